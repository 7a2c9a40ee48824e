"""Whatever happens to a rank, all processes end, and the caller gets an error that says why."""

import gc
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.cases import slow
from helpers.checkpoints import link_checkpoint, make_checkpoint, random_tokens
from helpers.engines import GREEDY, PROMPTS, assert_empty, build, greedy
from helpers.paths import ROOT
from nanovllm import LLM, SamplingParams
from nanovllm.parallel import group
from nanovllm.parallel.rank_runner import _end
from nanovllm.parallel.ranks import Ranks

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
LONG = SamplingParams(temperature=0, max_tokens=500)  # some seconds


def pids(llm: LLM) -> list[int]:
    return [process.pid for process in llm.model_runner.ranks._processes.values()]


def assert_gone(processes: list[int]) -> None:
    for pid in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_ranks_are_found_among_the_children(ranks: LLM):
    assert set(pids(ranks)) <= set(children())


@pytest.fixture
def ranks(tiny: Path) -> Iterator[LLM]:
    with build(tiny, tensor_parallel_size=2, max_model_len=600, num_kvcache_blocks=200) as llm:
        yield llm


def after(seconds: float, action: Callable[[], object]) -> None:
    threading.Timer(seconds, action).start()


def assert_ended(llm: LLM, processes: list[int]) -> None:
    assert_gone(processes)
    assert llm.is_closed
    with pytest.raises(RuntimeError, match="closed: build a new one"):
        llm.generate(PROMPTS, GREEDY)
    llm.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_rank_that_is_killed_at_a_random_moment(tiny: Path, seed: int):
    with build(tiny, tensor_parallel_size=4 if seed == 2 else 2, num_kvcache_blocks=200) as llm:
        processes = pids(llm)
        victim = len(processes) - 1
        start, delay = time.monotonic(), random.Random(seed).uniform(0, 0.6)
        after(delay, lambda: os.kill(processes[victim], signal.SIGKILL))
        name = f"rank {victim + 1} of {len(processes) + 1} was killed by signal 9"
        with pytest.raises(RuntimeError, match=name):
            for _ in range(100):
                llm.generate(PROMPTS, LONG, use_tqdm=False)
        assert time.monotonic() - start < delay + 5
        assert_ended(llm, processes)


