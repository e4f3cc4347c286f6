"""The default texts are two, and one of them is enough; a text asked for must be there."""

from __future__ import annotations

from pathlib import Path

import pytest

import lrc.evaluation.texts
from lrc.errors import UserError
from lrc.evaluation.texts import evaluation_texts

WIKI, C4 = "wikitext2-raw/test.txt", "c4/validation-sample.jsonl"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in ((WIKI, "Once.\n"), (C4, '{"text": "upon"}\n')):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text, "utf-8")
    return tmp_path


def test_two_texts_by_default_and_the_own_of_a_built_in_model(folder: Path) -> None:
    texts = evaluation_texts("somewhere", None, folder)
    assert [text.label for text in texts] == ["wikitext2:test", "c4:validation"]
    assert [text.notes for text in texts] == [(), ()]
    texts = evaluation_texts("tiny-gpt2", None, folder)
    assert [text.label for text in texts] == ["builtin:test"]


@pytest.mark.parametrize(("gone", "kept"), [(WIKI, "c4:validation"), (C4, "wikitext2:test")])
def test_one_default_text_is_enough(folder: Path, gone: str, kept: str) -> None:
    (folder / gone).unlink()
    (text,) = evaluation_texts("somewhere", None, folder)
    assert text.label == kept
    (note,) = text.notes
    name = gone.partition("/")[0].partition("-")[0]
    assert note.startswith(f"{name} is not measured: there is no local file, and the hub does not give ")


def test_without_a_default_text_the_first_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, read = list[str](), lrc.evaluation.texts.read_text
    monkeypatch.setattr(
        "lrc.evaluation.texts.read_text", lambda name, *rest: asked.append(name) or read(name, *rest)
    )
    with pytest.raises(UserError, match=r"no text for wikitext2:test"):
        evaluation_texts("somewhere", None, tmp_path)
    assert asked == ["wikitext2"]  # the hub does not answer, so it is asked once


def test_a_text_asked_for_must_be_there(folder: Path) -> None:
    (folder / C4).unlink()
    assert evaluation_texts("somewhere", "wikitext2", folder)[0].label == "wikitext2:test"
    with pytest.raises(UserError, match=r"no text for c4:validation"):
        evaluation_texts("somewhere", ["wikitext2", "c4"], folder)
    assert evaluation_texts("somewhere", [], folder) == []
