"""The folder a checkpoint grows in: hidden beside its final name, resumable, and renamed only when whole.

``.NAME.lrc-partial/`` holds the checkpoint to be; its folder ``.lrc/`` holds the journal of the run, the lock and the
finished layers. A killed run leaves it behind; the same command takes it up again.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrc.checkpoint.headers import StoredTensor, read_headers
from lrc.errors import OutOfResources, UserError

_SINGLE_FILE_BYTES = 2 * 1024**3
MANIFEST = "lrc.json"


class Staging:
    """One run's staging folder; open it with ``staging``."""

    def __init__(self, out: Path, folder: Path) -> None:
        self.out = out
        self.folder = folder
        self._work = folder / ".lrc"

    @property
    def scratch(self) -> Path:
        """A folder beside the parts, gone with them."""
        return self._work

    def has(self, part: str) -> bool:
        """Whether a part was finished by this run or the one it resumes."""
        return (self._work / f"{part}.json").exists()

    def record(self, part: str) -> dict[str, Any]:
        """What was noted of a finished part."""
        return json.loads((self._work / f"{part}.json").read_text(encoding="utf-8"))

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of a finished part."""
        try:
            return load_file(self._work / f"{part}.safetensors")
        except SafetensorError as error:
            raise UserError(
                f"{self._work / part}.safetensors is damaged: {error}; start over with --fresh"
            ) from error

    def headers(self, part: str) -> dict[str, StoredTensor]:
        """Shapes and precisions of a finished part's tensors."""
        return read_headers([self._work / f"{part}.safetensors"])

    def write(self, part: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Store a part; it counts as finished once its record, written last, is in place."""
        with _space(self.folder):
            held = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
            self._save(held, self._work / f"{part}.safetensors")
            write_text(self._work / f"{part}.json", json.dumps(record))

    def assemble(self, parts: list[str]) -> None:
        """Lay the parts out as a Hugging Face checkpoint: one file if small, else a shard each with an index."""
        sources = [self._work / f"{part}.safetensors" for part in parts]
        if sum(source.stat().st_size for source in sources) <= _SINGLE_FILE_BYTES:
            with _space(self.folder):
                merged = {name: tensor for source in sources for name, tensor in load_file(source).items()}
                self._save(merged, self.folder / "model.safetensors")
            return
        weight_map, total = {}, 0
        for i, source in enumerate(sources, start=1):
            name = f"model-{i:05d}-of-{len(sources):05d}.safetensors"
            with _space(self.folder):
                _link(source, self.folder / name)
            for key, stored in read_headers([source]).items():
                weight_map[key], total = name, total + stored.bytes
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        self.write_json("model.safetensors.index.json", index)

    def _save(self, tensors: dict[str, Tensor], path: Path) -> None:
        save_file(tensors, path, metadata={"format": "pt"})
        shutil.copymode(self._work / "run.json", path)  # safetensors would keep it from all but its owner

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file of the checkpoint."""
        self.write_file(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_file(self, name: str, text: str) -> None:
        """Write a text file of the checkpoint."""
        with _space(self.folder):
            write_text(self.folder / name, text)

    def copy(self, path: Path) -> None:
        """Copy a file of the source checkpoint (tokenizer, generation config) as it is."""
        with _space(self.folder):
            shutil.copyfile(path, self.folder / path.name)

    def publish(self) -> None:
        """Give the finished folder its name, in place of an earlier output of that name."""
        shutil.rmtree(self._work)
        retired = self.folder.with_name(f"{self.folder.name}.old")
        if self.out.exists():
            shutil.rmtree(retired, ignore_errors=True)  # of a run that was killed just here
            self.out.rename(retired)
        self.folder.rename(self.out)
        shutil.rmtree(retired, ignore_errors=True)


@contextmanager
def staging(
    out: Path, key: Mapping[str, Any], *, source: Path, fresh: bool, force: bool
) -> Iterator[Staging]:
    """Open the staging folder of ``out`` for one run; ``key`` is everything that decides the result.

    A run that is killed, crashes or runs out of something leaves its finished layers for the next, and so does any that
    has finished them all; another that fails by a user's mistake leaves nothing. ``source`` is the model's own folder,
    which ``out`` must not replace. Raises UserError where ``out`` exists and is not an lrc output (unless ``force``),
    where another run holds it, and where an unfinished run had another key (unless ``fresh``).
    """
    check_output(out, source=source, force=force)
    folder = out.with_name(f".{out.name}.lrc-partial")
    work = folder / ".lrc"
    with _space(folder):
        work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"another run is writing {out} (it holds {folder}); wait for it or choose another --out"
            ) from None
        journal = work / "run.json"
        if fresh or not journal.exists():
            _clear(folder)
        elif changed := _changed(json.loads(journal.read_text(encoding="utf-8")), key):
            raise UserError(
                f"an unfinished run of {out} had other settings ({', '.join(changed)}); "
                "pass --fresh to start over, or the same settings to go on"
            )
        with _space(folder):
            write_text(journal, json.dumps(key))
        try:
            yield Staging(out, folder)
        except Exception as error:
            mistaken = isinstance(error, UserError) and not isinstance(error, OutOfResources)
            finished = [path for path in work.glob("*.json") if path != journal]
            whole = (folder / "config.json").exists()
            if work.exists() and not whole and (mistaken or not finished):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def check_output(out: Path, *, source: Path, force: bool) -> None:
    """Raise UserError where an output folder may not be written or replaced; never over the model in ``source``."""
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: the folder {out.parent} does not exist")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"cannot write {out}: the folder {out.parent} is read-only")
    if out.is_file():
        raise UserError(f"cannot write {out}: it is a file; choose another --out")
    if out.exists() and not (out / MANIFEST).is_file() and not force:
        raise UserError(
            f"{out} exists and is not an lrc output; choose another --out, or pass --force to replace it"
        )
    if source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"cannot replace {out}: it is, or holds, the model that is being compressed")
    if out.exists() and Path.cwd().resolve().is_relative_to(out.resolve()):
        raise UserError(f"cannot replace {out}: it is, or holds, the current folder")


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _changed(old: Any, new: Mapping[str, Any]) -> list[str]:
    plain = json.loads(json.dumps(new))
    return sorted(name for name in {*old, *plain} if old.get(name) != plain.get(name))


def _clear(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            if path.name != ".lrc":
                path.rmdir()
        elif path.name != "lock":
            path.unlink()


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


@contextmanager
def _space(folder: Path) -> Iterator[None]:
    """Turn a full disk into a message; what was finished stays for the next run."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise OutOfResources(
                f"the disk is full: {folder}; free some space and run the same command again"
            ) from error
        raise
