"""Every domain has a text that fills windows; what the tokenizer cannot write is left out with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lrc.evaluation.domains import DOMAINS, WINDOW, domain_passages
from lrc.hub.loader import load_tokenizer
from lrc.text.source import ASSETS

TinyCheckpoint = Callable[..., Path]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def test_every_domain_is_cut_into_windows(tiny_checkpoint: TinyCheckpoint) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint("llama"))
    tokenizer.chat_template = TEMPLATE
    passages, skipped = domain_passages(tokenizer, 256, 4096)
    assert [passage.data for passage in passages] == [*DOMAINS]
    assert skipped == []
    for passage in passages:
        assert passage.seq_len == WINDOW
        assert len(passage.cut) == len(passage.ids) // WINDOW
    chat = str(tokenizer.decode(passages[[*DOMAINS].index("chat")].ids))
    assert chat.startswith("<user>")
    assert "<assistant>" in chat


def test_every_file_is_a_domain() -> None:
    assert {path.name for path in (ASSETS / "domains").iterdir()} == set(DOMAINS.values())


def test_shorter_models_get_shorter_windows_and_no_more_than_asked(tiny_checkpoint: TinyCheckpoint) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint("llama"))
    passages, _ = domain_passages(tokenizer, 256, 64, max_windows=3)
    assert {tuple(passage.cut.shape) for passage in passages} == {(3, 64)}


def test_what_the_tokenizer_cannot_write_is_left_out(tiny_checkpoint: TinyCheckpoint) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint("llama"))
    passages, (reason,) = domain_passages(tokenizer, 256, 64)
    assert [passage.data for passage in passages] == [name for name in DOMAINS if name != "chat"]
    assert reason.startswith("domain chat is not measured: ")
    assert "no chat template" in reason
    few, reasons = domain_passages(tokenizer, 100, 64)
    assert few == []
    assert len(reasons) == len(DOMAINS)
    assert "embedding has 100 rows" in reasons[0]


def test_a_tokenizer_that_fails_leaves_domains_out(
    tiny_checkpoint: TinyCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: object, **options: object) -> None:
        raise ValueError("broken\nfor long")

    tokenizer = load_tokenizer(tiny_checkpoint("llama"))
    monkeypatch.setattr("lrc.text.encoding.tokenize", fail)
    passages, reasons = domain_passages(tokenizer, 256, 64)
    assert passages == []
    assert reasons[0] == "domain encyclopedia is not measured: ValueError: broken"
