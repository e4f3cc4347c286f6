"""Every mistake is told in one message that names the thing, the place and the remedy, and leaves nothing behind."""

from __future__ import annotations

import errno
import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import Result

import lrc
from lrc.cli import main
from lrc.compression.loop import Compressor
from lrc.errors import UserError

Run = Callable[..., Result]
Fails = Callable[..., str]
TinyCheckpoint = Callable[..., Path]


@pytest.fixture
def refuses(fails: Fails, tmp_path: Path) -> Fails:
    """Runs ``lrc compress`` on a checkpoint with the small text and plan, and gives the message that refuses it."""

    def compress(model: object, *options: object, plan: str | None = None) -> str:
        if plan is not None:
            (tmp_path / "plan.yaml").write_text(plan, encoding="utf-8")
        text = tmp_path / "text.txt"
        given = [] if "--calib" in options else ["--calib", text]
        argv = ["compress", model, "--plan", tmp_path / "plan.yaml", "--ppl", text, *given]
        return fails(*argv, "--device", "cpu", *options)

    return compress


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(config), encoding="utf-8")


def edit_weight(folder: Path, name: str, value: float) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[3] = value
    save_file(tensors, path, metadata={"format": "pt"})


# The model


@pytest.mark.parametrize("verb", ["compress", "check", "eval"])
def test_unknown_model(fails: Fails, verb: str) -> None:
    plan = [] if verb == "eval" else ["--plan", "a3-2x"]
    message = fails(verb, "tiny-gtp2", *plan)
    assert "unknown model 'tiny-gtp2'" in message
    assert "did you mean 'tiny-gpt2'?" in message


