"""The embedding and the head, factorized: what is saved is what was solved, loads, and runs like its dense equal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import lrc
from lrc.checkpoint.reader import CheckpointReader
from lrc.checkpoint.staging import staging
from lrc.compression.finish import target_records, write_checkpoint
from lrc.compression.loop import Compressor
from lrc.compression.refit import held_out_mask
from lrc.errors import UserError
from lrc.families import family_of
from lrc.hub.names import ASSETS, ResolvedModel
from lrc.methods import methods
from lrc.modules.low_rank import FactorizedEmbedding
from lrc.moments import collectors
from lrc.plan.document import Document
from lrc.plan.job import Job, jobs_at_keeps
from lrc.plan.library import read_draft
from lrc.plan.resolve import Draft, parse_plan, resolve
from lrc.run.stopwatch import Stopwatch
from lrc.walk.stream import ModelStream

CPU = torch.device("cpu")
TIED = [("gpt2", {}), ("llama", {"tie_word_embeddings": True})]
UNTIED = [("gpt2", {"tie_word_embeddings": False}), ("llama", {})]
EMBED = "embed: {method: whitened_svd, rank: 12}"
HEAD = "lm_head: {method: whitened_svd, rank: 14}"
PLAIN = "embed: {method: svd, rank: 12}"


class Killed(Exception):
    pass


def blocks(vocab: int = 256) -> Tensor:
    words = torch.randint(1, vocab, (12, 4), generator=torch.Generator().manual_seed(0))
    chosen = torch.randint(0, 12, (5, 8), generator=torch.Generator().manual_seed(1))
    return words[chosen].flatten(1)


def compress(source: Path, out: Path, body: str, stop_after: int = 0) -> list[dict[str, Any]]:
    """Compress by a plan's text; ``stop_after`` dies after so many layers. Returns the records."""
    reader = CheckpointReader(source)
    plan = resolve(parse_plan(f"format: 1\n{body}\n", "p.yaml"), reader.architecture, methods(), collectors())
    job, left = (
        Job(ResolvedModel(source, str(source)), reader, Draft(plan.plan, Document.made("p.yaml", {})), plan),
        [stop_after],
    )

    def advance() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    def start(label: str, total: int) -> Callable[[int], object]:
        return lambda done: [advance() for _ in range(done) if label == "compress"]

    with staging(out, {"plan": plan.as_dict()}, source=Path("source"), fresh=False, force=False) as stage:
        stream = ModelStream(reader, CPU, torch.float32)
        Compressor(stream, plan, stage, Stopwatch(CPU)).run(blocks(reader.architecture.vocab), 2, start)
        write_checkpoint(job, stage, {})
        records = target_records(job, stage)
        stage.publish()
    return records


def load(folder: Path, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **kwargs).eval()


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    return model(ids).logits


def dense_equal(source: Path, out: Path) -> Any:
    """The original with the stored final norm, and products of the stored factors for its embedding and its head."""
    model, stored = load(source), load_file(out / "model.safetensors")
    table = json.loads((out / "config.json").read_text())["quantization_config"]["modules"]

    def product(path: str) -> torch.nn.Parameter:
        return torch.nn.Parameter(stored[f"{path}.B.weight"].float() @ stored[f"{path}.A.weight"].float())

    family = family_of(model.config.model_type)
    norm = model.get_submodule(family.final_norm)
    norm.load_state_dict({name: stored[f"{family.final_norm}.{name}"] for name in norm.state_dict()})
    if family.embedding in table:
        model.get_input_embeddings().weight = product(family.embedding)
    if family.head in table:
        tied = f"{family.head}.B.weight" not in stored
        model.get_output_embeddings().weight = product(family.embedding if tied else family.head)
    return model


def check_equal(source: Path, out: Path) -> Any:
    model, ids = load(out), blocks()
    expected = logits(dense_equal(source, out), ids)
    tolerance = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-4, atol=tolerance)
    assert (logits(load(source), ids) - expected).abs().max() > 100 * tolerance
    greedy: dict[str, Any] = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5, "pad_token_id": 0}
    with torch.no_grad():
        written = model.generate(ids[:1], **greedy)
    assert torch.equal(written, dense_equal(source, out).generate(ids[:1], **greedy))
    return model


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_the_built_in_models_run_like_their_dense_equals(tmp_path, name):
    compress(ASSETS / name, tmp_path / "out", "projections: {embed: {method: svd, rank: 64}}")
    model = check_equal(ASSETS / name, tmp_path / "out")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, FactorizedEmbedding)
    assert (embedding.num_embeddings, embedding.embedding_dim, embedding.rank) == (4096, 192, 64)
    assert embedding.A.weight is head.A.weight
    assert embedding.B.weight is head.B.weight
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not [key for key, tensor in stored.items() if key.startswith("lm_head") and tensor.numel()]


