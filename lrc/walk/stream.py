"""Walks a model one decoder layer at a time: at any moment only one layer's weights are on the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lrc.checkpoint.reader import CheckpointReader
from lrc.errors import UserError
from lrc.modules.table import Table, apply_table
from lrc.moments.observe import observe
from lrc.moments.statistic import Observer
from lrc.run.offload import ON_DEVICE, States, send
from lrc.run.processes import ALONE, Processes

# Threads that check and pin a layer's tensors: a launcher leaves each process one for sums on the host.
_HANDS = 8


@dataclass(frozen=True)
class LayerCall:
    """What the model hands a decoder layer besides the hidden states: mask, positions, rotary tables."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass
class Batch:
    """Hidden states (blocks, tokens, hidden) between two layers, where they wait, and every layer's call."""

    hidden: Tensor
    calls: list[LayerCall]


class ModelStream:
    """A checkpoint's model on the meta device, with the modules of its ``table``, and its layers made real one by one.

    Layers run in ``dtype``; the residual stream between them is ``residual`` whatever that is, and waits in ``states``.
    Each of ``processes`` walks with blocks of its own, and sums over blocks are those of all.
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
        layers = self._meta_model().get_submodule(reader.family.layers)
        self.skeletons: list[nn.Module] = list(layers.children())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors that the checkpoint must hold, by full name; a head that is the embedding has none."""
        head = f"{self.reader.family.head}."
        tied = self.reader.config.tie_word_embeddings
        state = self._meta_model().state_dict()
        return {name: tuple(t.shape) for name, t in state.items() if not (tied and name.startswith(head))}

    def embed(self, ids: Iterable[Tensor], embedding: nn.Module | None = None) -> list[Batch]:
        """Run everything before the first layer on batches of token ids (blocks, tokens).

        The model's own forward does it, with a recorder in every layer's place: masks, positions and rotary tables are
        then what the model would have used. ``embedding`` takes the place of the checkpoint's. Raises UserError where a
        weight of the embedding is missing, and where one outside the layers is NaN or inf.
        """
        model, family = self._meta_model(), self.reader.family
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
            hidden, calls = self._embed_batch(base, recorders, each)
            # Masks and rotary tables are on the device, and mostly the same for every batch.
            shared = batches[0].calls if batches and _same(calls, batches[0].calls) else calls
            batches.append(Batch(self.states.keep(hidden), shared))
        return batches

    @torch.no_grad()
    def _embed_batch(
        self, base: nn.Module, recorders: list[_Recorder], ids: Tensor
    ) -> tuple[Tensor, list[LayerCall]]:
        base(input_ids=ids.to(self.device), use_cache=False)
        hidden = recorders[0].call.args[0]
        return hidden.to(self._residual), [LayerCall(r.call.args[1:], r.call.kwargs) for r in recorders]

    def _meta_model(self) -> nn.Module:
        from transformers import AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        # Buffers stay real: rotary tables are computed from the config and are in no checkpoint.
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(
                self.reader.config, dtype=self.dtype, attn_implementation="sdpa"
            )
            apply_table(model, self._table, self.reader.family)
        return model.eval()

    def layer(self, index: int) -> tuple[nn.Module, dict[str, Tensor]]:
        """One decoder layer on the device, and its tensors there by path, in the checkpoint's precision.

        The one that follows, in the direction that the last two calls went, is read while this one is at work. Raises
        UserError where a weight is NaN or inf.
        """
        (following, tensors), self._ahead = self._ahead or (None, None), None
        found = tensors.result() if tensors and following == index else self.read(index)
        step, self._last = (-1 if index == self._last - 1 else 1), index
        if 0 <= index + step < len(self.skeletons):
            self._ahead = (index + step, self._reads.submit(self.read, index + step))
        state = {name: self.fetch(tensor) for name, tensor in found.items()}
        return self.materialize(index, state), state

    def read(self, index: int) -> dict[str, Tensor]:
        """The tensors of a layer on the host, pinned where a GPU takes them from there without waiting.

        Raises UserError where a weight is NaN or inf.
        """
        tensors = self.reader.layer(index)
        found = self._hands.map(partial(self._read_one, index), tensors.keys(), tensors.values())
        return dict(zip(tensors, found, strict=True))

    def _read_one(self, index: int, name: str, tensor: Tensor) -> Tensor:
        _check_finite({name: tensor}, f"layer {index}: ")
        if self.device.type != "cuda":
            return tensor
        with torch.cuda.device(self.device):  # another thread would make itself at home on the first GPU
            return tensor.pin_memory()

    def tail(self, head: nn.Module | None = None) -> Callable[[Tensor], Tensor]:
        """What follows the last layer: hidden states (..., hidden) to logits (..., vocab), by the final norm and head.

        ``head`` takes the place of the checkpoint's. Raises UserError where a weight of either is missing.
        """
        family = self.reader.family
        stored = family.embedding if self.reader.config.tie_word_embeddings else family.head
        norm, last = self.final_norm(), head or self._outer(family.head, stored)

        def logits(hidden: Tensor) -> Tensor:
            with self.precision():
                return last(norm(self.fetch(hidden)))

        return logits

    def final_norm(self) -> nn.Module:
        """What the last layer's hidden states pass before the head. UserError where its weight is missing."""
        path = self.reader.family.final_norm
        return self._outer(path, path)

    def _outer(self, path: str, stored: str) -> nn.Module:
        """A module outside the layers, holding the tensors stored under another path."""
        state = {
            name.removeprefix(f"{stored}."): tensor
            for name, tensor in self.reader.rest().items()
            if name.startswith(f"{stored}.")
        }
        if "weight" not in state:
            raise UserError(f"the checkpoint has no tensor {stored}.weight")
        return self.filled(self._meta_model().get_submodule(path), state)

    def materialize(self, index: int, state: Mapping[str, Tensor]) -> nn.Module:
        """The stock layer holding ``state``."""
        return self.filled(copy.deepcopy(self.skeletons[index]), state)

    def filled(self, module: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
        """A meta module given its tensors, on the device and in the precision layers run in."""
        module.load_state_dict({name: self._placed(tensor) for name, tensor in state.items()}, assign=True)
        return module.requires_grad_(False)

    def run(
        self,
        layer: nn.Module,
        index: int,
        batch: Batch,
        hidden: Tensor,
        *,
        attended: Tensor | None = None,
        grad: bool = False,
    ) -> Tensor:
        """Call a decoder layer as the model would, on hidden states (blocks, tokens, hidden) that wait anywhere.

        ``attended``: what its attention puts out, where that is known and need not run. With ``grad`` the result can be
        differentiated by hidden states that ask for it.
        """
        call, attention = batch.calls[index], self.reader.family.attention
        known = nullcontext() if attended is None else _given(layer, attention, attended)
        with torch.set_grad_enabled(grad), self.precision(), known:
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
        """Run a decoder layer on batches, feed its observers, and take the batches past it unless they ``stay``.

        New hidden states go to where states wait.
        """
        paths = {path: path for observer in observers for path in observer.watched}
        states = self.passing(batch.hidden for batch in batches)
        for batch, (hidden,) in zip(batches, states, strict=True):
            with observe(layer, paths) as calls:
                out = self.run(layer, index, batch, hidden)
            for observer in observers:
                observer.add(calls)
            if not stay:
                batch.hidden = self.states.keep(out)
            del out  # or the device would hold it beside the next
        for observer in observers:
            observer.reduce(self.processes)

    def fetch(self, x: Tensor) -> Tensor:
        """What waits anywhere, on the device."""
        return send([x], self.device)()[0]

    def passing(self, *lists: Iterable[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """The states of batch after batch, on the device: one of each list; the next come while some are at work.

        Lists are read one batch ahead.
        """
        ahead: Callable[[], tuple[Tensor, ...]] | None = None
        for states in zip(*lists, strict=True):
            now, ahead = ahead, send(states, self.device)
            if now:
                yield now()
        if ahead:
            yield ahead()

    def precision(self) -> AbstractContextManager[Any]:
        """Autocast to the layers' precision, so that a float32 stream can enter bfloat16 layers."""
        if self.dtype == self._residual:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def cast(self, x: Tensor) -> Tensor:
        """Activations as the products inside the layer see them."""
        return x.to(self.dtype)

    def _placed(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(self.device)
        # Norms work on the stream as it is; autocast brings biases to the precision of their product.
        return tensor.to(self.device, self._residual if tensor.ndim < 2 else self.dtype)


def _check_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        # The least and the largest are found without a second tensor, and NaN is both.
        if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise UserError(f"{where}{name} has NaN or inf")


def _same(calls: Sequence[LayerCall], others: Sequence[LayerCall]) -> bool:
    """Whether two batches hand every layer the same."""
    (one, shape), (other, its) = (
        tree_flatten([(c.args, dict(c.kwargs)) for c in each]) for each in (calls, others)
    )
    # Layers are handed the same objects, each of which is compared once.
    pairs = {(id(a), id(b)): (a, b) for a, b in zip(one, other, strict=False)}.values()
    return shape == its and all(_equal(a, b) for a, b in pairs)


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    return one is other or (type(one) is type(other) and bool(one == other))


@contextmanager
def _given(layer: nn.Module, path: str, output: Tensor) -> Iterator[None]:
    """Put what an attention module puts out in the place of the module."""
    module = layer.get_submodule(path)
    layer.set_submodule(path, _Given(output))
    try:
        yield
    finally:
        layer.set_submodule(path, module)


class _Given(nn.Module):
    """Stands in an attention module's place and returns what it would."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self._output = output

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return self._output, None


class _Recorder(nn.Module):
    """Stands in a layer's place, keeps what it was called with and passes the hidden states on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._attributes = {k: v for k, v in vars(layer).items() if not k.startswith("_")}
        self.call = LayerCall((), {})

    def __getattr__(self, name: str) -> Any:
        # Models read facts of a layer, such as its attention type, to choose its mask.
        attributes = self.__dict__.get("_attributes", {})
        return attributes[name] if name in attributes else super().__getattr__(name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.call = LayerCall((hidden_states, *args), kwargs)
        return hidden_states
