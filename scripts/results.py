"""The README's results: one model, every method, calibration and evaluation on real text, as Markdown.

    python scripts/results.py table smollm2-135m-instruct --data-dir data     # perplexity by size, the field beside
    python scripts/results.py effects smollm2-135m-instruct --data-dir data   # what every option is worth

Every figure is that of a whole ``lrc compress``: the perplexity of the saved folder, loaded back, on WikiText-2's test
split and the first 96 windows of C4's validation split. Devices named with ``--devices`` work beside one another.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from statistics import mean, stdev
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

TEXTS = {"wikitext2:test": None, "c4:validation": 96}  # windows; None is all
MEASURED = (0.9, 0.8, 0.65, 0.5, 0.35, 0.2)

PUBLISHED = {
    "qk": {"metric": "score"},
    "ov": {"metric": "output", "subspace": "stacked", "refit": "none"},
    "mlp": {"metric": "output", "select": "score"},
}
BASELINES: dict[str, dict[str, Any]] = {
    "whitened_svd (SVD-LLM)": {"method": "whitened_svd", "refit": "none"},
    "a3 as published": {"method": "a3", "components": PUBLISHED, "refit": "none"},
}


def _a3(**components: dict[str, Any]) -> dict[str, Any]:
    return {"method": "a3", "components": components}


EFFECTS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd", "refit": "none"},
    "monarch": {"method": "monarch", "refit": "none"},
    **BASELINES,
    "two_sided_svd": {"method": "two_sided_svd", "refit": "none"},
    "a3 as published, without the MLP refit": {
        **_a3(**{**PUBLISHED, "mlp": {**PUBLISHED["mlp"], "refit": "none"}}),
        "refit": "none",
    },
    "a3": {"method": "a3"},
    "a3, refit: none": {"method": "a3", "refit": "none"},
    "a3, qk: {metric: score}": _a3(qk={"metric": "score"}),
    "a3, qk: {metric: loss}": _a3(qk={"metric": "loss"}),
    "a3, ov: {metric: output}": _a3(ov={"metric": "output"}),
    "a3, ov: {subspace: stacked}": _a3(ov={"subspace": "stacked"}),
    "a3, ov: {subspace: joint}": _a3(ov={"subspace": "joint"}),
    "a3, mlp: {metric: output}": _a3(mlp={"metric": "output"}),
    "a3, mlp: {select: obs}": _a3(mlp={"select": "obs"}),
    "two_sided_svd with residual refit": {"method": "two_sided_svd"},
}


@dataclass(frozen=True)
class Task:
    """Models made and measured: a plan at each of ``keeps``, or its sizes found first, in each of the ``steps``."""

    row: str
    plan: dict[str, Any]
    keeps: tuple[float, ...]
    allocate: str | None = None
    steps: tuple[int, ...] = (1,)
    seed: int = 0


@dataclass(frozen=True)
class Figure:
    """What came of a task at one keep: perplexity by text, seconds by stage, the peak in bytes."""

    row: str
    asked: float
    keep: float
    perplexity: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)
    peak: int = 0


Model = Annotated[str, typer.Argument(help="Folder or name of the model.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder with the texts.")]
Calib = Annotated[str, typer.Option(help="Calibration text, all blocks of it.")]
SeqLen = Annotated[int, typer.Option(help="Tokens of a calibration block.")]
Devices = Annotated[str | None, typer.Option(help="Such as cuda:0,cuda:1.")]
Samples = Annotated[str, typer.Option(help="Calibration blocks, or all.")]
GradientSamples = Annotated[int, typer.Option(help="Blocks that gradients are taken on.")]
MaxWindows = Annotated[int | None, typer.Option(help="Evaluation windows of each text.")]
Out = Annotated[Path | None, typer.Option(help="Also write the tables here.")]

app = typer.Typer(add_completion=False)


@app.command()
def table(
    model: Model,
    data_dir: DataDir = None,
    keeps: Annotated[str, typer.Option(help="Kept decoder weights.")] = "0.9,0.8,0.6,0.4",
    allocate: Annotated[str, typer.Option(help="Allocations, separated by commas.")] = "sensitivity",
    seeds: Annotated[int, typer.Option(help="Draws of gradient blocks and labels.")] = 3,
    calib: Calib = "wikitext2:train",
    samples: Samples = "all",
    gradient_samples: GradientSamples = 64,
    seq_len: SeqLen = 2048,
    max_windows: MaxWindows = None,
    devices: Devices = None,
    baselines: Annotated[bool, typer.Option(help="The field beside us.")] = True,
    out: Out = None,
) -> None:
    """Perplexity by kept weights: allocated sizes, rounded to 2 and 1 and to 8, beside the field at uniform sizes."""
    kept = tuple(float(keep) for keep in keeps.split(","))
    calibration = _calibration(calib, samples, gradient_samples, seq_len)
    tasks = [
        Task(f"a3, {name}", {"method": "a3"}, kept, name, (1, 8), seed)
        for name in allocate.split(",")
        for seed in range(seeds)
    ]
    if baselines:
        tasks += [Task(row, plan, (keep,)) for row, plan in BASELINES.items() for keep in kept]
    figures = _run(tasks, model, calibration, data_dir, max_windows, devices)
    rows = dict.fromkeys(figure.row for figure in figures if figure.row != "dense")
    lines = [
        f"| keep | {' | '.join(rows)} |",
        f"|---|{'---|' * len(rows)}",
        f"| 1 (dense) | {' | '.join([_perplexities([f for f in figures if f.row == 'dense'])] * len(rows))} |",
    ]
    for keep in kept:
        cells = [[f for f in figures if f.row == row and f.asked == keep] for row in rows]
        lines.append(f"| {keep:g} | {' | '.join(_perplexities(cell) for cell in cells)} |")
    lines += [
        "",
        f"Perplexity on {' / '.join(TEXTS)}, mean ± standard deviation over seeds where there are several.",
    ]
    lines += ["", *_stages([f for f in figures if f.row in rows])]
    _print(lines, out)


@app.command()
def effects(
    model: Model,
    data_dir: DataDir = None,
    keep: Annotated[float, typer.Option(help="Kept decoder weights.")] = 0.8,
    rows: Annotated[list[str] | None, typer.Option("--row", help="Only these rows.")] = None,
    calib: Calib = "wikitext2:train",
    samples: Samples = "all",
    gradient_samples: GradientSamples = 64,
    seq_len: SeqLen = 2048,
    max_windows: MaxWindows = None,
    devices: Devices = None,
    out: Out = None,
) -> None:
    """What each method and each option of a3 is worth at one size, uniform over the layers."""
    calibration = _calibration(calib, samples, gradient_samples, seq_len)
    tasks = [Task(row, EFFECTS[row], (keep,)) for row in rows or EFFECTS]
    figures = _run(tasks, model, calibration, data_dir, max_windows, devices)
    lines = [
        f"| method | keep | {' | '.join(TEXTS)} | seconds | peak GiB |",
        f"|---|---|{'---|' * len(TEXTS)}---|---|",
    ]
    for figure in figures:
        values = " | ".join(f"{figure.perplexity[text]:.4g}" for text in TEXTS)
        cost = f"{sum(figure.seconds.values()):.1f} | {figure.peak / 2**30:.2f}" if figure.seconds else " | "
        lines.append(f"| {figure.row} | {figure.keep:.4f} | {values} | {cost} |")
    _print(lines, out)


def _calibration(calib: str, samples: str, gradient_samples: int, seq_len: int) -> dict[str, Any]:
    texts = calib.split(",")
    return {
        "data": texts if texts[1:] else calib,
        "samples": samples if samples == "all" else int(samples),
        "seq_len": seq_len,
        "gradient_samples": gradient_samples,
    }


def _run(
    tasks: Sequence[Task],
    model: str,
    calibration: dict[str, Any],
    data_dir: Path | None,
    max_windows: int | None,
    devices: str | None,
) -> list[Figure]:
    """Figures of the model as it is and of all tasks, each device taking the next task when it is free."""
    names = devices.split(",") if devices else [None]
    context = multiprocessing.get_context("spawn")
    free = context.Manager().Queue()
    for name in names:
        free.put(name)
    whole = Task("dense", {}, ())
    with ProcessPoolExecutor(len(names), mp_context=context) as pool:
        futures = [
            pool.submit(_make, task, model, calibration, data_dir, max_windows, free)
            for task in [*tasks, whole]
        ]
        *made, dense = [future.result() for future in futures]
    return [*dense, *(figure for figures in made for figure in figures)]


def _make(
    task: Task,
    model: str,
    calibration: dict[str, Any],
    data_dir: Path | None,
    max_windows: int | None,
    free: Queue[str | None],
) -> list[Figure]:
    import lrc

    device, console = free.get(), Console(stderr=True)
    common: dict[str, Any] = {"data_dir": data_dir, "device": device}

    def perplexity(path: str | Path) -> dict[str, float]:
        return {
            text: lrc.evaluate(path, text, max_windows=max_windows or windows, **common)[0].value
            for text, windows in TEXTS.items()
        }

    try:
        if not task.plan:
            return [Figure(task.row, 1.0, 1.0, perplexity(model))]
        found = []
        with tempfile.TemporaryDirectory() as scratch:
            base, folder = Path(scratch) / "base.yaml", Path(scratch) / "out"
            written = {"format": 1, **task.plan, "calibration": {**calibration, "seed": task.seed}}
            for step in task.steps:
                row = f"{task.row}, sizes in {step}s" if step > 1 else task.row
                plans, before = [base] * len(task.keeps), {}
                if task.allocate:
                    base.write_text(yaml.safe_dump(written), encoding="utf-8")
                    planning = lrc.make_plan(
                        model,
                        keep=task.keeps,
                        base=base,
                        allocate=task.allocate,
                        keeps=MEASURED,
                        round_to=step,
                        out=Path(scratch) / "sized.yaml",  # where curves of another step lie already
                        **common,
                    )
                    before = {f"plan: {stage}": seconds for stage, seconds in planning.seconds.items()}
                    plans = [Path(each.path) for each in planning.plans]
                for keep, plan in zip(task.keeps, plans, strict=True):
                    if not task.allocate:
                        base.write_text(yaml.safe_dump({**written, "keep": keep}), encoding="utf-8")
                    report = lrc.compress(model, plan, out=folder, ppl=[], **common)
                    peak = report.peak_bytes.get("device", report.peak_bytes["host"])
                    seconds = {**before, **report.seconds}
                    found.append(Figure(row, keep, report.keep, perplexity(folder), seconds, peak))
                    console.print(found[-1])
        return found
    finally:
        free.put(device)


def _perplexities(figures: Sequence[Figure]) -> str:
    """Means over seeds, one for each text."""
    if not figures:
        return ""
    cells = []
    for text in TEXTS:
        values = [figure.perplexity[text] for figure in figures]
        cells.append(f"{mean(values):.4g}" + (f" ± {stdev(values):.2g}" if values[1:] else ""))
    return " / ".join(cells)


def _stages(figures: Sequence[Figure]) -> list[str]:
    """Mean seconds by stage of each row, over keeps and seeds."""
    names = list(dict.fromkeys(stage for figure in figures for stage in figure.seconds))
    lines = [f"| seconds | {' | '.join(names)} | all | peak GiB |", f"|---|{'---|' * len(names)}---|---|"]
    for row in dict.fromkeys(figure.row for figure in figures):
        mine = [figure for figure in figures if figure.row == row]
        spent = [mean(figure.seconds.get(name, 0.0) for figure in mine) for name in names]
        cells = " | ".join(f"{each:.1f}" if each else "" for each in spent)
        peak = max(figure.peak for figure in mine) / 2**30
        lines.append(f"| {row} | {cells} | {sum(spent):.1f} | {peak:.2f} |")
    return lines


def _print(lines: Sequence[str], out: Path | None) -> None:
    text = "\n".join(lines)
    print(text)
    if out:
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
