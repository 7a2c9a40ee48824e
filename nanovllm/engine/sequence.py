"""One request on its way through the engine."""

from enum import Enum, auto
from functools import cached_property

import numpy as np

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.outputs import PositionLogprobs
from nanovllm.sampling_params import SamplingParams


class SequenceStatus(Enum):
    """WAITING -> RUNNING -> FINISHED; preemption takes a sequence back from RUNNING to WAITING."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


class Sequence:
    """The tokens of one request, and how far the engine is with them.

    The scheduler works with lengths alone, so it may plan a step whose input is a token that the
    previous step has not delivered yet: such a token is counted in `num_pending_tokens`.

    Attributes:
        token_ids: prompt and generated tokens known so far.
        temperature: what logits are divided by; 0 is greedy.
        truncates: whether it samples by top_k, top_p or min_p.
        penalizes: whether its tokens so far change the logits of the next.
        logits_until: how many tokens it has when no more has to be done with its logits than to
            sample from them.
        num_pending_tokens: sampled by a launched step, not yet collected.
        num_computed_tokens: leading tokens whose keys and values a launched step has written or
            the prefix cache held.
        num_cached_tokens: how many prompt tokens the prefix cache held at first admission.
        max_len: prompt and generated tokens together never exceed this.
        block_table: KV blocks in token order.
        ending_token_ids: the model's end-of-sequence tokens and its own stop tokens; set when it is
            queued.
        finish_reason, stop_reason: see `outputs.CompletionOutput`.
        detokenizer: where the text is needed as it grows.
        logprobs: of the tokens generated so far, if asked for.
        prompt_logprobs: of the prompt's tokens as far as they are known, if asked for.
        first_token_time, finished_time: in seconds, by `time.time`.
    """

    def __init__(
        self,
        seq_id: int,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        max_len: int,
        seed: int,
    ) -> None:
        self.seq_id = seq_id
        self.status = SequenceStatus.WAITING
        self.token_ids = list(prompt_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.sampling_params = sampling_params
        self.temperature = sampling_params.usable_temperature
        self.truncates = sampling_params.truncates
        self.penalizes = sampling_params.penalizes
        self.max_len = max_len
        self.seed = seed
        self.num_pending_tokens = 0
        self.num_computed_tokens = 0
        self.num_cached_tokens: int | None = None
        self.block_table: list[int] = []
        self.ending_token_ids: frozenset[int] = frozenset()
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.detokenizer: Detokenizer | None = None
        self.logprobs: list[PositionLogprobs] = []
        wants_prompt = sampling_params.prompt_logprobs is not None
        self.prompt_logprobs: list[PositionLogprobs | None] = [None] if wants_prompt else []
        self.logits_until = self.num_prompt_tokens if wants_prompt else 0
        if sampling_params.logprobs is not None or sampling_params.edits_all_logits:
            self.logits_until = max_len
        elif sampling_params.min_tokens:
            self.logits_until = self.num_prompt_tokens + sampling_params.min_tokens - 1
        self.first_token_time = self.finished_time = 0.0

    @property
    def num_tokens(self) -> int:
        """Length in tokens, pending ones included."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def misses_prompt_logprobs(self) -> bool:
        """Whether its whole prompt has to be run, whatever the cache holds of it."""
        return 0 < len(self.prompt_logprobs) < self.num_prompt_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt_tokens]

    @cached_property
    def distinct_prompt_tokens(self) -> np.ndarray:
        """Sorted, [distinct tokens] int64."""
        return np.unique(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def ended_by_token(self) -> bool:
        """Whether an end-of-sequence or stop token ended it."""
        return self.finish_reason == "stop" and not isinstance(self.stop_reason, str)
