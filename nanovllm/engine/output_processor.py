"""From finished sequences to what the person gets."""

from transformers import PreTrainedTokenizerBase

from nanovllm.engine.input_processor import Request
from nanovllm.engine.model_runner import Launch
from nanovllm.engine.outputs import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
)
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.sequence import Sequence
from nanovllm.layers.sampler import Logprobs


class OutputProcessor:
    """Text, log probabilities and metrics of requests.

    Args:
        tokenizer: transformers' tokenizer, or None if the checkpoint has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tokenizer = tokenizer

    def take_logprobs(self, batch: Batch, launch: Launch, token_ids: list[int]) -> None:
        """Note what a step, whose tokens are known, has found. To be called before the scheduler
        takes the tokens in."""
        for row, (position, logprobs) in launch.prompt_logprobs.items():
            seq = batch.seqs[row]
            end = position + len(logprobs.ranks)
            entries = self._entries(seq.token_ids[position:end], logprobs)
            seq.prompt_logprobs[position:end] = entries
        for row, logprobs in launch.logprobs.items():
            seq = batch.seqs[row]
            if not seq.is_finished:  # or else the token is discarded
                seq.logprobs += self._entries([token_ids[row]], logprobs)

    def output(self, request: Request) -> RequestOutput:
        """Of a request whose sequences have all finished."""
        completions = [self._completion(i, seq) for i, seq in enumerate(request.sequences)]
        first = request.sequences[0]
        has_prompt_logprobs = first.sampling_params.prompt_logprobs is not None
        return RequestOutput(
            **completions[0],
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=first.prompt_token_ids,
            prompt_logprobs=first.prompt_logprobs if has_prompt_logprobs else None,
            num_prompt_tokens=first.num_prompt_tokens,
            num_cached_tokens=first.num_cached_tokens or 0,
            outputs=completions,
            metrics=_metrics(request),
        )

    def _completion(self, index: int, seq: Sequence) -> CompletionOutput:
        token_ids, wants = seq.output_token_ids, seq.sampling_params.logprobs is not None
        if seq.detokenizer is not None:
            seq.detokenizer.finish()
            text = seq.detokenizer.text
        elif self.tokenizer is not None:
            skip = seq.sampling_params.skip_special_tokens
            text = self.tokenizer.decode(token_ids, skip_special_tokens=skip)
        else:
            text = ""
        own = [entries[token_id].logprob for token_id, entries in zip(token_ids, seq.logprobs)]
        return CompletionOutput(
            index=index,
            text=text,
            token_ids=token_ids,
            finish_reason=seq.finish_reason or "",
            stop_reason=seq.stop_reason,
            logprobs=seq.logprobs if wants else None,
            cumulative_logprob=sum(own) if wants else None,
        )

    def _entries(self, token_ids: list[int], logprobs: Logprobs) -> list[PositionLogprobs]:
        """One dict a position: the token that is there first, then the most likely ones."""
        entries = []
        columns = zip(token_ids, *(piece.tolist() for piece in logprobs), strict=True)
        for token_id, logprob, rank, top_token_ids, top_logprobs in columns:
            tops = enumerate(zip(top_token_ids, top_logprobs), 1)
            entry = {token_id: Logprob(logprob, rank)}
            entry |= {top: Logprob(value, place) for place, (top, value) in tops if top != token_id}
            for token, found in entry.items():
                found.decoded_token = self.tokenizer.decode([token]) if self.tokenizer else None
            entries.append(entry)
        return entries


def _metrics(request: Request) -> RequestMetrics:
    first_token = min(seq.first_token_time for seq in request.sequences)
    finished = max(seq.finished_time for seq in request.sequences)
    later = max(len(seq.token_ids) - seq.num_prompt_tokens for seq in request.sequences) - 1
    return RequestMetrics(
        arrival_time=request.arrival_time,
        first_token_time=first_token,
        finished_time=finished,
        time_to_first_token=first_token - request.arrival_time,
        time_per_output_token=(finished - first_token) / later if later else None,
    )
