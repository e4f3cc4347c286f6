"""Stage a checkpoint in a hidden folder beside its final name; resume it after a crash, and rename it when whole.

``.NAME.lrc-partial/`` holds the run's journal, its lock, its times, hashes of its source, the finished ``parts/`` and
``checkpoint/``, which is assembled from them and becomes NAME. Each part is synced to the disk before its record is
written, so a power cut costs no more than a kill. An earlier output NAME moves into the folder during that rename. The
folder is removed when the run ends, so that an evaluation of NAME can be resumed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrc.checkpoint.durable import put, sync, write_text
from lrc.checkpoint.hashes import Sources, file_sha256, tensor_sha256, watching
from lrc.checkpoint.headers import StoredTensor, read_headers
from lrc.errors import OutOfResources, Resumable, UserError
from lrc.run.offload import on_host
from lrc.run.processes import Processes

_SINGLE_FILE_BYTES = 2 * 1024**3
MANIFEST = "lrc.json"
INDEX = "model.safetensors.index.json"
_JOURNAL, _SOURCES, _RETIRED = "run.json", "sources.json", "retired"
_CHECKPOINT, _PUBLISHED, _TIMES = "checkpoint", "published", "times.json"
_FULL = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("your quota of the disk is used up", "free some space"),
    errno.EFBIG: ("a file has grown as large as files may", "raise the limit (ulimit -f)"),
}


class Staging:
    """Hold one run's staging folder, opened by ``staging``: ``folder`` becomes the checkpoint, ``scratch`` is deleted.

    ``folder`` is ``out`` once ``published``. Parts are written in the background, one at a time, so that at most one
    waits in memory.
    """

    _pending: tuple[str, Future[None]] | None  # the part that is being written

    def __init__(self, out: Path, scratch: Path, sources: Sources, writer: Executor) -> None:
        self.out, self.scratch, self.published = out, scratch, _published(scratch, out)
        self.folder = out if self.published else scratch / _CHECKPOINT
        self._parts, self._sources = scratch / "parts", sources
        self._sound: set[str] = set()  # parts that this run wrote, or has verified
        self._weights: dict[str, dict[str, Any]] = {}  # hashes by file of the checkpoint
        self._writer, self._pending = writer, None

    def has(self, part: str) -> bool:
        """Tell whether a part was finished by this run or the one it resumes."""
        self.settle(part)
        return self._record(part).exists() and self._file(part).exists()

    @property
    def finished(self) -> set[str]:
        """The names of the finished parts on the disk."""
        return {path.stem for path in self._parts.glob("*.json") if self._file(path.stem).exists()}

    def record(self, part: str) -> dict[str, Any]:
        return self._noted(part)["record"]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Return the tensors of a finished part; raise Resumable if its file is damaged."""
        return load_file(self._checked(part))

    def headers(self, part: str) -> dict[str, StoredTensor]:
        self.settle(part)
        return read_headers([self._file(part)])

    def write(self, part: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Store a part in the background; ``tensors`` must not change any more.

        An error is raised by the next call of any method: Resumable if a source file has changed.
        """
        held = on_host(tensors)
        self.settle()
        self._pending = part, self._writer.submit(self._write, part, held, dict(record))

    def _write(self, part: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> None:
        with _space(self.out):
            self._record(part).unlink(missing_ok=True)  # exists only if someone deleted the tensors
            hashes = self._save(tensors, self._file(part))
            self._sources.settle()
            write_text(self._record(part), json.dumps({"record": record, **hashes}, allow_nan=False))
        self._sound.add(part)

    def settle(self, part: str | None = None) -> None:
        """Wait for the pending write, of ``part`` if given, and raise its error."""
        if self._pending and part in (None, self._pending[0]):
            (_, written), self._pending = self._pending, None
            written.result()

    def assemble(self, parts: list[str]) -> None:
        """Lay the parts out as a Hugging Face checkpoint: one file if small, else one shard for each part and an index.

        Replaces what a killed run assembled. Raises Resumable for a damaged part.
        """
        self.settle()
        files = [self._checked(part) for part in parts]
        self.folder, self.published = self.scratch / _CHECKPOINT, False
        with _space(self.out):
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self.folder.mkdir()
            if sum(file.stat().st_size for file in files) <= _SINGLE_FILE_BYTES:
                merged = {name: tensor for file in files for name, tensor in load_file(file).items()}
                self._weights = {"model.safetensors": self._save(merged, self.folder / "model.safetensors")}
                return
            for number, (part, file) in enumerate(zip(parts, files, strict=True), 1):
                name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
                try:
                    os.link(file, self.folder / name)
                except OSError:  # a file system without hard links
                    self.copy(file, name)
                self._weights[name] = self._noted(part)
        stored = read_headers(self.folder / name for name in self._weights)
        weight_map = {key: tensor.file.name for key, tensor in sorted(stored.items())}
        total = sum(tensor.bytes for tensor in stored.values())
        self.write_json(INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def write_json(self, name: str, content: Any) -> None:
        self.write_file(name, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_file(self, name: str, text: str) -> None:
        """Write a text file of the checkpoint."""
        with _space(self.out):
            write_text(self.folder / name, text)

    def copy(self, path: Path, name: str) -> None:
        """Copy a file into the checkpoint, such as the source's tokenizer."""
        with _space(self.out):
            shutil.copyfile(path, self.folder / name)
            sync(self.folder / name)

    def hashes(self) -> dict[str, Any]:
        """Return the SHA-256 of the source's and the output's files so far, and of the output's tensors by file.

        Raises Resumable if a source file has changed.
        """
        files = {
            path.name: self._weights[path.name]["sha256"] if path.name in self._weights else file_sha256(path)
            for path in sorted(self.folder.iterdir())
        }
        tensors = {file: hashes["tensors"] for file, hashes in self._weights.items()}
        return {"source": self._sources.settle(), "files": files, "tensors": tensors}

    def publish(self) -> None:
        """Rename the finished folder to its final name; replace an earlier output."""
        with _space(self.out):
            write_text(self.scratch / _PUBLISHED, file_sha256(self.folder / MANIFEST))
        sync(self.folder)
        if self.out.exists():
            self.out.rename(self.scratch / _RETIRED)
        self.folder.rename(self.out)
        sync(self.out.parent)
        shutil.rmtree(self.scratch / _RETIRED, ignore_errors=True)
        self.folder, self.published = self.out, True

    @property
    def times(self) -> dict[str, Any]:
        """Return what ``write_times`` stored last, in this process or an earlier one of the run."""
        path = self.scratch / _TIMES
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def write_times(self, times: Mapping[str, Any]) -> None:
        """Store the times of the run so far; a power cut may lose the latest."""
        partial = self.scratch / f"{_TIMES}.partial"
        with _space(self.out):
            partial.write_text(json.dumps(times, allow_nan=False), encoding="utf-8")
            partial.replace(self.scratch / _TIMES)

    def _record(self, part: str) -> Path:
        return self._parts / f"{part}.json"

    def _file(self, part: str) -> Path:
        return self._parts / f"{part}.safetensors"

    def _noted(self, part: str) -> dict[str, Any]:
        self.settle(part)
        return json.loads(self._record(part).read_text(encoding="utf-8"))

    def _save(self, tensors: dict[str, Tensor], path: Path) -> dict[str, Any]:
        """Write a safetensors file; return the SHA-256 of what the disk holds, of the file and by tensor."""
        partial = path.with_name(f"{path.name}.partial")
        save_file(tensors, partial, metadata={"format": "pt"})
        shutil.copymode(self.scratch / _JOURNAL, partial)  # safetensors gives only the owner access
        with ThreadPoolExecutor() as pool:
            synced, whole = pool.submit(sync, partial), pool.submit(file_sha256, partial)
            by_tensor = {name: tensor_sha256(stored) for name, stored in read_headers([partial]).items()}
            hashes = {"sha256": whole.result(), "tensors": by_tensor}
            synced.result()
        put(partial, path)
        return hashes

    def _checked(self, part: str) -> Path:
        """Return the file of a finished part; raise Resumable if an earlier run's is damaged."""
        self.settle(part)
        file = self._file(part)
        if part not in self._sound and file_sha256(file) != self._noted(part)["sha256"]:
            remedy = "delete it and run the same command again, or pass --fresh to start over"
            raise Resumable(f"{file} is damaged; {remedy}")
        self._sound.add(part)
        return file


class SharedStaging:
    """Hold the finished parts of a run, the same on all processes; ``own`` is the folder on rank 0, None elsewhere.

    ``record`` and ``tensors`` are collective: every process calls them in the same order.
    """

    out: Path
    scratch: Path
    _finished: set[str]  # by this run or the one it resumes; shared once, so that ``has`` exchanges nothing

    def __init__(self, own: Staging | None, processes: Processes) -> None:
        self.own, self._processes = own, processes
        found = own and (own.out, own.scratch, own.finished)
        self.out, self.scratch, self._finished = processes.share(found)  # type: ignore[misc]

    def has(self, part: str) -> bool:
        """Tell whether this run, or the run that it resumes, finished a part; any process may ask alone."""
        return part in self._finished

    def record(self, part: str) -> dict[str, Any]:
        return self._processes.share(self.own.record(part) if self.own else {})

    def tensors(self, part: str) -> dict[str, Tensor]:
        """Return the tensors of a finished part, on the CPU."""
        return self._processes.share(self.own.tensors(part) if self.own else {})

    def write(self, part: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Store a part; every process calls this with the same part, and rank 0 stores its own arguments."""
        if self.own:
            self.own.write(part, tensors, record)
        self._finished.add(part)


@contextmanager
def staging(
    out: Path, key: Mapping[str, Any], *, source: Path, files: Iterable[Path] = (), fresh: bool, force: bool
) -> Iterator[Staging]:
    """Open the staging folder of ``out`` for one run; ``key`` is everything that decides the result.

    The folder is removed once a published run ends without an error. Finished parts stay for the next run, unless a
    UserError ends this one before all are finished. ``source`` is the model's folder; ``files`` in it must not change
    during the run. Raises UserError if ``out`` is no lrc output (unless ``force``), if another run holds it, and if an
    unfinished run had another key (unless ``fresh``).
    """
    check_output(out, source=source, force=force)
    work = out.with_name(f".{out.name}.lrc-partial")
    with _locked(work, out):
        _recover(work, out)
        journal, parts = work / _JOURNAL, work / "parts"
        resumed, new = journal.exists() and not fresh, json.loads(json.dumps(key, allow_nan=False))
        old = json.loads(journal.read_text(encoding="utf-8")) if resumed else {}
        if not resumed:
            journal.unlink(missing_ok=True)  # first: without it the rest is ignored
            for path in work.iterdir():
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name != "lock":
                    path.unlink()
        elif changed := sorted(name for name in {*old, *new} if old.get(name) != new.get(name)):
            # Changed weights change synthetic text too, and have their own message.
            if "model" not in changed:
                with watching(source, files, work / _SOURCES):
                    pass
            raise UserError(
                f"an unfinished run of {out} had other settings ({', '.join(changed)}); "
                "pass --fresh to start over, or the same settings to resume"
            )
        with _space(out):
            write_text(journal, json.dumps(key, allow_nan=False))
            parts.mkdir(exist_ok=True)
        for path in parts.iterdir():  # what a killed run did not finish
            if not path.with_suffix(".json").exists() or path.suffix not in (".json", ".safetensors"):
                path.unlink()
        try:
            # Sources close before the writer: a part that still waits for their hashes is dropped, others are finished.
            with ThreadPoolExecutor(1) as writer, watching(source, files, work / _SOURCES) as sources:
                stage = Staging(out, work, sources, writer)
                yield stage
                stage.settle()
            if stage.published:
                _discard(work)
        except Exception as error:
            mistaken = isinstance(error, UserError) and not isinstance(error, Resumable)
            finished = any(parts.glob("*.json"))
            whole = (work / _CHECKPOINT / "config.json").exists() or _published(work, out)
            if journal.exists() and not whole and (mistaken or not finished):
                _discard(work)
            raise


def check_output(out: Path, *, source: Path, force: bool) -> None:
    """Raise UserError if an output folder must not be written or replaced, such as the model in ``source``."""
    if not out.parent.is_dir():
        raise UserError(f"cannot write {out}: the folder {out.parent} does not exist")
    if not os.access(out.parent, os.W_OK):
        raise UserError(f"cannot write {out}: the folder {out.parent} is read-only")
    if out.is_file():
        raise UserError(f"cannot write {out}: it is a file; choose another --out")
    if out.exists() and not (out / MANIFEST).is_file() and not force:
        raise UserError(f"{out} exists and is not an lrc output; choose another --out or pass --force")
    if source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"cannot replace {out}: it is, or holds, the model that is being compressed")
    if out.exists() and Path.cwd().resolve().is_relative_to(out.resolve()):
        raise UserError(f"cannot replace {out}: it is, or holds, the current folder")


@contextmanager
def _locked(work: Path, out: Path) -> Iterator[None]:
    """Hold the staging folder's lock; the system frees it with the process."""
    while True:
        try:
            with _space(out):
                work.mkdir(parents=True, exist_ok=True)
                held = FileLock(work / "lock").acquire(blocking=False)
        except FileNotFoundError:  # another run has just finished and removed the folder
            continue
        except Timeout:
            message = f"another run is writing {out} (it holds {work}); wait for it or choose another --out"
            raise UserError(message) from None
        with held:
            yield
            return


def _recover(work: Path, out: Path) -> None:
    """Repair the folders of a run that was killed around its last rename."""
    shutil.rmtree(_doomed(work), ignore_errors=True)
    if (retired := work / _RETIRED).exists():
        if out.exists():
            shutil.rmtree(retired)
        else:
            retired.rename(out)


def _published(work: Path, out: Path) -> bool:
    """Tell whether the checkpoint of the run in ``work`` has its final name."""
    noted, manifest = work / _PUBLISHED, out / MANIFEST
    if (work / _CHECKPOINT).exists() or not (noted.exists() and manifest.exists()):
        return False
    return noted.read_text(encoding="utf-8") == file_sha256(manifest)


def _discard(work: Path) -> None:
    """Remove a staging folder; rename it first, as the next run may start before the last file is removed."""
    shutil.rmtree(_doomed(work), ignore_errors=True)
    work.rename(_doomed(work))
    shutil.rmtree(_doomed(work), ignore_errors=True)


def _doomed(work: Path) -> Path:
    return work.with_name(f"{work.name}.old")


@contextmanager
def _space(out: Path) -> Iterator[None]:
    """Raise OutOfResources if the disk is full; finished parts stay."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        for code, (what, remedy) in _FULL.items():
            if getattr(error, "errno", None) == code or f"(os error {code})" in str(error):
                message = f"{what}: {out.parent.resolve()}; {remedy} and run the same command again"
                raise OutOfResources(message) from error
        raise
