"""Python's garbage collector, while objects are made by the hundred thousand."""

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_lock = threading.Lock()
_open: set[object] = set()
_is_ours = False  # what is frozen


@contextmanager
def older_objects_spared() -> Iterator[None]:
    """While this is open, the collector leaves alone all objects that there are already.

    Each time there are many new objects, it would look through all of the process: 0.2 s with torch
    and transformers imported. It still finds garbage among the new ones, and among all of them
    afterwards. Nothing happens if the program itself has frozen objects; any that it freezes
    meanwhile are let go with the others.
    """
    global _is_ours
    this = object()
    try:  # from here on, since Ctrl-C may come anywhere
        with _lock:
            is_first = not _open
            _open.add(this)
            if is_first and not gc.get_freeze_count():
                _is_ours = True
                gc.freeze()
        yield
    finally:
        with _lock:
            _open.discard(this)
            if _is_ours and not _open:
                _is_ours = False
                gc.unfreeze()