@pytest.mark.parametrize("entries", [EMBED, HEAD, f"{EMBED}, {HEAD}", "lm_head: {method: svd, keep: 0.5}"])
@pytest.mark.parametrize(("family", "config"), UNTIED)
def test_untied_ones_run_like_their_dense_equals(tiny_checkpoint, tmp_path, family, config, entries):
    source = tiny_checkpoint(family, **config)
    compress(source, tmp_path / "out", f"projections: {{{entries}}}")
    model = check_equal(source, tmp_path / "out")
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight


@pytest.mark.parametrize("refit", ["none", "residual"])
@pytest.mark.parametrize(("family", "config"), TIED)
@torch.no_grad()
def test_predicted_is_measured_and_what_is_stored(tiny_checkpoint, tmp_path, family, config, refit):
    source = tiny_checkpoint(family, **config)
    (record,) = compress(source, tmp_path / "out", f"refit: {refit}\nprojections: {{{EMBED}}}")
    model, new = load(source), dense_equal(source, tmp_path / "out").get_input_embeddings().weight.double()
    old = model.get_input_embeddings().weight.double()
    ids = blocks()[~held_out_mask(5)] if refit == "residual" else blocks()
    hidden = model.base_model(ids).last_hidden_state.flatten(0, 1).double()
    uses = [(new[ids] - old[ids], old[ids]), (hidden @ (new - old).T, hidden @ old.T)]
    expected = sum(float(d.square().sum() / o.square().sum()) for d, o in uses) / 2
    assert record["measured"]["error"] == pytest.approx(expected, rel=1e-4)
    assert record["measured"]["reference"] == 1
    # Tokens that the text does not have count once each.
    assert record["predicted"]["error"] == pytest.approx(expected, rel=0.5)
    assert (record["target"], record["layer"]) == ("embed", None)


@pytest.mark.parametrize(("family", "config"), UNTIED)
@torch.no_grad()
def test_the_head_is_solved_for_the_originals_hidden_states(tiny_checkpoint, tmp_path, family, config):
    source = tiny_checkpoint(family, **config)
    records = compress(source, tmp_path / "out", f"keep: 0.5\nprojections: {{{PLAIN}, {HEAD}}}")
    (head,) = [record for record in records if record["target"] == "lm_head"]
    model = load(source)
    seen = blocks()[~held_out_mask(5)]
    x = model.base_model(seen).last_hidden_state.flatten(0, 1).double()
    y = x @ model.lm_head.weight.double().T
    values = torch.linalg.svdvals(y)  # the best that rank 14 can do is to lose all but 14 of them
    expected = float(values[14:].square().sum()) / len(x)
    assert head["predicted"]["error"] == pytest.approx(expected, rel=1e-3)
    assert head["measured"]["error"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("family", "config"), TIED)
def test_the_refit_starts_from_the_reduced_embedding(tiny_checkpoint, tmp_path, family, config):
    """With it the layers make up for what the embedding lost."""
    source, ids = tiny_checkpoint(family, **config), blocks()[~held_out_mask(5)]
    original = load(source)
    errors = {}
    for refit in ("none", "residual"):
        out = tmp_path / refit
        body = f"refit: {refit}\nmethod: svd\nprojections: {{{PLAIN}, o: {{keep: 0.99}}}}"
        compress(source, out, body)
        with torch.no_grad():
            old, new = (m(ids, output_hidden_states=True).hidden_states[1:-1] for m in (original, load(out)))
        errors[refit] = sum(float((a - b).square().mean()) for a, b in zip(old, new, strict=True))
    assert errors["residual"] < 0.8 * errors["none"]


