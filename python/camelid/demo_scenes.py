"""Draw the scenes of the demo model: coloured shapes on paper, and what can be asked about them.

Owns what a scene may hold, its picture, the questions with their answers, and the split between
what training may show and what is held out. `camelid demo --image` imports it to draw a scene the
model never saw; `tools/train_demo_vision.py` imports it for training. Deterministic for a seeded
`random.Random`. It must never know tensors, tokenizers or the engine.

Held out: a *triple* (colour, shape, place), for example (red, star, top left), belongs to the
held-out split when `zlib.crc32("red|star|top left") % 5 == 0`. A training scene shows only training
triples and a held-out scene only held-out ones: nothing in it was ever seen where it stands.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

Split = Literal["train", "heldout"]

HELD_OUT_MODULUS = 5

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (244, 132, 28),
    "yellow": (242, 208, 44),
    "green": (40, 156, 66),
    "blue": (38, 84, 214),
    "purple": (132, 52, 172),
    "black": (32, 32, 36),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
# Row by row, and what is said of a thing there.
PLACES = {
    "top left": "at the top left",
    "top": "at the top",
    "top right": "at the top right",
    "left": "on the left",
    "middle": "in the middle",
    "right": "on the right",
    "bottom left": "at the bottom left",
    "bottom": "at the bottom",
    "bottom right": "at the bottom right",
}
_NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
MAX_THINGS = len(_NUMBERS) - 1
_N_COLUMNS = 3
_SMOOTH = 3  # drawn this much larger, then reduced: smooth edges
_LIGHT_NOISE, _HUE_NOISE = 16, 8  # of 255: on all channels together, and on each


@dataclass(frozen=True)
class Thing:
    """One shape of a scene."""

    colour: str
    shape: str
    place: str
    # How it is drawn: its centre and radius in cells (thirds of the picture's sides), how far it is
    # turned in radians, and its exact colour.
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.35
    turn: float = 0.0
    rgb: tuple[int, int, int] = (0, 0, 0)

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A picture to be and what can be asked about it; every question has exactly one answer."""

    width: int  # pixels
    height: int
    paper: tuple[int, int, int]
    things: list[Thing]
    questions: list[tuple[str, str]] = field(default_factory=list)

    def draw(self) -> Image:
        """Return the picture, RGB."""
        from PIL import Image, ImageDraw

        scale = _SMOOTH
        picture = Image.new("RGB", (self.width * scale, self.height * scale), self.paper)
        pen = ImageDraw.Draw(picture)
        cell_width = picture.width / _N_COLUMNS
        cell_height = picture.height / _N_COLUMNS
        for thing in self.things:
            row, column = divmod(list(PLACES).index(thing.place), _N_COLUMNS)
            centre = ((column + thing.x) * cell_width, (row + thing.y) * cell_height)
            radius = thing.radius * min(cell_width, cell_height)
            if thing.shape == "circle":
                pen.circle(centre, radius, fill=thing.rgb)
            else:
                outline = _OUTLINES[thing.shape]
                pen.polygon(_placed(outline, centre, radius, thing.turn), fill=thing.rgb)
        return picture.resize((self.width, self.height), Image.Resampling.BOX)


def is_held_out(colour: str, shape: str, place: str) -> bool:
    """Return whether training never shows this triple."""
    return zlib.crc32(f"{colour}|{shape}|{place}".encode()) % HELD_OUT_MODULUS == 0


def make_scene(
    rng: random.Random,
    *,
    split: Split = "heldout",
    n_things: int | None = None,
    sides: tuple[int, int] = (240, 640),
) -> Scene:
    """Lay out one scene and ask everything there is to ask.

    Args:
        rng: The only source of chance; equal states give equal scenes.
        split: Which triples may be shown. "heldout" ones never occur in training.
        n_things: How many shapes, 1 to `MAX_THINGS`; drawn when None.
        sides: Least and most pixels of each side of the picture.

    Example:
        >>> scene = make_scene(random.Random(7))
        >>> scene.draw().save("scene.png")
        >>> question, answer = scene.questions[0]
    """
    width = rng.randint(*sides)
    # At most 3 : 2, either way.
    height = min(max(rng.randint(*sides), math.ceil(width / 1.5)), math.floor(width * 1.5))
    tone = rng.randint(232, 252)
    paper = (tone, tone - rng.randint(0, 6), tone - rng.randint(0, 12))
    if n_things is None:
        n_things = rng.randint(1, MAX_THINGS)
    # A colour or shape that comes back makes counting worth asking for.
    colours = rng.sample(list(COLOURS), rng.randint(2, len(COLOURS)))
    shapes = rng.sample(SHAPES, rng.randint(2, len(SHAPES)))
    places = rng.sample(list(PLACES), n_things)
    things = [_choose_thing(rng, place, colours, shapes, split) for place in places]
    scene = Scene(width, height, paper, things)
    scene.questions.extend(_ask(rng, things))
    return scene


