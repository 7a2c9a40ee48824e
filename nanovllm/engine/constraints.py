"""What restricts the next token of a completion beyond its parameters: a grammar, bad words."""

import functools
import os
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeAlias

import numpy as np

from nanovllm.engine.bad_words import BadWords, WordTable, spellings
from nanovllm.engine.grammars import NUM_CACHED, Grammar, GrammarConstraint, GrammarMasks, Grammars
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.sampling_params import SamplingParams


class TokenConstraint(Protocol):
    """Which tokens may come next in one sequence."""

    def accept(self, token_id: int) -> None:
        """The sequence's next token is known."""

    def restrict(self, mask: np.ndarray) -> None:
        """Clear the bits of the tokens that may not come next.

        Args:
            mask: [ceil(vocab / 32)] int32: bit i % 32 of word i // 32 is token i.
        """

    @property
    def allows_all(self) -> bool:
        """Whether any token may come next: then there is nothing to restrict."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end can follow, or the end was accepted."""


class AllOf:
    """A `TokenConstraint`: what all of several allow.

    Args:
        parts: in the order in which they restrict; a grammar comes first.
    """

    def __init__(self, parts: Sequence[TokenConstraint]) -> None:
        self.parts = parts

    def accept(self, token_id: int) -> None:
        for part in self.parts:
            part.accept(token_id)

    def restrict(self, mask: np.ndarray) -> None:
        for part in self.parts:
            part.restrict(mask)

    @property
    def allows_all(self) -> bool:
        return all(part.allows_all for part in self.parts)

    @property
    def is_complete(self) -> bool:
        return any(part.is_complete for part in self.parts)


def first_places(params: Sequence[SamplingParams]) -> dict[int, int]:
    """For each distinct object among the parameters, by its `id`, the first prompt that has it.
    Most often one object serves all prompts, and what follows from it is found only once."""
    places = dict[int, int]()
    for place, one in enumerate(params):
        places.setdefault(id(one), place)
    return places


MakeConstraint: TypeAlias = Callable[[], TokenConstraint | None]  # one for each completion


