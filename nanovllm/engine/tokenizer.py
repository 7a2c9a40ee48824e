"""A checkpoint's tokenizer: transformers' own. Imported when one is wanted, since it takes long."""

import json
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


def decode(tokenizer: Tokenizer, token_ids: list[int], skip_special_tokens: bool) -> str:
    """The text of some tokens."""
    text = tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
    assert isinstance(text, str)  # transformers gives a list where a list of lists is decoded
    return text


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
