"""Hold the place of a fused projection that is stored as separate ones."""

from __future__ import annotations

from torch import Tensor, nn


class Absent(nn.Module):
    """Hold the place of a fused projection; its empty tensor makes loading without lrc fail.

    Its text is part of what PEFT says where an adapter is asked for it.
    """

    weight: Tensor

    def __init__(self, like: Tensor, instead: list[str]) -> None:
        super().__init__()
        self.register_buffer("weight", like.new_empty(0))
        self.instead = instead

    def extra_repr(self) -> str:
        return f"stored as {', '.join(self.instead)}: name these in target_modules"
