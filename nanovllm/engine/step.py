"""What a step is to do for its rows, and what it yields."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from nanovllm.engine.scheduler import Batch
from nanovllm.engine.step_inputs import StepShape
from nanovllm.layers.edit_tables import SlotContents
from nanovllm.layers.logprobs import Logprobs


class PromptSpan(NamedTuple):
    """Tokens of a row's prompt whose log probabilities a prefill step finds.

    Attributes:
        row: of the batch.
        num_top: how many of the most likely tokens are reported with each.
        first_kept: where their logits begin, among the tokens of the step that are kept.
        position: of the first of them in the sequence: one after the first input token.
        token_ids: these tokens.
    """

    row: int
    num_top: int
    first_kept: int
    position: int
    token_ids: list[int]


class PromptLogprobs(NamedTuple):
    """What is to be found of prompts: of which of the step's tokens logits are kept, and for which
    spans; and where each row's last token is among those kept."""

    kept: list[int]
    last: list[int]
    spans: list[PromptSpan]


class Step(NamedTuple):
    """All that there is to know of a step, besides the inputs in a host buffer.

    Attributes:
        shape: of the inputs, padding included.
        rows: of the batch.
        buffer_index: the host buffer that holds the inputs, and the one that gets the tokens.
        num_words: of the inputs.
        slot_contents: what is written to `EditTables` first.
        has_late_rows: whether some rows may be sampled once more: see `LateRows`.
        num_top: by row, of those that want the log probabilities of their token and of the most
            likely ones: how many of these.
        prompt_logprobs: None if no row wants any.
    """

    shape: StepShape
    rows: int
    buffer_index: int
    num_words: int
    slot_contents: list[SlotContents]
    has_late_rows: bool
    num_top: dict[int, int]
    prompt_logprobs: PromptLogprobs | None


class LateRows(NamedTuple):
    """Rows of a step that are sampled once more, when the tokens before are known on the host.

    Attributes:
        rows: of the batch; each has a mask, in this order.
        newest: the token that came last in each.
    """

    rows: list[int]
    newest: list[int]


@dataclass
class PendingStep:
    """A step that was launched. On a GPU, what it yields may be read after `done`.

    Attributes:
        step: it.
        token_ids: [rows] int64, on the host.
        logits: [rows, vocab], padding included, as long as rows may be sampled once more.
        done: None on a CPU, where the step has been computed.
        logprobs: (rows, log probabilities of the tokens just sampled there).
        prompt_logprobs: (row, position of the first token, log probabilities of tokens of the
            row's prompt).
    """

    step: Step
    token_ids: torch.Tensor
    logits: torch.Tensor | None = None
    done: torch.cuda.Event | None = None
    logprobs: list[tuple[list[int], Logprobs]] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, int, Logprobs]] = field(default_factory=list)

    @property
    def is_done(self) -> bool:
        """Whether the device has computed it."""
        return self.done is None or self.done.query()


def prompt_logprobs(batch: Batch) -> PromptLogprobs | None:
    """Of rows that want log probabilities of their prompt the logits of all tokens are kept, of the
    others those of the last one.

    With a row of 3 such tokens and one of 2 that wants none, tokens 0, 1, 2 and 4 are kept, and 2
    and 3 of these are the rows' last ones.
    """
    if not batch.is_prefill or not any(seq.needs_prompt_logprobs for seq in batch.seqs):
        return None
    found = PromptLogprobs([], [], [])
    first = 0  # token of the row, among the step's
    for row, seq in enumerate(batch.seqs):
        start, length = batch.starts[row], batch.lengths[row]
        num_tokens = min(length, seq.num_prompt_tokens - 1 - start)
        num_top = seq.sampling_params.prompt_logprobs
        if seq.needs_prompt_logprobs and num_top is not None and num_tokens > 0:
            token_ids = seq.token_ids[start + 1 : start + 1 + num_tokens].tolist()
            found.spans.append(PromptSpan(row, num_top, len(found.kept), start + 1, token_ids))
            found.kept.extend(range(first, first + num_tokens))
        first += length
        found.kept.append(first - 1)
        found.last.append(len(found.kept) - 1)
    return found
