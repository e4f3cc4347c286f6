"""Finds plans: files of the user, and those shipped with lrc."""

from __future__ import annotations

from pathlib import Path

from lrc.errors import UserError, nearest

PACKAGE = Path(__file__).resolve().parents[1]


def shipped_plans() -> dict[str, Path]:
    """The plans in ``configs/``, by name: inside the installed package, or beside it in a checkout."""
    folders = [PACKAGE / "configs", PACKAGE.parent / "configs"]
    folder = next((f for f in folders if f.is_dir()), folders[0])
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_plan(name_or_path: str) -> tuple[str, str]:
    """Text of a plan and what to call it in messages, by path or by name of a shipped plan, .yaml or not.

    Raises UserError where there is no such plan, or it is not text.
    """
    path, shipped = Path(name_or_path).expanduser(), shipped_plans()
    if not path.is_file():
        name = name_or_path.removesuffix(".yaml")
        if name not in shipped:
            missing = f"there is no plan file {name_or_path!r} and no shipped plan of that name"
            raise UserError(f"{missing}; {nearest(name, shipped)}")
        path = shipped[name]
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text in UTF-8 (byte {error.start}); a plan is a YAML file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
