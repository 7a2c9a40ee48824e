"""Turns a scheduled batch into tensors, runs the model, owns the KV cache and the CUDA Graphs."""

import gc
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.scheduler import Batch
from nanovllm.layers.attention import BACKENDS, select_backend
from nanovllm.layers.linear import Linear, can_pack
from nanovllm.layers.rotary_embedding import rope_cos_sin
from nanovllm.layers.sampler import Sampler
from nanovllm.models.qwen3 import Qwen3ForCausalLM
from nanovllm.utils.context import Context
from nanovllm.utils.loader import fill_with_noise, load_weights
from nanovllm.utils.memory import GPU_RESERVE, available_host_memory, gpu_memory_in_use

# Dividing by a smaller temperature could overflow: it counts as 0, greedy. Above the largest, all
# tokens are equally likely in float32 anyway.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-5, 1e30


class StepInputs(NamedTuple):
    """What the device needs to know of a step: views of one int32 buffer, copied in one go.

    `carve` lays them out from the shapes alone, the same way on host and device.
    """

    seeds: torch.Tensor  # [rows] int64
    temperatures: torch.Tensor  # [rows] float32
    context_lens: torch.Tensor  # [rows]
    cu_seqlens_q: torch.Tensor  # [rows + 1]
    input_ids: torch.Tensor  # [tokens]; -1 - i stands for token i of the previous step
    positions: torch.Tensor  # [tokens]
    slot_mapping: torch.Tensor  # [tokens]
    block_tables: torch.Tensor  # [rows, width]

    @staticmethod
    def sizes(tokens: int, rows: int, width: int) -> list[int]:
        """int32 words of each field."""
        return [2 * rows, rows, rows, rows + 1, tokens, tokens, tokens, rows * width]

    @classmethod
    def carve(cls, buffer: torch.Tensor, tokens: int, rows: int, width: int) -> "StepInputs":
        sizes = cls.sizes(tokens, rows, width)
        pieces = list(buffer[: sum(sizes)].split(sizes))
        pieces[0] = pieces[0].view(torch.int64)
        pieces[1] = pieces[1].view(torch.float32)
        pieces[-1] = pieces[-1].view(rows, width)
        return cls(*pieces)


