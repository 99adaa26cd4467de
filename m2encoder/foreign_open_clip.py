"""open_clip's own models behind the Encoder: by name and pretrained tag, or from a folder.

Model, tokenizer and picture transform are open_clip's. Not for its models whose text tower is one
of transformers': those need the hub whenever they are built.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_model
from torch import Tensor, nn

from m2encoder.compat import import_open_clip
from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, ConfigError
from m2encoder.folders import write_json
from m2encoder.foreign_transformers import unit_norm, vocabulary_of
from m2encoder.quiet import first_line

logger = logging.getLogger(__name__)

PREFIX = "open-clip:"
CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
PRECISIONS = {
    torch.float32: "fp32",
    torch.float16: "pure_fp16",
    torch.bfloat16: "pure_bf16",
}


class OpenClipModel(nn.Module):
    """One of open_clip's models; normalises pixels with the statistics of its own transform."""

    def __init__(self, inner: Any, config: dict[str, Any]) -> None:
        super().__init__()
        self.inner = inner
        self.config = config  # open_clip's model_cfg
        self.preprocess: dict[str, Any] = inner.visual.preprocess_cfg

    @property
    def logit_scale(self) -> Tensor:
        """The logarithm of what cosines are multiplied with."""
        return self.inner.logit_scale

    @property
    def logit_bias(self) -> Tensor | None:
        """What is added to the scaled cosine in front of a sigmoid; SigLIP alone has it."""
        return self.inner.logit_bias

    @property
    def dim(self) -> int:
        """Width P of the vectors."""
        return self.config["embed_dim"]

    @property
    def vector_settings(self) -> list[Any]:
        """What decides the vectors beside weights, tokenizer and picture size."""
        return ["open_clip", self.config, self.preprocess]

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """pixel_values: (B, 3, S, S) in 0..1. Returns (B, P) float32, unit norm."""
        mean = pixel_values.new_tensor(self.preprocess["mean"])[:, None, None]
        std = pixel_values.new_tensor(self.preprocess["std"])[:, None, None]
        pixels = (pixel_values - mean) / std
        return unit_norm(self.inner.encode_image(pixels.to(next(self.inner.parameters()).dtype)))

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids: (M, L) int64; the mask is not used. Returns (M, P) float32, unit norm."""
        return unit_norm(self.inner.encode_text(input_ids))


class OpenClipPixels:
    """open_clip's picture transform for evaluation, up to the division by 255."""

    def __init__(self, preprocess: dict[str, Any]) -> None:
        transform = import_module("open_clip.transform")
        settings = transform.PreprocessCfg(**preprocess)
        steps = transform.image_transform_v2(settings, is_train=False).transforms
        self._steps = steps[:-1]  # the last one normalises
        self.resize_mode: str = preprocess["resize_mode"]
        self.size_px = self.to_pixels(Image.new("RGB", (64, 48))).shape[-1]

    def to_pixels(self, image: Any) -> np.ndarray[Any, Any]:
        """Return one RGB picture as (3, S, S) float32 in 0..1. EXIF is ignored, as there."""
        for step in self._steps:
            image = step(image)
        return image.numpy()


