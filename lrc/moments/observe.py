"""Record calls of a module's submodules with temporary forward hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class Call:
    """One call of a submodule: its arguments and its output. ``shape``: (blocks, tokens) of the observed module."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None
    shape: tuple[int, ...] = ()

    @property
    def input(self) -> Tensor:
        """Return the hidden states (blocks, tokens, width) that were passed to the submodule."""
        x = self.args[0] if self.args else self.kwargs["hidden_states"]
        return (
            x.unflatten(0, self.shape) if x.ndim == 2 and self.shape else x
        )  # some layers join blocks and tokens


class Stop(Exception):
    """Raised to end a module's call early."""


@contextmanager
def observe(
    module: nn.Module, paths: Mapping[str, str], stop_at: str | None = None
) -> Iterator[dict[str, Call]]:
    """Record the calls of the submodules at ``paths`` (name -> path) while the context is open.

    With ``stop_at``, the call of ``module`` ends without a result before the submodule of that name runs.
    """
    calls: dict[str, Call] = {}
    handles, shape = [], list[int]()

    def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs.get("hidden_states")
        shape[:] = states.shape[:-1] if states is not None and states.ndim == 3 else []

    def before(name: str):
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = Call(args, kwargs, shape=tuple(shape))
            if name == stop_at:
                raise Stop

        return hook

    def after(name: str):
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            calls[name].output = output

        return hook

    try:
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        for name, path in paths.items():
            submodule = module.get_submodule(path)
            handles.append(submodule.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(submodule.register_forward_hook(after(name)))
        yield calls
    except Stop as stop:
        # Its frames hold the layer's activations in a reference cycle; free them now.
        stop.__traceback__ = None
    finally:
        for handle in handles:
            handle.remove()
