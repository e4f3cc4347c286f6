"""Models of checkpoints in folders, loaded to be evaluated, whole where they fit, and let go."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lrc.checkpoint.headers import read_headers
from lrc.estimate.room import fits_whole
from lrc.evaluation.perplexity import Keep, Perplexity, evaluate_perplexity
from lrc.evaluation.streamed import StreamedModel
from lrc.hub.loader import load
from lrc.hub.tokenizer import load_tokenizer
from lrc.run.settings import Run, find_device, find_dtype

if TYPE_CHECKING:
    from lrc.evaluation.perplexity import Model


@dataclass(frozen=True)
class Loading:
    """How models are loaded to be evaluated.

    ``dtype``: what they run in, None being as they are stored. ``scratch``: where hidden states that are streamed and
    have no room in memory go. ``streamed``: a layer at a time, or whole; None is whole where they fit.
    """

    device: torch.device
    dtype: torch.dtype | None
    scratch: Path
    run: Run = Run()
    streamed: bool | None = None


def find_loading(run: Run, streamed: bool | None) -> Loading:
    """Return how a run loads models: by default as stored on a GPU, in float32 on a CPU.

    Raises UserError as ``find_device`` and ``find_dtype`` do.
    """
    place = find_device(run.device, run.processes)
    # On a CPU half precision is slow, and rounds unlike a GPU.
    as_stored = run.dtype is None and place.type != "cpu"
    precision = None if as_stored else find_dtype(run.dtype, place, torch.float32)
    return Loading(place, precision, Path(tempfile.gettempdir()), run, streamed)


def fit(folders: Iterable[Path], vocab: int, loading: Loading) -> bool:
    """Whether the models of folders fit on the device at once, whole; pickled ones are taken to.

    ``vocab``: entries of their vocabularies together, which say how large a batch's logits are.
    """
    stored = [*chain(*(read_headers(folder.glob("*.safetensors")).values() for folder in folders))]
    return not stored or fits_whole(stored, vocab, loading.dtype, loading.device)


@contextmanager
def loaded(folders: Sequence[Path], vocab: int, loading: Loading) -> Iterator[list[Model]]:
    """The models of folders until the context closes, all at once: whole where all fit, else each a layer at a time.

    ``vocab`` as for ``fit``. Raises UserError for a model that cannot be had.
    """
    trusted: dict[str, Any] = {
        "allow_pickle": loading.run.allow_pickle,
        "trust_remote_code": loading.run.trust_remote_code,
    }
    streamed = loading.streamed
    if streamed is None:
        streamed = not fit(folders, vocab, loading)
    models: list[Model] = []
    try:
        for folder in folders:
            models.append(
                StreamedModel(folder, loading.device, loading.dtype, loading.scratch, **trusted)
                if streamed
                else load(folder, device=loading.device, dtype=loading.dtype or "auto", **trusted)
            )
        yield models
    finally:
        # Models hold references to themselves: only the collector frees the memory for the next one.
        models.clear()
        gc.collect()


def evaluate_folder(
    path: Path,
    specs: list[str],
    loading: Loading,
    *,
    seq_len: int | Sequence[int] | None = None,
    max_windows: int | None,
    keep: Keep | None = None,
) -> list[Perplexity]:
    """Perplexities of a folder's model on each text of ``specs``, as ``evaluate_perplexity`` has them.

    Raises UserError for a model or a text that cannot be had.
    """
    tokenizer = load_tokenizer(path, trust_remote_code=loading.run.trust_remote_code)
    with loaded([path], len(tokenizer), loading) as models:
        return evaluate_perplexity(
            models[0],
            tokenizer,
            specs,
            data_dir=loading.run.data_folder,
            seq_len=seq_len,
            max_windows=max_windows,
            progress=loading.run.progress,
            keep=keep,
            ranks=loading.run.processes,
        )
