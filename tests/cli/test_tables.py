"""A budget that the embedding and the head share: ``lrc plan``, and ``allocate:`` in a plan of ``lrc compress``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.usefixtures("without_pages")

BASE = "format: 1\nmethod: {method}\nprojections: {tables}\ncalibration: {calibration}\n"
OPEN = "{embed: {method: whitened_svd}}"
BOTH = "{embed: {method: whitened_svd}, lm_head: {method: svd}}"
CALIBRATION = "{data: calib.txt, samples: 3, seq_len: 48}"
UNIFORM = ("--base", "base.yaml", "--device", "cpu")
QUICK = (*UNIFORM, "--keeps", "0.7,0.4")
SENSITIVE = (*QUICK, "--held-out", "held-out.txt", "--held-out-samples", "2")
# An MLP whose neurons are less than 0.2 % of the model each.
WIDE = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 256}


@pytest.fixture(autouse=True)
def texts(work: Path) -> None:
    for name, animals in (("calib", "sheep"), ("held-out", "goats")):
        text = " ".join(f"{n} {animals} of {n * 37 % 101}." for n in range(800))
        (work / f"{name}.txt").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def llamas(shared_checkpoint: Any) -> dict[bool, Path]:
    """By whether the head is the embedding."""
    return {tied: shared_checkpoint("llama", tie_word_embeddings=tied, **WIDE) for tied in (False, True)}


@pytest.fixture(scope="module")
def gpt2(shared_checkpoint: Any) -> Path:
    return shared_checkpoint("gpt2", n_head=2, n_inner=512)


def write(work: Path, tables: str, method: str = "a3", more: str = "", name: str = "base.yaml") -> None:
    text = BASE.format(method=method, tables=tables, calibration=CALIBRATION)
    (work / name).write_text(text + more, encoding="utf-8")


def check(succeeds: Any, model: Any, plan: str = "plan.yaml") -> dict[str, Any]:
    return json.loads(succeeds("check", model, "--plan", plan, "--json").stdout)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rounded", [1, 4])
@pytest.mark.parametrize("name", ["uniform", "energy", "sensitivity"])
def test_the_budget_is_of_decoder_and_tables(
    work: Path, succeeds: Any, llamas: dict[bool, Path], name: str, rounded: int, tied: bool
) -> None:
    write(work, OPEN if tied else BOTH)
    few = {"uniform": UNIFORM, "energy": QUICK, "sensitivity": SENSITIVE}[name]
    limits = ("--round", rounded, "--floor", "0.45", "--cap", "0.9")
    result = succeeds("plan", llamas[tied], "--keep", "0.7", "--allocate", name, *few, *limits, "--json")
    found = json.loads(result.stdout)
    (plan,) = found["plans"]
    checked = check(succeeds, llamas[tied])
    tables = 1 if tied else 2
    decoder = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 256)
    whole = decoder + tables * 256 * 32
    names = "decoder and embedding" if tied else "decoder, embedding and head"
    kept = sum(row["kept"] * len(row["layers"].split("-")) for row in checked["targets"])
    assert checked["with_tables"] == {key: plan[key] for key in ("of", "keep", "kept", "whole")}
    assert (plan["of"], plan["whole"], plan["kept"]) == (names, whole, kept)
    step = rounded * 3 * 32  # weights of neurons, which are the finest
    assert plan["keep"] == pytest.approx(kept / whole)
    assert 0.7 - max(0.002 * 0.7, step / whole) <= plan["keep"] <= 0.7
    assert all(0.45 <= row["kept"] / row["whole"] <= 0.9 for row in checked["targets"])
    assert all(row["size"] % rounded == 0 for row in checked["targets"])
    text = (work / "plan.yaml").read_text(encoding="utf-8")
    assert f"keeps {plan['keep']:.4f} of the weights of {names}." in text
    written = {name: entry["rank"] for name, entry in yaml.safe_load(text)["projections"].items()}
    assert written == {row["target"]: row["size"] for row in plan["tables"]}
    assert not any("not measured" in warning for warning in found["warnings"])


def test_several_keeps_cost_one_measurement_until_a_table_is_solved_otherwise(
    work: Path, gpt2: Path, succeeds: Any
) -> None:
    write(work, OPEN)
    first = succeeds("plan", gpt2, "--keep", "0.45,0.44", *SENSITIVE)
    assert "found in this run" in first.stdout
    assert first.stdout.count("\nembed: size ") == 2
    assert "of the weights of decoder and embedding" in first.stdout
    for keep in (0.45, 0.44):
        found = check(succeeds, gpt2, f"plan-{keep}.yaml")
        assert 0.998 * keep <= found["with_tables"]["keep"] <= keep
        assert found["keep"] != pytest.approx(keep, abs=0.01)  # which is of the decoder alone
    (curves,) = work.glob("gpt2-*.sensitivity.*.curves.json")
    stored = json.loads(curves.read_text(encoding="utf-8"))
    assert [c["target"] for c in stored["curves"] if c["layer"] is None] == ["embed"]
    for tables, measured in ((OPEN, False), ("{embed: {method: svd}}", True), ("{embed: keep-all}", True)):
        write(work, tables)
        again = json.loads(succeeds("plan", gpt2, "--keep", "0.7", *SENSITIVE, "--json").stdout)
        assert again["measured"] == measured
    assert (again["plans"][0]["of"], again["plans"][0]["tables"]) == ("decoder", [])


def test_bytes_count_tables_once(work: Path, gpt2: Path, succeeds: Any) -> None:
    write(work, OPEN)
    succeeds("plan", gpt2, "--bytes", "280kB", "--allocate", "energy", *QUICK)
    after = check(succeeds, gpt2)["after"]["bytes"]
    assert 0.995 * 280_000 <= after <= 280_000  # of which kilobytes are names of tensors


def test_a_cache_alone_leaves_tables_whole(work: Path, gpt2: Path, succeeds: Any) -> None:
    write(work, OPEN)
    result = succeeds("plan", gpt2, "--kv-cache", "0.6", "--allocate", "energy", *QUICK)
    assert "embed stays whole" in result.stdout
    assert "projections: {embed: keep-all}" in (work / "plan.yaml").read_text(encoding="utf-8")
    assert {row["target"] for row in check(succeeds, gpt2)["targets"]} == {"qk", "ov"}


def test_a_table_with_a_size_is_outside_the_budget(
    work: Path, succeeds: Any, llamas: dict[bool, Path]
) -> None:
    model = llamas[False]
    write(work, "{embed: {method: svd}, lm_head: {method: svd, rank: 9}}")
    found = json.loads(
        succeeds("plan", model, "--keep", "0.7", "--allocate", "energy", *QUICK, "--json").stdout
    )
    (plan,) = found["plans"]
    assert plan["of"] == "decoder and embedding"
    assert 0.698 <= plan["keep"] <= 0.7
    assert [(row["target"], row["size"]) for row in plan["tables"]][1:] == [("lm_head", 9)]
    assert sum("the cost of lm_head is not measured" in warning for warning in found["warnings"]) == 1
    tables = check(succeeds, model)["with_tables"]
    head = 256 * 32, 9 * (256 + 32)
    assert tables["of"] == "decoder, embedding and head"
    assert (tables["whole"] - head[0], tables["kept"] - head[1]) == (plan["whole"], plan["kept"])


def test_compress_takes_the_sizes_that_lrc_plan_finds(work: Path, gpt2: Path, succeeds: Any) -> None:
    (work / "wikitext2-raw").mkdir()
    (work / "held-out.txt").rename(work / "wikitext2-raw" / "valid.txt")
    more = "keep: 0.6\nallocate: sensitivity\nlayers: [{match: 0, keep: 1}]\n"
    write(work, OPEN, "whitened_svd", more)
    (work / "text.txt").write_text("All that is solid melts into air, and all is well. " * 300)
    run = ("--device", "cpu", "--data-dir", work, "--ppl", "text.txt", "--max-windows", "1")
    succeeds("compress", gpt2, "--plan", "base.yaml", "--out", "out", *run)
    succeeds("plan", gpt2, "--keep", "0.6", *UNIFORM, "--data-dir", work)
    result = succeeds("compress", gpt2, "--plan", "plan.yaml", "--out", "by-hand", *run, "--json")
    manifest, by_hand = (
        json.loads((work / folder / "lrc.json").read_text(encoding="utf-8")) for folder in ("out", "by-hand")
    )
    assert manifest["plan"]["layers"] == by_hand["plan"]["layers"]
    assert manifest["plan"]["outer"] == by_hand["plan"]["outer"] != []
    reports = [json.loads((work / folder / "report.json").read_text()) for folder in ("out", "by-hand")]
    assert reports[0]["with_tables"] == reports[1]["with_tables"] == json.loads(result.stdout)["with_tables"]
    tables = reports[0]["with_tables"]
    assert (tables["of"], tables["whole"]) == ("decoder and embedding", 2 * (4 + 32) * 32**2 + 256 * 32)
    assert 0.6 * 0.998 <= tables["keep"] <= 0.6
    assert reports[0]["keep"] == reports[1]["keep"] != tables["keep"]
    assert reports[0]["perplexity"][0]["after"]["value"] == reports[1]["perplexity"][0]["after"]["value"]
    page = (work / "out" / "report.md").read_text(encoding="utf-8")
    assert f"of the decoder's weights, {tables['keep']:.1%} of the weights of decoder and embedding." in page


@pytest.mark.parametrize(("name", "method"), [("fisher", "a3"), ("importance", "svd")])
def test_allocations_of_gradients_are_refused(
    work: Path, gpt2: Path, fails: Any, name: str, method: str
) -> None:
    write(work, OPEN, method)
    found = fails("plan", gpt2, "--keep", "0.8", "--base", "base.yaml", "--allocate", name)
    assert "allocations by gradients find no size for embed" in found
    assert "uniform, energy or sensitivity" in found
    write(work, OPEN, method, f"keep: 0.8\nallocate: {name}\n")
    found = fails("compress", gpt2, "--plan", "base.yaml", "--device", "cpu", "--no-eval")
    assert "allocations by gradients find no size for embed" in found


def test_without_an_allocation_nobody_finds_the_size(work: Path, gpt2: Path, fails: Any) -> None:
    write(work, OPEN, more="keep: 0.8\n")
    message = fails("compress", gpt2, "--plan", "base.yaml", "--device", "cpu")
    assert "base.yaml:3: projections.embed: has no size; write rank or keep" in message
    assert "such as 'allocate: sensitivity'" in message


def test_a_cap_that_no_table_can_meet_names_it(work: Path, gpt2: Path, fails: Any) -> None:
    write(work, OPEN, more="components: {qk: keep-all, ov: keep-all, mlp: keep-all}\n")
    options = (*QUICK, "--allocate", "energy", "--keep", "0.8", "--cap", "0.3")
    assert "--cap 0.3 leaves embed no size; its smallest keeps 0.3867" in fails("plan", gpt2, *options)


def test_the_embedding_alone_may_be_all_that_shrinks(work: Path, gpt2: Path, succeeds: Any) -> None:
    write(work, OPEN, more="components: {qk: keep-all, ov: keep-all, mlp: keep-all}\n")
    result = succeeds("plan", gpt2, "--keep", "0.97", "--allocate", "energy", *QUICK)
    assert "rank by layer" not in result.stdout
    decoder = 2 * (4 + 32) * 32**2
    rank = int(0.97 * (decoder + 256 * 32) - decoder) // (256 + 32)
    assert f"\nembed: size {rank}, " in result.stdout
    assert [(row["target"], row["size"]) for row in check(succeeds, gpt2)["targets"]] == [("embed", rank)]
