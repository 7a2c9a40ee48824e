"""What a single request may ask of the sampler."""

import math
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, replace
from typing import TYPE_CHECKING, Any

from nanovllm.structured_outputs import StructuredOutputsParams
from nanovllm.utils.validation import as_integer, as_number

if TYPE_CHECKING:
    from typing_extensions import Self

# Dividing by a smaller temperature could overflow. Above the largest, all tokens are equally likely
# in float32 anyway.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-5, 1e30
MAX_N = 16384


# vLLM's other parameters: what says what is the case anyway, and what to do about the rest.
_OTHERS: dict[str, tuple[tuple[object, ...], str]] = {
    "best_of": ((), "sample n completions, and choose among them by cumulative_logprob"),
    "use_beam_search": ((False,), "beam search is not served"),
    "length_penalty": ((1, 1.0), "beam search is not served"),
    "early_stopping": ((False,), "beam search is not served"),
    "detokenize": ((True,), "LLM(skip_tokenizer_init=True) makes no text"),
    "spaces_between_special_tokens": ((True,), "it is always True"),
    "logits_processors": ((), "see logit_bias and allowed_token_ids"),
    "guided_decoding": ((), "give structured_outputs=StructuredOutputsParams(...)"),
    "truncate_prompt_tokens": ((), "cut the prompt's token ids before"),
    "extra_args": ((), "leave it out"),
}