@dataclass
class Launch:
    """A step under way: its tokens, and the event after which the host may read them."""

    token_ids: torch.Tensor  # [rows] int64, on the host
    done: torch.cuda.Event | None


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
        hf_config = config.hf_config
        self.attention_backend = select_backend(
            config.attention_backend, self.device, config.torch_dtype, hf_config.head_dim,
            config.kvcache_block_size,
        )  # fmt: skip
        # The torch backend reads lengths on the host, which a graph cannot.
        self.use_graphs = (
            self.on_gpu and not config.enforce_eager and self.attention_backend != "torch"
        )
        in_use_before = gpu_memory_in_use(self.device) if self.on_gpu else 0
        self.model = self._load_model()
        self.sampler = Sampler()
        self.cos_sin = rope_cos_sin(hf_config, config.max_model_len, self.device)
        self._allocate_inputs()
        self.kv_cache = self._allocate_kv_cache(num_blocks=1)
        if self.on_gpu:
            self._warm_up()
        self.num_kvcache_blocks = config.num_kvcache_blocks or self._fitting_blocks(in_use_before)
        self.kv_cache = self._allocate_kv_cache(self.num_kvcache_blocks)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        if self.use_graphs:  # one of each: every new stream would bring a cuBLAS workspace
            self._graph_pool = torch.cuda.graph_pool_handle()
            self._capture_stream = torch.cuda.Stream(self.device)
        self._launched_rows: dict[int, int] = {}  # seq_id -> row of the last launch

    @torch.inference_mode()
    def launch(self, batch: Batch) -> Launch:
        """Start a step; returns at once on a GPU. Tokens that the host does not know yet are taken
        on the device from the step launched before."""
        rows = len(batch.seqs)
        for_graph = self._runs_as_graph(batch)
        padded_rows = self._graph_size(rows) if for_graph else rows
        inputs, context = self._prepare(batch, padded_rows)
        if for_graph and padded_rows in self.graphs:
            self.graphs[padded_rows].replay()
        else:
            self._run(inputs, context)
            if for_graph:
                self._capture(padded_rows, inputs, context)
        self._launched_rows = {seq.seq_id: row for row, seq in enumerate(batch.seqs)}
        if not self.on_gpu:
            return Launch(self.sampled[:rows].clone(), None)
        token_ids = self._host_tokens[self._turn][:rows]
        token_ids.copy_(self.sampled[:rows], non_blocking=True)
        done = torch.cuda.Event()
        done.record()
        return Launch(token_ids, done)

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
        del self.model, self.kv_cache, self.cos_sin, self.sampled
        del self._host_inputs, self._host_tokens, self._device_inputs
        gc.collect()
        if self.on_gpu:
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()

    def _load_model(self) -> Qwen3ForCausalLM:
        config = self.config
        with torch.device("meta"):
            model = Qwen3ForCausalLM(config.hf_config, BACKENDS[self.attention_backend])
        model = model.to(config.torch_dtype).to_empty(device=self.device).requires_grad_(False)
        model.tie_weights()
        if config.load_format == "dummy":
            fill_with_noise(model, config.hf_config.initializer_range, config.seed)
        else:
            ignored = frozenset(["lm_head.weight"] if model.is_tied else [])
            load_weights(config.model_dir, model.checkpoint_views(), ignored)
        for module in model.modules():
            if isinstance(module, Linear) and can_pack(module.weight):
                module.pack()
        return model

    def _allocate_inputs(self) -> None:
        """Buffers that every step reuses, at fixed places, as CUDA Graphs need them.

        The host has two of each, taken in turns, since the device may still be reading the one of
        the last step; two steps back, all is read.
        """
        config = self.config
        rows = config.max_num_seqs
        tokens = max(config.max_num_batched_tokens, rows)
        self.max_width = -(-config.max_model_len // config.kvcache_block_size)
        size = sum(StepInputs.sizes(tokens, rows, self.max_width))
        self._device_inputs = torch.zeros(size, dtype=torch.int32, device=self.device)
        self._host_inputs = [
            torch.zeros(size, dtype=torch.int32, pin_memory=self.on_gpu) for _ in range(2)
        ]
        self._host_tokens = [
            torch.zeros(rows, dtype=torch.int64, pin_memory=self.on_gpu) for _ in range(2)
        ]
        self._turn = 0
        self.sampled = torch.zeros(rows, dtype=torch.int64, device=self.device)

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
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise RuntimeError(
                f"no memory for a KV cache of {num_blocks} blocks: lower num_kvcache_blocks"
            ) from error

    def _warm_up(self) -> None:
        """Run the largest prefill and the largest decode step once, on a cache of one block.

        Libraries load, kernels compile, and the allocator learns the peak. Nothing is written: all
        rows are padding as far as the KV cache is concerned.
        """
        config = self.config
        length = min(config.max_num_batched_tokens, config.max_model_len - 1)
        rows = min(config.max_num_seqs, max(1, config.max_num_batched_tokens // length))
        torch.cuda.reset_peak_memory_stats(self.device)
        for is_prefill, num_rows, num_tokens in (
            (True, rows, length),
            (False, config.max_num_seqs, 1),
        ):
            inputs = StepInputs.carve(
                self._device_inputs, num_rows * num_tokens, num_rows, self.max_width
            )
            inputs.slot_mapping.fill_(-1)
            inputs.context_lens.fill_(num_tokens)
            inputs.cu_seqlens_q.copy_(torch.arange(num_rows + 1) * num_tokens)
            self._run(inputs, self._context(inputs, is_prefill, num_tokens, config.max_model_len))
            self._device_inputs.zero_()
        torch.cuda.synchronize(self.device)

    def _fitting_blocks(self, in_use_before: int) -> int:
        """How many KV blocks the memory holds that is really free, within this engine's share."""
        config, hf_config = self.config, self.config.hf_config
        block_bytes = (
            2 * hf_config.num_hidden_layers * config.kvcache_block_size
            * hf_config.num_key_value_heads * hf_config.head_dim * config.torch_dtype.itemsize
        )  # fmt: skip
        if not self.on_gpu:
            # A quarter of what is there; never more than all sequences at full length could use.
            wanted = config.max_num_seqs * self.max_width
            num_blocks = min(wanted, available_host_memory() // 4 // block_bytes)
        else:
            stats = torch.cuda.memory_stats(self.device)
            activations = stats["allocated_bytes.all.peak"] - stats["allocated_bytes.all.current"]
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info(self.device)
            in_use = gpu_memory_in_use(self.device) - in_use_before
            share = int(total * config.gpu_memory_utilization) - in_use
            num_blocks = (min(share, free) - activations - GPU_RESERVE) // block_bytes
        if num_blocks < 1:
            raise RuntimeError(
                "no memory left for the KV cache: raise gpu_memory_utilization, lower "
                "max_num_batched_tokens or max_num_seqs, or free memory on the device"
            )
        return num_blocks

    def _prepare(self, batch: Batch, padded_rows: int) -> tuple[StepInputs, Context]:
        """Fill this turn's host buffer with a batch, and send it to the device in one copy."""
        self._turn = 1 - self._turn
        rows, block_size = len(batch.seqs), self.config.kvcache_block_size
        tables = [seq.block_table for seq in batch.seqs]
        # A graph's inputs have one shape a size, so its block tables are as wide as can be.
        for_graph = self._runs_as_graph(batch)
        width = self.max_width if for_graph else max(map(len, tables))
        num_tokens = batch.num_tokens if batch.is_prefill else padded_rows
        shape = (num_tokens, padded_rows, width)
        buffer = self._host_inputs[self._turn][: sum(StepInputs.sizes(*shape))]
        host = StepInputs(*(piece.numpy() for piece in StepInputs.carve(buffer, *shape)))

        starts, lengths = np.array(batch.starts), np.array(batch.lengths)
        ends = starts + lengths
        host.seeds[:rows] = [seq.seed for seq in batch.seqs]
        host.temperatures[:rows] = [
            min(t, MAX_TEMPERATURE)
            if (t := seq.sampling_params.temperature) >= MIN_TEMPERATURE
            else 0
            for seq in batch.seqs
        ]
        host.context_lens[:rows] = ends
        host.cu_seqlens_q[0] = 0
        np.cumsum(lengths, out=host.cu_seqlens_q[1 : rows + 1])
        for row, table in enumerate(tables):
            host.block_tables[row, : len(table)] = table
        row_of_token = np.repeat(np.arange(rows), lengths)
        real_tokens = len(row_of_token)
        positions = np.arange(real_tokens) + (starts - host.cu_seqlens_q[:rows])[row_of_token]
        host.positions[:real_tokens] = positions
        blocks = host.block_tables[row_of_token, positions // block_size]
        host.slot_mapping[:real_tokens] = blocks * block_size + positions % block_size
        if batch.is_prefill:
            spans = (seq.token_ids[s:e] for seq, s, e in zip(batch.seqs, batch.starts, ends))
            host.input_ids[:] = list(chain.from_iterable(spans))
        else:
            host.input_ids[:rows] = [
                seq.token_ids[start] if start < len(seq.token_ids)
                else -1 - self._launched_rows[seq.seq_id]
                for seq, start in zip(batch.seqs, batch.starts)
            ]  # fmt: skip
        if padded_rows > rows:  # rows that write nowhere and attend to nothing
            host.slot_mapping[rows:] = -1
            for piece in (host.context_lens, host.positions, host.input_ids, host.temperatures):
                piece[rows:padded_rows] = 0
        self._device_inputs[: buffer.numel()].copy_(buffer, non_blocking=True)
        inputs = StepInputs.carve(self._device_inputs, *shape)
        max_context = self.config.max_model_len if for_graph else int(ends.max())
        return inputs, self._context(inputs, batch.is_prefill, max(batch.lengths), max_context)

    def _context(
        self, inputs: StepInputs, is_prefill: bool, max_seqlen_q: int, max_context_len: int
    ) -> Context:
        return Context(
            cos_sin=self.cos_sin, is_prefill=is_prefill, positions=inputs.positions,
            slot_mapping=inputs.slot_mapping, context_lens=inputs.context_lens,
            block_tables=inputs.block_tables, cu_seqlens_q=inputs.cu_seqlens_q,
            max_seqlen_q=max_seqlen_q, max_context_len=max_context_len,
        )  # fmt: skip

    def _run(self, inputs: StepInputs, context: Context) -> None:
        """The step itself, on the device from its inputs to `sampled`: what a graph captures."""
        previous = self.sampled[(-1 - inputs.input_ids).clamp_(min=0)]
        input_ids = torch.where(inputs.input_ids < 0, previous, inputs.input_ids)
        hidden = self.model(input_ids, self.kv_cache, context)
        if context.is_prefill:
            hidden = hidden[inputs.cu_seqlens_q[1:] - 1]
        logits = self.model.compute_logits(hidden)
        rows = logits.shape[0]
        self.sampler(
            logits, inputs.temperatures, inputs.seeds, inputs.context_lens, self.sampled[:rows]
        )

    def _runs_as_graph(self, batch: Batch) -> bool:
        return self.use_graphs and not batch.is_prefill

    def _graph_size(self, rows: int) -> int:
        """The batch size whose graph runs `rows` rows: 1, 2, 4, 8, then multiples of 16."""
        size = 1 << (rows - 1).bit_length() if rows <= 8 else -(-rows // 16) * 16
        return min(size, self.config.max_num_seqs)

    def _capture(self, size: int, inputs: StepInputs, context: Context) -> None:
        """Record the decode step of one size, for the next time. All graphs share one pool."""
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would collect garbage and empty the allocator's cache each time.
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._capture_stream):
            graph.capture_begin(self._graph_pool)
            self._run(inputs, context)
            graph.capture_end()
        torch.cuda.synchronize(self.device)
        self.graphs[size] = graph
