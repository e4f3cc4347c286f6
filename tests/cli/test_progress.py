"""What a run shows of its stages, under a clock that moves as slowly or fast as steps take."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import pytest

from lrc.cli import progress as module
from lrc.cli.progress import Stage, Stages, progress

SLOW = 45.0  # seconds of a step


class Screen:
    """Stages whose clock is moved by hand; every second that passes, a thread would tick."""

    def __init__(self) -> None:
        self.now, self.lines = 0.0, list[tuple[float, str]]()
        self.stages = Stages(lambda line: self.lines.append((self.now, line)), lambda: self.now)

    def track(self, label: str, total: int) -> Callable[[int], None]:
        stage = self.stages.begin(label, total)
        return lambda done: self.stages.advance(stage, done)

    def spend(self, seconds: float) -> None:
        for _ in range(round(seconds)):
            self.now += 1
            self.stages.tick()


@pytest.fixture
def screen() -> Screen:
    return Screen()


def test_slow_steps_have_a_line_every_ten_seconds_with_rate_and_time_left(screen: Screen) -> None:
    advance = screen.track("compress", 30)
    for _ in range(3):
        screen.spend(SLOW)
        advance(1)
    screen.spend(11)
    times = [0.0, *(time for time, _ in screen.lines)]
    assert max(late - early for early, late in itertools.pairwise(times)) <= 15
    assert screen.lines[0] == (10, "compress: 0 of 30, 0:00:10")
    assert screen.lines[-1] == (140, "compress: 3 of 30, 0:02:20, 45.0 s each, 0:20:10 left")


def test_the_time_left_never_rises_within_a_step_and_stays_above_the_steps_behind_it() -> None:
    stage = Stage("compress", 3, 0.0)
    stage.advance(1, SLOW)
    left = [stage.left(SLOW + second) for second in (0, 10, 44, 46, 4000)]
    assert left == ["0:01:30 left", "0:01:20 left", "0:00:46 left", "0:00:45 left", "0:00:45 left"]


def test_quick_steps_have_a_rate_per_second(screen: Screen) -> None:
    advance = screen.track("before: wikitext2:test", 1000)
    for _ in range(20):
        screen.spend(1)
        advance(4)
    assert screen.lines[-1][1] == "before: wikitext2:test: 76 of 1000, 0:00:20, 4.0/s, 0:03:51 left"


def test_a_resumed_run_starts_where_it_is_and_counts_its_own_steps_alone(screen: Screen) -> None:
    advance = screen.track("compress", 30)
    advance(20)
    for _ in range(2):
        screen.spend(20)
        advance(1)
    screen.spend(10)
    assert screen.lines[0][1] == "compress: 20 of 30, 0:00:10"
    assert screen.lines[-1][1] == "compress: 22 of 30, 0:00:50, 20.0 s each, 0:02:30 left"


def test_a_stage_that_waits_for_another_is_timed_from_its_end(screen: Screen) -> None:
    measure = screen.track("measure sizes", 10)
    gradients = screen.track("gradients", 2)
    for _ in range(2):
        screen.spend(20)
        gradients(1)
    assert screen.lines[-1] == (40, "gradients: 2 of 2, 0:00:40, 20.0 s each")
    screen.spend(5)
    measure(1)
    screen.spend(5)
    assert screen.lines[-1] == (50, "measure sizes: 1 of 10, 0:00:10, 5.0 s each, 0:00:40 left")


def test_between_stages_a_line_says_that_the_run_goes_on(screen: Screen) -> None:
    screen.track("write", 1)(1)
    screen.spend(25)
    assert [line for _, line in screen.lines] == ["at work for 0:00:10", "at work for 0:00:20"]


def test_a_quick_run_says_nothing_where_it_is_piped(screen: Screen) -> None:
    for label in ("compress", "write"):
        advance = screen.track(label, 3)
        for _ in range(3):
            screen.spend(1)
            advance(1)
    assert screen.lines == []


def test_lines_come_while_a_step_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a thread, as a step may take minutes."""
    monkeypatch.setattr(module, "_EVERY", 0.0)
    with progress() as track:
        track("compress", 3)
        told = ""
        while "compress" not in told:
            told += capsys.readouterr().err
    assert re.fullmatch(r"(compress: 0 of 3, 0:00:\d\d\n)+", told)


def test_a_terminal_has_a_bar_for_each_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"FORCE_COLOR": "1", "TERM": "xterm", "COLUMNS": "100"}.items():
        monkeypatch.setenv(name, value)
    now = [0.0]
    with progress(clock=lambda: now[0]) as track:
        for label in ("gradients", "compress"):
            advance = track(label, 4)
            now[0] += SLOW
            advance(1)
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().err)
    rows = {row.split()[0]: row for row in re.split(r"[\r\n]+", shown) if row.strip()}
    assert re.search(r"1/4 0:01:30 45\.0 s each 0:01:30 left", rows["gradients"]), rows
    assert re.search(r"1/4 0:00:45 45\.0 s each 0:02:15 left", rows["compress"]), rows
