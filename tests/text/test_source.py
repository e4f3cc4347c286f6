"""Texts by name and by path: the protocol of each data set, where it is looked for, and every refusal."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import os

import datasets
import pytest
from datasets import config as datasets_config

from lrc.errors import UserError
from lrc.text.datasets import DATASETS, DataSet, Split
from lrc.text.source import ASSETS, read_text


@pytest.fixture(autouse=True)
def no_data_variable(monkeypatch):
    monkeypatch.delenv("LRC_DATA_DIR", raising=False)


def write(folder, name, content):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(*texts, field="text"):
    return "".join(json.dumps({field: text, "other": 1}) + "\n" for text in texts)


def message(spec, *, data_dir=None):
    with pytest.raises(UserError) as error:
        read_text(str(spec), "evaluation", data_dir)
    return str(error.value)


# --- the protocol of each data set ---


def test_wikitext_test_split_is_the_official_one_joined_by_the_protocol(data_dir):
    raw = (data_dir / "wikitext2-raw" / "test.txt").read_bytes()
    assert (
        hashlib.sha256(raw).hexdigest() == "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08"
    )
    text = read_text("wikitext2", "evaluation", data_dir)
    lines = raw.decode().split("\n")[:-1]
    blank = sum(line == " " for line in lines)
    assert len(lines) == 4358
    # a blank row loses its space and newline, and 4357 joints of two newlines come in
    assert len(text.text) == len(raw.decode()) - 2 * blank + 2 * 4357
    assert text.text.startswith("\n\n = Robert Boulter = \n\n\n\n\n Robert Boulter is an English film")
    assert text.text.endswith("Eddie Pelkey . \n\n\n")
    assert (text.name, text.split, text.label, text.notes) == ("wikitext2", "test", "wikitext2:test", ())
    assert text.sha256 == hashlib.sha256(text.text.encode()).hexdigest()
    assert text.origin == "wikitext2-raw/test.txt"


def test_wikitext_from_text_and_from_parquet_is_the_same_text(tmp_path):
    rows = ["", " = Title = \n", "", " One \u2028 two . \n", " Three . \n", ""]
    write(tmp_path, "a/wikitext2-raw/test.txt", " \n = Title = \n \n One \u2028 two . \n Three . \n \n")
    write(
        tmp_path,
        "crlf/wikitext2-raw/test.txt",
        " \r\n = Title = \r\n \r\n One \u2028 two . \r\n Three . \r\n \r\n",
    )
    (tmp_path / "b" / "wikitext-2-raw-v1").mkdir(parents=True)
    parquet = tmp_path / "b" / "wikitext-2-raw-v1" / "test-00000-of-00001.parquet"
    datasets.Dataset.from_dict({"text": rows}).to_parquet(str(parquet))
    texts = {read_text("wikitext2", "evaluation", tmp_path / name).text for name in ("a", "b", "crlf")}
    assert texts == {"\n\n".join(rows)}


def test_splits_follow_the_use_and_the_whole_train_comes_before_its_head(tmp_path):
    for name in ("train-head", "valid", "test"):
        write(tmp_path, f"wikitext2-raw/{name}.txt", f" {name} \n")
    assert read_text("wikitext2", "calibration", tmp_path).text == " train-head \n"
    write(tmp_path, "wikitext2-raw/train.txt", " train \n")
    assert read_text("wikitext2", "calibration", tmp_path).text == " train \n"
    assert read_text("wikitext2", "evaluation", tmp_path).split == "test"
    for spelling in ("validation", "valid", "val"):
        text = read_text(f"wikitext2:{spelling}", "evaluation", tmp_path)
        assert (text.split, text.text) == ("validation", " valid \n")


def test_calibrating_on_the_evaluation_split_is_noted(tmp_path):
    write(tmp_path, "wikitext2-raw/test.txt", " x \n")
    write(tmp_path, "c4/validation-sample.jsonl", jsonl("y"))
    assert read_text("wikitext2:test", "evaluation", tmp_path).notes == ()
    assert read_text("wikitext2:test", "calibration", tmp_path).notes == (
        "wikitext2: test split used for calibration",
    )
    assert read_text("c4:valid", "calibration", tmp_path).notes == (
        "c4: validation split used for calibration",
    )


def test_c4_joins_documents_and_stops_at_the_protocols_number(tmp_path):
    write(tmp_path, "c4/validation-sample.jsonl", jsonl("a\nb", "c\u2028d"))
    assert read_text("c4", "evaluation", tmp_path).text == "a\nb\n\nc\u2028d"
    shard = gzip.compress(jsonl(*(f"document {i}" for i in range(2500))).encode())
    write(tmp_path, "c4/en/c4-validation.00000-of-00008.json.gz", shard)
    text = read_text("c4", "evaluation", tmp_path)  # the hub's own file comes before the sample
    assert text.text == "\n\n".join(f"document {i}" for i in range(600))
    assert text.split == "validation"


def test_c4_samples_are_read_whole(data_dir):
    texts = read_text("c4", "evaluation", data_dir), read_text("c4", "calibration", data_dir)
    for text, documents in zip(texts, (600, 1480), strict=True):
        lines = (data_dir / text.origin).read_bytes().split(b"\n")[:-1][:documents]
        assert len(lines) == documents
        assert text.text == "\n\n".join(json.loads(line)["text"] for line in lines)


def test_ptb_strips_its_sentences(tmp_path):
    write(tmp_path, "ptb/ptb.test.txt", " no it was n't <unk> monday \n but while \n")
    assert read_text("ptb", "evaluation", tmp_path).text == "no it was n't <unk> monday\n\nbut while"


def test_builtin_needs_no_data_folder(monkeypatch, tmp_path):
    import lrc.text.source

    if not (ASSETS / "heldout.txt").is_file():
        pytest.skip("the package holds no built-in text yet")
    held_out, calibration = read_text("builtin", "evaluation"), read_text("builtin", "calibration")
    assert held_out.text == (ASSETS / "heldout.txt").read_text(encoding="utf-8")
    assert calibration.text == (ASSETS / "calibration.txt").read_text(encoding="utf-8")
    assert "no split 'valid': known: test, train" in message("builtin:valid")
    monkeypatch.setattr(lrc.text.source, "ASSETS", tmp_path)
    assert "heldout.txt: missing; the installation of lrc is damaged" in message("builtin")


def test_the_table_has_a_split_for_each_use_and_says_what_it_is():
    for name, data_set in DATASETS.items():
        assert name == data_set.name
        assert {data_set.calibration, data_set.evaluation} <= set(data_set.splits)
        assert data_set.calibration != data_set.evaluation
        assert all([data_set.summary, data_set.licence, data_set.protocol])
        assert all(split.local for split in data_set.splits.values())


# --- where a data set is looked for ---


def test_the_variable_names_the_data_folder_and_the_argument_goes_before_it(tmp_path, monkeypatch):
    write(tmp_path, "a/ptb/test.txt", "from the variable")
    write(tmp_path, "b/ptb/test.txt", "from the argument")
    monkeypatch.setenv("LRC_DATA_DIR", str(tmp_path / "a"))
    assert read_text("ptb", "evaluation").text == "from the variable"
    assert read_text("ptb", "evaluation", tmp_path / "b").text == "from the argument"
    monkeypatch.setenv("LRC_DATA_DIR", str(tmp_path / "c"))
    assert message("ptb") == f"{tmp_path / 'c'}, given by LRC_DATA_DIR, is not a folder"
    assert (
        message("ptb", data_dir=tmp_path / "d") == f"{tmp_path / 'd'}, given by --data-dir, is not a folder"
    )


@pytest.mark.parametrize("suffix", ["parquet", "json.gz"])
@pytest.mark.parametrize("documents", [None, 3])
def test_the_hub_path_reads_rows_through_datasets(tmp_path, monkeypatch, suffix, documents):
    """The real loader on a folder that stands for the hub's repository: one file of it, whole or streamed."""
    rows = [f"row {i}" for i in range(5)]
    file = write(tmp_path, f"repository/part/0000.{suffix}", b"")
    other = write(tmp_path, f"repository/other/0000.{suffix}", b"")
    for path, texts in ((file, rows), (other, ["other split"])):
        if suffix == "parquet":
            datasets.Dataset.from_dict({"sentence": texts}).to_parquet(str(path))
        else:
            path.write_bytes(gzip.compress(jsonl(*texts, field="sentence").encode()))
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    split = Split(("x/test.txt",), hub_file=f"part/0000.{suffix}", documents=documents)
    data_set = DataSet(
        "x", "s", "l", "p", {"test": split}, hub=str(tmp_path / "repository"), column="sentence", joiner=" | "
    )
    monkeypatch.setitem(DATASETS, "x", data_set)
    text = read_text("x", "evaluation")
    assert text.text == " | ".join(rows[:documents])


