"""From sampled tokens to what the person gets: text, stop strings, log probabilities, metrics."""

from nanovllm.engine.detokenizer import Detokenizer
from nanovllm.engine.input_processor import Request
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.sequence import Sequence
from nanovllm.engine.step import PendingStep
from nanovllm.engine.tokenizer import Decoder, Tokenizer
from nanovllm.layers.logprobs import Logprobs
from nanovllm.outputs import (
    CompletionOutput,
    Logprob,
    PositionLogprobs,
    RequestMetrics,
    RequestOutput,
    StreamOutput,
)


class OutputProcessor:
    """Turns sequences into text and outputs.

    The text of a sequence is made as it grows only where it is needed then: it has stop strings, or
    is streamed.

    Args:
        tokenizer: transformers' tokenizer, or None if the checkpoint has none.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self.decoder = None if tokenizer is None else Decoder(tokenizer)
        self._detokenizers: dict[int, Detokenizer] = {}  # by seq_id
        self._token_texts: dict[int, str] = {}

    def add(self, request: Request) -> None:
        """Begin with a request that is being queued."""
        for seq in request.sequences:
            if seq.sampling_params.stop:
                self._detokenizer_of(seq)

    def drop(self, seq: Sequence) -> None:
        """Forget a sequence that has ended."""
        self._detokenizers.pop(seq.seq_id, None)

    def clear(self) -> None:
        """Forget all sequences."""
        self._detokenizers.clear()

    def stream(self, index: int, seq: Sequence) -> "OutputStream":
        """The output of a queued sequence as it grows. `index`: see `StreamOutput`."""
        return OutputStream(index, seq, self._detokenizer_of(seq))

    def process(
        self, batch: Batch, rows: list[int], step: PendingStep
    ) -> list[tuple[Sequence, str]]:
        """Take in what a step has given.

        Args:
            rows: those whose token the scheduler has appended to their sequence.

        Returns:
            The sequences in whose text a stop string has come, and that string.
        """
        self._take_prompt_logprobs(batch, step)
        if step.logprobs:
            self._take_logprobs(batch, set(rows), step)
        if not self._detokenizers:
            return []
        stopped = []
        for row in rows:
            seq = batch.seqs[row]
            detokenizer = self._detokenizers.get(seq.seq_id)
            if detokenizer is not None and (stop := self._extend(seq, detokenizer)) is not None:
                stopped.append((seq, stop))
        return stopped

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
            finished=True,
            metrics=_metrics(request),
        )

    def _detokenizer_of(self, seq: Sequence) -> Detokenizer | None:
        """The one that follows the sequence's text, from now on; None without a tokenizer."""
        if self.decoder is not None and seq.seq_id not in self._detokenizers:
            params = seq.sampling_params
            self._detokenizers[seq.seq_id] = Detokenizer(
                self.decoder, params.skip_special_tokens, tuple(params.stop or ()),
                params.include_stop_str_in_output,
            )  # fmt: skip
        return self._detokenizers.get(seq.seq_id)

    def _extend(self, seq: Sequence, detokenizer: Detokenizer) -> str | None:
        """Add a sequence's newest token to its text; returns the stop string that it completes."""
        params = seq.sampling_params
        if seq.ended_by_token and not params.include_stop_str_in_output:
            return None  # the text leaves that token out
        # A text that a token has ended, or that is too short, no stop string ends.
        may_stop = not seq.ended_by_token and not params.is_below_min_tokens(seq.num_generated)
        detokenizer.append(seq.token_ids[-1], may_stop)
        return detokenizer.stopped_by

    def _take_prompt_logprobs(self, batch: Batch, step: PendingStep) -> None:
        for row, position, logprobs in step.prompt_logprobs:
            seq = batch.seqs[row]
            token_ids = seq.token_ids[position : position + len(logprobs.ranks)].tolist()
            ks = [seq.sampling_params.prompt_logprobs or 0] * len(token_ids)
            entries = self._entries(token_ids, ks, logprobs)
            # The first of them may be known already, if the sequence was preempted.
            num_known = len(seq.prompt_logprobs) - position
            seq.prompt_logprobs += entries[num_known:]

    def _take_logprobs(self, batch: Batch, rows: set[int], step: PendingStep) -> None:
        token_ids = step.token_ids.tolist()
        for places, logprobs in step.logprobs:
            # Not of those that have ended, or had no token to sample.
            indices = [index for index, row in enumerate(places) if row in rows]
            if len(indices) < len(places):
                logprobs = Logprobs(*(piece[indices] for piece in logprobs))
            counted = [places[index] for index in indices]
            ks = [batch.seqs[row].sampling.logprobs or 0 for row in counted]
            entries = self._entries([token_ids[row] for row in counted], ks, logprobs)
            for row, entry in zip(counted, entries, strict=True):
                batch.seqs[row].logprobs.append(entry)

    def _completion(self, index: int, seq: Sequence) -> CompletionOutput:
        token_ids, wants = seq.output_token_ids, seq.sampling_params.logprobs is not None
        own = [entries[token_id].logprob for token_id, entries in zip(token_ids, seq.logprobs)]
        return CompletionOutput(
            index=index,
            text=self._text(seq),
            token_ids=token_ids,
            finish_reason=seq.finish_reason or "",
            stop_reason=seq.stop_reason,
            logprobs=seq.logprobs if wants else None,
            cumulative_logprob=sum(own) if wants else None,
        )

    def _text(self, seq: Sequence) -> str:
        """All of a finished sequence's text."""
        if self.decoder is None:
            return ""
        detokenizer = self._detokenizers.get(seq.seq_id)
        if detokenizer is not None:
            detokenizer.finish()
            return detokenizer.text
        params, token_ids = seq.sampling_params, seq.output_token_ids
        if seq.ended_by_token and not params.include_stop_str_in_output:
            del token_ids[-1]
        return self.decoder.decode(token_ids, params.skip_special_tokens)

    def _entries(
        self, token_ids: list[int], ks: list[int], logprobs: Logprobs
    ) -> list[PositionLogprobs]:
        """One dict a position: the token that is there first, then the k most likely ones."""
        entries = []
        columns = zip(token_ids, ks, *(piece.tolist() for piece in logprobs), strict=True)
        for token_id, k, logprob, rank, top_token_ids, top_logprobs in columns:
            entry = {token_id: Logprob(logprob, rank, self._token_text(token_id))}
            for place, top in enumerate(top_token_ids[:k]):
                if top != token_id:
                    entry[top] = Logprob(top_logprobs[place], place + 1, self._token_text(top))
            entries.append(entry)
        return entries

    def _token_text(self, token_id: int) -> str | None:
        if token_id not in self._token_texts and self.decoder is not None:
            self._token_texts[token_id] = self.decoder.decode([token_id], False)
        return self._token_texts.get(token_id)


