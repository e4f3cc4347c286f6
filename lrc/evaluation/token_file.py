"""Write results by token to a Parquet file, which appears under its name only when whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lrc.checkpoint.durable import check_file, put, sync, written
from lrc.errors import UserError
from lrc.evaluation.passage import Passage
from lrc.evaluation.perplexity import TokenWriter
from lrc.run.processes import ALONE, Processes

_ROWS = 2**18  # rows of a row group, rounded to whole windows
_PLACE = {
    "text": pa.dictionary(pa.int32(), pa.string()),
    "seq_len": pa.int32(),
    "window": pa.int32(),
    "position": pa.int32(),
    "token": pa.int32(),
}
_RESULTS = {"nll": pa.float32(), "nll_against": pa.float32(), "kl": pa.float32(), "agree": pa.bool_()}


@contextmanager
def token_file(
    path: str | Path | None, *, paired: bool, processes: Processes = ALONE
) -> Iterator[TokenWriter | None]:
    """Yield a function that adds a passage's results by token to a Parquet file, or None without a ``path``.

    The file gets its name when the context closes without an error; rank 0 writes it. Columns: ``text`` and ``seq_len``
    of the passage, ``window``, ``position`` in the window from 0 (which is not scored), ``token`` (its id) and ``nll``;
    if ``paired``, also ``nll_against``, ``kl`` and ``agree`` of ``Divergence``. Raises UserError if the file cannot be
    written or another file is there, and OutOfResources if the disk is full.
    """
    if path is None:
        yield None
        return
    path = Path(path)
    _check(path)
    if not processes.first:
        yield lambda passage, results: None
        return
    schema = pa.schema({**_PLACE, **(_RESULTS if paired else {"nll": _RESULTS["nll"]})})
    partial = path.with_name(f".{path.name}.partial")
    with written(path):
        writer = pq.ParquetWriter(partial, schema)

    def add(passage: Passage, results: Mapping[str, Tensor]) -> None:
        windows = max(_ROWS // (passage.seq_len - 1), 1)
        for start in range(0, len(passage.cut), windows):
            columns = _columns(passage, results, slice(start, start + windows))
            with written(path):
                writer.write_table(pa.table(columns, schema))

    try:
        yield add
        with written(path):
            writer.close()
            sync(partial)
            put(partial, path)
    finally:
        with suppress(OSError):  # the error of the full disk again
            writer.close()
        partial.unlink(missing_ok=True)


def _check(path: Path) -> None:
    check_file("--tokens", path)
    if path.suffix != ".parquet":
        raise UserError(f"--tokens {path} writes Parquet; name the file {path.with_suffix('.parquet')}")
    try:
        columns = pq.read_schema(path).names if path.exists() else [*_PLACE, "nll"]
    except (OSError, pa.ArrowException):
        columns = []
    if not {*_PLACE, "nll"} <= {*columns}:
        raise UserError(f"--tokens {path} exists and was not made by lrc eval; name another file")


def _columns(passage: Passage, results: Mapping[str, Tensor], rows: slice) -> dict[str, pa.Array]:
    ids = passage.cut[rows, 1:].int()
    windows = torch.arange(len(passage.cut), dtype=torch.int32)[rows, None].expand_as(ids)
    positions = torch.arange(1, passage.seq_len, dtype=torch.int32).expand_as(ids)
    found = {"window": windows, "position": positions, "token": ids}
    found |= {name: values[rows] for name, values in results.items()}
    return {
        "text": pa.DictionaryArray.from_arrays(pa.array([0] * ids.numel(), pa.int32()), [passage.data]),
        "seq_len": pa.array([passage.seq_len] * ids.numel(), pa.int32()),
        **{name: pa.array(values.reshape(-1).numpy()) for name, values in found.items()},
    }
