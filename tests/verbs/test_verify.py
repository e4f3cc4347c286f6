"""Every byte of an output is vouched for, and damage is told by file and tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lrc
from lrc.checkpoint import staging
from lrc.checkpoint.headers import parse_header
from lrc.checkpoint.staging import INDEX, MANIFEST
from lrc.errors import UserError
from lrc.records.check import Damage
from lrc.verbs.verify import verify

pytestmark = pytest.mark.usefixtures("without_pages")

PLAN = "format: 1\nkeep: 0.5\nmethod: a3\nrefit: none\ncalibration: {samples: 4, seq_len: 16}\n"
TABLES = PLAN.replace("a3", "svd") + "projections: {embed: {method: svd, rank: 8}}\n"


def compress(model: Path, plan: str, folder: Path) -> Path:
    """An output of a model by a plan's text, in ``folder``."""
    (folder / "plan.yaml").write_text(plan, encoding="utf-8")
    (folder / "text.txt").write_text(" ".join(f"{n} sheep went by." for n in range(40)), encoding="utf-8")
    calib = str(folder / "text.txt")
    lrc.compress(
        model, folder / "plan.yaml", out=folder / "out", calib=calib, ppl=[], run=lrc.Run(device="cpu")
    )
    return folder / "out"


@pytest.fixture(scope="module")
def sharded(shared_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output of three shards: everything outside the layers, and two layers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "_SINGLE_FILE_BYTES", 0)
        return compress(shared_checkpoint("llama"), PLAN, tmp_path_factory.mktemp("sharded"))


@pytest.fixture
def out(sharded: Path, tmp_path: Path) -> Path:
    """A copy of the sharded output."""
    return shutil.copytree(sharded, tmp_path / "out")


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def found(out: Path) -> list[Damage]:
    integrity = verify(out)
    assert integrity.sound == (not integrity.damage)
    return integrity.damage


@pytest.mark.parametrize(
    ("family", "plan", "config"),
    [
        ("llama", PLAN, {}),
        ("llama", TABLES, {"tie_word_embeddings": True, "attention_bias": True}),
        ("llama", TABLES, {"tie_word_embeddings": False}),
        ("gpt2", PLAN, {}),
        ("gpt2", PLAN.replace("a3", "monarch"), {}),
        ("gpt2", TABLES, {}),
    ],
)
def test_what_was_written_is_sound(tiny_checkpoint, tmp_path, family, plan, config):
    out = compress(tiny_checkpoint(family, **config), plan, tmp_path)
    integrity = verify(out)
    assert integrity.sound
    assert integrity.damage == []
    assert integrity.tensors == len(load_file(out / "model.safetensors"))
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    assert {*names} <= {*json.loads((out / MANIFEST).read_text())["sha256"]["files"]}
    reports = (MANIFEST, "README.md", "report.html", "report.json", "report.md")
    kept = [path for path in out.iterdir() if path.name not in reports]
    assert integrity.files == len(kept)
    assert integrity.bytes == sum(path.stat().st_size for path in kept)


def test_a_sharded_output_is_sound(out):
    assert verify(out).sound
    assert len(list(out.glob("*.safetensors"))) == 3


