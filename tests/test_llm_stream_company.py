"""A stream and whatever else is asked of its engine."""

import time
from pathlib import Path

import pytest

from helpers.checkpoints import Reference, edit_json
from helpers.engines import BOTH_ORDERS, GREEDY, PROMPTS, assert_empty, build
from helpers.streams import assert_works, gather
from nanovllm import LLM, SamplingParams


@BOTH_ORDERS
def test_generate_beside_an_open_stream_disturbs_neither(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    """What its steps bring for the stream comes with the stream's next pieces."""
    found: list[list[int]] = [[] for _ in PROMPTS]
    with build(tiny, async_scheduling=async_scheduling) as llm:
        for number, piece in enumerate(llm.stream(PROMPTS, GREEDY)):
            found[piece["index"]] += piece["token_ids"]
            if number in (0, 3):
                short = SamplingParams(temperature=0, max_tokens=3)
                (output,) = llm.generate([1, 2], short, use_tqdm=False)
                assert output["token_ids"] == tiny_reference.tokens([1, 2], 3)
        assert found == [tiny_reference.tokens(prompt, 12) for prompt in PROMPTS]
        assert_works(llm, tiny_reference)


def test_generate_between_two_last_pieces_disturbs_neither(llm: LLM, tiny_reference: Reference):
    """Of prompts that ended with one step some pieces are yet to be taken; nothing is queued."""
    found: dict[int, list[int]] = {0: [], 1: []}
    for piece in llm.stream(PROMPTS[:2], GREEDY):
        found[piece["index"]] += piece["token_ids"]
        if piece["finish_reason"]:
            (output,) = llm.generate(PROMPTS[2], GREEDY, use_tqdm=False)
            assert output["token_ids"] == tiny_reference.tokens(PROMPTS[2], 12)
    assert list(found.values()) == [tiny_reference.tokens(prompt, 12) for prompt in PROMPTS[:2]]


def test_two_streams_share_steps(llm: LLM, tiny_reference: Reference):
    streams = [llm.stream(prompt, GREEDY) for prompt in PROMPTS[:2]]
    found: list[list[int]] = [[], []]
    for pieces in zip(*streams, strict=True):
        for tokens, piece in zip(found, pieces, strict=True):
            tokens += piece["token_ids"]
    assert found == [tiny_reference.tokens(prompt, 12) for prompt in PROMPTS[:2]]
    assert_works(llm, tiny_reference)


def test_a_stream_is_refused_beside_requests_that_were_added(llm: LLM, tiny_reference: Reference):
    made_before = llm.stream(PROMPTS[1], GREEDY)
    request_id = llm.add_request(PROMPTS[0], GREEDY)
    with pytest.raises(RuntimeError, match=r"1 requests .* are unfinished"):
        llm.stream(PROMPTS[1], GREEDY)
    with pytest.raises(RuntimeError, match=r"1 requests .* are unfinished"):
        next(made_before)
    outputs = []
    while not llm.is_finished():
        outputs += llm.step()
    assert [output["request_id"] for output in outputs] == [request_id]
    assert outputs[0]["token_ids"] == tiny_reference.tokens(PROMPTS[0], 12)


@BOTH_ORDERS
def test_a_request_is_not_added_beside_an_open_stream(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    """The stream's steps would take what comes of it."""
    with build(tiny, async_scheduling=async_scheduling) as llm:
        waiting = llm.stream(PROMPTS[1], GREEDY)
        llm.abort(llm.add_request([1, 2], GREEDY))  # none is open yet
        while not llm.is_finished():
            assert llm.step() == []
        tokens = []
        for piece in llm.stream(PROMPTS[0], GREEDY):
            tokens += piece["token_ids"]
            if piece["finish_reason"] is None:
                with pytest.raises(RuntimeError, match="a stream is open"):
                    llm.add_request([1, 2], GREEDY)
        assert tokens == tiny_reference.tokens(PROMPTS[0], 12)
        next(waiting)
        waiting.close()
        request_id = llm.add_request(PROMPTS[2], GREEDY)
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()
        assert [output["request_id"] for output in outputs] == [request_id]
        assert outputs[0]["token_ids"] == tiny_reference.tokens(PROMPTS[2], 12)
        assert_empty(llm)


@BOTH_ORDERS
@pytest.mark.parametrize("taken", [11, 12, 13])
def test_a_stream_left_after_its_last_piece_does_nothing_to_the_next(
    tiny: Path, tiny_reference: Reference, taken: int, async_scheduling: bool
):
    """It is still suspended, its requests long gone, and is closed while the next one is open."""
    with build(tiny, async_scheduling=async_scheduling) as llm:
        first, second = llm.stream(PROMPTS[0], GREEDY), llm.stream(PROMPTS[1], GREEDY)
        for _ in range(min(taken, 12)):
            piece = next(first)
        if taken == 11:
            assert piece["finish_reason"] is None
            first.close()
        elif taken == 13:
            assert list(first) == []
        pieces = [next(second), next(second)]
        first.close()
        pieces += second
        tokens = [token for piece in pieces for token in piece["token_ids"]]
        assert tokens == tiny_reference.tokens(PROMPTS[1], 12)
        assert_works(llm, tiny_reference)


@BOTH_ORDERS
def test_a_stream_left_after_its_last_piece_does_nothing_to_requests(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        stream = llm.stream(PROMPTS[0], GREEDY)
        for piece in stream:
            if piece["finish_reason"]:
                break
        try:
            request_id = llm.add_request(PROMPTS[1], GREEDY)
        except RuntimeError:  # since it is still open
            stream.close()
            request_id = llm.add_request(PROMPTS[1], GREEDY)
        stream.close()
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()
        assert [output["request_id"] for output in outputs] == [request_id]
        assert outputs[0]["token_ids"] == tiny_reference.tokens(PROMPTS[1], 12)


@BOTH_ORDERS
def test_a_stream_left_after_its_last_piece_does_not_open_the_engine_to_requests(
    tiny: Path, async_scheduling: bool
):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        first, second = llm.stream(PROMPTS[0], GREEDY), llm.stream(PROMPTS[1], GREEDY)
        for _ in range(12):
            next(first)
        next(second)
        first.close()
        with pytest.raises(RuntimeError, match="a stream is open"):
            llm.add_request([1, 2], GREEDY)


@BOTH_ORDERS
@pytest.mark.parametrize("every", [1, 3, 5, 47])
def test_steps_taken_beside_a_stream_lose_no_piece(
    tiny: Path, tiny_reference: Reference, every: int, async_scheduling: bool
):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        found: list[list[int]] = [[] for _ in PROMPTS]
        reasons: list[str | None] = [None] * len(PROMPTS)
        for number, piece in enumerate(llm.stream(PROMPTS, GREEDY)):
            found[piece["index"]] += piece["token_ids"]
            reasons[piece["index"]] = piece["finish_reason"]
            if number % every == 0:
                llm.step()
        assert found == [tiny_reference.tokens(prompt, 12) for prompt in PROMPTS]
        assert reasons == ["length"] * 4
        assert_empty(llm)


def test_all_steps_may_be_taken_beside_a_stream(llm: LLM, tiny_reference: Reference):
    stream = llm.stream(PROMPTS, GREEDY)
    head = [next(stream) for _ in range(3)]
    while not llm.is_finished():
        llm.step()
    found: list[list[int]] = [[] for _ in PROMPTS]
    for piece in (*head, *stream):
        found[piece["index"]] += piece["token_ids"]
    assert found == [tiny_reference.tokens(prompt, 12) for prompt in PROMPTS]


@BOTH_ORDERS
def test_the_engine_may_be_closed_while_it_streams(tiny: Path, async_scheduling: bool):
    llm = build(tiny, async_scheduling=async_scheduling)
    stream = llm.stream(PROMPTS, GREEDY)
    for _ in range(6):
        next(stream)
    llm.close()
    rest = []
    with pytest.raises(RuntimeError, match="closed"):
        rest.extend(stream)
    assert [piece["index"] for piece in rest] in ([], [2, 3]), "what the step before had brought"
    assert not any(piece["finish_reason"] for piece in rest)
    assert list(stream) == []
    stream.close()


def test_a_stream_of_a_closed_engine_is_refused(tiny: Path):
    llm = build(tiny)
    made_before, started = llm.stream([1, 2], GREEDY), llm.stream([3, 4], GREEDY)
    next(started)
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.stream([1, 2], GREEDY)
    with pytest.raises(RuntimeError, match="closed"):
        next(made_before)
    started.close()  # does nothing


@BOTH_ORDERS
def test_nothing_is_under_way_after_a_stream(tiny_copy: Path, async_scheduling: bool):
    tokens = []
    with build(tiny_copy) as llm:
        tokens = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)[0]["token_ids"]
    edit_json(tiny_copy / "generation_config.json", eos_token_id=tokens[3])
    with build(tiny_copy, async_scheduling=async_scheduling) as llm:
        assert gather(llm.stream(PROMPTS[0], GREEDY))[0]["finish_reason"] == "stop"
        assert_empty(llm)
        stream = llm.stream(PROMPTS[0], GREEDY)
        next(stream)
        stream.close()
        assert_empty(llm)


@BOTH_ORDERS
def test_time_after_a_stream_was_left_is_not_counted(tiny: Path, async_scheduling: bool):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        stream = llm.stream(PROMPTS, GREEDY)
        next(stream)
        stream.close()
        before = llm.stats.prefill_seconds + llm.stats.decode_seconds
        time.sleep(0.3)
        start = time.perf_counter()
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
        spent = time.perf_counter() - start
        assert llm.stats.prefill_seconds + llm.stats.decode_seconds - before <= spent


@BOTH_ORDERS
def test_aborting_all_ends_an_open_stream(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        stream = llm.stream(PROMPTS, GREEDY)
        for _ in range(6):
            next(stream)
        llm.abort_all()
        rest = list(stream)
        assert not any(piece["text"] or piece["token_ids"] for piece in rest if piece["index"] < 2)
        assert {piece["finish_reason"] for piece in rest} <= {None, "abort"}
        assert llm.metrics()["requests_aborted"] == 4
        assert_works(llm, tiny_reference)
