"""The model runner of a rank, and that of rank 0, which leads the others."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.connection import Connection

import numpy as np
import torch

from nanovllm.config import Config
from nanovllm.engine.cuda_graphs import Graphs, release
from nanovllm.engine.model_runner import ModelRunner
from nanovllm.engine.scheduler import Batch
from nanovllm.engine.step import LateRows, PendingStep, Step
from nanovllm.engine.step_inputs import StepShape
from nanovllm.models import CausalLM
from nanovllm.parallel.group import Group
from nanovllm.parallel.ranks import Ranks
from nanovllm.parallel.sampler import ParallelSampler
from nanovllm.parallel.sharding import shard
from nanovllm.utils.interrupts import no_interrupt


class RankRunner(ModelRunner):
    """A `ModelRunner` with a part of the model.

    Args:
        config: of this rank.
        group: of all ranks.
    """

    def __init__(self, config: Config, group: Group) -> None:
        self.group = group
        super().__init__(config)

    def make_model(self) -> CausalLM:
        model = super().make_model()
        with torch.device("meta"):
            shard(model, self.group)
        return model

    def make_sampler(self) -> ParallelSampler:
        config = self.config
        return ParallelSampler(
            config.max_num_seqs, self.device, config.model_config.vocab_size, self.group
        )

    def make_compiler(self) -> None:
        """None: in a step in which some kernels do not run, ranks would wait for each other."""

    def largest_decode_shape(self) -> StepShape:
        return super().largest_decode_shape()._replace(truncates=True)

    def capture_ahead(self, num_seqs: int, like: StepShape) -> bool:
        """Nothing: every rank would have to do it between the same two steps."""
        return False

    def agree_on_blocks(self, num_fitting: int) -> int:
        return self.group.least(num_fitting)

    def receive(self, step: Step, connection: Connection) -> None:
        """Take the inputs of a step from rank 0."""
        buffer = self.inputs.hosts[step.buffer_index].numpy()
        connection.recv_bytes_into(buffer)


class LeadingRunner(RankRunner):
    """The runner of rank 0: whatever it runs, all ranks run. When one of them fails, all are ended,
    this one gives its memory back, and who waits for a step gets a RuntimeError that says why.

    Args:
        config: of the engine.
        ranks: the others.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.ranks = ranks
        self.graphs = None
        group = None
        try:
            group = ranks.watched(lambda: Group.of_config(config, ranks.store, 0))
            ranks.abort = group.abort
            super().__init__(config, group)
            ranks.wait_until_ready()
        except BaseException as error:
            explained = ranks.fail_with(error)
            if self.graphs is not None:
                self.graphs.close()
            _end(ranks, group, {})
            raise explained from error
        # Also where it is dropped, or the program ends, without close().
        graphs: Graphs = {} if self.graphs is None else self.graphs.graphs
        self._finalizer = weakref.finalize(self, _end, ranks, group, graphs)

    def on_device(self) -> AbstractContextManager:
        return super().on_device() if self.on_gpu else _threads(self.ranks.num_threads)

    def launch(self, batch: Batch, before_it_runs: Callable[[], None]) -> PendingStep:
        step = self.prepare(batch)
        before_it_runs()
        inputs = self.inputs.hosts[step.buffer_index][: step.num_words].numpy()
        with no_interrupt():  # it would leave the ranks at different steps
            try:
                self.ranks.send(step, inputs.data)
                return self.run(step)
            except BaseException as error:
                raise self._fail_with(error) from error

    def sample_late(self, pending: PendingStep, late: LateRows) -> None:
        with no_interrupt():
            try:
                masks = self.masks(len(late.rows)).reshape(-1)
                self.ranks.send(late, masks.view(np.uint8).data)
                super().sample_late(pending, late)
            except BaseException as error:
                raise self._fail_with(error) from error

    def collect(self, step: PendingStep) -> list[int]:
        self.ranks.waits(True)
        try:
            tokens = super().collect(step)
            self.ranks.check()  # else they may be garbage: a GPU stops waiting for a rank that ends
            return tokens
        except Exception as error:
            raise self._fail_with(error) from error
        finally:
            self.ranks.waits(False)

    def reset(self) -> None:
        if not self.is_closed:
            super().reset()

    def close(self) -> None:
        try:
            super().close()
        finally:  # a second call goes on where the first was interrupted
            if (pending := self._finalizer.peek()) is not None:
                _end(*pending[2])
                self._finalizer.detach()

    def _fail_with(self, error: BaseException) -> BaseException:
        explained = self.ranks.fail_with(error)
        self.close()
        return explained


def _end(ranks: Ranks, group: Group | None, graphs: Graphs) -> None:
    """End the other ranks, then give up this one's graphs, and what it has of the group."""
    ranks.close()
    if group is not None and ranks.is_mine:
        group.abort()
        release(graphs)
        group.close()


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Let torch compute with so many, while the other ranks do on the same CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
