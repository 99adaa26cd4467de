"""The released M2-Encoder layout: which of its tensors are ours, under which names, both ways.

Source: alipay/Ant-Multi-Modal-Framework, prj/M2_Encoder: BEiT-3 multiway weights, where branch A
serves images, branch B texts, and branch A of the top ("vl") layers both. Not for opening files
(torch_files.py) nor for writing model folders (convert.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from m2encoder.errors import CheckpointError
from m2encoder.model.architecture import Architecture
from m2encoder.model.configuration_m2encoder import M2EncoderConfig
from m2encoder.model.layers import resize_positions
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.torch_files import forget

UNUSED_POSITIONS = 2
"""First rows of both position tables, which no token ever takes (fairseq counts from 2)."""
CONTAINERS = ("state_dict", "module", "model")
PREFIX = "_forward_module."

# A block's parts: ours, theirs with branch {X}. Three of theirs make one of ours, rows in order.
_BLOCK = (
    ("attention_norm", ("self_attn_layer_norm.{X}",)),
    ("attention.qkv", tuple(f"self_attn.{p}_proj.{{X}}" for p in "qkv")),
    ("attention.inner_norm", ("self_attn.inner_attn_ln.{X}",)),
    ("attention.out", ("self_attn.out_proj.{X}",)),
    ("ffn_norm", ("final_layer_norm.{X}",)),
    ("ffn.fc1", ("ffn.{X}.fc1",)),
    ("ffn.inner_norm", ("ffn.{X}.ffn_layernorm",)),
    ("ffn.fc2", ("ffn.{X}.fc2",)),
)
# Our stack, their encoder, its branch.
_STACKS = (
    ("image.stack", "backbone.encoder", "A"),
    ("text.stack", "backbone.encoder", "B"),
    ("shared", "backbone_vl", "A"),
)
_SINGLE = {
    "logit_scale": "logit_scale",
    "image.patch_embed.weight": "backbone.vision_embed.proj.weight",
    "image.patch_embed.bias": "backbone.vision_embed.proj.bias",
    "image.cls_token": "backbone.vision_embed.cls_token",
    "image.positions": "backbone.encoder.embed_positions.A.weight",
    "text.token_embed.weight": "backbone.text_embed.weight",
    "text.positions": "backbone.encoder.embed_positions.B.weight",
    "image_projection.weight": "itc_vl_image_proj.fc.weight",
    "text_projection.weight": "itc_vl_text_proj.fc.weight",
}
POSITIONS = {name for name in _SINGLE if name.endswith("positions")}


def key_map(shape: Architecture) -> dict[str, tuple[str, ...]]:
    """Return our parameter name -> the released names whose rows, one after another, make it up."""
    table = {ours: (theirs,) for ours, theirs in _SINGLE.items()}
    layers = (shape.image_layers, shape.text_layers, shape.shared_layers)
    for (ours, theirs, branch), count in zip(_STACKS, layers, strict=True):
        table |= _stack_map(ours, theirs, branch, count)
    return table


def _stack_map(ours: str, theirs: str, branch: str, layers: int) -> dict[str, tuple[str, ...]]:
    table = {}
    for kind in ("weight", "bias"):
        table[f"{ours}.norm.{kind}"] = (f"{theirs}.layer_norm.{branch}.{kind}",)
        for layer in range(layers):
            for part, names in _BLOCK:
                table[f"{ours}.blocks.{layer}.{part}.{kind}"] = tuple(
                    f"{theirs}.layers.{layer}.{name.format(X=branch)}.{kind}" for name in names
                )
    return table


def extra_shapes(shape: Architecture) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of what the released files carry and inference never uses.

    Branch B of the top layers, the last norm, pooler, mask token, the backbone's own projections
    and their scale, and (as `NAME[:2]`) the first rows of the position tables.
    """
    d, wide, out = shape.width, shape.ffn_width, shape.projection_dim
    sizes = {"ffn.fc1": (wide, d), "ffn.inner_norm": (wide,), "ffn.fc2": (d, wide)}
    sizes |= {"attention.qkv": (d, d), "attention.out": (d, d)}
    shapes: dict[str, tuple[int, ...]] = {
        "logit_vl_scale": (),
        "backbone.vision_embed.mask_token": (1, 1, d),
        "norm.weight": (d,),
        "norm.bias": (d,),
        "pooler.dense.weight": (d, d),
        "pooler.dense.bias": (d,),
        "itc_text_proj.fc.weight": (out, d),
        "itc_image_proj.fc.weight": (out, d),
    }
    for name in POSITIONS:
        shapes[_first_rows(_SINGLE[name])] = (UNUSED_POSITIONS, d)
    for ours, names in _stack_map("shared", "backbone_vl", "B", shape.shared_layers).items():
        size = next((s for part, s in sizes.items() if f".{part}." in ours), (d,))
        for name in names:
            shapes[name] = size[:1] if name.endswith("bias") else size
    return shapes