class ConstraintMaker:
    """Prepares the constraints of requests: compiles grammars, tokenizes bad words.

    Args:
        tokenizer: the engine's; None if there is none.
        eos_token_ids: the engine's.
        vocab_size: the model's.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, eos_token_ids: Collection[int], vocab_size: int
    ) -> None:
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids
        self._vocab_size = vocab_size
        self._words = functools.lru_cache(NUM_CACHED)(self._find_words)

    def prepare(self, params: Sequence[SamplingParams]) -> list[MakeConstraint]:
        """For each prompt's parameters, what makes the constraint of one of its completions.

        Raises:
            ImportError: if the library for structured outputs is missing.
            ValueError: for what cannot work, by its place in the list.
        """
        places = first_places(params)
        tables = []
        for index in places.values():
            try:
                self._check(params[index])
                tables.append(self._words(tuple(params[index].bad_words or ())))
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from error
        structures = [params[index].structured_outputs for index in places.values()]
        # All at once, since compiling runs in parallel.
        wanted = [structure for structure in structures if structure is not None]
        compiled = self._grammars.compile_all(wanted) if wanted else {}
        makers = dict[int, MakeConstraint]()
        for (name, index), structure, words in zip(places.items(), structures, tables):
            grammar = None if structure is None else compiled[structure]
            if isinstance(grammar, ValueError):
                raise ValueError(f"prompt {index}: {grammar}") from grammar
            makers[name] = functools.partial(_make, grammar, words)
        return [makers[id(one)] for one in params]

    @functools.cached_property
    def _grammars(self) -> Grammars:
        """Made when the first is wanted: it takes 1 to 2 s for 150,000 tokens."""
        assert self._tokenizer is not None
        return Grammars(self._tokenizer, self._eos_token_ids, self._vocab_size)

    def _check(self, params: SamplingParams) -> None:
        for name in ("bad_words", "structured_outputs"):
            if getattr(params, name) and self._tokenizer is None:
                raise ValueError(f"{name} needs text, and the checkpoint has no tokenizer")
        if params.structured_outputs is not None:
            _ = self._grammars  # whether there can be any

    def _find_words(self, words: tuple[str, ...]) -> WordTable | None:
        if not words:
            return None
        assert self._tokenizer is not None
        found = spellings(words, self._tokenizer)
        # A model may lack tokens of its tokenizer.
        known = tuple(tokens for tokens in found if max(tokens) < self._vocab_size)
        return WordTable(known) if known else None


def _make(grammar: Grammar | None, words: WordTable | None) -> TokenConstraint | None:
    parts: list[TokenConstraint] = []
    if grammar is not None:
        parts.append(GrammarConstraint(grammar))
    if words is not None:
        parts.append(BadWords(words))
    if len(parts) == 2:
        return AllOf(parts)
    return parts[0] if parts else None


class Masks:
    """Which tokens may come next, of many rows at once: to be made, computed and completed.

    No constraint may change meanwhile.

    Args:
        constraints: of one engine, one a row; None allows all tokens.
        out: [rows, ceil(vocab / 32)] int32, contiguous, as in `restrict`; overwritten.
    """

    def __init__(self, constraints: Sequence[TokenConstraint | None], out: np.ndarray) -> None:
        grammars: list[tuple[int, GrammarConstraint]] = []
        self._out = out
        self._others: list[tuple[int, TokenConstraint]] = []
        for row, constraint in enumerate(constraints):
            parts = constraint.parts if isinstance(constraint, AllOf) else (constraint,)
            if isinstance(parts[0], GrammarConstraint):
                grammars.append((row, parts[0]))
                parts = parts[1:]
            else:
                out[row] = -1
            self._others += [(row, part) for part in parts if part is not None]
        self.of_grammars = GrammarMasks(grammars, out) if grammars else None

    def complete(self) -> None:
        """To be called when those of grammars are computed."""
        if self.of_grammars is not None:
            self.of_grammars.complete()
        for row, part in self._others:
            part.restrict(self._out[row])


def fill_masks(constraints: Sequence[TokenConstraint | None], out: np.ndarray) -> None:
    """Overwrite `out` with masks; see `Masks`."""
    masks = Masks(constraints, out)
    if masks.of_grammars is not None:
        masks.of_grammars.compute()
    masks.complete()


class MaskFiller:
    """Fills masks, those of grammars in a thread, while its caller goes on."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._pid = 0
        self._filling: tuple[Masks, Future[None] | None] | None = None

    def start(self, constraints: Sequence[TokenConstraint | None], out: np.ndarray) -> None:
        """Begin to fill `out`, see `Masks`."""
        masks = Masks(constraints, out)
        computing = None if masks.of_grammars is None else self._started(masks.of_grammars.compute)
        self._filling = masks, computing

    def finish(self) -> None:
        """Wait until they are filled. Without a start, and a second time, it does nothing."""
        if self._filling is not None:
            (masks, computing), self._filling = self._filling, None
            if computing is not None:
                computing.result()
            masks.complete()

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None and self._pid == os.getpid():
            self._pool.shutdown(wait=False)
        self._pool = None

    def _started(self, compute: Callable[[], None]) -> "Future[None] | None":
        """Of what frees the GIL soon; None if it is done."""
        if self._pool is None or self._pid != os.getpid():  # a fork has no threads
            self._pool, self._pid = ThreadPoolExecutor(1, "masks"), os.getpid()
        has_begun = threading.Event()

        def run() -> None:
            has_begun.set()
            compute()

        try:
            computing = self._pool.submit(run)
        except RuntimeError:  # the main thread has ended: no thread does anything for others
            compute()
            return None
        # Else the thread would not get the GIL as long as this one has something to do.
        has_begun.wait()
        return computing
