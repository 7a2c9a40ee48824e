"""The tokenizer's files, read as transformers reads them, without its detours."""

import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from helpers.checkpoints import Reference, add_tokenizer, edit_json, make_checkpoint
from helpers.engines import GREEDY, PROMPTS, build
from nanovllm.engine.tokenizer import encode_many, load_tokenizer


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("demo", "Qwen2Tokenizer"), ("demo", "Qwen2TokenizerFast"),
        ("demo", "PreTrainedTokenizerFast"), ("demo", "TokenizersBackend"), ("demo", None),
        ("words", "PreTrainedTokenizerFast"), ("words", None),
    ],
)  # fmt: skip
def test_the_tokenizer_is_the_one_that_autotokenizer_makes(
    demo_copy: Path, tiny_copy: Path, source: str, name: str | None
):
    if name == "TokenizersBackend" and not hasattr(transformers, name):
        pytest.skip("transformers 4 has no such class")
    path = demo_copy if source == "demo" else add_tokenizer(tiny_copy, eos_token="t7")
    edit_json(path / "tokenizer_config.json", remove=("tokenizer_class",))
    if name is not None:
        edit_json(path / "tokenizer_config.json", tokenizer_class=name)
    ours, theirs = load_tokenizer(path), AutoTokenizer.from_pretrained(path)
    assert type(ours) is type(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.special_tokens_map == theirs.special_tokens_map
    for text in ("t1 t2  t3", "It's  1234,\n\n<|im_start|>user é 漢字 🙂<|im_end|>"):
        assert ours(text).input_ids == theirs(text).input_ids
        ids = theirs(text).input_ids
        assert ours.decode(ids) == theirs.decode(ids)


TEXTS = ["Hello", "", "<|im_start|>user\né 漢字 🙂<|im_end|>", "  a" * 50, "1234,\n\n"]


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("split_special_tokens", [True, False])
def test_many_texts_have_the_tokens_of_each(
    demo_copy: Path, add_special_tokens: bool, split_special_tokens: bool
):
    """Whatever tokenizer.json has of truncation and padding, and in groups of any size."""
    tokenizer = load_tokenizer(demo_copy)
    backend, kwargs = tokenizer.backend_tokenizer, {"add_special_tokens": add_special_tokens}
    backend.post_processor = TemplateProcessing(
        "<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    tokenizer.split_special_tokens = split_special_tokens
    expected = [tokenizer.encode(text, **kwargs) for text in TEXTS]
    assert (expected[0][0] == 1) == add_special_tokens and len(expected[3]) > 20
    for at_once in (1000, 2):
        backend.enable_truncation(8)
        backend.enable_padding(length=20)
        backend.encode_special_tokens = not split_special_tokens
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nanovllm.engine.tokenizer._TEXTS_AT_ONCE", at_once)
            assert encode_many(tokenizer, TEXTS, **kwargs) == expected


def test_texts_that_are_no_unicode_are_left_to_encode(
    demo_copy: Path, monkeypatch: pytest.MonkeyPatch
):
    tokenizer = load_tokenizer(demo_copy)
    monkeypatch.setattr("nanovllm.engine.tokenizer._TEXTS_AT_ONCE", 2)
    encoded = encode_many(tokenizer, ["a", "b", "c", "\ud800", "d"])
    assert encoded == [
        tokenizer.encode("a"),
        tokenizer.encode("b"),
        None,
        None,
        tokenizer.encode("d"),
    ]


def test_prompts_and_chats_are_encoded_together(demo_copy: Path, monkeypatch: pytest.MonkeyPatch):
    chats = [[{"role": "user", "content": text}] for text in ("47+38=", "Hi")]
    prompts = ["Hello", [1, 2], {"prompt": "Hi"}]
    with build(demo_copy) as llm:
        expected = [*llm.generate(prompts, GREEDY, False), *llm.chat(chats, GREEDY, False)]

        def fail(*_: object, **__: object) -> None:
            raise AssertionError("one by one")

        monkeypatch.setattr(type(llm.tokenizer), "encode", fail)
        found = [*llm.generate(prompts, GREEDY, False), *llm.chat(chats, GREEDY, False)]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("prompt", "prompt_token_ids", "text"):
            assert ours[name] == theirs[name]


@pytest.mark.parametrize("content", ["[]", "null", '{"tokenizer_class": []}', "{"])
def test_a_tokenizer_config_of_no_use_is_refused(demo_copy: Path, content: str):
    (demo_copy / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(demo_copy)


@pytest.mark.parametrize("content", ["", "{", "{}", "\x00\xff"])
def test_corrupt_tokenizer_is_refused(tiny_copy: Path, content: str):
    (tiny_copy / "tokenizer.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read"):
        build(tiny_copy)


def test_missing_tokenizer_leaves_token_ids(tmp_path: Path):
    path = make_checkpoint(tmp_path / "model")
    with build(path) as llm:
        for _ in range(2):
            with pytest.raises(ValueError, match=r"prompt 0 is a string, and .* has no tokenizer"):
                llm.generate("t1 t2", GREEDY, use_tqdm=False)
            (output,) = llm.generate(PROMPTS[0], GREEDY, use_tqdm=False)
            assert output["token_ids"] == Reference(path).tokens(PROMPTS[0], 12)
            assert output["text"] == ""


def test_importing_nanovllm_leaves_transformers_alone():
    """Its import takes a second or more, which a start hides behind the GPU's."""
    code = "import sys, nanovllm; print('transformers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False"]
