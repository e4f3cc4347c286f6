"""The README's results table: one model, every method, calibration and evaluation on real text.

    python scripts/results.py smollm2-135m-instruct --data-dir data --out results.md

Every row is a whole run of ``lrc compress``: the perplexity is that of the saved folder, loaded back.
"""

from __future__ import annotations

import json
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
    lines = [
        f"| method | keep | {' | '.join(texts)} | seconds | peak GiB |",
        f"|---|---|{'---|' * len(texts)}---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        for name in rows or ROWS:
            plan = {
                "format": 1,
                "keep": keep,
                **ROWS[name],
                "calibration": {
                    "data": calib,
                    "samples": samples if samples == "all" else int(samples),
                    "seq_len": seq_len,
                },
            }
            path, folder = Path(scratch) / "plan.yaml", Path(scratch) / "out"
            path.write_text(yaml.safe_dump(plan), encoding="utf-8")
            console.print(f"{name}: {json.dumps(plan)}")
            report = lrc.compress(
                model,
                path,
                out=folder,
                ppl=texts,
                data_dir=data_dir,
                max_windows=max_windows,
                device=device,
                dtype=dtype,
            )
            console.print({stage: round(seconds, 1) for stage, seconds in report.seconds.items()})
            if len(lines) == 2:
                dense = " | ".join(f"{c.before.value:.2f}" for c in report.perplexity)
                lines.append(f"| dense | 1 | {dense} | | |")
            after = " | ".join(f"{c.after.value:.4g}" for c in report.perplexity)
            seconds = sum(s for stage, s in report.seconds.items() if stage != "evaluate")
            peak = max(report.peak_bytes.values()) if "device" not in report.peak_bytes else report.peak_bytes["device"]
            lines.append(f"| {name} | {report.keep:.4f} | {after} | {seconds:.1f} | {peak / 2**30:.2f} |")
            console.print(lines[-1])
            shutil.rmtree(folder)
    table = "\n".join(lines)
    print(table)
    if out:
        out.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
