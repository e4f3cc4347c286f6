"""The look of every picture: type, lines and colours, in SVG that suits light paper, dark paper and print.

A picture is drawn on the figure of ``drawing``, and ``svg`` makes an ``<svg>`` element of it for a page. The colours of
the element are custom properties that ``css`` defines in the page. Sizes are in CSS pixels.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, to_rgb
from matplotlib.figure import Figure

PHONE = 344  # the widest picture that a phone shows without scaling

# By name, ``--NAME`` in the page: on light and on dark paper. Pictures are drawn in the light colours, each of which
# stands once, so that it identifies its property. The series are those of Okabe and Ito, for colour-blind readers too,
# with a contrast of 3:1 to the paper.
COLOURS = {
    "ink": ("#1d2125", "#e4e7ea"),
    "muted": ("#5c656d", "#a1a9b1"),
    "rule": ("#d7dbdf", "#3a4046"),
    "paper": ("#fefefe", "#16191c"),
    "heat": ("#f2a13a", "#9a4f0c"),
    "series-1": ("#0072b2", "#5db5ee"),
    "series-2": ("#d05a00", "#f58a3c"),
    "series-3": ("#008a66", "#3fc79b"),
    "series-4": ("#b0528a", "#e39ac6"),
    "series-5": ("#8c6a00", "#dcb63c"),
    "series-6": ("#6a5acd", "#b3a8ff"),
}
INK, MUTED, RULE, PAPER, _HEAT, *SERIES = (light for light, _ in COLOURS.values())

# Opacity grows with the value, so that the least value is the paper, light or dark.
HEAT = LinearSegmentedColormap.from_list("heat", [(*to_rgb(_HEAT), opacity) for opacity in (0.04, 1.0)])

_RC: dict[Any, Any] = {
    "font.family": ["DejaVu Sans"],  # wider than the fonts of a page, so that text fits there
    "font.size": 11,
    "text.color": INK,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": RULE,
    "grid.linewidth": 0.7,
    **{f"{axis}tick.color": RULE for axis in "xy"},
    **{f"{axis}tick.labelcolor": MUTED for axis in "xy"},
    **{f"{axis}tick.labelsize": 10 for axis in "xy"},
    "legend.frameon": False,
    "legend.fontsize": 10,
    "legend.borderpad": 0.2,
    "figure.facecolor": "none",
    "figure.dpi": 72,  # so that a point is a pixel
    "svg.fonttype": "none",
}


@contextmanager
def drawing(width: float = PHONE, height: float = 220) -> Iterator[Figure]:
    """Make an empty figure of a size in pixels, with the theme while it is drawn."""
    with matplotlib.rc_context(_RC), warnings.catch_warnings():
        # The font for measuring lacks some scripts, which the page's fonts have.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure


def svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure as an ``<svg>`` element with text as text. Called inside ``drawing``.

    ``name`` is unique in the page, as ids are made from it; ``label`` describes the picture for screen readers. The
    same figure gives the same bytes.
    """
    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", metadata=no_metadata)
    _, _, body = out.getvalue().partition("<svg")[2].partition(">")
    body = re.sub(r"<style.*?</style>", "", body, count=1, flags=re.DOTALL)  # its * is the whole page
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # figure_1, axes_1: the same in every picture
    body = body.replace("'DejaVu Sans'", "system-ui, sans-serif")
    properties = {light: f"var(--{name}, {light})" for name, (light, _) in COLOURS.items()}
    body = re.sub("(?<=: )#[0-9a-f]{6}", lambda hit: properties.get(hit[0], hit[0]), body)
    width, height = 72 * figure.get_size_inches()
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
        f'data-picture="{escape(name)}" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" style="stroke-linejoin: round; stroke-linecap: butt">'
        f"{body.strip()}"
    )


def css(selector: str = ":root") -> str:
    """Return the definitions of the colours: light, and dark on screens that prefer it."""
    light, dark = (" ".join(f"--{name}: {shades[i]};" for name, shades in COLOURS.items()) for i in (0, 1))
    return (
        f"{selector} {{ color-scheme: light dark; {light} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ {selector} {{ {dark} }} }}\n"
    )


def standalone(element: str) -> str:
    """Return an ``<svg>`` element as the text of a file, with its own paper."""
    opening, end, body = element.partition(">")
    style = f"<style>\n{css('svg')}svg {{ background: var(--paper) }}\n</style>\n"
    return f'<?xml version="1.0" encoding="utf-8"?>\n{opening}{end}{style}{body.rstrip()}\n'


def shortened(text: str, most: int) -> str:
    """Return the two ends of a text of more than ``most`` characters."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}…{text[-(most - most // 2 - 1) :]}"
