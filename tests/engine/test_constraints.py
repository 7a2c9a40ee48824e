"""Constraints of requests, prepared together and filled together."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from helpers.constraints import (
    EOS,
    allowed,
    bits,
    constraint,
    demo_bytes,
    demo_tokenizer,
    factory,
    maker,
    num_words,
)
from helpers.paths import DEMO
from nanovllm import SamplingParams, StructuredOutputsParams
from nanovllm.config import Config
from nanovllm.engine.constraints import ConstraintMaker, MaskFiller, TokenConstraint, fill_masks
from nanovllm.engine.grammars import MANY_ROWS
from nanovllm.engine.input_processor import InputProcessor

FORMS: list[dict[str, Any]] = [
    {"regex": "(a|ba|[c-e])*x"}, {"bad_words": ["x", "ba"]},
    {"bad_words": ["x", "ba"], "regex": "(a|ba|[c-e])*x"},
]  # fmt: skip


def of_all_kinds(number: int, vocab_size: int) -> list[TokenConstraint | None]:
    """A grammar, bad words, both and none, in turn; each time after one token more."""
    found: list[TokenConstraint | None] = []
    for row in range(number):
        turn, kind = divmod(row, 4)
        one = constraint(vocab_size=vocab_size, **FORMS[kind]) if kind < 3 else None
        for byte in (b"cbaba" * number)[:turn]:
            if one is not None:
                one.accept(demo_bytes().index(bytes([byte])))
        found.append(one)
    return found


@pytest.mark.parametrize("number", [0, 1, 2, 4, MANY_ROWS, 3 * MANY_ROWS])
@pytest.mark.parametrize("vocab_size", [700, 800, 870])
def test_masks_filled_together_are_those_of_each(number: int, vocab_size: int):
    """In threads if they are many, and whatever was there before."""
    rows = of_all_kinds(number, vocab_size)
    out = np.full((number, num_words(vocab_size)), 0x5A5A5A5A, dtype=np.int32)
    fill_masks(rows, out)
    whole = set(range(32 * num_words(vocab_size)))
    expected = [whole if one is None else allowed(one, vocab_size) for one in rows]
    assert [bits(mask) for mask in out] == expected
    assert number < 4 or len(set(map(frozenset, expected))) > 3


def test_of_many_texts_those_that_cannot_go_on_say_so():
    """Their tokens are taken in together."""
    make = factory(choice=["ya", "yb"])
    rows = [make() for _ in range(MANY_ROWS + 1)]
    for row, one in enumerate(rows):
        one.accept(demo_bytes().index(b"n" if row == 3 else b"y"))
    out = np.empty((len(rows), num_words()), dtype=np.int32)
    with pytest.warns(UserWarning, match="cannot be completed") as caught:
        fill_masks(rows, out)
    assert len(caught) == 1
    found = [{demo_bytes()[i] for i in bits(mask)} for mask in out]
    assert found[3] == set() and found[:3] + found[4:] == [{b"a", b"b"}] * MANY_ROWS
    fill_masks(rows, out)  # without a second warning


def test_all_of_several_allow_all_where_each_does():
    word = demo_tokenizer().encode("qz")
    bad = constraint(["qz"])
    assert len(word) == 2 and bad.allows_all
    bad.accept(word[0])
    assert not bad.allows_all and not constraint(["qz"], regex="[a-z]+").allows_all


def test_all_of_several_must_allow_a_token():
    both = constraint(["the"], regex="[a-z ]*")
    assert allowed(both) == allowed(constraint(["the"])) & allowed(constraint(regex="[a-z ]*"))
    both.accept(EOS[0])
    assert both.is_complete and allowed(both) == set(EOS)
    first, second = demo_tokenizer().encode("qz")
    both = constraint(["qz"], regex="[a-z ]+")
    assert {first, second} <= allowed(both)
    both.accept(first)
    assert first in allowed(both) and second not in allowed(both)


def test_what_asks_for_nothing_has_none():
    (make,) = maker().prepare([SamplingParams()])
    assert make() is None


def test_each_prompt_gets_what_it_asks_for():
    params = [
        SamplingParams(structured_outputs=StructuredOutputsParams(choice=[word]))
        if word
        else SamplingParams()
        for word in ("a", "", "b", "c", "b")
    ]
    found = [make() for make in maker().prepare(params)]
    letters = [one and {demo_bytes()[i] for i in allowed(one)} for one in found]
    assert letters == [{b"a"}, None, {b"b"}, {b"c"}, {b"b"}]
    assert found[2] is not found[4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structured_outputs": {"regex": "["}}, "prompt 1: structured_outputs: .*unclosed"),
        ({"bad_words": ["a\ud800"]}, "prompt 1: bad_words: .* not valid Unicode"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_by_its_place(options: dict[str, Any], message: str):
    good = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        maker().prepare([good, SamplingParams(**options), SamplingParams(**options)])


@pytest.mark.parametrize(
    "options", [{"bad_words": ["a"]}, {"structured_outputs": {"json_object": True}}], ids=str
)
def test_without_a_tokenizer_there_is_no_text(options: dict[str, Any]):
    without = ConstraintMaker(None, EOS, 800)
    with pytest.raises(ValueError, match=f"prompt 1: {next(iter(options))} needs text"):
        without.prepare([SamplingParams(), SamplingParams(**options)])


def test_an_engine_without_an_end_refuses_structures():
    endless = ConstraintMaker(demo_tokenizer(), set(), 800)
    structured = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    with pytest.raises(ValueError, match="prompt 1: structured_outputs needs an end-of-sequence"):
        endless.prepare([SamplingParams(bad_words=["a"]), structured])


def test_a_word_of_tokens_that_the_model_lacks_cannot_come():
    last = demo_tokenizer().decode([799])
    assert demo_tokenizer().encode(last) == [799]
    bare = SamplingParams(bad_words=[last])
    assert maker(700).prepare([bare])[0]() is None
    assert maker(800).prepare([bare])[0]() is not None


def test_every_completion_of_a_request_has_its_own():
    config = Config.from_options(DEMO, {"device": "cpu"})
    processor = InputProcessor(config, demo_tokenizer(), set(EOS))
    structure = StructuredOutputsParams(choice=["a", "b"])
    params = [SamplingParams(), SamplingParams(n=3, structured_outputs=structure)]
    plain, request = processor.process(["1", "2"], params)
    assert [seq.constraint for seq in plain.sequences] == [None]
    first, *others = [seq.constraint for seq in request.sequences]
    first.accept(demo_bytes().index(b"a"))
    assert first.is_complete
    assert [len(allowed(one)) for one in others] == [2, 2]
    with pytest.raises(ValueError, match="prompt 1: structured_outputs"):
        processor.process(
            ["1", "2"], [params[0], SamplingParams(structured_outputs={"regex": "["})]
        )


# The thread


def test_masks_are_filled_in_a_fork_too():
    filler, masks = MaskFiller(), np.empty((1, num_words(800)), dtype=np.int32)
    filler.start([constraint(choice=["yes"])], masks)
    filler.finish()
    expected = masks.copy()
    pid = os.fork()
    if pid == 0:
        masks[:] = 0
        filler.start([constraint(choice=["yes"])], masks)
        filler.finish()
        os._exit(0 if np.array_equal(masks, expected) else 1)
    deadline = time.monotonic() + 20
    while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended == (0, 0):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert ended == (pid, 0)


def test_masks_are_filled_without_a_thread_if_there_can_be_none(monkeypatch: pytest.MonkeyPatch):
    """As after the main thread has ended."""
    filler, masks = MaskFiller(), np.empty((1, num_words(800)), dtype=np.int32)
    refuse = RuntimeError("cannot schedule new futures after interpreter shutdown")
    monkeypatch.setattr(ThreadPoolExecutor, "submit", lambda *_: (_ for _ in ()).throw(refuse))
    filler.start([None], masks)
    filler.finish()
    assert (masks == -1).all()
    filler.close()
    filler.close()
