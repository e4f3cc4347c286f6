"""Run-time modules of compressed checkpoints: one file for each kind, the compressed attention, the module table."""

from lrc.modules.kind import Entry, Factors, StructuredLinear, kind_of, kinds

__all__ = ["Entry", "Factors", "StructuredLinear", "kind_of", "kinds"]
