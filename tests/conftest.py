"""Shared by all tests: where Triton kernels run, and tiny checkpoints to run the engine on.

Tests are where their module is: those of nanovllm/engine/scheduler.py in engine/test_scheduler.py,
those of LLM in test_llm*.py. What must hold of the whole engine, whatever is asked of it, is in
properties/.
"""

import gc
import os
import signal
from pathlib import Path

import pytest

# Before torch is loaded: for tiny models more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as of what a shell runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # before anything imports triton: its kernels run in the interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.register_assert_rewrite("helpers")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    gc.freeze()  # each LLM.close() collects garbage: not among all that was imported


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel should have written, and did not, is NaN."""
    from helpers.kernel_inputs import poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint with a tokenizer ("t0 t1 t2 ...") and no end-of-sequence token."""
    from helpers.checkpoints import add_tokenizer, make_checkpoint

    return add_tokenizer(make_checkpoint(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def tiny_reference(tiny: Path):
    """Greedy generation with `tiny` through transformers."""
    from helpers.checkpoints import Reference

    return Reference(tiny)


@pytest.fixture
def tiny_copy(tiny: Path, tmp_path: Path) -> Path:
    """A checkpoint like `tiny`, in a directory whose JSON files a test may change."""
    from helpers.checkpoints import link_checkpoint

    return link_checkpoint(tiny, tmp_path / "model")


@pytest.fixture
def demo_copy(tmp_path: Path) -> Path:
    """The trained checkpoint, in a directory whose JSON files a test may change."""
    from helpers.checkpoints import link_checkpoint
    from helpers.paths import DEMO

    return link_checkpoint(DEMO, tmp_path / "demo")


@pytest.fixture
def llm(tiny: Path):
    """A small engine with `tiny`, a new one for each test."""
    from helpers.engines import build

    with build(tiny) as engine:
        yield engine


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint with a vocabulary of 48 tokens, of which one ends a text, and its logits."""
    from helpers.small_model import Model

    return Model(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="session")
def small_engine(model):
    """An engine with that checkpoint. Tests leave it empty."""
    from helpers.small_model import build

    with build(model, max_num_seqs=1024, num_kvcache_blocks=1200, max_model_len=64) as llm:
        yield llm
