"""From finished sequences to what the person gets."""

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
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.layers.logits import Logprobs


class OutputProcessor:
    """Text, log probabilities and metrics of requests.

    Args:
        tokenizer: transformers' tokenizer, or None if the checkpoint has none.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.tokenizer = tokenizer
        self._texts: dict[int, str] = {}  # of single tokens

    def take_logprobs(self, batch: Batch, launch: Launch, token_ids: list[int]) -> None:
        """Note what a step, whose tokens are known, has found. To be called before the scheduler
        takes the tokens in."""
        for row, position, logprobs in launch.prompt_logprobs:
            seq = batch.seqs[row]
            there = seq.token_ids[position : position + len(logprobs.ranks)]
            ks = [seq.sampling_params.prompt_logprobs] * len(there)
            entries = self._entries(there, ks, logprobs)
            seq.prompt_logprobs += entries[len(seq.prompt_logprobs) - position :]
        for rows, logprobs in launch.logprobs:
            seqs = [batch.seqs[row] for row in rows]
            ks = [seq.sampling_params.logprobs for seq in seqs]
            entries = self._entries([token_ids[row] for row in rows], ks, logprobs)
            for seq, entry in zip(seqs, entries):
                if not seq.is_finished:  # or else the token is discarded
                    seq.logprobs.append(entry)

    def output(self, request: Request) -> RequestOutput:
        """Of a request whose sequences have all finished."""
        completions = [self._completion(i, seq) for i, seq in enumerate(request.sequences)]
        first = request.sequences[0]
        return RequestOutput(
            **completions[0],
            request_id=request.request_id,
            prompt=request.prompt,
            prompt_token_ids=first.prompt_token_ids,
            prompt_logprobs=first.prompt_logprobs or None,
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
            params = seq.sampling_params
            hides_last = seq.ended_by_token and not params.include_stop_str_in_output
            shown = token_ids[:-1] if hides_last else token_ids
            text = self.tokenizer.decode(shown, skip_special_tokens=params.skip_special_tokens)
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

    def _entries(
        self, token_ids: list[int], ks: list[int], logprobs: Logprobs
    ) -> list[PositionLogprobs]:
        """One dict a position: the token that is there first, then the k most likely ones."""
        entries = []
        columns = zip(token_ids, ks, *(piece.tolist() for piece in logprobs), strict=True)
        for token_id, k, logprob, rank, top_token_ids, top_logprobs in columns:
            entry = {token_id: Logprob(logprob, rank, self._decoded(token_id))}
            for place, top in enumerate(top_token_ids[:k]):
                if top != token_id:
                    entry[top] = Logprob(top_logprobs[place], place + 1, self._decoded(top))
            entries.append(entry)
        return entries

    def _decoded(self, token_id: int) -> str | None:
        if token_id not in self._texts and self.tokenizer is not None:
            self._texts[token_id] = self.tokenizer.decode([token_id])
        return self._texts.get(token_id)


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
