"""The messages of a chat, checked, with their content in the form that the chat template takes.

A template that does not know a form of content leaves the text out without a word. So what is no
text is refused here, OpenAI's content parts are given only to templates that render them, and
strings become parts for templates that render nothing else.
"""

import reprlib
from collections.abc import Callable, Collection
from typing import Any

Message = dict[str, Any]  # "role" and "content", and whatever else the template knows

_MARKER = "a-text-that-no-template-has"


def check_messages(messages: Any) -> list[Message]:
    """The messages as a list; text parts all have the form {"type": "text", "text": ...}.

    Raises:
        ValueError: if they are no conversation, or a message has something else than text.
    """
    is_chat = isinstance(messages, (list, tuple)) and all(isinstance(m, dict) for m in messages)
    if not is_chat or not messages:
        raise ValueError(f"messages must be a list of dicts, got {reprlib.repr(messages)}")
    return [_checked(message, f"messages[{index}]") for index, message in enumerate(messages)]


def for_template(
    messages: list[Message], render: Callable[[list[Message]], str], source: str
) -> list[Message]:
    """The messages of `check_messages`, with text parts joined by newlines unless the template
    takes parts, and with a string as a part where it takes only these.

    Args:
        messages: are not changed.
        render: applies the template; raises whatever that raises.
        source: of the template.
    """
    if any(_has_parts(message) for message in messages) and not _takes_parts(messages, render):
        messages = [
            {**message, "content": "\n".join(part["text"] for part in message["content"])}
            if _has_parts(message)
            else message
            for message in messages
        ]
    if "text" not in source:  # it reads no part
        return messages
    strings = [i for i, message in enumerate(messages) if isinstance(message.get("content"), str)]
    lost = set(strings) - _rendered_ones(messages, strings, render, as_parts=False)
    only_parts = _rendered_ones(messages, lost, render, as_parts=True) if lost else set()
    return [
        {**message, "content": _parts(message["content"])} if i in only_parts else message
        for i, message in enumerate(messages)
    ]


def _checked(message: Message, name: str) -> Message:
    if not isinstance(message.get("role"), str):
        raise ValueError(f'{name} needs a "role", such as "user", got {reprlib.repr(message)}')
    content = message.get("content")
    if isinstance(content, str):
        return message
    if isinstance(content, (list, tuple)) and content:
        parts = [_text_part(part, f"{name}, part {i}") for i, part in enumerate(content)]
        return {**message, "content": parts}
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return message
    raise ValueError(
        f'{name} needs a "content", a string or a list of text parts (or "tool_calls", from an '
        f"assistant): it has the keys {[*message]}, and content {reprlib.repr(content)}"
    )


def _text_part(part: Any, name: str) -> dict[str, Any]:
    if isinstance(part, str):
        return _parts(part)[0]
    if not isinstance(part, dict):
        raise ValueError(f'{name} must be a dict with "type" and "text", got {reprlib.repr(part)}')
    if part.get("type") != "text":
        raise ValueError(
            f"{name} has the type {part.get('type')!r}, and the models here take only text: "
            'give {"type": "text", "text": ...}'
        )
    if not isinstance(part.get("text"), str):
        raise ValueError(f'{name} needs a string as "text", got {reprlib.repr(part)}')
    return part


def _has_parts(message: Message) -> bool:
    return isinstance(message.get("content"), list)


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _takes_parts(messages: list[Message], render: Callable[[list[Message]], str]) -> bool:
    """Whether a text comes out of the template as a part just as it does as a string, or only as a
    part. Finding it in the result is not enough: a template may write a list as Python does."""

    def rendered(content: Any) -> str:
        return _rendered(
            [{**m, "content": content} if _has_parts(m) else m for m in messages], render
        )

    as_part, as_string = rendered(_parts(_MARKER)), rendered(_MARKER)
    return _MARKER in as_part and (as_part == as_string or _MARKER not in as_string)


def _rendered_ones(
    messages: list[Message],
    places: Collection[int],
    render: Callable[[list[Message]], str],
    as_parts: bool,
) -> set[int]:
    """At which of some places a text comes out of the template."""
    markers = {place: f"{_MARKER}-{place}." for place in places}
    marked = [*messages]
    for place, marker in markers.items():
        content = _parts(marker) if as_parts else marker
        marked[place] = {**messages[place], "content": content}
    text = _rendered(marked, render)
    return {place for place, marker in markers.items() if marker in text}


def _rendered(messages: list[Message], render: Callable[[list[Message]], str]) -> str:
    try:
        return render(messages)
    except Exception:  # of jinja, and whatever a template raises: it does not take this form
        return ""
