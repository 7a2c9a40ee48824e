"""nanovllm under lm-evaluation-harness gives the scores and texts of the harness's own backend."""

import copy
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from helpers.checkpoints import link_checkpoint

lm_eval = pytest.importorskip("lm_eval")
huggingface = pytest.importorskip("lm_eval.models.huggingface", exc_type=ImportError)

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from nanovllm import LLM, SamplingParams  # noqa: E402
from nanovllm.lm_eval import NanoVLLM  # noqa: E402

ROOT = Path(__file__).parent.parent
DEMO = str(ROOT / "demo" / "tiny-qwen3")
TASKS = Path(__file__).parent / "lm_eval_task"
ARGS = f"pretrained={DEMO},dtype=float32"
TOLERANCE = 1e-4

USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
SUM = f"{USER}What is 47 + 38?{ASSISTANT}47"
RIGHT, WRONG = f" + 38 = 85{END}", f" + 38 = 86{END}"
COUNTING = ", ".join(map(str, range(1, 100)))


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(DEMO, dtype="float32", device="cpu", num_kvcache_blocks=64) as llm:
        yield llm


@pytest.fixture(scope="module")
def ours(llm: LLM) -> NanoVLLM:
    return NanoVLLM(llm)


@pytest.fixture(scope="module")
def hf() -> Any:
    # Without its cache of logits: where a window ends with the context of another, and the two have
    # continuations of different lengths, it takes the shorter one's logits from the wrong place.
    return huggingface.HFLM(DEMO, dtype="float32", device="cpu", batch_size=3, logits_cache=False)


