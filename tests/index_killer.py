"""Change an index in a process of its own that is killed at a chosen moment.

A server: reads one JSON request per line, forks a child that does the change, kills it (SIGKILL) at
the n-th phase that it logs, or some time later, and answers with the phases that it reached. It
forks because importing torch takes seconds and a hundred kills should not.
"""

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from phase_pipe import PhasePipe

from m2encoder import index_update
from m2encoder.index import IndexSettings, build_index, update_index
from m2encoder.load import load_model


def change(request: dict[str, Any], encoder: Any, pipe: int) -> None:
    """Do the change in this process."""
    logger = logging.getLogger("m2encoder.index_files")
    logger.setLevel(logging.DEBUG)
    exact = request["delay_s"] == 0
    logger.addHandler(PhasePipe(pipe, lambda phases: exact and len(phases) == request["phase"]))
    index_update.STAGE_ROWS = request["stage_rows"]
    folder = Path(request["folder"])
    if request["source"]:
        settings = IndexSettings(**request["settings"])
        build_index(encoder, Path(request["source"]), folder, settings=settings)
    else:
        update_index(encoder, folder)


def run_and_kill(request: dict[str, Any], encoder: Any) -> dict[str, Any]:
    """Fork, read the phases, kill at the chosen moment; returns phases and exit status."""
    reads, writes = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reads)
            change(request, encoder, writes)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writes)
    text, killed = b"", False
    while chunk := os.read(reads, 65_536):
        text += chunk
        if not killed and text.count(b"\n") >= request["phase"]:
            time.sleep(request["delay_s"])
            os.kill(child, signal.SIGKILL)
            killed = True
    os.close(reads)
    _, status = os.waitpid(child, 0)
    return {"phases": text.decode().splitlines(), "status": status}


def answer(content: Any) -> None:
    """Write one line to stdout."""
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def main() -> None:
    """Serve until stdin ends."""
    encoder = load_model(sys.argv[1], device="cpu")
    _ = encoder.fingerprint
    answer("ready")
    for line in sys.stdin:
        answer(run_and_kill(json.loads(line), encoder))


if __name__ == "__main__":
    main()
