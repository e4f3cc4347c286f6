"""Name the cases of a benchmark: prefill or decode, batch size, sequence length, mode of execution."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from lrc.errors import UserError, nearest

Phase = Literal["prefill", "decode"]
MODES = {
    "eager": "as transformers runs it",
    "compile": "with torch.compile; on a GPU decode is also captured in a CUDA graph",
    "graphs": "decode captured in a CUDA graph; GPU only",
}
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
    if listed is None or list(listed) == ["none"]:
        return None if listed is None else []
    found = []
    for word in listed:
        if not (match := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", word)):
            raise UserError(f"{option}: {word!r} is not BATCHxTOKENS, such as 8x2048, or none")
        found.append((int(match[1]), int(match[2])))
    return found


def make_cases(
    prefill: Iterable[tuple[int, int]] | None,
    decode: Iterable[tuple[int, int]] | None,
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
            raise UserError(f"--mode {mode!r} is not known; {nearest(mode, MODES)}")
        if mode == "graphs" and device.type != "cuda":
            raise UserError(f"--mode graphs is for GPUs, not for {device}; the nearest is --mode compile")
    if prefill is None:
        prefill = [(batch, min(_PREFILL_TOKENS, positions)) for batch in _PREFILL_BATCHES]
    if decode is None:
        decode = [(batch, min(_DECODE_TOKENS, positions)) for batch in _DECODE_BATCHES]
    for option, shapes in (("--prefill", prefill := list(prefill)), ("--decode", decode := list(decode))):
        for batch, length in shapes:
            if length > positions:
                raise UserError(
                    f"{option} {batch}x{length} is longer than the {positions} positions of the models; "
                    f"the nearest is {batch}x{positions}"
                )
    for batch, length in decode:
        if length <= new_tokens:
            raise UserError(
                f"--decode {batch}x{length} is too short for {new_tokens} new tokens; "
                f"the nearest is --new-tokens {length - 1}"
                if length > 1
                else f"--decode {batch}x1 has no context to continue; the nearest is {batch}x2"
            )
    if not prefill and not decode:
        raise UserError("--prefill none and --decode none leave nothing to measure; drop one of them")
    whole = dict.fromkeys("eager" if mode == "graphs" else mode for mode in modes)
    return [Case("prefill", *shape, mode) for mode in whole for shape in prefill] + [
        Case("decode", *shape, mode) for mode in modes for shape in decode
    ]
