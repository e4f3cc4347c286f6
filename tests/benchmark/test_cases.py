"""What is measured, from what a user asks for."""

from __future__ import annotations

import pytest
import torch

from lrc.benchmark.cases import Case, make_cases, parse_shapes
from lrc.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_shapes() -> None:
    assert parse_shapes("--decode", ["8x2048", "1x1"]) == [(8, 2048), (1, 1)]
    assert parse_shapes("--decode", ["none"]) == []
    assert parse_shapes("--decode", None) is None
    for word in ("8", "0x4", "8x", "8*2", "-1x2", "8x2048x1", ""):
        with pytest.raises(UserError, match=r"--decode: .* is not BATCHxTOKENS, such as 8x2048"):
            parse_shapes("--decode", [word])


def test_defaults_are_cut_to_the_positions() -> None:
    assert [str(c) for c in make_cases(None, None, None, 300, 16, CPU)] == [
        "prefill 1x300 eager",
        "prefill 8x300 eager",
        "decode 1x300 eager",
        "decode 32x300 eager",
    ]


def test_graphs_are_for_decode() -> None:
    cases = make_cases([(2, 9)], [(1, 8)], ["eager", "graphs", "compile"], 16, 4, GPU)
    assert cases == [
        Case("prefill", 2, 9, "eager"),
        Case("prefill", 2, 9, "compile"),
        Case("decode", 1, 8, "eager"),
        Case("decode", 1, 8, "graphs"),
        Case("decode", 1, 8, "compile"),
    ]
    assert [c.mode for c in make_cases([(2, 9)], [], ["graphs"], 16, 4, GPU)] == ["eager"]


@pytest.mark.parametrize(
    ("prefill", "decode", "modes", "message"),
    [
        (
            [(1, 17)],
            [],
            None,
            "--prefill 1x17 is longer than the 16 positions of the models; the nearest is 1x16",
        ),
        ([], [(3, 17)], None, "--decode 3x17 is longer"),
        ([], [(3, 4)], None, "4 new tokens; the nearest is --new-tokens 3"),
        ([], [(3, 1)], None, "the nearest is 3x2"),
        ([], [], None, "nothing to measure"),
        (None, None, ["fast"], "--modes 'fast' is not known; known: compile, eager, graphs"),
        (None, None, ["graphs"], "--modes graphs is for GPUs, not for cpu; the nearest is --modes compile"),
    ],
)
def test_mistakes(prefill, decode, modes, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        make_cases(prefill, decode, modes, 16, 4, CPU)
