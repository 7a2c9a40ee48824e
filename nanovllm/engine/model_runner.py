"""Turns a scheduled batch into tensors, runs the model, owns the KV cache and the CUDA Graphs."""

import gc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.step_inputs import InputBuffers, StepInputs, StepShape
from nanovllm.kernels.embed import embed
from nanovllm.kernels.gumbel_sample import gumbel_sample
from nanovllm.kernels.paged_decode import num_decode_ranges
from nanovllm.kernels.truncate import truncation_thresholds
from nanovllm.layers.attention import BACKENDS, select_backend
from nanovllm.layers.layernorm import Residual
from nanovllm.layers.linear import Linear, can_pack
from nanovllm.layers.logits import LogitEdits, Logprobs, compute_logprobs, edit_logits_
from nanovllm.layers.rotary_embedding import rope_cos_sin
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.utils.context import Context
from nanovllm.utils.loader import fill_with_noise, load_weights
from nanovllm.utils.memory import (
    GPU_RESERVE,
    available_host_memory,
    gpu_memory_in_use,
    to_device,
)

# Rows of logits whose log probabilities are computed at a time: in float32 they take much room.
LOGPROB_ROWS = 128


@dataclass
class Launch:
    """A step under way: its tokens, and the event after which the host may read them.

    Log probabilities, too, may be read after that event: of some rows' new tokens, and of tokens of
    one row's prompt, the first of which is at the position given.
    """

    token_ids: torch.Tensor  # [rows] int64, on the host
    done: torch.cuda.Event | None
    logprobs: list[tuple[list[int], Logprobs]] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, int, Logprobs]] = field(default_factory=list)


@torch.inference_mode()
def load_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """Use a GPU a first time, for which its context is made, and cuBLAS and torch's kernels load.

    Triton finds its compiler, too. Much of that goes on while other threads of Python run.
    """
    with torch.cuda.device(device):
        ones = torch.ones(16, 16, dtype=dtype, device=device)
        compute_logprobs(ones @ ones, ones[0].long(), 1)
        embed(ones[0].int(), ones[0].long(), ones)
        torch.cuda.synchronize()


