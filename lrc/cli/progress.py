"""Show the stages of a run on stderr: a bar for each on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from threading import Event, RLock, Thread
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from lrc.cli.interrupt import unwind
from lrc.cli.screen import note

if TYPE_CHECKING:
    from lrc.run.settings import Progress

Clock = Callable[[], float]

_EVERY = 10.0  # seconds between two lines
_AT_ONCE = 0.01  # seconds from the start of a stage; steps in them were done by an earlier process


class Stage:
    """Hold the steps of one stage, and what they say of its rate and of the time left."""

    def __init__(self, label: str, total: int, now: float) -> None:
        self.label, self.total, self.done = label, total, 0
        self.shown = False  # in a line
        self._start = self._last = now
        self._before = 0  # steps of an earlier process

    def advance(self, done: int, now: float) -> None:
        self.done, self._last = self.done + done, now
        if now - self._start < _AT_ONCE:
            self._before = self.done

    def wait(self, now: float) -> None:
        """Start only now if no step is done yet: another stage had to end first."""
        if self.done == self._before and not self.finished:
            self._start = self._last = now

    @property
    def finished(self) -> bool:
        return self.done >= self.total

    def elapsed(self, now: float) -> str:
        return _time((self._last if self.finished else now) - self._start)

    def rate(self, now: float) -> str:
        """Return steps per second or seconds per step; nothing before the first step."""
        if not (each := self._seconds_each):
            return ""
        return f"{1 / each:.1f}/s" if each <= 1 else f"{each:.1f} s each"

    def left(self, now: float) -> str:
        """Return the time left at the rate so far; nothing before the first step and after the last."""
        if not (each := self._seconds_each) or self.finished:
            return ""
        return f"{_time(each * (self.total - self.done) - min(now - self._last, each))} left"

    def line(self, now: float) -> str:
        told = [f"{self.done} of {self.total}", self.elapsed(now), self.rate(now), self.left(now)]
        return f"{self.label}: {', '.join(filter(None, told))}"

    @property
    def _seconds_each(self) -> float:
        own = self.done - self._before
        return (self._last - self._start) / own if own else 0.0


class Stages:
    """Hold the stages of a run, and print a line about the present one at least every ten seconds."""

    def __init__(self, write: Callable[[str], object], clock: Clock) -> None:
        self._write, self._clock, self._lock = write, clock, RLock()
        self._start = self._told = clock()
        self._stages: list[Stage] = []

    def begin(self, label: str, total: int) -> Stage:
        with self._lock:
            self._stages.append(Stage(label, total, self._clock()))
            return self._stages[-1]

    def advance(self, stage: Stage, done: int) -> None:
        with self._lock:
            now = self._clock()
            stage.advance(done, now)
            if stage.finished:
                for other in self._stages:
                    other.wait(now)
                if stage.shown:
                    self._tell(stage.line(now), now)

    def tick(self) -> None:
        """Print a line if the last one is ten seconds ago."""
        with self._lock:
            now = self._clock()
            if now - self._told < _EVERY:
                return
            stage = next((each for each in reversed(self._stages) if not each.finished), None)
            if stage:
                stage.shown = True
            self._tell(stage.line(now) if stage else f"at work for {_time(now - self._start)}", now)

    def _tell(self, line: str, now: float) -> None:
        self._told = now
        self._write(line)


@contextmanager
def progress(shown: bool = True, clock: Clock = time.monotonic) -> Iterator[Progress]:
    """Show the stages of a run on stderr, if ``shown``; from now on Ctrl-C is a KeyboardInterrupt."""
    unwind()
    if not shown:
        yield lambda label, total: lambda done: None
    elif Console(stderr=True).is_terminal:
        with _bars(clock) as track:
            yield track
    else:
        stages, ended = Stages(note, clock), Event()

        def tick() -> None:
            while not ended.wait(1):
                stages.tick()

        ticking = Thread(target=tick, daemon=True)
        ticking.start()
        try:
            yield lambda label, total: partial(stages.advance, stages.begin(label, total))
        finally:
            ended.set()
            ticking.join()


@contextmanager
def _bars(clock: Clock) -> Iterator[Progress]:
    """Show a bar for each stage, with the time elapsed, the rate and the time left."""
    from rich import progress as bar

    class Figure(bar.ProgressColumn):
        def __init__(self, of: Callable[[Stage, float], str]) -> None:
            super().__init__()
            self._of = of

        def render(self, task: bar.Task) -> Text:
            return Text(self._of(task.fields["stage"], clock()))

    label = bar.TextColumn("{task.description}", markup=False)
    figures = map(Figure, (Stage.elapsed, Stage.rate, Stage.left))
    stages = Stages(lambda line: None, clock)
    with bar.Progress(
        label, bar.BarColumn(), bar.MofNCompleteColumn(), *figures, console=Console(stderr=True)
    ) as bars:

        def track(label: str, total: int) -> Callable[[int], None]:
            stage = stages.begin(label, total)
            task = bars.add_task(label, total=total, stage=stage)

            def advance(done: int) -> None:
                stages.advance(stage, done)
                bars.advance(task, done)

            return advance

        yield track


def _time(seconds: float) -> str:
    return str(timedelta(seconds=round(max(seconds, 0.0))))
