"""An inspection as tables, and the files inspect.json and inspect.html."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from lrc.checkpoint.durable import check_file, write_text, written
from lrc.checkpoint.sizes import byte_text
from lrc.errors import UserError
from lrc.methods import methods
from lrc.plan.precedence import spans
from lrc.records.compression import json_text
from lrc.records.inspection import Choice, Conditioning, Estimate, Inspected, Inspection
from lrc.report.page import Picture, Section, render
from lrc.report.plots.heatmap import heatmap
from lrc.report.table import Table, grouped, table
from lrc.report.tables import listed, seconds_line, size_span

if TYPE_CHECKING:
    from rich.console import RenderableType

_RECORD = "inspect.json"
Groups = Mapping[str, Sequence[Inspected]]


def inspection_tables(found: Inspection, *, by_layer: bool) -> Iterator[RenderableType]:
    """Yield an inspection for a terminal, with a row for each target, or for each target of each layer."""
    yield heading(found)
    for each in tables(found, by_layer=by_layer):
        yield each.on_screen()
    yield seconds_line(found.seconds)


def tables(found: Inspection, *, by_layer: bool) -> list[Table]:
    """Return an inspection as tables, with a row for each target, or for each target of each layer."""
    groups = by_target(found.targets, by_layer=by_layer)
    shown = [spectra_table(groups), *estimate_tables(found, groups), best_table(groups, found.keeps)]
    if found.moments:
        shown.append(moments_table(found.moments, by_layer=by_layer))
    if found.against is not None:
        shown.append(output_table(groups, found.against))
    return shown


def heading(found: Inspection) -> str:
    """Return one line that says what was inspected."""
    layers = f"layer{'s' * (len(found.layers) > 1)} {spans(found.layers)}" if found.layers else "no layers"
    outside = list(dict.fromkeys(each.target for each in found.targets if each.layer is None))
    looked_at = ", ".join(outside if outside and not found.layers else [layers, *outside])
    return f"{found.model}: {looked_at}; moments of {found.calibration}"


def by_target(targets: Iterable[Inspected], *, by_layer: bool) -> dict[str, list[Inspected]]:
    """Group targets by name, or by layer and name."""

    def name(each: Inspected) -> str:
        return f"{each.layer} {each.target}" if by_layer and each.layer is not None else each.target

    return grouped(targets, name)


def spectra_table(groups: Groups) -> Table:
    """Return effective and stable ranks, plain and whitened: means over the layers."""
    rows = []
    for name, each in groups.items():
        plain, whitened = [one.plain for one in each], [one.whitened for one in each]
        rows.append(
            {
                "target": name,
                "full:n": str(each[0].plain.full),
                "effective:n": f"{fmean(s.effective_rank for s in plain):.1f}",
                "effective, whitened:n": f"{fmean(s.effective_rank for s in whitened):.1f}",
                "stable:n:m": f"{fmean(s.stable_rank for s in plain):.2f}",
                "stable, whitened:n:m": f"{fmean(s.stable_rank for s in whitened):.2f}",
                "99 %, whitened:n": _span([s.rank_99 for s in whitened]),
            }
        )
    return table(
        rows,
        "Ranks, plain and whitened by the moment of the inputs; means over the layers. Effective rank: exp of the "
        "entropy of σ/Σσ. Stable rank: Σσ²/σ₁². 99 %: the rank that holds 99 % of Σσ²",
    )


def moments_table(moments: Sequence[Conditioning], *, by_layer: bool) -> Table:
    """Return how well the moments can be inverted: the range over the layers."""

    def name(each: Conditioning) -> str:
        return f"{each.layer} " * by_layer + each.site + ", centred" * each.centred

    return table(
        (
            {
                "moment": name,
                "width:n:m": str(each[0].width),
                "numerical rank:n": _span([one.numerical_rank for one in each]),
                "condition number:n": _range([one.condition for one in each]),
                "damped:n": _range([one.damped for one in each]),
                "damping:n:m": _range([one.damping for one in each]),
                "tokens:n:m": f"{each[0].tokens:,}",
            }
            for name, each in grouped(moments, name).items()
        ),
        "Moments of the inputs. Condition number: largest over smallest eigenvalue. Damped: the same with the damping "
        "that solvers add. Damping: as a fraction of the mean diagonal",
    )


def estimate_tables(found: Inspection, groups: Groups) -> list[Table]:
    """Return the predicted errors of methods by kept fraction; with gradients, the nats of all layers too.

    Over layers relative errors are root mean squares, nats of divergence means, and nats of loss sums.
    """

    def error(some: Sequence[Estimate]) -> str:
        unit = some[0].unit
        return _folded([e.error for e in some], f" {unit}" if unit.startswith("nats") else "")

    def loss(some: Sequence[Estimate]) -> str:
        return f"{sum(e.loss or 0.0 for e in some):.3g}"

    tables = []
    for what, cell in (("error", error), ("nats of loss", loss))[: 2 if found.gradients else 1]:
        rows = []
        for name, each in groups.items():
            every = [e for one in each for e in one.estimates if cell is error or e.loss is not None]
            for method, some in grouped(every, lambda e: e.method + _unusual(e)).items():
                at = grouped(some, lambda e: e.keep)
                cells = {f"{keep:g}:n": cell(at[keep]) if keep in at else "" for keep in found.keeps}
                rows.append({"target": name, "method": method, **cells})
        tables.append(table(rows, f"Predicted {what}, by kept fraction"))
    return tables


def best_table(groups: Groups, keeps: Sequence[float]) -> Table:
    """Return the best method by kept fraction: counts over layers, or the errors of a single layer."""
    rows = []
    for name, each in groups.items():
        choices = {keep: [c for one in each for c in one.choices if c.keep == keep] for keep in keeps}
        rows.append({"target": name, **{f"{keep:g}:w": _taken(some) for keep, some in choices.items()}})
    return table(rows, "Best method, by kept fraction")


def _taken(choices: Sequence[Choice]) -> str:
    if len(choices) != 1:
        count = Counter(choice.method for choice in choices).most_common()
        return "\n".join(method if len(count) == 1 else f"{n} {method}" for method, n in count)
    (one,) = choices
    lines = [f"{one.method}: {one.error:.3g} {one.unit}, keeps {one.kept:.1%}"]
    if one.next_method is not None:
        lines.append(f"next {one.next_method}: {one.next_error:.3g}, keeps {one.next_kept:.1%}")
    return "\n".join(lines)


def output_table(groups: Groups, against: str) -> Table:
    """Return the errors of an output by target, beside those in its manifest."""
    rows = []
    for name, each in groups.items():
        by_method = grouped(
            (one.output for one in each if one.output is not None), lambda output: output.method
        )
        for method, errors in by_method.items():
            sized = sorted((e for e in errors if e.size is not None), key=lambda each: each.kept)
            sizes = [e.size for e in sized if e.size is not None]
            predicted = " nats KL" if errors[0].recorded_unit == "nats KL" else ""
            measured = " nats KL" if any(e.kl is not None for e in errors) else ""
            rows.append(
                {
                    "target": name,
                    "method": method,
                    "measured:n": _folded([e.kl if measured else e.measured for e in errors], measured),
                    "data error:n": _folded([e.data_error for e in errors]),
                    "‖W−W'‖/‖W‖:n": _folded([e.reconstruction for e in errors]),
                    "overlap:n:m": _folded([e.overlap for e in errors], plain=True),
                    "kept:n": f"{sum(e.kept for e in errors) / sum(e.whole for e in errors):.1%}",
                    "size:n:m": size_span(sizes[0], sizes[-1]) if sizes else "",
                    "recorded predicted:n": _folded([e.recorded_predicted for e in errors], predicted),
                    "recorded measured:n": _folded([e.recorded_measured for e in errors], measured),
                }
            )
    return table(
        rows,
        f"Errors of {against} against the original, as it is stored, after refits. Recorded: from its manifest, "
        "before refits. Overlap: mean squared cosine of the principal angles between the kept inputs and the best "
        "inputs of that rank; for an MLP, the share of its neurons that are among the largest scores",
    )


def check_folder(folder: Path) -> None:
    """Raise UserError if a folder cannot be written to. Nothing is made."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} cannot be written: it is a file; name a folder with -o")
    check_file("-o", folder / _RECORD if folder.is_dir() else folder)


