"""Whether an output folder is as it was written, and what is not."""

from __future__ import annotations

from dataclasses import dataclass

_TOLD = 8  # damages of one file in one message


@dataclass(frozen=True)
class Damage:
    """What is wrong with a file of an output, or with one tensor in it."""

    file: str
    problem: str
    tensor: str | None = None

    def __str__(self) -> str:
        tensor = "" if self.tensor is None else f"tensor {self.tensor!r} "
        return f"{self.file}: {tensor}{self.problem}"


@dataclass(frozen=True)
class Integrity:
    """The damage of an output ``folder``, and how many files, tensors and bytes its manifest vouches for and are there.

    Of a ``sound`` one there is none.
    """

    folder: str
    sound: bool
    files: int
    tensors: int
    bytes: int
    damage: list[Damage]

    @property
    def message(self) -> str:
        """The damage in words, a line for a file or a tensor, of each file the first few."""
        by_file: dict[str, list[Damage]] = {}
        for damage in self.damage:
            by_file.setdefault(damage.file, []).append(damage)
        lines = [f"{self.folder} is damaged"]
        for file, found in by_file.items():
            lines += [f"  {damage}" for damage in found[:_TOLD]]
            if found[_TOLD:]:
                lines.append(f"  {file}: {len(found) - _TOLD} more, all of which --json names")
        return "\n".join(lines)
