"""The transformers configuration of M2Encoder: an Architecture plus what a model folder needs.

Not for training settings (m2encoder/config.py).
"""

from dataclasses import asdict, fields
from typing import Any, Literal

from transformers import PretrainedConfig

from .architecture import Architecture

Towers = Literal["both", "image", "text"]
TOWER_FIELDS = {
    "image_tower": ("timm", {"library", "name", "options"}),
    "text_tower": ("transformers", {"library", "config", "pooling"}),
}
"""The library that each tower may come from, and what describes it; towers.py says more."""
POOLINGS = ("cls", "mean", "last")
_MODEL = "modeling_m2encoder.M2Encoder"
AUTO_MAP = {
    "AutoConfig": "configuration_m2encoder.M2EncoderConfig",
    "AutoModel": _MODEL,
    "AutoModelForZeroShotImageClassification": _MODEL,
}
"""Where transformers finds the classes beside config.json; its own registering keeps one model."""


class M2EncoderConfig(PretrainedConfig):
    """Configuration of an M2Encoder; takes every field of `Architecture` by name.

    image_mean, image_std: per channel; the model itself normalises pixels in 0..1 with them.
    pad_token_id, eos_token_id: used only to derive a mask where the caller gives none.
    towers: which towers are built; `image` or `text` alone saves the other's memory.
    truncation_side: the end that `forward` drops of ids over max_text_length, as the tokenizer
        does.
    image_tower, text_tower: a timm or a transformers model in place of ours, as towers.py describes
        it; then shared_layers is 0 and the sizes of our own tower do not count.
    has_logit_bias: a learned number is added to all logits (models trained with the sigmoid loss).
    Raises ValueError when sizes do not fit each other.
    """

    model_type = "m2_encoder"
    attribute_map = {  # noqa: RUF012 - the type that transformers expects
        "hidden_size": "width",
        "num_attention_heads": "num_heads",
    }

    def __init__(
        self,
        *,
        image_mean: tuple[float, ...] | list[float] = (0.5, 0.5, 0.5),
        image_std: tuple[float, ...] | list[float] = (0.5, 0.5, 0.5),
        pad_token_id: int = 0,
        eos_token_id: int | None = 3,
        towers: Towers = "both",
        truncation_side: Literal["left", "right"] = "left",
        image_tower: dict[str, Any] | None = None,
        text_tower: dict[str, Any] | None = None,
        has_logit_bias: bool = False,
        **kwargs: Any,
    ) -> None:
        names = {field.name for field in fields(Architecture)}
        shape = Architecture(**{name: kwargs.pop(name) for name in names & kwargs.keys()})
        for name, value in asdict(shape).items():
            setattr(self, name, value)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.towers = towers
        self.truncation_side = truncation_side
        self.has_logit_bias = has_logit_bias
        _check_tower("image_tower", image_tower, shape.shared_layers)
        _check_tower("text_tower", text_tower, shape.shared_layers)
        self.image_tower = image_tower
        self.text_tower = text_tower
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__init__(**kwargs)
        self.pad_token_id = pad_token_id
        self.eos_token_id = eos_token_id

    @property
    def architecture(self) -> Architecture:
        """The shape alone."""
        return Architecture(**{f.name: getattr(self, f.name) for f in fields(Architecture)})


def _check_tower(name: str, tower: dict[str, Any] | None, shared_layers: int) -> None:
    if tower is None:
        return
    library, fields_ = TOWER_FIELDS[name]
    if set(tower) != fields_ or tower["library"] != library:
        raise ValueError(
            f"{name} is from {tower.get('library')!r} with {', '.join(sorted(tower))}; expected "
            f"{library!r} with {', '.join(sorted(fields_))}"
        )
    if tower.get("pooling", "cls") not in POOLINGS:
        raise ValueError(
            f"{name}: pooling is {tower['pooling']!r}, expected one of {', '.join(POOLINGS)}"
        )
    if shared_layers:
        raise ValueError(f"{name} needs shared_layers 0, found {shared_layers}: it shares none")
