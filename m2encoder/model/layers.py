"""The building blocks of both towers: one pre-norm block with sub-LayerNorm, embeddings, resizing.

Every detail follows the released M2-Encoder (BEiT-3 multiway, "MAGNETO" sub-LN; torchscale).
Letters: B batch, L tokens or patches, H heads, K head width, D width.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .architecture import MAX_STEM_CONVOLUTIONS, Architecture

LAYER_NORM_EPS = 1e-5  # everywhere in the released encoder; not transformers' usual 1e-12 or 1e-6
STEM_CHANNELS = 48  # after the first convolution; wider than width / 8: small models learn faster


class Attention(nn.Module):
    """Self-attention with a LayerNorm before the output projection (sub-LN)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.inner_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.out = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        """Attend over valid tokens; mask is True where the token is real, None means everywhere."""
        batch, length, width = x_BLD.shape
        qkv = self.qkv(x_BLD).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q_BHLK, k_BHLK, v_BHLK = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if mask_BL is None else mask_BL[:, None, None, :]
        y_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, attn_mask=mask)
        return self.out(self.inner_norm(y_BHLK.transpose(1, 2).reshape(batch, length, width)))


class FeedForward(nn.Module):
    """Two linear layers around an exact (erf) GELU and a LayerNorm (sub-LN)."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ffn_width)
        self.inner_norm = nn.LayerNorm(ffn_width, eps=LAYER_NORM_EPS)
        self.fc2 = nn.Linear(ffn_width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.fc2(self.inner_norm(F.gelu(self.fc1(x_BLD))))


class Block(nn.Module):
    """x + attention(LN(x)), then x + feed-forward(LN(x))."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.attention = Attention(shape.width, shape.num_heads)
        self.ffn_norm = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.ffn = FeedForward(shape.width, shape.ffn_width)
        self.checkpointed: Callable[..., Tensor] | None = None
        """Runs `layers` so that training keeps fewer activations; None keeps all."""

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        if self.checkpointed is not None and self.training:
            return self.checkpointed(self.layers, x_BLD, mask_BL)
        return self.layers(x_BLD, mask_BL)

    def layers(self, x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        """Compute what `forward` returns."""
        x_BLD = x_BLD + self.attention(self.attention_norm(x_BLD), mask_BL)
        return x_BLD + self.ffn(self.ffn_norm(x_BLD))


class Stack(nn.Module):
    """Blocks closed by one LayerNorm; without blocks there is no norm either."""

    def __init__(self, shape: Architecture, num_layers: int) -> None:
        super().__init__()
        self.gradient_checkpointing = False  # transformers' switch finds this name
        self.blocks = nn.ModuleList(Block(shape) for _ in range(num_layers))
        norm = nn.LayerNorm(shape.width, eps=LAYER_NORM_EPS)
        self.norm = norm if num_layers else nn.Identity()

    def forward(self, x_BLD: Tensor, mask_BL: Tensor | None) -> Tensor:
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x_BLD = checkpoint(block, x_BLD, mask_BL, use_reentrant=False)  # pyright: ignore[reportAssignmentType]
            else:
                x_BLD = block(x_BLD, mask_BL)
        return self.norm(x_BLD)


def make_patch_stem(shape: Architecture) -> nn.Module:
    """Return (B, 3, S, S) -> (B, D, grid, grid): one large convolution or a few small ones.

    conv: 3x3 convolutions of stride 2, channels doubling from 48, GroupNorm (the same for any batch
    and world size, unlike BatchNorm) and GELU between; one 1x1 convolution closes it if that stays
    within four.
    """
    if shape.patch_stem == "linear":
        return nn.Conv2d(3, shape.width, shape.patch_size, stride=shape.patch_size)
    depth = shape.patch_size.bit_length() - 1
    layers: list[nn.Module] = []
    channels = 3
    for i in range(depth):
        wider = shape.width if i == depth - 1 else STEM_CHANNELS * 2**i
        layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1)]
        channels = wider
        if i < depth - 1 or depth < MAX_STEM_CONVOLUTIONS:
            layers += [nn.GroupNorm(math.gcd(8, channels), channels), nn.GELU()]
    if depth < MAX_STEM_CONVOLUTIONS:
        layers += [nn.Conv2d(channels, shape.width, 1)]
    return nn.Sequential(*layers)


class ImageTower(nn.Module):
    """Pixels to hidden states: patches, a CLS token, positions, blocks."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.patch_embed = make_patch_stem(shape)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, shape.width))
        self.positions = nn.Parameter(torch.zeros(1 + shape.grid**2, shape.width))
        self.stack = Stack(shape, shape.image_layers)

    def forward(self, pixels: Tensor, kept: Tensor | None = None) -> Tensor:
        """pixels: (B, 3, S, S), already normalised. Returns (B, 1 + grid^2, D).

        kept: (B, K) int64, the patches that are seen (patch dropout); returns (B, 1 + K, D).
        """
        x_BLD = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        # [0]: or else one picture alone gives a gradient that is a view, which DDP warns about
        cls_BLD = self.cls_token[0].expand(len(x_BLD), -1, -1)
        x_BLD = torch.cat([cls_BLD, x_BLD], dim=1)
        x_BLD = x_BLD + self.positions
        if kept is not None:
            place_BK = torch.cat([kept.new_zeros(len(kept), 1), kept + 1], dim=1)
            x_BLD = x_BLD.gather(1, place_BK[..., None].expand(-1, -1, x_BLD.shape[-1]))
        return self.stack(x_BLD, None)


class TextTower(nn.Module):
    """Token ids to hidden states: embeddings, positions, blocks."""

    def __init__(self, shape: Architecture) -> None:
        super().__init__()
        self.token_embed = nn.Embedding(shape.vocab_size, shape.width)
        self.positions = nn.Parameter(torch.zeros(shape.text_positions, shape.width))
        self.stack = Stack(shape, shape.text_layers)

    def forward(self, ids: Tensor, mask_BL: Tensor) -> Tensor:
        """ids: (B, L) int64; mask: (B, L) bool, True where real. Returns (B, L, D)."""
        x_BLD = self.token_embed(ids) + self.positions[: ids.shape[1]]
        # The released code zeroes padded rows; keys are masked, so this changes no CLS output.
        return self.stack(x_BLD * mask_BL[..., None].to(x_BLD.dtype), mask_BL)


def resize_positions(table: Tensor, grid: int) -> Tensor:
    """Resize an image position table (1 + g^2, D) to (1 + grid^2, D), float32 inside.

    Row 0 (CLS) is kept; the rest is a square grid, averaged by area (adaptive average pooling), the
    rule of the released loader.
    """
    old_grid = math.isqrt(len(table) - 1)
    if old_grid == grid:
        return table
    cells = table[1:].float().T.reshape(1, -1, old_grid, old_grid)
    resized = F.interpolate(cells, size=(grid, grid), mode="area")
    return torch.cat([table[:1], resized.flatten(2)[0].T.to(table.dtype)])
