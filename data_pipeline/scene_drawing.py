"""Draw a demo scene with Pillow: outlined shapes on a plain light background.

Position, tilt, shade and background are nuisance and drawn from the generator that is passed in.
Drawn at four times the size and reduced, for smooth edges. Not for captions.
"""

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image, ImageDraw

from m2encoder.data_pipeline.scene_grammar import Colour, Group, ObjectName, Relation, Scene, Size

SUPERSAMPLING = 4

Rgb = tuple[int, int, int]
Point = tuple[float, float]

PAINT: dict[Colour, Rgb] = {
    "red": (218, 38, 40),
    "green": (36, 150, 60),
    "blue": (40, 84, 208),
    "yellow": (250, 214, 30),
    "purple": (136, 48, 172),
    "orange": (246, 132, 24),
    "black": (28, 28, 30),
    "white": (252, 252, 252),
}
BACKGROUNDS: tuple[Rgb, ...] = (
    (222, 222, 222),
    (206, 224, 238),
    (214, 232, 212),
    (240, 222, 226),
    (236, 226, 206),
)
OUTLINE: Rgb = (74, 74, 80)
"""Around every shape, so that white ones show on light backgrounds and black ones keep details."""
BROWN: Rgb = (116, 82, 58)
"""Trunks, doors and the middle of flowers; no scene's colour."""
SIZE_RADIUS: dict[Size, tuple[float, float]] = {"big": (0.185, 0.215), "small": (0.105, 0.125)}
"""Smallest and largest radius, as a share of the picture's side; far enough apart to tell."""
RELATION_RADIUS = (0.165, 0.205)
TILT_DEGREES = 12.0


class Part(NamedTuple):
    """One polygon of a shape, in the unit circle, y down. paint None means the scene's colour."""

    points: Sequence[Point]
    paint: Rgb | None = None
    is_detail: bool = False
    """Details lie inside the shape and have no outline."""


class Spot(NamedTuple):
    """Where one shape goes; as shares of the picture's side."""

    x: float
    y: float
    radius: float


def draw_scene(scene: Scene, rng: random.Random, *, size_px: int = 64) -> Image.Image:
    """Return an RGB picture, `size_px` squared; equal generators give equal pixels."""
    side_px = size_px * SUPERSAMPLING
    image = Image.new("RGB", (side_px, side_px), _jitter(rng.choice(BACKGROUNDS), rng, 6))
    draw = ImageDraw.Draw(image)
    if isinstance(scene, Group):
        things = [scene.thing] * scene.count
        spots = _scatter(scene, rng)
    else:
        things = [scene.thing, scene.other]
        spots = _place_pair(scene, rng)
    for thing, spot in zip(things, spots, strict=True):
        paint = _jitter(PAINT[thing.colour], rng, 8)
        _draw_shape(draw, thing.object, paint, spot, rng, side_px=side_px)
    return image.reduce(SUPERSAMPLING)


def _jitter(colour: Rgb, rng: random.Random, amount: int) -> Rgb:
    red, green, blue = (min(255, max(0, value + rng.randint(-amount, amount))) for value in colour)
    return red, green, blue


def _scatter(scene: Group, rng: random.Random) -> list[Spot]:
    """Place the copies anywhere without overlap; in the cells of a 2 x 2 grid if that fails."""
    low, high = SIZE_RADIUS[scene.size]
    for _ in range(8):
        spots: list[Spot] = []
        for _ in range(10 * scene.count):
            radius = rng.uniform(low, high)
            margin = radius + 0.02
            spot = Spot(rng.uniform(margin, 1 - margin), rng.uniform(margin, 1 - margin), radius)
            if all(_are_apart(spot, other) for other in spots):
                spots.append(spot)
            if len(spots) == scene.count:
                return spots
    shift = 0.045  # four smallest big circles still stay apart, and inside the picture
    return [
        Spot(
            0.25 + 0.5 * (cell % 2) + rng.uniform(-shift, shift),
            0.25 + 0.5 * (cell // 2) + rng.uniform(-shift, shift),
            low,
        )
        for cell in rng.sample(range(4), scene.count)
    ]


def _are_apart(one: Spot, other: Spot) -> bool:
    return math.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius + 0.02


def _place_pair(scene: Relation, rng: random.Random) -> list[Spot]:
    """Place two things clearly side by side or clearly one above the other."""
    offset = rng.uniform(0.22, 0.27)
    centre = rng.uniform(-0.03, 0.03)
    shift = rng.uniform(-0.16, 0.16)
    spots: list[Spot] = []
    for sign in (-1, 1) if scene.relation in ("left", "above") else (1, -1):
        along = 0.5 + centre + sign * offset
        across = 0.5 + shift + rng.uniform(-0.05, 0.05)
        x, y = (along, across) if scene.relation in ("left", "right") else (across, along)
        spots.append(Spot(x, y, rng.uniform(*RELATION_RADIUS)))
    return spots


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    name: ObjectName,
    paint: Rgb,
    spot: Spot,
    rng: random.Random,
    *,
    side_px: int,
) -> None:
    """Outline all parts first and fill them afterwards: one line around the whole shape."""
    angle = math.radians(rng.uniform(-TILT_DEGREES, TILT_DEGREES))
    flip = rng.choice((-1, 1)) if name in ("fish", "moon") else 1
    scale = spot.radius * side_px
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    left, top = spot.x * side_px, spot.y * side_px

    def place(x: float, y: float) -> Point:
        return left + flip * x * cos - y * sin, top + flip * x * sin + y * cos

    polygons = [(part, [place(x, y) for x, y in part.points]) for part in SHAPES[name]]
    width = max(2, round(side_px / 64))
    for part, points in polygons:
        if not part.is_detail:
            draw.line([*points, *points[:2]], fill=OUTLINE, width=2 * width, joint="curve")
    for part, points in polygons:
        draw.polygon(points, fill=part.paint or paint)


