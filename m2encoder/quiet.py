"""Other libraries' messages: silence them while a model loads, and cut their errors to one line.

Not for our own log lines.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging as transformers_logging


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, else its type."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' progress bars and reports; whoever loads says what is wrong."""
    had_bars = transformers_logging.is_progress_bar_enabled()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()
