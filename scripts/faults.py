"""Does to compressions what machines do, and tells what came out: a Markdown table, and exit code 1 if anything failed.

    python scripts/faults.py                   # everything, about five minutes of CPU time
    python scripts/faults.py --quick           # what the tests run, half a minute: three kill points and what is quick
    python scripts/faults.py --kills 100 --seed 7 --only kill

Every run is a process of its own, forked from one that has only imported lrc. The product has no hook for this: the
child listens to Python's audit events for files that are opened, named, linked and removed in the folder of the output,
wraps ``os.fsync`` and safetensors' ``save_file``, and kills itself, or has the disk be full, at one of them.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import gc
import importlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ |= {
    "OMP_NUM_THREADS": "1",  # a process that has threads cannot be forked safely
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
}

import torch
from random_checkpoint import SHAPES, TOKENIZER, TOKENIZER_FILES, configuration, write

import lrc.cli
import lrc.compression.loop
import lrc.verbs.compress
import lrc.verbs.verify
from lrc.checkpoint import staging
from lrc.checkpoint.headers import parse_header
from lrc.hub.names import ASSETS

REPORTS = {"report.json", "report.md", "report.html", "README.md"}  # they have the seconds of a run
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
NAMED = ("open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir")
FILLING = (
    "open",
    "os.mkdir",
    "os.fsync",
    "save_file",
)  # what a full disk refuses; a link that fails is copied
# Half-way through the tensors of a layer, before its record has its name, and with the earlier output out of the way.
POINTS = ("save_file parts/layer-00002", "os.rename parts/layer-00001.json.partial", "os.rename checkpoint\n")
LAYERS = 4
SHAPES["deep"] = SHAPES["tiny"] | {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1000,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}

# All kinds of parts: sizes that are measured, an embedding, text that the model writes, gradients, refits.
PLAN = """\
format: 1
keep: 0.6
method: a3
allocate: energy
projections: {embed: {method: whitened_svd}}
calibration: {data: [synthetic, builtin], samples: 10, gradient_samples: 4, seq_len: 32}
"""
QUICK = """\
format: 1
keep: 0.6
method: a3
calibration: {samples: 9, gradient_samples: 2, seq_len: 32}
"""


class Failed(Exception):
    """Something came out as it should not."""


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the signal; what it printed; what it did to files and layers."""

    code: int
    told: str
    done: list[str]

    @property
    def solved(self) -> set[int]:
        """The layers that it solved."""
        return {int(line.split()[1]) for line in self.done if line.startswith("solve ")}

    def must(self, code: int, *words: str) -> Ended:
        """The same, where it ended with this code and said these words; raises Failed otherwise."""
        if self.code != code or not all(word in self.told for word in words):
            raise Failed(f"ended with {self.code}, not {code} and {words}: {self.told.strip()[-600:]}")
        if code == 2 and "Traceback" in self.told:
            raise Failed(self.told)
        return self


@dataclass(frozen=True)
class Case:
    """One compression in a folder of its own: ``model``, ``plan.yaml``, and from an earlier run ``out``."""

    folder: Path
    sharded: bool = False
    out: str = "out"
    options: tuple[str, ...] = ()

    @property
    def argv(self) -> list[str]:
        argv = ["compress", "model", "--plan", "plan.yaml", "--out", self.out, "--no-eval", "--device", "cpu"]
        return [*argv, *self.options]

    @property
    def work(self) -> Path:
        return self.folder / f".{self.out}.lrc-partial"

    @property
    def finished(self) -> set[int]:
        """Layers of the unfinished run that are finished."""
        return {int(path.stem.partition("-")[2]) for path in (self.work / "parts").glob("layer-*.json")}

    def start(self, prepare: Callable[[Listener], None] = lambda listener: None) -> Child:
        """Begin the compression in a child, once ``prepare`` has set its fault up there."""
        return Child(self, self.argv, prepare)

    def run(self, prepare: Callable[[Listener], None] = lambda listener: None) -> Ended:
        return self.start(prepare).wait()

    def resume(self) -> Ended:
        """Run to the end; raises Failed where that does not go well or a finished layer is solved again."""
        finished = self.finished
        ended = self.run().must(0)
        if again := finished & ended.solved:
            raise Failed(f"layers {sorted(again)} were finished, and were solved again")
        return ended

    def check(self) -> Ended:
        return Child(self, ["verify", self.out], lambda listener: None).wait()

    def same(self, reference: Path) -> None:
        """Raise Failed unless the output has the bytes of another, is sound, and nothing is left beside it."""
        found = {p.name: p.read_bytes() for p in (self.folder / self.out).iterdir() if p.name not in REPORTS}
        wanted = {p.name: p.read_bytes() for p in reference.iterdir() if p.name not in REPORTS}
        if found != wanted:
            names = sorted(n for n in {*found, *wanted} if found.get(n) != wanted.get(n))
            raise Failed(f"other bytes: {', '.join(names)}")
        if left := [path.name for path in self.folder.iterdir() if path.name.startswith(".")]:
            raise Failed(f"left behind: {', '.join(left)}")
        self.check().must(0, "sound")


