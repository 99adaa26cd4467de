"""What a training step takes of each process: memory, and bytes sent to others. Arithmetic alone.

For the plan of a run (plan.py), before there is a GPU. Not for measuring (measure.py).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from m2encoder.blocks import CheckpointActivations
from m2encoder.grid import Placement
from m2encoder.model.architecture import Architecture
from m2encoder.model.layers import Block
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.training_step import text_pieces

PARTS: tuple[str, ...] = ("image", "text", "shared", "rest")
ACTIVATIONS_PER_WIDTH = {
    # Bytes per token, layer and unit of width that the backward pass needs, by what is kept. All:
    # input (float32) of both norms and of the sum between, their outputs, q, k, v, attention, and
    # three times the feed-forward width (before and after GELU, after its norm). Under autocast
    # norms compute in float32 and matrix products in bfloat16.
    ("none", False): 84, ("selective", False): 44, ("full", False): 4,
    ("none", True): 58, ("selective", True): 24, ("full", True): 4,
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, by part; `rest` is what both towers have beyond shared layers."""

    all: dict[str, int]
    trained: dict[str, int]
    blocks: dict[str, int]
    """Those of blocks, which sharding gathers one by one."""
    largest_block: int

    @classmethod
    def of(cls, model: M2Encoder) -> "Sizes":
        """Count a model, on the meta device too. Locked parameters are those without gradient."""
        every, trained, blocks = (dict.fromkeys(PARTS, 0) for _ in range(3))
        for name, parameter in model.named_parameters():
            part = name.partition(".")[0]
            part = part if part in PARTS else "rest"
            every[part] += parameter.numel()
            trained[part] += parameter.numel() * parameter.requires_grad
        for name, module in model.named_modules():
            if isinstance(module, Block):
                blocks[name.partition(".")[0]] += _count(module)
        largest = max((_count(b) for b in model.modules() if isinstance(b, Block)), default=0)
        return cls(every, trained, blocks, largest)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.all.values())

    @property
    def total_trained(self) -> int:
        """Those that train."""
        return sum(self.trained.values())

    @property
    def outside_blocks(self) -> int:
        """What sharding gathers together: embeddings, positions, norms, projections."""
        return self.total - sum(self.blocks.values())


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Work:
    """What a process does in a step, and with whom."""

    sharding: Literal["nnn", "ggg", "iii"]
    world_size: int
    group_ranks: int
    """Processes that share one copy of the weights; 1 for nnn."""
    bfloat16: bool
    checkpoint_activations: CheckpointActivations
    pairs: int
    """Pairs of this process per step."""
    accumulate: int
    languages: int
    """Captions per pair, one of each language."""
    image_tokens: int
    text_tokens: int
    ema: bool

    @property
    def image_calls(self) -> int:
        """Pieces that the pictures of a step are cut in (training_step.py)."""
        return self.accumulate

    @property
    def text_calls(self) -> int:
        """Pieces that the captions of a step are cut in."""
        is_sharded = self.sharding != "nnn"
        return text_pieces(self.pairs * self.languages, self.accumulate, is_sharded=is_sharded)

    @property
    def pictures_at_once(self) -> int:
        """Pictures whose activations are held together."""
        return -(-self.pairs // self.image_calls)

    @property
    def captions_at_once(self) -> int:
        """Captions whose activations are held together."""
        captions = self.pairs * self.languages
        return captions if self.accumulate == 1 else -(-captions // self.text_calls)


def memory(shape: Architecture, sizes: Sizes, work: Work, placement: Placement) -> dict[str, float]:
    """Return bytes per process by what they hold, at their most; activations are an estimate.

    Not in it: the framework itself (0.5 to 1 GiB on a GPU), fragmentation, compiled buffers.
    """
    shards = work.group_ranks
    found = {
        "weights": 4 * sizes.total / shards,
        "gradients": 4 * sizes.total_trained / shards,
        "AdamW": 8 * sizes.total_trained / shards,
    }
    if work.ema:
        found["running mean"] = 4 * sizes.total / shards
    width = 2 if work.bfloat16 else 4
    if work.sharding != "nnn":
        # two blocks at a time and what is outside of blocks; gradients likewise
        found["gathered weights"] = 2 * width * (2 * sizes.largest_block + sizes.outside_blocks)
    elif work.bfloat16:
        found["bfloat16 copies"] = 2 * sizes.total
    found["activations"] = activation_bytes(shape, work)
    found["loss"] = loss_bytes(shape.projection_dim, work, placement)
    return found


def activation_bytes(shape: Architecture, work: Work) -> float:
    """Return what the backward pass needs of the towers. Texts count at their full length."""
    per_width = ACTIVATIONS_PER_WIDTH[work.checkpoint_activations, work.bfloat16]
    image = work.pictures_at_once * work.image_tokens * (shape.image_layers + shape.shared_layers)
    text = work.captions_at_once * work.text_tokens * (shape.text_layers + shape.shared_layers)
    kept = (image + text) * shape.width * per_width
    pixels = work.pictures_at_once * 3 * shape.image_size**2 * (1 + 4 + 4)
    if work.checkpoint_activations == "none":
        return kept + pixels
    one_block = max(
        work.pictures_at_once * work.image_tokens, work.captions_at_once * work.text_tokens
    )
    whole = ACTIVATIONS_PER_WIDTH["none", work.bfloat16]
    return kept + pixels + one_block * shape.width * whole  # of the block that is computed again


def loss_bytes(dim: int, work: Work, placement: Placement) -> float:
    """Return gathered features and their gradients; similarities are never held as a whole."""
    rows, columns = placement.rows, placement.columns
    features = work.pairs * dim * (columns + rows * work.languages)
    return 2 * 4 * features


def sent_bytes(
    sizes: Sizes, work: Work, placement: Placement, *, dim: int, wire_bytes: int
) -> dict[str, float]:
    """Return bytes that a process sends per step, with the best algorithm of each collective."""
    found: dict[str, float] = {}
    n, m = work.world_size, work.group_ranks
    trained = sizes.total_trained
    if work.sharding == "nnn":
        found["gradients"] = 2 * (n - 1) / n * 4 * trained
    else:
        # once for all pieces: autograd adds up what they give before anything is sent
        weights, sums = _gathers(sizes, work), sizes.total_trained
        found["weights"] = (m - 1) / m * (2 if work.bfloat16 else 4) * weights
        found["gradients"] = (m - 1) / m * 4 * sums
        groups = n // m
        if groups > 1:
            found["gradients between groups"] = 2 * (groups - 1) / groups * 4 * sums / m
    columns, rows = placement.columns - 1, placement.rows - 1
    features = (columns + rows * work.languages) * work.pairs * dim
    found["loss"] = features * (wire_bytes + 4)
    return found


def _gathers(sizes: Sizes, work: Work) -> int:
    """Return the parameters gathered in a step: anew for each piece, forward and backward."""
    image, text = work.image_calls, work.text_calls
    pieces = {"image": image, "text": text, "shared": image + text, "rest": 0}
    if work.accumulate == 1:
        runs, whole = 2, 2
    else:
        # a pass without gradients, piece by piece and once for scale and bias; then both ways,
        # the last picture piece together with the last captions
        runs, whole = 3, image + text + 1 + 2 * (image + text - 1)
    blocks = sum(runs * pieces[part] * sizes.blocks[part] for part in PARTS)
    return blocks + whole * sizes.outside_blocks


def gibibytes(numbers: Iterable[float]) -> float:
    """Return a sum of bytes in GiB."""
    return sum(numbers) / 2**30
