"""What compiles the kernels' launches for cards that are not there."""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from helpers.compile_launches import H100, run_compiler, simulated
from helpers.kernel_inputs import interpreted

FACTS_OF_LAUNCHES = """
import json

import torch
from helpers.compile_launches import A100, H100, RTX_4090, launches
from nanovllm.kernels.layernorm import rms_norm
from nanovllm.kernels.split_k import split_k
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

def empty(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")

def facts(launch):
    ptx, ttir = launch.compiled.asm["ptx"], launch.compiled.asm["ttir"]
    return {
        "name": launch.name, "grid": launch.grid, "num_warps": launch.num_warps,
        "registers": launch.registers, "spills": launch.spills, "shared": launch.shared,
        "fits": launch.fits, "has_pdl": "griddepcontrol" in ptx,
        "aligned": ttir.count("tt.divisibility"), "target": ptx.split(".target ")[1].split()[0],
        "instructions": len(launch.sass), "last": launch.sass[-1],
    }

before = vars(driver).copy(), JITFunction.run, torch.cuda.get_device_capability
found = {}
for card in (A100, H100):
    [launch] = launches(rms_norm, empty(8, 1024), empty(1024), 1e-6, card=card)
    found[card.name] = facts(launch)
uneven = empty(1025)[1:]  # 2 bytes past an aligned address
[launch] = launches(rms_norm, empty(8, 1024), uneven, eps=1e-6)
found["uneven"] = facts(launch)
x, weight = empty(40, 1024), empty(2048, 1024)
for card in (H100, RTX_4090):
    [launch] = launches(split_k, x, weight, card=card)
    found["product, " + card.name] = facts(launch)
assert before == (vars(driver), JITFunction.run, torch.cuda.get_device_capability)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return json.loads(run_compiler(FACTS_OF_LAUNCHES, tmp_path_factory.mktemp("cache")))


def test_a_wrapper_is_compiled_for_each_card_as_it_launches_there(found: dict) -> None:
    for card, target, has_pdl in (("A100", "sm_80", False), ("H100", "sm_90a", True)):
        facts = found[card]
        assert (facts["name"], facts["grid"], facts["num_warps"]) == ("_rms_norm_kernel", [8], 2)
        assert facts["target"].startswith(target)
        assert facts["has_pdl"] == has_pdl
        assert 16 <= facts["registers"] <= 255
        assert facts["spills"] == 0
        assert facts["fits"]
        assert 100 < facts["instructions"] < 1000
        assert facts["last"].startswith("BRA")  # padding is not counted


def test_arguments_are_specialised_by_their_real_alignment(found: dict) -> None:
    assert found["uneven"]["aligned"] == found["H100"]["aligned"] - 1


def test_shared_memory_is_held_against_the_card(found: dict) -> None:
    assert found["product, H100"]["fits"]
    assert found["product, RTX 4090"]["shared"] > 99 * 1024
    assert not found["product, RTX 4090"]["fits"]


def test_errors_of_the_compiling_process_are_raised(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no such card"):
        run_compiler("raise KeyError('no such card')", tmp_path)


@interpreted
def test_the_interpreter_compiles_nothing() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), simulated(H100):
        pass
