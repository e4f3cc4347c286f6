"""Lists the model families, and compares methods on tiny models of them that were trained on real text.

    python scripts/family_models.py page                       # prints docs/families.md
    python scripts/family_models.py compare --out build/families
    python scripts/family_models.py compare qwen3 gemma2 --out build/families --steps 400

A model is trained on bytes of the built-in calibration text; random weights would prove nothing. Then it is compressed
by a3 and by whitened_svd, and its divergence from the original is measured on the built-in held-out text.
"""

from __future__ import annotations

import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import lrc
from lrc.checkpoint.reader import CheckpointReader
from lrc.families import Architecture, Family, families, logit_rule

ASSETS = Path(lrc.__file__).with_name("assets")
KEEP, METHODS = 0.8, ("a3", "whitened_svd")
BLOCK, BATCH, PEAK = 64, 8, 1e-2
HEAD = """# Model families

`lrc` compresses causal language models of these `model_type`s, with transformers {version} as tested. The page is
printed by `python scripts/family_models.py page`, from what each family's file says of its tiny model. `tests/families`
holds every family to it. Nothing reduced gives the original's logits to the last bit, in float32 on a CPU. An output
that is loaded and saved again keeps every bit, and its perplexity is that of a plain transformers script. It generates
the same with caches, without and with left padding.

- *Components*: what can shrink as a whole. Where `qk` cannot, `q` and `k` shrink one by one, and a plan that names `qk`
  is refused with the reason.
- *Refit*: `exact` reaches the least squared error of the residual stream; `norm held` takes a norm behind the
  projection as linear, with its scale held.
- *Logit scale*: whether the final norm can scale the logits. It cannot in front of a soft cap.
- *First token*: whether every calibration block and every window starts with the tokenizer's BOS token.

| model_type | components | projections | refit | logit scale | first token | notes |
|---|---|---|---|---|---|---|
"""
TAIL = """
Tables: `embed` can be factorized in all of them, and `lm_head` where it is not tied to it. There is no export to stock
checkpoints yet. Of a multimodal `gemma3` checkpoint the decoder for text is compressed, and the output is a
`gemma3_text` model. Mixtures of experts, ALiBi (bloom, falcon), and models whose layers differ in shape are refused.
"""

Names = Annotated[list[str] | None, typer.Argument(help="Families (default: all).")]
Out = Annotated[Path, typer.Option(help="Where trained models go; those there are used again.")]
app = typer.Typer(add_completion=False, help=__doc__)


def byte_tokenizer(*, starts: bool = False) -> PreTrainedTokenizerFast:
    """Return a tokenizer whose ids are bytes, in the order of the byte-level alphabet; ``starts``: id 0 is BOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **({"bos_token": alphabet[0]} if starts else {})
    )


def tiny_model(name: str) -> PreTrainedModel:
    """Make the untrained tiny model of a family on bytes."""
    ids = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **families()[name].tiny, **ids))


def train(name: str, folder: Path, steps: int) -> float:
    """Train the tiny model of a family, save it, and return its last loss in nats."""
    torch.manual_seed(0)
    model, tokenizer = tiny_model(name), byte_tokenizer(starts=families()[name].starts_texts)
    text = (ASSETS / "calibration.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda at: min(1, (at + 1) / 20) * (1 - at / steps)
    )
    loss, generator = Tensor(), torch.Generator().manual_seed(0)
    for _ in range(steps):
        window = ids[torch.randint(len(ids) - BLOCK, (BATCH, 1), generator=generator) + torch.arange(BLOCK)]
        if families()[name].starts_texts:
            window[:, 0] = 0
        loss = model(input_ids=window, labels=window, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss.item()


def divergences(folder: Path, work: Path) -> dict[str, float]:
    """Return KL(original ‖ compressed) in nats per held-out token, by method, at the same kept weights."""
    found = {}
    for method in METHODS:
        plan = work / f"{method}.yaml"
        plan.write_text(
            f"format: 1\nkeep: {KEEP}\nmethod: {method}\nrefit: none\n"
            f"calibration: {{data: {ASSETS / 'calibration.txt'}, samples: 64, seq_len: {BLOCK}}}\n",
            encoding="utf-8",
        )
        run = lrc.Run(device="cpu")
        lrc.compress(folder, plan, out=work / method, ppl=[], run=run)
        held_out = str(ASSETS / "heldout.txt")
        (pair,) = lrc.evaluate_against(
            work / method, folder, held_out, seq_len=BLOCK, max_windows=64, run=run
        ).pairs
        assert pair.tokens is not None
        found[method] = pair.tokens.kl_mean.value
    return found


@app.command()
def compare(
    names: Names = None,
    out: Out = Path("build/families"),
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 400,
) -> None:
    """Train a tiny model of each family and print the divergence that each method causes at keep 0.8."""
    transformers.utils.logging.disable_progress_bar()
    typer.echo(f"| model_type | {' | '.join(METHODS)} |\n|---|{'---|' * len(METHODS)}")
    for name in names or sorted(families()):
        if not (out / name / "config.json").is_file():
            train(name, out / name, steps)
        with tempfile.TemporaryDirectory() as work:
            found = divergences(out / name, Path(work))
        typer.echo(f"| {name} | {' | '.join(f'{found[method]:.3g}' for method in METHODS)} |")


def row(family: Family, architecture: Architecture, *, capped: bool) -> str:
    """Return a family's row of docs/families.md."""
    components = [name for name in ("qk", "ov", "mlp") if name not in architecture.closed]
    summary = (import_module(f"lrc.families.{family.model_type}").__doc__ or "").strip()
    notes = [summary, *(f"No {name}: {reason}." for name, reason in architecture.closed.items())]
    cells = [
        f"`{family.model_type}`",
        " ".join(components),
        " ".join(architecture.matrices),
        "norm held" if family.halves[0].post_norm else "exact",
        "no" if capped else "yes",
        "yes" if family.starts_texts else "no",
        " ".join(notes),
    ]
    return f"| {' | '.join(cells)} |\n"


def page_text() -> str:
    """Return docs/families.md."""
    rows = []
    for name, family in sorted(families().items()):
        with tempfile.TemporaryDirectory() as folder:
            tiny_model(name).save_pretrained(folder)
            reader = CheckpointReader(Path(folder))
            capped = logit_rule(family, reader.config).cap is not None
            rows.append(row(family, reader.architecture, capped=capped))
    return HEAD.format(version=transformers.__version__) + "".join(rows) + TAIL


@app.command()
def page() -> None:
    """Print docs/families.md."""
    transformers.utils.logging.disable_progress_bar()
    sys.stdout.write(page_text())


if __name__ == "__main__":
    app()
