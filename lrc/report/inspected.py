"""An inspection as tables on a terminal: by target over the layers, or layer by layer."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from lrc.methods import methods
from lrc.plan.layers import spans
from lrc.report.inspection import Conditioning, Estimate, Held, Inspected, Inspection

if TYPE_CHECKING:
    from rich.console import RenderableType


def inspection_tables(found: Inspection, *, by_layer: bool) -> Iterator[RenderableType]:
    """What was found, a row a target, or a row a target of a layer with the reasons for what ``auto`` takes."""
    yield f"{found.model}: layers {spans(found.layers) or 'none'}; moments of {found.calibration}"
    groups = grouped(found.targets, by_layer=by_layer)
    yield _spectra(groups)
    if found.moments:
        yield _moments(found.moments, by_layer=by_layer)
    yield _estimates("predicted error", groups, found.keeps, _error)
    if found.gradients:
        yield _estimates("predicted nats of loss", groups, found.keeps, _loss)
    yield _auto(groups, found.keeps)
    if by_layer:
        yield from _reasons(found.targets)
    if found.against is not None:
        yield f"against {found.against}, as it is stored, on the same tokens"
        yield _held(groups)
    yield "seconds: " + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in found.seconds.items())
    yield from (f"warning: {warning}" for warning in found.warnings)


def grouped(targets: Iterable[Inspected], *, by_layer: bool) -> dict[str, list[Inspected]]:
    """Targets by name, or by layer and name, in the order they come."""
    groups: dict[str, list[Inspected]] = {}
    for each in targets:
        layer = "" if each.layer is None or not by_layer else f"{each.layer} "
        groups.setdefault(f"{layer}{each.target}", []).append(each)
    return groups


def labelled(estimates: Iterable[Estimate]) -> dict[str, list[Estimate]]:
    """Estimates by method, named with the options that are not its defaults."""
    found: dict[str, list[Estimate]] = {}
    for each in estimates:
        found.setdefault(each.method + _unusual(each), []).append(each)
    return found


def root_mean_square(values: Sequence[float]) -> float:
    """(mean of squares)^½."""
    return math.sqrt(sum(value * value for value in values) / len(values))


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def _unusual(estimate: Estimate) -> str:
    solvers = methods()[estimate.method].solvers.values()
    known = [{name: option.default for name, option in solver.options.items()} for solver in solvers]
    defaults = next((each for each in known if each.keys() == estimate.options.keys()), {})
    changed = {name: value for name, value in estimate.options.items() if defaults.get(name) != value}
    return "".join(f", {name} {value}" for name, value in changed.items())


def _table(*columns: str) -> Table:
    table = Table()
    for column in columns:
        heading, _, side = column.partition(":")
        table.add_column(heading, justify="right" if side == "r" else "left", overflow="fold")
    return table


def _spectra(groups: dict[str, list[Inspected]]) -> Table:
    table = _table(
        "target",
        "of:r",
        "effective rank:r",
        "whitened:r",
        "stable rank:r",
        "whitened:r",
        "99 % energy, whitened:r",
    )
    for name, each in groups.items():
        plain, whitened = [one.plain for one in each], [one.whitened for one in each]
        table.add_row(
            name,
            str(each[0].plain.full),
            *(f"{mean([s.effective_rank for s in spectra]):.1f}" for spectra in (plain, whitened)),
            *(f"{mean([s.stable_rank for s in spectra]):.2f}" for spectra in (plain, whitened)),
            _span([next(r for r, e in zip(s.ranks, s.energy, strict=True) if e >= 0.99) for s in whitened]),
        )
    return table


def _moments(moments: Sequence[Conditioning], *, by_layer: bool) -> Table:
    table = _table(
        "moment", "width:r", "numerical rank:r", "condition number:r", "damped:r", "damping:r", "tokens:r"
    )
    groups: dict[str, list[Conditioning]] = {}
    for each in moments:
        name = each.site + (", centred" if each.centred else "")
        groups.setdefault(f"{each.layer} {name}" if by_layer else name, []).append(each)
    for name, each in groups.items():
        table.add_row(
            name,
            str(each[0].width),
            _span([one.numerical_rank for one in each]),
            *(_spread([getattr(one, key) for one in each]) for key in ("condition", "damped", "damping")),
            f"{each[0].tokens:,}",
        )
    return table


def _estimates(
    what: str,
    groups: dict[str, list[Inspected]],
    keeps: Sequence[float],
    cell: Callable[[Sequence[Estimate]], str],
) -> Table:
    table = _table("target", "method", *(f"{what} at {keep:g}:r" for keep in keeps))
    for name, each in groups.items():
        for label, estimates in labelled(e for one in each for e in one.estimates).items():
            at = [[e for e in estimates if e.keep == keep] for keep in keeps]
            table.add_row(name, label, *(cell(some) if some else "" for some in at))
    return table


def _error(estimates: Sequence[Estimate]) -> str:
    errors, unit = [e.error for e in estimates], estimates[0].unit
    if unit.startswith("nats"):
        return f"{mean(errors):.2g} {unit}"
    return f"{root_mean_square(errors):.4f}"


def _loss(estimates: Sequence[Estimate]) -> str:
    losses = [e.loss for e in estimates if e.loss is not None]
    return f"{sum(losses):.3g}" if losses else ""


def _auto(groups: dict[str, list[Inspected]], keeps: Sequence[float]) -> Table:
    table = _table("target", *(f"auto at {keep:g}" for keep in keeps))
    for name, each in groups.items():
        cells = []
        for keep in keeps:
            counts = Counter(c.method for one in each for c in one.choices if c.keep == keep)
            only = len(counts) == 1
            cells.append("\n".join(method if only else f"{n} {method}" for method, n in counts.most_common()))
        table.add_row(name, *cells)
    return table


def _reasons(targets: Iterable[Inspected]) -> Iterator[str]:
    for each in targets:
        where = "" if each.layer is None else f"layer {each.layer} "
        for choice in each.choices:
            yield f"{where}{each.target} at {choice.keep:g}: {choice.method}: {choice.reason}"


def _held(groups: dict[str, list[Inspected]]) -> Table:
    table = _table(
        "target",
        "method",
        "size:r",
        "kept:r",
        "‖W−W'‖/‖W‖:r",
        "data error:r",
        "measured:r",
        "overlap:r",
        "recorded\npredicted:r",
        "recorded\nmeasured:r",
    )
    for name, each in groups.items():
        by_method: dict[str, list[Held]] = {}
        for held in (one.held for one in each if one.held is not None):
            by_method.setdefault(held.method, []).append(held)
        for method, held in by_method.items():
            sizes = [h.size for h in held if h.size is not None]
            unit = "nats KL" if held[0].recorded_unit == "nats KL" else ""
            nats = any(h.kl is not None for h in held)
            table.add_row(
                name,
                method,
                _span(sizes) if sizes else "",
                f"{sum(h.kept for h in held) / sum(h.whole for h in held):.1%}",
                _folded([h.reconstruction for h in held]),
                _folded([h.data_error for h in held]),
                _folded([h.kl for h in held], "nats KL") if nats else _folded([h.measured for h in held]),
                _folded([h.overlap for h in held], average=mean),
                _folded([h.recorded_predicted for h in held], unit),
                _folded([h.recorded_measured for h in held], "nats KL" if nats else ""),
            )
    return table


def _folded(
    values: Iterable[float | None], unit: str = "", average: Callable[[Sequence[float]], float] | None = None
) -> str:
    """What there is of some figures as one: nats as their mean, relative errors as their root mean square."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    if unit:
        return f"{mean(there):.2g} {unit}"
    return f"{(average or root_mean_square)(there):.4f}"


def _span(values: Sequence[int]) -> str:
    least, most = min(values), max(values)
    return str(least) if least == most else f"{least}-{most}"


def _spread(values: Sequence[float]) -> str:
    least, most = (f"{value:.2g}" for value in (min(values), max(values)))
    return least if least == most else f"{least} to {most}"
