"""The public face of the engine: whole lists of prompts, chats, streams."""

import reprlib
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

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
from nanovllm.engine.tokenizer import Tokenizer
from nanovllm.outputs import RequestOutput, StreamOutput
from nanovllm.sampling_params import SamplingParams


class LLM(LLMEngine):
    """Offline inference with one model: ``LLM("path/or/hub-id").generate(["Hello"])``.

    Every engine option (see :class:`nanovllm.config.Config`) is a keyword argument. Use it as a
    context manager, or call :meth:`close`, to give the memory back.
    """

    _is_streaming = False

    def add_request(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> int:
        """See `LLMEngine.add_request`. Refused while a stream is open: its steps would take it."""
        if self._is_streaming:
            raise RuntimeError("a stream is open: close it, or go through it, before add_request()")
        return super().add_request(prompt, sampling_params)

    def generate(
        self,
        prompts: Prompts,
        sampling_params: Params = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete one prompt or many; returns one dict a prompt, in their order.

        Args:
            prompts: a string, a list of token ids, or a list of either. As with vLLM, a dict
                {"prompt": ...} or {"prompt_token_ids": ...} may stand for what it holds.
            sampling_params: one for all, or one a prompt; None means `SamplingParams()`.
            use_tqdm: show progress, with tokens per second of prefill and decode.

        Raises:
            TypeError, ValueError: for a request that cannot work; nothing is queued then.
            RuntimeError: if the engine is closed, or still has requests from elsewhere.
        """
        self._check_idle("generate")
        many = prompt_list(prompts)
        requests = self.input_processor.process(many, params_list(sampling_params, len(many)))
        outputs: dict[int, RequestOutput] = {}
        before = replace(self.stats)
        try:
            for request in requests:
                self._queue(request)
            with tqdm(total=len(requests), desc="Generating", disable=not use_tqdm) as progress:
                while not self.is_finished():
                    finished = self.step()
                    outputs.update((output["request_id"], output) for output in finished)
                    _show_rates(progress, self.stats.since(before))
                    progress.update(len(finished))
        except BaseException:  # Ctrl-C too
            self._drop_all()
            raise
        ids = [request.request_id for request in requests]
        if aborted := [index for index, request_id in enumerate(ids) if request_id not in outputs]:
            raise RuntimeError(f"aborted while generate() ran: prompts {reprlib.repr(aborted)}")
        return [outputs[request_id] for request_id in ids]

    def stream(
        self,
        prompts: Prompts,
        sampling_params: Params = None,
    ) -> Generator[StreamOutput, None, None]:
        """Complete one prompt or many, and yield what is new as it comes.

        The pieces of a prompt, put together, are what `generate` returns: text in whole characters,
        and nothing that a stop string may yet take back. Closing the iterator aborts what is left.

        Args and errors are those of `generate`. `n` must be 1, and there are no prompt_logprobs.
        Nothing runs before the first piece is asked for.
        """
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
            **template: see `chat_text`, whose text is each output's `prompt`.
        """
        conversations: list[Any] = [messages]
        if _is_list(messages) and messages and not isinstance(messages[0], dict):
            conversations = list(messages)
        texts = [self.chat_text(conversation, **template) for conversation in conversations]
        outputs = self.generate([self._encode(text) for text in texts], sampling_params, use_tqdm)
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
            messages: dicts with "role" and "content": a string, or a list of OpenAI's text parts,
                which are joined by newlines if the template takes only strings.
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

        try:
            return render(for_template(checked, render))
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

    def _pieces(self, requests: list[Request]) -> Generator[StreamOutput, None, None]:
        self._check_idle("stream")  # again, as it begins when the first piece is asked for
        self._is_streaming = is_mine = True
        try:
            live = []
            for index, request in enumerate(requests):
                self._queue(request)
                live.append(self.output_processor.stream(index, request.sequences[0]))
            while live:
                self.step()
                pieces = [piece for stream in live if (piece := stream.next_piece()) is not None]
                live = [stream for stream in live if not stream.seq.is_finished]
                self._is_streaming = is_mine = bool(live)  # with the last piece, others may begin
                yield from pieces
        finally:
            if is_mine:  # it was closed early, or has failed
                self._is_streaming = False
                if not self.is_closed:
                    for request in requests:
                        self.abort(request.request_id)

    def _check_idle(self, method: str) -> None:
        self._check_open()
        if self.scheduler.num_unfinished:
            raise RuntimeError(
                f"{self.scheduler.num_unfinished} requests from add_request or stream are "
                f"unfinished: step() until is_finished(), or close the stream, before {method}()"
            )


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _show_rates(progress: tqdm, stats: StepStats) -> None:
    progress.set_postfix_str(
        f"prefill {stats.prefill_rate:,.0f} tok/s, decode {stats.decode_rate:,.0f} tok/s",
        refresh=False,
    )
