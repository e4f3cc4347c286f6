"""Load the models that are evaluated, whole or by layer, and free them."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from lrc.checkpoint.headers import read_headers
from lrc.estimate.room import fits_whole
from lrc.evaluation.passage import choose_seq_lens, passages
from lrc.evaluation.perplexity import Model, Perplexity, TokenWriter, measure
from lrc.evaluation.streamed import StreamedModel
from lrc.hub.loader import first_token, load, load_tokenizer
from lrc.run.settings import Run, find_device, find_dtype
from lrc.text.source import Text


@dataclass(frozen=True)
class Loading:
    """Say how models are loaded for an evaluation.

    ``dtype``: None means as stored. ``scratch``: the folder for hidden states on disk. ``streamed``: one layer at a
    time; None means only if the models do not fit whole.
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
    device = find_device(run.device, run.processes)
    # On a CPU half precision is slow, and rounds unlike a GPU.
    as_stored = run.dtype is None and device.type != "cpu"
    dtype = None if as_stored else find_dtype(run.dtype, device, torch.float32)
    return Loading(device, dtype, Path(tempfile.gettempdir()), run, streamed)


def fit(folders: Iterable[Path], vocab: int, loading: Loading) -> bool:
    """Tell whether the models of folders fit whole on the device at once; True for pickled ones, which have no headers.

    ``vocab``: the sum of their vocabularies, which gives the size of a batch's logits.
    """
    stored = [*chain(*(read_headers(folder.glob("*.safetensors")).values() for folder in folders))]
    return not stored or fits_whole(stored, vocab, loading.dtype, loading.device)


@contextmanager
def loaded(folders: Sequence[Path], vocab: int, loading: Loading) -> Iterator[list[Model]]:
    """Load the models of folders, all whole or all streamed, and free them when the context closes.

    ``vocab`` as for ``fit``. Raises UserError for a model that cannot be loaded.
    """
    device, dtype, run = loading.device, loading.dtype, loading.run
    trusted: dict[str, Any] = {"allow_pickle": run.allow_pickle, "trust_remote_code": run.trust_remote_code}
    streamed = not fit(folders, vocab, loading) if loading.streamed is None else loading.streamed
    models, advance = list[Model](), run.stage("load", len(folders))
    try:
        for folder in folders:
            models.append(
                StreamedModel(folder, device, dtype, loading.scratch, **trusted)
                if streamed
                else load(folder, device=device, dtype=dtype or "auto", **trusted)
            )
            advance(1)
        yield models
    finally:
        # Models hold references to themselves: only the collector frees the memory for the next one.
        models.clear()
        gc.collect()


def evaluate_folder(
    path: Path,
    texts: Sequence[Text],
    loading: Loading,
    *,
    seq_len: int | Sequence[int] | None = None,
    max_windows: int | None,
    keep: TokenWriter | None = None,
) -> list[Perplexity]:
    """Load a folder's model and measure its perplexity on each text.

    Windows are of each ``seq_len``. Every process of the run loads the model and runs its share of the windows. Every
    text is cut before the model runs. Raises UserError as ``choose_seq_lens`` and ``passages`` do.
    """
    run = loading.run
    tokenizer = load_tokenizer(path, trust_remote_code=run.trust_remote_code)
    with loaded([path], len(tokenizer), loading) as (model,):
        lengths = choose_seq_lens([("the model", model.config)], seq_len)
        rows = model.config.get_text_config().vocab_size
        first = first_token(model.config, tokenizer)
        cut = passages(tokenizer, texts, lengths, max_windows, rows, first)
        return [measure(model, passage, tokenizer, run, keep) for passage in cut]
