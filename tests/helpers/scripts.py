"""The programs at the top of the repository."""

import subprocess
import sys

from helpers.paths import ROOT


def run_script(*command: str) -> str:
    """What a script at the top of the repository prints."""
    process = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert process.returncode == 0, process.stderr
    return process.stdout
