"""What tests share: the text data if it is at hand, and tiny random checkpoints."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import runpy
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from torch import Tensor

# Read once, when torch and huggingface_hub are first imported; xdist runs one process a core.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}

# So that a test reads the text data only if it asks for ``data_dir``; under a name that other workers also see.
if _given := os.environ.pop("LRC_DATA_DIR", None):
    os.environ["LRC_TEST_DATA_DIR"] = _given

COMMON = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": 256}  # as the byte tokenizer has it


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest test first, so that the other worker has something to do beside it."""
    items.sort(key=lambda item: item.path.name != "test_golden.py")


@pytest.fixture(scope="module", autouse=True)
def imports_without_collections() -> None:
    """Exclude what is alive before a file, mostly imports, from garbage collections: it takes most of their time."""
    gc.collect()
    gc.freeze()


class TinyCheckpoint(Protocol):
    """Writes a new checkpoint folder of a family; keywords override its config."""

    def __call__(self, family: str, *, seed: int = 0, **config: Any) -> Path: ...


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of text data: LRC_DATA_DIR, or shared/data beside the repository."""
    folder = Path(os.environ.get("LRC_TEST_DATA_DIR") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no text data: {folder} is not a folder; set LRC_DATA_DIR")
    return folder


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> TinyCheckpoint:
    """Makes float32 checkpoints of 2 layers, 32 wide, 4 heads (llama: 2 of keys), 256 bytes as vocabulary."""
    return _checkpoints_in(tmp_path)


@pytest.fixture(scope="module")
def shared_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    """The same for the tests of a whole file, which must leave them as they are."""
    return _checkpoints_in(tmp_path_factory.mktemp("shared"))


def _checkpoints_in(parent: Path) -> TinyCheckpoint:
    numbers = count()

    def make(family: str, *, seed: int = 0, **config: Any) -> Path:
        from lrc.families import families

        folder = parent / f"{family}-{next(numbers)}"
        save_random_model(folder, family, seed, config)
        save_byte_tokenizer(folder, starts=families()[family].starts_texts)
        return folder

    return make


@pytest.fixture
def without_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the page, the domains and the answers of outputs: most of the time of a small compression."""
    _leave_out_pages(monkeypatch)


@pytest.fixture(scope="module")
def module_without_pages() -> Iterator[None]:
    """The same for the tests of a whole file."""
    with pytest.MonkeyPatch.context() as patch:
        _leave_out_pages(patch)
        yield


def _leave_out_pages(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("lrc.verbs.compress.html_page", lambda report, others: "")
    patch.setattr("lrc.verbs.cost.domain_passages", lambda *given: ([], []))
    patch.setattr("lrc.verbs.cost.write_answers", lambda *models: None)


@pytest.fixture
def tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenize each text once for a tokenizer: of the built-in texts each takes a second, in every compression."""
    from lrc.text.blocks import tokenize

    known: dict[Any, Tensor] = {}

    def once(tokenizer: Any, text: str, rows: int | None = None, first: int | None = None) -> Tensor:
        key = tokenizer.backend_tokenizer.to_str(), text, rows, first
        if key not in known:
            known[key] = tokenize(tokenizer, text, rows, first)
        return known[key].clone()

    monkeypatch.setattr("lrc.text.encoding.tokenize", once)
    monkeypatch.setattr("lrc.evaluation.passage.tokenize", once)


@pytest.fixture
def few_known_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave lm-evaluation-harness the tasks of ARC alone: indexing its ten thousand files takes 20 s."""
    from lm_eval.tasks import manager

    shutil.copytree(Path(manager.__file__).with_name("arc"), tmp_path / "harness" / "arc")
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "harness" / "manager.py"))


