"""Text as it grows: whole characters, and nothing lost."""

from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from helpers.checkpoints import VOCAB_SIZE
from helpers.growing_text import (
    BROKEN,
    END_OF_TEXT,
    EXAMPLES,
    FIRST_WORD,
    IM_END,
    IM_START,
    SPACE,
    WORDS_EOS,
    A,
    B,
    byte_ids,
    demo_ids,
    growth,
    piece_ids,
    text_of,
    texts,
    word_ids,
)
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.tokenizer import Decoder


def check_growth(tokenizer: PreTrainedTokenizerBase, ids: list[int], skip: bool) -> None:
    """Take `ids` in, one by one, and check the text after each."""
    detokenizer, whole = Detokenizer(Decoder(tokenizer), skip), text_of(tokenizer, ids, skip)
    for token_id, expected in zip(ids, growth(tokenizer, ids, skip), strict=True):
        before = detokenizer.text
        detokenizer.append(token_id)
        assert detokenizer.text == expected
        assert detokenizer.text.startswith(before) and whole.startswith(detokenizer.text)
        assert not detokenizer.text.endswith(BROKEN)
        assert detokenizer.num_safe == len(detokenizer.text)
        assert detokenizer.stopped_by is None
    for _ in range(2):
        detokenizer.finish()
        assert detokenizer.text == whole
        assert detokenizer.num_safe == len(whole)


def test_the_demos_bytes_are_where_these_tests_take_them_to_be(demo: PreTrainedTokenizerBase):
    assert len(demo) == 800
    assert demo.all_special_ids and set(demo.all_special_ids) == {END_OF_TEXT, IM_START, IM_END}
    single = [token for token in demo.convert_ids_to_tokens(list(range(3, 259)))]
    assert len(set(single)) == 256 and all(len(token) == 1 for token in single)


@EXAMPLES
@given(text=texts, skip=st.booleans())
def test_any_text_grows_by_whole_characters(demo: PreTrainedTokenizerBase, text: str, skip: bool):
    ids = demo.encode(text, add_special_tokens=False)
    assert text_of(demo, ids, skip=False) == text
    check_growth(demo, ids, skip)


@EXAMPLES
@given(text=texts, skip=st.booleans())
def test_any_text_grows_by_whole_characters_from_single_bytes(
    demo: PreTrainedTokenizerBase, text: str, skip: bool
):
    """As if no merge were known: a character of n bytes takes n tokens."""
    byte_of = {demo.convert_ids_to_tokens(i): i for i in range(3, 259)}
    ids = demo.encode(text, add_special_tokens=False)
    tokens = demo.convert_ids_to_tokens(ids)
    parted = [
        part
        for token_id, token in zip(ids, tokens)
        for part in ([token_id] if token_id < 3 else [byte_of[char] for char in token])
    ]
    assert text_of(demo, parted, skip) == text_of(demo, ids, skip)
    check_growth(demo, parted, skip)


@EXAMPLES
@given(ids=demo_ids, skip=st.booleans())
def test_any_tokens_of_bytes_grow_to_what_decoding_all_gives(
    demo: PreTrainedTokenizerBase, ids: list[int], skip: bool
):
    check_growth(demo, ids, skip)


@EXAMPLES
@given(ids=word_ids)
def test_any_words_grow_to_what_decoding_all_gives(words: PreTrainedTokenizerBase, ids: list[int]):
    check_growth(words, [i for i in ids if i < VOCAB_SIZE], skip=False)


@EXAMPLES
@given(ids=word_ids, skip=st.booleans())
@example(ids=[1, WORDS_EOS, 2], skip=True)
@example(ids=[1, VOCAB_SIZE, 2], skip=False)
def test_tokens_without_text_leave_the_space_between_words(
    words: PreTrainedTokenizerBase, ids: list[int], skip: bool
):
    check_growth(words, ids, skip)


