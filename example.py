"""Chat with a model, to see that it talks:

python example.py
python example.py --stream
python example.py --model Qwen/Qwen3-0.6B --prompt "Why is the sky blue?"
"""

import argparse
from pathlib import Path

from nanovllm import LLM, SamplingParams

DEMO_MODEL = Path(__file__).parent / "demo" / "tiny-qwen3"
PROMPTS = ["Who are you?", "List the primes under 100.", "What is 47 + 38?", "你好，请从1数到10。"]


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a model a few questions.")
    parser.add_argument("--model", help="checkpoint directory or hub id; default: the tiny demo")
    parser.add_argument("--prompt", action="append", help="a question; may be given several times")
    parser.add_argument("--temperature", type=float, help="default: 0.6; 0 for the tiny demo")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--stream", action="store_true", help="print each answer as it comes")
    args = parser.parse_args()
    if args.model is None:
        print(
            "This is the tiny demo model that comes with nanovllm, one million parameters; for a "
            "real one: python example.py --model Qwen/Qwen3-0.6B\n"
        )
    temperature = args.temperature if args.temperature is not None else 0.6 if args.model else 0.0
    prompts = args.prompt or PROMPTS

    params = SamplingParams(temperature=temperature, max_tokens=args.max_tokens)
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]

    with LLM(args.model or DEMO_MODEL) as llm:
        if args.stream:
            for prompt, chat in zip(prompts, chats):
                print(f"\n> {prompt}")
                for piece in llm.stream(llm.chat_prompt(chat), params):
                    print(piece["text"], end="", flush=True)
                print(" [cut at --max-tokens]" if piece["finish_reason"] == "length" else "")
            return
        outputs = llm.chat(chats, params)

    for prompt, output in zip(prompts, outputs):
        cut = " [cut at --max-tokens]" if output["finish_reason"] == "length" else ""
        print(f"\n> {prompt}\n{output['text'].strip()}{cut}")


if __name__ == "__main__":
    main()