def _first_rows(name: str) -> str:
    return f"{name}[:{UNUSED_POSITIONS}]"


class Resized(NamedTuple):
    """A position table that was made for another picture size."""

    name: str
    rows: int
    wanted_rows: int


@dataclass
class Report:
    """What became of each tensor of a released checkpoint: used, kept beside, or dropped."""

    container: str
    """`state_dict`, `module`, `model` or `bare`."""
    preset: str | None
    """The preset of this shape."""
    used: list[str] = field(default_factory=list)
    """Tensors that are now the model's."""
    kept: list[str] = field(default_factory=list)
    """Tensors that inference never uses; kept for the way back."""
    dropped: list[str] = field(default_factory=list)
    """Unexpected tensors: no part of M2-Encoder."""
    missing: list[str] = field(default_factory=list)
    """Tensors that inference never uses and the file lacks."""
    resized: list[Resized] = field(default_factory=list)
    """Position tables made for another picture size."""

    def lines(self) -> list[str]:
        """Say it for people; what is unremarkable takes one line."""
        total = len(self.used) + len(self.kept) + len(self.dropped)
        lines = [
            f"{self.preset or 'a model of its own size'} ({self.container}): {total} tensors = "
            f"{len(self.used)} used + {len(self.kept)} kept beside + {len(self.dropped)} dropped"
        ]
        for what, names in (("unexpected, dropped", self.dropped), ("missing", self.missing)):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"{what}: {', '.join(names[:5])}{more}")
        lines += [f"resized: {r.name} from {r.rows} to {r.wanted_rows} rows" for r in self.resized]
        return lines


def find_weights(content: Any, *, where: str) -> tuple[str, dict[str, Tensor]]:
    """Return container and tensors of a released checkpoint's content.

    Takes every layout of the released loader; `_forward_module.` is stripped wherever it stands.
    Raises CheckpointError if these are not M2-Encoder's weights.
    """
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{where}: holds a {type(content).__name__}, expected a mapping of tensors by name"
        )
    container = next((c for c in CONTAINERS if isinstance(content.get(c), Mapping)), "bare")
    found = content if container == "bare" else content[container]
    weights = {
        name.removeprefix(PREFIX): tensor
        for name, tensor in found.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    if not any(name.startswith(("backbone.", "backbone_vl.")) for name in weights):
        seen = ", ".join(list(weights)[:3]) or "no tensor"
        raise CheckpointError(
            f"{where}: no M2-Encoder checkpoint: found {seen}, expected names such as "
            f"backbone.text_embed.weight"
        )
    return container, weights


def build_model(
    weights: Mapping[str, Tensor],
    config: M2EncoderConfig,
    *,
    where: str,
    report: Report,
    dtype: torch.dtype | None = None,
) -> tuple[M2Encoder, dict[str, Tensor]]:
    """Return the model and the extras (`extra_shapes`), and complete `report`.

    weights: mapped from a file, so that memory holds the model and never the file beside it.
    dtype: of the parameters; None keeps each tensor's own, but resized tables are float32.
    Raises CheckpointError on a tensor that is missing or does not fit.
    """
    with torch.device("meta"):
        model = M2Encoder(config).eval()
    table = key_map(config.architecture)
    wanted = dict(model.named_parameters())
    if missing := [n for name in wanted for n in table[name] if n not in weights]:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CheckpointError(
            f"{where}: lacks {', '.join(missing[:3])}{more}, which the model needs; is this file "
            f"complete, and the configuration its own?"
        )
    for name, parameter in wanted.items():
        pieces = [weights[theirs] for theirs in table[name]]
        if name in POSITIONS:
            pieces = [piece[UNUSED_POSITIONS:] for piece in pieces]
        if name == "image.positions" and len(pieces[0]) != len(parameter):
            pieces = [_resized(pieces[0], config, table[name][0], report, where)]
        _check_shape(pieces, parameter, table[name], where)
        value = torch.empty(parameter.shape, dtype=dtype or pieces[0].dtype)
        rows = [len(piece) for piece in pieces] if value.ndim else []
        for target, piece in zip(value.split(rows) if rows else [value], pieces, strict=True):
            target.copy_(piece)
            forget(piece)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value))
    extras = _extras(weights, config.architecture, where)
    known = {n for names in table.values() for n in names}
    report.used += [n for n in weights if n in known]
    report.kept += [n for n in weights if n in extras]
    report.dropped += [n for n in weights if n not in known and n not in extras]
    report.missing += [n for n in extra_shapes(config.architecture) if n not in extras]
    return model, extras


