"""The shape of a model as plain values: what a preset or a `model:` section holds.

Standard library only, so that the command line can describe it without importing torch.
"""

from dataclasses import dataclass
from typing import Literal

MAX_STEM_CONVOLUTIONS = 4


@dataclass(frozen=True)
class Architecture:
    """Two towers over one block, sharing their last layers (M2-Encoder, arXiv 2401.15896; BEiT-3).

    The feed-forward width is 4 x width and the grid of patches image_size / patch_size; neither is
    a setting. Raises ValueError when sizes do not fit each other.
    """

    width: int = 192
    """Width of the residual stream, the same in both towers because they share layers."""
    num_heads: int = 6
    """Attention heads; must divide width."""
    image_layers: int = 4
    """Layers of the image tower before the shared ones."""
    text_layers: int = 2
    """Layers of the text tower before the shared ones."""
    shared_layers: int = 2
    """Last layers, one set of weights for both towers; 0 gives an ordinary dual tower."""
    projection_dim: int = 192
    """Width of the embeddings."""
    image_size: int = 64
    """Height and width of the input picture, in pixels."""
    patch_size: int = 16
    """Height and width of a patch, in pixels; must divide image_size."""
    patch_stem: Literal["linear", "conv"] = "linear"
    """linear: one convolution of patch size, as released. conv: up to 4 small strided convolutions,
    which small models trained on little data need (Xiao et al., arXiv 2106.14881)."""
    vocab_size: int = 4000
    """Rows of the token embedding; taken from the tokenizer when training."""
    max_text_length: int = 52
    """Tokens per text, both special tokens included; longer texts are truncated."""
    text_positions: int = 1022
    """Rows of the text position table: the longest text that can ever be asked for."""
    position_init_std: float = 1.0
    """Standard deviation that position tables start with. 1.0 is the released code's; small models
    learn faster from 0.02, because positions then do not drown patches and tokens."""

    def __post_init__(self) -> None:
        for name in ("width", "num_heads", "projection_dim", "image_size", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide width {self.width}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"patch_size {self.patch_size} does not divide image_size {self.image_size}"
            )
        if not 2 <= self.max_text_length <= self.text_positions:
            raise ValueError(
                f"max_text_length {self.max_text_length} must lie between 2 and text_positions "
                f"{self.text_positions}"
            )
        power = self.patch_size.bit_length() - 1
        if self.patch_stem == "conv" and (
            self.patch_size != 2**power or not 1 <= power <= MAX_STEM_CONVOLUTIONS
        ):
            raise ValueError(
                f"patch_stem conv needs patch_size 2, 4, 8 or 16, found {self.patch_size}"
            )
        if min(self.image_layers, self.text_layers, self.shared_layers) < 0:
            raise ValueError("layer counts must not be negative")
        if self.shared_layers == 0 and not (self.image_layers and self.text_layers):
            raise ValueError("with shared_layers 0 each tower needs at least one layer of its own")

    @property
    def grid(self) -> int:
        """Patches along one side of the picture."""
        return self.image_size // self.patch_size

    @property
    def ffn_width(self) -> int:
        """Width of the feed-forward layers."""
        return 4 * self.width
