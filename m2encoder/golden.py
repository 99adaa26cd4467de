"""Golden vectors: what a model made of a few fixed texts and pictures when its folder was written.

Compared with what it makes of them now, they tell whether weights, preprocessing and arithmetic are
still the same. Not for the published figures of the released models (anchor.py).
"""

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError

GOLDEN = "golden.json"
TEXTS = (
    "一只红色的猫坐在窗台上",
    "繁體中文：貓與狗",
    "Ｆｕｌｌ　ｗｉｄｔｈ，１２３！",
    "a photo of a red cat",
    "图中有 three 个 circles",
    "👨‍👩‍👧‍👦 🐱 emoji",
    "a red cat sits on a blue sofa, 一只红色的猫坐在蓝色的沙发上, " * 12,
    "猫",
)
TOLERANCES = {"float32": 1e-5, "tf32": 1e-3, "float16": 2e-3, "bfloat16": 2e-2}
"""What a component of a unit vector may differ by, by the precision that computed it.

At least eight times what was seen with random weights of the 0.4B shape: 1.4e-7 between threads,
batches and kernels in float32 on a CPU; from there to TF32 (simulated) 1.2e-4, to float16 2.2e-4,
to bfloat16 2.1e-3. Trained weights and deeper models need some room above that.
"""
KINDS = ("text", "image", "logit_scale")


@dataclass(frozen=True)
class GoldenReport:
    """How far an encoder is from its golden vectors."""

    differences: dict[str, float]
    """By kind: the largest absolute difference of a component; relative for `logit_scale`."""
    worst: str
    """The item with the largest difference."""
    tolerance: float
    """What a difference may be, by the wider of both precisions."""

    @property
    def ok(self) -> bool:
        """True if no difference is over the tolerance; a NaN is."""
        return all(value <= self.tolerance for value in self.differences.values())

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "ok": self.ok}


def write_golden(encoder: Encoder, folder: Path) -> None:
    """Write `folder/golden.json`: vectors of what the encoder has towers for, and how they came."""
    items = golden_vectors(encoder, TEXTS)
    content = {
        "made_with": {
            "precision": _precision(encoder),
            "device": encoder.device.type,
            **{name: version(name) for name in ("torch", "transformers", "pillow", "numpy")},
        },
        "logit_scale": encoder.logit_scale,
        **{kind: {name: _exact(row) for name, row in rows.items()} for kind, rows in items.items()},
    }
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"
    (folder / GOLDEN).write_text(text, encoding="utf-8")


def check_golden(encoder: Encoder, folder: Path) -> GoldenReport:
    """Compare an encoder with the golden vectors in `folder`, as far as it has the towers for them.

    Raises CheckpointError if there are none, or they are damaged or of another width.
    """
    golden = _read(folder / GOLDEN)
    found = golden_vectors(encoder, list(golden["text"]))
    scale = golden["logit_scale"]
    distances = {("logit_scale", ""): abs(encoder.logit_scale - scale) / abs(scale)}
    for kind, rows in found.items():
        for name, row in rows.items():
            if name not in golden[kind]:
                continue
            want = np.asarray(golden[kind][name], dtype=np.float32)
            if want.shape != row.shape:
                raise CheckpointError(
                    f"{folder / GOLDEN}: {kind} {name!r} has {want.size} components, this model "
                    f"gives {row.size}; save the model again"
                )
            distances[kind, name] = float(np.abs(row - want).max())
    by_kind = {kind: [d for (k, _), d in distances.items() if k == kind] for kind in KINDS}
    kind, name = max(distances, key=lambda item: np.nan_to_num(distances[item], nan=np.inf))
    return GoldenReport(
        {kind: float(np.max(found)) for kind, found in by_kind.items() if found},
        f"{kind} {name[:60]!r}" if name else "logit scale",
        max(TOLERANCES[_precision(encoder)], TOLERANCES[golden["made_with"]["precision"]]),
    )


def golden_vectors(
    encoder: Encoder, texts: Sequence[str]
) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """Return {"text": {text: vector}, "image": {picture's name: vector}}, (dim,) float32 each.

    Either is empty where the encoder has no tower for it, or no tokenizer. No dropout meanwhile.
    """
    training = [module for module in encoder.model.modules() if module.training]
    encoder.model.eval()
    try:
        return _vectors(encoder, texts)
    finally:
        for module in training:
            module.training = True


def _vectors(encoder: Encoder, texts: Sequence[str]) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    quiet = copy.copy(encoder)
    quiet._told_of_truncation = True  # the long text is no user's
    towers = encoder.model.config.towers
    vectors: dict[str, dict[str, np.ndarray[Any, Any]]] = {"text": {}, "image": {}}
    if towers != "image" and encoder.tokenizer is not None and texts:
        rows = quiet.encode_text(list(texts), show_progress=False)
        vectors["text"] = dict(zip(texts, rows, strict=True))
    if towers != "text":
        pictures = golden_pictures()
        rows = quiet.encode_image(list(pictures.values()), show_progress=False)
        vectors["image"] = dict(zip(pictures, rows, strict=True))
    return vectors


def golden_pictures() -> dict[str, Image.Image]:
    """Return the pictures by name, from integer arithmetic alone: the same bytes everywhere."""

    def grid(width: int, height: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        y, x = np.indices((height, width), dtype=np.int64)
        return x, y

    x, y = grid(64, 48)
    gradient = [x * 255 // 63, y * 255 // 47, (x + y) * 255 // 110]
    x, y = grid(41, 97)
    tiles = (x // 7 + y // 5) % 2
    checks = [tiles * 220 + 20, (1 - tiles) * 180 + 40, tiles * 90]
    x, y = grid(300, 200)
    inside = (x - 150) ** 2 + (y - 100) ** 2 < 80**2
    disc = [inside * 190 + 40, (1 - inside) * 120 + 30, y * 255 // 199]
    x, y = grid(224, 224)
    noise = [(x * 7919 + y * 104729 + x * y * k) // 64 % 256 for k in (31, 37, 41)]
    named = {"gradient": gradient, "checks": checks, "disc": disc, "noise": noise}
    return {
        name: Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))
        for name, channels in named.items()
    }


def _exact(row: np.ndarray[Any, Any]) -> list[float]:
    """Return float32 numbers with the nine digits that give them back."""
    return [float(f"{value:.9g}") for value in row]


def _precision(encoder: Encoder) -> str:
    """Return a key of TOLERANCES; accelerators may round float32 products to 10 bits (TF32)."""
    dtype = str(encoder.model.dtype).removeprefix("torch.")
    return "tf32" if dtype == "float32" and encoder.device.type != "cpu" else dtype


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent}: no {path.name}, so there is nothing to compare with; save the model "
            f"again to write one"
        )
    try:
        golden = json.loads(path.read_text(encoding="utf-8"))
        assert golden["made_with"]["precision"] in TOLERANCES
        for kind in ("text", "image"):
            for row in golden[kind].values():
                np.asarray(row, dtype=np.float32)
        float(golden["logit_scale"])
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: damaged ({reason}); save the model again") from None
    return golden
