"""Text as it grows, token by token: whole characters only, and stop strings found on the way."""

from nanovllm.engine.tokenizer import Tokenizer, decode

UNFINISHED = "\ufffd"  # what decoding makes of the first bytes of a character


class Detokenizer:
    """Turns the generated tokens of one request into text.

    A character may take several tokens, and then shows in `text` with the last of them only. A stop
    string, once complete, ends the text.

    Args:
        tokenizer: transformers' tokenizer.
        skip_special_tokens: leave special tokens out of the text.
        stop: strings that end the text.
        include_stop: whether the one found stays in it.

    Attributes:
        text: the text so far; after `finish`, of all tokens.
        stopped_by: the stop string found, if one was.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool = True,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
    ) -> None:
        self.text = ""
        self.stopped_by: str | None = None
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._stop = stop
        self._include_stop = include_stop
        # The text of a token may depend on the token before it: new tokens are decoded together
        # with some before them, whose text is in `text` already. Where a character takes two
        # tokens, the first is new until the second has come; then both are the next one's context.
        self._context: list[int] = []
        self._new: list[int] = []
        self._num_shown = 0  # characters of the new tokens' text that are in `text`

    def append(self, token_id: int, may_stop: bool = True) -> None:
        """Take in the next token. With `may_stop` false no stop string may end with it."""
        self._new.append(token_id)
        new = self._new_text()
        complete = new.rstrip(UNFINISHED)
        self._show(complete[self._num_shown :], may_stop)
        self._num_shown = max(self._num_shown, len(complete))
        if complete == new:
            if new:  # what has no text, such as a special token, changes no text after it
                self._context = self._new
            self._new, self._num_shown = [], 0

    def finish(self) -> None:
        """Show what is left, as a broken character if need be."""
        if self._new and self.stopped_by is None:
            self._show(self._new_text()[self._num_shown :], may_stop=False)
            self._new = []

    @property
    def num_safe(self) -> int:
        """How much of `text` no stop string can take back: it does not end inside of one."""
        if self.stopped_by is not None:
            return len(self.text)
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop):
                return len(self.text) - length
        return len(self.text)

    def _show(self, new: str, may_stop: bool) -> None:
        old, self.text = len(self.text), self.text + new
        if not may_stop or not new:
            return
        found = []
        for stop in self._stop:
            start = self.text.find(stop, max(0, old - len(stop) + 1))
            if start >= 0:
                found.append((start, start + len(stop), stop))
        if found:
            start, end, self.stopped_by = min(found)
            self.text = self.text[: end if self._include_stop else start]

    def _new_text(self) -> str:
        """The text of the new tokens, as it is after the context."""
        return self._decode(self._context + self._new)[len(self._decode(self._context)) :]

    def _decode(self, token_ids: list[int]) -> str:
        return decode(self._tokenizer, token_ids, self._skip_special_tokens)
