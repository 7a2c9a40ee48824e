"""Constraints driven by hand, and the demo's tokens as bytes."""

import warnings
from collections.abc import Collection
from functools import cache
from typing import Any

import numpy as np
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from helpers.paths import DEMO
from nanovllm import SamplingParams, StructuredOutputsParams
from nanovllm.engine.constraints import ConstraintMaker, MakeConstraint, TokenConstraint

EOS = (0, 2)  # the demo's, as its generation_config says
OTHER_SPECIAL = 1


@cache
def demo_tokenizer() -> PreTrainedTokenizerBase:
    """800 tokens: three special ones, bytes, and merges of bytes."""
    return AutoTokenizer.from_pretrained(DEMO)


@cache
def demo_bytes() -> list[bytes]:
    """What each token stands for; nothing for a special one."""
    # Byte-level tokenizers write the bytes that print as themselves, the others from U+0100 on.
    prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in prints]
    byte_of = {chr(byte): byte for byte in prints}
    byte_of |= {chr(0x100 + i): byte for i, byte in enumerate(hidden)}
    assert byte_of.keys() == set(ByteLevel.alphabet())
    tokens = demo_tokenizer().convert_ids_to_tokens(list(range(800)))
    special = demo_tokenizer().all_special_ids
    return [
        b"" if i in special else bytes(byte_of[c] for c in token) for i, token in enumerate(tokens)
    ]


@cache
def maker(vocab_size: int = 800, eos: tuple[int, ...] = EOS) -> ConstraintMaker:
    return ConstraintMaker(demo_tokenizer(), eos, vocab_size)


def constraint(
    bad_words: Collection[str] = (), vocab_size: int = 800, eos: tuple[int, ...] = EOS, **what: Any
) -> TokenConstraint:
    """Of one completion; `what` is of StructuredOutputsParams."""
    made = factory(bad_words, vocab_size, eos, **what)()
    assert made is not None
    return made


def factory(
    bad_words: Collection[str] = (), vocab_size: int = 800, eos: tuple[int, ...] = EOS, **what: Any
) -> MakeConstraint:
    structure = StructuredOutputsParams(**what) if what else None
    params = SamplingParams(bad_words=list(bad_words), structured_outputs=structure)
    (make,) = maker(vocab_size, eos).prepare([params])
    return make


def num_words(vocab_size: int = 800) -> int:
    return -(-vocab_size // 32)


def bits(mask: np.ndarray) -> set[int]:
    """The tokens that a mask, [words] int32, allows."""
    each = (mask[:, None].astype(np.int64) >> np.arange(32)) & 1
    return set(np.flatnonzero(each.reshape(-1)).tolist())


def allowed(constraint: TokenConstraint, vocab_size: int = 800) -> set[int]:
    mask = np.full(num_words(vocab_size), -1, dtype=np.int32)
    constraint.restrict(mask)
    return bits(mask)


def accept_text(constraint: TokenConstraint, text: str) -> None:
    """Text as its bytes, a token each: also where a mask has only the usual token of several.

    Raises:
        UserWarning: if it is not allowed.
    """
    for byte in text.encode():
        assert not constraint.is_complete, (text, byte)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            constraint.accept(demo_bytes().index(bytes([byte])))
            _ = constraint.is_complete  # only now a grammar takes the token in
