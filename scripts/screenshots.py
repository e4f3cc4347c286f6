"""Looks at pages of reports in headless Chromium, and makes the screenshots of docs/.

    python scripts/screenshots.py make docs                # compresses tiny-gpt2 by seven plans: ten CPU minutes
    python scripts/screenshots.py look DIR/report.html     # what overflows, overlaps or cannot be read, by width

Needs ``chromium`` (or what CHROMIUM names); the screenshots need Pillow too, which comes with Matplotlib.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)

PHONE, DESKTOP = 360, 1120
_NARROWEST = 500  # of a window of Chromium; a page on a phone stands in a frame
_PLANS = ("a3-20pct", "a3-2x", "a3-4x", "a3-8x", "whitened-svd-2x", "monarch-2x", "svd-2x")

_LOOK = Path(__file__).with_name("look.js")


@dataclass(frozen=True)
class Looked:
    """What a look at a page found: its size in pixels, whether in ``dark``, luminance of its ``paper`` from 0 to 1, how
    many ``texts`` its pictures have, and in ``found`` everything that a reader would stumble over.
    """

    width: int
    height: int
    dark: bool
    paper: float
    texts: int
    found: list[str]


def chromium() -> str | None:
    """The browser's program, if it is there."""
    return shutil.which(os.environ.get("CHROMIUM", "chromium"))


def look(page: Path, width: int, *, dark: bool = False) -> Looked:
    """Open a page at a width and measure what is in it."""
    with _framed(page, width, 2000, _LOOK.read_text(encoding="utf-8")) as frame:
        dom = _run(frame, width, 2000, dark, "--dump-dom").stdout
    found = re.search(r'<pre id="result">(.*?)</pre>', dom, flags=re.DOTALL)
    if found is None or not found[1]:
        raise RuntimeError(f"{page} was not looked at: {dom[:2000]}")
    values: dict[str, Any] = json.loads(unescape(found[1]))
    return Looked(**values)


def screenshot(
    page: Path, picture: Path, width: int, height: int, *, dark: bool = False, scale: float = 1
) -> None:
    """A PNG of the top ``height`` pixels of a page at a width, in as few colours as do."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as folder, _framed(page, width, height, "") as frame:
        shot = Path(folder) / "shot.png"
        _run(frame, width, height, dark, f"--screenshot={shot}", f"--force-device-scale-factor={scale:g}")
        with Image.open(shot) as image:
            cut = image.convert("RGB").crop((0, 0, round(width * scale), round(height * scale)))
            cut.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(
                picture, optimize=True
            )


@contextmanager
def _framed(page: Path, width: int, height: int, script: str) -> Iterator[Path]:
    """A page in a frame of a size, in which a script runs once it is there."""
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(
            f"""<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<style>body {{ margin: 0 }} iframe {{ border: 0; display: block }}</style>
<iframe id="frame" width="{width}" height="{height}" src="{escape(page.resolve().as_uri())}"></iframe>
<pre id="result"></pre>
<script>
const frame = document.getElementById("frame"), result = document.getElementById("result");
frame.addEventListener("load", () => {{ {script} }});
</script>""",
            encoding="utf-8",
        )
        yield frame


def _run(frame: Path, width: int, height: int, dark: bool, *options: str) -> subprocess.CompletedProcess[str]:
    program = chromium()
    if program is None:
        raise RuntimeError("there is no chromium; name it in CHROMIUM")
    with tempfile.TemporaryDirectory() as profile:
        command = [
            program,
            "--headless",
            "--no-sandbox",  # as root in a container; the page is our own
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--hide-scrollbars",
            "--allow-file-access-from-files",
            "--force-prefers-reduced-motion",
            f"--user-data-dir={profile}",
            f"--window-size={max(width, _NARROWEST)},{height}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            "--virtual-time-budget=5000",
            *options,
            frame.as_uri(),
        ]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@app.command("look")
def look_at(pages: list[Path]) -> None:
    """Say what a reader would stumble over in pages, on a phone and on a desk, in light and in dark."""
    worst = False
    for page in pages:
        for width in (PHONE, DESKTOP):
            for dark in (False, True):
                found = look(page, width, dark=dark)
                worst |= bool(found.found)
                print(f"{page} {width} {'dark' if dark else 'light'}: {'; '.join(found.found) or 'nothing'}")
    raise typer.Exit(int(worst))


@app.command()
def make(
    docs: Annotated[Path, typer.Argument(help="Folder for the screenshots.")],
    work: Annotated[
        Path | None, typer.Option(help="Outputs that are there already, or a place for them.")
    ] = None,
) -> None:
    """Compress tiny-gpt2 by every plan, compare, and take the screenshots."""
    with tempfile.TemporaryDirectory() as folder:
        place = work or Path(folder)
        place.mkdir(exist_ok=True)
        for plan in _PLANS:
            if not (place / f"tiny-gpt2-{plan}").is_dir():
                subprocess.run(["lrc", "compress", "tiny-gpt2", "--plan", plan], cwd=place, check=True)
        outputs = [f"tiny-gpt2-{plan}" for plan in _PLANS]
        subprocess.run(["lrc", "compare", *outputs, "-o", "compare.html"], cwd=place, check=True)
        screenshot(place / "tiny-gpt2-a3-4x" / "report.html", docs / "report.png", DESKTOP, 1270, scale=1.5)
        screenshot(place / "compare.html", docs / "compare.png", 920, 920, dark=True, scale=1.5)


if __name__ == "__main__":
    app()
