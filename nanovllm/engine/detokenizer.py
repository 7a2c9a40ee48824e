"""Text as it grows, token by token: whole characters only, and stop strings found on the way."""

from nanovllm.engine.tokenizer import Decoder

UNFINISHED = "\ufffd"  # what decoding makes of the first bytes of a character


class Detokenizer:
    """Turns the generated tokens of one request into text.

    A character may take several tokens, and then shows in `text` with the last of them only. A stop
    string, once complete, ends the text. One that has a special token in it is looked for in the
    text with special tokens, whether or not `text` has them.

    Args:
        decoder: makes text of tokens.
        skip_special_tokens: leave special tokens out of the text.
        stop: strings that end the text.
        include_stop: whether the one found stays in it, with the special tokens that it has.

    Attributes:
        text: the text so far; after `finish`, what decoding all tokens together gives.
        stopped_by: the stop string found, if one was.
    """

    def __init__(
        self,
        decoder: Decoder,
        skip_special_tokens: bool = True,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
    ) -> None:
        self.text = ""
        self.stopped_by: str | None = None
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        self._include_stop = include_stop
        self._token_ids: list[int] = []
        self._is_finished = False
        self._shown = _GrowingText(decoder, skip_special_tokens)
        # Those that the text shown can have are searched for there, and the others in a text with
        # special tokens, which is made only for them.
        with_special = [one for one in stop if decoder.has_special_token(one)]
        if not skip_special_tokens:
            with_special = []
        self._search = _Search(self._shown, [one for one in stop if one not in with_special])
        self._full: _GrowingText | None = None
        self._full_search = self._search
        if with_special:
            self._full = _GrowingText(decoder, skip_special_tokens=False)
            self._full_search = _Search(self._full, with_special)
        self._special_spans: list[tuple[int, int]] = []  # where special tokens are in that text

    def append(self, token_id: int, may_stop: bool = True) -> None:
        """Take in the next token. With `may_stop` false no stop string may end with it."""
        self._token_ids.append(token_id)
        is_left_out = self._skip_special_tokens and self._decoder.is_special(token_id)
        if not is_left_out:
            self._shown.append(token_id)
        if self._full is not None:
            start = len(self._full.all_text) if is_left_out else 0
            self._full.append(token_id)
            if is_left_out:
                self._special_spans.append((start, len(self._full.all_text)))
        self.text = self._shown.text
        found = self._search.found(may_stop)
        if self._full is not None:
            in_full = self._full_search.found(may_stop)
            found += [(self._place_in_shown(start), stop) for start, stop in in_full]
        if found:
            start, self.stopped_by = min(found, key=lambda one: (one[0], len(one[1])))
            self.text = self._shown.all_text[:start]
            if self._include_stop:
                self.text += self.stopped_by

    def finish(self) -> None:
        """Show what is left, as a broken character if need be."""
        if self.stopped_by is None:
            self.text = self._decoder.decode(self._token_ids, self._skip_special_tokens)
            self._is_finished = True

    @property
    def num_safe(self) -> int:
        """How much of `text` no stop string can take back: it does not end inside of one."""
        if self.stopped_by is not None or self._is_finished:
            return len(self.text)
        num_safe = self._search.num_safe
        if self._full is not None:
            num_safe = min(num_safe, self._place_in_shown(self._full_search.num_safe))
        return num_safe

    def _place_in_shown(self, start: int) -> int:
        """Where a place in the text with special tokens is in the one that is shown. Counted from
        the end: at the beginning a special token may change the spaces of the text after it."""
        assert self._full is not None
        num_after = len(self._full.all_text) - start
        for span_start, span_end in self._special_spans:
            num_after -= max(0, span_end - max(span_start, start))
        return max(0, len(self._shown.all_text) - num_after)


class _GrowingText:
    """The text of tokens that come one by one.

    Args:
        decoder: makes text of tokens.
        skip_special_tokens: if so, none come.

    Attributes:
        text: as far as no later token changes it.
    """

    def __init__(self, decoder: Decoder, skip_special_tokens: bool) -> None:
        self.text = ""
        self._decoder = decoder
        self._skip_special_tokens = skip_special_tokens
        # The text of a token may depend on the token before it: new tokens are decoded together
        # with some before them, whose text is in `text` already. Where a character takes two
        # tokens, the first is new until the second has come; then both are the next one's context.
        self._context: list[int] = []
        self._new: list[int] = []
        self._num_shown = 0  # characters of the new tokens' text that are in `text`
        self._ends_in_bytes = False

    def append(self, token_id: int) -> None:
        if not self._decoder.is_known(token_id):  # it has no text, and parts none
            return
        self._new.append(token_id)
        self._ends_in_bytes = self._decoder.is_byte(token_id)
        if self._ends_in_bytes:  # one more may make all of the run broken: wait for its end
            return
        new = self._new_text()
        complete = new.rstrip(UNFINISHED)
        self.text += complete[self._num_shown :]
        self._num_shown = max(self._num_shown, len(complete))
        if complete == new:
            # What has no text, such as a first space that is dropped, may change what comes after.
            self._context = self._new if new else self._context + self._new
            self._new, self._num_shown = [], 0

    @property
    def valid_text(self) -> str:
        """The text if it ended here, but for a last character that is not whole."""
        if not self._ends_in_bytes or UNFINISHED in self._new_text():
            return self.text
        return self.all_text

    @property
    def all_text(self) -> str:
        """The text if it ended here."""
        return self.text + self._new_text()[self._num_shown :] if self._new else self.text

    def _new_text(self) -> str:
        """The text of the new tokens, as it is after the context."""
        return self._decode(self._context + self._new)[len(self._decode(self._context)) :]

    def _decode(self, token_ids: list[int]) -> str:
        return self._decoder.decode(token_ids, self._skip_special_tokens)


class _Search:
    """Looks for stop strings in a text as it grows."""

    def __init__(self, text: _GrowingText, stops: list[str]) -> None:
        self._text = text
        self._stops = stops
        self._num_searched = 0  # characters in which no stop string can end any more

    def found(self, may_stop: bool) -> list[tuple[int, str]]:
        """The stop strings that end in what is new, and where they begin. To be called after each
        token; with `may_stop` false none may end there."""
        if not self._stops:
            return []
        text, old = self._text.valid_text, self._num_searched
        self._num_searched = max(old, len(text))
        starts = [text.find(stop, max(0, old - len(stop) + 1)) for stop in self._stops]
        found = [(start, stop) for start, stop in zip(starts, self._stops) if start >= 0]
        return found if may_stop else []

    @property
    def num_safe(self) -> int:
        """Where what may be the beginning of a stop string begins."""
        text = self._text.text
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stops):
                return len(text) - length
        return len(text)
