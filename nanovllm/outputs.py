"""What a request gives back: dicts, whose entries are attributes as well."""

import reprlib
from typing import Any

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlist = _SHORT.maxdict = 4


class Record(dict[str, Any]):
    """A dict with entries of fixed names: `output["text"]` is `output.text`.

    It is JSON, pickles and compares as the dict that it is, and prints short.
    """

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            kind = type(self).__name__
            raise AttributeError(f"{kind} has no {name!r}; it has {', '.join(self)}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __repr__(self) -> str:
        entries = (f"{name}={_SHORT.repr(value)}" for name, value in self.items())
        return f"{type(self).__name__}({', '.join(entries)})"


class Logprob(Record):
    """A token at one position.

    Attributes:
        logprob: natural logarithm of its probability, before temperature and all other changes.
        rank: 1 for the most likely token; of equally likely ones the lowest id comes first.
        decoded_token: its text; None if the checkpoint has no tokenizer.
    """

    __slots__ = ()

    logprob: float
    rank: int
    decoded_token: str | None

    def __init__(self, logprob: float, rank: int, decoded_token: str | None = None) -> None:
        super().__init__(logprob=logprob, rank=rank, decoded_token=decoded_token)

    def __reduce__(self) -> Any:
        return Logprob, (self.logprob, self.rank, self.decoded_token)


# At one position: the token that is there, then the most likely ones.
PositionLogprobs = dict[int, Logprob]


class RequestMetrics(Record):
    """All in seconds: points in time by `time.time`, then two durations.

    `time_per_output_token` is the mean over the tokens after the first; None if there are none.
    """

    __slots__ = ()

    arrival_time: float
    first_token_time: float
    finished_time: float
    time_to_first_token: float
    time_per_output_token: float | None


class CompletionOutput(Record):
    """One completion of a prompt.

    `text` leaves out special tokens unless asked not to, and is empty if the checkpoint has no
    tokenizer; `token_ids` has all that was generated. An end-of-sequence or stop token is in
    `token_ids`, and in the text only with `include_stop_str_in_output`.
    `finish_reason` is "stop" (an end-of-sequence token, a stop token or a stop string), "length"
    (`max_tokens` or `max_model_len`) or "error" (no token could be sampled); `stop_reason` is the
    stop token or string, or why there was no token, None for the rest.
    `logprobs` has a dict a token, and `cumulative_logprob` their sum, if they were asked for.
    """

    __slots__ = ()

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str
    stop_reason: int | str | None
    logprobs: list[PositionLogprobs] | None
    cumulative_logprob: float | None


class RequestOutput(CompletionOutput):
    """A finished request: its first completion, and what is said of all.

    `outputs` lists all `n` completions. `prompt` is None for one given as token ids, and of a chat
    the template's text. The first entry of `prompt_logprobs` is None. The cache held
    `num_cached_tokens` of the prompt. `finished` is True.
    """

    __slots__ = ()

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    prompt_logprobs: list[PositionLogprobs | None] | None
    num_prompt_tokens: int
    num_cached_tokens: int
    outputs: list[CompletionOutput]
    finished: bool
    metrics: RequestMetrics

    @property
    def error(self) -> str | None:
        """Why one of the completions ended in an error, and the others were aborted."""
        for one in self["outputs"]:
            if one["finish_reason"] == "error":
                return one["stop_reason"]
        return None


class StreamOutput(Record):
    """What is new of one prompt of `LLM.stream`: whole characters, and tokens.

    `index` is the prompt's place in the list. `logprobs` has a dict a token, if asked for.
    `finish_reason` and `stop_reason` are None until the last piece; a request that was aborted ends
    with "abort".
    """

    __slots__ = ()

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[PositionLogprobs] | None
    finish_reason: str | None
    stop_reason: int | str | None
