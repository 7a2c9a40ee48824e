"""Options that vLLM has besides: taken where they say what is the case, else refused by name."""

from pathlib import Path

import pytest
import torch

from helpers.checkpoints import add_tokenizer, edit_json, make_checkpoint, random_tokens
from helpers.engines import GREEDY, PROMPTS, build, greedy
from nanovllm.config import Config
from nanovllm.other_options import OTHER_OPTIONS, SYNONYMS

# What scripts give; each of them changes nothing.
AS_IT_IS = {
    "trust_remote_code": True, "pipeline_parallel_size": 1, "data_parallel_size": 1,
    "enable_expert_parallel": False, "distributed_executor_backend": "mp", "worker_use_ray": False,
    "disable_custom_all_reduce": True, "tokenizer_mode": "auto",
    "tokenizer_revision": "main",
    "calculate_kv_scales": False, "cpu_offload_gb": 0, "swap_space": 16,
    "enable_lora": False, "max_loras": 1, "max_lora_rank": 64, "enable_prompt_adapter": False,
    "speculative_config": None, "speculative_model": None, "guided_decoding_backend": "auto",
    "limit_mm_per_prompt": {}, "mm_processor_kwargs": None, "task": "generate", "runner": "auto",
    "enable_sleep_mode": False, "enable_chunked_prefill": True, "max_num_partial_prefills": 1,
    "scheduling_policy": "fcfs", "preemption_mode": "recompute", "num_scheduler_steps": 1,
    "use_v2_block_manager": True, "max_seq_len_to_capture": 8192,
    "max_context_len_to_capture": 8192, "max_logprobs": 20, "disable_log_stats": True,
    "disable_log_requests": True, "max_parallel_loading_workers": 2, "generation_config": "vllm",
}  # fmt: skip
SOMETHING_ELSE = [
    ("trust_remote_code", "yes", "True or False"), ("pipeline_parallel_size", 2, "tensor_parallel"),
    ("pipeline_parallel_size", True, "tensor_parallel"), ("data_parallel_size", 4, "replicas"),
    ("distributed_executor_backend", "ray", "processes of this machine"),
    ("worker_use_ray", True, "ray_data"), ("tokenizer_mode", "slow", "which tokenizer"),
    ("calculate_kv_scales", True, "the weights"),
    ("cpu_offload_gb", 10, "tensor_parallel_size"), ("enable_lora", True, "merge the adapter"),
    ("speculative_config", {"num_speculative_tokens": 3}, "speculative decoding"),
    ("limit_mm_per_prompt", {"image": 2}, "only text"), ("task", "embed", "embeddings"),
    ("runner", "pooling", "embeddings"), ("scheduling_policy", "priority", "first come"),
    ("preemption_mode", "swap", "computed again"), ("num_scheduler_steps", 8, "async_scheduling"),
    ("generation_config", "auto", "get_default_sampling_params"),
]  # fmt: skip


def test_what_is_the_case_is_taken(tiny: Path):
    assert AS_IT_IS.keys() == OTHER_OPTIONS.keys()
    with build(tiny) as llm:
        expected = greedy(llm, PROMPTS)
    with build(tiny, **AS_IT_IS) as llm:
        assert greedy(llm, PROMPTS) == expected


@pytest.mark.parametrize(("name", "value", "way_out"), SOMETHING_ELSE)
def test_something_else_is_refused_with_the_way_out(
    tiny: Path, name: str, value: object, way_out: str
):
    with pytest.raises(ValueError, match=f"{name}=.*{way_out}"):
        build(tiny, **{name: value})


def test_none_is_the_default(tiny: Path):
    names = [f for f in Config.__dataclass_fields__ if f not in ("model",)]
    given = {name: None for name in names if Config.__dataclass_fields__[name].init}
    settled = Config.from_options(tiny, given | dict.fromkeys(SYNONYMS) | {"device": "cpu"})
    default = Config.from_options(tiny, {"device": "cpu"})
    assert settled == default


def test_synonyms_are_the_same_option(tiny: Path):
    options = {"block_size": 32, "num_gpu_blocks_override": 17, "device": "cpu"}
    config = Config.from_options(tiny, options)
    assert (config.kvcache_block_size, config.num_kvcache_blocks) == (32, 17)
    with pytest.raises(ValueError, match="kvcache_block_size is given twice: 32 and 64"):
        Config.from_options(tiny, options | {"kvcache_block_size": 64})


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("half", torch.float16), ("float", torch.float32), ("float16", torch.float16),
        (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16),
    ],
    ids=str,
)  # fmt: skip
def test_dtypes_by_all_their_names(tiny: Path, dtype: object, expected: torch.dtype):
    assert Config.from_options(tiny, {"dtype": dtype, "device": "cpu"}).torch_dtype == expected


@pytest.mark.parametrize("is_on", [True, False])
def test_prefix_caching_can_be_turned_off(tiny: Path, is_on: bool):
    prompt = random_tokens(60)
    with build(tiny, enable_prefix_caching=is_on, num_kvcache_blocks=20) as llm:
        found = [llm.generate(prompt, GREEDY, use_tqdm=False)[0] for _ in range(2)]
        assert [output.num_cached_tokens for output in found] == [0, 48 if is_on else 0]
        assert found[0].token_ids == found[1].token_ids
        manager = llm.scheduler.block_manager
        assert manager.num_free_blocks == len(manager.blocks)


def test_another_tokenizer_and_none(tiny: Path, tmp_path: Path):
    bare = make_checkpoint(tmp_path / "model")
    with build(bare, tokenizer=tiny) as llm:
        assert llm.generate("t5 t6", GREEDY, use_tqdm=False)[0].prompt_token_ids == [5, 6]
    with build(tiny, skip_tokenizer_init=True) as llm:
        (output,) = llm.generate([5, 6], GREEDY, use_tqdm=False)
        assert output.text == "" and len(output.token_ids) == 12
        with pytest.raises(ValueError, match="no tokenizer"):
            llm.generate("t5 t6", GREEDY)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        build(tiny, tokenizer=tmp_path / "nowhere")


def test_entries_of_the_config_are_overridden(tmp_path: Path):
    """By a dict as Qwen's documentation has it; theta stays the checkpoint's."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 320}
    path = add_tokenizer(make_checkpoint(tmp_path / "model"))
    with build(path, hf_overrides={"rope_scaling": scaling}) as llm:
        assert llm.config.model_config.rope_parameters == scaling | {"rope_theta": 10000.0}
        found = greedy(llm, PROMPTS)
    edit_json(path / "config.json", rope_scaling=scaling)
    with build(path) as llm:
        assert greedy(llm, PROMPTS) == found
