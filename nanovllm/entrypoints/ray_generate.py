"""The command `generate --ray`: files of prompts, answered by engines in Ray's actors.

What has been answered is known from the output alone. Its digests, 8 bytes a row, are read into one
sorted array in Ray's object store, and the tasks that read the input drop the rows that it has. For
10 million rows that is 80 MB on each node, and one pass over the output when the command starts.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import xxhash
from tqdm import tqdm

from nanovllm import SamplingParams
from nanovllm.entrypoints.answer_file import lock
from nanovllm.entrypoints.common import (
    ENGINE_OPTIONS,
    SAMPLING_OPTIONS,
    CommandError,
    chat_template_kwargs,
    given_options,
    model_settings,
)
from nanovllm.entrypoints.generate import Counts, end, unknown_key_message
from nanovllm.entrypoints.rows import parse_object, unknown_keys

try:
    import numpy as np
    import pyarrow as pa
    import ray
    from pyarrow.fs import FileSystem, FileType

    from nanovllm.entrypoints import row_files
    from nanovllm.entrypoints.ray_data import LLMPredictor, replica_arguments
except ImportError as error:
    raise CommandError(f"--ray needs Ray ({error}): pip install 'nanovllm[ray]'") from error


class RowAnswerer(LLMPredictor):
    """Answers rows of `row_files.ROW_SCHEMA` and writes them to a file of their own.

    Args:
        model, **options: as for `LLMPredictor`.
        write_to: arguments of `row_files.write_answers`, all but the answers.
        has_one_file: a row's seed is then the one that the command gives without --ray.
    """

    def __init__(
        self, model: str, *, write_to: dict[str, Any], has_one_file: bool, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self.write_to = write_to
        self.has_one_file = has_one_file
        self.unknown_keys: set[str] = set()  # of all rows so far

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Write the answers, and return a row that counts them, `answered` and `bad`, and has the
        `unknown_keys` of all rows so far."""
        rows = batch.to_pylist()
        answers = [
            answer
            | {"id": _id(row), "file": row["file"], "line": row["line"]}
            | {"digest": f"{row['digest']:016x}"}
            for row, answer in zip(rows, self.answer(rows), strict=True)
        ]
        table = pa.Table.from_pylist(answers, row_files.ANSWER_SCHEMA)
        row_files.write_answers(answers=table, **self.write_to)
        bad = sum(answer["error"] is not None for answer in answers)
        unknown = pa.array([sorted(self.unknown_keys)], pa.list_(pa.string()))
        counts = {"answered": [len(answers) - bad], "bad": [bad]}
        return pa.table(counts | {"unknown_keys": unknown})

    def request(self, row: dict[str, Any]) -> tuple[str | list[int], SamplingParams]:
        name = row["line"] if self.has_one_file else f"{row['file']}:{row['line']}"
        item = parse_object(row["row"])
        self.unknown_keys.update(unknown_keys(item))
        return self.parser.parse(item, name)


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit status."""
    replicas = _positive(args.replicas, 1, "--replicas")
    batch_size = _positive(args.batch_size, 1024, "--batch-size")
    engine = given_options(args, ENGINE_OPTIONS)
    sampling = {"seed": 0} | given_options(args, SAMPLING_OPTIONS)
    template = chat_template_kwargs(args)
    settings = json.dumps(sampling | template | model_settings(args), sort_keys=True).encode()
    prefix = f"part-{xxhash.xxh3_64_hexdigest(settings)}"
    source, root, files = _input_files(args.input)
    target, directory = _output_directory(args.output, source, root)
    options = engine | {
        "sampling_params": sampling,
        "chat_template_kwargs": template,
        "has_one_file": files == [root],
        "write_to": {
            "filesystem": target,
            "directory": directory,
            "prefix": prefix,
            "extension": "parquet" if row_files.is_parquet(files[0]) else "jsonl",
        },
    }
    counts, reported_keys = Counts(), set[str]()
    try:
        with _locked(target, directory):
            _connect()
            written = _written_digests(target, _parts(target, directory, prefix, args.output))
            counts.skipped = len(written)
            counted = (
                _files(files, root)
                # With the one CPU of a repartition, Ray would make one task of both, which gives
                # out its first rows when it has read the whole file.
                .map_batches(
                    _row_reader(source, written), batch_size=1, batch_format="pyarrow", num_cpus=0.5
                )
                # The work of a replica, and all that is done again if it dies, is one batch.
                .repartition(target_num_rows_per_block=batch_size)
                .map_batches(
                    RowAnswerer,
                    fn_constructor_args=(_absolute(args.model),),
                    fn_constructor_kwargs=options,
                    **replica_arguments(replicas, batch_size, engine),
                )
            )
            with tqdm(desc="Answering", unit=" rows") as progress:
                for row in counted.iter_rows():
                    counts.answered += row["answered"]
                    counts.bad += row["bad"]
                    progress.update(row["answered"] + row["bad"])
                    for key in sorted({*row["unknown_keys"]} - reported_keys):
                        reported_keys.add(key)
                        tqdm.write(unknown_key_message(key, "a row"), file=sys.stderr)
    except KeyboardInterrupt:
        return end(counts, interrupted=True)
    except ray.exceptions.RayError as error:
        raise CommandError(
            f"{error}\nThe run has failed: {counts}. To go on from here, give the same command "
            "again."
        ) from error
    return end(counts, interrupted=False)


def _connect() -> None:
    """To the cluster that RAY_ADDRESS names, or to a Ray of this machine's own."""
    if not ray.is_initialized():
        ray.init(logging_level=logging.WARNING, include_dashboard=False)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


