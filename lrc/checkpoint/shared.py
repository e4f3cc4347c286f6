"""The staging folder as every process of a run sees it: the first has it open, and the others ask that one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lrc.checkpoint.staging import Staging
from lrc.run.processes import Ranks


class SharedStaging:
    """Finished parts of a run, alike on all processes; ``own`` is the folder on the first one, None on the others."""

    def __init__(self, own: Staging | None, ranks: Ranks) -> None:
        self.own, self._ranks = own, ranks
        self.folder: Path = ranks.share(own and own.folder)  # type: ignore[assignment]
        self.scratch: Path = ranks.share(own and own.scratch)  # type: ignore[assignment]

    def has(self, part: str) -> bool:
        """Whether a part was finished by this run or the one it resumes."""
        return bool(self._ranks.share(self.own and self.own.has(part)))

    def record(self, part: str) -> dict[str, Any]:
        """What was noted of a finished part."""
        return self._ranks.share(self.own.record(part) if self.own else {})

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of a finished part, on the CPU."""
        return self._ranks.share(self.own.tensors(part) if self.own else {})

    def write(self, part: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Store a part, which all processes have alike."""
        if self.own:
            self.own.write(part, tensors, record)
