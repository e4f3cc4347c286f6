"""Chats: read from every kind of file, written by the tokenizer's template, and every refusal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lrc.errors import UserError
from lrc.text.chat import has_template
from lrc.text.corpus import read_corpus
from lrc.text.encoding import encode
from lrc.text.mixture import read_mixture
from lrc.text.source import read_text

# A template that begins each conversation with a special token, as those of Llama do.
TEMPLATE = "!{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
REFUSES = "{{ raise_exception('no system messages') if messages[0].role == 'system' }}" + TEMPLATE
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"A number, {n}."}]
    for n in range(12)
]
SYSTEM = [{"role": "system", "content": "Be brief."}, *CHATS[0]]


@pytest.fixture
def tokenizer(shared_checkpoint) -> PreTrainedTokenizerBase:
    """A byte tokenizer that begins every text with a token of its own: ``!``, id 0."""
    from tokenizers import processors

    found = AutoTokenizer.from_pretrained(shared_checkpoint("gpt2"))
    found.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="! $A", special_tokens=[("!", 0)]
    )
    found.chat_template = TEMPLATE
    return found


@pytest.fixture
def chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write_chat("chat.jsonl", CHATS)


def write_chat(name: str, chats: Any, **more: Any) -> Path:
    Path(name).write_text(
        "".join(json.dumps({"messages": c, **more}) + "\n" for c in chats), encoding="utf-8"
    )
    return Path(name)


def test_a_chat_is_read_from_json_and_parquet_with_and_without_its_column(chat: Path) -> None:
    rows = [{"messages": c, "id": i} for i, c in enumerate(CHATS)]
    Path("chat.json").write_text(json.dumps(rows), encoding="utf-8")
    parquet.write_table(pa.Table.from_pylist(rows), "chat.parquet")
    names = ("chat.jsonl", "chat.json", "chat.parquet")
    found = [read_text(f"{name}{column}", "calibration") for name in names for column in ("", ":messages")]
    assert all([*map(list, text.chat)] == CHATS for text in found)
    assert len({text.sha256 for text in found}) == 1
    assert [text.label for text in found[:2]] == ["chat.jsonl", "chat.jsonl:messages"]
    assert {text.origin for text in found} == {*names}


def test_a_file_with_text_and_messages_is_text_unless_the_messages_are_named(chat: Path) -> None:
    write_chat("both.jsonl", CHATS, text="plain")
    assert not read_text("both.jsonl", "calibration").chat
    assert len(read_text("both.jsonl:messages", "calibration").chat) == len(CHATS)


def test_each_conversation_is_written_by_the_template_without_a_doubled_first_token(
    chat: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    encoded = encode(tokenizer, read_text("chat.jsonl", "calibration"), 256)
    written = "".join(
        "!" + "".join(f"{m['role']}: {m['content']}\n" for m in conversation) for conversation in CHATS
    )
    assert tokenizer.decode(encoded.ids) == written
    assert int((encoded.ids == 0).sum()) == len(CHATS)
    assert tokenizer(written)["input_ids"][:2] == [0, 0]  # the token that it would have doubled
    assert (encoded.bytes, encoded.notes) == (len(written), ())


def test_a_chat_mixes_with_plain_text(chat: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    Path("a.txt").write_text("plain text " * 50, encoding="utf-8")
    found = read_corpus(read_mixture("chat.jsonl=1,a.txt=2"), tokenizer, 16, 6).draw(6, 0)
    assert [(s.label, len(s.blocks)) for s in found.sources] == [("chat.jsonl", 2), ("a.txt", 4)]
    assert [s.provenance["origin"] for s in found.sources] == ["chat.jsonl", "a.txt"]


def test_no_template_names_the_file_and_what_to_do(chat: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    assert not has_template(tokenizer)
    with pytest.raises(UserError, match=r"chat\.jsonl.*no chat template.*chat_template\.jinja"):
        read_corpus(read_mixture("chat.jsonl"), tokenizer, 16)


def test_a_conversation_that_the_template_refuses_is_named_with_its_reason(
    chat: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = REFUSES
    write_chat("system.jsonl", [CHATS[0], SYSTEM, CHATS[1]])
    text = read_text("system.jsonl", "calibration")
    with pytest.raises(UserError, match=r"system\.jsonl, row 2: .*no system messages"):
        encode(tokenizer, text)
    lenient = encode(tokenizer, text, lenient=True)
    assert tokenizer.decode(lenient.ids).count("user:") == 2
    assert lenient.notes == ("system.jsonl: 1 conversations that the chat template refuses are left out",)
    write_chat("all.jsonl", [SYSTEM, SYSTEM])
    with pytest.raises(UserError, match=r"row 2: .*no system messages"):
        encode(tokenizer, read_text("all.jsonl", "calibration"), lenient=True)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"content": "a"}], "line 2, field 'messages', message 1: role is missing"),
        ([{"role": "user"}], "message 1: content is missing"),
        ([CHATS[0][0], {"role": "user", "content": ["a"]}], "message 2: content is list, not text"),
        (["a"], "message 1: expected an object with role and content, found str"),
        ([], "line 2, field 'messages': a conversation without messages"),
        ("a", "row 2: text and messages in one column"),
        (3, "line 2: no text in field 'messages'; fields: messages"),
    ],
)
def test_malformed_messages_are_named_with_their_row(chat: Path, messages: Any, said: str) -> None:
    write_chat("bad.jsonl", [CHATS[0], messages])
    with pytest.raises(UserError) as error:
        read_text("bad.jsonl", "calibration")
    assert "bad.jsonl" in str(error.value)
    assert said in str(error.value)


def test_a_chat_is_no_text_for_perplexity(chat: Path) -> None:
    for spec in ("chat.jsonl", "chat"):
        with pytest.raises(UserError, match=rf"{spec} is a chat.*plain text"):
            read_text(spec, "evaluation")
