"""Start one command in several processes on this machine, as torchrun would, with quiet errors.

Not for several machines: there torchrun or Slurm start the processes.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO

from m2encoder.errors import ConfigError

GRACE_S = 10.0
"""How long processes may take to end by themselves after the first that failed, or a signal."""


def is_worker() -> bool:
    """Say whether this process is one of several that were started together."""
    return "RANK" in os.environ


def is_first() -> bool:
    """Say whether this process is the one of them that speaks."""
    return os.environ.get("RANK", "0") == "0"


def launch(words: Sequence[str], nproc: int) -> int:
    """Run `m2enc WORDS` in nproc processes that find each other; returns the exit code.

    The first process speaks; what another says on stderr is shown only where it failed first and
    not like the first process too. A failure ends all, with that process's exit code; so does
    Ctrl-C. SIGTERM and SIGUSR1 are passed on: training saves. Raises ConfigError when nproc is
    below 1.
    """
    if nproc < 1:
        raise ConfigError(f"nproc is {nproc}, expected at least 1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    workers: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as scratch, _passing_on(workers):
        logs: list[IO[bytes] | None] = [None]
        logs += [open(f"{scratch}/{rank}", "w+b") for rank in range(1, nproc)]  # noqa: SIM115
        for rank, log in enumerate(logs):
            world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc}
            world |= {"LOCAL_WORLD_SIZE": nproc, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = os.environ | {name: str(value) for name, value in world.items()}
            workers.append(
                subprocess.Popen(
                    [sys.executable, "-m", "m2encoder", *words],
                    env=environment | {"OMP_NUM_THREADS": threads},
                    stdout=None if log is None else subprocess.DEVNULL,
                    stderr=log,
                    preexec_fn=_end_with_parent if sys.platform == "linux" else None,
                )
            )
        failed = _wait(workers)
        if failed is not None and workers[failed].returncode < 0:
            _tell_of_death(failed, nproc, -workers[failed].returncode)
        _stop(workers)
        code = 0 if failed is None else workers[failed].returncode
        if failed is not None and (log := logs[failed]) and code != workers[0].returncode:
            log.seek(0)
            sys.stderr.write(log.read().decode(errors="replace"))
        for log in filter(None, logs):
            log.close()
        return code if code >= 0 else 128 - code  # killed by a signal


def _wait(workers: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Return the rank that failed first, or None when all have ended well."""
    while True:
        codes = [worker.poll() for worker in workers]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed:  # one that a signal ended is the cause of the others' errors
            return min(failed, key=lambda rank: ((codes[rank] or 0) > 0, rank))
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.05)


def _stop(workers: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let processes end by themselves for a while, then ask them to, then kill them."""
    for ask in (lambda _: None, subprocess.Popen.terminate, subprocess.Popen.kill):
        running = [worker for worker in workers if worker.poll() is None]
        for worker in running:
            ask(worker)
        until = time.monotonic() + GRACE_S
        while any(worker.poll() is None for worker in running) and time.monotonic() < until:
            time.sleep(0.02)


def _tell_of_death(rank: int, nproc: int, number: int) -> None:
    name = signal.Signals(number).name
    memory = "; was the machine out of memory?" if number == signal.SIGKILL else ""
    print(f"rank {rank} of {nproc} was ended by {name}{memory}", file=sys.stderr)


@contextmanager
def _passing_on(workers: Sequence[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Pass on what asks training to save, and leave no process behind."""

    def pass_on(number: int, _: object) -> None:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(number)

    before = {n: signal.signal(n, pass_on) for n in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    except KeyboardInterrupt:
        pass_on(signal.SIGINT, None)
        raise
    finally:
        _stop(workers)
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_with_parent() -> None:
    """Ask Linux to end this process when the one that started it dies, however that happens."""
    import ctypes

    set_parent_death_signal = 1
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGTERM)
