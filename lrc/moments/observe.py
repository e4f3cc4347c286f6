"""Watches a module's submodules during one call: forward hooks that come off again whatever happens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass
class Call:
    """One call of a submodule: its arguments and what it returned."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None

    @property
    def input(self) -> Tensor:
        """The hidden states that the submodule was given."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]


class Stop(Exception):
    """Ends a layer's call once everything watched has been seen."""


@contextmanager
def observe(
    module: nn.Module, paths: Mapping[str, str], stop_at: str | None = None
) -> Iterator[dict[str, Call]]:
    """Record the calls of the submodules at ``paths`` (name -> path) while the context is open.

    With ``stop_at`` the call of ``module`` ends, without a result, when that name's submodule is about to run.
    """
    calls: dict[str, Call] = {}
    handles = []

    def before(name: str):
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[name] = Call(args, kwargs)
            if name == stop_at:
                raise Stop

        return hook

    def after(name: str):
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            calls[name].output = output

        return hook

    try:
        for name, path in paths.items():
            submodule = module.get_submodule(path)
            handles.append(submodule.register_forward_pre_hook(before(name), with_kwargs=True))
            handles.append(submodule.register_forward_hook(after(name)))
        yield calls
    except Stop as stop:
        # Its frames hold the layer's activations, in a cycle that only the garbage collector would free.
        stop.__traceback__ = None
    finally:
        for handle in handles:
            handle.remove()
