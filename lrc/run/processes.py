"""The processes of one run: each holds its part of the blocks, and they add up what they sum.

A launcher (torchrun, accelerate) starts them and says so in the environment. Tensors on GPUs travel by NCCL, all else
by gloo. Before they exchange anything the processes meet over gloo, where one that has failed tells the others why and
one that is dead is missed at once, so that none waits for what will not come.
"""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from io import BytesIO
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from lrc.errors import Lost, OutOfResources, UserError
from lrc.run.launcher import Place, place

TIMEOUT = timedelta(minutes=10)  # a process may solve or write alone, and the others wait as long for it
AGAIN = "run the same command again: a compression goes on where it stopped"

Split = TypeVar("Split", bound=Sequence[Any] | Tensor)
Item = TypeVar("Item")
Found = TypeVar("Found")
Number = TypeVar("Number", int, Tensor)


class Ranks:
    """All processes of a run and this one's place among them: ``rank`` of ``size``, ``local`` on its own machine.

    Alone, every operation gives back what it is given. Else all processes have to call it, in the same order; it raises
    what any of them failed with, on all of them, and ``Lost`` where one does not come.
    """

    def __init__(self, place: Place, store: Store | None = None) -> None:
        self.rank, self.size, self.local = place
        self._store = store
        self._parted = False  # after a failure there is nothing more to meet for

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    def mine(self, items: Split) -> Split:
        """This process's part of what all of them see: every ``size``-th, so that parts differ by one at most."""
        return items[self.rank :: self.size]  # type: ignore[return-value]

    def woven(self, part: Tensor) -> Tensor:
        """What ``mine`` took apart along the first dimension, put together again."""
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
        """A small sum over all processes, of the same bits on each, so that each may decide by it alike."""
        if self.alone:
            return number
        first, *others = self.gather(number)
        for other in others:
            first = first + other
        return first

    def gather(self, value: Item) -> list[Item]:
        """Every process's value, by rank."""
        if self.alone:
            return [value]
        self.meet()
        outline, tensors = _outlined(value)
        outlines: list[Any] = [None] * self.size
        self._try(lambda: dist.all_gather_object(outlines, outline))
        return [self._filled(each, tensors, source) for source, each in enumerate(outlines)]

    def share(self, value: Item, source: int = 0) -> Item:
        """What the process ``source`` has, which counts there alone."""
        if self.alone:
            return value
        self.meet()
        outline, tensors = _outlined(value) if self.rank == source else (b"", [])
        held = [outline]
        self._try(lambda: dist.broadcast_object_list(held, source))
        shared = self._filled(held[0], tensors, source)
        return value if self.rank == source else shared

    def spread(self, items: Sequence[Item], work: Callable[[Item], Found]) -> Iterator[Found]:
        """The ``work`` on every item in order, each done by one process in turn and shared; one in hand at a time."""
        for start in range(0, len(items), self.size):
            group = items[start : start + self.size]
            own: Any = work(group[self.rank]) if self.rank < len(group) else None
            for source in range(len(group)):
                yield self.share(own, source)

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Raise UserError, on all of them, where a process would run with other settings than the first."""
        theirs = self.share(settings)
        if others := [name for name in {**theirs, **settings} if theirs.get(name) != settings.get(name)]:
            raise UserError(
                f"process {self.rank} would run with another {' and '.join(others)} than process 0; all have to see "
                "the same files and libraries"
            )
        self.meet()

    def meet(self, failure: UserError | None = None) -> None:
        """Wait until every process is here, each with what it failed with, if it did; raises the first of those."""
        if self.alone or self._parted:
            return
        failed = torch.tensor(failure is not None, dtype=torch.uint8)
        flags = [torch.zeros_like(failed) for _ in range(self.size)]
        self._try(lambda: dist.all_gather(flags, failed))
        if any(flags):
            self._parted = True
            failures: list[Any] = [None] * self.size
            self._try(lambda: dist.all_gather_object(failures, failure))
            raise next(each for each in failures if each is not None)

    def first_to_miss(self) -> bool:
        """Whether this is the first process to find another lost, which is the one to tell."""
        try:
            return self._store is None or self._store.add("lost", 1) == 1
        except RuntimeError:  # it went with the one that is lost
            return True

    def _filled(self, outline: bytes, tensors: Sequence[Tensor], source: int) -> Any:
        """Return the value behind an outline; its tensors come from process ``source``, whose own are ``tensors``."""
        ranks = self

        class Reader(pickle.Unpickler):
            def persistent_load(self, pid: tuple[int, Any, torch.dtype, str]) -> Tensor:
                number, shape, dtype, device = pid
                sends = ranks.rank == source
                found = (
                    tensors[number].contiguous() if sends else torch.empty(shape, dtype=dtype, device=device)
                )
                if found.numel():  # as bytes, which every backend carries
                    ranks._try(lambda: dist.broadcast(found.view(-1).view(torch.uint8), source))
                return tensors[number] if sends else found

        return Reader(BytesIO(outline)).load()

    def _try(self, exchange: Callable[[], object]) -> None:
        try:
            exchange()
        except RuntimeError as error:  # gloo and NCCL have no error of their own for it
            self._parted = True
            # Without the place in their source that they begin with, and the advice after it.
            reason = re.sub(r"^\[[^]]*\] *", "", str(error).strip().splitlines()[0]).split(". ")[0]
            raise Lost(
                f"another of the {self.size} processes of this run ended, or did not answer for "
                f"{TIMEOUT.seconds // 60} minutes (process {self.rank}: {reason}); {AGAIN}"
            ) from error


ALONE = Ranks(Place())


@contextmanager
def launched() -> Iterator[Ranks]:
    """The processes that a launcher started this one among, until the context closes; one alone without a launcher.

    Where one of them fails the context raises the same UserError on all, except that a failure of ours keeps its
    traceback where it happened.
    """
    here = place()
    if here.size == 1:
        yield ALONE
        return
    # The store of a restart holds the addresses of those that are gone.
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        raise UserError(
            "a launcher's restarts are not supported; leave --max-restarts at 0 and start the command again"
        )
    by = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    try:
        store, *_ = next(rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(by, store=store, rank=here.rank, world_size=here.size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {here.size} processes of this run do not find each other: {str(error).splitlines()[0]}"
        ) from error
    ranks, whole = Ranks(here, PrefixStore("lrc", store)), True
    try:
        yield ranks
        ranks.meet()
    except Lost:
        whole = False
        raise
    except UserError as error:
        ranks.meet(error)
        raise
    except Exception as error:
        with suppress(UserError):
            ranks.meet(_of_ours(error, here))
        raise
    except BaseException:
        whole = False
        raise
    finally:
        if whole or by == "gloo":  # NCCL would wait for those that are gone
            dist.destroy_process_group()


def _of_ours(error: Exception, place: Place) -> UserError:
    """What the other processes are told of a failure that is no mistake of the user's."""
    reason = f"process {place.rank} of {place.size} failed with {type(error).__name__}: {error}"
    return OutOfResources(f"{reason}; its traceback is on its stderr; {AGAIN}")


def _outlined(value: Any) -> tuple[bytes, list[Tensor]]:
    """Pickle a value without its tensors, and return these in the order they stand in it.

    Tensors that are pickled within an object travel ten times slower, and CUDA ones arrive on the sender's device.
    """
    file, tensors = BytesIO(), list[Tensor]()

    class Writer(pickle.Pickler):
        def persistent_id(self, obj: Any) -> Any:
            if not isinstance(obj, Tensor):
                return None
            tensors.append(obj)
            return len(tensors) - 1, tuple(obj.shape), obj.dtype, obj.device.type

    Writer(file).dump(value)
    return file.getvalue(), tensors
