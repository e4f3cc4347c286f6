"""Stand in for a projection that is stored as several."""

from __future__ import annotations

from torch import Tensor, nn


class Absent(nn.Module):
    """Stands where a projection was that is stored split; its empty tensor makes loading without lrc fail.

    Its text is part of what PEFT says where an adapter is asked for it.
    """

    weight: Tensor

    def __init__(self, like: Tensor, instead: list[str]) -> None:
        super().__init__()
        self.register_buffer("weight", like.new_empty(0))
        self.instead = instead

    def extra_repr(self) -> str:
        return f"stored as {', '.join(self.instead)}: name these in target_modules"
