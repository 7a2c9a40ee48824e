import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from helpers.checkpoints import add_tokenizer
from helpers.growing_text import DECODERS, WORDS_EOS, make_pieces
from helpers.paths import DEMO


@pytest.fixture(scope="module")
def demo() -> PreTrainedTokenizerBase:
    """Tokens are bytes, and merges of them."""
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Tokens are whole words: "t1 t2"."""
    path = add_tokenizer(tmp_path_factory.mktemp("words"), eos_token=f"t{WORDS_EOS}")
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="module", params=DECODERS)
def pieces(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """Tokens are pieces of words, and bytes, with the decoders that such tokenizers have."""
    return make_pieces(request.param)


@pytest.fixture(scope="module")
def llama() -> PreTrainedTokenizerBase:
    return make_pieces("Llama 2")
