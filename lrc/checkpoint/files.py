"""Choose the files that hold a checkpoint's weights, as transformers chooses them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lrc.errors import UserError

# In the order in which transformers looks for them.
_SETS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_INDEX = ".index.json"


@dataclass(frozen=True)
class WeightFiles:
    """Files that hold a checkpoint's weights, and other sets of weights in the folder that are not read."""

    files: list[Path]
    name: str
    ignored: tuple[str, ...]

    @property
    def pickled(self) -> bool:
        return ".bin" in self.name


def weight_files(folder: Path, named: object = None) -> WeightFiles:
    """Find the files of ``folder`` that transformers reads; ``named`` is the config's ``transformers_weights``.

    Raises UserError if there are none, a file is missing, or an index cannot be read.
    """
    found = [name for name in _SETS if (folder / name).is_file()]
    if named is not None:
        found = [_named(folder, named), *(name for name in found if name != named)]
    if not found:
        raise UserError(f"{folder} holds no weights; expected {_SETS[0]} or {_SETS[1]}")
    name, *ignored = found
    files = _shards(folder / name) if name.endswith(_INDEX) else [folder / name]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{folder / name} names missing files: {', '.join(missing)}")
    return WeightFiles(files, name, tuple(ignored))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError if the file is missing or holds something else."""
    if not path.is_file():
        raise UserError(f"{path.parent} is not a checkpoint: it has no {path.name}")

    def refuse(name: str) -> None:
        raise UserError(f"{path} is not JSON: {name} is no value of JSON")

    try:
        found = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: line {error.lineno}: {error.msg}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds {type(found).__name__}, expected a JSON object")
    return found


def _named(folder: Path, named: object) -> str:
    """Return the file that ``transformers_weights`` names, under the rules of transformers."""
    where = f"{folder / 'config.json'}: transformers_weights: {named!r}"
    if not isinstance(named, str) or not named.endswith((".safetensors", f".safetensors{_INDEX}")):
        raise UserError(f"{where} is no safetensors file or index")
    # Not resolved: files of the hub's cache are links to another folder.
    if not Path(os.path.abspath(folder / named)).is_relative_to(os.path.abspath(folder)):
        raise UserError(f"{where} is outside the folder of the model")
    if not (folder / named).is_file():
        raise UserError(f"{where} is not in the folder of the model")
    return named


def _shards(index: Path) -> list[Path]:
    found = read_json(index)
    if missing := {"metadata", "weight_map"} - found.keys():
        raise UserError(f"{index} has no {' and no '.join(sorted(missing))}, so transformers cannot load it")
    shards = found["weight_map"]
    if not isinstance(shards, Mapping) or not shards or not all(isinstance(s, str) for s in shards.values()):
        raise UserError(f"{index}: weight_map must give a file for each tensor")
    return [index.parent / name for name in sorted(set(shards.values()))]