def end_slowly(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let it take so long until it is known how a rank has ended."""
    how_it_ended = Ranks._how_it_ended

    def slowly(self: Ranks, rank: int) -> str:
        time.sleep(seconds)
        return how_it_ended(self, rank)

    monkeypatch.setattr(Ranks, "_how_it_ended", slowly)


def test_a_rank_that_ends_slowly_is_the_reason_all_the_same(
    ranks: LLM, monkeypatch: pytest.MonkeyPatch
):
    """Rank 0 gets an error of its own as soon as the connection is gone."""
    processes = pids(ranks)
    end_slowly(monkeypatch, seconds=3)
    after(0.1, partial(os.kill, processes[0], signal.SIGKILL))
    with pytest.raises(RuntimeError, match="rank 1 of 2 was killed by signal 9"):
        for _ in range(100):
            ranks.generate(PROMPTS, LONG, use_tqdm=False)
    assert_ended(ranks, processes)


def test_what_a_step_yields_without_a_rank_is_not_taken(
    ranks: LLM, monkeypatch: pytest.MonkeyPatch
):
    """Kernels that wait for a rank end without an error when they are let go. Here so on a CPU."""
    (process,), wait, send = pids(ranks), group.Group._wait, ranks.model_runner.ranks.send

    def without_error(self: group.Group, work: object) -> None:
        try:
            wait(self, work)
        except RuntimeError:
            while self._aborting is None:
                time.sleep(0.01)

    def send_in_vain(step: object, inputs: memoryview) -> None:
        os.kill(process, signal.SIGSTOP)
        send(step, inputs)
        os.kill(process, signal.SIGKILL)

    monkeypatch.setattr(group.Group, "_wait", without_error)
    end_slowly(monkeypatch, seconds=1)
    ranks.model_runner.ranks.send = send_in_vain
    with pytest.raises(RuntimeError, match="rank 1 of 2 was killed by signal 9"):
        ranks.generate(PROMPTS, SamplingParams(max_tokens=1), use_tqdm=False)
    assert_ended(ranks, [process])


def test_who_looks_for_a_reason_and_finds_none_is_not_waited_for_for_ever(
    ranks: LLM, monkeypatch: pytest.MonkeyPatch
):
    """As when the driver hangs in `abort`."""
    watched, found = ranks.model_runner.ranks, list[BaseException]()
    monkeypatch.setattr("nanovllm.parallel.ranks._PATIENCE", 1)
    watched._is_looking = True
    thread = threading.Thread(target=lambda: found.append(watched.fail_with(ValueError("own"))))
    thread.daemon = True
    thread.start()
    thread.join(10)
    assert found and "rank 0 of 2 failed: ValueError: own" in str(found[0])


def test_an_error_of_a_rank_reaches_the_caller(ranks: LLM):
    """Here of a step that is none: whatever a rank raises takes this way."""
    processes, runner = pids(ranks), ranks.model_runner
    send = runner.ranks.send
    runner.ranks.send = lambda step, inputs: send(step._replace(shape=None), inputs)
    with pytest.raises(RuntimeError, match="rank 1 of 2 failed: AttributeError: 'NoneType'"):
        ranks.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert_ended(ranks, processes)


def test_an_error_of_rank_0_in_a_step_ends_the_others(ranks: LLM):
    processes = pids(ranks)

    def fail(*_: object) -> None:
        raise MemoryError("no room for the logits")

    ranks.model_runner.model.compute_logits = fail
    with pytest.raises(RuntimeError, match="rank 0 of 2 failed: MemoryError: no room"):
        ranks.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert_ended(ranks, processes)


def test_a_rank_that_hangs_is_waited_for_only_so_long(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(group, "TIMEOUT", 8)  # of the start, too
    with build(tiny, tensor_parallel_size=2) as llm:
        processes = pids(llm)
        os.kill(processes[0], signal.SIGSTOP)
        with pytest.raises(RuntimeError, match=r"rank 0 of 2 failed: .*[Tt]imed out"):
            llm.generate(PROMPTS, LONG, use_tqdm=False)
        assert_ended(llm, processes)


def test_ctrl_c_leaves_an_engine_that_works(ranks: LLM):
    """At random moments, which may be in the middle of a step: the ranks must not part."""
    expected = greedy(ranks, PROMPTS)
    for seed in range(4):
        delay = random.Random(seed).uniform(0.01, 0.3)
        after(delay, lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            for _ in range(100):
                ranks.generate(PROMPTS, LONG, use_tqdm=False)
        assert_empty(ranks)
        assert greedy(ranks, PROMPTS) == expected


def test_an_exception_between_steps_leaves_an_engine_that_works(ranks: LLM):
    expected = greedy(ranks, PROMPTS)
    schedule = ranks.scheduler.schedule
    ranks.scheduler.schedule = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        ranks.generate(PROMPTS, GREEDY, use_tqdm=False)
    ranks.scheduler.schedule = schedule
    assert greedy(ranks, PROMPTS) == expected


def test_engines_one_after_another_and_side_by_side(tiny: Path):
    options = {"tensor_parallel_size": 2, "num_kvcache_blocks": 40}
    with build(tiny, **options) as first:
        processes = pids(first)
        expected = greedy(first, PROMPTS)
        with build(tiny, **options) as second, build(tiny) as alone:
            assert greedy(second, PROMPTS) == greedy(alone, PROMPTS) == expected
        assert greedy(first, PROMPTS) == expected
    assert_gone(processes)
    first.close()  # does nothing


def test_what_ctrl_c_has_left_a_second_close_ends(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    llm = build(tiny, tensor_parallel_size=2)
    processes = pids(llm)

    def interrupted(patience: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.model_runner.ranks, "_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.close()
    llm.close()
    assert_gone(processes)


def test_a_fork_of_the_caller_ends_nothing(ranks: LLM):
    expected = greedy(ranks, PROMPTS)
    if (pid := os.fork()) == 0:
        ranks.model_runner._finalizer()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    assert greedy(ranks, PROMPTS) == expected


class Backend:
    """Behaves as NCCL does: its abort waits until no graph has calls of it."""

    def __init__(self, backend: object, graphs: list) -> None:
        self.backend, self.graphs = backend, graphs

    def __getattr__(self, name: str) -> object:
        return getattr(self.backend, name)

    def abort(self) -> None:
        while any(graph() is not None for graph in self.graphs):
            time.sleep(0.01)
        self.backend.abort()


class Graph:
    def reset(self) -> None:
        self.is_reset = True


@pytest.mark.parametrize("way", ["close", slow("drop"), "kill", slow("error")])
def test_nccl_is_not_waited_for_before_the_graphs_are_gone(tiny: Path, way: str):
    llm = build(tiny, tensor_parallel_size=2)
    runner, processes, graph = llm.model_runner, pids(llm), Graph()
    runner.group._backend = Backend(runner.group._backend, [weakref.ref(graph)])
    runner._finalizer.detach()
    graphs = {None: (graph, None)}
    del graph
    runner._finalizer = weakref.finalize(runner, _end, runner.ranks, runner.group, graphs)
    group, start = runner.group, time.monotonic()
    del runner
    if way == "kill":
        after(0.3, partial(os.kill, processes[0], signal.SIGKILL))
        with pytest.raises(RuntimeError, match="rank 1 of 2 was killed by signal 9"):
            for _ in range(100):
                llm.generate(PROMPTS, LONG, use_tqdm=False)
    elif way == "error":
        llm.model_runner.run = lambda step: 1 / 0
        with pytest.raises(RuntimeError, match="rank 0 of 2 failed: ZeroDivisionError"):
            llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    elif way == "close":
        llm.close()
    else:
        del llm
        gc.collect()
    assert_gone(processes)
    assert not group._aborting.is_alive()
    assert time.monotonic() - start < 8


def test_an_engine_that_is_dropped_ends_its_ranks(tiny: Path):
    llm = build(tiny, tensor_parallel_size=2)
    processes = pids(llm)
    del llm
    gc.collect()
    assert_gone(processes)


def test_a_checkpoint_that_only_a_rank_finds_broken(tiny: Path, tmp_path: Path):
    """Every rank reads it; the error comes from one of them, and none is left."""
    path = link_checkpoint(tiny, tmp_path / "model")
    (path / "model.safetensors").unlink()
    before = set(children())
    with pytest.raises(RuntimeError, match=r"has no model\*\.safetensors file"):
        build(path, tensor_parallel_size=2)
    assert set(children()) <= before


def children() -> list[int]:
    """Ranks that this process has started, and that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"parallel.worker" in (path / "cmdline").read_bytes():
                found.append(int(path.name))
        except OSError:  # it has ended meanwhile
            pass
    return found


def test_a_tensor_parallel_size_that_does_not_fit_starts_nothing(tiny: Path):
    before = children()
    with pytest.raises(ValueError, match="tensor_parallel_size=3 does not fit the model"):
        build(tiny, tensor_parallel_size=3)
    with pytest.raises(ValueError, match="tensor_parallel_size must be at least 1"):
        build(tiny, tensor_parallel_size=0)
    assert children() == before


def test_a_gpu_is_needed_for_each_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    config = SimpleNamespace(tensor_parallel_size=2, torch_device=torch.device("cuda", 1))
    with pytest.raises(ValueError, match="needs GPUs 1 to 2; torch sees 2 CUDA devices"):
        Ranks(config)


SCRIPT = """
import sys
print("started", flush=True)
from nanovllm import LLM, SamplingParams
llm = LLM(sys.argv[1], tensor_parallel_size=2, device="cpu", num_kvcache_blocks=40,
          kvcache_block_size=16)
print(*[p.pid for p in llm.model_runner.ranks._processes.values()], flush=True)
params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
print(llm.generate([[1, 2, 3]], params, use_tqdm=False)[0]["token_ids"], flush=True)
if "wait" in sys.argv:
    while True:
        llm.generate([[1, 2, 3]], SamplingParams(max_tokens=100), use_tqdm=False)
"""


def script(tiny: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-", str(tiny), *arguments], cwd=ROOT, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def test_a_script_needs_no_guard_and_may_end_without_close(tiny: Path):
    """Not even a file: what is started runs nothing of the caller's program."""
    output, _ = script(tiny).communicate(SCRIPT, timeout=60)
    started, processes, tokens = output.splitlines()
    assert started == "started" and len(tokens.split()) == 5
    assert_gone([int(pid) for pid in processes.split()])


def test_ranks_end_when_their_caller_is_killed(tiny: Path):
    process = script(tiny, "wait")
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(SCRIPT)
    process.stdin.close()
    process.stdout.readline()
    processes = [int(pid) for pid in process.stdout.readline().split()]
    process.stdout.readline()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(map(is_running, processes)):
        time.sleep(0.05)
    assert not any(map(is_running, processes))
    process.stdout.close()


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_rank_may_die_while_it_starts(tiny: Path):
    before = set(children())
    processes: list[int] = []

    def kill_the_new_one() -> None:
        deadline = time.monotonic() + 20
        while not processes and time.monotonic() < deadline:
            processes.extend(set(children()) - before)
            time.sleep(0.01)
        os.kill(processes[0], signal.SIGKILL)

    thread = threading.Thread(target=kill_the_new_one)
    thread.start()
    with pytest.raises(RuntimeError, match="rank 1 of 2 was killed by signal 9"):
        build(tiny, tensor_parallel_size=2)
    thread.join()
    assert_gone(processes)


def test_a_long_prompt_is_read_by_all_ranks(ranks: LLM):
    """Inputs of more bytes than the socket holds at once."""
    prompts = [random_tokens(590, seed=i) for i in range(24)]
    found = greedy(ranks, prompts, SamplingParams(temperature=0, max_tokens=2))
    assert [len(tokens) for tokens in found] == [2] * 24


needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@pytest.mark.gpu
@needs_two_gpus
@pytest.mark.parametrize("max_tokens", [1, 400], ids=["prefill", "decode"])
def test_a_gpu_waits_for_no_rank_that_is_gone(tmp_path: Path, max_tokens: int):
    """Its kernels and its stream let go, its memory is free again, and a new engine works."""
    path = make_checkpoint(tmp_path / "model", hidden_size=2048, max_position_embeddings=2048)
    options = {
        "device": "cuda", "dtype": "bfloat16", "tensor_parallel_size": 2, "kvcache_block_size": 256,
        "num_kvcache_blocks": 100, "max_model_len": 2048,
    }  # fmt: skip
    prompts = [random_tokens(1500, seed=i) for i in range(8)]
    for seed in range(2):
        with build(path, **options) as llm:
            processes = pids(llm)
            llm.generate(prompts, GREEDY, use_tqdm=False)
            taken = torch.cuda.memory_allocated()
            kill = partial(os.kill, processes[0], signal.SIGKILL)
            after(random.Random(seed).uniform(0, 1), kill)
            with pytest.raises(RuntimeError, match="rank 1 of 2 was killed by signal 9"):
                for turn in range(1000):
                    fresh = [[turn % 128, *prompt] for prompt in prompts]  # none is in the cache
                    params = SamplingParams(max_tokens=max_tokens)
                    llm.generate(fresh, params, use_tqdm=False)
            assert_ended(llm, processes)
            gc.collect()
            assert torch.cuda.memory_allocated() < taken / 4


@pytest.mark.gpu
@needs_two_gpus
def test_a_program_on_gpus_may_end_without_close(tiny: Path):
    process = script(tiny)
    output, _ = process.communicate(SCRIPT.replace('"cpu"', '"cuda"'), timeout=120)
    _, processes, tokens = output.splitlines()
    assert process.returncode == 0 and len(tokens.split()) == 5
    assert_gone([int(pid) for pid in processes.split()])


@pytest.mark.gpu
@needs_two_gpus
def test_a_gpu_without_room_is_named(tiny: Path):
    free, _ = torch.cuda.mem_get_info(1)
    hog = torch.empty(free - 2**30, dtype=torch.int8, device="cuda:1")
    try:
        with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed: .*memory"):
            build(tiny, device="cuda", tensor_parallel_size=2)
    finally:  # the next test needs it, whatever came of this one
        del hog
        torch.cuda.empty_cache()
    with build(tiny, device="cuda", tensor_parallel_size=2) as llm:
        assert len(greedy(llm, PROMPTS)) == len(PROMPTS)
