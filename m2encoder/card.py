"""The model card (README.md) of a model folder: metadata for the Hub, use, shape, training.

Written from the encoder and the run themselves. Not for the cards of released models
(model_cards/).
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from m2encoder.config import PretrainConfig
from m2encoder.encoder import Encoder
from m2encoder.golden import GOLDEN, TEXTS, golden_pictures
from m2encoder.shards import ShardIndex

PATH = "path/to/this/folder"
TASKS = {
    "both": "zero-shot-image-classification",
    "image": "image-feature-extraction",
    "text": "sentence-similarity",
}
"""The Hub's name for what a model with these towers is for."""
TAGS = ["m2encoder", "clip", "image-text-retrieval", "sentence-transformers", "custom_code"]


def write_card(
    encoder: Encoder,
    folder: Path,
    *,
    repo_id: str | None = None,
    license: str | None = None,
    sections: Sequence[str] = (),
) -> None:
    """Write `folder/README.md`: metadata, how to open the model, its shape, then `sections`.

    repo_id: the repository that the examples open; None is a path to fill in.
    license: as the Hub spells it (`apache-2.0`); None is `unknown`.
    sections: by default those about training and results of the folder that `encoder` was opened
        from, if its weights are unchanged.
    """
    data = ModelCardData(
        language=["zh", "en"],
        license=license or "unknown",
        library_name="transformers",
        pipeline_tag=TASKS[encoder.model.config.towers],
        tags=TAGS,
    )
    ours, theirs = (f"hf:{repo_id}", repo_id) if repo_id else (PATH, PATH)
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {encoder.name}\n",
        "An image-text encoder for Chinese and English, saved by m2encoder.\n",
        _use(encoder, ours, theirs),
        _shape(encoder),
        f"## Check\n\n`{GOLDEN}` holds the vectors that this model gave of {len(TEXTS)} fixed "
        f"texts and {len(golden_pictures())} pictures made by formula. "
        f"`m2enc models verify {ours}` compares them with those that it gives now.\n",
        *(sections or _kept_sections(encoder)),
        "## Licence\n\n"
        + (
            f"{license}.\n" if license else "None is stated for these weights; ask who made them.\n"
        ),
    ]
    (folder / "README.md").write_text("\n".join(parts), encoding="utf-8")


def is_unchanged(encoder: Encoder) -> bool:
    """Whether this is an opened folder's model as it was: training first sets requires_grad."""
    return encoder.folder is not None and not any(
        parameter.requires_grad for parameter in encoder.model.parameters()
    )


def _kept_sections(encoder: Encoder) -> list[str]:
    """Return what the card of an opened, unchanged model says of its training and results."""
    card = encoder.folder / "README.md" if encoder.folder and is_unchanged(encoder) else None
    if card is None or not card.is_file():
        return []
    text = card.read_text(encoding="utf-8")
    found = re.search(r"(?ms)^## (Training|Results)\n.*?(?=^## Licence\n|\Z)", text)
    return [found[0]] if found else []


def write_model_card(
    folder: Path, cfg: PretrainConfig, encoder: Encoder, results: Mapping[str, float]
) -> None:
    """Write the card of a trained model: also its data, settings and the last evaluation."""
    folders = [Path(source.path) for source in cfg.data.train_sources]
    indexes = [ShardIndex.load(folder) for folder in folders if folder.is_dir()]
    length = f"{cfg.epochs:g} epochs" if cfg.steps is None else f"{cfg.steps:,} steps"
    sections = [
        f"## Training\n\n{_trained_on(cfg, indexes)}; {length} in "
        f"batches of {cfg.data.batch_size}; seed {cfg.seed}. Objectives: "
        f"{', '.join(f'{o.name} (weight {o.weight:g})' for o in cfg.objectives)}.\n"
    ]
    if named := sorted({index.attribution for index in indexes if index.attribution}):
        lines = "\n\n".join(named)
        sections.append(f"## Attribution of the training pictures\n\n{lines}\n")
    if results:
        rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(results.items()))
        sections.append(
            f"## Results\n\nMeasured on `{cfg.evaluate.data}` at the end of training.\n\n"
            f"| measure | value |\n|---|---|\n{rows}\n"
        )
    write_card(encoder, folder, sections=sections)
    if results:
        text = json.dumps(dict(results), indent=2, ensure_ascii=False) + "\n"
        (folder / "results.json").write_text(text, encoding="utf-8")


