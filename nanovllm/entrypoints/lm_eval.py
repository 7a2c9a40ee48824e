"""A model of EleutherAI's lm-evaluation-harness that runs on nanovllm (the "eval" extra).

Importing this module registers the model "nanovllm". From Python:

    import nanovllm.lm_eval, lm_eval
    results = lm_eval.simple_evaluate("nanovllm", "pretrained=Qwen/Qwen3-0.6B", tasks=["arc_easy"])

or, with an `LLM` that exists already, `simple_evaluate(NanoVLLM(llm), tasks=...)`. From a shell,
with all options of the harness's own command:

    python -m nanovllm.lm_eval run --model nanovllm --model_args pretrained=DIR --tasks arc_easy

Scores equal those of the harness's "hf" model, up to the rounding of the logits, if both have the
same `max_length`: texts that are too long are then cut in the same place.
"""

import logging
import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import jinja2
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from nanovllm import LLM, SamplingParams, __version__
from nanovllm.outputs import Logprob, RequestOutput
from nanovllm.utils.validation import as_integer

logger = logging.getLogger(__name__)

# `max_length` counts the tokens that the model reads. `max_model_len` must be larger by two: one
# for the last token of a text, which is scored and not read, and one for the token that the engine
# always generates.
EXTRA_TOKENS = 2

# Arguments of the harness's other backends that the engine does not know, with the value that says
# what is the case.
GIVEN_ANYWAY = {"lora_local_path": None, "parallelize": False, "truncation_side": "left"}

