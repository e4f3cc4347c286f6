"""Numbers as text, the same in every table, report and message."""

from __future__ import annotations

_LONGEST = 1e12  # above it, digits before the point say less than a power of ten


def number(value: float, digits: int = 4) -> str:
    """Return a number with ``digits`` significant digits, or all before the point: 47,180, 12.35, 0.0021."""
    whole = 10 ** (digits - 1) <= abs(value) < _LONGEST
    return f"{value:,.0f}" if whole else f"{value:,.{digits}g}"


def ratio_text(value: float) -> str:
    """Return a ratio with three decimals, or a large one without: 0.854, 1.245, 47,180."""
    return f"{value:.3f}" if abs(value) < 1000 else number(value)
