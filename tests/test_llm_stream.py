"""LLM.stream: what comes, and how it is left."""

import gc
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.cases import in_turns
from helpers.checkpoints import Reference, random_tokens
from helpers.engines import BOTH_ORDERS, GREEDY, ORDERS, PROMPTS, Fault, assert_empty, build
from helpers.paths import DEMO
from helpers.streams import QUESTIONS, assert_idle, assert_works, gather, parts, question
from nanovllm import LLM, SamplingParams

# What comes


def random_prompts(source: random.Random, count: int, vocab_size: int) -> list[Any]:
    """Text and tokens, some with a prefix in common, and some twice."""
    prompts: list[Any] = []
    for _ in range(count):
        kind = source.randrange(4)
        if kind == 0:
            prompts.append(question(source.choice(QUESTIONS)))
        elif kind == 1 and prompts:
            prompts.append(source.choice(prompts))
        else:
            shared = random.Random(source.randrange(2))
            length = source.randint(1, 60)
            prompts.append([shared.randrange(vocab_size) for _ in range(length)])
    return prompts


def random_params(source: random.Random) -> SamplingParams:
    max_tokens = source.randint(1, 30)
    pick = source.choice
    return SamplingParams(
        temperature=pick([0, 0.8, 1, 4, 50]),  # the last samples broken characters
        top_k=pick([0, 0, 40]),
        top_p=pick([1, 0.9]),
        max_tokens=max_tokens,
        min_tokens=pick([0, 0, source.randint(0, max_tokens)]),
        ignore_eos=pick([False, False, True]),
        stop=pick([None, None, "a", "e m", [" demo", "。"], [" = ", "个", "\n", "t"]]),
        include_stop_str_in_output=pick([False, True]),
        stop_token_ids=pick([None, [300, 301], [*range(100, 180)]]),
        seed=source.getrandbits(63),
        repetition_penalty=pick([1, 1, 1.2]),
        presence_penalty=pick([0, 0, 0.5]),
        logprobs=pick([None, None, 2]),
        skip_special_tokens=pick([True, False]),
    )


ROOMS = {
    "roomy": ({"num_kvcache_blocks": 150}, False),
    "tight": (
        {
            "num_kvcache_blocks": 6, "max_num_seqs": 5, "max_num_batched_tokens": 40,
            "max_model_len": 96,
        },
        True,
    ),
}  # fmt: skip


@in_turns("room_and_whether_it_preempts, async_scheduling", ROOMS, ORDERS, share=2)
def test_pieces_put_together_are_what_generate_returns(
    room_and_whether_it_preempts: tuple[dict[str, int], bool], async_scheduling: bool
):
    room, preempts = room_and_whether_it_preempts
    with build(DEMO, dtype="float32", async_scheduling=async_scheduling, **room) as llm:
        reasons: set[tuple[str, type]] = set()
        for seed in range(3):
            source = random.Random(seed)
            prompts = random_prompts(source, 12, 800)
            params = [random_params(source) for _ in prompts]
            expected = llm.generate(prompts, params, use_tqdm=False)
            assert gather(llm.stream(prompts, params), len(prompts)) == parts(expected)
            assert_idle(llm)
            reasons |= {(out["finish_reason"], type(out["stop_reason"])) for out in expected}
        assert reasons == {
            ("stop", type(None)), ("stop", int), ("stop", str), ("length", type(None)),
        }  # fmt: skip
        assert bool(llm.metrics()["preemptions"]) == preempts


@BOTH_ORDERS
def test_a_long_list_streams_whatever_the_limit_on_sequences(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    prompts = [random_tokens(1 + i % 30, seed=i % 7) for i in range(40)]
    with build(tiny, max_num_seqs=6, async_scheduling=async_scheduling) as llm:
        found = gather(llm.stream(prompts, GREEDY), len(prompts))
        assert_idle(llm)
    assert [one["token_ids"] for one in found] == [
        tiny_reference.tokens(prompt, GREEDY.max_tokens) for prompt in prompts
    ]


def test_pieces_come_as_soon_as_their_tokens_do(llm: LLM, tiny_reference: Reference):
    expected = tiny_reference.tokens([1, 2, 3], 12)
    pieces = []
    for piece in llm.stream("t1 t2 t3", GREEDY):
        pieces.append(piece)
        (seq,) = llm.scheduler.running or [None]
        assert seq is None or seq.output_token_ids == expected[: len(pieces)]
    assert [piece["token_ids"] for piece in pieces] == [[token] for token in expected]
    assert [piece["text"] for piece in pieces] == [
        f"t{expected[0]}", *(f" t{token}" for token in expected[1:])
    ]  # fmt: skip
    assert [piece["finish_reason"] for piece in pieces] == [None] * 11 + ["length"]


@pytest.mark.parametrize(
    ("prompts", "count"),
    [("t1 t2", 1), ([1, 2], 1), ((1, 2), 1), (["t1 t2"], 1), (["t1 t2", [1, 2], (3,)], 3)],
    ids=str,
)
def test_prompts_in_any_form_are_known_by_their_place(llm: LLM, prompts: Any, count: int):
    expected = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert gather(llm.stream(prompts, GREEDY), count) == parts(expected)


def test_each_prompt_may_have_its_own_params(llm: LLM, tiny_reference: Reference):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (9, 1, 5, 2)]
    found = gather(llm.stream(PROMPTS, params), 4)
    assert [one["token_ids"] for one in found] == [
        tiny_reference.tokens(prompt, param.max_tokens)
        for prompt, param in zip(PROMPTS, params, strict=True)
    ]


