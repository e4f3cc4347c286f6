"""Damages small checkpoints as real ones are damaged; lrc must compress the model that transformers loads, or refuse.

    python scripts/fuzz_checkpoints.py                          # 200 checkpoints, about five minutes on two cores
    python scripts/fuzz_checkpoints.py --cases 20 --seed 7      # others
    python scripts/fuzz_checkpoints.py --only 17 --keep-folders # one of them again, left in a folder to look at

Every checkpoint is a tiny random model with one to three faults. A case fails if lrc raises anything but UserError; if
the output of ``keep: 1`` has other logits than ``AutoModelForCausalLM.from_pretrained`` gives for the source; if lrc
compresses what transformers fills with random numbers or cannot load; if a tensor is left out without a warning; if
``lrc.json`` or ``report.json`` is not strict JSON; or if ``lrc compress`` refuses what ``lrc check`` accepts, though
headers and config show it. Prints a Markdown table; exit code 1 if any case fails.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.utils import logging as transformers_logging

import lrc
from lrc.errors import UserError
from lrc.hub.names import ASSETS

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
RUN = lrc.Run(device="cpu", dtype="float32")
PLAN = "{keep: 1.0, method: svd, calibration: {samples: 2, seq_len: 32, data: builtin}}"
VOCAB = 4096  # of the built-in tokenizer
Random = random.Random


@dataclass(frozen=True)
class Fault:
    """A way to damage a checkpoint; ``hidden``: headers and config do not show it, so ``lrc check`` need not refuse."""

    name: str
    apply: Callable[[Path, Random], None]
    hidden: bool


FAULTS: list[Fault] = []


def fault(hidden: bool = False) -> Callable[[Callable[[Path, Random], None]], Callable[[Path, Random], None]]:
    def register(apply: Callable[[Path, Random], None]) -> Callable[[Path, Random], None]:
        FAULTS.append(Fault(apply.__name__, apply, hidden))
        return apply

    return register


# The checkpoint before it is damaged.


def make(folder: Path, rng: Random) -> None:
    """Save a tiny random Llama or GPT-2 with the built-in tokenizer."""
    tied, dtype = rng.random() < 0.5, rng.choice([torch.float32, torch.float16, torch.bfloat16])
    config: Any
    if rng.random() < 0.7:
        config = LlamaConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=rng.choice([2, 4]),
            vocab_size=VOCAB,
            max_position_embeddings=64,
            attention_bias=rng.random() < 0.3,
            mlp_bias=rng.random() < 0.2,
            tie_word_embeddings=tied,
        )
        tokenizer = ASSETS / "tiny-llama"
    else:
        config = GPT2Config(
            n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=VOCAB, tie_word_embeddings=tied
        )
        tokenizer = ASSETS / "tiny-gpt2"
    torch.manual_seed(rng.randrange(2**31))
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    for parameter in model.parameters():  # biases and norms too, so that a lost one changes the logits
        parameter.data += torch.randn_like(parameter) * 0.05
    model.save_pretrained(folder)
    for pattern in ("tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt"):
        for file in tokenizer.glob(pattern):
            shutil.copy(file, folder)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(config, dict):
        path.write_text(json.dumps(config | changes), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of the single file, or of the first shard."""
    file = next(iter(sorted(folder.glob("model*.safetensors"))), None)
    if file is None:
        return
    tensors = load_file(file)
    change(tensors)
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, file, metadata={"format": "pt"})


def pick(tensors: dict[str, Tensor], rng: Random) -> str:
    return rng.choice(sorted(tensors))


def embedding(tensors: dict[str, Tensor]) -> str:
    return next(name for name in tensors if name.endswith(("embed_tokens.weight", "wte.weight")))