@pytest.fixture
def at_most(hf: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Both backends, limited to so many tokens."""

    def limited(max_length: int) -> tuple[NanoVLLM, Any]:
        monkeypatch.setattr(hf, "_max_length", max_length)
        return NanoVLLM(llm, max_length=max_length), hf

    return limited


def requests(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


def score(model: Any, *pairs: tuple[str, str]) -> list[tuple[float, bool]]:
    return model.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)


def roll(model: Any, *texts: str) -> list[float]:
    found = requests("loglikelihood_rolling", *((text,) for text in texts))
    return model.loglikelihood_rolling(found, disable_tqdm=True)


def generate(model: Any, *pairs: tuple[str, dict[str, Any]]) -> list[str]:
    return model.generate_until(requests("generate_until", *pairs), disable_tqdm=True)


def assert_same_scores(
    scores: list[tuple[float, bool]], expected: list[tuple[float, bool]]
) -> None:
    assert [is_greedy for _, is_greedy in scores] == [is_greedy for _, is_greedy in expected]
    logprobs = [logprob for logprob, _ in scores]
    assert logprobs == pytest.approx([logprob for logprob, _ in expected], abs=TOLERANCE)


def evaluate(model: str, tasks: list[str], **options: Any) -> dict[str, Any]:
    return lm_eval.simple_evaluate(
        model, ARGS, tasks=tasks, device="cpu", batch_size=3, bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False), **options,
    )  # fmt: skip


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the directory that the tasks' file names are relative to, with a cache of its own."""
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


@pytest.mark.parametrize(
    "pairs",
    [
        [(SUM, RIGHT), (SUM, WRONG), (SUM, RIGHT[:-1]), (SUM, " + "), (f"{SUM} + 38 = 8", "5")],
        [("", "I am a tiny demo"), ("", f"{END}\nI am"), ("", "你好！"), ("I", " am")],
        [("Two spaces  ", "there"), (f"{USER}Hello!{ASSISTANT}", "Hello! I am a tiny demo model")],
        [(f"{USER}Count from 1 to 99.{ASSISTANT}1", f"{COUNTING[1:]}{END}"), (SUM, RIGHT)],
    ],
)
def test_loglikelihoods(ours: NanoVLLM, hf: Any, pairs: list[tuple[str, str]]) -> None:
    assert_same_scores(score(ours, *pairs), score(hf, *pairs))


def test_greedy_continuations_are_known(ours: NanoVLLM) -> None:
    (right, is_greedy), (wrong, is_not) = score(ours, (SUM, RIGHT), (SUM, WRONG))
    assert is_greedy and not is_not
    assert wrong < right - 1 and right > -0.1


def test_scores_do_not_depend_on_the_engine(ours: NanoVLLM) -> None:
    pairs = [(f"{COUNTING}, {n},", f" {n + 1}") for n in range(20)]
    expected = score(ours, *pairs)
    options = {
        "max_num_seqs": 2, "max_num_batched_tokens": 48, "kvcache_block_size": 16,
        "async_scheduling": True, "max_model_len": 1000,
    }  # fmt: skip
    small = NanoVLLM(DEMO, dtype="float32", device="cpu", num_kvcache_blocks=64, **options)
    try:
        assert_same_scores(score(small, *pairs), expected)
        assert_same_scores(score(small, *pairs), expected)  # the prefixes are in the cache now
    finally:
        small.llm.close()


def test_no_requests(ours: NanoVLLM) -> None:
    assert score(ours) == [] and roll(ours) == [] and generate(ours) == []


@pytest.mark.parametrize("max_length", [1, 2, 7, 62, 300])
def test_texts_in_windows(at_most: Any, max_length: int) -> None:
    ours, hf = at_most(max_length)
    texts = [COUNTING, f"{USER}Hello!{ASSISTANT}", "你好！", "", "I"]
    assert roll(ours, *texts) == pytest.approx(roll(hf, *texts), abs=TOLERANCE, rel=1e-6)


def test_texts_may_be_as_long_as_the_model_allows(tmp_path: Path) -> None:
    path = link_checkpoint(Path(DEMO), tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    config["max_position_embeddings"] = 8192  # more than the engine's default
    (path / "config.json").write_text(json.dumps(config))
    model = NanoVLLM(str(path), device="cpu", num_kvcache_blocks=32)
    assert model.max_length == 8192 - 2
    model.llm.close()


@pytest.mark.parametrize("too_long", [0, 1, 5])
def test_long_contexts_are_cut_from_the_left(
    at_most: Any, caplog: pytest.LogCaptureFixture, too_long: int
) -> None:
    continuation = ", 98, 99"
    text = f"{COUNTING}{continuation}"
    ours, _ = at_most(300)
    ours, hf = at_most(len(ours.tok_encode(text)) - 1 - too_long)
    with caplog.at_level(logging.WARNING, logger="nanovllm.lm_eval"):
        found = score(ours, (COUNTING, continuation))
    assert_same_scores(found, score(hf, (COUNTING, continuation)))
    assert ("cut from the left" in caplog.text) == (too_long > 0)


def test_long_prompts_are_cut_from_the_left(at_most: Any, caplog: pytest.LogCaptureFixture) -> None:
    ours, hf = at_most(60)
    pair = (f"{USER}Count from 1 to 99.{ASSISTANT}{COUNTING[:200]}", {"max_gen_toks": 20})
    with caplog.at_level(logging.WARNING, logger="nanovllm.lm_eval"):
        found = generate(ours, pair)
    assert found == generate(hf, pair)
    assert found != generate(NanoVLLM(ours.llm), pair)
    assert "cut from the left to the 40 that leave room for 20" in caplog.text


@pytest.mark.parametrize(
    "gen_kwargs",
    [
        {},
        {"until": [], "max_gen_toks": 7},
        {"until": ", 7"},
        {"until": ["9", ", 6", "never"], "max_new_tokens": 50},
        {"until": ["\n\n"], "do_sample": False, "temperature": 0.0},
        {"until": [END], "max_tokens": 60, "num_beams": 1},
        {"until": ["I am a"], "do_sample": False},
        {"until": ["个"], "temperature": 0.0},
    ],
)
def test_generated_texts(ours: NanoVLLM, hf: Any, gen_kwargs: dict[str, Any]) -> None:
    questions = ["Count from 3 to 12.", "Who are you?", "你是谁？", "List the primes under 60."]
    pairs = [(f"{USER}{question}{ASSISTANT}", gen_kwargs) for question in questions]
    found = generate(ours, *pairs)
    assert found == generate(hf, *pairs)
    assert any(found)


def test_texts_without_end(ours: NanoVLLM) -> None:
    hello = f"{USER}Hello!{ASSISTANT}"
    (text,) = generate(ours, (hello, {"max_gen_toks": 3}))
    assert len(ours.tok_encode(text)) == 3
    (text,) = generate(NanoVLLM(ours.llm, max_gen_toks=5), (hello, {"until": ""}))
    assert len(ours.tok_encode(text)) == 5


def test_a_special_token_may_be_a_stop_string(ours: NanoVLLM) -> None:
    biased = {"do_sample": False, "logit_bias": {1: 100.0}, "max_gen_toks": 9}
    start = ours.tokenizer.decode([1])
    assert start == "<|im_start|>"
    request = (f"{USER}Hello!{ASSISTANT}", biased | {"until": [start]})
    before = ours.llm.metrics()["generated_tokens"]
    assert generate(ours, request) == [""]
    assert ours.llm.metrics()["generated_tokens"] == before + 1


def test_sampling(ours: NanoVLLM) -> None:
    hello = f"{USER}Tell me about 12{ASSISTANT}"
    hot = {"do_sample": True, "temperature": 5.0, "max_gen_toks": 20}
    assert len(set(generate(ours, *[(hello, hot)] * 4))) == 4
    assert len(set(generate(ours, *[(hello, hot | {"seed": 3})] * 4))) == 1
    greedy = generate(ours, (hello, {"max_gen_toks": 20}))
    assert generate(ours, (hello, hot | {"top_k": 1})) == greedy
    assert generate(ours, (hello, hot | {"do_sample": False})) == greedy
    assert generate(ours, (hello, hot | {"do_sample": True, "temperature": 0.0})) == greedy
    warm = {"temperature": 5.0, "max_gen_toks": 20}  # which means to sample
    assert len(set(generate(ours, *[(hello, warm)] * 4))) == 4


def test_thoughts_are_left_out(ours: NanoVLLM) -> None:
    count = f"{USER}Count from 3 to 12.{ASSISTANT}"
    with_thoughts = NanoVLLM(ours.llm, enable_thinking=True, think_end_token="6,")
    # The stop strings, one of which is among the thoughts too, count after them only.
    assert generate(with_thoughts, (count, {"until": [", 1", "4"]})) == ["7, 8, 9"]
    with pytest.raises(ValueError, match="enable_thinking is for tasks that generate"):
        score(with_thoughts, ("a", "b"))
    with pytest.raises(ValueError, match="needs think_end_token"):
        NanoVLLM(ours.llm, enable_thinking=True)


def test_chats(ours: NanoVLLM, hf: Any, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
    answer = {"role": "assistant", "content": "Hello! I"}
    assert ours.apply_chat_template(chat) == hf.apply_chat_template(chat)
    begun = ours.apply_chat_template([*chat, answer], add_generation_prompt=False)
    assert begun == hf.apply_chat_template([*chat, answer], add_generation_prompt=False)
    assert begun.endswith("Hello! I")
    assert ours.tokenizer_name == hf.tokenizer_name
    assert ours.chat_template(True) == hf.chat_template(True)
    strict = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ thinks }}{{ enable_thinking }}{{ messages[0].content }}"
    )
    monkeypatch.setattr(llm.tokenizer, "chat_template", strict)
    arguments = {"chat_template_args": {"thinks": 7}, "enable_thinking": False}
    assert NanoVLLM(llm, **arguments).apply_chat_template(chat) == "7FalseHello!"


