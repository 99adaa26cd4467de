"""Open a model folder as those who do not have m2encoder do, and compare with load_model's vectors.

check_folder.py FOLDER EXPECTED.npz: run by the Python of an environment that holds transformers and
sentence-transformers but not m2encoder. Prints one line per consumer; exit code 1 if one is off.
EXPECTED.npz: texts, text (M, dim), image (N, dim), scale, and picture_0, picture_1, ... (H, W, 3).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    __version__,
    pipeline,
)

TRUST: dict[str, Any] = {"trust_remote_code": True}
TASK = "zero-shot-image-classification"
Vectors = dict[str, np.ndarray]


class Case:
    """A folder, and what load_model made of some texts and pictures with it."""

    def __init__(self, folder: str, expected: Path) -> None:
        self.folder = folder
        given = dict(np.load(expected))
        self.texts: list[str] = json.loads(str(given["texts"]))
        count = len(given["image"])
        self.pictures = [Image.fromarray(given[f"picture_{i}"]) for i in range(count)]
        logits = given["scale"] * (given["image"] @ given["text"].T)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        self.want: Vectors = {
            "text": given["text"],
            "image": given["image"],
            "logits": logits,
            "scores": odds / odds.sum(axis=1, keepdims=True),
        }


def numpy(tensor: torch.Tensor) -> np.ndarray:
    assert tensor.dtype == torch.float32, f"computed in {tensor.dtype}, expected float32"
    return tensor.detach().numpy()


def auto_model(case: Case) -> Vectors:
    """AutoModel with AutoProcessor, which truncates."""
    model = AutoModel.from_pretrained(case.folder, **TRUST)
    processor = AutoProcessor.from_pretrained(case.folder, **TRUST)
    found = model(**processor(images=case.pictures, text=case.texts))
    return {"text": numpy(found.text_embeds), "image": numpy(found.image_embeds)}


def auto_parts(case: Case) -> Vectors:
    """AutoModelForZeroShotImageClassification with AutoTokenizer, padding only."""
    model = AutoModelForZeroShotImageClassification.from_pretrained(case.folder, **TRUST)
    tokenizer = AutoTokenizer.from_pretrained(case.folder, **TRUST)
    images = AutoImageProcessor.from_pretrained(case.folder, **TRUST)
    texts = tokenizer(case.texts, padding=True, return_tensors="pt")
    found = model(**texts, **images(case.pictures, return_tensors="pt"))
    return {
        "text": numpy(found.text_embeds),
        "image": numpy(found.image_embeds),
        "logits": numpy(found.logits_per_image),
    }


def zero_shot(case: Case) -> Vectors:
    """The pipeline, with bare labels, one of them long; and what its own parts give."""
    classify: Any = pipeline(TASK, model=case.folder, **TRUST)
    ranked = classify(case.pictures, candidate_labels=case.texts, hypothesis_template="{}")
    by_label = [{item["label"]: item["score"] for item in items} for items in ranked]
    texts = classify.tokenizer(case.texts, padding=True, return_tensors="pt")
    images = classify.image_processor(images=case.pictures, return_tensors="pt")
    found = classify.model(**texts, **images)
    return {
        "text": numpy(found.text_embeds),
        "image": numpy(found.image_embeds),
        "scores": np.array([[scores[text] for text in case.texts] for scores in by_label]),
    }


def sentence_transformer(case: Case) -> Vectors:
    """SentenceTransformer, which gives unit vectors of texts and of pictures."""
    from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]

    model = SentenceTransformer(case.folder, device="cpu", **TRUST)
    text, image = model.encode(case.texts), model.encode(case.pictures)
    assert model.similarity_fn_name == "cosine"
    assert model.get_embedding_dimension() == text.shape[1]
    return {"text": np.asarray(text), "image": np.asarray(image)}


CONSUMERS: dict[str, Callable[[Case], Vectors]] = {
    "AutoModel": auto_model,
    "AutoModelForZeroShotImageClassification": auto_parts,
    "pipeline": zero_shot,
    "SentenceTransformer": sentence_transformer,
}
LOGIT_SCALE = 100.0  # logits are this many times a cosine at most, of vectors right to atol


def compare(found: Vectors, want: Vectors, atol: float) -> tuple[str, bool]:
    """Return "text 1e-07, image ..." and whether all of it is within the tolerance."""
    words, ok = [], True
    for kind, value in found.items():
        assert value.shape == want[kind].shape, f"{kind}: {value.shape}, not {want[kind].shape}"
        worst = float(np.abs(value - want[kind]).max())
        ok &= worst <= (atol if kind in ("text", "image") else atol * LOGIT_SCALE)
        words.append(f"{kind} {worst:.1e}")
    return ", ".join(words), ok


def main() -> int:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("expected", type=Path)
    parser.add_argument("--atol", type=float, default=1e-6, help="of a component of a vector")
    options = parser.parse_args()
    if find_spec("m2encoder") is not None:
        print("m2encoder can be imported here, so this would prove nothing")  # noqa: T201 - a script
        return 1
    case, failed = Case(options.folder, options.expected), False
    for name, consumer in CONSUMERS.items():
        try:
            with torch.inference_mode():
                words, ok = compare(consumer(case), case.want, options.atol)
        except Exception as error:  # one consumer's failure must not hide the others
            words, ok = f"{type(error).__name__}: {error}", False
        failed |= not ok
        print(f"transformers {__version__} {name}: {words}: {'ok' if ok else 'OFF'}")  # noqa: T201
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
