"""A model folder: open one as an Encoder, write one that opens everywhere.

Not for names, released checkpoints and other families (load.py), training checkpoints
(checkpoint.py) or uploads (publish.py).
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from m2encoder.calibration import keep_calibration
from m2encoder.card import is_unchanged, write_card
from m2encoder.compat import import_timm
from m2encoder.encoder import Encoder
from m2encoder.errors import CheckpointError, DataError
from m2encoder.folders import complete_folder, write_json
from m2encoder.golden import write_golden
from m2encoder.model.configuration_m2encoder import M2EncoderConfig, Towers
from m2encoder.model.image_processing_m2encoder import M2EncoderImageProcessor
from m2encoder.model.modeling_m2encoder import M2Encoder
from m2encoder.model.processing_m2encoder import M2EncoderProcessor
from m2encoder.quiet import first_line, quiet_transformers
from m2encoder.tokenizer import write_tokenizer_class

WEIGHTS = "model.safetensors"
"""The weights, unless they lie in several files; then an index beside them says which."""
PICTURES_AND_TEXTS = "processor_config.json"
PICTURES_ONLY = "preprocessor_config.json"
EXTRAS = "released_extras.safetensors"
"""Beside a converted model's weights: what its checkpoint carries and inference never uses."""
TEXT_FILES = (PICTURES_AND_TEXTS, "tokenizer.json", "tokenizer_config.json")
OURS = re.compile(
    r"model[\w.-]*\.safetensors|released_extras\.safetensors|sp\.model|README\.md"
    r"|\w+\.(json|py)|model\.safetensors\.index\.json|__pycache__|\.cache"
)
"""Names that a model folder may hold and that saving again may replace."""
SENTENCE_TRANSFORMERS = "sentence_transformers.models"
"""The old name of its modules; the new ones are not the same in 5.7 and 6.2."""


# ── open ────────────────────────────────────────────────────────────────────────────────────────


def open_folder(
    folder: Path,
    *,
    device: torch.device,
    dtype: str,
    towers: Towers = "both",
    image_size: int | None = None,
) -> Encoder:
    """Open a model folder. Raises CheckpointError if it is damaged or holds another model.

    Weights stored in `dtype` stay mapped to their file; others need the memory of their copy and
    of one tensor more.
    """
    _check_folder(folder)
    model = _load_weights(folder, dtype, towers)
    processor, tokenizer = _load_preprocessing(folder)
    if processor.size_px != (size := model.config.image_size):
        raise CheckpointError(
            f"{folder}: processor_config.json makes pictures of {processor.size_px} pixels, "
            f"config.json expects {size}; were they saved together?"
        )
    if image_size is not None:
        model.set_image_size(image_size)
        processor.size_px = image_size
    model.requires_grad_(False).to(device)  # pyright: ignore[reportArgumentType]
    return Encoder(model, processor, tokenizer, name=folder.resolve().name, folder=folder)


def _check_folder(folder: Path) -> None:
    index = folder / (WEIGHTS + ".index.json")
    textless = (folder / PICTURES_ONLY).is_file() and not any(
        (folder / name).is_file() for name in TEXT_FILES
    )
    for name in ("config.json", WEIGHTS, *(() if textless else TEXT_FILES)):
        if not (folder / name).is_file() and not (name == WEIGHTS and index.is_file()):
            raise CheckpointError(
                f"{folder}: no {name}, expected a model folder as `m2enc pretrain` exports it"
            )
    config = _read_json(folder / "config.json")
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "m2_encoder":
        raise CheckpointError(f"{folder}: model_type is {kind!r}, expected 'm2_encoder'")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None


def _load_weights(folder: Path, dtype: str, towers: Towers) -> M2Encoder:
    tensors = read_tensors(folder, getattr(torch, dtype), towers)
    try:
        with quiet_transformers():
            config = M2EncoderConfig.from_pretrained(folder, towers=towers)
            if config.image_tower is not None and towers != "text":
                import_timm()  # says what to install where it is absent
            model, info = cast(Any, M2Encoder.from_pretrained)(
                None,
                config=config,
                state_dict=tensors,
                dtype=getattr(torch, dtype),
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # named below, with both shapes
            )
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder}: cannot load its weights ({first_line(error)})") from None
    shapes = model.state_dict()
    # names; since transformers 5 with both shapes
    misfits = [entry if isinstance(entry, str) else entry[0] for entry in info["mismatched_keys"]]
    for what, items in (
        ("lacks", info["missing_keys"]),
        ("has unexpected", info["unexpected_keys"]),
        (
            "does not fit config.json:",
            [
                f"{name} has shape {tuple(tensors[name].shape)}, expected "
                f"{tuple(shapes[name].shape)}"
                for name in misfits
            ],
        ),
    ):
        if names := sorted(map(str, items)):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{folder}/model.safetensors {what} {', '.join(names[:3])}{more}; was it saved "
                f"by another model?"
            )
    return model