@pytest.mark.parametrize(
    ("name", "use", "expected"),
    [
        (
            "wikitext2",
            "evaluation",
            {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test", "streaming": False},
        ),
        (
            "c4",
            "calibration",
            {
                "path": "allenai/c4",
                "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
                "split": "train",
                "streaming": True,
            },
        ),
        (
            "ptb",
            "evaluation",
            {
                "path": "ptb-text-only/ptb_text_only",
                "revision": "refs/convert/parquet",
                "data_files": {"test": "penn_treebank/test/0000.parquet"},
                "split": "test",
            },
        ),
        (
            "pile",
            "evaluation",
            {
                "path": "monology/pile-uncopyrighted",
                "data_files": {"test": "default/partial-test/0000.parquet"},
                "streaming": True,
            },
        ),
    ],
)
def test_what_is_asked_of_the_hub(monkeypatch, name, use, expected):
    column = DATASETS[name].column

    def load_dataset(path, name=None, **options):
        asked = {"path": path, "name": name, **options}
        assert {key: asked[key] for key in expected} == expected
        return ({column: f"row {i}"} for i in range(20_000))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    text = read_text(name, use).text
    split = DATASETS[name].splits[expected.get("split", "test")]
    assert text == "\n\n".join(f"row {i}" for i in range(split.documents or 20_000))


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_no_network_and_no_data_says_which_files_to_give(tmp_path, monkeypatch, name):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")
    split = DATASETS[name].splits[DATASETS[name].evaluation]
    for folder, searched in ((None, "no data folder is given"), (tmp_path, f"not in {tmp_path}")):
        said = message(name, data_dir=folder)
        assert f"no text for {name}:{DATASETS[name].evaluation}: {searched}" in said
        assert "--data-dir" in said
        assert "LRC_DATA_DIR" in said
        assert all(file in said for file in split.local)
        assert "\n" not in said


# --- files ---


def test_files_by_path_in_every_form(tmp_path):
    text = "Ünïcode text\r\nof two lines\n"
    plain = write(tmp_path, "a.txt", text)
    forms = [plain, write(tmp_path, "a.txt.xz", lzma.compress(text.encode()))]
    forms.append(write(tmp_path, "noending", text))
    for path in forms:
        read = read_text(str(path), "calibration")
        assert (read.text, read.name, read.split, read.label) == (text, str(path), None, str(path))
        assert read.sha256 == hashlib.sha256(text.encode()).hexdigest()
    rows = jsonl("one", "two\u2028") + "\n"
    for path in (
        write(tmp_path, "b.jsonl", rows),
        write(tmp_path, "b.jsonl.xz", lzma.compress(rows.encode())),
        write(tmp_path, "b.jsonl.gz", gzip.compress(rows.encode())),
    ):
        assert read_text(str(path), "evaluation").text == "one\n\ntwo\u2028"


def test_a_file_named_like_a_data_set_is_reached_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "c4", "my own text")
    assert read_text(f".{os.sep}c4", "evaluation").text == "my own text"