@dataclass(kw_only=True)
class SamplingParams:
    """How the tokens of one request are chosen, when it ends, and what comes back.

    Names, defaults and meanings are vLLM's, except that `max_tokens` is 64. What vLLM has besides
    is taken where it is None, empty, or what is the case. Fields may be assigned between requests,
    and are checked again when they are used. Applied in this order: `allowed_token_ids`,
    `min_tokens` and `logit_bias`, then the penalties, `temperature`, `min_p`, `top_k`, `top_p`.

    Attributes:
        temperature: logits are divided by it before sampling; 0 picks the most likely token
            (greedy), and so does anything below 1e-5.
        top_k: sample from the `top_k` most likely tokens; 0 or -1 from all.
        top_p: sample from the fewest most likely tokens whose probabilities add up to `top_p`.
        min_p: sample from tokens at least `min_p` times as likely as the most likely one.
        max_tokens: the most tokens to generate, at least 1; None: up to the engine's max_model_len.
        min_tokens: no end-of-sequence or stop token, and no stop string, before so many tokens.
        ignore_eos: go on to `max_tokens` even when the model says that it is done.
        stop: a string, or several, that end the request; cut from the text. One that has a special
            token in it, "42<|im_end|>" say, is found even where special tokens are skipped.
        include_stop_str_in_output: leave it in the text, as a whole: special tokens in it stay,
            too, whatever `skip_special_tokens` says. A token that ends the request stays as well,
            unless it is a special one that is skipped.
        stop_token_ids: tokens that end the request.
        seed: makes the request's random choices repeatable, whatever else runs beside it; any
            integer of 64 bits. None, or -1, draws one from the engine's own seed. Of `n`
            completions the first has this seed, and the others a hash of it and their index.
        logprobs: return the log probability of each token and of so many most likely ones.
        prompt_logprobs: the same for the tokens of the prompt.
        n: how many completions of the prompt to sample.
        presence_penalty: taken off the logit of each token generated before, -2 to 2.
        frequency_penalty: the same, times how often it was generated, -2 to 2.
        repetition_penalty: divides the positive logit, and multiplies the negative one, of each
            token of the prompt or generated before; 1e-5 to 1e5, 1 does nothing.
        logit_bias: added to the logits of these tokens, limited to -100 to 100.
        allowed_token_ids: no other token is sampled.
        bad_words: no token is sampled that would complete one of these strings, as the tokenizer
            spells it at the start of a text or after a space.
        structured_outputs: what the whole text must be, or a dict of its fields. An ended structure
            cannot go on, so not with `min_tokens` or `ignore_eos`.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        TypeError, ValueError: for a value that cannot work, naming the parameter.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int | None = 64
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: str | list[str] | tuple[str, ...] | None = None
    include_stop_str_in_output: bool = False
    stop_token_ids: list[int] | tuple[int, ...] | None = None
    seed: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: list[int] | tuple[int, ...] | None = None
    bad_words: str | list[str] | tuple[str, ...] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    skip_special_tokens: bool = True

    best_of: InitVar[Any] = None
    use_beam_search: InitVar[Any] = None
    length_penalty: InitVar[Any] = None
    early_stopping: InitVar[Any] = None
    detokenize: InitVar[Any] = None
    spaces_between_special_tokens: InitVar[Any] = None
    logits_processors: InitVar[Any] = None
    guided_decoding: InitVar[Any] = None
    truncate_prompt_tokens: InitVar[Any] = None
    extra_args: InitVar[Any] = None

    def __post_init__(self, *others: Any) -> None:
        for (name, (values, way_out)), value in zip(_OTHERS.items(), others, strict=True):
            if value is None:
                continue
            is_nothing = isinstance(value, (list, tuple, dict)) and not value
            is_n = name == "best_of" and value == self.n
            if not (is_nothing or is_n or value in values):
                raise ValueError(f"{name}={value!r}: {way_out}")
        self._number("temperature", 0, what="0 (greedy) or above")
        self._number("top_p", 0, 1, what="above 0 and at most 1")
        if self.top_p == 0:
            raise ValueError("top_p must be above 0 and at most 1, got 0; temperature=0 is greedy")
        self._number("min_p", 0, 1, what="0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            self._number(name, -2, 2, what="-2 to 2")
        self._number("repetition_penalty", 1e-5, 1e5, what="1e-5 to 1e5 (1 does nothing)")
        self._integer("top_k", at_least=-1)
        self._set("top_k", max(self.top_k, 0))
        self._integer("max_tokens", at_least=1, optional=True)
        self._integer("min_tokens", at_least=0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}"
            )
        self._integer("logprobs", at_least=0, optional=True)
        self._integer("prompt_logprobs", at_least=0, optional=True)
        self._integer("n", at_least=1)
        if self.n > MAX_N:
            raise ValueError(f"n must be at most {MAX_N}, got {self.n}")
        self._integer("seed", at_least=-(2**63), optional=True)
        if self.seed == -1:
            self._set("seed", None)
        if self.seed is not None and self.seed >= 2**64:
            raise ValueError(f"seed must fit in 64 bits, got {self.seed}")
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._set("stop", self._strings("stop"))
        self._set("stop_token_ids", self._token_ids("stop_token_ids"))
        if self.allowed_token_ids is not None:
            self._set("allowed_token_ids", self._token_ids("allowed_token_ids"))
            if not self.allowed_token_ids:
                raise ValueError("allowed_token_ids is empty: no token could be sampled")
        if self.logit_bias is not None:
            self._set("logit_bias", self._bias())
        self._set("bad_words", self._strings("bad_words"))
        for word in self.bad_words or ():
            if not word.strip():
                raise ValueError(f"bad_words has {word!r}, which is only space: see logit_bias")
        self._structure()
        self._checked = dict(vars(self))

    @property
    def effective_temperature(self) -> float:
        """The temperature, such that float32 logits can be divided by it; 0 for greedy."""
        too_small = self.temperature < MIN_TEMPERATURE
        return 0.0 if too_small else min(self.temperature, MAX_TEMPERATURE)

    @property
    def truncates(self) -> bool:
        """Whether `top_k`, `top_p` or `min_p` may cut tokens off."""
        is_on = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return is_on and self.effective_temperature > 0

    @property
    def penalizes(self) -> bool:
        """Whether the tokens so far change the logits of the next."""
        return self.penalties != (1, 0, 0)

    @property
    def penalties(self) -> tuple[float, float, float]:
        """Repetition, presence and frequency penalty."""
        return self.repetition_penalty, self.presence_penalty, self.frequency_penalty

    def clone(self) -> "Self":
        """A copy, checked anew."""
        return replace(self)

    def checked(self) -> "Self":
        """These, or a checked copy if a field was assigned since.

        Raises:
            TypeError, ValueError: for a value that cannot work.
        """
        is_as_checked = vars(self) == {**self._checked, "_checked": self._checked}
        return self if is_as_checked else self.clone()

    def is_below_min_tokens(self, num_generated: int) -> bool:
        """Whether after so many generated tokens nothing may end the request yet."""
        return num_generated < self.min_tokens

    def _set(self, name: str, value: Any) -> None:
        setattr(self, name, value)

    def _number(self, name: str, low: float, high: float = math.inf, *, what: str) -> None:
        value = as_number(name, getattr(self, name))
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(f"{name} must be a finite number, {what}, got {value}")
        self._set(name, value)

    def _integer(self, name: str, at_least: int, optional: bool = False) -> None:
        if optional and getattr(self, name) is None:
            return
        value = as_integer(name, getattr(self, name))
        if value < at_least:
            raise ValueError(f"{name} must be at least {at_least}, got {value}")
        self._set(name, value)

    def _strings(self, name: str) -> tuple[str, ...]:
        value = getattr(self, name)
        strings = [value] if isinstance(value, str) else [] if value is None else value
        if not isinstance(strings, (list, tuple)) or not all(isinstance(s, str) for s in strings):
            raise TypeError(f"{name} must be a string or a list of strings, got {value!r}")
        if "" in strings:
            raise ValueError(f"{name} has an empty string, which is everywhere")
        return tuple(strings)

    def _structure(self) -> None:
        value: Any = self.structured_outputs
        if value is None:
            return
        if isinstance(value, Mapping):
            try:
                self._set("structured_outputs", StructuredOutputsParams(**value))
            except TypeError as error:
                raise TypeError(f"structured_outputs: {error}") from error
        elif not isinstance(value, StructuredOutputsParams):
            raise TypeError(
                f"structured_outputs must be StructuredOutputsParams or a dict, got {value!r}"
            )
        if self.min_tokens or self.ignore_eos:
            name = "min_tokens" if self.min_tokens else "ignore_eos"
            raise ValueError(f"{name} with structured_outputs: an ended structure cannot go on")

    def _token_ids(self, name: str) -> tuple[int, ...]:
        value = getattr(self, name)
        if value is None:
            return ()
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{name} must be a list of token ids, got {value!r}")
        return tuple(
            dict.fromkeys(as_integer(f"{name}, entry {i}", t) for i, t in enumerate(value))
        )

    def _bias(self) -> dict[int, float]:
        if not isinstance(self.logit_bias, Mapping):
            raise TypeError(f"logit_bias must map token ids to numbers, got {self.logit_bias!r}")
        biases = {}
        for token_id, value in self.logit_bias.items():
            number = as_number(f"logit_bias of token {token_id}", value)
            if not math.isfinite(number):
                raise ValueError(f"logit_bias of token {token_id} must be finite, got {number}")
            biases[as_integer("logit_bias, key", token_id)] = max(-100.0, min(100.0, number))
        return biases
