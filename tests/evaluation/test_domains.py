"""Every domain has a text that fills windows; what the tokenizer cannot write is left out with its reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lrc.evaluation.domains import DOMAINS, WINDOW, domain_passages
from lrc.hub.loader import load_tokenizer
from lrc.text.source import ASSETS

TinyCheckpoint = Callable[..., Path]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def test_every_domain_is_cut_into_windows(tiny_checkpoint: TinyCheckpoint) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint("llama"))
    tokenizer.chat_template = TEMPLATE
    cut = domain_passages(tokenizer, 256, 4096)
    assert [passage.data for passage in cut.passages] == [*DOMAINS]
    assert cut.skipped == []
    for passage in cut.passages:
        assert passage.seq_len == WINDOW
        assert len(passage.cut) == len(passage.ids) // WINDOW >= 30  # enough bytes for an interval
    chat = tokenizer.decode(cut.passages[[*DOMAINS].index("chat")].ids)
    assert chat.startswith("<user>")
    assert "<assistant>" in chat


def test_every_file_is_a_domain() -> None:
    assert {path.name for path in (ASSETS / "domains").iterdir()} == set(DOMAINS.values())


def test_shorter_models_get_shorter_windows_and_no_more_than_asked(tiny_checkpoint: TinyCheckpoint) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint("llama"))
    cut = domain_passages(tokenizer, 256, 64, max_windows=3)
    assert {tuple(passage.cut.shape) for passage in cut.passages} == {(3, 64)}


def test_what_the_tokenizer_cannot_write_is_left_out(tiny_checkpoint: TinyCheckpoint) -> None:
    tokenizer = load_tokenizer(tiny_checkpoint("llama"))
    cut = domain_passages(tokenizer, 256, 64)
    assert [passage.data for passage in cut.passages] == [name for name in DOMAINS if name != "chat"]
    (reason,) = cut.skipped
    assert reason.startswith("domain chat is not measured: ")
    assert "no chat template" in reason
    few = domain_passages(tokenizer, 100, 64)
    assert few.passages == []
    assert len(few.skipped) == len(DOMAINS)
    assert "embedding has 100 rows" in few.skipped[0]
