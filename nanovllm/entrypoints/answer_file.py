"""The output file of `generate`: an answer a line, in the order in which they are complete.

It also tells which answers are there already when a run that was stopped is started again.
"""

import json
from pathlib import Path
from typing import Any, BinaryIO

from nanovllm.entrypoints.common import CommandError
from nanovllm.outputs import RequestOutput

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def encode_answer(id_: Any, line_number: int, digest: str, output: RequestOutput) -> bytes:
    """The line of one answer.

    Args:
        id_: a JSON value, given by the user or else the line number.
        line_number: of the input line.
        digest: of the input line and of all else that the answer depends on.
        output: what the engine returned.
    """
    record = {
        "id": id_,
        "line": line_number,
        "digest": digest,
        "text": output["text"],
        "token_ids": output["token_ids"],
        "finish_reason": output["finish_reason"],
    }
    return encode_line(record)


def encode_line(record: dict[str, Any]) -> bytes:
    """A line of JSON."""
    # An id may have half of a surrogate pair, which UTF-8 cannot encode. The error handler writes
    # \uXXXX, as JSON does.
    text = json.dumps(record, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace") + b"\n"


def lock(file: BinaryIO | int, path: str | Path) -> None:
    """Keep other runs off an output, until it is closed or the process ends.

    Args:
        file: the output file, open, or the number of the open output directory.
        path: of that.

    Raises:
        CommandError: if another run has it.
    """
    if fcntl is None or not (Path(path).is_file() or Path(path).is_dir()):
        return  # a pipe, or /dev/null, may be shared
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise CommandError(
            f"another run is writing to {path}: wait for its end, or give another --output"
        ) from None
    except OSError:  # a file system that has no locks
        return


def read_digests(path: Path) -> dict[int, str]:
    """The digest of each answer in an output file, by the number of the input line.

    A last line that is incomplete, because a run was stopped, is removed from the file.

    Raises:
        CommandError: if the file has a line that `generate` did not write.
    """
    digests: dict[int, str] = {}
    if not path.is_file():  # it does not exist yet, or is a pipe
        return digests
    end_of_answers = 0
    with path.open("rb+") as file:
        for number, content in enumerate(file, start=1):
            is_complete = content.endswith(b"\n")
            if not is_complete and _may_be_cut_answer(content):
                file.truncate(end_of_answers)
                break
            try:
                record = json.loads(content)
                line_number, digest = record["line"], record["digest"]
                is_answer = isinstance(line_number, int) and isinstance(digest, str)
                if not is_complete or not is_answer:
                    raise ValueError
            except (ValueError, RecursionError, TypeError, KeyError):
                raise CommandError(
                    f"line {number} of {path} is not what this command writes: give another "
                    "--output, or remove that line"
                ) from None
            digests[line_number] = digest
            end_of_answers += len(content)
    return digests


def _may_be_cut_answer(content: bytes) -> bool:
    """Whether an incomplete line may be the beginning of a line that `encode_answer` makes."""
    text = content.decode(errors="replace")
    before_id, after_id = '{"id": ', ', "line": '
    if not text.startswith(before_id):
        return before_id.startswith(text)
    try:
        _, end_of_id = json.JSONDecoder().raw_decode(text, len(before_id))
    except (ValueError, RecursionError):  # the line ends inside the id
        return True
    rest = text[end_of_id:]
    return rest.startswith(after_id) or after_id.startswith(rest)
