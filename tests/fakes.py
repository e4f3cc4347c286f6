"""A kind of the tests that holds kinds, and a method whose size is a pair of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from lrc.families import Target
from lrc.maths.linalg import best_pair
from lrc.methods import Method
from lrc.methods.contract import Affine, ProjectionProblem, Solution, solves
from lrc.methods.monarch import solve_projection as solve_monarch
from lrc.methods.shared.pairs import corrected_bias, input_moment, predicted
from lrc.methods.sizes import Options, SizeRule, SizeValue
from lrc.modules import Entry, Factors, StructuredLinear, kind_of, kinds
from lrc.modules.kind import Held


class SumLinear(StructuredLinear):
    """y = Σ_i W_i x + b for kinds W_i; the factors are ``0``, ``1``, and so on."""

    kind = "sum"
    factor_names = ("0", "1")
    tiny: ClassVar = {
        "in": 12,
        "out": 20,
        "parts": [
            {"kind": "low_rank", "in": 12, "out": 20, "rank": 3, "bias": False},
            {"kind": "monarch", "in": 12, "out": 20, "blocks": 2, "rank": 2, "bias": False},
        ],
    }

    def __init__(self, entry: Mapping[str, Any]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(kind_of(each).from_entry(each) for each in entry["parts"])
        self.bias = nn.Parameter(torch.empty(entry["out"])) if entry["bias"] else None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.stack([part(x) for part in self.parts]).sum(dim=0)
        return y if self.bias is None else y + self.bias

    @property
    def factors(self) -> dict[str, Any]:
        return {
            str(i): Factors(part.kind, part.factors)
            for i, part in enumerate(self.parts)
            if isinstance(part, StructuredLinear)
        }

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Self:
        return cls(entry)

    @classmethod
    def entry(cls, factors: Held, bias: bool) -> Entry:
        parts = [kinds()[each.kind].entry(each.tensors, False) for each in factors.values()]
        return {"kind": cls.kind, "in": parts[0]["in"], "out": parts[0]["out"], "parts": parts, "bias": bias}

    def load_factors(self, factors: Held, bias: Tensor | None) -> None:
        for part, held in zip(self.parts, factors.values(), strict=True):
            assert isinstance(part, StructuredLinear)
            part.load_factors(held.tensors, None)
            self.weight = part.weight
        if bias is not None:
            self.bias = nn.Parameter(bias)

    @staticmethod
    def dense(factors: Held) -> Tensor:
        return torch.stack([each.dense for each in factors.values()]).sum(dim=0)

    @staticmethod
    def parameter_count(entry: Mapping[str, Any]) -> int:
        return sum(kind_of(each).parameter_count(each) for each in entry["parts"])

    @property
    def output_linear(self) -> None:
        return None


BLOCKS = 2


class TwoRanks(SizeRule):
    """The rank of a pair, and that of the blocks which are added to it."""

    word = "ranks"

    def read(self, value: object) -> tuple[int, int]:
        if isinstance(value, list) and len(value) == 2 and all(type(each) is int for each in value):
            return value[0], value[1]
        raise ValueError(f"{value!r} is no pair of ranks, such as [8, 1]")

    def full(self, target: Target, options: Options) -> tuple[int, int]:
        return target.full, 1

    def nearest(self, target: Target, keep: float, options: Options) -> tuple[int, int]:
        return max(int(keep * target.parameters / target.unit) - BLOCKS, 1), 1

    def weights(self, target: Target, size: Any, options: Options) -> int:
        return (size[0] + BLOCKS * size[1]) * target.unit

    def refusal(self, target: Target, size: Any, options: Options) -> str | None:
        if min(size) < 1:
            return f"ranks {size} keep nothing of a part; the smallest are [1, 1]"
        if self.weights(target, size, options) > target.parameters:
            return f"ranks {size} are larger than the matrix"
        return None

    def choices(self, target: Target, options: Options, multiple: int | None = None) -> list[SizeValue]:
        ranks = range(1, target.full)
        found = [(rank, blocks) for rank in ranks[:: multiple or 2] for blocks in (1, 2)]
        saving = [size for size in found if self.weights(target, size, options) < target.parameters]
        return sorted(saving, key=lambda size: self.weights(target, size, options))


@solves("projection", size=TwoRanks(), paper="none")
def solve_projection(problem: ProjectionProblem, size: tuple[int, int]) -> Solution:
    """A pair in the metric of the inputs, and blocks of what it leaves."""
    weight = problem.matrix.weight.double()
    b, a, _ = best_pair(weight, size[0], input_moment(problem))
    rest = replace(problem, matrix=Affine(weight - b @ a, problem.matrix.bias))
    (blocks,) = solve_monarch(rest, size[1], blocks=BLOCKS).parts.values()
    assert isinstance(blocks, Factors)
    parts = {"0": Factors("low_rank", {"A": a, "B": b}), "1": replace(blocks, bias=None)}
    delta = weight - Factors("sum", parts).dense
    bias = corrected_bias(problem, delta)
    return Solution(
        {problem.role: Factors("sum", parts, bias)}, predicted(problem, delta, input_moment(problem))
    )


TWO_RANKS = Method(
    "two_ranks",
    "A pair and blocks.",
    {"projection": solve_projection.solver},  # type: ignore[attr-defined]
)
