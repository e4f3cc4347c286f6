"""Costs of the embedding and the head against tables replaced by hand in the model itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lrc.allocation import ALLOCATORS, sensitivity
from lrc.allocation.contract import walk_steps
from lrc.allocation.sizing import plan_sha256
from lrc.allocation.spend import allocate
from lrc.evaluation.perplexity import window_losses
from lrc.methods import methods
from lrc.methods.contract import EmbeddingProblem
from lrc.moments.moment import Moment
from lrc.text.corpus import Drawn

WHOLE = "components: {qk: keep-all, ov: keep-all, mlp: keep-all}"
TIED = [("gpt2", {}, "embed"), ("llama", {"tie_word_embeddings": True}, "embed")]
UNTIED = [
    (family, config, target)
    for family, config in (("gpt2", {"tie_word_embeddings": False}), ("llama", {}))
    for target in ("embed", "lm_head")
]


def open_(target: str, method: str, rest: str = WHOLE) -> str:
    """A plan that leaves the size of a table to an allocation."""
    return f"allocate: energy\n{rest}\nprojections: {{{target}: {{method: {method}}}}}"


class ByHand:
    """A model as transformers runs it, one of its tables, and what the calibration blocks say of it."""

    def __init__(self, folder: Path, target: str, blocks: Tensor) -> None:
        self.folder, self.target = folder, target
        model = self.model()
        self.tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        self.table = self.place(model).weight.detach().double()
        counts = torch.zeros(len(self.table), dtype=torch.float64)
        for token in blocks.flatten().tolist():
            counts[token] += 1
        self.shares = (counts + 1) / (counts + 1).sum()
        with torch.no_grad():
            self.x = model.base_model(blocks).last_hidden_state.flatten(0, 1).double()

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def place(self, model: Any) -> Any:
        return model.get_input_embeddings() if self.target == "embed" else model.get_output_embeddings()

    def reduced(self, method: str, rank: Any) -> Tensor:
        """The table at a rank."""
        e = self.table
        if method == "svd":
            u, s, vh = torch.linalg.svd(e, full_matrices=False)
            return u[:, :rank] * s[:rank] @ vh[:rank]
        if self.target == "lm_head":  # the directions of its outputs that are largest on the text
            kept = torch.linalg.svd(self.x @ e.T, full_matrices=False).Vh[:rank]
            return kept.T @ (kept @ e)
        if not self.tied:
            kept = torch.linalg.svd(self.shares.sqrt()[:, None] * e, full_matrices=False).Vh[:rank]
            return e @ kept.T @ kept
        moment = Moment(self.x.T @ self.x / len(self.x), self.x.mean(0), len(self.x))
        solve = methods()[method].solvers["embed"].solve
        factors: Any = solve(EmbeddingProblem(e, self.shares, moment), rank).parts["embed"]
        return factors.tensors["B"].double() @ factors.tensors["A"].double()

    def loss(self, held_out: Tensor) -> float:
        """Nats per token of the model."""
        return float(window_losses(self.model(), held_out).double().sum()) / (
            held_out.numel() - len(held_out)
        )

    @torch.no_grad()
    def kl(self, held_out: Tensor, table: Tensor) -> float:
        """KL from the model per token, with a table in the place of its own, and of the head's where they are one."""
        model, weight = self.model(), torch.nn.Parameter(table.float())
        self.place(model).weight = weight
        if self.tied:
            model.get_output_embeddings().weight = weight
        q, p = (m(held_out).logits[:, :-1].double().log_softmax(-1) for m in (model, self.model()))
        return float((p.exp() * (p - q)).sum(-1).mean())

    def lost(self, table: Tensor) -> float:
        """Squared error over squared size of what the table puts out, the mean of its uses."""
        change = table - self.table
        looked_up = [float((self.shares @ t.square()).sum()) for t in (change, self.table)]
        read = [float((self.x @ t.T).square().sum()) for t in (change, self.table)]
        uses = [looked_up] if self.target == "embed" else [read]
        uses += [read] if self.tied else []
        return sum(error / whole for error, whole in uses) / len(uses)


