"""Stop strings in text as it grows, wherever tokens part them."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from helpers.checkpoints import VOCAB_SIZE
from helpers.growing_text import (
    BROKEN,
    EXAMPLES,
    FORTY_TWO,
    IM_START,
    SPACE,
    A,
    B,
    byte_ids,
    demo_ids,
    growth,
    piece_ids,
    text_of,
    texts,
    word_ids,
)
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.tokenizer import Decoder


def stops_in(text: str) -> st.SearchStrategy[tuple[str, ...]]:
    """Stop strings that are in `text`, that nearly are, and others."""
    others = st.sampled_from(["a", "t1", "中", "e\u0301", "\n", "zz", "aab", " "])
    parts = others
    if text:
        spans = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 6))
        inside = spans.map(lambda span: text[span[0] : span[0] + span[1]])
        almost = st.tuples(inside, st.sampled_from("a 中t")).map("".join)
        parts = st.one_of(inside, inside, almost, others)
    return st.lists(parts, min_size=1, max_size=3).map(tuple)


def held_back(text: str, stops: tuple[str, ...]) -> int:
    """How much of the end of `text` may be the beginning of a stop string, and not all of it."""
    return max(
        (cut for stop in stops for cut in range(1, len(stop)) if text.endswith(stop[:cut])),
        default=0,
    )


def check_stops(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    skip: bool,
    stops: tuple[str, ...],
    include_stop: bool,
    min_tokens: int,
) -> None:
    """Take `ids` in until a stop string ends the text, against a plain search in the whole text."""
    detokenizer = Detokenizer(Decoder(tokenizer), skip, stops, include_stop)
    whole = text_of(tokenizer, ids, skip)
    steps = [(text, n >= min_tokens) for n, text in enumerate(growth(tokenizer, ids, skip), 1)]
    safe_texts, before = [], ""
    for number, (text, may_stop) in enumerate([*steps, (whole, False)]):
        if number < len(ids):
            detokenizer.append(ids[number], may_stop)
        else:
            detokenizer.finish()
        found = [
            (start, start + len(stop), stop)
            for stop in stops
            for start in range(len(text))
            if text.startswith(stop, start) and start + len(stop) > len(before)
        ]
        safe_texts.append(detokenizer.text[: detokenizer.num_safe])
        if found and may_stop:
            start, end, stop = min(found)
            assert detokenizer.stopped_by == stop
            assert detokenizer.text == text[: end if include_stop else start]
            assert detokenizer.num_safe == len(detokenizer.text)
            break
        assert detokenizer.stopped_by is None
        assert detokenizer.text == text
        held = held_back(text, stops)
        if min_tokens == 0 and number < len(ids):
            assert detokenizer.num_safe == len(text) - held
        elif number == len(ids):
            assert detokenizer.num_safe == len(text), "it has ended: nothing is taken back"
        else:  # `text` may end with a whole stop string, which is as well held back or not
            assert len(text) - max(held, *map(len, stops)) <= detokenizer.num_safe
            assert detokenizer.num_safe <= len(text) - held
        before = text
    for shorter, longer in pairwise(safe_texts):
        assert longer.startswith(shorter), "text that was safe is gone"
    end = detokenizer.text
    assert end.startswith(safe_texts[-1])
    detokenizer.finish()
    assert detokenizer.text == end
    whole_characters = steps[-1][0] if steps else ""
    if len(stops) == 1 and min_tokens == 0 and stops[0] in whole_characters:
        assert end == whole.partition(stops[0])[0] + (stops[0] if include_stop else "")


@EXAMPLES
@given(data=st.data(), text=texts, skip=st.booleans(), include_stop=st.booleans())
def test_text_ends_at_the_first_stop_string(
    demo: PreTrainedTokenizerBase, data: st.DataObject, text: str, skip: bool, include_stop: bool
):
    ids = demo.encode(text, add_special_tokens=False)
    stops = data.draw(stops_in(text_of(demo, ids, skip)))
    min_tokens = data.draw(st.one_of(st.just(0), st.integers(0, len(ids))))
    check_stops(demo, ids, skip, stops, include_stop, min_tokens)


@EXAMPLES
@given(data=st.data(), ids=demo_ids, skip=st.booleans(), include_stop=st.booleans())
def test_broken_text_ends_at_the_first_stop_string(
    demo: PreTrainedTokenizerBase,
    data: st.DataObject,
    ids: list[int],
    skip: bool,
    include_stop: bool,
):
    stops = data.draw(stops_in(text_of(demo, ids, skip)))
    min_tokens = data.draw(st.one_of(st.just(0), st.integers(0, len(ids))))
    check_stops(demo, ids, skip, stops, include_stop, min_tokens)


@EXAMPLES
@given(data=st.data(), ids=word_ids, include_stop=st.booleans())
def test_words_end_at_the_first_stop_string(
    words: PreTrainedTokenizerBase, data: st.DataObject, ids: list[int], include_stop: bool
):
    ids = [i for i in ids if i < VOCAB_SIZE]
    stops = data.draw(stops_in(text_of(words, ids, skip=False)))
    min_tokens = data.draw(st.one_of(st.just(0), st.integers(0, len(ids))))
    check_stops(words, ids, False, stops, include_stop, min_tokens)


def run_words(
    tokenizer: PreTrainedTokenizerBase, text: str, stop: tuple[str, ...], **options: bool
) -> list[tuple[str, str, str | None]]:
    """After each word: the text, what of it is safe, and the stop string found."""
    detokenizer, seen = Detokenizer(Decoder(tokenizer), True, stop, **options), []
    for token_id in tokenizer.encode(text, add_special_tokens=False):
        detokenizer.append(token_id)
        safe = detokenizer.text[: detokenizer.num_safe]
        seen.append((detokenizer.text, safe, detokenizer.stopped_by))
    return seen


def test_a_stop_string_over_three_tokens_is_held_back_and_cut(words: PreTrainedTokenizerBase):
    assert run_words(words, "t9 t12 t34 t56", ("2 t34 t5",)) == [
        ("t9", "t9", None),
        ("t9 t12", "t9 t1", None),
        ("t9 t12 t34", "t9 t1", None),
        ("t9 t1", "t9 t1", "2 t34 t5"),
    ]


def test_a_stop_string_that_does_not_come_true_is_shown(words: PreTrainedTokenizerBase):
    assert run_words(words, "t12 t34 t7", ("2 t34 t5",)) == [
        ("t12", "t1", None),
        ("t12 t34", "t1", None),
        ("t12 t34 t7", "t12 t34 t7", None),
    ]


def test_a_stop_string_may_begin_again_within_itself(words: PreTrainedTokenizerBase):
    seen = run_words(words, "t11 t11 t11 t12", ("1 t11 t12",))
    assert [safe for _, safe, _ in seen] == ["t1", "t1", "t11 t1", "t11 t1"]
    assert seen[-1] == ("t11 t1", "t11 t1", "1 t11 t12")


def test_the_stop_string_stays_if_asked_for_and_what_comes_after_it_never(
    words: PreTrainedTokenizerBase,
):
    assert run_words(words, "t9 t123", ("t1",))[-1] == ("t9 ", "t9 ", "t1")
    assert run_words(words, "t9 t123", ("t1",), include_stop=True)[-1] == ("t9 t1", "t9 t1", "t1")


def test_of_several_stop_strings_the_first_in_the_text_ends_it(words: PreTrainedTokenizerBase):
    assert run_words(words, "t9 t123", ("3", "2", "t7"))[-1] == ("t9 t1", "t9 t1", "2")
    assert run_words(words, "t9 t123", ("123", "12"))[-1] == ("t9 t", "t9 t", "12")


def test_a_stop_string_that_no_token_may_end_with_stays(words: PreTrainedTokenizerBase):
    detokenizer = Detokenizer(Decoder(words), True, ("t2 t3",))
    seen = []
    for token_id, may_stop in ((1, False), (2, False), (3, False), (2, False), (3, True)):
        detokenizer.append(token_id, may_stop)
        seen.append((detokenizer.text[: detokenizer.num_safe], detokenizer.stopped_by))
    assert [safe for safe, _ in seen] == [
        "t1", "t1 ", "t1 t2 t3", "t1 t2 t3 ", "t1 t2 t3 ",
    ]  # fmt: skip
    assert [stop for _, stop in seen] == [None] * 4 + ["t2 t3"]
    assert detokenizer.text == "t1 t2 t3 "


def test_a_stop_string_that_ends_with_the_first_token_that_may_is_found(
    words: PreTrainedTokenizerBase,
):
    """Its beginning came with tokens that might not stop."""
    detokenizer = Detokenizer(Decoder(words), True, ("t1 t2 t3",))
    for token_id, may_stop in ((1, False), (2, False), (3, True)):
        detokenizer.append(token_id, may_stop)
    assert (detokenizer.text, detokenizer.stopped_by) == ("", "t1 t2 t3")


def test_what_is_shown_at_the_very_end_no_stop_string_ends(demo: PreTrainedTokenizerBase):
    """By then it is settled why the request has ended."""
    assert demo.decode([512]) == "不\ufffd"
    for stop in (BROKEN, "不\ufffd"):
        detokenizer = Detokenizer(Decoder(demo), True, (stop,))
        detokenizer.append(512)
        assert (detokenizer.text, detokenizer.stopped_by) == ("不", None)
        detokenizer.finish()
        assert (detokenizer.text, detokenizer.stopped_by) == ("不\ufffd", None)


def test_a_stop_string_is_found_before_the_first_bytes_of_a_character(
    demo: PreTrainedTokenizerBase,
):
    for include, text in ((False, ""), (True, "不")):
        detokenizer = Detokenizer(Decoder(demo), True, ("不",), include)
        detokenizer.append(512)
        detokenizer.finish()
        assert (detokenizer.text, detokenizer.stopped_by) == (text, "不")


def test_a_stop_string_ends_inside_of_a_token_after_whole_characters_only(
    demo: PreTrainedTokenizerBase,
):
    """The character that the stop string ends with takes several tokens: it stops with the last."""
    byte_of = {demo.convert_ids_to_tokens(i): i for i in range(3, 259)}
    (token,) = demo.backend_tokenizer.pre_tokenizer.pre_tokenize_str("🙂")
    ids = [byte_of[char] for char in token[0]]
    detokenizer = Detokenizer(Decoder(demo), True, ("a🙂",))
    seen = []
    for token_id in [*demo.encode("ba"), *ids]:
        detokenizer.append(token_id)
        seen.append((detokenizer.text[: detokenizer.num_safe], detokenizer.stopped_by))
    assert len(ids) == 4
    assert seen[-4:] == [("b", None)] * 3 + [("b", "a🙂")]


# Stop strings that have a special token


def run(
    tokenizer: PreTrainedTokenizerBase,
    ids: list[int],
    stop: str,
    skip: bool = True,
    include: bool = False,
) -> tuple[str, str | None, list[str]]:
    """The text, the stop string found, and what was safe after each token before it."""
    detokenizer, safe = Detokenizer(Decoder(tokenizer), skip, (stop,), include), []
    for token_id in ids:
        detokenizer.append(token_id)
        if detokenizer.stopped_by is not None:
            break
        safe.append(detokenizer.text[: detokenizer.num_safe])
    detokenizer.finish()
    return detokenizer.text, detokenizer.stopped_by, safe


@pytest.mark.parametrize("skip", [True, False])
def test_a_special_token_is_found_whether_or_not_it_is_shown(
    demo: PreTrainedTokenizerBase, skip: bool
):
    start, end = "<|im_start|>", "<|im_end|>"
    shown = "" if skip else start
    ids = demo.encode(f"{start}a42{end}b", add_special_tokens=False)
    assert run(demo, ids, end, skip)[:2] == (f"{shown}a42", end)
    assert run(demo, ids, end, skip, include=True)[:2] == (f"{shown}a42{end}", end)
    assert run(demo, ids, f"42{end}", skip)[:2] == (f"{shown}a", f"42{end}")
    assert run(demo, ids, f"2{end}b", skip)[:2] == (f"{shown}a4", f"2{end}b")
    assert run(demo, ids, f"{start}a", skip)[:2] == ("", f"{start}a")


def test_what_may_be_before_a_special_token_of_a_stop_string_is_held_back(
    demo: PreTrainedTokenizerBase,
):
    ids = [byte for char in "a4" for byte in demo.encode(char)] + [IM_START, *demo.encode("b")]
    text, stopped_by, safe = run(demo, ids, "4<|im_start|>c")
    assert (text, stopped_by) == ("a4b", None)
    assert safe == ["a", "a", "a", "a4b"]


def test_what_a_special_token_is_written_with_ends_no_text_that_leaves_it_out(
    demo: PreTrainedTokenizerBase,
):
    ids = [*demo.encode("a"), IM_START, *demo.encode("b")]
    assert run(demo, ids, "im")[:2] == ("ab", None)
    assert run(demo, ids, "ab")[:2] == ("", "ab")


@EXAMPLES
@given(ids=piece_ids, include=st.booleans(), stop=st.sampled_from(["</s>", "42</s>", "</s><s>"]))
@example(ids=[A, *byte_ids("é"), 2], include=False, stop="</s>")
@example(ids=[A, *byte_ids("é")[:1], 2], include=True, stop="</s>")
@example(ids=[1, SPACE, FORTY_TWO, 2], include=True, stop="42</s>")
def test_what_precedes_a_special_token_that_stops_stays(
    llama: PreTrainedTokenizerBase, ids: list[int], include: bool, stop: str
):
    """It is what decoding the tokens before gives."""
    tokens = llama.convert_ids_to_tokens(ids)
    wanted = {"</s>": ["</s>"], "42</s>": ["42", "</s>"], "</s><s>": ["</s>", "<s>"]}[stop]
    known = [place for place, token in enumerate(tokens) if token is not None]
    places = [
        known[i] for i in range(len(known))
        if [tokens[place] for place in known[i : i + len(wanted)]] == wanted
    ]  # fmt: skip
    text, stopped_by, safe = run(llama, ids, stop, include=include)
    if places:
        before = text_of(llama, ids[: places[0]])
        assert (text, stopped_by) == (before + (stop if include else ""), stop)
    else:
        before = text
        assert (text, stopped_by) == (text_of(llama, ids), None)
    for shorter, longer in pairwise([*safe, before]):
        assert longer.startswith(shorter), "text that was safe is gone"


def test_a_stop_string_of_bytes_ends_the_text_with_its_last_byte(llama: PreTrainedTokenizerBase):
    assert run(llama, [A, *byte_ids("é"), B], "é") == ("a", "é", ["a", "a"])
    assert run(llama, [A, *byte_ids("é🙂"), B], "🙂")[:2] == ("aé", "🙂")
