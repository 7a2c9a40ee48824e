"""From what a person asks for to sequences that the scheduler can queue, checked."""

import random
import reprlib
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import count

from nanovllm.config import Config
from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.validation import as_integer

# Text, or a list or tuple of token ids, or a dict that has one of them as its only entry.
Prompt = str | Collection[int] | dict[str, str | Collection[int]]


@dataclass
class Request:
    """A prompt and its completions, a sequence each; the first one's id is the request's."""

    prompt: str | None  # None if it came as token ids
    sequences: list[Sequence]
    arrival_time: float  # by `time.time`

    @property
    def request_id(self) -> int:
        return self.sequences[0].seq_id


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
        eos_token_ids: set[int],
    ) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self._ids = count()
        self._seeds = random.Random(config.seed)

    def process(
        self, prompts: list[Prompt], params: SamplingParams | Collection[SamplingParams] | None
    ) -> list[Request]:
        """Check every prompt with its parameters before any becomes a request.

        Raises:
            TypeError, ValueError: for one that cannot work, by its place in the list.
        """
        if not isinstance(params, (list, tuple)):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts need as many sampling_params (or a single one for all), "
                f"got {len(params)}"
            )
        checked = []
        for index, (prompt, param) in enumerate(zip(prompts, params)):
            name, param = f"prompt {index}", SamplingParams() if param is None else param
            prompt = _unwrapped(prompt, name)
            if not isinstance(param, SamplingParams):
                raise TypeError(f"{name}: sampling_params must be SamplingParams, got {param!r}")
            token_ids = self._token_ids(prompt, name)
            try:
                self._check_params(param)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            checked.append((prompt if isinstance(prompt, str) else None, token_ids, param))
        now = time.time()
        return [Request(text, self._sequences(ids, param), now) for text, ids, param in checked]

    def detokenizer(self, params: SamplingParams) -> Detokenizer:
        """A new one for a sequence with such parameters. There must be a tokenizer."""
        return Detokenizer(
            self.tokenizer, params.skip_special_tokens, params.stop,
            params.include_stop_str_in_output,
        )  # fmt: skip

    def _sequences(self, token_ids: list[int], params: SamplingParams) -> list[Sequence]:
        drawn = self._seeds.getrandbits(63)
        seed = drawn if params.seed is None else params.seed
        max_len = self.config.max_model_len
        if params.max_tokens is not None:
            max_len = min(max_len, len(token_ids) + params.max_tokens)
        sequences = []
        for index in range(params.n):
            # What is said of the prompt, the first one says for all.
            own = params if index == 0 else replace(params, prompt_logprobs=None)
            signed = (seed + index + 2**63) % 2**64 - 2**63  # the same 64 bits as an int64
            seq = Sequence(next(self._ids), token_ids, own, max_len, signed)
            if params.stop:
                seq.detokenizer = self.detokenizer(params)
            sequences.append(seq)
        return sequences

    def _check_params(self, params: SamplingParams) -> None:
        """What cannot be known without the model."""
        vocab_size = self.config.hf_config.vocab_size
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
            if self.eos_token_ids.union(params.stop_token_ids).issuperset(allowed):
                raise ValueError(
                    "min_tokens leaves no token to sample: all of allowed_token_ids, or of the "
                    "vocabulary, end the request"
                )

    def _token_ids(self, prompt: Prompt, name: str) -> list[int]:
        """The tokens of a prompt, checked against the model."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(
                    f"{name} is a string, and {self.config.model_dir} has no tokenizer: pass token "
                    "ids, or add the checkpoint's tokenizer files"
                )
            try:
                token_ids = self.tokenizer.encode(prompt)
            except (TypeError, UnicodeError) as error:
                raise ValueError(f"{name} is not valid Unicode text: {error}") from error
        elif isinstance(prompt, (list, tuple)):
            token_ids = list(prompt)
            if set(map(type, token_ids)) != {int}:  # one by one takes 0.5 us a token
                token_ids = [as_integer(f"{name}, token {i}", t) for i, t in enumerate(prompt)]
        else:
            raise TypeError(
                f"{name} must be a string or a list of token ids, got {reprlib.repr(prompt)}"
            )
        if not token_ids:
            raise ValueError(f"{name} is empty: it needs at least one token")
        vocab_size = self.config.hf_config.vocab_size
        for token_id in (min(token_ids), max(token_ids)):
            if not 0 <= token_id < vocab_size:
                raise ValueError(
                    f"{name} has token id {token_id}, outside the vocabulary of {vocab_size}"
                )
        if len(token_ids) >= self.config.max_model_len:
            raise ValueError(
                f"{name} has {len(token_ids)} tokens, and at most {self.config.max_model_len - 1} "
                f"fit (max_model_len={self.config.max_model_len}, the model's positions and the KV "
                "cache considered, must hold it and one token more): shorten it, or raise "
                "max_model_len or num_kvcache_blocks if the model allows"
            )
        return token_ids


def _unwrapped(prompt: Prompt, name: str) -> str | Collection[int]:
    """What a dict stands for, by its key."""
    if not isinstance(prompt, dict):
        return prompt
    for key, kind in (("prompt", str), ("prompt_token_ids", (list, tuple))):
        if [*prompt] == [key] and isinstance(prompt[key], kind):
            return prompt[key]
    raise ValueError(
        f"{name} must have a string as 'prompt' or a list as 'prompt_token_ids', and nothing else, "
        f"got {reprlib.repr(prompt)}"
    )
