"""The public face of the engine: whole lists of prompts, chats, streams."""

import reprlib
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from nanovllm.engine.callers import Call
from nanovllm.engine.chat_messages import Message, check_messages, for_template
from nanovllm.engine.input_processor import (
    Params,
    Prompt,
    Prompts,
    Request,
    params_list,
    prompt_list,
)
from nanovllm.engine.llm_engine import LLMEngine
from nanovllm.engine.stats import StepStats
from nanovllm.engine.tokenizer import Tokenizer, encode_many
from nanovllm.other_options import CALL_OPTIONS, check_call
from nanovllm.outputs import RequestOutput, StreamOutput
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.collector import older_objects_spared
from nanovllm.utils.interrupts import no_interrupt

MANY_REQUESTS = 512  # from so many on, the garbage collector would look through everything


class LLM(LLMEngine):
    """Offline inference with one model: ``LLM("path/or/hub-id").generate(["Hello"])``.

    Every engine option (see :class:`nanovllm.config.Config`) is a keyword argument. Use it as a
    context manager, or call :meth:`close`, to give the memory back.

    `generate`, `chat` and `stream` may be called from many threads at once: their requests share
    the engine's steps, each call gets its own results, and one that fails harms no other.
    """

    def generate(
        self,
        prompts: Prompts | None = None,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        prompt_token_ids: Prompts | None = None,
        **others: Any,
    ) -> list[RequestOutput]:
        """Complete one prompt or many; returns one dict a prompt, in their order.

        Args:
            prompts: a string, a list of token ids, or a list of either. As with vLLM, a dict
                {"prompt": ...} or {"prompt_token_ids": ...} may stand for what it holds.
            sampling_params: one for all, or one a prompt; None means `SamplingParams()`.
            use_tqdm: show progress, with tokens per second of prefill and decode.
            prompt_token_ids: the prompts by another name.
            **others: of vLLM's, see `other_options.CALL_OPTIONS`.

        Raises:
            TypeError, ValueError: for a request that cannot work; nothing is queued then.
            RuntimeError: if the engine is closed, or has unfinished requests from `add_request`; if
                a request is aborted meanwhile, or a step of another thread's call fails; when all
                have ended, if one ended in an error: its logits are not finite, say.
            Any error once requests run, KeyboardInterrupt too, has the results that are there as
                its attribute `finished_outputs`: a list, with None for each prompt that had not
                ended. The other prompts' requests are aborted.
        """
        self._check_open()
        check_call(others)
        given = [one for one in (prompts, prompt_token_ids) if one is not None]
        if len(given) == 2:
            raise TypeError("give prompts or prompt_token_ids, not both")
        many = prompt_list(given[0] if given else None)
        with older_objects_spared() if len(many) >= MANY_REQUESTS else nullcontext():
            return self._generate(many, params_list(sampling_params, len(many)), use_tqdm)

    def stream(
        self,
        prompts: Prompts,
        sampling_params: Params = None,
    ) -> Generator[StreamOutput, None, None]:
        """Complete one prompt or many, and yield what is new as it comes.

        The pieces of a prompt, put together, are what `generate` returns: text in whole characters,
        and nothing that a stop string may yet take back. Closing the iterator aborts what is left.
        A piece has more than one token if others' steps have run since the last.

        Args and errors are those of `generate`; the error in which a prompt ends is raised when the
        others have ended. `n` must be 1, and there are no prompt_logprobs. Nothing runs before the
        first piece is asked for.
        """
        with self._callers.alone():
            self._check_idle("stream")
        many = prompt_list(prompts)
        params = params_list(sampling_params, len(many))
        if any(one.n > 1 for one in params):
            raise ValueError("n must be 1 to stream: give the prompt n times")
        if any(one.prompt_logprobs is not None for one in params):
            raise ValueError("prompt_logprobs do not come in a stream: use generate")
        return self._pieces(self.input_processor.process(many, params))

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, by the tokenizer's chat template.

        Args:
            messages: dicts with "role" and "content"; or a list of such lists.
            sampling_params, use_tqdm: as in `generate`.
            **template: see `chat_text`, whose text is each output's `prompt`; and the others of
                `generate`.
        """
        others = {name: template.pop(name) for name in [*template] if name in CALL_OPTIONS}
        check_call(others)
        conversations: list[Any] = [messages]
        if _is_list(messages) and messages and not isinstance(messages[0], dict):
            conversations = list(messages)
        texts = [self.chat_text(conversation, **template) for conversation in conversations]
        encoded = encode_many(self.tokenizer, texts, add_special_tokens=False)
        prompts: list[Any] = [
            self._encode(text) if token_ids is None else token_ids
            for text, token_ids in zip(texts, encoded, strict=True)
        ]
        outputs = self.generate(prompts, sampling_params, use_tqdm)
        for output, text in zip(outputs, texts, strict=True):
            output["prompt"] = text
        return outputs

    def chat_prompt(self, messages: Sequence[Message], **template: Any) -> list[int]:
        """The token ids of a conversation; see `chat_text` for the arguments and errors."""
        return self._encode(self.chat_text(messages, **template))

    def chat_text(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[Any] | None = None,
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> str:
        """The text that the chat template makes of a conversation.

        Args:
            messages: dicts with "role" and "content": a string, or a list of OpenAI's text parts;
                of these the one becomes the other if the template takes nothing else (parts are
                joined by newlines).
            add_generation_prompt: end where the answer is to begin.
            continue_final_message: end inside of the last message, to have it completed.
            tools: functions, or their JSON schemas, that the model may call.
            chat_template: in place of the tokenizer's.
            chat_template_kwargs: whatever else the template knows, such as `enable_thinking`.

        Raises:
            ValueError: if there is no chat template, or it does not take these messages.
        """
        self._check_open()
        tokenizer = self.tokenizer
        if tokenizer is None or not (tokenizer.chat_template is not None or chat_template):
            what = "chat template" if tokenizer is not None else "tokenizer"
            raise ValueError(
                f"{self.config.model_dir} has no {what}: pass chat_template, or write the prompt "
                "yourself and use generate"
            )
        checked = check_messages(messages)
        if continue_final_message:
            add_generation_prompt = False

        def render(messages: list[Message]) -> str:
            text = tokenizer.apply_chat_template(
                messages, tools=tools, chat_template=chat_template, tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message, **(chat_template_kwargs or {}),
            )  # fmt: skip
            assert isinstance(text, str)  # since tokenize=False
            return text

        source = f"{chat_template} {tokenizer.chat_template}"  # the first may name one of several
        try:
            return render(for_template(checked, render, source))
        except Exception as error:  # of jinja, and whatever a template raises
            raise ValueError(f"the chat template does not take these messages: {error}") from error

    def get_tokenizer(self) -> Tokenizer:
        """transformers' tokenizer.

        Raises:
            ValueError: if the checkpoint has none.
        """
        if self.tokenizer is None:
            raise ValueError(f"{self.config.model_dir} has no tokenizer: add its files")
        return self.tokenizer

    def get_default_sampling_params(self) -> SamplingParams:
        """Those that the checkpoint's generation_config.json recommends: greedy if it says that
        `do_sample` is false.

        Raises:
            TypeError, ValueError: if it has values that cannot work.
        """
        names = {"max_new_tokens": "max_tokens"} | {
            name: name for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        }
        found = self.config.generation_config
        if found.get("do_sample") is False:
            found = found | {"temperature": 0.0}
        return SamplingParams(
            **{ours: found[name] for name, ours in names.items() if found.get(name) is not None}
        )

    def _encode(self, text: str) -> list[int]:
        """The tokens of what a chat template made, which has the special tokens already."""
        assert self.tokenizer is not None  # since it has applied the template
        try:
            return self.tokenizer.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeError) as error:
            raise ValueError(f"a message is not valid Unicode text: {error}") from error

    def _generate(
        self, prompts: list[Prompt], params: list[SamplingParams], use_tqdm: bool
    ) -> list[RequestOutput]:
        requests = deque(self.input_processor.process(prompts, params))
        ids = [request.request_id for request in requests]
        call, before = Call(ids), replace(self.stats)
        try:
            with (
                self._running(call, requests),
                tqdm(total=len(ids), desc="Generating") if use_tqdm else nullcontext() as progress,
            ):
                while call.pending:
                    if self._callers.must_step(call):
                        self.step()
                    if progress is not None:
                        _show_rates(progress, self.stats.since(before))
                        progress.update(len(call.outputs) - progress.n)
                call.check()
            if aborted := [index for index, one in enumerate(ids) if one not in call.outputs]:
                raise RuntimeError(f"aborted while generate() ran: prompts {reprlib.repr(aborted)}")
            for index, one in enumerate(ids):
                if (why := call.outputs[one].error) is not None:
                    raise RuntimeError(f"prompt {index}: {why}")
        except BaseException as error:  # Ctrl-C too
            error.finished_outputs = [call.outputs.get(one) for one in ids]  # type: ignore[attr-defined]
            raise
        return [call.outputs[one] for one in ids]

    def _pieces(self, requests: list[Request]) -> Generator[StreamOutput, None, None]:
        call = Call((request.request_id for request in requests), every_step=True)
        with self._running(call, deque(requests)):
            with self._callers.alone():
                live = [
                    self.output_processor.stream(index, request.sequences[0])
                    for index, request in enumerate(requests)
                ]
            errors = []
            while live:
                if self._callers.must_step(call):
                    self.step()
                call.check()
                with self._callers.alone():  # no step is half way through a sequence
                    pieces = [piece for one in live if (piece := one.next_piece()) is not None]
                    errors += [one for one in pieces if one["finish_reason"] == "error"]
                    live = [stream for stream in live if not stream.seq.is_finished]
                self._callers.stop_leading(call)  # who knows when the next piece is asked for
                yield from pieces
            for piece in errors:
                raise RuntimeError(f"prompt {piece['index']}: {piece['stop_reason']}")

    @contextmanager
    def _running(self, call: Call, requests: deque[Request]) -> Iterator[None]:
        """Queue the requests of a call; in the end those that have not ended are aborted. They are
        taken out of `requests`: what nobody else holds is freed as it ends, while the device runs.
        """
        try:
            with self._callers.alone():
                self._check_idle("stream" if call.every_step else "generate")
                self._callers.add(call)
                while requests:
                    self._queue(requests.popleft())
            yield
        finally:
            with no_interrupt():  # a second Ctrl-C would leave requests that are nobody's
                try:
                    if call.pending:
                        with self._callers.alone():
                            self._abort(call.pending)
                finally:
                    self._callers.leave(call)

    def _check_idle(self, method: str) -> None:
        """Refuse steps that would swallow the outputs of a loop by hand. To be called alone."""
        self._check_open()
        if self.scheduler.num_unfinished and not self._callers.are_waiting:
            raise RuntimeError(
                f"{self.scheduler.num_unfinished} requests from add_request are unfinished: step() "
                f"until is_finished() before {method}()"
            )


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _show_rates(progress: tqdm, stats: StepStats) -> None:
    progress.set_postfix_str(
        f"prefill {stats.prefill_rate:,.0f} tok/s, decode {stats.decode_rate:,.0f} tok/s",
        refresh=False,
    )
