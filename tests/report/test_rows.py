"""The summary of a report: what is averaged how, and in which unit it is shown."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

from rich.console import Console

from lrc.checkpoint.sizes import Size
from lrc.compression.logit_scale import LogitScale
from lrc.compression.measure import Measured
from lrc.compression.norms import StreamNorms
from lrc.compression.ridge import REFITS, RefitRecord, StreamError
from lrc.methods.contract import Prediction
from lrc.records.compression import CalibrationRecord, CalibrationSource, Report, TargetRecord
from lrc.report.compression import report_page
from lrc.report.tables import compression_tables, targets_table


def record(target: str, metric: Any, predicted: tuple[float, float], **measured: float) -> TargetRecord:
    prediction = Prediction(*predicted, metric)
    return TargetRecord(target, "a3", 4, {}, 10, 20, 0, prediction, {}, Measured(**measured))


RECORDS = [
    record("qk", "kl", (0.1, 9.0), kl=0.2),
    record("qk", "kl", (0.12, 3.0), kl=0.3),
    record("qk", "scores", (0.04, 1.0), kl=0.5),
    record("ov", "output", (0.09, 1.0), error=0.16, reference=1.0),
]


def test_a_divergence_is_a_mean_in_nats_and_an_error_is_relative() -> None:
    """A row for each metric of a target, as their means are of different things."""
    assert targets_table(RECORDS).rows == [
        ["qk", "0.11 nats KL", "0.25 nats KL", "50.0%", "4 per head", "a3", "2"],
        ["qk", "0.2000", "0.5 nats KL", "50.0%", "4 per head", "a3", "1"],
        ["ov", "0.3000", "0.4000", "50.0%", "4 per head", "a3", "1"],
    ]


def test_page_and_table_show_nats_beside_nats() -> None:
    size = Size(100, 400, 8)
    report = Report(
        model="m",
        revision=None,
        fingerprint="f0",
        layers=2,
        plan="p",
        plan_text="keep: 0.5",
        out="o",
        keep=0.5,
        with_tables=None,
        before=size,
        after=replace(size, parameters=50),
        perplexity=[],
        targets=RECORDS,
        refits=[
            RefitRecord(0, "o", 0.1, None, StreamError(0.125, 0.1), StreamError(0.15, 0.1234)),
            RefitRecord(1, "down", 0.1, 0.2, StreamError(0.5, 0.25), None),
        ],
        stream_norms=[StreamNorms(0, 100, 1, 4, 2), StreamNorms(1, 100, 0, 4, 0)],
        scale=LogitScale(0.93, 0.4, 0.375, 2048),
        calibration=CalibrationRecord(
            "a=2,b=1", 3, 8, 0, [CalibrationSource("a", 2, 2), CalibrationSource("b", 1, 1)], "0a", 8
        ),
        allocation=None,
        batch_size=1,
        processes=1,
        device_bytes={},
        device="cpu",
        dtype="float32",
        offload="device",
        seconds={},
        peak_bytes={},
        warnings=[],
        versions={},
    )
    page = report_page(report)
    assert "| qk | 0.11 nats KL | 0.25 nats KL | 50.0% | 4 per head | a3 | 2 |" in page
    assert "| qk | 0.2000 | 0.5 nats KL | 50.0% | 4 per head | a3 | 1 |" in page
    assert "Calibrated on 3 blocks of 8 tokens: 2 of a, 1 of b." in page
    assert (
        "- Calibration: data a=2,b=1, samples 3, seq_len 8, seed 0, ids_sha256 0a, first_token 8\n"
        "- Calibration text: data a, blocks 2, weight 2\n" in page
    )
    assert "| 0 | o | 0.1 | 0.125 | 0.1 | 0.15 | 0.123 |" in page
    assert "| 1 | down | 0.1, raised to 0.2 | 0.5 | 0.25 |  |  |" in page
    scaled = (
        "logits scaled by 0.930 in the final norm; KL divergence from the original on 2,048 calibration tokens "
        "that no other fit has used: "
    )
    assert "which no method and no fit has seen" in page
    assert f"Scale: {scaled}0.4 nats before, 0.375 after." in page
    typed = json.loads(report.to_json())
    assert REFITS.validate_python(typed["refits"]) == report.refits
    assert typed["scale"]["value"] == 0.93
    assert "## Residual stream" not in report_page(replace(report, refits=[]))
    assert "Scale" not in report_page(replace(report, scale=None))
    console = Console(file=io.StringIO(), width=200)
    console.print(*compression_tables(report))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "0.11 nats KL" in shown
    assert f"scale: {scaled}" in shown