def read_tensors(
    folder: Path, dtype: torch.dtype | None = None, towers: Towers = "both"
) -> dict[str, Tensor]:
    """Return the tensors of the wanted towers, floating-point ones in `dtype` if it is given."""
    absent = {"both": (), "image": ("text.", "text_"), "text": ("image.", "image_")}[towers]
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, "pt") as file:
                names = [name for name in file.keys() if not name.startswith(absent)]  # noqa: SIM118
            for name in names:
                # Opened for each anew: a mapping keeps every page that was read through it.
                with safe_open(path, "pt") as file:
                    tensor: Tensor = file.get_tensor(name)
                tensors[name] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
        except Exception as error:  # safetensors' own error type has no public name
            if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
                raise
            raise CheckpointError(f"{path}: damaged file ({first_line(error)})") from None
    return tensors


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / (WEIGHTS + ".index.json")
    content = _read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise CheckpointError(f"{index}: damaged (it names no files of weights)")
    files = [folder / str(name) for name in sorted(set(names.values()))]
    for path in files:
        if not path.is_file():
            raise CheckpointError(f"{folder}: no {path.name}, which {index.name} names")
    return files


def _load_preprocessing(
    folder: Path,
) -> tuple[M2EncoderImageProcessor, PreTrainedTokenizerFast | None]:
    tokenizer = None
    try:
        processor = M2EncoderImageProcessor.from_pretrained(folder)
        if (folder / PICTURES_AND_TEXTS).is_file():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    except Exception as error:  # a damaged file may raise anything, from KeyError to Rust's own
        reason = first_line(error)
        raise CheckpointError(f"{folder}: cannot read its preprocessing ({reason})") from None
    assert isinstance(processor, M2EncoderImageProcessor)
    return processor, tokenizer


# ── write ───────────────────────────────────────────────────────────────────────────────────────


def save_model_folder(
    encoder: Encoder,
    folder: Path,
    *,
    sp_model: bytes | None = None,
    license: str | None = None,
    repo_id: str | None = None,
    max_shard_size: str = "5GB",
    golden: bool = True,
) -> None:
    """Write all that `load_model`, transformers and sentence-transformers need, or nothing.

    An older model folder is replaced once everything is written. Weights keep their dtype; whoever
    opens them computes in float32 unless asked for another. A calibration comes along while it
    fits the weights.
    sp_model: serves further training; by default the one in the folder that `encoder` is from,
        whose unused released tensors come along too.
    license: SPDX name for the card; without one the card says that none is stated.
    repo_id: the repository that the card's examples open; by default a path to fill in.
    max_shard_size: weights above it take several files.
    golden: whether to write golden vectors, which takes a forward pass of each tower.
    Raises DataError if the folder holds other files or cannot be written.
    """
    check_only_ours(folder)
    sp_model = sp_model or _sp_model_of(encoder)
    with complete_folder(folder, marker="config.json") as new:
        _write_weights(encoder, new, max_shard_size)
        _write_preprocessing(encoder, new)
        _write_sentence_transformers(encoder, new)
        if sp_model is not None:
            (new / "sp.model").write_bytes(sp_model)
        for name in (EXTRAS, *(["results.json"] if is_unchanged(encoder) else [])):
            if encoder.folder is not None and (encoder.folder / name).is_file():
                shutil.copy(encoder.folder / name, new / name)
        keep_calibration(encoder, new)
        if golden:
            write_golden(encoder, new)
        write_card(encoder, new, repo_id=repo_id, license=license)


def check_only_ours(folder: Path) -> None:
    """Raise DataError if replacing `folder` would lose files that no model folder has."""
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if strangers := [name for name in found if not OURS.fullmatch(name)]:
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        raise DataError(
            f"{folder}: holds other files ({', '.join(strangers[:3])}{more}), they would be lost; "
            f"choose another folder"
        )


def _sp_model_of(encoder: Encoder) -> bytes | None:
    path = encoder.folder / "sp.model" if encoder.folder else None
    return path.read_bytes() if path and path.is_file() and encoder.tokenizer else None


def _write_weights(encoder: Encoder, folder: Path, max_shard_size: str) -> None:
    if encoder.tokenizer is not None:
        encoder.model.config.truncation_side = encoder.tokenizer.truncation_side
    try:
        with quiet_transformers():
            encoder.model.save_pretrained(folder, max_shard_size=max_shard_size)
    except Exception as error:  # safetensors' own error type has no public name
        if type(error).__name__ != "SafetensorError":
            raise
        raise OSError(first_line(error)) from None
    for path in folder.glob("*.safetensors"):  # written for their owner alone
        shutil.copymode(folder / "config.json", path)
    # transformers 5 computes in what is written here, and 4.57 in float32 whatever it says.
    write_json(folder / "config.json", {**_read_json(folder / "config.json"), "dtype": "float32"})


def _write_preprocessing(encoder: Encoder, folder: Path) -> None:
    if encoder.tokenizer is None:
        encoder.image_processor.save_pretrained(folder)
        return
    M2EncoderProcessor(encoder.image_processor, encoder.tokenizer).save_pretrained(folder)
    write_tokenizer_class(folder)


def _write_sentence_transformers(encoder: Encoder, folder: Path) -> None:
    """Write what sentence-transformers reads: which method takes what, and that vectors are unit.

    Nothing without a tokenizer, which it cannot do without.
    """
    if encoder.tokenizer is None:
        return
    kinds = {"both": ("text", "image")}.get(
        encoder.model.config.towers, (encoder.model.config.towers,)
    )
    write_json(
        folder / "sentence_bert_config.json",
        {
            "transformer_task": "feature-extraction",
            "modality_config": {
                kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"}
                for kind in kinds
            },
            "module_output_name": "sentence_embedding",
        },
    )
    modules = {"": "Transformer", "1_Normalize": "Normalize"}
    write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": f"{SENTENCE_TRANSFORMERS}.{module}"}
            for i, (path, module) in enumerate(modules.items())
        ],
    )
    write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
