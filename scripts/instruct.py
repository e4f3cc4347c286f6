"""How compressed instruct models answer the prompts of instruct.yaml, beside their original.

    python scripts/instruct.py smollm2-135m-instruct small smaller --show 5

Every model answers every prompt with the most likely tokens, through the original's chat template. A row of the table
has three shares of a model's answers:

- "end properly": not empty, and ended by the model before the limit of tokens.
- "of like length": in tokens, within a factor of two of the original's.
- "repeat": have the same four tokens in a row more than four times.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
import yaml

from lrc.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lrc.run.settings import Run

PROMPTS = Path(__file__).with_suffix(".yaml")
NEW_TOKENS = 128
GRAM, TIMES = 4, 4  # an answer that holds one sequence of so many tokens more often than this repeats itself
FACTOR = 2

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Written:
    """An answer: its tokens without the end token, its text, and whether the model ended it before the limit."""

    ids: tuple[int, ...]
    text: str
    ended: bool


@dataclass(frozen=True)
class Row:
    """Shares of a model's answers that end properly, are as long as the original's, and repeat themselves."""

    model: str
    proper: float
    like: float
    repeating: float


@app.command()
def main(
    original: Annotated[str, typer.Argument(help="The original: an instruct model, as for lrc eval.")],
    folders: Annotated[list[str], typer.Argument(help="Compressed models.")],
    show: Annotated[int, typer.Option(min=0, help="Print the first N answers side by side.")] = 0,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = NEW_TOKENS,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that run at once.")] = 25,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Precision, as stored by default; float32 on a CPU.")
    ] = None,
) -> None:
    """Answer the prompts by the original and by compressed models, and compare the answers."""
    from rich.console import Console

    from lrc.report.table import table
    from lrc.run.settings import Run

    prompts = [
        prompt for each in yaml.safe_load(PROMPTS.read_text(encoding="utf-8")).values() for prompt in each
    ]
    try:
        written = answer(
            [original, *folders], prompts, new_tokens, batch_size, Run(device=device, dtype=dtype)
        )
    except UserError as error:
        raise typer.BadParameter(str(error)) from None
    names, console = [original, *folders], Console(highlight=False, emoji=False)
    rows = [row(name, answers, written[0]) for name, answers in zip(names, written, strict=True)]
    shown = (
        {
            "model:w": each.model,
            "end properly:n": f"{each.proper:.0%}",
            "of like length:n": f"{each.like:.0%}",
            "repeat:n": f"{each.repeating:.0%}",
        }
        for each in rows
    )
    console.print(table(shown, f"{len(prompts)} prompts, at most {new_tokens} new tokens").on_screen())
    for place, prompt in enumerate(prompts[:show]):
        console.print(f"\n{prompt}", markup=False)
        for name, answers in zip(names, written, strict=True):
            console.print(f"  {name}: {plain(answers[place])}", markup=False)


def answer(
    models: Sequence[str], prompts: Sequence[str], new_tokens: int, batch_size: int, run: Run
) -> list[list[Written]]:
    """Return the answers of each model, loaded one after another; the first is the original."""
    from lrc.evaluation.folder import find_loading, loaded
    from lrc.hub.loader import load_tokenizer
    from lrc.hub.names import resolve_model

    paths = [resolve_model(model).path for model in models]
    tokenizer, loading = load_tokenizer(paths[0]), replace(find_loading(run, None), streamed=False)
    if not tokenizer.chat_template:
        raise UserError(f"{models[0]} has no chat template; name an instruct model as ORIGINAL")
    found = []
    for path in paths:
        with loaded([path], len(tokenizer), loading) as (model,):
            found.append([*write(cast("PreTrainedModel", model), tokenizer, prompts, new_tokens, batch_size)])
            del model  # leaves room for the next one
    return found


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    new_tokens: int,
    batch_size: int,
) -> Iterator[Written]:
    """Yield a model's answers."""
    from lrc.evaluation.answers import continue_prompts, encode_prompt

    config = model.config.get_text_config()
    left = iter([encode_prompt(tokenizer, prompt, True, config.vocab_size) for prompt in prompts])
    while batch := [*islice(left, batch_size)]:
        longest, limit = max(map(len, batch)), getattr(config, "max_position_embeddings", None)
        if limit is not None and longest + new_tokens > limit:
            raise UserError(
                f"a prompt of {longest} tokens leaves {limit - longest} of the model's {limit} positions for the "
                f"answer; use at most --new-tokens {max(limit - longest, 0)}"
            )
        for ids, ended in continue_prompts(model, batch, new_tokens):
            yield Written(tuple(ids), str(tokenizer.decode(ids, skip_special_tokens=True)).strip(), ended)


def row(model: str, answers: Sequence[Written], originals: Sequence[Written]) -> Row:
    """Return the shares of a model's answers."""
    pairs = [(len(mine.ids), len(theirs.ids)) for mine, theirs in zip(answers, originals, strict=True)]
    count = len(answers)
    return Row(
        model,
        sum(each.ended and bool(each.text) for each in answers) / count,
        sum(max(pair) <= FACTOR * min(pair) for pair in pairs) / count,
        sum(repeats(each.ids) for each in answers) / count,
    )


def repeats(ids: Sequence[int]) -> bool:
    """Tell whether an answer repeats itself."""
    grams = Counter(zip(*(ids[start:] for start in range(GRAM)), strict=False))
    return max(grams.values(), default=0) > TIMES


def plain(answer: Written) -> str:
    """Return an answer as one line, without the control characters that a damaged model may write."""
    line = "".join(c if c.isprintable() else " " for c in answer.text)
    return line + ("" if answer.ended else " …")


if __name__ == "__main__":
    app()
