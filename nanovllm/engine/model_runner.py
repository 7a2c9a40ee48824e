"""Runs a model's steps on a device: load, launch, collect."""

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.cuda_graphs import CudaGraphs, graph_rows, graph_sizes
from nanovllm.engine.kv_cache import allocate_kv_cache, max_blocks, num_fitting_blocks
from nanovllm.engine.logit_edits import EditSlots
from nanovllm.engine.model_checks import checked_model_config
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.step import LateRows, PendingStep, PromptLogprobs, Step, prompt_logprobs
from nanovllm.engine.step_inputs import InputBuffers, StepInputs, StepShape
from nanovllm.engine.warm_up import compile_ahead, warm_up
from nanovllm.engine.weights import allocate_weights, fill_weights, pack_weights, unpack_weights
from nanovllm.layers.attention_backends import make_backend
from nanovllm.layers.sampler import LOGPROB_ROWS, Sampler
from nanovllm.models import CausalLM
from nanovllm.quantization.fp8_weights import use_fp8
from nanovllm.quantization.kv_cache import set_kv_scales
from nanovllm.utils.checkpoint_files import read_headers
from nanovllm.utils.context import Context
from nanovllm.utils.kernels import kernels
from nanovllm.utils.memory import gpu_memory_in_use, to_device

LATE_ROWS = 128  # whose logits are gathered at a time


