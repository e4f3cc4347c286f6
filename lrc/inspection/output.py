"""Read an lrc output layer by layer, as solutions, and compare them with the original."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
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
from lrc.inspection.spectrum import neuron_scores
from lrc.maths.linalg import damped_cholesky, data_error
from lrc.methods.a3 import attention_output, diagonal_blocks
from lrc.methods.contract import (
    Affine,
    EmbeddingProblem,
    Factors,
    MLPProblem,
    OVProblem,
    Prediction,
    Problem,
    ProjectionProblem,
    QKProblem,
    Solution,
)
from lrc.methods.shared.pairs import input_moment, table_error
from lrc.methods.shared.scores import by_head
from lrc.modules.low_rank import EMBEDDING, LowRankLinear
from lrc.modules.table import Table
from lrc.moments.moment import Moment
from lrc.records.compression import TargetRecord
from lrc.walk.stream import below

_NOTHING = Prediction(0.0, 0.0, "output")
_ROUNDING = 0.02  # relative residual of a map of the original's values, rounded to bfloat16


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
            path = family.path(role, table)
            return restore(table[path], below(tensors, path)) if path in table else None

        found: dict[str, Solution] = {}
        for target in (target for layer, target in self.records if layer == index):
            parts = {role: each for role in architecture.targets[target].matrices if (each := part(role))}
            found[target] = Solution(parts, _NOTHING, columns if target == "qk" else None)
        covered = {role for solution in found.values() for role in solution.parts}
        for role in ("o", family.mlp_output):
            here, original = (
                None if role in covered else part(role),
                canonical(family, architecture, state, role),
            )
            if isinstance(here, Affine) and not all(map(_same, (here.weight, here.bias), original)):
                found[role] = Solution({role: here}, _NOTHING)
        return found

    def outer(self, target: str) -> Solution | None:
        """Return what is stored for the embedding or the head; None if it is as it was."""
        if (None, target) not in self.records:
            return None
        path = self._source.family.outer[target]
        tensors = {name: tensor.to(self._device) for name, tensor in self._reader.rest().items()}
        here = below(tensors, path)
        if self._table[path]["kind"] == EMBEDDING:
            part = Factors(EMBEDDING, {name: here[f"{name}.weight"] for name in ("A", "B")})
        else:
            part = restore(self._table[path], here)
        return Solution({target: part}, _NOTHING)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and bool((one == other).all())


@dataclass(frozen=True)
class Fidelity:
    """Fields of ``lrc.records.inspection.OutputErrors``, None where they are not defined."""

    reconstruction: float | None = None
    data_error: float | None = None
    overlap: float | None = None
    angle: float | None = None


def fidelity(problem: Problem, solution: Solution) -> Fidelity:
    """Compare a stored solution with the problem that it solves."""
    if isinstance(problem, ProjectionProblem):
        return _of_projection(problem, solution.parts[problem.role])
    if isinstance(problem, EmbeddingProblem):
        return _of_table(problem, solution.parts["embed"])
    if isinstance(problem, QKProblem):
        return _of_scores(problem, _affine(solution, "q"), _affine(solution, "k"))
    if isinstance(problem, OVProblem):
        return _of_values(problem, _affine(solution, "v"), _affine(solution, "o"))
    return _of_neurons(problem, solution)


def overlap(one: Tensor, other: Tensor) -> tuple[float, float]:
    """Return the mean squared cosine of the principal angles between two orthonormal bases (..., n, r), and the largest
    angle in degrees (Björck and Golub 1973).
    """
    cosines = torch.linalg.svdvals(one.mT @ other).clamp(max=1.0)
    return float(cosines.square().mean()), math.degrees(math.acos(float(cosines.min())))


def product_difference(left: Tensor, right: Tensor, new_left: Tensor, new_right: Tensor) -> Tensor:
    """Return ‖A B − A' B'‖² (...,) for A (..., m, r), B (..., r, n), A' (..., m, s), B' (..., s, n), without (m, n).

    It is ‖R Sᵀ‖² for [A, −A'] = Q R and [B; B']ᵀ = P S, which cancels within entries, not between sums of squares.
    """
    r = torch.linalg.qr(torch.cat([left, -new_left], dim=-1), mode="r").R
    s = torch.linalg.qr(torch.cat([right, new_right], dim=-2).mT, mode="r").R
    return (r @ s.mT).square().sum(dim=(-2, -1))


def _of_projection(problem: ProjectionProblem, part: Affine | Factors) -> Fidelity:
    weight, bias = problem.matrix.weight.double(), problem.matrix.bias
    if isinstance(part, Affine):
        new, new_bias, kept = part.weight.double(), part.bias, None
    else:
        factors = part.to(torch.float64)
        new, new_bias = factors.dense, part.bias
        kept = factors.tensors["A"] if part.kind == LowRankLinear.kind else None
    error = _affine_error(weight - new, _shift(bias, new_bias, weight), problem.input)
    reconstruction = _root((weight - new).square().sum(), weight.square().sum())
    data = _root(error, data_error(weight, problem.input.second))
    if kept is None:
        return Fidelity(reconstruction, data)
    low = damped_cholesky(input_moment(problem)).factor
    best = _top_inputs(weight @ low, len(kept))
    return Fidelity(reconstruction, data, *overlap(torch.linalg.qr((kept @ low).mT).Q, best))


def _of_table(problem: EmbeddingProblem, part: Affine | Factors) -> Fidelity:
    assert isinstance(part, Factors), "an embedding is stored as factors"
    table = problem.table.double()
    b, a = part.tensors["B"].double(), part.tensors["A"].double()
    lost = table - b @ a
    best = _top_inputs(problem.frequency.double().sqrt().unsqueeze(-1) * table, len(a))
    return Fidelity(
        _root(lost.square().sum(), table.square().sum()),
        table_error(problem, lost).relative,
        *overlap(torch.linalg.qr(a.mT).Q, best),
    )


def _of_scores(problem: QKProblem, new_q: Affine, new_k: Affine) -> Fidelity:
    heads = problem.heads
    q, k = _extended(problem.q, heads.heads), _extended(problem.k, heads.kv_heads)
    q_new, k_new = _extended(new_q, heads.heads), _extended(new_k, heads.kv_heads)

    def lost(left: Tensor, right: Tensor, new_left: Tensor, new_right: Tensor) -> float | None:
        """Of all heads together, each query head with the key head that it reads."""
        right, new_right = (each.repeat_interleave(heads.group, dim=0) for each in (right, new_right))
        return _relative_difference(left.mT, right, new_left.mT, new_right)

    weights = lost(q[..., :-1], k[..., :-1], q_new[..., :-1], k_new[..., :-1])
    low = damped_cholesky(_extended_moment(problem.input)).factor
    q, k, q_new, k_new = (each @ low for each in (q, k, q_new, k_new))
    # The best keys of this width for all queries that share them: right singular vectors of the stacked products.
    basis, right = torch.linalg.qr(k.mT)
    left = torch.linalg.qr(q.mT, mode="r").R.unflatten(0, (-1, heads.group))
    inner = _top_inputs((left @ right.mT.unsqueeze(1)).flatten(1, 2), k_new.shape[-2])
    kept = torch.linalg.qr(k_new.mT).Q
    return Fidelity(weights, lost(q, k, q_new, k_new), *overlap(kept, basis @ inner))


def _of_values(problem: OVProblem, new_v: Affine, new_o: Affine) -> Fidelity:
    heads, weight = problem.heads, problem.o.weight.double()
    readers, new_readers = (
        each.weight.double().unflatten(1, (heads.heads, -1)).transpose(0, 1) for each in (problem.o, new_o)
    )
    values, new_values = (
        each.weight.double().unflatten(0, (heads.kv_heads, -1)) for each in (problem.v, new_v)
    )
    shared = [each.repeat_interleave(heads.group, dim=0) for each in (values, new_values)]
    reconstruction = _relative_difference(readers, shared[0], new_readers, shared[1])
    maps = torch.linalg.lstsq(values.mT, new_values.mT).solution.mT  # (kv_heads, rank, D)
    if float((new_values - maps @ values).norm()) > _ROUNDING * float(new_values.norm()):
        return Fidelity(reconstruction)
    free, c = attention_output(problem)
    moment = problem.output.double()
    new_weight = new_o.weight.double() @ torch.block_diag(*maps.repeat_interleave(heads.group, dim=0))
    shift = weight @ (moment.mean - free.mean) + _shift(problem.o.bias, new_o.bias, weight)
    if new_v.bias is not None:
        by_value = new_v.bias.double().unflatten(0, (heads.kv_heads, -1))
        shift = shift - new_o.weight.double() @ by_value.repeat_interleave(heads.group, dim=0).flatten()
    data = _root(_affine_error(weight - new_weight, shift, free), data_error(weight, moment.second))
    own = diagonal_blocks(c, heads.heads).unflatten(0, (-1, heads.group)).mean(dim=1)
    low = damped_cholesky(own).factor
    stacked = readers.unflatten(0, (-1, heads.group)) @ low.unsqueeze(1)
    best = _top_inputs(stacked.flatten(1, 2), maps.shape[-2])
    return Fidelity(reconstruction, data, *overlap(torch.linalg.qr((maps @ low).mT).Q, best))


def _of_neurons(problem: MLPProblem, solution: Solution) -> Fidelity:
    kept = _kept_neurons(problem, solution)
    if kept is None:
        return Fidelity()
    weight, output = problem.output.weight.double(), _affine(solution, problem.output_role)
    delta = weight.clone()
    delta[:, kept] -= output.weight.double()
    error = _affine_error(delta, _shift(problem.output.bias, output.bias, weight), problem.hidden)
    best = neuron_scores(problem).topk(len(kept)).indices
    shared = float(torch.isin(kept, best).double().mean())
    return Fidelity(None, _root(error, data_error(weight, problem.hidden.second)), shared)


def _kept_neurons(problem: MLPProblem, solution: Solution) -> Tensor | None:
    """Return the indices (rank,) of the neurons that the output kept unchanged; None if it has others."""
    roles = list(problem.inputs)
    old = torch.cat([problem.inputs[role].weight for role in roles], dim=1)
    new = torch.cat([_affine(solution, role).weight for role in roles], dim=1).to(old)
    places = {row.tobytes(): i for i, row in enumerate(old.float().cpu().numpy())}
    found = [places.get(row.tobytes()) for row in new.float().cpu().numpy()]
    if None in found or len(set(found)) < len(found):
        return None
    return torch.tensor(found, device=old.device)


def _affine(solution: Solution, role: str) -> Affine:
    part = solution.parts[role]
    assert isinstance(part, Affine), "a component's projections are stored as plain matrices"
    return part


def _affine_error(delta: Tensor, shift: Tensor, moment: Moment) -> float:
    """Return E‖ΔW x + s‖² for a shift s (out,), about the mean so that nothing large cancels."""
    if not bool(shift.any()):
        return data_error(delta, moment.second)
    moment = moment.double()
    return data_error(delta, moment.centred) + float((delta @ moment.mean + shift).square().sum())


def _shift(old: Tensor | None, new: Tensor | None, weight: Tensor) -> Tensor:
    """Return b − b' (out,); a missing bias is zero."""
    nothing = weight.new_zeros(len(weight))
    return (nothing if old is None else old.double()) - (nothing if new is None else new.double())


