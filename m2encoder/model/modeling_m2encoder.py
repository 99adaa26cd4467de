"""M2Encoder: two towers over one block, sharing their last layers.

Source: M2-Encoder (arXiv 2401.15896) and its released inference code; BEiT-3's multiway weights
split exactly into an image tower, a text tower and shared layers. Not for losses or for loading by
name.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

from .configuration_m2encoder import M2EncoderConfig
from .layers import Block, ImageTower, Stack, TextTower, resize_positions
from .towers import TimmImageTower, TransformersTextTower

LOGIT_BIAS_INIT = -10.0  # SigLIP (arXiv 2303.15343, section 3.2)


@dataclass
class M2EncoderOutput(ModelOutput):
    """What `forward` returns; a tower that was given nothing leaves its fields None."""

    logits_per_image: Tensor | None = None
    """(B, M) float32: exp(logit_scale) x cosine, plus logit_bias where there is one."""
    logits_per_text: Tensor | None = None
    """(M, B) float32, its transpose."""
    image_embeds: Tensor | None = None
    """(B, P), unit norm."""
    text_embeds: Tensor | None = None
    """(M, P), unit norm."""


class M2Encoder(PreTrainedModel):
    """Chinese-English image-text encoder.

    Tensor methods only; `m2encoder.load_model` wraps it with methods that take pictures and
    strings.
    """

    config_class = M2EncoderConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012 - the type that transformers expects

    def __init__(self, config: M2EncoderConfig) -> None:
        super().__init__(config)
        shape = config.architecture
        self.image: ImageTower | TimmImageTower | None = None
        self.text: TextTower | TransformersTextTower | None = None
        if config.towers in ("both", "image"):
            self.image, width = _make_image_tower(config)
            self.image_projection = nn.Linear(width, shape.projection_dim, bias=False)
        if config.towers in ("both", "text"):
            self.text, width = _make_text_tower(config)
            self.text_projection = nn.Linear(width, shape.projection_dim, bias=False)
        absent = {"both": [], "image": ["text"], "text": ["image"]}[config.towers]
        self._keys_to_ignore_on_load_unexpected = [rf"^{tower}[._]" for tower in absent]
        self.shared = Stack(shape, shape.shared_layers)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias: nn.Parameter | None = None
        if config.has_logit_bias:
            self.logit_bias = nn.Parameter(torch.tensor(LOGIT_BIAS_INIT))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Start as the released code does (torchscale sub-LN); every rule stands here.

        Linear and convolution: torch's defaults; the value, output and feed-forward layers of a
        stack of n are then drawn wider by sqrt(ln 2n). Token embedding N(0, 1/sqrt(D)); CLS token
        0; positions N(0, position_init_std); projections N(0, 0.02); logit_scale ln(1/0.07);
        logit_bias, where the loss is a sigmoid, -10.
        """
        if isinstance(module, nn.Linear | nn.Conv2d | nn.LayerNorm | nn.GroupNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5)
        elif isinstance(module, ImageTower | TextTower):
            nn.init.normal_(module.positions, std=self.config.position_init_std)
            if isinstance(module, ImageTower):
                nn.init.zeros_(module.cls_token)
        elif module is self:
            # Here and not when the walk comes past each Stack: transformers passes over modules of
            # custom code that have no parameters of their own.
            for part in self.modules():
                if isinstance(part, Stack):
                    _init_sub_layer_norm(part)
            nn.init.constant_(self.logit_scale, math.log(1 / 0.07))
            if self.logit_bias is not None:
                nn.init.constant_(self.logit_bias, LOGIT_BIAS_INIT)
            for name in ("image_projection", "text_projection"):
                if (projection := getattr(self, name, None)) is not None:
                    nn.init.normal_(projection.weight, std=0.02)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Open a model folder as transformers does; a timm tower computes its tables again."""
        loaded = super().from_pretrained(*args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(model.image, TimmImageTower):
            model.image.restore_tables(model.config.image_size)
        return loaded

    @property
    def dim(self) -> int:
        """Width P of the vectors."""
        return self.config.projection_dim

    @property
    def vector_settings(self) -> list[Any]:
        """What decides the vectors beside the weights, as plain values."""
        config = self.config
        towers = [tower for tower in (config.image_tower, config.text_tower) if tower is not None]
        return [asdict(config.architecture), config.image_mean, config.image_std, *towers]

    def encode_image(self, pixel_values: Tensor, kept_patches: Tensor | None = None) -> Tensor:
        """pixel_values: (B, 3, S, S) in 0..1. Returns (B, P) float32, unit norm.

        kept_patches: (B, K) int64, the patches to look at, None for all; for training alone.
        Raises ValueError on another picture size, when the image tower was not loaded, or with
        kept_patches when it is timm's.
        """
        return _unit_norm(self._image_features(pixel_values, kept_patches))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """input_ids: (M, L) int64, right-padded; attention_mask: (M, L), 1 where real.

        Without a mask everything after the first end token is taken as padding. Returns (M, P)
        float32, unit norm. Raises ValueError on wrong shapes, too long texts or when the text tower
        was not loaded.
        """
        return _unit_norm(self._text_features(input_ids, attention_mask))

    def _image_features(self, pixel_values: Tensor, kept: Tensor | None = None) -> Tensor:
        if self.image is None:
            raise ValueError("this model was loaded with towers='text'; load it with towers='both'")
        size = self.config.image_size
        if tuple(pixel_values.shape[1:]) != (3, size, size):
            raise ValueError(
                f"pixel_values are {tuple(pixel_values.shape)}, expected (B, 3, {size}, {size})"
            )
        pixel_values = pixel_values.to(self.image_projection.weight.dtype)
        mean = pixel_values.new_tensor(self.config.image_mean)[:, None, None]
        std = pixel_values.new_tensor(self.config.image_std)[:, None, None]
        pixel_values = (pixel_values - mean) / std
        if isinstance(self.image, TimmImageTower):
            if kept is not None:
                raise ValueError("patch dropout needs our own image tower, this one is timm's")
            return self.image_projection(self.image(pixel_values))
        hidden_BLD = self.shared(self.image(pixel_values, kept), None)
        return self.image_projection(hidden_BLD[:, 0])

    def _text_features(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        if self.text is None:
            raise ValueError(
                "this model was loaded with towers='image'; load it with towers='both'"
            )
        if input_ids.ndim != 2 or input_ids.shape[1] > self.config.text_positions:
            raise ValueError(
                f"input_ids are {tuple(input_ids.shape)}, expected (M, L) with L at most "
                f"{self.config.text_positions}"
            )
        if attention_mask is None:
            attention_mask = self._derived_mask(input_ids)
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask is {tuple(attention_mask.shape)}, expected the shape of "
                f"input_ids, {tuple(input_ids.shape)}"
            )
        mask_ML = attention_mask.bool()
        if isinstance(self.text, TransformersTextTower):
            return self.text_projection(self.text(input_ids, mask_ML))
        hidden_MLD = self.shared(self.text(input_ids, mask_ML), mask_ML)
        return self.text_projection(hidden_MLD[:, 0])

    def _derived_mask(self, input_ids: Tensor) -> Tensor:
        pad, end = self.config.pad_token_id, self.config.eos_token_id
        if isinstance(self.text, TransformersTextTower) and pad != end:
            return (input_ids != pad).long()  # not every tokenizer ends a text with a token
        return mask_up_to_end(input_ids, end)

    def get_image_features(self, pixel_values: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """transformers' name: `pooler_output` is (B, P), projected, not normalised."""
        return BaseModelOutputWithPooling(pooler_output=self._image_features(pixel_values))  # pyright: ignore[reportArgumentType]

    def get_text_features(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> BaseModelOutputWithPooling:
        """transformers' name: `pooler_output` is (M, P), projected, not normalised."""
        features = self._text_features(input_ids, attention_mask)
        return BaseModelOutputWithPooling(pooler_output=features)  # pyright: ignore[reportArgumentType]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> M2EncoderOutput:
        """Encode pictures (B, 3, S, S), texts (M, L) or both; with both also compare them.

        Texts over max_text_length are cut here: transformers' pipelines tokenize without a limit.
        """
        if input_ids is not None and input_ids.shape[1] > self.config.max_text_length:
            input_ids, attention_mask = self._cut(input_ids, attention_mask)
        image = None if pixel_values is None else self.encode_image(pixel_values)
        text = None if input_ids is None else self.encode_text(input_ids, attention_mask)
        if image is None or text is None:
            return M2EncoderOutput(image_embeds=image, text_embeds=text)  # pyright: ignore[reportArgumentType]
        logits = self.logit_scale.float().exp() * image.float() @ text.float().T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias.float()
        return M2EncoderOutput(logits, logits.T, image, text)  # pyright: ignore[reportArgumentType]

    def _cut(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ids and mask (M, max_text_length): of a longer text first, last and what is kept.

        The ids that the tokenizer gives when it truncates; it drops from truncation_side.
        """
        if attention_mask is None:
            attention_mask = mask_up_to_end(input_ids, self.config.eos_token_id)
        limit = self.config.max_text_length
        place_ML = torch.arange(limit, device=input_ids.device).repeat(len(input_ids), 1)
        excess_M1 = (attention_mask.sum(dim=1, keepdim=True) - limit).clamp(min=0)
        moved = slice(1, None) if self.config.truncation_side == "left" else slice(-1, None)
        place_ML[:, moved] += excess_M1
        return input_ids.gather(1, place_ML), attention_mask.gather(1, place_ML)

    @torch.no_grad()
    def set_image_size(self, image_size: int) -> None:
        """Take pictures of another size, a multiple of the patch: resize the position table."""
        shape = self.config.architecture
        if isinstance(self.image, TimmImageTower):
            self.image.set_image_size(image_size)
        elif image_size < 1 or image_size % shape.patch_size:
            raise ValueError(
                f"image_size is {image_size}, expected a multiple of patch_size {shape.patch_size}"
            )
        if isinstance(self.image, ImageTower):
            table = resize_positions(self.image.positions, image_size // shape.patch_size)
            self.image.positions = nn.Parameter(table.clone())
        self.config.image_size = image_size


def _make_image_tower(config: M2EncoderConfig) -> tuple[ImageTower | TimmImageTower, int]:
    """Return a tower and the width of what it gives."""
    if config.image_tower is None:
        return ImageTower(config.architecture), config.architecture.width
    tower = TimmImageTower(config.image_tower, image_size=config.image_size)
    return tower, tower.width


def _make_text_tower(config: M2EncoderConfig) -> tuple[TextTower | TransformersTextTower, int]:
    if config.text_tower is None:
        return TextTower(config.architecture), config.architecture.width
    tower = TransformersTextTower(config.text_tower)
    return tower, tower.width


def mask_up_to_end(input_ids: Tensor, end_id: int) -> Tensor:
    """Return (M, L) int64: 1 up to and including the first end token (padding may share its id)."""
    is_end = (input_ids == end_id).long()
    return ((is_end.cumsum(dim=1) - is_end) == 0).long()


def _unit_norm(features: Tensor) -> Tensor:
    features = features.float()  # half precision would leave a norm of 1 ± 0.002
    return features / features.norm(dim=-1, keepdim=True)  # without epsilon, as released


def _init_sub_layer_norm(stack: Stack) -> None:
    for block in stack.blocks:
        assert isinstance(block, Block)
        value = 2 * block.attention.out.in_features  # first row of the values in q, k, v
        layers = (block.attention.out, 0), (block.ffn.fc1, 0), (block.ffn.fc2, 0)
        for linear, first_row in ((block.attention.qkv, value), *layers):
            bound = math.sqrt(math.log(2 * len(stack.blocks)) / linear.in_features)
            for parameter in (linear.weight, linear.bias):
                if not getattr(parameter, "_is_hf_initialized", False):  # else it was loaded
                    nn.init.uniform_(parameter[first_row:], -bound, bound)


M2EncoderConfig.register_for_auto_class()
M2Encoder.register_for_auto_class("AutoModel")
