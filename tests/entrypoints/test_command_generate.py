"""The command `generate`: answers to a file of prompts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import edit_json, link_checkpoint
from helpers.command_line import COMMAND, DEMO, ENGINE_OPTIONS, ROOT, RecordingLLM
from nanovllm import LLM, SamplingParams
from nanovllm.entrypoints import common
from nanovllm.entrypoints.command_line import main


class Files:
    """An input file, an output file, and the command that reads one and writes the other."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.input = directory / "prompts.jsonl"
        self.output = directory / "answers.jsonl"
        self.model = DEMO
        self.capsys = capsys

    def command(self, *options: str) -> list[str]:
        files = ["--input", str(self.input), "--output", str(self.output)]
        return ["generate", self.model, *files, *ENGINE_OPTIONS, *options]

    def write_input(self, *lines: Any) -> None:
        """Write the input file: objects as JSON, strings as they are."""
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        content = "".join(text + "\n" for text in texts)
        self.input.write_bytes(content.encode("utf-8", "surrogateescape"))

    def run(self, *options: str) -> tuple[int, str, list[str]]:
        """Returns the exit status, and from stderr the summary and the reports of bad lines."""
        status = main(self.command(*options))
        captured = self.capsys.readouterr()
        assert captured.out == ""
        lines = captured.err.replace("\r", "\n").splitlines()
        return status, lines[-1], [line for line in lines[:-1] if line.startswith("line ")]

    def answers(self) -> dict[int, dict[str, Any]]:
        """The answers in the output file, by the number of the input line."""
        lines = self.output.read_text(encoding="utf-8").split("\n")
        assert lines.pop() == ""
        records = [json.loads(line) for line in lines]
        assert len({record["line"] for record in records}) == len(records)
        return {record["line"]: record for record in records}


@pytest.fixture
def files(tmp_path: Path, capsys: pytest.CaptureFixture[str], engines: object) -> Files:
    return Files(tmp_path, capsys)


def long_lines(count: int) -> list[dict[str, Any]]:
    """Lines with answers of different lengths, which are complete one after the other."""
    return [
        {"prompt": "1, 2, 3", "sampling_params": {"max_tokens": 12 * i, "ignore_eos": True}}
        for i in range(1, count + 1)
    ]


def test_every_kind_of_line(files: Files):
    messages = [{"role": "user", "content": "47+38="}]
    with LLM(DEMO, device="cpu", dtype="float32") as llm:
        token_ids = llm.chat_prompt([{"role": "user", "content": "Who are you?"}])
        prompt = llm.tokenizer.decode(token_ids)
        params = SamplingParams(temperature=0, max_tokens=9)
        (expected,) = llm.generate(token_ids, params, use_tqdm=False)
    files.write_input(
        {"prompt": prompt, "sampling_params": None, "note": "other keys do not matter"},
        {"prompt_token_ids": token_ids, "prompt": None, "id": {"any": ["JSON", 1.5, "é\ud800"]}},
        "",
        {"messages": messages, "id": None, "sampling_params": {"max_tokens": 30}},
        {"prompt": prompt, "id": "s", "sampling_params": {"stop": " tiny", "max_tokens": None}},
        {"prompt": prompt, "sampling_params": {"logit_bias": {str(token_ids[0]): -1}, "seed": 5}},
    )
    status, summary, reports = files.run("--temperature", "0", "--max-tokens", "9")
    assert (status, summary, reports) == (0, "Done: 5 answered, 0 skipped, 0 bad.", [])
    answers = files.answers()
    assert {number: record["id"] for number, record in answers.items()} == {
        1: 1, 2: {"any": ["JSON", 1.5, "é\ud800"]}, 4: None, 5: "s", 6: 6,
    }  # fmt: skip
    keys = ["id", "line", "digest", "text", "token_ids", "finish_reason"]
    assert all(list(record) == keys for record in answers.values())
    for number in (1, 2):
        record = answers[number]
        assert (record["text"], record["token_ids"], record["finish_reason"]) == (
            expected["text"], expected["token_ids"], "length",
        )  # fmt: skip
    assert (answers[4]["text"], answers[4]["finish_reason"]) == ("47 + 38 = 85", "stop")
    assert (answers[5]["text"], answers[5]["finish_reason"]) == ("I am a", "stop")


