"""Masks of grammars: by brute force over the whole vocabulary, and what may end a text."""

import itertools
import json
import random
import re
import sys
from typing import Any

import pytest

from helpers.constraints import (
    EOS,
    OTHER_SPECIAL,
    accept_text,
    allowed,
    constraint,
    demo_bytes,
    demo_tokenizer,
    factory,
)
from nanovllm import StructuredOutputsParams
from nanovllm.engine.grammars import NUM_LEXERS, Grammar, Grammars

CHOICES = [
    ["yes", "no"], ["a", "ab", "abc", "b"], ["", "x"], ["the", "then", " the", "there is"],
    ["日本語", "日本", "é", "🙂🙂"],
    ['say "so"', "back\\slash", "line\nbreak", "tab\t", "/x/", "{1}"],
]  # fmt: skip
# With the letters and the length of the longest text: all texts are tried.
REGEXES = [
    ("(a|bc){1,3}d?", "abcd", 7), ("[0-1]{2}-[x-z]", "01-xyz", 4), ("x?y{0,2}z|yy", "xyz", 4),
    ("(foo|fo)o?", "fo", 4), ("(?i)ab?", "aAbB", 2), ("[0-9]{1,2}é", "0123456789é", 3),
]  # fmt: skip
GREETINGS = [f"{a} {b}{c}" for a in ("hello", "hi") for b in ("you", "world") for c in ("", "!")]
GRAMMARS = [
    'start: hi " " WHO "!"?\nhi: "hello" | "hi"\nWHO: /you|world/',
    'root ::= hi " " ("you" | "world") "!"?\nhi ::= "hello" | "hi"',
]
VALUES = [1, 12, "a", "", [1, "a"], {"k": None}, {"k": True}]


def languages() -> list[tuple[dict[str, Any], list[str]]]:
    """What is asked for, and all texts that it allows."""
    found: list[tuple[dict[str, Any], list[str]]] = [({"choice": c}, c) for c in CHOICES]
    for regex, letters, longest in REGEXES:
        texts = [
            "".join(t) for n in range(longest + 1) for t in itertools.product(letters, repeat=n)
        ]
        found.append(({"regex": regex}, [text for text in texts if re.fullmatch(regex, text)]))
    found += [({"grammar": grammar}, GREETINGS) for grammar in GRAMMARS]
    compact = [json.dumps(value, separators=(",", ":")) for value in VALUES]
    found.append(({"json": {"enum": VALUES}, "disable_any_whitespace": True}, compact))
    return found


@pytest.mark.parametrize(("what", "texts"), languages(), ids=lambda value: str(value)[:30])
def test_masks_are_those_of_brute_force(what: dict[str, Any], texts: list[str]):
    """Along random walks, at every state: a token may come if some text goes on with it. Where all
    go on with the same byte, the library may leave only the usual token."""
    rng, wanted = random.Random(0), {text.encode() for text in texts}
    make, ends = factory(**what), set()
    for _ in range(25):
        walked, so_far = make(), b""
        while True:
            rests = {text[len(so_far) :] for text in wanted if text.startswith(so_far)}
            beginnings = {rest[:n] for rest in rests for n in range(1, len(rest) + 1)}
            expected = {i for i, token in enumerate(demo_bytes()) if token in beginnings}
            if b"" in rests:
                expected |= set(EOS)
            found = allowed(walked)
            is_forced = len({rest[:1] for rest in rests}) == 1 and b"" not in rests
            assert found == expected or (is_forced and len(found & expected) == len(found) == 1)
            assert walked.is_complete == (expected == set(EOS)), so_far
            token_id = rng.choice(sorted(found))
            walked.accept(token_id)
            if token_id in EOS:
                break
            so_far += demo_bytes()[token_id]
        assert walked.is_complete and allowed(walked) == set(EOS)
        ends.add(so_far)
    assert len(ends) > 1


def test_an_object_is_any_object_and_nothing_else():
    walked = constraint(json_object=True)
    assert {demo_bytes()[i][:1] for i in allowed(walked)} == {b"{"}
    accept_text(walked, '{ "größe":\n[1, {"b": null}] }')
    assert walked.is_complete and allowed(walked) == set(EOS)


@pytest.mark.parametrize(
    ("options", "texts", "refused"),
    [
        ({}, ['{"a":1}', '{ "a" :\n1 }'], []),
        ({"disable_any_whitespace": True}, ['{"a":1}'], ['{"a": 1}', '{ "a":1}']),
        ({"whitespace_pattern": " ?"}, ['{"a": 1}', '{"a":1 }'], ['{"a":  1}', '{\n"a":1}']),
    ],
)  # fmt: skip
def test_whitespace(options: dict[str, Any], texts: list[str], refused: list[str]):
    schema = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}
    schema["additionalProperties"] = False
    for text in texts:
        walked = constraint(json=schema, **options)
        accept_text(walked, text)
        assert walked.is_complete
    for text in refused:
        with pytest.raises(UserWarning, match="doesn't satisfy"):
            accept_text(constraint(json=schema, **options), text)


# The end


