"""Real gloo processes that live as long as the tests: starting some costs seconds each.

One pool per world size. A pool runs a module-level function `work(rank, world_size, *args)` on all
ranks at once and returns what each one returned.
"""

import multiprocessing
import os
import socket
import traceback
import warnings
from contextlib import suppress

ANSWER_TIMEOUT_S = 300


def _serve(rank, world_size, port, pipe):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    while (order := pipe.recv()) is not None:
        work, args = order
        try:
            torch.manual_seed(rank)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                answer = ("returned", work(rank, world_size, *args))
        except BaseException as error:
            answer = ("raised", (type(error).__name__, str(error), traceback.format_exc()))
        pipe.send(answer)
    dist.destroy_process_group()


class GlooPool:
    """`world_size` processes in one gloo world."""

    def __init__(self, world_size):
        self.world_size = world_size
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, world_size, port, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def answers(self, work, *args):
        """Run on all ranks; returns ("returned", value) or ("raised", (type, message, traceback))
        of each.
        """
        for pipe in self.pipes:
            pipe.send((work, args))
        found = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(ANSWER_TIMEOUT_S):
                self.close()
                raise TimeoutError(f"rank {rank} of {self.world_size} gave no answer: a hang?")
            found.append(pipe.recv())
        return found

    def run(self, work, *args):
        """Run on all ranks; returns the list of what they returned, or fails with a traceback."""
        found = self.answers(work, *args)
        for rank, (how, value) in enumerate(found):
            assert how == "returned", f"rank {rank} of {self.world_size}:\n{value[2]}"
        return [value for _, value in found]

    def errors(self, work, *args):
        """Run on all ranks, each of which must raise; returns (type name, message) of each."""
        found = self.answers(work, *args)
        assert [how for how, _ in found] == ["raised"] * self.world_size, found
        return [value[:2] for _, value in found]

    def close(self):
        """End the processes."""
        for pipe in self.pipes:
            with suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
                process.join()
