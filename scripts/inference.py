"""Tokens per second of compressed models of a shape against the dense one, with random weights and no calibration.

    python scripts/inference.py llama-7b --keeps 0.8,0.6 --methods a3,whitened_svd      # the table of docs/results.md
    python scripts/inference.py llama-7b --layers 8 --modes graphs,compile              # with fused kernels besides
    python scripts/inference.py llama-7b --fusion none,first,both                       # what merging brings
    python scripts/inference.py llama-7b --fuse-dense                                   # and what it brings to both
    python scripts/inference.py tiny --device cpu --write outputs                       # to try it, and keep the models

The weights are drawn where they run. A compressed model has the modules that ``lrc compress`` would store for the plan
``{format: 1, keep: KEEP, method: METHOD}``. As in ``lrc bench`` it is fused (``lrc.fuse``), while the dense model runs
as transformers runs it unless ``--fuse-dense`` is there, and samples of both are taken in turn.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from random_checkpoint import SHAPES, STD, configuration
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lrc.benchmark.cases import make_cases, parse_shapes
from lrc.benchmark.measure import measure, weigh
from lrc.compression.assemble import assemble
from lrc.families import Architecture, describe, family_of
from lrc.hub.quantizer import FORMAT_VERSION, METHOD, replace_modules
from lrc.methods import methods
from lrc.methods.contract import Affine, Factors, Prediction, Solution
from lrc.modules.fused.fuse import fuse, unfuse
from lrc.modules.table import Table
from lrc.moments import collectors
from lrc.plan.resolve import parse_plan, resolve
from lrc.plan.resolved import Assignment, ResolvedPlan
from lrc.records.benchmark import Row
from lrc.run.settings import DTYPES

LOW_RANK = ("svd", "two_sided_svd", "whitened_svd")  # of single projections; components are a3's
FUSIONS: dict[str, Callable[[PreTrainedModel], object]] = {
    "none": unfuse,
    "both": fuse,
}

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Reduced:
    """What a plan makes of a model: the table of its modules, and the columns that narrower rotary heads keep."""

    plan: ResolvedPlan
    table: Table
    columns: dict[str, Tensor]


@app.command()
def main(
    shape: Annotated[str, typer.Argument(help=f"One of {', '.join(SHAPES)}.")],
    keeps: Annotated[str, typer.Option(help="Fractions of the decoder's weights.")] = "0.8,0.6",
    kinds: Annotated[str, typer.Option("--methods", help="Methods of the plans.")] = "a3,whitened_svd",
    prefill: Annotated[str, typer.Option(help="Batches and lengths, or none.")] = "8x2048",
    decode: Annotated[
        str, typer.Option(help="Batches and tokens attended to, or none.")
    ] = "1x512,32x512,128x512",
    modes: Annotated[
        str | None, typer.Option(help="As --modes of lrc bench.", show_default="graphs on a GPU")
    ] = None,
    fusion: Annotated[str, typer.Option(help=f"Products that are merged: {', '.join(FUSIONS)}.")] = "both",
    fuse_dense: Annotated[bool, typer.Option("--fuse-dense", help="Have the dense model fused too.")] = False,
    new_tokens: Annotated[int, typer.Option(help="Tokens of a sample of decode.")] = 8,
    repeats: Annotated[int, typer.Option(help="Samples of each model, in turn.")] = 7,
    layers: Annotated[int | None, typer.Option(help="As many layers instead of all.")] = None,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(DTYPES)}.")] = "bfloat16",
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the script.")] = "cuda",
    write: Annotated[Path | None, typer.Option(help="Folder to save the compressed models in.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for all figures as JSON.")] = None,
) -> None:
    started, place = time.perf_counter(), torch.device(device)
    config = configuration(shape, layers, dtype)
    torch.manual_seed(0)
    dense = draw(config, DTYPES[dtype], place)
    if fuse_dense:
        fuse(dense)
    cases = make_cases(
        parse_shapes("--prefill", prefill.split(",")),
        parse_shapes("--decode", decode.split(",")),
        modes.split(",") if modes else (["graphs"] if place.type == "cuda" else ["eager"]),
        config.max_position_embeddings,
        new_tokens,
        place,
    )
    head = [
        "model",
        "case",
        f"dense{' and fused' if fuse_dense else ''}, tokens/s",
        "compressed",
        "ratio",
        "expected",
        "reached",
        "KV bytes a token",
    ]
    typer.echo(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    found: dict[str, Any] = {}
    for method in kinds.split(","):
        for keep in map(float, keeps.split(",")):
            reduced = reduce(config, plan_text(method, keep))
            model = draw_reduced(config, reduced, DTYPES[dtype], place)
            if write is not None:
                model.save_pretrained(write / f"{method}-{keep:g}")
            for merged in fusion.split(","):
                FUSIONS[merged](model)
                name = f"{method} {keep:g}" + (f", {merged} merged" if "," in fusion else "")
                weights = weigh(model).bytes / weigh(dense).bytes
                note(f"{name}: keep {reduced.plan.keep:.4f}, {weights:.4f} of the bytes", started)
                measured = measure([model, dense], cases, new_tokens=new_tokens, repeats=repeats)
                rows = [Row(case, *pair) for case, pair in zip(cases, measured, strict=True)]
                for row in rows:
                    typer.echo(line(name, row))
                found[name] = [row.as_dict() for row in rows]
            del model
            gc.collect()
    if out is not None:
        out.write_text(json.dumps(found, indent=2), encoding="utf-8")
    name = torch.cuda.get_device_name(place) if place.type == "cuda" else "cpu"
    note(f"{shape}, {dtype}, {name}, torch {torch.__version__}", started)


def note(message: str, started: float) -> None:
    print(f"[{time.perf_counter() - started:.0f} s] {message}", file=sys.stderr, flush=True)


def line(name: str, row: Row) -> str:
    """A row of the table: medians, with half the distance of the quartiles."""
    assert row.theirs is not None
    speeds = [
        f"{side.tokens_per_second:,.0f}" + ("" if side.spread is None else f" ±{side.spread / 2:.1%}")
        for side in (row.theirs, row.ours)
    ]
    ratios = [f"{ratio:.3f}" for ratio in (row.speedup, row.expected, row.reached) if ratio is not None]
    kv = f"{row.theirs.kv_bytes_per_token:,} to {row.ours.kv_bytes_per_token:,}"
    return f"| {' | '.join([name, str(row.case), *speeds, *ratios, kv])} |"


def plan_text(method: str, keep: float) -> str:
    return f"format: 1\nkeep: {keep}\nmethod: {method}\n"


def draw(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A dense model whose weights are drawn on the device as its initialisation draws them."""
    with device:
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype).eval()