def test_without_params_a_stream_has_the_defaults(llm: LLM):
    (one,) = gather(llm.stream([1, 2, 3]))
    assert len(one["token_ids"]) == SamplingParams().max_tokens


@BOTH_ORDERS
def test_random_choices_of_a_seed_are_the_same_in_a_stream(tiny: Path, async_scheduling: bool):
    params = [SamplingParams(seed=seed, max_tokens=20) for seed in (0, 1, 0, -5)]
    prompts = [[1, 2, 3]] * 4
    with build(tiny, async_scheduling=async_scheduling) as llm:
        found = gather(llm.stream(prompts, params), 4)
        assert found == parts(llm.generate(prompts, params, use_tqdm=False))
    assert found[0] == found[2]
    assert len({tuple(one["token_ids"]) for one in found}) == 3


def test_requests_without_a_seed_draw_in_streams_as_in_generate(tiny: Path):
    params = SamplingParams(max_tokens=20)
    with build(tiny, seed=3) as first, build(tiny, seed=3) as second:
        streamed = [gather(first.stream([[1, 2]] * 2, params), 2) for _ in range(2)]
        whole = [parts(second.generate([[1, 2]] * 2, params, use_tqdm=False)) for _ in range(2)]
    assert streamed == whole
    assert len({tuple(one["token_ids"]) for run in streamed for one in run}) == 4


def test_no_tokenizer_streams_tokens_without_text(tiny_copy: Path, tiny_reference: Reference):
    for path in tiny_copy.glob("tokenizer*"):
        path.unlink()
    with build(tiny_copy) as llm:
        assert llm.tokenizer is None
        expected = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        found = gather(llm.stream(PROMPTS, GREEDY), 4)
        with pytest.raises(ValueError, match="no tokenizer"):
            llm.stream("t1", GREEDY)
        with pytest.raises(ValueError, match="stop needs text"):
            llm.stream([1, 2], SamplingParams(stop="t1"))
        assert_empty(llm)
    assert found == parts(expected)
    for prompt, one in zip(PROMPTS, found, strict=True):
        assert (one["text"], one["token_ids"]) == ("", tiny_reference.tokens(prompt, 12))
        assert (one["finish_reason"], one["stop_reason"], one["logprobs"]) == ("length", None, None)


def test_more_than_one_completion_is_refused(llm: LLM, tiny_reference: Reference):
    for params in (
        SamplingParams(n=2, max_tokens=3),
        [GREEDY, GREEDY, SamplingParams(n=3, seed=1), GREEDY],
    ):
        with pytest.raises(ValueError, match="n must be 1 to stream"):
            llm.stream(PROMPTS, params)
        assert_empty(llm)
    assert_works(llm, tiny_reference)


def test_bad_requests_are_refused_before_the_first_piece_is_asked_for(llm: LLM):
    for prompts, params, error in (
        ([[1], [999]], GREEDY, "prompt 1 has token id 999"),
        ([[1], []], GREEDY, "prompt 1 is empty"),
        ([[1], [2]], [GREEDY], "2 prompts need as many"),
        ([1], SamplingParams(stop_token_ids=[128]), "stop_token_ids has token id 128"),
    ):
        with pytest.raises(ValueError, match=error):
            llm.stream(prompts, params)
    for prompts, params in ((None, GREEDY), ([[1], None], GREEDY), ([1], "greedy")):
        with pytest.raises(TypeError):
            llm.stream(prompts, params)
    assert_empty(llm)


# Leaving a stream


def leave_by_close(stream: Iterator[Any], after: int) -> None:
    for _ in range(after):
        next(stream)
    stream.close()


def leave_by_forgetting(stream: Iterator[Any], after: int) -> None:
    for _ in range(after):
        next(stream)
    del stream
    gc.collect()


def leave_by_break(stream: Iterator[Any], after: int) -> None:
    for number, _ in enumerate(stream, 1):
        if number == after:
            break


def leave_by_error(stream: Iterator[Any], after: int) -> None:
    try:
        for number, _ in enumerate(stream, 1):
            if number == after:
                raise KeyError("of the consumer")
    except KeyError:
        pass


def leave_by_throw(stream: Iterator[Any], after: int) -> None:
    for _ in range(after):
        next(stream)
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt())


