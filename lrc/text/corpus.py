"""Tokenize the texts of a mixture and draw blocks from them: for calibration, and held out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from lrc.errors import UserError
from lrc.text.blocks import calibration_blocks, held_out_blocks, ids_sha256, unshared_blocks, windows
from lrc.text.chat import has_template
from lrc.text.datasets import DATASETS, FOREIGN, GENERAL, MESSAGES, SYNTHETIC
from lrc.text.encoding import FEW_BYTES, encode, excerpt, handles
from lrc.text.mixture import Data, Mixture, about, filled, interleaved, label_of, most, shares
from lrc.text.source import DATA_DIR_VARIABLE, Missing, Text, Use, data_folder, local_file, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS = 10  # of a text of the general mixture for each token of its share; English has 4 or 5 a token
_LEAST_SHARE = 8  # blocks


@dataclass(frozen=True)
class Source:
    """Hold the blocks (n, tokens) of one source; ``provenance`` identifies its text, as JSON values."""

    label: str
    blocks: Tensor
    provenance: Mapping[str, Any]


@dataclass(frozen=True)
class Drawn:
    """Hold the ``blocks`` (samples, tokens) drawn from all sources; ``weights`` is None if none were given.

    Each block is of one source. Sources are interleaved evenly, each in the order of its text, so that any run of
    blocks has about the proportions of the whole. ``name``: that of the default mixture. ``notes``: for the report.
    ``first``: the token that every block starts with, if any.
    """

    sources: tuple[Source, ...]
    weights: tuple[float, ...] | None
    blocks: Tensor
    name: str | None = None
    notes: tuple[str, ...] = ()
    first: int | None = None

    @property
    def data(self) -> Data:
        """Return the texts as a plan writes them, with explicit splits."""
        labels = tuple(source.label for source in self.sources)
        if self.name:
            return self.name
        if self.weights is not None:
            return dict(zip(labels, self.weights, strict=True))
        return labels if labels[1:] else labels[0]

    @property
    def label(self) -> str:
        """Return the texts as the command line writes them: ``wikitext2:train=2,c4:train=1``."""
        return self.name or label_of([source.label for source in self.sources], self.weights)

    def as_dict(self, seed: int) -> dict[str, Any]:
        """Return the output's record of the blocks, which were drawn with ``seed``."""
        samples, seq_len = self.blocks.shape
        weights = [{"weight": w} for w in self.weights or ()] or [{}] * len(self.sources)
        return {
            "data": self.label,
            "samples": samples,
            "seq_len": seq_len,
            "seed": seed,
            **({} if self.first is None else {"first_id": self.first}),
            "sources": [
                {"data": source.label, **weight, "blocks": len(source.blocks), **source.provenance}
                for source, weight in zip(self.sources, weights, strict=True)
            ],
            "ids_sha256": ids_sha256(self.blocks),
        }