def shard(folder: Path, remove_whole: bool, rng: Random) -> None:
    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    rng.shuffle(names)
    half = len(names) // 2
    weight_map = {}
    for number, group in enumerate((names[:half], names[half:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in group}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(group, file)
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (folder / INDEX).write_text(text, encoding="utf-8")
    if remove_whole:
        (folder / WEIGHTS).unlink()


# Faults of the config.


@fault()
def no_quantization(folder: Path, rng: Random) -> None:
    edit_config(folder, quantization_config=None)


@fault()
def strange_quantization(folder: Path, rng: Random) -> None:
    edit_config(
        folder, quantization_config=rng.choice([{}, {"quant_method": "gptq", "bits": 4}, "int8", 4, []])
    )


@fault()
def other_number(folder: Path, rng: Random) -> None:
    keys = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    keys += ["num_key_value_heads", "n_embd", "n_layer", "n_head", "n_inner", "n_positions", "head_dim"]
    present = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    key = rng.choice([each for each in keys if each in present] or keys)
    number = present.get(key)
    changed = [0, 1, -1, 3, 10**6]
    if isinstance(number, int):
        changed += [number * 2, number + 1, number - 1, number // 2]
    edit_config(folder, **{key: rng.choice(changed)})


@fault()
def other_type(folder: Path, rng: Random) -> None:
    present = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    key = rng.choice(sorted(present))
    edit_config(folder, **{key: rng.choice([None, "thirty", [], {}, [1, 2], 1.5, True, -1])})


@fault()
def key_missing(folder: Path, rng: Random) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop(rng.choice(sorted(config)))
    path.write_text(json.dumps(config), encoding="utf-8")


@fault()
def tie_flipped(folder: Path, rng: Random) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    edit_config(folder, tie_word_embeddings=not config.get("tie_word_embeddings", True))


@fault()
def biases_flipped(folder: Path, rng: Random) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    key = rng.choice(["attention_bias", "mlp_bias"])
    edit_config(folder, **{key: not config.get(key, False)})


@fault()
def other_architecture(folder: Path, rng: Random) -> None:
    edit_config(
        folder,
        architectures=rng.choice(
            [None, [], ["LlamaForSequenceClassification"], ["LlamaModel"], "LlamaForCausalLM"]
        ),
    )


@fault()
def other_family(folder: Path, rng: Random) -> None:
    edit_config(folder, model_type=rng.choice(["gpt2", "llama", "lama", None, 3, "bert"]))


@fault()
def rotary(folder: Path, rng: Random) -> None:
    edit_config(
        folder,
        rope_scaling=rng.choice([None, {"rope_type": "linear", "factor": 2.0}, {"rope_type": "spiral"}, "x"]),
    )


@fault()
def config_text(folder: Path, rng: Random) -> None:
    path = folder / "config.json"
    text = path.read_text(encoding="utf-8")
    broken = [
        text[: len(text) // 2].encode(),
        b"[1, 2]",
        b"",
        b"null",
        text.encode("utf-16"),
        b"\xff\xfe\x00",
    ]
    broken += [b"\xef\xbb\xbf" + text.encode(), b'"llama"', text.replace("}", ', "x": NaN}', 1).encode()]
    path.write_bytes(rng.choice(broken))


# Faults of names and ties.


@fault()
def head_again(folder: Path, rng: Random) -> None:
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t[embedding(t)].clone()}))


@fault()
def head_differs(folder: Path, rng: Random) -> None:
    edit_weights(folder, lambda t: t.update({"lm_head.weight": torch.randn_like(t[embedding(t)]) * 0.1}))


@fault()
def head_instead_of_embedding(folder: Path, rng: Random) -> None:
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t.pop(embedding(t))}))


@fault()
def tensor_missing(folder: Path, rng: Random) -> None:
    edit_weights(folder, lambda t: t.pop(pick(t, rng)))


