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
from typer.testing import CliRunner

import lrc
from lrc.checkpoint.reader import CheckpointReader
from lrc.cli import app
from lrc.compression.assemble import assemble
from lrc.compression.refit import REFITS
from lrc.errors import UserError
from lrc.families import canonical, describe, families
from lrc.moments.observe import observe
from lrc.walk.stream import ModelStream

CPU = torch.device("cpu")
WORDS = "It was a bright cold day in April, and nobody had yet counted the words of this sentence. " * 12
# Heads narrower in keys and values, fewer neurons: everything that the compressed attention can do.
PLAN = """\
format: 1
keep: 0.5
scale: logits
components: {qk: {metric: attention}}
calibration: {samples: 8, seq_len: 32}
"""


@dataclass(frozen=True)
class Made:
    """A tiny model of a family and its compressed form."""

    source: CheckpointReader
    out: Path

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.out / "lrc.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=sorted(families()))
def made(request: pytest.FixtureRequest, shared_checkpoint: Any, tmp_path_factory: Any) -> Made:
    folder, work = shared_checkpoint(request.param), tmp_path_factory.mktemp("family")
    (work / "text.txt").write_text(WORDS, encoding="utf-8")
    (work / "plan.yaml").write_text(PLAN, encoding="utf-8")
    words = ["compress", folder, "--plan", work / "plan.yaml", "--calib", work / "text.txt"]
    result = CliRunner().invoke(
        app, [str(word) for word in (*words, "--out", work / "out", "--device", "cpu", "--no-eval")]
    )
    assert result.exit_code == 0, result.output
    return Made(CheckpointReader(folder), work / "out")


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


def test_roles_reassemble_the_state_bit_for_bit(made: Made) -> None:
    family, architecture = made.source.family, made.source.architecture
    for index in range(architecture.layers):
        state, again = made.source.layer(index), dict[str, Tensor]()
        for stored in set(family.projections.values()):
            roles = stored.fused or [r for r, each in family.projections.items() if each is stored]
            parts = [canonical(family, architecture, state, role) for role in roles]
            weight = torch.cat([weight for weight, _ in parts])
            again[f"{stored.module}.weight"] = weight.T if stored.input_major else weight
            if parts[0][1] is not None:
                again[f"{stored.module}.bias"] = torch.cat([b for _, b in parts if b is not None])
        matrices = {name for name, tensor in state.items() if tensor.ndim == 2}
        assert matrices <= set(again)
        assert all(torch.equal(tensor, state[name]) for name, tensor in again.items())


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
        close(mapped, calls[stored.module].output[..., architecture.output_rows(role)])


def test_the_halves_add_up_to_the_layer(made: Made, stock: Any, ids: Tensor) -> None:
    family = made.source.family
    layer = stock.get_submodule(f"{family.layers}.1")
    paths = {half.name: half.module for half in family.halves}
    norms = {f"{half.name} norm": half.norm for half in family.halves}
    closing = {f"{half.name} end": family.projections[half.output].module for half in family.halves}
    with observe(layer, {**paths, **norms, **closing}) as calls, observe(layer, {"layer": ""}) as whole:
        logits(stock, ids)
    stream = whole["layer"].input
    for half in family.halves:
        close(calls[f"{half.name} norm"].input, stream)
        assert torch.equal(calls[half.name].input, calls[f"{half.name} norm"].output)
        output = calls[half.name].output
        stream = stream + (output[0] if isinstance(output, tuple) else output)
        close(calls[f"{half.name} end"].output, output[0] if isinstance(output, tuple) else output)
    out = whole["layer"].output
    close(out[0] if isinstance(out, tuple) else out, stream)


def test_nothing_reduced_gives_the_same_logits(made: Made, stock: Any, ids: Tensor) -> None:
    architecture, stream = made.source.architecture, ModelStream(made.source, CPU, torch.float32)
    (batch,) = stream.embed([ids])
    for index in range(architecture.layers):
        state = made.source.layer(index)
        whole = assemble(architecture, stream.skeletons[index], state, [], architecture.matrices)
        assert set(whole.paths) == set(architecture.matrices)
        stream.advance(stream.filled(whole.module, whole.state), index, [batch])
    close(stream.tail()(batch.hidden), logits(stock, ids))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_generates_the_same_with_caches_and_without(made: Made, ids: Tensor, implementation: str) -> None:
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
    assert widths == [(sizes[i, "qk"], sizes[i, "ov"]) for i in range(made.source.architecture.layers)]
    assert all(max(each) < made.source.architecture.head_dim for each in widths)


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
    assert all(record.error.after < record.error.before for record in records)


def test_the_logit_scale_scales_the_logits(made: Made, reduced: Any, ids: Tensor) -> None:
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


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "parallel": ({"parallel": True}, {}, "in parallel"),
    "1 + w": ({"norm_offset": 1}, {}, r"multiply by 1 \+ w"),
    "qk norm": ({"qk_norm": "head"}, {}, "norms of queries and keys"),
    "interleaved": ({"rotary": "interleaved"}, {}, "neighbouring dimensions"),
    "partial": ({"rotary_share": "share"}, {"share": 0.5}, "share=0.5"),
    "soft caps": ({"soft_caps": ("cap",)}, {"cap": 50.0}, "cap=50"),
    "window": ({"window": "window"}, {"window": 16}, "window=16"),
    "experts": ({"experts": "experts"}, {"experts": 8}, "experts=8"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_fact_without_code_is_refused_before_any_weight_is_read(made: Made, name: str) -> None:
    facts, config, message = REFUSED[name]
    source = made.source
    shapes = {key: stored.shape for key, stored in source.tensors.items()}
    settings = copy.deepcopy(source.config)
    for key, value in config.items():
        setattr(settings, key, value)
    with pytest.raises(UserError, match=f"{source.family.model_type} is not supported with .*{message}"):
        describe(replace(source.family, **facts), settings, shapes)


def test_a_norm_behind_a_module_and_a_fusing_by_head_are_refused(made: Made) -> None:
    family = made.source.family
    attention, mlp = family.halves
    behind = replace(family, halves=(replace(attention, post_norm="post"), mlp))
    with pytest.raises(UserError, match=rf"a norm after {attention.module} \(post\)"):
        describe(behind, made.source.config, {})
    stored = replace(family.projections["q"], order="by_head")
    with pytest.raises(UserError, match=rf"fused head by head \({stored.module}\)"):
        describe(replace(family, projections={**family.projections, "q": stored}), made.source.config, {})


def test_layers_that_differ_are_named_with_both_shapes(made: Made) -> None:
    source, family = made.source, made.source.family
    shapes = {key: stored.shape for key, stored in source.tensors.items()}
    name = f"{family.layers}.1.{family.projections[family.mlp_output].module}.weight"
    shapes[name] = tuple(n if n == source.architecture.hidden else n - 8 for n in shapes[name])
    with pytest.raises(UserError, match=rf"{name} is .* in layer 0 it is .*"):
        describe(family, source.config, shapes)