def write_inspection(found: Inspection, folder: Path) -> list[Path]:
    """Write an inspection into a folder, which is made if need be, and return the files."""
    files = {folder / _RECORD: json_text(asdict(found)), folder / "inspect.html": inspection_page(found)}
    with written(folder):
        folder.mkdir(exist_ok=True)
        for path, text in files.items():
            write_text(path, text)
    return list(files)


def inspection_page(found: Inspection) -> str:
    """Return an inspection as one page: tables by target, and the best methods layer by layer."""
    names = list(dict.fromkeys(t.target for t in found.targets if t.layer is not None))
    facts = [
        ("fingerprint", found.fingerprint),
        ("calibration", found.calibration),
        ("device", f"{found.device}, layers run in {found.dtype}"),
        ("seconds", listed({stage: f"{seconds:.1f}" for stage, seconds in found.seconds.items()})),
        ("peak memory", listed({place: byte_text(size) for place, size in found.peak_bytes.items()})),
        ("versions", listed(found.versions)),
    ]
    sections = [
        Section(
            "What was found",
            [_ranks(found, names)] if names else [],
            tables=tables(found, by_layer=False),
            folded={"Layer by layer": best_table(by_target(found.targets, by_layer=True), found.keeps)},
        ),
        Section("How it was made", facts=facts),
    ]
    return render(f"{found.model}, inspected", heading(found), sections, warnings=found.warnings)


