"""One request on its way through the engine."""

from enum import Enum, auto

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
        num_pending_tokens: sampled by a launched step, not yet collected.
        num_computed_tokens: leading tokens whose keys and values a launched step has written or
            the prefix cache held.
        num_cached_tokens: how many prompt tokens the prefix cache held at first admission.
        max_len: prompt and generated tokens together never exceed this.
        block_table: KV blocks in token order.
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
        self.max_len = max_len
        self.seed = seed
        self.num_pending_tokens = 0
        self.num_computed_tokens = 0
        self.num_cached_tokens: int | None = None
        self.block_table: list[int] = []
        self.finish_reason: str | None = None

    @property
    def num_tokens(self) -> int:
        """Length in tokens, pending ones included."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def is_finished(self) -> bool:
        return self.status is SequenceStatus.FINISHED

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]
