"""A report read back: the same record, or a message that says what is wrong with the file."""

from __future__ import annotations

import json
import math
import re
import runpy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lrc
from lrc.errors import UserError
from lrc.records.compression import REPORT, REPORT_VERSION, Report, read_report

ROOT = Path(__file__).parents[2]
report_schema = runpy.run_path(str(ROOT / "scripts" / "report_schema.py"))["report_schema"]


def test_a_report_is_read_back_as_it_was(make_report: Callable[..., Report], tmp_path: Path) -> None:
    report = make_report(warnings=["Größe 名 <b>"], allocation={"cost": 1.5})
    (tmp_path / REPORT).write_text(report.to_json(), encoding="utf-8")
    assert read_report(tmp_path) == report
    assert lrc.read_report(str(tmp_path)) == report


def test_figures_that_json_has_not_are_read_back(worst: Report, tmp_path: Path) -> None:
    (tmp_path / REPORT).write_text(worst.to_json(), encoding="utf-8")
    found = read_report(tmp_path)
    assert found.perplexity[0].after.value == math.inf
    assert math.isnan(found.targets[5].predicted.error)
    assert isinstance(found.targets[0].numerics["rounds"], int)
    assert found.to_json() == worst.to_json()


def broken(change: Callable[[dict[str, Any]], object]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        record = json.loads(text)
        change(record)
        return json.dumps(record)

    return edit


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda text: text[:200], "is damaged, it is not JSON"),
        (lambda text: "[]", "has no version of the report"),
        (broken(lambda r: r.update(version=1)), "has version 1 of the report; this lrc reads version 5"),
        (broken(lambda r: r.update(version=99)), "has version 99 of the report"),
        (broken(lambda r: r.pop("keep")), "is damaged at keep: Field required"),
        (broken(lambda r: r["targets"][3].update(kept="many")), "is damaged at targets.3.kept"),
        (broken(lambda r: r["before"].pop("bytes")), "is damaged at before.bytes"),
    ],
)
def test_a_file_that_is_none_of_ours_is_told(
    make_report: Callable[..., Report], tmp_path: Path, edit: Callable[[str], str], told: str
) -> None:
    path = tmp_path / REPORT
    path.write_text(edit(make_report().to_json()), encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"{path} {told}")):
        read_report(tmp_path)


def test_a_missing_and_an_unreadable_file_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"{tmp_path} has no report.json")):
        read_report(tmp_path)
    (tmp_path / REPORT).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read"):
        read_report(tmp_path)
    (tmp_path / REPORT).unlink()
    (tmp_path / REPORT).mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_report(tmp_path)


def test_the_published_schema_is_that_of_the_code() -> None:
    published = (ROOT / "docs" / "report.schema.json").read_text(encoding="utf-8")
    assert published == report_schema(), (
        "make it again: python scripts/report_schema.py > docs/report.schema.json"
    )


def test_a_report_has_what_the_schema_lists(worst: Report) -> None:
    schema, written = json.loads(report_schema()), json.loads(worst.to_json())
    assert set(written) == set(schema["required"]) == set(schema["properties"])
    assert schema["properties"]["version"] == {"const": REPORT_VERSION}
    record = schema["$defs"]["TargetRecord"]
    assert all(set(target) == set(record["properties"]) for target in written["targets"])
    number = schema["$defs"]["Perplexity"]["properties"]["value"]
    assert written["perplexity"][0]["after"]["value"] in number["anyOf"][1]["enum"]


def test_methods_are_listed_once(worst: Report, make_report: Callable[..., Report]) -> None:
    assert worst.methods == ["two_sided_svd", "whitened_svd", "a3", "monarch", "svd"]
    assert replace(make_report(), targets=[]).methods == []
