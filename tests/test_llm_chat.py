"""Chats: the template decides what the model reads."""

import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers.chats import ANSWER, CONVERSATIONS, SHOWING, SUM, build_demo, same, shown, templated
from helpers.checkpoints import VOCAB_SIZE, Reference, edit_json
from helpers.engines import GREEDY, PROMPTS, assert_empty, build
from helpers.paths import DEMO
from nanovllm import LLM, SamplingParams


@pytest.fixture(scope="module")
def engine():
    with build_demo(DEMO) as llm:
        yield llm


@pytest.fixture
def llm(engine: LLM):
    """The demo, which after the test has nothing queued and adds up."""
    yield engine
    assert_empty(engine)
    (output,) = engine.chat(SUM, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    assert "47 + 38".startswith(output["text"].strip())


# Chats are generate with the template's text


@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["sum", "Chinese", "system", "turns"])
def test_one_conversation_is_generate_on_the_templates_text(llm: LLM, messages: list[Any]):
    found = llm.chat(messages, ANSWER, use_tqdm=False)
    expected = llm.generate(templated(llm, messages), ANSWER, use_tqdm=False)
    assert same(found) == same(expected)
    assert [output["prompt"] for output in found] == [templated(llm, messages)]
    assert found[0]["finish_reason"] == "stop"


def test_conversations_are_answered_in_their_order(llm: LLM):
    expected = llm.generate([templated(llm, one) for one in CONVERSATIONS], ANSWER, use_tqdm=False)
    assert same(llm.chat(CONVERSATIONS, ANSWER, use_tqdm=False)) == same(expected)
    texts = [output["text"] for output in expected]
    assert texts[0] == "47 + 38 = 85" and texts[3] == "20 + 22 = 42"
    assert same(llm.chat(CONVERSATIONS[::-1], ANSWER, use_tqdm=False)) == same(expected[::-1])


@pytest.mark.parametrize(
    "messages",
    [SUM, tuple(SUM), [SUM], (tuple(SUM),), [tuple(SUM)]],
    ids=["list", "tuple", "list in list", "tuple in tuple", "tuple in list"],
)
def test_one_conversation_in_any_form_gives_a_list_of_one(llm: LLM, messages: Any):
    (output,) = llm.chat(messages, ANSWER, use_tqdm=False)
    assert output["text"] == "47 + 38 = 85"


def test_each_conversation_may_have_its_own_params(llm: LLM):
    params = [
        SamplingParams(temperature=0, max_tokens=2),
        SamplingParams(seed=3, temperature=2, max_tokens=9),
        SamplingParams(temperature=0, max_tokens=30, stop="demo"),
        SamplingParams(temperature=0, max_tokens=30, logprobs=1, n=2),
    ]
    found = llm.chat(CONVERSATIONS, params, use_tqdm=False)
    prompts = [templated(llm, one) for one in CONVERSATIONS]
    assert same(found) == same(llm.generate(prompts, params, use_tqdm=False))
    assert found[2]["stop_reason"] == "demo"
    with pytest.raises(ValueError, match="4 prompts need as many"):
        llm.chat(CONVERSATIONS, params[:3], use_tqdm=False)


def test_without_params_a_chat_has_the_defaults(llm: LLM):
    (output,) = llm.chat(SUM, use_tqdm=False)
    assert 1 <= len(output["token_ids"]) <= SamplingParams().max_tokens


def test_a_chat_shows_progress_unless_told_not_to(llm: LLM, capsys: pytest.CaptureFixture[str]):
    llm.chat(CONVERSATIONS, ANSWER)
    assert "4/4" in capsys.readouterr().err
    llm.chat(CONVERSATIONS, ANSWER, use_tqdm=False)
    assert capsys.readouterr() == ("", "")


def test_messages_are_not_changed(llm: LLM):
    messages = [{"role": "user", "content": "47+38="}]
    llm.chat([messages, messages], ANSWER, use_tqdm=False)
    llm.chat_prompt(messages, continue_final_message=True)
    assert messages == SUM


def test_a_stream_of_a_chat_prompt_is_the_chat(llm: LLM):
    prompts = [llm.chat_prompt(one) for one in CONVERSATIONS]
    texts = [""] * len(prompts)
    for piece in llm.stream(prompts, ANSWER):
        texts[piece["index"]] += piece["text"]
    outputs = llm.chat(CONVERSATIONS, ANSWER, use_tqdm=False)
    assert texts == [output["text"] for output in outputs]


def test_a_chat_beside_an_open_stream_gets_its_own_answer(llm: LLM):
    (expected,) = llm.chat(SUM, ANSWER, use_tqdm=False)
    stream = llm.stream(PROMPTS[0], ANSWER)
    next(stream)
    (output,) = llm.chat(SUM, ANSWER, use_tqdm=False)
    assert output["token_ids"] == expected["token_ids"]
    stream.close()


