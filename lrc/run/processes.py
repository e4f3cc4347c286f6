"""Split, sum and send between the processes of one run, which torchrun or accelerate started.

Tensors on GPUs are sent by NCCL, everything else by gloo. Before each exchange the processes meet over gloo. A failed
process then sends its error to the others, and a process that ended is noticed at once.
"""

from __future__ import annotations

import os
import pickle
import re
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import reduce
from io import BytesIO
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lrc.errors import OutOfResources, ProcessEnded, UserError
from lrc.run.launcher import ProcessRank, own_rank

TIMEOUT = timedelta(minutes=10)  # the others wait while one process solves or writes alone
AGAIN = "run the same command again: a compression resumes where it stopped"

Split = TypeVar("Split", bound=Sequence[Any] | Tensor)
Item = TypeVar("Item")
Found = TypeVar("Found")
Number = TypeVar("Number", int, Tensor)


class Processes:
    """Connect this process with the others of its run; it is number ``rank`` of ``size``, ``local`` on its machine.

    A single process gets its arguments back. Several processes must call each method in the same order. An error in one
    of them is raised on all; ``ProcessEnded`` if one ended or does not answer.
    """

    def __init__(self, rank: ProcessRank, store: Store | None = None) -> None:
        self.rank, self.size, self.local = rank
        self.first, self.alone = self.rank == 0, self.size == 1  # the first writes files and prints
        self._store = store
        self._failed = False  # after a failure the processes no longer meet
        self._reports: bool | None = (
            None  # whether this process reports another's end; None before it notices
        )

    def mine(self, items: Split) -> Split:
        """Return this process's share of items that all have: every ``size``-th one."""
        return items[self.rank :: self.size]  # type: ignore[return-value]

    def gather_rows(self, part: Tensor) -> Tensor:
        """Gather the rows of a tensor that ``mine`` split along the first dimension, in order."""
        if self.alone:
            return part
        parts = self.gather(part)
        whole = part.new_empty(sum(map(len, parts)), *part.shape[1:])
        for rank, each in enumerate(parts):
            whole[rank :: self.size] = each
        return whole

    def sum(self, *tensors: Tensor) -> None:
        """Add up each contiguous tensor over all processes, in place."""
        self.meet()
        for tensor in tensors if not self.alone else ():
            self._try(lambda tensor=tensor: dist.all_reduce(tensor))

    def total(self, number: Number) -> Number:
        """Return the sum over all processes, added in the same order on each, so that its bits are the same."""
        return reduce(lambda one, other: one + other, self.gather(number))

    def gather(self, value: Item) -> list[Item]:
        """Return every process's value, by rank."""
        self.meet()
        return [self._broadcast(value, source) for source in range(self.size)]

    def share(self, value: Item, source: int = 0) -> Item:
        """Return the value of the process ``source``; those of others are ignored."""
        self.meet()
        return self._broadcast(value, source)

    def spread(self, items: Sequence[Item], work: Callable[[Item], Found]) -> Iterator[Found]:
        """Yield ``work(item)`` for each item in order; each process computes every ``size``-th and shares it."""
        for start in range(0, len(items), self.size):
            group = items[start : start + self.size]
            own: Any = work(group[self.rank]) if self.rank < len(group) else None
            for source in range(len(group)):
                yield self.share(own, source)

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Raise UserError on all processes if one would run with other settings than the first."""
        theirs = self.share(settings)
        if others := [name for name in {**theirs, **settings} if theirs.get(name) != settings.get(name)]:
            differing = f"process {self.rank} would run with another {' and '.join(others)} than process 0"
            raise UserError(f"{differing}; all processes need the same files and libraries")
        self.meet()

    def meet(self, failure: UserError | None = None) -> None:
        """Wait for every process; raise the first ``failure`` that any of them passes."""
        if self.alone or self._failed:
            return
        failed = torch.tensor(failure is not None, dtype=torch.uint8)
        flags = [torch.zeros_like(failed) for _ in range(self.size)]
        self._try(lambda: dist.all_gather(flags, failed))
        if any(flags):
            self._failed = True
            failures: list[Any] = [None] * self.size
            self._try(lambda: dist.all_gather_object(failures, failure))
            raise next(each for each in failures if each is not None)

    def ended(self, message: str) -> ProcessEnded:
        """Return an error about another process that ended; only the first process to notice that reports it."""
        error = ProcessEnded(f"{message}; {AGAIN}")
        if self._reports is None:
            self._reports = True
            with suppress(RuntimeError):  # the store was on the process that ended
                self._reports = self._store is None or self._store.add("lost", 1) == 1
        error.reported = not self._reports
        return error

    def _broadcast(self, value: Any, source: int) -> Any:
        """Send a value's pickle without its tensors, then the tensors in order.

        Tensors pickled with the object would take ten times as long, and CUDA tensors arrive on the sender's device.
        """
        if self.alone:
            return value

        def exchange(tensor: Tensor) -> Tensor:
            if tensor.numel():  # as bytes, which every backend carries
                self._try(lambda: dist.broadcast(tensor.view(-1).view(torch.uint8), source))
            return tensor

        tensors: list[Tensor] = []

        class Writer(pickle.Pickler):
            def persistent_id(self, obj: Any) -> Any:
                if not isinstance(obj, Tensor):
                    return None
                tensors.append(obj.contiguous())
                return tuple(obj.shape), obj.dtype, obj.device.type

        class Reader(pickle.Unpickler):
            def persistent_load(self, pid: tuple[Any, torch.dtype, str]) -> Tensor:
                shape, dtype, device = pid
                return exchange(torch.empty(shape, dtype=dtype, device=device))

        outline = BytesIO()
        if self.rank == source:
            Writer(outline).dump(value)
        held = [outline.getvalue()]
        self._try(lambda: dist.broadcast_object_list(held, source))
        if self.rank != source:
            return Reader(BytesIO(held[0])).load()
        for tensor in tensors:
            exchange(tensor)
        return value

    def _try(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:  # gloo and NCCL have no error class for it
            self._failed = True
            # Strip the place in the backend's source before the reason, and the advice after it.
            reason = re.sub(r"^\[[^]]*\] *", "", str(error).strip().splitlines()[0]).split(". ")[0]
            raise self.ended(
                f"another of the {self.size} processes of this run ended, or did not answer for "
                f"{TIMEOUT.seconds // 60} minutes (process {self.rank}: {reason})"
            ) from error


ALONE = Processes(ProcessRank())


@contextmanager
def launched() -> Iterator[Processes]:
    """Connect the processes that a launcher started until the context closes; ``ALONE`` without a launcher.

    A UserError in one process is raised on all. Any other exception keeps its type and traceback where it happened. If
    one process ends, the launcher stops the others by SIGTERM, which raises ``ProcessEnded`` here.
    """
    here = own_rank()
    if here.size == 1:
        yield ALONE
        return
    # After a restart the store holds addresses of processes that ended.
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise UserError("lrc supports no restarts by a launcher: use --max-restarts 0 and start again")
    by = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, *_ = next(rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(by, store=store, rank=here.rank, world_size=here.size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the {here.size} processes of this run do not find each other: {reason}") from error
    processes, connected = Processes(here, PrefixStore("lrc", store)), True

    def stop(*_: object) -> None:
        raise processes.ended("the launcher stopped this run (SIGTERM), as it does when a process ends")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield processes
        processes.meet()
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)  # None: not set by Python
    except BaseException as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the process ends now, with its message and exit code
        connected = isinstance(error, Exception) and not isinstance(error, ProcessEnded)
        if connected and isinstance(error, UserError):
            processes.meet(error)
        elif connected:
            reason = f"process {here.rank} of {here.size} failed with {type(error).__name__}: {error}"
            with suppress(UserError):
                processes.meet(OutOfResources(f"{reason}; its traceback is on its stderr; {AGAIN}"))
        raise
    finally:
        if connected or by == "gloo":  # NCCL would wait for processes that ended
            dist.destroy_process_group()