@pytest.mark.parametrize("layers_done", [1, 2])
@pytest.mark.parametrize(
    ("family", "config", "entries"), [(*TIED[0], EMBED), (*UNTIED[1], f"{EMBED}, {HEAD}")]
)
def test_a_run_taken_up_again_ends_with_the_same_bytes(
    tiny_checkpoint, tmp_path, family, config, entries, layers_done
):
    source, body = tiny_checkpoint(family, **config), f"keep: 0.5\nprojections: {{{entries}}}"
    compress(source, tmp_path / "a", body)
    with pytest.raises(Killed):
        compress(source, tmp_path / "b", body, stop_after=layers_done)
    compress(source, tmp_path / "b", body)
    for name in sorted(path.name for path in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("family", "config", "entries"), [(*TIED[1], EMBED), (*UNTIED[0], f"{EMBED}, {HEAD}")]
)
def test_a_run_killed_before_the_scale_ends_with_the_same_bytes(
    tiny_checkpoint, tmp_path, monkeypatch, family, config, entries
):
    source, body = tiny_checkpoint(family, **config), f"keep: 0.5\nprojections: {{{entries}}}"
    compress(source, tmp_path / "a", body)
    with monkeypatch.context() as patch:
        patch.setattr("lrc.compression.loop.fit_scale", killed)
        with pytest.raises(Killed):
            compress(source, tmp_path / "b", body)
    compress(source, tmp_path / "b", body)
    for name in ("model.safetensors", "config.json", "lrc.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def killed(*_: Any) -> None:
    raise Killed


SCALED = [
    (*TIED[0], f"keep: 0.5\nprojections: {{{EMBED}}}"),
    (*TIED[1], f"keep: 0.5\nprojections: {{{EMBED}}}"),
    (*UNTIED[0], f"keep: 0.5\nprojections: {{{EMBED}, {HEAD}}}"),
    (*UNTIED[1], f"keep: 0.5\nprojections: {{{HEAD}}}"),
    (*UNTIED[1], f"projections: {{{HEAD}}}"),  # no layer shrinks: the streams are one to the end
]


@pytest.mark.parametrize(("family", "config", "body"), SCALED)
@torch.no_grad()
def test_the_scale_is_that_of_the_reduced_heads_logits(
    tiny_checkpoint, tmp_path, monkeypatch, family, config, body
):
    """The folder's logits are those of the run's own stream by the stored factors, times the scale; no other number
    brings them nearer to the original's on the held-out block.
    """
    source, out, kept = tiny_checkpoint(family, **config), tmp_path / "out", []
    run_all = Compressor.run

    def run_and_keep(self: Compressor, *args: Any) -> None:
        kept.append(self)
        run_all(self, *args)

    monkeypatch.setattr(Compressor, "run", run_and_keep)
    compress(source, out, f"{body}\nscale: logits")
    held = held_out_mask(len(blocks()))
    ids = torch.cat([blocks()[~held], blocks()[held]])  # in the order of the run
    stored, model = load_file(out / "model.safetensors"), load(source)
    shape = family_of(family)
    at = shape.embedding if config.get("tie_word_embeddings", family == "gpt2") else shape.head
    (run,) = kept
    streamed = torch.cat(run._compressed or [batch.hidden for batch in run._batches])
    plain = (
        model.get_submodule(shape.final_norm)(streamed)
        @ (stored[f"{at}.B.weight"] @ stored[f"{at}.A.weight"]).T
    )
    scale = json.loads((out / "lrc.json").read_text())["scale"]
    found = logits(load(out), ids)
    torch.testing.assert_close(found, scale["value"] * plain, rtol=1e-4, atol=1e-4 * plain.abs().max().item())

    held = held.sort().values
    p = logits(model, ids)[held].double().log_softmax(-1).flatten(0, 1)

    def divergence(by: float) -> float:
        q = (by * plain[held].double()).log_softmax(-1).flatten(0, 1)
        return float(torch.nn.functional.kl_div(q, p, log_target=True, reduction="batchmean"))

    assert abs(scale["value"] - 1) > 0.01
    assert scale["before"] == pytest.approx(divergence(1.0), rel=1e-3)
    assert scale["after"] == pytest.approx(divergence(scale["value"]), rel=1e-3)
    for other in (0.98, 1.02):
        assert divergence(other * scale["value"]) > divergence(scale["value"])


@pytest.fixture
def tied(tiny_checkpoint, tmp_path) -> Path:
    compress(
        tiny_checkpoint("llama", tie_word_embeddings=True), tmp_path / "tied", f"projections: {{{EMBED}}}"
    )
    return tmp_path / "tied"


def test_a_loaded_model_is_saved_and_loaded_again(tied, tmp_path):
    model = load(tied)
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert torch.equal(logits(model, blocks()), logits(again, blocks()))
    model.tie_weights()
    assert model.lm_head.B.weight is model.get_input_embeddings().B.weight is not None
    assert not [
        k
        for k, t in load_file(tmp_path / "again" / "model.safetensors").items()
        if "lm_head" in k and t.numel()
    ]


def test_the_base_model_loads_alone(tied):
    base = AutoModel.from_pretrained(tied, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = load(tied).model(blocks()).last_hidden_state
        torch.testing.assert_close(base(blocks()).last_hidden_state, expected)


def test_gradients_reach_the_shared_factors(tied):
    model = load(tied)
    model(blocks(), labels=blocks()).loss.backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.get_input_embeddings().parameters())


def test_without_lrc_it_stops(tied):
    script = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained({str(tied)!r})"
    environment = {
        **os.environ,
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }  # torch would import lrc by its entry point
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=tied, env=environment
    )
    assert result.returncode != 0
    assert "pip install lrc" in result.stderr