BAD_LINES = {
    "not JSON": ('{"prompt": "torn', "not JSON: "),
    "nested too deep": ("[" * 100_000, "not JSON"),
    "not UTF-8": ('{"prompt": "\udcff"}', "not JSON: 'utf-8' codec"),
    "no object": ([1, 2], "not a JSON object"),
    "no prompt": ({"text": "Hello"}, "needs one of prompt, prompt_token_ids, messages, and has no"),
    "two prompts": ({"prompt": "a", "messages": []}, "and has prompt and messages"),
    "prompt of another type": ({"prompt": 5}, "prompt must be a string, got 5"),
    "long value": ({"prompt": ["x" * 500]}, "prompt must be a string, got"),
    "empty prompt": ({"prompt": ""}, "the prompt is empty"),
    "half a character": ({"prompt": "\ud800"}, "the prompt is not valid Unicode"),
    "no list of tokens": ({"prompt_token_ids": "1 2"}, "prompt_token_ids must be a list"),
    "no token": ({"prompt_token_ids": [1, 10**9]}, "the prompt has token id 1000000000, outside"),
    "token of another type": ({"prompt_token_ids": [1, "2"]}, "the prompt, token 1 must be an"),
    "no messages": ({"messages": []}, "messages must be a list of dicts"),
    "odd message": ({"messages": ["Hello"]}, "messages must be a list of dicts"),
    "too long": ({"prompt_token_ids": [5] * 64}, "the prompt has 64 tokens, and at most 63 fit"),
    "no object of parameters": ({"prompt": "a", "sampling_params": [1]}, "must be an object"),
    "unknown parameter": ({"prompt": "a", "sampling_params": {"temp": 1}}, "has 'temp'; it takes"),
    "bad parameter": ({"prompt": "a", "sampling_params": {"top_p": 2}}, "top_p must be a finite"),
    "null": ({"prompt": "a", "sampling_params": {"temperature": None}}, "must be a number"),
    "bad bias": ({"prompt": "a", "sampling_params": {"logit_bias": {"x": 1}}}, "got 'x'"),
    "several answers": ({"prompt": "a", "sampling_params": {"n": 2}}, "no place in the output"),
    "parameter of another type": ({"prompt": "a", "top_p": 2}, "top_p must be a finite"),
    "parameter twice": (
        {"prompt": "a", "seed": 1, "sampling_params": {"seed": 1}}, "seed is given twice",
    ),
    "several answers, beside": ({"prompt": "a", "n": 2}, "no place in the output"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0], part 0 has the type 'image_url'",
    ),
    "misspelt content": (
        {"messages": [{"role": "user", "contents": "a"}]}, 'messages[0] needs a "content"',
    ),
    "tools without messages": ({"prompt": "a", "tools": []}, "tools needs messages"),
    "no list of tools": (
        {"messages": [{"role": "user", "content": "a"}], "tools": {}}, "tools must be a list",
    ),
    "no object for the template": (
        {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": [1]},
        "chat_template_kwargs must be an object",
    ),
    "infinite id": ('{"prompt": "a", "id": 1e999}', "id must be a JSON value"),
}  # fmt: skip


def test_bad_lines_are_reported_and_the_rest_goes_on(files: Files):
    good = {"prompt": "1, 2, 3"}
    files.write_input(good, *[line for line, _ in BAD_LINES.values()], good)
    status, summary, reports = files.run("--max-tokens", "4", "--max-model-len", "64")
    assert status == 1
    assert summary == f"Done: 2 answered, 0 skipped, {len(BAD_LINES)} bad."
    assert len(reports) == len(BAD_LINES)
    for number, (report, (_, reason)) in enumerate(zip(reports, BAD_LINES.values()), start=2):
        assert report.startswith(f"line {number}: ")
        assert reason in report
        assert len(report) < 600
    assert set(files.answers()) == {1, len(BAD_LINES) + 2}
    before = files.output.read_bytes()
    status, summary, _ = files.run("--max-tokens", "4", "--max-model-len", "64")
    assert (status, summary) == (1, f"Done: 0 answered, 2 skipped, {len(BAD_LINES)} bad.")
    assert files.output.read_bytes() == before


