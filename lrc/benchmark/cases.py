"""Name the cases of a benchmark: prefill or decode, batch size, sequence length, mode of execution."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lrc.errors import UserError, nearest

Phase = Literal["prefill", "decode"]
# As transformers runs it; with torch.compile and, for decode on a GPU, a CUDA graph; decode alone in a CUDA graph.
MODES = ("eager", "compile", "graphs")
_PREFILL_BATCHES, _PREFILL_TOKENS = (1, 8), 2048
_DECODE_BATCHES, _DECODE_TOKENS = (1, 32), 512


@dataclass(frozen=True)
class Case:
    """Hold one case: prefill ``batch`` x ``length`` tokens, or decode up to a context of ``length``."""

    phase: Phase
    batch: int
    length: int
    mode: str

    @property
    def shape(self) -> str:
        """Return the shape as options write it, such as 8x2048."""
        return f"{self.batch}x{self.length}"

    def __str__(self) -> str:
        return f"{self.phase} {self.shape} {self.mode}"


def parse_shapes(option: str, listed: Sequence[str] | None) -> list[tuple[int, int]] | None:
    """Parse words such as ``8x2048`` into pairs of batch and length.

    ``none`` gives no pairs, None (the default shapes) None. Raises UserError for any other word.
    """
    if listed is None:
        return None
    found = []
    for word in [] if [*listed] == ["none"] else listed:
        if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", word)):
            raise UserError(f"{option}: {word!r} is not BATCHxTOKENS, such as 8x2048, or none")
        found.append((int(match[1]), int(match[2])))
    return found


def make_cases(
    prefill: Sequence[tuple[int, int]] | None,
    decode: Sequence[tuple[int, int]] | None,
    modes: Sequence[str] | None,
    positions: int,
    new_tokens: int,
    device: torch.device,
) -> list[Case]:
    """List all cases in the order of measurement; None means the defaults, cut to the models' ``positions``.

    Mode ``graphs`` measures prefill as ``eager``: its few large kernels gain nothing from CUDA graphs. Raises UserError
    for an unknown mode, one that the device lacks, and a length beyond ``positions`` or below ``new_tokens`` + 1.
    """
    modes = modes or (["eager"] if device.type == "cpu" else ["eager", "graphs"])
    for mode in modes:
        if mode not in MODES:
            raise UserError(f"--modes {mode!r} is not known; {nearest(mode, MODES)}")
        if mode == "graphs" and device.type != "cuda":
            raise UserError(f"--modes graphs is for GPUs, not for {device}; the nearest is --modes compile")
    if prefill is None:
        prefill = [(batch, min(_PREFILL_TOKENS, positions)) for batch in _PREFILL_BATCHES]
    if decode is None:
        decode = [(batch, min(_DECODE_TOKENS, positions)) for batch in _DECODE_BATCHES]
    whole = dict.fromkeys("eager" if mode == "graphs" else mode for mode in modes)
    cases = [Case("prefill", *shape, mode) for mode in whole for shape in prefill]
    cases += [Case("decode", *shape, mode) for mode in modes for shape in decode]
    if not cases:
        raise UserError("--prefill none and --decode none leave nothing to measure; drop one of them")
    for case in cases:
        option = f"--{case.phase} {case.shape}"
        if case.length > positions:
            raise UserError(
                f"{option} is longer than the {positions} positions of the models; "
                f"the nearest is {case.batch}x{positions}"
            )
        if case.phase == "decode" and case.length <= new_tokens:
            raise UserError(
                f"{option} is too short for {new_tokens} new tokens; the nearest is --new-tokens {case.length - 1}"
                if case.length > 1
                else f"{option} has no context to continue; the nearest is {case.batch}x2"
            )
    return cases
