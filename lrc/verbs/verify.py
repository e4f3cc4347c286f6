"""Whether an output folder is as it was written, by the hashes in its manifest: behind ``lrc verify``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM

from lrc.checkpoint.hashes import hashing, tensor_sha256
from lrc.checkpoint.headers import Shape, StoredTensor, parse_header
from lrc.checkpoint.staging import INDEX, MANIFEST
from lrc.errors import UserError
from lrc.hub.quantizer import LrcConfig, replace_modules
from lrc.records.integrity import Damage, Integrity

_THREADS = 8
_CONFIG = "config.json"
_WEIGHTS = ("*.safetensors", "*.bin")
_DIFFERS = "differs from what was written"

Hashes = Mapping[str, str]
Headers = dict[str, dict[str, StoredTensor]]
Progress = Callable[[str, int], Callable[[int], object]]


def verify(folder: Path, *, trust_remote_code: bool = False, progress: Progress | None = None) -> Integrity:
    """Hold an output's files against its manifest, and its weights against its index and the table in config.json.

    Every file is read once, and the tensors of a damaged one a second time, each by itself. ``trust_remote_code`` is
    for models that come with code of their own. Raises UserError where ``folder`` is no lrc output, and where the
    manifest itself is damaged or has no hashes.
    """
    files, tensors = _read_manifest(folder)
    there = {name: folder / name for name in files if (folder / name).is_file()}
    damage = [Damage(name, "is missing") for name in files if name not in there]
    weights = sorted(path.name for pattern in _WEIGHTS for path in folder.glob(pattern))
    damage += [Damage(name, "is not of this checkpoint") for name in weights if name not in files]
    changed = _changed(there, files, progress)
    damage += [Damage(name, _DIFFERS) for name in changed if name not in tensors]
    headers: Headers = {}
    for name in (name for name in tensors if name in there):
        try:
            headers[name] = parse_header(there[name])
        except UserError as error:
            damage.append(Damage(name, str(error).removeprefix(str(there[name])).lstrip(": ")))
            continue
        if name in changed:
            damage += _by_tensor(there[name], headers[name], tensors[name])
    if INDEX in there:
        damage += _of_index(there[INDEX], headers)
    if _CONFIG in there:
        lost = {tensor for name in tensors if name not in headers for tensor in tensors[name]}
        damage += _of_config(folder, headers, lost, trust_remote_code=trust_remote_code)
    return Integrity(
        folder=str(folder),
        sound=not damage,
        files=len(there),
        tensors=sum(len(tensors[name]) for name in headers),
        bytes=sum(path.stat().st_size for path in there.values()),
        damage=damage,
    )


def _read_manifest(folder: Path) -> tuple[Hashes, Mapping[str, Hashes]]:
    """SHA-256 by file, and hashes by tensor of those that hold weights."""
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(
            f"{folder} is no lrc output (it has no {MANIFEST}), so there is nothing to verify it by"
        )
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged, so that the rest cannot be verified: {error}") from None
    try:
        return dict(manifest["sha256"]["files"]), {
            k: dict(v) for k, v in manifest["sha256"]["tensors"].items()
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{path} has no hashes to verify the folder by, or is damaged") from None


def _changed(there: Mapping[str, Path], files: Hashes, progress: Progress | None) -> set[str]:
    """Names of files that are not what was written."""
    advance = progress("verify", len(there)) if progress else lambda done: None
    changed = set[str]()
    with hashing(there.values(), min(_THREADS, os.cpu_count() or 1)) as hashes:
        for name, path in there.items():
            if hashes[path].result() != files[name]:
                changed.add(name)
            advance(1)
    return changed


def _by_tensor(file: Path, stored: Mapping[str, StoredTensor], hashes: Hashes) -> Iterator[Damage]:
    """What is wrong with the tensors of a file that is not what was written, or else with the rest of it."""
    size, sound = file.stat().st_size, True
    for name, sha256 in hashes.items():
        if name not in stored:
            problem = "is missing"
        elif stored[name].bytes and stored[name].end > size:
            problem = f"is cut off: it ends at byte {stored[name].end}, the file has {size}"
        elif tensor_sha256(stored[name]) != sha256:
            problem = _DIFFERS
        else:
            continue
        sound = False
        yield Damage(file.name, problem, name)
    for name in stored:
        if name not in hashes:
            sound = False
            yield Damage(file.name, "is not of this checkpoint", name)
    if sound:
        yield Damage(file.name, f"{_DIFFERS}, in its header or behind its tensors, whose values are sound")


def _of_index(index: Path, headers: Headers) -> Iterator[Damage]:
    """Tensors that are not in the file that the index says; of files that cannot be read nothing is said."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        named = {str(name): str(file) for name, file in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        yield Damage(index.name, "is no index of a checkpoint")
        return
    held = {name: file for file, stored in headers.items() for name in stored}
    for name in sorted({*named, *held}):
        if name in held and name not in named:
            yield Damage(index.name, f"is in {held[name]}, and the index does not name it", name)
        elif held.get(name, named[name]) != named[name]:
            yield Damage(index.name, f"is in {held[name]}, the index says {named[name]}", name)
        elif name not in held and named[name] in headers:
            yield Damage(index.name, f"is not in {named[name]}, as the index says", name)


def _of_config(
    folder: Path, headers: Headers, lost: set[str], *, trust_remote_code: bool
) -> Iterator[Damage]:
    """Tensors that have not the shapes of the modules in config.json; but for those ``lost`` with their files."""
    try:
        expected = _expected(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged config can break any line of transformers' models
        reason = " ".join(str(error).split()) or type(error).__name__
        yield Damage(_CONFIG, f"cannot be used: {reason}")
        return
    held = {name: tensor for stored in headers.values() for name, tensor in stored.items()}
    for name, shape in expected.items():
        if name not in held:
            if name not in lost:
                yield Damage(_CONFIG, "is asked for, and no file holds it", name)
        elif held[name].shape != shape:
            found = f"has shape {list(held[name].shape)} in {held[name].file.name}"
            yield Damage(_CONFIG, f"{found}, config.json says {list(shape)}", name)


def _expected(folder: Path, *, trust_remote_code: bool) -> dict[str, Shape]:
    """Shapes of the tensors that the model of a folder's config.json is loaded from, by full name."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    table = LrcConfig(**config.quantization_config).modules
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        return replace_modules(model, table)
