"""The command `generate --ray`: answers of two engines to files of prompts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.command_line import COMMAND, DEMO, ROOT
from nanovllm.entrypoints.command_line import main

OPTIONS = [
    "--device", "cpu", "--dtype", "float32", "--max-model-len", "64", "--max-tokens", "4",
    "--temperature", "1",
]  # fmt: skip
BAD_LINES = ["not JSON", '{"prompt": ""}', '{"id": 7, "prompt": "a", "sampling_params": 5}']


def test_ray_that_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name in ("ray", "nanovllm.entrypoints.ray_data"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "nanovllm.entrypoints.ray_generate", raising=False)
    assert main([*command(tmp_path / "in.jsonl", tmp_path / "out")]) == 2
    assert "--ray needs Ray" in (message := capsys.readouterr().err)
    assert "pip install 'nanovllm[ray]'" in message


def test_options_without_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = command(tmp_path / "in.jsonl", tmp_path / "out")
    assert main([argument for argument in arguments if argument != "--ray"]) == 2
    assert "--replicas and --batch-size go with --ray" in capsys.readouterr().err


def command(source: Path, target: Path, *options: str) -> list[str]:
    return [
        "generate", DEMO, "--input", str(source), "--output", str(target), *OPTIONS, "--ray",
        "--replicas", "2", "--batch-size", "50", *options,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def local() -> Iterator[None]:
    """A Ray of this module's own, which the command finds and uses."""
    pytest.importorskip("ray")
    from helpers.ray_data import local_ray

    with local_ray():
        yield


