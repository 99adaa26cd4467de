"""`m2enc models`: name the released models, describe a model folder, mix two of them.

Not for comparing a model with its golden vectors (verify.py). Weights are described from their
headers, never loaded.
"""

import math
import os
import struct
from dataclasses import asdict
from json import JSONDecodeError, dumps, loads
from pathlib import Path
from typing import TYPE_CHECKING, Any

from m2encoder.errors import CheckpointError

if TYPE_CHECKING:
    from m2encoder.sources import ModelInfo

EXTRAS = "released_extras.safetensors"
ALSO = ("sp.model", "golden.json", "modules.json", "results.json")
"""Files that a model folder can do without, named where they are."""


def ls(*, json: bool = False) -> int:
    """Name the released models, and whether they have been fetched.

    Args:
        json: Print JSON instead of a table.
    """
    from m2encoder.sources import list_models

    models = list_models()
    if json:
        print(dumps([_plain(model) for model in models], ensure_ascii=False, indent=2))
        return 0
    rows = [("model", "parameters", "embedding", "pictures", "tokens", "languages", "fetched")]
    rows += [
        (m.name, f"{m.parameters:,}", str(m.dim), f"{m.image_size} px", str(m.max_text_length),
         " ".join(m.languages), "yes" if m.cached else "no")
        for m in models
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())
    return 0


def info(model: str, *, json: bool = False) -> int:
    """Describe a released model or a model folder: size, inputs, licence, files.

    Args:
        model: A model folder, or the name of a released model.
        json: Print JSON instead of lines.
    """
    from m2encoder.sources import list_models

    known = {m.name: m for m in list_models()}
    if os.path.isdir(model):  # unlike Path.is_dir, False on names that are too long to be one
        facts = describe_folder(Path(model))
        lines = _folder_lines(facts)
    elif model in known:
        facts = _plain(known[model])
        lines = _release_lines(known[model])
    else:
        raise CheckpointError(
            f"{model}: neither a model folder nor a released model; check the path, or take one of "
            f"{', '.join(known)}"
        )
    if json:
        print(dumps(facts, ensure_ascii=False, indent=2))
    else:
        print("\n".join(f"{name + '  ':<14}{value}" for name, value in lines if value))
    return 0


def interpolate(start: str, end: str, out: Path, *, share: float = 0.5) -> int:
    """Write the model between two of the same shape, such as a fine-tuned one and its start.

    Args:
        start: A model folder, or the name of a released model.
        end: The same; preprocessing and tokenizer are this one's.
        out: The model folder to write.
        share: How far to go: 0 is start, 1 is end (WiSE-FT, arXiv 2109.01903).
    """
    from m2encoder.interpolate import write_interpolated

    write_interpolated(start, end, out, share=share)
    print(out)
    return 0


def describe_folder(folder: Path) -> dict[str, Any]:
    """Return what a model folder holds as plain values; None where it does not say.

    Raises CheckpointError if it is no model folder, or a file in it is damaged.
    """
    from m2encoder.sources import sha256_of

    config = _read_json(folder / "config.json")
    weights = {path.name: read_header(path) for path in sorted(folder.glob("model*.safetensors"))}
    extras = {EXTRAS: read_header(folder / EXTRAS)} if (folder / EXTRAS).is_file() else {}
    card = _card_metadata(folder / "README.md")
    languages = card.get("language")
    return {
        "name": folder.resolve().name,
        "folder": str(folder),
        "model_type": config.get("model_type"),
        "parameters": sum(map(_count, weights.values())),
        "extra_parameters": sum(map(_count, extras.values())),
        "dtypes": sorted({t["dtype"] for header in weights.values() for t in header.values()}),
        "dim": config.get("projection_dim"),
        "image_size": config.get("image_size"),
        "max_text_length": config.get("max_text_length"),
        **_text_settings(folder),
        "languages": [languages] if isinstance(languages, str) else languages,
        "licence": card.get("license_name") or card.get("license"),
        "weights": {
            name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
            for name in weights | extras
        },
        "also": [name for name in ALSO if (folder / name).is_file()],
    }