@fault()
def tensor_extra(folder: Path, rng: Random) -> None:
    names = ["extra.weight", "model.layers.7.mlp.up_proj.weight", "transformer.h.0.attn.bias", "score.weight"]
    names += [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "lm_head.bias",
        "model.layers.0.self_attn.q_proj.scale",
    ]
    shape = rng.choice([(3, 3), (32,), (), (0, 4)])
    edit_weights(folder, lambda t: t.update({rng.choice(names): torch.ones(shape)}))


@fault()
def no_prefix(folder: Path, rng: Random) -> None:
    def strip(t: dict[str, Tensor]) -> None:
        for name in list(t):
            t[name.removeprefix("model.").removeprefix("transformer.")] = t.pop(name)

    edit_weights(folder, strip)


@fault()
def prefix_of_a_wrapper(folder: Path, rng: Random) -> None:
    prefix = rng.choice(["model.", "module.", "base_model.model.", "language_model.", "transformer."])

    def add(t: dict[str, Tensor]) -> None:
        for name in list(t):
            t[prefix + name] = t.pop(name)

    edit_weights(folder, add)


@fault()
def one_name_changed(folder: Path, rng: Random) -> None:
    def change(t: dict[str, Tensor]) -> None:
        name = pick(t, rng)
        t[rng.choice([name + "_", name.upper(), name.replace("weight", "gamma"), "x." + name])] = t.pop(name)

    edit_weights(folder, change)


# Faults of values, shapes and precision.


@fault()
def other_shape(folder: Path, rng: Random) -> None:
    def change(t: dict[str, Tensor]) -> None:
        name = pick(t, rng)
        x = t[name]
        t[name] = rng.choice([x.T if x.ndim == 2 else x[:-1], x[:-1], x[None], x.flatten()[:7], x[:0]])

    edit_weights(folder, change)


@fault()
def other_precision(folder: Path, rng: Random) -> None:
    dtypes = [
        torch.float16,
        torch.bfloat16,
        torch.float64,
        torch.float32,
        torch.int8,
        torch.bool,
        torch.float8_e4m3fn,
    ]

    def change(t: dict[str, Tensor]) -> None:
        name = pick(t, rng)
        t[name] = t[name].to(rng.choice(dtypes))

    edit_weights(folder, change)


@fault(hidden=True)
def not_finite(folder: Path, rng: Random) -> None:
    def change(t: dict[str, Tensor]) -> None:
        name = pick(t, rng)
        if t[name].is_floating_point() and t[name].numel():
            t[name].view(-1)[rng.randrange(t[name].numel())] = rng.choice(
                [float("nan"), float("inf"), -float("inf")]
            )

    edit_weights(folder, change)


@fault(hidden=True)
def huge(folder: Path, rng: Random) -> None:
    def change(t: dict[str, Tensor]) -> None:
        name = pick(t, rng)
        if t[name].is_floating_point():
            t[name] = t[name].float() * 10.0 ** rng.choice([18, 30, 36])

    edit_weights(folder, change)


@fault(hidden=True)
def zeros(folder: Path, rng: Random) -> None:
    edit_weights(folder, lambda t: t[pick(t, rng)].zero_())


# Faults of files.


@fault()
def sharded(folder: Path, rng: Random) -> None:
    if (folder / WEIGHTS).exists():
        shard(folder, True, rng)


@fault()
def stale_index(folder: Path, rng: Random) -> None:
    """An index that stays behind: of shards with other values, or of shards that are gone."""
    if not (folder / WEIGHTS).exists():
        return
    shard(folder, False, rng)
    if rng.random() < 0.5:
        edit = {name: torch.randn_like(t.float()) for name, t in load_file(folder / WEIGHTS).items()}
        save_file(edit, folder / WEIGHTS, metadata={"format": "pt"})
    else:
        for file in folder.glob("model-0*.safetensors"):
            file.unlink()


