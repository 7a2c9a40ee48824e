"""Python's garbage collector, while objects are made by the hundred thousand."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

COLLECT_EVERY = 16  # times that objects were spared
_lock = threading.Lock()
_open: set[object] = set()
_is_ours = False  # what is frozen
_num_times = 0


@contextmanager
def older_objects_spared() -> Iterator[None]:
    """While this is open, the collector leaves alone all objects that there are already.

    Each time there are many new objects, it would look through all of the process: 0.2 s with torch
    and transformers imported. It still finds garbage among the new ones. Nothing happens if the
    program itself has frozen objects; any that it freezes meanwhile are let go with the others.

    Afterwards the collector counts all of them as old, and it seldom looks at old ones. So the
    youngest are looked at before, and every sixteenth time all are: else the garbage of a program
    that calls this again and again would stay for ever.
    """
    global _is_ours, _num_times
    this = object()
    gc.collect(1)
    try:  # from here on, since Ctrl-C may come anywhere
        with _lock:
            is_first = not _open
            _open.add(this)
            if is_first and not gc.get_freeze_count():
                _is_ours = True
                gc.freeze()
        yield
    finally:
        is_due = False
        with _lock:
            _open.discard(this)
            if _is_ours and not _open:
                _is_ours = False
                gc.unfreeze()
                _num_times += 1
                is_due = _num_times % COLLECT_EVERY == 0
        if is_due:
            gc.collect()