def test_unknown_names_give_the_nearest(tmp_path):
    assert message("wikitxt2") == (
        "unknown text 'wikitxt2': did you mean 'wikitext2'? known: builtin, c4, chat, code, pile, ptb, "
        "textbooks, web, wikipedia, wikipedia-es, wikipedia-fr, wikitext2; "
        "or a path to a text file"
    )
    assert "no split 'tset': did you mean 'test'? known: test, train, validation" in message("wikitext2:tset")
    assert message(tmp_path / "gone.txt") == f"{tmp_path / 'gone.txt'}: no such file"
    assert message("gone.jsonl") == "gone.jsonl: no such file"
    assert f"{tmp_path} is a folder" in message(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.txt", b"", "is empty: it holds no text"),
        ("blank.txt", b" \n\n", "is empty: it holds no text"),
        ("empty.jsonl", b"\n", "is empty: it holds no text"),
        ("binary.txt", b"one\ntwo\0three", "is not a text file: NUL at byte 7 (line 2)"),
        ("latin.txt", b"one\ntwo\ncaf\xe9!", "is not UTF-8: invalid continuation byte at byte 11 (line 3)"),
        (
            "latin.jsonl",
            b'{"text": "a"}\n{"text": "\xff"}',
            "is not UTF-8: invalid start byte at byte 24 (line 2)",
        ),
        ("binary.jsonl", b'{"text": "a"}\n\0', "is not a text file: NUL at byte 14 (line 2)"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not JSON: Expecting value at column 10"),
        ("fields.jsonl", b'{"body": "a", "id": 3}', "line 1: no text in field 'text'; fields: body, id"),
        ("number.jsonl", b'{"text": 3}', "line 1: no text in field 'text'; fields: text"),
        ("list.jsonl", b'["a"]', "line 1: expected an object with a field 'text', found list"),
        ("half.jsonl", b'{"text": "ab\\ud800"}', "character 2 is half of a surrogate pair, not text"),
        ("cut.txt.xz", lzma.compress(b"text " * 1000)[:40], "cannot be read: Compressed file ended"),
        ("not.txt.gz", b"plain text", "cannot be read: Not a gzipped file"),
        ("not.parquet", b"plain text", "cannot be read as parquet"),
    ],
)
def test_files_that_hold_no_text_are_refused(tmp_path, name, content, said):
    path = write(tmp_path, name, content)
    assert str(path) in message(path)
    assert said in message(path)


def test_a_parquet_file_without_the_column_is_refused(tmp_path):
    datasets.Dataset.from_dict({"body": ["a"], "id": [1]}).to_parquet(str(tmp_path / "a.parquet"))
    assert message(tmp_path / "a.parquet").endswith("a.parquet: no column 'text'; columns: body, id")