class Listener:
    """In a child: notes every operation on files below a folder, and acts at one of them."""

    def __init__(self, root: Path, log: int) -> None:
        self._root, self._log = f"{root}/", log
        self._text, self._number = "", 0
        self._act: Callable[[str], None] = lambda line: None
        sys.addaudithook(self._hear)
        fsync, save, solve = os.fsync, staging.save_file, lrc.compression.loop.solve_layer

        def count_fsync(descriptor: int) -> None:
            self.note("os.fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
            fsync(descriptor)

        def count_save(tensors: Any, path: Path, **options: Any) -> None:
            self.note("save_file", os.path.abspath(path))
            save(tensors, path, **options)

        def count_solve(architecture: Any, plan: Any, *rest: Any) -> Any:
            self.note("solve", f"{self._root}{plan.index}")
            return solve(architecture, plan, *rest)

        os.fsync, staging.save_file, lrc.compression.loop.solve_layer = count_fsync, count_save, count_solve

    def at(self, text: str, number: int, act: Callable[[str], None]) -> None:
        """Do something before the ``number``-th operation whose line has a text in it."""
        self._text, self._number, self._act = text, number, act

    def note(self, what: str, path: str) -> None:
        if not path.startswith(self._root):
            return
        line = f"{what} {path.removeprefix(self._root)}"
        line = line.replace(".out.lrc-partial/", "")
        os.write(self._log, f"{line}\n".encode())
        if self._text in f"{line}\n":
            self._number -= 1
            if self._number == 0:
                self._act(line)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event not in NAMED or not isinstance(args[0], str | os.PathLike):
            return
        if event == "open" and not args[2] & WRITES:
            return
        beside = event in ("os.remove", "os.rmdir") and args[1] != -1  # of a folder that is being emptied
        self.note(event, f"{self._root}{args[0]}" if beside else os.path.abspath(os.fspath(args[0])))


class Child:
    """A forked process that runs one verb."""

    def __init__(self, case: Case, argv: list[str], prepare: Callable[[Listener], None]) -> None:
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 (read once the child has ended)
        told, log = (file.fileno() for file in self._files)
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.dup2(told, 1)
                os.dup2(told, 2)
                os.chdir(case.folder)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if case.sharded:
                    staging._SINGLE_FILE_BYTES = 0
                prepare(Listener(case.folder, log))
                code = verb(argv)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def wait(self) -> Ended:
        status = os.waitpid(self.pid, 0)[1]
        told, log = (os.pread(file.fileno(), 2**24, 0).decode() for file in self._files)
        for file in self._files:
            file.close()
        return Ended(os.waitstatus_to_exitcode(status), told, log.splitlines())


def verb(argv: list[str]) -> int:
    """Run the command line in this process; its exit code."""
    sys.argv = ["lrc", *argv]
    try:
        lrc.cli.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def kill(text: str, number: int) -> Callable[[Listener], None]:
    """Have a child kill itself before an operation; in a save, with half a file written as safetensors does."""

    def act(line: str) -> None:
        if line.startswith("save_file"):
            folder = Path(".out.lrc-partial") / Path(line.split()[1]).parent
            (folder / f".tmp{Path(line).name}").write_bytes(b"\0" * 1000)
        os.kill(os.getpid(), signal.SIGKILL)

    return lambda listener: listener.at(text, number, act)


def fill(text: str, number: int) -> Callable[[Listener], None]:
    """Have the disk of a child be full at an operation."""

    def act(line: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda listener: listener.at(text, number, act)


def flip(file: Path, at: int, *, times: bool = True) -> None:
    """Change one bit of a file, and leave its times as they were unless ``times``."""
    status, data = file.stat(), bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)
    if not times:
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


@dataclass
class Faults:
    """The faults, each a method that says what it did and raises Failed; cases are copies of one prepared folder."""

    root: Path
    quick: bool
    kills: int
    draw: random.Random
    rows: list[tuple[str, str, str]] = field(default_factory=list)
    _references: dict[bool, tuple[Path, list[str], float]] = field(default_factory=dict)

    def prepare(self) -> None:
        """Make the model that all cases share, and see what undisturbed runs come to."""
        if self.quick:
            lrc.verbs.compress.html_page = lambda report, others: ""
        in_child(lambda: make_model("tiny", self.root / "model"))
        warm(self.case())
        for sharded in (False, True):
            case = self.case(sharded)
            started = time.perf_counter()
            ended = case.run().must(0)
            seconds = time.perf_counter() - started
            self._references[sharded] = case.folder / "out", ended.done, seconds
            case.check().must(0, "sound")

    def case(self, sharded: bool = False, *, name: str = "case", older: bool = False) -> Case:
        """A new folder; with an output of an ``older`` run in the place of what is to be."""
        folder = Path(tempfile.mkdtemp(prefix=f"{name} ", dir=self.root))
        shutil.copytree(self.root / "model", folder / "model")
        (folder / "plan.yaml").write_text(QUICK if self.quick else PLAN, encoding="utf-8")
        if older:
            (folder / "out").mkdir()
            for file in ("lrc.json", "model.safetensors"):
                (folder / "out" / file).write_text("{}", encoding="utf-8")
        if not self.quick:
            return Case(folder, sharded)
        text = (ASSETS / "calibration.txt").read_text(encoding="utf-8")
        (folder / "text.txt").write_text(text[:20_000], encoding="utf-8")
        return Case(folder, sharded, options=("--calib", "text.txt"))

    def reference(self, case: Case) -> Path:
        return self._references[case.sharded][0]

    @contextmanager
    def row(self, fault: str, what: str) -> Iterator[None]:
        """A row of the table, of what goes on inside."""
        try:
            yield
        except Failed as error:
            self.rows.append((fault, what, f"FAILED: {error}"))
        else:
            self.rows.append((fault, what, "as it should"))
        print(f"{self.rows[-1][0]}: {self.rows[-1][2]}", file=sys.stderr, flush=True)

    def kill(self) -> None:
        """Killed at named points, at random operations, some of them twice, and at random moments."""
        for number, point in enumerate(POINTS):
            self._killed(self.case(bool(number % 2), older=True), [kill(point, 1)])
        if self.quick:
            return
        for number in range(self.kills):
            case = self.case(bool(number % 2), older=number % 3 == 0)
            operations = len(self._references[case.sharded][1])
            points = [self.draw.randrange(1, operations) for _ in range(1 + number % 4 // 3)]
            self._killed(case, [kill("", point) for point in points])
        for number in range(max(self.kills // 4, 1)):
            case = self.case(bool(number % 2), older=True)
            seconds = self.draw.uniform(0, self._references[case.sharded][2])
            with self.row("killed", f"by another process after {seconds:.2f} s"):
                child = case.start()
                time.sleep(seconds)
                os.kill(child.pid, signal.SIGKILL)
                child.wait()
                self._go_on(case)

    def _killed(self, case: Case, faults: list[Callable[[Listener], None]]) -> None:
        places = []
        ended = [case.run(fault) for fault in faults]
        for each in ended:
            places.append(f"at `{each.done[-1]}`" if each.code else "after its end")
        layout = "shards" if case.sharded else "one file"
        with self.row("killed", f"{', then '.join(places)} ({layout})"):
            for each in ended:
                if each.code not in (0, -signal.SIGKILL):
                    each.must(-signal.SIGKILL)
            self._go_on(case)

    def _go_on(self, case: Case) -> None:
        if (case.folder / "out").exists() and (case.folder / "out" / "config.json").exists():
            case.check().must(0, "sound")  # what has its name is whole
        case.resume()
        case.same(self.reference(case))

    def full(self) -> None:
        """The disk is full: for real on a small file system, by a limit on files, and at random operations."""
        limit = 100_000
        case = self.case()
        with self.row("disk full", f"no file may grow beyond {limit:,} bytes (RLIMIT_FSIZE)"):

            def bounded(listener: Listener) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

            case.run(bounded).must(2, "as large as files may", "run the same command again")
            self._go_on(case)
        for number in range(2 if self.quick else 8):
            case = self.case(bool(number % 2))
            lines = [line for line in self._references[case.sharded][1] if line.startswith(FILLING)]
            line = self.draw.choice(sorted(set(lines)))
            with self.row("disk full", f"ENOSPC at `{line}`"):
                case.run(fill(line, 1)).must(2, "the disk is full", "run the same command again")
                self._go_on(case)
        if not self.quick:
            self._full_tmpfs()

    def _full_tmpfs(self) -> None:
        """Three file systems, from one with room for half the output to one with room for all but the last copy."""
        size = sum(path.stat().st_size for path in self._references[False][0].iterdir())
        for small in (size // 2, size, size + size // 2):
            case = self.case()
            what = f"a file system of {small / 1e6:.1f} MB for {size / 1e6:.1f} MB, then a larger one"
            if not in_child(partial(mount, case.folder / "small", small)):
                self.rows.append(("disk full", what, "left out: no file system can be mounted here"))
                continue
            with self.row("disk full", what):
                if not in_child(partial(outgrow, case, small, 10 * size)):
                    raise Failed((case.folder / "told").read_text(encoding="utf-8"))
                shutil.rmtree(case.folder / "small")
                case.same(self.reference(case))

    def damaged_output(self) -> None:
        """One bit of an output, or the end of a shard: told by file and, in the values, by tensor."""
        case = self.case(sharded=True)
        shutil.copytree(self.reference(case), case.folder / "out")
        files = sorted(p for p in (case.folder / "out").iterdir() if p.name not in {*REPORTS, "lrc.json"})
        shards = [file for file in files if file.suffix == ".safetensors"]
        for file in [self.draw.choice(shards)] if self.quick else files:
            at = self.draw.randrange(file.stat().st_size)
            held = self._tensor_at(file, at)
            with self.row("output damaged", f"a bit of byte {at} of `{file.name}`"):
                flip(file, at)
                case.check().must(2, file.name, *([repr(held)] if held else []))
                flip(file, at)
                case.check().must(0)
        for file in shards[: 1 if self.quick else None]:
            data = file.read_bytes()
            length = self.draw.randrange(len(data))
            with self.row("output damaged", f"`{file.name}` cut to {length} bytes of {len(data)}"):
                file.write_bytes(data[:length])
                case.check().must(2, file.name, "cut")
                file.write_bytes(data)

    def damaged_source(self) -> None:
        """A shard of the source that is cut short, and one whose header is damaged: nothing is left behind."""
        case = self.case()
        shards = sorted((case.folder / "model").glob("*.safetensors"))
        for file in [self.draw.choice(shards)] if self.quick else shards:
            data = file.read_bytes()
            header = 8 + int.from_bytes(data[:8], "little")
            for length in (self.draw.randrange(header), self.draw.randrange(header, len(data))):
                with self.row("source damaged", f"`{file.name}` cut to {length} bytes of {len(data)}"):
                    file.write_bytes(data[:length])
                    case.run().must(2, file.name, "cut short")
            start = data.index(b'"data_offsets":[') + len(b'"data_offsets":[')
            with self.row("source damaged", f"a bit of byte {start} of the header of `{file.name}`"):
                file.write_bytes(data)
                flip(file, start)
                case.run().must(2, file.name, "damaged")
                if left := [
                    p.name for p in case.folder.iterdir() if p.name not in ("model", "plan.yaml", "text.txt")
                ]:
                    raise Failed(f"left behind: {left}")
            file.write_bytes(data)

    def changed(self) -> None:
        """A source, plan or text that changes between kill and resume: refused, and as it was, taken up."""
        weights = sorted(path.name for path in (self.root / "model").glob("*.safetensors"))
        for name, times in [
            (self.draw.choice(weights), True),
            (weights[-1], False),
            ("tokenizer.json", True),
        ]:
            case = self.case()
            file = case.folder / "model" / name
            data = file.read_bytes()
            at = self.draw.randrange(len(data) // 2, len(data)) if name in weights else data.index(b"\n")
            how = "" if times else ", its time of change set back"
            with self.row("source changed", f"one byte of `{name}` between kill and resume{how}"):
                case.run(kill("os.rename parts/layer-00001.json.partial", 1)).must(-signal.SIGKILL)
                if name in weights:
                    flip(file, at, times=times)
                else:
                    file.write_bytes(data[:at] + b" " + data[at:])
                kept = case.finished
                case.run().must(2, name, "has changed", "--fresh")
                if not kept or case.finished != kept:
                    raise Failed("finished layers are gone")
                file.write_bytes(data)
                self._go_on(case)
        case = self.case()
        with self.row("plan changed", "between kill and resume, and `--fresh`"):
            case.run(kill(POINTS[0], 1)).must(-signal.SIGKILL)
            plan = case.folder / "plan.yaml"
            text = plan.read_text(encoding="utf-8")
            plan.write_text(text.replace("0.6", "0.7"), encoding="utf-8")
            case.run().must(2, "other settings (plan", "--fresh")
            plan.write_text(text, encoding="utf-8")
            replace(case, options=(*case.options, "--fresh")).run().must(0)
            case.same(self.reference(case))

    def interrupted(self) -> None:
        """SIGINT: one message, and the same command goes on."""
        for number in range(1 if self.quick else 5):
            case = self.case(bool(number % 2), older=True)
            with self.row("SIGINT", f"after {number + 1 if number < LAYERS else 'all'} layers"):
                child = case.start()
                wait_for(lambda case=case, number=number: len(case.finished) > min(number, LAYERS - 1))
                os.kill(child.pid, signal.SIGINT)
                ended = child.wait()
                if ended.code != 0 or number < LAYERS - 1:
                    ended.must(130, "error: interrupted; run the same command again to resume")
                    if "Traceback" in ended.told:
                        raise Failed(ended.told)
                self._go_on(case)

    def two_at_once(self) -> None:
        """Two runs into one folder: the second is refused, and the first does not notice."""
        case = self.case()
        with self.row("two runs at once", "the second into the same folder, the first half-way"):
            first = case.start()
            wait_for(lambda: len(case.finished) > 1)
            os.kill(first.pid, signal.SIGSTOP)
            for options in ((), ("--fresh",), ("--force",)):
                second = replace(case, options=(*case.options, *options))
                second.run().must(2, "another run is writing out")
            os.kill(first.pid, signal.SIGCONT)
            first.wait().must(0)
            case.same(self.reference(case))

    def read_only(self) -> None:
        """An output in a folder that may not be written, by whoever permissions count for."""
        case = self.case()
        (case.folder / "closed").mkdir(mode=0o555)
        with self.row("read-only output", "`--out closed/out`"):
            replace(case, out="closed/out").run(lambda listener: heed_permissions()).must(
                2, "closed is read-only"
            )
            if any((case.folder / "closed").iterdir()):
                raise Failed("something was written")

    def strange_path(self) -> None:
        """Spaces and letters of other alphabets, in a run that is killed and goes on."""
        case = self.case(name="naïve 'Übung' & 模型 $HOME")
        with self.row("strange path", f"`{case.folder.name}`, killed and taken up"):
            case.run(kill(POINTS[1], 1)).must(-signal.SIGKILL)
            self._go_on(case)

    def huge_plan(self) -> None:
        """A rule for each of a thousand layers."""
        if self.quick:
            return
        case = self.case(name="deep")
        shutil.rmtree(case.folder / "model")
        in_child(lambda: make_model("deep", case.folder / "model"))
        rules = [f'  - {{match: "{i}", mlp: {{keep: {0.4 + i % 5 / 10:.1f}}}}}' for i in range(1000)]
        text = (
            "format: 1\nmethod: svd\nkeep: 0.6\nrefit: none\ncalibration: {samples: 2, seq_len: 8}\nlayers:\n"
        )
        (case.folder / "plan.yaml").write_text(text + "\n".join(rules) + "\n", encoding="utf-8")
        case = replace(case, options=("--calib", "builtin"))
        with self.row("huge plan", "1,000 rules for 1,000 layers; killed at the 500th layer and taken up"):
            case.run(kill("os.rename parts/layer-00499.json.partial", 1)).must(-signal.SIGKILL)
            case.resume()
            case.check().must(0, "sound")

    def long_line(self) -> None:
        """A calibration file of ten megabytes without a line break."""
        if self.quick:
            return
        case = self.case()
        words = (ASSETS / "calibration.txt").read_text(encoding="utf-8").split()
        text = " ".join(words)
        text = (text * (10_000_000 // len(text) + 1))[:10_000_000]
        (case.folder / "line.txt").write_text(text, encoding="utf-8")
        with self.row("long line", f"`--calib` a file of {len(text):,} characters in one line"):
            replace(case, options=("--calib", "line.txt")).run().must(0)
            case.check().must(0, "sound")

    def _tensor_at(self, file: Path, at: int) -> str | None:
        if file.suffix != ".safetensors":
            return None
        return next((n for n, held in parse_header(file).items() if held.offset <= at < held.end), None)


FAULTS = (
    "kill",
    "full",
    "damaged_output",
    "damaged_source",
    "changed",
    "interrupted",
    "two_at_once",
    "read_only",
    "strange_path",
    "huge_plan",
    "long_line",
)


def make_model(shape: str, out: Path) -> None:
    """A random checkpoint, a shard a layer, with a tokenizer."""
    write(out, configuration(shape, None, "float32"), torch.float32, torch.device("cpu"), seed=0)
    for pattern in TOKENIZER_FILES:
        for file in TOKENIZER.glob(pattern):
            shutil.copy(file, out)


def warm(case: Case) -> None:
    """Import here what a run and a check import, so that no child has to."""
    names = case.folder / "modules"

    def run() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.chdir(case.folder)
        verb(case.argv)
        verb(["verify", case.out])
        names.write_text("\n".join(sys.modules), encoding="utf-8")

    in_child(run)
    for name in names.read_text(encoding="utf-8").split("\n"):
        with suppress(Exception):  # names that are no modules
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # else every child looks through all modules, and copies the memory that they are in
    threads = {(path / "comm").read_text().strip() for path in Path("/proc/self/task").iterdir()}
    known = {
        Path("/proc/self/comm").read_text().strip(),
        "jemalloc_bg_thd",
    }  # an allocator's, which knows of forks
    if threads - known:
        raise Failed(f"imports have started threads, with which no process can be forked: {threads - known}")


def in_child(do: Callable[[], Any]) -> bool:
    """Whether something goes well in a process of its own; False too where it returns False."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = int(do() is False)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


def outgrow(case: Case, small: int, large: int) -> None:
    """Run a case on a file system that is too small, and again once that is large enough."""
    os.chdir(case.folder)
    os.dup2(os.open("told", os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    argv = replace(case, out="small/out").argv
    if not mount(case.folder / "small", small) or verb(argv) != 2:
        raise Failed("it did not end with 2 where the file system is too small")
    subprocess.run(["mount", "-o", f"remount,size={large}", "small"], check=True)
    if verb(argv) != 0:
        raise Failed("it did not go on where the file system is large enough")
    shutil.copytree("small/out", "out")


def mount(folder: Path, size: int) -> bool:
    """Mount a small file system in a name space of this process; False where that is not allowed."""
    new_user, new_mounts = 0x10000000, 0x00020000
    flags = new_mounts | (0 if os.getuid() == 0 else new_user)
    folder.mkdir(exist_ok=True)
    if ctypes.CDLL(None, use_errno=True).unshare(flags):
        return False
    private = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True)
    small = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    return not (private.returncode or subprocess.run(small, capture_output=True).returncode)


def heed_permissions() -> None:
    """Take from this process what lets root read and write whatever a file's mode says: CAP_DAC_OVERRIDE and
    CAP_DAC_READ_SEARCH, as effective and as permitted.
    """
    libc, version = ctypes.CDLL(None, use_errno=True), 0x20080522
    header, sets = (ctypes.c_uint32 * 2)(version, 0), (ctypes.c_uint32 * 6)()
    if libc.capget(header, sets) == 0:
        sets[0], sets[1] = (kept & ~0b110 for kept in (sets[0], sets[1]))
        if libc.capset(header, sets) == 0:
            return
    raise OSError(ctypes.get_errno(), "the capabilities of this process cannot be changed")


def wait_for(happened: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise Failed(f"nothing happened for {seconds} s")
        time.sleep(0.002)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="what takes seconds, with three kill points")
    parser.add_argument("--kills", type=int, default=20, help="random operations to be killed at")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--only", choices=FAULTS, action="append", help="of the faults; may be given again")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lrc-faults-") as folder:
        faults = Faults(Path(folder), arguments.quick, arguments.kills, random.Random(arguments.seed))
        faults.prepare()
        for name in arguments.only or FAULTS:
            getattr(faults, name)()
    print("| fault | what was done | what came out |\n|---|---|---|")
    for row in faults.rows:
        print(f"| {' | '.join(' '.join(cell.split()).replace('|', '/') for cell in row)} |")
    if any(outcome.startswith("FAILED") for *_, outcome in faults.rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
