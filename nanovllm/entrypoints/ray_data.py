"""Ray Data: a data set is answered by many engines, each in an actor of its own (the "ray" extra).

    dataset = ray.data.read_parquet("s3://bucket/prompts")
    answers = generate(dataset, "Qwen/Qwen3-0.6B", {"max_tokens": 128}, replicas=8)
    answers.write_parquet("s3://bucket/answers")

Ray reads and distributes the blocks, restarts an actor that died and gives its blocks out again.
"""

import json
import os
import traceback
from dataclasses import replace
from typing import Any

import pyarrow as pa
import ray
import xxhash
from ray.data import ActorPoolStrategy, Dataset

from nanovllm import LLM, SamplingParams
from nanovllm.entrypoints.row_files import without_nulls
from nanovllm.entrypoints.rows import TEMPLATE_TYPES, RowParser, reason

ANSWER_FIELDS = [
    pa.field("text", pa.string()),
    pa.field("token_ids", pa.list_(pa.int32())),
    pa.field("finish_reason", pa.string()),
    pa.field("error", pa.string()),
]


class LLMPredictor:
    """Answers the rows of a batch, for `Dataset.map_batches` with `batch_format="pyarrow"`.

    A row has one of the columns `prompt` (a string), `prompt_token_ids` (a list of integers) and
    `messages` (a list of {"role", "content"} structs), the others being null, and maybe
    `sampling_params` (a struct) and, with messages, `tools` (a list of structs) and
    `chat_template_kwargs` (a struct). A null inside a struct counts as not given, since all structs
    of a column have the same fields; the four columns of structs may instead be JSON text, which is
    taken as it stands. All columns are kept, and four come to them:

    - `text` (string), `token_ids` (list of int32), `finish_reason` (string), as `LLM.generate`
      returns them; null if the row could not be answered.
    - `error` (string): why it could not; null if it was. The other rows go on.

    A row without a seed gets one computed from the seed of `sampling_params` (or else the engine's)
    and its column `id`, or from its prompt if it has no `id`. So its tokens do not depend on the
    batch and the actor that it comes to; to have a prompt answered several times, give ids.

    Args:
        model: a checkpoint directory, which every node must have, or a hub id.
        sampling_params: for what rows do not set. A dict overrides what the checkpoint recommends;
            `SamplingParams` are taken as they are.
        chat_template_kwargs: more arguments for the chat template.
        **engine_options: of `LLM`.

    Raises:
        TypeError, ValueError, FileNotFoundError, RuntimeError: if the engine cannot be built. In
            an actor this ends the run.
    """

    def __init__(
        self,
        model: str,
        sampling_params: SamplingParams | dict[str, Any] | None = None,
        *,
        chat_template_kwargs: dict[str, Any] | None = None,
        **engine_options: Any,
    ) -> None:
        self.llm = LLM(model, **engine_options)
        if not isinstance(sampling_params, SamplingParams):
            recommended = self.llm.get_default_sampling_params()
            sampling_params = replace(recommended, **(sampling_params or {}))
        seed = self.llm.config.seed if sampling_params.seed is None else sampling_params.seed
        self.parser = RowParser(self.llm, sampling_params, chat_template_kwargs or {}, seed)
        self._has_answered = False

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Answer a batch.

        Raises:
            TypeError, ValueError: if it is not an Arrow table, or has a column of an answer's name.
            Exception: whatever a failing engine raises; see `_run`.
        """
        if not isinstance(batch, pa.Table):
            raise TypeError(
                f'the batch is a {type(batch).__name__}: give map_batches batch_format="pyarrow"'
            )
        for field in ANSWER_FIELDS:
            if field.name in batch.column_names:
                raise ValueError(
                    f"the data set has a column {field.name!r}, which answers would replace: "
                    "rename or drop it"
                )
        answers = self.answer(batch.to_pylist())
        for field in ANSWER_FIELDS:
            column = pa.array([answer[field.name] for answer in answers], field.type)
            batch = batch.append_column(field, column)
        return batch

    def answer(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The four new columns of each row, in their order."""
        answers = [dict.fromkeys(field.name for field in ANSWER_FIELDS) for _ in rows]
        index_of: dict[int, int] = {}  # by request id
        for index, row in enumerate(rows):
            try:
                prompt, params = self.request(row)
                index_of[self.llm.add_request(prompt, params)] = index
            except (TypeError, ValueError) as error:
                answers[index]["error"] = reason(error)
        for output in self._run():
            answer = answers[index_of[output["request_id"]]]
            answer["error"] = output.error
            if output.error is None:
                answer |= {key: output[key] for key in ("text", "token_ids", "finish_reason")}
        return answers

    def request(self, row: dict[str, Any]) -> tuple[str | list[int], SamplingParams]:
        """The prompt and the sampling parameters of a row.

        Raises:
            TypeError, ValueError: if the row is invalid.
        """
        item = {key: row.get(key) for key in ("prompt", "prompt_token_ids")}
        for key in ("messages", "sampling_params"):
            item[key] = _from_json(key, row.get(key))
        for key in TEMPLATE_TYPES:
            if row.get(key) is not None:  # rows without it keep the seeds that they always had
                item[key] = _from_json(key, row[key])
        if (name := row.get("id")) is None:
            content = json.dumps(item | {"sampling_params": None}, sort_keys=True)
            name = xxhash.xxh3_128_hexdigest(content.encode())
        return self.parser.parse(item, name)

    def _run(self) -> list[Any]:
        """Step until all that is queued has ended.

        An exception of the engine is no row's fault: a device or one of its processes has failed.
        An exception would end the whole run. So an actor that has worked before ends its own
        process: Ray then restarts it and gives the block to an actor again. If the block fails
        in a fresh engine too, the exception is raised, since it would fail in every one.
        """
        outputs = []
        try:
            while not self.llm.is_finished():
                outputs += self.llm.step()
        except Exception:
            if self._has_answered and _is_in_actor():
                traceback.print_exc()
                os._exit(1)
            raise
        self._has_answered = True
        return outputs