def test_tokens(ours: NanoVLLM, hf: Any, llm: LLM) -> None:
    assert ours.eot_token_id == hf.eot_token_id == 2
    assert ours.prefix_token_id == hf.prefix_token_id == 2
    assert ours.max_gen_toks == hf.max_gen_toks
    assert NanoVLLM(llm, prefix_token_id=0).prefix_token_id == 0
    for text in ("", "Hello!", f"{END}Hello!", "你好", f"{SUM}{RIGHT}"):
        for special in (None, True, False):
            assert ours.tok_encode(text, special) == hf.tok_encode(text, special)
    with_other_prefix = NanoVLLM(llm, prefix_token_id=0)
    assert score(with_other_prefix, ("", "Hello!")) != score(ours, ("", "Hello!"))


def test_beginning_of_sequence(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = copy.deepcopy(llm.tokenizer)
    tokenizer.bos_token = "<|im_start|>"
    seen = []
    monkeypatch.setattr(tokenizer, "encode", lambda text, **options: seen.append(options) or [5])
    monkeypatch.setattr(llm, "tokenizer", tokenizer)
    model = NanoVLLM(llm, add_bos_token=True)
    assert model.prefix_token_id == 1
    model.tok_encode("Hello!")
    model.tok_encode("<|im_start|>Hello!")
    model.tok_encode("Hello!", add_special_tokens=False)
    NanoVLLM(llm).tok_encode("Hello!")
    assert [options.get("add_special_tokens") for options in seen] == [True, False, False, None]


class Cache:
    """Takes down what a model gives the harness to keep."""

    def __init__(self) -> None:
        self.kept: list[tuple[str, Any, Any]] = []

    def add_partial(self, kind: str, key: Any, value: Any) -> None:
        self.kept.append((kind, key, value))


def test_results_may_be_cached(llm: LLM) -> None:
    model, cache = NanoVLLM(llm), Cache()
    model.set_cache_hook(cache)
    gen_kwargs = {"until": ["."], "max_gen_toks": 5}
    scores = score(model, (SUM, RIGHT), ("", "Hello!"))
    totals = roll(model, "Hello!", COUNTING)
    texts = generate(model, (SUM, gen_kwargs))
    assert sorted(cache.kept[:2]) == sorted(
        [("loglikelihood", (SUM, RIGHT), scores[0]), ("loglikelihood", ("", "Hello!"), scores[1])]
    )
    assert cache.kept[2:4] == [
        ("loglikelihood_rolling", ("Hello!",), totals[0]),
        ("loglikelihood_rolling", (COUNTING,), totals[1]),
    ]
    assert cache.kept[4:] == [("generate_until", (SUM, gen_kwargs), texts[0])]


@pytest.mark.usefixtures("at_root")
def test_the_harness_finds_cached_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sqlitedict")
    tasks, options = ["demo_sums", "demo_talk"], {"use_cache": str(tmp_path / "cache"), "limit": 2}
    first = evaluate("nanovllm", tasks, **options)
    monkeypatch.setattr(NanoVLLM, "_run", None)
    assert evaluate("nanovllm", tasks, **options)["results"] == first["results"]


def test_bad_requests_are_refused(ours: NanoVLLM, at_most: Any) -> None:
    short, _ = at_most(6)
    with pytest.raises(ValueError, match="may have 1 to 6"):
        score(short, ("I", COUNTING))
    with pytest.raises(ValueError, match="may have 1 to"):
        score(ours, ("I am", ""))
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        generate(short, ("I am", {"max_gen_toks": 6}))
    with pytest.raises(TypeError, match="penalty_alpha"):
        generate(ours, ("I am", {"penalty_alpha": 0.5}))
    assert ours.llm.is_finished()


def test_bad_arguments_are_refused(llm: LLM, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="unknown engine option 'parallelize'"):
        NanoVLLM(DEMO, parallelize=True)
    with pytest.raises(ValueError, match="not both"):
        NanoVLLM(DEMO, max_length=20, max_model_len=20)
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        NanoVLLM(DEMO, max_length=0, device="cpu", num_kvcache_blocks=4)
    with pytest.raises(ValueError, match="come too late"):
        NanoVLLM(llm, dtype="float32")
    with pytest.raises(ValueError, match="give prefix_token_id"):
        NanoVLLM(str(tiny), device="cpu", num_kvcache_blocks=4)
    for path in tiny.iterdir():
        if "token" not in path.name:
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises(ValueError, match="has no tokenizer"):
        NanoVLLM(str(tmp_path), device="cpu", num_kvcache_blocks=4)


def test_max_length_is_the_engines_limit() -> None:
    model = NanoVLLM(DEMO, max_length=30, device="cpu", num_kvcache_blocks=4)
    assert (model.max_length, model.llm.config.max_model_len) == (30, 32)
    model.llm.close()


def test_the_engine_is_left_ready_after_a_failure(
    ours: NanoVLLM, llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm, "step", fail)
        with pytest.raises(KeyboardInterrupt):
            score(ours, (SUM, RIGHT))
    assert llm.is_finished()
    request = llm.add_request("Hello!", SamplingParams(max_tokens=2))
    with pytest.raises(RuntimeError, match="unfinished requests"):
        score(ours, (SUM, RIGHT))
    llm.abort(request)
    assert len(score(ours, (SUM, RIGHT))) == 1


def run(*command: str, **options: Any) -> str:
    process = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, encoding="utf-8", **options
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_nanovllm_does_not_need_the_harness() -> None:
    out = run(
        "-c",
        "import sys, nanovllm; print([m for m in sys.modules if m.split('.')[-1] == 'lm_eval'])",
        cwd=ROOT,
    )
    assert out.strip() == "[]"


def test_command() -> None:
    pytest.importorskip("pytablewriter")
    out = run(
        "-m", "nanovllm.lm_eval", "run", "--model", "nanovllm", "--model_args", ARGS,
        "--include_path", str(TASKS), "--tasks", "demo_talk", "--apply_chat_template",
        "--limit", "2", "--device", "cpu", cwd=ROOT,
    )  # fmt: skip
    assert "|demo_talk|" in out and "exact_match" in out


def test_of_equally_likely_tokens_one_is_greedy() -> None:
    """In bfloat16 they are common."""
    with LLM(DEMO, device="cpu", num_kvcache_blocks=64) as llm:
        adapter, ties = NanoVLLM(llm), 0
        params = SamplingParams(temperature=0, max_tokens=60, logprobs=2, ignore_eos=True)
        for seed in range(40):
            prompt = [3 + (seed * 37 + 11 * i) % 790 for i in range(9)]
            (output,) = llm.generate(prompt, params, use_tqdm=False)
            tokens = prompt + output["token_ids"]
            for place, entry in enumerate(output["logprobs"], len(prompt)):
                values = [found.logprob for found in entry.values()]
                if values[0] != values[1]:
                    continue
                ties += 1
                found = adapter._loglikelihood_tokens(
                    [(None, tokens[:place], [token]) for token in entry], disable_tqdm=True
                )
                assert sum(is_greedy for _, is_greedy in found) == 1
        assert ties > 0, "a test without ties"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"think_end_token": 5}, "think_end_token must be text"),
        ({"max_gen_toks": 0}, "max_gen_toks must be at least 1"),
        ({"max_gen_toks": "abc"}, "max_gen_toks must be an integer"),
        ({"max_length": "abc"}, "max_length must be an integer"),
        ({"prefix_token_id": 99999}, "prefix_token_id is 99999, outside"),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_that_cannot_work(llm: LLM, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        NanoVLLM(llm, **arguments)


def test_what_the_harness_adds_is_taken(llm: LLM) -> None:
    adapter = NanoVLLM(llm, trust_remote_code=True, batch_size="auto")
    empty, prefix = generate(
        adapter, *((text, {"max_gen_toks": 9, "use_cache": True}) for text in ("", END))
    )
    assert empty == prefix
    with pytest.raises(ValueError, match="num_beams must be 1, got 10"):
        generate(adapter, ("Hello", {"max_gen_toks": 3, "num_beams": 10}))