def test_a_special_token_inside_of_a_character_does_not_part_it(demo: PreTrainedTokenizerBase):
    byte_of = {demo.convert_ids_to_tokens(i): i for i in range(3, 259)}
    (token,) = demo.backend_tokenizer.pre_tokenizer.pre_tokenize_str("中")
    first, second, third = (byte_of[char] for char in token[0])
    check_growth(demo, [first, IM_START, second, third], skip=True)
    check_growth(demo, [first, IM_START, second, third], skip=False)
    detokenizer = Detokenizer(Decoder(demo))
    texts = []
    for token_id in (first, IM_START, second, third):
        detokenizer.append(token_id)
        texts.append(detokenizer.text)
    assert texts == ["", "", "", "中"]


@EXAMPLES
@given(ids=piece_ids, skip=st.booleans())
@example(ids=[SPACE, SPACE, B], skip=True)
@example(ids=[*byte_ids("é"), *byte_ids("🙂")[:2]], skip=True)
@example(ids=[*byte_ids("é"), 1, *byte_ids("🙂")[:2]], skip=True)
@example(ids=[*byte_ids("é"), 999, *byte_ids("🙂")[:2]], skip=False)
def test_any_pieces_grow_to_what_decoding_all_gives(
    pieces: PreTrainedTokenizerBase, ids: list[int], skip: bool
):
    detokenizer, whole = Detokenizer(Decoder(pieces), skip), text_of(pieces, ids, skip)
    unused = Detokenizer(Decoder(pieces), skip, stop=("xyz", "xyz</s>"))
    for number, token_id in enumerate(ids, 1):
        before = detokenizer.text
        detokenizer.append(token_id)
        unused.append(token_id)
        assert detokenizer.text.startswith(before) and whole.startswith(detokenizer.text)
        if FIRST_WORD <= token_id < 999:  # it ends a run of bytes
            assert detokenizer.text == text_of(pieces, ids[:number], skip).rstrip(BROKEN)
    detokenizer.finish()
    unused.finish()
    assert detokenizer.text == unused.text == whole


def test_bytes_are_held_back_until_they_can_be_broken_no_more(llama: PreTrainedTokenizerBase):
    ids = [A, *byte_ids("é"), *byte_ids("🙂"), B, *byte_ids("é"), *byte_ids("🙂")[:2]]
    detokenizer, texts = Detokenizer(Decoder(llama)), []
    for token_id in ids:
        detokenizer.append(token_id)
        texts.append(detokenizer.text)
    assert texts == ["a"] * 7 + ["aé🙂b"] * 5
    detokenizer.finish()
    assert detokenizer.text == "aé🙂b" + BROKEN * 4 == text_of(llama, ids)


def test_special_tokens_show_only_if_asked_for(demo: PreTrainedTokenizerBase):
    ids = demo.encode("Hi<|im_end|>中<|im_start|>", add_special_tokens=False)
    for skip, expected in ((True, "Hi中"), (False, "Hi<|im_end|>中<|im_start|>")):
        detokenizer = Detokenizer(Decoder(demo), skip)
        for token_id in ids:
            detokenizer.append(token_id)
        assert detokenizer.text == expected


def test_nothing_at_all_is_an_empty_text(demo: PreTrainedTokenizerBase):
    detokenizer = Detokenizer(Decoder(demo), stop=("a",))
    assert (detokenizer.text, detokenizer.num_safe) == ("", 0)
    detokenizer.finish()
    assert (detokenizer.text, detokenizer.num_safe, detokenizer.stopped_by) == ("", 0, None)


def test_work_per_token_does_not_grow_with_the_text(demo: PreTrainedTokenizerBase):
    class Counting(Decoder):
        most = 0

        def decode(self, token_ids: list[int], skip_special_tokens: bool) -> str:
            self.most = max(self.most, len(token_ids))
            return super().decode(token_ids, skip_special_tokens)

    counting = Counting(demo)
    detokenizer = Detokenizer(counting)
    ids = demo.encode("数到一百：👍🏽 and so on. " * 40, add_special_tokens=False)
    for token_id in ids:
        detokenizer.append(token_id)
    assert detokenizer.text == text_of(demo, ids)
    assert len(ids) > 400 and counting.most <= 16
