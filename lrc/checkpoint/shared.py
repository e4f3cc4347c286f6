"""Share a run's staging folder between processes: rank 0 opens it, the others read through rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lrc.checkpoint.staging import Staging
from lrc.run.processes import Processes


class SharedStaging:
    """Hold the finished parts of a run, the same on all processes; ``own`` is the folder on rank 0, None elsewhere."""

    def __init__(self, own: Staging | None, processes: Processes) -> None:
        self.own, self._processes = own, processes
        self.folder: Path = processes.share(own and own.folder)  # type: ignore[assignment]
        self.scratch: Path = processes.share(own and own.scratch)  # type: ignore[assignment]

    def has(self, part: str) -> bool:
        """Tell whether this run, or the run that it resumes, finished a part."""
        return bool(self._processes.share(self.own and self.own.has(part)))

    def record(self, part: str) -> dict[str, Any]:
        return self._processes.share(self.own.record(part) if self.own else {})

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Return the tensors of a finished part, on the CPU."""
        return self._processes.share(self.own.tensors(part) if self.own else {})

    def write(self, part: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Store a part; every process calls this with the same part."""
        if self.own:
            self.own.write(part, tensors, record)
