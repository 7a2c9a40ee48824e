"""Texts and token ids as a model may give them, for tests of the detokenizer."""

from collections.abc import Iterator

from hypothesis import settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from helpers.checkpoints import VOCAB_SIZE

BROKEN = "\ufffd"  # what decoding makes of bytes that are no character
EXAMPLES = settings(max_examples=120, deadline=None, derandomize=True)

# The demo's tokens are bytes, and merges of them, in the manner of Qwen's.
END_OF_TEXT, IM_START, IM_END = 0, 1, 2
WORDS_EOS = 127  # of the tokenizer of whole words

PIECES = [
    "中", "文", "，", "。", "你好，世界", "日本語", "한국어", "𠮷", "é", "e\u0301", "a\u0308\u0323",
    "👍", "👍🏽", "👩\u200d👩\u200d👧\u200d👦", "🏴\u200d☠\ufe0f", "🇩🇪", "🇨🇳🇯🇵", "❤\ufe0f",
    "\u200d", "\ufe0f", "नि", "ก็", "ע\u05b4", "𝒳", "ß", "\u00a0", "\x00", "\x07", "\x1b[0m", "\x7f",
    "\r\n", "\n\n", "\t", " ", "  ", "\u2028", "\ufeff", "\u202e", BROKEN, "<|im_end|>",
    "<|endoftext|>", "<|im_start|>assistant\n", "<|im_", "|>", "Hello", " a", " don't ", "12", "?!",
    " .", " , ",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=8).map("".join)

# Token ids as a model may sample them. The demo's first tokens after the special ones are the 256
# bytes; the last ids here are beyond either vocabulary, as in a model whose vocabulary is padded.
demo_ids = st.lists(
    st.one_of(
        st.integers(0, 2), st.integers(3, 258), st.integers(3, 258), st.integers(259, 799),
        st.sampled_from([800, 900]),
    ),
    max_size=24,
)  # fmt: skip
word_ids = st.lists(
    st.one_of(
        st.integers(0, VOCAB_SIZE - 1), st.just(WORDS_EOS), st.sampled_from([VOCAB_SIZE, 999])
    ),
    max_size=24,
)


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip: bool = True) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip)


def growth(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip: bool) -> Iterator[str]:
    """The text after each token: all of it, but for a last character that is not whole."""
    for end in range(1, len(ids) + 1):
        yield text_of(tokenizer, ids[:end], skip).rstrip(BROKEN)
