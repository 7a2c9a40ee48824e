"""Runs a model's steps on a device: load, launch, collect."""

import gc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

from nanovllm.config import Config
from nanovllm.engine.cuda_graphs import CudaGraphs, graph_rows
from nanovllm.engine.kv_cache import allocate_kv_cache, num_fitting_blocks
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.step_inputs import InputBuffers, StepShape
from nanovllm.layers.attention_backends import make_backend
from nanovllm.layers.linear import Linear
from nanovllm.layers.logits import Logprobs, RowEdits, compute_logprobs
from nanovllm.layers.sampler import LOGPROB_ROWS, Sampler, SamplingInputs
from nanovllm.models import CausalLM
from nanovllm.utils.context import Context
from nanovllm.utils.kernels import has_kernels, kernels
from nanovllm.utils.loader import fill_with_noise, load_weights
from nanovllm.utils.memory import gpu_memory_in_use, to_device


@dataclass
class PendingStep:
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
        if has_kernels(ones):
            kernels.embed(ones[0].int(), ones[0].long(), ones)
        torch.cuda.synchronize()


class ModelRunner:
    """Weights, KV cache and the execution of steps on one device.

    Args:
        config: the engine's options.

    Attributes:
        attention_backend: the name of the one in use.
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
        in_use_before = gpu_memory_in_use(self.device) if self.on_gpu else 0
        self.backend = make_backend(
            config.attention_backend, self.device, config.torch_dtype,
            hf_config.num_key_value_heads, hf_config.head_dim, config.kvcache_block_size,
        )  # fmt: skip
        self.attention_backend = self.backend.name
        use_graphs = self.on_gpu and not config.enforce_eager and self.backend.can_capture
        self.model = load_model(config)
        self.cos_sin = self.model.rotary_table(config.max_model_len, self.device)
        try:
            self.inputs = InputBuffers(config, self.backend)
        except RuntimeError as error:
            raise RuntimeError(
                "no memory for the inputs of a step: lower max_num_batched_tokens "
                f"({config.max_num_batched_tokens}) or max_num_seqs ({config.max_num_seqs})"
            ) from error
        self.sampler = Sampler(config.max_num_seqs, self.device)
        # Where graphs leave their logits: all in one place, not each in its own.
        self.logits: torch.Tensor | None = None
        if use_graphs:
            shape = (config.max_num_seqs, hf_config.vocab_size)
            self.logits = torch.empty(shape, dtype=config.torch_dtype, device=self.device)
        specs = self.model.cache_specs()
        self.kv_cache = allocate_kv_cache(config, specs, num_blocks=1)
        step_bytes = self._warm_up(use_graphs) if self.on_gpu else 0
        self.num_kvcache_blocks = config.num_kvcache_blocks or num_fitting_blocks(
            config, specs, step_bytes, in_use_before
        )
        self.kv_cache = allocate_kv_cache(config, specs, self.num_kvcache_blocks)
        self.graphs: CudaGraphs | None = None
        if use_graphs:
            self.graphs = CudaGraphs(self.device, self._run)
            self.graphs.capture(self.inputs.decode_shape(config.max_num_seqs))
        self._launched_rows: dict[int, int] = {}  # seq_id -> row of the last launch

    def on_device(self) -> AbstractContextManager:
        """Makes the runner's GPU the current one: Triton and events go by that."""
        return torch.cuda.device(self.device) if self.on_gpu else nullcontext()

    @torch.inference_mode()
    def launch(self, batch: Batch) -> PendingStep:
        """Start a step; returns at once on a GPU. Tokens that the host does not know yet are taken
        on the device from the step launched before."""
        rows = len(batch.seqs)
        graphs = None if batch.is_prefill else self.graphs
        padded_rows = rows if graphs is None else graph_rows(rows, self.config.max_num_seqs)
        with self.on_device():
            shape = self.inputs.send(
                batch, padded_rows, self._launched_rows, for_graph=graphs is not None
            )
            step = PendingStep(self.sampler.host_tokens[self.inputs.buffer_index, :rows], None)
            edits, reported = _wishes(batch)
            own = self._set_aside([*edits], shape) if edits else None
            if batch.is_prefill and any(seq.needs_prompt_logprobs for seq in batch.seqs):
                logits = self._run_with_prompt_logprobs(shape, batch, step)
            else:
                logits = self._run(shape) if graphs is None else graphs.run(shape)
            if own is not None:
                self.sampler.resample(logits[:rows], own, edits, self.inputs.buffer_index)
            if reported:
                k = max(reported.values())
                step.logprobs = self.sampler.logprobs(logits[:rows], [*reported], k)
            self._launched_rows = {seq.seq_id: row for row, seq in enumerate(batch.seqs)}
            if self.on_gpu:
                step.done = torch.cuda.Event()
                step.done.record()
            return step

    def collect(self, step: PendingStep) -> list[int]:
        """Wait for a step's tokens, one a row. At most one newer step may be under way."""
        if step.done is not None:
            step.done.synchronize()
        return step.token_ids.tolist()

    def reset(self) -> None:
        """Wait for whatever is under way, and forget it."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)
        self._launched_rows = {}

    def close(self) -> None:
        """Give all memory back. The runner is of no use afterwards."""
        self.reset()
        del self.graphs, self.model, self.kv_cache, self.cos_sin, self.sampler, self.inputs
        del self.logits
        gc.collect()
        if self.on_gpu:
            with self.on_device():
                torch._C._cuda_clearCublasWorkspaces()
                torch.cuda.empty_cache()

    def _run(self, shape: StepShape) -> torch.Tensor:
        """The step itself, on the device from its inputs to the sampled tokens: what a graph
        captures. Returns the logits, [rows, vocab]."""
        inputs = self.inputs.view(shape)
        stream = self.model(inputs.input_ids, self.sampler.tokens, self._context(shape))
        out = None if self.logits is None else self.logits[: shape.rows]
        logits = self.model.compute_logits(stream, out)
        self.sampler.sample(logits, inputs.sampling(shape.truncates))
        return logits

    def _set_aside(self, rows: list[int], shape: StepShape) -> SamplingInputs:
        """How a step's rows are to be sampled. Some of them will be once more, from edited logits:
        until then they are greedy, which takes the least time."""
        inputs = self.inputs.view(shape).sampling(shape.truncates)
        asked = inputs.temperatures.clone()
        inputs.temperatures[to_device(rows, self.device)] = 0
        return inputs._replace(temperatures=asked)

    def _run_with_prompt_logprobs(
        self, shape: StepShape, batch: Batch, step: PendingStep
    ) -> torch.Tensor:
        """A prefill step in which some rows may want to know of all their tokens."""
        keep: list[int] = []  # of the step's tokens, those whose logits are needed
        last: list[int] = []  # where each row's last token is among them
        spans = []
        first = 0  # of a row among the step's tokens
        for row, seq in enumerate(batch.seqs):
            start, length = batch.starts[row], batch.lengths[row]
            wanted = min(length, seq.num_prompt_tokens - 1 - start)
            k = seq.sampling_params.prompt_logprobs
            if seq.needs_prompt_logprobs and k is not None and wanted > 0:
                spans.append((row, k, len(keep), start + 1, wanted))
                keep.extend(range(first, first + wanted))
            first += length
            keep.append(first - 1)
            last.append(len(keep) - 1)
        inputs, context = self.inputs.view(shape), self._context(shape)
        context.logits_indices = to_device(keep, self.device)
        stream = self.model(inputs.input_ids, self.sampler.tokens, context)
        for row, k, at, position, wanted in spans:
            token_ids = batch.seqs[row].token_ids
            for start in range(0, wanted, LOGPROB_ROWS):
                end, place = min(start + LOGPROB_ROWS, wanted), position + start
                logits = self.model.compute_logits(stream[at + start : at + end])
                own = to_device(token_ids[place : position + end], self.device)
                step.prompt_logprobs.append((row, place, compute_logprobs(logits, own, k)))
        logits = self.model.compute_logits(stream[to_device(last, self.device)])
        self.sampler.sample(logits, inputs.sampling(shape.truncates))
        return logits

    def _context(self, shape: StepShape) -> Context:
        inputs, metadata = self.inputs.view(shape), None
        if not shape.is_prefill:
            metadata = self.backend.decode_metadata(inputs.decode_metadata, shape.rows)
        return Context(
            backend=self.backend, kv_cache=self.kv_cache, cos_sin=self.cos_sin,
            is_prefill=shape.is_prefill, positions=inputs.positions,
            slot_mapping=inputs.slot_mapping, context_lens=inputs.context_lens,
            block_tables=inputs.block_tables, cu_seqlens_q=inputs.cu_seqlens_q,
            max_seqlen_q=shape.max_seqlen_q, max_context_len=shape.max_context_len,
            decode_metadata=metadata,
            logits_indices=inputs.cu_seqlens_q[1:] - 1 if shape.is_prefill else None,
        )  # fmt: skip

    def _warm_up(self, use_graphs: bool) -> int:
        """Run the largest steps of each kind once, on a cache of one block; returns the bytes that
        a step needs at the most.

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
        graph_bytes = 0  # of the first, a decode step
        for shape in (decode, prefill, decode):
            inputs = self.inputs.view(shape)
            inputs.slot_mapping.fill_(-1)
            inputs.context_lens.fill_(shape.max_seqlen_q)
            starts = torch.arange(shape.rows + 1) * shape.max_seqlen_q
            inputs.cu_seqlens_q.copy_(starts.clamp_(max=shape.tokens))
            logits = self._run(shape)
            self.inputs.device.zero_()
            graph_bytes = graph_bytes or self._activation_bytes()
        # What a step holds at once when rows want their logits changed, and to know of them.
        edited = logits.clone().float()
        first_token = self.sampler.tokens[:1].expand(LOGPROB_ROWS)
        compute_logprobs(logits[:1].expand(LOGPROB_ROWS, -1), first_token, 1)
        del logits, edited
        torch.cuda.synchronize(self.device)
        # The graphs' own pool holds a decode step's memory once more.
        return self._activation_bytes() + (graph_bytes if use_graphs else 0)

    def _activation_bytes(self) -> int:
        stats = torch.cuda.memory_stats(self.device)
        return stats["allocated_bytes.all.peak"] - stats["allocated_bytes.all.current"]