@pytest.mark.parametrize(
    "eos",
    [(2,), (0, 2), (2, 860), (2, demo_bytes().index(b"a"), demo_bytes().index(b"x"))],
    ids=["one", "two", "one_past_the_tokenizer", "two_of_text"],
)
def test_every_end_of_sequence_token_may_end_a_text_and_do_nothing_else(eos: tuple[int, ...]):
    """Whether it is special in the tokenizer or not."""
    make = factory(choice=["yb", "ybc", "ax"], vocab_size=870, eos=eos)
    walked = make()
    for text in ("y", "b"):
        assert allowed(walked, 870).isdisjoint(eos)
        accept_text(walked, text)
    assert allowed(walked, 870) > set(eos) and not walked.is_complete
    accept_text(walked, "c")
    assert allowed(walked, 870) == set(eos) and walked.is_complete
    for token_id in eos:
        ended = make()
        accept_text(ended, "yb")
        ended.accept(token_id)
        assert allowed(ended, 870) == set(eos) and ended.is_complete


def test_special_tokens_and_padding_are_no_text():
    walked = constraint(regex="(?s:.)*", vocab_size=870)
    for text in ("", "<|im_", "é"):
        accept_text(walked, text)
        found = allowed(walked, 870)
        assert OTHER_SPECIAL not in found and max(found) < 800 and found >= set(EOS)


def test_a_model_may_lack_tokens_of_the_tokenizer():
    walked = constraint(regex="[a-z]+", vocab_size=700)
    assert allowed(walked, 700) == {
        i for i, t in enumerate(demo_bytes()[:704]) if t.isascii() and t.isalpha() and t.islower()
    }  # fmt: skip


def test_a_text_that_cannot_go_on_has_no_next_token():
    """As one that outgrows the library's limits."""
    walked = constraint(choice=["yes"])
    with pytest.warns(UserWarning, match=r"cannot be completed: .*doesn't satisfy"):
        walked.accept(demo_bytes().index(b"n"))
        assert walked.is_complete and not allowed(walked)
    walked.accept(EOS[0])
    assert not allowed(walked)


def test_a_literal_never_brings_a_special_token():
    """Spelled such that it is not seen before: the library would take the token for its text."""
    walked = constraint(regex=r"a[<][|]im_end[|]>b|c")
    walked.accept(demo_bytes().index(b"a"))
    assert not allowed(walked).intersection([*EOS, OTHER_SPECIAL])


# Compiling

REFUSED = [
    ({"json": {"type": "strin"}}, "Invalid type: strin"),
    ({"json": {"not": {"type": "string"}}}, "Unimplemented keys"),
    ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
    ({"json": {"type": "integer", "minimum": 3, "maximum": 2}}, "Unsatisfiable"),
    ({"json": {"$ref": "#/nowhere"}}, "nowhere"),
    ({"json": {"type": "string", "format": "color"}}, "Unknown format"),
    ({"json": {"oneOf": [{"type": "integer"}, {"minimum": 3}]}}, "oneOf"),
    ({"json": {"type": "string", "pattern": "a(?=b)"}}, "look-around"),
    ({"choice": ["yes", "a<|im_start|>"]}, "'<|im_start|>' is a special token"),
    ({"regex": r"a<\|im_end\|>b"}, "'<|im_end|>' is a special token"),
    ({"json": {"const": "a<|im_end|>b"}}, "'<|im_end|>' is a special token"),
    ({"regex": "["}, "unclosed character class"),
    ({"regex": r"(a)\1"}, "backreferences"),
    ({"grammar": "start: who"}, 'unknown name: "who"'),
    ({"grammar": "root := 3"}, "GBNF"),
    ({"grammar": "start: /a"}, "lexer error"),
    ({"json_object": True, "whitespace_pattern": "["}, "unclosed character class"),
]  # fmt: skip


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(demo_tokenizer(), EOS, 800)


@pytest.mark.parametrize(("what", "reason"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_compiled_says_why(grammars: Grammars, what: dict[str, Any], reason: str):
    params = StructuredOutputsParams(**what)
    good = StructuredOutputsParams(regex="a")
    compiled = grammars.compile_all([good, params])
    assert isinstance(compiled[good], Grammar)
    assert reason in str(compiled[params]) and "structured_outputs" in str(compiled[params])


def test_equal_structures_are_compiled_once(grammars: Grammars):
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    other_order = {"type": "object", "properties": {"a": {}, "b": {}}}
    before = grammars.compile.cache_info().misses
    for _ in range(3):
        for form in (schema, json.dumps(schema)):
            grammars.compile_all([StructuredOutputsParams(json=form)] * 3)
    assert grammars.compile.cache_info().misses == before + 1
    grammars.compile_all([StructuredOutputsParams(json=other_order)])
    assert grammars.compile.cache_info().misses == before + 2


def test_completions_of_one_grammar_are_apart():
    """More than there are lexers: some share one."""
    make = factory(choice=["abc", "b"])
    walked = [make() for _ in range(2 * NUM_LEXERS + 1)]
    first = allowed(walked[0])
    for one in walked[::3]:
        one.accept(demo_bytes().index(b"a"))
    assert all(allowed(one) == first for one in walked[1::3] + walked[2::3])
    assert all(allowed(one) != first for one in walked[::3])


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "llguidance.hf", None)
    with pytest.raises(ImportError, match=r"pip install nanovllm\[structured\]"):
        Grammars(demo_tokenizer(), EOS, 800)


def test_an_end_must_be_a_special_token():
    for eos in ((), (860,), (demo_bytes().index(b"a"),)):
        with pytest.raises(ValueError, match="special token of the tokenizer"):
            Grammars(demo_tokenizer(), eos, 870)


def test_a_tokenizer_of_words_is_refused(words: Any):
    with pytest.raises(ValueError, match="cannot use this tokenizer"):
        Grammars(words, {words.eos_token_id}, 128)
