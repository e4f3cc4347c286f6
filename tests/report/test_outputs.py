"""Outputs beside each other: what may stand on one axis, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lrc.errors import UserError
from lrc.records.compression import REPORT, Domains, Report
from lrc.report.outputs import compared_page, domain_ratios, points, read_beside, read_outputs, short

MakeReport = Callable[..., Report]
Written = Callable[..., list[Path]]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """Writes reports into folders of their own, by the names given."""

    def write(**reports: Report) -> list[Path]:
        for name, report in reports.items():
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / REPORT).write_text(report.to_json(), encoding="utf-8")
        return [tmp_path / name for name in reports]

    return write


def test_outputs_of_other_originals_are_apart(written: Written, make_report: MakeReport) -> None:
    other = make_report(model="gpt2", fingerprint="e5" * 32)
    sources = read_outputs(written(a=make_report(), b=other, c=make_report()))
    assert [(source.model, [output.label for output in source.outputs]) for source in sources] == [
        ("llama-7b", ["a", "c"]),
        ("gpt2", ["b"]),
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [("ids_sha256", "ff"), ("windows", 9), ("seq_len", 512), ("dtype", "bfloat16"), ("protocol", 2)],
)
def test_figures_of_other_tokens_are_on_no_axis_together(
    written: Written, make_report: MakeReport, field: str, value: object
) -> None:
    first = make_report()
    (figure,) = first.perplexity
    before, after = (replace(each, **{field: value}) for each in (figure.before, figure.after))
    second = replace(first, perplexity=[replace(figure, before=before, after=after)])
    (source,) = read_outputs(written(a=first, b=second))
    assert [list(text.changes) for text in source.texts] == [[0], [1]]
    assert len({text.text for text in source.texts}) == 2
    assert [[point.label for point in points(source, text)] for text in source.texts] == [
        ["dense", "a"],
        ["dense", "b"],
    ]


def test_a_dense_figure_that_differs_between_reports_is_told(
    written: Written, make_report: MakeReport
) -> None:
    first = make_report()
    (figure,) = first.perplexity

    def other(value: float) -> Report:
        return replace(first, perplexity=[replace(figure, before=replace(figure.before, value=value))])

    assert read_outputs(written(a=first, b=other(5.472)))[0].notes == []
    (note,) = read_outputs(written(c=first, d=other(5.6)))[0].notes
    assert "between 5.47 and 5.6 in these reports" in note


def test_domains_of_all_outputs_stand_in_one_table(written: Written, make_report: MakeReport) -> None:
    (source,) = read_outputs(written(a=make_report(), b=make_report(domains=Domains())))
    found = domain_ratios(source)
    assert [column.heading for column in found.columns] == ["output", "largest ratio", "chat", "web", "code"]
    assert found.rows == [
        ["dense", "", "9", "10", "4"],
        ["a", "× 4.000, code", "× 1.100", "× 1.200", "× 4.000"],
    ]
    assert "Perplexity by domain" in compared_page([source])
    (without,) = read_outputs(written(c=make_report(domains=Domains())))
    assert domain_ratios(without).rows == []


def test_domains_of_other_windows_stand_apart(written: Written, make_report: MakeReport) -> None:
    report = make_report()
    code = report.domains.changes["code"]
    fewer = replace(code, before=replace(code.before, windows=3), after=replace(code.after, windows=3))
    (source,) = read_outputs(written(a=report, b=make_report(domains=Domains({"code": fewer}))))
    assert [text.text for text in source.domains if text.text.startswith("code, ")] == [
        "code, 148 × 2048, float32",
        "code, 3 × 2048, float32",
    ]


def test_what_has_no_place_is_told(written: Written, make_report: MakeReport, many: list[Report]) -> None:
    none = make_report(perplexity=[])
    (source,) = read_outputs(written(a=make_report(), b=none))
    assert source.notes == ["without a perplexity: b"]
    sources = read_outputs(written(**{f"many-{i}": report for i, report in enumerate(many)}))
    assert "the perplexity of many-17 is nan, which has no place in the picture" in sources[1].notes[0]
    page = compared_page(sources)
    assert page.count("<svg") == 3
    assert "<i>gpt2" not in page
    assert "&lt;i&gt;gpt2" in page


def test_on_a_phone_perplexity_is_in_sight(written: Written, make_report: MakeReport) -> None:
    page = compared_page(read_outputs(written(a=make_report(), b=make_report())))
    heads = re.findall(r'<th scope="col"(?: class="([^"]+)")?>([^<]*)</th>', page)
    assert [heading for _, heading in heads[:4]] == ["output", "wikitext2:test", "× dense", "bytes"]
    left_out = [heading for classes, heading in heads if "m" in classes.split()]
    assert left_out == ["of dense", "KV per token", "keep", "method", "seconds", "chat", "web", "code"]
    assert page.count('<td class="n m">') == (4 + 3) * 3  # the dense model and both outputs
    assert 'class="beside"' not in page  # there are no notes, so no gap for them
    unmeasured = compared_page(read_outputs(written(c=make_report(), d=make_report(perplexity=[]))))
    assert '<div class="beside">\n<p class="note">without a perplexity: d</p>' in unmeasured


def test_json_has_every_figure(written: Written, make_report: MakeReport) -> None:
    report = make_report()
    (source,) = read_outputs(written(a=report))
    found = json.loads(json.dumps(source.as_dict()))
    (output,) = found["outputs"]
    assert output["after"]["bytes"] == report.after.bytes
    figures = output["perplexity"]["wikitext2:test"]
    assert figures["ratio"] == pytest.approx(6.81 / 5.47)
    assert figures["tokens"]["top1_agreement"] == {"value": 0.871, "low": 0.869, "high": 0.873}
    assert output["domains"]["code"] == {"before": 4.0, "after": 16.0, "ratio": 4.0}
    assert found["before"]["kv_bytes_per_token"] == report.before.kv_bytes_per_token
    assert math.isclose(output["seconds"], sum(report.seconds.values()))


def test_every_folder_without_a_report_is_named_at_once(
    written: Written, make_report: MakeReport, tmp_path: Path
) -> None:
    (good,) = written(good=make_report())
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError) as told:
        read_outputs([good, tmp_path / "model", tmp_path / "nowhere"])
    assert str(tmp_path / "model") in str(told.value)
    assert str(tmp_path / "nowhere") in str(told.value)
    assert str(good) not in str(told.value)
    assert "lrc compress writes one" in str(told.value)


def test_a_folder_that_is_named_twice_counts_once(written: Written, make_report: MakeReport) -> None:
    (folder,) = written(a=make_report())
    (source,) = read_outputs([folder, folder / ".", folder])
    assert [output.label for output in source.outputs] == ["a"]


def test_folders_of_one_name_are_told_apart(tmp_path: Path, make_report: MakeReport) -> None:
    folders = [tmp_path / parent / "out" for parent in ("x", "y")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / REPORT).write_text(make_report().to_json(), encoding="utf-8")
    (source,) = read_outputs(folders)
    assert [output.label for output in source.outputs] == list(map(str, folders))


def test_only_outputs_of_the_model_stand_beside_it(written: Written, make_report: MakeReport) -> None:
    ours, other = written(ours=make_report(), other=make_report(model="gpt2", fingerprint="e5" * 32))
    (output,) = read_beside([ours], "llama-7b", "d4" * 32)
    assert output.label == "ours"
    with pytest.raises(UserError, match=r"not made from llama-7b as it is now.*other \(of gpt2\)"):
        read_beside([ours, other], "llama-7b", "d4" * 32)


@pytest.mark.parametrize(
    ("labels", "shorter"),
    [
        (["m-a3-2x", "m-a3-4x"], ["2x", "4x"]),
        (["m-a3-2x", "m-svd-2x"], ["a3-2x", "svd-2x"]),
        (["m-a3", "m"], ["m-a3", "m"]),
        (["m-a3-2x"], ["m-a3-2x"]),
        (["m-a3", "m-a3"], ["a3", "a3"]),
        (["a", ""], ["a", ""]),
    ],
)
def test_what_all_labels_begin_with_is_left_out(labels: list[str], shorter: list[str]) -> None:
    assert short(labels) == shorter


def test_ratios_have_their_intervals(written: Written, make_report: MakeReport) -> None:
    assert "1.245\n1.235 to 1.255</td>" in compared_page(read_outputs(written(a=make_report())))
