"""Code that runs in a rank's helper process.

Only the standard library is imported here, because the helper is a new interpreter and the rank waits until
it has started.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def only_follow_parent() -> None:
    """Ignore the signals that are meant for the rank, and end when the rank does, however that ended."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    parent = multiprocessing.parent_process()
    assert parent is not None, "a helper has the rank as its parent"

    def follow() -> None:
        parent.join()
        os._exit(0)

    threading.Thread(target=follow, daemon=True).start()
