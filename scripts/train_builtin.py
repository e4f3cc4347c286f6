"""Makes the built-in texts, tokenizer and models of lrc from a folder of public-domain novels.

    python scripts/train_builtin.py texts --data-dir DATA
    python scripts/train_builtin.py tokenizer --data-dir DATA
    python scripts/train_builtin.py train tiny-gpt2 tiny-llama --device cuda --steps 2600

DATA holds novels/train.txt.xz and novels/valid.txt. Needs torch, transformers, tokenizers, numpy and typer.
"""

from __future__ import annotations

import json
import lzma
import math
import re
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

ASSETS = Path("lrc/assets")
IDS = Path("build/train-ids.npy")

CALIBRATION_EXCERPTS, CALIBRATION_CHARS = 8, 70_000
HELDOUT_CHARS = 400_000
# Half of the novels are hard-wrapped with no blank line between paragraphs, so a line that closes a sentence
# is the one sign of a paragraph's end that all of them share.
PARAGRAPH_END = re.compile(r"[.!?][\"']?\n")

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
POSITIONS = 512
EVAL_WINDOW = 256
SEED = 1729

GPT2 = GPT2Config(
    vocab_size=VOCABULARY,
    n_positions=POSITIONS,
    n_embd=192,
    n_layer=4,
    n_head=4,
    resid_pdrop=0.0,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    bos_token_id=0,
    eos_token_id=0,
)
LLAMA = LlamaConfig(
    vocab_size=VOCABULARY,
    max_position_embeddings=POSITIONS,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)
MODELS = {"tiny-gpt2": (GPT2LMHeadModel, GPT2, 2e-3), "tiny-llama": (LlamaForCausalLM, LLAMA, 3e-3)}

DataDir = Annotated[Path, typer.Option(help="Folder that holds novels/train.txt.xz and novels/valid.txt.")]
AssetsDir = Annotated[Path, typer.Option(help="Where the texts and the tokenizer are, or are written to.")]
IdsFile = Annotated[Path, typer.Option(help="The tokenised training text, a uint16 .npy file.")]

app = typer.Typer(add_completion=False, help=__doc__)


def read_train(data_dir: Path) -> str:
    with lzma.open(data_dir / "novels/train.txt.xz", "rt", encoding="utf-8") as file:
        return file.read()


def excerpt(text: str, start: int, chars: int) -> str:
    """Whole paragraphs, about `chars` characters, from the first that begins after `start` (0: at once)."""
    first = 0 if start == 0 else next(PARAGRAPH_END.finditer(text, start)).end()
    return text[first : next(PARAGRAPH_END.finditer(text, first + chars)).end()].strip("\n") + "\n"


