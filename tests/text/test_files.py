"""Files by what they hold: columns by name, each value as it is written, compression and encoding by their marks."""

from __future__ import annotations

import bz2
import codecs
import gzip
import json
import lzma
import os
import threading

import pyarrow as pa
import pytest
from pyarrow import parquet

from lrc.errors import UserError
from lrc.text.files import read_plain, read_rows
from lrc.text.mixture import read_mixture
from lrc.text.source import read_text

TEXTS = ["1.50", "2024-01-02", 'a "quoted" word, and\r\na second line', "", "Zürich 007", "NA", " x "]


def table(delimiter=",", end="\n"):
    cells = ['"' + text.replace('"', '""') + '"' if set(text) & set(',"\n\t') else text for text in TEXTS]
    return delimiter.join(["id", "text"]) + end + end.join(f"{i}{delimiter}{c}" for i, c in enumerate(cells))


def zstd_stream(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


PACKERS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd_stream,
}


def forms():
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    buffer = pa.BufferOutputStream()
    parquet.write_table(pa.table({"id": range(len(TEXTS)), "text": TEXTS}), buffer)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    return {
        ".csv": table().encode(),
        ".tsv": table("\t", "\r\n").encode(),
        ".jsonl": lines.encode(),
        ".ndjson": lines.encode(),
        ".json": json.dumps(rows, indent=1).encode(),
        ".parquet": buffer.getvalue().to_pybytes(),
    }


@pytest.mark.parametrize("packed", PACKERS)
@pytest.mark.parametrize("form", forms())
def test_the_column_text_of_every_form_has_its_values_as_they_are_written(tmp_path, form, packed):
    data = PACKERS[packed](forms()[form])
    for name in (f"a{form}{packed}", f"A{form.upper()}{packed.upper()}", f"a{form}"):
        path = tmp_path / name
        path.write_bytes(data)
        assert read_rows(path, "text") == TEXTS
        assert read_text(str(path), "calibration").text == "\n\n".join(TEXTS)
    assert read_rows(path, "text", 2) == TEXTS[:2]


@pytest.mark.parametrize("packed", PACKERS)
def test_plain_text_and_parquet_are_known_by_their_first_bytes(tmp_path, packed):
    for name, content in (("a.txt", b"text\r\n"), ("data", forms()[".parquet"])):
        path = tmp_path / name
        path.write_bytes(PACKERS[packed](content))
        expected = "text\r\n" if name == "a.txt" else "\n\n".join(TEXTS)
        assert read_text(str(path), "evaluation").text == expected


def test_a_column_by_name_and_a_file_whose_name_has_the_colon(tmp_path):
    (tmp_path / "t.csv").write_text("id,text,a:b\n1,one,x\n007,two,y\n")
    (tmp_path / "t.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    parquet.write_table(pa.table({"body": ["one", "two"]}), tmp_path / "t.parquet")
    spec = f"{tmp_path}/t.csv:id"
    found = read_text(spec, "calibration")
    assert (found.text, found.label, found.origin) == ("1\n\n007", spec, "t.csv")
    assert read_text(f"{tmp_path}/t.csv:a:b", "calibration").text == "x\n\ny"
    for form in ("jsonl", "parquet"):
        assert read_text(f"{tmp_path}/t.{form}:body", "evaluation").text == "one\n\ntwo"
    (tmp_path / "t.csv:id").write_text("a whole file")
    found = read_text(spec, "calibration")
    assert (found.text, found.label, found.split) == ("a whole file", spec, None)


def test_a_column_in_a_mixture(tmp_path):
    for name in ("t.csv", "a,b.csv"):
        (tmp_path / name).write_text("id,text\n1,one\n")
    one, comma = f"{tmp_path}/t.csv:text", f"{tmp_path}/a,b.csv:text"
    mixture = read_mixture(f"{one}=2,builtin=1")
    assert (mixture.names, mixture.weights) == ((one, "builtin"), (2, 1))
    mixture.check(8)
    assert read_mixture(f"{one},builtin").names == (one, "builtin")
    assert read_mixture(comma).names == (comma,)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv:body", "id,text\n1,a\n", ["no column 'body'; columns: id, text"]),
        ("t.csv:", "id,text\n1,a\n", ["no column ''; columns: id, text"]),
        ("t.tsv", "id\tbody\n1\ta\n", ["no column 'text'; columns: id, body"]),
        ("t.csv", "id;text\n1;a\n", ["no column 'text'; columns: id;text"]),
        ("t.csv", "1,It was a dark\n2,b\n", ["columns: 1, It was a dark", "line 1 has to name the columns"]),
        ("t.csv", "x" * 500 + ",2\n", ["x" * 39 + "…, 2"]),
        ("t.csv", "text,text\na,b\n", ["two columns 'text'"]),
        ("t.csv", 'id,text\n1,"a\nb"\n\n2,b,c\n', ["line 5: 3 cells, but line 1 names 2 columns (id, text)"]),
        ("t.csv", "id,text\n1\n", ["line 2: 1 cells, but line 1 names 2 columns"]),
        ("t.csv", 'id,text\n1,a\n2,"b\n', ["line 3", "quotes"]),
        ("t.tsv", 'id\ttext\n1\t"a" b\n', ["line 2", "quotes"]),
        ("t.csv", "id,text\n", ["is empty"]),
        ("t.csv", "\n", ["is empty"]),
        ("t.txt:text", "id,text\n", ["is plain text, without a column 'text'", "CSV"]),
        ("t.jsonl:body", '{"text": "a"}', ["line 1: no text in field 'body'; fields: text"]),
        ("t.json", '[{"text": "a"}, {"text": null}]', ["row 2: no text in field 'text'"]),
        ("t.json", '[{"text": "a"},\n {"text" "b"}]', ["not JSON", "line 2, column 10"]),
    ],
)
def test_what_a_table_lacks_is_named(tmp_path, name, content, said):
    (tmp_path / name.partition(":")[0]).write_text(content)
    with pytest.raises(UserError) as error:
        read_text(f"{tmp_path}/{name}", "calibration")
    assert f"{tmp_path}/t." in str(error.value)
    assert [part for part in said if part not in str(error.value)] == []