# A text to score: the key of its score in the harness's cache (None: do not cache it), the token
# ids of the context, and those of the continuation, which are scored.
ScoreRequest = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("nanovllm")
class NanoVLLM(TemplateLM):
    """Scores and generates texts with an `LLM`.

    Args:
        pretrained: a checkpoint directory or hub id; or an `LLM`, which stays open.
        max_length: the most tokens that the model reads, as the "hf" model counts them. Instead,
            `max_model_len` may be given, which is larger by two. By default as many as the model
            and the KV cache allow.
        max_gen_toks: the most tokens to generate, for tasks that do not give it.
        prefix_token_id: the token before a text that has no context; by default the
            beginning-of-sequence token, or the end-of-sequence token if there is none.
        add_bos_token: whether to encode texts with special tokens; None: the tokenizer's default.
        chat_template_args: more arguments for the chat template.
        enable_thinking: one of these, only for tasks that generate. True needs `think_end_token`.
        think_end_token: the end of the model's thoughts, such as "</think>". Only what follows is
            the answer, and only there a task's stop strings apply.
        batch_size, max_batch_size: ignored, since the engine forms batches by `max_num_seqs` and
            `max_num_batched_tokens`.
        trust_remote_code: ignored, since the engine never runs code from a checkpoint.
        **options: engine options, see :class:`nanovllm.config.Config`. A GPU that is not there is
            replaced by the CPU, with a warning, since the harness asks for one by default.

    Raises:
        TypeError, ValueError: for an invalid argument.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | LLM,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        prefix_token_id: int | None = None,
        add_bos_token: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        trust_remote_code: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if max_length is not None:
            max_length = as_integer("max_length", max_length)
        max_gen_toks = as_integer("max_gen_toks", max_gen_toks)
        if max_gen_toks < 1:
            raise ValueError(f"max_gen_toks must be at least 1, got {max_gen_toks}")
        if think_end_token is not None and not isinstance(think_end_token, str):
            raise TypeError(f"think_end_token must be text, got {think_end_token!r}")
        if enable_thinking and think_end_token is None:
            raise ValueError(
                "enable_thinking needs think_end_token, such as '</think>': without it thoughts "
                "would count as answers"
            )
        self.llm = _load_llm(pretrained, max_length, options)
        if self.llm.tokenizer is None:
            raise ValueError(
                f"{self.llm.config.model_dir} has no tokenizer, and the tasks are text: add the "
                "checkpoint's tokenizer files"
            )
        self.tokenizer = self.llm.tokenizer
        self._prefix_token_id = self._choose_prefix_token_id(prefix_token_id)
        self.max_length = self.llm.config.max_model_len - EXTRA_TOKENS
        if max_length is not None:
            self.max_length = min(self.max_length, max_length)
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {self.max_length}")
        self.max_gen_toks = max_gen_toks
        self.add_bos_token = add_bos_token
        self.chat_template_args = dict(chat_template_args or {})
        if enable_thinking is not None:
            self.chat_template_args["enable_thinking"] = enable_thinking
        self.enable_thinking = enable_thinking
        self.think_end_token = think_end_token
        self._prefix_text = self._decode([self._prefix_token_id])
        eos = self.eot_token_id
        self._eos_text = None if eos is None else self._decode([eos])

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self._prefix_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, str]:
        """What the harness stores with the results."""
        return {
            "model_dtype": str(self.llm.config.torch_dtype),
            "model_device": str(self.llm.config.torch_device),
            "nanovllm_version": __version__,
        }

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, up to where the answer begins; without
        `add_generation_prompt` up to the end of the last message, which the model continues."""

        def render(messages: list[dict[str, str]]) -> str:
            text = self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.chat_template_args,
            )
            assert isinstance(text, str)  # since tokenize=False
            return text

        try:
            return render(chat_history)
        except jinja2.exceptions.TemplateError:
            logger.warning("the chat template fails: trying again without the system message")
            return render([message for message in chat_history if message["role"] != "system"])

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The token ids of a text. By default none are added if it begins with the prefix token."""
        if add_special_tokens is None:
            add_special_tokens = self.add_bos_token
            if self._prefix_text and string.startswith(self._prefix_text):
                add_special_tokens = False
        if add_special_tokens is not None:
            kwargs["add_special_tokens"] = add_special_tokens
        return self.tokenizer.encode(string, **kwargs)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log probability, and whether greedy
        decoding would generate it."""
        if self.enable_thinking:
            raise ValueError(
                "enable_thinking is for tasks that generate: these tasks score given answers, "
                "which have no thoughts before them"
            )
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log probability of each text. One that is too long is scored in several windows."""
        windows: list[ScoreRequest] = []
        text_indices: list[int] = []  # of each window
        for index, request in enumerate(requests):
            (text,) = request.args
            pairs = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            for pair in pairs:
                windows.append((None, *make_disjoint_window(pair)))
                text_indices.append(index)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for index, (logprob, _) in zip(text_indices, scores, strict=True):
            totals[index] += logprob
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """For each (context, generation arguments): the generated text, up to the first stop
        string."""
        prompts, all_params, all_stops = [], [], []
        for request in requests:
            context, gen_kwargs = request.args
            params, stops, max_prompt_tokens = self._generation_settings(gen_kwargs)
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            if len(tokens) > max_prompt_tokens:
                logger.warning(
                    "a prompt of %d tokens is cut from the left to the %d that leave room for %d",
                    len(tokens), max_prompt_tokens, params.max_tokens,
                )  # fmt: skip
            prompts.append(tokens[-max_prompt_tokens:])
            all_params.append(params)
            all_stops.append(stops)
        texts = [""] * len(requests)
        for index, output in self._run(prompts, all_params, "Generating", disable_tqdm):
            # output["text"] may have special tokens: the engine keeps them to find stop strings.
            text = self._decode(output["token_ids"], skip_special_tokens=True)
            if self.think_end_token:
                text = text.split(self.think_end_token)[-1].lstrip()
            texts[index] = postprocess_generated_text(text, all_stops[index], None)
            self.cache_hook.add_partial("generate_until", requests[index].args, texts[index])
        return texts

    def _loglikelihood_tokens(
        self, requests: list[ScoreRequest], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        limit = self.max_length + 1  # the last token is scored and not read
        prompts = []
        for _key, context, continuation in requests:
            if not context or not 1 <= len(continuation) < limit:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens after {len(context)} cannot be "
                    f"scored: it needs a token before it, and may have 1 to {limit - 1}"
                )
            tokens = context + continuation
            if len(tokens) > limit:
                logger.warning(
                    "a text of %d tokens is cut from the left to %d (max_length=%d)",
                    len(tokens), limit, self.max_length,
                )  # fmt: skip
            prompts.append(tokens[-limit:])
        params = [SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)] * len(prompts)
        scores = [(0.0, False)] * len(requests)
        for index, output in self._run(prompts, params, "Scoring", disable_tqdm):
            key, _context, continuation = requests[index]
            found = _continuation_logprobs(output, continuation)
            is_greedy = all(entry.rank == 1 for entry in found)
            scores[index] = sum(entry.logprob for entry in found), is_greedy
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, scores[index])
        return scores

    def _run(
        self,
        prompts: list[list[int]],
        params: list[SamplingParams],
        description: str,
        disable_tqdm: bool,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Run all requests. Yields each output as it comes, with the index of its prompt.

        A benchmark may have very many requests: the engine gets only enough of them to fill its
        next batches, and no output is kept.
        """
        if not self.llm.is_finished():
            raise RuntimeError("the engine has unfinished requests: step() until is_finished()")
        max_pending = 2 * self.llm.config.max_num_seqs
        requests = iter(enumerate(zip(prompts, params, strict=True)))
        pending: dict[int, int] = {}  # request id -> index of its prompt
        try:
            with tqdm(total=len(prompts), desc=description, disable=disable_tqdm) as progress:
                while True:
                    for index, (prompt, param) in islice(requests, max_pending - len(pending)):
                        pending[self.llm.add_request(prompt, param)] = index
                    if not pending:
                        return
                    for output in self.llm.step():
                        if output.error is not None:
                            raise RuntimeError(output.error)
                        yield pending.pop(output["request_id"]), output
                        progress.update()
        finally:  # after an error or Ctrl-C, the engine must be free for other requests
            for request_id in pending:
                self.llm.abort(request_id)

    def _generation_settings(
        self, gen_kwargs: dict[str, Any]
    ) -> tuple[SamplingParams, list[str], int]:
        """What a task's generation arguments mean: the sampling parameters, the stop strings (which
        the parameters lack if thoughts come first), and how many tokens are left for the prompt.

        Raises:
            TypeError, ValueError: for an argument that the engine does not have, or a bad value.
        """
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        until = _strings("until", kwargs.pop("until", None))
        until += _strings("stop", kwargs.pop("stop", None))  # vLLM's name
        stop_strings = [stop for stop in handle_stop_sequences(until, self._eos_text) if stop]
        max_tokens = kwargs.pop("max_gen_toks")
        if max_tokens >= self.max_length:
            raise ValueError(
                f"max_gen_toks={max_tokens} leaves no room for a prompt: max_length is "
                f"{self.max_length}"
            )
        temperature = kwargs.pop("temperature", 1.0)
        if not kwargs.pop("do_sample"):
            temperature = 0.0
        for name in ("num_beams", "num_return_sequences"):
            if (number := kwargs.pop(name, 1)) != 1:
                raise ValueError(f"{name} must be 1, got {number}")
        kwargs.pop("use_cache", None)
        params = SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            stop=[] if self.think_end_token else stop_strings,
            skip_special_tokens=False,  # a stop string may be a special token
            **{name: value for name, value in kwargs.items() if value is not None},
        )
        return params, stop_strings, self.max_length - max_tokens

    def _choose_prefix_token_id(self, given: int | None) -> int:
        candidates = (given, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        token_id = next((candidate for candidate in candidates if candidate is not None), None)
        if token_id is None:
            raise ValueError(
                "the tokenizer has neither a beginning- nor an end-of-sequence token, which would "
                "stand before a text without context: give prefix_token_id"
            )
        vocab_size = self.llm.config.model_config.vocab_size
        if not 0 <= as_integer("prefix_token_id", token_id) < vocab_size:
            raise ValueError(
                f"prefix_token_id is {token_id}, outside the vocabulary of {vocab_size}"
            )
        return token_id

    def _decode(self, token_ids: list[int], **options: Any) -> str:
        text = self.tokenizer.decode(token_ids, **options)
        assert isinstance(text, str)  # since token_ids are those of one text
        return text


def _strings(name: str, value: Any) -> list[str]:
    """A string, several, or None -> a list."""
    strings = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(strings, (list, tuple)) or not all(isinstance(one, str) for one in strings):
        raise TypeError(f"{name} must be a string or a list of strings, got {value!r}")
    return [*strings]


def _load_llm(
    pretrained: str | os.PathLike[str] | LLM, max_length: int | None, options: dict[str, Any]
) -> LLM:
    if isinstance(pretrained, LLM):
        given = [name for name in options if options[name] is not None]
        if given:
            raise ValueError(f"{given} come too late: the engine is built already")
        return pretrained
    options = _without_what_is_anyway(options)
    device = options.get("device")
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        logger.warning("device=%s, and there is no GPU that torch can use: using the CPU", device)
        options["device"] = "auto"
    if max_length is not None:
        if "max_model_len" in options:
            raise ValueError("give max_length or max_model_len, not both")
        options["max_model_len"] = max_length + EXTRA_TOKENS
    return LLM(pretrained, **options)


def _without_what_is_anyway(options: dict[str, Any]) -> dict[str, Any]:
    """The options less those that are None, the default, or ask for what the engine does anyway.

    Raises:
        ValueError: for a value in `GIVEN_ANYWAY` that is another one.
    """
    left = {}
    for name, value in options.items():
        if value is None or (name in GIVEN_ANYWAY and value == GIVEN_ANYWAY[name]):
            continue
        if name in GIVEN_ANYWAY:
            raise ValueError(
                f"{name}={value!r} is not supported: leave it out, or give {GIVEN_ANYWAY[name]!r}"
            )
        left[name] = value
    return left


def _continuation_logprobs(output: RequestOutput, continuation: list[int]) -> list[Logprob]:
    """The entries of the prompt's last tokens, which are those of `continuation`."""
    entries = output["prompt_logprobs"]
    assert entries is not None  # since they were asked for
    found = []
    for token_id, entry in zip(continuation, entries[-len(continuation) :], strict=True):
        assert entry is not None  # since only a prompt's first token has none
        found.append(entry[token_id])
    return found


def main() -> None:
    """Run the harness's own command, which then has the model "nanovllm"."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
