"""An inspection as tables and as a folder: what several layers come to, and a page that fetches nothing."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from lrc.errors import UserError
from lrc.records.inspection import (
    Choice,
    Conditioning,
    Estimate,
    Inspected,
    Inspection,
    OutputErrors,
    Spectrum,
)
from lrc.report.inspection import (
    best_table,
    by_target,
    check_folder,
    estimate_tables,
    heading,
    inspection_tables,
    moments_table,
    output_table,
    spectra_table,
    write_inspection,
)

SPECTRUM = Spectrum(8, 6.0, 2.0, 7, [1, 4, 8], [0.5, 0.9, 1.0])
ESTIMATE = Estimate(0.6, "svd", {}, 2, 6, 10, 0.3, "relative error", 0.01, 2)
HELD = OutputErrors("svd", 2, 6, 10, 0.5, 0.3, 0.9, 20.0, 0.3, None, 0.3, 0.31, "relative error")
ONE = Inspected(
    0,
    "q",
    SPECTRUM,
    replace(SPECTRUM, effective_rank=4.0),
    [ESTIMATE],
    [Choice(0.6, "svd", 0.3, "relative error", 0.6, "whitened_svd", 0.35, 0.5)],
    HELD,
)
OTHER = replace(
    ONE,
    layer=1,
    plain=replace(SPECTRUM, effective_rank=7.0, rank_99=8),
    whitened=replace(SPECTRUM, rank_99=8),
    estimates=[replace(ESTIMATE, error=0.4, loss=0.02), replace(ESTIMATE, method="whitened_svd", error=0.2)],
    choices=[Choice(0.6, "whitened_svd", 0.2, "relative error", 0.6)],
    output=replace(HELD, size=3, data_error=0.4, overlap=0.7, reconstruction=None),
)
MOMENT = Conditioning(0, "attn_in", 32, 1000, True, 1e3, 9e2, 1e-6, 32)


def inspection(**changes: object) -> Inspection:
    found = Inspection(
        model="model <&>",
        fingerprint="ab12",
        layers=[0, 1],
        keeps=[0.6],
        gradients=True,
        calibration="text (4 blocks of 32 tokens)",
        device="cpu",
        dtype="float32",
        targets=[ONE, OTHER, replace(ONE, layer=None, target="embed", output=None)],
        moments=[MOMENT, replace(MOMENT, layer=1, condition=float("inf"), numerical_rank=30)],
        against="out",
        seconds={"solve": 1.25},
        peak_bytes={"host": 2**30},
        warnings=["few tokens"],
        versions={"lrc": "0"},
    )
    return replace(found, **changes)  # type: ignore[arg-type]


GROUPS = by_target(inspection().targets, by_layer=False)


def test_groups_by_target_or_by_layer() -> None:
    assert list(GROUPS) == ["q", "embed"]
    assert list(by_target(inspection().targets, by_layer=True)) == ["0 q", "1 q", "embed"]


def test_spectra_are_means_and_ranks_a_range() -> None:
    table = spectra_table(GROUPS)
    assert table.rows[0] == ["q", "8", "6.5", "5.0", "2.00", "2.00", "7-8"]
    headings = [column.heading for column in table.columns]
    assert len(set(headings)) == len(headings)  # of two that are alike nobody knows which is which


def test_moments_are_ranges() -> None:
    (row,) = moments_table(inspection().moments, by_layer=False).rows
    assert row == ["attn_in, centred", "32", "30-32", "1000 to inf", "900", "1e-06", "1,000"]
    assert [r[0] for r in moments_table(inspection().moments, by_layer=True).rows] == [
        "0 attn_in, centred",
        "1 attn_in, centred",
    ]


def test_relative_errors_fold_to_their_root_mean_square_and_nats_to_sums_or_means() -> None:
    errors, losses = estimate_tables(inspection(), GROUPS)
    assert errors.rows[0] == ["q", "svd", "0.3536"]  # ((0.09 + 0.16) / 2)^½
    assert losses.rows[0] == ["q", "svd", "0.03"]
    assert len(estimate_tables(inspection(gradients=False), GROUPS)) == 1
    kl = [replace(ESTIMATE, error=e, unit="nats KL") for e in (0.1, 0.3)]
    errors, losses = estimate_tables(inspection(), {"qk": [replace(ONE, estimates=kl)]})
    assert (errors.rows[0][2], losses.rows[0][2]) == ("0.2 nats KL", "0.02")
    unknown = replace(ONE, estimates=[replace(ESTIMATE, loss=None)])
    assert estimate_tables(inspection(), {"q": [unknown]})[1].rows == []


def test_methods_are_named_with_options_that_are_not_their_defaults() -> None:
    options = {"metric": "output", "select": "score", "refit": "least_squares"}
    for metric, name in (("output", "a3, metric output"), ("loss", "a3")):
        one = replace(ESTIMATE, method="a3", options={**options, "metric": metric})
        (row,) = estimate_tables(inspection(), {"mlp": [replace(ONE, estimates=[one])]})[0].rows
        assert row[1] == name


def test_auto_counts_the_layers_where_they_differ_and_has_figures_of_one() -> None:
    figures = "svd: 0.3 relative error, keeps 60.0%\nnext whitened_svd: 0.35, keeps 50.0%"
    assert best_table(GROUPS, [0.6]).rows == [["q", "1 svd\n1 whitened_svd"], ["embed", figures]]
    alone = best_table(by_target([OTHER], by_layer=True), [0.6]).rows
    assert alone == [["1 q", "whitened_svd: 0.2 relative error, keeps 60.0%"]]


def test_an_output_beside_the_original() -> None:
    (row,) = output_table(GROUPS, "out").rows
    assert row == ["q", "svd", "0.3000", "0.3536", "0.5000", "0.8000", "60.0%", "2-3", "0.3000", "0.3100"]
    kl = replace(HELD, measured=None, kl=0.02, recorded_predicted=0.01, recorded_unit="nats KL")
    (row,) = output_table({"qk": [replace(ONE, output=kl)]}, "out").rows
    assert (row[2], *row[8:]) == ("0.02 nats KL", "0.01 nats KL", "0.31 nats KL")


def test_all_of_it_in_order() -> None:
    printed = [part for part in inspection_tables(inspection(), by_layer=True) if isinstance(part, str)]
    assert printed[0] == "model <&>: layers 0-1, embed; moments of text (4 blocks of 32 tokens)"
    assert printed[-1] == "seconds: solve 1.2"


def test_what_was_looked_at_is_named() -> None:
    of = "; moments of text (4 blocks of 32 tokens)"
    table = replace(ONE, layer=None, target="embed")
    assert heading(inspection(targets=[ONE], layers=[0])) == f"model <&>: layer 0{of}"
    assert heading(inspection(targets=[table], layers=[])) == f"model <&>: embed{of}"


def test_a_folder_with_all_of_it(tmp_path: Path) -> None:
    found = inspection()
    written = write_inspection(found, tmp_path / "seen")
    assert [path.name for path in written] == ["inspect.json", "inspect.html"]
    assert sorted(path.name for path in (tmp_path / "seen").iterdir()) == sorted(p.name for p in written)
    record = json.loads(written[0].read_text(encoding="utf-8"))
    assert record["moments"][1]["condition"] == "inf"
    page = written[1].read_text(encoding="utf-8")
    assert page.count("<svg") == 1
    assert "model &lt;&amp;&gt;, inspected" in page
    links = set(re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^")\s]+)', page))
    assert all(link.startswith("#") for link in links)
    for word in ("out against", "few tokens", "1 whitened_svd", "next whitened_svd", "fingerprint"):
        assert word in page
    assert write_inspection(found, tmp_path / "seen") == written
    assert written[1].read_text(encoding="utf-8") == page


def test_what_is_not_there_has_no_picture_and_no_section(tmp_path: Path) -> None:
    table = replace(ONE, layer=None, target="embed", estimates=[], choices=[], output=None)
    bare = inspection(targets=[table], moments=[], layers=[], against=None, gradients=False)
    written = write_inspection(bare, tmp_path / "seen")
    page = written[1].read_text(encoding="utf-8")
    assert "<svg" not in page
    assert "Moments" not in page
    assert "against" not in page


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here", encoding="utf-8")
    for path, told in ((tmp_path / "file", "it is a file"), (tmp_path / "no" / "such", "there is no folder")):
        with pytest.raises(UserError, match=told):
            check_folder(path)
    check_folder(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.fixture
def browser(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    module = importlib.import_module("screenshots")
    if module.chromium() is None:
        pytest.skip("no chromium: apt-get install chromium, or name one in CHROMIUM")
    return module


def test_nothing_overflows_or_overlaps_in_a_browser(browser: ModuleType, tmp_path: Path) -> None:
    names = ("qk", "ov", "mlp", "q", "k", "v", "o", "gate", "up", "down")
    methods = [
        replace(ESTIMATE, method=name, loss=0.01 * i) for i, name in enumerate(("a3", "svd", "whitened_svd"))
    ]
    deep = [
        replace(ONE, layer=layer, target=name, estimates=[*methods, replace(ESTIMATE, keep=0.4, error=0.5)])
        for layer in range(40)
        for name in names
    ]
    for i, found in enumerate(
        (inspection(), inspection(targets=deep, layers=list(range(40)), keeps=[0.6, 0.4]))
    ):
        page = write_inspection(found, tmp_path / str(i))[1]
        for width in (browser.PHONE, browser.DESKTOP):
            for dark in (False, True):
                seen = browser.look(page, width, dark=dark)
                assert seen.found == []
                assert seen.texts > 5
