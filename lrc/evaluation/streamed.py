"""Evaluate a model one layer at a time: each layer is loaded once and runs on all windows of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrc.checkpoint.headers import check_shapes
from lrc.checkpoint.reader import CheckpointReader
from lrc.estimate.room import place_for
from lrc.hub.quantizer import METHOD, LrcConfig
from lrc.run.offload import ON_DEVICE, States
from lrc.text.blocks import batched
from lrc.walk.stream import ModelStream
from lrc.walk.walk import Walk


class StreamedModel:
    """Hold a checkpoint, compressed or not, whose logits equal those of the whole model in ``dtype``.

    The device holds one layer and a batch of windows. Hidden states of all windows are offloaded to the first of
    device, host and disk (``scratch``) with room. Raises UserError for a tensor that is missing or of the wrong shape.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        dtype: torch.dtype | None,
        scratch: Path,
        *,
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self._reader = CheckpointReader(
            folder, quantized=METHOD, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code
        )
        self.device, self.dtype = device, dtype or self._reader.dtype
        stored = self._reader.raw_config.get("quantization_config")
        self._table, self._scratch = LrcConfig(**stored).modules if stored else {}, scratch
        check_shapes(self._stream(ON_DEVICE).shapes, self._reader.tensors)

    @property
    def config(self) -> Any:
        return self._reader.config

    @torch.no_grad()
    def logits(
        self, cut: Tensor, batch_size: int, advance: Callable[[int], object] = lambda done: None
    ) -> Iterator[Tensor]:
        """Yield the logits (batch, seq_len, vocab) of windows (windows, seq_len), ``batch_size`` windows at a time.

        All windows go through the layers first; ``advance`` is called with their number after each layer.
        """
        held = cut.numel() * self.config.hidden_size * self.dtype.itemsize
        stream = self._stream(States(place_for(held, self.device), self._scratch))
        batches = stream.embed(batched(cut, batch_size))
        for visit in Walk(stream, batches):
            visit.observe()
            advance(len(cut))
        tail = stream.tail()
        for (hidden,) in stream.prefetched(batch.hidden for batch in batches):
            yield tail(hidden)

    def _stream(self, states: States) -> ModelStream:
        return ModelStream(
            self._reader, self.device, self.dtype, states, residual=self.dtype, table=self._table
        )
