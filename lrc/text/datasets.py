"""List the data sets known by name: where each split comes from, and how its rows become one text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class Split:
    """Hold one split of a data set.

    ``local``: file names in the data folder, tried in order. ``hub_file``: the file to read from the hub; None uses the
    hub's config. ``documents``: how many rows are used; None means all. ``skip``: rows of the hub's stream before them.
    """

    local: tuple[str, ...]
    hub_file: str | None = None
    documents: int | None = None
    skip: int = 0


@dataclass(frozen=True)
class DataSet:
    """Hold a data set: its hub repository, the split for each use, and how its rows become one text.

    ``hub`` is None for text inside the package; its ``local`` names are in ``lrc/assets``. ``lines`` says how a line of
    a local text file becomes a row: ``row`` keeps the newline and turns a blank line into an empty row, ``stripped``
    strips white space, ``none`` uses the whole file as it is. ``column`` is that of the hub; local files have ``text``
    or ``messages``. ``stream``: the hub's split that holds the rows of both train and validation; a local file then
    holds both too, and its last tenth is validation.
    """

    name: str
    summary: str
    licence: str
    protocol: str
    splits: Mapping[str, Split]
    calibration: str = "train"
    evaluation: str = "test"
    hub: str | None = None
    config: str | None = None
    revision: str | None = None
    column: str = "text"
    joiner: str = "\n\n"
    lines: Literal["row", "stripped", "none"] = "none"
    stream: str | None = None


def _streamed(name: str, summary: str, licence: str, hub: str, local: str, **options: Any) -> DataSet:
    """Return a data set of one stream: the first 2,000 rows are train, the next 200 are validation."""
    train, validation = 2_000, 200
    return DataSet(
        name,
        summary,
        licence,
        f"rows joined with two newlines: the first {train:,} of the hub's stream, for validation the next "
        f"{validation}; of a local file its last tenth is validation",
        {
            "train": Split((local,), documents=train),
            "validation": Split((local,), documents=validation, skip=train),
        },
        evaluation="validation",
        hub=hub,
        stream="train",
        **options,
    )


SYNTHETIC = "synthetic"  # the name of calibration text that the model itself generates
MESSAGES = "messages"  # the column of conversations

# The default calibration: a mixture of texts by weight. Calibrated on WikiText-2 alone, a model forgets all else.
GENERAL = "general"
GENERAL_WEIGHTS = {
    "wikitext2": 2.3,
    "wikipedia": 1.7,
    "web": 2,
    "c4": 2,
    "textbooks": 0.75,
    "code": 1,
    "wikipedia-es": 0.25,
    "wikipedia-fr": 0.25,
    "chat": 0.75,
}
FOREIGN = (
    "wikipedia-es",
    "wikipedia-fr",
)  # left out of ``general`` if the tokenizer does not handle the language
HELD_OUT = {
    "c4": "web"
}  # texts that stand in where held-out text is wanted; c4:validation measures perplexity

# the hub's conversion; the main branch has a script (refused by datasets 4) or needs zstandard
_PARQUET = "refs/convert/parquet"
_SHORT = {"train": "train", "validation": "valid", "test": "test"}  # splits, as file names write them

_ALL = (
    DataSet(
        name="wikitext2",
        summary="WikiText-2 raw: Wikipedia articles, the usual perplexity text",
        licence="CC BY-SA 3.0 and GFDL",
        protocol="all rows joined with two newlines; a blank row is the empty string",
        hub="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        lines="row",
        splits={
            split: Split(
                (
                    f"wikitext2-raw/{short}.txt",
                    f"wikitext2-raw/wiki.{short}.raw",
                    f"wikitext-2-raw/wiki.{short}.raw",
                    f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet",
                    *(("wikitext2-raw/train-head.txt",) if split == "train" else ()),
                )
            )
            for split, short in _SHORT.items()
        },
    ),
    DataSet(
        name="c4",
        summary="C4 (English): cleaned web pages",
        licence="ODC-BY 1.0; Common Crawl terms of use for the pages",
        protocol="the first documents of the first shard, joined with two newlines: 600 of validation, about as "
        "many tokens as WikiText-2 has in test, and 10,000 of train",
        hub="allenai/c4",
        evaluation="validation",
        splits={
            split: Split(
                (f"c4/{file}", f"c4/{Path(file).name}", f"c4/{sample}-sample.jsonl"), file, documents
            )
            for split, file, sample, documents in (
                ("train", "en/c4-train.00000-of-01024.json.gz", "calibration", 10_000),
                ("validation", "en/c4-validation.00000-of-00008.json.gz", "validation", 600),
            )
        },
    ),
    DataSet(
        name="ptb",
        summary="Penn Treebank: newspaper sentences in lower case with rare words as <unk>",
        licence="LDC User Agreement for Non-Members",
        protocol="sentences joined with two newlines; some papers use ptb:validation, or join with spaces",
        hub="ptb-text-only/ptb_text_only",
        revision=_PARQUET,
        column="sentence",
        lines="stripped",
        splits={
            split: Split((f"ptb/ptb.{short}.txt", f"ptb/{short}.txt"), f"penn_treebank/{split}/0000.parquet")
            for split, short in _SHORT.items()
        },
    ),
    DataSet(
        name="pile",
        summary="The Pile without its copyrighted parts: web, papers, code, mail",
        licence="mixed, by source",
        protocol="the first documents joined with two newlines: 2,000 of validation or test, 10,000 of "
        "train; figures are not those of the full Pile",
        hub="monology/pile-uncopyrighted",
        revision=_PARQUET,
        splits={
            "train": Split(("pile/train.jsonl",), "default/partial-train/0000.parquet", 10_000),
            "validation": Split(("pile/val.jsonl",), "default/partial-validation/0000.parquet", 2_000),
            "test": Split(("pile/test.jsonl",), "default/partial-test/0000.parquet", 2_000),
        },
    ),
    DataSet(
        name="builtin",
        summary="novels from 1849 to 1929, part of the package; needs no network",
        licence="public domain",
        protocol="the text as it is",
        splits={"train": Split(("calibration.txt",)), "test": Split(("heldout.txt",))},
    ),
    *(
        _streamed(
            f"wikipedia{suffix}",
            f"Wikipedia articles in {language}",
            "CC BY-SA 3.0 and GFDL",
            "wikimedia/wikipedia",
            f"text/wikipedia-{file}.jsonl.xz",
            config=f"20231101.{code}",
        )
        for suffix, language, code, file in (
            ("", "English", "en", "articles"),
            ("-es", "Spanish", "es", "leads-es"),
            ("-fr", "French", "fr", "leads-fr"),
        )
    ),
    _streamed(
        "web",
        "FineWeb: filtered web pages in English",
        "ODC-BY 1.0; Common Crawl terms of use for the pages",
        "HuggingFaceFW/fineweb",
        "text/web-c4-redpajama.jsonl.xz",
        config="sample-10BT",
    ),
    _streamed(
        "textbooks",
        "FineWeb-Edu: educational web pages in English; locally textbooks",
        "ODC-BY 1.0; Common Crawl terms of use for the pages",
        "HuggingFaceFW/fineweb-edu",
        "text/openstax-textbooks.jsonl.xz",
        config="sample-10BT",
    ),
    _streamed(
        "code",
        "CodeParrot: Python files of GitHub",
        "that of each file's repository",
        "codeparrot/codeparrot-clean-valid",
        "text/code-python-stdlib.jsonl.xz",
        column="content",
    ),
    _streamed(
        "chat",
        "SmolTalk: conversations with an assistant, by the tokenizer's chat template; not for perplexity",
        "Apache 2.0, and that of each source",
        "HuggingFaceTB/smoltalk",
        "text/chat.jsonl.xz",
        config="all",
        column=MESSAGES,
    ),
)

DATASETS: dict[str, DataSet] = {data_set.name: data_set for data_set in _ALL}
