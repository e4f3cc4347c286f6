"""The whole loop on tiny random checkpoints: predictions hold, nothing else changes, the folder loads."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lrc.compression.loop  # also, so that compressed checkpoints load
import lrc.walk.backward
from lrc.checkpoint.reader import CheckpointReader
from lrc.checkpoint.staging import staging
from lrc.compression.finish import logit_scale, refit_records, target_records, write_checkpoint
from lrc.compression.logit_scale import LogitScale
from lrc.compression.loop import Compressor
from lrc.compression.norms import NORMS, StreamNorms
from lrc.compression.refit import held_out_mask
from lrc.compression.ridge import REFITS, RIDGE, RIDGES, RefitRecord
from lrc.families import families, logit_rule
from lrc.hub.names import ResolvedModel
from lrc.methods import methods
from lrc.moments import collectors
from lrc.moments.observe import observe
from lrc.plan.document import Document
from lrc.plan.job import Job
from lrc.plan.resolve import Draft, parse_plan, resolve
from lrc.plan.resolved import Assignment, LayerPlan, ResolvedPlan
from lrc.plan.schema import Plan
from lrc.run.stopwatch import Stopwatch
from lrc.walk.backward import GradientSweep
from lrc.walk.stream import ModelStream

CPU = torch.device("cpu")
FAMILIES = ["gpt2", "llama"]
OTHERS = sorted(families().keys() - FAMILIES)
METHODS = ["a3", "whitened_svd", "two_sided_svd", "svd", "monarch"]
# Every method on two families, and the default one on all.
WIDELY = pytest.mark.parametrize(
    ("family", "method"), [*product([*FAMILIES, "llama+"], METHODS), *((family, "a3") for family in OTHERS)]
)


class Killed(Exception):
    pass


@dataclass(frozen=True)
class Run:
    """A finished output folder and what was recorded of it."""

    source: Path
    out: Path
    records: list[dict[str, Any]]
    refits: list[RefitRecord]
    scale: LogitScale | None

    def record(self, layer: int, target: str) -> dict[str, Any]:
        (found,) = [r for r in self.records if (r["layer"], r["target"]) == (layer, target)]
        return found

    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.out / "model.safetensors")


def in_order(ids: Tensor) -> Tensor:
    """Blocks as a run takes them, those that it holds out last."""
    held = held_out_mask(len(ids))
    return torch.cat([ids[~held], ids[held]])


def blocks(count: int = 5, tokens: int = 32) -> Tensor:
    """Blocks of a few words over and over, so that inputs are correlated."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(1, 256, (12, 4), generator=generator)
    return words[torch.randint(0, 12, (count, tokens // 4), generator=generator)].flatten(1)


def seen() -> Tensor:
    """Those of the blocks that a run with a refit does not hold out."""
    return blocks()[~held_out_mask(5)]


def compress(
    source: Path,
    out: Path,
    plan: str | ResolvedPlan,
    *,
    ids: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    stop_after: int | None = None,
) -> Run:
    """Compress a checkpoint by a plan's text, in batches of two blocks; ``stop_after`` dies after so many layers."""
    reader = CheckpointReader(source)
    if isinstance(plan, str):
        plan = resolve(
            parse_plan(f"format: 1\n{plan}", "p.yaml"), reader.architecture, methods(), collectors()
        )
    job = Job(ResolvedModel(source, str(source)), reader, Draft(plan.plan, Document.made("p.yaml", {})), plan)
    left = stop_after

    def advance() -> None:
        nonlocal left
        if left is not None:
            left -= 1
            if left == 0:
                raise Killed

    def start(label: str, total: int) -> Callable[[int], object]:
        return lambda done: [advance() for _ in range(done) if label == "compress"]

    with staging(out, {"plan": plan.as_dict()}, source=Path("source"), fresh=False, force=False) as stage:
        stream = ModelStream(reader, CPU, dtype)
        Compressor(stream, plan, stage, Stopwatch(CPU)).run(blocks() if ids is None else ids, 2, start)
        write_checkpoint(job, stage, {})
        records, refits, scale = target_records(job, stage), refit_records(job, stage), logit_scale(stage)
        stage.publish()
    return Run(source, out, records, refits, scale)


def whole_plan(source: Path, method: str, refit: Any, targets: Sequence[str]) -> ResolvedPlan:
    """Everything at full size, which no plan asks for."""
    architecture = CheckpointReader(source).architecture
    assignments = []
    for target in targets:
        solvers = methods()[method].solvers
        solver = solvers.get(target) or solvers["projection"]
        options = {name: option.default for name, option in solver.options.items()}
        size = solver.size.full(architecture.targets[target], options)
        assignments.append(Assignment(target, method, size, options, 1, 1))
    layers = tuple(LayerPlan(i, tuple(assignments)) for i in range(architecture.layers))
    return ResolvedPlan(Plan(format=1, refit=refit), layers, seq_len=32, first_token=1, whole=1, warnings=())


@torch.no_grad()
def outputs(folder: Path, ids: Tensor | None = None, **kwargs: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()
    return model(blocks() if ids is None else ids, output_hidden_states=True)


def weights_of(folder: Path, path: str) -> tuple[Tensor, Tensor | None] | None:
    """Weight (out, in) and bias of a linear of a checkpoint in float64; None where it has none of that name."""
    tensors = load_file(folder / "model.safetensors")
    weight, bias = tensors.get(f"{path}.weight"), tensors.get(f"{path}.bias")
    if weight is None or not weight.numel():
        return None
    if "c_proj" in path and "quantization_config" not in json.loads((folder / "config.json").read_text()):
        weight = weight.T
    return weight.double(), None if bias is None else bias.double()


def inputs_at(folder: Path, paths: dict[str, str]) -> dict[str, Tensor]:
    """What modules of a loaded model read, by name."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with observe(model, paths) as calls, torch.no_grad():
        model(blocks())
    return {name: call.input.view(*blocks().shape, -1) for name, call in calls.items()}


def ridge_on_tokens(
    x: Tensor, goal: Tensor, start: tuple[Tensor, Tensor | None], ridge: float
) -> tuple[Tensor, Tensor | None]:
    """W, b from ``start``, by the normal equations on centred tokens where there is a bias."""
    x, goal = x.flatten(0, 1), goal.flatten(0, 1)
    mean_x, mean_goal = (t.mean(dim=0) if start[1] is not None else 0 * t[0] for t in (x, goal))
    gram = (x - mean_x).T @ (x - mean_x) / len(x)
    cross = (goal - mean_goal).T @ (x - mean_x) / len(x)
    pull = ridge * gram.diagonal().mean() * torch.eye(len(gram)).double()
    weight = torch.linalg.solve(gram + pull, (cross + start[0] @ pull).T).T
    return weight, None if start[1] is None else mean_goal - weight @ mean_x


def missing(x: Tensor, goal: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """Mean over tokens of the squared distance from a projection's output to what it should have been."""
    return float((goal - torch.nn.functional.linear(x, weight, bias)).square().sum(-1).mean())


@pytest.fixture
def out(tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: tmp_path / name


@pytest.fixture
def all_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no block is held out, reductions are measured on all: on the very tokens of the predictions."""
    monkeypatch.setattr(
        lrc.compression.loop, "held_out_mask", lambda count: torch.zeros(count, dtype=torch.bool)
    )


@pytest.fixture
def biased(tiny_checkpoint: Any) -> Callable[..., Path]:
    """Tiny checkpoints; ``llama+`` has biases everywhere and a head for every query."""

    def make(family: str, **config: Any) -> Path:
        if family == "llama+":
            config = {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4} | config
        return tiny_checkpoint(family.removesuffix("+"), **config)

    return make


@pytest.mark.parametrize("family", [*FAMILIES, "llama+"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("first_token", [1, 20])
def test_predicted_is_measured(biased, out, family, method, first_token, all_measured):
    body = f"keep: 0.5\nmethod: {method}\nrefit: none\ncalibration: {{first_token: {first_token}}}"
    run = compress(biased(family), out("o"), body)
    architecture = CheckpointReader(run.source).architecture
    expected, component = list(architecture.matrices), method == "a3" and architecture.family.rotary == "none"
    if method == "a3":  # whose errors are of the queries and keys where it has these one by one
        expected = ["ov", "mlp"] if component else ["q", "k", "ov", "mlp"]
    for layer in range(architecture.layers):
        for target in expected:
            record = run.record(layer, target)
            predicted, measured = record["predicted"], record["measured"]
            assert (predicted["error"] / predicted["reference"]) ** 0.5 > 1e-4
            assert measured["error"] == pytest.approx(predicted["error"], rel=1e-3)
            assert measured["reference"] == pytest.approx(predicted["reference"], rel=1e-3)
    assert len(run.records) == architecture.layers * (len(expected) + component)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_tokens_that_count_more_lose_less(tiny_checkpoint, out, family, all_measured):
    """Of the MLP, which moments alone decide here."""
    first = blocks(4, tokens=4)[:, :1]  # the same few in all blocks, and blocks too long for them to count
    ids, lost = torch.cat((first, blocks(4, tokens=64)[:, 1:]), dim=1), {}
    body = "refit: none\ncomponents: {mlp: {keep: 0.3, metric: output}}"
    for times in (1, 1000):
        plan = f"{body}\ncalibration: {{first_token: {times}}}"
        run = compress(tiny_checkpoint(family), out(f"{times}"), plan, ids=ids)
        states = [outputs(folder, ids).hidden_states[1] for folder in (run.source, run.out)]
        lost[times] = (states[0] - states[1]).square().sum(-1).mean(0)  # by position, behind the first layer
    assert lost[1000][0] < 0.8 * lost[1][0]
    assert lost[1000][1:].mean() >= lost[1][1:].mean()


@WIDELY
@pytest.mark.parametrize("refit", ["none", "residual"])
def test_at_full_size_the_model_is_the_same(biased, out, family, method, refit):
    source = biased(family)
    components = method == "a3"
    architecture = CheckpointReader(source).architecture
    targets = (
        list(architecture.targets)[: -len(architecture.matrices)]
        if components
        else list(architecture.matrices)
    )
    run = compress(source, out("o"), whole_plan(source, method, refit, targets))
    old, new = outputs(source).logits, outputs(run.out).logits
    assert (new - old).abs().max() < 1e-4 * old.abs().max()
    for record in run.records:
        assert record["measured"]["kl"] is None or abs(record["measured"]["kl"]) < 1e-6


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
        ("gpt2", {"scale_attn_weights": False, "tie_word_embeddings": False}),
        ("llama", {"head_dim": 12, "tie_word_embeddings": True}),
        (
            "llama",
            {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        ),
    ],
)
def test_what_a_config_may_say_holds_at_full_size_and_below(biased, out, family, config, all_measured):
    source = biased(family, **config)
    run = compress(source, out("o"), whole_plan(source, "a3", "none", ["qk", "ov", "mlp"]))
    old, new = outputs(source).logits, outputs(run.out).logits
    assert (new - old).abs().max() < 1e-4 * old.abs().max()
    smaller = compress(source, out("s"), "keep: 0.5\nrefit: none")
    for target in ("ov", "mlp"):
        record = smaller.record(1, target)
        assert record["measured"]["error"] == pytest.approx(record["predicted"]["error"], rel=1e-3)


@WIDELY
def test_the_saved_folder_is_the_stream(biased, out, family, method, monkeypatch):
    """``from_pretrained`` gives the hidden states that the run's own compressed stream ended with."""
    source = biased(family)
    kept: list[Compressor] = []
    run_layers = Compressor.run

    def run_and_keep(self: Compressor, *args: Any) -> None:
        kept.append(self)
        run_layers(self, *args)

    monkeypatch.setattr(Compressor, "run", run_and_keep)
    run = compress(source, out("o"), f"keep: 0.5\nmethod: {method}")
    streamed = kept[0]._compressed
    assert streamed is not None
    reader = CheckpointReader(source)
    stock = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    norm = stock.get_submodule(reader.family.final_norm)
    stored = run.tensors()
    norm.load_state_dict({n: stored[f"{reader.family.final_norm}.{n}"] for n in norm.state_dict()})
    with torch.no_grad():
        normed = norm(torch.cat(streamed))
        expected = logit_rule(reader.family, reader.config)(stock.get_submodule(reader.family.head)(normed))
    ids = in_order(blocks())
    loaded = outputs(run.out, ids)
    torch.testing.assert_close(loaded.logits, expected, rtol=1e-4, atol=1e-4)
    assert (loaded.logits - outputs(source, ids).logits).abs().max() > 0.1


@WIDELY
def test_the_refit_brings_the_residual_stream_nearer(biased, out, family, method):
    source = biased(family, num_hidden_layers=3)
    exact = outputs(source)
    errors = {}
    for refit in ("none", "residual"):
        plan = f"keep: 0.5\nmethod: {method}\nrefit: {refit}\nscale: none"
        run = compress(source, out(refit), plan, ids=blocks() if refit == "residual" else seen())
        states = outputs(run.out).hidden_states
        errors[refit] = [
            float((a - b).square().mean()) for a, b in zip(states, exact.hidden_states, strict=True)
        ]
    assert errors["none"][0] == errors["residual"][0] == 0
    if method == "monarch":  # it ends in no linear that could be refitted
        assert errors["residual"] == pytest.approx(errors["none"], rel=1e-3)
        return
    for fitted, plain in zip(errors["residual"][1:], errors["none"][1:], strict=True):
        assert fitted < plain


@pytest.mark.parametrize("family", [*FAMILIES, "llama+"])
@pytest.mark.parametrize("target", ["qk", "ov", "mlp"])
def test_the_refit_is_a_ridge_regression_to_the_original_stream(biased, out, family, target):
    """In the last layer, behind one that was reduced: from what its projection reads in the finished model.

    Targets are the original's stream minus the compressed one before the projection; the ridge, a fraction of the mean
    diagonal, pulls to the solution without refit. The first of the five blocks chooses it and is in no fit. The
    record's errors are those of the streams of the finished models.
    """
    source = biased(family)
    reader = CheckpointReader(source)
    shape = reader.family
    attention = target in ("qk", "ov")
    role = "o" if attention else shape.mlp_output
    layer = f"{shape.layers}.1"
    plain, fitted = (
        compress(
            source,
            out(refit),
            f"components: {{{target}: {{keep: 0.5}}}}\nrefit: {refit}\nscale: none",
            ids=ids,
        )
        for refit, ids in (("none", seen()), ("residual", blocks()))
    )
    path = next(
        p
        for p in (
            f"{layer}.{shape.path(role, [shape.attention])}",
            f"{layer}.{shape.projections[role].module}",
        )
        if f"{p}.weight" in fitted.tensors()
    )
    start = weights_of(plain.out, path) or weights_of(source, f"{layer}.{shape.projections[role].module}")
    found = weights_of(fitted.out, path)
    assert start is not None
    assert found is not None

    places = {"in": layer, "middle": f"{layer}.{shape.half('mlp').norm}", "end": shape.final_norm}
    old, new = inputs_at(source, places), inputs_at(fitted.out, {**places, "x": path})
    goal = old["middle"] - new["in"] if attention else old["end"] - new["middle"]
    x, goal = new["x"].double(), goal.double()
    (record,) = [r for r in fitted.refits if (r.layer, r.role) == (1, role)]
    without = {ridge: ridge_on_tokens(x[1:], goal[1:], start, ridge) for ridge in RIDGES}
    errors = {ridge: missing(x[:1], goal[:1], *affine) for ridge, affine in without.items()}
    assert record.ridge == min(errors, key=errors.__getitem__)
    assert record.raised is None
    assert record.applied == (family != "gpt2" or target != "ov")
    weight, bias = without[record.ridge] if record.applied else start
    torch.testing.assert_close(found[0], weight, rtol=1e-3, atol=1e-3)
    assert ((found[0] - start[0]).norm() > 0.005 * start[0].norm()) == record.applied
    if bias is not None:
        torch.testing.assert_close(found[1], bias, rtol=1e-3, atol=1e-3)
    place = "middle" if attention else "end"
    first, size = (part.double().square().sum(-1).mean() for part in (old[place][:1], old[place][1:]))
    apart = (new[place] - old[place])[1:].double().square().sum(-1).mean()
    reached = record.error.after if record.applied else record.error.before
    assert reached == pytest.approx(float(apart / size), rel=1e-3)
    assert record.error.before == pytest.approx(missing(x[1:], goal[1:], *start) / float(size), rel=1e-3)
    assert record.held_out is not None
    assert record.held_out.before == pytest.approx(missing(x[:1], goal[:1], *start) / float(first), rel=1e-3)
    assert record.held_out.after == pytest.approx(errors[record.ridge] / float(first), rel=1e-3)


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
def test_stream_errors_are_those_of_every_layer(biased, out, family):
    """Also behind layers that were refitted in both halves, and none behind a layer that stays whole.

    A change through a norm is applied only if it lowers the error; no module reads a stream between parallel halves.
    """
    source = biased(family, num_hidden_layers=3)
    architecture = CheckpointReader(source).architecture
    shape = architecture.family
    exact = shape.halves[0].post_norm is None
    run = compress(source, out("o"), "keep: 0.5\nlayers:\n  - {match: 1, keep: 1.0}")
    assert [(r.layer, r.role) for r in run.refits] == [
        (layer, role) for layer in (0, 2) for role in ("o", shape.mlp_output)
    ]
    places = {f"0 {shape.mlp_output}": f"{shape.layers}.1", f"2 {shape.mlp_output}": shape.final_norm}
    if not architecture.parallel:
        places |= {f"{layer} o": f"{shape.layers}.{layer}.{shape.half('mlp').entry}" for layer in (0, 2)}
    old, new = inputs_at(source, places), inputs_at(run.out, places)
    for record in run.refits:
        place = f"{record.layer} {record.role}"
        assert record.held_out is not None
        assert record.applied == (record.held_out.after < record.held_out.before)
        assert record.error.after < record.error.before or not (exact or record.applied)
        if place not in places:
            continue
        for error, part in ((record.held_out, slice(1)), (record.error, slice(1, None))):
            apart = (new[place] - old[place])[part].double().square().sum()
            reached = error.after if record.applied else error.before
            expected = float(apart / old[place][part].double().square().sum())
            assert reached == pytest.approx(expected, rel=1e-3)
    manifest = json.loads((run.out / "lrc.json").read_text())
    assert REFITS.validate_python(manifest["refits"]) == run.refits
    counted = NORMS.validate_python(manifest["stream_norms"])
    assert [norms.layer for norms in counted] == [0, 2]
    for norms in counted:
        place = f"{norms.layer} {shape.mlp_output}"
        before, after = (states[place][:1].norm(dim=-1) for states in (old, new))
        changed = (after < before / 2) | (after > 2 * before)
        first = changed[:, 0]
        assert norms == StreamNorms(
            norms.layer, changed.numel(), int(changed.sum()), len(first), int(first.sum())
        )
    assert all("refit_damping" not in record for record in run.records)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_the_scale_of_the_logits_is_in_the_final_norm(biased, out, family, tied):
    """Everything but the final norm is as without it; the first of five blocks is nearest to the original by it."""
    source = biased(family, tie_word_embeddings=tied)
    norm = CheckpointReader(source).family.final_norm
    plain = compress(source, out("plain"), "keep: 0.5\nscale: none")
    scaled = compress(source, out("scaled"), "keep: 0.5\nscale: logits")
    assert plain.scale is None
    assert scaled.scale is not None
    assert json.loads((scaled.out / "lrc.json").read_text())["scale"]["value"] == scaled.scale.value
    assert json.loads((plain.out / "lrc.json").read_text())["scale"] is None
    old, new = plain.tensors(), scaled.tensors()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {name for name in old if name.startswith(f"{norm}.")}
    p, q, s = (outputs(folder).logits[:1].double() for folder in (source, plain.out, scaled.out))
    torch.testing.assert_close(s, scaled.scale.value * q, rtol=1e-4, atol=1e-4)

    def divergence(by: float) -> float:
        logs = [t.log_softmax(-1).flatten(0, 1) for t in (by * q, p)]
        return float(torch.nn.functional.kl_div(*logs, log_target=True, reduction="batchmean"))

    assert scaled.scale.tokens == 32
    assert scaled.scale.before == pytest.approx(divergence(1.0), rel=1e-3)
    assert scaled.scale.after == pytest.approx(divergence(scaled.scale.value), rel=1e-3)
    near = [scaled.scale.value + step for step in (-0.02, 0.02)]
    assert all(divergence(by) > divergence(scaled.scale.value) for by in near)


@pytest.mark.parametrize("family", FAMILIES)
def test_factors_of_channels_are_in_the_final_norm_and_nearer(biased, out, family):
    source = biased(family)
    norm = CheckpointReader(source).family.final_norm
    one, each = (compress(source, out(name), f"keep: 0.5\nscale: {name}") for name in ("logits", "channels"))
    plain = compress(source, out("plain"), "keep: 0.5\nscale: none").tensors()
    assert one.scale is not None
    assert each.scale is not None
    assert (one.scale.channels, each.scale.value) == (None, one.scale.value)
    assert each.scale.channels is not None
    assert each.scale.after < one.scale.after
    tensors = each.tensors()
    factors = tensors[f"{norm}.weight"] / plain[f"{norm}.weight"]
    assert (float(factors.min()), float(factors.max())) == pytest.approx(each.scale.channels, rel=1e-5)
    if f"{norm}.bias" in plain:
        torch.testing.assert_close(tensors[f"{norm}.bias"], factors * plain[f"{norm}.bias"])
    p, q = (outputs(folder).logits[:1].double().log_softmax(-1) for folder in (source, each.out))
    kl = torch.nn.functional.kl_div(q.flatten(0, 1), p.flatten(0, 1), log_target=True, reduction="batchmean")
    assert each.scale.after == pytest.approx(float(kl), rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_one_block_chooses_nothing(tiny_checkpoint, out, family):
    run = compress(tiny_checkpoint(family), out("o"), "keep: 0.5", ids=blocks(1))
    assert run.scale is None
    assert {record.ridge for record in run.refits} == {RIDGE}
    assert all(record.held_out is None for record in run.refits)


def test_where_nothing_was_reduced_the_final_norm_stays(tiny_checkpoint, out):
    run = compress(tiny_checkpoint("llama"), out("o"), "keep: 1.0")
    assert run.scale is None
    assert run.refits == []


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_stay_whole_stay_bit_for_bit(tiny_checkpoint, out, family):
    plan = "keep: 0.5\nscale: none\nlayers:\n  - {match: '0,2', keep: 1.0}"
    run = compress(tiny_checkpoint(family, num_hidden_layers=3), out("o"), plan)
    old, new = load_file(run.source / "model.safetensors"), run.tensors()
    prefix = CheckpointReader(run.source).family.layers
    same = {n for n in old if not n.startswith(f"{prefix}.1.")}
    assert same == {n for n in new if not n.startswith(f"{prefix}.1.")}
    assert all(torch.equal(old[name], new[name]) for name in same)
    norms = [n for n in old if n.startswith(f"{prefix}.1.") and ("norm" in n or "ln_" in n)]
    assert len(norms) >= 2
    assert all(torch.equal(old[name], new[name]) for name in norms)
    config = json.loads((run.out / "config.json").read_text())
    assert all(path.startswith(f"{prefix}.1.") for path in config["quantization_config"]["modules"])
    assert {record["layer"] for record in run.records} == {1}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_component_is_left_alone(tiny_checkpoint, out, family):
    """With no refit, shrinking the MLP touches nothing of the attention."""
    run = compress(tiny_checkpoint(family), out("o"), "components: {mlp: {keep: 0.5}}\nrefit: none")
    old, new = load_file(run.source / "model.safetensors"), run.tensors()
    attention = [name for name in old if "attn" in name]
    assert attention
    assert all(torch.equal(old[name], new[name]) for name in attention)
    assert not any(
        "attn" in path
        for path in json.loads((run.out / "config.json").read_text())["quantization_config"]["modules"]
    )


@pytest.mark.parametrize("family", [*FAMILIES, "llama+"])
@pytest.mark.parametrize("keep", [0.25, 0.5])
def test_the_kl_of_the_scores_is_that_of_the_models_attention(biased, out, family, keep):
    run = compress(biased(family), out("o"), f"components: {{qk: {{keep: {keep}}}}}\nrefit: none")
    first = blocks()[:1]
    with torch.no_grad():
        old, new = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")(
                first, output_attentions=True
            ).attentions[0]
            for folder in (run.source, run.out)
        )
    terms = torch.where(old > 0, old * (old.log() - new.log()), 0.0)
    measured = run.record(0, "qk")["measured"]["kl"]
    assert measured == pytest.approx(float(terms.sum(-1).mean()), rel=1e-3)
    assert all(record["measured"]["kl"] > 0 for record in run.records)


def test_keeping_more_of_the_scores_costs_less(tiny_checkpoint, out):
    source = tiny_checkpoint("gpt2")
    found = [
        compress(source, out(f"o{rank}"), f"components: {{qk: {{rank: {rank}}}}}\nrefit: none").record(
            0, "qk"
        )
        for rank in (2, 4, 6)
    ]
    kl, predicted = (
        [r[word][key] for r in found] for word, key in (("measured", "kl"), ("predicted", "error"))
    )
    assert kl == sorted(kl, reverse=True)
    assert predicted == sorted(predicted, reverse=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("refit", ["none", "residual"])
@pytest.mark.parametrize("layers_done", [1, 2])
@pytest.mark.parametrize("method", ["a3", "two_sided_svd"])
def test_a_run_taken_up_again_ends_with_the_same_bytes(
    tiny_checkpoint, out, family, method, refit, layers_done
):
    source = tiny_checkpoint(family, num_hidden_layers=3)
    plan = (
        f"keep: 0.5\nmethod: {method}\nrefit: {refit}\ncalibration: {{gradient_samples: 3}}\n"
        "layers:\n  - {match: 1, keep: 1.0}"
    )
    straight = compress(source, out("a"), plan)
    with pytest.raises(Killed):
        compress(source, out("b"), plan, stop_after=layers_done)
    assert not out("b").exists()
    resumed = compress(source, out("b"), plan)
    names = sorted(path.name for path in straight.out.iterdir())
    assert names == sorted(path.name for path in resumed.out.iterdir())
    for name in names:
        assert (straight.out / name).read_bytes() == (resumed.out / name).read_bytes(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_go_through_every_layer_once_and_those_held_out_once_more(tiny_checkpoint, out, family, runs):
    """What is measured on them needs solutions, which need the moments of all."""
    compress(
        tiny_checkpoint(family),
        out("measured"),
        "method: whitened_svd\nkeep: 0.5\nrefit: none\nlayers: [{match: 0, keep: 1}]",
    )
    assert runs() == {(0, False): 5, (1, False): 5 + int(held_out_mask(5).sum())}


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_taken_once_of_their_samples_for_the_layers_that_are_left(
    tiny_checkpoint, out, family, monkeypatch
):
    source, swept = tiny_checkpoint(family, num_hidden_layers=3), []

    class Sweep(GradientSweep):
        def __init__(self, stream: Any, ids: Tensor, *rest: Any, **named: Any) -> None:
            super().__init__(stream, ids, *rest, **named)
            self.samples = len(ids)

        def run(self, needed: Any, seed: int) -> Any:
            found = super().run(needed, seed)
            swept.append((self.samples, sorted(needed), found))
            return found

    monkeypatch.setattr(lrc.walk.backward, "GradientSweep", Sweep)
    plan = (
        "method: two_sided_svd\nkeep: 0.5\ncalibration: {gradient_samples: 2}\nlayers: [{match: 0, keep: 1}]"
    )
    with pytest.raises(Killed):
        compress(source, out("o"), plan, stop_after=2)
    compress(source, out("o"), plan)
    assert [each[:2] for each in swept] == [(2, [1, 2]), (2, [2])]
    assert not swept[1][2]  # let go as the layers were solved
    compress(source, out("whitened"), "method: whitened_svd\nkeep: 0.5")
    assert len(swept) == 2


def test_bfloat16_checkpoints_are_summed_in_float32_and_saved_as_they_were(
    tiny_checkpoint, out, all_measured
):
    source = tiny_checkpoint("llama")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(source)
    run = compress(source, out("o"), "keep: 0.5", dtype=torch.bfloat16)
    assert {t.dtype for n, t in run.tensors().items() if not n.endswith("rotary_columns")} == {torch.bfloat16}
    for layer in range(2):
        for target in ("ov", "mlp"):
            record = run.record(layer, target)
            assert record["measured"]["error"] == pytest.approx(record["predicted"]["error"], rel=0.02)
    exact = outputs(source).hidden_states[-1]
    error = (outputs(run.out).hidden_states[-1] - exact).norm() / exact.norm()
    reference = compress(source, out("f"), "keep: 0.5")
    single = (outputs(reference.out).hidden_states[-1] - exact).norm() / exact.norm()
    assert float(error) == pytest.approx(float(single), rel=0.1)


def test_batch_size_changes_only_rounding(tiny_checkpoint, out, monkeypatch):
    source = tiny_checkpoint("llama")
    one = compress(source, out("one"), "keep: 0.5")
    run_layers = Compressor.run
    monkeypatch.setattr(Compressor, "run", lambda self, ids, size, advance: run_layers(self, ids, 5, advance))
    other = compress(source, out("other"), "keep: 0.5")
    assert [r.ridge for r in one.refits] == [r.ridge for r in other.refits]
    assert one.scale is not None
    assert other.scale is not None
    assert one.scale.value == pytest.approx(other.scale.value, rel=1e-4)
    a, b = outputs(one.out).logits, outputs(other.out).logits
    assert (a - b).abs().max() < 1e-3 * a.abs().max()
