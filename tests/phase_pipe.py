"""Tell another process which phases a job goes through, and wait at one of them to be killed.

For index_killer.py and engine_killer.py; phases are what the library logs as `phase: NAME`.
"""

import logging
import os
import time
from collections.abc import Callable


class PhasePipe(logging.Handler):
    """Write each phase to a pipe, a line each; after the one that `is_last` picks stand still."""

    def __init__(self, pipe: int, is_last: Callable[[list[str]], bool]) -> None:
        super().__init__()
        self.pipe, self.is_last = pipe, is_last
        self.phases: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Send one phase."""
        message = record.getMessage()
        if not message.startswith("phase: "):
            return
        self.phases.append(message.removeprefix("phase: "))
        os.write(self.pipe, (self.phases[-1] + "\n").encode())
        if self.is_last(self.phases):
            time.sleep(600)
