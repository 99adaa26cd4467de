"""Let LAION's CLIP_benchmark measure models that `load_model` opens, to compare its numbers.

    python -m m2encoder.eval.clip_benchmark eval --model_type m2encoder --model FOLDER ...

takes every option of CLIP_benchmark's own command line (1.6.2; `--pretrained` means nothing here).
Its zero-shot metrics fail with NumPy 2.4 and newer. Not for our own suites (tasks.py).
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from m2encoder.encoder import Encoder
from m2encoder.errors import MissingExtraError
from m2encoder.images import open_image
from m2encoder.load import load_model

MODEL_TYPE = "m2encoder"


class BenchmarkModel(nn.Module):
    """An Encoder behind the two methods that CLIP_benchmark calls."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.model = encoder.model

    def encode_image(self, images: Tensor) -> Tensor:
        """images: (B, 3, S, S) in 0..1. Returns (B, P), unit norm."""
        return self.model.encode_image(images)

    def encode_text(self, texts: Tensor) -> Tensor:
        """texts: (M, 2, L) int64, ids and attention mask. Returns (M, P), unit norm."""
        return self.model.encode_text(texts[:, 0], texts[:, 1])


class BenchmarkTokenizer:
    """Texts to one tensor, because CLIP_benchmark moves what it gets to the device."""

    def __init__(self, encoder: Encoder) -> None:
        self.tokenizer = encoder.needed_tokenizer()

    def __call__(self, texts: str | list[str]) -> Tensor:
        """Return (M, 2, L) int64: ids and attention mask, truncated and padded."""
        many = [texts] if isinstance(texts, str) else list(texts)
        found = self.tokenizer(many, padding=True, truncation=True, return_tensors="pt")
        return torch.stack([found["input_ids"], found["attention_mask"]], dim=1)


def load_for_benchmark(
    model_name: str, pretrained: str = "", cache_dir: str | None = None, device: Any = "cpu"
) -> tuple[BenchmarkModel, Any, BenchmarkTokenizer]:
    """Return (model, transform of one Pillow image, tokenizer), as CLIP_benchmark loads models.

    model_name: what load_model takes. pretrained and cache_dir are CLIP_benchmark's and unused.
    """
    encoder = load_model(model_name, device=str(device))

    def transform(image: Any) -> Tensor:
        return torch.from_numpy(encoder.image_processor.to_pixels(open_image(image)))

    return BenchmarkModel(encoder), transform, BenchmarkTokenizer(encoder)


def register() -> None:
    """Add the model type `m2encoder` to CLIP_benchmark. Raises MissingExtraError without it."""
    if find_spec("clip_benchmark") is None:
        raise MissingExtraError("clip-benchmark", extra="peers")
    models = import_module("clip_benchmark.models")
    models.TYPE2FUNC[MODEL_TYPE] = load_for_benchmark
    if MODEL_TYPE not in models.MODEL_TYPES:  # the list that its command line checks
        models.MODEL_TYPES.append(MODEL_TYPE)


if __name__ == "__main__":
    register()
    sys.exit(import_module("clip_benchmark.cli").main())