def _input_files(location: str) -> tuple[FileSystem, str, list[str]]:
    """The file system, the path that `location` is there, and the files to read."""
    try:
        filesystem, root = row_files.open_location(location)
        return filesystem, root, row_files.list_files(filesystem, root)
    except (ImportError, ValueError) as error:
        raise CommandError(f"--input {location} cannot be read: {error}") from error


def _output_directory(location: str, source: FileSystem, root: str) -> tuple[FileSystem, str]:
    """The file system and the path of the output directory, which is made if need be."""
    try:
        filesystem, directory = row_files.open_location(location)
    except (ImportError, ValueError) as error:
        raise CommandError(f"--output {location} cannot be written: {error}") from error
    if filesystem == source and f"{directory}/".startswith(f"{root}/"):
        raise CommandError("--output is in the input: give it another place")
    if filesystem.get_file_info(directory).type is FileType.File:
        raise CommandError(f"--output {location} is a file: with --ray it must be a directory")
    filesystem.create_dir(directory, recursive=True)
    return filesystem, directory


@contextmanager
def _locked(filesystem: FileSystem, directory: str) -> Iterator[None]:
    """Keeps other runs off an output directory of this machine; elsewhere there are no locks."""
    with ExitStack() as stack:
        if filesystem.type_name == "local":
            with suppress(OSError):  # Windows opens no directory
                descriptor = os.open(directory, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                lock(descriptor, directory)
        yield


def _parts(filesystem: FileSystem, directory: str, prefix: str, location: str) -> list[str]:
    """The files of answers that there are already."""
    try:
        files = row_files.list_files(filesystem, directory)
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise CommandError(f"--output {location} is not of this command: {error}") from error
    for file in files:
        if not Path(file).name.startswith(prefix):
            raise CommandError(
                f"--output {location} has {Path(file).name}, which is of another model or other "
                "options, or not of this command: give those of that run, or another --output"
            )
    return files


def _files(paths: list[str], root: str) -> ray.data.Dataset:
    """A row for each file: its path, and its name, which is the path below the directory `root`."""
    names = [Path(path).name if path == root else path.removeprefix(f"{root}/") for path in paths]
    return ray.data.from_items([{"path": path, "name": name} for path, name in zip(paths, names)])


def _row_reader(
    filesystem: FileSystem, written: np.ndarray
) -> Callable[[pa.Table], Iterator[pa.Table]]:
    """Makes of files the rows that have not been answered yet."""
    written_ref = ray.put(written)  # once, and not in each task

    def read(files: pa.Table) -> Iterator[pa.Table]:
        for file in files.to_pylist():
            written = ray.get(written_ref)
            yield from row_files.read_rows(filesystem, file["path"], file["name"], written)

    return read


def _written_digests(filesystem: FileSystem, parts: list[str]) -> np.ndarray:
    """The digests of all answers, sorted, [any number] uint64."""

    def read(files: pa.Table) -> Iterator[pa.Table]:
        for path in files["path"].to_pylist():
            yield pa.table({"digest": row_files.read_digests(filesystem, path)})

    if not parts:
        return np.empty(0, np.uint64)
    digests = _files(parts, "").map_batches(read, batch_size=1, batch_format="pyarrow")
    batches = digests.iter_batches(batch_format="numpy", batch_size=None)
    return np.unique(np.concatenate([batch["digest"] for batch in batches]))


def _absolute(model: str) -> str:
    """A directory's path as an actor needs it, which runs elsewhere; a hub id as it is."""
    return str(Path(model).resolve()) if Path(model).is_dir() else model


def _id(row: dict[str, Any]) -> str:
    """The id that a row gives, or else its number, as JSON text."""
    try:
        return json.dumps(parse_object(row["row"]).get("id", row["line"]))
    except ValueError:
        return str(row["line"])


def _positive(value: int | None, default: int, name: str) -> int:
    if value is not None and value < 1:
        raise CommandError(f"{name} must be at least 1, got {value}")
    return default if value is None else value
