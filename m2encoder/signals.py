"""What SIGTERM and SIGUSR1 ask of a training run: save, and stop or go on.

Clusters send them before they take a machine away. Not for Ctrl-C, which stops at once.
"""

import signal
import threading
from types import FrameType
from typing import Any


class AskedToSave:
    """While entered, remembers the signals that came instead of obeying them.

    Outside the main thread, where Python takes no handlers, it remembers nothing.
    """

    def __init__(self) -> None:
        self.save = False
        """SIGUSR1 came: save soon and go on."""
        self.stop = False
        """SIGTERM came: save soon and stop."""
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "AskedToSave":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM:
            self.stop = True
        else:
            self.save = True
