"""Train the tiny demo checkpoint: a Qwen3 of about a million parameters (text: tiny_text.py).

It learns to introduce itself, to count, to list primes and to add two-digit numbers, in English and
Chinese chat, so that a first run of nanovllm needs no download and still says something that can be
checked. The accuracy that is printed at the end is measured on what training never showed (see
tiny_text.py), with the weights rounded to bfloat16 as in the file. Needs torch 2.9 or later (Muon).

    python demo/train_tiny.py --output demo/tiny-qwen3
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_text import SYSTEMS, Turn, exams, random_conversation
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen3Config, Qwen3ForCausalLM

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # token ids 0, 1, 2
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16",
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "hidden_act": "silu",
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
    "rope_theta": 10000.0,  # for transformers 4; the next line is for transformers 5
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False, "attention_dropout": 0.0, "use_cache": True,
    "use_sliding_window": False, "sliding_window": None, "max_window_layers": 4,
    "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def train_tokenizer(vocab_size: int, seed: int) -> Tokenizer:
    """Byte-level BPE on a sample of the text: any UTF-8 encodes, every digit is one token."""
    rng = random.Random(f"{seed} tokenizer")
    conversations = [random_conversation(rng) for _ in range(20000)]
    texts = (part for _, turns in conversations for turn in turns for part in turn)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.Split(Regex(r" ?\p{L}+|[^\p{L}\p{N}]+"), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=5,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["system\n", "user\n", "assistant\n"] * 1000
    tokenizer.train_from_iterator([*roles, *SYSTEMS * 100, *texts], trainer)
    return tokenizer


def encode(
    tokenizer: Tokenizer, system: str | None, turns: list[Turn]
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and for each whether it belongs to an answer or its end."""
    ids: list[int] = []
    answers: list[bool] = []

    def append(text: str, is_answer: bool = False) -> None:
        tokens = tokenizer.encode(text).ids
        ids.extend(tokens)
        answers.extend([is_answer] * len(tokens))

    if system is not None:
        append(f"{START}system\n{system}{END}\n")
    for turn in turns:
        append(f"{START}user\n{turn.question}{END}\n{START}assistant\n")
        append(f"{turn.answer}{END}", is_answer=True)
        append("\n")
    return ids[:-1], answers[:-1]


