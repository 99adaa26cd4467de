"""Train in processes of their own that are killed at a chosen moment.

A server: reads one JSON request per line, forks the ranks of a world, kills some of them (SIGKILL)
when rank 0 has logged a phase so often, or some time later, and answers with the phases it reached.
It forks because importing torch takes seconds and many kills should not.
"""

import json
import logging
import os
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any

from phase_pipe import PhasePipe

from m2encoder.cli.options import call_with_options
from m2encoder.cli.pretrain import run
from m2encoder.config import PretrainConfig

LOGGERS = ("m2encoder.watchdog", "m2encoder.checkpoint")


def given(cfg: PretrainConfig) -> PretrainConfig:
    """What a configuration file says."""
    return cfg


given.options_class = PretrainConfig  # pyright: ignore[reportFunctionMemberAccess]


def is_reached(request: dict[str, Any], phases: list[str]) -> bool:
    """Say whether the phase of the request has come as often as it says."""
    return request["phase"] is not None and phases.count(request["phase"]) >= request["count"]


def train(request: dict[str, Any], rank: int, port: int, pipe: int) -> None:
    """Be one rank."""
    if request["ranks"] > 1:
        world = {"RANK": rank, "WORLD_SIZE": request["ranks"], "LOCAL_RANK": rank}
        world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in world.items()}
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if rank == 0:
        exact = request["delay_s"] == 0
        handler = PhasePipe(pipe, lambda phases: exact and is_reached(request, phases))
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.DEBUG)
            logging.getLogger(name).addHandler(handler)
            logging.getLogger(name).propagate = False
    cfg = call_with_options(given, "pretrain", ["--config", request["config"]])
    run(cfg, show_progress=False)


def start(request: dict[str, Any]) -> tuple[list[int], int]:
    """Fork the ranks; returns their process ids and where rank 0 tells its phases."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reads, writes = os.pipe()
    children = []
    for rank in range(request["ranks"]):
        child = os.fork()
        if child == 0:
            try:
                os.close(reads)
                train(request, rank, port, writes)
                os._exit(0)
            except BaseException:
                if rank == 0 and request["phase"] is None:
                    traceback.print_exc()
            finally:
                os._exit(1)
        children.append(child)
    os.close(writes)
    return children, reads


def run_and_kill(request: dict[str, Any]) -> dict[str, Any]:
    """Start, kill `victims` at the moment asked for, end the others as a launcher would."""
    children, reads = start(request)
    text, killed, ends = b"", False, time.monotonic() + 120
    while time.monotonic() < ends:
        if not select.select([reads], [], [], 1.0)[0]:
            continue
        if not (chunk := os.read(reads, 65_536)):
            break
        text += chunk
        if not killed and is_reached(request, text.decode().splitlines()):
            time.sleep(request["delay_s"])
            for rank in request["victims"]:
                os.kill(children[rank], signal.SIGKILL)
            time.sleep(0.05)
            for child in children:  # a launcher ends the others
                os.kill(child, signal.SIGKILL)
            killed = True
    os.close(reads)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    return {"phases": text.decode().splitlines(), "statuses": statuses}


def answer(content: Any) -> None:
    """Write one line to stdout."""
    sys.__stdout__.write(json.dumps(content) + "\n")  # pyright: ignore[reportOptionalMemberAccess]
    sys.__stdout__.flush()  # pyright: ignore[reportOptionalMemberAccess]


def main() -> None:
    """Serve until stdin ends."""
    import m2encoder.card
    import m2encoder.data_pipeline.stream
    import m2encoder.model_folder
    import m2encoder.train  # noqa: F401 - imported once, before forking

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    answer("ready")
    for line in sys.stdin:
        answer(run_and_kill(json.loads(line)))


if __name__ == "__main__":
    main()
