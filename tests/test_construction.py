"""What an engine makes of its options and its checkpoint, and of packages that are not there."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import nanovllm
from helpers.checkpoints import Reference, edit_json, link_checkpoint, random_tokens
from helpers.engines import GREEDY, PROMPTS, build
from nanovllm import LLM


def test_dummy_weights_need_no_files_and_repeat(tiny: Path, tmp_path: Path):
    path = link_checkpoint(tiny, tmp_path / "model")
    (path / "model.safetensors").unlink()
    found = []
    for seed in (0, 0, 1):
        with build(path, load_format="dummy", seed=seed) as llm:
            outputs = llm.generate(PROMPTS, GREEDY, use_tqdm=False)
            found.append([output["token_ids"] for output in outputs])
    assert found[0] == found[1] != found[2]


def test_max_model_len_is_capped_by_the_model_in_silence(tiny: Path, recwarn):
    with build(tiny, max_model_len=100_000) as llm:
        assert llm.config.max_model_len == 640
    assert not [w for w in recwarn if "max_model_len" in str(w.message)]


def test_max_model_len_is_lowered_to_the_cache_with_a_warning_that_points_here(tiny: Path):
    with pytest.warns(UserWarning, match="max_model_len lowered from 640 to 48") as caught:
        llm = LLM(tiny, kvcache_block_size=16, num_kvcache_blocks=3, device="cpu")
    assert [warning.filename for warning in caught] == [__file__]
    with llm:
        assert llm.config.max_model_len == 48
        (output,) = llm.generate(random_tokens(40), GREEDY, use_tqdm=False)
        assert len(output["token_ids"]) == 8


def test_size_of_the_cache_is_computed_where_it_is_not_given(tiny: Path):
    with LLM(tiny, device="cpu", max_num_seqs=4, max_model_len=300) as llm:
        assert llm.model_runner.num_kvcache_blocks == 4 * 2  # all that four sequences could use
        assert len(llm.generate([1, 2], GREEDY, use_tqdm=False)[0]["token_ids"]) == 12


def test_path_may_be_a_string(tiny: Path):
    with build(str(tiny)) as llm:
        assert llm.config.model_dir == tiny


def test_auto_takes_the_checkpoints_dtype(tiny_copy: Path):
    for name in ("dtype", "torch_dtype"):
        edit_json(tiny_copy / "config.json", remove=("dtype", "torch_dtype"), **{name: "bfloat16"})
        with build(tiny_copy) as llm:
            assert llm.config.torch_dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_auto_takes_the_dtype_of_the_weights_if_the_config_has_none(
    tiny_copy: Path, dtype: torch.dtype
):
    edit_json(tiny_copy / "config.json", remove=("dtype", "torch_dtype"))
    path = tiny_copy / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    path.unlink()  # a link to the shared file
    save_file(tensors, path)
    with build(tiny_copy) as llm:
        assert llm.config.torch_dtype == dtype


def test_unknown_dtype_of_a_checkpoint_is_refused(tiny_copy: Path):
    edit_json(tiny_copy / "config.json", remove=("dtype", "torch_dtype"), torch_dtype="int8")
    with pytest.raises(ValueError, match="int8"):
        build(tiny_copy)


# Without the packages that only a GPU needs

WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Blocker(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] not in {blocked!r}:
            return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Blocker
from nanovllm import LLM, SamplingParams

for name in {blocked!r}:
    assert name not in sys.modules, name
with LLM(sys.argv[1], device="cpu", num_kvcache_blocks=4) as llm:
    params = SamplingParams(temperature=0, max_tokens=12)
    greedy = llm.generate([5, 6, 7], params, use_tqdm=False)[0]
    llm.generate([5, 6, 7], SamplingParams(max_tokens=3), use_tqdm=False)
    assert llm.model_runner.attention_backend == "torch"
    print(*greedy["token_ids"])
"""


@pytest.mark.parametrize("blocked", [("triton", "flash_attn"), ("flash_attn",)], ids=str)
def test_generates_on_a_cpu_without_the_gpu_packages(
    tiny: Path, tiny_reference: Reference, blocked: tuple[str, ...]
):
    root = str(Path(nanovllm.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT.format(blocked=blocked)), str(tiny)],
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [int(token) for token in done.stdout.split()] == tiny_reference.tokens([5, 6, 7], 12)