@dataclass(frozen=True)
class Part:
    """Hold one tokenized text by the name that a mixture gives it; ``ids`` is None for synthetic text."""

    name: str
    label: str
    ids: Tensor | None = None
    provenance: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Corpus:
    """Hold the tokenized texts of a mixture that could be had, to be cut into blocks of ``seq_len`` tokens.

    ``first``: the token that every block starts with, if any.
    """

    mixture: Mixture
    parts: tuple[Part, ...]
    use: Use
    seq_len: int
    notes: tuple[str, ...]
    first: int | None = None

    @property
    def label(self) -> str:
        """Return the texts as the command line writes them."""
        if self.mixture.general:
            return GENERAL
        return label_of([part.label for part in self.parts], self.mixture.weights)

    def draw(
        self, samples: int | Literal["all"], seed: int, generate: Callable[[int], Source] | None = None
    ) -> Drawn:
        """Draw ``samples`` blocks, split by ``shares``, from each source without replacement.

        ``all`` takes every block of every source; with weights, as many as the scarcest source allows in proportion.
        ``generate`` makes the blocks of synthetic text and is called last. Raises UserError for too few blocks. Of the
        general mixture a source with too few blocks gives all, and the others fill up.
        """
        corpus = self if samples == "all" else self._served(samples)
        room = [
            None if part.ids is None else len(windows(part.ids, self.seq_len, self.first))
            for part in corpus.parts
        ]
        counts, notes = corpus._counts(samples, room)
        found: dict[str, Source] = {}
        for part, count in zip(corpus.parts, counts, strict=True):
            if part.ids is not None:
                with about(f"calibration on {part.label}"):
                    blocks = calibration_blocks(part.ids, count, self.seq_len, seed, self.first)
                found[part.name] = Source(part.label, blocks, part.provenance or {})
        if SYNTHETIC in corpus.mixture.names:
            assert generate is not None, "synthetic text needs a model"
            found[SYNTHETIC] = generate(counts[corpus.mixture.names.index(SYNTHETIC)])
        return corpus._drawn([found[part.name] for part in corpus.parts], notes)

    def held_out(self, samples: int, fitted: Tensor) -> Drawn:
        """Take the first ``samples`` blocks that are not among ``fitted`` (n, tokens), split by ``shares``.

        Raises UserError for too few blocks, and for text that overlaps ``fitted``. Of the general mixture overlapping
        blocks are left out, a source with too few blocks gives all, and the others fill up.
        """
        if not self.mixture.general:
            sources = []
            counts = shares(samples, self.mixture.fractions)
            for part, count in zip(self.parts, counts, strict=True):
                assert part.ids is not None, "held-out text is not synthetic"
                with about(f"held-out text {part.label}"):
                    blocks = held_out_blocks(part.ids, count, fitted, self.first)
                sources.append(Source(part.label, blocks, part.provenance or {}))
            return self._drawn(sources, [])
        texts = [(part.name, part.ids) for part in self.parts if part.ids is not None]
        free = {name: unshared_blocks(ids, fitted, self.first) for name, ids in texts}
        corpus = self._of(
            [name for name, blocks in free.items() if len(blocks)], "no block besides calibration"
        )
        corpus = corpus._served(samples)
        counts, notes = corpus._counts(samples, [len(free[part.name]) for part in corpus.parts])
        sources = [
            Source(part.label, free[part.name][:count], part.provenance or {})
            for part, count in zip(corpus.parts, counts, strict=True)
        ]
        return corpus._drawn(sources, notes)

    def _drawn(self, sources: Sequence[Source], notes: Sequence[str]) -> Drawn:
        name = self.label if self.mixture.general else None
        blocks = interleaved([source.blocks for source in sources])
        notes = (*self.notes, *notes)
        return Drawn(tuple(sources), self.mixture.weights, blocks, name, notes, self.first)

    def _of(self, names: Sequence[str], reason: str) -> Corpus:
        """Return the corpus of these sources alone, with a note that says why the others are left out."""
        gone = [part.name for part in self.parts if part.name not in names]
        if not gone:
            return self
        parts = tuple(part for part in self.parts if part.name in names)
        notes = (*self.notes, _without(self.use, ", ".join(gone), reason))
        return replace(self, mixture=self.mixture.of(names), parts=parts, notes=notes)

    def _served(self, samples: int) -> Corpus:
        """Return the general mixture of no more sources than ``samples``, those of the largest weights."""
        if not self.mixture.general or samples >= len(self.parts):
            return self
        weights = dict(zip(self.mixture.names, self.mixture.fractions, strict=True))
        heaviest = sorted(weights, key=lambda name: -weights[name])[:samples]
        return self._of(heaviest, f"{samples} blocks are fewer than the texts")

    def _counts(
        self, samples: int | Literal["all"], room: Sequence[int | None]
    ) -> tuple[list[int], list[str]]:
        """Return the blocks of each source, and notes about short sources; ``room``: what each has, None unlimited."""
        weights, labels = self.mixture.fractions, [part.label for part in self.parts]
        full = [blocks or 0 for blocks in room]
        if samples == "all":
            every = self.mixture.weights is None
            return full if every else shares(most(weights, room, sum(full)), weights), []
        counts = shares(samples, weights)
        short = [i for i, blocks in enumerate(room) if blocks is not None and blocks < counts[i]]
        what = "calibration" if self.use == "calibration" else "held-out text"
        if self.mixture.general:
            if samples > sum(full):
                raise UserError(
                    f"{what} on {self.label}: the texts have {sum(full)} blocks of {self.seq_len} tokens, fewer than "
                    f"the {samples} samples asked for; use samples: {sum(full)} or a shorter seq_len"
                )
            lacking = [
                f"{what} on {self.label}: {labels[i]} has {room[i]} blocks, fewer than the {counts[i]} of its share; "
                "the other texts fill up"
                for i in short
            ]
            return filled(samples, weights, full), lacking
        if short and labels[1:]:  # for a single text the draw has a better message
            lacking = [
                f"{labels[i]} has {room[i]} blocks, fewer than the {counts[i]} of its share" for i in short
            ]
            raise UserError(
                f"{what} on {self.label}: {'; '.join(lacking)}; use at most samples: "
                f"{most(weights, room, samples)}, other weights or a longer text"
            )
        return counts, []


