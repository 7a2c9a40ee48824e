"""Runs a model's steps on a device: load, launch, collect."""

import gc
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from nanovllm.config import Config
from nanovllm.engine.cuda_graphs import CudaGraphs, graph_rows
from nanovllm.engine.kv_cache import allocate_kv_cache, num_fitting_blocks
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.step_inputs import InputBuffers, StepInputs, StepShape
from nanovllm.layers.attention_backends import make_backend
from nanovllm.layers.linear import Linear
from nanovllm.layers.logits import Logprobs, RowEdits, compute_logprobs
from nanovllm.layers.sampler import LOGPROB_ROWS, Sampler
from nanovllm.models import CausalLM
from nanovllm.utils.context import Context
from nanovllm.utils.kernels import has_kernels, kernels
from nanovllm.utils.loader import fill_with_noise, load_weights
from nanovllm.utils.memory import gpu_memory_in_use, to_device


@dataclass
class PendingStep:
    """A step that was launched. On a GPU, what it yields may be read after `done`.

    Attributes:
        token_ids: [rows] int64, on the host.
        done: None on a CPU, where the step has been computed.
        logprobs: (rows, log probabilities of the tokens just sampled there).
        prompt_logprobs: (row, position of the first token, log probabilities of tokens of the
            row's prompt).
    """

    token_ids: torch.Tensor
    done: torch.cuda.Event | None = None
    logprobs: list[tuple[list[int], Logprobs]] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, int, Logprobs]] = field(default_factory=list)


class PromptSpan(NamedTuple):
    """Tokens of a row's prompt whose log probabilities a prefill step finds.

    Attributes:
        row: of the batch.
        num_top: how many of the most likely tokens are reported with each.
        first_kept: where their logits begin, among the tokens of the step that are kept.
        position: of the first token whose probability is found: one after the first input token.
        num_tokens: how many.
    """

    row: int
    num_top: int
    first_kept: int
    position: int
    num_tokens: int


