"""Answers of compressed models beside the original's: the shares, and the table of tiny models."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from lrc.hub.loader import load, load_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<a>' if add_generation_prompt }}"
)


@pytest.fixture
def instruct(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("instruct")


@pytest.fixture
def folder(tiny_checkpoint: Any) -> Path:
    """A tiny model with a chat template."""
    found = tiny_checkpoint("llama", max_position_embeddings=512)
    tokenizer = load_tokenizer(found)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(found)
    return found


def test_shares(instruct: ModuleType) -> None:
    def written(ids: range | list[int], ended: bool = True) -> Any:
        return instruct.Written(tuple(ids), "text" if ids else "", ended)

    original = [written(range(10))] * 4
    answers = [written(range(5)), written(range(21)), written([]), written([1, 2, 3, 4] * 4, False)]
    assert instruct.row("x", answers, original) == instruct.Row("x", 0.5, 0.5, 0.0)
    assert instruct.repeats([1, 2, 3, 4] * 5)
    assert not instruct.repeats([1, 2, 3, 4] * 4)
    assert instruct.repeats([7] * 8)
    assert not instruct.repeats([7] * 7)


def test_the_table(instruct: ModuleType, folder: Path, tiny_checkpoint: Any) -> None:
    other = tiny_checkpoint("llama", seed=1, max_position_embeddings=512)
    argv = [str(folder), str(other), "--device", "cpu", "--new-tokens", "6"]
    result = CliRunner().invoke(instruct.app, [*argv, "--show", "1"], catch_exceptions=False)
    assert result.exit_code == 0
    assert "50 prompts, at most 6 new tokens" in result.stdout
    assert "100%" in result.stdout  # of like length, the original itself
    shown = result.stdout.rpartition("What is the capital of Australia?")[2]
    assert all(name in shown for name in argv[:2])


def test_answers_are_those_of_each_prompt_alone(instruct: ModuleType, folder: Path) -> None:
    model: Any = load(folder)
    tokenizer, prompts = load_tokenizer(folder), ["Why?", "What is 2 + 2?", "Größe"]
    for prompt, found in zip(prompts, instruct.write(model, tokenizer, prompts, 5, 2), strict=True):
        ids = torch.tensor([tokenizer(f"<user>{prompt}<a>")["input_ids"]])
        new = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=5)
        expected = new[0, ids.shape[1] :].tolist()
        assert [*found.ids, *([0] if found.ended else [])] == expected


def test_mistakes(instruct: ModuleType, folder: Path, tiny_checkpoint: Any) -> None:
    def refused(*argv: object) -> str:
        result = CliRunner().invoke(
            instruct.app, [*map(str, argv), "--device", "cpu"], env={"COLUMNS": "300"}
        )
        assert result.exit_code == 2
        return result.stderr

    bare = tiny_checkpoint("llama")
    assert "has no chat template; name an instruct model" in refused(bare, folder)
    assert "use at most --new-tokens" in refused(folder, folder, "--new-tokens", 100_000)
