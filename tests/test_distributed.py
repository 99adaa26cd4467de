"""What processes that train together tell each other, on real ones; and a process alone.

Not for the step's own exchanges (test_loss_grid.py, test_training_step.py) nor for starting several
(test_launch.py).
"""

import socket
import time

import pytest
import torch
import torch.distributed as dist
from torch import nn

from m2encoder.distributed import World, joined_world, ranks_per_machine
from m2encoder.measure import SentBytes

# --- together -----------------------------------------------------------------------------------


def share_of(rank, world_size, value, source):
    mine = value if rank == source else f"not to be read, from {rank}"
    return World(rank, world_size).share(mine, source=source)


@pytest.mark.parametrize(
    "value", [None, "第3步：pair 貓👍", {"step": 3, "keys": ["a", ""]}, b"x" * 100_000]
)
def test_share_gives_all_ranks_the_value_of_one(gloo, value):
    for source in range(4):
        assert gloo(4).run(share_of, value, source) == [value] * 4


def concatenation_of(rank, world_size, items):
    with SentBytes() as sent:
        found = World(rank, world_size).concatenated(items[rank])
    return found, sent.total


@pytest.mark.parametrize(
    "items",
    [
        [["a"], ["b", "c"], [("键", "reason")], ["d"]],
        [[], [("k", "坏图")], [], []],
        [["a"] * 50, [], [None, 0, ""], ["a"]],
    ],
)
def test_concatenated_keeps_every_item_in_the_order_of_ranks(gloo, items):
    expected = [item for of_rank in items for item in of_rank]
    assert [found for found, _ in gloo(4).run(concatenation_of, items)] == [expected] * 4


@pytest.mark.parametrize(("world_size", "sent_bytes"), [(2, 8), (4, 12)])
def test_concatenating_nothing_costs_one_number(gloo, world_size, sent_bytes):
    nothing = [[]] * world_size
    # an int64 is all-reduced: 2 (n - 1) / n of its 8 bytes
    assert gloo(world_size).run(concatenation_of, nothing) == [([], sent_bytes)] * world_size


def seconds_of_waiting(rank, world_size, late_s):
    """When this rank came and went; one clock for all processes of a machine."""
    time.sleep(late_s[rank])
    came = time.monotonic()
    World(rank, world_size).wait()
    return came, time.monotonic()


def test_nobody_goes_on_before_all_have_come(gloo):
    for late_s in ([0, 0, 0.4, 0], [0.4, 0, 0, 0]):
        came, went = zip(*gloo(4).run(seconds_of_waiting, late_s), strict=True)
        assert min(went) >= max(came)


def wrapped_gradients(rank, world_size):
    """Parameters before, and gradients after a backward pass that differs by rank."""
    plain = nn.Linear(3, 2)  # the pool seeds each rank differently
    own = plain.weight.detach().clone()
    wrapped = World(rank, world_size).wrap(plain)
    shared = plain.weight.detach().clone()
    (wrapped(torch.eye(3)[rank : rank + 1]) * (rank + 1)).sum().backward()
    return own, shared, plain.weight.grad


def test_wrapped_modules_start_alike_and_average_their_gradients(gloo):
    own, shared, gradients = zip(*gloo(2).run(wrapped_gradients), strict=True)
    assert not torch.equal(*own)
    assert torch.equal(shared[0], own[0])
    assert torch.equal(shared[1], own[0])
    # rank 0 adds 1 to column 0, rank 1 adds 2 to column 1; both halved
    expected = torch.tensor([[0.5, 1.0, 0.0]] * 2)
    assert torch.equal(gradients[0], expected)
    assert torch.equal(gradients[1], expected)


# --- alone --------------------------------------------------------------------------------------


def test_a_world_of_one_needs_no_other_process():
    assert not dist.is_initialized()
    world, module, items = World(), nn.Linear(2, 2), ["a", "b"]
    assert (world.rank, world.size, world.device) == (0, 1, torch.device("cpu"))
    assert world.share({"a": 1}) == {"a": 1}
    assert world.concatenated(items) == items
    assert world.concatenated(items) is not items
    assert world.concatenated([]) == []
    assert world.wrap(module) is module
    world.wait()


def test_only_rank_0_is_first():
    assert [World(rank, 3).is_first for rank in range(3)] == [True, False, False]


def test_torchrun_says_how_many_ranks_a_machine_has(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert [ranks_per_machine(World(0, size)) for size in (1, 16)] == [1, 16]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert [ranks_per_machine(World(0, size)) for size in (1, 16)] == [1, 8]


def test_a_process_alone_joins_no_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with joined_world("cpu") as world:
        assert world == World()
        assert not dist.is_initialized()
    with joined_world() as world:
        assert world.size == 1
        assert world.device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def started_alone(monkeypatch):
    """The variables that torchrun sets for one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")


def test_a_started_process_joins_a_group_and_leaves_it(started_alone):
    with joined_world("cpu") as world:
        assert (world.rank, world.size, world.device.type) == (0, 1, "cpu")
        assert dist.get_backend() == "gloo"
    assert not dist.is_initialized()


def leave_by_a_mistake():
    with joined_world("cpu"):
        assert dist.is_initialized()
        raise ValueError("a mistake")


def test_a_mistake_leaves_the_group_too(started_alone):
    with pytest.raises(ValueError, match="a mistake"):
        leave_by_a_mistake()
    assert not dist.is_initialized()
