"""Streams, why and when a request ends, and what the engine says of its work."""

import gc
import random
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Reference, add_tokenizer, edit_json, random_tokens
from test_block_manager import assert_blocks_consistent
from test_engine import BOTH_ORDERS, GREEDY, PROMPTS, assert_empty, build

from nanovllm import LLM, SamplingParams
from nanovllm.engine.outputs import Logprob

DEMO = Path(__file__).parent.parent / "demo" / "tiny-qwen3"
END_OF_TEXT, IM_START, IM_END = 0, 1, 2  # the demo's special tokens; the first and last end a text
DISTINCT = random_tokens(5, seed=15)  # no two of the 12 greedy tokens after it are the same
QUESTIONS = ["Who are you?", "47+38=", "从3数到9。", "List the primes under 30.", "你是谁？"]


@pytest.fixture
def llm(tiny: Path):
    with build(tiny) as engine:
        yield engine


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def demo(request: pytest.FixtureRequest):
    """The demo, which answers in English and Chinese. Tests leave nothing behind in it."""
    with build(
        DEMO, num_kvcache_blocks=128, dtype="float32", async_scheduling=request.param
    ) as engine:
        yield engine


PARTS = ("text", "token_ids", "logprobs")  # that come in pieces


def question(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def gather(pieces: Iterator[dict[str, Any]], count: int = 1) -> list[dict[str, Any]]:
    """Put the pieces of `count` prompts together, and check what holds of every piece."""
    found = [
        {"text": "", "token_ids": [], "logprobs": None, "finish_reason": None, "stop_reason": None}
        for _ in range(count)
    ]
    for piece in pieces:
        assert set(piece) == {"index", "finish_reason", "stop_reason", *PARTS}
        assert piece["finish_reason"] or piece["stop_reason"] is None
        own = found[piece["index"]]
        assert own["finish_reason"] is None, "a piece came after the last"
        assert len(piece["token_ids"]) == 1, "tokens are shown one by one, as they come"
        assert not piece["text"].endswith("\ufffd") or piece["finish_reason"]
        own["text"] += piece["text"]
        own["token_ids"] += piece["token_ids"]
        if piece["logprobs"] is not None:
            own["logprobs"] = (own["logprobs"] or []) + piece["logprobs"]
        own["finish_reason"], own["stop_reason"] = piece["finish_reason"], piece["stop_reason"]
    assert all(own["finish_reason"] for own in found)
    return found


def parts(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What `generate` returns, of it what a stream has too."""
    keys = ("finish_reason", "stop_reason", *PARTS)
    found = [{key: out[key] for key in keys} for out in outputs]
    for own in found:
        own["logprobs"] = own["logprobs"] and about(own["logprobs"])
    return found


def about(logprobs: list[dict[int, Logprob]]) -> list[dict[int, Any]]:
    """Equal within what the batch size changes in a sum of floats."""
    return [
        {
            token: Logprob(pytest.approx(found.logprob, abs=1e-4), found.rank, found.decoded_token)
            for token, found in entry.items()
        }
        for entry in logprobs
    ]


def assert_idle(llm: LLM) -> None:
    """Nothing is queued or under way, and every block is free."""
    assert not llm._in_flight
    manager = llm.scheduler.block_manager
    assert not llm.scheduler.waiting and not llm.scheduler.running and not llm._requests
    assert manager.num_free_blocks == len(manager.blocks)
    assert_blocks_consistent(manager, [])


def assert_works(llm: LLM, reference: Reference) -> None:
    """Nothing is left over, and requests give what they should."""
    assert_idle(llm)
    outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert output["token_ids"] == reference.tokens(prompt, GREEDY.max_tokens)
    assert_empty(llm)


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


@BOTH_ORDERS
@pytest.mark.parametrize(
    ("room", "preempts"),
    [
        ({"num_kvcache_blocks": 150}, False),
        (
            {
                "num_kvcache_blocks": 6, "max_num_seqs": 5, "max_num_batched_tokens": 40,
                "max_model_len": 96,
            },
            True,
        ),
    ],
    ids=["roomy", "tight"],
)  # fmt: skip
def test_pieces_put_together_are_what_generate_returns(
    room: dict[str, int], preempts: bool, async_scheduling: bool
):
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
        ([], GREEDY, "prompts is empty"),
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


# Whole characters, and stop strings


@pytest.mark.parametrize("token_id", [20, 130, 200, 512])
def test_bytes_that_make_no_character_are_shown_at_the_end_only(demo: LLM, token_id: int):
    params = SamplingParams(max_tokens=3, allowed_token_ids=[token_id], ignore_eos=True)
    whole = demo.tokenizer.decode([token_id] * 3)
    pieces = list(demo.stream([5, 6], params))
    assert [piece["token_ids"] for piece in pieces] == [[token_id]] * 3
    if whole.endswith("\ufffd"):
        assert [piece["text"] for piece in pieces] == ["", "", whole]
    else:
        assert "".join(piece["text"] for piece in pieces) == whole
    assert_idle(demo)


@pytest.mark.parametrize("text", QUESTIONS)
def test_no_piece_has_part_of_a_character(demo: LLM, text: str):
    params = SamplingParams(temperature=0, max_tokens=120)
    pieces = list(demo.stream(question(text), params))
    (expected,) = demo.generate(question(text), params, use_tqdm=False)
    assert "".join(piece["text"] for piece in pieces) == expected["text"]
    assert all("\ufffd" not in piece["text"] for piece in pieces)
    assert len([piece for piece in pieces if piece["text"]]) > 2
    shown, tokens = "", []
    for piece in pieces:
        shown, tokens = shown + piece["text"], tokens + piece["token_ids"]
        so_far = demo.tokenizer.decode(tokens, skip_special_tokens=True)
        assert so_far == shown or so_far.endswith("\ufffd")


@pytest.mark.parametrize("include", [False, True], ids=["cut", "kept"])
@pytest.mark.parametrize(
    "stop", [" = ", "8 = 8", ["5", "= 85"], "85", "4", "never", ["7 +", " +"], "5!"]
)
def test_no_piece_has_part_of_a_stop_string(demo: LLM, stop: Any, include: bool):
    prompt = question("47+38=")
    plain = SamplingParams(temperature=0, max_tokens=20)
    (whole,) = demo.generate(prompt, plain, use_tqdm=False)
    assert whole["text"] == "47 + 38 = 85"
    params = SamplingParams(
        temperature=0, max_tokens=20, stop=stop, include_stop_str_in_output=include
    )
    (expected,) = demo.generate(prompt, params, use_tqdm=False)
    stops = [stop] if isinstance(stop, str) else stop
    starts = [(whole["text"].find(one), one) for one in stops if one in whole["text"]]
    if starts:
        start, found = min(starts)
        cut = whole["text"][: start + len(found) * include]
        assert (expected["text"], expected["stop_reason"]) == (cut, found)
        assert len(expected["token_ids"]) < len(whole["token_ids"])
    else:
        assert expected["text"] == whole["text"]
    shown = ""
    for piece in demo.stream(prompt, params):
        shown += piece["text"]
        assert expected["text"].startswith(shown)
        if piece["finish_reason"] is None:
            assert not any(shown.endswith(one[:n]) for one in stops for n in range(1, len(one)))
    assert shown == expected["text"]


@BOTH_ORDERS
def test_min_tokens_keeps_early_stop_strings(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    tokens = tiny_reference.tokens([1, 2, 3], 12)
    first, words = tokens.index(tokens[2]), [f"t{token}" for token in tokens]
    assert words.count(words[2]) == 1
    stop = f"{words[2]} "  # found with the token after
    with build(tiny, async_scheduling=async_scheduling) as llm:
        for min_tokens in range(13):
            params = SamplingParams(temperature=0, max_tokens=12, min_tokens=min_tokens, stop=stop)
            (expected,) = llm.generate([1, 2, 3], params, use_tqdm=False)
            assert gather(llm.stream([1, 2, 3], params)) == parts([expected])
            if min_tokens <= first + 2:
                assert expected["text"] == " ".join(words[:2]) + " "
                assert expected["stop_reason"] == stop
                assert len(expected["token_ids"]) == first + 2
            else:
                assert expected["text"] == " ".join(words)
                assert (expected["finish_reason"], expected["stop_reason"]) == ("length", None)


def test_a_stop_string_in_the_last_token_allowed_is_why_it_ends(demo: LLM):
    prompt = question("47+38=")
    (whole,) = demo.generate(prompt, SamplingParams(temperature=0, max_tokens=20), use_tqdm=False)
    decoded = [
        demo.tokenizer.decode(whole["token_ids"][:n], skip_special_tokens=True)
        for n in range(len(whole["token_ids"]))
    ]
    for count, (before, now) in enumerate(pairwise(decoded), 1):
        stop = now.removeprefix(before)
        if not stop or stop in before:
            continue
        params = SamplingParams(temperature=0, max_tokens=count, stop=stop)
        (expected,) = demo.generate(prompt, params, use_tqdm=False)
        assert (expected["finish_reason"], expected["stop_reason"]) == ("stop", stop)
        assert (expected["text"], len(expected["token_ids"])) == (before, count)
        assert gather(demo.stream(prompt, params)) == parts([expected])


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("include", [True, False])
def test_the_token_that_ends_is_in_the_text_only_if_asked_for(demo: LLM, skip: bool, include: bool):
    prompt = question("47+38=")
    common = {"temperature": 0, "max_tokens": 20, "skip_special_tokens": skip}
    common["include_stop_str_in_output"] = include
    params = SamplingParams(**common)
    (expected,) = demo.generate(prompt, params, use_tqdm=False)
    assert expected["token_ids"][-1] == IM_END
    assert expected["text"] == "47 + 38 = 85" + ("<|im_end|>" if include and not skip else "")
    assert gather(demo.stream(prompt, params)) == parts([expected])
    with_stop = SamplingParams(**common, stop="never")
    assert gather(demo.stream(prompt, with_stop)) == parts([expected])


def test_special_tokens_in_the_middle_of_a_text(demo: LLM):
    for skip, expected in ((True, ""), (False, "<|im_start|>" * 4)):
        params = SamplingParams(
            max_tokens=4, allowed_token_ids=[IM_START], skip_special_tokens=skip, ignore_eos=True
        )
        (one,) = gather(demo.stream([5, 6], params))
        assert (one["text"], one["token_ids"]) == (expected, [IM_START] * 4)


def test_end_of_sequence_tokens_in_the_middle_leave_the_space_between_words(
    tiny_copy: Path, tiny_reference: Reference
):
    tokens = tiny_reference.tokens([1, 2, 3], 12)
    add_tokenizer(tiny_copy, eos_token=f"t{tokens[3]}")
    expected = " ".join(f"t{token}" for token in tokens if token != tokens[3])
    with build(tiny_copy) as llm:
        for stop in (None, "never"):
            params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=stop)
            (whole,) = llm.generate([1, 2, 3], params, use_tqdm=False)
            (streamed,) = gather(llm.stream([1, 2, 3], params))
            assert (whole["text"], streamed["text"]) == (expected, expected)


# Why a request ends


@BOTH_ORDERS
def test_reasons_to_end(tiny_copy: Path, tiny_reference: Reference, async_scheduling: bool):
    tokens = tiny_reference.tokens(DISTINCT, 12)
    assert len(set(tokens)) == len(tokens), "each token has to name a place"
    eos, stop_token, word = tokens[8], tokens[4], f"t{tokens[6]}"
    edit_json(tiny_copy / "generation_config.json", eos_token_id=eos)
    cases = [
        ({}, 9, "stop", None),
        ({"max_tokens": 5}, 5, "length", None),
        ({"max_tokens": 9}, 9, "stop", None),
        ({"ignore_eos": True}, 12, "length", None),
        ({"stop_token_ids": [stop_token]}, 5, "stop", stop_token),
        ({"stop_token_ids": [stop_token], "max_tokens": 5}, 5, "stop", stop_token),
        ({"stop_token_ids": [stop_token], "ignore_eos": True}, 5, "stop", stop_token),
        ({"stop_token_ids": [eos]}, 9, "stop", None),
        ({"stop_token_ids": [eos], "ignore_eos": True}, 9, "stop", eos),
        ({"stop": word}, 7, "stop", word),
        ({"stop": ["never", word]}, 7, "stop", word),
        ({"stop": word, "max_tokens": 7}, 7, "stop", word),
        ({"stop": word, "max_tokens": 6}, 6, "length", None),
        ({"stop": word, "stop_token_ids": [stop_token]}, 5, "stop", stop_token),
        ({"stop": word, "stop_token_ids": [tokens[6]]}, 7, "stop", tokens[6]),
        ({"stop": word, "stop_token_ids": [tokens[9]], "min_tokens": 8}, 9, "stop", None),
    ]
    with build(tiny_copy, async_scheduling=async_scheduling) as llm:
        defaults = {"temperature": 0, "max_tokens": 12}
        params = [SamplingParams(**defaults | options) for options, *_ in cases]
        outputs = llm.generate([DISTINCT] * len(cases), params, use_tqdm=False)
        for (options, count, reason, stop_reason), output in zip(cases, outputs, strict=True):
            found = len(output["token_ids"]), output["finish_reason"], output["stop_reason"]
            assert found == (count, reason, stop_reason), options
            assert output["token_ids"] == tokens[:count]
        assert gather(llm.stream([DISTINCT] * len(cases), params), len(cases)) == parts(outputs)
        assert_idle(llm)


def test_length_is_also_the_end_of_the_models_room(tiny: Path):
    with build(tiny, max_model_len=20) as llm:
        params = SamplingParams(temperature=0, max_tokens=None)
        for length in (1, 10, 19):
            (output,) = llm.generate(random_tokens(length), params, use_tqdm=False)
            assert len(output["token_ids"]) == 20 - length
            assert (output["finish_reason"], output["stop_reason"]) == ("length", None)
            assert gather(llm.stream(random_tokens(length), params)) == parts([output])


@pytest.mark.parametrize("stop", ["不", "\ufffd"])
def test_text_cut_at_a_stop_string_is_said_to_have_stopped_there(demo: LLM, stop: str):
    """Also if the last token allowed goes on to bytes that are no character yet."""
    assert demo.tokenizer.decode([512]) == "不\ufffd"
    params = SamplingParams(max_tokens=1, allowed_token_ids=[512], stop=stop)
    (output,) = demo.generate([5, 6], params, use_tqdm=False)
    found = (output["text"], output["finish_reason"], output["stop_reason"])
    assert found in [
        ("不\ufffd", "length", None), ("不\ufffd".partition(stop)[0], "stop", stop),
    ]  # fmt: skip
    assert gather(demo.stream([5, 6], params)) == parts([output])


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
    from test_failures import Fault

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


# Beside a stream


@BOTH_ORDERS
def test_generate_is_refused_while_a_stream_is_open_and_the_stream_goes_on(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    with build(tiny, async_scheduling=async_scheduling) as llm:

        def pieces() -> Iterator[dict[str, Any]]:
            for number, piece in enumerate(llm.stream(PROMPTS, GREEDY)):
                yield piece
                if number in (0, 3, 9):
                    with pytest.raises(RuntimeError, match=r"4 requests .* before generate\(\)"):
                        llm.generate([1, 2], GREEDY, use_tqdm=False)
                    with pytest.raises(RuntimeError, match=r"4 requests .* before stream\(\)"):
                        llm.stream([1, 2], GREEDY)

        found = gather(pieces(), 4)
        assert [one["token_ids"] for one in found] == [
            tiny_reference.tokens(prompt, 12) for prompt in PROMPTS
        ]
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


def test_of_two_streams_the_second_has_to_wait_for_the_first(llm: LLM, tiny_reference: Reference):
    first, second, third = (llm.stream(prompt, GREEDY) for prompt in PROMPTS[:3])
    head = [next(second)]
    with pytest.raises(RuntimeError, match=r"1 requests .* before stream\(\)"):
        next(first)
    (found,) = gather(iter([*head, *second]))
    assert found["token_ids"] == tiny_reference.tokens(PROMPTS[1], 12)
    (found,) = gather(third)
    assert found["token_ids"] == tiny_reference.tokens(PROMPTS[2], 12)
    assert list(first) == []
    assert llm.metrics()["requests_aborted"] == 0
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


# Aborting one request


@BOTH_ORDERS
def test_an_aborted_request_of_several_completions_is_gone_whole(
    tiny: Path, tiny_reference: Reference, async_scheduling: bool
):
    several = SamplingParams(n=3, seed=5, max_tokens=9)
    with build(tiny, max_num_seqs=3, async_scheduling=async_scheduling) as llm:
        for steps in range(5):
            aborted = llm.add_request(PROMPTS[0], several)
            kept = llm.add_request(PROMPTS[1], GREEDY)
            outputs = [output for _ in range(steps) for output in llm.step()]
            llm.abort(aborted + 1)  # no request's id
            assert llm.metrics()["requests_aborted"] == steps
            assert llm.scheduler.num_unfinished == 4
            llm.abort(aborted)
            llm.abort(aborted)
            assert llm.metrics()["requests_aborted"] == steps + 1
            assert llm.scheduler.num_unfinished == 1
            while not llm.is_finished():
                outputs += llm.step()
            assert [output["request_id"] for output in outputs] == [kept]
            assert outputs[0]["token_ids"] == tiny_reference.tokens(PROMPTS[1], 12)
            assert_empty(llm)


@BOTH_ORDERS
def test_a_request_whose_first_completion_has_ended_can_be_aborted(
    tiny: Path, async_scheduling: bool
):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        # Seeds whose completions end after different numbers of tokens, the first one first.
        for seed in range(100):
            params = SamplingParams(
                n=3, seed=seed, max_tokens=20, stop_token_ids=[*range(10)], temperature=2
            )
            (output,) = llm.generate([1, 2], params, use_tqdm=False)
            lengths = [len(one["token_ids"]) for one in output["outputs"]]
            if lengths[0] + 3 < min(lengths[1:]):
                break
        aborted_before = llm.metrics()["requests_aborted"]
        request_id = llm.add_request([1, 2], params)
        for _ in range(lengths[0] + 2):
            assert llm.step() == []
        assert llm.scheduler.num_unfinished == 2
        llm.abort(request_id)
        assert llm.metrics()["requests_aborted"] == aborted_before + 1
        while not llm.is_finished():
            assert llm.step() == []
        assert_empty(llm)
        assert not llm._requests


def test_aborting_a_request_that_has_ended_does_nothing(llm: LLM):
    request_id = llm.add_request([1, 2], GREEDY)
    while not llm.is_finished():
        llm.step()
    llm.abort(request_id)
    assert llm.metrics()["requests_aborted"] == 0
    assert llm.metrics()["requests_finished"] == 1


@BOTH_ORDERS
def test_a_request_of_several_completions_is_given_back_once(tiny: Path, async_scheduling: bool):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        request_id = llm.add_request([1, 2], SamplingParams(n=3, seed=1, max_tokens=4))
        outputs = []
        while not llm.is_finished():
            outputs += llm.step()
        assert [output["request_id"] for output in outputs] == [request_id]
        assert [one["index"] for one in outputs[0]["outputs"]] == [0, 1, 2]


# Metrics of a request


@BOTH_ORDERS
def test_times_of_a_request_are_in_order(tiny: Path, async_scheduling: bool):
    params = [SamplingParams(temperature=0, max_tokens=n) for n in (1, 2, 12, 5)]
    with build(tiny, max_num_seqs=2, async_scheduling=async_scheduling) as llm:
        before = time.time()
        outputs = llm.generate(PROMPTS, params, use_tqdm=False)
        after = time.time()
    for param, output in zip(params, outputs, strict=True):
        times = output["metrics"]
        assert set(times) == {
            "arrival_time", "first_token_time", "finished_time", "time_to_first_token",
            "time_per_output_token",
        }  # fmt: skip
        arrival, first, last = (
            times[name] for name in ("arrival_time", "first_token_time", "finished_time")
        )
        assert before <= arrival < first <= last <= after
        assert times["time_to_first_token"] == first - arrival > 0
        if param.max_tokens == 1:
            assert times["time_per_output_token"] is None
        else:
            mean = (last - first) / (param.max_tokens - 1)
            assert times["time_per_output_token"] == pytest.approx(mean)
            assert mean > 0
    assert len({output["metrics"]["arrival_time"] for output in outputs}) == 1
    waited = outputs[3]["metrics"]["first_token_time"]
    assert waited > outputs[0]["metrics"]["finished_time"], "only two run at once"


def test_times_of_a_request_include_its_time_in_the_queue(llm: LLM):
    llm.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=3))
    time.sleep(0.2)
    outputs = llm.step()
    time.sleep(0.2)
    while not llm.is_finished():
        outputs += llm.step()
    (output,) = outputs
    assert output["metrics"]["time_to_first_token"] >= 0.19
    assert output["metrics"]["time_per_output_token"] >= 0.09


def test_times_of_several_completions_are_of_the_first_and_the_last(tiny: Path):
    with build(tiny, max_num_seqs=1) as llm:  # one after another
        params = SamplingParams(n=3, seed=1, max_tokens=4)
        (output,) = llm.generate([1, 2, 3], params, use_tqdm=False)
        times = output["metrics"]
        assert times["arrival_time"] < times["first_token_time"] < times["finished_time"]
        assert times["time_per_output_token"] > 0


@BOTH_ORDERS
def test_a_preempted_request_keeps_the_time_of_its_first_token(tiny: Path, async_scheduling: bool):
    with build(
        tiny, num_kvcache_blocks=8, max_model_len=128, async_scheduling=async_scheduling
    ) as llm:
        prompts = [random_tokens(30, seed=seed) for seed in range(3)]
        params = SamplingParams(temperature=0, max_tokens=40)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert llm.metrics()["preemptions"] > 0
    first = [output["metrics"]["first_token_time"] for output in outputs]
    assert max(first[:2]) < min(output["metrics"]["finished_time"] for output in outputs)
    for output in outputs:
        times = output["metrics"]
        assert times["arrival_time"] < times["first_token_time"] < times["finished_time"]


# Metrics of the engine


def counts(llm: LLM) -> dict[str, int | float]:
    """The engine's metrics without the rates."""
    found = llm.metrics()
    rates = {name: found.pop(name) for name in list(found) if name.endswith("_per_second")}
    assert set(rates) == {"prefill_tokens_per_second", "decode_tokens_per_second"}
    assert all(rate >= 0 for rate in rates.values())
    return found


@BOTH_ORDERS
def test_counts_after_known_work(tiny: Path, async_scheduling: bool):
    with build(tiny, async_scheduling=async_scheduling) as llm:
        expected = {
            "requests_running": 0, "requests_waiting": 0, "requests_finished": 0,
            "requests_aborted": 0, "prompt_tokens": 0, "cached_prompt_tokens": 0,
            "prefix_cache_hit_rate": 0, "generated_tokens": 0, "kv_blocks": 40,
            "kv_blocks_in_use": 0, "kv_blocks_peak": 0, "preemptions": 0,
        }  # fmt: skip
        assert counts(llm) == expected
        params = [SamplingParams(temperature=0, max_tokens=n) for n in (12, 3, 1, 7)]
        llm.generate(PROMPTS, params, use_tqdm=False)  # of 5, 40, 16, 33 tokens
        expected |= {"requests_finished": 4, "prompt_tokens": 94, "generated_tokens": 23}
        found = counts(llm)
        peak = found.pop("kv_blocks_peak")
        assert found == {key: expected[key] for key in found}
        # The prompts take 1 + 3 + 1 + 3 blocks. The first grows to 16 computed tokens: none more.
        assert peak == 8
        llm.generate(PROMPTS[1], GREEDY, use_tqdm=False)  # 32 of 40 tokens are in the cache
        expected |= {
            "requests_finished": 5, "prompt_tokens": 134, "cached_prompt_tokens": 32,
            "prefix_cache_hit_rate": 32 / 134, "generated_tokens": 35, "kv_blocks_peak": 8,
        }  # fmt: skip
        assert counts(llm) == expected
        assert llm.metrics()["prefill_tokens_per_second"] == llm.stats.prefill_rate > 0
        assert llm.metrics()["decode_tokens_per_second"] == llm.stats.decode_rate > 0


def test_counts_while_requests_run_and_wait(tiny: Path):
    with build(tiny, max_num_seqs=2) as llm:
        ids = [llm.add_request(prompt, GREEDY) for prompt in PROMPTS]  # 5, 40, 16, 33 tokens
        found = counts(llm)
        assert (found["requests_running"], found["requests_waiting"]) == (0, 4)
        assert (found["prompt_tokens"], found["kv_blocks_in_use"]) == (0, 0)
        llm.step()
        found = counts(llm)
        assert (found["requests_running"], found["requests_waiting"]) == (2, 2)
        assert (found["prompt_tokens"], found["kv_blocks_in_use"]) == (45, 4)
        assert (found["generated_tokens"], found["requests_finished"]) == (0, 0)
        llm.abort(ids[0])
        llm.abort(ids[2])
        found = counts(llm)
        assert (found["requests_running"], found["requests_waiting"]) == (1, 1)
        assert (found["requests_aborted"], found["kv_blocks_in_use"]) == (2, 3)
        assert found["kv_blocks_peak"] == 4
        while not llm.is_finished():
            llm.step()
        found = counts(llm)
        assert (found["requests_aborted"], found["requests_finished"]) == (2, 2)
        assert found["generated_tokens"] == 24, "those of finished requests"
        assert found["prompt_tokens"] == 5 + 40 + 33, "those of admitted requests"
        llm.add_request([1, 2], GREEDY)
        llm.add_request([1, 2], SamplingParams(n=3, seed=1))
        assert counts(llm)["requests_waiting"] == 4, "counted by completion"
        llm.abort_all()
        found = counts(llm)
        assert (found["requests_running"], found["requests_waiting"]) == (0, 0)
        assert (found["requests_aborted"], found["requests_finished"]) == (4, 2)
        assert found["kv_blocks_peak"] > 0


def test_completions_of_one_prompt_share_its_blocks(tiny: Path):
    with build(tiny) as llm:
        params = SamplingParams(n=4, seed=1, max_tokens=5)
        llm.generate(random_tokens(40), params, use_tqdm=False)
        found = counts(llm)
    assert found["generated_tokens"] == 20
    assert (found["prompt_tokens"], found["cached_prompt_tokens"]) == (160, 3 * 32)
    assert found["prefix_cache_hit_rate"] == 0.6
    assert found["kv_blocks_peak"] == 2 + 4


def test_a_request_of_several_completions_counts_once(tiny: Path):
    with build(tiny) as llm:
        params = [SamplingParams(n=4, seed=1, max_tokens=5), GREEDY]
        llm.generate([[1, 2], [3]], params, use_tqdm=False)
        assert counts(llm)["requests_finished"] == 2


def test_tokens_of_an_aborted_request_are_not_counted(tiny: Path):
    with build(tiny, max_num_seqs=1) as llm:  # one completion after another
        request_id = llm.add_request([1, 2], SamplingParams(n=2, seed=1, max_tokens=3))
        for _ in range(3):
            assert llm.step() == []
        assert counts(llm)["requests_waiting"] == 1
        llm.abort(request_id)
        found = counts(llm)
        assert (found["requests_finished"], found["requests_aborted"]) == (0, 1)
        assert found["generated_tokens"] == 0


@BOTH_ORDERS
def test_preemptions_are_counted_and_prompts_only_once(tiny: Path, async_scheduling: bool):
    with build(
        tiny, num_kvcache_blocks=8, max_model_len=128, async_scheduling=async_scheduling
    ) as llm:
        prompts = [random_tokens(30, seed=seed) for seed in range(3)]
        params = SamplingParams(temperature=0, max_tokens=40)
        scheduler, preempted = llm.scheduler, []
        preempt = scheduler._preempt
        scheduler._preempt = lambda seq: (preempted.append(seq.seq_id), preempt(seq))
        llm.generate(prompts, params, use_tqdm=False)
        found = counts(llm)
    assert found["preemptions"] == len(preempted) > 0
    assert found["kv_blocks_peak"] == found["kv_blocks"] == 8
    assert (found["prompt_tokens"], found["cached_prompt_tokens"]) == (90, 0)
    assert found["generated_tokens"] == 120


def test_metrics_of_streams_are_those_of_generate(tiny: Path):
    with build(tiny) as first, build(tiny) as second:
        for _ in range(2):
            gather(first.stream(PROMPTS, GREEDY), 4)
            second.generate(PROMPTS, GREEDY, use_tqdm=False)
            assert counts(first) == counts(second)
        assert counts(first)["prefix_cache_hit_rate"] == 2 * (32 + 32) / (4 * 94)


def test_metrics_of_a_closed_engine_are_refused(tiny: Path):
    llm = build(tiny)
    llm.close()
    for use in (llm.metrics, lambda: llm.abort(0)):
        with pytest.raises(RuntimeError, match="closed"):
            use()
