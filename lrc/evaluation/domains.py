"""Cut a small text of each domain into windows, to show what a compression forgets.

The texts are part of the package and were written for it, so that no calibration and no training has seen them. They
have about 10,000 bytes each.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lrc.errors import UserError
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
    "Spanish": "spanish.txt",
    "French": "french.txt",
    "German": "german.txt",
    "Chinese": "chinese.txt",
}
WINDOW = 256


@dataclass(frozen=True)
class DomainPassages:
    """Hold a passage for each domain, which it has as ``data``; ``skipped`` says which are left out, and why."""

    passages: list[Passage]
    skipped: list[str]


def domain_passages(
    tokenizer: PreTrainedTokenizerBase, rows: int, positions: int, max_windows: int | None = None
) -> DomainPassages:
    """Tokenize the text of each domain and cut it into windows of 256 tokens, or ``positions`` if that is fewer.

    ``rows``: of the embedding. ``max_windows``: of each domain. A domain is left out if the tokenizer cannot write it:
    a chat without a template, an id beyond the embedding.
    """
    found, skipped = list[Passage](), list[str]()
    for name, file in DOMAINS.items():
        try:
            text = replace(read_text(str(ASSETS / "domains" / file), "held-out"), name=name)
            ids = encode(tokenizer, text, rows).ids
            found.append(Passage(name, ids, windows(ids, min(WINDOW, positions))[:max_windows]))
        except UserError as error:
            skipped.append(f"domain {name} is not measured: {error}")
    return DomainPassages(found, skipped)