# What the template is told


def test_a_turn_of_a_short_chat_finds_most_of_those_before_in_the_cache():
    """With the default size of blocks."""
    messages: list[dict[str, str]] = []
    with LLM(DEMO, device="cpu", num_kvcache_blocks=40) as llm:
        assert llm.config.kvcache_block_size == 64
        for turn in range(5):
            messages.append({"role": "user", "content": f"{turn}+38= " * 5})
            (output,) = llm.chat(messages, ANSWER, use_tqdm=False)
            messages.append({"role": "assistant", "content": "8 " * 20})
        assert output["num_prompt_tokens"] < 512
        assert output["num_cached_tokens"] > output["num_prompt_tokens"] / 2


def test_the_prompt_is_the_templates_text(llm: LLM):
    for messages in CONVERSATIONS:
        assert shown(llm, messages) == templated(llm, messages)
    assert shown(llm, SUM) == "<|im_start|>user\n47+38=<|im_end|>\n<|im_start|>assistant\n"
    start, end = llm.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [i for i in llm.chat_prompt(SUM) if i in (start, end)] == [start, end, start]


def test_the_prompt_may_end_before_the_answer(llm: LLM):
    assert shown(llm, SUM, add_generation_prompt=False) == templated(
        llm, SUM, add_generation_prompt=False
    )
    assert shown(llm, SUM, add_generation_prompt=False).endswith("<|im_end|>\n")
    (output,) = llm.chat(SUM, ANSWER, use_tqdm=False, add_generation_prompt=False)
    assert output["prompt_token_ids"] == llm.chat_prompt(SUM, add_generation_prompt=False)


@pytest.mark.parametrize("explicit", [{}, {"add_generation_prompt": False}], ids=str)
def test_the_final_message_is_continued(llm: LLM, explicit: dict[str, bool]):
    messages = [*SUM, {"role": "assistant", "content": "47 + 38"}]
    text = shown(llm, messages, continue_final_message=True, **explicit)
    assert text == templated(llm, SUM) + "47 + 38"
    (output,) = llm.chat(messages, ANSWER, use_tqdm=False, continue_final_message=True, **explicit)
    assert output["text"] == " = 85"


def test_tools_reach_the_template(llm: LLM):
    def get_weather(city: str) -> str:
        """
        Say what the weather is like.

        Args:
            city: the name of the city.
        """
        return city

    schema = {"type": "function", "function": {"name": "add", "parameters": {}}}
    assert shown(llm, SUM, chat_template=SHOWING) == "[user:47+38=]>"
    assert shown(llm, SUM, chat_template=SHOWING, tools=[get_weather, schema]) == (
        "[user:47+38=]<get_weather><add>>"
    )


def test_whatever_else_the_template_knows_reaches_it(llm: LLM):
    for kwargs, text in (
        (None, "[user:47+38=]>"),
        ({}, "[user:47+38=]>"),
        ({"enable_thinking": False}, "[user:47+38=]thinking=False>"),
        ({"enable_thinking": True, "documents_at": ["a", "b"]}, "[user:47+38=]thinking=Truea+b>"),
        ({"unknown": 3}, "[user:47+38=]>"),
    ):
        assert shown(llm, SUM, chat_template=SHOWING, chat_template_kwargs=kwargs) == text
        (output,) = llm.chat(
            SUM, ANSWER, use_tqdm=False, chat_template=SHOWING, chat_template_kwargs=kwargs
        )
        assert llm.tokenizer.decode(output["prompt_token_ids"]) == text


def test_the_template_of_qwen3_closes_the_thoughts_it_is_told_to_leave_out(demo_copy: Path):
    """The end of Qwen3's own template."""
    template = (
        "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content"
        " + '<|im_end|>' + '\\n' }}{%- endfor %}{%- if add_generation_prompt %}"
        "{{- '<|im_start|>assistant\\n' }}{%- if enable_thinking is defined and enable_thinking is"
        " false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
    )
    edit_json(demo_copy / "tokenizer_config.json", chat_template=template)
    with build_demo(demo_copy) as llm:
        asked = "<|im_start|>user\n47+38=<|im_end|>\n<|im_start|>assistant\n"
        quiet = asked + "<think>\n\n</think>\n\n"
        for kwargs, text in (
            ({}, asked), ({"enable_thinking": True}, asked), ({"enable_thinking": False}, quiet),
        ):  # fmt: skip
            assert shown(llm, SUM, chat_template_kwargs=kwargs) == text
        (output,) = llm.chat(
            SUM, ANSWER, use_tqdm=False, chat_template_kwargs={"enable_thinking": False}
        )
        assert output["prompt_token_ids"] == llm.tokenizer.encode(quiet)


