"""The files of an inspection: inspect.json and inspect.html."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lrc.checkpoint.durable import check_file, write_text, written
from lrc.checkpoint.sizes import byte_text
from lrc.errors import UserError
from lrc.records.inspection import Inspection
from lrc.report.inspected import auto_table, by_target, heading, tables
from lrc.report.page import Picture, Section, render
from lrc.report.plots.heatmap import heatmap
from lrc.report.rows import listed

_RECORD = "inspect.json"


def check_folder(folder: Path) -> None:
    """Raise UserError if a folder cannot be written to. Nothing is made."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} cannot be written: it is a file; name a folder with -o")
    check_file("-o", folder / _RECORD if folder.is_dir() else folder)


def write_inspection(found: Inspection, folder: Path) -> list[Path]:
    """Write an inspection into a folder, which is made if need be, and return the files."""
    files = {folder / _RECORD: found.to_json(), folder / "inspect.html": inspection_page(found)}
    with written(folder):
        folder.mkdir(exist_ok=True)
        for path, text in files.items():
            write_text(path, text)
    return list(files)


def inspection_page(found: Inspection) -> str:
    """Return an inspection as one page: tables by target, and the choices of ``auto`` layer by layer."""
    by_layer = by_target(found.targets, by_layer=True)
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
    """Yield a picture of the effective rank by layer and target."""
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