def test_a_missing_factor_is_named(tied):
    tensors = load_file(tied / "model.safetensors")
    del tensors["model.embed_tokens.A.weight"]
    save_file(tensors, tied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks the tensor 'model.embed_tokens.A.weight'"):
        load(tied)


def test_a_tied_embedding_without_its_head_is_refused(tied, tmp_path):
    folder = shutil.copytree(tied, tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["modules"]["lm_head"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"'model.embed_tokens' is factorized; set tie_word_embeddings to false"
    ):
        load(folder)


def test_the_report_counts_the_whole_model(tied, tiny_checkpoint, tmp_path):
    plan, text = tmp_path / "p.yaml", tmp_path / "t.txt"
    plan.write_text(f"format: 1\nprojections: {{{EMBED}}}\ncalibration: {{samples: 3, seq_len: 32}}\n")
    text.write_text("Once more into the fields, and back again. " * 40)
    source = tiny_checkpoint("llama", tie_word_embeddings=True)
    report = lrc.compress(
        source, plan, out=tmp_path / "o", calib=str(text), ppl=[], run=lrc.Run(device="cpu")
    )
    assert report.keep == 1
    assert report.before.parameters - report.after.parameters == 256 * 32 - 12 * (256 + 32)
    rows = [line.split(" | ") for line in (tmp_path / "o" / "report.md").read_text().splitlines()]
    assert any({"| embed", "12", "whitened_svd"} <= set(row) for row in rows)


def test_a_base_plan_for_a_budget_keeps_its_embedding(tiny_checkpoint, tmp_path):
    source, base = tiny_checkpoint("gpt2"), tmp_path / "base.yaml"
    base.write_text(f"format: 1\nprojections: {{{EMBED}}}\n")
    reader = CheckpointReader(source)
    small, large = jobs_at_keeps(ResolvedModel(source, str(source)), reader, read_draft(base), [0.5, 0.75])
    assert [a.size for a in small.plan.outer] == [a.size for a in large.plan.outer] == [12]
    assert any("the cost of embed is not measured" in warning for warning in small.plan.warnings)
    assert small.plan.keep == 0.5


def test_an_allocation_leaves_the_embedding_to_the_plan(tiny_checkpoint, tmp_path):
    plan, text = tmp_path / "p.yaml", tmp_path / "t.txt"
    entries = f"projections: {{{EMBED}}}\ncalibration: {{samples: 3, seq_len: 32}}"
    plan.write_text(f"format: 1\nkeep: 0.6\nallocate: energy\nmethod: whitened_svd\n{entries}\n")
    text.write_text("Once more into the fields, and back again. " * 40)
    source = tiny_checkpoint("gpt2")
    report = lrc.compress(
        source, plan, out=tmp_path / "o", calib=str(text), ppl=[], run=lrc.Run(device="cpu")
    )
    assert report.keep == pytest.approx(0.6, abs=0.01)
    assert [r.size for r in report.targets if r.target == "embed"] == [12]
    assert any("the cost of embed is not measured" in warning for warning in report.warnings)
    assert report.scale is not None