def test_an_option_that_does_not_exist_is_refused(llm: LLM):
    for use in (llm.chat, llm.chat_prompt):
        with pytest.raises(TypeError, match="enable_thinking"):
            use(SUM, enable_thinking=False)
        with pytest.raises((TypeError, ValueError), match="tokenize"):
            use(SUM, chat_template_kwargs={"tokenize": True})


def test_all_conversations_have_the_same_template_options(llm: LLM):
    outputs = llm.chat(CONVERSATIONS, ANSWER, use_tqdm=False, chat_template=SHOWING)
    for messages, output in zip(CONVERSATIONS, outputs, strict=True):
        text = llm.tokenizer.decode(output["prompt_token_ids"])
        assert text == "".join(f"[{m['role']}:{m['content']}]" for m in messages) + ">"


def test_what_else_a_message_has_is_the_templates_own_business(llm: LLM):
    template = "{% for m in messages %}{{ m.parts | length }}{{ m.name }};{% endfor %}"
    messages = [SUM[0] | {"parts": [{"type": "text"}, 2], "name": "Ann"}]
    messages += [SUM[0] | {"parts": [], "name": "Bo"}]
    assert shown(llm, messages, chat_template=template) == "2Ann;0Bo;"


# Special tokens


def add_tokenizer_with_bos(path: Path) -> None:
    """Of whole words "t0 t1 t2 ..."; every text that is encoded begins with t7."""
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB_SIZE)}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="t7 $A", special_tokens=[("t7", 7)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="t7",
        chat_template="{{ bos_token }} {% for m in messages %}{{ m.content }} {% endfor %}t9",
    ).save_pretrained(path)


def test_special_tokens_of_the_template_are_not_doubled(tiny_copy: Path, tiny_reference: Reference):
    for path in tiny_copy.glob("tokenizer*"):
        path.unlink()
    add_tokenizer_with_bos(tiny_copy)
    messages = [{"role": "user", "content": "t1 t2"}, {"role": "user", "content": "t3"}]
    with build(tiny_copy) as llm:
        (plain,) = llm.generate("t1 t2", GREEDY, use_tqdm=False)
        assert plain["prompt_token_ids"] == [7, 1, 2], "the tokenizer does add its own"
        assert llm.chat_prompt(messages) == [7, 1, 2, 3, 9]
        (output,) = llm.chat(messages, GREEDY, use_tqdm=False)
        assert output["prompt_token_ids"] == [7, 1, 2, 3, 9]
        assert output["token_ids"] == tiny_reference.tokens([7, 1, 2, 3, 9], 12)


def test_special_tokens_that_a_user_writes_are_what_the_template_makes_of_them(llm: LLM):
    messages = [{"role": "user", "content": "a<|im_end|>b"}]
    assert llm.chat_prompt(messages) == llm.tokenizer.encode(templated(llm, messages))


# What cannot work


def test_a_checkpoint_without_a_template_says_so(demo_copy: Path):
    edit_json(demo_copy / "tokenizer_config.json", remove=("chat_template",))
    with build_demo(demo_copy) as llm:
        for use in (llm.chat, llm.chat_prompt):
            with pytest.raises(ValueError, match="has no chat template: pass chat_template"):
                use(SUM)
            with pytest.raises(ValueError, match=re.escape(str(demo_copy))):
                use([*SUM, *SUM])
        assert_empty(llm)
        assert shown(llm, SUM, chat_template=SHOWING) == "[user:47+38=]>"
        (output,) = llm.chat(SUM, ANSWER, use_tqdm=False, chat_template=SHOWING)
        (expected,) = llm.generate("[user:47+38=]>", ANSWER, use_tqdm=False)
        assert same([output]) == same([expected])


def test_a_checkpoint_without_a_tokenizer_says_so(demo_copy: Path):
    for path in demo_copy.glob("tokenizer*"):
        path.unlink()
    with build_demo(demo_copy) as llm:
        for use in (llm.chat, llm.chat_prompt):
            for options in ({}, {"chat_template": SHOWING}):
                with pytest.raises(ValueError, match="has no tokenizer"):
                    use(SUM, **options)
        assert_empty(llm)


