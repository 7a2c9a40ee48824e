"""From what a person asks for to sequences that the scheduler can queue, checked."""

import collections.abc
import random
import reprlib
import struct
import time
from array import array
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, TypeAlias

import numpy as np

from nanovllm.config import Config
from nanovllm.engine.constraints import ConstraintMaker, MakeConstraint, first_places
from nanovllm.engine.sequence import RowSampling, Sequence
from nanovllm.engine.tokenizer import Tokenizer, encode_many
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.validation import as_integer

# Text, or token ids, or a dict that has one of them as its only entry.
TokenIds: TypeAlias = collections.abc.Sequence[int]
Prompt: TypeAlias = str | TokenIds | collections.abc.Mapping[str, str | TokenIds]
Prompts: TypeAlias = Prompt | collections.abc.Sequence[Prompt]
Params: TypeAlias = SamplingParams | collections.abc.Sequence[SamplingParams | None] | None


@dataclass(slots=True)
class Request:
    """A prompt and its completions, a sequence each; the first one's id is the request's."""

    prompt: str | None  # None if it came as token ids
    sequences: list[Sequence]
    arrival_time: float  # by `time.time`

    @property
    def request_id(self) -> int:
        return self.sequences[0].seq_id


def prompt_list(prompts: Prompts | None) -> list[Prompt]:
    """One prompt or many -> a list of prompts. What begins with a number is one prompt. Any
    sequence will do: a list, an array, a column of a table.

    Raises:
        TypeError: for something else.
    """
    if isinstance(prompts, (str, collections.abc.Mapping)):
        return [prompts]
    prompts = _as_list(prompts)
    if not isinstance(prompts, list):
        raise TypeError(
            "prompts must be a string, a list of token ids, or a list of these, got "
            f"{reprlib.repr(prompts)}"
        )
    is_many = not prompts or hasattr(prompts[0], "__len__")
    return prompts if is_many else [prompts]


def params_list(params: Params, num_prompts: int) -> list[SamplingParams]:
    """One for each prompt; None stands for the defaults.

    Raises:
        TypeError, ValueError: for something else, or a wrong number of them.
    """
    many: list[Any] = [params]
    if is_list := isinstance(params, (list, tuple)):
        many = list(params)
    if is_list and len(many) != num_prompts:
        raise ValueError(
            f"{num_prompts} prompts need as many sampling_params (or a single one for all), got "
            f"{len(many)}"
        )
    for index, one in enumerate(many):
        if one is not None and not isinstance(one, SamplingParams):
            raise TypeError(f"prompt {index}: sampling_params must be SamplingParams, got {one!r}")
    checked = [SamplingParams() if one is None else one.checked() for one in many]
    return checked if is_list else checked * num_prompts