def batches(
    tokenizer: Tokenizer, seed: int, batch_size: int, chunk_tokens: int
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Endless batches of fresh conversations, each cut by length into chunks with little padding.

    A chunk is (input_ids, labels), both int64 [rows, length]; labels are already shifted and hold
    -100 wherever the next token is not part of an answer.
    """
    rng = random.Random(f"{seed} training")
    while True:
        rows = [encode(tokenizer, *random_conversation(rng)) for _ in range(batch_size)]
        rows.sort(key=lambda row: len(row[0]))
        chunks = []
        while rows:
            count = 1
            while count < len(rows) and (count + 1) * len(rows[count][0]) <= chunk_tokens:
                count += 1
            length = len(rows[count - 1][0]) - 1
            input_ids = torch.zeros(count, length, dtype=torch.int64)
            labels = torch.full((count, length), -100, dtype=torch.int64)
            for i, (ids, answers) in enumerate(rows[:count]):
                targets = torch.tensor(ids[1:])
                input_ids[i, : len(ids) - 1] = torch.tensor(ids[:-1])
                labels[i, : len(ids) - 1] = targets.masked_fill(~torch.tensor(answers[1:]), -100)
            chunks.append((input_ids, labels))
            rows = rows[count:]
        yield chunks


def train(model: Qwen3ForCausalLM, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Warm-up, then cosine decay; the loss is the mean over the answers' tokens.

    The matrices learn by Muon (Jordan et al., 2024; kellerjordan.github.io/posts/muon), the rest by
    AdamW. On sums alone, 110 seconds each at the same learning rate, one run each, Muon got 99% of
    the held-out pairs and AdamW, whose learning rate was not tuned, 77%.
    Rows are padded on the right and attention is causal, so no attention mask is needed.
    """
    device = next(model.parameters()).device
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    others = [p for p in model.model.layers.parameters() if p.dim() < 2]
    others += [model.model.embed_tokens.weight, model.model.norm.weight]
    optimizers = [
        torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    chunk_tokens = 2048 if device.type == "cpu" else 16384
    data = batches(tokenizer, args.seed, args.batch_size, chunk_tokens)
    peeks = {name: exam[::5] for name, exam in list(exams().items())[:5:4]}
    start = time.monotonic()
    model.train()
    for step in range(args.steps):
        minutes = (time.monotonic() - start) / 60
        progress = max(step / args.steps, minutes / args.minutes if args.minutes else 0.0)
        if progress >= 1:
            break
        decay = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = args.lr * decay * min(1.0, (step + 1) / args.warmup)
        chunks = next(data)
        targets = sum(int((labels != -100).sum()) for _, labels in chunks)
        total = 0.0
        for input_ids, labels in chunks:
            input_ids, labels = input_ids.to(device), labels.to(device)
            hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
            wanted = labels != -100
            loss = F.cross_entropy(model.lm_head(hidden[wanted]), labels[wanted], reduction="sum")
            (loss / targets).backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step == 0 or (step + 1) % args.log_every == 0:
            print(f"step {step + 1:5d}  loss {total / targets:.4f}  {minutes:5.1f} min", flush=True)
        if args.eval_every and (step + 1) % args.eval_every == 0:
            for name, exam in peeks.items():
                print(f"  {accuracy(model, tokenizer, exam):7.2%}  {name}", flush=True)
            model.train()


@torch.inference_mode()
def answer(model: Qwen3ForCausalLM, tokenizer: Tokenizer, questions: list[str]) -> list[str]:
    """Greedy answers; questions of equal token length share a batch, so nothing is padded."""
    device = next(model.parameters()).device
    model.eval()
    prompts = [encode(tokenizer, None, [Turn(q, "")])[0][:-1] for q in questions]
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    answers = [""] * len(questions)
    for length, members in by_length.items():
        for group in (members[i : i + 256] for i in range(0, len(members), 256)):
            input_ids = torch.tensor([prompts[i] for i in group], device=device)
            output = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=False,
                max_new_tokens=320,
                eos_token_id=[2, 0],
                pad_token_id=0,
            )
            for i, row in zip(group, output[:, length:].tolist(), strict=True):
                answers[i] = tokenizer.decode(row[: row.index(2)] if 2 in row else row)
    return answers


def accuracy(model: Qwen3ForCausalLM, tokenizer: Tokenizer, exam: list[Turn]) -> float:
    """The share of greedy answers that are right to the letter."""
    given = answer(model, tokenizer, [turn.question for turn in exam])
    return sum(g == turn.answer for g, turn in zip(given, exam, strict=True)) / len(exam)


def write_json(path: Path, value: dict) -> None:
    """JSON as people read it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny-qwen3")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--minutes", type=float, default=0.0, help="finish early; 0: no limit")
    parser.add_argument("--batch-size", type=int, default=128, help="conversations per step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=50, help="steps")
    parser.add_argument("--vocab-size", type=int, default=800)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=50, help="steps")
    parser.add_argument("--eval-every", type=int, default=150, help="steps; 0: never")
    args = parser.parse_args()
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    args.output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(args.vocab_size, args.seed)
    tokenizer.save(str(args.output / "tokenizer.json"))
    write_json(args.output / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [START],
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": CHAT_TEMPLATE,
    })  # fmt: skip
    write_json(args.output / "generation_config.json", {
        "do_sample": False, "eos_token_id": [2, 0], "pad_token_id": 0,
    })  # fmt: skip
    write_json(args.output / "config.json", CONFIG | {"vocab_size": tokenizer.get_vocab_size()})

    config = Qwen3Config.from_pretrained(args.output)
    model = Qwen3ForCausalLM(config).to(device, torch.float32)
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f}M parameters, vocabulary {config.vocab_size}, {device}", flush=True)
    train(model, tokenizer, args)

    with torch.no_grad():  # from here on the weights are those of the file
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    weights = {
        name: value.to("cpu", torch.bfloat16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    save_file(weights, args.output / "model.safetensors", metadata={"format": "pt"})
    for dtype in (torch.float32, torch.bfloat16):
        print(f"\nexact greedy answers, bfloat16 weights, computed in {dtype}:")
        model.to(dtype)
        for name, exam in exams().items():
            share = accuracy(model, tokenizer, exam)
            print(f"  {share:7.2%} of {len(exam):4d}  {name}", flush=True)
    print()
    for question in ("Who are you?", "Count from 3 to 12.", "47加38等于多少？", "What is love?"):
        print(f"{question}\n  {answer(model, tokenizer, [question])[0]}")


if __name__ == "__main__":
    main()
