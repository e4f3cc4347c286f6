"""What the tests of the command line share: a folder to work in, a way to run a verb, a small text and plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from lrc.cli import app

Run = Callable[..., Result]

TEXT = "It was a bright cold day in April, and nobody had yet counted the words of this sentence. " * 12
PLAN = "format: 1\nkeep: 0.5\nmethod: a3\ncalibration: {samples: 4}\n"


@pytest.fixture(scope="module", autouse=True)
def loud() -> Iterator[None]:
    """Gives the libraries their voice back, which the verbs take from them."""
    from datasets.utils import logging as datasets_logging
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    yield
    for each in (logging, datasets_logging, hub_logging):
        each.set_verbosity_warning()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of a test, with ``text.txt`` and ``plan.yaml`` beside it and no data folder set."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "plan.yaml").write_text(PLAN, encoding="utf-8")
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LRC_DATA_DIR", raising=False)
    return folder


@pytest.fixture
def run(work: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a verb in this process, in the work folder; on a slow machine too without lines of progress."""
    monkeypatch.setattr("lrc.cli.progress._EVERY", float("inf"))

    def invoke(*argv: object) -> Result:
        return CliRunner().invoke(app, [str(word) for word in argv])

    return invoke


@pytest.fixture
def succeeds(run: Run) -> Run:
    """Runs a verb that must end well."""

    def invoke(*argv: object) -> Result:
        result = run(*argv)
        assert result.exit_code == 0, result.output
        return result

    return invoke


@pytest.fixture
def fails(run: Run, work: Path) -> Callable[..., str]:
    """Runs a verb that must be refused as the user's mistake and leave nothing behind; gives its one message."""

    def invoke(*argv: object) -> str:
        before = sorted(work.rglob("*"))
        result = run(*argv)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        begun, error, message = result.stderr.rpartition("error: ")
        assert error
        assert all(line.startswith("warning: ") for line in begun.splitlines())
        assert "Traceback" not in message
        assert sorted(work.rglob("*")) == before
        return message

    return invoke
