"""Several threads that call one LLM: their requests share steps, and nothing else."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import Reference, random_tokens
from helpers.engines import BOTH_ORDERS, GREEDY, PROMPTS, assert_empty, build, greedy
from nanovllm import LLM, SamplingParams

LONG = SamplingParams(temperature=0, max_tokens=100)
ENDLESS = SamplingParams(temperature=0, max_tokens=550)  # for what does not get that far
MANY = [random_tokens(3 + 5 * seed % 41, seed=seed) for seed in range(12)]
SEEDED = [SamplingParams(seed=seed, max_tokens=4 + seed) for seed in range(12)]


@pytest.fixture
def impatient() -> Iterator[None]:
    """Threads take turns as often as Python can have it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Thread(threading.Thread):
    """Calls a function; `result` returns or raises what that has."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        super().__init__(daemon=True)
        self.function, self.args = function, args
        self.value, self.error = None, None
        self.start()

    def run(self) -> None:
        try:
            self.value = self.function(*self.args)
        except BaseException as error:
            self.error = error

    def result(self) -> Any:
        self.join(60)
        assert not self.is_alive(), "a thread waits for ever"
        if self.error is not None:
            raise self.error
        return self.value


def num_unfinished(llm: LLM) -> int:
    return llm.scheduler.num_unfinished


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def at_step(llm: LLM, number: int, function: Callable[[], None]) -> None:
    """Call a function in the step of this number, whoever takes it."""
    launch, numbers = llm.model_runner.launch, iter(range(10**6))

    def wrapped(*args):
        if next(numbers) == number:
            function()
        return launch(*args)

    llm.model_runner.launch = wrapped


def streamed(llm: LLM, prompts: list, params: Any, leave_after: int | None = None) -> list:
    found: list[list[int]] = [[] for _ in prompts]
    for number, piece in enumerate(llm.stream(prompts, params)):
        found[piece["index"]] += piece["token_ids"]
        if number == leave_after:
            break
    return found


@BOTH_ORDERS
def test_each_of_many_calls_gets_its_own_results(
    tiny: Path, impatient: None, async_scheduling: bool
):
    """Beside others that are left, or fail, in the middle; there are too few blocks for all."""
    with build(tiny, num_kvcache_blocks=8, async_scheduling=async_scheduling) as llm:
        expected = greedy(llm, MANY, SEEDED)

        def call_often(number: int) -> None:
            for i in range(5):
                picks = [(7 * number + i + j) % 12 for j in range(1 + (number + i) % 5)]
                prompts, params = [MANY[k] for k in picks], [SEEDED[k] for k in picks]
                want = [expected[k] for k in picks]
                if number == 0:
                    streamed(llm, prompts, params, leave_after=i)
                elif number == 1:
                    with pytest.raises(TypeError):  # the second prompt is none
                        llm.generate([MANY[0], None], use_tqdm=False)
                elif number % 2:
                    assert streamed(llm, prompts, params) == want
                else:
                    assert greedy(llm, prompts, params) == want

        for thread in [Thread(call_often, number) for number in range(8)]:
            thread.result()
        assert_empty(llm)
        assert greedy(llm, MANY, SEEDED) == expected


def test_chats_of_two_threads(demo_copy: Path):
    chats = [[{"role": "user", "content": text}] for text in ("Who are you?", "47 + 38 =")]
    with build(demo_copy) as llm:
        expected = [llm.chat(chat, GREEDY, use_tqdm=False)[0]["text"] for chat in chats]
        threads = [Thread(llm.chat, chat, GREEDY, False) for chat in chats]
        assert [thread.result()[0]["text"] for thread in threads] == expected


def test_calls_share_steps_and_the_shorter_one_returns_first(llm: LLM, tiny_reference: Reference):
    num_steps, step = [0], llm.step
    others: list[Thread] = []

    def counted() -> list:
        num_steps[0] += 1
        if num_steps[0] == 3:
            others.append(Thread(greedy, llm, PROMPTS[1:2]))
            wait_until(lambda: bool(llm._callers._entering) or num_unfinished(llm) == 2)
        return step()

    llm.step = counted
    long = Thread(greedy, llm, PROMPTS[:1], LONG)
    wait_until(lambda: bool(others))
    assert others[0].result() == [tiny_reference.tokens(PROMPTS[1], 12)]
    assert long.is_alive()
    assert long.result() == [tiny_reference.tokens(PROMPTS[0], 100)]
    assert num_steps[0] <= 104, "two prompts, and each token of the longer answer"


def test_ctrl_c_ends_the_requests_of_the_main_thread_only(llm: LLM, tiny_reference: Reference):
    """Also where the main thread steps for all, in the middle of a step."""
    threads: list[Thread] = []

    def join_in() -> None:
        threads.append(Thread(greedy, llm, PROMPTS))

    at_step(llm, 2, join_in)
    step = llm.step

    def interrupted() -> list:
        if threads and num_unfinished(llm) == 1 + len(PROMPTS):
            at_step(llm, 0, lambda: signal.raise_signal(signal.SIGINT))
        return step()

    llm.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        greedy(llm, [MANY[5]], ENDLESS)
    del llm.step, llm.model_runner.launch
    assert threads[0].result() == [tiny_reference.tokens(prompt, 12) for prompt in PROMPTS]
    assert llm.metrics()["requests_aborted"] == 1
    assert_empty(llm)


def test_an_error_outside_of_a_step_ends_the_requests_of_its_call_only(
    llm: LLM, tiny_reference: Reference, monkeypatch: pytest.MonkeyPatch
):
    failing: list[Thread] = []

    def fail(*_: object) -> None:
        if threading.current_thread() in failing and num_unfinished(llm) > 1:
            raise OSError("the terminal is gone")

    monkeypatch.setattr("nanovllm.llm._show_rates", fail)
    failing.append(Thread(llm.generate, [MANY[5]], ENDLESS))
    wait_until(lambda: num_unfinished(llm) == 1)
    while failing[0].is_alive():  # one call may have all steps of another's requests
        assert greedy(llm, PROMPTS) == [tiny_reference.tokens(prompt, 12) for prompt in PROMPTS]
    with pytest.raises(OSError, match="the terminal is gone"):
        failing[0].result()
    assert_empty(llm)


def test_a_step_that_fails_fails_every_call(llm: LLM, tiny_reference: Reference):
    calls = [
        Thread(greedy, llm, PROMPTS[:1], ENDLESS),
        Thread(greedy, llm, PROMPTS[1:], ENDLESS),
        Thread(streamed, llm, MANY, ENDLESS),
    ]
    wait_until(lambda: num_unfinished(llm) == 4 + len(MANY))

    def fail() -> None:
        raise OSError("device on fire")

    at_step(llm, 0, fail)
    errors = []
    for call in calls:
        with pytest.raises((OSError, RuntimeError), match="device on fire") as caught:
            call.result()
        errors.append(caught.value)
    own = [error for error in errors if isinstance(error, OSError)]
    assert len(own) == 1, "who has taken the step"
    assert all(error in own or error.__cause__ is own[0] for error in errors)
    assert_empty(llm)
    assert greedy(llm, PROMPTS) == [tiny_reference.tokens(prompt, 12) for prompt in PROMPTS]


def test_closing_ends_the_calls_of_other_threads(tiny: Path):
    llm = build(tiny)
    calls = [Thread(greedy, llm, [prompt], ENDLESS) for prompt in PROMPTS]
    wait_until(lambda: num_unfinished(llm) == 4)
    llm.close()
    for call in calls:
        with pytest.raises(RuntimeError, match="closed"):
            call.result()


def test_a_request_is_not_added_beside_another_threads_call(llm: LLM):
    call = Thread(greedy, llm, PROMPTS, ENDLESS)
    wait_until(lambda: num_unfinished(llm) == 4)
    with pytest.raises(RuntimeError, match=r"another thread's generate\(\) runs"):
        llm.add_request(PROMPTS[0], GREEDY)
    llm.abort_all()
    with pytest.raises(RuntimeError, match="aborted while"):
        call.result()


def test_a_stream_that_nobody_reads_holds_up_no_other_thread(llm: LLM, tiny_reference: Reference):
    stream = llm.stream(PROMPTS[0], GREEDY)
    tokens = next(stream)["token_ids"]
    assert Thread(greedy, llm, PROMPTS[1:2], LONG).result() == [
        tiny_reference.tokens(PROMPTS[1], 100)
    ]
    for piece in stream:
        tokens += piece["token_ids"]
    assert tokens == tiny_reference.tokens(PROMPTS[0], 12)
