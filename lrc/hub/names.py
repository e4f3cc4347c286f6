"""Turn a model's path, built-in name, short name or hub id into a folder."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from lrc.errors import UserError, nearest

ASSETS = Path(__file__).parents[1] / "assets"
BUILTIN = ("tiny-gpt2", "tiny-llama")
ALLOW_PICKLE = "pass --allow-pickle to read pickled ones"
SHORT_NAMES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "llama-7b": "huggyllama/llama-7b",
    "llama-13b": "huggyllama/llama-13b",
    "llama-30b": "huggyllama/llama-30b",
    "llama-65b": "huggyllama/llama-65b",
    "llama-2-7b": "meta-llama/Llama-2-7b-hf",
    "llama-2-13b": "meta-llama/Llama-2-13b-hf",
    "llama-2-70b": "meta-llama/Llama-2-70b-hf",
    "llama-3-8b": "meta-llama/Meta-Llama-3-8B",
    "llama-3-70b": "meta-llama/Meta-Llama-3-70B",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
    "llama-3.1-70b": "meta-llama/Llama-3.1-70B",
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B",
}
# Config, weights, tokenizer, chat template, licence.
WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*"]
UNWANTED = ["*/*", "consolidated*"]  # the same weights in other formats


@dataclass(frozen=True)
class ResolvedModel:
    """Hold a model's folder, the name or id given for it, and the commit of a hub model."""

    path: Path
    source: str
    revision: str | None = None
    builtin: bool = False

    @property
    def name(self) -> str:
        """Return the last part of the source, for file names."""
        return Path(
            os.path.abspath(Path(self.source).expanduser())
        ).name  # of a link, not of what it points to


def resolve_model(
    name: str, *, revision: str | None = None, allow_pickle: bool = False, remedy: str = ALLOW_PICKLE
) -> ResolvedModel:
    """Find a model's folder; download it from the hub if it is not on this machine.

    Pickled weights (``.bin``) are downloaded only with ``allow_pickle``; ``remedy`` ends the message if there are no
    others. Raises UserError for an unknown name and for a repository that cannot be downloaded.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{name} is not a checkpoint: the folder has no config.json")
        return ResolvedModel(path, name)
    if path.is_file():
        raise UserError(f"{name} is a file; a model is the folder that holds config.json")
    if name in BUILTIN:
        return ResolvedModel(ASSETS / name, name, builtin=True)
    if name in SHORT_NAMES or re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        return _download(SHORT_NAMES.get(name, name), revision, allow_pickle, remedy)
    if "/" in name or name.startswith((".", "~")):
        raise UserError(f"there is no folder {name}")
    known = nearest(name, (*SHORT_NAMES, *BUILTIN))
    raise UserError(f"unknown model {name!r}; {known}, or a folder, or org/name")


def default_texts(model: str) -> tuple[str, ...]:
    """Return the default texts of an evaluation: ``builtin`` for built-in models and their outputs, else two texts."""
    return ("builtin",) if _is_builtin(model) else ("wikitext2", "c4")


def default_calibration(model: str) -> str:
    """Return the default calibration: ``builtin`` for built-in models and their outputs, else ``general``."""
    return "builtin" if _is_builtin(model) else "general"


def _is_builtin(model: str) -> bool:
    manifest = Path(model).expanduser() / "lrc.json"
    if manifest.is_file():
        model = json.loads(manifest.read_text(encoding="utf-8"))["model"]["source"]
    return model in BUILTIN


def _download(repository: str, revision: str | None, allow_pickle: bool, remedy: str) -> ResolvedModel:
    from huggingface_hub import errors, snapshot_download

    what = f"{repository} at revision {revision}" if revision else repository
    try:
        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=[*WANTED, "*.bin"] if allow_pickle else WANTED,
            ignore_patterns=UNWANTED,
        )
    except errors.GatedRepoError:
        message = f"{what} is gated: ask for access on its page at the hub, then run `hf auth login`"
    except errors.RevisionNotFoundError:
        message = f"{repository} has no revision {revision!r}"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        message = f"there is no folder and no public model {repository} on the Hugging Face hub"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, ConnectionError):
        message = f"{what} is not on this machine and the Hugging Face hub cannot be reached; pass a folder"
    except errors.HfHubHTTPError as error:
        message = f"{what} cannot be downloaded: {error}"
    except OSError as error:
        message = f"{what} cannot be stored: {error}"
    else:
        path = Path(folder)
        if not any(path.glob("*.safetensors")) and not allow_pickle:
            raise UserError(f"{what} has no safetensors weights; {remedy}")
        return ResolvedModel(path, repository, path.name)
    raise UserError(message)
