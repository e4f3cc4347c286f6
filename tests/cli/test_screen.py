"""What the screen shows of the libraries below: nothing, so that a mistake is one message."""

from __future__ import annotations

import logging

import pytest

from lrc.cli.screen import quiet


@pytest.mark.parametrize(
    "library", ["huggingface_hub.utils._http", "datasets.load", "transformers.modeling_utils"]
)
def test_libraries_are_quiet(library: str, capfd: pytest.CaptureFixture[str]) -> None:
    quiet()
    logging.getLogger(library).warning("Retrying in 1s [Retry 1/5].")
    assert capfd.readouterr().err == ""
