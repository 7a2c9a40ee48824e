"""The loop: add_request -> schedule -> launch -> collect -> postprocess -> output."""

import os
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nanovllm.config import Config
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.callers import Callers
from nanovllm.engine.constraints import MaskFiller
from nanovllm.engine.input_processor import InputProcessor, Prompt, Request, params_list
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.output_processor import OutputProcessor
from nanovllm.engine.scheduler import Batch, Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.stats import StepStats
from nanovllm.engine.step import LateRows, PendingStep
from nanovllm.engine.tokenizer import load_tokenizer
from nanovllm.engine.warm_up import load_libraries
from nanovllm.engine.weights import load_weights, update_weights
from nanovllm.models import CausalLM
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.checkpoint_files import read_headers

if TYPE_CHECKING:
    from typing_extensions import Self

LONG_STEP = 8192  # tokens that take a GPU longer than a capture takes the host
_CLOSED = "this LLM is closed: build a new one"


class LLMEngine:
    """Scheduler, block manager and model runner, wired together.

    Any thread may call any method: one at a time uses the engine, and others wait for a step at the
    most.

    Args:
        model: a local directory with a checkpoint, or a hub id to fetch.
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
        self.config = Config.from_options(model, options)
        with ExitStack() as on_error:
            if self.config.tensor_parallel_size > 1:
                from nanovllm.parallel.ranks import Ranks

                ranks = Ranks(self.config)  # their processes start meanwhile
                on_error.callback(ranks.close)
            with ThreadPoolExecutor(1) as pool:
                # A GPU gets ready meanwhile. What fails there fails in ModelRunner, too.
                if self.config.torch_device.type == "cuda":
                    pool.submit(load_libraries, self.config.torch_device, self.config.torch_dtype)
                self.tokenizer = None
                if not self.config.skip_tokenizer_init:
                    self.tokenizer = load_tokenizer(self.config.tokenizer_dir)
            if self.config.tensor_parallel_size > 1:
                from nanovllm.parallel.rank_runner import LeadingRunner

                self.model_runner: ModelRunner = LeadingRunner(self.config, ranks)
            else:
                self.model_runner = ModelRunner(self.config)
            on_error.pop_all()
        self._fit_to_cache(self.model_runner.num_kvcache_blocks, options.get("max_model_len"))
        eos_token_ids = self._eos_token_ids()
        self.scheduler = Scheduler(
            BlockManager(
                self.model_runner.num_kvcache_blocks,
                self.config.kvcache_block_size,
                self.config.enable_prefix_caching,
            ),
            self.config.max_num_seqs,
            self.config.max_num_batched_tokens,
        )
        self.input_processor = InputProcessor(self.config, self.tokenizer, eos_token_ids)
        self.output_processor = OutputProcessor(self.tokenizer)
        self.stats = StepStats()
        self._callers = Callers()
        self._request_of_seq: dict[int, Request] = {}  # by seq_id, of unfinished sequences
        self._in_flight: deque[tuple[Batch, PendingStep]] = deque()
        self._mask_filler = MaskFiller()
        self._waiting: tuple[PendingStep, LateRows] | None = None  # for masks
        self._last_collect = 0.0
        self._num_finished = self._num_aborted = self._num_generated = 0

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop all requests and give the device's memory back. Calling it again does nothing."""
        with self._callers.alone():
            try:
                if not self.is_closed:
                    self._drop_all(_CLOSED)
            finally:
                self._mask_filler.close()
                self.model_runner.close()

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or had to be: no request can run any more."""
        return self.model_runner.is_closed

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """Queue one request and return its id; `step` until `is_finished` to run it.

        Raises:
            TypeError, ValueError: for a request that cannot work; it is not queued.
            RuntimeError: if the engine is closed; or if a stream is open or another thread's call
                runs, whose steps would take the output.
        """
        self._check_open()
        (request,) = self.input_processor.process([prompt], params_list(sampling_params, 1))
        with self._callers.alone():
            self._check_open()
            if self._callers.are_waiting:
                raise RuntimeError(
                    "a stream is open, or another thread's generate() runs: wait for its end "
                    "before add_request(), or use generate()"
                )
            self._queue(request)
        return request.request_id

    def step(self) -> list[RequestOutput]:
        """Run one step; returns the requests that ended with it.

        With `async_scheduling` the tokens read are those of the step before, so that the device
        already works on the next one while the host looks at them. If a step fails, every request
        is aborted, and the engine is ready for new ones; with several ranks it is closed.
        """
        with self._callers.lock, self._callers.step_guard():
            self._check_open()
            outputs: list[RequestOutput] = []
            try:
                if not self._in_flight:
                    self._last_collect = time.perf_counter()
                batch = self.scheduler.schedule()
                if batch is not None:
                    self._launch(batch, outputs)
                    self._capture_ahead()
                # The step just launched may stay in flight; with nothing to launch, none does.
                max_in_flight = 1 if batch is not None and self.config.async_scheduling else 0
                if len(self._in_flight) > max_in_flight:
                    outputs += self._collect()
                self._collect_leftovers()
                self._callers.deliver(outputs)
                return outputs
            except BaseException as error:
                self._callers.deliver(outputs)  # they are complete
                what = f"{type(error).__name__}: {error}"
                self._drop_all(f"a step of another caller has failed: {what}", error)
                raise

    def is_finished(self) -> bool:
        """Whether no request is queued or running."""
        self._check_open()
        return not self.scheduler.num_unfinished

    def abort(self, request_id: int) -> None:
        """Drop one request, wherever it is; no output comes of it. Unknown ids are ignored."""
        with self._callers.alone():
            self._check_open()
            self._abort({request_id})

    def abort_all(self) -> None:
        """Drop every request; all KV blocks are free afterwards."""
        with self._callers.alone():
            self._check_open()
            self._drop_all()

    def update_weights(
        self, weights: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]
    ) -> None:
        """Copy tensors over the model's weights, in place: those of a model in training, say.

        Args:
            weights: pairs of a name, as in a checkpoint, and a whole tensor, on any device and in
                any floating-point dtype. They are taken one by one, so a generator may make them as
                it goes. Weights that do not come stay as they are, and so do scales of keys and
                values that the checkpoint had. The prefix cache is emptied.

        Raises:
            TypeError, ValueError: for a tensor that the model does not have, of another shape or no
                floats; those before it are in place. And if the model's checkpoint is in fp8.
            RuntimeError: if requests are unfinished, or with several ranks.
        """
        if self.config.fp8_blocks is not None:
            raise ValueError(
                "update_weights takes no tensors for a model whose checkpoint is in fp8: give "
                "load_weights() the directory of another one, or start from the bf16 checkpoint "
                "with quantization='fp8'"
            )
        self._change_weights(lambda model: update_weights(model, self.config, weights))

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Load another checkpoint of the same shape over the model's weights, in place: all that is
        in the directory's *.safetensors files, which is checked before anything is changed. The
        prefix cache is emptied; tokenizer and configuration stay.

        Raises:
            ValueError, FileNotFoundError: for a checkpoint that cannot be loaded.
            RuntimeError: if requests are unfinished, or with several ranks.
        """

        def load(model: CausalLM) -> None:
            with torch.inference_mode():
                load_weights(model, self.config, read_headers(Path(path)))

        self._change_weights(load)

    def reset_prefix_cache(self) -> None:
        """Forget which prompts' keys and values the KV cache holds.

        Raises:
            RuntimeError: if requests are unfinished.
        """
        with self._callers.alone():
            self._check_no_requests("reset_prefix_cache")
            self.scheduler.block_manager.reset()

    def metrics(self) -> dict[str, int | float]:
        """What the engine is doing, and has done since it began.

        By request: `requests_finished` and `requests_aborted`, and `generated_tokens`, those of
        finished requests. By completion, of which a request with `n` has n: `requests_running`,
        `requests_waiting`, `prompt_tokens` of those that were admitted, `cached_prompt_tokens` of
        them that the prefix cache held, and their share, `prefix_cache_hit_rate`. `kv_blocks_peak`
        is the most blocks ever in use. The two rates are tokens run per second of such steps.
        """
        self._check_open()
        scheduler, blocks = self.scheduler, self.scheduler.block_manager
        return {
            "requests_running": len(scheduler.running),
            "requests_waiting": len(scheduler.waiting),
            "requests_finished": self._num_finished,
            "requests_aborted": self._num_aborted,
            "prompt_tokens": scheduler.num_prompt_tokens,
            "cached_prompt_tokens": scheduler.num_cached_tokens,
            "prefix_cache_hit_rate": (
                scheduler.num_cached_tokens / max(1, scheduler.num_prompt_tokens)
            ),
            "generated_tokens": self._num_generated,
            "kv_blocks": len(blocks.blocks),
            "kv_blocks_in_use": len(blocks.blocks) - blocks.num_free_blocks,
            "kv_blocks_peak": len(blocks.blocks) - blocks.fewest_free,
            "preemptions": scheduler.num_preemptions,
            "prefill_tokens_per_second": self.stats.prefill_rate,
            "decode_tokens_per_second": self.stats.decode_rate,
        }

    def _change_weights(self, fill: Callable[[CausalLM], None]) -> None:
        with self._callers.alone():
            self._check_no_requests("a change of weights")
            if self.config.tensor_parallel_size > 1:
                raise RuntimeError(
                    "weights can be changed in one process only, and this engine has "
                    f"tensor_parallel_size={self.config.tensor_parallel_size}: build a new LLM"
                )
            self.scheduler.block_manager.reset()
            self.model_runner.change_weights(fill)

    def _check_no_requests(self, what: str) -> None:
        self._check_open()
        if self.scheduler.num_unfinished:
            raise RuntimeError(
                f"{self.scheduler.num_unfinished} requests are unfinished: let them end, or abort "
                f"them, before {what}"
            )

    def _drop_all(self, reason: str = "", cause: BaseException | None = None) -> None:
        """Drop every request, whatever state a failed step has left; see `Callers.drop_all`."""
        self._callers.drop_all(reason, cause)
        self._num_aborted += len({id(request) for request in self._request_of_seq.values()})
        self._request_of_seq.clear()
        self._in_flight.clear()
        self._waiting = None
        with suppress(Exception):  # a failure is no news any more
            self._mask_filler.finish()
        self.output_processor.clear()
        self.scheduler.abort_all()
        self.model_runner.reset()

    def _abort(self, request_ids: set[int]) -> None:
        """Drop requests, those of them that are queued and have not ended."""
        queued = self._request_of_seq.values()
        dropped = {id(one): one for one in queued if one.request_id in request_ids}
        for request in dropped.values():
            self._callers.drop(request.request_id)
            for seq in request.sequences:
                if self._request_of_seq.pop(seq.seq_id, None) is not None:
                    self.scheduler.abort(seq)
                self.output_processor.drop(seq)
        self._num_aborted += len(dropped)
        self._collect_leftovers()

    def _queue(self, request: Request) -> None:
        self.output_processor.add(request)
        for seq in request.sequences:
            self._request_of_seq[seq.seq_id] = request
            self.scheduler.add(seq)

    def _collect_leftovers(self) -> None:
        """When all requests have ended, wait for the step that is still in flight, of which nothing
        counts."""
        while self._in_flight and not self.scheduler.num_unfinished:
            self._collect()

    def _launch(self, batch: Batch, outputs: list[RequestOutput]) -> None:
        """Start a step. Masks depend on the tokens before: these are taken in while the device
        runs it, and a thread fills the masks while the next step is planned. Requests that end with
        these tokens are added to `outputs`."""
        step = self.model_runner.launch(batch, self._sample_waiting)
        self._in_flight.append((batch, step))
        if batch.constraints:
            while len(self._in_flight) > 1:
                outputs += self._collect()
            rows = batch.late_rows()
            if rows:
                masks = self.model_runner.masks(len(rows))
                self._mask_filler.start([batch.constraints[row] for row in rows], masks)
            self._waiting = step, LateRows(rows, [batch.seqs[row].token_ids[-1] for row in rows])

    def _capture_ahead(self) -> None:
        """Record CUDA Graphs that the requests will need, while the device still runs the step
        before the newest, and the newest is a long one: so the device never waits for the host."""
        if len(self._in_flight) < 2:
            return
        (_, before), (batch, newest) = list(self._in_flight)[-2:]
        if not batch.is_prefill or batch.num_tokens < LONG_STEP:
            return
        if any(seq.max_len > seq.num_tokens for seq in batch.seqs):  # decode steps will follow
            num_seqs, like = self.scheduler.num_unfinished, newest.step.shape
            while not before.is_done and self.model_runner.capture_ahead(num_seqs, like):
                pass

    def _sample_waiting(self) -> None:
        """Sample the late rows of the step that waits for their masks, if there is one."""
        if self._waiting is not None:
            (step, late), self._waiting = self._waiting, None
            self._mask_filler.finish()
            self.model_runner.sample_late(step, late)

    def _collect(self) -> list[RequestOutput]:
        """Wait for the oldest step in flight, and take its tokens in."""
        batch, step = self._in_flight.popleft()
        if self._waiting is not None and step is self._waiting[0]:
            self._sample_waiting()
        token_ids = self.model_runner.collect(step)
        now = time.perf_counter()
        self.stats.add(batch, now - self._last_collect)
        self._last_collect = now
        rows = self.scheduler.postprocess(batch, token_ids)
        # Text needs the tokens, and may end a sequence: only then it is known which have ended.
        for seq, stop_string in self.output_processor.process(batch, rows, step):
            self.scheduler.stop(seq, stop_string)
        if constraints := batch.constraints:
            for row in rows:
                if row in constraints:
                    constraints[row].accept(token_ids[row])
        outputs = []
        finished = SequenceStatus.FINISHED
        for seq in [seq for seq in batch.seqs if seq.status is finished]:
            if seq.seq_id in self._request_of_seq:  # and was not dropped
                outputs += self._end(seq)
        return outputs

    def _end(self, seq: Sequence) -> list[RequestOutput]:
        """Of a sequence that has ended, its request's output if it was the last. One that ended in
        an error ends the others."""
        seq.finished_time = time.time()
        request = self._request_of_seq.pop(seq.seq_id)
        if seq.finish_reason == "error":
            for other in request.sequences:
                if self._request_of_seq.pop(other.seq_id, None) is not None:
                    self.scheduler.abort(other)
        if any(other.seq_id in self._request_of_seq for other in request.sequences):
            return []
        self._num_finished += 1
        output = self.output_processor.output(request)
        for other in request.sequences:
            self.output_processor.drop(other)
        self._num_generated += sum(len(one["token_ids"]) for one in output["outputs"])
        return [output]

    def _fit_to_cache(self, num_blocks: int, asked: int | None) -> None:
        """Lower max_model_len to what the KV cache holds, and warn if it is less than `asked`."""
        block_size, limit = self.config.kvcache_block_size, self.config.model_config.max_length
        capacity = num_blocks * block_size
        self.config.max_model_len = min(self.config.max_model_len, capacity)
        if asked is not None and self.config.max_model_len < asked:
            reason = f"the KV cache has {num_blocks} blocks of {block_size} tokens"
            if limit <= capacity:
                reason = f"by its config.json the model has {limit} positions"
            warnings.warn(
                f"max_model_len lowered from {asked} to {self.config.max_model_len}: {reason}",
                stacklevel=3,
            )

    def _eos_token_ids(self) -> frozenset[int]:
        eos = set(self.config.eos_token_ids)
        if self.tokenizer is not None and self.tokenizer.eos_token_id is not None:
            eos.add(self.tokenizer.eos_token_id)
        vocab_size = self.config.model_config.vocab_size
        return frozenset(token_id for token_id in eos if 0 <= token_id < vocab_size)

    def _check_open(self) -> None:
        if self.is_closed:
            raise RuntimeError(_CLOSED)
