"""Processes for benchmarks/loss.py: one gloo world, in private networks that end with it.

A network here is a Linux network namespace without a name. It lives as long as a process or a
descriptor refers to it, so nothing stays behind however a run ends, and the machine's own network
is never touched. Linux only. Not for what the processes compute (loss_peers.py).
"""

import ctypes
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

ANSWER_TIMEOUT_S = 600
CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
UPLINK = "uplink"
SUBNET = "10.77.0"
MTU = 9000
UNITS = {"kbit": 10**3, "mbit": 10**6, "gbit": 10**9}


class NoNetworkError(Exception):
    """This process may not, or this system cannot, make private networks; the text says why."""


class Network:
    """A private network with a loopback device; it ends with this process and those inside."""

    def __init__(self) -> None:
        home = _current()
        _system_call("unshare", CLONE_NEWNET)
        try:
            self.descriptor = _current()
            run_command("ip link set lo up")
        finally:
            _system_call("setns", home, CLONE_NEWNET)
            os.close(home)

    @property
    def path(self) -> str:
        """What `ip` calls it."""
        return f"/proc/{os.getpid()}/fd/{self.descriptor}"

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make this thread, and every process that it starts meanwhile, part of the network."""
        home = _current()
        _system_call("setns", self.descriptor, CLONE_NEWNET)
        try:
            yield
        finally:
            _system_call("setns", home, CLONE_NEWNET)
            os.close(home)


def _current() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def _system_call(name: str, *args: int) -> None:
    if getattr(ctypes.CDLL(None, use_errno=True), name)(*args) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def run_command(words: str) -> None:
    """Run a command of iproute2. Raises OSError with what it said."""
    ran = subprocess.run(words.split(), capture_output=True, text=True, check=False)
    if ran.returncode:
        raise OSError(f"{words!r} says: {ran.stderr.strip()}")


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NoNetworkError(f"private networks need root and iproute2 ({error})") from error


def private_network() -> Network:
    """Return a network with nothing but loopback in it. Raises NoNetworkError."""
    with _explained():
        return Network()


def joined_nodes(count: int, rate: str) -> list[Network]:
    """Return networks that stand for nodes, joined by a switch; what leaves one is held to `rate`.

    rate: as tc writes it, for example 50mbit. Bandwidth is limited, latency is not: netem is
    missing from many kernels. Raises NoNetworkError.
    """
    # Enough for 5 ms, so that the timer keeps up, and for a few packets; a step sends far more.
    burst_bytes = max(4 * MTU, round(bits_per_s(rate) / 8 * 0.005))
    with _explained():
        switch = Network()
        with switch.entered():
            run_command("ip link add switch type bridge")
            run_command(f"ip link set switch mtu {MTU} up")
        nodes = [Network() for _ in range(count)]
        for idx, node in enumerate(nodes):
            with switch.entered():
                peer = f"peer name {UPLINK} mtu {MTU} netns {node.path}"
                run_command(f"ip link add node{idx} mtu {MTU} type veth {peer}")
                run_command(f"ip link set node{idx} master switch up")
            with node.entered():
                run_command(f"ip addr add {SUBNET}.{idx + 1}/24 dev {UPLINK}")
                run_command(f"ip link set {UPLINK} up")
                # A shorter queue than 400 ms drops packets when all ranks send at once.
                run_command(
                    f"tc qdisc add dev {UPLINK} root tbf rate {rate} burst {burst_bytes} "
                    f"latency 400ms"
                )
    return nodes


def bits_per_s(rate: str) -> int:
    """Read a rate such as 50mbit. Raises ValueError."""
    found = re.fullmatch(r"(\d+)(kbit|mbit|gbit)", rate)
    if not found:
        raise ValueError(f"rate is {rate!r}, expected for example 50mbit")
    return int(found[1]) * UNITS[found[2]]


class Worker:
    """One rank, as what it is asked to run sees it."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.kept: dict[Any, Any] = {}
        """What one order leaves for the next."""

    def cached(self, key: object, make: Callable[[], Any]) -> Any:
        """Return what `make` gave the first time that it was asked for under this key."""
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]


class Pool:
    """`world_size` processes in one gloo world, spread evenly over nodes, one thread each.

    They are forked, so import torch and the peers before, once, and compute nothing before: that
    would start threads which a fork loses.
    """

    def __init__(self, world_size: int, networks: Sequence[Network] = ()) -> None:
        self.world_size = world_size
        self.networks = networks
        per_node = world_size // max(1, len(networks))
        context = multiprocessing.get_context("fork")
        address = f"{SUBNET}.1" if len(networks) > 1 else "127.0.0.1"
        environment = {
            "GLOO_SOCKET_IFNAME": UPLINK if len(networks) > 1 else "lo",
            "LOCAL_WORLD_SIZE": str(per_node),
        }
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            url = f"tcp://{address}:{free.getsockname()[1]}"
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            here = environment | {"LOCAL_RANK": str(rank % per_node)}
            args = (Worker(rank, world_size), url, here, theirs)
            process = context.Process(target=_serve, args=args, daemon=True)
            with ExitStack() as stack:
                if networks:
                    stack.enter_context(networks[rank // per_node].entered())
                process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, work: Callable[..., Any], *args: object) -> list[Any]:
        """Run work(worker, *args) on all ranks at once; returns what each returned."""
        for pipe in self.pipes:
            pipe.send((work, args))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(ANSWER_TIMEOUT_S):
                raise TimeoutError(f"rank {rank} gave no answer within {ANSWER_TIMEOUT_S} s")
            is_error, answer = pipe.recv()
            if is_error:
                raise RuntimeError(f"rank {rank} of {self.world_size}:\n{answer}")
            answers.append(answer)
        return answers

    def leaving_bytes(self, work: Callable[..., Any], *args: object) -> tuple[list[Any], int]:
        """Run as above; returns the answers, and the bytes that left the busiest network device.

        That is a node's uplink, or the loopback device of a world in one network. Headers and
        acknowledgements count.
        """
        before = self.run(_device_bytes)
        answers = self.run(work, *args)
        after = self.run(_device_bytes)
        return answers, max(b - a for a, b in zip(before, after, strict=True))

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, where: TracebackType | None
    ) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


def _serve(worker: Worker, url: str, environment: dict[str, str], pipe: Any) -> None:
    """Run what arrives, until killed. Dies with the parent; Ctrl-C is the parent's business."""
    _system_call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= environment
    torch.set_num_threads(1)
    is_started = False
    while True:
        work, args = pipe.recv()
        try:
            if not is_started:
                dist.init_process_group(
                    "gloo", init_method=url, rank=worker.rank, world_size=worker.world_size
                )
                is_started = True
            answer = False, work(worker, *args)
        except Exception:  # the parent raises it
            answer = True, traceback.format_exc()
        pipe.send(answer)


def _device_bytes(worker: Worker) -> int:
    """Return the bytes sent so far by the device that this rank uses, in its own network."""
    lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
    counts = dict(line.split(":", 1) for line in lines if ":" in line)
    counts = {name.strip(): numbers.split() for name, numbers in counts.items()}
    return int(counts[os.environ["GLOO_SOCKET_IFNAME"]][8])
