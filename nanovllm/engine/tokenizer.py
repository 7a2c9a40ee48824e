"""A checkpoint's tokenizer: transformers' own. Imported when one is wanted, since it takes long."""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
# What AutoTokenizer makes of a tokenizer_config.json. AutoTokenizer itself imports the classes of
# text generation in some versions of transformers: 4 s in 5.17, 0.3 s for the class alone.
_CLASSES = {
    "Qwen2Tokenizer": "Qwen2TokenizerFast",
    "Qwen2TokenizerFast": "Qwen2TokenizerFast",
    "PreTrainedTokenizerFast": "PreTrainedTokenizerFast",
    "TokenizersBackend": "PreTrainedTokenizerFast",
}


_TEXTS_AT_ONCE = 1000  # an encoding takes more memory than its ids, and Ctrl-C waits meanwhile
# A token that is one byte, of a tokenizer that has such for characters it does not know.
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class Decoder:
    """Makes text of tokens.

    Args:
        tokenizer: transformers' tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
        """The text of some tokens, as the tokenizer's own decoder makes it. The clean-up that old
        tokenizers ask for is left out: made for words with spaces around them, it takes spaces away
        that the model has written, as in "a ? b : c"."""
        text = self._tokenizer.decode(
            token_ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)  # transformers gives a list where a list of lists is decoded
        return text

    def is_byte(self, token_id: int) -> bool:
        """Whether a token is one byte by byte fallback. A run of them is decoded as a whole: each
        is a broken character unless all of them together are valid UTF-8."""
        return bool(_BYTE.fullmatch(self._token(token_id) or ""))

    def is_special(self, token_id: int) -> bool:
        """Whether a token is left out of the text where special tokens are."""
        return token_id in self._special_token_ids

    def is_known(self, token_id: int) -> bool:
        """Whether the tokenizer has the token. A model's vocabulary may be larger."""
        return self._token(token_id) is not None

    def has_special_token(self, text: str) -> bool:
        """Whether the text of a special token is in a text."""
        return any(token in text for token in self._special_tokens)

    @cached_property
    def _special_tokens(self) -> list[str]:
        tokens = [self._token(token_id) for token_id in self._special_token_ids]
        return [token for token in tokens if token]

    @cached_property
    def _special_token_ids(self) -> frozenset[int]:
        ids = frozenset(self._tokenizer.all_special_ids)
        try:
            added = self._tokenizer.added_tokens_decoder
        except NotImplementedError:  # of Mistral's own
            return ids
        return ids.union(token_id for token_id, token in added.items() if token.special)

    def _token(self, token_id: int) -> str | None:
        token: str | None = self._tokenizer.convert_ids_to_tokens(token_id)  # type: ignore[assignment]
        return token


def encode_many(
    tokenizer: Tokenizer | None, texts: list[str], add_special_tokens: bool = True
) -> list[list[int] | None]:
    """The tokens of each text, as `tokenizer.encode` gives them, made by several threads.

    Returns:
        None for texts that have to be encoded one by one: there is but one, the tokenizer has no
        threads, or a text near by is no Unicode, and `encode` says which.
    """
    encoded: list[list[int] | None] = [None] * len(texts)
    if len(texts) < 2 or not getattr(tokenizer, "is_fast", False):
        return encoded
    assert tokenizer is not None
    backend = tokenizer.backend_tokenizer
    # As `encode` does. Setting what is set would disturb another thread that is encoding.
    if backend.truncation is not None:
        backend.no_truncation()
    if backend.padding is not None:
        backend.no_padding()
    if backend.encode_special_tokens != tokenizer.split_special_tokens:
        backend.encode_special_tokens = tokenizer.split_special_tokens
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        span = slice(start, start + _TEXTS_AT_ONCE)
        try:
            found = backend.encode_batch_fast(texts[span], add_special_tokens=add_special_tokens)
        except (TypeError, UnicodeError):
            continue
        encoded[span] = [one.ids for one in found]
    return encoded


def load_tokenizer(model_dir: Path) -> Tokenizer | None:
    """The checkpoint's tokenizer, None if it has none.

    Raises:
        ValueError: if it has one that cannot be read.
    """
    if not any((model_dir / name).is_file() for name in _FILES):
        return None
    import transformers

    try:
        path = model_dir / "tokenizer_config.json"
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if not isinstance(content, dict):
            raise ValueError(f"{path.name} is not an object")
        name = _CLASSES.get(str(content.get("tokenizer_class")), "AutoTokenizer")
        tokenizer_class = getattr(transformers, name)
        tokenizer = tokenizer_class.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:
        raise ValueError(f"the tokenizer in {model_dir} cannot be read: {error}") from error
    # It would warn once of a text longer than the model takes. The engine refuses such a prompt.
    warned = getattr(tokenizer, "deprecation_warnings", {})  # some of Mistral's have none
    warned["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer
