"""The results of ``lrc check``, ``lrc verify`` and ``lrc list``."""

from __future__ import annotations

from dataclasses import dataclass

from lrc.checkpoint.sizes import Size, byte_text
from lrc.estimate.memory import Memory
from lrc.estimate.sizes import TargetSize
from lrc.plan.resolved import Share

_SHOWN = 8  # problems of one file in a message


@dataclass(frozen=True)
class Check:
    """Sizes and memory of a plan for a model. ``memory`` and ``least_memory`` are estimates, all else is exact.

    ``keep``: kept fraction of the decoder's weights. ``with_tables``: with the tables that the plan names, if any.
    ``memory``: with hidden states on the GPU; ``least_memory``: off it.
    """

    model: str
    plan: str
    keep: float
    with_tables: Share | None
    before: Size
    after: Size
    targets: list[TargetSize]
    memory: Memory
    least_memory: Memory
    warnings: list[str]


@dataclass(frozen=True)
class Damage:
    """A problem of a file of an output, or of one tensor in it."""

    file: str
    problem: str
    tensor: str | None = None

    def __str__(self) -> str:
        tensor = "" if self.tensor is None else f"tensor {self.tensor!r} "
        return f"{self.file}: {tensor}{self.problem}"


@dataclass(frozen=True)
class Integrity:
    """The damage of an output, none if ``sound``, and the number of files, tensors and bytes that were verified."""

    folder: str
    sound: bool
    files: int
    tensors: int
    bytes: int
    damage: list[Damage]

    @property
    def message(self) -> str:
        """What was verified, or the damage: a line for a file or a tensor, at most eight for each file."""
        if self.sound:
            size = byte_text(self.bytes)
            return f"sound: {self.folder}, {self.files} files, {self.tensors:,} tensors, {size}"
        by_file: dict[str, list[Damage]] = {}
        for damage in self.damage:
            by_file.setdefault(damage.file, []).append(damage)
        lines = [f"{self.folder} is damaged"]
        for file, found in by_file.items():
            lines += [f"  {damage}" for damage in found[:_SHOWN]]
            if found[_SHOWN:]:
                lines.append(f"  {file}: {len(found) - _SHOWN} more, all of which --json names")
        return "\n".join(lines)


@dataclass(frozen=True)
class Item:
    """One choice; ``source``: its paper, or where it is on the hub."""

    name: str
    summary: str
    source: str = ""
