"""nanovllm as a model of EleutherAI's lm-evaluation-harness (the "eval" extra).

Importing this module registers the model "nanovllm". From Python:

    import nanovllm.lm_eval, lm_eval
    results = lm_eval.simple_evaluate("nanovllm", "pretrained=Qwen/Qwen3-0.6B", tasks=["arc_easy"])

or with an engine that is there already, `simple_evaluate(NanoVLLM(llm), tasks=...)`. From a shell,
with all that the harness's own command takes:

    python -m nanovllm.lm_eval run --model nanovllm --model_args pretrained=DIR --tasks arc_easy

Scores are those of the harness's "hf" model, up to the rounding of the logits; texts that do not
fit are cut as it cuts them when it is given the same `max_length`.
"""

import logging
import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import jinja2
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

from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.outputs import RequestOutput
from nanovllm.llm import LLM
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.validation import as_integer
from nanovllm.version import __version__

logger = logging.getLogger(__name__)

# What a prompt must leave free: the engine refuses one that fills max_model_len, since it always
# generates a token; and the last token of a text is scored, while the harness's lengths count those
# that are read.
SPARE_TOKENS = 2
AS_LONG_AS_THE_MODEL = 2**31 - 1  # max_model_len, which the engine caps

# A text to score: what the harness knows it by (None: not worth caching), context, continuation.
ToScore = tuple[tuple[str, str] | None, list[int], list[int]]


