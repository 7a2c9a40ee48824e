"""Texts and token ids as a model may give them, for tests of the detokenizer."""

from collections.abc import Iterator

from hypothesis import settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

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

# Tokens in the manner of SentencePiece: special ones, then the 256 bytes, then pieces of words.
SPECIAL = ["<unk>", "<s>", "</s>"]
FIRST_BYTE = len(SPECIAL)
FIRST_WORD = FIRST_BYTE + 256
WORDS = [
    "▁",
    "▁▁",
    "▁a",
    "b",
    "é",
    "中",
    "▁don",
    "'",
    "t",
    "n",
    ".",
    "▁.",
    "▁n't",
    "42",
    "\n",
    BROKEN,
]
SPACE, SPACES, A, B = range(FIRST_WORD, FIRST_WORD + 4)
FORTY_TWO = FIRST_WORD + WORDS.index("42")


def byte_ids(text: str) -> list[int]:
    """Each byte as a token of its own."""
    return [FIRST_BYTE + byte for byte in text.encode()]


# Bytes of characters, whole and in parts, and others.
piece_ids = st.lists(
    st.one_of(
        st.sampled_from(range(FIRST_WORD, FIRST_WORD + len(WORDS))),
        st.sampled_from(byte_ids("é中🙂")), st.sampled_from(["é", "中", "🙂"]),
        st.integers(0, FIRST_WORD), st.sampled_from([*range(len(SPECIAL)), 999]),
    ),
    max_size=24,
).map(lambda drawn: [
    token for one in drawn
    for token in ([one] if isinstance(one, int) else byte_ids(one))
])  # fmt: skip

SPACE_MARK = decoders.Replace("▁", " ")
DECODERS = {
    "Llama 2": [SPACE_MARK, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)],
    "Gemma": [SPACE_MARK, decoders.ByteFallback(), decoders.Fuse()],
    "Metaspace": [decoders.ByteFallback(), decoders.Metaspace()],
    "WordPiece": [decoders.WordPiece("▁", cleanup=True)],
}


def make_pieces(decoder: str) -> PreTrainedTokenizerBase:
    """A tokenizer of `WORDS` and bytes. It asks for a clean-up of spaces, as old ones do."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.decoder = decoders.Sequence(DECODERS[decoder])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", clean_up_tokenization_spaces=True
    )


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip: bool = True) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def growth(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip: bool) -> Iterator[str]:
    """The text after each token: all of it, but for a last character that is not whole."""
    for end in range(1, len(ids) + 1):
        yield text_of(tokenizer, ids[:end], skip).rstrip(BROKEN)
