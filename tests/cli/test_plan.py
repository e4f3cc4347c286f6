"""``lrc plan`` from end to end: budgets met, curves measured once, plans that compress takes, every mistake told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import Result

import lrc.allocation.sizing
from lrc.allocation import ALLOCATORS
from lrc.allocation.sensitivity import Sensitivity
from lrc.text.datasets import GENERAL_WEIGHTS

BASE = "format: 1\nmethod: a3\ncalibration: {data: calib.txt, samples: 3, seq_len: 48}\n"
NARROW = f"{BASE}components: {{qk: {{metric: attention}}}}\n"
QUIET = ("--base", "base.yaml", "--device", "cpu")  # what allocations without held-out text take
QUICK = (*QUIET, "--held-out", "held-out.txt", "--held-out-samples", "2", "--keeps", "0.7,0.4")
# Heads of 16, and an MLP whose neurons are less than 0.1 % of the model each.
WIDE = {
    "llama": {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 512},
    "gpt2": {"n_head": 2, "n_inner": 512},
}


@pytest.fixture(scope="module")
def models(shared_checkpoint: Any) -> dict[str, Path]:
    return {family: shared_checkpoint(family, **config) for family, config in WIDE.items()}


@pytest.fixture
def llama(models: dict[str, Path]) -> Path:
    return models["llama"]


@pytest.fixture
def gpt2(models: dict[str, Path]) -> Path:
    return models["gpt2"]


@pytest.fixture(autouse=True)
def base(work: Path) -> None:
    (work / "base.yaml").write_text(BASE, encoding="utf-8")
    for name, animals in (("calib", "sheep"), ("held-out", "goats"), ("other", "cows")):
        text = " ".join(f"{n} {animals} of {n * 37 % 101}." for n in range(150))
        (work / f"{name}.txt").write_text(text, encoding="utf-8")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the measurements."""
    counted, curves = [], Sensitivity.curves

    def count(self: Sensitivity, *arguments: Any) -> Any:
        counted.append(1)
        return curves(self, *arguments)

    monkeypatch.setattr(Sensitivity, "curves", count)
    return counted


def check(succeeds: Any, plan: str, model: str | Path) -> dict[str, Any]:
    return json.loads(succeeds("check", model, "--plan", plan, "--json").stdout)


def test_several_keeps_cost_one_measurement_and_each_is_kept(
    work: Path, llama: Path, succeeds: Any, measured: list[int]
) -> None:
    result: Result = succeeds("plan", llama, "--keep", "0.8,0.6", *QUICK)
    for keep in (0.8, 0.6):
        assert keep * 0.998 <= check(succeeds, f"plan-{keep}.yaml", llama)["keep"] <= keep
    assert "the plan has" not in result.stdout
    assert f"plan-{0.8}.yaml: keeps" in result.stdout
    (curves,) = work.glob("llama-*.sensitivity.????????.curves.json")
    before = curves.stat().st_mtime_ns
    found = json.loads(succeeds("plan", llama, "--keep", "0.7", *QUICK, "--json").stdout)
    assert len(measured) == 1
    assert curves.stat().st_mtime_ns == before
    assert not found["measured"]
    (plan,) = found["plans"]
    assert (plan["path"], plan["keep"]) == ("plan.yaml", check(succeeds, "plan.yaml", llama)["keep"])
    stored = json.loads(curves.read_text(encoding="utf-8"))
    assert len(stored["curves"]) == 2 * len({"q", "k", "ov", "mlp"})
    assert stored["loss"] == found["loss"]


def test_curves_are_found_again_for_any_plan_beside_them_and_never_overwritten(
    work: Path, gpt2: Path, llama: Path, succeeds: Any, measured: list[int]
) -> None:
    (work / "other").mkdir()
    for options, times in (
        ((gpt2, "--keep", "0.8"), 1),
        ((gpt2, "--keep", "0.7", "-o", "a.yaml"), 1),
        ((gpt2, "--bytes", "300kB", "-o", "b.yaml"), 1),
        ((llama, "--keep", "0.8"), 2),
        ((gpt2, "--keep", "0.8", "--calib", "other.txt"), 3),
        ((gpt2, "--keep", "0.9"), 3),
        ((llama, "--kv-cache", "0.8", "-o", "c.yaml"), 3),
        ((gpt2, "--keep", "0.8", "--fresh"), 4),
        ((gpt2, "--keep", "0.8", "-o", "other/plan.yaml"), 5),
    ):
        succeeds("plan", *options, *QUICK)
        assert len(measured) == times, options
    found = sorted(path.name.split(".")[0] for path in work.glob("*.curves.json"))
    assert found == [gpt2.name, gpt2.name, llama.name]


