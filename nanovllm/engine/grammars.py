"""Structured outputs by llguidance, a library that is imported when the first one is asked for.

It parses the text byte by byte as tokens come, and walks a tree of the vocabulary for the tokens
that may come next. https://github.com/guidance-ai/llguidance. Why this one, and what it costs:
docs/structured-outputs.md.
"""

import functools
import itertools
import json
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher
    from llguidance._lib import JsonCompileOptions

NUM_CACHED = 256  # compiled grammars
# Matchers of one lexer wait for each other. With so many, the threads that fill masks seldom meet.
NUM_LEXERS = 32
MANY_ROWS = 8  # so many masks are worth waking threads


class Grammars:
    """Compiles what requests ask for, and keeps what was used last.

    Args:
        tokenizer: the engine's.
        eos_token_ids: the engine's.
        vocab_size: the model's, with or without tokens that the tokenizer lacks.

    Raises:
        ImportError: if llguidance is not installed.
        ValueError: if the tokenizer or the end-of-sequence tokens are of no use here.
    """

    def __init__(
        self, tokenizer: Tokenizer, eos_token_ids: Collection[int], vocab_size: int
    ) -> None:
        try:
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            raise ImportError(
                "structured_outputs needs llguidance: pip install nanovllm[structured]"
            ) from error
        self.eos_token_ids = frozenset(eos_token_ids)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = sorted(i for i in self.eos_token_ids if i in added and added[i].special)
        if not special:
            raise ValueError(
                "structured_outputs needs an end-of-sequence token that is a special token of the "
                f"tokenizer; the engine has {sorted(self.eos_token_ids)}: set eos_token_id in "
                "generation_config.json"
            )
        self.eos_token_id = special[0]
        # The library knows only special tokens as ends, and takes special tokens for the text of
        # literals that spell them. So the bits of all these are set here.
        all_special = {i for i, token in added.items() if token.special}
        self.special_texts = [added[i].content for i in sorted(all_special)]
        self.special = TokenBits(all_special | self.eos_token_ids, vocab_size)
        self.ends = TokenBits(self.eos_token_ids, vocab_size)
        size = max(vocab_size, len(tokenizer))
        self.num_words = (size + 31) // 32  # of the library's masks
        try:
            backed: Any = tokenizer
            self._tokenizer = from_tokenizer(backed, n_vocab=size, eos_token=special)
        except ValueError as error:
            raise ValueError(f"structured_outputs cannot use this tokenizer: {error}") from error
        self.compile = functools.lru_cache(NUM_CACHED)(self._compile)

    def compile_all(
        self, wanted: Iterable[StructuredOutputsParams]
    ) -> "dict[StructuredOutputsParams, Grammar | ValueError]":
        """What `compile` returns or raises for each, made in several threads."""
        distinct = list(dict.fromkeys(wanted))
        if len(distinct) == 1:
            return {distinct[0]: self._try_compile(distinct[0])}
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return dict(zip(distinct, pool.map(self._try_compile, distinct)))

    def _try_compile(self, params: StructuredOutputsParams) -> "Grammar | ValueError":
        try:
            return self.compile(params)
        except ValueError as error:
            return ValueError(f"structured_outputs: {error}")

    def _compile(self, params: StructuredOutputsParams) -> "Grammar":
        """Raises:
        ValueError: with the library's reason.
        """
        from llguidance import LLMatcher

        given = (params.json, params.regex, params.grammar, *(params.choice or ()))
        for text in self.special_texts:
            if any(text in part.replace("\\", "") for part in given if part is not None):
                raise ValueError(f"{text!r} is a special token, which is no part of a text")
        source = _source(params)
        grammar = Grammar(self, lambda: LLMatcher(self._tokenizer, source, log_level=0))
        reason = grammar.originals[0].get_error()
        if reason:
            raise ValueError(reason.strip())
        return grammar


class Grammar:
    """A compiled one, of which each completion gets a matcher of its own.

    Args:
        grammars: what made it.
        compile: makes a matcher at the start of the text, about 1 ms.

    Attributes:
        originals: matchers that stay at the start of the text.
    """

    def __init__(self, grammars: Grammars, compile: "Callable[[], LLMatcher]") -> None:
        self.grammars = grammars
        self.originals = [compile()]
        self._compile = compile
        self._turns = itertools.count()

    def matcher(self) -> "LLMatcher":
        """At the start of the text: a copy, 4 us, which shares its original's lexer."""
        turn = next(self._turns) % NUM_LEXERS
        while len(self.originals) <= turn:
            self.originals.append(self._compile())
        return self.originals[turn].deep_copy()


