"""Options of vLLM that say here what is the case anyway: taken if they do, so that a script runs as
it is, and refused by name if they ask for something else."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

# The same thing by another name.
SYNONYMS = {
    "block_size": "kvcache_block_size",
    "num_gpu_blocks_override": "num_kvcache_blocks",
}


class Other(NamedTuple):
    """An option that nothing reads.

    Attributes:
        holds: whether a value says what is the case.
        way_out: what to do about another one.
    """

    holds: Callable[[Any], bool]
    way_out: str


def _one_of(*values: object) -> Callable[[Any], bool]:
    return lambda value: any(value is v or (value == v and type(value) is type(v)) for v in values)


def _anything(value: object) -> bool:
    return True


_NO_LORA = "LoRA adapters are not served: merge the adapter into the model's weights first"
_ONE_MODEL = "a step is shared by tensor_parallel_size; for more throughput run replicas"
_TEXT_ONLY = "only text goes in and comes out"
_GENERATES = "the engine generates text: embeddings, scores and rewards are not served"

OTHER_OPTIONS: dict[str, Other] = {
    # Code from a checkpoint is never run; the models that are served need none.
    "trust_remote_code": Other(_one_of(True, False), "give True or False"),
    "pipeline_parallel_size": Other(_one_of(1), _ONE_MODEL),
    "data_parallel_size": Other(_one_of(1), _ONE_MODEL),
    "enable_expert_parallel": Other(_one_of(False), _ONE_MODEL),
    "distributed_executor_backend": Other(
        _one_of("mp", "uni"), "ranks are processes of this machine: leave it out"
    ),
    "worker_use_ray": Other(_one_of(False), "see nanovllm.entrypoints.ray_data for Ray"),
    "disable_custom_all_reduce": Other(_anything, ""),
    "tokenizer_mode": Other(_one_of("auto"), "the checkpoint says which tokenizer it has"),
    "tokenizer_revision": Other(_one_of("main"), "it is the checkpoint's revision"),
    "calculate_kv_scales": Other(_one_of(False), "scales follow from the weights"),
    "cpu_offload_gb": Other(_one_of(0, 0.0), "weights stay on the GPU: raise tensor_parallel_size"),
    "swap_space": Other(_anything, ""),  # preempted sequences are computed again
    "enable_lora": Other(_one_of(False), _NO_LORA),
    "max_loras": Other(_anything, ""),
    "max_lora_rank": Other(_anything, ""),
    "enable_prompt_adapter": Other(_one_of(False), _NO_LORA),
    "speculative_config": Other(_one_of(), "speculative decoding is not served: leave it out"),
    "speculative_model": Other(_one_of(), "speculative decoding is not served: leave it out"),
    "guided_decoding_backend": Other(
        _one_of("auto", "guidance"), "structured outputs are llguidance's: leave it out"
    ),
    "limit_mm_per_prompt": Other(lambda value: not value, _TEXT_ONLY),
    "mm_processor_kwargs": Other(lambda value: not value, _TEXT_ONLY),
    "task": Other(_one_of("auto", "generate"), _GENERATES),
    "runner": Other(_one_of("auto", "generate"), _GENERATES),
    "enable_sleep_mode": Other(_one_of(False), "close() gives the memory back"),
    "enable_chunked_prefill": Other(_anything, ""),  # prompts longer than a step run in chunks
    "max_num_partial_prefills": Other(_anything, ""),
    "scheduling_policy": Other(_one_of("fcfs"), "requests run first come, first served"),
    "preemption_mode": Other(_one_of("recompute"), "preempted sequences are computed again"),
    "num_scheduler_steps": Other(_one_of(1), "see async_scheduling"),
    "use_v2_block_manager": Other(_anything, ""),
    "max_seq_len_to_capture": Other(_anything, ""),  # CUDA Graphs hold any length
    "max_context_len_to_capture": Other(_anything, ""),
    "max_logprobs": Other(_anything, ""),  # as many as are asked for
    "disable_log_stats": Other(_anything, ""),
    "disable_log_requests": Other(_anything, ""),
    "max_parallel_loading_workers": Other(_anything, ""),
    "generation_config": Other(
        _one_of("vllm"), "call get_default_sampling_params() for what the checkpoint recommends"
    ),
}

# Of `generate` and `chat`.
CALL_OPTIONS: dict[str, Other] = {
    "lora_request": Other(lambda value: not value, _NO_LORA),
    "prompt_adapter_request": Other(_one_of(), _NO_LORA),
    "guided_options_request": Other(_one_of(), "give structured_outputs in SamplingParams"),
    "priority": Other(lambda value: not value, "requests run first come, first served"),
    "tokenization_kwargs": Other(lambda value: not value, "give token ids"),
    "mm_processor_kwargs": Other(lambda value: not value, _TEXT_ONLY),
    "chat_template_content_format": Other(
        _one_of("auto"), "the template is given the form that it takes"
    ),
}


def check_call(options: dict[str, Any]) -> None:
    """Raises:
    TypeError: for an option of `generate` or `chat` that does not exist.
    ValueError: for one that asks for what is not served.
    """
    for name, value in options.items():
        if name not in CALL_OPTIONS:
            raise TypeError(f"unexpected keyword argument {name!r}")
        if value is not None and not CALL_OPTIONS[name].holds(value):
            raise ValueError(f"{name}={value!r}: {CALL_OPTIONS[name].way_out}")


def settle(options: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """The options that `Config` knows, of those that were given. None stands for the default.

    Raises:
        TypeError: for an option that does not exist.
        ValueError: for one that asks for what is not served, or is given twice.
    """
    settled: dict[str, Any] = {}
    for given_name, value in options.items():
        name = SYNONYMS.get(given_name, given_name)
        if name in known:
            if value is not None and settled.setdefault(name, value) is not value:
                raise ValueError(f"{name} is given twice: {settled[name]!r} and {value!r}")
        elif name not in OTHER_OPTIONS:
            raise TypeError(f"unknown engine option {name!r}; the options are {[*known]}")
        elif value is not None and not OTHER_OPTIONS[name].holds(value):
            raise ValueError(f"{name}={value!r}: {OTHER_OPTIONS[name].way_out}")
    return settled
