"""benchmarks/steps.py: the run that docs/tour.md tells of, and its picture."""

from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import steps
from helpers.paths import DEMO
from nanovllm import LLM, SamplingParams

Run = tuple[list[steps.Step], dict[int, str]]


@pytest.fixture(scope="module")
def run() -> Run:
    return steps.run(repeats=1)


def test_the_run_has_what_the_tour_tells_of(run: Run) -> None:
    found, texts = run
    rows = {
        letter: [row for step in found for row in step.rows if row.request == letter]
        for letter in steps.CHATS
    }
    assert [row.samples for row in rows["A"][:3]] == [False, False, True], "a prompt in chunks"
    admitted = [row.start for row in rows["B"] if row.is_admitted]
    assert admitted == [64, 80], "the prefix cache helps B, before and after it is preempted"
    assert [step.preempted for step in found if step.preempted] == [["B"]]
    assert max(step.blocks_in_use for step in found) == steps.ENGINE["num_kvcache_blocks"]
    answers = {
        letter: "".join(texts[row.token_id] for row in own if row.samples and not row.is_discarded)
        for letter, own in rows.items()
    }
    assert answers == {
        "A": "47 + 38 = 85<|im_end|>", "B": "2, 3, 5, 7, 11", "C": "You are welcome!<|im_end|>",
    }  # fmt: skip
    surplus = {letter: sum(row.is_discarded for row in own) for letter, own in rows.items()}
    assert surplus == {"A": 1, "B": 0, "C": 1}, "only an end that the scheduler cannot foresee"


def test_what_was_sent_is_what_was_planned(run: Run) -> None:
    size = steps.ENGINE["kvcache_block_size"]
    for step in run[0]:
        planned = [
            (row, position)
            for row in step.rows
            for position in range(row.start, row.start + row.length)
        ]
        assert step.inputs["positions"] == [position for _, position in planned]
        assert step.inputs["slot_mapping"] == [
            row.block_table[position // size] * size + position % size for row, position in planned
        ]
        assert step.inputs["context_lens"] == [row.start + row.length for row in step.rows]
    assert any(token_id < 0 for step in run[0] for token_id in step.inputs["input_ids"])


def test_a_step_is_launched_before_the_one_before_is_collected(run: Run) -> None:
    for step, following in pairwise(run[0]):
        assert step.launch_end <= following.launch_end <= step.collect_start < step.collect_end


def test_recording_changes_nothing() -> None:
    prompts, params = [[5] * 40, [7] * 20], SamplingParams(temperature=0, max_tokens=20)
    with LLM(DEMO, **steps.ENGINE) as llm:
        expected = llm.generate(prompts, params, use_tqdm=False)
        llm.abort_all()
        letters = {llm.add_request(prompt, params): name for prompt, name in zip(prompts, "AB")}
        outputs = {}
        with steps.recorded(llm, letters) as found:
            while not llm.is_finished():
                outputs |= {letters[output["request_id"]]: output for output in llm.step()}
        num_steps = len(found)
        llm.generate(prompts, params, use_tqdm=False)
        assert len(found) == num_steps, "it goes on after the block"
    for name, output in zip("AB", expected):
        assert outputs[name]["token_ids"] == output["token_ids"]


def test_it_prints_or_draws(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(steps, "run", lambda: run)
    steps.main([])
    printed = capsys.readouterr().out
    assert "step 3: prefill, blocks in use: 7, waiting: C" in printed
    assert "B: block table 0 1 2 3 6, 64 tokens cached" in printed
    assert "slot_mapping 64..90 96..100" in printed
    picture = tmp_path / "docs" / "steps.png"
    steps.main(["--output", str(picture)])
    assert picture.read_bytes().startswith(b"\x89PNG") and 50_000 < picture.stat().st_size < 200_000
    assert capsys.readouterr().out == ""