def read_header(path: Path) -> dict[str, Any]:
    """Return name to {dtype, shape, data_offsets} of a safetensors file, without its tensors.

    Raises CheckpointError if the file is damaged or shorter than its header says.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            tensors = loads(file.read(min(length, size)))
        tensors.pop("__metadata__", None)
        expected = 8 + length + max((t["data_offsets"][1] for t in tensors.values()), default=0)
    except (struct.error, ValueError, AttributeError, KeyError, TypeError):
        raise CheckpointError(f"{path}: no safetensors header; is the file damaged?") from None
    if size != expected:
        raise CheckpointError(f"{path}: has {size:,} bytes, expected {expected:,}; copy it again")
    return tensors


def _count(header: dict[str, Any]) -> int:
    return sum(math.prod(tensor["shape"]) for tensor in header.values())


def _text_settings(folder: Path) -> dict[str, Any]:
    """Return how texts are cut and normalised; empty without a fast tokenizer."""
    if not (folder / "tokenizer.json").is_file():
        return {"truncation_side": None, "text_normalization": None}
    from transformers import PreTrainedTokenizerFast

    from m2encoder.text_normalization import get_text_normalization

    settings = _read_json(folder / "tokenizer_config.json")
    try:
        fast = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    except Exception:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"{folder}/tokenizer.json: damaged, not a tokenizer") from None
    return {
        "truncation_side": settings.get("truncation_side", "right"),
        "text_normalization": get_text_normalization(fast),
    }


def _card_metadata(card: Path) -> dict[str, Any]:
    """Return the YAML at the top of a model card; empty without one."""
    import yaml

    if not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n")
    if len(parts) < 3 or parts[0]:
        return {}
    try:
        head = yaml.safe_load(parts[1])
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{card}: its head is not YAML ({reason})") from None
    return head if isinstance(head, dict) else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: no {path.name}, expected a model folder") from None
    except (JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: holds a {type(values).__name__}, expected an object")
    return values


def _plain(model: "ModelInfo") -> dict[str, Any]:
    return asdict(model) | {"folder": str(model.folder)}


def _release_lines(model: "ModelInfo") -> list[tuple[str, str]]:
    return [
        ("name", model.name),
        ("parameters", f"{model.parameters:,}; {model.extra_parameters:,} more never used"),
        ("embedding", str(model.dim)),
        ("pictures", f"{model.image_size} x {model.image_size} pixels"),
        ("texts", f"up to {model.max_text_length} tokens"),
        ("languages", ", ".join(model.languages)),
        ("licence", model.licence),
        *(("source", f"{source} ({source.known_from})") for source in model.sources),
        ("fetched", f"yes, {model.folder}" if model.cached else "no"),
    ]  # fmt: skip


def _folder_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    size, tokens = facts["image_size"], facts["max_text_length"]
    extra = facts["extra_parameters"]
    texts = [
        f"up to {tokens} tokens" if tokens else "",
        f"{facts['truncation_side']} truncation" if facts["truncation_side"] else "",
        f"normalisation {facts['text_normalization']}" if facts["text_normalization"] else "",
    ]
    return [
        ("name", facts["name"]),
        ("folder", facts["folder"]),
        ("model type", facts["model_type"] or ""),
        ("parameters", f"{facts['parameters']:,} ({', '.join(facts['dtypes'])})"
                       + (f"; {extra:,} more never used" if extra else "")),
        ("embedding", str(facts["dim"] or "")),
        ("pictures", f"{size} x {size} pixels" if size else ""),
        ("texts", ", ".join(filter(None, texts))),
        ("languages", ", ".join(facts["languages"] or [])),
        ("licence", facts["licence"] or "not stated"),
        *((name, f"{file['bytes']:,} bytes, sha256 {file['sha256']}")
          for name, file in facts["weights"].items()),
        ("also", ", ".join(facts["also"])),
    ]  # fmt: skip