def test_keys_of_a_line_reach_its_request(files: Files):
    ask = {"prompt": "1, 2, 3", "ignore_eos": True}
    files.write_input(
        ask | {"max_tokens": 3},
        ask | {"stop": ", 11"},
        ask | {"temperature": 3, "seed": 7},
        {"prompt": "1, 2, 3", "temperature": 3, "sampling_params": {"ignore_eos": True, "seed": 7}},
        ask | {"max_tokens": None, "top_p": None},
    )
    assert files.run("--temperature", "0", "--max-tokens", "20")[0] == 0
    answers = files.answers()
    assert [len(answers[line]["token_ids"]) for line in (1, 3, 4, 5)] == [3, 20, 20, 20]
    assert (answers[2]["text"], answers[2]["finish_reason"]) == (", , 2", "stop")
    assert answers[3]["token_ids"] == answers[4]["token_ids"] != answers[5]["token_ids"]


def test_content_parts_tools_and_template_kwargs_reach_the_template(
    files: Files, tmp_path: Path, engines: list[RecordingLLM]
):
    template = (
        "{% for tool in tools or [] %}{{ tool.function.name }};{% endfor %}{{ color }};"
        "{{ enable_thinking }};{{ messages[0].content if messages[0].content is string }}"
    )
    path = link_checkpoint(Path(DEMO), tmp_path / "model")
    edit_json(path / "tokenizer_config.json", chat_template=template)
    files.model = str(path)
    files.write_input(
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
            "tools": [{"type": "function", "function": {"name": "add"}}],
            "chat_template_kwargs": {"color": "blue"},
            "max_tokens": 1,
        },
        {
            "messages": [{"role": "user", "content": "Hello"}],
            "chat_template_kwargs": {"enable_thinking": True},
            "max_tokens": 1,
        },
    )
    queued = []
    original = RecordingLLM.add_request

    def record(self: RecordingLLM, prompt: Any, params: Any) -> int:
        queued.append(self.tokenizer.decode(prompt))
        return original(self, prompt, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordingLLM, "add_request", record)
        assert files.run("--no-thinking")[0] == 0
    assert queued == ["add;blue;False;Hello", ";True;Hello"]


def test_a_key_that_is_not_known_is_reported_once(files: Files):
    line = {"prompt": "1, 2, 3", "max_token": 9}
    files.write_input({"prompt": "1, 2, 3"}, line, line | {"model": "m"})
    assert main(files.command("--max-tokens", "2")) == 0
    warnings = [line for line in files.capsys.readouterr().err.splitlines() if "warning" in line]
    assert warnings == [
        "warning: line 2 has the key 'max_token', which is not known, and ignored in all lines",
        "warning: line 3 has the key 'model', which is not known, and ignored in all lines",
    ]
    assert {len(answer["token_ids"]) for answer in files.answers().values()} == {2}


