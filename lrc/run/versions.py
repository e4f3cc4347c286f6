"""The versions of lrc and of the packages that a result depends on."""

from __future__ import annotations

from importlib.metadata import version

__version__ = "0.1.0"


def versions(*packages: str) -> dict[str, str]:
    """Return the installed version of lrc and of each package, by name."""
    return {"lrc": __version__, **{name: version(name) for name in packages}}