def _trained_on(cfg: PretrainConfig, indexes: Sequence[ShardIndex]) -> str:
    """Return pairs and captions of the sources that lie here; those far away by their address."""
    captions: dict[str, int] = {}
    for index in indexes:
        for language, count in index.captions.items():
            captions[language] = captions.get(language, 0) + count
    listed = ", ".join(f"{count:,} {language}" for language, count in captions.items())
    far = [source.path for source in cfg.data.train_sources if not Path(source.path).is_dir()]
    here = f"{sum(index.count for index in indexes):,} pairs with {listed} captions"
    return "; ".join([*([here] if indexes else []), *(f"`{path}`" for path in far)])


def _use(encoder: Encoder, path: str, their_path: str) -> str:
    towers = encoder.model.config.towers
    image, text = towers != "text", towers != "image" and encoder.tokenizer is not None
    ours = [
        "from m2encoder import load_model\n",
        f'model = load_model("{path}")',
        'texts = model.encode_text(["一只猫", "a cat"])  # float32, unit norm' if text else "",
        'pictures = model.encode_image("cat.jpg")' if image else "",
        'odds = model.classify("cat.jpg", ["猫", "狗"])' if image and text else "",
    ]
    parts = ["## Use\n", _block(ours)]
    if not text:
        return "\n".join(parts)
    parts.append(
        "Also without m2encoder, on transformers 4.57 or newer. `trust_remote_code=True` is "
        "needed, because the classes are in this folder's Python files; they import transformers, "
        "torch, NumPy and Pillow. They compute in float32 unless asked for another dtype.\n"
    )
    theirs = [
        "from PIL import Image" if image else "",
        "from transformers import AutoModel, AutoProcessor\n",
        f'model = AutoModel.from_pretrained("{their_path}", trust_remote_code=True)',
        f'processor = AutoProcessor.from_pretrained("{their_path}", trust_remote_code=True)',
        'inputs = processor(text=["一只猫", "a cat"]'
        + (', images=Image.open("cat.jpg"))' if image else ")"),
        "outputs = model(**inputs)  # unit norm: " + _outputs(image),
    ]
    pipeline = [
        "from transformers import pipeline\n",
        f'task = "{TASKS["both"]}"',
        f'classify = pipeline(task, model="{their_path}", trust_remote_code=True)',
        'odds = classify("cat.jpg", candidate_labels=["猫", "狗"], hypothesis_template="{}")',
    ]
    sentences = [
        "from PIL import Image" if image else "",
        "from sentence_transformers import SentenceTransformer  # 5.4 or newer\n",
        f'model = SentenceTransformer("{their_path}", trust_remote_code=True)',
        'texts = model.encode(["一只猫", "a cat"])  # unit norm',
        'pictures = model.encode([Image.open("cat.jpg")])' if image else "",
    ]
    blocks = [theirs, pipeline, sentences] if image else [theirs, sentences]
    return "\n".join([*parts, *map(_block, blocks)])


def _outputs(image: bool) -> str:
    return "text_embeds and image_embeds" if image else "text_embeds"


def _block(lines: Sequence[str]) -> str:
    return "```python\n" + "\n".join(filter(None, lines)) + "\n```\n"


def _shape(encoder: Encoder) -> str:
    config, shape = encoder.model.config, encoder.model.config.architecture
    parameters = sum(p.numel() for p in encoder.model.parameters())
    facts = [f"{parameters:,} parameters"]
    if config.image_tower is None and config.text_tower is None:
        facts.append(
            f"width {shape.width}, {shape.image_layers} image, {shape.text_layers} text and "
            f"{shape.shared_layers} shared layers after M2-Encoder (arXiv 2401.15896)"
        )
    else:
        facts += [f"image tower: timm {config.image_tower['name']}"] if config.image_tower else []
        kind = config.text_tower["config"].get("model_type") if config.text_tower else None
        facts += [f"text tower: transformers {kind}"] if kind else []
    facts.append(f"vectors of {encoder.dim} components")
    if config.towers != "text":
        size = encoder.image_processor.size_px
        facts.append(f"pictures of {size} x {size} pixels ({encoder.image_processor.resize_mode})")
    if (tokenizer := encoder.tokenizer) is not None and config.towers != "image":
        facts.append(
            f"texts of up to {tokenizer.model_max_length} tokens ({len(tokenizer):,} pieces), "
            f"longer ones lose their {'start' if tokenizer.truncation_side == 'left' else 'end'}"
        )
    return f"## Model\n\n{'; '.join(facts)}.\n"