def draw_reduced(
    config: PreTrainedConfig, reduced: Reduced, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """A compressed model as ``from_pretrained`` would give it, its weights drawn on the device."""
    model: Any = draw(config, dtype, device)
    replace_modules(model, reduced.table)
    with torch.no_grad():
        for path in reduced.table:
            for name, parameter in model.get_submodule(path).named_parameters():
                parameter.zero_() if name.endswith("bias") else parameter.normal_(0.0, STD)
        for path, columns in reduced.columns.items():
            model.get_buffer(path).copy_(columns)
    table = {"quant_method": METHOD, "format_version": FORMAT_VERSION, "modules": reduced.table}
    model.config.quantization_config = table
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # of the weights that were replaced
    return model


def reduce(config: PreTrainedConfig, text: str) -> Reduced:
    """What a plan makes of a model of a config, from shapes alone, as ``lrc compress`` stores it."""
    family = family_of(config.model_type)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in skeleton.state_dict().items()}
    architecture = describe(family, config, shapes)
    plan = resolve(parse_plan(text, "the plan"), architecture, methods(), collectors())
    table, columns = Table(), {}
    for layer in plan.layers:
        start = f"{family.layers}.{layer.index}"
        module = skeleton.get_submodule(start)
        solutions = [stand_in(architecture, assignment) for assignment in layer.assignments]
        made = assemble(architecture, module, module.state_dict(), solutions)
        table |= {f"{start}.{path}": entry for path, entry in made.table.items()}
        columns |= {f"{start}.{n}": t for n, t in made.state.items() if n.endswith("rotary_columns")}
    return Reduced(plan, table, columns)


def stand_in(architecture: Architecture, assignment: Assignment) -> Solution:
    """What a method would give for an assignment, with tensors that have shapes and no values."""
    target, size = architecture.targets[assignment.target], assignment.size
    groups = {"q": architecture.heads, "k": architecture.kv_heads, "v": architecture.kv_heads}
    inputs = architecture.family.mlp_inputs
    parts: dict[str, Affine | Factors] = {}
    columns = None
    for role, matrix in target.matrices.items():
        rows, into = matrix.rows, matrix.columns
        if len(target.matrices) == 1:
            if assignment.method not in LOW_RANK:
                raise typer.BadParameter(f"{assignment.method} is none of: a3, {', '.join(LOW_RANK)}")
            factors = {"A": meta(size, into), "B": meta(rows, size)}
            parts[role] = Factors("low_rank", factors, meta(rows) if matrix.bias else None)
            continue
        if role in groups:
            rows = groups[role] * size
        elif role in inputs:
            rows = size
        elif role == "o":
            into = architecture.heads * size
        else:
            into = size
        biased = matrix.bias and role != "v"  # that of values moves to the output
        parts[role] = Affine(meta(rows, into), meta(rows) if biased else None)
    if assignment.target == "qk" and architecture.family.rotary != "none":
        half = torch.arange(size // 2)
        columns = torch.cat((half, half + architecture.head_dim // 2)).expand(architecture.kv_heads, -1)
    return Solution(parts, Prediction(0.0, 1.0, "output"), rotary_columns=columns)


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


if __name__ == "__main__":
    app()
