"""Where weights, gradients and optimizer state live: on every rank, or in shards of one copy.

Three letters after PaRO (arXiv 2310.06003): nnn is DDP, ggg FSDP2 over all ranks, iii FSDP2 inside
groups of ranks that each hold one copy (HSDP). Not for saving shards (checkpoint.py) nor for the
loss's exchanges (collectives.py).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from m2encoder.distributed import World, ranks_per_machine
from m2encoder.ema import Ema
from m2encoder.errors import PlacementError
from m2encoder.model.layers import Block
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.training_step import Towers

Sharding = Literal["nnn", "ggg", "iii"]


def check_sharding(
    sharding: Sharding, world_size: int, *, shard_ranks: int | None, local_world_size: int
) -> None:
    """Raise PlacementError where these ranks cannot be arranged so. A world of one always can.

    shard_ranks: ranks that share one copy (iii alone); None: those of one machine.
    """
    if sharding != "iii" and shard_ranks is not None:
        raise PlacementError(
            f"shard_ranks is {shard_ranks}, but sharding {sharding} has no groups; "
            f"leave shard_ranks out, or set sharding iii"
        )
    if sharding != "iii" or world_size == 1:
        return
    ranks = local_world_size if shard_ranks is None else shard_ranks
    if ranks < 1 or world_size % ranks:
        found = "of one machine" if shard_ranks is None else "of shard_ranks"
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise PlacementError(
            f"sharding iii: {world_size} ranks cannot be cut in groups {found}, {ranks}; "
            f"set shard_ranks to one of {', '.join(map(str, divisors))}"
        )


def shard(
    towers: Towers,
    world: World,
    *,
    sharding: Sharding,
    shard_ranks: int | None = None,
    bfloat16: bool = False,
) -> nn.Module:
    """Return the module to train: called as `towers`, its gradients averaged over the ranks.

    All start with rank 0's weights. ggg and iii replace the model's parameters by DTensors in
    place, so make the optimizer and the average (Ema) afterwards; all but scalars: see
    sync_plain_gradients. bfloat16: their layers compute in it, weights and sums of gradients stay
    float32; nnn leaves that to autocast. A world of one shards nothing. Raises PlacementError.
    """
    local = ranks_per_machine(world)
    check_sharding(sharding, world.size, shard_ranks=shard_ranks, local_world_size=local)
    if sharding == "nnn" or world.size == 1:
        return world.wrap(towers)
    _start_alike(towers)
    groups = (world.size,)
    names = ("shard",)
    if sharding == "iii":
        ranks = local if shard_ranks is None else shard_ranks
        groups, names = (world.size // ranks, ranks), ("replicate", "shard")
    mesh = init_device_mesh(world.device.type, groups, mesh_dim_names=names)
    policy = MixedPrecisionPolicy()
    if bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    scalars = {p for p in towers.parameters() if p.ndim == 0}  # FSDP2 takes none
    # Sharded again after every forward pass, the root's own parameters too (not its default): what
    # is read between steps, by a checkpoint or the average, is then always the shard.
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "reshard_after_forward": True}
    for block in _blocks(towers.model):
        ignored = {p for p in block.parameters() if p in scalars}
        fully_shard(block, **options, ignored_params=ignored)
    fully_shard(towers, **options, ignored_params=scalars)  # in place
    return towers


def sync_plain_gradients(module: nn.Module, world: World) -> None:
    """Average the gradients of what a sharded module does not shard (logit_scale, logit_bias).

    Call it after the backward pass on all ranks; does nothing where no parameter is sharded.
    """
    parameters = list(module.parameters())
    if world.size == 1 or not any(isinstance(p, DTensor) for p in parameters):
        return
    plain = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if plain:
        together = torch.stack(plain)
        dist.all_reduce(together)
        torch._foreach_copy_(plain, list((together / world.size).unbind()))


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale all gradients so that their norm together is at most max_norm; return it as it was.

    DTensors on one mesh and plain tensors together. Returns a scalar, the same on all ranks; one
    number is exchanged, none where all are plain. Not finite: gradients are then not to be used.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    pieces = [g.to_local() for g in sharded]
    plain = [g for g in gradients if not isinstance(g, DTensor)]
    if not gradients:
        return torch.zeros(())
    squares = [_sum_of_squares(tensors, gradients[0].device) for tensors in (pieces, plain)]
    if sharded:
        mesh, placements = sharded[0].device_mesh, sharded[0].placements
        assert all(g.placements == placements for g in sharded)
        for dim, placement in enumerate(placements):
            if placement.is_shard():
                dist.all_reduce(squares[0], group=mesh.get_group(dim))
    norm = (squares[0] + squares[1]).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)  # torch's clip_grad_norm_, to the epsilon
    torch._foreach_mul_([*pieces, *plain], factor)
    return norm


def full_state(
    model: nn.Module, tensors: Mapping[str, Tensor] | None = None, *, only_first: bool = False
) -> dict[str, Tensor]:
    """Return the model's state, or `tensors` placed like it (Ema.tensors), whole and on the CPU.

    Call it on all ranks. only_first: the others return nothing, and keep no more than one tensor
    at a time.
    """
    is_kept = not only_first or not dist.is_initialized() or dist.get_rank() == 0
    found = {}
    for name, whole in _one_by_one(model.state_dict() if tensors is None else tensors):
        if is_kept:
            found[name] = whole.cpu().clone() if whole.device.type == "cpu" else whole.cpu()
    return found


def evaluation_model(model: M2Encoder, ema: Ema | None = None) -> M2Encoder:
    """Return a model that a rank can run by itself, with the average's weights where one is given.

    The model itself where it is whole and no average is asked for, else a whole copy on the same
    device: ranks share evaluation unevenly, and a sharded forward pass needs all of them. Call it
    on all ranks.
    """
    parameters = list(model.parameters())
    if ema is None and not any(isinstance(p, DTensor) for p in parameters):
        return model
    device = parameters[0].device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices), device:
        copy = M2Encoder(model.config)  # pyright: ignore[reportArgumentType]
    nn.Module.to(copy, device)  # tables that timm made on the CPU
    own = copy.state_dict()
    with torch.no_grad():
        for name, whole in _one_by_one(model.state_dict() if ema is None else ema.tensors):
            own[name].copy_(whole)
    return copy.train(model.training)


def _one_by_one(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Each tensor whole, gathered when it is asked for; may share memory with what was given."""
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def _start_alike(module: nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.data, src=0)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The layers to gather one at a time: our Blocks; of other towers their longest list."""
    found: list[nn.Module] = [module for module in model.modules() if isinstance(module, Block)]
    for tower in (getattr(model, name, None) for name in ("image", "text")):
        if tower is None or any(isinstance(module, Block) for module in tower.modules()):
            continue
        lists = [m for m in tower.modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
        found += max(lists, key=len, default=nn.ModuleList())
    return found


def _sum_of_squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(tensors)).square().sum()