@pytest.fixture
def blocks() -> Tensor:
    """Four blocks of 32 random ids."""
    import torch

    return torch.randint(1, 256, (4, 32), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def linear_inputs(blocks: Tensor) -> Callable[[Path], dict[str, Tensor]]:
    """Gives the inputs (tokens, width) of every projection of a model by its path, from the model's own forward."""
    return lambda folder: _linear_inputs(folder, blocks)


def _linear_inputs(folder: Path, blocks: Tensor) -> dict[str, Tensor]:
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            module.register_forward_hook(
                lambda module, args, out, name=name: seen.setdefault(name, []).append(args[0].flatten(0, 1))
            )
    with torch.no_grad():
        model(input_ids=blocks, use_cache=False)
    return {name: torch.cat(found).double() for name, found in seen.items()}


Runs = Callable[[], "dict[tuple[int, bool], int]"]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Gives, and forgets, how many blocks have gone through each layer, and of those the ones to be differentiated."""
    from lrc.walk.stream import ModelStream

    counted: dict[tuple[int, bool], int] = {}
    run = ModelStream.run

    def count(self: Any, layer: Any, index: int, batch: Any, hidden: Tensor, **options: Any) -> Tensor:
        key = index, options.get("grad", False)
        counted[key] = counted.get(key, 0) + len(hidden)
        return run(self, layer, index, batch, hidden, **options)

    def taken() -> dict[tuple[int, bool], int]:
        found = dict(counted)
        counted.clear()
        return found

    monkeypatch.setattr(ModelStream, "run", count)
    return taken


@dataclass(frozen=True)
class Ended:
    """How one of several processes ended: its exit code, what it printed, and what its function returned."""

    code: int
    out: str
    err: str
    value: Any


class Together(Protocol):
    """Runs a function of a test file in ``size`` processes at once in a folder, as a launcher starts them."""

    def __call__(
        self, function: Callable[..., Any], *args: Any, size: int = 2, cwd: Path | None = None
    ) -> list[Ended]: ...


@pytest.fixture
def together(tmp_path: Path) -> Together:
    """Forks processes from one that has imported everything once, and has run nothing of torch itself."""
    context = multiprocessing.get_context("forkserver")
    used = ("models.llama.modeling_llama", "models.gpt2.modeling_gpt2", "models.auto.tokenization_auto")
    context.set_forkserver_preload(
        [
            "lrc.verbs.compress",
            "lrc.cli",
            "lrc.report.tables",
            "datasets",
            *(f"transformers.{name}" for name in used),
        ]
    )
    numbers = count()

    def run(function: Callable[..., Any], *args: Any, size: int = 2, cwd: Path | None = None) -> list[Ended]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        number = next(numbers)
        kept = [tmp_path / f"together-{number}-{rank}" for rank in range(size)]
        started = []
        for rank in range(size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            job = {
                "environment": environment,
                "folder": str(cwd or tmp_path),
                "kept": str(kept[rank]),
                "file": function.__code__.co_filename,
                "function": function.__name__,
                "args": args,
            }
            script = str(Path(__file__).with_name("one_of_several.py"))
            process = context.Process(target=runpy.run_path, args=(script, {"JOB": job}))
            process.start()
            started.append(process)
        return [_ended(process, here) for process, here in zip(started, kept, strict=True)]

    return run


def _ended(process: Any, kept: Path) -> Ended:
    process.join(120)
    assert process.exitcode is not None, f"{kept.name} hangs"
    out, err = (kept.with_name(f"{kept.name}.{name}").read_text(encoding="utf-8") for name in ("out", "err"))
    returned = kept.with_name(f"{kept.name}.pickle")
    value = pickle.loads(returned.read_bytes()) if returned.exists() else None
    return Ended(process.exitcode, out, err, value)


def save_random_model(folder: Path, family: str, seed: int, config: dict[str, Any]) -> None:
    """Save a model whose every parameter is random: biases not zero, norms not one, attention not uniform."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lrc.families import families

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = {**families()[family].tiny, **COMMON, **config}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                around = 1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0
                parameter.normal_(around, 0.2)
    model.save_pretrained(folder)


def save_byte_tokenizer(folder: Path, *, starts: bool = False) -> None:
    """Save a tokenizer whose ids are bytes, in the order of the byte-level alphabet; id 0 ends a text.

    ``starts``: it also starts one, as its BOS token.
    """
    from family_models import byte_tokenizer

    byte_tokenizer(starts=starts).save_pretrained(folder)
