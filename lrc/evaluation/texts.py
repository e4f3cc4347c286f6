"""Choose and read the texts that a model is evaluated on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lrc.hub.names import default_texts
from lrc.text.datasets import DATASETS
from lrc.text.source import Missing, Text, data_folder, local_file, read_text


def evaluation_texts(model: str, asked: str | Sequence[str] | None, data_dir: Path | None) -> list[Text]:
    """Read the texts asked for, by default those of ``default_texts`` that can be read.

    A default text that neither the data folder nor the hub has is a note of the others. Raises UserError for a text
    asked for that cannot be read, and if there is no default text at all.
    """
    if asked is not None:
        return [read_text(s, "evaluation", data_dir) for s in ([asked] if isinstance(asked, str) else asked)]
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
    notes = tuple(f"{name} is not measured: {error.reason}" for name, error in missing.items())
    return [replace(text, notes=(*text.notes, *notes)) for text in found]
