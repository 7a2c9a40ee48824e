"""Why and when a request ends, and where its text does."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from helpers.chats import ANSWER, SUM, build_demo
from helpers.checkpoints import Reference, add_tokenizer, edit_json, random_tokens
from helpers.engines import BOTH_ORDERS, GREEDY, build, greedy
from helpers.paths import DEMO
from helpers.streams import (
    DISTINCT,
    IM_END,
    IM_START,
    QUESTIONS,
    assert_idle,
    gather,
    parts,
    question,
)
from nanovllm import LLM, SamplingParams


@pytest.fixture(scope="module", params=[False, True], ids=["sync", "async"])
def demo(request: pytest.FixtureRequest):
    """The demo, which answers in English and Chinese. Tests leave nothing behind in it."""
    with build(
        DEMO, num_kvcache_blocks=128, dtype="float32", async_scheduling=request.param
    ) as engine:
        yield engine


# Whole characters, and stop strings


@pytest.mark.parametrize("token_id", [20, 130, 200, 512])
def test_bytes_that_make_no_character_are_shown_at_the_end_only(demo: LLM, token_id: int):
    params = SamplingParams(max_tokens=3, allowed_token_ids=[token_id], ignore_eos=True)
    whole = demo.tokenizer.decode([token_id] * 3)
    pieces = list(demo.stream([5, 6], params))
    assert [piece["token_ids"] for piece in pieces] == [[token_id]] * 3
    assert "".join(piece["text"] for piece in pieces) == whole
    assert not any(piece["text"].endswith("\ufffd") for piece in pieces[:-1])
    if whole == "\ufffd" * len(whole):
        assert [piece["text"] for piece in pieces] == ["", "", whole]
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


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("stop", ["<|im_end|>", "5<|im_end|>"])
def test_a_special_token_in_a_stop_string_ends_a_request_that_ignores_it(
    demo: LLM, stop: str, include: bool
):
    prompt = question("47+38=")
    params = SamplingParams(
        temperature=0, max_tokens=20, ignore_eos=True, stop=stop, include_stop_str_in_output=include
    )
    (output,) = demo.generate(prompt, params, use_tqdm=False)
    assert output["token_ids"][-1] == IM_END
    assert (output["finish_reason"], output["stop_reason"]) == ("stop", stop)
    assert output["text"] == ("47 + 38 = 85<|im_end|>"[: None if include else -len(stop)])
    assert gather(demo.stream(prompt, params)) == parts([output])


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


@BOTH_ORDERS
def test_an_end_of_sequence_token_outside_the_vocabulary_ends_nothing(
    tiny_copy: Path, tiny_reference: Reference, async_scheduling: bool
):
    first = tiny_reference.tokens(DISTINCT, 12)[0]
    edit_json(tiny_copy / "generation_config.json", eos_token_id=[-1, 128, first, 10**6])
    with build(tiny_copy, async_scheduling=async_scheduling) as llm:
        params = [SamplingParams(temperature=0, min_tokens=n) for n in (0, 3)]
        short, long = llm.generate([DISTINCT] * 2, params, use_tqdm=False)
        assert short["token_ids"] == [first]
        assert len(long["token_ids"]) >= 3 and first not in long["token_ids"][:3]


# Which tokens end it


@pytest.mark.parametrize(
    ("generation", "config", "tokenizer", "ends_at"),
    [
        (None, None, None, 12), (3, None, None, 4), (None, 3, None, 4), (None, None, 3, 4),
        ([9, 3], None, None, 4), (None, [9, 3], None, 4), (3, 9, None, 4), (9, 3, None, 10),
        (9, None, 3, 4), (3, None, 9, 4), (None, 9, 3, 4), (None, 3, 9, 4), (9, 3, 5, 6),
        ([9, 8], 3, 5, 6), ([], 3, 5, 6), ([], 3, None, 12), (3, 3, 3, 4),
        ("no key", [9, 3], None, 4), ("no file", 3, None, 4), ("no file", 9, 3, 4),
    ],
)  # fmt: skip
def test_answers_end_at_the_tokens_of_generation_config_and_tokenizer(
    tiny_copy: Path,
    tiny_reference: Reference,
    generation: int | list[int] | str | None,
    config: int | list[int] | None,
    tokenizer: int | None,
    ends_at: int,
):
    """Numbers are places in the answer. config.json counts if generation_config.json has none."""
    tokens = tiny_reference.tokens(DISTINCT, 12)
    assert len(set(tokens)) == 12

    def at(places: int | list[int] | None) -> int | list[int] | None:
        if isinstance(places, list):
            return [tokens[place] for place in places]
        return None if places is None else tokens[places]

    path = tiny_copy / "generation_config.json"
    if generation == "no file":
        path.unlink(missing_ok=True)
    elif generation == "no key":
        edit_json(path, remove=("eos_token_id",))
    else:
        edit_json(path, eos_token_id=at(generation))
    edit_json(tiny_copy / "config.json", eos_token_id=at(config))
    if tokenizer is not None:
        add_tokenizer(tiny_copy, eos_token=f"t{tokens[tokenizer]}")
    with build(tiny_copy) as llm:
        outputs = llm.generate(
            [DISTINCT] * 2,
            [GREEDY, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)],
            use_tqdm=False,
        )
    assert [output["token_ids"] for output in outputs] == [tokens[:ends_at], tokens]
    assert outputs[0]["finish_reason"] == ("length" if ends_at == 12 else "stop")
    assert outputs[0]["stop_reason"] is None


def test_an_answer_ends_where_the_template_ends_messages(demo_copy: Path):
    """By the tokenizer's end-of-sequence token, which generation_config.json does not name."""
    edit_json(demo_copy / "generation_config.json", eos_token_id=0)
    edit_json(demo_copy / "config.json", eos_token_id=0)
    with build_demo(demo_copy) as llm:
        (output,) = llm.chat(SUM, ANSWER, use_tqdm=False)
    assert (output["text"], output["finish_reason"]) == ("47 + 38 = 85", "stop")


def test_eos_in_the_prompt_ends_nothing(tiny_copy: Path, tiny_reference: Reference):
    tokens = tiny_reference.tokens(DISTINCT, 12)
    eos = next(token for token in DISTINCT if token not in tokens)
    edit_json(tiny_copy / "generation_config.json", eos_token_id=eos)
    with build(tiny_copy) as llm:
        assert greedy(llm, [DISTINCT]) == [tokens]
