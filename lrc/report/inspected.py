"""An inspection as tables, by target over the layers or layer by layer, for a terminal and for a page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.table import Table as Screen

from lrc.methods import methods
from lrc.plan.precedence import spans
from lrc.records.inspection import Conditioning, Estimate, Held, Inspected, Inspection
from lrc.report.groups import size_span
from lrc.report.page import Table, columns

if TYPE_CHECKING:
    from rich.console import RenderableType

Groups = Mapping[str, Sequence[Inspected]]


def inspection_tables(found: Inspection, *, by_layer: bool) -> Iterator[RenderableType]:
    """What was found, a row a target, or a row a target of a layer with the reasons for what ``auto`` takes."""
    groups = grouped(found.targets, by_layer=by_layer)
    yield heading(found)
    yield _on_screen(spectra_table(groups))
    if found.moments:
        yield _on_screen(moments_table(found.moments, by_layer=by_layer))
    yield from map(_on_screen, estimate_tables(found, groups))
    yield _on_screen(auto_table(groups, found.keeps))
    if by_layer:
        yield from (": ".join(row) for row in reasons_table(found.targets).rows)
    if found.against is not None:
        yield f"against {found.against}, as it is stored, on the same tokens"
        yield _on_screen(held_table(groups))
    yield "seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in found.seconds.items())
    yield from (f"warning: {warning}" for warning in found.warnings)


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


def error_of(estimates: Sequence[Estimate]) -> float:
    """Errors of several layers as one: of nats the mean, of relative errors the root mean square."""
    errors = [estimate.error for estimate in estimates]
    return _mean(errors) if estimates[0].unit.startswith("nats") else _root_mean_square(errors)


def loss_of(estimates: Sequence[Estimate]) -> float:
    """The nats of several layers, which add up."""
    return sum(estimate.loss or 0.0 for estimate in estimates)


def spectra_table(groups: Groups) -> Table:
    """Effective and stable ranks, plain and whitened: means over the layers."""
    rows = []
    for name, each in groups.items():
        plain, whitened = [one.plain for one in each], [one.whitened for one in each]
        rows.append(
            [
                name,
                str(each[0].plain.full),
                *(f"{_mean([s.effective_rank for s in kind]):.1f}" for kind in (plain, whitened)),
                *(f"{_mean([s.stable_rank for s in kind]):.2f}" for kind in (plain, whitened)),
                _span([s.rank_99 for s in whitened]),
            ]
        )
    headings = columns(
        "target",
        "full:n",
        "effective:n",
        "effective, whitened:n",
        "stable:n:m",
        "stable, whitened:n:m",
        "99 %, whitened:n",
    )
    caption = "effective and stable rank, plain and whitened, and the rank of 99 % of the energy, whitened"
    return Table(headings, rows, caption)


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
    headings = columns(
        "moment",
        "width:n:m",
        "numerical rank:n",
        "condition number:n",
        "damped:n",
        "damping:n:m",
        "tokens:n:m",
    )
    return Table(headings, rows, "moments of what is read")


def estimate_tables(found: Inspection, groups: Groups) -> list[Table]:
    """What methods would lose, by kept fraction; with gradients the nats of all layers too."""
    every = {name: [e for one in each for e in one.estimates] for name, each in groups.items()}
    tables = [_estimates("error", every, found.keeps, _error_text)]
    if found.gradients:
        known = {name: [e for e in each if e.loss is not None] for name, each in every.items()}
        tables.append(_estimates("nats of loss", known, found.keeps, lambda some: f"{loss_of(some):.3g}"))
    return tables


def auto_table(groups: Groups, keeps: Sequence[float]) -> Table:
    """What ``auto`` takes by kept fraction, with the number of layers where they differ."""
    rows = []
    for name, each in groups.items():
        counts = [Counter(c.method for one in each for c in one.choices if c.keep == keep) for keep in keeps]
        rows.append(
            [name]
            + [
                "\n".join(method if len(count) == 1 else f"{n} {method}" for method, n in count.most_common())
                for count in counts
            ]
        )
    return Table(columns("target", *(f"{keep:g}:w" for keep in keeps)), rows, "auto, by kept fraction")


def reasons_table(targets: Iterable[Inspected]) -> Table:
    """What ``auto`` takes of each target of each layer, and why."""
    rows = [
        [f"{_where(each)} at {choice.keep:g}", choice.method, choice.reason]
        for each in targets
        for choice in each.choices
    ]
    return Table(columns("target", "auto:w", "why:w"), rows)


def held_table(groups: Groups) -> Table:
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
                    _folded([h.overlap for h in held], fold=_mean),
                    f"{sum(h.kept for h in held) / sum(h.whole for h in held):.1%}",
                    size_span(sizes[0], sizes[-1], "-") if sizes else "",
                    _folded([h.recorded_predicted for h in held], predicted),
                    _folded([h.recorded_measured for h in held], measured),
                ]
            )
    headings = columns(
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
    return Table(headings, rows, "the output beside the original")


def _on_screen(table: Table) -> Screen:
    screen = Screen(title=table.caption, title_justify="left")
    for column in table.columns:
        screen.add_column(column.heading, justify="right" if column.kind == "n" else "left", overflow="fold")
    if table.columns[1].heading == "method":
        screen.columns[1].no_wrap = True
    for row in table.rows:
        screen.add_row(*row)
    return screen


def _unusual(estimate: Estimate) -> str:
    solvers = methods()[estimate.method].solvers.values()
    known = [{name: option.default for name, option in solver.options.items()} for solver in solvers]
    defaults = next((each for each in known if each.keys() == estimate.options.keys()), {})
    changed = {name: value for name, value in estimate.options.items() if defaults.get(name) != value}
    return "".join(f", {name} {value}" for name, value in changed.items())


def _where(each: Inspected) -> str:
    return each.target if each.layer is None else f"layer {each.layer} {each.target}"


def _estimates(
    what: str,
    groups: Mapping[str, Sequence[Estimate]],
    keeps: Sequence[float],
    cell: Callable[[Sequence[Estimate]], str],
) -> Table:
    rows = [
        [name, method, *(cell(at[keep]) if keep in at else "" for keep in keeps)]
        for name, each in groups.items()
        for method, at in by_method(each).items()
    ]
    headings = columns("target", "method", *(f"{keep:g}:n" for keep in keeps))
    return Table(headings, rows, f"predicted {what}, by kept fraction")


def _error_text(estimates: Sequence[Estimate]) -> str:
    unit = estimates[0].unit
    error = error_of(estimates)
    return f"{error:.2g} {unit}" if unit.startswith("nats") else f"{error:.4f}"


def _folded(
    values: Iterable[float | None], unit: str = "", fold: Callable[[Sequence[float]], float] | None = None
) -> str:
    """What there is of some figures as one: nats as their mean, relative errors as their root mean square."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    return f"{_mean(there):.2g}{unit}" if unit else f"{(fold or _root_mean_square)(there):.4f}"


def _span(values: Sequence[int]) -> str:
    return size_span(min(values), max(values), "-")


def _range(values: Sequence[float]) -> str:
    least, most = (_two_digits(value) for value in (min(values), max(values)))
    return least if least == most else f"{least} to {most}"


def _two_digits(value: float) -> str:
    """510 and 0.0012, and in powers of ten what is longer."""
    rounded = f"{value:.2g}"
    return f"{float(rounded):g}" if 1e-4 <= abs(value) < 1e5 else rounded


def _root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(_mean([value * value for value in values]))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
