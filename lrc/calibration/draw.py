"""The calibration and held-out texts of a run, warnings about too few tokens, and the keys of cached measurements."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lrc.families import Architecture
from lrc.plan.job import Job
from lrc.plan.resolved import ResolvedPlan
from lrc.plan.schema import Calibration as Settings
from lrc.text.blocks import gradient_blocks, ids_sha256
from lrc.text.corpus import Corpus, Drawn
from lrc.text.datasets import DATASETS
from lrc.text.mixture import DataLike, Mixture, general_mixture, read_mixture
from lrc.walk.needs import gradients_needed


@dataclass(frozen=True)
class Texts:
    """Calibration blocks and, for an allocation that measures losses, held-out blocks."""

    calibration: Drawn
    held_out: Drawn | None = None

    @property
    def held_blocks(self) -> Tensor | None:
        """The held-out blocks (n, tokens)."""
        return None if self.held_out is None else self.held_out.blocks

    @property
    def warnings(self) -> list[str]:
        """Warnings about the texts, for the report."""
        held = self.held_out
        warnings = [*self.calibration.notes, *(held.notes if held else ())]
        for source in held.sources if held else ():
            name, _, split = source.label.partition(":")
            data_set = DATASETS.get(name)
            if data_set and data_set.stream is None and split == data_set.evaluation:
                warnings.append(
                    f"{source.label} is what perplexity is measured on: sizes were chosen on it, so its figures are "
                    "too good"
                )
        return warnings

    @property
    def fitted_to(self) -> str:
        """The calibration text and its blocks, in words."""
        return _described(self.calibration.label, self.calibration)

    @property
    def measured_on(self) -> str | None:
        """The held-out text and its blocks, in words."""
        if self.held_out is None:
            return None
        splits = "the validation splits of " if self.held_out.name else ""
        return _described(f"{splits}{self.held_out.label}", self.held_out)


def held_out_mixture(job: Job, named: DataLike | None, calibration: Corpus) -> Mixture:
    """Return the named held-out texts, by default those of the general calibration, else of the same corpus."""
    if named is not None:
        return read_mixture(named, "held-out")
    if calibration.mixture.general:
        return general_mixture("held-out", calibration.mixture.names)
    return Mixture(("builtin:train" if job.model.builtin else "wikitext2:validation",), None)


def _described(label: str, drawn: Drawn) -> str:
    count, length = drawn.blocks.shape
    first = "" if drawn.first is None else f", each starting with token {drawn.first}"
    return f"{label} ({count} block{'s' * (count != 1)} of {length} tokens{first})"


def blocks_key(blocks: Tensor) -> str:
    """Return what identifies blocks (n, tokens): their number, their length and the hash of their ids."""
    return f"{blocks.shape[0]} x {blocks.shape[1]} {ids_sha256(blocks)}"


def gradients_key(blocks: Tensor, settings: Settings) -> str:
    """Return what identifies the gradients of calibration blocks: the blocks drawn, and the seed of the labels."""
    chosen = gradient_blocks(blocks, settings.gradient_samples, settings.seed)
    return f"{blocks_key(chosen)} seed {settings.seed}"


def digest(key: Mapping[str, Any]) -> str:
    """Return eight hex digits of a key's hash, for a file name."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, allow_nan=False).encode()).hexdigest()[:8]


def too_few(
    architecture: Architecture,
    plan: ResolvedPlan,
    samples: int,
    *,
    losses: bool = False,
    targets: Collection[str] | None = None,
) -> list[str]:
    """Return warnings if ``samples`` calibration blocks have too few tokens for moments of activations or gradients.

    ``losses``: gradients of every target are read, as by an allocation by predicted losses. ``targets``: those with
    moments (default: those that the plan assigns).
    """
    if targets is None:
        targets = {a.target for layer in plan.layers for a in layer.assignments}
        targets |= {assignment.target for assignment in plan.outer}
    inside = [architecture.targets[target] for target in targets if target in architecture.targets]
    widths = [architecture.matrices[role].columns for target in inside for role in target.matrices]
    width = max([0, *widths, architecture.hidden if len(inside) < len(targets) else 0])
    found = []
    if (tokens := samples * plan.seq_len) < width:
        found.append(f"calibration has {tokens} tokens for moments of {width} dimensions; use more samples")
    asked = plan.plan.calibration.gradient_samples
    wanted = [gradients_needed(architecture, layer, losses=losses) for layer in plan.layers]
    width = max((architecture.matrices[role].rows for want in wanted for role in want.roles), default=0)
    if (tokens := min(asked, samples) * plan.seq_len) < width:
        more = "gradient_samples" if asked < samples else "samples"
        found.append(f"gradients are of {tokens} tokens for moments of {width} dimensions; use more {more}")
    return found