class ModelRunner:
    """Weights, KV cache and the execution of steps on one device.

    Args:
        config: the engine's options.

    Attributes:
        attention_backend: the name of the one in use.
        num_kvcache_blocks: size of the KV cache.
        is_closed: its memory has been given back.

    Raises:
        ValueError, FileNotFoundError: for a checkpoint or an option that cannot work.
        RuntimeError: if there is no memory left for a KV cache.
    """

    is_closed = False

    @torch.inference_mode()
    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = config.torch_device
        self.on_gpu = self.device.type == "cuda"
        # Whatever the process has made its default.
        with self.on_device(), torch.device("cpu"), self.in_own_dtype():
            self._build()

    def _build(self) -> None:
        config = self.config
        in_use_before = gpu_memory_in_use(self.device) if self.on_gpu else 0
        headers = {} if config.load_format == "dummy" else read_headers(config.model_dir)
        config.model_config = checked_model_config(config, headers)
        self.model = self.make_model().to(config.torch_dtype)
        if config.has_fp8_weights:
            use_fp8(self.model.model.layers, config.fp8_blocks)
        specs = self.model.cache_specs()
        self.backend = make_backend(
            config.attention_backend, self.device, config.torch_dtype, *specs[0],
            config.kvcache_block_size, fp8_cache=config.kv_cache_dtype == "fp8",
        )  # fmt: skip
        self.attention_backend = self.backend.name
        config.kvcache_block_size = self.backend.block_size
        parts = [self.backend, *self.model.modules()]
        can_capture = all(getattr(part, "can_capture", True) for part in parts)
        use_graphs = self.on_gpu and not config.enforce_eager and can_capture
        allocate_weights(self.model, config, headers)
        # Before anything is allocated for so many positions.
        most_tokens = self.agree_on_blocks(max_blocks(config, specs)) * config.kvcache_block_size
        config.max_model_len = min(config.max_model_len, most_tokens)
        self.cos_sin = self.model.rotary_table(config.max_model_len, self.device)
        try:
            self.inputs = InputBuffers(config, self.backend)
        except RuntimeError as error:
            raise RuntimeError(
                "no memory for the inputs of a step: lower max_num_batched_tokens "
                f"({config.max_num_batched_tokens}) or max_num_seqs ({config.max_num_seqs})"
            ) from error
        self.sampler = self.make_sampler()
        # One buffer for the logits of all graphs, as wide as the largest step.
        self.logits: torch.Tensor | None = None
        if use_graphs:
            shape = (config.max_num_seqs, self.model.lm_head.out_features)
            self.logits = torch.empty(shape, dtype=config.torch_dtype, device=self.device)
        self.kv_cache = allocate_kv_cache(config, specs, num_blocks=1)  # for the warm-up
        self.compiler = self.make_compiler()
        run_ahead = [] if self.compiler is None else compile_ahead(self, use_graphs)
        fill_weights(self.model, config, headers)  # while kernels are being compiled
        with self._kernels_on_demand():
            step_bytes = warm_up(self, use_graphs) if self.on_gpu else 0
        self.num_kvcache_blocks = config.num_kvcache_blocks or self.agree_on_blocks(
            num_fitting_blocks(config, specs, step_bytes, in_use_before)
        )
        self.kv_cache = allocate_kv_cache(config, specs, self.num_kvcache_blocks)
        self.graphs: CudaGraphs | None = None
        if use_graphs:
            self.graphs = CudaGraphs(self.device, self.run_shape, run_ahead)
            with self._kernels_on_demand():
                self.graphs.capture(self.largest_decode_shape())
        self._edit_slots = EditSlots(config.max_num_seqs)

    # What a rank of several does in another way: see `parallel.rank_runner`.

    def make_model(self) -> CausalLM:
        """The network, still without memory."""
        with torch.device("meta"):
            return self.config.model_class(self.config.model_config)

    def make_sampler(self) -> Sampler:
        config = self.config
        return Sampler(config.max_num_seqs, self.device, config.model_config.vocab_size)

    def make_compiler(self) -> Any:
        """What compiles kernels ahead; None if nothing does."""
        if not self.on_gpu or kernels is None:
            return None
        can_run = all(getattr(part, "can_run_ahead", True) for part in self.model.modules())
        return kernels.Compiler(self.device) if can_run else None

    def largest_decode_shape(self) -> StepShape:
        """The decode step that needs the most memory."""
        return self.inputs.decode_shape(self.config.max_num_seqs)

    @torch.inference_mode()
    def capture_ahead(self, num_seqs: int, like: StepShape) -> bool:
        """Record the CUDA Graph of one decode step of up to `num_seqs` rows, of those that have run
        and have none: the largest, which is needed first as sequences end.

        Args:
            like: whose sampling that of the decode step will be like.

        Returns:
            Whether there was one.
        """
        if self.graphs is None:
            return False
        most = graph_rows(min(num_seqs, self.config.max_num_seqs), self.config.max_num_seqs)
        for rows in reversed(graph_sizes(most)):
            shape = self.inputs.decode_shape(rows, like.truncates)._replace(edits=like.edits)
            if self.graphs.can_capture(shape):
                with self.in_own_settings():
                    self.graphs.capture(shape)
                return True
        return False

    def agree_on_blocks(self, num_fitting: int) -> int:
        """How many KV blocks there will be, if so many fit here."""
        return num_fitting

    def on_device(self) -> AbstractContextManager:
        """Makes the runner's GPU the current one: Triton and events go by that."""
        return torch.cuda.device(self.device) if self.on_gpu else nullcontext()

    @contextmanager
    def in_own_settings(self) -> Iterator[None]:
        """Around whatever runs the model."""
        with self.on_device(), self.in_own_dtype(), self._kernels_on_demand():
            yield

    def in_own_dtype(self) -> AbstractContextManager:
        """Switches the caller's `torch.autocast` off: the engine computes in `dtype`."""
        kind = self.device.type
        is_on = torch.is_autocast_enabled(kind)
        return torch.autocast(kind, enabled=False) if is_on else nullcontext()

    def launch(self, batch: Batch, before_it_runs: Callable[[], None]) -> PendingStep:
        """Start a step; returns at once on a GPU. Tokens that the host does not know yet are taken
        on the device from the step launched before. `before_it_runs` may still sample that one."""
        step = self.prepare(batch)
        before_it_runs()
        return self.run(step)

    def prepare(self, batch: Batch) -> Step:
        """Fill a host buffer with the inputs of a batch."""
        rows = len(batch.seqs)
        has_graph = self.graphs is not None and not batch.is_prefill
        padded_rows = graph_rows(rows, self.config.max_num_seqs) if has_graph else rows
        edit_slots, slot_contents = self._edit_slots.of_batch(batch)
        shape, num_words = self.inputs.fill(batch, padded_rows, has_graph, edit_slots)
        index = self.inputs.buffer_index
        num_top = {
            row: number
            for row in batch.wishful_rows
            if (number := batch.seqs[row].sampling.logprobs) is not None
        }
        return Step(
            shape, rows, index, num_words, slot_contents, bool(batch.constraints), num_top,
            prompt_logprobs(batch),
        )  # fmt: skip

    @torch.inference_mode()
    def run(self, step: Step) -> PendingStep:
        """Run a step whose inputs are in the host buffer."""
        shape = step.shape
        with self.in_own_settings():
            self.inputs.send(step.buffer_index, step.num_words)
            if step.slot_contents:
                self.sampler.edits.write(step.slot_contents)
            # Its tokens will be written there.
            token_ids = self.sampler.host_tokens[step.buffer_index, : step.rows]
            pending = PendingStep(step, token_ids)
            if step.prompt_logprobs is not None:
                logits = self._run_with_prompt_logprobs(shape, step.prompt_logprobs, pending)
            elif self.graphs is not None and not shape.is_prefill:
                logits = self.graphs.run(shape)
            else:
                logits = self.run_shape(shape)
            if step.has_late_rows:
                pending.logits = logits
            else:
                self._finish(pending, logits)
            return pending

    def run_shape(self, shape: StepShape) -> torch.Tensor:
        """The step itself, on the device from its inputs to the sampled tokens: what a graph
        captures. Returns the logits, [rows, vocab]."""
        inputs = self.inputs.view(shape)
        context = self._context(shape, inputs)
        stream = self.model(inputs.input_ids, self.sampler.tokens, context)
        out = None if self.logits is None else self.logits[: shape.rows]
        logits = self.model.compute_logits(stream, out)
        self._sample(logits, shape)
        return logits

    def masks(self, number: int) -> np.ndarray:
        """[number, words] int32: to be filled before `sample_late`. The tokens of the steps before
        must be known. See `EditTables.masks`."""
        return self.sampler.edits.host_masks(number)

    @torch.inference_mode()
    def sample_late(self, pending: PendingStep, late: LateRows) -> None:
        """Sample rows of a step once more, none or as many as have masks: the step launched last,
        and it has late rows."""
        assert pending.logits is not None
        with self.in_own_settings():
            if late.rows:
                self._sample_late(pending, pending.logits, late)
            self._finish(pending, pending.logits)
            pending.logits = None

    def collect(self, step: PendingStep) -> list[int]:
        """Wait for a step's tokens, one a row. At most one newer step may be under way."""
        if step.done is not None:
            step.done.synchronize()
        return step.token_ids.tolist()

    def reset(self) -> None:
        """Wait for whatever is under way, and forget it."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        self.inputs.forget()
        self._edit_slots.clear()

    def change_weights(self, fill: Callable[[CausalLM], None]) -> None:
        """Let `fill` write to the model's weights where they are, so that CUDA Graphs stay
        valid."""
        in_fp8 = self.config.kv_cache_dtype == "fp8"
        with self.on_device():
            self.reset()
            unpack_weights(self.model)
            try:
                fill(self.model)
            finally:
                if in_fp8:
                    set_kv_scales(self.model)
                pack_weights(self.model, self.config)
                self.reset()  # a step may be launched by another stream

    def close(self) -> None:
        """Give all memory back. The runner is of no use afterwards; calling it again does
        nothing."""
        if self.is_closed:
            return
        self.reset()
        self.is_closed = True
        if self.graphs is not None:
            self.graphs.close()
        if self.compiler is not None:
            self.compiler.close()
        del self.graphs, self.model, self.kv_cache, self.cos_sin, self.sampler, self.inputs
        del self.logits
        gc.collect()
        if self.on_gpu:
            with self.on_device():
                torch._C._cuda_clearCublasWorkspaces()
                torch.cuda.empty_cache()

    def _kernels_on_demand(self) -> AbstractContextManager:
        return nullcontext() if self.compiler is None else self.compiler.on_demand()

    def _run_with_prompt_logprobs(
        self, shape: StepShape, wanted: PromptLogprobs, pending: PendingStep
    ) -> torch.Tensor:
        """A prefill step in which some rows want log probabilities of their prompt."""
        inputs = self.inputs.view(shape)
        context = self._context(shape, inputs)
        context.logits_indices = to_device(wanted.kept, self.device)
        stream = self.model(inputs.input_ids, self.sampler.tokens, context)
        for span in wanted.spans:
            for start in range(0, len(span.token_ids), LOGPROB_ROWS):
                own = span.token_ids[start : start + LOGPROB_ROWS]
                first = span.first_kept + start
                logits = self.model.compute_logits(stream[first : first + len(own)])
                found = self.sampler.logprobs_of(logits, to_device(own, self.device), span.num_top)
                pending.prompt_logprobs.append((span.row, span.position + start, found))
        logits = self.model.compute_logits(stream[to_device(wanted.last, self.device)])
        self._sample(logits, shape)
        return logits

    def _sample(self, logits: torch.Tensor, shape: StepShape) -> None:
        self.sampler.sample(logits, self.inputs.view(shape).sampling(shape))

    def _sample_late(self, pending: PendingStep, logits: torch.Tensor, late: LateRows) -> None:
        step, edits, number = pending.step, self.sampler.edits, len(late.rows)
        edits.send_masks(number)
        inputs = self.inputs.view(step.shape)
        # In prefill all tokens are counted already.
        is_prefill = step.shape.is_prefill
        newest = None if is_prefill else to_device(late.newest, self.device, np.int32)
        if number == step.rows:
            own = slice(0, number)
            places = edits.mask_places[own]
            self.sampler.sample(logits[own], inputs.late_sampling(step.shape, own, newest, places))
            return
        all_rows = to_device(late.rows, self.device)
        for start in range(0, number, LATE_ROWS):
            piece = slice(start, min(start + LATE_ROWS, number))
            rows = all_rows[piece]
            own_newest = None if newest is None else newest[piece]
            sampling = inputs.late_sampling(step.shape, rows, own_newest, edits.mask_places[piece])
            self.sampler.sample_again(logits[rows], sampling, rows)
        pending.token_ids.copy_(self.sampler.tokens[: step.rows], non_blocking=True)

    def _finish(self, pending: PendingStep, logits: torch.Tensor) -> None:
        """What comes after the sampling, and is in no graph."""
        step = pending.step
        if step.num_top:
            k = max(step.num_top.values())
            pending.logprobs = self.sampler.logprobs(logits[: step.rows], [*step.num_top], k)
        if self.on_gpu:
            pending.done = torch.cuda.Event()
            pending.done.record()

    def _context(self, shape: StepShape, inputs: StepInputs) -> Context:
        if shape.is_prefill:
            sizes = shape.rows, shape.tokens, shape.max_seqlen_q, shape.max_context_len
            metadata = self.backend.prefill_metadata(inputs.rest, *sizes)
        else:
            metadata = self.backend.decode_metadata(inputs.rest, shape.rows, shape.shares)
        return Context(
            backend=self.backend, kv_cache=self.kv_cache, cos_sin=self.cos_sin,
            is_prefill=shape.is_prefill, positions=inputs.positions,
            slot_mapping=inputs.slot_mapping, context_lens=inputs.context_lens,
            block_tables=inputs.block_tables, cu_seqlens_q=inputs.cu_seqlens_q,
            max_seqlen_q=shape.max_seqlen_q, max_context_len=shape.max_context_len,
            metadata=metadata,
            logits_indices=inputs.cu_seqlens_q[1:] - 1 if shape.is_prefill else None,
        )  # fmt: skip