@app.command()
def texts(data_dir: DataDir, assets: AssetsDir = ASSETS) -> None:
    """Write calibration.txt (excerpts spread over the training novels) and heldout.txt (unseen novels)."""
    train = read_train(data_dir)
    valid = (data_dir / "novels/valid.txt").read_text(encoding="utf-8")
    starts = [len(train) * i // CALIBRATION_EXCERPTS for i in range(CALIBRATION_EXCERPTS)]
    calibration = "\n".join(excerpt(train, start, CALIBRATION_CHARS) for start in starts)
    assets.mkdir(parents=True, exist_ok=True)
    (assets / "calibration.txt").write_text(calibration, encoding="utf-8")
    (assets / "heldout.txt").write_text(excerpt(valid, 0, HELDOUT_CHARS), encoding="utf-8")


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


@app.command()
def tokenizer(data_dir: DataDir, assets: AssetsDir = ASSETS, ids: IdsFile = IDS) -> None:
    """Train the byte-level BPE, save it in every model folder, and write the tokenised training text."""
    text = read_train(data_dir)
    trained = train_tokenizer(text)
    for name in MODELS:
        trained.save_pretrained(assets / name)
    ids.parent.mkdir(parents=True, exist_ok=True)
    np.save(ids, np.array(trained.backend_tokenizer.encode(text).ids, dtype=np.uint16))


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over the first 4 %, then a cosine down to 1 % of the peak."""
    warm_up = max(1, steps // 25)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def optimizer_for(model: PreTrainedModel, peak: float, device: torch.device) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices alone."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.95), fused=device.type == "cuda")


def fit(model: PreTrainedModel, ids: Tensor, steps: int, batch: int, peak: float) -> float:
    """Train in place on random windows of `ids` (1-D, on the model's device); the last step's loss."""
    device = ids.device
    optimizer = optimizer_for(model, peak, device)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    generator = torch.Generator(device).manual_seed(SEED)
    offsets = torch.arange(POSITIONS, device=device)
    loss = torch.zeros(())
    model.train()
    for step in range(steps):
        starts = torch.randint(len(ids) - POSITIONS, (batch, 1), generator=generator, device=device)
        window = ids[starts + offsets].long()
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=window, labels=window, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        if step % max(1, steps // 20) == 0:
            typer.echo(f"  step {step:6d}  loss {loss.item():.4f}")
    return loss.item()


def windows(ids: Tensor) -> Tensor:
    """`ids` as non-overlapping rows of EVAL_WINDOW tokens, the rest dropped."""
    return ids[: len(ids) // EVAL_WINDOW * EVAL_WINDOW].view(-1, EVAL_WINDOW)


@torch.inference_mode()
def perplexity(model: PreTrainedModel, rows: Tensor) -> float:
    """exp of the mean negative log-likelihood of tokens 2..n of every row."""
    total = 0.0
    for part in rows.split(32):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1]
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum"
        ).item()
    return math.exp(total / rows[:, 1:].numel())


def unigram_perplexity(train_ids: Tensor, rows: Tensor) -> float:
    """Perplexity of the same tokens under the training text's add-one smoothed token frequencies."""
    counts = torch.bincount(train_ids.long(), minlength=VOCABULARY).double() + 1
    return math.exp(-(counts / counts.sum()).log()[rows[:, 1:].flatten()].mean().item())


def heldout_rows(assets: Path, name: str) -> Tensor:
    text = (assets / "heldout.txt").read_text(encoding="utf-8")
    return windows(torch.tensor(AutoTokenizer.from_pretrained(assets / name)(text)["input_ids"]))


def evaluate(folder: Path, rows: Tensor, device: torch.device) -> float:
    """Held-out perplexity in float32 of the weights as saved."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map=device).eval()
    return perplexity(model, rows.to(device))


def record(path: Path, name: str, figures: dict[str, Any]) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, name: figures}, indent=2, sort_keys=True) + "\n")


def train_one(name: str, ids: Tensor, steps: int, batch: int, assets: Path, out: Path) -> None:
    model_class, config, peak = MODELS[name]
    torch.manual_seed(SEED)
    model = model_class(config).to(ids.device)
    typer.echo(f"{name}: {model.num_parameters():,} parameters, {steps * batch * POSITIONS:,} tokens")
    started = time.perf_counter()
    loss = fit(model, ids, steps, batch, peak)
    seconds = time.perf_counter() - started
    model.half().save_pretrained(out / name)

    rows = heldout_rows(assets, name)
    figures = {
        "parameters": model.num_parameters(),
        "steps": steps,
        "batch": batch,
        "window": POSITIONS,
        "peak_learning_rate": peak,
        "seed": SEED,
        "tokens_seen": steps * batch * POSITIONS,
        "tokens_in_text": len(ids),
        "seconds": round(seconds, 1),
        "last_train_loss": round(loss, 4),
        "heldout_window": EVAL_WINDOW,
        "heldout_windows": len(rows),
        "heldout_perplexity": round(evaluate(out / name, rows, ids.device), 4),
        "unigram_perplexity": round(unigram_perplexity(ids.cpu(), rows), 4),
        "device": torch.cuda.get_device_name() if ids.is_cuda else "cpu",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    record(out / "training.json", name, figures)
    typer.echo(json.dumps(figures, indent=2))


@app.command()
def train(
    names: Annotated[list[str], typer.Argument(help=" or ".join(MODELS))],
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda.")] = "cpu",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 2600,
    batch: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 128,
    assets: AssetsDir = ASSETS,
    ids: IdsFile = IDS,
    out: Annotated[Path, typer.Option(help="Where the models and training.json go.")] = ASSETS,
) -> None:
    """Train models, save them as float16, and record their held-out perplexity in training.json."""
    if unknown := sorted(set(names) - set(MODELS)):
        raise typer.BadParameter(f"{', '.join(unknown)}; known: {', '.join(MODELS)}")
    # int32, as CUDA cannot index uint16 tensors
    train_ids = torch.from_numpy(np.load(ids).astype(np.int32)).to(device)
    for name in names:
        train_one(name, train_ids, steps, batch, assets, out)


@app.command()
def check(
    names: Annotated[list[str], typer.Argument(help=" or ".join(MODELS))],
    assets: AssetsDir = ASSETS,
) -> None:
    """Evaluate saved models again on the CPU, beside the recorded perplexity."""
    recorded = json.loads((assets / "training.json").read_text())
    for name in names:
        reached = evaluate(assets / name, heldout_rows(assets, name), torch.device("cpu"))
        typer.echo(f"{name}: reached {reached:.4f}, recorded {recorded[name]['heldout_perplexity']:.4f}")


if __name__ == "__main__":
    app()
