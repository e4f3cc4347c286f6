"""Generate calibration text with the model itself.

A block follows one start token (``bos_token_id`` of config.json, else ``eos_token_id``), which is not in the block,
unless the model needs it at the start of every text.
Tokens are drawn from the full softmax at temperature 1; an end token stays in the block like any other. Token t of
block b is where a uniform number, a function of (seed, b, t) alone, falls in the float64 cumulative probabilities. So
blocks do not depend on the batch size, up to the rounding of the logits. Ids are never decoded.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lrc.errors import UserError
from lrc.estimate.memory import generating_memory
from lrc.estimate.room import free_bytes, memory_advice
from lrc.hub.loader import load, start_tokens
from lrc.modules.cache import cache_argument
from lrc.plan.job import Job
from lrc.run.processes import ALONE, Processes
from lrc.run.settings import Run, generating_batch
from lrc.run.stopwatch import Stopwatch
from lrc.text.blocks import batched, ids_sha256, uniforms
from lrc.text.corpus import Source
from lrc.text.datasets import SYNTHETIC


def synthesize(
    count: int,
    *,
    job: Job,
    device: torch.device,
    dtype: torch.dtype,
    run: Run,
    watch: Stopwatch,
    first: int | None = None,
) -> Source:
    """Generate ``count`` blocks of the job's seq_len; each process loads the model and generates its share.

    ``first``: the token that every block starts with, if the model needs one.

    Raises UserError if the model does not fit on the device, has no start token, or gives NaN.
    """
    batch = min(run.batch_size or generating_batch(job.plan.seq_len), count)
    needed, start = generating_memory(job, dtype, batch), start_token(job) if first is None else first
    if needed > (free := free_bytes(device)):
        raise UserError(
            f"synthetic calibration text is written by the whole model on {device}: it needs about {needed:,} bytes, "
            f"and {free:,} are free. Try --batch-size below {batch} or --dtype bfloat16; a text to calibrate on, such "
            "as --calib wikitext2 or a file, needs one layer at a time"
        )
    seed, seq_len = job.plan.plan.calibration.seed, job.plan.seq_len - (first is not None)
    with watch.stage("generate"):
        model = load(
            job.reader.folder,
            device=device,
            dtype=dtype,
            allow_pickle=run.allow_pickle,
            trust_remote_code=run.trust_remote_code,
        )
        steps = -(-len(run.processes.mine(range(count))) // batch) * seq_len
        advance = run.stage("generate", steps)
        try:
            with memory_advice(f"--batch-size below {batch}"):
                blocks = write_blocks(model, start, count, seq_len, seed, batch, advance, run.processes)
        finally:
            # Models hold references to themselves, so only the collector frees the memory.
            del model
            gc.collect()
    if first is not None:
        blocks = torch.cat([torch.full_like(blocks[:, :1], first), blocks], dim=1)
    settings = {"start": start, "temperature": 1.0, "ids_sha256": ids_sha256(blocks)}
    return Source(SYNTHETIC, blocks, settings)


def write_blocks(
    model: PreTrainedModel,
    start: int,
    count: int,
    seq_len: int,
    seed: int,
    batch_size: int,
    advance: Callable[[int], object],
    processes: Processes = ALONE,
) -> Tensor:
    """Return blocks (count, seq_len) that a model generates after ``start``, on the CPU.

    ``advance`` is called with the steps done. Raises UserError if logits are NaN or inf.
    """
    numbers = torch.stack([uniforms(seed, f"{SYNTHETIC}/{block}", seq_len) for block in range(count)])
    written = [_write(model, start, part, advance) for part in batched(processes.mine(numbers), batch_size)]
    return processes.gather_rows(torch.cat([torch.empty(0, seq_len, dtype=torch.int64), *written]))


@torch.no_grad()
def _write(model: PreTrainedModel, start: int, numbers: Tensor, advance: Callable[[int], object]) -> Tensor:
    """Return the blocks that uniform ``numbers`` (blocks, seq_len) choose."""
    numbers = numbers.to(model.device)
    ids = torch.empty(numbers.shape, dtype=torch.int64, device=model.device)
    last, cache, name = torch.full_like(ids[:, :1], start), None, cache_argument(model.forward)
    sound = torch.ones((), dtype=torch.bool, device=model.device)
    for t in range(ids.shape[1]):
        out = model(input_ids=last, use_cache=True, **{name: cache})
        cache = out[name]
        total = out.logits[:, -1].double().softmax(-1).cumsum(-1)
        sound &= total[:, -1].isfinite().all()
        last = torch.searchsorted(total, numbers[:, t : t + 1] * total[:, -1:], right=True)
        last = last.clamp_max(total.shape[1] - 1)  # NaN is found past the last token
        ids[:, t : t + 1] = last
        advance(1)
    if not sound:
        raise UserError(
            "the model's logits are NaN or inf while it writes calibration text; try --dtype float32"
        )
    return ids.cpu()


def start_token(job: Job) -> int:
    """Return the start token of config.json. Raises UserError if there is none in the vocabulary."""
    vocab = job.reader.architecture.vocab
    for token in start_tokens(job.reader.config):
        if 0 <= token < vocab:
            return token
    raise UserError(
        f"{job.reader.folder / 'config.json'} names no bos_token_id or eos_token_id among the {vocab} tokens, and "
        "synthetic text has to start with one; name one there, or calibrate on a text"
    )
