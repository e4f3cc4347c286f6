"""Estimate from headers the bytes that a benchmark needs, and check that they are free on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lrc.benchmark.cases import Case
from lrc.checkpoint.headers import read_headers
from lrc.errors import UserError
from lrc.estimate.room import free_bytes
from lrc.families import family_of, head_counts
from lrc.hub.loader import causal_config
from lrc.modules.attention import STEP

CONVERT = "lrc bench reads no pickled ones; convert them to safetensors with transformers' save_pretrained"
_INNER = ("intermediate_size", "ffn_dim", "n_inner")  # keys of the MLP's width
_SHARE = 0.9  # of the free memory: libraries' workspaces and fragmentation are not counted


@dataclass(frozen=True)
class Needs:
    """Hold a model's bytes: weights, keys and values a token, activations a token in one layer, logits a sequence."""

    name: str
    positions: int
    weights: int
    kv: int
    activations: int
    logits: int

    def beside(self, case: Case) -> int:
        """Return the bytes of a case without the weights: KV cache, a step's activations, logits."""
        tokens = case.length if case.phase == "prefill" else 1
        return case.batch * (case.length * self.kv + tokens * self.activations + self.logits)


def needs_of(name: str, folder: Path, dtype: torch.dtype, device: torch.device, *, trusted: bool) -> Needs:
    """Estimate what a checkpoint needs when it runs in ``dtype``; activations are the peak inside one layer.

    Raises UserError for a model that cannot run and for one without safetensors.
    """
    config = causal_config(folder, trust_remote_code=trusted)
    family_of(config.model_type)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{name} has no safetensors weights; {CONVERT}")
    stored = read_headers(files).values()
    weights = sum(
        t.bytes // t.dtype.itemsize * dtype.itemsize if t.dtype.is_floating_point else t.bytes for t in stored
    )
    (_, kv_heads, full), hidden = head_counts(config), config.hidden_size
    inner = next((n for key in _INNER if (n := getattr(config, key, None))), 4 * hidden)
    step = STEP.get(device.type, 1)
    table = (getattr(config, "quantization_config", None) or {}).get("modules", {})
    reduced = [(e["qk"], e["v"]) for e in table.values() if e["kind"] == "attention"]
    widths = [*reduced, *[(full, full)] * (config.num_hidden_layers - len(reduced))]
    kept = sum(width + -width % step for pair in widths for width in pair)
    return Needs(
        name=name,
        positions=config.max_position_embeddings,
        weights=weights,
        kv=kept * kv_heads * dtype.itemsize,
        activations=max(2 * hidden + 6 * inner, 14 * hidden) * dtype.itemsize + 8 * hidden,
        logits=config.vocab_size * (dtype.itemsize + 4),
    )


def fit_together(sides: Sequence[Needs], cases: Sequence[Case], device: torch.device) -> bool:
    """Tell whether all models fit on the device at once, in every case; False if only one at a time fits.

    Raises UserError if a model does not fit alone, with the bytes that it needs and the nearest case that fits.
    """
    free = free_bytes(device)
    room = int(_SHARE * free)
    for side in sides:
        for case in cases:
            if (needed := side.weights + side.beside(case)) > room:
                raise UserError(
                    f"the benchmark of {side.name} needs about {needed:,} bytes on {device} for {case.phase} "
                    f"{case.shape} ({side.weights:,} of weights); {free:,} are free, of which it takes {_SHARE:.0%}; "
                    f"{_nearest(side, case, room)}"
                )
    weights = sum(side.weights for side in sides)
    return weights + max(sum(side.beside(case) for side in sides) for case in cases) <= room


def _nearest(side: Needs, case: Case, room: int) -> str:
    """Name the largest batch that fits, or a remedy if none does."""
    if batch := max(room - side.weights, 0) // side.beside(replace(case, batch=1)):
        return f"the nearest is --{case.phase} {batch}x{case.length}"
    if side.weights < room:
        return f"not even --{case.phase} 1x{case.length} fits; try fewer tokens"
    return "the weights alone do not fit; the nearest is a larger device, or --dtype with fewer bytes"