class OpenClipTexts:
    """open_clip's tokenizer: truncates at the end and pads to its context length, always."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.inner: Any = getattr(tokenizer, "tokenizer", None)  # transformers' one, if any
        self.model_max_length: int = tokenizer.context_length
        self.truncation_side: str = getattr(self.inner, "truncation_side", "right")

    def __call__(self, texts: list[str], **_: Any) -> dict[str, Tensor]:
        """Return {"input_ids", "attention_mask"}: (M, L) int64 tensors."""
        ids = self.tokenizer(texts)
        padding = 0 if self.inner is None else self.inner.pad_token_id
        real = (ids != padding).long().flip(1).cummax(dim=1).values.flip(1)
        return {"input_ids": ids, "attention_mask": real}

    def definition(self) -> bytes:
        """Return what decides the ids."""
        about = [type(self.tokenizer).__name__, self.tokenizer.clean_fn.__name__]
        if self.inner is not None:
            return repr(about).encode() + vocabulary_of(self.inner)
        return json.dumps([about, sorted(self.tokenizer.encoder.items())]).encode()


def open_open_clip(
    spec: str,
    *,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    weights: Path | None = None,
) -> Encoder:
    """Open `open-clip:NAME/TAG`, or `open-clip:NAME` with the first weights that open_clip lists.

    weights: a file of them instead, which needs no network; never random ones. open_clip downloads
    and caches the rest.
    Raises ConfigError on an unknown name or tag, CheckpointError if the weights cannot be had or do
    not fit, MissingExtraError without open_clip.
    """
    open_clip = import_open_clip()
    name, _, tag = spec.removeprefix(PREFIX).partition("/")
    if name not in open_clip.list_models():
        near = get_close_matches(name, open_clip.list_models(), n=3)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"{spec}: open_clip has no model {name!r}{hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights is None and not tags:
        raise ConfigError(f"{spec}: open_clip lists no weights for {name}; give a file of them")
    if tag and weights is None and tag not in tags:
        raise ConfigError(f"{spec}: no such weights, expected one of {', '.join(tags)}")
    source = str(weights) if weights is not None else tag or tags[0]
    config = open_clip.get_model_config(name)
    # OpenAI's weights need another activation than most trained under the same name.
    if (open_clip.get_pretrained_cfg(name, source) or {}).get("quick_gelu"):
        config["quick_gelu"] = True
    logger.info("%s: %s of %d weights", spec, source, len(tags))
    with _load(spec):
        inner = open_clip.create_model(
            name,
            pretrained=source,
            precision=PRECISIONS[dtype],
            force_quick_gelu=config.get("quick_gelu", False),
            require_pretrained=True,
        )
        tokenizer = open_clip.get_tokenizer(name)
    named = f"{name}/{source if weights is None else weights.stem}"
    return _encoder(inner, config, tokenizer, device, name=named, folder=None)


def open_open_clip_folder(folder: Path, *, device: torch.device, dtype: torch.dtype) -> Encoder:
    """Open a folder as open_clip writes it. Raises CheckpointError, MissingExtraError."""
    open_clip = import_open_clip()
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["model_cfg"]
        text = config["text_cfg"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}/{CONFIG_NAME}: damaged, expected model_cfg with text_cfg "
            f"({type(error).__name__}: {first_line(error)})"
        ) from None
    if not [p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pth")]:
        raise CheckpointError(f"{folder}: no {WEIGHTS_NAME}, expected a folder of open_clip")
    if text.get("hf_tokenizer_name") and not (folder / "tokenizer_config.json").is_file():
        raise CheckpointError(f"{folder}: no tokenizer_config.json, but {CONFIG_NAME} needs it")
    with _load(str(folder)):
        inner = open_clip.create_model(
            f"local-dir:{folder}", precision=PRECISIONS[dtype], require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    return _encoder(inner, config, tokenizer, device, name=folder.resolve().name, folder=folder)


def _encoder(
    inner: Any,
    config: dict[str, Any],
    tokenizer: Any,
    device: torch.device,
    *,
    name: str,
    folder: Path | None,
) -> Encoder:
    model = OpenClipModel(inner, config).requires_grad_(False).to(device)
    pixels = OpenClipPixels(model.preprocess)
    return Encoder(model, pixels, OpenClipTexts(tokenizer), name=name, folder=folder)


def save_open_clip(encoder: Encoder, folder: Path) -> None:
    """Write a folder that opens offline here and with open_clip's own `local-dir:`.

    Raises CheckpointError if its text tower is one of transformers'.
    """
    model: OpenClipModel = encoder.model
    if source := model.config["text_cfg"].get("hf_model_name"):
        raise CheckpointError(
            f"{encoder.name}: its text tower {source} is built from the hub's files, so no folder "
            f"can hold it; expected one of open_clip's own models"
        )
    preprocess = {**model.preprocess, "size": _plain(model.preprocess["size"])}
    write_json(folder / CONFIG_NAME, {"model_cfg": model.config, "preprocess_cfg": preprocess})
    save_model(model.inner, str(folder / WEIGHTS_NAME), metadata={"format": "pt"})
    if (inner := encoder.tokenizer.inner) is not None:
        inner.save_pretrained(folder)


def _plain(size: Any) -> Any:
    return list(size) if isinstance(size, tuple) else size


@contextmanager
def _load(what: str) -> Iterator[None]:
    """Silence open_clip, which logs to the root and sets that up; make any error one line."""
    root = logging.getLogger()
    handlers, disabled = list(root.handlers), root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:  # a damaged file may raise anything
        reason = first_line(error).partition(". ")[0]
        raise CheckpointError(
            f"{what}: open_clip cannot open it ({reason}); check the files, or the network if they "
            f"have to come from there"
        ) from None
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
