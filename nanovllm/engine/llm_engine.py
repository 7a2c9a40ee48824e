"""The loop: add_request -> schedule -> launch -> collect -> postprocess -> decode text."""

import os
import random
import reprlib
import warnings
from collections import deque
from collections.abc import Collection
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any, TypedDict

from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.model_runner import Launch, ModelRunner
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.validation import as_integer

Prompt = str | Collection[int]  # text, or a list or tuple of token ids


class RequestOutput(TypedDict):
    """What a finished request gives back.

    `text` leaves out special tokens, and is empty if the checkpoint has no tokenizer; `token_ids`
    has all that was generated, the end-of-sequence token included. `finish_reason` is "stop" (an
    end-of-sequence token) or "length" (`max_tokens` or `max_model_len`).
    """

    request_id: int
    text: str
    token_ids: list[int]
    finish_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int


@dataclass
class StepStats:
    """Tokens run and seconds spent since the engine began, by kind of step."""

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0

    def add(self, batch: Batch, seconds: float) -> None:
        if batch.is_prefill:
            self.prefill_tokens += batch.num_tokens
            self.prefill_seconds += seconds
        else:
            self.decode_tokens += batch.num_tokens
            self.decode_seconds += seconds

    def since(self, before: "StepStats") -> "StepStats":
        """What was added after the copy `before` was taken."""
        return StepStats(*(now - then for now, then in zip(astuple(self), astuple(before))))

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second of prefill."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second of decode."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


