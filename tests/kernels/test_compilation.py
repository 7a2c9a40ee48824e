"""What steps of models launch, by Triton's compiler: no GPU is needed, and every GPU's limits hold.

What the interpreter lets pass, the compiler may not (a variable that changes its type between
branches, say), and only the compiler tells how much shared memory a program takes.
"""

from pathlib import Path

from helpers.compile_launches import run_compiler
from helpers.kernel_inputs import interpreted


@interpreted
def test_a_sample_of_models_and_gpus_compiles_and_fits(tmp_path: Path) -> None:
    code = "from helpers.compile_models import main; main()"
    assert run_compiler(code, tmp_path).endswith("all compiled\n")
