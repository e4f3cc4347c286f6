"""What a plan has to know of a method: its solvers by target, with their sizes, options and limits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lrc.families import Heads
from lrc.methods.sizes import SizeRule


class OptionData(Protocol):
    """An option's type and default."""

    @property
    def annotation(self) -> Any: ...

    @property
    def default(self) -> Any: ...


class SolverData(Protocol):
    """A solver of one target, as ``lrc.methods.contract.Solver`` describes it."""

    @property
    def size(self) -> SizeRule: ...

    @property
    def needs(self) -> tuple[str, ...]: ...

    @property
    def options(self) -> Mapping[str, OptionData]: ...

    def collectors(self, options: Mapping[str, Any]) -> set[str]: ...

    @property
    def refuses(self) -> Callable[[Heads, Mapping[str, Any]], str | None]: ...

    @property
    def rotary(self) -> str | None: ...


class MethodData(Protocol):
    """A method's solvers by target: ``projection``, ``embed``, ``qk``, ``ov``, ``mlp``."""

    @property
    def solvers(self) -> Mapping[str, SolverData]: ...


def find_solver(method: MethodData, target: str) -> SolverData | None:
    """What of a method solves a target; an embedding is looked up, so no solver of projections will do for it."""
    return method.solvers.get(target) or (None if target == "embed" else method.solvers.get("projection"))
