"""Scripts in the idioms of vLLM's offline use, with their import changed, run and say something.

Each is a whole program, run with the trained demo, whose directory it finds as MODEL.
"""

import json

import pytest

from helpers.paths import DEMO

SCRIPTS = {
    "quickstart": """
        from nanovllm import LLM, SamplingParams
        prompts = ["1, 2, 3,", "20 + 22 ="]
        llm = LLM(model=MODEL, trust_remote_code=True, tensor_parallel_size=1, dtype="auto",
                  gpu_memory_utilization=0.9, swap_space=4, enforce_eager=False, seed=None)
        for output in llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=8)):
            print(f"Prompt: {output.prompt!r}, Generated text: {output.outputs[0].text!r}")
    """,
    "benchmark_of_answers": """
        import json
        from nanovllm import LLM, SamplingParams
        llm = LLM(MODEL, max_model_len=128, enable_prefix_caching=True, quantization=None,
                  disable_log_stats=True, distributed_executor_backend="mp", max_logprobs=20)
        params = SamplingParams(n=2, best_of=2, temperature=0.8, top_p=0.95, stop=["\\n"],
                                max_tokens=16, logprobs=1, seed=1, use_beam_search=False)
        rows, prompts = [], ["7 + 8 =", "3 + 4 ="]
        for prompt, out in zip(prompts, llm.generate(prompts, params)):
            best = max(out.outputs, key=lambda c: c.cumulative_logprob)
            rows.append({"prompt": prompt, "answers": [c.text for c in out.outputs],
                         "reason": best.finish_reason, "tokens": len(best.token_ids)})
        print(json.dumps(rows))
        json.dumps(llm.generate("1,", params, use_tqdm=False))
    """,
    "chat_with_the_tokenizer": """
        from nanovllm import LLM, SamplingParams
        llm = LLM(MODEL, tokenizer=MODEL, tokenizer_mode="auto", pipeline_parallel_size=1)
        tokenizer = llm.get_tokenizer()
        messages = [[{"role": "user", "content": f"{i}+{i}="}] for i in (11, 12)]
        prompts = [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True)
                   for m in messages]
        stops = [tokenizer.eos_token_id]
        params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=stops)
        outputs = llm.generate(prompts, sampling_params=params, use_tqdm=False, lora_request=None)
        same = llm.chat(messages, params, use_tqdm=False, chat_template_content_format="auto")
        assert [o.outputs[0].text for o in outputs] == [o.outputs[0].text for o in same]
        assert [o.prompt for o in same] == prompts
        print(outputs[0].outputs[0].text)
    """,
    "token_ids_from_an_array": """
        import numpy as np
        from nanovllm import LLM, SamplingParams, TokensPrompt
        llm = LLM(MODEL, skip_tokenizer_init=True, block_size=16, max_num_seqs=4, dtype="half")
        ids = np.array([[21, 22, 23], [31, 32, 33]])
        params = SamplingParams(temperature=0, max_tokens=4, detokenize=True, ignore_eos=True)
        one = llm.generate(prompt_token_ids=ids, sampling_params=params, use_tqdm=False)
        prompts = [TokensPrompt(prompt_token_ids=list(map(int, row))) for row in ids]
        two = llm.generate(prompts, params)
        assert [o.outputs[0].token_ids for o in one] == [o.outputs[0].token_ids for o in two]
        print(one[0].outputs[0].token_ids)
    """,
    "perplexity_of_prompts": """
        import math
        from nanovllm import LLM, SamplingParams
        llm = LLM(MODEL, dtype="float32")
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0)
        (output,) = llm.generate(["1, 2, 3, 4, 5, 6, 7"], params)
        found = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[1:]]
        print("perplexity", math.exp(-sum(found) / len(found)))
    """,
    "params_that_change": """
        from nanovllm import LLM, SamplingParams
        llm = LLM(MODEL)
        params = llm.get_default_sampling_params().clone()
        params.max_tokens = 6
        params.temperature = 0
        for length in (3, 6):
            params.max_tokens = length
            (out,) = llm.generate("1, 2,", params, use_tqdm=False)
            assert len(out.outputs[0].token_ids) == length and out.finished
        print(out.outputs[0].text, out.metrics.first_token_time > out.metrics.arrival_time)
    """,
    "weights_from_a_training_loop": """
        from safetensors.torch import load_file
        from nanovllm import LLM, SamplingParams
        llm = LLM(MODEL, dtype="float32")
        params = SamplingParams(temperature=0, max_tokens=8)
        (before,) = llm.generate("1, 2, 3,", params, use_tqdm=False)
        llm.update_weights(load_file(f"{MODEL}/model.safetensors").items())
        (after,) = llm.generate("1, 2, 3,", params, use_tqdm=False)
        assert after.outputs[0].text == before.outputs[0].text
        print(after.outputs[0].text)
    """,
    "a_table_of_prompts": """
        import pandas as pd
        from nanovllm import LLM, SamplingParams
        table = pd.DataFrame({"question": ["1 + 1 =", "2 + 2 ="], "length": [4, 5]})
        llm = LLM(MODEL)
        params = [SamplingParams(max_tokens=n, temperature=0) for n in table["length"]]
        outputs = llm.generate(table["question"], params)
        table["answer"] = [output.outputs[0].text for output in outputs]
        print(table.to_json())
    """,
}  # fmt: skip


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    if "pandas" in SCRIPTS[name]:
        pytest.importorskip("pandas")
    lines = SCRIPTS[name].splitlines()
    code = "\n".join(line.removeprefix(" " * 8) for line in lines)
    names = {"MODEL": str(DEMO)}
    exec(code, names)
    assert capsys.readouterr().out.strip()
    names["llm"].close()


def test_what_is_not_served_is_refused_by_name() -> None:
    from nanovllm import LLM

    with LLM(DEMO, num_kvcache_blocks=8) as llm:
        with pytest.raises(ValueError, match=r"lora_request='adapter'.*merge the adapter"):
            llm.generate("1,", lora_request="adapter")
        with pytest.raises(ValueError, match="priority=1"):
            llm.chat([{"role": "user", "content": "1"}], priority=1)
        with pytest.raises(TypeError, match="unexpected keyword argument 'sampling'"):
            llm.generate("1,", sampling=None)
        with pytest.raises(TypeError, match="prompts must be a string"):
            llm.generate()
        assert json.dumps(llm.generate([])) == "[]"