@fault()
def index_disagrees(folder: Path, rng: Random) -> None:
    if not (folder / INDEX).exists():
        sharded(folder, rng)
    if not (folder / INDEX).exists():
        return
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    weight_map, first = index["weight_map"], min(index["weight_map"])
    changed: list[Any] = [
        {
            **index,
            "weight_map": {k: v for k, v in weight_map.items() if k != first},
        },  # the file holds one more
        {**index, "weight_map": {**weight_map, "ghost.weight": weight_map[first]}},
        {**index, "weight_map": {**weight_map, first: "gone.safetensors"}},
        {**index, "weight_map": {**weight_map, first: 3}},
        {**index, "weight_map": {**weight_map, first: "../outside.safetensors"}},
        {**index, "weight_map": list(weight_map)},
        {**index, "weight_map": {}},
        {"weight_map": weight_map},
        {"metadata": {}},
        [],
    ]
    (folder / INDEX).write_text(json.dumps(rng.choice(changed)), encoding="utf-8")


@fault()
def twice_in_two_shards(folder: Path, rng: Random) -> None:
    sharded(folder, rng)
    files = sorted(folder.glob("model-0*.safetensors"))
    if len(files) == 2:
        one, two = map(load_file, files)
        one |= {name: torch.randn_like(t.float()) for name, t in list(two.items())[:2]}
        save_file(one, files[0], metadata={"format": "pt"})


