"""What every picture looks like: type, lines and colours, and SVG that is right in light, in dark and in print.

A picture is drawn between ``drawing`` and ``svg``::

    with drawing(344, 220) as figure:
        axes = figure.subplots()
        axes.plot(x, y, color=SERIES[0])
        return svg(figure, "cost", "Perplexity against bytes")

``svg`` gives an ``<svg>`` element to stand in a page, whose colours are custom properties that ``css`` defines there;
``standalone`` makes a file of it. Sizes are in CSS pixels; 344 is what a phone shows without scaling.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure
from matplotlib.rcsetup import cycler

PHONE = 344


@dataclass(frozen=True)
class Colour:
    """A colour by its name, ``--NAME`` in the page, on light and on dark paper. Pictures are drawn in ``light``."""

    name: str
    light: str
    dark: str


# The series are Okabe and Ito's, which the colour-blind tell apart, darkened to 3:1 against light paper and lightened
# to the same against dark. Each light colour stands once, as it is what the property is found by.
COLOURS = (
    Colour("ink", "#1d2125", "#e4e7ea"),
    Colour("muted", "#5c656d", "#a1a9b1"),
    Colour("rule", "#d7dbdf", "#3a4046"),
    Colour("paper", "#fefefe", "#16191c"),
    Colour("heat", "#f2a13a", "#9a4f0c"),  # with ink on it in full
    Colour("series-1", "#0072b2", "#5db5ee"),
    Colour("series-2", "#d05a00", "#f58a3c"),
    Colour("series-3", "#008a66", "#3fc79b"),
    Colour("series-4", "#b0528a", "#e39ac6"),
    Colour("series-5", "#8c6a00", "#dcb63c"),
    Colour("series-6", "#6a5acd", "#b3a8ff"),
)
_LIGHT = {colour.name: colour.light for colour in COLOURS}
INK, MUTED, RULE, PAPER = (_LIGHT[name] for name in ("ink", "muted", "rule", "paper"))
SERIES = tuple(light for name, light in _LIGHT.items() if name.startswith("series-"))
MARKERS = ("o", "s", "^", "D", "v", "P")  # beside the colours, so that print in grey can be read

# From nothing to full: as it is opacity that grows, the lowest value is the paper of either kind.
HEAT = LinearSegmentedColormap.from_list(
    "heat", [(*to_rgb(_LIGHT["heat"]), opacity) for opacity in (0.04, 1.0)]
)

_RC: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # wider than what a page shows, so that what fits here fits there
    "font.size": 11,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.labelsize": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "axes.prop_cycle": cycler(color=SERIES),
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    "xtick.color": RULE,
    "xtick.labelcolor": MUTED,
    "xtick.labelsize": 10,
    "ytick.color": RULE,
    "ytick.labelcolor": MUTED,
    "ytick.labelsize": 10,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.borderpad": 0.2,
    "figure.facecolor": "none",
    "figure.dpi": 72,  # so that a point is a pixel
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
}


@contextmanager
def drawing(width: float = PHONE, height: float = 220) -> Iterator[Figure]:
    """An empty figure of a size in pixels, and the theme for what is drawn in it."""
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # A name in a script that the font for measuring has not; the page's fonts have it.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def svg(figure: Figure, name: str, label: str) -> str:
    """A drawn figure as an ``<svg>`` element with text as text; the same figure gives the same bytes.

    ``name`` is the picture's, one of its own in the page, as ids hang on it; ``label`` says what it shows to those who
    do not see it. Called inside ``drawing``.
    """
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata=nothing)
    return _element(out.getvalue(), name, label)


def _element(drawn: str, name: str, label: str) -> str:
    width, height = figure_size(drawn)
    body = drawn[drawn.index(">", drawn.index("<svg")) + 1 :]
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, count=1, flags=re.DOTALL)  # its * is the whole page
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # figure_1, axes_1: the same in every picture
    body = body.replace("'DejaVu Sans'", "system-ui, sans-serif")
    by_light = {colour.light: f"var(--{colour.name}, {colour.light})" for colour in COLOURS}
    body = re.sub(
        r'(?<= style=")[^"]*',
        lambda style: re.sub("#[0-9a-f]{6}", lambda hit: by_light.get(hit[0], hit[0]), style[0]),
        body,
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'data-picture="{escape(name)}" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" style="stroke-linejoin: round; stroke-linecap: butt">'
        f"{body.strip()}"
    )


def figure_size(drawn: str) -> tuple[float, float]:
    """Width and height in pixels of an ``<svg>`` element."""
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawn)
    assert box, "an <svg> element has a viewBox"
    return float(box[1]), float(box[2])


def css(selector: str = ":root") -> str:
    """The definitions of the colours: light, in dark where the reader wants that on a screen."""
    light, dark = (
        " ".join(f"--{colour.name}: {getattr(colour, kind)};" for colour in COLOURS)
        for kind in ("light", "dark")
    )
    return (
        f"{selector} {{ color-scheme: light dark; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ {selector} {{ {dark} }} }}\n"
    )


def standalone(element: str) -> str:
    """An ``<svg>`` element as the text of a file of its own, on paper of its own."""
    opening = element.index(">") + 1
    style = f"<style>\n{css('svg')}svg {{ background: var(--paper) }}\n</style>\n"
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        + element[:opening]
        + style
        + element[opening:].rstrip()
        + "\n"
    )


def compact(value: float) -> str:
    """A number for a tick or a label in few characters: 1.5M, 32k, 0.004."""
    units = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1, ""))
    size, unit = next((each for each in units if abs(value) >= each[0]), (1, ""))
    return f"{value / size:.3g}{unit}".replace("-", "−")


def mark(number: int) -> tuple[str, str]:
    """Colour and marker of a series by its number; the first 36 differ, the first 6 in both."""
    turn, colour = divmod(number, len(SERIES))
    return SERIES[colour], MARKERS[(colour + turn) % len(MARKERS)]


def shortened(text: str, most: int) -> str:
    """The two ends of a text of more than ``most`` characters, as a picture has no room for a long name."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"