def _ranks(found: Inspection, names: Sequence[str]) -> Picture:
    """Return a picture of the effective rank by layer and target."""
    shares = {(t.layer, t.target): t.whitened.effective_rank / t.whitened.full for t in found.targets}
    grid = [[shares.get((layer, name), 0.0) for name in names] for layer in found.layers]
    drawn = heatmap(
        "ranks",
        grid,
        [["1" if share > 0.995 else f"{share:.2f}".removeprefix("0") for share in row] for row in grid],
        [str(layer) for layer in found.layers],
        names,
        title="Effective over full rank, by layer",
        below="whitened by the moment of the inputs",
        label=f"Effective rank over full rank by layer of {', '.join(names)}",
    )
    return Picture(
        drawn, "The smaller the rank, the smaller the error of a low-rank map on the calibration text."
    )


def _unusual(estimate: Estimate) -> str:
    solvers = methods()[estimate.method].solvers.values()
    known = [{name: option.default for name, option in solver.options.items()} for solver in solvers]
    defaults = next((each for each in known if each.keys() == estimate.options.keys()), {})
    changed = {name: value for name, value in estimate.options.items() if defaults.get(name) != value}
    return "".join(f", {name} {value}" for name, value in changed.items())


def _folded(values: Iterable[float | None], unit: str = "", *, plain: bool = False) -> str:
    """Return the mean of the figures that are not None, with a unit or ``plain``; else their root mean square."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    if unit:
        return f"{fmean(there):.2g}{unit}"
    return f"{fmean(there) if plain else fmean(v * v for v in there) ** 0.5:.4f}"


def _span(values: Sequence[int]) -> str:
    return size_span(min(values), max(values))


def _range(values: Sequence[float]) -> str:
    """Return the ends in two digits, such as 510 or 0.0012, and longer numbers in powers of ten."""
    ends = (f"{value:.2g}" for value in (min(values), max(values)))
    return " to ".join(
        dict.fromkeys(f"{float(end):g}" if 1e-4 <= abs(float(end)) < 1e5 else end for end in ends)
    )
