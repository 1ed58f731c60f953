"""What tests ask of processes that were not started by them."""

from __future__ import annotations

import psutil


def ended(process: psutil.Process) -> bool:
    """Gone, or dead with nobody to reap it, as in a container; it may go while it is being looked at."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
