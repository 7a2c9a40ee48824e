"""Which tokens complete a bad word."""

import random

import numpy as np
import pytest

from helpers.constraints import accept_text, allowed, constraint, demo_tokenizer
from nanovllm.engine.bad_words import BadWords, WordTable, spellings

VOCAB_SIZE = 70  # not a multiple of 32


class Characters:
    """A tokenizer whose tokens are characters, or with `glued` a space and the one after it."""

    def __init__(self, glued: bool = False) -> None:
        self.glued = glued

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        spaced = self.glued and text.startswith(" ")
        tokens = [ord(c) for c in text[spaced:]]
        return [tokens[0] + 1000 * spaced, *tokens[1:]]


def test_a_word_is_spelled_with_and_without_a_space():
    a, b = ord("a"), ord("b")
    assert spellings(["ab", " ab", "b"], Characters(glued=True)) == (
        (a, b), (a + 1000, b), (b,), (b + 1000,),
    )  # fmt: skip
    # A space that is a token of its own changes nothing about the word's tokens.
    assert spellings(["ab"], Characters()) == ((a, b),)


@pytest.mark.parametrize("word", ["the", " the", "Hello world", "日本", "x1"])
def test_spellings_of_a_real_tokenizer_are_text(word: str):
    tokenizer = demo_tokenizer()
    found = spellings([word], tokenizer)
    bare = word.lstrip()
    assert [tokenizer.decode(tokens) for tokens in found] == [bare, f" {bare}"][: len(found)]
    assert (len(found) == 2) == (
        len(tokenizer.encode(f" {bare}")) == len(tokenizer.encode(bare))
        and tokenizer.encode(f" {bare}")[0] != tokenizer.encode(bare)[0]
    )


@pytest.mark.parametrize("seed", range(20))
def test_masks_are_those_of_brute_force(seed: int):
    rng = random.Random(seed)
    few = rng.sample(range(VOCAB_SIZE), 4)
    words = {tuple(rng.choices(few, k=rng.randint(1, 4))) for _ in range(rng.randint(1, 6))}
    bad, so_far, num_banned = BadWords(WordTable(tuple(words))), [], 0
    for _ in range(60):
        banned = {
            token_id
            for token_id in range(VOCAB_SIZE)
            if any((*so_far, token_id)[-len(word) :] == word for word in words)
        }
        assert allowed(bad, VOCAB_SIZE) & set(range(VOCAB_SIZE)) == (
            set(range(VOCAB_SIZE)) - banned
        )
        assert bad.allows_all is not bool(banned)
        num_banned += len(banned)
        so_far.append(rng.choice(few))
        bad.accept(so_far[-1])
    assert num_banned and not bad.is_complete


def test_other_bits_stay_as_they_are():
    bad = BadWords(WordTable(((31,), (40,))))
    mask = np.array([-(2**31) + 5, 2**8 + 1, 0], dtype=np.int32)
    bad.restrict(mask)
    assert mask.tolist() == [5, 1, 0]


def test_the_only_token_that_is_left_may_come():
    bad = BadWords(WordTable(((31,), (40,), (31,))))
    mask = np.array([-(2**31), 2**8], dtype=np.int32)
    bad.restrict(mask)
    assert mask.tolist() == [-(2**31), 2**8]


def test_a_structure_goes_before_bad_words():
    only = constraint(["yes", "ye", "y"], choice=["yes"])
    assert allowed(only) == allowed(constraint(choice=["yes"]))
    some = constraint(["yes", "ye", "y"], choice=["yes", "no"])
    assert allowed(some) == allowed(constraint(choice=["no"])) | allowed(
        constraint(choice=["no", "yes"])
    ) - {demo_tokenizer().encode(word)[0] for word in ("yes", "ye", "y")}
    accept_text(some, "no")
    assert some.is_complete


def test_a_word_without_tokens_is_refused():
    class Nothing:
        def encode(self, text: str, add_special_tokens: bool) -> list[int]:
            return []

    with pytest.raises(ValueError, match="bad_words: 'ab' has no tokens"):
        spellings(["ab"], Nothing())
    with pytest.raises(ValueError, match="not valid Unicode"):
        spellings(["a\ud800"], demo_tokenizer())
