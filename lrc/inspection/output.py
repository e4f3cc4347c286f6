"""An lrc output read layer by layer, as solutions of the targets that it has reduced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrc.checkpoint.reader import CheckpointReader
from lrc.checkpoint.staging import MANIFEST
from lrc.compression.assemble import restore
from lrc.errors import UserError
from lrc.families import canonical
from lrc.hub.quantizer import METHOD, LrcConfig
from lrc.methods.contract import Affine, Factors, Prediction, Solution
from lrc.modules.embedding import EMBEDDING
from lrc.modules.table import Table

REFIT = "refit"  # what is done to a projection that was only fitted again
_NOTHING = Prediction(0.0, 0.0, "output")


class Output:
    """What a compression of a model wrote: its records by layer and target, and its tensors a layer at a time.

    Raises UserError where ``folder`` is no lrc output, and where it is one of another model than that of ``source``,
    which the user called ``name``.
    """

    def __init__(
        self,
        folder: Path,
        source: CheckpointReader,
        name: str,
        device: torch.device,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self._folder, self._source, self._device = folder, source, device
        manifest = _manifest(folder)
        model = manifest["model"]
        if model["fingerprint"] != source.fingerprint:
            raise UserError(
                f"{folder} was made of {model['source']} (fingerprint {model['fingerprint'][:12]}), and "
                f"{name} has other weights or another config.json ({source.fingerprint[:12]}); name the "
                "model that it was made of"
            )
        self._reader = CheckpointReader(folder, quantized=METHOD, trust_remote_code=trust_remote_code)
        self._table: Table = LrcConfig(**self._reader.raw_config["quantization_config"]).modules
        self._records = {(record["layer"], record["target"]): record for record in manifest["targets"]}

    def record(self, layer: int | None, target: str) -> dict[str, Any] | None:
        """What the manifest has of a target; None of one that was only fitted again."""
        return self._records.get((layer, target))

    def layer(self, index: int, state: Mapping[str, Tensor]) -> dict[str, Solution]:
        """What stands in the place of a layer's targets, by target, for the original's tensors by path."""
        architecture, family = self._source.architecture, self._source.family
        start = f"{family.layers}.{index}."
        table = {p.removeprefix(start): e for p, e in self._table.items() if p.startswith(start)}
        tensors = {name: tensor.to(self._device) for name, tensor in self._reader.layer(index).items()}
        columns = tensors.get(f"{family.attention}.rotary_columns")

        def part(role: str) -> Affine | Factors | None:
            split = family.attention in table
            path = family.split_module(role) if split else family.projections[role].module
            return restore(table[path], _under(tensors, path)) if path in table else None

        targets = [target for layer, target in self._records if layer == index]
        found: dict[str, Solution] = {}
        for target in targets:
            parts = {role: each for role in architecture.targets[target].matrices if (each := part(role))}
            found[target] = Solution(parts, _NOTHING, columns if target == "qk" else None)
        covered = {role for solution in found.values() for role in solution.parts}
        for role in ("o", family.mlp_output):
            here = None if role in covered else part(role)
            if isinstance(here, Affine) and not _same(here, canonical(family, architecture, state, role)):
                found[role] = Solution({role: here}, _NOTHING)
        return found

    def outer(self, target: str) -> Factors | Affine | None:
        """What stands in the place of the embedding or the head; None where it is as it was."""
        path = self._source.family.outer[target]
        if (None, target) not in self._records:
            return None
        tensors = {name: tensor.to(self._device) for name, tensor in self._reader.rest().items()}
        here = _under(tensors, path)
        if self._table[path]["kind"] == EMBEDDING:
            return Factors(EMBEDDING, {name: here[f"{name}.weight"] for name in ("A", "B")})
        return restore(self._table[path], here)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise UserError(f"{folder} is no lrc output: it has no {MANIFEST}; --against takes the folder of one")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        keys = {"layer", "target", "method", "size", "kept", "predicted", "measured"}
        sound = {"fingerprint", "source"} <= manifest["model"].keys()
        sound = sound and all(keys <= record.keys() for record in manifest["targets"])
    except (ValueError, KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{path} is damaged; see lrc verify {folder}")
    return manifest


def _under(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    start = f"{path}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _same(part: Affine, original: tuple[Tensor, Tensor | None]) -> bool:
    weight, bias = original
    if (part.bias is None) != (bias is None):
        return False
    same = part.weight.shape == weight.shape and bool((part.weight == weight).all())
    return same and (bias is None or part.bias is None or bool((part.bias == bias).all()))
