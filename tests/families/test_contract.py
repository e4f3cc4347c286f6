"""What every family found in the folder must do, unasked, on its tiny model."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import lrc
from lrc.checkpoint.reader import CheckpointReader
from lrc.cli import app
from lrc.compression.assemble import assemble
from lrc.compression.ridge import REFITS
from lrc.errors import UserError
from lrc.families import Family, canonical, describe, families, logit_rule
from lrc.moments.observe import observe
from lrc.walk.stream import ModelStream

CPU = torch.device("cpu")
WORDS = "It was a bright cold day in April, and nobody had yet counted the words of this sentence. " * 12
CALIBRATION = "calibration: {samples: 8, seq_len: 32}\n"
PLAN = f"format: 1\nkeep: 0.5\n{CALIBRATION}"
# Narrower heads of keys as of values, where the family can.
NARROW_KEYS = "components: {qk: {metric: attention}}\n"


@dataclass(frozen=True)
class Made:
    """A tiny model of a family and its compressed form."""

    source: CheckpointReader
    out: Path

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.out / "lrc.json").read_text(encoding="utf-8"))

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.out / "report.json").read_text(encoding="utf-8"))


def capped(source: CheckpointReader) -> bool:
    """Tells whether logits end in a soft cap, so that a norm cannot scale them."""
    return logit_rule(source.family, source.config).cap is not None


@pytest.fixture(scope="module", params=sorted(families()))
def made(
    request: pytest.FixtureRequest, shared_checkpoint: Any, tmp_path_factory: Any, module_without_pages: None
) -> Made:
    folder, work = shared_checkpoint(request.param), tmp_path_factory.mktemp("family")
    (work / "text.txt").write_text(WORDS, encoding="utf-8")
    source = CheckpointReader(folder)
    plan = PLAN + (NARROW_KEYS if "qk" in source.architecture.targets else "")
    plan += "" if capped(source) else "scale: logits\n"
    (work / "plan.yaml").write_text(plan, encoding="utf-8")
    words = ["compress", folder, "--plan", work / "plan.yaml", "--calib", work / "text.txt"]
    words += ["--ppl", work / "text.txt", "--out", work / "out", "--device", "cpu"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    return Made(source, work / "out")


@pytest.fixture(scope="module")
def stock(made: Made) -> Any:
    return lrc.load(made.source.folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def reduced(made: Made) -> Any:
    return lrc.load(made.out, dtype=torch.float32)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, 256, (2, 11), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    return model(ids, **kwargs).logits


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_roles_are_all_rows_of_the_state_bit_for_bit(made: Made) -> None:
    family, architecture = made.source.family, made.source.architecture

    def in_order(rows: Tensor) -> Tensor:
        return rows[rows.flatten(1)[:, 0].argsort()]

    for index in range(architecture.layers):
        state, covered = made.source.layer(index), set[str]()
        for stored in set(family.projections.values()):
            roles = stored.fused or [r for r, each in family.projections.items() if each is stored]
            parts = [canonical(family, architecture, state, role) for role in roles]
            name = f"{stored.module}.weight"
            weight = state[name].T if stored.input_major else state[name]
            assert torch.equal(in_order(torch.cat([each for each, _ in parts])), in_order(weight))
            covered.add(name)
            if biases := [bias for _, bias in parts if bias is not None]:
                whole = state[f"{stored.module}.bias"]
                assert torch.equal(torch.cat(biases).sort().values, whole.sort().values)
        matrices = {name for name, tensor in state.items() if tensor.ndim == 2 and "norm" not in name}
        assert matrices == covered


def test_a_projection_maps_what_its_site_has_to_what_its_module_returns(
    made: Made, stock: Any, ids: Tensor
) -> None:
    family, architecture = made.source.family, made.source.architecture
    layer = stock.get_submodule(f"{family.layers}.1")
    modules = {stored.module for stored in family.projections.values()}
    with observe(layer, {**family.sites, **{path: path for path in modules}}) as calls:
        logits(stock, ids)
    for role, stored in family.projections.items():
        weight, bias = canonical(family, architecture, made.source.layer(1), role)
        mapped = F.linear(calls[family.site(role)].input, weight, bias)
        close(mapped, architecture.own(role, calls[stored.module].output, -1).view_as(mapped))


def test_the_halves_add_up_to_the_layer(made: Made, stock: Any, ids: Tensor) -> None:
    family, architecture = made.source.family, made.source.architecture
    layer = stock.get_submodule(f"{family.layers}.1")
    used = [path for half in family.halves for path in (half.module, half.norm, half.post_norm) if path]
    closing = [family.projections[half.output].module for half in family.halves]
    with (
        observe(layer, {path: path for path in (*used, *closing)}) as calls,
        observe(layer, {"": ""}) as whole,
    ):
        logits(stock, ids)
    before = stream = whole[""].input
    for half in family.halves:
        close(calls[half.entry].input, before if architecture.parallel else stream)
        output = calls[family.projections[half.output].module].output.view_as(stream)
        if half.module:
            close(first(calls[half.module].output), output)
            if half.norm:
                assert torch.equal(calls[half.module].input, calls[half.norm].output)
        if half.post_norm:
            close(calls[half.post_norm].input, output)
            output = calls[half.post_norm].output
        stream = stream + architecture.residual_factor * output
    close(first(whole[""].output), stream)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def test_nothing_reduced_gives_the_same_bits(made: Made, stock: Any, ids: Tensor) -> None:
    architecture, stream = made.source.architecture, ModelStream(made.source, CPU, torch.float32)
    (batch,) = stream.embed([ids])
    for index in range(architecture.layers):
        state = made.source.layer(index)
        whole = assemble(architecture, stream.skeletons[index], state, [], architecture.matrices)
        assert set(whole.paths) == set(architecture.matrices)
        stream.advance(stream.filled(whole.module, whole.state), index, [batch])
    assert torch.equal(stream.tail()(batch.hidden), logits(stock, ids))


def test_keep_1_writes_the_original(made: Made, stock: Any, ids: Tensor, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(WORDS, encoding="utf-8")
    plan, text, out = f"{{keep: 1, {CALIBRATION.strip()}}}", str(tmp_path / "text.txt"), tmp_path / "out"
    lrc.compress(made.source.folder, plan, out=out, calib=text, ppl=[], run=lrc.Run(device="cpu"))
    same_tensors(made.source.family, out, made.source.folder)
    assert torch.equal(logits(lrc.load(out), ids), logits(stock, ids))


def test_saving_again_changes_no_bit(made: Made, reduced: Any, ids: Tensor, tmp_path: Path) -> None:
    reduced.save_pretrained(tmp_path / "once")
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "once", attn_implementation=usual(made))
    again.save_pretrained(tmp_path / "twice")
    for folder in (tmp_path / "once", tmp_path / "twice"):
        same_tensors(made.source.family, folder, made.out)
    assert torch.equal(logits(lrc.load(tmp_path / "twice"), ids), logits(reduced, ids))


def usual(made: Made) -> str:
    """The attention that computes the model: transformers before 5.21 runs gemma2 in sdpa, without its soft caps."""
    return "sdpa" if made.source.family.sdpa else "eager"


def same_tensors(family: Family, *folders: Path) -> None:
    files = (load_file(folder / "model.safetensors") for folder in folders)
    ours, theirs = ({family.own_name(name): tensor for name, tensor in file.items()} for file in files)
    assert {name: t.dtype for name, t in ours.items()} == {name: t.dtype for name, t in theirs.items()}
    assert [name for name, tensor in ours.items() if not torch.equal(tensor, theirs[name])] == []


def test_the_perplexities_of_the_report_are_those_of_a_plain_script(made: Made) -> None:
    starts = made.source.family.starts_texts
    (change,) = made.report["perplexity"]
    for folder, found in ((made.source.folder, change["before"]), (made.out, change["after"])):
        assert found["value"] == pytest.approx(plain_perplexity(folder, starts, usual(made)), rel=1e-5)
        assert any("every window starts with" in note for note in found["notes"]) == starts


def plain_perplexity(folder: Path, starts: bool, attention: str) -> float:
    """Exp of the mean cross entropy on the text's windows, each with a BOS token if ``starts``; nothing of lrc."""
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(WORDS)["input_ids"])
    windows = ids.unfold(0, *[model.config.max_position_embeddings - starts] * 2)
    if starts:
        windows = F.pad(windows, (1, 0), value=tokenizer.bos_token_id)
    scores = logits(model, windows)[:, :-1]
    return F.cross_entropy(scores.double().flatten(0, 1), windows[:, 1:].flatten()).exp().item()


