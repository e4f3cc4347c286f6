"""Check an output folder against the hashes in its manifest: what ``lrc verify`` calls."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from lrc.checkpoint.hashes import hashing, tensor_sha256
from lrc.checkpoint.headers import StoredTensor, parse_header
from lrc.checkpoint.staging import INDEX, MANIFEST
from lrc.errors import UserError
from lrc.hub.quantizer import LrcConfig, replace_modules
from lrc.records.check import Damage, Integrity
from lrc.run.settings import Progress

_THREADS = 8
_CONFIG = "config.json"
_DIFFERS = "differs from what was written"

Hashes = Mapping[str, str]
Headers = dict[str, dict[str, StoredTensor]]


def verify(
    folder: str | Path, *, trust_remote_code: bool = False, progress: Progress | None = None
) -> Integrity:
    """Check an output's files against its manifest, and its weights against its index and the table in config.json.

    Files are read once, and a damaged file again, tensor by tensor. ``trust_remote_code``: run code that comes with the
    checkpoint. Raises UserError if ``folder`` is no lrc output, or its manifest is damaged or has no hashes.
    """
    folder = Path(folder).expanduser()
    files, tensors = _read_manifest(folder)
    present = {name: folder / name for name in files if (folder / name).is_file()}
    damage = [Damage(name, "is missing") for name in files if name not in present]
    weights = sorted(path.name for pattern in ("*.safetensors", "*.bin") for path in folder.glob(pattern))
    damage += [Damage(name, "is not of this checkpoint") for name in weights if name not in files]
    advance = progress("verify", len(present)) if progress else lambda done: None
    changed = set[str]()
    with hashing(present.values(), min(_THREADS, os.cpu_count() or 1)) as hashes:
        for name, path in present.items():
            if hashes[path].result() != files[name]:
                changed.add(name)
            advance(1)
    damage += [Damage(name, _DIFFERS) for name in changed if name not in tensors]
    headers: Headers = {}
    for name in (name for name in tensors if name in present):
        try:
            headers[name] = parse_header(present[name])
        except UserError as error:
            damage.append(Damage(name, str(error).removeprefix(str(present[name])).lstrip(": ")))
            continue
        if name in changed:
            damage += _by_tensor(present[name], headers[name], tensors[name])
    if INDEX in present:
        damage += _of_index(present[INDEX], headers)
    if _CONFIG in present:
        unread = {tensor for name in tensors if name not in headers for tensor in tensors[name]}
        damage += _of_config(folder, headers, unread, trust_remote_code=trust_remote_code)
    return Integrity(
        folder=str(folder),
        sound=not damage,
        files=len(present),
        tensors=sum(len(tensors[name]) for name in headers),
        bytes=sum(path.stat().st_size for path in present.values()),
        damage=damage,
    )


def _read_manifest(folder: Path) -> tuple[Hashes, Mapping[str, Hashes]]:
    """Return SHA-256 by file, and by file and tensor for files with weights."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is no lrc output (it has no {MANIFEST}), so it has no hashes to verify")
    try:
        hashes = json.loads(path.read_text(encoding="utf-8"))["sha256"]
        return dict(hashes["files"]), {name: dict(each) for name, each in hashes["tensors"].items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged or has no hashes, so nothing can be verified") from None


def _by_tensor(file: Path, stored: Mapping[str, StoredTensor], hashes: Hashes) -> Iterator[Damage]:
    """Yield the damage of a changed file: its tensors, or if these are sound, the rest."""
    size, problems = file.stat().st_size, dict[str, str]()
    for name, sha256 in hashes.items():
        if name not in stored:
            problems[name] = "is missing"
        elif stored[name].bytes and stored[name].end > size:
            problems[name] = f"is cut off: it ends at byte {stored[name].end}, the file has {size}"
        elif tensor_sha256(stored[name]) != sha256:
            problems[name] = _DIFFERS
    problems |= {name: "is not of this checkpoint" for name in stored if name not in hashes}
    yield from (Damage(file.name, problem, name) for name, problem in problems.items())
    if not problems:
        yield Damage(file.name, f"{_DIFFERS}, in its header or after its tensors, whose values are sound")


def _of_index(index: Path, headers: Headers) -> Iterator[Damage]:
    """Yield the tensors that are not in the file that the index names."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        named = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        yield Damage(index.name, "is no index of a checkpoint")
        return
    held = {name: file for file, stored in headers.items() for name in stored}
    for name in sorted({*named, *held}):
        found, expected = held.get(name), named.get(name)
        if found != expected and (found or expected in headers):  # other files are missing or unreadable
            problem = f"is in {found or 'no file'}, the index says {expected or 'in none'}"
            yield Damage(index.name, problem, name)


def _of_config(
    folder: Path, headers: Headers, unread: set[str], *, trust_remote_code: bool
) -> Iterator[Damage]:
    """Yield the tensors without the shape that config.json asks for, except those ``unread`` with their files."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        table = LrcConfig(**config.quantization_config).modules
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
            expected = replace_modules(model, table)
    except Exception as error:  # a damaged config can break any line of transformers' models
        reason = " ".join(str(error).split()) or type(error).__name__
        yield Damage(_CONFIG, f"cannot be used: {reason}")
        return
    held = {name: tensor for stored in headers.values() for name, tensor in stored.items()}
    for name, shape in expected.items():
        if name not in held:
            if name not in unread:
                yield Damage(_CONFIG, "is asked for, and no file holds it", name)
        elif held[name].shape != shape:
            found = f"has shape {list(held[name].shape)} in {held[name].file.name}"
            yield Damage(_CONFIG, f"{found}, config.json says {list(shape)}", name)