@torch.inference_mode()
def load_libraries(device: torch.device, dtype: torch.dtype) -> None:
    """Use a GPU for the first time: its context is made, and cuBLAS, torch's kernels and Triton's
    compiler load. Other Python threads can run during most of this.
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
        config, model_config = self.config, self.config.model_config
        in_use_before = gpu_memory_in_use(self.device) if self.on_gpu else 0
        self.backend = make_backend(
            config.attention_backend, self.device, config.torch_dtype,
            model_config.num_key_value_heads, model_config.head_dim, config.kvcache_block_size,
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
        # One buffer for the logits of all graphs, as wide as the largest step.
        self.logits: torch.Tensor | None = None
        if use_graphs:
            shape = (config.max_num_seqs, model_config.vocab_size)
            self.logits = torch.empty(shape, dtype=config.torch_dtype, device=self.device)
        specs = self.model.cache_specs()
        self.kv_cache = allocate_kv_cache(config, specs, num_blocks=1)  # for the warm-up
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
        edits, num_top = _wishes(batch)
        with self.on_device():
            shape = self.inputs.send(
                batch, padded_rows, self._launched_rows, fixed_shape=graphs is not None,
                set_aside=[*edits],
            )  # fmt: skip
            # Its tokens will be written there.
            step = PendingStep(self.sampler.host_tokens[self.inputs.buffer_index, :rows])
            if batch.is_prefill and any(seq.needs_prompt_logprobs for seq in batch.seqs):
                logits = self._run_with_prompt_logprobs(shape, batch, step)
            else:
                logits = self._run(shape) if graphs is None else graphs.run(shape)
            if edits:
                inputs, index = self.inputs.view(shape), self.inputs.buffer_index
                self.sampler.resample(logits[:rows], inputs.sampling(shape.truncates), edits, index)
            if num_top:
                k = max(num_top.values())
                step.logprobs = self.sampler.logprobs(logits[:rows], [*num_top], k)
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
        context = self._context(shape, inputs)
        stream = self.model(inputs.input_ids, self.sampler.tokens, context)
        out = None if self.logits is None else self.logits[: shape.rows]
        logits = self.model.compute_logits(stream, out)
        self.sampler.sample(logits, inputs.sampling(shape.truncates))
        return logits

    def _run_with_prompt_logprobs(
        self, shape: StepShape, batch: Batch, step: PendingStep
    ) -> torch.Tensor:
        """A prefill step in which some rows want log probabilities of their prompt: of these rows
        the logits of all tokens are kept, of the others those of the last one.

        With a row of 3 such tokens and one of 2 that wants none, tokens 0, 1, 2 and 4 are kept, and
        2 and 3 of these are the rows' last ones.
        """
        kept: list[int] = []  # of the step's tokens
        last: list[int] = []  # of each row, where its last token is among those kept
        spans: list[PromptSpan] = []
        first = 0  # token of the row, among the step's
        for row, seq in enumerate(batch.seqs):
            start, length = batch.starts[row], batch.lengths[row]
            num_tokens = min(length, seq.num_prompt_tokens - 1 - start)
            num_top = seq.sampling_params.prompt_logprobs
            if seq.needs_prompt_logprobs and num_top is not None and num_tokens > 0:
                spans.append(PromptSpan(row, num_top, len(kept), start + 1, num_tokens))
                kept.extend(range(first, first + num_tokens))
            first += length
            kept.append(first - 1)
            last.append(len(kept) - 1)
        inputs = self.inputs.view(shape)
        context = self._context(shape, inputs)
        context.logits_indices = to_device(kept, self.device)
        stream = self.model(inputs.input_ids, self.sampler.tokens, context)
        for span in spans:
            token_ids = batch.seqs[span.row].token_ids
            for start in range(0, span.num_tokens, LOGPROB_ROWS):
                end = min(start + LOGPROB_ROWS, span.num_tokens)
                of_piece = slice(span.first_kept + start, span.first_kept + end)
                logits = self.model.compute_logits(stream[of_piece])
                own = token_ids[span.position + start : span.position + end]
                found = compute_logprobs(logits, to_device(own, self.device), span.num_top)
                step.prompt_logprobs.append((span.row, span.position + start, found))
        logits = self.model.compute_logits(stream[to_device(last, self.device)])
        self.sampler.sample(logits, inputs.sampling(shape.truncates))
        return logits

    def _context(self, shape: StepShape, inputs: StepInputs) -> Context:
        metadata = None
        if not shape.is_prefill:
            metadata = self.backend.decode_metadata(inputs.rest, shape.rows)
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
    """What some rows of a step want besides a token sampled from their logits as they are: edits of
    these, and how many of the most likely tokens to report, both by row."""
    edits: dict[int, RowEdits] = {}
    num_top: dict[int, int] = {}
    for row in [row for row, sampling in enumerate(batch.sampling) if sampling.has_wishes]:
        if not batch.yields_token[row]:
            continue
        seq, sampling = batch.seqs[row], batch.sampling[row]
        num_generated = batch.starts[row] + batch.lengths[row] - seq.num_prompt_tokens
        if sampling.edits is not None and sampling.edits.apply_to(num_generated):
            # Only with penalties the engine has waited until all of them are known.
            generated = seq.output_token_ids if sampling.penalizes else []
            temperature = sampling.temperature
            edits[row] = RowEdits(sampling.edits, temperature, num_generated, generated)
        if sampling.logprobs is not None:
            num_top[row] = sampling.logprobs
    return edits, num_top


def load_model(config: Config) -> CausalLM:
    """The network with its weights, on the device.

    Raises:
        ValueError, FileNotFoundError: for a checkpoint that cannot be loaded.
    """
    with torch.device("meta"):
        model = config.model_class(config.model_config)
    # As `to_empty` would do, which imports sympy. A tied head gets memory too, and gives it back at
    # once. With that gap, later tensors lie where a step of one row takes 1% less time (see
    # docs/performance.md).
    memory = {
        name: torch.empty(parameter.shape, dtype=config.torch_dtype, device=config.torch_device)
        for name, parameter in model.state_dict().items()
    }
    model.load_state_dict(memory, assign=True)
    model.requires_grad_(False).tie_weights()
    if config.load_format == "dummy":
        fill_with_noise(model, config.model_config.initializer_range, config.seed)
    else:
        load_weights(config.model_dir, model.checkpoint_views(), model.ignored_tensors())
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack()
    return model