class LLMEngine:
    """Scheduler, block manager and model runner, wired together.

    Args:
        model: a local directory with a Qwen3 checkpoint, or a hub id to fetch.
        **options: see :class:`nanovllm.config.Config`.

    Attributes:
        config: the options as resolved.
        tokenizer: transformers' tokenizer, or None if the checkpoint has none.
        stats: tokens and seconds so far.

    Raises:
        TypeError, ValueError, FileNotFoundError: for an option or a checkpoint that cannot work.
        RuntimeError: if the device has no room for a KV cache.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Any) -> None:
        self.model_runner: ModelRunner | None = None
        self.config = Config.from_options(model, options)
        self.tokenizer = _load_tokenizer(self.config.model_dir)
        self.model_runner = ModelRunner(self.config)
        self._fit_to_cache(self.model_runner.num_kvcache_blocks)
        self.scheduler = Scheduler(
            BlockManager(self.model_runner.num_kvcache_blocks, self.config.kvcache_block_size),
            self.config.max_num_seqs,
            self.config.max_num_batched_tokens,
            self._eos_token_ids(),
        )
        self.stats = StepStats()
        self._in_flight: deque[tuple[Batch, Launch]] = deque()
        self._last_collect = 0.0
        self._next_id = 0
        self._seeds = random.Random(self.config.seed)

    def __enter__(self) -> "LLMEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop all requests and give the device's memory back. Calling it again does nothing."""
        if self.model_runner is not None:
            try:
                self.abort_all()
            finally:
                self.model_runner.close()
                self.model_runner = None

    def generate(
        self,
        prompts: Prompt | Collection[Prompt],
        sampling_params: SamplingParams | Collection[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete one prompt or many; returns one dict a prompt, in their order.

        Args:
            prompts: a string, a list of token ids, or a list of either.
            sampling_params: one for all, or one a prompt; None means `SamplingParams()`.
            use_tqdm: show progress, with tokens per second of prefill and decode.

        Raises:
            TypeError, ValueError: for a request that cannot work; nothing is queued then.
            RuntimeError: if the engine is closed, or still has requests from `add_request`.
        """
        self._check_open()
        if self.scheduler.num_unfinished:
            raise RuntimeError(
                f"{self.scheduler.num_unfinished} requests from add_request are unfinished: "
                "step() until is_finished() before generate()"
            )
        sequences = self._build_sequences(_as_list(prompts), sampling_params)
        outputs: dict[int, RequestOutput] = {}
        before = replace(self.stats)
        try:
            for seq in sequences:
                self.scheduler.add(seq)
            with tqdm(total=len(sequences), desc="Generating", disable=not use_tqdm) as progress:
                while not self.is_finished():
                    finished = self.step()
                    outputs.update((output["request_id"], output) for output in finished)
                    self._show_rates(progress, self.stats.since(before))
                    progress.update(len(finished))
        except BaseException:  # Ctrl-C too
            self.abort_all()
            raise
        return [outputs[seq.seq_id] for seq in sequences]

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue one request and return its id; `step` until `is_finished` to run it.

        Raises:
            TypeError, ValueError: for a request that cannot work; it is not queued.
        """
        (seq,) = self._build_sequences([prompt], sampling_params)
        self.scheduler.add(seq)
        return seq.seq_id

    def step(self) -> list[RequestOutput]:
        """Run one step; returns the requests that ended with it.

        With `async_scheduling` the tokens read are those of the step before, so that the device
        already works on the next one while the host looks at them. If a step fails, every request
        is aborted, and the engine is ready for new ones.
        """
        self._check_open()
        try:
            batch = self.scheduler.schedule()
            if batch is not None:
                if not self._in_flight:
                    self._last_collect = perf_counter()
                self._in_flight.append((batch, self.model_runner.launch(batch)))
            may_stay = 1 if batch is not None and self.config.async_scheduling else 0
            if len(self._in_flight) <= may_stay:
                return []
            batch, launch = self._in_flight.popleft()
            token_ids = self.model_runner.collect(launch)
            now = perf_counter()
            self.stats.add(batch, now - self._last_collect)
            self._last_collect = now
            return [self._output(seq) for seq in self.scheduler.postprocess(batch, token_ids)]
        except BaseException:
            self.abort_all()
            raise

    def is_finished(self) -> bool:
        """Whether no request is queued, running or under way."""
        self._check_open()
        return not self.scheduler.num_unfinished and not self._in_flight

    def abort(self, request_id: int) -> None:
        """Drop one request, wherever it is; no output comes of it. Unknown ids are ignored."""
        self._check_open()
        self.scheduler.abort(request_id)

    def abort_all(self) -> None:
        """Drop every request; all KV blocks are free afterwards."""
        self._check_open()
        self._in_flight.clear()
        self.scheduler.abort_all()
        self.model_runner.reset()

    def _build_sequences(
        self, prompts: list[Prompt], params: SamplingParams | Collection[SamplingParams] | None
    ) -> list[Sequence]:
        """Check every prompt with its parameters before any is queued."""
        self._check_open()
        if not isinstance(params, (list, tuple)):
            params = [params] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(
                f"{len(prompts)} prompts need as many sampling_params (or a single one for all), "
                f"got {len(params)}"
            )
        checked = []
        for index, (prompt, param) in enumerate(zip(prompts, params)):
            param = SamplingParams() if param is None else param
            if not isinstance(param, SamplingParams):
                raise TypeError(f"sampling_params must be SamplingParams, got {param!r}")
            checked.append((self._token_ids(prompt, f"prompt {index}"), param))
        return [self._new_sequence(token_ids, param) for token_ids, param in checked]

    def _new_sequence(self, token_ids: list[int], params: SamplingParams) -> Sequence:
        drawn = self._seeds.getrandbits(63)
        seed = drawn if params.seed is None else params.seed
        max_len = min(len(token_ids) + params.max_tokens, self.config.max_model_len)
        seq = Sequence(self._next_id, token_ids, params, max_len, _as_signed(seed))
        self._next_id += 1
        return seq

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

    def _fit_to_cache(self, num_blocks: int) -> None:
        capacity = num_blocks * self.config.kvcache_block_size
        if capacity < self.config.max_model_len:
            warnings.warn(
                f"max_model_len lowered from {self.config.max_model_len} to {capacity}: the KV "
                f"cache has {num_blocks} blocks of {self.config.kvcache_block_size} tokens",
                stacklevel=3,
            )
            self.config.max_model_len = capacity

    def _eos_token_ids(self) -> set[int]:
        eos = set(self.config.eos_token_ids)
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            eos.add(self.tokenizer.eos_token_id)
        return eos

    def _output(self, seq: Sequence) -> RequestOutput:
        token_ids = seq.output_token_ids
        text = ""
        if self.tokenizer is not None:
            text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return RequestOutput(
            request_id=seq.seq_id,
            text=text,
            token_ids=token_ids,
            finish_reason=seq.finish_reason or "",
            num_prompt_tokens=seq.num_prompt_tokens,
            num_cached_tokens=seq.num_cached_tokens or 0,
        )

    @staticmethod
    def _show_rates(progress: tqdm, stats: StepStats) -> None:
        progress.set_postfix_str(
            f"prefill {stats.prefill_rate:,.0f} tok/s, decode {stats.decode_rate:,.0f} tok/s",
            refresh=False,
        )

    def _check_open(self) -> None:
        if self.model_runner is None:
            raise RuntimeError("this LLM is closed: build a new one")


def _as_list(prompts: Prompt | Collection[Prompt]) -> list[Prompt]:
    """One prompt or many -> a list of prompts. A list that begins with an integer is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, (list, tuple)):
        raise TypeError(
            "prompts must be a string, a list of token ids, or a list of these, got "
            f"{reprlib.repr(prompts)}"
        )
    if not prompts:
        raise ValueError("prompts is empty: give at least one prompt")
    if isinstance(prompts[0], (str, list, tuple)):
        return list(prompts)
    return [list(prompts)]


def _as_signed(seed: int) -> int:
    """The same 64 bits as an int64."""
    return (seed + 2**63) % 2**64 - 2**63


def _load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase | None:
    """The checkpoint's tokenizer, None if it has none.

    Raises:
        ValueError: if it has one that cannot be read.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    if not any((model_dir / name).is_file() for name in names):
        return None
    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except Exception as error:
        raise ValueError(f"the tokenizer in {model_dir} cannot be read: {error}") from error