def test_a_folder_that_is_no_checkpoint(fails: Fails, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = fails("compress", tmp_path / "empty", "--plan", "a3-2x")
    assert f"{tmp_path / 'empty'} is not a checkpoint" in message


def test_not_a_causal_language_model(refuses: Fails, tiny_checkpoint: TinyCheckpoint) -> None:
    model = tiny_checkpoint("gpt2")
    edit_config(model, architectures=["GPT2ForSequenceClassification"])
    message = refuses(model)
    assert (
        f"{model} is a GPT2ForSequenceClassification, not a causal language model (GPT2LMHeadModel)"
        in message
    )


def test_evaluating_what_is_not_a_causal_language_model(
    fails: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    model = tiny_checkpoint("gpt2")
    edit_config(model, model_type="t5")
    message = fails("eval", model, "--ppl", tmp_path / "text.txt")
    assert f"{model} is a t5 model, not a causal language model" in message


def test_unknown_family(refuses: Fails, tiny_checkpoint: TinyCheckpoint) -> None:
    model = tiny_checkpoint("llama")
    edit_config(model, model_type="lama")
    message = refuses(model)
    assert "model family 'lama' is not supported; did you mean 'llama'? known: cohere, gemma, " in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("layer", [0, 1])
def test_weights_that_are_no_numbers(
    refuses: Fails, tiny_checkpoint: TinyCheckpoint, layer: int, value: float
) -> None:
    model = tiny_checkpoint("llama")
    edit_weight(model, f"model.layers.{layer}.mlp.up_proj.weight", value)
    assert f"layer {layer}: mlp.up_proj.weight has NaN or inf" in refuses(model)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_weights_outside_the_layers_that_are_no_numbers(
    refuses: Fails, tiny_checkpoint: TinyCheckpoint, name: str
) -> None:
    model = tiny_checkpoint("llama")
    edit_weight(model, name, float("nan"))
    assert f"{name} has NaN or inf" in refuses(model)


def test_activations_that_are_no_numbers(refuses: Fails, tiny_checkpoint: TinyCheckpoint) -> None:
    model = tiny_checkpoint("llama")
    edit_weight(model, "model.layers.1.mlp.up_proj.weight", 3e38)
    assert "layer 1: activations are NaN or inf" in refuses(model)


@pytest.mark.parametrize("value", ["NaN", "-Infinity"])
def test_a_config_with_numbers_that_json_has_not(
    refuses: Fails, tiny_checkpoint: TinyCheckpoint, value: str
) -> None:
    model = tiny_checkpoint("llama")
    edit_config(model, some_limit=float(value))
    assert f"config.json is not JSON: {value} is no value of JSON" in refuses(model)


HUGE = [
    ("llama", "model.layers.0.mlp.down_proj.weight", "layer 0: activations after mlp.down_proj are up to"),
    (
        "llama",
        "model.layers.1.self_attn.o_proj.weight",
        "layer 1: activations after self_attn.o_proj are up to",
    ),
    ("llama", "model.layers.1.self_attn.q_proj.weight", "layer 1: "),
    ("gpt2", "transformer.h.1.mlp.c_proj.weight", "layer 1: activations after mlp.c_proj are up to"),
    ("llama", "lm_head.weight", "the model's logits are NaN or inf"),
]


@pytest.mark.parametrize("plan", ["keep: 0.5", "keep: 0.5\nmethod: svd\nrefit: none"])
@pytest.mark.parametrize(("family", "name", "message"), HUGE)
def test_weights_whose_products_overflow_float32(
    refuses: Fails, tiny_checkpoint: TinyCheckpoint, family: str, name: str, message: str, plan: str
) -> None:
    model = tiny_checkpoint(family, tie_word_embeddings=False)
    path = model / "model.safetensors"
    tensors = load_file(path)
    tensors[name] *= 2e38 / float(tensors[name].abs().max()) if "head" in name else 1e36
    save_file(tensors, path, metadata={"format": "pt"})
    assert message in refuses(model, plan=f"format: 1\n{plan}\ncalibration: {{samples: 4, seq_len: 32}}\n")


def test_safetensors_cut_short(refuses: Fails, tiny_checkpoint: TinyCheckpoint) -> None:
    model = tiny_checkpoint("llama")
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    message = refuses(model)
    assert f"{path} is cut short: tensor 'model.norm.weight' ends at byte" in message


def test_a_shard_that_is_not_there(refuses: Fails, tiny_checkpoint: TinyCheckpoint) -> None:
    model = tiny_checkpoint("llama")
    path = model / "model.safetensors"
    weight_map = dict.fromkeys(load_file(path), "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    path.unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    message = refuses(model)
    assert "model.safetensors.index.json names missing files: model-00001-of-00001" in message


def test_no_weights(refuses: Fails, tiny_checkpoint: TinyCheckpoint) -> None:
    model = tiny_checkpoint("llama")
    (model / "model.safetensors").unlink()
    assert f"{model} holds no weights" in refuses(model)


def test_a_tensor_that_is_not_there(refuses: Fails, tiny_checkpoint: TinyCheckpoint) -> None:
    model = tiny_checkpoint("llama")
    tensors = load_file(model / "model.safetensors")
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    assert "no tensor 'model.layers.1.self_attn.k_proj.weight'" in refuses(model)


def test_no_tokenizer(refuses: Fails, tiny_checkpoint: TinyCheckpoint) -> None:
    model = tiny_checkpoint("llama")
    for path in model.glob("tokenizer*"):
        path.unlink()
    message = refuses(model)
    assert f"{model} has no tokenizer that works" in message
    assert "tokenizer.json" in message
    with pytest.raises(UserError, match="has no tokenizer that works"):
        lrc.check(model, keep=0.8)


def test_a_compressed_checkpoint(refuses: Fails, tiny_checkpoint: TinyCheckpoint) -> None:
    model = tiny_checkpoint("llama")
    edit_config(model, quantization_config={"quant_method": "lrc"})
    assert f"{model} is compressed already (lrc)" in refuses(model)


# Code inside checkpoints


def pickle_only(model: Path) -> Path:
    path = model / "pytorch_model.bin"
    torch.save(load_file(model / "model.safetensors"), path)
    (model / "model.safetensors").unlink()
    return path


@pytest.mark.parametrize("verb", ["compress", "eval"])
def test_pickles_are_refused(
    refuses: Fails, fails: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, verb: str
) -> None:
    model = tiny_checkpoint("llama")
    pickle_only(model)
    message = refuses(model) if verb == "compress" else fails("eval", model, "--ppl", tmp_path / "text.txt")
    assert f"{model} " in message
    assert "pickled" in message
    assert "allow" in message


def test_pickles_are_read_if_asked_for(
    succeeds: Run, tiny_checkpoint: TinyCheckpoint, work: Path, tmp_path: Path
) -> None:
    model, text = tiny_checkpoint("llama"), tmp_path / "text.txt"
    pickle_only(model)
    plan = ["--plan", tmp_path / "plan.yaml", "--calib", text, "--ppl", text]
    succeeds("compress", model, *plan, "--out", "out", "--allow-pickle")
    assert (work / "out" / "model.safetensors").is_file()


class Attack:
    """A pickle that runs code where it is loaded as more than weights."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.marker,)


def test_pickles_are_read_as_weights_alone(
    refuses: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    model, marker = tiny_checkpoint("llama"), tmp_path / "executed"
    path = pickle_only(model)
    torch.save({"model.norm.weight": Attack(marker)}, path, pickle_module=pickle)
    assert f"{path} cannot be read as weights alone" in refuses(model, "--allow-pickle")
    assert not marker.exists()


REMOTE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM
class OtherConfig(LlamaConfig):
    model_type = "other"
class OtherForCausalLM(LlamaForCausalLM):
    config_class = OtherConfig
"""
AUTO_MAP = {"AutoConfig": "remote.OtherConfig", "AutoModelForCausalLM": "remote.OtherForCausalLM"}


def with_remote_code(model: Path, marker: Path, **config: Any) -> None:
    (model / "remote.py").write_text(REMOTE.format(marker=str(marker)), encoding="utf-8")
    edit_config(model, auto_map=AUTO_MAP, **config)


def test_remote_code_of_an_unknown_model_is_never_executed(
    refuses: Fails, fails: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    model, marker = tiny_checkpoint("llama"), tmp_path / "executed"
    with_remote_code(model, marker, model_type="other")
    assert "model family 'other' is not supported" in refuses(model)
    assert "--trust-remote-code" in fails("eval", model, "--ppl", tmp_path / "text.txt")
    assert not marker.exists()


def test_remote_code_of_a_known_model_is_never_executed(
    succeeds: Run, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    model, text, marker = tiny_checkpoint("llama"), tmp_path / "text.txt", tmp_path / "executed"
    with_remote_code(model, marker)
    plan = ["--plan", tmp_path / "plan.yaml", "--calib", text, "--ppl", text]
    succeeds("compress", model, *plan, "--out", "out")
    assert not marker.exists()


# The plan


def test_no_such_plan(fails: Fails, tiny_checkpoint: TinyCheckpoint) -> None:
    message = fails("compress", tiny_checkpoint("llama"), "--plan", "a3-3x")
    assert "there is no plan file 'a3-3x'" in message
    assert "did you mean 'a3-" in message


PLANS = [
    ("keep: [0.5", 3, "not valid YAML"),
    ("keeep: 0.5", 2, "did you mean 'keep'?"),
    ("keep: 0.5\nkeep: 0.6", 3, "keep: written twice, first on line 2"),
    ("components: {qkv: {rank: 4}}", 2, "did you mean 'qk'?"),
    ("method: a4", 2, "'a4' is not a method; "),
    ("components: {ov: {rank: 0}}", 2, "rank 0 keeps nothing; the smallest is 1"),
    ("components: {ov: {rank: -2}}", 2, "rank -2 keeps nothing; the smallest is 1"),
    ("components: {ov: {rank: 9}}", 2, "rank 9 is above the full rank; ov has 8"),
    ("components: {qk: {rank: 3}}", 2, "ranks of qk are multiples of 2, such as 2"),
    ("method: svd\nprojections: {up: {rank: 33}}", 3, "rank 33 is above the full rank; up has 32"),
    (
        "method: svd\nprojections: {up: {rank: 20}}",
        3,
        "larger than the matrix; the largest that is not is 19",
    ),
    ("keep: 0", 2, "keep: 0"),
    ("keep: 1.5", 2, "keep: 1.5"),
    ("keep: -0.5", 2, "keep: -0.5"),
    (
        "keep: 0.5\nlayers:\n  - {match: '2-3', mlp: keep-all}",
        4,
        "there is no layer 2; the model has 2 layers, 0 to 1",
    ),
    (
        "keep: 0.5\ncomponents: {ov: {rank: 4}}\nprojections: {v: {method: svd, rank: 4}}",
        4,
        "components.ov on line 3 is for the same weights; keep one of the two",
    ),
]


@pytest.mark.parametrize(("plan", "line", "says"), PLANS, ids=[plan for plan, *_ in PLANS])
def test_mistakes_in_a_plan(
    refuses: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, plan: str, line: int, says: str
) -> None:
    message = refuses(tiny_checkpoint("llama"), plan=f"format: 1\n{plan}\n")
    assert message.startswith(f"{tmp_path / 'plan.yaml'}:{line}: ")
    assert says in message


def test_all_mistakes_of_a_plan_at_once(refuses: Fails, tiny_checkpoint: TinyCheckpoint) -> None:
    message = refuses(tiny_checkpoint("llama"), plan="format: 1\nkeep: 2\nmethood: a3\nrefit: maybe\n")
    assert [part in message for part in ("yaml:2:", "yaml:3:", "yaml:4:")] == [True] * 3


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ("keep: 0.8\nallocate: importance", "ov under 'a3' has none"),
        ("keep: 0.1\nallocate: energy", "a keep of 0.1 cannot be met; the smallest that can is"),
        ("keep: 0.5\ncalibration: {data: nosuch}", "unknown text 'nosuch'"),
        ("keep: 0.5\ncalibration: {data: [wikitext2, nosuch]}", "unknown text 'nosuch'"),
        ("keep: 0.5\ncalibration: {data: 'c4:test'}", "c4 has no split 'test'"),
        ("keep: 0.5\ncalibration: {data: not/there.txt}", "not/there.txt: no such file"),
    ],
)
def test_check_refuses_what_compress_refuses_before_a_weight_is_read(
    fails: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, plan: str, says: str
) -> None:
    (tmp_path / "plan.yaml").write_text(f"format: 1\n{plan}\n", encoding="utf-8")
    argv = [tiny_checkpoint("llama"), "--plan", tmp_path / "plan.yaml"]
    assert says in fails("check", *argv)
    assert says in fails("compress", *argv, "--no-eval", "--device", "cpu")


# Texts


def test_calibration_text_shorter_than_one_window(
    refuses: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("x" * 63, encoding="utf-8")
    message = refuses(tiny_checkpoint("gpt2"), "--calib", tmp_path / "short.txt")
    assert str(tmp_path / "short.txt") in message
    assert "63 tokens, fewer than one window of 64" in message


def test_too_few_blocks(refuses: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    blocks = (tmp_path / "text.txt").stat().st_size // 64
    message = refuses(tiny_checkpoint("gpt2"), plan="format: 1\nkeep: 0.5\ncalibration: {samples: 400}\n")
    assert str(tmp_path / "text.txt") in message
    assert (
        f"{blocks} blocks of 64 tokens, fewer than the 400 samples asked for; use samples: {blocks}"
        in message
    )


def test_evaluation_text_shorter_than_one_window(
    refuses: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Compressor, "run")  # it is told before the work is done
    (tmp_path / "short.txt").write_text("x" * 63, encoding="utf-8")
    message = refuses(tiny_checkpoint("gpt2"), "--ppl", tmp_path / "short.txt")
    assert f"{tmp_path / 'short.txt'}: the text has 63 tokens, fewer than one window of 64" in message


@pytest.mark.parametrize("option", ["--calib", "--ppl"])
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty: it holds no text"),
        (b" \n\n", "is empty: it holds no text"),
        (b"one line\nMZ\x90\0\3", "is not a text file: NUL at byte 12 (line 2)"),
        ("fünf\n".encode("latin-1"), "is not UTF-8: "),
    ],
    ids=["empty", "blank", "binary", "latin-1"],
)
def test_files_that_hold_no_text(
    refuses: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path, option: str, content: bytes, says: str
) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    assert f"{path} {says}" in refuses(tiny_checkpoint("gpt2"), option, path)


def test_unknown_text(refuses: Fails, tiny_checkpoint: TinyCheckpoint) -> None:
    message = refuses(tiny_checkpoint("gpt2"), "--ppl", "wikitxt2")
    assert "unknown text 'wikitxt2': did you mean 'wikitext2'?" in message


def test_no_network_and_no_data(fails: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path) -> None:
    message = fails("compress", tiny_checkpoint("gpt2"), "--plan", tmp_path / "plan.yaml")
    assert "no text for wikitext2" in message
    assert "--data-dir" in message
    assert "LRC_DATA_DIR" in message
    assert "wikitext2-raw/test.txt" in message
    assert "'builtin'" in message


def test_no_network_and_no_model(fails: Fails) -> None:
    message = fails("compress", "llama-7b", "--plan", "a3-2x")
    assert "huggyllama/llama-7b is not on this machine and the Hugging Face hub cannot be reached" in message


# The machine


def test_a_device_that_is_not_there(refuses: Fails, tiny_checkpoint: TinyCheckpoint) -> None:
    message = refuses(tiny_checkpoint("gpt2"), "--device", "cuda:99")
    assert "there is no device 'cuda:99' on this machine" in message
    assert "cpu" in message


def test_unknown_dtype(refuses: Fails, tiny_checkpoint: TinyCheckpoint) -> None:
    message = refuses(tiny_checkpoint("gpt2"), "--dtype", "bf16")
    assert "unknown dtype 'bf16'" in message
    assert "bfloat16" in message


def test_gpu_out_of_memory(
    refuses: Fails, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def observe(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\ndetails")

    monkeypatch.setattr(Compressor, "_layer", observe)
    message = refuses(tiny_checkpoint("gpt2"), "--batch-size", 3)
    assert "the GPU is out of memory; try --batch-size below 3" in message
    assert "details" not in message


def test_disk_full(refuses: Fails, tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lrc.checkpoint.staging.save_file", save)
    assert "the disk is full" in refuses(tiny_checkpoint("gpt2"))


# The output folder


def test_an_output_over_the_model_itself(
    fails: Fails, tiny_checkpoint: TinyCheckpoint, tmp_path: Path
) -> None:
    model = tiny_checkpoint("llama")
    before = sorted(path.name for path in model.iterdir())
    for out in (model, model.parent):
        message = fails(
            "compress", model, "--plan", tmp_path / "plan.yaml", "--out", out, "--force", "--no-eval"
        )
        assert f"cannot replace {out}: it is, or holds, the model that is being compressed" in message
    assert sorted(path.name for path in model.iterdir()) == before


def test_an_output_folder_that_is_not_ours(
    refuses: Fails, tiny_checkpoint: TinyCheckpoint, work: Path
) -> None:
    (work / "out").mkdir()
    (work / "out" / "thesis.txt").write_text("years of work", encoding="utf-8")
    message = refuses(tiny_checkpoint("gpt2"), "--out", "out")
    assert "out exists and is not an lrc output" in message
    assert "--force" in message
    assert (work / "out" / "thesis.txt").read_text(encoding="utf-8") == "years of work"


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_an_output_that_is_a_file(
    refuses: Fails, tiny_checkpoint: TinyCheckpoint, work: Path, force: list[str]
) -> None:
    (work / "out").write_text("years of work", encoding="utf-8")
    assert "out: it is a file" in refuses(tiny_checkpoint("gpt2"), "--out", "out", *force)


def test_an_output_in_a_folder_that_is_not_there(
    refuses: Fails, tiny_checkpoint: TinyCheckpoint, work: Path
) -> None:
    assert "the folder missing does not exist" in refuses(tiny_checkpoint("gpt2"), "--out", "missing/out")


# The command line itself


def test_options_that_contradict(refuses: Fails, tiny_checkpoint: TinyCheckpoint) -> None:
    assert "--ppl and --no-eval contradict each other" in refuses(tiny_checkpoint("gpt2"), "--no-eval")


def test_nothing_to_evaluate(fails: Fails, work: Path) -> None:
    assert f"there is no lrc output below {work}" in fails("eval")


def test_unknown_list(fails: Fails) -> None:
    assert "did you mean 'methods'?" in fails("list", "method")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ("chek",),
            "there is no verb 'chek'; did you mean 'check'? known: "
            "bench, check, compare, compress, eval, inspect, list, plan",
        ),
        (("plan", "m", "--kepp", "0.8"), "lrc plan has no option --kepp; did you mean '--keep'? known: "),
        (("--jsn",), "lrc has no option --jsn; known: --version"),
        (("plan", "m", "--round", "x"), "--round 'x': should be a valid integer"),
        (("plan", "m", "--kv-cache", "abc"), "--kv-cache 'abc': should be a valid number"),
        (("compress", "m", "--plan", "p", "--batch-size", "0"), "--batch-size '0': should be greater than"),
        (("compress", "m", "--plan"), "option '--plan' requires an argument"),
        (("compress", "m"), "say how much to keep, such as --keep 0.8, or name a plan, such as --plan a3-2x"),
        (("compress",), "missing argument 'model'; see lrc compress --help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_does_not_parse_is_told_as_every_mistake(
    argv: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["lrc", *argv])
    with pytest.raises(SystemExit) as exit_:
        main()
    told = capsys.readouterr()
    assert (exit_.value.code, told.out) == (2, "")
    assert told.err.startswith(f"error: {message}")
    assert told.err.count("\n") == 1


@pytest.mark.parametrize("verb", ["check", "compress"])
def test_layers_that_differ_name_tensor_and_shapes(
    tiny_checkpoint: TinyCheckpoint, fails: Fails, verb: str
) -> None:
    folder = tiny_checkpoint("llama")
    tensors = load_file(folder / "model.safetensors")
    for role, shape in (("gate", (40, 32)), ("up", (40, 32)), ("down", (32, 40))):
        tensors[f"model.layers.1.mlp.{role}_proj.weight"] = torch.zeros(shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = fails(verb, folder, "--plan", "../plan.yaml")
    assert all(told in said for told in ("model.layers.1.mlp.", "_proj.weight", "40", "48"))


# Token ids

KEEP = ("--plan", "{keep: 0.5, method: a3, calibration: {samples: 4}}")


@pytest.mark.parametrize(
    "words",
    [
        ("compress", "M", *KEEP, "--calib", "GOOD", "--ppl", "BAD"),
        ("compress", "M", *KEEP, "--calib", "BAD", "--ppl", "GOOD"),
        ("compress", "M", *KEEP, "--calib", "GOOD=3,BAD=1", "--ppl", "GOOD"),
        ("plan", "M", "--keep", "0.5", "--calib", "BAD", "--held-out", "GOOD"),
        ("plan", "M", "--keep", "0.5", "--calib", "GOOD", "--held-out", "BAD"),
        ("inspect", "M", "--calib", "BAD", "--samples", "2"),
        ("eval", "M", "--ppl", "BAD"),
        ("eval", "M", "--ppl", "BAD", "--streamed"),
        ("eval", "M", "--against", "M", "--ppl", "BAD"),
        ("eval", "M", "--ablate", "--ppl", "BAD", "--calib", "GOOD"),
        ("eval", "M", "--ablate", "--ppl", "GOOD", "--calib", "BAD"),
    ],
    ids=" ".join,
)
def test_token_ids_beyond_the_embedding(
    fails: Fails, shared_checkpoint: TinyCheckpoint, tmp_path: Path, words: tuple[str, ...]
) -> None:
    model = shared_checkpoint("llama", vocab_size=224)  # the byte 0x82 has the id 224
    (tmp_path / "bad.txt").write_text((tmp_path / "text.txt").read_text() * 2 + "ł", encoding="utf-8")
    given = [
        word.replace("GOOD", f"{tmp_path}/text.txt").replace("BAD", f"{tmp_path}/bad.txt") for word in words
    ]
    given = [str(model) if word == "M" else word for word in given]
    message = fails(*given, "--device", "cpu")
    assert "bad.txt" in message
    assert "the id 224" in message
    assert "224 rows" in message
    assert repr("Ĥ") in message