@fault()
def cut_short(folder: Path, rng: Random) -> None:
    file = rng.choice(sorted(folder.glob("model*.safetensors")) or [folder / "config.json"])
    data = file.read_bytes()
    file.write_bytes(data[: rng.choice([0, 4, 8, 100, len(data) // 2, max(0, len(data) - 1)])])


@fault()
def header_damaged(folder: Path, rng: Random) -> None:
    file = rng.choice(sorted(folder.glob("model*.safetensors")) or [folder / "config.json"])
    data = bytearray(file.read_bytes())
    for _ in range(3):
        place = rng.randrange(8, 200) if len(data) > 208 else 0
        if data:
            data[place] = rng.randrange(256)
    file.write_bytes(bytes(data))


@fault()
def pickled_beside(folder: Path, rng: Random) -> None:
    if (folder / WEIGHTS).exists():
        other = {name: torch.randn_like(t.float()) for name, t in load_file(folder / WEIGHTS).items()}
        torch.save(other, folder / "pytorch_model.bin")


@fault()
def named_weights(folder: Path, rng: Random) -> None:
    """A config that names its file of weights."""
    if (folder / WEIGHTS).exists():
        other = {name: torch.randn_like(t.float()) for name, t in load_file(folder / WEIGHTS).items()}
        save_file(other, folder / "other.safetensors", metadata={"format": "pt"})
        edit_config(
            folder,
            transformers_weights=rng.choice(["other.safetensors", "gone.safetensors", "../x.safetensors", 5]),
        )


# Faults of the tokenizer and of the files beside.


@fault(hidden=True)
def large_tokens(folder: Path, rng: Random) -> None:
    """An embedding with fewer rows than the tokenizer has ids."""
    rows = rng.choice([100, 1000, VOCAB - 1])

    def change(t: dict[str, Tensor]) -> None:
        for name in list(t):
            if t[name].shape[:1] == (VOCAB,):
                t[name] = t[name][:rows]

    edit_weights(folder, change)
    edit_config(folder, vocab_size=rows)


@fault()
def tokenizer_damaged(folder: Path, rng: Random) -> None:
    file = folder / rng.choice(["tokenizer.json", "tokenizer_config.json"])
    rng.choice(
        [lambda: file.unlink(missing_ok=True), lambda: file.write_text("{"), lambda: file.write_text("[]")]
    )()


@fault()
def generation_config_damaged(folder: Path, rng: Random) -> None:
    (folder / "generation_config.json").write_text(rng.choice(["{", "[]", "{}", '{"max_length": "x"}']))


# What must come out.


def reference(folder: Path, ids: Tensor) -> tuple[Tensor | None, list[str]]:
    """Return the logits that transformers gives, None if it loads no whole model, and the tensors it leaves out."""
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True
        )
        model, info = loaded
        if info["missing_keys"] or info["mismatched_keys"]:
            return None, []
        with torch.no_grad():
            return model(input_ids=ids).logits, sorted(info["unexpected_keys"])
    except Exception:  # anything: transformers raises what it meets
        return None, []


def strict(path: Path) -> None:
    def refuse(text: str) -> None:
        raise ValueError(f"{path.name} has {text}, which is no JSON")

    json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def try_case(folder: Path, faults: list[Fault]) -> tuple[str, str]:
    """Return a verdict (``same``, ``refused`` or ``FAILED``) and the reason."""
    ids = torch.arange(2, 22)[None]
    expected, left_out = reference(folder, ids)
    out = folder.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    refused = ""
    try:
        lrc.check(folder, PLAN, run=RUN)
    except UserError as error:
        refused = str(error)
    try:
        report = lrc.compress(folder, PLAN, out=out, ppl=[], run=RUN)
    except UserError as error:
        message = " ".join(str(error).split())
        if out.exists():
            return "FAILED", f"refused, but wrote {out.name}: {message}"
        if not refused and not any(each.hidden for each in faults):
            return "FAILED", f"check accepts it, compress says: {message}"
        if expected is not None and not faults:
            return "FAILED", f"a sound checkpoint is refused: {message}"
        return ("stricter" if expected is not None else "refused"), message
    if refused:
        return "FAILED", f"compress accepts it, check says: {refused}"
    for name in ("lrc.json", "report.json", "config.json"):
        strict(out / name)
    if expected is None:
        return "FAILED", "compressed, but transformers loads no whole model from the source"
    silent = [name for name in left_out if not any(name in warning for warning in report.warnings)]
    if silent:
        return "FAILED", f"left out without a warning: {', '.join(silent)}"
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(input_ids=ids).logits
    if not expected.isfinite().all():
        return "FAILED", "compressed, though the source gives logits that are not finite"
    error = float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not error < 1e-3:
        return "FAILED", f"other logits than the source: largest difference {error:.3g} of the largest logit"
    return "same", f"logits differ by {error:.1e} of the largest"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="run these cases alone")
    parser.add_argument(
        "--keep-folders", action="store_true", help="leave the checkpoints in the working folder"
    )
    arguments = parser.parse_args()
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    started, verdicts, work = time.perf_counter(), Counter[str](), Path(tempfile.mkdtemp())
    print("| case | faults | verdict | what was said |\n|---|---|---|---|")
    for number in arguments.only or range(arguments.cases):
        rng = Random(f"{arguments.seed} {number}")
        folder = work / str(number) / "model"
        make(folder, rng)
        faults = rng.sample(FAULTS, rng.choice([0, 1, 1, 1, 1, 2, 2, 3]))
        for each in faults:
            try:
                each.apply(folder, rng)
            except (ValueError, KeyError, StopIteration, AttributeError, OSError, TypeError, RuntimeError):
                continue  # an earlier fault left nothing for this one to damage
            except Exception as error:
                if type(error).__name__ != "SafetensorError":
                    raise
        try:
            verdict, reason = try_case(folder, faults)
        except Exception:
            verdict, reason = "FAILED", " ".join(traceback.format_exc().strip().splitlines()[-3:])
        verdicts[verdict] += 1
        names = ", ".join(each.name for each in faults) or "none"
        reason = reason.replace(str(work), "").replace("|", "\\|")
        print(f"| {number} | {names} | {verdict} | {reason} |", flush=True)
        if not arguments.keep_folders:
            shutil.rmtree(folder.parent)
    print(f"\n{dict(verdicts)} in {time.perf_counter() - started:.0f} s", flush=True)
    if arguments.keep_folders:
        print(f"the folders are in {work}")
    else:
        shutil.rmtree(work)
    sys.exit(1 if verdicts["FAILED"] else 0)


if __name__ == "__main__":
    main()