class Run:
    """The command, in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: Any) -> tuple[int, str]:
        """Its exit status and the last line on stderr."""
        self.capsys.readouterr()
        status = main(command(*arguments))
        captured = self.capsys.readouterr()
        assert captured.out == ""
        return status, captured.err.replace("\r", "\n").splitlines()[-1]


@pytest.fixture
def run(local: None, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


def answers_in(directory: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """All answers, by file and line, of which each must be there once."""
    import pyarrow.parquet as pq

    answers = []
    for path in directory.iterdir():
        if path.suffix == ".parquet":
            answers += pq.read_table(path).to_pylist()
        else:
            answers += map(json.loads, path.read_text(encoding="utf-8").splitlines())
    by_row = {(answer["file"], answer["line"]): answer for answer in answers}
    assert len(by_row) == len(answers)
    return by_row


def prompts(count: int) -> list[str]:
    return [json.dumps({"id": f"row {i}", "prompt": f"{i}, {i + 1},"}) for i in range(count)]


@pytest.mark.slow
def test_lines_get_the_answers_of_the_command_without_ray(run: Run, tmp_path: Path):
    source, target, plain = (tmp_path / name for name in ("in.jsonl", "out", "plain.jsonl"))
    lines = [*prompts(200), "", *BAD_LINES]
    source.write_text("\n".join(lines))
    assert run(source, target) == (1, "Done: 200 answered, 0 skipped, 3 bad.")
    answers = answers_in(target)
    assert len(answers) == 203
    assert len({path.name for path in target.iterdir()}) >= 4
    arguments = ["generate", DEMO, "--input", str(source), "--output", str(plain), *OPTIONS]
    assert main(arguments) == 1
    for line in plain.read_text(encoding="utf-8").splitlines():
        expected = json.loads(line) | {"file": "in.jsonl", "error": None}
        found = answers["in.jsonl", expected["line"]]
        assert found | {"digest": ""} == expected | {"digest": ""}
    bad = {line: answer for (_, line), answer in answers.items() if answer["error"] is not None}
    assert {line: answer["id"] for line, answer in bad.items()} == {202: 202, 203: 203, 204: 7}
    assert bad[202]["error"].startswith("not JSON")
    assert bad[203]["error"].startswith("the prompt is empty")
    assert bad[204]["error"].startswith("sampling_params must be an object")
    assert all(answer["token_ids"] is None for answer in bad.values())

    # What is missing is done again, what is new is done, and nothing else.
    part = max(target.iterdir(), key=lambda path: path.stat().st_size)
    lost = part.read_bytes().count(b"\n")
    part.unlink()
    source.write_text("\n".join([*lines, *prompts(1)]))
    status, summary = run(source, target)
    assert status == 0
    assert summary == f"Done: {lost + 1} answered, {203 - lost} skipped, 0 bad."
    again = answers_in(target)
    assert again.pop(("in.jsonl", 205))["id"] == "row 0"
    assert again == answers

    before = sorted(target.iterdir())
    for options in (["--max-tokens", "5"], ["--seed", "1"], ["--no-thinking"]):
        status, message = run(source, target, *options)
        assert status == 2 and "of another model or other options" in message
    assert sorted(target.iterdir()) == before


@pytest.mark.slow
def test_a_directory_of_parquet(run: Run, tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    source, target = tmp_path / "in", tmp_path / "out"
    for name in ("a.parquet", "b/c.parquet"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        rows = {"prompt": ["1, 2, 3"] * 40 + [None], "n": [*range(41)], "id": [*range(41)]}
        params = [{"seed": 3, "max_tokens": None}, {"seed": None, "max_tokens": 2}, None] * 13
        pq.write_table(pa.table(rows | {"sampling_params": [*params, None, None]}), source / name)
    assert run(source, target) == (1, "Done: 80 answered, 0 skipped, 2 bad.")
    assert {path.suffix for path in target.iterdir()} == {".parquet"}
    answers = answers_in(target)
    assert set(answers) == {(f, i) for f in ("a.parquet", "b/c.parquet") for i in range(1, 42)}
    assert all(answer["id"] == str(answer["line"] - 1) for answer in answers.values())
    assert answers["a.parquet", 41]["error"].startswith("it needs one of prompt")
    tokens = {key: answer["token_ids"] for key, answer in answers.items()}
    assert {len(tokens["a.parquet", line]) for line in range(2, 40, 3)} == {2}
    assert tokens["a.parquet", 1] == tokens["a.parquet", 4] == tokens["b/c.parquet", 1]
    # Without a seed of its own, a row's answer depends on its file and its number.
    first, second = ([tokens[f, i] for i in range(3, 40, 3)] for f in ("a.parquet", "b/c.parquet"))
    assert first != second
    assert any(row != first[0] for row in first)


@pytest.mark.slow
def test_keys_of_a_line_reach_its_request_or_are_reported_once(run: Run, tmp_path: Path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out"
    line = {"prompt": "1, 2, 3", "max_tokens": 2, "ignore_eos": True, "note": 1}
    source.write_text((json.dumps(line) + "\n") * 120)
    assert main(command(source, target)) == 0
    assert {len(answer["token_ids"]) for answer in answers_in(target).values()} == {2}
    err = run.capsys.readouterr().err
    assert err.count("the key 'note', which is not known") == err.count("warning: a row has") == 1


def test_places_that_cannot_be_used(run: Run, tmp_path: Path):
    source = tmp_path / "in.jsonl"
    status, message = run(source, tmp_path / "out")
    assert status == 2 and "in.jsonl" in message
    source.write_text('{"prompt": "a"}\n')
    status, message = run(source, source)
    assert status == 2 and "--output is in the input" in message
    status, message = run(tmp_path, tmp_path / "out")
    assert status == 2 and "--output is in the input" in message
    (tmp_path / "file").touch()
    status, message = run(source, tmp_path / "file")
    assert status == 2 and "is a file: with --ray it must be a directory" in message
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.json").touch()
    status, message = run(source, tmp_path / "other")
    assert status == 2 and "has notes.json, which is of another model" in message
    (tmp_path / "other" / "notes.parquet").touch()
    status, message = run(source, tmp_path / "other")
    assert status == 2 and "has both JSONL and Parquet files" in message
    status, message = run(source, tmp_path / "out", "--replicas", "0")
    assert (status, message) == (2, "error: --replicas must be at least 1, got 0")


def test_a_second_run_on_the_same_output_is_refused(run: Run, tmp_path: Path):
    fcntl = pytest.importorskip("fcntl")
    source, target = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_text('{"prompt": "a"}\n')
    target.mkdir()
    descriptor = os.open(target, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # as a run has it while it lives
        status, message = run(source, target)
        assert status == 2 and f"another run is writing to {target}" in message
        assert not [*target.iterdir()]
    finally:
        os.close(descriptor)


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded(run: Run, tmp_path: Path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "a"}\n')
    arguments = command(source, tmp_path / "out")
    arguments[1] = "./nowhere"
    assert main(arguments) == 2
    assert "model directory './nowhere' does not exist" in run.capsys.readouterr().err


@pytest.mark.slow
def test_resume_after_a_kill_loses_and_doubles_nothing(run: Run, tmp_path: Path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_text("\n".join(prompts(1000)))
    process = subprocess.Popen(
        [*COMMAND, *command(source, target)], cwd=ROOT, stderr=subprocess.DEVNULL,
        env=os.environ | {"RAY_ADDRESS": "local"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not target.exists() or len(list(target.glob("part-*"))) < 3:
        assert process.poll() is None, "the process ended before the test could stop it"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert "another run is writing to" in run(source, target)[1]
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(5)  # until its actors have noticed
    left = answers_in(target)
    assert 150 <= len(left) < 1000
    status, summary = run(source, target)
    assert status == 0
    assert summary == f"Done: {1000 - len(left)} answered, {len(left)} skipped, 0 bad."
    answers = answers_in(target)
    assert set(answers) == {("in.jsonl", line) for line in range(1, 1001)}
    assert {key: answers[key] for key in left} == left
    assert all(answer["error"] is None and answer["token_ids"] for answer in answers.values())
