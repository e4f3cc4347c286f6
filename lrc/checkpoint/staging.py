"""The folder a checkpoint grows in: hidden beside its final name, resumable, and renamed only when whole.

``.NAME.lrc-partial/`` holds the journal of a run, its lock, what was found of its source, the finished ``parts/`` and
``checkpoint/``, which is laid out from them in one go and becomes NAME. A killed run leaves it behind; the same command
takes it up again. Everything is on the disk before it counts, so that a power cut takes no more than a kill does. An
earlier output of that name waits in the folder from just before the last rename to just after it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrc.checkpoint.durable import put, sync, write_text
from lrc.checkpoint.hashes import file_sha256, tensor_sha256
from lrc.checkpoint.headers import StoredTensor, read_headers
from lrc.checkpoint.sources import Sources, watching
from lrc.errors import OutOfResources, Resumable, UserError
from lrc.run.offload import on_host

_SINGLE_FILE_BYTES = 2 * 1024**3
MANIFEST = "lrc.json"
INDEX = "model.safetensors.index.json"
_JOURNAL, _SOURCES, _RETIRED = "run.json", "sources.json", "retired"
_FULL = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("your quota of the disk is used up", "free some space"),
    errno.EFBIG: ("a file has grown as large as files may", "raise the limit (ulimit -f)"),
}


@dataclass(frozen=True)
class Written:
    """What was written of a safetensors file: its SHA-256, and the hashes of its ``tensors`` by name."""

    sha256: str
    tensors: dict[str, str]


class Staging:
    """One run's staging folder; open it with ``staging``. ``folder`` is the checkpoint to be.

    A part goes to the disk while the run goes on, one at a time, so that memory holds no more than one that waits.
    """

    _pending: tuple[str, Future[None]] | None  # the part that is being written

    def __init__(self, out: Path, work: Path, sources: Sources, writer: Executor) -> None:
        self.out = out
        self.folder = work / "checkpoint"
        self._work, self._parts, self._sources = work, work / "parts", sources
        self._sound: set[str] = set()  # parts that this run wrote, or has read again whole
        self._weights: dict[str, Written] = {}  # by file of the checkpoint
        self._writer, self._pending = writer, None

    @property
    def scratch(self) -> Path:
        """A folder beside the parts, gone with them."""
        return self._work

    def has(self, part: str) -> bool:
        """Whether a part was finished by this run or the one it resumes."""
        self.settle(part)
        return self._record(part).exists() and self._file(part).exists()

    def record(self, part: str) -> dict[str, Any]:
        """What was noted of a finished part."""
        return self._noted(part)["record"]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The tensors of a finished part. Raises Resumable where its file is not what was written."""
        self._check(part)
        return load_file(self._file(part))

    def headers(self, part: str) -> dict[str, StoredTensor]:
        """Shapes and precisions of a finished part's tensors."""
        self.settle(part)
        return read_headers([self._file(part)])

    def write(self, part: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Store a part, in the background; it counts as finished once its record, written last, is in place.

        ``tensors`` must not change any more. What goes wrong is raised by the next call: Resumable where a file of the
        source has changed.
        """
        held = on_host(tensors)
        self.settle()
        self._pending = part, self._writer.submit(self._write, part, held, dict(record))

    def _write(self, part: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        with _space(self.out):
            self._record(part).unlink(missing_ok=True)  # there only if someone took its tensors away
            written = self._save(tensors, self._file(part))
            self._sources.settle()
            write_text(self._record(part), json.dumps({"record": record, **asdict(written)}))
        self._sound.add(part)

    def settle(self, part: str | None = None) -> None:
        """Wait until nothing is being written, or a ``part`` is not, and raise what went wrong."""
        if self._pending and part in (None, self._pending[0]):
            (_, written), self._pending = self._pending, None
            written.result()

    def assemble(self, parts: list[str]) -> None:
        """Lay the parts out as a Hugging Face checkpoint: one file if small, else a shard each with an index.

        What a killed run laid out before goes. Raises Resumable where a part is not what was written.
        """
        self.settle()
        for part in parts:
            self._check(part)
        with _space(self.out):
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir()
            if sum(self._file(part).stat().st_size for part in parts) <= _SINGLE_FILE_BYTES:
                merged = {n: tensor for part in parts for n, tensor in load_file(self._file(part)).items()}
                self._weights = {"model.safetensors": self._save(merged, self.folder / "model.safetensors")}
                return
            names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
            for part, name in zip(parts, names, strict=True):
                _link(self._file(part), self.folder / name)
                noted = self._noted(part)
                self._weights[name] = Written(noted["sha256"], noted["tensors"])
        stored = read_headers(self.folder / name for name in names)
        weight_map = {key: tensor.file.name for key, tensor in sorted(stored.items())}
        total = sum(tensor.bytes for tensor in stored.values())
        self.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def write_json(self, name: str, content: Any) -> None:
        """Write a JSON file of the checkpoint."""
        self.write_file(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_file(self, name: str, text: str) -> None:
        """Write a text file of the checkpoint."""
        with _space(self.out):
            write_text(self.folder / name, text)

    def copy(self, path: Path) -> None:
        """Copy a file of the source checkpoint (tokenizer, generation config) as it is."""
        with _space(self.out):
            shutil.copyfile(path, self.folder / path.name)
            sync(self.folder / path.name)

    def hashes(self) -> dict[str, Any]:
        """SHA-256 of the source's files and of all that is laid out so far, and the hashes of its tensors by file.

        Raises Resumable where a file of the source has changed.
        """
        files = {
            path.name: self._weights[path.name].sha256 if path.name in self._weights else file_sha256(path)
            for path in sorted(self.folder.iterdir())
        }
        tensors = {file: written.tensors for file, written in self._weights.items()}
        return {"source": self._sources.settle(), "files": files, "tensors": tensors}

    def publish(self) -> None:
        """Give the finished folder its name, in place of an earlier output of that name."""
        sync(self.folder)
        if self.out.exists():
            self.out.rename(self._work / _RETIRED)
        self.folder.rename(self.out)
        sync(self.out.parent)
        _discard(self._work)

    def _record(self, part: str) -> Path:
        return self._parts / f"{part}.json"

    def _file(self, part: str) -> Path:
        return self._parts / f"{part}.safetensors"

    def _noted(self, part: str) -> dict[str, Any]:
        self.settle(part)
        return json.loads(self._record(part).read_text(encoding="utf-8"))

    def _save(self, tensors: dict[str, Tensor], path: Path) -> Written:
        """Write a safetensors file and read it again for its hashes, while it goes to the disk."""
        partial = path.with_name(f"{path.name}.partial")
        save_file(tensors, partial, metadata={"format": "pt"})
        shutil.copymode(self._work / _JOURNAL, partial)  # safetensors would keep it from all but its owner
        with ThreadPoolExecutor() as pool:
            synced, whole = pool.submit(sync, partial), pool.submit(file_sha256, partial)
            by_tensor = {name: tensor_sha256(stored) for name, stored in read_headers([partial]).items()}
            written = Written(whole.result(), by_tensor)
            synced.result()
        put(partial, path)
        return written

    def _check(self, part: str) -> None:
        """Raise Resumable where a part of an earlier run is not what it wrote."""
        self.settle(part)
        file = self._file(part)
        if part not in self._sound and file_sha256(file) != self._noted(part)["sha256"]:
            raise Resumable(
                f"{file} is damaged: it is not what was written; delete it and run the same command again to have "
                "this part made anew, or start over with --fresh"
            )
        self._sound.add(part)


@contextmanager
def staging(
    out: Path,
    key: Mapping[str, Any],
    *,
    source: Path,
    files: Iterable[Path] = (),
    fresh: bool,
    force: bool,
) -> Iterator[Staging]:
    """Open the staging folder of ``out`` for one run; ``key`` is everything that decides the result.

    A run that is killed, crashes or runs out of something leaves its finished layers for the next, and so does any that
    has finished them all; another that fails by a user's mistake leaves nothing. ``source`` is the model's own folder,
    which ``out`` must not replace, and ``files`` those in it that must not change under the run. Raises UserError where
    ``out`` exists and is not an lrc output (unless ``force``), where another run holds it, and where an unfinished run
    had another key (unless ``fresh``).
    """
    check_output(out, source=source, force=force)
    work = out.with_name(f".{out.name}.lrc-partial")
    with _locked(work, out):
        _recover(work, out)
        journal, parts = work / _JOURNAL, work / "parts"
        if fresh or not journal.exists():
            _clear(work)
        elif changed := _changed(json.loads(journal.read_text(encoding="utf-8")), key):
            if "model" not in changed:  # but perhaps its weights, and with them the text that it writes
                with watching(source, files, work / _SOURCES):
                    pass
            raise UserError(
                f"an unfinished run of {out} had other settings ({', '.join(changed)}); "
                "pass --fresh to start over, or the same settings to go on"
            )
        with _space(out):
            write_text(journal, json.dumps(key))
            parts.mkdir(exist_ok=True)
        _sweep(parts)
        try:
            # The sources go first: a part that still waits for their hashes is given up, one that does not is finished.
            with ThreadPoolExecutor(1) as writer, watching(source, files, work / _SOURCES) as sources:
                stage = Staging(out, work, sources, writer)
                yield stage
                stage.settle()
        except Exception as error:
            mistaken = isinstance(error, UserError) and not isinstance(error, Resumable)
            finished = any(parts.glob("*.json"))
            whole = (work / "checkpoint" / "config.json").exists()
            if journal.exists() and not whole and (mistaken or not finished):
                _discard(work)
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


def _changed(old: Any, new: Mapping[str, Any]) -> list[str]:
    plain = json.loads(json.dumps(new))
    return sorted(name for name in {*old, *plain} if old.get(name) != plain.get(name))


@contextmanager
def _locked(work: Path, out: Path) -> Iterator[None]:
    """Hold the staging folder's lock, which dies with its process."""
    while True:
        try:
            with _space(out):
                work.mkdir(parents=True, exist_ok=True)
                held = FileLock(work / "lock").acquire(blocking=False)
        except FileNotFoundError:  # another run has just finished, and its folder is gone
            continue
        except Timeout:
            raise UserError(
                f"another run is writing {out} (it holds {work}); wait for it or choose another --out"
            ) from None
        with held:
            yield
            return


def _recover(work: Path, out: Path) -> None:
    """Mend what a run left that was killed around its last rename."""
    shutil.rmtree(_doomed(work), ignore_errors=True)
    if (retired := work / _RETIRED).exists():
        if out.exists():
            shutil.rmtree(retired)
        else:
            retired.rename(out)


def _clear(work: Path) -> None:
    (work / _JOURNAL).unlink(missing_ok=True)  # first: what is left without it is no run
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _sweep(parts: Path) -> None:
    """Remove what a killed run had not finished writing, under whatever name."""
    for path in parts.iterdir():
        if not path.with_suffix(".json").exists() or path.suffix not in (".json", ".safetensors"):
            path.unlink()


def _discard(work: Path) -> None:
    """Remove a staging folder. It loses its name at once, as the next run may come before the last file is gone."""
    shutil.rmtree(_doomed(work), ignore_errors=True)
    work.rename(_doomed(work))
    shutil.rmtree(_doomed(work), ignore_errors=True)


def _doomed(work: Path) -> Path:
    return work.with_name(f"{work.name}.old")


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
        sync(target)


@contextmanager
def _space(out: Path) -> Iterator[None]:
    """Turn a full disk into a message; what was finished stays for the next run."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        for code, (what, remedy) in _FULL.items():
            if getattr(error, "errno", None) == code or f"(os error {code})" in str(error):
                raise OutOfResources(
                    f"{what}: {out.parent.resolve()}; {remedy} and run the same command again"
                ) from error
        raise
