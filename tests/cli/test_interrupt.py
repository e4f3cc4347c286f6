"""Ctrl-C while a command still imports: one line, no traceback, whatever library it hits."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from lrc.cli.interrupt import end_at_once, unwind
from lrc.cli.progress import progress

STRUCK = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # the shell may run the tests with it ignored
import lrc
sys.addaudithook(lambda event, args: event == "import" and args[0] == {0!r} and os.kill(os.getpid(), signal.SIGINT))
sys.argv = ["lrc", "compress", "tiny-gpt2", "--keep", "0.8", "--out", "out"]
from lrc.cli import main
main()
"""


@pytest.mark.parametrize("module", ["lrc.cli.command", "typer", "torch._C", "lrc.verbs.compress"])
def test_an_interrupt_during_imports_is_one_line(module: str, tmp_path: object) -> None:
    found = subprocess.run(
        [sys.executable, "-c", STRUCK.format(module)], capture_output=True, text=True, cwd=str(tmp_path)
    )
    assert (found.returncode, found.stdout) == (130, "")
    assert found.stderr == "error: interrupted before the work began; run the same command again\n"


def test_once_work_begins_an_interrupt_unwinds() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    end_at_once()
    try:
        assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        with progress(False):
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        unwind()
        signal.signal(signal.SIGINT, before)


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As of a command that the shell runs in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        end_at_once()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