class ModelRunner:
    """Weights, KV cache and the execution of steps on one device.

    Args:
        config: the engine's options.

    Attributes:
        attention_backend: the one in use.
        num_kvcache_blocks: size of the KV cache.

    Raises:
        ValueError, FileNotFoundError: for a checkpoint or an option that cannot work.
        RuntimeError: if there is no memory left for a KV cache.
    """

    @torch.inference_mode()
    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = config.torch_device
        self.on_gpu = self.device.type == "cuda"
        with self.on_device(), torch.device("cpu"):  # whatever the process has made its default
            self._build()

    def _build(self) -> None:
        config, hf_config = self.config, self.config.hf_config
        self.attention_backend = select_backend(
            config.attention_backend, self.device, config.torch_dtype, hf_config.head_dim,
            config.kvcache_block_size,
        )  # fmt: skip
        # The torch backend reads lengths on the host, which a graph cannot.
        self.use_graphs = (
            self.on_gpu and not config.enforce_eager and self.attention_backend != "torch"
        )
        self._graph_bytes = 0
        in_use_before = gpu_memory_in_use(self.device) if self.on_gpu else 0
        self.model = self._load_model()
        self.cos_sin = rope_cos_sin(hf_config, config.max_model_len, self.device)
        num_ranges = 0
        if self.attention_backend == "triton":
            num_ranges = num_decode_ranges(self.device, hf_config.num_key_value_heads)
        try:
            self.inputs = InputBuffers(config, num_ranges)
        except RuntimeError as error:
            raise RuntimeError(
                "no memory for the inputs of a step: lower max_num_batched_tokens "
                f"({config.max_num_batched_tokens}) or max_num_seqs ({config.max_num_seqs})"
            ) from error
        rows = config.max_num_seqs
        # A step's tokens go where its turn says, since the host may not have read the last ones.
        self.host_tokens = torch.zeros(2, rows, dtype=torch.int64, pin_memory=self.on_gpu)
        self.sampled = torch.zeros(rows, dtype=torch.int64, device=self.device)
        self.kv_cache = self._allocate_kv_cache(num_blocks=1)
        if self.on_gpu:
            self._warm_up()
        self.num_kvcache_blocks = config.num_kvcache_blocks or self._fitting_blocks(in_use_before)
        self.kv_cache = self._allocate_kv_cache(self.num_kvcache_blocks)
        # Each with the residual stream that it leaves, if it ends before the head.
        self.graphs: dict[StepShape, tuple[torch.cuda.CUDAGraph, Residual | None]] = {}
        if self.use_graphs:  # one of each: every new stream would bring a cuBLAS workspace
            self._graph_pool = torch.cuda.graph_pool_handle()
            self._capture_stream = torch.cuda.Stream(self.device)
            # The largest first: what its tensors leave in the pool holds those of all others.
            # After smaller ones each would add to it (measured, 512 rows: 2.4 GB in place of 0.3).
            self._capture(self.inputs.decode_shape(config.max_num_seqs))
        self._launched_rows: dict[int, int] = {}  # seq_id -> row of the last launch

    def on_device(self) -> AbstractContextManager:
        """Makes the runner's GPU the current one: Triton and events go by that."""
        return torch.cuda.device(self.device) if self.on_gpu else nullcontext()

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launch:
        """Start a step; returns at once on a GPU. Tokens that the host does not know yet are taken
        on the device from the step launched before."""
        rows = len(batch.seqs)
        for_graph = self.use_graphs and not batch.is_prefill
        padded_rows = self._graph_size(rows) if for_graph else rows
        with self.on_device():
            shape = self.inputs.send(batch, padded_rows, self._launched_rows, for_graph)
            launch = Launch(self.host_tokens[self.inputs.turn, :rows], None)
            if not shape.has_head and batch.misses_prompt_logprobs:
                residual = self._run_for_prompt_logprobs(shape, batch, launch)
            elif for_graph and shape in self.graphs:
                graph, residual = self.graphs[shape]
                graph.replay()
            else:
                residual = self._run(shape)
                if for_graph:
                    self._capture(shape)
            if residual is not None:
                # A copy, since the norm takes the partial sums out, and a graph's are to stay.
                logits = self.model.compute_logits(replace(residual))
                self._sample_edited(logits[:rows], shape, batch, launch)
            self._launched_rows = {seq.seq_id: row for row, seq in enumerate(batch.seqs)}
            if self.on_gpu:
                launch.done = torch.cuda.Event()
                launch.done.record()
            return launch

    def collect(self, launch: Launch) -> list[int]:
        """Wait for a step's tokens, one a row. At most one newer step may be under way."""
        if launch.done is not None:
            launch.done.synchronize()
        return launch.token_ids.tolist()

    def reset(self) -> None:
        """Wait for whatever is under way, and forget it."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        self._launched_rows = {}

    def close(self) -> None:
        """Give all memory back. The runner is of no use afterwards."""
        self.reset()
        self.graphs.clear()
        del self.model, self.kv_cache, self.cos_sin, self.sampled, self.inputs, self.host_tokens
        gc.collect()
        if self.on_gpu:
            with self.on_device():
                torch._C._cuda_clearCublasWorkspaces()
                torch.cuda.empty_cache()

    def _load_model(self) -> Qwen3ForCausalLM:
        config = self.config
        with torch.device("meta"):
            model = Qwen3ForCausalLM(config.hf_config, BACKENDS[self.attention_backend])
        # As `to_empty` would do, which imports sympy. A tied head has memory, too, for a moment:
        # what comes after lies where a step of one row takes 1% less (see docs/performance.md).
        memory = {
            name: torch.empty(parameter.shape, dtype=config.torch_dtype, device=self.device)
            for name, parameter in model.state_dict().items()
        }
        model.load_state_dict(memory, assign=True)
        model.requires_grad_(False).tie_weights()
        if config.load_format == "dummy":
            fill_with_noise(model, config.hf_config.initializer_range, config.seed)
        else:
            ignored = frozenset(["lm_head.weight"] if model.is_tied else [])
            load_weights(config.model_dir, model.checkpoint_views(), ignored)
        for module in model.modules():
            if isinstance(module, Linear) and can_pack(module.weight):
                module.pack()
        return model

    def _allocate_kv_cache(self, num_blocks: int) -> torch.Tensor:
        """[2, layers, num_blocks, block_size, num_kv_heads, head_dim], keys then values.

        On a CPU a block's memory goes head by head, as attention reads it: the cache is a
        transposed view.
        """
        hf_config = self.config.hf_config
        block_size, num_kv_heads = self.config.kvcache_block_size, hf_config.num_key_value_heads
        block = (block_size, num_kv_heads) if self.on_gpu else (num_kv_heads, block_size)
        shape = (2, hf_config.num_hidden_layers, num_blocks, *block, hf_config.head_dim)
        try:
            cache = torch.empty(shape, dtype=self.config.torch_dtype, device=self.device)
            return cache if self.on_gpu else cache.transpose(3, 4)
        except RuntimeError as error:
            raise RuntimeError(
                f"no memory for a KV cache of {num_blocks} blocks of {block_size} tokens: lower "
                "num_kvcache_blocks or kvcache_block_size"
            ) from error

    def _warm_up(self) -> None:
        """Run the largest steps of each kind once, on a cache of one block.

        Libraries load, kernels compile, and the allocator learns the peak. Nothing is written: all
        rows are padding as far as the KV cache is concerned.
        """
        config = self.config
        length = min(config.max_num_batched_tokens, config.max_model_len - 1)
        tokens = min(config.max_num_batched_tokens, config.max_num_seqs * length)
        rows, width, context = -(-tokens // length), self.inputs.max_width, config.max_model_len
        prefill = StepShape(True, rows, tokens, width, length, context)
        decode = self.inputs.decode_shape(config.max_num_seqs)
        torch.cuda.reset_peak_memory_stats(self.device)
        for shape in (decode, prefill, decode._replace(has_head=False)):
            inputs = self.inputs.view(shape)
            inputs.slot_mapping.fill_(-1)
            inputs.context_lens.fill_(shape.max_seqlen_q)
            starts = torch.arange(shape.rows + 1) * shape.max_seqlen_q
            inputs.cu_seqlens_q.copy_(starts.clamp_(max=shape.tokens))
            residual = self._run(shape)
            self.inputs.device.zero_()
            if shape is decode and self.use_graphs:  # which the graphs' own pool holds again
                self._graph_bytes = self._activation_bytes()
        # What a step holds at once when requests want its logits changed, and to know of them.
        logits = self.model.compute_logits(residual)
        edited = logits.to(torch.float32, copy=True)
        first_token = self.sampled[:1].expand(LOGPROB_ROWS)
        compute_logprobs(logits[:1].expand(LOGPROB_ROWS, -1), first_token, 1)
        del residual, logits, edited
        torch.cuda.synchronize(self.device)

    def _activation_bytes(self) -> int:
        stats = torch.cuda.memory_stats(self.device)
        return stats["allocated_bytes.all.peak"] - stats["allocated_bytes.all.current"]

    def _fitting_blocks(self, in_use_before: int) -> int:
        """How many KV blocks the memory holds that is really free, within this engine's share."""
        config, hf_config = self.config, self.config.hf_config
        block_bytes = (
            2 * hf_config.num_hidden_layers * config.kvcache_block_size
            * hf_config.num_key_value_heads * hf_config.head_dim * config.torch_dtype.itemsize
        )  # fmt: skip
        if not self.on_gpu:
            # A quarter of what is there; never more than all sequences at full length could use.
            wanted = config.max_num_seqs * self.inputs.max_width
            num_blocks = min(wanted, available_host_memory() // 4 // block_bytes)
        else:
            activations = self._activation_bytes() + self._graph_bytes
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(self.device)
            in_use = total - free - in_use_before
            share = int(total * config.gpu_memory_utilization) - in_use
            num_blocks = (min(share, free) - activations - GPU_RESERVE) // block_bytes
        if num_blocks < 1:
            way_out = (
                "raise gpu_memory_utilization, lower max_num_batched_tokens or max_num_seqs, or "
                "free memory on the device"
                if self.on_gpu
                else "lower kvcache_block_size, give num_kvcache_blocks, or free memory"
            )
            raise RuntimeError(f"no memory left for the KV cache: {way_out}")
        return num_blocks

    def _run(self, shape: StepShape) -> Residual | None:
        """The step itself, on the device from its inputs to `sampled`: what a graph captures.

        If the shape says that tokens are not sampled from here, returns what the head needs.
        """
        inputs = self.inputs.view(shape)
        context = self._context(inputs, shape)
        residual = self.model(inputs.input_ids, self.sampled, self.kv_cache, context)
        if not shape.has_head:
            return residual
        self._sample(self.model.compute_logits(residual), inputs, shape.truncates)
        return None

    def _sample(self, logits: torch.Tensor, inputs: StepInputs, truncates: bool) -> None:
        rows = slice(len(logits))
        temperatures, thresholds = inputs.temperatures[rows], None
        if truncates:
            thresholds = truncation_thresholds(
                logits, temperatures, inputs.top_k[rows], inputs.top_p[rows], inputs.min_p[rows]
            )
        gumbel_sample(
            logits, temperatures, inputs.seeds[rows], inputs.context_lens[rows],
            self.sampled[rows], self.host_tokens, inputs.turn, thresholds,
        )  # fmt: skip

    def _sample_edited(
        self, logits: torch.Tensor, shape: StepShape, batch: Batch, launch: Launch
    ) -> None:
        """Sample from logits [rows, vocab] that some rows want changed, or to know of."""
        edits, wants = [], []
        for row, seq in enumerate(batch.seqs):
            length, params = batch.starts[row] + batch.lengths[row], seq.sampling_params
            num_generated = length - seq.num_prompt_tokens
            if not batch.samples[row]:
                continue
            if params.edits_all_logits or num_generated < params.min_tokens:
                prompt, generated = np.empty(0), []
                if seq.penalizes:
                    prompt, generated = seq.distinct_prompt_tokens, seq.output_token_ids
                ending = seq.ending_token_ids
                edits.append(LogitEdits(row, params, ending, prompt, generated, num_generated))
            if params.logprobs is not None:
                wants.append(row)
        edited = logits.to(torch.float32, copy=True)
        edit_logits_(edited, edits)
        self._sample(edited, self.inputs.view(shape), batch.truncates)
        k = max((batch.seqs[row].sampling_params.logprobs for row in wants), default=0)
        for start in range(0, len(wants), LOGPROB_ROWS):
            rows = wants[start : start + LOGPROB_ROWS]
            places = to_device(rows, self.device)
            found = compute_logprobs(logits[places], self.sampled[places], k)
            launch.logprobs.append((rows, found))

    def _run_for_prompt_logprobs(self, shape: StepShape, batch: Batch, launch: Launch) -> Residual:
        """A prefill step in which some rows may want to know of all their tokens; returns what the
        head needs for the rows' next ones."""
        inputs = self.inputs.view(shape)
        keep: list[int] = []  # of the step's tokens, those whose logits are needed
        last: list[int] = []  # where each row's last token is among them
        spans = []
        first = 0  # of a row among the step's tokens
        for row, seq in enumerate(batch.seqs):
            start, length = batch.starts[row], batch.lengths[row]
            wanted = min(length, seq.num_prompt_tokens - 1 - start)
            if seq.misses_prompt_logprobs and wanted > 0:
                spans.append((row, len(keep), start + 1, wanted))
                keep.extend(range(first, first + wanted))
            first += length
            keep.append(first - 1)
            last.append(len(keep) - 1)
        context = self._context(inputs, shape)
        context.logits_indices = to_device(keep, self.device)
        residual = self.model(inputs.input_ids, self.sampled, self.kv_cache, context)
        for row, at, position, wanted in spans:
            seq = batch.seqs[row]
            for start in range(0, wanted, LOGPROB_ROWS):
                end, place = min(start + LOGPROB_ROWS, wanted), position + start
                logits = self.model.compute_logits(residual.rows(slice(at + start, at + end)))
                own = to_device(seq.token_ids[place : position + end], self.device)
                found = compute_logprobs(logits, own, seq.sampling_params.prompt_logprobs)
                launch.prompt_logprobs.append((row, place, found))
        return residual.rows(to_device(last, self.device))

    def _context(self, inputs: StepInputs, shape: StepShape) -> Context:
        plan = (inputs.bounds, inputs.chunk_counts, inputs.tiles) if shape.has_plan else None
        return Context(
            cos_sin=self.cos_sin, is_prefill=shape.is_prefill, positions=inputs.positions,
            slot_mapping=inputs.slot_mapping, context_lens=inputs.context_lens,
            block_tables=inputs.block_tables, cu_seqlens_q=inputs.cu_seqlens_q,
            logits_indices=inputs.cu_seqlens_q[1:] - 1 if shape.is_prefill else None,
            decode_plan=plan, max_seqlen_q=shape.max_seqlen_q,
            max_context_len=shape.max_context_len,
        )  # fmt: skip

    def _graph_size(self, rows: int) -> int:
        """The batch size whose graph runs `rows` rows: 1, 2, 4, 8, then multiples of 16."""
        size = 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 16) * 16
        return min(size, self.config.max_num_seqs)

    def _capture(self, shape: StepShape) -> None:
        """Record the decode step of one shape, for the next time. All graphs share one pool."""
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would collect garbage and empty the allocator's cache each time.
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._capture_stream):
            graph.capture_begin(self._graph_pool)
            try:
                residual = self._run(shape)
            finally:  # a stream left capturing would refuse everything after
                graph.capture_end()
        torch.cuda.synchronize(self.device)
        self.graphs[shape] = graph, residual
