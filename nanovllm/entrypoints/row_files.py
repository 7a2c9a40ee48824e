"""Files of rows to answer, and of answers: JSONL or Parquet, wherever pyarrow or fsspec reads.

Nothing here needs Ray; the functions run in its tasks and actors.
"""

import io
import json
import uuid
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from pyarrow.fs import FileSelector, FileSystem, FileType, FSSpecHandler, PyFileSystem

from nanovllm.entrypoints.answer_file import encode_line
from nanovllm.entrypoints.rows import PROMPT_TYPES, TEMPLATE_TYPES

ROWS_AT_ONCE = 1000
# What is read of a Parquet file. A data set may have columns of any name: "n" or "seed" need not
# be a sampling parameter's.
ROW_COLUMNS = ("id", *PROMPT_TYPES, *TEMPLATE_TYPES, "sampling_params")
ROW_SCHEMA = pa.schema(
    [
        ("file", pa.string()),  # below the input directory; a single file's name
        ("line", pa.int64()),  # or row of a Parquet file, from 1
        ("row", pa.binary()),  # a JSON object, as text
        ("digest", pa.uint64()),  # of all three
    ]
)
ANSWER_SCHEMA = pa.schema(
    [
        ("id", pa.string()),  # JSON text
        ("file", pa.string()),
        ("line", pa.int64()),
        ("digest", pa.string()),  # 16 hexadecimal digits
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("error", pa.string()),
    ]
)


def open_location(location: str) -> tuple[FileSystem, str]:
    """The file system of a path or URL, and the path there.

    Raises:
        OSError, ValueError, ImportError: if there is no such file system.
    """
    if "://" not in location:
        location = Path(location).resolve().as_posix()
    try:
        return FileSystem.from_uri(location)
    except pa.ArrowInvalid:  # a scheme that pyarrow does not know, such as https
        from fsspec.core import url_to_fs

        filesystem, path = url_to_fs(location)
        return PyFileSystem(FSSpecHandler(filesystem)), path


def list_files(filesystem: FileSystem, path: str) -> list[str]:
    """The JSONL or the Parquet files below a directory, in order, or the file that `path` is.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if there are files of both kinds.
    """
    kind = filesystem.get_file_info(path).type
    if kind is FileType.NotFound:
        raise FileNotFoundError(f"there is no {path}")
    if kind is not FileType.Directory:
        return [path]
    found = filesystem.get_file_info(FileSelector(path, recursive=True))
    files = sorted(
        info.path
        for info in found
        if info.type is FileType.File
        and not info.base_name.startswith((".", "_"))
        and {".jsonl", ".json", ".parquet"} & set(Path(info.base_name).suffixes)
    )
    if not files:
        raise FileNotFoundError(f"{path} has no .jsonl, .json or .parquet file")
    if len({is_parquet(file) for file in files}) > 1:
        raise ValueError(f"{path} has both JSONL and Parquet files: give one kind at a time")
    return files


def is_parquet(path: str) -> bool:
    return path.endswith(".parquet")


def read_rows(
    filesystem: FileSystem, path: str, name: str, written: np.ndarray
) -> Iterator[pa.Table]:
    """The rows of a file that have not been answered yet, as tables of ROW_SCHEMA.

    Args:
        filesystem, path: where the file is.
        name: of the file, in `file` and in the digests.
        written: sorted digests of the rows that have been answered, [any number] uint64.
    """
    numbered = enumerate(_contents(filesystem, path), start=1)
    while chunk := list(islice(numbered, ROWS_AT_ONCE)):
        rows = [(number, content) for number, content in chunk if content]
        digests = [row_digest(name, number, content) for number, content in rows]
        columns = {
            "file": [name] * len(rows),
            "line": [number for number, _ in rows],
            "row": [content for _, content in rows],
            "digest": digests,
        }
        table = pa.table(columns, schema=ROW_SCHEMA)
        yield table.filter(pa.array(~are_among(np.array(digests, np.uint64), written)))


def row_digest(name: str, number: int, content: bytes) -> int:
    """64 bits that stand for a row: of a file, at a place, with a content."""
    return xxhash.xxh3_64_intdigest(f"{name}\0{number}\0".encode() + content)


def are_among(digests: np.ndarray, written: np.ndarray) -> np.ndarray:
    """[n] uint64, sorted [m] uint64 -> [n] bool."""
    if not len(written):
        return np.zeros(len(digests), dtype=bool)
    places = np.searchsorted(written, digests)
    return written[np.minimum(places, len(written) - 1)] == digests


def write_answers(
    filesystem: FileSystem, directory: str, prefix: str, extension: str, answers: pa.Table
) -> None:
    """Write a batch of answers to a file, which is there as a whole or not at all.

    The name depends on the rows alone: a batch that is done twice is written to the same file.

    Args:
        filesystem, directory: where to.
        prefix: of the file's name.
        extension: "jsonl" or "parquet", where an id that is no string becomes its JSON text.
        answers: of ANSWER_SCHEMA.
    """
    digests = "".join(answers["digest"].to_pylist()).encode()
    name = f"{prefix}-{xxhash.xxh3_64_hexdigest(digests)}.{extension}"
    unfinished = f"{directory}/.{name}-{uuid.uuid4().hex}"
    with filesystem.open_output_stream(unfinished) as file:
        if extension == "parquet":
            ids = pa.array(map(_plain, answers["id"].to_pylist()), pa.string())
            pq.write_table(answers.set_column(0, "id", ids), file)
        else:
            for answer in answers.to_pylist():
                file.write(encode_line(answer | {"id": json.loads(answer["id"])}))
    filesystem.move(unfinished, f"{directory}/{name}")


def read_digests(filesystem: FileSystem, path: str) -> np.ndarray:
    """The digests in a file of answers, [rows] uint64."""
    if is_parquet(path):
        with filesystem.open_input_file(path) as file:
            texts = pq.read_table(file, columns=["digest"])["digest"].to_pylist()
    else:
        texts = [json.loads(content)["digest"] for content in _contents(filesystem, path)]
    return np.array([int(text, 16) for text in texts], np.uint64)


def without_nulls(value: Any) -> Any:
    """What a struct had before Arrow gave all structs of its column the same fields."""
    if isinstance(value, dict):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _contents(filesystem: FileSystem, path: str) -> Iterator[bytes]:
    """Each line of a JSONL file, without white space around it; each row of a Parquet file."""
    if is_parquet(path):
        with filesystem.open_input_file(path) as file:
            parquet = pq.ParquetFile(file)
            columns = [name for name in ROW_COLUMNS if name in parquet.schema_arrow.names]
            for batch in parquet.iter_batches(ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    yield json.dumps(without_nulls(row), default=str).encode()
    else:
        with filesystem.open_input_stream(path) as stream:  # also decompresses .gz and the like
            for line in io.BufferedReader(stream):
                yield line.strip()


def _plain(id_: str) -> str:
    """JSON text of a string -> the string; other JSON text stays what it is."""
    value = json.loads(id_)
    return value if isinstance(value, str) else id_
