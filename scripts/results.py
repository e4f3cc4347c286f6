"""The README's results table: one model, every method, calibration and evaluation on real text.

    python scripts/results.py smollm2-135m-instruct --data-dir data --out results.md

Every row is a whole run of ``lrc compress``: the perplexity is that of the saved folder, loaded back.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

import lrc

PUBLISHED = {"qk": {"metric": "score"}, "ov": {"refit": "none"}}
ROWS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd", "refit": "none"},
    "whitened_svd": {"method": "whitened_svd", "refit": "none"},
    "a3 as published": {"method": "a3", "components": PUBLISHED, "refit": "none"},
    "a3 as published, without the MLP refit": {
        "method": "a3",
        "components": {**PUBLISHED, "mlp": {"refit": "none"}},
        "refit": "none",
    },
    "a3 without the residual refit": {"method": "a3", "refit": "none"},
    "a3 with the published score for QK": {"method": "a3", "components": {"qk": {"metric": "score"}}},
    "a3": {"method": "a3"},
    "whitened_svd with residual refit": {"method": "whitened_svd"},
    "monarch": {"method": "monarch", "refit": "none"},
}


def main(
    model: Annotated[str, typer.Argument(help="Folder or name of the model.")],
    data_dir: Annotated[Path | None, typer.Option(help="Folder with the texts.")] = None,
    keep: Annotated[float, typer.Option(help="Kept decoder weights.")] = 0.8,
    rows: Annotated[list[str] | None, typer.Option("--row", help="Only these rows.")] = None,
    plans: Annotated[
        list[Path] | None, typer.Option("--plan", help="These plans instead of the rows.")
    ] = None,
    calib: Annotated[str, typer.Option(help="Calibration text.")] = "wikitext2:train",
    samples: Annotated[str, typer.Option(help="Calibration blocks, or all.")] = "all",
    seq_len: Annotated[int, typer.Option(help="Tokens of a calibration block.")] = 2048,
    ppl: Annotated[str, typer.Option(help="Evaluation texts, separated by commas.")] = "wikitext2:test",
    max_windows: Annotated[int | None, typer.Option(help="Evaluation windows.")] = None,
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str | None, typer.Option()] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the table here.")] = None,
) -> None:
    """Compress MODEL once a row and print the table in Markdown."""
    console = Console(stderr=True)
    texts = ppl.split(",")
    common: dict[str, Any] = {
        "data_dir": data_dir,
        "max_windows": max_windows,
        "device": device,
        "dtype": dtype,
    }
    dense = " | ".join(f"{each.value:.2f}" for each in lrc.evaluate(model, texts, **common))
    lines = [
        f"| method | keep | {' | '.join(texts)} | seconds | peak GiB |",
        f"|---|---|{'---|' * len(texts)}---|---|",
        f"| dense | 1 | {dense} | | |",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        calibration = {
            "data": calib,
            "samples": samples if samples == "all" else int(samples),
            "seq_len": seq_len,
        }
        for name in plans or rows or ROWS:
            path, folder = Path(scratch) / "plan.yaml", Path(scratch) / "out"
            if isinstance(name, Path):
                path = name
            else:
                plan = {"format": 1, "keep": keep, **ROWS[name], "calibration": calibration}
                path.write_text(yaml.safe_dump(plan), encoding="utf-8")
            console.print(f"{name}:\n{path.read_text(encoding='utf-8')}")
            report = lrc.compress(model, path, out=folder, ppl=[], **common)
            console.print({stage: round(seconds, 1) for stage, seconds in report.seconds.items()})
            after = " | ".join(f"{each.value:.4g}" for each in lrc.evaluate(folder, texts, **common))
            peak = report.peak_bytes.get("device", report.peak_bytes["host"]) / 2**30
            lines.append(
                f"| {name} | {report.keep:.4f} | {after} | {sum(report.seconds.values()):.1f} | {peak:.2f} |"
            )
            console.print(lines[-1])
            shutil.rmtree(folder)
    table = "\n".join(lines)
    print(table)
    if out:
        out.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
