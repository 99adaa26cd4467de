"""The model card (README.md) that an exported model folder carries, written from the run itself."""

import json
from collections.abc import Mapping
from pathlib import Path

from m2encoder.config import PretrainConfig
from m2encoder.encoder import Encoder
from m2encoder.shards import ShardIndex

METADATA = """---
language:
- zh
- en
library_name: transformers
pipeline_tag: zero-shot-image-classification
tags:
- m2encoder
- clip
- image-text-retrieval
---
"""


def write_model_card(
    folder: Path, cfg: PretrainConfig, encoder: Encoder, results: Mapping[str, float]
) -> None:
    """Write `folder/README.md`: use, shape, data, training and the last evaluation's figures."""
    shape, index = cfg.model, ShardIndex.load(Path(cfg.data.train))
    parameters = sum(p.numel() for p in encoder.model.parameters())
    captions = ", ".join(f"{count:,} {language}" for language, count in index.captions.items())
    sections = [
        METADATA + f"\n# {encoder.folder.name if encoder.folder else encoder.name}\n",
        "A Chinese-English image-text encoder, trained with m2encoder after M2-Encoder "
        "(arXiv 2401.15896).\n",
        "## Use\n\n```python\nfrom m2encoder import load_model\n\n"
        'model = load_model("path/to/this/folder")\n'
        'vectors = model.encode_text(["一只猫", "a cat"])  # float32, unit norm\n```\n',
        f"## Model\n\n{parameters:,} parameters; width {shape.width}, {shape.image_layers} image, "
        f"{shape.text_layers} text and {shape.shared_layers} shared layers; pictures of "
        f"{shape.image_size} x {shape.image_size} pixels ({encoder.image_processor.resize_mode}), "
        f"texts of up to {shape.max_text_length} tokens ({shape.vocab_size:,} pieces).\n",
        f"## Training\n\n{index.count:,} pairs with {captions} captions; {cfg.epochs} epochs in "
        f"batches of {cfg.data.batch_size}; seed {cfg.seed}. Objectives: "
        f"{', '.join(f'{o.name} (weight {o.weight:g})' for o in cfg.objectives)}.\n",
    ]
    if index.attribution:
        sections.append(f"## Attribution of the training pictures\n\n{index.attribution}\n")
    if results:
        rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in sorted(results.items()))
        sections.append(
            f"## Results\n\nMeasured on `{cfg.data.evaluate}` at the end of training.\n\n"
            f"| measure | value |\n|---|---|\n{rows}\n"
        )
    (folder / "README.md").write_text("\n".join(sections), encoding="utf-8")
    if results:
        text = json.dumps(dict(results), indent=2, ensure_ascii=False) + "\n"
        (folder / "results.json").write_text(text, encoding="utf-8")
