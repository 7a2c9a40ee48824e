"""Threads that share one engine: who steps, and who gets which output.

There is no thread of the engine's own. Of the calls that wait for their outputs (`generate`, `chat`
or `stream`, each in a thread of its caller) one leads: it takes step after step, for all, until its
own outputs are there. The others sleep until a step has brought something for them, or until the
lead is free.
"""

import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from nanovllm.outputs import RequestOutput
from nanovllm.utils.interrupts import no_interrupt


class Call:
    """What one caller waits for.

    Args:
        request_ids: of its requests.
        every_step: every step is news, as for a stream; else only an output is.

    Attributes:
        pending: ids of requests that have neither ended nor been aborted.
        outputs: of those that have ended, by request id.
        failure: raised by `check`: why there will be no more.
        has_news: something has happened since the caller last looked.
    """

    def __init__(self, request_ids: Iterable[int], every_step: bool = False) -> None:
        self.pending = set(request_ids)
        self.outputs: dict[int, RequestOutput] = {}
        self.failure: RuntimeError | None = None
        self.every_step = every_step
        self.has_news = False

    def check(self) -> None:
        """Raises:
        RuntimeError: if the engine was closed meanwhile, or a step of another caller has failed.
        """
        if self.failure is not None:
            raise self.failure


class Callers:
    """All calls that are under way, and the locks by which their threads get along.

    Attributes:
        lock: held by whoever uses the engine, for a whole step too. It is reentrant, since a signal
            handler may call `abort` in the middle of a step.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._entering: set[object] = set()  # one for each thread that waits in `alone`
        # Guards all below and all of `Call`, for moments only. Who holds it never waits for `lock`.
        self._guard = threading.RLock()
        self._changed = threading.Condition(self._guard)
        self._calls: set[Call] = set()
        self._call_of_request: dict[int, Call] = {}  # by id, of pending requests
        self._leader: Call | None = None

    @property
    def are_waiting(self) -> bool:
        """Whether any call has pending requests."""
        return bool(self._call_of_request)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The engine is this thread's, between two steps, and Ctrl-C waits. It goes before the next
        step, which would else start before this thread is awake, again and again."""
        turn = object()
        self._entering.add(turn)
        try:
            with self.lock:
                self._entering.discard(turn)
                with no_interrupt():
                    yield
        finally:
            self._entering.discard(turn)

    def step_guard(self) -> AbstractContextManager:
        """Around a step: Ctrl-C waits if it would end the requests of other callers, since a step
        that is cut short leaves nothing that could go on."""
        return no_interrupt() if len(self._calls) > 1 else nullcontext()

    def add(self, call: Call) -> None:
        """A call begins. To be called alone, before its requests are queued."""
        with self._guard:
            self._calls.add(call)
            self._call_of_request |= dict.fromkeys(call.pending, call)

    def leave(self, call: Call) -> None:
        """A call has ended: what is pending of it has no owner from now on."""
        with self._guard:
            self._calls.discard(call)
            for request_id in call.pending:
                self._call_of_request.pop(request_id, None)
        self.stop_leading(call)

    def must_step(self, call: Call) -> bool:
        """Wait until there is news for a call (False), or until it has to step for all (True). Then
        it leads until `stop_leading`."""
        with self._guard:
            while not call.has_news and self._leader not in (None, call):
                self._changed.wait()
            if not call.has_news:
                self._leader = call
            must_step, call.has_news = not call.has_news, False
        while must_step and self._entering:
            time.sleep(0)
        return must_step

    def stop_leading(self, call: Call) -> None:
        """Let another call lead, if this one does."""
        if self._leader is call:
            with self._guard:
                self._leader = None
                self._changed.notify_all()

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """Hand over what a step has brought."""
        with self._guard:
            for output in outputs:
                if (call := self._drop(output["request_id"])) is not None:
                    call.outputs[output["request_id"]] = output
            for call in self._calls:
                call.has_news |= call.every_step
            self._wake()

    def drop(self, request_id: int) -> None:
        """A request was aborted."""
        with self._guard:
            self._drop(request_id)
            self._wake()

    def drop_all(self, reason: str = "", cause: BaseException | None = None) -> None:
        """All requests were aborted; if that has a reason, each call with pending ones fails."""
        with self._guard:
            for call in self._calls:
                if call.pending and reason:
                    call.failure = RuntimeError(reason)
                    call.failure.__cause__ = cause
                call.pending.clear()
                call.has_news = True
            self._call_of_request.clear()
            self._wake()

    def _drop(self, request_id: int) -> Call | None:
        """A request is pending no more; returns the call that it belongs to."""
        call = self._call_of_request.pop(request_id, None)
        if call is not None:
            call.pending.discard(request_id)
            call.has_news = True
        return call

    def _wake(self) -> None:
        if [call for call in self._calls if call.has_news and call is not self._leader]:
            self._changed.notify_all()