def generate(
    dataset: Dataset,
    model: str,
    sampling_params: SamplingParams | dict[str, Any] | None = None,
    *,
    replicas: int = 1,
    batch_size: int = 1024,
    **options: Any,
) -> Dataset:
    """The data set with the answers of `replicas` engines; it is lazy, as all of Ray Data is.

    Args:
        dataset: see `LLMPredictor` for its columns. A block is the work of one replica, and is
            redone as a whole if that dies: `repartition(target_num_rows_per_block=batch_size)`
            gives small and equal ones.
        model, sampling_params: as for `LLMPredictor`.
        replicas: engines, each on `tensor_parallel_size` GPUs of a node; where the cluster has no
            GPU, or with device="cpu", each in a process with one thread.
        batch_size: rows that a replica answers before it takes more. In the end of a batch few
            sequences run, so small batches cost throughput.
        **options: of `LLMPredictor`.
    """
    return dataset.map_batches(
        LLMPredictor,
        fn_constructor_args=(model, sampling_params),
        fn_constructor_kwargs=options,
        **replica_arguments(replicas, batch_size, options),
    )


def replica_arguments(replicas: int, batch_size: int, options: dict[str, Any]) -> dict[str, Any]:
    """What `map_batches` must know of the replicas of a predictor.

    Args:
        replicas, batch_size: as for `generate`.
        options: the engine's.
    """
    has_gpus = ray.cluster_resources().get("GPU", 0) > 0
    on_gpu = options.get("device", "auto") != "cpu" and has_gpus
    return {
        "batch_format": "pyarrow",
        "batch_size": batch_size,
        # One block to work on and one at hand. More would wait for a busy replica at the end of
        # the run while others have nothing to do.
        "compute": ActorPoolStrategy(size=replicas, max_tasks_in_flight_per_actor=2),
        # With every CPU reserved by a replica, Ray could not read what they wait for.
        "num_cpus": 0,
        "num_gpus": options.get("tensor_parallel_size", 1) if on_gpu else 0,
    }


def _is_in_actor() -> bool:
    # The runtime context would start Ray where it does not run.
    return ray.is_initialized() and ray.get_runtime_context().get_actor_id() is not None


def _from_json(key: str, value: Any) -> Any:
    """What JSON text says, or what a struct had when it was made."""
    if not isinstance(value, str):
        return without_nulls(value)
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key} is text, and not JSON: {error}") from error
