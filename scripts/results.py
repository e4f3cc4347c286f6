"""The results of docs/results.md: one model, every method, calibration and evaluation on real text, as Markdown.

    python scripts/results.py table smollm2-135m-instruct --data-dir data     # perplexity by size, the field beside
    python scripts/results.py effects smollm2-135m-instruct --data-dir data   # what every option is worth

Every figure is that of a whole ``lrc compress``: the perplexity of the saved folder, loaded back, on WikiText-2's test
split and the first 96 windows of C4's validation split. ``table --tasks-dir tasks`` also runs ``lrc eval --tasks
standard`` on it. Devices named with ``--devices`` work beside one another; one named twice does two things at a time.
With ``--work`` figures are kept as they come, and a later run makes the rest.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from queue import Queue
from statistics import mean, stdev
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from rich.console import Console

if TYPE_CHECKING:
    from lrc.run.settings import Run

TEXTS = {"wikitext2:test": None, "c4:validation": 96}  # windows; None is all
PPL = ",".join(TEXTS)
# Of lrc eval --tasks standard: the beginnings of a task's name and of its metric's.
SCORES = {
    "LAMBADA perplexity": ("lambada_openai", "perplexity"),
    "LAMBADA accuracy": ("lambada_openai", "acc"),
    "zero-shot mean": ("standard", "mean"),
}

PUBLISHED = {
    "qk": {"metric": "score"},
    "ov": {"metric": "output", "subspace": "stacked", "refit": "none"},
    "mlp": {"metric": "output", "select": "score"},
}
# The field refits nothing to the stream and counts all tokens alike.
FIELD = {"refit": "none", "calibration": {"first_token": 1}}
BASELINES: dict[str, dict[str, Any]] = {
    "whitened_svd (SVD-LLM)": {"method": "whitened_svd", **FIELD},
    "a3 as published": {"method": "a3", "components": PUBLISHED, **FIELD},
}


def _a3(**components: dict[str, Any]) -> dict[str, Any]:
    return {"method": "a3", "components": components}


EFFECTS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd", **FIELD},
    "monarch": {"method": "monarch", **FIELD},
    **BASELINES,
    "two_sided_svd": {"method": "two_sided_svd", "refit": "none"},
    "a3 as published, without the MLP refit": {
        **_a3(**{**PUBLISHED, "mlp": {**PUBLISHED["mlp"], "refit": "none"}}),
        **FIELD,
    },
    "a3": {"method": "a3"},
    "a3, refit: none": {"method": "a3", "refit": "none"},
    "a3, qk: {metric: attention}": _a3(qk={"metric": "attention"}),
    "a3, qk: {metric: score}": _a3(qk={"metric": "score"}),
    "a3, qk: {metric: loss}": _a3(qk={"metric": "loss"}),
    "a3, ov: {metric: output}": _a3(ov={"metric": "output"}),
    "a3, ov: {subspace: stacked}": _a3(ov={"subspace": "stacked"}),
    "a3, ov: {subspace: joint}": _a3(ov={"subspace": "joint"}),
    "a3, mlp: {metric: output}": _a3(mlp={"metric": "output"}),
    "a3, mlp: {select: obs}": _a3(mlp={"select": "obs"}),
    "two_sided_svd with residual refit": {"method": "two_sided_svd"},
}
# For models whose positions turn no queries and keys.
UNTURNED = {"a3, qk: {metric: attention_als}": _a3(qk={"metric": "attention_als"})}


@dataclass(frozen=True)
class Task:
    """Models made and measured: a plan at each of ``keeps``, or its sizes found first, in each of the ``steps``."""

    row: str
    plan: dict[str, Any]
    keeps: tuple[float, ...]
    allocate: str | None = None
    steps: tuple[int | None, ...] = (None,)  # None: as ``lrc plan`` rounds by default
    seed: int = 0


@dataclass(frozen=True)
class Tasks:
    """How the standard tasks are run: local ones in ``folder``, the first ``limit`` documents of each."""

    folder: Path
    limit: int | None
    batch_size: int


@dataclass(frozen=True)
class Setting:
    """What all tasks of a run share. ``work``: where figures and curves are kept, with what they hang on."""

    model: str
    calibration: dict[str, Any]
    dtype: str | None
    data_dir: Path | None
    max_windows: int | None
    texts: list[str]
    work: Path
    tasks: Tasks | None = None

    def known(self, task: Task, step: int | None, keep: float) -> Figure | None:
        """The figure that an earlier run made."""
        if not (file := self._file).exists():
            return None
        made = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        wanted = self._key(task, step, keep)
        return next((Figure(**each["figure"]) for each in made if each["key"] == wanted), None)

    def note(self, task: Task, step: int | None, keep: float, figure: Figure) -> None:
        """Keep a figure; a line is written at once, so that processes beside one another do not mix theirs."""
        line = json.dumps({"key": self._key(task, step, keep), "figure": asdict(figure)})
        with self._file.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    @property
    def _file(self) -> Path:
        return self.work / "figures.jsonl"

    def _key(self, task: Task, step: int | None, keep: float) -> dict[str, Any]:
        shared = {
            key: value for key, value in asdict(self).items() if key not in ("data_dir", "work", "tasks")
        }
        tasks = {"tasks": {"limit": self.tasks.limit}} if self.tasks else {}
        return {
            **shared,
            **tasks,
            "plan": task.plan,
            "allocate": task.allocate,
            "seed": task.seed,
            "step": step,
            "keep": keep,
        }


@dataclass(frozen=True)
class Figure:
    """What came of a task at one keep: perplexity by text, scores by name, seconds by stage, the peak in bytes."""

    row: str
    asked: float
    keep: float
    perplexity: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)
    peak: int = 0
    scores: dict[str, float] = field(default_factory=dict)


Model = Annotated[str, typer.Argument(help="Folder or name of the model.")]
DataDir = Annotated[Path | None, typer.Option(help="Folder with the texts.")]
Calib = Annotated[str, typer.Option(help="Calibration texts, as for lrc compress --calib.")]
SeqLen = Annotated[int, typer.Option(help="Tokens of a calibration block.")]
Devices = Annotated[str | None, typer.Option(help="Such as cuda:0,cuda:1.")]
Samples = Annotated[
    str | None, typer.Option(help="Calibration blocks, or all.", show_default="as a plan without samples")
]
GradientSamples = Annotated[int, typer.Option(help="Blocks that gradients are taken on.")]
FirstToken = Annotated[
    int | None,
    typer.Option(help="What the first token of a block counts for, of the field too, which else has 1."),
]
MaxWindows = Annotated[int | None, typer.Option(help="Evaluation windows of each text.")]
Ppl = Annotated[str, typer.Option(help="Texts that perplexity is measured on, separated by commas.")]
Out = Annotated[Path | None, typer.Option(help="Also write the tables here.")]
Dtype = Annotated[str | None, typer.Option(help="Precision of calibration; evaluation is in the model's.")]
Work = Annotated[
    Path | None, typer.Option(help="Keep figures and curves in this folder; make what it lacks.")
]

app = typer.Typer(add_completion=False)


@app.command()
def table(
    model: Model,
    data_dir: DataDir = None,
    keeps: Annotated[str, typer.Option(help="Kept decoder weights.")] = "0.9,0.8,0.6,0.4",
    allocate: Annotated[str, typer.Option(help="Allocations, separated by commas.")] = "sensitivity",
    steps: Annotated[
        str, typer.Option(help="What sizes are multiples of, a column each, as: default,1,8.")
    ] = "default",
    seeds: Annotated[int, typer.Option(help="Draws of gradient blocks and labels.")] = 3,
    calib: Calib = "wikitext2:train",
    samples: Samples = None,
    gradient_samples: GradientSamples = 64,
    seq_len: SeqLen = 2048,
    first_token: FirstToken = None,
    max_windows: MaxWindows = None,
    ppl: Ppl = PPL,
    devices: Devices = None,
    dtype: Dtype = None,
    work: Work = None,
    tasks_dir: Annotated[
        Path | None, typer.Option(help="Folder with tasks: also run lrc eval --tasks standard with them.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task, from its start.")] = None,
    batch_size: Annotated[int, typer.Option(help="Requests of tasks that run at once.")] = 8,
    baselines: Annotated[bool, typer.Option(help="The field beside us.")] = True,
    out: Out = None,
) -> None:
    """Perplexity by kept weights, and standard tasks: allocated sizes, beside the field at uniform sizes."""
    if limit is not None and tasks_dir is None:
        raise typer.BadParameter("--limit has no effect without --tasks-dir; name a folder, or leave it out")
    kept, texts = tuple(float(keep) for keep in keeps.split(",")), ppl.split(",")
    rounded = tuple(None if step == "default" else int(step) for step in steps.split(","))
    calibration = _calibration(calib, samples, gradient_samples, seq_len, first_token)
    tasks = [
        Task(f"a3, {name}", {"method": "a3"}, kept, name, rounded, seed)
        for name in allocate.split(",")
        for seed in range(seeds)
    ]
    if baselines:
        tasks += [Task(row, plan, (keep,)) for row, plan in BASELINES.items() for keep in kept]
    standard = Tasks(tasks_dir.resolve(), limit, batch_size) if tasks_dir else None
    with _folder(work) as kept_in:
        setting = Setting(model, calibration, dtype, data_dir, max_windows, texts, kept_in, standard)
        figures = _run(tasks, setting, devices)
    rows = dict.fromkeys(figure.row for figure in figures if figure.row != "dense")
    lines = [
        f"| keep | {' | '.join(rows)} |",
        f"|---|{'---|' * len(rows)}",
        f"| 1 (dense) | {' | '.join([_measured([f for f in figures if f.row == 'dense'])] * len(rows))} |",
    ]
    for keep in kept:
        cells = [[f for f in figures if f.row == row and f.asked == keep] for row in rows]
        lines.append(f"| {keep:g} | {' | '.join(_measured(cell) for cell in cells)} |")
    lines += ["", _legend(texts, standard), "", *_stages([f for f in figures if f.row in rows])]
    _print(lines, out)


@app.command()
def effects(
    model: Model,
    data_dir: DataDir = None,
    keep: Annotated[float, typer.Option(help="Kept decoder weights.")] = 0.8,
    rows: Annotated[list[str] | None, typer.Option("--row", help="Only these rows.")] = None,
    seeds: Annotated[int, typer.Option(help="Draws of gradient blocks and labels.")] = 1,
    calib: Calib = "wikitext2:train",
    samples: Samples = None,
    gradient_samples: GradientSamples = 64,
    seq_len: SeqLen = 2048,
    first_token: FirstToken = None,
    max_windows: MaxWindows = None,
    ppl: Ppl = PPL,
    devices: Devices = None,
    dtype: Dtype = None,
    work: Work = None,
    out: Out = None,
) -> None:
    """What each method and each option of a3 is worth at one size, uniform over the layers."""
    calibration = _calibration(calib, samples, gradient_samples, seq_len, first_token)
    effects, texts = _effects(model), ppl.split(",")
    tasks = [Task(row, effects[row], (keep,), seed=seed) for row in rows or effects for seed in range(seeds)]
    with _folder(work) as kept_in:
        setting = Setting(model, calibration, dtype, data_dir, max_windows, texts, kept_in)
        figures = _run(tasks, setting, devices)
    lines = ["| method | keep | perplexity | seconds | peak GiB |", "|---|---|---|---|---|"]
    for row in dict.fromkeys(figure.row for figure in figures):
        mine = [figure for figure in figures if figure.row == row]
        seconds, peak = (
            mean(sum(each.seconds.values()) for each in mine),
            max(each.peak for each in mine) / 2**30,
        )
        cost = f"{seconds:.1f} | {peak:.2f}" if seconds else " | "
        lines.append(f"| {row} | {mine[0].keep:.4f} | {_measured(mine)} | {cost} |")
    _print([*lines, "", _legend(texts)], out)


def _effects(model: str) -> dict[str, dict[str, Any]]:
    """Rows that the model can have."""
    from lrc.checkpoint.reader import CheckpointReader
    from lrc.hub.names import resolve_model

    rotary = CheckpointReader(resolve_model(model).path).architecture.geometry.rotary != "none"
    return EFFECTS if rotary else {**EFFECTS, **UNTURNED}


def _legend(texts: Sequence[str], tasks: Tasks | None = None) -> str:
    first = f", of the first {tasks.limit} documents of each task" if tasks and tasks.limit else ""
    scores = f" / {' / '.join(SCORES)}{first}" if tasks else ""
    return f"Perplexity on {' / '.join(texts)}{scores}, mean ± standard deviation over seeds where there are several."


def _calibration(
    calib: str, samples: str | None, gradient_samples: int, seq_len: int, first_token: int | None
) -> dict[str, Any]:
    return {
        "data": calib,
        **({} if samples is None else {"samples": samples if samples == "all" else int(samples)}),
        "seq_len": seq_len,
        "gradient_samples": gradient_samples,
        **({"first_token": first_token} if first_token is not None else {}),
    }


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield Path(scratch)


def _run(tasks: Sequence[Task], setting: Setting, devices: str | None) -> list[Figure]:
    """Figures of the model as it is and of all tasks, each device taking the next task when it is free."""
    names = devices.split(",") if devices else [None]
    context = multiprocessing.get_context("spawn")
    free = context.Manager().Queue()
    for name in names:
        free.put(name)
    with ProcessPoolExecutor(len(names), mp_context=context) as pool:
        futures = [pool.submit(_make, task, setting, free) for task in [*tasks, Task("dense", {}, (1.0,))]]
        *made, dense = [future.result() for future in futures]
    return [*dense, *(figure for figures in made for figure in figures)]


def _make(task: Task, setting: Setting, free: Queue[str | None]) -> list[Figure]:
    """Every figure of a task, by step and keep."""
    device, console = free.get(), Console(stderr=True)
    try:
        found = []
        for step in task.steps:
            missing = [keep for keep in task.keeps if setting.known(task, step, keep) is None]
            for keep, figure in _figures(task, setting, step, missing, device):
                setting.note(task, step, keep, figure)
                console.print(figure)
            found += [setting.known(task, step, keep) for keep in task.keeps]
        return found
    finally:
        free.put(device)


def _figures(
    task: Task, setting: Setting, step: int | None, keeps: Sequence[float], device: str | None
) -> Iterator[tuple[float, Figure]]:
    """Compress and evaluate at each of the keeps; their sizes are found first where the task asks for it."""
    import lrc

    if not keeps:
        return
    run = lrc.Run(data_dir=setting.data_dir, device=device)
    if not task.plan:
        perplexity, scores = _perplexity(setting.model, setting, run), _scores(setting.model, setting, run)
        yield 1.0, Figure(task.row, 1.0, 1.0, perplexity, scores=scores)
        return
    row = task.row if step is None else f"{task.row}, sizes in {step}s"
    calibration = {**task.plan.get("calibration", {}), **setting.calibration, "seed": task.seed}
    written = {"format": 1, **task.plan, "calibration": calibration}
    with tempfile.TemporaryDirectory() as scratch:
        base, folder = Path(scratch) / "base.yaml", Path(scratch) / "out"
        plans, before = [base] * len(keeps), {}
        if task.allocate:
            base.write_text(yaml.safe_dump(written), encoding="utf-8")
            planning = lrc.make_plan(
                setting.model,
                keep=keeps,
                base=base,
                measuring=lrc.Measuring(allocate=task.allocate),
                run=replace(run, dtype=setting.dtype),
                limits=lrc.Limits(round_to=step),
                # beside it lie the curves, which another step, keep or run of the same key takes from there
                out=setting.work / f"{task.allocate}-{task.seed}.yaml",
            )
            before = {f"plan: {stage}": seconds for stage, seconds in planning.seconds.items()}
            plans = [Path(each.path) for each in planning.plans]
        for keep, plan in zip(keeps, plans, strict=True):
            if not task.allocate:
                base.write_text(yaml.safe_dump({**written, "keep": keep}), encoding="utf-8")
            report = lrc.compress(
                setting.model,
                plan,
                out=folder,
                ppl=[],
                run=replace(run, dtype=setting.dtype),
                force=True,
            )
            peak = report.peak_bytes.get("device", report.peak_bytes["host"])
            perplexity, scores = _perplexity(folder, setting, run), _scores(folder, setting, run)
            yield (
                keep,
                Figure(row, keep, report.keep, perplexity, {**before, **report.seconds}, peak, scores),
            )


def _perplexity(path: str | Path, setting: Setting, run: Run) -> dict[str, float]:
    import lrc

    return {
        text: lrc.evaluate(path, text, max_windows=setting.max_windows or TEXTS.get(text), run=run)[0].value
        for text in setting.texts
    }


def _scores(path: str | Path, setting: Setting, run: Run) -> dict[str, float]:
    """The standard tasks' scores, by the names of ``SCORES``."""
    from lrc.verbs.evaluate import prepare_tasks

    if (asked := setting.tasks) is None:
        return {}
    (scores,) = prepare_tasks(
        [path],
        ["standard"],
        tasks_dir=asked.folder,
        limit=asked.limit,
        run=replace(run, batch_size=asked.batch_size),
    )()
    return {
        name: next(
            each.value for each in scores if each.task.startswith(task) and each.metric.startswith(metric)
        )
        for name, (task, metric) in SCORES.items()
    }


def _measured(figures: Sequence[Figure]) -> str:
    """Means over seeds, one for each text and score."""
    if not figures:
        return ""
    cells, all_measured = [], [{**figure.perplexity, **figure.scores} for figure in figures]
    for name in all_measured[0]:
        values = [measured[name] for measured in all_measured]
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