def _resized(
    table: Tensor, config: M2EncoderConfig, name: str, report: Report, where: str
) -> Tensor:
    """Resize an image position table to the configuration's grid, in float32, in both directions.

    The released loader cuts a larger table off after its first rows in one of its routes, which
    puts patches in the wrong places; here it is always resized.
    """
    if (side := round((len(table) - 1) ** 0.5)) ** 2 != len(table) - 1 or side == 0:
        raise CheckpointError(
            f"{where}: {name} has {len(table) + UNUSED_POSITIONS} rows, expected 3 and a square "
            f"number of patches"
        )
    resized = resize_positions(table.float(), config.architecture.grid)
    report.resized.append(
        Resized(name, len(table) + UNUSED_POSITIONS, len(resized) + UNUSED_POSITIONS)
    )
    return resized


def _check_shape(
    pieces: list[Tensor], parameter: Tensor, names: tuple[str, ...], where: str
) -> None:
    first, *rest = parameter.shape or (1,)
    for piece, name in zip(pieces, names, strict=True):
        want = torch.Size([first // len(pieces), *rest]) if parameter.ndim else parameter.shape
        if piece.shape != want:
            raise CheckpointError(
                f"{where}: {name} is {tuple(piece.shape)}, the configuration asks for "
                f"{tuple(want)}; give the configuration that belongs to this file"
            )


def _extras(weights: Mapping[str, Tensor], shape: Architecture, where: str) -> dict[str, Tensor]:
    extras = {}
    for name, size in extra_shapes(shape).items():
        whole = name.removesuffix(_first_rows(""))
        if whole not in weights:
            continue
        tensor = weights[whole] if whole == name else weights[whole][:UNUSED_POSITIONS]
        if tuple(tensor.shape) != size:
            raise CheckpointError(
                f"{where}: {name} is {tuple(tensor.shape)}, the configuration asks for {size}; "
                f"give the configuration that belongs to this file"
            )
        extras[name] = tensor
    return extras


def to_released(
    weights: Mapping[str, Tensor], extras: Mapping[str, Tensor], shape: Architecture
) -> dict[str, Tensor]:
    """Return the released layout of our weights; with the extras of their origin bit for bit.

    Without extras what inference never uses is left out and the two unused rows are zero. Raises
    CheckpointError on weights that the layout has no place for.
    """
    table = key_map(shape)
    if shape.patch_stem != "linear":
        raise CheckpointError(
            "has a convolutional patch stem, for which the released layout has no place; only "
            "models of the released kind (patch_stem linear) go back"
        )
    if strangers := sorted(weights.keys() ^ table.keys()):
        raise CheckpointError(
            f"the released layout has no place for this model ({', '.join(strangers[:3])} is too "
            f"much or missing); expected linear patch stem, shared layers and both towers"
        )
    released = {n: t for n, t in extras.items() if not n.endswith(_first_rows(""))}
    for name, theirs in table.items():
        whole = weights[name]
        pieces = list(whole.chunk(len(theirs))) if whole.ndim else [whole]
        if name in POSITIONS:
            blank = pieces[0].new_zeros(UNUSED_POSITIONS, shape.width)
            first = extras.get(_first_rows(theirs[0]), blank).to(pieces[0].dtype)
            pieces = [torch.cat([first, pieces[0]])]
        for target, piece in zip(theirs, pieces, strict=True):
            released[target] = piece.clone()
    return released
