"""What the tests of plans share: architectures from shapes alone, small methods, a way to resolve a text."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping
from functools import cache
from typing import Annotated, Any, Literal

import pytest
import torch
from annotated_types import Ge
from transformers import AutoConfig, AutoModelForCausalLM

from lrc.families import Architecture, Heads, describe, family_of
from lrc.methods.contract import Method, Solution, solves
from lrc.methods.sizes import ComponentRank, PairRank
from lrc.plan.resolve import parse_plan, resolve
from lrc.plan.resolved import ResolvedPlan

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "small-gpt2": ("gpt2", {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "vocab_size": 256}),
    "llama-7b": ("llama", {}),
    "llama-8k": (
        "llama",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
        },
    ),
    "small-llama": (
        "llama",
        {
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "vocab_size": 256,
        },
    ),
}
SHAPES["narrow-llama"] = ("llama", {**SHAPES["small-llama"][1], "head_dim": 2})


@cache
def architecture(name: str) -> Architecture:
    family, overrides = SHAPES[name]
    config = AutoConfig.for_model(family, **overrides)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return describe(family_of(family), config, {n: tuple(p.shape) for n, p in model.named_parameters()})


def _fake(*functions: Any) -> Method:
    return Method("fake", "A method of the tests.", {f.solver.target: f.solver for f in functions})


def _no_wide_heads(heads: Heads, options: Mapping[str, Any]) -> str | None:
    return "its heads share keys" if heads.group > 1 and not options["shared"] else None


@solves("projection", size=PairRank(), paper="none")
def pair(problem: Any, rank: int, *, damping: Annotated[float, Ge(0)] = 1e-6) -> Solution: ...


@solves("embed", size=PairRank(), paper="none")
def table(problem: Any, rank: int) -> Solution: ...


@solves("projection", size=PairRank(), needs=("moments", "gradients"), paper="none")
def gradient_pair(problem: Any, rank: int) -> Solution: ...


@solves("qk", size=ComponentRank(), paper="none")
def qk(problem: Any, rank: int) -> Solution: ...


@solves("ov", size=ComponentRank(), paper="none")
def ov(problem: Any, rank: int, *, rounds: int = 4, exact: bool = False) -> Solution: ...


@solves("mlp", size=ComponentRank(), paper="none")
def mlp(problem: Any, width: int, *, select: Literal["score", "leverage"] = "score") -> Solution: ...


@solves("qk", size=ComponentRank(), paper="none", refuses=_no_wide_heads)
def picky_qk(problem: Any, rank: int, *, shared: bool = False) -> Solution: ...


@solves("ov", size=ComponentRank(), option_needs={("metric", "loss"): "gradients"}, paper="none")
def curious_ov(problem: Any, rank: int, *, metric: Literal["output", "loss"] = "output") -> Solution: ...


@solves("qk", size=ComponentRank(), paper="none", rotary="pairs")
def unturned_qk(problem: Any, rank: int, *, metric: Literal["score", "loss"] = "score") -> Solution: ...


METHODS = {
    "unturned": _fake(unturned_qk, ov, mlp),
    "a3": _fake(qk, ov, mlp),
    "pairs": _fake(pair, table),
    "gradient_pairs": _fake(gradient_pair),
    "narrow": _fake(mlp),
    "picky": _fake(picky_qk),
    "curious": _fake(curious_ov),
}


@pytest.fixture(name="architecture")
def architecture_fixture() -> Callable[[str], Architecture]:
    """Makes the architecture of one of SHAPES."""
    return architecture


@pytest.fixture
def resolved() -> Callable[..., ResolvedPlan]:
    """Resolves a plan's text for one of SHAPES, with the small methods and moments alone."""

    def resolve_text(text: str, model: str = "small-llama") -> ResolvedPlan:
        draft = parse_plan(textwrap.dedent(text).lstrip("\n"), "p.yaml")
        return resolve(draft, architecture(model), METHODS, {"moments"})

    return resolve_text
