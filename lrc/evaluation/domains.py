"""Cut a small text of each domain into windows, to show what compression costs there.

The texts are part of the package. They were written for lrc and are in none of its calibration texts. Each has 9,000 to
13,000 bytes.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lrc.evaluation.answers import reason
from lrc.evaluation.passage import Passage
from lrc.text.blocks import windows
from lrc.text.encoding import encode
from lrc.text.source import ASSETS, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOMAINS = {
    "encyclopedia": "encyclopedia.txt",
    "web": "web.txt",
    "technical": "technical.txt",
    "code": "code.txt",
    "chat": "chat.jsonl",
    "spanish": "spanish.txt",
    "french": "french.txt",
    "german": "german.txt",
    "chinese": "chinese.txt",
}
WINDOW = 256


def domain_passages(
    tokenizer: PreTrainedTokenizerBase,
    rows: int,
    positions: int,
    max_windows: int | None = None,
    first: int | None = None,
) -> tuple[list[Passage], list[str]]:
    """Cut each domain's text into windows of 256 tokens, or ``positions`` if that is fewer.

    Returns passages, whose ``data`` is the domain, and the reasons why other domains are left out: a chat without a
    template, an id beyond the ``rows`` of the embedding, whatever the tokenizer raises. ``max_windows``: of each.
    ``first``: the token that every window starts with.
    """
    found, skipped = list[Passage](), list[str]()
    for name, file in DOMAINS.items():
        try:
            text = replace(read_text(str(ASSETS / "domains" / file), "held-out"), name=name)
            ids = encode(tokenizer, text, rows, first).ids
            found.append(Passage(name, ids, windows(ids, min(WINDOW, positions), first)[:max_windows]))
        except Exception as error:  # templates and tokenizers raise whatever they like
            skipped.append(f"domain {name} is not measured: {reason(error)}")
    return found, skipped
