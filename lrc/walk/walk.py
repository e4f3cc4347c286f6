"""What solvers read of a layer, from a run of the original on all calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from torch import Tensor, nn

from lrc.moments.gradient import GradientMoment
from lrc.moments.observe import observe
from lrc.plan.resolved import LayerPlan
from lrc.plan.schema import Calibration
from lrc.text.blocks import gradient_blocks
from lrc.walk.backward import gradient_moments
from lrc.walk.needs import (
    collectors_needed,
    gradients_needed,
    sites_needed,
)
from lrc.walk.statistics import LayerSums, Statistics
from lrc.walk.stream import Batch, ModelStream


def read_gradients(
    stream: ModelStream,
    plans: Iterable[LayerPlan],
    calibration: Calibration,
    blocks: Tensor,
    batch_size: int,
    *,
    losses: bool = False,
    held: Callable[[int], nn.Module] | None = None,
) -> dict[int, GradientMoment]:
    """The gradient moments that layers' solvers read, where states wait, by layer; none where no solver reads any.

    They are of the calibration blocks (n, tokens) that its settings choose. ``losses`` and ``held`` are those of
    ``gradients_needed`` and of the sweep, which runs the layers that ``held`` gives.
    """
    architecture = stream.reader.architecture
    wanted = {plan.index: gradients_needed(architecture, plan, losses=losses) for plan in plans}
    wanted = {index: want for index, want in wanted.items() if want}
    if not wanted:
        return {}
    chosen = gradient_blocks(blocks, calibration.gradient_samples, calibration.seed)
    return gradient_moments(stream, chosen, wanted, batch_size, calibration.seed, layer=held)


def layer_sums(
    stream: ModelStream,
    plan: LayerPlan,
    layer: nn.Module,
    state: Mapping[str, Tensor],
    first_token: int,
    sites: Collection[str] = (),
) -> LayerSums:
    """What a layer's solvers read of its activations, and the moments at ``sites`` beside; nothing counted yet.

    The first token of a block counts as ``first_token`` in moments.
    """
    needed, collectors = sites_needed(stream.reader.architecture, plan), collectors_needed(plan)
    return LayerSums(stream, plan, layer, state, needed.union(sites), collectors, first_token)


def read_statistics(
    stream: ModelStream,
    plan: LayerPlan,
    layer: nn.Module,
    state: Mapping[str, Tensor],
    batches: Sequence[Batch],
    gradients: GradientMoment | None,
    first_token: int,
    sites: Collection[str] = (),
) -> Statistics:
    """What ``layer_sums`` counts, from a run of the original on all batches, and what a sweep found.

    The batches stay where they are. Raises UserError where activations are NaN or inf.
    """
    sums = layer_sums(stream, plan, layer, state, first_token, sites)
    for batch, (hidden,) in zip(batches, stream.passing(batch.hidden for batch in batches), strict=True):
        with observe(layer, sums.watched) as calls:
            stream.run(layer, plan.index, batch, hidden)
        sums.add(calls)
    return sums.results(gradients)
