"""Run a model one decoder layer at a time, with only that layer's weights on the device."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lrc.checkpoint.reader import CheckpointReader
from lrc.errors import UserError
from lrc.families import logit_rule
from lrc.modules.table import Table, apply_table
from lrc.moments.observe import observe
from lrc.moments.statistic import Observer, Statistic
from lrc.run.offload import ON_DEVICE, States, send
from lrc.run.processes import ALONE, Processes

# Threads that check and pin a layer's tensors; launchers often limit PyTorch to one thread a process.
_HANDS = 8


@dataclass(frozen=True)
class LayerCall:
    """Arguments of a decoder layer other than the hidden states: mask, positions, rotary tables."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Tail(Protocol):
    """The final norm and the head of a model."""

    def __call__(self, hidden: Tensor, factors: Tensor | None = None) -> Tensor:
        """Return logits (..., vocab) of hidden states (..., hidden), normed and multiplied by ``factors`` (hidden,)."""
        raise NotImplementedError


@dataclass
class Batch:
    """Hidden states (blocks, tokens, hidden) between two layers, perhaps offloaded, and each layer's arguments.

    ``held``: kept out of statistics.
    """

    hidden: Tensor
    calls: list[LayerCall]
    held: bool = False


class ModelStream:
    """A checkpoint's model on the meta device, with the modules of its ``table``; its layers are loaded one by one.

    Layers run in ``dtype``. The residual stream between layers has dtype ``residual`` and is stored by ``states``. Each
    of ``processes`` runs its own blocks; sums are over the blocks of all.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        device: torch.device,
        dtype: torch.dtype,
        states: States = ON_DEVICE,
        *,
        processes: Processes = ALONE,
        residual: torch.dtype = torch.float32,
        table: Table | None = None,
    ) -> None:
        self.reader, self.device, self.dtype = reader, device, dtype
        self.states, self.processes = states, processes
        self._residual, self._table = residual, table or {}
        self._reads = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._hands = ThreadPoolExecutor(_HANDS if device.type == "cuda" else 1, thread_name_prefix="hand")
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._last = -1
        layers = self._empty_model().get_submodule(reader.family.layers)
        self.skeletons: list[nn.Module] = list(layers.children())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors that the checkpoint must hold, by full name, without a tied head."""
        head = f"{self.reader.family.head}."
        tied = self.reader.config.tie_word_embeddings
        state = self._empty_model().state_dict()
        return {name: tuple(t.shape) for name, t in state.items() if not (tied and name.startswith(head))}

    @torch.no_grad()
    def embed(self, ids: Iterable[Tensor], embedding: nn.Module | None = None) -> list[Batch]:
        """Return the first layer's inputs for batches of token ids (blocks, tokens).

        ``embedding`` replaces the checkpoint's. Raises UserError if a weight before the layers is missing, or one
        outside the layers is NaN or inf.
        """
        model, family = self._empty_model(), self.reader.family
        # The model's own forward, with recorders as layers, makes the masks, positions and rotary tables.
        recorders = [_Recorder(layer) for layer in self.skeletons]
        parent, _, name = family.layers.rpartition(".")
        setattr(model.get_submodule(parent), name, nn.ModuleList(recorders))
        base = model.get_submodule(family.prefix)
        rest = self.reader.rest()
        _check_finite(rest, "")
        if embedding is not None:
            model.set_submodule(family.embedding, embedding)
            rest = {key: tensor for key, tensor in rest.items() if key != f"{family.embedding}.weight"}
        for key, tensor in rest.items():
            if key.startswith(f"{family.prefix}."):
                set_module_tensor_to_device(model, key, self.device, value=tensor, dtype=self.dtype)
        missing = [f"{family.prefix}.{key}" for key, tensor in base.named_parameters() if tensor.is_meta]
        if missing:
            raise UserError(f"the checkpoint has no tensor {', '.join(missing)}")
        base.to(self.device)
        batches: list[Batch] = []
        for each in ids:
            base(input_ids=each.to(self.device), use_cache=False)
            hidden, calls = recorders[0].hidden.to(self._residual), [recorder.call for recorder in recorders]
            # Batches share their masks and rotary tables on the device if these are equal.
            shared = batches[0].calls if batches and _same(calls, batches[0].calls) else calls
            batches.append(Batch(self.states.keep(hidden), shared))
        return batches

    def _empty_model(self) -> nn.Module:
        model = self.reader.empty_model(self.dtype)
        with init_empty_weights(include_buffers=False):
            apply_table(model, self._table, self.reader.family)
        return model.eval()

    def layer(self, index: int) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return a decoder layer on the device, and its tensors by path there, in the checkpoint's precision.

        The next layer in the direction of the last two calls is read ahead. Raises UserError if a weight is NaN or inf.
        """
        (following, tensors), self._ahead = self._ahead or (None, None), None
        found = tensors.result() if tensors and following == index else self.read(index)
        step, self._last = (-1 if index == self._last - 1 else 1), index
        if 0 <= index + step < len(self.skeletons):
            self._ahead = (index + step, self._reads.submit(self.read, index + step))
        state = {name: self.fetch(tensor) for name, tensor in found.items()}
        return self.materialize(index, state), state

    def read(self, index: int) -> dict[str, Tensor]:
        """Return the tensors of a layer on the host, pinned if the device is a GPU.

        Raises UserError if a weight is NaN or inf.
        """
        tensors = self.reader.layer(index)
        found = self._hands.map(partial(self._read_one, index), tensors.keys(), tensors.values())
        return dict(zip(tensors, found, strict=True))

    def _read_one(self, index: int, name: str, tensor: Tensor) -> Tensor:
        _check_finite({name: tensor}, f"layer {index}: ")
        if self.device.type != "cuda":
            return tensor
        with torch.cuda.device(self.device):  # new threads default to the first GPU
            return tensor.pin_memory()

    def tail(self, head: nn.Module | None = None) -> Tail:
        """Return the function from the last hidden states (..., hidden) to logits (..., vocab): final norm and head.

        ``head`` replaces the checkpoint's. Raises UserError if a weight of either is missing.
        """
        family = self.reader.family
        stored = family.embedding if self.reader.config.tie_word_embeddings else family.head
        rule = logit_rule(family, self.reader.config)
        norm, last = self.final_norm(), head or self._outer(family.head, stored)

        def logits(hidden: Tensor, factors: Tensor | None = None) -> Tensor:
            with self.precision():
                normed = norm(self.fetch(hidden))
                found = last(normed if factors is None else (normed * factors).to(normed.dtype))
            return rule(found)

        return logits

    def final_norm(self) -> nn.Module:
        """Return the norm between the last layer and the head. Raises UserError if its weight is missing."""
        path = self.reader.family.final_norm
        return self._outer(path, path)

    def _outer(self, path: str, stored: str) -> nn.Module:
        """Return the module at ``path``, outside the layers, filled with the tensors at ``stored``."""
        state = below(self.reader.rest(), stored)
        if "weight" not in state:
            raise UserError(f"the checkpoint has no tensor {stored}.weight")
        return self.filled(self._empty_model().get_submodule(path), state)

    def materialize(self, index: int, state: Mapping[str, Tensor]) -> nn.Module:
        """Return layer ``index`` filled with ``state``."""
        return self.filled(copy.deepcopy(self.skeletons[index]), state)

    def filled(self, module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """Fill a meta module with its tensors, on the device and in the precision of the layers."""
        module.load_state_dict({name: self._placed(tensor) for name, tensor in state.items()}, assign=True)
        return module.requires_grad_(False)

    def run(
        self,
        layer: nn.Module,
        index: int,
        batch: Batch,
        hidden: Tensor,
        *,
        attention_output: Tensor | None = None,
        grad: bool = False,
    ) -> Tensor:
        """Return a decoder layer's output for hidden states (blocks, tokens, hidden) on any device.

        ``attention_output`` replaces its attention, which then does not run. ``grad`` records gradients for hidden
        states that require them.
        """
        call, attention = batch.calls[index], layer.get_submodule(self.reader.family.attention)
        with torch.set_grad_enabled(grad), self.precision(), _returning(attention, attention_output):
            out = layer(self.fetch(hidden), *call.args, **call.kwargs)
        return (out[0] if isinstance(out, tuple) else out).to(self._residual)

    @torch.no_grad()
    def advance(
        self,
        layer: nn.Module,
        index: int,
        batches: Sequence[Batch],
        *observers: Observer,
        stay: bool = False,
    ) -> None:
        """Run a decoder layer on batches, feed its observers, and store its outputs in the batches unless ``stay``.

        Raises UserError as ``checked`` does.
        """
        paths = {path: path for observer in observers for path in observer.watched}
        states = self.prefetched(batch.hidden for batch in batches)
        with self.checked(layer, index):
            for batch, (hidden,) in zip(batches, states, strict=True):
                with observe(layer, paths) as calls:
                    out = self.run(layer, index, batch, hidden)
                for observer in observers:
                    if not (batch.held and isinstance(observer, Statistic)):
                        observer.add(calls)
                if not stay:
                    batch.hidden = self.states.keep(out)
                del out  # so that the device does not hold two outputs
        for observer in observers:
            observer.reduce(self.processes)

    @contextmanager
    def checked(self, layer: nn.Module, index: int) -> Iterator[None]:
        """Check the outputs of a layer and of its halves while the context is open; synchronize the device once.

        Raises UserError with layer and module if an output on any process, or its square, is NaN or inf.
        """
        family, peaks = self.reader.family, dict[str, list[Tensor]]()
        watched = {family.projections[half.output].module: half.module for half in family.halves}

        def noting(found: list[Tensor]) -> Callable[..., None]:
            def note(_: nn.Module, __: object, out: Any) -> None:
                found.append(torch.stack(torch.aminmax(out[0] if isinstance(out, tuple) else out)).float())

            return note

        with ExitStack() as hooks:
            for name, path in (watched | {"the layer": ""}).items():
                hook = noting(peaks.setdefault(name, []))
                hooks.callback(layer.get_submodule(path).register_forward_hook(hook).remove)
            yield
        own = [torch.stack(found).abs().amax() if found else torch.zeros(()) for found in peaks.values()]
        most = (torch.finfo(torch.float32).max / self.reader.config.hidden_size) ** 0.5
        for found in self.processes.gather(torch.stack(own).tolist() if peaks["the layer"] else []):
            for name, peak in zip(peaks, found, strict=False):
                if not math.isfinite(peak):
                    advice = "; try --dtype float32" if self.dtype == torch.float16 else ""
                    raise UserError(f"layer {index}: activations are NaN or inf after {name}{advice}")
                if peak > most:
                    what = f"up to {peak:.2g}, too large for squares in float32"
                    raise UserError(f"layer {index}: activations after {name} are {what}")

    def fetch(self, x: Tensor) -> Tensor:
        """Return a tensor moved to the device."""
        return send([x], self.device)()[0]

    def prefetched(self, *lists: Iterable[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """Yield the states of each batch on the device, one of each list; the next batch is copied meanwhile."""
        ahead: Callable[[], tuple[Tensor, ...]] | None = None
        for states in zip(*lists, strict=True):
            now, ahead = ahead, send(states, self.device)
            if now:
                yield now()
        if ahead:
            yield ahead()

    def precision(self) -> AbstractContextManager[Any]:
        """Return autocast to the layers' precision, so that bfloat16 layers accept a float32 stream."""
        if self.dtype == self._residual:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _placed(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(self.device)
        # Norms run in the precision of the stream; autocast casts biases.
        return tensor.to(self.device, self._residual if tensor.ndim < 2 else self.dtype)


def below(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return the tensors of the module at ``path``, by their names inside it."""
    start = f"{path}."
    return {name.removeprefix(start): t for name, t in tensors.items() if name.startswith(start)}


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        # aminmax propagates NaN and needs no second tensor of this size.
        if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise UserError(f"{where}{name} has NaN or inf")


def _same(calls: Sequence[LayerCall], others: Sequence[LayerCall]) -> bool:
    """Return whether two batches have equal arguments for every layer."""
    (one, shape), (other, its) = (
        tree_flatten([(c.args, dict(c.kwargs)) for c in each]) for each in (calls, others)
    )
    # Layers mostly share objects; compare each pair once.
    pairs = {(id(a), id(b)): (a, b) for a, b in zip(one, other, strict=False)}.values()
    return shape == its and all(_equal(a, b) for a, b in pairs)


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return one is other or (type(one) is type(other) and bool(one == other))


@contextmanager
def _returning(attention: Any, output: Tensor | None) -> Iterator[None]:
    """Let an attention module return ``output`` without running, unless it is None."""
    if output is None:
        yield
        return
    attention.forward = lambda *_, **__: (output, None)
    try:
        yield
    finally:
        del attention.forward


class _Recorder(nn.Module):
    """A stand-in for a layer that records its arguments and returns the hidden states."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._attributes = {k: v for k, v in vars(layer).items() if not k.startswith("_")}
        self.hidden, self.call = torch.empty(0), LayerCall((), {})

    def __getattr__(self, name: str) -> Any:
        # Models read attributes of a layer, such as its attention type, to choose its mask.
        attributes = self.__dict__.get("_attributes", {})
        return attributes[name] if name in attributes else super().__getattr__(name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.call = hidden_states, LayerCall(args, kwargs)
        return hidden_states
