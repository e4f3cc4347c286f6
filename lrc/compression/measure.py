"""Measure the errors of reductions: run the original and the reduced module on the same tokens."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lrc.compression.assemble import assemble
from lrc.errors import UserError
from lrc.families import canonical
from lrc.methods.contract import Solution
from lrc.modules.mlp import run_mlp
from lrc.moments.observe import Call
from lrc.moments.statistic import Layer, Observer
from lrc.plan.resolved import Assignment
from lrc.run.processes import Processes
from lrc.walk.stream import ModelStream, below


@dataclass(frozen=True)
class Measured:
    """Squared error and squared size of an output, means over tokens; ``kl`` in nats per query for attention scores."""

    error: float | None = None
    reference: float | None = None
    kl: float | None = None


def target_record(
    assignment: Assignment, layer: int | None, solution: Solution, measured: Measured
) -> dict[str, Any]:
    """Return the record of a target for the manifest and the report; ``layer`` is None outside the layers.

    Raises UserError if a figure is NaN or inf.
    """
    figures = {**solution.numerics, **asdict(solution.predicted), **asdict(measured)}
    if wrong := [
        name for name, each in figures.items() if isinstance(each, float) and not math.isfinite(each)
    ]:
        where = "" if layer is None else f"layer {layer}: "
        raise UserError(
            f"{where}the {wrong[0]} of {assignment.target} is NaN or inf: weights or activations are too large"
        )
    return {
        **asdict(assignment),
        "layer": layer,
        "predicted": asdict(solution.predicted),
        "numerics": dict(solution.numerics),
        "measured": asdict(measured),
    }


class LayerMeasure(Observer):
    """Compare the original layer with copies that hold one solution each, batch by batch.

    ``opens``: this process has the first measured block; attention is compared on that block only. The first token of a
    block has the same weight in errors as in the moments.
    """

    def __init__(
        self, stream: ModelStream, layer: Layer, solutions: Mapping[str, Solution], *, opens: bool = True
    ) -> None:
        self._stream, self._architecture = stream, layer.architecture
        self.index, self._state = layer.index, layer.state
        family = self._architecture.family
        self._alone: dict[str, Any] = {}
        for target, solution in solutions.items():
            reduced = assemble(self._architecture, stream.skeletons[self.index], self._state, [solution])
            module = stream.filled(reduced.module, reduced.state)
            if target == "mlp":
                self._alone[target] = partial(run_mlp, module, family)
            else:
                path = family.attention if target in ("qk", "ov") else reduced.paths[target]
                self._alone[target] = module.get_submodule(path)
        self._sums = {
            target: torch.zeros(2, dtype=torch.float64, device=stream.device) for target in solutions
        }
        self._opens, self._first_token = opens, layer.first_token
        self._kl: float | None = None
        self._tokens = 0

    @property
    def watched(self) -> Collection[str]:
        family = self._architecture.family
        return {family.attention, family.projections[family.mlp_output].module, *family.sites.values()}

    @torch.no_grad()
    def add(self, calls: Mapping[str, Call]) -> None:
        family = self._architecture.family
        attention, mlp = calls[family.attention], calls[family.sites[family.site(family.mlp_inputs[0])]]
        blocks, tokens, _ = attention.input.shape
        self._tokens += blocks * (tokens + self._first_token - 1)
        with self._stream.precision():
            for target, alone in self._alone.items():
                if target == "qk":
                    if self._opens and self._kl is None:
                        self._kl = self._attention_kl(alone, attention)
                elif target == "ov":
                    new, _ = alone(*attention.args, **attention.kwargs)
                    self._count(target, attention.output[0], new, self._affine("o")[1])
                elif target == "mlp":
                    old = calls[family.projections[family.mlp_output].module].output.view(blocks, tokens, -1)
                    self._count(target, old, alone(mlp.input), self._affine(family.mlp_output)[1])
                else:
                    x = calls[family.sites[family.site(target)]].input
                    weight, bias = self._affine(target)
                    self._count(target, functional.linear(x, weight, bias), alone(x), bias)

    def reduce(self, processes: Processes) -> None:
        self._tokens = processes.total(self._tokens)
        self._kl = next((each for each in processes.gather(self._kl) if each is not None), None)
        self._sums = {target: processes.total(sums) for target, sums in self._sums.items()}

    def result(self) -> dict[str, Measured]:
        """Return the errors over all processes, by target."""
        found = {}
        for target, sums in self._sums.items():
            error, reference = (sums / max(self._tokens, 1)).tolist()
            found[target] = Measured(kl=self._kl) if target == "qk" else Measured(error, reference)
        return found

    def _affine(self, role: str) -> tuple[Tensor, Tensor | None]:
        weight, bias = canonical(self._architecture.family, self._architecture, self._state, role)
        dtype = self._stream.dtype
        return weight.to(dtype), None if bias is None else bias.to(dtype)

    def _count(self, target: str, old: Tensor, new: Tensor, bias: Tensor | None) -> None:
        change, size = new.float() - old.float(), old.float() if bias is None else old.float() - bias.float()
        squares = (change.square(), size.square())  # (blocks, tokens, out)
        more = self._first_token - 1
        self._sums[target] += torch.stack([each.sum() + more * each[:, 0].sum() for each in squares])

    def _attention_kl(self, reduced: nn.Module, call: Call) -> float:
        """Return the KL divergence of the attention in the first block, averaged over queries and heads."""
        path = self._architecture.family.attention
        skeleton = copy.deepcopy(self._stream.skeletons[self.index].get_submodule(path))
        original = self._stream.filled(skeleton, below(self._state, path))
        old, new = (_attention_weights(module, call) for module in (original, reduced))
        floor = torch.finfo(old.dtype).tiny  # softmax underflows to zero
        return float((old * (old.clamp_min(floor).log() - new.clamp_min(floor).log())).sum(-1).mean())


def _attention_weights(attention: nn.Module, call: Call) -> Tensor:
    """Return the attention weights (heads, queries, keys) of the first block, by eager attention."""
    hidden = call.input[:1]
    kwargs = {k: v for k, v in call.kwargs.items() if k != "hidden_states"}
    mask = kwargs.get("attention_mask")
    if mask is None:  # causal for SDPA, but no mask for eager attention
        tokens = hidden.shape[1]
        mask = torch.full((tokens, tokens), -torch.inf, device=hidden.device).triu(1)[None, None]
    kwargs["attention_mask"] = mask[:1]
    attention.config._attn_implementation = "eager"  # type: ignore[union-attr]
    return attention(hidden, **kwargs)[1][0].float()
