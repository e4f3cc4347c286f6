"""Run prefill or decode steps of a model repeatedly, in one of the modes."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, StaticCache

from lrc.benchmark.cases import Case
from lrc.errors import UserError
from lrc.modules.cache import cache_argument

_WARM = 3  # steps before a capture: they choose kernels and allocate workspaces


class Steps(ABC):
    """Hold the steps of one timed sample: ``run`` processes ``tokens`` tokens and leaves their KV ``cache``."""

    cache: Any
    tokens: int

    def __init__(self, model: PreTrainedModel, case: Case) -> None:
        self.model, self.device, self.cache_name = model, model.device, cache_argument(model.forward)
        self.forward: Any = torch.compile(model, dynamic=False) if case.mode == "compile" else model
        generator = torch.Generator().manual_seed(0)
        shape = (case.batch, case.length if case.phase == "prefill" else 1)
        vocab = model.config.get_text_config().vocab_size
        self.ids = torch.randint(vocab, shape, generator=generator).to(self.device)

    @abstractmethod
    def run(self) -> None:
        """Queue the steps on the device."""

    @abstractmethod
    def prepare(self) -> None:
        """Do the untimed work before a sample."""

    def seconds(self) -> float:
        """Time one sample; synchronize the device before and after."""
        self.prepare()
        _wait(self.device)
        start = time.perf_counter()
        self.run()
        _wait(self.device)
        return time.perf_counter() - start


class Prefill(Steps):
    """Prefill a new cache with all tokens of a batch and find the most likely next tokens."""

    def __init__(self, model: PreTrainedModel, case: Case) -> None:
        super().__init__(model, case)
        self.tokens = case.batch * case.length
        self.run()

    def prepare(self) -> None:
        self.cache = None  # frees its memory for the next one

    def run(self) -> None:
        found = self.forward(input_ids=self.ids, use_cache=True, logits_to_keep=1)
        found.logits[:, -1].argmax(-1)
        self.cache = found[self.cache_name]


class Decode(Steps):
    """Decode ``new_tokens`` tokens one by one with a static cache; the last attends to ``case.length`` tokens.

    The context is noise, which takes as long as text. Raises UserError if the model cannot be captured in a CUDA graph.
    """

    def __init__(self, model: PreTrainedModel, case: Case, new_tokens: int) -> None:
        super().__init__(model, case)
        self.new_tokens, self.tokens = new_tokens, case.batch * new_tokens
        self.start = case.length - new_tokens
        self.cache = StaticCache(config=model.config, max_cache_len=case.length)
        self._step(model)  # the cache takes each layer's width from its first keys and values
        if not all(hasattr(layer, "cumulative_length") for layer in self.cache.layers):
            raise UserError(
                "lrc bench cannot find the token count of this transformers version's static cache; "
                "pip install --upgrade transformers"
            )
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.prepare()
        self._once: Callable[[], object] = lambda: self._step(self.forward)
        if case.mode != "eager" and self.device.type == "cuda":
            self._once = self._captured()

    def prepare(self) -> None:
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.start)
            if hasattr(layer, "cumulative_length_int"):
                layer.cumulative_length_int = self.start

    def run(self) -> None:
        for _ in range(self.new_tokens):
            self._once()

    def _step(self, forward: Any) -> None:
        found = forward(input_ids=self.ids, use_cache=True, **{self.cache_name: self.cache})
        self.ids.copy_(found.logits[:, -1:].argmax(-1))

    def _captured(self) -> Callable[[], object]:
        side, graph = torch.cuda.Stream(self.device), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM):
                self.prepare()
                self._step(self.forward)
        torch.cuda.current_stream(self.device).wait_stream(side)
        self.prepare()
        try:
            with torch.cuda.graph(graph):
                self._step(self.forward)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"a step of {type(self.model).__name__} cannot be captured in a CUDA graph ({reason}); the nearest is "
                "--modes eager"
            ) from error
        return graph.replay


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
