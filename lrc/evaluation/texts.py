"""Choose and read the texts that a model is evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lrc.hub.names import default_texts
from lrc.text.datasets import DATASETS
from lrc.text.source import Missing, Text, data_folder, local_file, read_text


def evaluation_texts(
    model: str, asked: str | Sequence[str] | None, data_dir: Path | None
) -> tuple[list[Text], list[str]]:
    """Read the texts asked for, by default those of ``default_texts`` that can be had.

    Also returns a note for each default text that neither the data folder nor the hub has. Raises UserError for a text
    asked for that cannot be read, and if there is no default text at all.
    """
    if asked is not None:
        return [
            read_text(s, "evaluation", data_dir) for s in ([asked] if isinstance(asked, str) else asked)
        ], []
    found, missing = list[Text](), dict[str, Missing]()
    for name in default_texts(model):
        unreachable = [error for error in missing.values() if error.unreachable]
        if unreachable and local_file(DATASETS[name], "", "evaluation", data_folder(data_dir)) is None:
            missing[name] = unreachable[0]  # the hub would be asked in vain, for a long time
            continue
        try:
            found.append(read_text(name, "evaluation", data_dir))
        except Missing as error:
            missing[name] = error
    if not found:
        raise next(iter(missing.values()))
    return found, [f"perplexity without {name}: {error.reason}" for name, error in missing.items()]
