"""Python's garbage collector, while objects are made by the hundred thousand."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_num_open = 0
_is_ours = False


@contextmanager
def older_objects_spared() -> Iterator[None]:
    """While this is open, the collector leaves alone all objects that there are already.

    Each time there are many new objects, it would look through all of the process: 0.2 s with torch
    and transformers imported. It still finds garbage among the new ones, and among all of them
    afterwards. Nothing happens if the program itself has frozen objects.
    """
    global _num_open, _is_ours
    with _lock:
        _num_open += 1
        if _num_open == 1:
            _is_ours = not gc.get_freeze_count()
            if _is_ours:
                gc.freeze()
    try:
        yield
    finally:
        with _lock:
            _num_open -= 1
            if not _num_open and _is_ours:
                gc.unfreeze()
