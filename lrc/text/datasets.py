"""The data sets known by name, as data: where each split comes from, and how its rows become one text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Split:
    """One split of a data set.

    ``local``: names under a data folder, tried in order. ``hub_file``: the one file read from the hub; None
    lets the hub's config say. ``documents``: how many rows from the start are used; None means all of them.
    """

    local: tuple[str, ...]
    hub_file: str | None = None
    documents: int | None = None


@dataclass(frozen=True)
class DataSet:
    """A data set: its home on the hub, the split for each use, and how its rows become one text.

    ``hub`` is None for text inside the package, whose ``local`` names lie in ``lrc/assets``. ``lines`` says
    how a line of a local text file becomes a row: ``row`` keeps its newline and makes a blank line the empty
    row, ``stripped`` drops white space at both ends, ``none`` takes the whole file as it is.
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


SYNTHETIC = "synthetic"  # stands for text that the model itself writes, where calibration texts are named

# the hub's own conversion, where the main branch is a script (refused by datasets 4) or needs zstandard
_PARQUET = "refs/convert/parquet"

_ALL = (
    DataSet(
        name="wikitext2",
        summary="WikiText-2 raw: Wikipedia articles, the usual perplexity text",
        licence="CC BY-SA 3.0 and GFDL",
        protocol="all rows joined with two newlines, a blank row being the empty string",
        hub="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        lines="row",
        splits={
            "train": Split(
                (
                    "wikitext2-raw/train.txt",
                    "wikitext2-raw/wiki.train.raw",
                    "wikitext-2-raw/wiki.train.raw",
                    "wikitext-2-raw-v1/train-00000-of-00001.parquet",
                    "wikitext2-raw/train-head.txt",
                )
            ),
            "validation": Split(
                (
                    "wikitext2-raw/valid.txt",
                    "wikitext2-raw/wiki.valid.raw",
                    "wikitext-2-raw/wiki.valid.raw",
                    "wikitext-2-raw-v1/validation-00000-of-00001.parquet",
                )
            ),
            "test": Split(
                (
                    "wikitext2-raw/test.txt",
                    "wikitext2-raw/wiki.test.raw",
                    "wikitext-2-raw/wiki.test.raw",
                    "wikitext-2-raw-v1/test-00000-of-00001.parquet",
                )
            ),
        },
    ),
    DataSet(
        name="c4",
        summary="C4 (English): cleaned web pages",
        licence="ODC-BY 1.0; Common Crawl terms of use for the pages",
        protocol="the first documents of the first shard, joined with two newlines: 2,000 of validation, "
        "10,000 of train",
        hub="allenai/c4",
        evaluation="validation",
        splits={
            "train": Split(
                (
                    "c4/en/c4-train.00000-of-01024.json.gz",
                    "c4/c4-train.00000-of-01024.json.gz",
                    "c4/calibration-sample.jsonl",
                ),
                hub_file="en/c4-train.00000-of-01024.json.gz",
                documents=10_000,
            ),
            "validation": Split(
                (
                    "c4/en/c4-validation.00000-of-00008.json.gz",
                    "c4/c4-validation.00000-of-00008.json.gz",
                    "c4/validation-sample.jsonl",
                ),
                hub_file="en/c4-validation.00000-of-00008.json.gz",
                documents=2_000,
            ),
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
            "train": Split(("ptb/ptb.train.txt", "ptb/train.txt"), "penn_treebank/train/0000.parquet"),
            "validation": Split(
                ("ptb/ptb.valid.txt", "ptb/valid.txt"), "penn_treebank/validation/0000.parquet"
            ),
            "test": Split(("ptb/ptb.test.txt", "ptb/test.txt"), "penn_treebank/test/0000.parquet"),
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
        summary="novels of 1849 to 1929 inside the package; needs no network",
        licence="public domain",
        protocol="the text as it is",
        splits={"train": Split(("calibration.txt",)), "test": Split(("heldout.txt",))},
    ),
)

DATASETS: dict[str, DataSet] = {data_set.name: data_set for data_set in _ALL}
