"""Read an lrc output layer by layer, as solutions of the targets that it has reduced."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from lrc.checkpoint.reader import CheckpointReader
from lrc.checkpoint.staging import MANIFEST
from lrc.compression.assemble import restore
from lrc.errors import UserError
from lrc.families import canonical
from lrc.hub.quantizer import METHOD, LrcConfig
from lrc.methods.contract import Affine, Factors, Prediction, Solution
from lrc.modules.low_rank import EMBEDDING
from lrc.modules.table import Table
from lrc.records.compression import TargetRecord

_NOTHING = Prediction(0.0, 0.0, "output")


class Output:
    """The output of a compression: its ``records`` by layer and target, and its tensors, a layer at a time.

    Raises UserError if ``folder`` is no lrc output, or the output of another model than ``source``, which the user
    called ``name``. A target that was only refitted has no record.
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
        self._source, self._device = source, device
        path = folder / MANIFEST
        if not path.is_file():
            raise UserError(
                f"{folder} is no lrc output: it has no {MANIFEST}; --against takes the folder of one"
            )
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            made_of, fingerprint = manifest["model"]["source"], manifest["model"]["fingerprint"]
            records = TypeAdapter(list[TargetRecord]).validate_python(manifest["targets"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is damaged; see lrc verify {folder}") from None
        if fingerprint != source.fingerprint:
            raise UserError(
                f"{folder} was made of {made_of} (fingerprint {fingerprint[:12]}), and {name} has other weights or "
                f"another config.json ({source.fingerprint[:12]}); name the model that it was made of"
            )
        self.records = {(record.layer, record.target): record for record in records}
        self._reader = CheckpointReader(folder, quantized=METHOD, trust_remote_code=trust_remote_code)
        self._table: Table = LrcConfig(**self._reader.raw_config["quantization_config"]).modules

    def layer(self, index: int, state: Mapping[str, Tensor]) -> dict[str, Solution]:
        """Return a layer's reduced or refitted targets, given the original's tensors by path."""
        architecture, family = self._source.architecture, self._source.family
        start = f"{family.layers}.{index}."
        table = {p.removeprefix(start): e for p, e in self._table.items() if p.startswith(start)}
        tensors = {name: tensor.to(self._device) for name, tensor in self._reader.layer(index).items()}
        columns = tensors.get(f"{family.attention}.rotary_columns")

        def part(role: str) -> Affine | Factors | None:
            split = family.attention in table
            path = family.split_module(role) if split else family.projections[role].module
            return restore(table[path], _under(tensors, path)) if path in table else None

        found: dict[str, Solution] = {}
        for target in (target for layer, target in self.records if layer == index):
            parts = {role: each for role in architecture.targets[target].matrices if (each := part(role))}
            found[target] = Solution(parts, _NOTHING, columns if target == "qk" else None)
        covered = {role for solution in found.values() for role in solution.parts}
        for role in ("o", family.mlp_output):
            here = None if role in covered else part(role)
            if isinstance(here, Affine) and not _same(here, canonical(family, architecture, state, role)):
                found[role] = Solution({role: here}, _NOTHING)
        return found

    def outer(self, target: str) -> Solution | None:
        """Return what is stored for the embedding or the head; None if it is as it was."""
        if (None, target) not in self.records:
            return None
        path = self._source.family.outer[target]
        tensors = {name: tensor.to(self._device) for name, tensor in self._reader.rest().items()}
        here = _under(tensors, path)
        if self._table[path]["kind"] == EMBEDDING:
            part = Factors(EMBEDDING, {name: here[f"{name}.weight"] for name in ("A", "B")})
        else:
            part = restore(self._table[path], here)
        return Solution({target: part}, _NOTHING)


def _under(tensors: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    start = f"{path}."
    return {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}


def _same(part: Affine, original: tuple[Tensor, Tensor | None]) -> bool:
    weight, bias = original
    pairs = [(part.weight, weight)]
    if part.bias is not None and bias is not None:
        pairs.append((part.bias, bias))
    elif part.bias is not bias:
        return False
    return all(one.shape == other.shape and bool((one == other).all()) for one, other in pairs)