def test_a_file_of_curves_is_for_one_key(
    work: Path, gpt2: Path, llama: Path, succeeds: Any, fails: Any, measured: list[int]
) -> None:
    model = ("plan", gpt2, "--keep", "0.8", *QUICK, "--curves", "mine.json")
    succeeds(*model)
    succeeds(*model, "-o", "other.yaml")
    assert len(measured) == 1
    assert [path.name for path in work.glob("*.json")] == ["mine.json"]
    before = (work / "mine.json").read_bytes()
    for more in ((), ("--fresh",)):
        message = fails(*model, "--calib", "other.txt", *more)
        assert "mine.json was measured with other settings: calibration (there 3 x 48 " in message
        assert "Use another --curves file" in message
    assert "dtype (there float32, here bfloat16)" in fails(*model, "--dtype", "bfloat16")
    base = (work / "base.yaml").read_text(encoding="utf-8")
    assert "calibration: {" in base
    first = base.replace("calibration: {", "calibration: {first_token: 8, ")
    (work / "first.yaml").write_text(first, encoding="utf-8")
    assert "settings: first token (there 1, here 8). " in fails(*model, "--base", "first.yaml")
    message = fails("plan", llama, *model[2:])
    assert f"model (there {gpt2} " in message
    assert f", here {llama} " in message
    assert len(measured) == 1
    assert (work / "mine.json").read_bytes() == before
    succeeds(*model, "--fresh")
    assert len(measured) == 2


DAMAGES = [
    (lambda found: [found], "no mapping with a format"),
    (lambda found: {}, "no mapping with a format"),
    (lambda found: found | {"format": 1}, "has format 1, this version of lrc reads 7; remove it"),
    (lambda found: found | {"key": 3}, "holds no curves of lrc plan (key: "),
    (lambda found: found | {"curves": 3}, "holds no curves of lrc plan (curves: "),
    (
        lambda found: {k: v for k, v in found.items() if k != "unit"},
        "holds no curves of lrc plan (unit: ",
    ),
    (lambda found: edited(found, sizes=[3.5, 5]), "holds no curves of lrc plan (curves[0].sizes[0]"),
    (lambda found: edited(found, sizes=["3", "5"]), "is damaged: its targets, sizes or costs"),
    (lambda found: edited(found, costs=None), "holds no curves of lrc plan (curves[0].costs: "),
    (lambda found: edited(found, costs=[0.1]), "is damaged: its targets, sizes or costs"),
    (lambda found: edited(found, costs=[0.1, math.nan]), "holds no curves of lrc plan ("),
    (lambda found: edited(found, full=7), "is damaged: its targets, sizes or costs"),
    (lambda found: found | {"curves": found["curves"][1:]}, "is damaged: its targets, sizes or costs"),
]


def test_damaged_curves_are_refused(
    work: Path, gpt2: Path, succeeds: Any, fails: Any, measured: list[int]
) -> None:
    model = ("plan", gpt2, "--keep", "0.8", *QUICK, "--curves", "mine.json")
    succeeds(*model)
    whole = json.loads((work / "mine.json").read_text(encoding="utf-8"))
    for damage, message in DAMAGES:
        (work / "mine.json").write_text(json.dumps(damage(whole)), encoding="utf-8")
        assert message in fails(*model)
    assert len(measured) == 1


