"""The command `chat`: a conversation in a terminal."""

import builtins
import io
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from helpers.command_line import COMMAND, DEMO, ENGINE_OPTIONS, INTRODUCTION, ROOT, RecordingLLM
from nanovllm import LLM, SamplingParams
from nanovllm.entrypoints.command_line import main


@pytest.fixture
def talk(
    engines: list[RecordingLLM],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """Runs a greedy chat with the given lines of input. Returns the lines of stdout, and stderr."""

    def run(*lines: str, options: tuple[str, ...] = ("--temperature", "0")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert main(["chat", DEMO, *ENGINE_OPTIONS, *options]) == 0
        captured = capsys.readouterr()
        return captured.out.splitlines(), captured.err

    return run


def test_chat_of_several_turns(talk, engines: list[RecordingLLM]):
    out, err = talk("Who are you?", "", "47+38=", "  /reset ", "20+22=", "/exit", "1+1=")
    assert len(out) == 3
    assert out[0].startswith(INTRODUCTION)
    assert out[1:] == ["47 + 38 = 85", "20 + 22 = 42"]
    assert "/reset" in err and "/exit" in err
    (llm,) = engines
    check, first, second, third = llm.conversations
    assert [role for role, _ in check] == ["user"]  # the check that there is a chat template
    assert first == [("user", "Who are you?")]
    assert second == [*first, ("assistant", out[0]), ("user", "47+38=")]
    assert third == [("user", "20+22=")]
    assert llm.template_kwargs[-1] == {}


def test_chat_ends_with_its_input(talk):
    assert talk("47+38=")[0] == ["47 + 38 = 85"]
    assert talk()[0] == []


def test_second_turn_finds_the_first_in_the_prefix_cache(talk, engines: list[RecordingLLM]):
    talk("Count from 1 to 60.", "47+38=")
    (llm,) = engines
    (first, _), (second, _) = llm.streamed
    assert len(second) > len(first) + 2 * 64
    # The cache had all whole blocks of the first turn and its answer. New are less than two.
    assert llm.stats.prefill_tokens < len(first) + 2 * 64


def test_chat_options_reach_template_and_sampling(talk, engines: list[RecordingLLM]):
    options = ("--system", "Be brief.", "--no-thinking", "--top-p", "0.9", "--top-k", "5")
    options += ("--min-p", "0.1", "--temperature", "0.5", "--seed", "3", "--max-tokens", "2")
    out, err = talk("Who are you?", "/reset", "Who are you?", options=options)
    (llm,) = engines
    assert llm.conversations[1:] == [[("system", "Be brief."), ("user", "Who are you?")]] * 2
    assert llm.template_kwargs[-1] == {"enable_thinking": False}
    params = SamplingParams(temperature=0.5, top_p=0.9, top_k=5, min_p=0.1, seed=3, max_tokens=2)
    assert [given for _, given in llm.streamed] == [params] * 2
    assert out[0] == out[1]  # because of the seed
    assert err.count("[cut at --max-tokens]") == 2


def test_the_checkpoint_gives_the_other_options(
    talk, engines: list[RecordingLLM], monkeypatch: pytest.MonkeyPatch
):
    recommended = SamplingParams(temperature=0.25, top_k=7, repetition_penalty=1.5)
    monkeypatch.setattr(LLM, "get_default_sampling_params", lambda self: recommended)
    talk("Who are you?", options=("--top-k", "3"))
    ((_, params),) = engines[0].streamed
    assert (params.temperature, params.top_k, params.repetition_penalty) == (0.25, 3, 1.5)
    assert params.max_tokens is None


@pytest.mark.parametrize("how", ["raised", "signalled"])
def test_ctrl_c_stops_the_answer_and_not_the_chat(
    talk, engines: list[RecordingLLM], monkeypatch: pytest.MonkeyPatch, how: str
):
    stream = LLM.stream

    def interrupted(self: LLM, prompts: Any, params: Any = None) -> Iterator[Any]:
        first_turn = len(engines[0].streamed) == 1
        for number, piece in enumerate(stream(self, prompts, params)):
            if first_turn and number == 4:
                if how == "raised":
                    raise KeyboardInterrupt
                signal.raise_signal(signal.SIGINT)
            yield piece

    monkeypatch.setattr(LLM, "stream", interrupted)
    handler = signal.getsignal(signal.SIGINT)
    out, err = talk("Who are you?", "47+38=")
    said = "I am a tiny" if how == "raised" else "I am a tiny demo"
    assert out == [said, "47 + 38 = 85"]
    assert "[stopped" in err
    assert engines[0].conversations[-1][:2] == [("user", "Who are you?"), ("assistant", said)]
    assert signal.getsignal(signal.SIGINT) is handler


def test_second_ctrl_c_does_not_wait_for_the_engine(talk, monkeypatch: pytest.MonkeyPatch):
    def stuck(self: LLM, prompts: Any, params: Any = None) -> Iterator[Any]:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        yield {"text": "too late", "token_ids": [1], "finish_reason": None}

    monkeypatch.setattr(LLM, "stream", stuck)
    out, err = talk("Who are you?", "/reset")
    assert out == [""]
    assert err.index("[stopped") < err.index("forgotten")


def test_ctrl_c_at_the_prompt_ends_the_chat(talk, monkeypatch: pytest.MonkeyPatch):
    def interrupt(prompt: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "input", interrupt)
    assert talk()[0] == []


def test_conversation_that_does_not_fit(talk, engines: list[RecordingLLM]):
    options = ("--temperature", "0", "--max-model-len", "64")
    out, err = talk("47+38=", "Who are you? " * 20, "20+22=", options=options)
    assert out == ["47 + 38 = 85", "20 + 22 = 42"]
    assert "at most 63 fit" in err and "forgotten" not in err
    said = [content for _, content in engines[0].conversations[-1]]
    assert said == ["47+38=", out[0], "20+22="]  # without the message that did not fit


def test_answer_that_fills_the_conversation(talk):
    options = ("--temperature", "0", "--max-model-len", "32")
    out, err = talk("Who are you?", "/reset", "20+22=", options=options)
    assert out[0].startswith("I am a tiny demo model")
    assert out[1] == "20 + 22 = 42"
    assert "[the conversation is full: /reset forgets it]" in err


def test_a_conversation_that_grows_too_long_drops_its_oldest_turns(
    talk, engines: list[RecordingLLM]
):
    options = ("--temperature", "0", "--max-model-len", "80", "--system", "Be brief.")
    out, err = talk("1+1=", "2+2=", "3+3=", "4+4=", options=options)
    assert len(out) == 4
    said = [[content for _, content in messages] for messages in engines[0].conversations]
    assert ["Be brief.", "1+1=", out[0], "2+2="] in said
    assert said[-1] == ["Be brief.", "3+3=", out[2], "4+4="]
    assert "outgrew its 80 tokens: the oldest 1 of your messages" in err


def test_lines_that_begin_with_a_slash_are_commands(talk, engines: list[RecordingLLM]):
    out, err = talk("/help", "/rest", "/exit now", " //47+38=", "/quit", "20+22=")
    assert len(out) == 1
    assert [content for _, content in engines[0].conversations[-1]] == [" /47+38="]
    assert len(engines[0].streamed) == 1
    assert "/help     shows these lines" in err
    assert "no command /rest, and nothing was sent" in err and "no command /exit now" in err


def test_message_that_is_not_valid_unicode_is_left_out(talk, engines: list[RecordingLLM]):
    out, err = talk("\ud800", "20+22=")
    assert out == ["20 + 22 = 42"]
    assert "cannot be answered" in err
    assert engines[0].conversations[-1] == [("user", "20+22=")]


def test_chat_in_a_process() -> None:
    process = subprocess.run(
        [*COMMAND, "chat", DEMO, *ENGINE_OPTIONS, "--temperature", "0"],
        input="Who are you?\n你好，请从1数到10。\n".encode() + b"\xff\n",
        capture_output=True,
        cwd=ROOT,
    )
    assert process.returncode == 0, process.stderr
    first, second, _ = process.stdout.decode().splitlines()
    assert first.startswith(INTRODUCTION)
    assert second == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"
