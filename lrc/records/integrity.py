"""The result of ``lrc verify``."""

from __future__ import annotations

from dataclasses import dataclass

_SHOWN = 8  # problems of one file in a message


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
        """The damage in words: a line for a file or a tensor, at most eight for each file."""
        by_file: dict[str, list[Damage]] = {}
        for damage in self.damage:
            by_file.setdefault(damage.file, []).append(damage)
        lines = [f"{self.folder} is damaged"]
        for file, found in by_file.items():
            lines += [f"  {damage}" for damage in found[:_SHOWN]]
            if found[_SHOWN:]:
                lines.append(f"  {file}: {len(found) - _SHOWN} more, all of which --json names")
        return "\n".join(lines)
