"""One completion of a request on its way through the engine."""

from array import array
from collections.abc import Collection, Iterable
from enum import Enum, auto
from typing import NamedTuple

from nanovllm.engine.constraints import TokenConstraint
from nanovllm.engine.logit_edits import LogitEdits
from nanovllm.outputs import PositionLogprobs
from nanovllm.sampling_params import SamplingParams


class SequenceStatus(Enum):
    """WAITING -> RUNNING -> FINISHED. Preemption takes a sequence back from RUNNING to WAITING, and
    an abort, or a last token that was in flight, finishes it from there, too."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class RowSampling(NamedTuple):
    """What a step has to do for the row of a sequence with some parameters.

    Attributes:
        temperature: what logits are divided by; 0 is greedy.
        top_k, top_p, min_p: 0, 1 and 0 are off.
        truncates: whether one of these three is on.
        edits: what is changed in the logits first; None: nothing.
        logprobs: report the token's log probability and so many of the most likely ones; None: no.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    truncates: bool
    edits: LogitEdits | None
    logprobs: int | None

    @classmethod
    def of(cls, params: SamplingParams, eos_token_ids: Collection[int]) -> "RowSampling":
        """By a request's parameters, and the model's end-of-sequence tokens."""
        return cls(
            params.effective_temperature, min(params.top_k, 2**31 - 1), params.top_p, params.min_p,
            params.truncates, LogitEdits.of(params, eos_token_ids), params.logprobs,
        )  # fmt: skip


class Sequence:
    """The tokens of one completion, and how far the engine is with them.

    The scheduler works with lengths alone, so it may plan a step whose input is a token that the
    previous step has not delivered yet: such a token is counted in `num_pending_tokens`.

    Args:
        seq_id: no other sequence has it.
        prompt_token_ids: at least one.
        sampling_params: of the request.
        max_len: prompt and generated tokens together never exceed this.
        seed: of its random choices, 64 bits as a signed integer.
        eos_token_ids: the model's end-of-sequence tokens.
        constraint: which tokens may come next, besides what the parameters allow; None: any.
        sampling: what a step has to do for its row, if that is known for these parameters.

    Attributes:
        token_ids: prompt and generated tokens known so far. An `array("I")`, since bytes are copied
            and hashed faster than Python's integers.
        seed, sampling: as given, or what follows from the parameters.
        has_wishes: whether it has edits or a constraint, or wants log probabilities.
        ending_token_ids: the tokens that end it: those of `eos_token_ids` silently, the others as
            its `stop_reason`.
        num_pending_tokens: that a planned step will sample, or has, and that are not collected.
        num_computed_tokens: leading tokens whose keys and values a planned step writes, or the
            prefix cache held.
        has_siblings: whether its prompt has other completions.
        num_found_tokens: leading tokens whose keys and values are not stored again, since the
            prefix cache held them when it was admitted.
        num_cached_tokens: how many prompt tokens the prefix cache held at first admission; None
            before it.
        block_table: KV blocks in token order.
        finish_reason, stop_reason: see `outputs.CompletionOutput`.
        logprobs: of the tokens generated so far, if asked for.
        prompt_logprobs: of the prompt's tokens as far as they are known, if asked for.
        first_token_time, finished_time: in seconds, by `time.time`.
    """

    def __init__(
        self,
        seq_id: int,
        prompt_token_ids: Iterable[int],
        sampling_params: SamplingParams,
        max_len: int,
        seed: int,
        eos_token_ids: Collection[int] = (),
        constraint: TokenConstraint | None = None,
        sampling: RowSampling | None = None,
    ) -> None:
        params = sampling_params
        self.seq_id = seq_id
        self.status = SequenceStatus.WAITING
        self.token_ids = array("I", prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.has_siblings = params.n > 1
        self.sampling_params = params
        self.max_len = max_len
        self.constraint = constraint
        self.eos_token_ids = frozenset(() if params.ignore_eos else eos_token_ids)
        self.ending_token_ids = self.eos_token_ids
        if params.stop_token_ids:
            self.ending_token_ids = self.eos_token_ids.union(params.stop_token_ids)
        self.seed = seed
        self.sampling = own = sampling or RowSampling.of(params, eos_token_ids)
        self.has_wishes = (own.edits, own.logprobs, constraint) != (None, None, None)
        self.num_pending_tokens = 0
        self.num_computed_tokens = 0
        self.num_found_tokens = 0
        self.num_cached_tokens: int | None = None
        self.block_table: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.logprobs: list[PositionLogprobs] = []
        wants_prompt_logprobs = params.prompt_logprobs is not None
        # The first token has none: nothing comes before it.
        self.prompt_logprobs: list[PositionLogprobs | None] = [None] * wants_prompt_logprobs
        self.first_token_time = self.finished_time = 0.0

    @property
    def num_tokens(self) -> int:
        """Length in tokens, pending ones included."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_generated(self) -> int:
        """Generated tokens that are known."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def needs_prompt_logprobs(self) -> bool:
        """Whether its whole prompt has to be run, whatever the prefix cache holds of it."""
        return 0 < len(self.prompt_logprobs) < self.num_prompt_tokens

    @property
    def is_ending(self) -> bool:
        """Whether its last token is on the way: the one that reaches `max_len`. No step has a row
        for it any more."""
        return self.num_computed_tokens + 1 >= self.max_len

    @property
    def is_running(self) -> bool:
        return self.status is SequenceStatus.RUNNING

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt_tokens].tolist()

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :].tolist()

    @property
    def ended_by_token(self) -> bool:
        """Whether an end-of-sequence or stop token ended it."""
        return self.finish_reason == "stop" and not isinstance(self.stop_reason, str)
