"""Whether there are tokens enough for what is taken of them: a moment of fewer than it is wide is partly damping."""

from __future__ import annotations

from lrc.families import Architecture
from lrc.plan.resolved import ResolvedPlan
from lrc.solve import gradients_needed


def too_few(
    architecture: Architecture, plan: ResolvedPlan, samples: int, *, losses: bool = False
) -> list[str]:
    """A warning where moments of ``samples`` calibration blocks have fewer tokens than rows, and one for gradients'.

    ``losses``: gradients are read of every target, as an allocation by predicted losses does.
    """
    asked = plan.plan.calibration.gradient_samples
    found = []
    tokens, width = samples * plan.seq_len, _width(architecture, plan)
    if tokens < width:
        found.append(f"calibration has {tokens} tokens for moments of {width} dimensions; use more samples")
    tokens, width = min(asked, samples) * plan.seq_len, _gradient_width(architecture, plan, losses)
    if tokens < width:
        more = "gradient_samples" if asked < samples else "samples"
        found.append(f"gradients are of {tokens} tokens for moments of {width} dimensions; use more {more}")
    return found


def _width(architecture: Architecture, plan: ResolvedPlan) -> int:
    """Inputs of the widest projection that anything is done to."""
    targets = {a.target for layer in plan.layers for a in layer.assignments}
    roles = {role for target in targets for role in architecture.targets[target].matrices}
    widths = [architecture.matrices[role].columns for role in roles]
    return max([0, *widths, architecture.hidden if plan.outer else 0])


def _gradient_width(architecture: Architecture, plan: ResolvedPlan, losses: bool) -> int:
    """Outputs of the widest projection whose gradients are read."""
    wanted = [gradients_needed(architecture, layer, losses=losses) for layer in plan.layers]
    return max((architecture.matrices[role].rows for want in wanted for role in want.roles), default=0)