@register_model("nanovllm")
class NanoVLLM(TemplateLM):
    """Scores and generates with `LLM`, which batches requests by itself.

    Args:
        pretrained: a checkpoint directory or hub id; or an engine, which is left open.
        max_length: the most tokens to condition on, as the "hf" model counts; `max_model_len`,
            which may be given instead, is two more. By default what the model and the KV cache
            allow.
        max_gen_toks: the most tokens to generate where a task does not say.
        prefix_token_id: what stands before a text without context; by default the
            beginning-of-sequence token, or the end-of-sequence token if there is none.
        add_bos_token: whether prompts are encoded with special tokens; None leaves it to the
            tokenizer.
        chat_template_args: more arguments for the chat template.
        enable_thinking: one of those, for generation only. It needs `think_end_token`.
        think_end_token: what ends the thoughts, such as "</think>": the answer is what follows, and
            a task's stop strings count only there.
        batch_size, max_batch_size, trust_remote_code: ignored. `max_num_seqs` and
            `max_num_batched_tokens` are the engine's, which runs no code of a checkpoint.
        **options: those of the engine, see :class:`nanovllm.config.Config`.

    Raises:
        TypeError, ValueError: for arguments that cannot work.
    """

    def __init__(
        self,
        pretrained: str | os.PathLike[str] | LLMEngine,
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
        self.llm = self._engine(pretrained, max_length, options)
        if self.llm.tokenizer is None:
            raise ValueError(
                f"{self.llm.config.model_dir} has no tokenizer, and the tasks are text: add the "
                "checkpoint's tokenizer files"
            )
        self.tokenizer = self.llm.tokenizer
        self.custom_prefix_token_id = prefix_token_id
        if self.prefix_token_id is None:
            raise ValueError(
                "the tokenizer has neither a beginning- nor an end-of-sequence token, which would "
                "stand before a text without context: give prefix_token_id"
            )
        vocab_size = self.llm.config.hf_config.vocab_size
        if not 0 <= as_integer("prefix_token_id", self.prefix_token_id) < vocab_size:
            raise ValueError(
                f"prefix_token_id is {self.prefix_token_id}, outside the vocabulary of {vocab_size}"
            )
        self.max_length = self.llm.config.max_model_len - SPARE_TOKENS
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
        self._prefix_text = self.tokenizer.decode([self.prefix_token_id])
        eos = self.eot_token_id
        self._eos_text = None if eos is None else self.tokenizer.decode([eos])

    @property
    def eot_token_id(self) -> int | None:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """What a text without context is conditioned on."""
        if self.custom_prefix_token_id is not None:
            return self.custom_prefix_token_id
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def get_model_info(self) -> dict[str, str]:
        """What the harness writes down beside the results."""
        return {
            "model_dtype": str(self.llm.config.torch_dtype),
            "model_device": str(self.llm.config.torch_device),
            "nanovllm_version": __version__,
        }

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, up to an answer; or else inside of its last message."""

        def render(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **self.chat_template_args,
            )

        try:
            return render(chat_history)
        except jinja2.exceptions.TemplateError:
            logger.warning("the chat template fails: trying again without the system message")
            return render([message for message in chat_history if message["role"] != "system"])

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids. A text that begins with the prefix token gets no special tokens on top."""
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
        """For each (context, continuation) its log probability, and whether greedy decoding would
        give the continuation."""
        if self.enable_thinking:
            raise ValueError(
                "enable_thinking is for tasks that generate: the answers that these tasks compare "
                "would stand in place of the thoughts"
            )
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The log probability of each text, in windows where it does not fit into one."""
        windows: list[ToScore] = []
        owners: list[int] = []
        for index, request in enumerate(requests):
            (text,) = request.args
            pairs = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            owners += [index] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (logprob, _) in zip(owners, scores, strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """For each (context, generation arguments) what the model goes on with, up to the first of
        the stop strings."""
        prompts, params, stops = [], [], []
        for request in requests:
            context, gen_kwargs = request.args
            param, until = self._sampling_params(gen_kwargs)
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            room = self.max_length - param.max_tokens
            if len(tokens) > room:
                logger.warning(
                    "a prompt of %d tokens is cut from the left to the %d that leave room for %d",
                    len(tokens), room, param.max_tokens,
                )  # fmt: skip
            prompts.append(tokens[-room:])
            params.append(param)
            stops.append(until)
        texts = [""] * len(requests)
        for index, output in self._run(prompts, params, "Generating", disable_tqdm):
            # All tokens, stop strings included: those may have held special tokens.
            text = self.tokenizer.decode(output["token_ids"], skip_special_tokens=True)
            if self.think_end_token:
                text = text.split(self.think_end_token)[-1].lstrip()
            texts[index] = text = postprocess_generated_text(text, stops[index], None)
            self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _loglikelihood_tokens(
        self, requests: list[ToScore], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        prompts, limit = [], self.max_length + 1
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
        answers = [(0.0, False)] * len(requests)
        for index, output in self._run(prompts, params, "Scoring", disable_tqdm):
            key, _context, continuation = requests[index]
            entries = output["prompt_logprobs"][-len(continuation) :]
            found = [entry[token] for token, entry in zip(continuation, entries, strict=True)]
            answers[index] = sum(x.logprob for x in found), all(x.rank == 1 for x in found)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answers[index])
        return answers

    def _run(
        self,
        prompts: list[list[int]],
        params: list[SamplingParams],
        what: str,
        disable_tqdm: bool,
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Run all requests, and yield outputs, with the places of their prompts, as they come.

        Few wait in the engine at a time, and outputs are not collected: benchmarks are long.
        """
        if not self.llm.is_finished():
            raise RuntimeError("the engine has unfinished requests: step() until is_finished()")
        ahead = 2 * self.llm.config.max_num_seqs
        upcoming = iter(enumerate(zip(prompts, params, strict=True)))
        places: dict[int, int] = {}  # of unfinished requests, by id
        try:
            with tqdm(total=len(prompts), desc=what, disable=disable_tqdm) as progress:
                while True:
                    for place, request in islice(upcoming, ahead - len(places)):
                        places[self.llm.add_request(*request)] = place
                    if not places:
                        return
                    for output in self.llm.step():
                        yield places.pop(output["request_id"]), output
                        progress.update()
        finally:  # after an error, Ctrl-C too
            for request_id in places:
                self.llm.abort(request_id)

    def _sampling_params(self, gen_kwargs: dict[str, Any]) -> tuple[SamplingParams, list[str]]:
        """What a task's generation arguments mean, and the stop strings.

        Raises:
            TypeError, ValueError: for arguments that the engine does not know or take.
        """
        kwargs: dict[str, Any] = dict(normalize_gen_kwargs(gen_kwargs, self.max_gen_toks))
        until = handle_stop_sequences(kwargs.pop("until", None), eos=self._eos_text)
        until = [stop for stop in until if stop]
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
            stop=[] if self.think_end_token else until,
            skip_special_tokens=False,  # a stop string may be one
            **{name: value for name, value in kwargs.items() if value is not None},
        )
        return params, until

    @staticmethod
    def _engine(
        pretrained: str | os.PathLike[str] | LLMEngine,
        max_length: int | None,
        options: dict[str, Any],
    ) -> LLMEngine:
        if isinstance(pretrained, LLMEngine):
            given = [name for name in options if options[name] is not None]
            if given:
                raise ValueError(f"{given} come too late: the engine is built already")
            return pretrained
        if max_length is not None:
            if "max_model_len" in options:
                raise ValueError("give max_length or max_model_len, not both")
            options["max_model_len"] = max_length + SPARE_TOKENS
        return LLM(pretrained, **{"max_model_len": AS_LONG_AS_THE_MODEL} | options)


def main() -> None:
    """The harness's own command, which now knows the model "nanovllm"."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
