"""Answers are the most likely tokens, as each model writes them alone; what fails is a reason, never an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lrc.estimate.room
from lrc.evaluation.answers import NEW_TOKENS, Answers, Written, write_answers
from lrc.evaluation.folder import Loading
from lrc.evaluation.streamed import StreamedModel
from lrc.hub.loader import load, load_tokenizer

TinyCheckpoint = Callable[..., Path]
CPU = torch.device("cpu")
PROMPTS = ("Why?", "What is 17 + 25?", "Größe")
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<a>' if add_generation_prompt }}"
)
FAILING = "{{ raise_exception('odd turns') if 'W' in messages[0].content }}{{ messages[0].content }}"


@pytest.fixture(params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoint) -> Path:
    return tiny_checkpoint(request.param, max_position_embeddings=90, n_positions=90)


def answers(
    folder: Path, tmp_path: Path, template: str | None = None, *, streamed: bool = False, **given: Any
) -> Answers:
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = template
    model = StreamedModel(folder, CPU, None, tmp_path) if streamed else load(folder)
    given = {"prompts": PROMPTS} | given
    return write_answers([model] * 2, [folder] * 2, tokenizer, Loading(CPU, None, tmp_path), **given)


def alone(folder: Path, text: str, end: int | None = None) -> Written:
    """The answer by transformers, of one prompt at a time."""
    model: Any = load(folder)
    tokenizer = load_tokenizer(folder)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=end
    )
    new = found[0, ids.shape[1] :].tolist()
    ended = end is not None and new[-1] == end
    return Written(str(tokenizer.decode(new[: -1 if ended else None])).strip(), ended)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_answers_are_those_of_each_prompt_alone(folder: Path, tmp_path: Path, template: str | None) -> None:
    found = answers(folder, tmp_path, template)
    assert (found.chat, found.skipped) == (template is not None, [])
    assert [each.prompt for each in found.answers] == [*PROMPTS]
    for each in found.answers:
        text = f"<user>{each.prompt}<a>" if template else each.prompt
        assert each.before == each.after == alone(folder, text, 0)


def test_an_answer_ends_at_an_end_token_of_the_generation_config(folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(folder), load_tokenizer(folder)
    ids = tokenizer(PROMPTS[1])["input_ids"]
    first = int(model(torch.tensor([ids])).logits[0, -1].argmax())
    assert model.generation_config is not None
    model.generation_config.eos_token_id = [0, first]
    loading = Loading(CPU, None, tmp_path)
    found = write_answers([load(folder), model], [folder] * 2, tokenizer, loading, PROMPTS)
    assert found.answers[1].after == Written("", True)
    assert found.answers[1].before == alone(folder, PROMPTS[1], 0)


def test_a_template_that_raises_is_a_reason(folder: Path, tmp_path: Path) -> None:
    found = answers(folder, tmp_path, FAILING)
    assert [each.prompt for each in found.answers] == ["Größe"]
    assert found.skipped == [
        f"no answers to {prompt!r}: the tokenizer fails (TemplateError: odd turns)" for prompt in PROMPTS[:2]
    ]
    broken = answers(folder, tmp_path, "{% if %}")
    assert broken.answers == []
    assert all("TemplateSyntaxError" in reason for reason in broken.skipped)
    assert len(broken.skipped) == len(PROMPTS)


def test_a_prompt_that_leaves_no_room_is_a_reason(folder: Path, tmp_path: Path) -> None:
    found = answers(folder, tmp_path, prompts=["x" * 51, "x" * 50])
    assert [each.prompt for each in found.answers] == ["x" * 50]
    assert found.skipped == [
        f"no answers to '{'x' * 51}': 51 tokens and 40 new ones exceed the model's 90 positions"
    ]


def test_a_model_that_fails_is_a_reason(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.cuda.OutOfMemoryError("no memory\nfor it")

    monkeypatch.setattr("lrc.evaluation.answers._write", fail)
    found = answers(folder, tmp_path)
    assert found.answers == []
    assert found.skipped == [
        f"no prompts are answered: {folder} fails to write (OutOfMemoryError: no memory)"
    ]


def test_streamed_models_are_loaded_one_by_one_where_each_fits(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert answers(folder, tmp_path, streamed=True) == answers(folder, tmp_path)
    monkeypatch.setattr(lrc.estimate.room, "free_bytes", lambda device: 100)
    found = answers(folder, tmp_path, streamed=True)
    assert found.answers == []
    assert found.skipped == [f"no prompts are answered: {folder} does not fit whole on cpu"]
