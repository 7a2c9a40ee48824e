"""What runs in the process of a rank from 1 on: it builds its part of the model, and then runs the
steps that rank 0 sends."""

import os
import sys
import threading
import time
import warnings
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from nanovllm.config import Config
from nanovllm.engine.step import Step
from nanovllm.parallel.group import HOST, Group
from nanovllm.parallel.rank_runner import RankRunner
from nanovllm.parallel.ranks import READY


def main(file_number: int) -> None:
    """Serve rank 0 at a socket until it says that it is enough, or is gone."""
    connection = Connection(file_number)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    status = 0
    try:
        _serve(connection, *connection.recv())
    except (EOFError, ConnectionError):
        pass  # rank 0 is gone
    except BaseException as error:
        status = 1
        with suppress(OSError):
            connection.send(f"{type(error).__name__}: {error}")
    # Without the destructors: they might wait for a rank that is gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _serve(
    connection: Connection, options: dict[str, Any], rank: int, port: int, threads: int
) -> None:
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")  # rank 0 gives them
    config = Config(**options)
    store = dist.TCPStore(HOST, port, config.tensor_parallel_size)
    group = Group.of_config(config, store, rank)
    runner = RankRunner(config, group)
    connection.send(READY)
    while (message := connection.recv()) is not None:
        if isinstance(message, Step):
            runner.receive(message, connection)
            pending = runner.run(message)
        else:
            masks = runner.masks(len(message.rows)).reshape(-1)
            masks[:] = np.frombuffer(connection.recv_bytes(), np.int32)
            runner.sample_late(pending, message)
    runner.reset()


def _end_with(parent: int) -> None:
    """End this process when its parent has, whatever it is doing."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