class GrammarConstraint:
    """A `TokenConstraint`: the tokens that keep to a grammar.

    After a complete text all end-of-sequence tokens may come, and nothing but them if it cannot go
    on. Other special tokens never may, nor tokens that the tokenizer lacks. After a text that
    outgrows the library's limits no token may, and a warning says so.

    Args:
        grammar: compiled.
    """

    allows_all = False

    def __init__(self, grammar: Grammar) -> None:
        self.grammars = grammar.grammars
        self._matcher = grammar.matcher()
        self._newest: int | None = None  # accepted, but the matcher does not know it yet
        self._has_warned = False

    def accept(self, token_id: int) -> None:
        """Matchers take tokens in later, many together."""
        if self._newest is not None:
            _take_in([self])
        is_eos = token_id in self.grammars.eos_token_ids
        self._newest = self.grammars.eos_token_id if is_eos else token_id

    def restrict(self, mask: np.ndarray) -> None:
        allowed = np.empty((1, len(mask)), dtype=np.int32)
        masks = GrammarMasks([(0, self)], allowed)
        masks.compute()
        masks.complete()
        mask &= allowed[0]

    @property
    def matcher(self) -> "LLMatcher":
        """Which knows all tokens."""
        _take_in([self])
        return self._matcher

    @property
    def is_complete(self) -> bool:
        return self.matcher.is_stopped()

    @property
    def may_end(self) -> bool:
        """Whether the text is complete, if it may go on or not."""
        return not self.matcher.is_error() and (self.matcher.is_accepting() or self.is_complete)

    def warn(self) -> None:
        """Say, once, that no text can be completed any more, if that is so."""
        if self._matcher.is_error() and not self._has_warned:
            self._has_warned = True
            reason = self._matcher.get_error().partition("\n")[0]
            warnings.warn(f"structured_outputs: a text cannot be completed: {reason}", stacklevel=2)


def _take_in(constraints: Sequence[GrammarConstraint]) -> None:
    """Tell matchers the tokens that were accepted, many in parallel."""
    behind, news = [], []
    for one in constraints:
        if one._newest is not None:
            behind.append(one)
            news.append((one._matcher, one._newest))
            one._newest = None
    if len(news) < MANY_ROWS:
        are_fine = [matcher.consume_token(token_id) for matcher, token_id in news]
    else:
        are_fine = _executor(os.getpid()).consume_token_par(news)
    if not all(are_fine):
        for one in behind:
            one.warn()


class GrammarMasks:
    """The masks of one engine's constraints: to be made, computed and completed.

    Rows of `out` are overwritten. No constraint may change meanwhile.

    Args:
        rows: an index of `out` and what may come there, no index twice; at least one.
        out: [any number, ceil(vocab / 32)] int32, contiguous.
    """

    def __init__(self, rows: Sequence[tuple[int, GrammarConstraint]], out: np.ndarray) -> None:
        self._constraints = dict(rows)
        self._grammars = rows[0][1].grammars
        self._out = self._masks = out
        if out.shape[1] != self._grammars.num_words:  # the model lacks tokens of the tokenizer
            self._masks = np.empty((len(out), self._grammars.num_words), dtype=np.int32)
        _take_in([constraint for _, constraint in rows])
        self._matchers = [(constraint._matcher, row) for row, constraint in rows]

    def compute(self) -> None:
        """The library's part, in threads of its own if they are many. The GIL is free meanwhile."""
        start, size = self._masks.ctypes.data, self._masks.strides[0]
        if len(self._matchers) < MANY_ROWS:
            for matcher, row in self._matchers:
                matcher.unsafe_compute_mask_ptr(start + row * size, size)
        else:
            executor, number = _executor(os.getpid()), len(self._masks)
            executor.unsafe_compute_mask_ptr(self._matchers, start, size, number)

    def complete(self) -> None:
        """What the library does not know."""
        grammars, out, rows = self._grammars, self._out, np.array([*self._constraints])
        if self._masks is not out:
            out[rows] = self._masks[rows, : out.shape[1]]
        # Its bit of an end stands for a complete text, or for a literal that spells the token.
        word, bit = divmod(grammars.eos_token_id, 32)
        ends = rows[self._masks[rows, word] >> bit & 1 != 0].tolist()
        grammars.special.clear(out, rows)
        grammars.ends.set(
            out, np.array([row for row in ends if self._constraints[row].may_end], np.int64)
        )


@functools.cache
def _executor(pid: int) -> "LLExecutor":
    """The library's threads, of this process: 80% of the cores, at most 32."""
    from llguidance import LLExecutor

    return LLExecutor()


class TokenBits:
    """Some tokens' bits of many masks at once.

    Args:
        token_ids: those past the vocabulary are left out.
        vocab_size: of the masks.
    """

    def __init__(self, token_ids: Iterable[int], vocab_size: int) -> None:
        bits: dict[int, int] = {}
        for token_id in token_ids:
            if token_id < vocab_size:
                bits[token_id // 32] = bits.get(token_id // 32, 0) | 1 << token_id % 32
        self._words = np.fromiter(bits, np.int64, len(bits))
        self._bits = np.fromiter(bits.values(), np.uint32, len(bits)).view(np.int32)

    def set(self, masks: np.ndarray, rows: np.ndarray) -> None:
        """In rows of `masks` [any number, words] int32."""
        masks[rows[:, None], self._words] |= self._bits

    def clear(self, masks: np.ndarray, rows: np.ndarray) -> None:
        """In rows of `masks` [any number, words] int32."""
        masks[rows[:, None], self._words] &= ~self._bits


def _source(params: StructuredOutputsParams) -> str:
    """The library's form of what is asked for.

    Raises:
        ValueError: for a grammar in GBNF that cannot be read.
    """
    from llguidance import LLMatcher, grammar_from

    if params.regex is not None:
        return LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        # One terminal of all: with a rule for each, some thousands are too many.
        strings = (json.dumps(text, ensure_ascii=False) for text in params.choice)
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(strings))
    if params.grammar is not None:
        return grammar_from("grammar", params.grammar)
    schema = '{"type": "object"}' if params.json is None else params.json
    assert isinstance(schema, str)
    options: JsonCompileOptions = {}
    if params.disable_any_whitespace:
        options["whitespace_flexible"] = False
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    return LLMatcher.grammar_from_json_schema(schema, overrides=options)