@pytest.mark.parametrize("fuse", [False, True])
def test_half_precision_is_near(made: Made, reduced: Any, ids: Tensor, fuse: bool) -> None:
    half, expected = lrc.load(made.out, dtype=torch.bfloat16, fuse=fuse), logits(reduced, ids)
    assert (logits(half, ids) - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generates_the_same_with_caches_and_without(made: Made, ids: Tensor, implementation: str) -> None:
    if implementation == "sdpa" and not made.source.family.sdpa:
        # Since 5.21 transformers refuses it, before that lrc does.
        with pytest.raises(
            (ValueError, UserError), match=r"does not support|pass attn_implementation='eager'"
        ):
            lrc.load(made.out, attn_implementation=implementation)
        return
    reduced: Any = lrc.load(made.out, dtype=torch.float32, attn_implementation=implementation)
    greedy: dict[str, Any] = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8, "pad_token_id": 0}
    expected = reduced.generate(ids, **greedy, use_cache=False)
    assert torch.equal(reduced.generate(ids, **greedy), expected)
    static = reduced.generate(ids, **greedy, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)


def test_the_cache_is_narrower(made: Made, reduced: Any, ids: Tensor) -> None:
    sizes = {(t["layer"], t["target"]): t["size"] for t in made.manifest["targets"]}
    cache = reduced(ids, use_cache=True).past_key_values
    widths = [(layer.keys.shape[-1], layer.values.shape[-1]) for layer in cache.layers]
    full, layers = made.source.architecture.head_dim, range(made.source.architecture.layers)
    assert widths == [(sizes.get((i, "qk"), full), sizes[i, "ov"]) for i in layers]
    assert all(v < full for _, v in widths)
    if "qk" in made.source.architecture.targets:
        assert all(qk < full for qk, _ in widths)