def _wishes(batch: Batch) -> tuple[dict[int, RowEdits], dict[int, int]]:
    """What some rows of a step want besides a token sampled from their logits as they are: changes
    of these first, and of how many of the most likely tokens to know, both by row."""
    edits: dict[int, RowEdits] = {}
    reported: dict[int, int] = {}
    for row, seq in enumerate(batch.seqs):
        sampling = seq.sampling
        if (sampling.edits is None and sampling.logprobs is None) or not batch.samples[row]:
            continue
        num_generated = batch.starts[row] + batch.lengths[row] - seq.num_prompt_tokens
        if sampling.edits is not None and sampling.edits.apply_to(num_generated):
            generated = seq.output_token_ids if sampling.penalizes else []
            edits[row] = RowEdits(sampling.edits, num_generated, generated)
        if sampling.logprobs is not None:
            reported[row] = sampling.logprobs
    return edits, reported


def load_model(config: Config) -> CausalLM:
    """The network with its weights, on the device.

    Raises:
        ValueError, FileNotFoundError: for a checkpoint that cannot be loaded.
    """
    with torch.device("meta"):
        model = config.model_class(config.hf_config)
    # As `to_empty` would do, which imports sympy. A tied head has memory, too, for a moment: what
    # comes after lies where a step of one row takes 1% less (see docs/performance.md).
    memory = {
        name: torch.empty(parameter.shape, dtype=config.torch_dtype, device=config.torch_device)
        for name, parameter in model.state_dict().items()
    }
    model.load_state_dict(memory, assign=True)
    model.requires_grad_(False).tie_weights()
    if config.load_format == "dummy":
        fill_with_noise(model, config.hf_config.initializer_range, config.seed)
    else:
        load_weights(config.model_dir, model.checkpoint_views(), model.ignored_tensors())
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack()
    return model
