"""The demo data that needs no download: drawn scenes with Chinese and English captions, as shards.

Test scenes show held-out combinations of object and colour, and carry hard negatives. Not for the
grammar, words or shapes themselves (scene_grammar.py, scene_captions.py, scene_drawing.py).
"""

import io
import json
import logging
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from m2encoder.data_pipeline.scene_captions import (
    LANGUAGES,
    Language,
    caption,
    choose_templates,
    scene_words,
)
from m2encoder.data_pipeline.scene_drawing import draw_scene
from m2encoder.data_pipeline.scene_grammar import (
    THINGS,
    Group,
    Scene,
    change_kinds,
    change_one,
    combination_id,
    held_out_scenes,
    held_out_things,
    random_scene,
)
from m2encoder.errors import ConfigError
from m2encoder.shards import Pair, ShardIndex, write_shards

logger = logging.getLogger(__name__)

VAL_PAIRS = 400
MIN_SIZE_PX = 16
ZERO_SHOT_NAME = "zero_shot.json"


def make_scenes(
    out_dir: Path,
    *,
    seed: int = 0,
    train_pairs: int = 12_000,
    test_pairs: int = 400,
    size_px: int = 64,
) -> dict[str, ShardIndex]:
    """Write `out_dir/train`, `val` and `test`; the same arguments give the same bytes.

    train: `train_pairs` scenes without held-out combinations of object and colour.
    val: up to 400 pairwise different attribute sets that occur in train, in new pictures.
    test: `test_pairs` pairwise different attribute sets, each with a held-out combination, and with
    captions that are wrong in one attribute (`meta["hard_negatives"]`).
    val and test also get `zero_shot.json`, the attribute tasks of zero_shot.py.
    Raises ConfigError on numbers that the grammar cannot serve.
    """
    if train_pairs < 1 or test_pairs < 1 or size_px < MIN_SIZE_PX:
        raise ConfigError(
            f"train_pairs {train_pairs}, test_pairs {test_pairs}, size_px {size_px}: expected at "
            f"least 1, 1 and {MIN_SIZE_PX}"
        )
    splits = choose_scenes(seed, train_pairs=train_pairs, test_pairs=test_pairs)
    indexes: dict[str, ShardIndex] = {}
    for split, scenes in splits.items():
        folder = out_dir / split
        pairs = _draw_pairs(scenes, split, seed=seed, size_px=size_px)
        indexes[split] = write_shards(pairs, folder)
        if split != "train":
            _write_json(folder / ZERO_SHOT_NAME, {"tasks": scene_words()["tasks"]})
        logger.info("drew %s", folder)
    return indexes


def choose_scenes(seed: int, *, train_pairs: int, test_pairs: int) -> dict[str, list[Scene]]:
    """Return the scenes of each split, as `make_scenes` describes them."""
    held_out = held_out_things(seed)
    seen_things = [thing for thing in THINGS if thing not in held_out]
    rng = random.Random(f"train/{seed}")
    train = [random_scene(rng, seen_things) for _ in range(train_pairs)]
    distinct = list({combination_id(scene): scene for scene in train}.values())
    val = random.Random(f"val/{seed}").sample(distinct, min(VAL_PAIRS, len(distinct)))
    try:
        test = held_out_scenes(random.Random(f"test/{seed}"), held_out, test_pairs)
    except ValueError as error:
        raise ConfigError(f"test_pairs is too large: {error}; ask for fewer") from None
    return {"train": train, "val": val, "test": test}


def _draw_pairs(scenes: Sequence[Scene], split: str, *, seed: int, size_px: int) -> Iterator[Pair]:
    for position, scene in enumerate(scenes):
        rng = random.Random(f"{split}/{seed}/{position}")
        encoded = io.BytesIO()
        draw_scene(scene, rng, size_px=size_px).save(encoded, "PNG")
        chosen = choose_templates(scene, rng)
        captions: dict[str, list[str]] = {
            language: [caption(scene, language, template) for template in chosen[language]]
            for language in LANGUAGES
        }
        meta: dict[str, Any] = dict(attributes(scene))
        if split == "test":
            meta |= hard_negatives(scene, chosen, rng)
        yield Pair(f"{split}-{position:06d}", encoded.getvalue(), captions, meta)


def attributes(scene: Scene) -> dict[str, str]:
    """Return what `Pair.meta` says about a scene.

    All are strings, as zero-shot labels are. Only groups have `object` and `colour`, so that these
    tasks never ask about a picture of two different things; a relation names them `first_…` and
    `other_…`. `arrangement` is the relation as far as a picture alone decides it.
    """
    if isinstance(scene, Group):
        return {
            "kind": "group",
            "combination": combination_id(scene),
            "object": scene.thing.object,
            "colour": scene.thing.colour,
            "count": str(scene.count),
            "size": scene.size,
        }
    return {
        "kind": "relation",
        "combination": combination_id(scene),
        "first_object": scene.thing.object,
        "first_colour": scene.thing.colour,
        "relation": scene.relation,
        "arrangement": "horizontal" if scene.relation in ("left", "right") else "vertical",
        "other_object": scene.other.object,
        "other_colour": scene.other.colour,
    }


def hard_negatives(
    scene: Scene, chosen: dict[Language, list[str]], rng: random.Random
) -> dict[str, Any]:
    """Return captions that are wrong in exactly one attribute, each in the first chosen template.

    {"hard_negatives": {language: captions}, "hard_negative_kinds": the attribute of each}.
    """
    kinds = change_kinds(scene)
    changed = [change_one(scene, kind, rng) for kind in kinds]
    return {
        "hard_negatives": {
            language: [caption(other, language, templates[0]) for other in changed]
            for language, templates in chosen.items()
        },
        "hard_negative_kinds": list(kinds),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    os.replace(temporary, path)