class OutputStream:
    """The output of one sequence, piece by piece.

    Args:
        index: see `StreamOutput`.
        seq: whose output it is.
        detokenizer: follows its text; None if there is no tokenizer.
    """

    def __init__(self, index: int, seq: Sequence, detokenizer: Detokenizer | None) -> None:
        self.index = index
        self.seq = seq
        self._detokenizer = detokenizer
        self._num_characters = 0  # given out so far
        self._num_tokens = 0

    def next_piece(self) -> StreamOutput | None:
        """What is new since the last call: no part of a character, and nothing that a stop string
        may yet take back. None if nothing is, and the sequence has not ended."""
        seq, text = self.seq, ""
        if self._detokenizer is not None:
            end = len(self._detokenizer.text) if seq.is_finished else self._detokenizer.num_safe
            text = self._detokenizer.text[self._num_characters : end]
        start = seq.num_prompt_tokens + self._num_tokens
        token_ids = seq.token_ids[start:].tolist()
        if not (text or token_ids or seq.is_finished):
            return None
        logprobs = None
        if seq.sampling_params.logprobs is not None:
            logprobs = seq.logprobs[self._num_tokens : self._num_tokens + len(token_ids)]
        self._num_characters += len(text)
        self._num_tokens += len(token_ids)
        return StreamOutput(
            index=self.index, text=text, token_ids=token_ids, logprobs=logprobs,
            finish_reason=seq.finish_reason, stop_reason=seq.stop_reason,
        )  # fmt: skip


def _metrics(request: Request) -> RequestMetrics:
    finished = max(seq.finished_time for seq in request.sequences)
    began = [seq.first_token_time for seq in request.sequences if seq.first_token_time]
    first_token = min(began, default=finished)  # none, if it ended in an error at once
    later = max(seq.num_generated for seq in request.sequences) - 1
    return RequestMetrics(
        arrival_time=request.arrival_time,
        first_token_time=first_token,
        finished_time=finished,
        time_to_first_token=first_token - request.arrival_time,
        time_per_output_token=(finished - first_token) / later if later else None,
    )
