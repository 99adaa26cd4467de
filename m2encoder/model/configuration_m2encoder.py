"""The transformers configuration of M2Encoder: an Architecture plus what a model folder needs.

Not for training settings (m2encoder/config.py).
"""

from dataclasses import asdict, fields
from typing import Any, Literal

from transformers import PretrainedConfig

from .architecture import Architecture

Towers = Literal["both", "image", "text"]
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
        eos_token_id: int = 3,
        towers: Towers = "both",
        **kwargs: Any,
    ) -> None:
        names = {field.name for field in fields(Architecture)}
        shape = Architecture(**{name: kwargs.pop(name) for name in names & kwargs.keys()})
        for name, value in asdict(shape).items():
            setattr(self, name, value)
        self.image_mean = list(image_mean)
        self.image_std = list(image_std)
        self.towers = towers
        kwargs.setdefault("auto_map", dict(AUTO_MAP))
        super().__init__(**kwargs)
        self.pad_token_id = pad_token_id
        self.eos_token_id = eos_token_id

    @property
    def architecture(self) -> Architecture:
        """The shape alone."""
        return Architecture(**{f.name: getattr(self, f.name) for f in fields(Architecture)})
