"""An inspection as a folder: inspect.json, a file for each picture, and inspect.html, which holds all of it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from lrc.errors import OutOfResources, UserError
from lrc.records.inspection import Inspection, Spectrum
from lrc.report.inspected import (
    Groups,
    auto_table,
    by_method,
    error_of,
    estimate_tables,
    grouped,
    heading,
    held_table,
    loss_of,
    moments_table,
    reasons_table,
    spectra_table,
)
from lrc.report.page import Picture, Table, render
from lrc.report.plots.estimates import Points, estimates
from lrc.report.plots.rank_map import rank_map
from lrc.report.plots.spectrum import Curve, spectra
from lrc.report.plots.theme import standalone


@dataclass(frozen=True)
class Section:
    """A heading with what stands under it."""

    heading: str
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    note: str = ""


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
    """Write an inspection into a folder, which is made if it is not there; the files that were written."""
    pictures = inspection_pictures(found)
    files = {"inspect.json": found.to_json(), "inspect.html": inspection_page(found, pictures)}
    files |= {f"{name}.svg": standalone(str(picture.svg)) for name, picture in pictures.items()}
    try:
        folder.mkdir(exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutOfResources(f"{folder} cannot be written: {error.strerror}") from error
    return [folder / name for name in files]


def inspection_pictures(found: Inspection) -> dict[str, Picture]:
    """Every picture by its name."""
    groups = grouped(found.targets, by_layer=False)
    drawn = {
        "spectra": (
            spectra(
                "spectra",
                [(n, *_curves([(t.plain, t.whitened) for t in each])) for n, each in groups.items()],
            ),
            "What the best map of every rank loses, (1 − energy)^½: of the weights alone, and of outputs on the "
            "calibration text. A line a layer; of qk and ov by head, of mlp by neurons kept.",
        )
    }
    inside = [t for t in found.targets if t.layer is not None]
    names = list(dict.fromkeys(t.target for t in inside))
    for kind, of in (("plain", "the weights alone"), ("whitened", "outputs on the calibration text")):
        if not inside:
            break
        shares = {}
        for t in inside:
            one: Spectrum = getattr(t, kind)
            assert t.layer is not None
            shares[t.layer, t.target] = one.effective_rank / one.full
        drawn[f"ranks-{kind}"] = (
            rank_map(f"ranks-{kind}", names, found.layers, shares),
            f"Effective rank over full rank, of {of}: the smaller, the less a map of low rank loses.",
        )
    if any(t.estimates for t in found.targets):
        drawn["errors"] = (
            estimates("errors", _panels(groups, loss=False), "predicted error"),
            "What each method predicts that it loses of the target's output, root mean square over the layers.",
        )
    if any(e.loss is not None for t in found.targets for e in t.estimates):
        drawn["losses"] = (
            estimates("losses", _panels(groups, loss=True), "predicted nats"),
            "The rise of the loss that each method predicts, in nats per token, all layers together.",
        )
    return {name: Picture(Markup(svg), caption) for name, (svg, caption) in drawn.items()}


def inspection_page(found: Inspection, pictures: dict[str, Picture]) -> str:
    """The whole inspection as one page."""
    groups = grouped(found.targets, by_layer=False)

    def shown(*names: str) -> list[Picture]:
        return [pictures[name] for name in names if name in pictures]

    sections = [
        Section(
            "What it is made of",
            shown("ranks-plain", "ranks-whitened", "spectra"),
            [spectra_table(groups)],
            "Effective rank: exp of the entropy of σ/Σσ (Roy and Vetterli 2007). Stable rank: Σσ²/σ₁² (Rudelson and "
            "Vershynin 2007). Means over the layers. Whitened: in the metric of the moment of what is read.",
        ),
        Section(
            "What methods would lose",
            shown("errors", "losses"),
            estimate_tables(found, groups),
            "Relative errors are root mean squares over the layers, nats of divergence means, nats of loss sums.",
        ),
        Section("What auto would take", [], [auto_table(groups, found.keeps)]),
    ]
    if found.moments:
        sections.append(
            Section(
                "Moments",
                [],
                [moments_table(found.moments, by_layer=False)],
                "Largest over smallest eigenvalue, and the same with the damping that solves add, in units of the "
                "mean diagonal; numerical rank at the precision of float32, in which moments are summed.",
            )
        )
    if found.against is not None:
        sections.append(
            Section(
                f"Against {found.against}",
                [],
                [held_table(groups)],
                "As it is stored, refits included, on the same tokens; what its manifest recorded is from before the "
                "refit. Overlap: mean squared cosine of the principal angles between the inputs kept and the best ones "
                "of that rank (Björck and Golub 1973), of an MLP the share of its neurons among the largest scores.",
            )
        )
    return render(
        "inspect.html",
        title=f"{found.model}, inspected",
        sentence=heading(found),
        found=found,
        sections=sections,
        reasons=reasons_table(found.targets),
        facts=_facts(found),
    )


def _curves(spectra: list[tuple[Spectrum, Spectrum]]) -> tuple[list[Curve], list[Curve]]:
    plain, whitened = zip(*spectra, strict=True)
    return (
        [Curve(s.full, s.ranks, s.energy) for s in plain],
        [Curve(s.full, s.ranks, s.energy) for s in whitened],
    )


def _panels(groups: Groups, *, loss: bool) -> list[tuple[str, dict[str, Points]]]:
    """A panel a target, with the points of each method at what it really keeps."""
    panels = []
    for name, each in groups.items():
        every = [e for one in each for e in one.estimates if not loss or e.loss is not None]
        if not every:
            continue
        unit = "" if loss or every[0].unit == "relative error" else f", {every[0].unit}"
        lines = {
            method: [
                (
                    sum(e.kept for e in some) / sum(e.whole for e in some),
                    loss_of(some) if loss else error_of(some),
                )
                for some in at.values()
            ]
            for method, at in by_method(every).items()
        }
        panels.append((name + unit, lines))
    return panels


def _facts(found: Inspection) -> list[tuple[str, str]]:
    return [
        ("fingerprint", found.fingerprint),
        ("calibration", found.calibration),
        ("device", f"{found.device}, layers run in {found.dtype}"),
        ("seconds", ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in found.seconds.items())),
        (
            "peak memory",
            ", ".join(f"{place} {size / 2**30:.2f} GiB" for place, size in found.peak_bytes.items()),
        ),
        ("versions", ", ".join(f"{name} {version}" for name, version in found.versions.items())),
    ]
