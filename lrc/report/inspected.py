"""An inspection as tables, by target over the layers or layer by layer, for a terminal and for a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from lrc.methods import methods
from lrc.plan.precedence import spans
from lrc.records.inspection import Choice, Conditioning, Estimate, Held, Inspected, Inspection
from lrc.report.rows import size_span
from lrc.report.table import Table, table
from lrc.report.tables import seconds_line, warning_lines

if TYPE_CHECKING:
    from rich.console import RenderableType

Groups = Mapping[str, Sequence[Inspected]]


def inspection_tables(found: Inspection, *, by_layer: bool) -> Iterator[RenderableType]:
    """Yield what was found for a terminal, a row a target or a row a target of a layer."""
    yield heading(found)
    for each in tables(found, by_layer=by_layer):
        yield each.on_screen()
    yield seconds_line(found.seconds)
    yield from warning_lines(found.warnings)


def tables(found: Inspection, *, by_layer: bool) -> list[Table]:
    """Return what was found as tables, a row a target or a row a target of a layer."""
    groups = grouped(found.targets, by_layer=by_layer)
    shown = [spectra_table(groups), *estimate_tables(found, groups), auto_table(groups, found.keeps)]
    if found.moments:
        shown.append(moments_table(found.moments, by_layer=by_layer))
    if found.against is not None:
        shown.append(held_table(groups, found.against))
    return shown


def heading(found: Inspection) -> str:
    """What was looked at, in a line."""
    layers = f"layer{'s' * (len(found.layers) > 1)} {spans(found.layers)}" if found.layers else "no layers"
    outside = list(dict.fromkeys(each.target for each in found.targets if each.layer is None))
    looked_at = ", ".join(outside if outside and not found.layers else [layers, *outside])
    return f"{found.model}: {looked_at}; moments of {found.calibration}"


def grouped(targets: Iterable[Inspected], *, by_layer: bool) -> dict[str, list[Inspected]]:
    """Targets by name, or by layer and name, in the order they come."""
    groups: dict[str, list[Inspected]] = {}
    for each in targets:
        layer = "" if each.layer is None or not by_layer else f"{each.layer} "
        groups.setdefault(f"{layer}{each.target}", []).append(each)
    return groups


def by_method(estimates: Iterable[Estimate]) -> dict[str, dict[float, list[Estimate]]]:
    """Estimates by method, named with the options that are not its defaults, and by the kept fraction asked for."""
    found: dict[str, dict[float, list[Estimate]]] = {}
    for each in estimates:
        found.setdefault(each.method + _unusual(each), {}).setdefault(each.keep, []).append(each)
    return found


def spectra_table(groups: Groups) -> Table:
    """Effective and stable ranks, plain and whitened: means over the layers."""
    rows = []
    for name, each in groups.items():
        plain, whitened = [one.plain for one in each], [one.whitened for one in each]
        rows.append(
            [
                name,
                str(each[0].plain.full),
                *(f"{fmean([s.effective_rank for s in kind]):.1f}" for kind in (plain, whitened)),
                *(f"{fmean([s.stable_rank for s in kind]):.2f}" for kind in (plain, whitened)),
                _span([s.rank_99 for s in whitened]),
            ]
        )
    headings = (
        "target",
        "full:n",
        "effective:n",
        "effective, whitened:n",
        "stable:n:m",
        "stable, whitened:n:m",
        "99 %, whitened:n",
    )
    return table(
        headings,
        rows,
        "Ranks, plain and whitened by the moment of what is read, means over the layers. Effective: exp of the entropy "
        "of σ/Σσ. Stable: Σσ²/σ₁². 99 %: of the energy",
    )


def moments_table(moments: Sequence[Conditioning], *, by_layer: bool) -> Table:
    """How well the moments can be inverted: the range over the layers."""
    groups: dict[str, list[Conditioning]] = {}
    for each in moments:
        name = each.site + (", centred" if each.centred else "")
        groups.setdefault(f"{each.layer} {name}" if by_layer else name, []).append(each)
    rows = [
        [
            name,
            str(each[0].width),
            _span([one.numerical_rank for one in each]),
            *(_range([getattr(one, key) for one in each]) for key in ("condition", "damped", "damping")),
            f"{each[0].tokens:,}",
        ]
        for name, each in groups.items()
    ]
    headings = (
        "moment",
        "width:n:m",
        "numerical rank:n",
        "condition number:n",
        "damped:n",
        "damping:n:m",
        "tokens:n:m",
    )
    return table(
        headings,
        rows,
        "Moments of what is read: largest over smallest eigenvalue, and the same with the damping that solves add, in "
        "units of the mean diagonal",
    )


def estimate_tables(found: Inspection, groups: Groups) -> list[Table]:
    """What methods would lose, by kept fraction; with gradients the nats of all layers too.

    Over layers relative errors are root mean squares, nats of divergence means, and nats of loss sums.
    """

    def error(some: Sequence[Estimate]) -> str:
        unit = some[0].unit
        return _folded([e.error for e in some], f" {unit}" if unit.startswith("nats") else "")

    def loss(some: Sequence[Estimate]) -> str:
        return f"{sum(e.loss or 0.0 for e in some):.3g}"

    shown: list[tuple[str, Callable[[Sequence[Estimate]], str]]] = [("error", error)]
    if found.gradients:
        shown.append(("nats of loss", loss))
    tables = []
    for what, cell in shown:
        rows = []
        for name, each in groups.items():
            every = [e for one in each for e in one.estimates if cell is error or e.loss is not None]
            for method, at in by_method(every).items():
                rows.append([name, method, *(cell(at[keep]) if keep in at else "" for keep in found.keeps)])
        headings = ("target", "method", *(f"{keep:g}:n" for keep in found.keeps))
        tables.append(table(headings, rows, f"Predicted {what}, by kept fraction"))
    return tables


def auto_table(groups: Groups, keeps: Sequence[float]) -> Table:
    """What ``auto`` takes by kept fraction: how many layers take it, or of one layer its error and the next best."""
    rows = []
    for name, each in groups.items():
        at = {keep: [c for one in each for c in one.choices if c.keep == keep] for keep in keeps}
        rows.append([name, *(_taken(choices) for choices in at.values())])
    return table(("target", *(f"{keep:g}:w" for keep in keeps)), rows, "Taken by auto, by kept fraction")


def _taken(choices: Sequence[Choice]) -> str:
    if len(choices) != 1:
        count = Counter(choice.method for choice in choices).most_common()
        return "\n".join(method if len(count) == 1 else f"{n} {method}" for method, n in count)
    (one,) = choices
    lines = [f"{one.method}: {one.error:.3g} {one.unit}, keeps {one.kept:.1%}"]
    if one.next_method is not None:
        lines.append(f"next {one.next_method}: {one.next_error:.3g}, keeps {one.next_kept:.1%}")
    return "\n".join(lines)


def held_table(groups: Groups, against: str) -> Table:
    """What an output has lost of each target, beside what its manifest says."""
    rows = []
    for name, each in groups.items():
        found: dict[str, list[Held]] = {}
        for held in (one.held for one in each if one.held is not None):
            found.setdefault(held.method, []).append(held)
        for method, held in found.items():
            sized = sorted((h for h in held if h.size is not None), key=lambda each: each.kept)
            sizes = [h.size for h in sized if h.size is not None]
            predicted = " nats KL" if held[0].recorded_unit == "nats KL" else ""
            measured = " nats KL" if any(h.kl is not None for h in held) else ""
            rows.append(
                [
                    name,
                    method,
                    _folded([h.kl if measured else h.measured for h in held], measured),
                    _folded([h.data_error for h in held]),
                    _folded([h.reconstruction for h in held]),
                    _folded([h.overlap for h in held], plain=True),
                    f"{sum(h.kept for h in held) / sum(h.whole for h in held):.1%}",
                    size_span(sizes[0], sizes[-1]) if sizes else "",
                    _folded([h.recorded_predicted for h in held], predicted),
                    _folded([h.recorded_measured for h in held], measured),
                ]
            )
    headings = (
        "target",
        "method",
        "measured:n",
        "data error:n",
        "‖W−W'‖/‖W‖:n",
        "overlap:n:m",
        "kept:n",
        "size:n:m",
        "recorded predicted:n",
        "recorded measured:n",
    )
    return table(
        headings,
        rows,
        f"{against} against the original, as it is stored, refits included; recorded: by its manifest, before the "
        "refit. Overlap: mean squared cosine of the principal angles between the inputs kept and the best ones of that "
        "rank, of an MLP the share of its neurons among the largest scores",
    )


def _unusual(estimate: Estimate) -> str:
    solvers = methods()[estimate.method].solvers.values()
    known = [{name: option.default for name, option in solver.options.items()} for solver in solvers]
    defaults = next((each for each in known if each.keys() == estimate.options.keys()), {})
    changed = {name: value for name, value in estimate.options.items() if defaults.get(name) != value}
    return "".join(f", {name} {value}" for name, value in changed.items())


def _folded(values: Iterable[float | None], unit: str = "", *, plain: bool = False) -> str:
    """What there is of some figures as one: with a unit or ``plain`` their mean, else their root mean square."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    return (
        f"{fmean(there):.2g}{unit}"
        if unit
        else f"{(fmean(there) if plain else fmean(v * v for v in there) ** 0.5):.4f}"
    )


def _span(values: Sequence[int]) -> str:
    return size_span(min(values), max(values))


def _range(values: Sequence[float]) -> str:
    least, most = (_two_digits(value) for value in (min(values), max(values)))
    return least if least == most else f"{least} to {most}"


def _two_digits(value: float) -> str:
    """510 and 0.0012, and in powers of ten what is longer."""
    rounded = f"{value:.2g}"
    return f"{float(rounded):g}" if 1e-4 <= abs(value) < 1e5 else rounded
