"""``lrc bench``: figures as tables and as one document, and mistakes told before anything is measured."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import lrc
from lrc.records.benchmark import Bench
from lrc.report.benchmark import bench_tables

QUICK = ["--prefill", "1x8,2x8", "--decode", "2x8", "--new-tokens", "2", "--repeats", "2", "--device", "cpu"]


def test_tables_and_documents(succeeds, tiny_checkpoint, work):
    ours, theirs = tiny_checkpoint("llama", intermediate_size=16), tiny_checkpoint("llama")
    result = succeeds("bench", ours, "--against", theirs, *QUICK, "-o", "figures.json")
    assert result.stderr == "wrote figures.json\n"
    printed = result.stdout
    assert f"model: {ours}, " in printed.replace("\n", "")
    for words in (
        "prefill 1x8 eager",
        "decode 2x8 eager",
        "tokens/s, against",
        "expected",
        "reached",
        "KV cache, model",
    ):
        assert words in printed
    assert "device peak" not in printed  # a CPU has none to tell
    assert "±" not in printed  # two samples have no quartiles
    assert "medians of 2 samples;" in printed
    written = json.loads((work / "figures.json").read_text(encoding="utf-8"))
    assert [(row["phase"], row["batch"]) for row in written["rows"]] == [
        ("prefill", 1),
        ("prefill", 2),
        ("decode", 2),
    ]
    shown = json.loads(succeeds("bench", ours, *QUICK, "--json").stdout)
    assert shown.keys() == written.keys()
    assert shown["against"] is None
    assert shown["of"] == written["of"]


def tables(found: Bench) -> list[Any]:
    shown: list[Any] = [part for part in bench_tables(found) if not isinstance(part, str)]
    return [part.table for part in shown]


def test_quartiles_and_peaks_where_there_are_some(tiny_checkpoint):
    quick = {"prefill": [(1, 8)], "decode": [], "new_tokens": 2, "run": lrc.Run(device="cpu")}
    alone = lrc.bench(tiny_checkpoint("llama"), repeats=3, **quick)
    parts = list(bench_tables(alone))
    told = " ".join(part for part in parts if isinstance(part, str))
    assert "medians of 3 samples ± half the distance of their quartiles" in told
    speed = tables(alone)[0]
    assert any("±" in str(row[1]) for row in speed.rows)
    on_gpu = replace(alone.rows[0], ours=replace(alone.rows[0].ours, peak_bytes=3 * 2**30))
    memory = tables(replace(alone, rows=[on_gpu]))[1]
    assert [column.heading for column in memory.columns] == ["case", "KV cache, model", "device peak, model"]
    assert [str(row[2]) for row in memory.rows] == ["3 GiB"]


def test_mistakes(fails, tiny_checkpoint):
    model = tiny_checkpoint("llama")
    quick = [*QUICK, "--device", "cpu"]
    assert "unknown model 'tiny-lama'" in fails("bench", "tiny-lama")
    assert "--prefill: '8' is not BATCHxTOKENS" in fails("bench", model, "--prefill", "8")
    assert "--modes graphs is for GPUs" in fails("bench", model, *quick, "--modes", "graphs")
    assert "there is no folder nowhere" in fails("bench", model, *quick, "-o", "nowhere/figures.json")
    assert "-o . cannot be written: it is a folder" in fails("bench", model, *quick, "-o", ".")
    assert "--modes '' is empty" in fails("bench", model, *quick, "--modes", "")
    assert "--prefill '' is empty; name something, or leave it out" in fails("bench", model, "--prefill", "")
    assert "--repeats 0: the smallest is 1" in fails("bench", model, *quick, "--repeats", "0")
    message = fails("bench", model, *quick, "--decode", "4000000000000x8")
    assert "bytes on cpu for decode 4000000000000x8" in message
    assert "the nearest is --decode " in message
