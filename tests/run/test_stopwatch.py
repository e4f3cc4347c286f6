"""The times of a run that several processes did, one after the other."""

from __future__ import annotations

import json
import time

import pytest
import torch

from lrc.run.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that tests move on by hand."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def spend(watch: Stopwatch, clock: list[float], **seconds: float) -> None:
    for name, each in seconds.items():
        with watch.stage(name):
            clock[0] += each


def test_seconds_of_all_processes_add_up_and_the_largest_peak_counts(clock: list[float]) -> None:
    first, second = Stopwatch(torch.device("cpu")), Stopwatch(torch.device("cpu"))
    spend(first, clock, load=1.0, solve=600.0, evaluate=20.0)
    kept = json.loads(
        json.dumps(first.times() | {"device_bytes": {"solve": 7}, "peak_bytes": {"host": 2**60}})
    )
    spend(second, clock, load=2.0)  # before the run is opened
    second.resume(kept)
    spend(second, clock, evaluate=40.0, write=0.5)
    assert second.seconds == {"load": 3.0, "solve": 600.0, "evaluate": 60.0, "write": 0.5}
    assert second.device_bytes == {"solve": 7}
    assert second.peak_bytes == {"host": 2**60}
    assert first.peak_bytes["host"] < 2**60


def test_a_stage_that_is_killed_counts_up_to_what_was_saved_last(clock: list[float]) -> None:
    watch, saved = Stopwatch(torch.device("cpu")), list[dict[str, float]]()
    watch.save = lambda: saved.append(watch.times()["seconds"])
    with watch.stage("evaluate"):
        clock[0] += 900
        watch.save()
        clock[0] += 10
    assert saved == [{"evaluate": 900.0}, {"evaluate": 910.0}]