def read_corpus(
    mixture: Mixture,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    samples: int | Literal["all"] = "all",
    *,
    use: Use = "calibration",
    data_dir: Path | None = None,
    rows: int | None = None,
    first: int | None = None,
) -> Corpus:
    """Read and tokenize the texts of a mixture.

    Of the general mixture, sources that cannot be had are left out, each with a note, and no more is tokenized of a
    text than ``samples`` blocks need. ``first``: the token that every block starts with. Raises UserError if no source
    is left. Of another mixture, raises UserError for a text that cannot be read, is named twice, fills no block, or has
    an id beyond the ``rows`` of the embedding.
    """
    mixture.check(samples, use)
    what = "calibration on" if use == "calibration" else "held-out text"
    texts, known = dict[str, Text | None](), dict[str, str]()
    notes, lost = list[str](), dict[str, UserError]()
    for name in mixture.names:
        if name == SYNTHETIC and use == "calibration":
            texts[name] = None
            continue
        with _kept(lost, name, mixture):
            if mixture.general:
                offline = any(isinstance(error, Missing) and error.unreachable for error in lost.values())
                _check_chance(tokenizer, name, use, data_dir, offline=offline)
            texts[name] = text = read_text(name, use, data_dir)
            if (other := known.setdefault(text.sha256, name)) != name:
                raise UserError(f"{what} {other} and {name}: they are the same text; name it once")
    there, parts = mixture.of(list(texts)), list[Part]()
    for (name, text), weight in zip(texts.items(), there.fractions, strict=True):
        if text is None:
            parts.append(Part(name, name))
            continue
        if mixture.general and samples != "all":
            share = float(weight / sum(there.fractions)) * samples
            text = excerpt(text, int(_CHARACTERS * max(share, _LEAST_SHARE) * seq_len))
        with _kept(lost, name, mixture):
            with nullcontext() if mixture.general else about(f"{what} {text.label}"):
                encoded = encode(tokenizer, text, rows, first, lenient=mixture.general)
                windows(encoded.ids, seq_len, first)
            few = f"the tokenizer writes {encoded.bytes_per_token:.2f} bytes a token, below {FEW_BYTES:g}"
            badly = not handles(tokenizer, encoded)
            if badly and mixture.general and name in FOREIGN:
                raise UserError(f"{few}: it does not handle the language")
            if badly and use == "calibration":
                notes.append(f"{what} {text.label}: {few}; it does not handle the text's language")
            notes += [*text.notes, *encoded.notes]
            provenance = {"text_sha256": text.sha256, "origin": text.origin}
            parts.append(Part(name, text.label, encoded.ids, provenance))
    reasons = {
        name: error.reason if isinstance(error, Missing) else str(error) for name, error in lost.items()
    }
    if not parts:
        name, reason = next(iter(reasons.items()))
        raise UserError(
            f"{what} {GENERAL}: none of its texts can be had (such as {name}: {reason}). Pass --data-dir or set "
            f"{DATA_DIR_VARIABLE} to a folder with data sets, or name a text file with --calib FILE"
        )
    notes = [*(_without(use, name, reason) for name, reason in reasons.items()), *notes]
    there = mixture.of([part.name for part in parts])
    return Corpus(there, tuple(parts), use, seq_len, tuple(notes), first)


@contextmanager
def _kept(lost: dict[str, UserError], name: str, mixture: Mixture) -> Iterator[None]:
    """Keep a UserError about a source of the general mixture in ``lost`` instead of raising it."""
    try:
        yield
    except UserError as error:
        if not mixture.general:
            raise
        lost[name] = error


def _check_chance(
    tokenizer: PreTrainedTokenizerBase, name: str, use: Use, data_dir: Path | None, *, offline: bool
) -> None:
    """Raise UserError for a source that cannot be had, before the hub is asked.

    It is a chat without a template, or a text that only the hub has while the hub is ``offline``.
    """
    if DATASETS[name].column == MESSAGES and not has_template(tokenizer):
        raise UserError("the tokenizer has no chat template")
    if offline and local_file(DATASETS[name], "", use, data_folder(data_dir)) is None:
        raise UserError("there is no local file, and the hub does not answer")


def _without(use: Use, names: str, reason: str) -> str:
    """Return the note about sources of the general mixture that are left out."""
    what = "calibration on" if use == "calibration" else "held-out text"
    return f"{what} {GENERAL} without {names}: {reason}; the other texts take its share"