def test_rows_of_parquet_without_text_are_named(tmp_path):
    parquet.write_table(pa.table({"text": ["a", None], "id": [1, 2]}), tmp_path / "t.parquet")
    for spec, said in (
        ("t.parquet", "row 2: no text in column 'text': it is null"),
        ("t.parquet:id", "int64"),
    ):
        with pytest.raises(UserError, match=said):
            read_text(f"{tmp_path}/{spec}", "calibration")


def test_a_cell_longer_than_the_csv_module_reads_by_default(tmp_path):
    (tmp_path / "t.csv").write_text("text\n" + "long " * 50_000 + "\n")
    assert len(read_rows(tmp_path / "t.csv", "text")[0]) == 250_000


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be", "utf-32-be"])
def test_texts_with_a_byte_order_mark_are_read_without_it(tmp_path, encoding):
    mark = {"utf-16-be": codecs.BOM_UTF16_BE, "utf-32-be": codecs.BOM_UTF32_BE}.get(encoding, b"")
    (tmp_path / "a.txt").write_bytes(mark + "Zürich\r\nżółw".encode(encoding))
    assert read_plain(tmp_path / "a.txt") == "Zürich\r\nżółw"
    for name in ("a.csv", "a.tsv"):
        (tmp_path / name).write_bytes(gzip.compress(mark + "text\nżółw".encode(encoding)))
        assert read_rows(tmp_path / name, "text") == ["żółw"]
    for name, lines in (("a.jsonl", '{"text": "ż"}\n{"text": "ó"}'), ("a.json", '[{"text": "ż"}]')):
        (tmp_path / name).write_bytes(mark + lines.encode(encoding))
        assert read_rows(tmp_path / name, "text")[0] == "ż"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (codecs.BOM_UTF16_LE + "ab\nc".encode("utf-16-le") + b"\x00\xd8x", "UTF-16: .* at byte 10 .line 2"),
        (codecs.BOM_UTF32_LE + b"a\0\0\0" + b"\xff\xff\xff\xff", "not UTF-32: .* at byte 8 .line 1"),
        (codecs.BOM_UTF8 + b"ab\n\xe9!", "is not UTF-8: .* at byte 6 .line 2"),
        ("no mark".encode("utf-16-le"), "NUL at byte 1 .*UTF-16.* convert it to UTF-8"),
        (b"caf\xe9 au lait", "is not UTF-8: .* at byte 3 .line 1.*convert"),
    ],
)
@pytest.mark.parametrize("name", ["a.txt", "a.csv"])
def test_what_cannot_be_decoded_is_named_with_its_byte(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        read_text(f"{tmp_path}/{name}", "evaluation")
    assert f"{tmp_path}/{name}" in str(error.value)


@pytest.mark.parametrize("packed", [".bz2", ".xz", ".zst", ".gz"])
def test_damaged_archives_are_refused(tmp_path, packed):
    data = PACKERS[packed](os.urandom(5000))
    for content in (data[:2000], b"plain text"):
        (tmp_path / f"a.txt{packed}").write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            read_text(f"{tmp_path}/a.txt{packed}", "evaluation")


def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(gzip.compress(b"text"),))
    writer.start()
    assert read_text(f"{tmp_path}/pipe", "evaluation").text == "text"
    writer.join()