def test_a_long_line_is_reported_by_the_engine_alone(files: Files, tmp_path: Path):
    path = link_checkpoint(Path(DEMO), tmp_path / "model")
    edit_json(path / "tokenizer_config.json", model_max_length=8)
    files.model = str(path)
    files.write_input({"prompt": "1, 2, 3, " * 9})
    process = subprocess.run(
        [*COMMAND, *files.command("--max-model-len", "16")],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert "and at most 15 fit" in process.stderr
    assert "sequence length" not in process.stderr


def test_each_line_has_its_own_seed(files: Files, tmp_path: Path):
    line = {"prompt": "1, 2, 3", "sampling_params": {"ignore_eos": True}}
    files.write_input(line, line, line | {"sampling_params": {"ignore_eos": True, "seed": 7}})
    options = ("--max-tokens", "16", "--temperature", "3")
    results = {}
    for seed in ("0", None, "1"):
        files.output = tmp_path / f"{seed}.jsonl"
        assert files.run(*options, *(["--seed", seed] if seed else []))[0] == 0
        results[seed] = {n: record["token_ids"] for n, record in files.answers().items()}
    assert results["0"] == results[None]
    first, second = results["0"], results["1"]
    assert first[1] != first[2]
    assert first[1] != second[1]
    assert first[3] == second[3]  # this line has its own seed


def test_a_seed_of_minus_one_is_like_none(files: Files):
    line = {"prompt": "1, 2, 3", "sampling_params": {"ignore_eos": True, "temperature": 3}}
    minus_one = line | {"sampling_params": line["sampling_params"] | {"seed": -1}}
    files.write_input(line, line)
    assert files.run("--max-tokens", "8")[0] == 0
    expected = [files.answers()[number]["token_ids"] for number in (1, 2)]
    files.output.unlink()
    files.write_input(minus_one, minus_one)
    assert files.run("--max-tokens", "8")[0] == 0
    assert [files.answers()[number]["token_ids"] for number in (1, 2)] == expected


def test_a_large_file_is_not_queued_at_once(
    files: Files, engines: list[RecordingLLM], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(RecordingLLM, "options", {"max_num_seqs": 2})
    files.write_input(*[{"prompt": "1, 2, 3"}] * 30)
    assert files.run("--max-tokens", "3")[:2] == (0, "Done: 30 answered, 0 skipped, 0 bad.")
    assert engines[0].most_queued == 8


def test_resume_after_a_kill_gives_the_same_lines(files: Files):
    files.write_input("not JSON", *long_lines(16))
    whole = files.output
    assert files.run()[:2] == (1, "Done: 16 answered, 0 skipped, 1 bad.")
    expected = files.answers()

    files.output = whole.with_name("killed.jsonl")
    process = subprocess.Popen([*COMMAND, *files.command()], cwd=ROOT, stderr=subprocess.DEVNULL)
    wait_for_lines(process, files.output, 3)
    process.kill()
    process.wait()
    left = files.output.read_bytes()
    assert 3 <= left.count(b"\n") < 16
    status, summary, _ = files.run()
    skipped = left.count(b"\n")
    assert (status, summary) == (1, f"Done: {16 - skipped} answered, {skipped} skipped, 1 bad.")
    assert files.output.read_bytes().startswith(left[: left.rfind(b"\n") + 1])
    assert files.answers() == expected


def test_ctrl_c_keeps_complete_answers(files: Files):
    files.write_input(*long_lines(30))
    process = subprocess.Popen(
        [*COMMAND, *files.command()], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    wait_for_lines(process, files.output, 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    answered = len(files.answers())
    assert 2 <= answered < 30
    assert err.splitlines()[-1] == (
        f"Interrupted: {answered} answered, 0 skipped, 0 bad. To go on from here, give the same "
        "command again."
    )


def wait_for_lines(process: subprocess.Popen, path: Path, number: int) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < number:
        assert process.poll() is None, "the process ended before the test could stop it"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ctrl_c_while_the_model_is_loaded(files: Files, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "LLM", interrupt)
    files.write_input({"prompt": "a"})
    assert files.run()[:2] == (
        130,
        "Interrupted: 0 answered, 0 skipped, 0 bad. To go on from here, give the same command "
        "again.",
    )


@pytest.mark.parametrize("kept", [1, 6, 7, 30, -1])
def test_cut_last_line_is_removed(files: Files, kept: int):
    files.write_input({"prompt": "1, 2, 3"}, {"prompt": "2, 3, 4"})
    assert files.run("--max-tokens", "4")[0] == 0
    whole, expected = files.output.read_bytes(), files.answers()
    first, last = whole.splitlines(keepends=True)
    files.output.write_bytes(first + last[:kept])
    status, summary, _ = files.run("--max-tokens", "4")
    assert (status, summary) == (0, "Done: 1 answered, 1 skipped, 0 bad.")
    assert files.answers() == expected


def test_changed_input_is_an_error_of_that_line(files: Files):
    lines = [{"prompt": f"{i}, {i + 1}"} for i in range(4)]
    files.write_input(*lines)
    assert files.run("--max-tokens", "4")[0] == 0
    before = files.output.read_bytes()
    files.write_input(lines[0], {"prompt": "7, 8"}, lines[2])
    status, summary, reports = files.run("--max-tokens", "4")
    assert (status, summary) == (1, "Done: 0 answered, 2 skipped, 2 bad.")
    second, fourth = reports
    assert second.startswith("line 2: the output has an answer to another line of this number")
    assert fourth.startswith("line 4: the output has an answer to it, and the input has no such")
    assert files.output.read_bytes() == before


def test_nothing_is_written_to_the_output_of_another_input(files: Files):
    lines = [{"prompt": f"{i}, {i + 1}"} for i in range(6)]
    files.write_input(*lines[:4])
    assert files.run("--max-tokens", "4")[0] == 0
    before = files.output.read_bytes()
    files.write_input(lines[0], {"prompt": "new"}, *lines[1:])
    status, summary, reports = files.run("--max-tokens", "4")
    assert (status, summary) == (1, "Done: 0 answered, 1 skipped, 3 bad.")
    assert [report.split(":")[0] for report in reports] == ["line 2", "line 3", "line 4"]
    assert files.output.read_bytes() == before


def test_a_second_run_on_the_same_output_is_refused(files: Files, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("fcntl")
    step, statuses = RecordingLLM.step, []

    def run_beside(self: RecordingLLM) -> list[Any]:
        if not statuses:
            statuses.append(main(files.command("--max-tokens", "2")))
        return step(self)

    files.write_input({"prompt": "1, 2, 3"})
    with monkeypatch.context() as patch:
        patch.setattr(RecordingLLM, "step", run_beside)
        assert main(files.command("--max-tokens", "2")) == 0
    assert statuses == [2]
    assert f"another run is writing to {files.output}" in files.capsys.readouterr().err
    assert set(files.answers()) == {1}
    assert files.run("--max-tokens", "2")[:2] == (0, "Done: 0 answered, 1 skipped, 0 bad.")


def test_input_may_grow(files: Files):
    files.write_input({"prompt": "1, 2, 3"})
    assert files.run("--max-tokens", "4")[0] == 0
    files.write_input({"prompt": "1, 2, 3"}, {"prompt": "2, 3, 4"})
    status, summary, _ = files.run("--max-tokens", "4")
    assert (status, summary) == (0, "Done: 1 answered, 1 skipped, 0 bad.")


def test_other_options_are_an_error_of_each_line(files: Files):
    files.write_input({"prompt": "1, 2, 3"})
    assert files.run("--max-tokens", "4")[0] == 0
    status, summary, (report,) = files.run("--max-tokens", "5")
    assert (status, summary) == (1, "Done: 0 answered, 0 skipped, 1 bad.")
    assert "with another model or other options" in report


def test_another_model_is_an_error_of_each_line(files: Files, tmp_path: Path):
    files.write_input({"prompt": "1, 2, 3"})
    assert files.run("--max-tokens", "4")[0] == 0
    before = files.output.read_bytes()
    other = str(link_checkpoint(Path(DEMO), tmp_path / "other"))
    for model, options in ((other, []), (DEMO, ["--max-model-len", "64"])):
        files.model = model
        status, summary, (report,) = files.run("--max-tokens", "4", *options)
        assert (status, summary) == (1, "Done: 0 answered, 0 skipped, 1 bad.")
        assert "with another model or other options" in report
        assert files.output.read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        "notes\n", "notes", '{"id": 1, "prompt": "a"}\n', "\n", "[" * 100_000 + "\n",
        '{"id": 1, "prompt": "a"}', '{"id": [1, "x"], "pro', '{"prompt": ', "[" * 100_000,
    ],
)  # fmt: skip
def test_output_file_with_other_content_is_refused(files: Files, content: str):
    files.write_input({"prompt": "1, 2, 3"})
    files.output.write_text(content)
    status, message, _ = files.run()
    assert status == 2
    assert "answers.jsonl is not what this command writes" in message
    assert files.output.read_text() == content


def test_files_that_cannot_be_used(files: Files, tmp_path: Path):
    status, message, _ = files.run()
    assert status == 2 and "prompts.jsonl" in message
    files.write_input({"prompt": "1, 2, 3"})
    files.output = tmp_path / "nowhere" / "answers.jsonl"
    status, message, _ = files.run()
    assert status == 2 and "nowhere" in message
    files.output = files.input
    status, message, _ = files.run()
    assert status == 2 and "--output is the input" in message
    assert files.input.read_text() == '{"prompt": "1, 2, 3"}\n'


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_input_may_be_a_pipe(files: Files, tmp_path: Path):
    files.input = tmp_path / "pipe"
    os.mkfifo(files.input)
    for count, summary in ((1, "Done: 1 answered, 0 skipped"), (3, "Done: 2 answered, 1 skipped")):
        lines = '{"prompt": "a"}\n' * count
        writer = subprocess.Popen(
            [sys.executable, "-c", f"open({str(files.input)!r}, 'w').write({lines!r})"]
        )
        assert files.run("--max-tokens", "2")[:2] == (0, f"{summary}, 0 bad.")
        assert writer.wait() == 0