@pytest.fixture
def held_out() -> Tensor:
    return torch.randint(1, 256, (3, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("method", ["svd", "whitened_svd"])
@pytest.mark.parametrize(("family", "config", "target"), [*TIED, *UNTIED])
def test_sensitivity_is_the_divergence_with_the_table_replaced(
    tiny_checkpoint: Any, setting: Any, blocks: Tensor, held_out: Tensor, family, config, target, method
) -> None:
    folder = tiny_checkpoint(family, **config)
    plan = setting(folder, open_(target, method))
    plan = replace(plan, texts=replace(plan.texts, held_out=Drawn((), None, held_out)))
    (curve,), dense = ALLOCATORS["sensitivity"].curves(plan, lambda done: None)
    by_hand = ByHand(folder, target, blocks)
    assert (curve.layer, curve.target, len(curve.sizes)) == (None, target, 2)
    assert (curve.full, curve.exact, curve.whole) == (32, 32 * (256 + 32), 256 * 32)
    assert dense == pytest.approx(by_hand.loss(held_out), abs=1e-6)
    for size, cost in zip(curve.sizes, curve.costs, strict=True):
        expected = by_hand.kl(held_out, by_hand.reduced(method, size))
        assert expected > 1e-4  # else this shows nothing
        assert cost == pytest.approx(expected, rel=1e-2, abs=1e-6)


@pytest.mark.parametrize("method", ["svd", "whitened_svd"])
@pytest.mark.parametrize(("family", "config", "target"), [*TIED, *UNTIED])
def test_energy_is_the_share_of_the_output_that_is_lost(
    tiny_checkpoint: Any, setting: Any, blocks: Tensor, family, config, target, method
) -> None:
    folder = tiny_checkpoint(family, **config)
    plan, done = setting(folder, open_(target, method)), []
    ((curve,), _) = ALLOCATORS["energy"].curves(plan, done.append)
    by_hand, decoder = ByHand(folder, target, blocks), plan.plans[0].whole
    share = curve.whole / (decoder + curve.whole)
    expected = [share * by_hand.lost(by_hand.reduced(method, size)) for size in curve.sizes]
    assert curve.costs == pytest.approx(expected, rel=1e-3)
    assert sum(done) == walk_steps(plan.reader.architecture, [curve]) == 3


def test_measures_the_layers_as_without_the_tables(
    tiny_checkpoint: Any, setting: Any, held_out: Tensor
) -> None:
    folder, rest = tiny_checkpoint("llama"), "layers: [{match: 0, qk: keep-all, ov: keep-all}]"
    found, done = [], []
    both = "embed: {method: svd}, lm_head: {method: whitened_svd}"
    for projections in (both, "embed: {method: svd, rank: 5}"):
        plan = setting(folder, f"allocate: energy\n{rest}\nprojections: {{{projections}}}")
        plan = replace(plan, texts=replace(plan.texts, held_out=Drawn((), None, held_out)))
        found.append(ALLOCATORS["sensitivity"].curves(plan, done.append)[0])
        blank = ALLOCATORS["sensitivity"].blank(plan.reader.architecture, plan.plans)
        assert [replace(c, costs=(0.0, 0.0)) for c in found[-1]] == blank
        assert sum(done) == sensitivity.passes(plan.reader.architecture, blank)
        done.clear()
    assert [(c.layer, c.target) for c in found[0][-2:]] == [(None, "embed"), (None, "lm_head")]
    assert found[0][:-2] == found[1]


@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_uniform_keeps_the_same_fraction_of_tables_too(
    tiny_checkpoint: Any, setting: Any, offered: Any, keep: float
) -> None:
    plan = setting(tiny_checkpoint("gpt2"), open_("embed", "svd", ""))
    curves, _ = ALLOCATORS["uniform"].curves(plan, lambda done: None)
    assert sum(curve.whole for curve in curves) == plan.plans[0].budget.whole
    offers = offered(plan, curves)
    bought = allocate(offers, int(keep * plan.plans[0].budget.whole))
    pairs = list(zip(offers, bought.choices, strict=True))
    fractions = [choice.weights / offer.curve.whole for offer, choice in pairs]
    coarsest = max((o.choices[1].weights - o.choices[0].weights) / o.curve.whole for o in offers)
    assert all(abs(fraction - keep) < coarsest for fraction in fractions)


def test_curves_hang_on_how_tables_of_open_size_are_solved(tiny_checkpoint: Any, setting: Any) -> None:
    folder = tiny_checkpoint("llama")

    def key(projections: str) -> str:
        return plan_sha256(setting(folder, f"allocate: energy\nprojections: {{{projections}}}").plans)

    ours = key("embed: {method: svd}")
    others = ["embed: {method: whitened_svd}", "lm_head: {method: svd}", "embed: keep-all"]
    assert len({ours, *map(key, others)}) == 4
    assert key("lm_head: {method: monarch, keep: 0.4}, embed: {method: svd}") == ours
    assert key("embed: {method: svd, rank: 4}") == key("embed: {method: svd, rank: 5}")
