"""An inspection as a folder: inspect.json, and inspect.html, which holds all of it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from lrc.checkpoint.sizes import byte_text
from lrc.errors import OutOfResources, UserError
from lrc.records.inspection import Inspection
from lrc.report.inspected import auto_table, grouped, heading, tables
from lrc.report.page import Picture, Section, render
from lrc.report.plots.heatmap import heatmap
from lrc.report.rows import listed


def check_folder(folder: Path) -> None:
    """Raise UserError where a folder cannot be written to; nothing is made yet."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} cannot be written: it is a file; name a folder with -o")
    near = folder if folder.is_dir() else folder.absolute().parent
    if not near.is_dir():
        raise UserError(f"{folder} cannot be written: there is no folder {near}")
    try:
        with tempfile.TemporaryFile(dir=near):
            pass  # whether it can be should be known now, not after the work
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None


def write_inspection(found: Inspection, folder: Path) -> list[Path]:
    """Write an inspection into a folder, which is made if it is not there, and return the files."""
    files = {"inspect.json": found.to_json(), "inspect.html": inspection_page(found)}
    try:
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutOfResources(f"{folder} cannot be written: {error.strerror}") from error
    return [folder / name for name in files]


def inspection_page(found: Inspection) -> str:
    """Return the whole inspection as one page: tables by target, and layer by layer what ``auto`` takes."""
    by_layer = grouped(found.targets, by_layer=True)
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
            list(_ranks(found)),
            tables=tables(found, by_layer=False),
            folded={"Layer by layer": auto_table(by_layer, found.keeps)},
        ),
        Section("How it was made", facts=facts),
    ]
    return render(f"{found.model}, inspected", heading(found), sections, warnings=found.warnings)


def _ranks(found: Inspection) -> Iterator[Picture]:
    """Effective rank by layer and target: where a model is narrow already."""
    names = list(dict.fromkeys(t.target for t in found.targets if t.layer is not None))
    if not names:
        return
    shares = {(t.layer, t.target): t.whitened.effective_rank / t.whitened.full for t in found.targets}
    grid = [[shares.get((layer, name), 0.0) for name in names] for layer in found.layers]
    drawn = heatmap(
        "ranks",
        grid,
        [["1" if share > 0.995 else f"{share:.2f}".removeprefix("0") for share in row] for row in grid],
        [str(layer) for layer in found.layers],
        names,
        title="Effective over full rank, by layer",
        below="whitened by the moment of what is read",
        label=f"Effective rank over full rank by layer of {', '.join(names)}",
    )
    yield Picture(
        drawn, "The smaller, the less a map of low rank loses of the outputs on the calibration text."
    )
