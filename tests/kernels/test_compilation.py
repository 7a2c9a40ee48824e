"""The kernels by Triton's compiler, where no GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

from helpers.kernel_inputs import interpreted
from helpers.paths import ROOT


@interpreted
def test_all_kernels_compile_for_hopper(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "compile_kernels.py")],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip() == "all compiled"
