"""Files of rows and of answers, without Ray."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyarrow")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.fs import LocalFileSystem

from nanovllm.entrypoints.row_files import (
    ANSWER_SCHEMA,
    ROWS_AT_ONCE,
    are_among,
    list_files,
    open_location,
    read_digests,
    read_rows,
    without_nulls,
    write_answers,
)

LOCAL = LocalFileSystem()
NONE = np.empty(0, np.uint64)


def rows_of(path: Path, name: str = "name", written: np.ndarray = NONE) -> list[dict[str, Any]]:
    tables = list(read_rows(LOCAL, str(path), name, written))
    return [row for table in tables for row in table.to_pylist()]


def answers_of(*ids: object) -> pa.Table:
    empty = {"text": "é\u2028\n", "token_ids": [1, 2], "finish_reason": "stop", "error": None}
    return pa.Table.from_pylist(
        [{"id": json.dumps(id_), "file": "f", "line": i, "digest": f"{2**63 + i:016x}"} | empty
         for i, id_ in enumerate(ids, start=1)],
        ANSWER_SCHEMA,
    )  # fmt: skip


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gz"])
def test_lines_are_numbered_and_blank_ones_left_out(tmp_path: Path, compress: Any):
    path = tmp_path / ("p.jsonl" + ".gz" * (compress is gzip.compress))
    path.write_bytes(compress(b'{"prompt": 1}\r\n\n  \nnot JSON, \xff\n {"prompt": 2}'))
    assert [(row["line"], row["row"]) for row in rows_of(path)] == [
        (1, b'{"prompt": 1}'), (4, b"not JSON, \xff"), (5, b'{"prompt": 2}'),
    ]  # fmt: skip
    assert {row["file"] for row in rows_of(path)} == {"name"}


def test_rows_of_parquet_are_json_without_what_structs_were_given(tmp_path: Path):
    rows = [
        {"id": 1, "prompt": "a", "sampling_params": {"max_tokens": 3}, "other": b"\xff"},
        {"id": 2, "messages": [{"role": "user", "content": "b"}, {"role": "tool", "name": "c"}]},
        {"id": None, "prompt_token_ids": [1, 2], "sampling_params": {"seed": 4}},
    ]
    keys = {key for row in rows for key in row}
    table = pa.Table.from_pylist([dict.fromkeys(keys) | row for row in rows])
    pq.write_table(table, tmp_path / "p.parquet")
    found = rows_of(tmp_path / "p.parquet")
    assert [row["line"] for row in found] == [1, 2, 3]
    del rows[0]["other"], rows[2]["id"]
    assert [json.loads(row["row"]) for row in found] == rows


def test_a_digest_tells_rows_of_the_same_content_apart(tmp_path: Path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"prompt": "x"}\n' * 2 + '{"prompt": "y"}\n')
    digests = [
        row["digest"] for name in ("a.jsonl", "b.jsonl") for row in rows_of(tmp_path / name, name)
    ]
    assert len(set(digests)) == 6
    (tmp_path / "a.jsonl").write_text('{"prompt": "x"}\n{"prompt": "changed"}\n{"prompt": "y"}\n')
    changed = [row["digest"] for row in rows_of(tmp_path / "a.jsonl", "a.jsonl")]
    assert [new == old for new, old in zip(changed, digests)] == [True, False, True]


def test_rows_that_have_been_answered_are_left_out(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text("".join(f"{i}\n" for i in range(3 * ROWS_AT_ONCE // 2)))
    digests = np.array([row["digest"] for row in rows_of(path)], np.uint64)
    keep = np.arange(len(digests)) % 7 == 0
    found = rows_of(path, written=np.sort(digests[~keep]))
    assert [row["digest"] for row in found] == digests[keep].tolist()
    assert rows_of(path, written=np.sort(digests)) == []


def test_are_among():
    largest = 2**64 - 1
    digests = np.array([0, 5, 6, largest], np.uint64)
    assert are_among(digests, NONE).tolist() == [False] * 4
    assert are_among(digests, np.array([5], np.uint64)).tolist() == [False, True, False, False]
    written = np.array([0, 7, largest], np.uint64)
    assert are_among(digests, written).tolist() == [True, False, False, True]
    assert are_among(NONE, written).tolist() == []


@pytest.mark.parametrize("extension", ["jsonl", "parquet"])
def test_a_batch_that_is_written_twice_is_there_once(tmp_path: Path, extension: str):
    for answers in (answers_of("x", 2), answers_of("x", 2), answers_of("x")):
        write_answers(LOCAL, str(tmp_path), "part-0", extension, answers)
    paths = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_size)
    assert len(paths) == 2
    assert all(path.match(f"part-0-*.{extension}") for path in paths)
    assert read_digests(LOCAL, str(paths[1])).tolist() == [2**63 + 1, 2**63 + 2]


def test_ids_in_both_formats(tmp_path: Path):
    ids = ["x", 2, None, {"a": ["é"]}, "\ud800"]
    write_answers(LOCAL, str(tmp_path), "p", "jsonl", answers_of(*ids))
    write_answers(LOCAL, str(tmp_path), "p", "parquet", answers_of(*ids[:4]))
    lines, parquet = sorted(tmp_path.iterdir(), key=lambda path: path.suffix)
    found = [json.loads(line) for line in lines.read_bytes().splitlines()]
    assert [answer["id"] for answer in found] == ids
    assert found[0] == answers_of("x").to_pylist()[0] | {"id": "x"}
    strings = ["x", "2", "null", '{"a": ["\\u00e9"]}']
    assert pq.read_table(parquet)["id"].to_pylist() == strings


def test_what_is_cut_while_it_is_written_is_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(table: pa.Table, file: Any) -> None:
        file.write(b"PAR1")
        raise OSError("no space left")

    monkeypatch.setattr(pq, "write_table", fail)
    with pytest.raises(OSError, match="no space left"):
        write_answers(LOCAL, str(tmp_path), "part-0", "parquet", answers_of("x"))
    with pytest.raises(FileNotFoundError, match=r"has no \.jsonl"):
        list_files(LOCAL, str(tmp_path))


def test_list_files(tmp_path: Path):
    for name in ("b.jsonl", "a/c.json", "a/d.jsonl.gz", "notes.txt", ".e.jsonl", "_f.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    root = str(tmp_path)
    names = ["a/c.json", "a/d.jsonl.gz", "b.jsonl"]
    assert list_files(LOCAL, root) == [f"{root}/{name}" for name in names]
    assert list_files(LOCAL, f"{root}/notes.txt") == [f"{root}/notes.txt"]
    (tmp_path / "g.parquet").touch()
    with pytest.raises(ValueError, match="both JSONL and Parquet"):
        list_files(LOCAL, root)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list_files(LOCAL, f"{root}/nowhere")


def test_locations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for location in ("x", str(tmp_path / "x"), f"file://{tmp_path}/x"):
        assert open_location(location) == (LOCAL, str(tmp_path / "x"))
    filesystem, path = open_location(
        "memory://nanovllm-test/x.jsonl"
    )  # pyarrow leaves it to fsspec
    with filesystem.open_output_stream(path) as file:
        file.write(b"line\n")
    (table,) = read_rows(filesystem, path, "x", NONE)
    assert table["row"].to_pylist() == [b"line"]
    with pytest.raises(ValueError, match="no-such-scheme"):
        open_location("no-such-scheme://x")


def test_without_nulls():
    value = {"a": None, "b": [{"c": None, "d": 0}, None], "e": {"f": None}, "g": ""}
    assert without_nulls(value) == {"b": [{"d": 0}, None], "e": {}, "g": ""}
    assert without_nulls(None) is None