ONE = {"role": "user", "content": "47+38="}
BAD_MESSAGES = {
    "string": "47+38=",
    "empty string": "",
    "number": 5,
    "None": None,
    "a message outside of a list": ONE,
    "empty dict": {},
    "set": {"role", "content"},
    "no messages": [],
    "no messages in a tuple": (),
    "an empty conversation": [[]],
    "strings": ["user", "47+38="],
    "numbers": [1, 2],
    "None in a list": [None],
    "a string after a message": [ONE, "47+38="],
    "None after a message": [ONE, None],
    "a conversation after a message": [ONE, [ONE]],
    "an empty conversation after another": [[ONE], []],
    "a message after a conversation": [[ONE], ONE],
    "None after a conversation": [[ONE], None],
    "a string after a conversation": [[ONE], "47+38="],
    "nested too deep": [[[ONE]]],
    "no content": [{"role": "user"}],
    "no role": [{"content": "47+38="}],
    "content is None": [{"role": "user", "content": None}],
    "content is a number": [{"role": "user", "content": 5}],
}


@pytest.mark.parametrize("messages", BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_messages_that_cannot_be_are_refused_as_messages(llm: LLM, messages: Any):
    with pytest.raises((TypeError, ValueError), match=r"messages|conversation"):
        llm.chat(messages, ANSWER, use_tqdm=False)
    assert_empty(llm)


@pytest.mark.parametrize(
    "messages",
    [
        "47+38=", 5, None, ONE, {}, [], ["47+38="], [None], [ONE, "47+38="], [[ONE]],
        [{"role": "user"}],
    ],
    ids=str,
)  # fmt: skip
def test_a_prompt_of_messages_that_cannot_be_is_refused(llm: LLM, messages: Any):
    with pytest.raises((TypeError, ValueError), match="messages"):
        llm.chat_prompt(messages)


def test_a_string_in_place_of_messages_is_shown_whole(llm: LLM):
    with pytest.raises((TypeError, ValueError), match=r"got '47\+38='"):
        llm.chat("47+38=", ANSWER, use_tqdm=False)


def test_long_nonsense_is_not_shown_whole(llm: LLM):
    with pytest.raises((TypeError, ValueError), match=r"got 'a{5,30}\.\.\.a{5,30}'$"):
        llm.chat_prompt("a" * 10_000)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for message in %}", "Expected|expected|unexpected"),
        ("{{ messages[7].content }}", "messages|list object"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ nothing.at_all }}", "nothing"),
    ],
)
def test_a_template_that_fails_says_why(llm: LLM, template: str, message: str):
    for use in (llm.chat, llm.chat_prompt):
        with pytest.raises(ValueError, match="the chat template does not take") as caught:
            use(SUM, chat_template=template)
        assert re.search(message, str(caught.value))
        assert caught.value.__cause__ is not None
    assert_empty(llm)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "__class__.*is unsafe"),
        ("{{ messages.append(1) }}", "append.*is unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "is unsafe"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
    ],
)
def test_a_template_cannot_leave_its_sandbox(llm: LLM, template: str, message: str):
    with pytest.raises(ValueError, match=f"the chat template does not take .*{message}"):
        shown(llm, SUM, chat_template=template)


def test_a_template_that_fails_on_one_conversation_queues_none(llm: LLM):
    template = "{% if messages | length > 1 %}{{ raise_exception('one only') }}{% endif %}Hi"
    with pytest.raises(ValueError, match="one only"):
        llm.chat(CONVERSATIONS, ANSWER, use_tqdm=False, chat_template=template)
    assert_empty(llm)
    assert len(llm.chat(CONVERSATIONS[:2], ANSWER, use_tqdm=False, chat_template=template)) == 2


def test_a_template_that_leaves_the_final_message_out_cannot_continue_it(llm: LLM):
    with pytest.raises(ValueError, match="the chat template does not take"):
        llm.chat_prompt(SUM, chat_template="Hi", continue_final_message=True)


def test_a_template_that_makes_no_text_is_refused(llm: LLM):
    with pytest.raises(ValueError, match="empty"):
        llm.chat(SUM, ANSWER, use_tqdm=False, chat_template="{% if false %}{% endif %}")


def test_text_that_is_not_unicode_is_refused(llm: LLM):
    with pytest.raises(ValueError, match=r"not valid Unicode|surrogate"):
        llm.chat([{"role": "user", "content": "a\ud800b"}], ANSWER, use_tqdm=False)


def test_a_conversation_that_is_too_long_is_refused_by_its_place(llm: LLM):
    endless = [{"role": "user", "content": "12345 " * 1000}]
    with pytest.raises(ValueError, match=r"prompt 1 has \d+ tokens, and at most 2047 fit"):
        llm.chat([SUM, endless], ANSWER, use_tqdm=False)


def test_a_closed_engine_refuses_chats():
    llm = build_demo(DEMO)
    llm.close()
    for use in (llm.chat, llm.chat_prompt):
        with pytest.raises(RuntimeError, match="closed"):
            use(SUM)
