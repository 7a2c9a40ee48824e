"""What the tests of the benchmarks share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `benchmarks.gpu` writes for a miniature of everything but a fresh process."""
    from benchmarks import gpu

    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    parts = [part for part in gpu.PARTS if part != "ready"]
    gpu.main(["--tiny", "--runs", "1", "--json", str(path), "--only", *parts])
    return path
