"""What is lost of a target at every rank: the tail of its spectrum, plain and in the metric of its moment."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.lines import Line2D

from lrc.report.plots.theme import PHONE, SERIES, drawing, svg

_ACROSS, _PANEL, _EDGES = (
    2,
    120,
    66,
)  # panels beside each other; pixels of a row of them, and of what is around all
_NAMES = ("plain", "whitened")


@dataclass(frozen=True)
class Curve:
    """A spectrum: the share of energy in the ``ranks`` largest of ``full`` singular values."""

    full: int
    ranks: Sequence[int]
    energy: Sequence[float]

    @property
    def points(self) -> tuple[list[float], list[float]]:
        """Fractions of the full rank, and the relative error (1 − energy)^½ of stopping there."""
        return [r / self.full for r in self.ranks], [max(1 - e, 0.0) ** 0.5 for e in self.energy]


def spectra(
    name: str, targets: Sequence[tuple[str, Sequence[Curve], Sequence[Curve]]], width: float = PHONE
) -> str:
    """A panel a target, with the plain and the whitened curves of its layers, all of one kind in one colour."""
    rows = -(-len(targets) // _ACROSS)
    with drawing(width, _EDGES + _PANEL * rows) as figure:
        panels = figure.subplots(rows, _ACROSS, squeeze=False, sharex=True, sharey=True)
        for axes, (target, *kinds) in zip(panels.flat, targets, strict=False):
            for curves, colour in zip(kinds, SERIES, strict=False):
                thin = max(0.9, 1.6 - 0.1 * len(curves))
                for curve in curves:
                    axes.plot(
                        *curve.points, color=colour, linewidth=thin, alpha=1 if len(curves) == 1 else 0.6
                    )
            axes.set_title(target)
            axes.set(xlim=(0, 1), ylim=(0, 1), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1))
        for axes in panels.flat[len(targets) :]:
            axes.set_visible(False)
        figure.supxlabel("rank, of the full one", fontsize=11)
        figure.supylabel("relative error", fontsize=11)
        handles = [
            Line2D([], [], color=colour, label=kind) for kind, colour in zip(_NAMES, SERIES, strict=False)
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=2)
        return svg(
            figure,
            name,
            "Relative error of the best map of every rank, plain and whitened, for "
            + ", ".join(target for target, *_ in targets),
        )