def test_every_byte_is_vouched_for(out):
    """A flip in the values of a tensor names it, another names its file; put back, the output is sound again."""
    for file in json.loads((out / MANIFEST).read_text())["sha256"]["files"]:
        path, size = out / file, (out / file).stat().st_size
        for at in (0, 9, size // 3, size // 2, size - 1):
            flip(path, at)
            damage = found(out)
            inside: list[str] = []
            if path.suffix == ".safetensors" and at > 9 + len(path.read_bytes().partition(b"}}")[0]):
                inside = [n for n, held in parse_header(path).items() if held.offset <= at < held.end]
            assert [d for d in damage if d.file == file]
            if inside:
                assert damage == [Damage(file, "differs from what was written", inside[0])]
            flip(path, at)
    assert found(out) == []


def test_a_file_cut_short_names_the_tensors_that_are_gone(out):
    file = out / "model-00002-of-00003.safetensors"
    stored = sorted((held.end, name) for name, held in parse_header(file).items() if held.bytes)
    file.write_bytes(file.read_bytes()[:-1])
    (damage,) = found(out)
    assert (damage.file, damage.tensor) == (file.name, stored[-1][1])
    assert damage.problem.startswith("is cut off")
    file.write_bytes(file.read_bytes()[: stored[1][0]])
    assert {damage.tensor for damage in found(out)} == {name for _, name in stored[2:]}
    file.write_bytes(file.read_bytes()[:20])
    (damage,) = found(out)
    assert damage.file == file.name
    assert damage.problem.startswith("is cut short or is no safetensors file")


def test_files_that_are_missing_or_should_not_be_there_are_named(out):
    (out / "tokenizer.json").unlink()
    (out / "model-00003-of-00003.safetensors").unlink()
    save_file({"x": torch.ones(1)}, out / "model.safetensors")
    assert sorted(map(str, found(out))) == [
        "model-00003-of-00003.safetensors: is missing",
        "model.safetensors: is not of this checkpoint",
        "tokenizer.json: is missing",
    ]


def test_tensors_that_are_missing_or_should_not_be_there_are_named(out):
    file = out / "model-00001-of-00003.safetensors"
    held = load_file(file)
    held["model.norm.weights"] = held.pop("model.norm.weight")
    save_file(held, file, metadata={"format": "pt"})
    assert {str(damage) for damage in found(out) if damage.file == file.name} == {
        f"{file.name}: tensor 'model.norm.weight' is missing",
        f"{file.name}: tensor 'model.norm.weights' is not of this checkpoint",
    }


def test_what_lies_beside_the_values_is_vouched_for_too(out):
    file = out / "model-00001-of-00003.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    (damage,) = found(out)
    assert damage.tensor is None
    assert "in its header or after its tensors" in damage.problem


def test_an_index_that_does_not_fit_the_shards_is_told(out):
    index = json.loads((out / INDEX).read_text())
    first, second, *_ = index["weight_map"]
    index["weight_map"][first] = "model-00001-of-00001.safetensors"
    del index["weight_map"][second]
    index["weight_map"]["x"] = "model-00001-of-00003.safetensors"
    (out / INDEX).write_text(json.dumps(index))
    told = {damage.tensor: damage.problem for damage in found(out) if damage.file == INDEX}
    assert set(told) == {None, first, second, "x"}
    assert told[first].endswith("the index says model-00001-of-00001.safetensors")
    assert told[second].endswith("the index says in none")
    assert told["x"] == "is in no file, the index says model-00001-of-00003.safetensors"


def test_a_table_that_does_not_fit_the_weights_is_told(out):
    config = json.loads((out / "config.json").read_text())
    table = config["quantization_config"]["modules"]
    path = next(
        path for path, entry in table.items() if path.startswith("model.layers.1.") and "rank" in entry
    )
    rank = table[path]["rank"]
    table[path]["rank"] += 1
    (out / "config.json").write_text(json.dumps(config))
    told = {damage.tensor: damage.problem for damage in found(out)}
    assert set(told) == {None, f"{path}.A.weight", f"{path}.B.weight"}
    assert f"has shape [{rank}, 32] in model-00003-of-00003.safetensors" in told[f"{path}.A.weight"]
    del table[path]
    (out / "config.json").write_text(json.dumps(config))
    told = " ".join(damage.problem for damage in found(out))
    assert "cannot be used: the module table has 'model.layers.1.self_attn' but not its projection" in told


@pytest.mark.parametrize("damage", ["{", '{"model_type": "llama"}', '{"model_type": "nobody knows"}'])
def test_a_config_that_cannot_be_used_is_told(out, damage):
    (out / "config.json").write_text(damage)
    problems = [damage.problem for damage in found(out) if damage.file == "config.json"]
    assert problems[0] == "differs from what was written"
    assert problems[1].startswith("cannot be used: ")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sha256": {"files": 3, "tensors": {}}}'])
def test_a_manifest_that_is_damaged_is_a_mistake(out, text):
    (out / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=r"lrc.json (is damaged|has no hashes)"):
        verify(out)


def test_of_many_tensors_the_message_names_some_and_says_of_more(out):
    file = out / "model-00002-of-00003.safetensors"
    start = min(held.offset for held in parse_header(file).values())
    file.write_bytes(file.read_bytes()[:start])
    integrity = verify(out)
    lines = integrity.message.splitlines()
    assert lines[0] == f"{out} is damaged"
    assert len(lines) == 1 + 8 + 1
    assert lines[-1] == f"  {file.name}: {len(integrity.damage) - 8} more, all of which --json names"