@BOTH_ORDERS
@pytest.mark.parametrize("after", [1, 4, 17])
@pytest.mark.parametrize(
    "leave",
    [leave_by_close, leave_by_forgetting, leave_by_break, leave_by_error, leave_by_throw],
)
def test_a_stream_left_in_the_middle_aborts_and_the_engine_goes_on(
    tiny: Path,
    tiny_reference: Reference,
    leave: Callable[[Iterator[Any], int], None],
    after: int,
    async_scheduling: bool,
):
    with build(tiny, max_num_seqs=3, async_scheduling=async_scheduling) as llm:
        leave(llm.stream(PROMPTS, GREEDY), after)  # of four prompts one still waits
        assert llm.metrics()["requests_aborted"] == 4
        assert llm.metrics()["kv_blocks_in_use"] == 0
        assert_works(llm, tiny_reference)
        assert llm.metrics()["requests_aborted"] == 4


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("at_call", [1, 2])
def test_an_interrupt_while_a_stream_is_queued_leaves_nothing_behind(
    llm: LLM, tiny_reference: Reference, at_call: int, after: bool
):
    fault = Fault(llm, "_queue", at_call, KeyboardInterrupt(), after)
    with pytest.raises(KeyboardInterrupt):
        next(llm.stream(PROMPTS, GREEDY))
    fault.remove()
    assert_empty(llm)
    llm.abort(llm.add_request(PROMPTS[0], GREEDY))  # no stream is open
    assert_works(llm, tiny_reference)


@BOTH_ORDERS
def test_a_stream_left_after_some_prompts_have_ended_aborts_the_others(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (2, 12, 1, 12)]
    with build(tiny, async_scheduling=async_scheduling) as llm:
        stream, ended = llm.stream(PROMPTS, params), set()
        while len(ended) < 2:
            piece = next(stream)
            if piece["finish_reason"]:
                ended.add(piece["index"])
        stream.close()
        assert ended == {0, 2}
        assert llm.metrics()["requests_aborted"] == 2
        assert llm.metrics()["requests_finished"] == 2
        assert_works(llm, tiny_reference)


@BOTH_ORDERS
def test_pieces_of_prompts_that_ended_together_may_be_left(tiny: Path, async_scheduling: bool):
    """All have ended with one step, and only the first one's last piece has been taken."""
    with build(tiny, async_scheduling=async_scheduling) as llm:
        stream = llm.stream(PROMPTS, GREEDY)
        while next(stream)["finish_reason"] is None:
            pass
        stream.close()
        assert llm.metrics()["requests_finished"] == 4
        assert llm.metrics()["requests_aborted"] == 0
        assert_idle(llm)


def test_an_ended_or_closed_stream_has_no_more_pieces(llm: LLM):
    ended = llm.stream([1, 2], GREEDY)
    list(ended)
    closed = llm.stream([1, 2], GREEDY)
    next(closed)
    closed.close()
    closed.close()
    for stream in (ended, closed):
        with pytest.raises(StopIteration):
            next(stream)
    assert_empty(llm)


def test_a_stream_that_was_never_started_queues_nothing(llm: LLM, tiny_reference: Reference):
    stream = llm.stream(PROMPTS, GREEDY)
    assert_empty(llm)
    assert llm.step() == []
    assert_works(llm, tiny_reference)
    stream.close()
    assert list(stream) == []
    stream = llm.stream(PROMPTS, GREEDY)
    del stream
    gc.collect()
    assert llm.metrics()["requests_aborted"] == 0
    assert_works(llm, tiny_reference)


@BOTH_ORDERS
@pytest.mark.parametrize("place", ["launch", "collect"])
@pytest.mark.parametrize("at_call", [1, 4])
def test_a_failed_step_ends_the_stream_and_the_engine_goes_on(
    tiny: Path, tiny_reference: Reference, place: str, at_call: int, async_scheduling: bool
):
    from helpers.engines import Fault

    with build(tiny, async_scheduling=async_scheduling) as llm:
        fault = Fault(llm.model_runner, place, at_call, RuntimeError("device on fire"), False)
        stream = llm.stream(PROMPTS, GREEDY)
        with pytest.raises(RuntimeError, match="device on fire"):
            list(stream)
        fault.remove()
        assert_empty(llm)
        assert list(stream) == []
        assert llm.metrics()["requests_aborted"] == 4
        assert_works(llm, tiny_reference)


def test_a_detokenizer_that_fails_ends_the_stream_and_the_engine_goes_on(
    llm: LLM, tiny_reference: Reference, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise KeyError("no such token")

    with monkeypatch.context() as patch:
        patch.setattr("nanovllm.engine.detokenizer.Detokenizer.append", fail)
        with pytest.raises(KeyError):
            list(llm.stream(PROMPTS, GREEDY))
    assert_works(llm, tiny_reference)
