"""lm-evaluation-harness runs tasks with the model "nanovllm", from Python and as a command."""

import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from helpers.command_line import DEMO, ROOT
from helpers.lm_eval_requests import (
    COUNTING,
    RIGHT,
    SUM,
    TOLERANCE,
    assert_same_scores,
    generate,
    roll,
    score,
)
from nanovllm import LLM
from nanovllm.lm_eval import NanoVLLM

TASKS = Path(__file__).parent / "lm_eval_tasks"
ARGS = f"pretrained={DEMO},dtype=float32"


def evaluate(model: str, tasks: list[str], **options: Any) -> dict[str, Any]:
    return simple_evaluate(
        model, ARGS, tasks=tasks, device="cpu", batch_size=3, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False), **options,
    )  # fmt: skip


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Runs in the directory that file names in the tasks are relative to, with an empty cache."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path))


@pytest.mark.usefixtures("at_root")
@pytest.mark.parametrize("chat", [True, False])
def test_tasks_have_the_results_of_transformers(chat: bool) -> None:
    tasks = ["demo_sums", "demo_talk", *([] if chat else ["demo_text"])]
    options = {"apply_chat_template": chat, "num_fewshot": 0 if chat else 1}
    found, expected = (evaluate(model, tasks, **options) for model in ("nanovllm", "hf"))
    for task in tasks:
        metrics = {k: v for k, v in found["results"][task].items() if isinstance(v, (int, float))}
        assert metrics
        assert metrics == pytest.approx({k: expected["results"][task][k] for k in metrics})
        samples, reference = found["samples"][task], expected["samples"][task]
        assert [s["arguments"] for s in samples] == [s["arguments"] for s in reference]
        responses, references = ([s["resps"] for s in ss] for ss in (samples, reference))
        if task == "demo_sums":
            scores, wanted = ([x for (x,) in chain(*rs)] for rs in (responses, references))
            assert_same_scores(scores, wanted)
        elif task == "demo_talk":
            assert responses == references
        else:
            logprobs = [logprob for ((logprob,),) in responses]
            assert logprobs == pytest.approx([r for ((r,),) in references], abs=TOLERANCE)
    if chat:
        assert found["results"]["demo_sums"]["acc,none"] == 1
        assert found["results"]["demo_talk"]["exact_match,none"] == pytest.approx(5 / 6)
    assert found["config"]["model_dtype"] == "torch.float32"


class Cache:
    """Records what a model stores in the harness's cache."""

    def __init__(self) -> None:
        self.entries: list[tuple[str, Any, Any]] = []

    def add_partial(self, kind: str, key: Any, value: Any) -> None:
        self.entries.append((kind, key, value))


def test_results_may_be_cached(llm: LLM) -> None:
    model, cache = NanoVLLM(llm), Cache()
    model.set_cache_hook(cache)
    gen_kwargs = {"until": ["."], "max_gen_toks": 5}
    scores = score(model, (SUM, RIGHT), ("", "Hello!"))
    totals = roll(model, "Hello!", COUNTING)
    texts = generate(model, (SUM, gen_kwargs))
    assert sorted(cache.entries[:2]) == sorted(
        [("loglikelihood", (SUM, RIGHT), scores[0]), ("loglikelihood", ("", "Hello!"), scores[1])]
    )
    assert cache.entries[2:4] == [
        ("loglikelihood_rolling", ("Hello!",), totals[0]),
        ("loglikelihood_rolling", (COUNTING,), totals[1]),
    ]
    assert cache.entries[4:] == [("generate_until", (SUM, gen_kwargs), texts[0])]


@pytest.mark.usefixtures("at_root")
def test_the_harness_finds_cached_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sqlitedict")
    tasks, options = ["demo_sums", "demo_talk"], {"use_cache": str(tmp_path / "cache"), "limit": 2}
    first = evaluate("nanovllm", tasks, **options)
    monkeypatch.setattr(NanoVLLM, "_run", None)
    assert evaluate("nanovllm", tasks, **options)["results"] == first["results"]


def run_python(*command: str, **options: Any) -> str:
    process = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, encoding="utf-8", **options
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_nanovllm_does_not_need_the_harness() -> None:
    out = run_python(
        "-c",
        "import sys, nanovllm; print([m for m in sys.modules if m.split('.')[-1] == 'lm_eval'])",
        cwd=ROOT,
    )
    assert out.strip() == "[]"


@pytest.mark.slow
def test_command() -> None:
    pytest.importorskip("pytablewriter")
    out = run_python(
        "-m", "nanovllm.lm_eval", "run", "--model", "nanovllm", "--model_args", ARGS,
        "--include_path", str(TASKS), "--tasks", "demo_talk", "--apply_chat_template",
        "--limit", "2", "--device", "cpu", cwd=ROOT,
    )  # fmt: skip
    assert "|demo_talk|" in out and "exact_match" in out