def nth_seed(seed: int, index: int) -> int:
    """The seed of a completion, 64 bits as a signed integer: the first has the request's. Another
    has a hash of that and its index, the output number `index` of SplitMix64 (Steele, Lea and Flood
    2014, doi:10.1145/2660193.2660195), so that requests of neighbouring seeds share none."""
    z = seed
    if index > 0:
        z = (seed + index * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        z ^= z >> 31
    return (z + 2**63) % 2**64 - 2**63


class InputProcessor:
    """Checks prompts and parameters against the model, and makes requests of them.

    Args:
        config: the engine's options.
        tokenizer: transformers' tokenizer, or None if the checkpoint has none.
        eos_token_ids: the model's.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer | None,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.vocab_size = config.model_config.vocab_size
        self._constraints = ConstraintMaker(tokenizer, eos_token_ids, self.vocab_size)
        self._ids = count()
        self._seeds = random.Random(config.seed)

    def process(self, prompts: list[Prompt], params: list[SamplingParams]) -> list[Request]:
        """Check every prompt with its parameters before any becomes a request.

        Raises:
            TypeError, ValueError: for one that cannot work, by its place in the list.
            ImportError: for structured outputs without their library.
        """
        contents = [_unwrapped(prompt, index) for index, prompt in enumerate(prompts)]
        encoded = self._encode_texts(contents)
        token_ids = [
            self._token_ids(content, index, encoded.get(index))
            for index, content in enumerate(contents)
        ]
        sampling = {}
        for name, index in first_places(params).items():
            try:
                self._check_params(params[index])
            except ValueError as error:
                raise ValueError(f"prompt {index}: {error}") from None
            sampling[name] = RowSampling.of(params[index], self.eos_token_ids)
        packed = self._packed(token_ids)
        makers = self._constraints.prepare(params)
        now = time.time()
        return [
            Request(
                content if isinstance(content, str) else None,
                self._sequences(ids, param, sampling[id(param)], make_constraint), now,
            )
            for content, ids, param, make_constraint in zip(contents, packed, params, makers)
        ]  # fmt: skip

    def _encode_texts(self, contents: list[str | TokenIds]) -> dict[int, list[int] | None]:
        """The tokens of the prompts that are text, by their place; None: encode it by itself."""
        texts = {place: one for place, one in enumerate(contents) if isinstance(one, str) and one}
        return dict(zip(texts, encode_many(self.tokenizer, [*texts.values()]), strict=True))

    def _sequences(
        self,
        token_ids: array,
        params: SamplingParams,
        sampling: RowSampling,
        make_constraint: MakeConstraint,
    ) -> list[Sequence]:
        drawn = self._seeds.getrandbits(63)  # in any case: seeds of later requests stay the same
        seed = drawn if params.seed is None else params.seed
        max_len = self.config.max_model_len
        if params.max_tokens is not None:
            max_len = min(max_len, len(token_ids) + params.max_tokens)
        sequences = []
        for index in range(params.n):
            # The first one reports the prompt's log probabilities for all.
            own = params if index == 0 else replace(params, prompt_logprobs=None)
            own_seed = nth_seed(seed, index)
            sequences.append(
                Sequence(
                    next(self._ids), token_ids, own, max_len, own_seed, self.eos_token_ids,
                    make_constraint(), sampling,
                )
            )  # fmt: skip
        return sequences

    def _check_params(self, params: SamplingParams) -> None:
        """What cannot be known without the model."""
        vocab_size = self.vocab_size
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            for token_id in getattr(params, name) or ():
                if not 0 <= token_id < vocab_size:
                    raise ValueError(
                        f"{name} has token id {token_id}, outside the vocabulary of {vocab_size}"
                    )
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(params, name) or 0) > vocab_size:
                raise ValueError(
                    f"{name} must be at most the vocabulary of {vocab_size}, got "
                    f"{getattr(params, name)}"
                )
        if params.stop and self.tokenizer is None:
            raise ValueError(
                f"stop needs text, and {self.config.model_dir} has no tokenizer: use stop_token_ids"
            )
        if params.min_tokens:
            allowed = params.allowed_token_ids or range(vocab_size)
            if self.eos_token_ids.union(params.stop_token_ids or ()).issuperset(allowed):
                raise ValueError(
                    "min_tokens leaves no token to sample: all of allowed_token_ids, or of the "
                    "vocabulary, end the request"
                )

    def _token_ids(self, prompt: str | TokenIds, index: int, encoded: list[int] | None) -> TokenIds:
        """The tokens of a prompt, as many as the model takes; `encoded` are those of a text, if
        they are known."""
        name = f"prompt {index}"
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"{name} is a string, and {self.config.model_dir} has no tokenizer: pass token "
                    "ids, or add the checkpoint's tokenizer files"
                )
            try:
                token_ids: TokenIds = self.tokenizer.encode(prompt) if encoded is None else encoded
            except (TypeError, UnicodeError) as error:
                raise ValueError(f"{name} is not valid Unicode text: {error}") from error
        elif isinstance(prompt, (list, tuple)):
            token_ids = prompt
        else:
            raise TypeError(
                f"{name} must be a string or a list of token ids, got {reprlib.repr(prompt)}"
            )
        if not token_ids:
            raise ValueError(f"{name} is empty: it needs at least one token")
        if len(token_ids) >= self.config.max_model_len:
            raise ValueError(
                f"{name} has {len(token_ids)} tokens, and at most {self.config.max_model_len - 1} "
                f"fit (max_model_len={self.config.max_model_len}, the model's positions and the KV "
                "cache considered, must hold it and one token more): shorten it, or raise "
                "max_model_len or num_kvcache_blocks if the model allows"
            )
        return token_ids

    def _packed(self, prompts: list[TokenIds]) -> list[array]:
        """Each prompt's token ids as `Sequence` has them, checked: integers, of the vocabulary.

        A look at each token takes 0.5 us, so all are checked at once, and one by one only those
        that may be wrong.
        """
        packed = []
        for index, token_ids in enumerate(prompts):
            try:  # struct is twice as fast as array; it takes integers alone, but True as 1
                packed.append(array("I", struct.pack(f"{len(token_ids)}I", *token_ids)))
            except (struct.error, TypeError, OverflowError):
                for place, token_id in enumerate(token_ids):
                    self._check_token(token_id, index, place)
                raise
        values = np.frombuffer(b"".join(packed), np.uint32)
        starts = np.cumsum([0, *map(len, packed)])
        maybe_wrong = np.flatnonzero((values <= 1) | (values >= self.vocab_size))
        indices = np.searchsorted(starts, maybe_wrong, side="right") - 1
        places = maybe_wrong - starts[indices]
        for index, place in zip(indices.tolist(), places.tolist()):
            token_id = prompts[index][place]
            if token_id > 1 or type(token_id) is not int:
                self._check_token(token_id, index, place)
        return packed

    def _check_token(self, token_id: int, index: int, place: int) -> None:
        if not 0 <= as_integer(f"prompt {index}, token {place}", token_id) < self.vocab_size:
            raise ValueError(
                f"prompt {index} has token id {token_id}, outside the vocabulary of "
                f"{self.vocab_size}"
            )


def _as_list(value: Any) -> Any:
    """A list of what a sequence has: a tuple, a NumPy array, a column of pandas or datasets."""
    if isinstance(value, list):
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    is_sequence = hasattr(value, "__len__") and hasattr(value, "__getitem__")
    is_text = isinstance(value, (str, bytes, collections.abc.Mapping))
    return list(value) if is_sequence and not is_text else value


def _unwrapped(prompt: Prompt, index: int) -> str | TokenIds:
    """What a dict stands for: its token ids if it has any, else its text. Entries of None do not
    count."""
    if type(prompt) in (list, str):  # mostly; whether it is a mapping takes longer to find out
        return prompt  # type: ignore[return-value]
    if not isinstance(prompt, collections.abc.Mapping):
        return _as_list(prompt)
    given = {key: value for key, value in prompt.items() if value is not None}
    token_ids = _as_list(given.get("prompt_token_ids"))
    others = given.keys() - {"prompt", "prompt_token_ids"}
    if not others and isinstance(token_ids, list):
        return token_ids
    if not others and token_ids is None and isinstance(given.get("prompt"), str):
        return given["prompt"]
    raise ValueError(
        f"prompt {index} must have a string as 'prompt' or a list as 'prompt_token_ids', and "
        f"nothing else, got {reprlib.repr(prompt)}"
    )
