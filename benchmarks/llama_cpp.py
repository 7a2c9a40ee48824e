"""llama.cpp for `benchmarks.cpu`: a model file with given weights, and greedy generation.

It needs the packages `llama-cpp-python` (built where it runs, with GGML_NATIVE) and `gguf`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import torch

NUM_SEQS, CONTEXT_LEN = 8, 4096  # at once, and of all of them together
WEIGHT_TYPES = {"BF16": gguf.GGMLQuantizationType.BF16, "Q8_0": gguf.GGMLQuantizationType.Q8_0}


def write_model(
    path: Path, config: Any, weights: Mapping[str, torch.Tensor], weight_type: str
) -> None:
    """A GGUF file of a Qwen3, with no tokenizer.

    Args:
        config: of transformers.
        weights: bf16, by their names in a checkpoint; the output head is the embedding.
        weight_type: of `WEIGHT_TYPES`: what matrices are stored as. Norms are in float32.
    """
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    for name, weight in weights.items():
        if name != "lm_head.weight":
            kind = WEIGHT_TYPES[weight_type] if weight.dim() > 1 else gguf.GGMLQuantizationType.F32
            data = gguf.quantize(weight.float().numpy(), kind)
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """One model file, with llama.cpp's defaults for all but the number of threads."""

    def __init__(self, path: Path, threads: int) -> None:
        llama_cpp.llama_log_set(_ignore, None)
        model_params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), model_params)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_seq_max = CONTEXT_LEN, CONTEXT_LEN, NUM_SEQS
        params.kv_unified = True
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if self._context is None:
            raise RuntimeError(f"llama.cpp makes no context of {path}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(
            llama_cpp.llama_model_get_vocab(self._model)
        )
        self._batch = llama_cpp.llama_batch_init(CONTEXT_LEN, 0, 1)

    def generate(self, prompts: list[list[int]], output_len: int) -> list[list[int]]:
        """As many tokens for each prompt, [prompts, output_len]: all prompts in one batch, then all
        sequences in one batch a token."""
        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_clear(memory, False)
        outputs: list[list[int]] = [[] for _ in prompts]
        inputs, starts = prompts, [0] * len(prompts)
        while True:
            for output, token in zip(outputs, self._step(inputs, starts)):
                output.append(token)
            if len(outputs[0]) == output_len:
                return outputs
            starts = [start + len(tokens) for start, tokens in zip(starts, inputs)]
            inputs = [output[-1:] for output in outputs]

    def _step(self, inputs: list[list[int]], starts: list[int]) -> list[int]:
        """The most likely token after each sequence's new tokens, which begin at `starts`."""
        batch, lasts, place = self._batch, [], 0
        for seq_id, (tokens, start) in enumerate(zip(inputs, starts)):
            for position, token in enumerate(tokens, start):
                batch.token[place], batch.pos[place] = token, position
                batch.n_seq_id[place], batch.seq_id[place][0] = 1, seq_id
                batch.logits[place] = 0
                place += 1
            batch.logits[place - 1] = 1
            lasts.append(place - 1)
        batch.n_tokens = place
        if error := llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode returned {error} for {place} tokens")
        logits = (llama_cpp.llama_get_logits_ith(self._context, last) for last in lasts)
        return [int(np.ctypeslib.as_array(row, (self._vocab_size,)).argmax()) for row in logits]


@llama_cpp.llama_log_callback
def _ignore(level: int, text: bytes, user_data: Any) -> None:
    pass