def _choose_thing(
    rng: random.Random, place: str, colours: list[str], shapes: list[str], split: Split
) -> Thing:
    """Return a thing of the wanted split, of the favoured colours and shapes where it can be."""

    def allowed(colours: Iterable[str], shapes: Iterable[str]) -> list[tuple[str, str]]:
        return [
            (colour, shape)
            for colour in colours
            for shape in shapes
            if is_held_out(colour, shape, place) == (split == "heldout")
        ]

    colour, shape = rng.choice(allowed(colours, shapes) or allowed(COLOURS, SHAPES))
    light = rng.randint(-_LIGHT_NOISE, _LIGHT_NOISE)
    red, green, blue = (
        min(255, max(0, value + light + rng.randint(-_HUE_NOISE, _HUE_NOISE)))
        for value in COLOURS[colour]
    )
    radius = rng.uniform(0.24, 0.44)
    slack = 0.5 - radius
    return Thing(
        colour,
        shape,
        place,
        x=0.5 + rng.uniform(-slack, slack),
        y=0.5 + rng.uniform(-slack, slack),
        radius=radius,
        turn=rng.uniform(-0.2, 0.2),
        rgb=(red, green, blue),
    )


def _ask(rng: random.Random, things: list[Thing]) -> list[tuple[str, str]]:
    """Return every kind of question once for everything it can be asked about."""
    questions = [(f"What is {where}?", _what_is(place, things)) for place, where in PLACES.items()]
    for thing in things:
        if _count(things, colour=thing.colour, shape=thing.shape) == 1:
            where = PLACES[thing.place]
            questions.append((f"Where is the {thing.name}?", f"The {thing.name} is {where}."))
        if _count(things, shape=thing.shape) == 1:
            colour = f"The {thing.shape} is {thing.colour}."
            questions.append((f"What colour is the {thing.shape}?", colour))
        if _count(things, colour=thing.colour) == 1:
            shape = f"The {thing.colour} shape is a {thing.shape}."
            questions.append((f"Which shape is {thing.colour}?", shape))
    questions.append(("How many shapes are there?", _how_many(things, "shape")))
    # Also some that are not there.
    for shape in {thing.shape: None for thing in things} | {rng.choice(SHAPES): None}:
        n = _how_many(things, shape, shape=shape)
        questions.append((f"How many {_plural(shape)} are there?", n))
    for colour in {thing.colour: None for thing in things} | {rng.choice(list(COLOURS)): None}:
        n = _how_many(things, f"{colour} shape", colour=colour)
        questions.append((f"How many {colour} shapes are there?", n))
    return questions


def _count(things: list[Thing], *, colour: str | None = None, shape: str | None = None) -> int:
    return sum(colour in (None, thing.colour) and shape in (None, thing.shape) for thing in things)


def _what_is(place: str, things: list[Thing]) -> str:
    for thing in things:
        if thing.place == place:
            article = "An" if thing.colour[0] in "aeiou" else "A"
            return f"{article} {thing.name} is {PLACES[place]}."
    return f"Nothing is {PLACES[place]}."


def _how_many(
    things: list[Thing], what: str, *, colour: str | None = None, shape: str | None = None
) -> str:
    n = _count(things, colour=colour, shape=shape)
    return f"There is one {what}." if n == 1 else f"There are {_NUMBERS[n]} {_plural(what)}."


def _plural(what: str) -> str:
    return f"{what}es" if what.endswith("s") else f"{what}s"


def vocabulary_texts() -> list[str]:
    """Return texts in which every word of questions and answers occurs."""
    texts = []
    for colour in COLOURS:
        for shape in SHAPES:
            things = [Thing(colour, shape, place) for place in PLACES]
            for n in range(MAX_THINGS + 1):
                for question, answer in _ask(random.Random(n), things[:n]):
                    texts += [question, answer]
    return list(dict.fromkeys(texts))


def _corners(n: int, first: float, radii: tuple[float, ...] = (1.0,)) -> list[tuple[float, float]]:
    """Return corners around the origin, evenly turned, at radii that alternate."""
    angles = [first + 2 * math.pi * i / n for i in range(n)]
    return [
        (radii[i % len(radii)] * math.cos(angle), radii[i % len(radii)] * math.sin(angle))
        for i, angle in enumerate(angles)
    ]


_UP = -math.pi / 2
_ARM = 0.34  # half the width of the cross's arms
_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": _corners(4, math.pi / 4),
    "triangle": _corners(3, _UP),
    "star": _corners(10, _UP, (1.0, 0.42)),
    "cross": [
        (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM),
        (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM),
    ],
}  # fmt: skip


def _placed(
    outline: list[tuple[float, float]], centre: tuple[float, float], radius: float, turn: float
) -> list[tuple[float, float]]:
    cos, sin = math.cos(turn), math.sin(turn)
    return [
        (centre[0] + radius * (x * cos - y * sin), centre[1] + radius * (x * sin + y * cos))
        for x, y in outline
    ]