def _extended(matrix: Affine, heads: int) -> Tensor:
    """Return [W, b] (heads, D, n + 1), for inputs with a last entry of one."""
    weight, bias = by_head(matrix, heads)
    return torch.cat([weight, bias.unsqueeze(-1)], dim=-1)


def _extended_moment(moment: Moment) -> Tensor:
    """Return E[[x; 1] [x; 1]ᵀ] (n + 1, n + 1)."""
    moment = moment.double()
    mean = torch.cat([moment.mean, moment.mean.new_ones(1)])
    return torch.cat([torch.cat([moment.second, mean[None, :-1]]), mean[:, None]], dim=1)


def _top_inputs(whitened: Tensor, rank: int) -> Tensor:
    """Return the top right singular vectors (..., n, r) of a map (..., m, n)."""
    rows, columns = whitened.shape[-2:]
    if rows < columns:
        top = torch.linalg.eigh(whitened @ whitened.mT).eigenvectors[..., -rank:]
        return torch.linalg.qr(whitened.mT @ top).Q
    return torch.linalg.eigh(whitened.mT @ whitened).eigenvectors[..., -rank:]


def _relative_difference(left: Tensor, right: Tensor, new_left: Tensor, new_right: Tensor) -> float | None:
    """Return ‖A B − A' B'‖ / ‖A B‖ over all leading dimensions together."""
    whole = product_difference(left, right, left[..., :0], right[..., :0, :]).sum()
    return _root(product_difference(left, right, new_left, new_right).sum(), whole)


def _root(error: Tensor | float, reference: Tensor | float) -> float | None:
    return math.sqrt(max(float(error), 0.0) / float(reference)) if reference > 0 else None
