"""Warn when there are fewer tokens than a moment has rows, so that damping decides a part of its inverse."""

from __future__ import annotations

from collections.abc import Collection

from lrc.families import Architecture
from lrc.plan.resolved import ResolvedPlan
from lrc.walk.needs import gradients_needed


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