def _ellipse(x: float, y: float, width: float, height: float, num_points: int = 20) -> list[Point]:
    """Return a polygon; width and height are half axes."""
    angles = (2 * math.pi * i / num_points for i in range(num_points))
    return [(x + width * math.cos(a), y + height * math.sin(a)) for a in angles]


def _star() -> list[Point]:
    spikes = ((-math.pi / 2 + math.pi * i / 5, 1.0 if i % 2 == 0 else 0.42) for i in range(10))
    return [(radius * math.cos(a), radius * math.sin(a)) for a, radius in spikes]


def _heart() -> list[Point]:
    angles = [2 * math.pi * i / 28 for i in range(28)]
    waves = [
        13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)
        for a in angles
    ]
    return [
        (0.94 * math.sin(a) ** 3, -wave / 17.0 - 0.08)
        for a, wave in zip(angles, waves, strict=True)
    ]


def _moon() -> list[Point]:
    """Return a crescent: most of a circle, and back along a second circle that cuts into it."""
    start = math.radians(50)
    outer = [start + (2 * math.pi - 2 * start) * i / 20 for i in range(21)]
    tip_x, tip_y = 0.95 * math.cos(start), 0.95 * math.sin(start)
    centre = 0.48
    inner_start = math.atan2(tip_y, tip_x - centre)
    radius = math.hypot(tip_x - centre, tip_y)
    inner = [inner_start + (2 * math.pi - 2 * inner_start) * i / 16 for i in range(16, -1, -1)]
    return [(0.95 * math.cos(a), 0.95 * math.sin(a)) for a in outer] + [
        (centre + radius * math.cos(a), radius * math.sin(a)) for a in inner
    ]


def _fish() -> tuple[Part, ...]:
    return (
        Part([(0.35, 0.0), (0.98, -0.55), (0.82, 0.0), (0.98, 0.55)]),
        Part([(-0.25, -0.4), (0.15, -0.72), (0.3, -0.25)]),
        Part(_ellipse(-0.24, 0.0, 0.74, 0.48)),
        Part(_ellipse(-0.58, -0.12, 0.15, 0.15, 10), (250, 250, 250), is_detail=True),
        Part(_ellipse(-0.6, -0.12, 0.08, 0.08, 8), (20, 20, 20), is_detail=True),
    )


def _flower() -> tuple[Part, ...]:
    angles = [2 * math.pi * i / 5 - math.pi / 2 for i in range(5)]
    petals = [Part(_ellipse(0.56 * math.cos(a), 0.56 * math.sin(a), 0.4, 0.4)) for a in angles]
    middle = _ellipse(0, 0, 0.25, 0.25, 12)
    return *petals, Part(middle), Part(middle, BROWN, is_detail=True)


SHAPES: dict[ObjectName, tuple[Part, ...]] = {
    "circle": (Part(_ellipse(0, 0, 0.88, 0.88, 32)),),
    "square": (Part([(-0.74, -0.74), (0.74, -0.74), (0.74, 0.74), (-0.74, 0.74)]),),
    "triangle": (Part([(0.0, -0.92), (0.92, 0.68), (-0.92, 0.68)]),),
    "star": (Part(_star()),),
    "heart": (Part(_heart()),),
    "moon": (Part(_moon()),),
    "house": (
        Part([(-0.66, -0.1), (0.66, -0.1), (0.66, 0.82), (-0.66, 0.82)]),
        Part([(0.0, -0.95), (0.95, -0.08), (-0.95, -0.08)]),
        Part([(-0.2, 0.28), (0.2, 0.28), (0.2, 0.82), (-0.2, 0.82)], BROWN, is_detail=True),
    ),
    "tree": (
        Part([(-0.16, 0.2), (0.16, 0.2), (0.16, 0.98), (-0.16, 0.98)], BROWN),
        Part(_ellipse(-0.4, 0.05, 0.42, 0.42)),
        Part(_ellipse(0.4, 0.05, 0.42, 0.42)),
        Part(_ellipse(0.0, -0.45, 0.5, 0.5)),
        Part(_ellipse(0.0, 0.1, 0.42, 0.38)),
    ),
    "fish": _fish(),
    "flower": _flower(),
}