def test_left_padding_changes_nothing(reduced: Any, ids: Tensor) -> None:
    pad, mask = 4, torch.ones_like(ids)
    ids[0, :pad], mask[0, :pad] = 0, 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    together = logits(reduced, ids, attention_mask=mask, position_ids=positions)
    close(together[0, pad:], logits(reduced, ids[:1, pad:])[0])
    close(together[1], logits(reduced, ids[1:])[0])


def test_the_refit_lowers_the_error_of_the_stream(made: Made) -> None:
    records = REFITS.validate_python(made.manifest["refits"])
    closing = [half.output for half in made.source.family.halves]
    layers = range(made.source.architecture.layers)
    assert [(r.layer, r.role) for r in records] == [(i, role) for i in layers for role in closing]
    assert any(record.applied for record in records)
    exact = made.source.family.halves[0].post_norm is None
    assert all(record.error.after < record.error.before for record in records if record.applied or exact)


def test_the_logit_scale_scales_the_logits(made: Made, reduced: Any, ids: Tensor) -> None:
    if capped(made.source):
        assert made.manifest["scale"] is None
        return
    scale: float = made.manifest["scale"]["value"]
    name = made.source.family.final_norm
    assert abs(scale - 1) > 1e-3
    scaled = logits(reduced, ids)
    norm, original = reduced.get_submodule(name), load_file(made.source.folder / "model.safetensors")
    kept = {key: tensor.clone() for key, tensor in norm.state_dict().items()}
    norm.load_state_dict({key: original[f"{name}.{key}"] for key in kept})
    try:
        close(scaled, scale * logits(reduced, ids))
    finally:
        norm.load_state_dict(kept)


def test_a_factorized_embedding_is_near_the_table(
    made: Made, stock: Any, ids: Tensor, tmp_path: Path
) -> None:
    body = "keep: 1.0\nrefit: none\nprojections: {embed: {method: svd, rank: 28}}"
    (tmp_path / "plan.yaml").write_text(f"format: 1\n{body}\n{CALIBRATION}", encoding="utf-8")
    (tmp_path / "text.txt").write_text(WORDS, encoding="utf-8")
    run, text = lrc.Run(device="cpu"), str(tmp_path / "text.txt")
    lrc.compress(
        made.source.folder, tmp_path / "plan.yaml", out=tmp_path / "out", calib=text, ppl=[], run=run
    )
    old, new = stock.get_input_embeddings()(ids), lrc.load(tmp_path / "out").get_input_embeddings()(ids)
    assert (new - old).norm() < 0.3 * old.norm()


def test_experts_are_refused_before_any_weight_is_read(made: Made) -> None:
    settings = copy.deepcopy(made.source.config)
    settings.experts = 8
    with pytest.raises(UserError, match=f"{made.source.family.model_type} is not supported with experts.*=8"):
        describe(replace(made.source.family, experts="experts"), settings, {})


# A fact of the family and of the config, and why queries and keys cannot shrink together.
CLOSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "qk norm": ({"qk_norm": "head"}, {}, "a norm over each head"),
    "interleaved": ({"rotary": "interleaved"}, {}, "interleaved"),
    "partial": ({"rotary_share": "share"}, {"rope_parameters": {"share": 0.5}}, "share=0.5"),
    "soft caps": ({"score_cap": "cap"}, {"cap": 50.0}, "cap=50"),
}


@pytest.mark.parametrize("name", CLOSED)
def test_a_component_that_cannot_shrink_is_no_target(made: Made, name: str) -> None:
    facts, config, message = CLOSED[name]
    settings = copy.deepcopy(made.source.config)
    for key, value in config.items():
        setattr(settings, key, value)
    shapes = {key: stored.shape for key, stored in made.source.tensors.items()}
    found = describe(replace(made.source.family, **facts), settings, shapes)
    assert message in found.closed["qk"]
    assert "qk" not in found.targets
    assert {"q", "k", "ov", "mlp"} <= set(found.targets)


def test_layers_that_differ_are_named_with_both_shapes(made: Made) -> None:
    source, family = made.source, made.source.family
    shapes = {key: stored.shape for key, stored in source.tensors.items()}
    name = f"{family.layers}.1.{family.projections[family.mlp_output].module}.weight"
    shapes[name] = tuple(n if n == source.architecture.hidden else n - 8 for n in shapes[name])
    with pytest.raises(UserError, match=rf"{name} is .* in layer 0 it is .*"):
        describe(family, source.config, shapes)