def edited(found: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Stored curves with changes to the first."""
    return found | {"curves": [found["curves"][0] | changes, *found["curves"][1:]]}


def test_curves_hang_on_the_blocks_of_the_gradients_where_those_are_read(
    work: Path, gpt2: Path, succeeds: Any, measured: list[int]
) -> None:
    model = ("plan", gpt2, "--keep", "0.8", *QUICK)
    for method, times in (("two_sided_svd", [1, 1, 2]), ("svd", [3, 3, 3])):
        for samples, expected in zip((2, 2, 1), times, strict=True):
            text = BASE.replace("a3", method).replace("seq_len", f"gradient_samples: {samples}, seq_len")
            (work / "base.yaml").write_text(text, encoding="utf-8")
            succeeds(*model)
            assert len(measured) == expected


def test_the_plan_is_readable_and_compress_takes_it(work: Path, succeeds: Any) -> None:
    (work / "base.yaml").write_text(BASE.replace("data: calib.txt, ", ""), encoding="utf-8")
    succeeds("plan", "tiny-gpt2", "--keep", "0.75", *QUICK, "--held-out", "builtin:test", "-o", "mine.yaml")
    text = (work / "mine.yaml").read_text(encoding="utf-8")
    head = [line for line in text.splitlines() if line.startswith("#")]
    assert head[0] == "# lrc compress tiny-gpt2 --plan mine.yaml"
    assert "nats per token, perplexity times" in text
    assert "# Measured on builtin:test (2 blocks of 48 tokens), each target alone." in head
    assert "# Moments of builtin:train (3 blocks of 48 tokens)." in head
    assert "# Warning: builtin:test is what perplexity is measured on" in text
    assert (
        "calibration: {data: 'builtin:train', samples: 3, seq_len: 48, gradient_samples: 32, seed: 0}" in text
    )
    out = succeeds(
        "compress",
        "tiny-gpt2",
        "--plan",
        "mine.yaml",
        "--no-eval",
        "--out",
        "out",
        "--device",
        "cpu",
        "--json",
    )
    assert 0.75 * 0.998 <= json.loads(out.stdout)["keep"] <= 0.75


def test_bytes_count_the_whole_checkpoint(work: Path, gpt2: Path, llama: Path, succeeds: Any) -> None:
    for model, limit in ((llama, 420_000), (gpt2, 300_000)):
        succeeds("plan", model, "--bytes", f"{limit / 1e3}kB", *QUICK)
        # A file this small has kilobytes of names beside its weights.
        assert 0.995 * limit <= check(succeeds, "plan.yaml", model)["after"]["bytes"] <= limit


def test_the_cache_is_shared_between_qk_and_ov(work: Path, llama: Path, succeeds: Any) -> None:
    (work / "base.yaml").write_text(NARROW, encoding="utf-8")
    succeeds("plan", llama, "--kv-cache", "0.6", *QUICK)
    alone = check(succeeds, "plan.yaml", llama)
    ratio = alone["after"]["kv_bytes_per_token"] / alone["before"]["kv_bytes_per_token"]
    assert 0.6 - 2 / 64 < ratio <= 0.6  # widths of 64, in steps of 1 and 2
    assert {row["target"] for row in alone["targets"]} == {"qk", "ov"}
    succeeds("plan", llama, "--kv-cache", "0.6", "--keep", "0.7", *QUICK)
    both = check(succeeds, "plan.yaml", llama)
    assert both["after"]["kv_bytes_per_token"] == alone["after"]["kv_bytes_per_token"]
    assert 0.7 * 0.998 <= both["keep"] <= 0.7


def test_sizes_are_rounded_inside_the_budget(work: Path, llama: Path, succeeds: Any) -> None:
    succeeds("plan", llama, "--keep", "0.7", "--round", "8", *QUICK)
    found = check(succeeds, "plan.yaml", llama)
    assert all(row["size"] % 8 == 0 for row in found["targets"])
    assert 0.7 * 0.99 <= found["keep"] <= 0.7  # one step of 8 neurons is 0.7 % of this small a model


@pytest.mark.parametrize("name", ["keep", "kv-cache", "bytes"])
def test_a_budget_that_coarse_sizes_leave_unspent_is_told(work: Path, succeeds: Any, name: str) -> None:
    """In the head of the plan and the report, where and only where more than 0.2 % is left."""
    (work / "base.yaml").write_text(NARROW, encoding="utf-8")
    uniform = ("plan", "tiny-llama", "--allocate", "uniform", *QUIET)
    asked, told = {"keep": 0.7, "kv-cache": 0.7, "bytes": 4_700_000}[name], []
    for rounded in (1, 6, 12) if name == "kv-cache" else (1, 8, 40):
        coarse = ("--round", rounded, f"--{name}", asked)
        report = json.loads(succeeds(*uniform, *coarse, "--json").stdout)
        warnings = [warning for warning in report["warnings"] if "the plan has" in warning]
        found = check(succeeds, "plan.yaml", "tiny-llama")
        before, after = (found[when]["kv_bytes_per_token"] for when in ("before", "after"))
        kept = {"keep": found["keep"], "kv-cache": after / before, "bytes": found["after"]["bytes"]}[name]
        assert kept <= asked
        assert bool(warnings) == (kept < asked * 0.998)
        told += [warnings]
        if warnings:
            (warning,) = warnings
            assert warning.startswith(
                f"the plan has {name.replace('kv-c', 'KV c')} {round(kept, 4):,} instead of {asked:,}: "
            )
            assert f"--round {rounded}" in warning or rounded == 1
            assert f"# Warning: {warning}\n" in (work / "plan.yaml").read_text(encoding="utf-8")
    assert any(told)


def test_each_of_several_keeps_is_warned_of_by_itself(work: Path, llama: Path, succeeds: Any) -> None:
    (work / "base.yaml").write_text(NARROW, encoding="utf-8")
    uniform = ("plan", llama, "--allocate", "uniform", *QUIET, "--round", "40", "--keep", "0.7,1")
    report = json.loads(succeeds(*uniform, "--json").stdout)
    (warning,) = [warning for warning in report["warnings"] if "the plan has" in warning]
    assert warning.startswith("the plan has keep 0.6")
    assert "instead of 0.7" in warning
    heads = [(work / f"plan-{keep}.yaml").read_text(encoding="utf-8") for keep in ("0.7", "1")]
    assert [f"# Warning: {warning}" in head for head in heads] == [True, False]


def test_other_methods_and_layers_left_whole_are_the_base_plans(
    work: Path, gpt2: Path, succeeds: Any
) -> None:
    (work / "base.yaml").write_text(
        BASE.replace("a3", "whitened_svd") + "layers:\n- {match: 0, method: a3, mlp: keep-all}\n",
        encoding="utf-8",
    )
    succeeds("plan", gpt2, "--keep", "0.68", *QUICK)
    found = check(succeeds, "plan.yaml", gpt2)
    assert 0.68 * 0.998 <= found["keep"] <= 0.68
    first = {row["target"]: row["method"] for row in found["targets"] if row["layers"].startswith("0")}
    assert set(first) <= {"qk", "ov"}
    assert {row["method"] for row in found["targets"]} == {"a3", "whitened_svd"}


def test_a_model_of_ones_own_is_measured_on_the_validation_split(
    work: Path, succeeds: Any, shared_checkpoint: Any
) -> None:
    (work / "base.yaml").write_text(BASE.replace("data: calib.txt, ", ""), encoding="utf-8")
    (work / "wikitext2-raw").mkdir()
    for name, split in (("calib", "train"), ("held-out", "valid")):
        (work / f"{name}.txt").rename(work / "wikitext2-raw" / f"{split}.txt")
    few = ("--held-out-samples", "2", "--keeps", "0.7,0.4")
    options = (shared_checkpoint("gpt2"), "--keep", "0.8", *QUIET, *few, "--data-dir", work)
    for named, label in (((), "the validation splits of general"), (("wikitext2",), "wikitext2:validation")):
        held = [word for name in named for word in ("--held-out", name)]
        found = json.loads(succeeds("plan", *options, *held, "--json").stdout)
        assert found["held_out"] == f"{label} (2 blocks of 48 tokens)"
        assert found["calibration"] == "general (3 blocks of 48 tokens)"
        assert len(found["warnings"]) == len(GENERAL_WEIGHTS) - 1
        assert all("calibration on general without " in warning for warning in found["warnings"])
        assert "calibration: {data: general, samples: 3, " in (work / "plan.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-gpt2"])
@pytest.mark.parametrize("keep", [0.9, 0.6, 0.2])
def test_uniform_is_exact(work: Path, succeeds: Any, model: str, keep: float) -> None:
    succeeds("plan", model, "--allocate", "uniform", "--keep", keep, *QUIET)
    found = check(succeeds, "plan.yaml", model)
    assert keep * 0.998 <= found["keep"] <= keep
    assert all(abs(row["kept"] / row["whole"] - keep) < 2 / 32 for row in found["targets"])


@pytest.mark.parametrize("rounded", [1, 8])
@pytest.mark.parametrize("family", list(WIDE))
@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("uniform", "a3"),
        ("uniform", "whitened_svd"),
        ("energy", "a3"),
        ("fisher", "a3"),
        ("fisher", "two_sided_svd"),
        ("importance", "whitened_svd"),
        ("sensitivity", "svd"),
    ],
)
def test_every_allocation_spends_the_budget_on_legal_sizes(
    work: Path, succeeds: Any, models: dict[str, Path], name: str, method: str, family: str, rounded: int
) -> None:
    model = models[family]
    (work / "base.yaml").write_text(BASE.replace("a3", method), encoding="utf-8")
    few = ("--keeps", "0.7,0.4") if ALLOCATORS[name].keeps else ()
    few += ("--held-out", "held-out.txt", "--held-out-samples", "2") if ALLOCATORS[name].held_out else ()
    named = ("--allocate", name, "--keep", "0.7", "--round", rounded)
    arguments = ("plan", model, *named, *QUIET, *few)
    found = json.loads(succeeds(*arguments, "--floor", "0.45", "--cap", "0.9", "--json").stdout)
    checked = check(succeeds, "plan.yaml", model)
    step = rounded * (3 if method == "a3" else 17) * 32  # weights; of a factor pair, 512 + 32 at most
    assert 0.7 - max(0.002 * 0.7, step / found["plans"][0]["whole"]) <= checked["keep"] <= 0.7
    assert all(row["size"] % rounded == 0 for row in checked["targets"])
    assert all(0.45 <= row["kept"] / row["whole"] <= 0.9 for row in checked["targets"])
    assert found["allocation"] == name
    (plan,) = found["plans"]
    in_nats = found["unit"] in ("nats", "predicted nats")
    assert in_nats == (name in ("fisher", "importance", "sensitivity"))
    assert plan["factor"] == (pytest.approx(math.exp(plan["cost"])) if in_nats else None)
    text = (work / "plan.yaml").read_text(encoding="utf-8")
    assert ("perplexity times" in text) == in_nats
    assert f"# Allocation: {name}." in text
    assert ("Measured on" in text) == (name == "sensitivity")
    stored = [path.name.split(".")[:2] for path in work.glob("*.json")]
    assert stored == ([] if name == "uniform" else [[model.name, name]])


def test_sizes_are_told_out_of_the_methods_own_full_one(work: Path, gpt2: Path, succeeds: Any) -> None:
    (work / "base.yaml").write_text(BASE.replace("a3", "monarch"), encoding="utf-8")
    arguments = ("plan", gpt2, "--keep", "0.95", "--allocate", "uniform", *QUIET)
    (plan,) = json.loads(succeeds(*arguments, "--json").stdout)["plans"]
    ranks = {row["size"] for row in check(succeeds, "plan.yaml", gpt2)["targets"]}
    for sizes in plan["targets"]:
        assert sizes["full"] == 32 // 4
        assert set(sizes["sizes"]) <= ranks | {32 // 4}


def test_curves_of_another_allocation_are_refused(work: Path, gpt2: Path, succeeds: Any, fails: Any) -> None:
    first, again = (
        json.loads(succeeds("plan", gpt2, "--keep", keep, "--allocate", "energy", *QUIET, "--json").stdout)
        for keep in (0.8, 0.6)
    )
    assert (first["measured"], again["measured"]) == (True, False)
    used_again = ("plan", gpt2, "--keep", "0.8", *QUICK, "--curves", first["curves"])
    message = fails(*used_again, "--allocate", "sensitivity")
    assert "with other settings: allocation (there energy, here sensitivity)" in message


@pytest.mark.parametrize(
    ("name", "method", "reads"),
    [("fisher", "whitened_svd", True), ("energy", "whitened_svd", False), ("energy", "two_sided_svd", True)],
)
def test_curves_hang_on_the_gradients_where_they_are_read(
    work: Path, gpt2: Path, succeeds: Any, name: str, method: str, reads: bool
) -> None:
    for samples, anew in ((2, True), (2, False), (1, reads)):
        text = BASE.replace("a3", method).replace("samples: 3", f"samples: 3, gradient_samples: {samples}")
        (work / "base.yaml").write_text(text, encoding="utf-8")
        arguments = ("plan", gpt2, "--keep", "0.8", "--allocate", name, "--keeps", "0.7", *QUIET)
        assert json.loads(succeeds(*arguments, "--json").stdout)["measured"] == anew


def test_the_base_plan_may_name_the_allocation(work: Path, gpt2: Path, succeeds: Any) -> None:
    (work / "base.yaml").write_text(f"{BASE}allocate: energy\n", encoding="utf-8")
    result = succeeds("plan", gpt2, "--keep", "0.8", *QUIET)
    assert f"curves by energy, found in this run: {gpt2.name}.energy." in result.stdout
    assert "relative squared error" in result.stdout
    assert "perplexity" not in result.stdout


def test_a_uniform_of_the_base_plan_is_taken_at_its_word(work: Path, gpt2: Path, succeeds: Any) -> None:
    (work / "base.yaml").write_text(f"{BASE}allocate: uniform\n", encoding="utf-8")
    found = json.loads(succeeds("plan", gpt2, "--keep", "0.8", *QUIET, "--json").stdout)
    assert (found["allocation"], found["curves"]) == ("uniform", None)


@pytest.mark.parametrize(
    ("written", "asked", "told"),
    [
        ("keep: 0.5\n", ("--keep", "0.8"), "keep 0.8"),
        ("keep: 0.5\n", ("--keep", "0.8,0.5"), "keep 0.8 and keep 0.5"),
        ("keep: [0.9, 0.5]\n", ("--kv-cache", "0.6"), "KV cache 0.6"),
        ("keep: 0.8\n", ("--keep", "0.8"), None),
        ("", ("--keep", "0.8"), None),
    ],
)
def test_a_keep_of_the_base_plan_is_said_to_give_way(
    work: Path, gpt2: Path, succeeds: Any, written: str, asked: tuple[str, ...], told: str | None
) -> None:
    (work / "base.yaml").write_text(BASE + written, encoding="utf-8")
    result = succeeds("plan", gpt2, *asked, "--allocate", "uniform", *QUIET)
    said = f"base.yaml:4: keep: is replaced by what is asked for, {told}\n"
    assert result.output.count("is replaced by") == result.stderr.count("is replaced by") == bool(told)
    assert told is None or said in result.stderr


# Mistakes


@pytest.mark.parametrize(
    ("method", "name", "message"),
    [
        ("a3", "importance", "qk under 'a3' has none"),
        ("monarch", "importance", "q under 'monarch' has none"),
    ],
)
def test_an_allocation_asked_of_a_method_that_has_no_curve_is_refused(
    work: Path, gpt2: Path, fails: Any, method: str, name: str, message: str
) -> None:
    (work / "base.yaml").write_text(BASE.replace("a3", method), encoding="utf-8")
    assert message in fails("plan", gpt2, "--keep", "0.8", "--allocate", name, *QUIET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "say what to keep"),
        (("--keep", "0.8", "--bytes", "4M"), "--bytes stands alone"),
        (("--keep", "1.5"), "--keep 1.5 is outside (0, 1]"),
        (("--keep", "half"), "'half' is not a number"),
        (("--keep", ""), "--keep '' is empty; name something, or leave it out"),
        (("--keep", "0.8,0.8"), "names a fraction twice"),
        (("--keep", "0.8,0.80000001"), "names a fraction twice"),
        (("--bytes", "100GB"), "100,000,000,000 bytes are more than the whole model, which has "),
        (("--keep", "0.8", "-o", "/proc/plan.yaml"), "-o /proc/plan.yaml cannot be written: "),
        (("--kv-cache", "0"), "--kv-cache 0 is outside (0, 1]"),
        (("--bytes", "4 pounds"), "is not a size; write such as 4G"),
        (("--keep", "0.3"), "a keep of 0.3 cannot be met; the smallest that can is 0.3971"),
        (
            ("--kv-cache", "0.3"),
            "a KV cache of 0.3 without narrower keys (components: qk) cannot be met; the",
        ),
        (("--bytes", "100k"), "100,000 bytes cannot be met; the fewest that can are 2"),
        (
            ("--keep", "0.8", "--keeps", "0.5,1.0"),
            "--keeps 0.5,1: fractions are distinct, above 0 and below 1",
        ),
        (("--keep", "0.8", "--round", "0"), "--round 0 is too small"),
        (("--keep", "0.8", "--allocate", "sensitive"), "unknown allocation 'sensitive'; did you mean 'sens"),
        (
            ("--keep", "0.8", "--allocate", "energy"),
            "--held-out has no effect: allocation energy reads",
        ),
        (("--keep", "0.8", "--floor", "0"), "--floor 0 is outside (0, 1]"),
        (("--keep", "0.8", "--floor", "0.2"), "--floor 0.2 is below the smallest fraction measured"),
        (("--keep", "0.8", "--floor", "0.9", "--cap", "0.8"), "--floor 0.9 is above --cap 0.8"),
        (("--keep", "0.8", "--floor", "0.9"), "a keep of 0.8 cannot be met; the smallest that can is 0.9"),
        (("--keep", "0.8", "--cap", "0.7"), "a keep of 0.8 cannot be met; the largest that can is 0.6"),
        (("--keep", "0.8", "-o", "nowhere/plan.yaml"), "there is no folder nowhere"),
        (("--keep", "0.8", "-o", "base.yaml"), "was not made by lrc plan"),
        (
            ("--keep", "0.8", "--curves", "nowhere/c.json"),
            "--curves nowhere/c.json cannot be written: there is",
        ),
        (("--keep", "0.8", "--curves", "base.yaml"), "base.yaml holds no curves of lrc plan"),
        (("--keep", "0.8", "--held-out-samples", "10000"), "fewer than the 10000 held-out samples"),
        (("--keep", "0.8", "--held-out", "nothing"), "unknown text 'nothing'"),
        (("--keep", "0.8", "--held-out", ""), "held-out data '': '' names no text"),
        (("--keep", "0.8", "--calib", ""), "calibration data '': '' names no text"),
        (("--keep", "0.8", "--device", "tpu"), "there is no device 'tpu'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_told_before_anything_is_measured(
    work: Path, llama: Path, fails: Any, measured: list[int], options: tuple[str, ...], message: str
) -> None:
    assert message in fails("plan", llama, *QUICK, *options)
    assert not measured


def test_held_out_samples_need_held_out_text(work: Path, llama: Path, fails: Any) -> None:
    options = ("--keep", "0.8", "--allocate", "energy", "--held-out-samples", "2", *QUIET)
    assert "--held-out-samples has no effect: allocation energy reads" in fails("plan", llama, *options)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "components: {mlp: {rank: 9}}",
            "base.yaml:4: components.mlp.rank: sets a size, but the allocation finds the sizes",
        ),
        ("layers: [{match: 0, keep: 0.5}]", "base.yaml:4: layers[0].keep: sets a size"),
        ("components: {mlp: {kep: 1}}", "base.yaml:4: components.mlp.kep: unknown key"),
        ("layers: [{match: 0-1, qk: keep-all, ov: keep-all, mlp: keep-all}]", "nothing to allocate"),
    ],
)
def test_a_base_plan_without_sizes_to_find_is_refused(
    work: Path, llama: Path, fails: Any, line: str, message: str
) -> None:
    (work / "base.yaml").write_text(f"{BASE}{line}\n", encoding="utf-8")
    assert message in fails("plan", llama, "--keep", "0.8", *QUICK)


def test_a_cache_needs_components(work: Path, llama: Path, fails: Any) -> None:
    (work / "base.yaml").write_text(BASE.replace("a3", "svd"), encoding="utf-8")
    assert "the KV cache shrinks with" in fails("plan", llama, "--kv-cache", "0.8", *QUICK)


def test_calibration_that_draws_all_leaves_nothing_to_hold_out(work: Path, gpt2: Path, fails: Any) -> None:
    (work / "base.yaml").write_text(BASE.replace("samples: 3", "samples: all"), encoding="utf-8")
    message = fails("plan", gpt2, "--keep", "0.8", *QUICK, "--held-out", "calib.txt")
    assert "held-out text calib.txt: it has 0 blocks of 48 tokens besides the " in message


def test_held_out_text_that_is_in_the_calibration_is_refused(work: Path, llama: Path, fails: Any) -> None:
    text = " ".join(f"{n} sheep and {n * 37 % 101} goats." for n in range(200))
    (work / "text.txt").write_text(text, encoding="utf-8")
    (work / "copy.txt").write_text(f"Once upon a time: {text}", encoding="utf-8")
    (work / "base.yaml").write_text(BASE.replace("samples: 3", "samples: all"), encoding="utf-8")
    options = ("--held-out", "text.txt", "--calib", "copy.txt")
    message = fails("plan", llama, "--keep", "0.8", *QUICK, *options)
    assert "held-out text text.txt: it overlaps the calibration blocks" in message


def test_a_model_that_does_not_fit_says_how_much_it_needs(
    work: Path, llama: Path, fails: Any, measured: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lrc.allocation.sizing, "free_bytes", lambda device: 123_456)
    message = fails("plan", llama, "--keep", "0.8", *QUICK)
    assert "123,456 are free" in message
    assert "Allocate by fisher" in message
    needed = int(message.split("it needs about ")[1].split(" bytes")[0].replace(",", ""))
    assert 120_000 * 4 < needed < psutil.virtual_memory().total
    assert not measured
