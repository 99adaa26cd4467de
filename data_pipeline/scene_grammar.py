"""What a demo scene can be: its attributes, which combinations are held out, and how scenes differ.

Not for words (scene_captions.py), pictures (scene_drawing.py) or files (scenes.py).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, TypeVar, get_args

T = TypeVar("T")

ObjectName = Literal[
    "circle", "square", "triangle", "star", "heart", "moon", "house", "tree", "fish", "flower"
]
Colour = Literal["red", "green", "blue", "yellow", "purple", "orange", "black", "white"]
Size = Literal["big", "small"]
RelationName = Literal["left", "right", "above", "below"]
ChangeKind = Literal["object", "colour", "count", "size", "relation"]

OBJECTS: tuple[ObjectName, ...] = get_args(ObjectName)
COLOURS: tuple[Colour, ...] = get_args(Colour)
SIZES: tuple[Size, ...] = get_args(Size)
RELATIONS: tuple[RelationName, ...] = get_args(RelationName)
COUNTS = (1, 2, 3, 4)
HELD_OUT_SHARE = 0.15
OPPOSITE: dict[RelationName, RelationName] = {
    "left": "right",
    "right": "left",
    "above": "below",
    "below": "above",
}


@dataclass(frozen=True, order=True)
class Thing:
    """One object and its colour: the combination that is held out or trained on."""

    object: ObjectName
    colour: Colour

    def __str__(self) -> str:
        return f"{self.colour}-{self.object}"


@dataclass(frozen=True)
class Group:
    """`count` copies of one thing in one size."""

    thing: Thing
    count: int
    size: Size


@dataclass(frozen=True)
class Relation:
    """`thing` lies to the left of, to the right of, above or below `other`; the two differ."""

    thing: Thing
    relation: RelationName
    other: Thing


Scene = Group | Relation

THINGS = tuple(Thing(name, colour) for name, colour in product(OBJECTS, COLOURS))


def held_out_things(seed: int) -> frozenset[Thing]:
    """Choose the combinations that only test scenes may show: 12 of the 80.

    Every object and every colour is in one or two of them, so that testing asks about all words and
    training still shows each word in at least six combinations.
    """
    rng = random.Random(f"held-out/{seed}")
    objects, colours = rng.sample(OBJECTS, len(OBJECTS)), rng.sample(COLOURS, len(COLOURS))
    # Going round both circles at once meets no combination twice before step lcm(10, 8) = 40.
    return frozenset(
        Thing(objects[i % len(objects)], colours[i % len(colours)])
        for i in range(round(HELD_OUT_SHARE * len(THINGS)))
    )


def combination_id(scene: Scene) -> str:
    """Name the scene's attribute set; equal for two scenes exactly if the same captions fit both.

    "A right of B" is "B left of A", so only `left` and `above` occur in the names of relations.
    """
    if isinstance(scene, Group):
        return f"{scene.count}-{scene.size}-{scene.thing}"
    if scene.relation in ("right", "below"):
        scene = turn_around(scene)
    return f"{scene.thing}-{scene.relation}-{scene.other}"


def turn_around(scene: Relation) -> Relation:
    """Say the same from the other object's side."""
    return Relation(scene.other, OPPOSITE[scene.relation], scene.thing)


def random_scene(rng: random.Random, things: Sequence[Thing]) -> Scene:
    """Draw a group or a relation, equally often, of `things` (at least two)."""
    if rng.random() < 0.5:
        return Group(rng.choice(things), rng.choice(COUNTS), rng.choice(SIZES))
    thing, other = rng.sample(things, 2)
    return Relation(thing, rng.choice(RELATIONS), other)


def held_out_scenes(rng: random.Random, held_out: frozenset[Thing], count: int) -> list[Scene]:
    """Draw `count` scenes, pairwise different, each with at least one held-out thing.

    Half are groups where there are enough of those (96), the rest relations, in random order.
    Raises ValueError if the grammar has fewer scenes of that kind than `count`.
    """
    things = sorted(held_out)
    groups = [Group(*parts) for parts in product(things, COUNTS, SIZES)]
    relations = [
        Relation(thing, relation, other)
        for thing, other in product(THINGS, THINGS)
        for relation in RELATIONS
        if relation in ("left", "above") and thing != other and {thing, other} & held_out
    ]
    num_groups = min(len(groups), count // 2)
    if count - num_groups > len(relations):
        raise ValueError(f"{count} test scenes, the grammar has {len(groups) + len(relations)}")
    chosen: list[Scene] = [*rng.sample(groups, num_groups)]
    for scene in rng.sample(relations, count - num_groups):
        chosen.append(turn_around(scene) if rng.random() < 0.5 else scene)
    rng.shuffle(chosen)
    return chosen


def change_one(scene: Scene, kind: ChangeKind, rng: random.Random) -> Scene:
    """Return the scene with exactly one attribute changed, so that no caption of it fits `scene`.

    In a relation, the first or the second object changes, and never into the other one.
    """
    if isinstance(scene, Group):
        if kind == "count":
            return replace(scene, count=_another(scene.count, COUNTS, rng))
        if kind == "size":
            return replace(scene, size=_another(scene.size, SIZES, rng))
        return replace(scene, thing=_another_thing(scene.thing, kind, rng, avoid=None))
    if kind == "relation":
        return replace(scene, relation=OPPOSITE[scene.relation])
    if rng.random() < 0.5:
        return replace(scene, thing=_another_thing(scene.thing, kind, rng, avoid=scene.other))
    return replace(scene, other=_another_thing(scene.other, kind, rng, avoid=scene.thing))


def change_kinds(scene: Scene) -> tuple[ChangeKind, ...]:
    """Return the attributes that `change_one` can change in this scene."""
    if isinstance(scene, Group):
        return "object", "colour", "count", "size"
    return "object", "colour", "relation"


def _another_thing(
    thing: Thing, kind: ChangeKind, rng: random.Random, *, avoid: Thing | None
) -> Thing:
    if kind == "object":
        choices = [Thing(name, thing.colour) for name in OBJECTS]
    elif kind == "colour":
        choices = [Thing(thing.object, colour) for colour in COLOURS]
    else:
        raise ValueError(f"a thing has no {kind}")
    return rng.choice([choice for choice in choices if choice not in (thing, avoid)])


def _another(value: T, choices: Sequence[T], rng: random.Random) -> T:
    return rng.choice([choice for choice in choices if choice != value])
