"""Effective rank by layer and target, as a share of the full rank: where a model is narrow already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lrc.report.plots.theme import HEAT, INK, PHONE, drawing, svg

_ROW, _EDGES = 24, 56  # pixels of a layer, and of what is above and below all of them


def rank_map(
    name: str,
    targets: Sequence[str],
    layers: Sequence[int],
    shares: Mapping[tuple[int, str], float],
    width: float = PHONE,
) -> str:
    """A cell a target of a layer, by its share of the full rank; the fuller the colour, the larger it is."""
    with drawing(width, _EDGES + _ROW * len(layers)) as figure:
        axes = figure.subplots()
        grid = [[shares.get((layer, target), float("nan")) for target in targets] for layer in layers]
        axes.pcolormesh(grid, cmap=HEAT, vmin=0, vmax=1)
        for y, row in enumerate(grid):
            for x, share in enumerate(row):
                if share == share:
                    text = f"{share:.2f}".removeprefix("0") if share < 0.995 else "1"
                    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", color=INK, fontsize=9)
        step = max(1, -(-len(layers) // 40))
        axes.set_xticks([i + 0.5 for i in range(len(targets))], targets)
        axes.set_yticks([i + 0.5 for i in range(0, len(layers), step)], [str(n) for n in layers[::step]])
        axes.tick_params(length=0)
        axes.xaxis.tick_top()
        axes.invert_yaxis()
        axes.set_ylabel("layer")
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        return svg(figure, name, f"Effective rank over full rank by layer of {', '.join(targets)}")
