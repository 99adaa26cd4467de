"""Towers of other libraries: a timm image model, a transformers text model, pooled their own way.

Described by plain values in the configuration, so that a folder opens offline; timm is imported
only where a tower asks for it. Not for pretrained weights: m2encoder/towers.py puts those in.
"""

import inspect
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_MAPPING, AutoModel, PretrainedConfig
from transformers import __version__ as transformers_version


class TimmImageTower(nn.Module):
    """A timm model without its classifier: normalised pixels to pooled features (B, width).

    settings: {"library": "timm", "name": NAME, "options": {arguments of timm.create_model}}.
    image_size: pixels, where the model is later set to another size than it is created with.
    Raises ImportError without timm, ValueError on what timm does not know.
    """

    def __init__(self, settings: dict[str, Any], *, image_size: int) -> None:
        super().__init__()
        self.settings, self.name, options = settings, settings["name"], settings["options"]
        # Real even where transformers builds a model without memory: timm computes tables here.
        with torch.device("cpu"):
            self.model = create_timm_model(self.name, options, pretrained=False)
            created_for = options.get("img_size", self.model.pretrained_cfg["input_size"][1])  # pyright: ignore[reportIndexIssue, reportCallIssue, reportArgumentType]
            if image_size != created_for:
                self.set_image_size(image_size)
        for module in self.model.modules():
            vars(module)["_is_hf_initialized"] = True  # leaves it as timm starts it
        width = getattr(self.model, "head_hidden_size", None) or self.model.num_features
        assert isinstance(width, int)
        self.width = width

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: (B, 3, S, S), already normalised. Returns (B, width)."""
        return self.model(pixels)

    @property
    def gradient_checkpointing(self) -> bool:
        """transformers' switch finds this name and sets it."""
        return bool(getattr(self.model, "grad_checkpointing", False))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, enable: bool) -> None:
        self.model.set_grad_checkpointing(enable)  # pyright: ignore[reportCallIssue]

    def set_image_size(self, size: int) -> None:
        """Take pictures of another size. Raises ValueError if timm cannot do that."""
        change = getattr(self.model, "set_input_size", None)
        if change is None:
            if self.model.pretrained_cfg.get("fixed_input_size"):  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
                raise ValueError(
                    f"timm's {self.name} takes pictures of one size, not {size} pixels"
                )
            return  # convolutions take any
        try:
            change(img_size=size)
        except (AssertionError, RuntimeError, ValueError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise ValueError(
                f"timm's {self.name} takes no pictures of {size} pixels ({reason})"
            ) from None

    def restore_tables(self, image_size: int) -> None:
        """Compute again the tables that no file holds: transformers leaves them empty."""
        emptied = dict(self.model.named_buffers()).keys() - self.model.state_dict().keys()
        if not emptied:
            return
        fresh = TimmImageTower(self.settings, image_size=image_size).model
        for name in emptied:
            owner, _, leaf = name.rpartition(".")
            now, table = self.model.get_buffer(name), fresh.get_buffer(name)
            buffers = self.model.get_submodule(owner)._buffers
            buffers[leaf] = table.to("cpu" if now.is_meta else now.device, now.dtype)


def create_timm_model(name: str, options: dict[str, Any], *, pretrained: bool) -> nn.Module:
    """Return timm's model without classifier. Raises ImportError, ValueError (see above)."""
    try:
        timm = import_module("timm")
    except ImportError as error:
        raise ImportError(
            f"the image tower {name} needs timm, which cannot be imported ({error}); install it "
            f"with: pip install timm"
        ) from None
    if not timm.is_model(name.partition(".")[0]):
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; see timm.list_models()")
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **options)
    except (TypeError, AssertionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(f"timm cannot build {name} with {options} ({reason})") from None


class TransformersTextTower(nn.Module):
    """A transformers text model: ids to one pooled hidden state, (M, width).

    settings: {"library": "transformers", "config": {a configuration with model_type}, "pooling":
    "cls" (first token) | "mean" (of all tokens) | "last" (last token)}.
    Raises ValueError on a model that transformers does not hold itself.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        config = text_config(settings["config"])
        self.model = AutoModel.from_config(config, **without_pooler(config))
        self.width = config.hidden_size
        self.pooling = settings["pooling"]

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids: (M, L) int64, right-padded; mask: (M, L) bool, True where real. Returns (M, D)."""
        hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        if self.pooling == "cls":
            return hidden[:, 0]
        if self.pooling == "last":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]
        weights = mask[..., None].to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def text_config(values: dict[str, Any]) -> PretrainedConfig:
    """Return the configuration of a text model. Raises ValueError on an unknown kind."""
    values = dict(values)
    kind = str(values.pop("model_type", None))
    if kind not in CONFIG_MAPPING:
        raise ValueError(f"transformers {transformers_version} has no text model {kind!r}")
    config = CONFIG_MAPPING[kind](**values)
    if config.is_encoder_decoder or type(config) not in MODEL_MAPPING:
        raise ValueError(f"{kind!r} is no plain text encoder, expected one like bert or roberta")
    config.use_cache = False  # a decoder would keep keys and values for tokens never generated
    return config


def without_pooler(config: PretrainedConfig) -> dict[str, bool]:
    """Return the option that leaves out a pooler which nothing here would train or use."""
    cls: Any = MODEL_MAPPING[type(config)]
    known = inspect.signature(cls.__init__).parameters
    return {"add_pooling_layer": False} if "add_pooling_layer" in known else {}
