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
    asked = plan.plan.calibration.gradient_samples
    found = []
    if targets is None:
        targets = {a.target for layer in plan.layers for a in layer.assignments}
        targets |= {assignment.target for assignment in plan.outer}
    tokens, width = samples * plan.seq_len, _width(architecture, targets)
    if tokens < width:
        found.append(f"calibration has {tokens} tokens for moments of {width} dimensions; use more samples")
    tokens, width = min(asked, samples) * plan.seq_len, _gradient_width(architecture, plan, losses)
    if tokens < width:
        more = "gradient_samples" if asked < samples else "samples"
        found.append(f"gradients are of {tokens} tokens for moments of {width} dimensions; use more {more}")
    return found


def _width(architecture: Architecture, targets: Collection[str]) -> int:
    """Return the inputs of the widest projection of the targets."""
    inside = [architecture.targets[target] for target in targets if target in architecture.targets]
    widths = [architecture.matrices[role].columns for target in inside for role in target.matrices]
    return max([0, *widths, architecture.hidden if len(inside) < len(targets) else 0])


def _gradient_width(architecture: Architecture, plan: ResolvedPlan, losses: bool) -> int:
    """Return the outputs of the widest projection whose gradients are read."""
    wanted = [gradients_needed(architecture, layer, losses=losses) for layer in plan.layers]
    return max((architecture.matrices[role].rows for want in wanted for role in want.roles), default=0)
