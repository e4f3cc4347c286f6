"""Seconds, memory and tokens a second at the shape of a real model, with random weights, on one GPU or several.

    python scripts/speed.py compress llama-7b --data data/wikitext2-raw/train.txt     # whole commands, a row each
    python scripts/speed.py compress llama-70b --layers 3 --data data/wikitext2-raw/train.txt
    python scripts/speed.py compress llama-7b --ways "a3,a3 on 2 processes" --data data/wikitext2-raw/train.txt
    python scripts/speed.py evaluate llama-7b --data data/wikitext2-raw/valid.txt     # beside a bare forward loop
    python scripts/speed.py profile llama-7b --data data/wikitext2-raw/train.txt      # kernels, stage by stage
    OMP_NUM_THREADS=1 python scripts/speed.py read llama-7b --layers 6                # layers to pinned memory

A row of ``compress`` is one ``lrc compress`` in a process of its own: its wall time from start to exit, the stages and
the peak of its report, and what ``lrc check`` estimates. The checkpoint was just written and is in the page cache,
unless ``--cold`` drops it before every row.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
import yaml

KEEP = 0.8
STAGES = ("load", "gradients", "embed", "observe", "solve", "measure", "refit", "write", "scale")
PROFILED = 2  # layers
_SPAN = "lrc: "
# What a3 is without gradients of the loss.
PLAIN = {
    "qk": {"metric": "attention"},
    "ov": {"metric": "output", "subspace": "stacked"},
    "mlp": {"metric": "output"},
}


@dataclass(frozen=True)
class Way:
    """One way to run a compression: what the plan says besides its size, options of the command, processes."""

    plan: dict[str, Any] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    processes: int = 1


WAYS = {
    "a3": Way(),
    "a3, states on the host": Way(options=("--offload", "host")),
    "a3 without gradients": Way({"components": PLAIN}),
    "a3 without gradients, states on the host": Way({"components": PLAIN}, ("--offload", "host")),
    "a3 on 2 processes": Way(processes=2),
    "a3 without gradients on 2 processes": Way({"components": PLAIN}, processes=2),
}

Shape = Annotated[str, typer.Argument(help="A shape of scripts/random_checkpoint.py.")]
Data = Annotated[str, typer.Option(help="Text of the calibration or the evaluation.")]
Layers = Annotated[int | None, typer.Option(help="As many layers instead of all.")]
Samples = Annotated[int, typer.Option(help="Calibration blocks.")]
SeqLen = Annotated[int, typer.Option(help="Tokens of a block or window.")]
Work = Annotated[Path | None, typer.Option(help="Folder for checkpoints; kept, and used again.")]
Device = Annotated[str, typer.Option(help="cuda, or cpu to try the script.")]

app = typer.Typer(add_completion=False)


@app.command()
def compress(
    shape: Shape,
    data: Data = "builtin",
    layers: Layers = None,
    ways: Annotated[str | None, typer.Option(help="Rows, a comma and no space between.")] = None,
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    cold: Annotated[
        bool, typer.Option(help="Drop the checkpoint from the page cache before each row.")
    ] = False,
    work: Work = None,
    device: Device = "cuda",
) -> None:
    """Whole compressions, one after another, as a table."""
    names = [name for name, way in WAYS.items() if way.processes == 1] if ways is None else _names(ways)
    head = ["run", "wall", "stages", *STAGES, "GPU peak", "estimate", "SHA-256 of the weights"]
    typer.echo(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    with _checkpoint(shape, layers, work, device) as model:
        for name in names:
            typer.echo(f"| {' | '.join(_compress(name, model, data, samples, seq_len, cold, device))} |")


@app.command()
def evaluate(
    shape: Shape,
    data: Data = "builtin",
    layers: Layers = None,
    windows: Annotated[int, typer.Option(help="Windows that are scored.")] = 64,
    seq_len: SeqLen = 2048,
    repeats: Annotated[int, typer.Option(help="Interleaved pairs, of which the medians count.")] = 5,
    work: Work = None,
    device: Device = "cuda",
) -> None:
    """Tokens a second of the perplexity, against the same model going forward over the same batches and no more."""
    from transformers import AutoTokenizer

    import lrc
    from lrc.evaluation.passage import Passage
    from lrc.evaluation.perplexity import measure, window_losses
    from lrc.text.blocks import tokenize
    from lrc.text.source import read_text

    with _checkpoint(shape, layers, work, device) as folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = lrc.load(folder, device=device)
        ids = tokenize(tokenizer, read_text(data, "evaluation").text)[: windows * seq_len]
        cut = ids[: len(ids) // seq_len * seq_len].view(-1, seq_len)
        seen: list[int] = []
        window_losses(model, cut, progress=seen.append)  # warms up, and tells the batches

        @torch.no_grad()
        def bare() -> None:
            for batch in cut.to(model.device).split(seen[0]):
                model(input_ids=batch, use_cache=False)

        bare()
        both = [
            (_seconds(bare), _seconds(lambda: measure(model, Passage("ids", ids, cut))))
            for _ in range(repeats)
        ]
    forward, scored = (cut.numel() / statistics.median(times) for times in zip(*both, strict=True))
    spread = [max(times) / min(times) - 1 for times in zip(*both, strict=True)]
    typer.echo(f"bare forward {forward:,.0f} tokens/s (spread {spread[0]:.1%})")
    typer.echo(f"perplexity   {scored:,.0f} tokens/s (spread {spread[1]:.1%}): {scored / forward:.3f} of it")


@app.command()
def profile(
    shape: Shape,
    data: Data = "builtin",
    layers: Annotated[int, typer.Option(help="Layers of the model.")] = PROFILED,
    way: Annotated[str, typer.Option(help="A row of `compress`.")] = "a3",
    samples: Samples = 128,
    seq_len: SeqLen = 2048,
    rows: Annotated[int, typer.Option(help="Kernels shown for each stage.")] = 8,
    work: Work = None,
    device: Device = "cuda",
) -> None:
    """What the device does in each stage: seconds in which it is busy, and the kernels that take most of them."""
    import lrc
    import lrc.compression.solve
    from lrc.run.stopwatch import Stopwatch

    activity = torch.profiler.ProfilerActivity
    plan = _plan(WAYS[_names(way)[0]], data, samples, seq_len)
    timed, solved = Stopwatch.stage, lrc.compression.solve.solve

    @contextmanager
    def stage(self: Stopwatch, name: str) -> Iterator[None]:
        with timed(self, name), _span(name):
            yield

    def solve(problem: Any, assignment: Any) -> Any:
        with _span(f"solve {assignment.target}"):
            return solved(problem, assignment)

    with _checkpoint(shape, layers, work, device) as model, tempfile.TemporaryDirectory() as scratch:
        (written := Path(scratch) / "plan.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
        options: dict[str, Any] = {"plan": str(written), "ppl": [], "run": lrc.Run(device=device)}
        lrc.compress(str(model), out=Path(scratch) / "warm", **options)
        Stopwatch.stage, lrc.compression.solve.solve = stage, solve  # type: ignore[method-assign]
        kinds = [activity.CPU] if device == "cpu" else [activity.CPU, activity.CUDA]
        with torch.profiler.profile(activities=kinds) as profiler:
            lrc.compress(str(model), out=Path(scratch) / "out", **options)
    _show_kernels(profiler, rows)


@app.command()
def read(shape: Shape, layers: Layers = None, work: Work = None, device: Device = "cuda") -> None:
    """Bytes a second of layers on their way from the page cache to pinned memory, checked, in two passes over them."""
    from lrc.checkpoint.reader import CheckpointReader
    from lrc.walk.stream import ModelStream

    with _checkpoint(shape, layers, work, device) as folder:
        stream = ModelStream(CheckpointReader(folder), torch.device(device), torch.bfloat16)
        for number in range(2):
            speeds = []
            for index in range(len(stream.skeletons)):
                start = time.perf_counter()
                size = sum(tensor.nbytes for tensor in stream.read(index).values())
                speeds.append(size / 1e9 / (time.perf_counter() - start))
            typer.echo(f"pass {number + 1}: {' '.join(f'{speed:.1f}' for speed in speeds)} GB/s")


@contextmanager
def _span(name: str) -> Iterator[None]:
    """A named stretch of the profile, to its end on the device."""
    with torch.profiler.record_function(f"{_SPAN}{name}"):
        yield
        _wait()


def _show_kernels(profiler: torch.profiler.profile, rows: int) -> None:
    """Kernels by the innermost span in which they ran."""
    events = profiler.events() or []
    spans = [e for e in events if e.name.startswith(_SPAN) and not _on_gpu(e)]
    spans.sort(key=lambda span: span.time_range.elapsed_us())
    seconds, kernels, counts = (
        Counter[str](),
        defaultdict[str, Counter[str]](Counter),
        Counter[tuple[str, str]](),
    )
    for span in spans:
        seconds[span.name] += span.time_range.elapsed_us() / 1e6
    for event in events:
        if not _on_gpu(event) or event.name.startswith(_SPAN):
            continue
        start = event.time_range.start
        span = next((s for s in spans if s.time_range.start <= start < s.time_range.end), None)
        if span is not None:
            kernels[span.name][event.name] += event.time_range.elapsed_us() / 1e6
            counts[span.name, event.name] += 1
    for name, found in kernels.items():
        label = name.removeprefix(_SPAN)
        typer.echo(f"\n{label}: {seconds[name]:.2f} s, {sum(found.values()):.2f} s of kernels")
        for kernel, took in found.most_common(rows):
            typer.echo(f"  {took:8.3f} s {counts[name, kernel]:7d} x  {kernel[:100]}")


def _on_gpu(event: Any) -> bool:
    return str(event.device_type).endswith("CUDA")


def _names(ways: str) -> list[str]:
    """Names of ways; one may have a comma and a space in it."""
    names = [name.replace("\0", ", ") for name in ways.replace(", ", "\0").split(",")]
    if unknown := [name for name in names if name not in WAYS]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of: {'; '.join(WAYS)}")
    return names


def _plan(way: Way, data: str, samples: int, seq_len: int) -> dict[str, Any]:
    calibration = {"data": data, "samples": samples, "seq_len": seq_len}
    return {"format": 1, "keep": KEEP, "method": "a3", **way.plan, "calibration": calibration}


def _compress(
    name: str, model: Path, data: str, samples: int, seq_len: int, cold: bool, device: str
) -> list[str]:
    """The cells of one whole command: its wall time and what its report says."""
    import lrc

    way = WAYS[name]
    launcher = (
        ["-m", "torch.distributed.run", "--nproc-per-node", str(way.processes)] if way.processes > 1 else []
    )
    with tempfile.TemporaryDirectory(dir=model.parent) as scratch:
        (plan := Path(scratch) / "plan.yaml").write_text(
            yaml.safe_dump(_plan(way, data, samples, seq_len)), encoding="utf-8"
        )
        checked = lrc.check(model, plan)
        if cold:
            _drop(model)
        out = Path(scratch) / "out"
        options = ["--out", str(out), "--no-eval", "--device", device, *way.options]
        start = time.perf_counter()
        report = _json(
            [*launcher, "-m", "lrc", "compress", str(model), "--plan", str(plan), "--json", *options]
        )
        wall = time.perf_counter() - start
        manifest = json.loads((out / "lrc.json").read_text(encoding="utf-8"))
    estimated = checked.least_memory if "--offload" in way.options else checked.memory
    took = report["seconds"]
    weights = json.dumps(manifest["sha256"]["tensors"], sort_keys=True)
    memory = report["peak_bytes"].get("device", 0), estimated.peak
    return [
        name,
        f"{wall:.1f}",
        f"{sum(took.values()):.1f}",
        *(f"{took.get(stage, 0):.1f}" for stage in STAGES),
        *(f"{held / 2**30:.1f} GiB" for held in memory),
        hashlib.sha256(weights.encode()).hexdigest()[:8],
    ]


def _json(command: list[str]) -> dict[str, Any]:
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


@contextmanager
def _checkpoint(shape: str, layers: int | None, work: Path | None, device: str) -> Iterator[Path]:
    """A folder with a random model of the shape, written once where there is a folder for work."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = (work or Path(scratch)) / (shape if layers is None else f"{shape}-{layers}-layers")
        if not folder.exists():
            maker = [str(Path(__file__).with_name("random_checkpoint.py")), shape, "--out", str(folder)]
            size = [] if layers is None else ["--layers", str(layers)]
            subprocess.run(
                [sys.executable, *maker, *size, "--device", device], check=True, stdout=sys.stderr.fileno()
            )
        yield folder


def _drop(folder: Path) -> None:
    """Have the next reader of a folder's files wait for the disk."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def _seconds(work: Any) -> float:
    """Seconds of a call, the device's queue drained before and after."""
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    app()
