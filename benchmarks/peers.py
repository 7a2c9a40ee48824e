"""Another engine's seconds for given calls, in a process of its own: see `benchmarks.gpu`.

Every engine runs with its defaults, at most 4096 tokens a request, temperature 0.6 and no
end-of-sequence. Nothing of nanovllm is imported here: nano-vllm's package has the same name.
"""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPERATURE = 0.6
MAX_MODEL_LEN = 4096
Generate = Callable[[list[list[int]], list[int]], object]


@contextmanager
def vllm(model: str) -> Iterator[Generate]:
    from vllm import LLM, SamplingParams

    llm = LLM(model=model, skip_tokenizer_init=True, max_model_len=MAX_MODEL_LEN)

    def generate(prompts: list[list[int]], output_lens: list[int]) -> None:
        params = [
            SamplingParams(temperature=TEMPERATURE, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in output_lens
        ]
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)

    yield generate


@contextmanager
def transformers(model: str) -> Iterator[Generate]:
    """Continuous batching, one manager for all calls."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    flash = device == "cuda" and importlib.util.find_spec("flash_attn")
    net = AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, attn_implementation="flash_attention_2" if flash else "sdpa"
    )
    config = GenerationConfig(do_sample=True, temperature=TEMPERATURE, eos_token_id=-1)
    manager = net.to(device).eval().init_continuous_batching(generation_config=config)
    manager.start()

    def generate(prompts: list[list[int]], output_lens: list[int]) -> None:
        for prompt, length in zip(prompts, output_lens, strict=True):
            manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
        unfinished = len(prompts)
        while unfinished:
            result = manager.get_result(timeout=1)
            if result is not None:
                unfinished -= result.is_finished()
            elif not manager.is_running():
                raise RuntimeError("the continuous batching thread of transformers has died")

    try:
        yield generate
    finally:
        manager.stop(block=True)


@contextmanager
def nano_vllm(model: str) -> Iterator[Generate]:
    from nanovllm import LLM, SamplingParams

    llm = LLM(model, max_model_len=MAX_MODEL_LEN)

    def generate(prompts: list[list[int]], output_lens: list[int]) -> None:
        params = [
            SamplingParams(temperature=TEMPERATURE, max_tokens=n, ignore_eos=True)
            for n in output_lens
        ]
        llm.generate(prompts, params)

    yield generate


ENGINES = {"vllm": vllm, "transformers": transformers, "nano-vllm": nano_vllm}


def time_calls(
    engine: str, model: Path, calls: list[dict[str, Any]], engine_path: str | None = None
) -> dict[str, Any]:
    """Start an engine in a new process and time calls of it.

    Args:
        engine: one of `ENGINES`.
        model: a checkpoint's directory.
        calls: each {"prompts": lists of token ids, "output_lens": how many to generate}.
        engine_path: the directory that holds the engine's package, if it is not installed.

    Returns:
        {"version": str, "ready": seconds of import and constructor, "seconds": those of each call}

    Raises:
        RuntimeError: with the last line that the process printed, if it failed.
    """
    with tempfile.TemporaryDirectory() as directory:
        calls_file, result_file = Path(directory, "calls.json"), Path(directory, "result.json")
        calls_file.write_text(json.dumps(calls))
        command = [sys.executable, "-m", "benchmarks.peers", engine, str(model)]
        command += [str(calls_file), str(result_file), *([engine_path] if engine_path else [])]
        root = Path(__file__).parent.parent
        process = subprocess.run(
            command, cwd=root, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL
        )
        if process.returncode:
            last = (process.stderr.strip() or f"exit status {process.returncode}").splitlines()[-1]
            raise RuntimeError(f"{engine}: {last}")
        return json.loads(result_file.read_text())


def main() -> None:
    """In the new process."""
    engine, model, calls, result, *engine_path = sys.argv[1:]
    sys.path[:0] = engine_path
    report = {"version": _version(engine), "seconds": []}
    start = time.perf_counter()
    try:
        with ENGINES[engine](model) as generate:
            report["ready"] = time.perf_counter() - start
            for call in json.loads(Path(calls).read_text()):
                start = time.perf_counter()
                generate(call["prompts"], call["output_lens"])
                report["seconds"].append(time.perf_counter() - start)
    except ImportError as error:
        sys.exit(f"not installed here: {error}")
    Path(result).write_text(json.dumps(report))


def _version(engine: str) -> str:
    try:
        return importlib.metadata.version(engine)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


if __name__ == "__main__":
    main()
