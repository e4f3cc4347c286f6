"""Reports for tests of pages and comparisons, from the plainest to the worst that there is to show."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Protocol

import pytest

from lrc.checkpoint.sizes import Size
from lrc.compression.logit_scale import LogitScale
from lrc.compression.measure import Measured
from lrc.compression.norms import StreamNorms
from lrc.compression.ridge import RefitRecord, StreamError
from lrc.evaluation.answers import Answer, Answers, Written
from lrc.evaluation.bootstrap import Estimate
from lrc.evaluation.last_words import LastWords
from lrc.evaluation.pair import TokenByToken
from lrc.evaluation.perplexity import Perplexity
from lrc.methods.contract import Prediction
from lrc.plan.resolved import Share
from lrc.records.compression import (
    CalibrationRecord,
    CalibrationSource,
    Domains,
    PerplexityChange,
    Report,
    TargetRecord,
)
from lrc.report.compression import html_page

DENSE = Size(6_738_415_616, 13_476_831_232, 524_288)


class MakeReport(Protocol):
    """A report of a few layers; keywords replace its fields."""

    def __call__(self, **fields: Any) -> Report: ...


def perplexity(value: float, data: str = "wikitext2:test", ids: str = "ab", **fields: Any) -> Perplexity:
    known = Perplexity(data, value, 9e5, 302_950, 341_469, 148, 2048, "float32", 0.9, 1, 32 * ids, 60.0, 5e3)
    return replace(known, **fields)


def change(before: float, after: float, data: str = "wikitext2:test", **fields: Any) -> PerplexityChange:
    ratio = after / before
    tokens = TokenByToken(
        Estimate(ratio, ratio - 0.01, ratio + 0.01),
        Estimate(0.1234, 0.12, 0.127),
        Estimate(1.5, 1.4, 1.6),
        Estimate(0.871, 0.869, 0.873),
    )
    return PerplexityChange(perplexity(before, data, **fields), perplexity(after, data, **fields), tokens)


def target(name: str, layer: int | None, kept: float = 0.5, **fields: Any) -> TargetRecord:
    """A record whose errors grow with the layer."""
    error = 0.01 * 1.05 ** (layer or 0)
    known = TargetRecord(
        target=name,
        method="a3",
        size=round(128 * kept),
        options={"metric": "loss", "refit": "least_squares"},
        kept=round(1000 * kept),
        whole=1000,
        layer=layer,
        predicted=Prediction(error, 1.0, "output", 0.02),
        numerics={"damping": 1e-6, "rounds": 3},
        measured=Measured(1.1 * error, 1.0),
    )
    return replace(known, **fields)


def attention(layer: int) -> TargetRecord:
    """Queries and keys, whose error is a divergence."""
    return target(
        "qk", layer, predicted=Prediction(0.01 + layer / 1000, 4.0, "kl"), measured=Measured(kl=0.02)
    )


@pytest.fixture(scope="session")
def make_report() -> MakeReport:
    def make(**fields: Any) -> Report:
        known = Report(
            model="llama-7b",
            revision="5f98eefcc80e437ef68d457ad7bf167c2c6a1348",
            fingerprint="d4" * 32,
            layers=4,
            plan="a3-2x",
            plan_text="format: 1\nkeep: 0.5\nmethod: a3\n",
            out="llama-7b-a3-2x",
            keep=0.5,
            with_tables=None,
            before=DENSE,
            after=Size(3_500_000_000, 7_000_000_000, 262_144),
            perplexity=[change(5.47, 6.81)],
            targets=[r for i in range(4) for r in (attention(i), target("ov", i), target("mlp", i))],
            refits=[RefitRecord(0, "o", 0.1, None, StreamError(0.125, 0.1), StreamError(0.15, 0.1234))],
            stream_norms=[StreamNorms(i, 4096, 10 * i, 8, i) for i in range(4)],
            scale=LogitScale(0.93, 0.4, 0.375, 2048),
            calibration=CalibrationRecord(
                "c4", 128, 2048, 0, [CalibrationSource("c4", 128, text_sha256="0a" * 32)], "0b" * 32, 8, 32
            ),
            allocation=None,
            device="cpu",
            dtype="float32",
            batch_size=2,
            processes=1,
            offload="device",
            seconds={"load": 0.5, "observe": 22.7, "solve": 5.7, "evaluate": 11.3},
            device_bytes={},
            peak_bytes={"host": 2**31},
            warnings=[],
            versions={"lrc": "0.1.0", "torch": "2.13.0"},
            domains=Domains(
                {
                    "chat": change(9.0, 9.9, "chat"),
                    "web": change(10.0, 12.0, "web"),
                    "code": change(4.0, 16.0, "code"),
                },
                ["domain german is not measured: no file"],
            ),
            last_words=LastWords(
                500, 498, 0.41, 0.38, Estimate(-0.03, -0.05, -0.01), 40.0, 50.0, Estimate(1.25, 1.2, 1.3)
            ),
            answers=Answers(
                True,
                [Answer("Why?", Written("Because light is scattered.", True), Written("The sky", False))],
                ["no answers to 'Who?': the tokenizer fails (KeyError: 'role')"],
            ),
        )
        return replace(known, **fields)

    return make


@pytest.fixture(scope="session")
def worst(make_report: MakeReport) -> Report:
    """80 layers of every projection and both tables, long and foreign names, markup, figures that are no numbers."""
    roles = ("q", "k", "v", "o", "gate", "up", "down")
    methods = {"q": "two_sided_svd", "k": "two_sided_svd", "v": "whitened_svd", "gate": "monarch"}
    targets = [
        target(role, layer, 0.1 + 0.01 * layer, method=methods.get(role, "a3"))
        for layer in range(2, 80)
        for role in roles
    ]
    targets += [attention(layer) for layer in range(2)]
    targets += [target("embed", None, 0.4, method="whitened_svd"), target("lm_head", None, 0.3, method="svd")]
    targets[5] = replace(
        targets[5], predicted=Prediction(math.nan, 1.0, "output"), measured=Measured(0.0, 0.0)
    )
    targets[6] = replace(targets[6], measured=Measured(math.inf, 1.0))
    targets[7] = replace(targets[7], predicted=Prediction(0.1, 1.0, "loss"))
    name = "/home/Größe/模型/" + "ein-sehr-langer-Name-ohne-jede-Luecke-" * 4 + "<b>&\"'$x_1$"
    stages = (
        "load",
        "generate",
        "measure sizes",
        "gradients",
        "embed",
        "observe",
        "solve",
        "assemble",
        "measure",
    )
    seconds = {stage: 10.0 ** (i - 3) for i, stage in enumerate(stages)}
    return make_report(
        model=name,
        plan="配置/" + 12 * "very-long-plan-" + "<script>alert(1)</script>.yaml",
        plan_text="# <script>alert(1)</script> " + 40 * "lang " + "\nkeep: 0.1 # " + 200 * "x" + "\n",
        out=name + "-out",
        layers=80,
        with_tables=Share("decoder, embedding and head", 0.4, 4, 10),
        perplexity=[
            change(5.47, math.inf),
            change(7.2, 7.3, "c4"),
            change(1.5, 1e7, "/data/<i>text</i>/" + 20 * "longer-" + ".txt", bits_per_byte=None),
        ],
        targets=targets,
        refits=[
            RefitRecord(i, role, 0.1, 0.2, StreamError(0.5, math.nan), None)
            for i in range(80)
            for role in ("o", "down")
        ],
        allocation={"allocation": "sensitivity", "cost": math.inf, "loss": None, "key": "f" * 64},
        warnings=["<b>bold</b> " + 60 * "words of a warning ", "x" * 400],
        seconds=seconds,
        device_bytes={stage: i * 2**33 for i, stage in enumerate(stages)},
        peak_bytes={"host": 2**38, "device": 2**36},
        processes=8,
        offload="disk",
        versions={f"package-{i}": "1.2.3+cu128" for i in range(20)},
        answers=Answers(
            False,
            [
                Answer(
                    "<b>Why|How?</b>" + 40 * "long-",
                    Written("```\n\n# <script>alert(1)</script> | \x1b[31mred\x00", True),
                    Written(300 * "x" + "\r\n模型", False),
                )
            ],
            ["<b>none</b> " + 60 * "reasons "],
        ),
    )


@pytest.fixture(scope="session")
def worst_page(worst: Report) -> str:
    """The page of the worst report, which takes seconds to draw."""
    return html_page(worst)


@pytest.fixture
def many(make_report: MakeReport) -> list[Report]:
    """Outputs of two originals on two texts, near one another, some without a figure or with one that is none."""
    sizes = [(13.0 - 0.2 * i) * 1e9 for i in range(8)] + [(9.0 - i) * 1e9 for i in range(8)]
    reports = []
    for i, size in enumerate(sizes):
        method = ("a3", "whitened_svd", "svd")[i % 3]
        quality = [change(5.47, 5.47 + 0.3 * i * (1 + i % 3))]
        if i % 2:
            quality.append(change(7.2, 9.0 + i, "c4"))
        after = replace(DENSE, bytes=round(size))
        records = [target("q", layer, method=method) for layer in range(4)]
        reports.append(make_report(plan=f"{method}-{i}", after=after, targets=records, perplexity=quality))
    other = {"model": "<i>gpt2</i>", "fingerprint": "e5" * 32, "before": replace(DENSE, bytes=498_000_000)}
    tiny = replace(DENSE, bytes=300_000_000)
    reports.append(make_report(plan="none", perplexity=[]))
    reports.append(make_report(**other, after=tiny, perplexity=[change(29.9, math.nan)]))
    reports.append(make_report(**other, after=tiny, perplexity=[change(29.9, 1e9)]))
    return reports
