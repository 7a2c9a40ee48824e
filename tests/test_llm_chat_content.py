"""Content of a chat's messages: strings, OpenAI's parts, and what is refused."""

from collections.abc import Iterator
from typing import Any

import pytest

from helpers.chats import ANSWER, SUM, build_demo, shown
from helpers.engines import assert_empty
from helpers.paths import DEMO
from nanovllm import LLM

START, END = "{% for m in messages %}", "{% endfor %}>"
# As Qwen3's: any content that is no string is rendered as ''.
STRINGS = START + "[{{ m.content if m.content is string else '' }}]" + END
# Parts alone: a string is gone through by its characters, which have no "text".
PARTS = START + "[{% for part in m.content %}{{ part.text }}|{% endfor %}]" + END
BOTH = (
    START + "[{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}]" + END
)
# Writes a list as Python does, with all its quotes and braces.
ANYTHING = START + "[{{ m.content }}]" + END
# Parts of users, and only strings of the system.
BOTH_FROM_USERS = (
    "{% for m in messages %}{% if m.role == 'system' %}"
    "[{{ m.content if m.content is string else '' }}]"
    "{% elif m.content is string %}[{{ m.content }}]"
    "{% else %}[{% for part in m.content %}{{ part.text }}{% endfor %}]{% endif %}{% endfor %}>"
)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with build_demo(DEMO) as llm:
        yield llm


def parts(*texts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (STRINGS, "[a]["), (ANYTHING, "[a]["), (BOTH, "[a]["), (BOTH_FROM_USERS, "[a]["),
        (PARTS, "[a|]["),
    ],
    ids=["strings", "anything", "both", "both from users", "parts"],
)  # fmt: skip
def test_text_in_parts_reaches_the_model(llm: LLM, template: str, expected: str):
    messages = [
        {"role": "system", "content": parts("a")},
        {"role": "user", "content": parts("b", "c")},
    ]
    rest = {PARTS: "b|c|]>", BOTH: "bc]>"}.get(template, "b\nc]>")
    assert shown(llm, messages, chat_template=template) == expected + rest


# Parts alone, of users; fails on a string.
STRICT_PARTS = (
    START + "{% if m.role == 'user' %}{% if m.content is string %}{{ raise_exception('no') }}"
    "{% endif %}[{{ m.content[0]['text'] }}]{% else %}[{{ m.content }}]{% endif %}" + END
)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (STRINGS, "[a][user][c]>"), (ANYTHING, "[a][user][c]>"), (BOTH, "[a][user][c]>"),
        (BOTH_FROM_USERS, "[a][user][c]>"), (PARTS, "[a|][user|][c|]>"),
    ],
    ids=["strings", "anything", "both", "both from users", "parts"],
)  # fmt: skip
def test_text_in_strings_reaches_the_model(llm: LLM, template: str, expected: str):
    """One has a word that templates have, too."""
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "user"},
        {"role": "user", "content": "c"},
    ]
    assert shown(llm, messages, chat_template=template) == expected


def test_strings_become_parts_only_where_the_template_takes_nothing_else(llm: LLM):
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert shown(llm, messages[1:], chat_template=STRICT_PARTS) == "[b]>"
    # Strings and parts in one conversation
    mixed = [*messages, {"role": "user", "content": parts("c", "d")}]
    assert shown(llm, mixed, chat_template=PARTS) == "[a|][b|][c|d|]>"
    # What the template leaves out in any form
    assert shown(llm, messages, chat_template="{{ messages[1].content[0].text }}>") == "b>"


def test_a_string_may_stand_for_a_part(llm: LLM):
    messages = [{"role": "user", "content": ("a", "b")}]
    assert shown(llm, messages, chat_template=STRINGS) == "[a\nb]>"
    assert shown(llm, messages, chat_template=PARTS) == "[a|b|]>"


def test_strings_beside_parts_stay_what_they_are(llm: LLM):
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": parts("b")}]
    assert shown(llm, messages, chat_template=STRINGS) == "[a][b]>"
    assert shown(llm, messages, chat_template=BOTH) == "[a][b]>"


def test_a_final_message_in_parts_is_continued(llm: LLM):
    messages = [*SUM, {"role": "assistant", "content": parts("47 + 38")}]
    for template in (STRINGS, BOTH):
        text = shown(llm, messages, chat_template=template, continue_final_message=True)
        assert text == "[47+38=][47 + 38"


def test_a_chat_in_parts_has_the_answer_of_its_text(llm: LLM):
    messages = [{"role": "user", "content": parts("47+38=")}]
    (output,) = llm.chat(messages, ANSWER, use_tqdm=False)
    assert output["text"] == "47 + 38 = 85"
    assert messages == [{"role": "user", "content": parts("47+38=")}]


def test_an_assistant_that_calls_tools_needs_no_content(llm: LLM):
    call = {"type": "function", "function": {"name": "add", "arguments": {}}}
    for content in ({}, {"content": None}):
        messages = [*SUM, {"role": "assistant", "tool_calls": [call]} | content]
        assert shown(llm, messages, chat_template=STRINGS) == "[47+38=][]>"


IMAGE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
BAD = {
    "image": ([*parts("a"), IMAGE], r"messages\[1\], part 1 has the type 'image_url'"),
    "no type": ([{"text": "a"}], "part 0 has the type None"),
    "no text": ([{"type": "text"}], 'part 0 needs a string as "text"'),
    "text is a number": ([{"type": "text", "text": 5}], 'part 0 needs a string as "text"'),
    "a number among parts": ([5], "part 0 must be a dict .* got 5"),
    "no parts": ([], r'messages\[1\] needs a "content"'),
    "number": (5, "content 5"),
    "dict": ({"type": "text", "text": "a"}, 'needs a "content"'),
    "None": (None, "content None"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_content_that_is_no_text_is_refused(llm: LLM, content: Any, message: str):
    for template in (STRINGS, BOTH):
        with pytest.raises(ValueError, match=message):
            llm.chat(
                [SUM, [*SUM, {"role": "user", "content": content}]], ANSWER, use_tqdm=False,
                chat_template=template,
            )  # fmt: skip
    assert_empty(llm)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"role": "user", "contents": "a"}, r"needs a \"content\".* has the keys .*'contents'"),
        ({"role": "user", "tool_calls": [{}]}, 'needs a "content"'),
        ({"role": "assistant", "tool_calls": []}, 'needs a "content"'),
        ({"rol": "user", "content": "a"}, r'messages\[0\] needs a "role"'),
    ],
    ids=["misspelt", "a user's tool_calls", "no tool_calls", "no role"],
)
def test_a_message_with_a_key_missing_is_refused(llm: LLM, wrong: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        llm.chat_prompt([wrong], chat_template=STRINGS)
