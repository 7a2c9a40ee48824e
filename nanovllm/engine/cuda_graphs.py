"""CUDA Graphs of decode steps: the launches of a step are recorded once and replayed as one."""

from collections.abc import Callable, Iterable

import torch

from nanovllm.engine.step_inputs import StepShape

Graphs = dict[StepShape, tuple[torch.cuda.CUDAGraph, torch.Tensor]]  # and the logits of each


def graph_sizes(max_rows: int) -> list[int]:
    """All batch sizes that have graphs, rising."""
    return sorted({graph_rows(rows, max_rows) for rows in range(1, max_rows + 1)})


def graph_rows(rows: int, max_rows: int) -> int:
    """The batch size whose graph runs `rows` rows, at the most `max_rows`: 1, 2, 4, 8, 16, 32, 48,
    64, 96, 128, or a multiple of 64.

    Each size is captured once in a process, while users wait; matrix products work on as many rows
    at a time anyhow, so that most padding costs them nothing.
    """
    power = 1 << (rows - 1).bit_length()
    step = power if rows <= 8 else min(64, max(16, power // 4))
    return min(-(-rows // step) * step, max_rows)


class CudaGraphs:
    """Runs decode steps as graphs, each shape from its second time on, or from the first if it was
    run ahead: libraries may not allocate and load while a step is captured.

    All graphs share one pool of memory.

    Args:
        device: of the steps.
        run_step: runs the step of a shape and returns its logits. Inputs and outputs are on the
            device, at the same addresses each time.
        run_ahead: shapes that were run; more may be added.
    """

    def __init__(
        self,
        device: torch.device,
        run_step: Callable[[StepShape], torch.Tensor],
        run_ahead: Iterable[StepShape] = (),
    ) -> None:
        self.device = device
        self.run_step = run_step
        self.graphs: Graphs = {}
        self._has_run = set(run_ahead)
        # One pool, one stream: every new stream would bring a cuBLAS workspace.
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)
        # That workspace is allocated with the stream's first product. In the pool it would lie in
        # the middle of the largest graph's memory, and others would not find room there.
        with torch.cuda.stream(self._stream):
            ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
            torch.mm(ones, ones)

    def run(self, shape: StepShape) -> torch.Tensor:
        """Run the step of a shape; returns its logits [rows, vocab]."""
        if shape not in self.graphs:
            if shape not in self._has_run:
                self._has_run.add(shape)
                return self.run_step(shape)
            self.capture(shape)
        graph, logits = self.graphs[shape]
        graph.replay()
        return logits

    def can_capture(self, shape: StepShape) -> bool:
        """Whether a shape has no graph yet, and what it launches is loaded."""
        return shape in self._has_run and shape not in self.graphs

    def capture(self, shape: StepShape) -> None:
        """Record the step of a shape, for the next time.

        The largest should be the first: what its tensors leave in the pool holds those of all
        others. After smaller ones each would add to it (measured, 512 rows: 2.4 GB in place of
        0.3).
        """
        graph = torch.cuda.CUDAGraph()
        # torch.cuda.graph would wait for the device, collect garbage and empty the allocator's
        # cache each time. Relaxed, as kernels may be loaded meanwhile.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="relaxed")
            try:
                logits = self.run_step(shape)
            except BaseException:
                try:  # a stream left capturing would refuse everything after
                    graph.capture_end()
                finally:
                    graph.reset()  # the exception's traceback would keep it
                raise
            graph.capture_end()
        self.graphs[shape] = graph, logits

    def close(self) -> None:
        """Give up all graphs."""
        release(self.graphs)


def release(graphs: Graphs) -> None:
    """Give up graphs, whoever may still refer to one."""
    for graph, _ in graphs.values():
        graph.reset()
    graphs.clear()
