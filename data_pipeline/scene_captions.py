"""Chinese and English sentences about a demo scene; every one states all of its attributes.

The words, templates and zero-shot tasks are data: scene_words.json. Not for choosing scenes.
"""

import json
import random
from functools import cache
from importlib import resources
from typing import Any, Literal

from m2encoder.data_pipeline.scene_grammar import Group, Relation, Scene, Thing

Language = Literal["zh", "en"]
LANGUAGES: tuple[Language, ...] = ("zh", "en")
CAPTIONS_PER_LANGUAGE = 2


@cache
def scene_words() -> dict[str, Any]:
    """Return the vocabulary, the caption templates and the zero-shot tasks."""
    path = resources.files("m2encoder.data_pipeline") / "scene_words.json"
    return json.loads(path.read_text(encoding="utf-8"))


def templates(scene: Scene, language: Language) -> list[str]:
    """Return the templates that fit this kind of scene."""
    kind = "group_templates" if isinstance(scene, Group) else "relation_templates"
    return scene_words()[kind][language]


def choose_templates(scene: Scene, rng: random.Random) -> dict[Language, list[str]]:
    """Draw two different templates per language."""
    return {
        language: rng.sample(templates(scene, language), CAPTIONS_PER_LANGUAGE)
        for language in LANGUAGES
    }


def caption(scene: Scene, language: Language, template: str) -> str:
    """Fill one template of the scene's kind and language."""
    if isinstance(scene, Group):
        fields = _group_zh(scene) if language == "zh" else _group_en(scene)
    else:
        fields = _relation(scene, language)
    return template.format(**fields)


def _group_zh(scene: Group) -> dict[str, str]:
    words = scene_words()
    noun = words["objects"][scene.thing.object]
    return {
        "count": words["counts"][str(scene.count)]["zh"],  # 两, never 二, before a measure word
        "measure": noun["measure"],
        "size": words["sizes"][scene.size]["zh"],
        "colour": words["colours"][scene.thing.colour]["zh"],
        "object": noun["zh"],
    }


def _group_en(scene: Group) -> dict[str, str]:
    words = scene_words()
    noun = words["objects"][scene.thing.object]
    is_one = scene.count == 1
    fields = {
        "count": words["counts"][str(scene.count)]["en"],
        "size": words["sizes"][scene.size]["en"],
        "colour": words["colours"][scene.thing.colour]["en"],
        "object": noun["en"] if is_one else noun["plural"],
        "are": "is" if is_one else "are",
    }
    described = f"{fields['size']} {fields['colour']} {fields['object']}"
    fields["things"] = with_article(described) if is_one else f"{fields['count']} {described}"
    return fields


def _relation(scene: Relation, language: Language) -> dict[str, str]:
    thing, a_thing = _name_thing(scene.thing, language)
    other, an_other = _name_thing(scene.other, language)
    sides = scene_words()["relations"][scene.relation][language]
    return sides | {"thing": thing, "a_thing": a_thing, "other": other, "an_other": an_other}


def _name_thing(thing: Thing, language: Language) -> tuple[str, str]:
    """Return ("red star", "a red star"), or ("红色的星星", "一颗红色的星星")."""
    noun = scene_words()["objects"][thing.object]
    colour = scene_words()["colours"][thing.colour][language]
    if language == "zh":
        name = f"{colour}的{noun['zh']}"
        return name, f"一{noun['measure']}{name}"
    name = f"{colour} {noun['en']}"
    return name, with_article(name)


def with_article(words: str) -> str:
    """Put "a" or "an" in front; by the first letter, which is enough for our vocabulary."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
