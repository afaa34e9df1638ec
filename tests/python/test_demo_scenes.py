"""The demo's scenes: every answer is true of the things drawn, and the split holds."""

from __future__ import annotations

import random
import re

import pytest

from camelid.demo_scenes import (
    COLOURS,
    MAX_THINGS,
    PLACES,
    SHAPES,
    Scene,
    Split,
    is_held_out,
    make_scene,
)

_NUMBERS = ["no", "one", "two", "three", "four", "five", "six"]
_ONE_OF = {
    "shapes": "shape",
    "circles": "circle",
    "squares": "square",
    "triangles": "triangle",
    "stars": "star",
    "crosses": "cross",
}


def _grid(scene: Scene) -> dict[str, tuple[str, str]]:
    return {thing.place: (thing.colour, thing.shape) for thing in scene.things}


def _truth(question: str, grid: dict[str, tuple[str, str]]) -> str:
    """Answer from what stands where, by rules of its own."""
    if match := re.fullmatch(r"What is (.*)\?", question):
        (place,) = [name for name, phrase in PLACES.items() if phrase == match[1]]
        if place not in grid:
            return f"Nothing is {match[1]}."
        return (
            f"{'An' if grid[place][0] == 'orange' else 'A'} {' '.join(grid[place])} is {match[1]}."
        )
    if match := re.fullmatch(r"Where is the (\w+) (\w+)\?", question):
        (place,) = [name for name, thing in grid.items() if thing == match.groups()]
        return f"The {match[1]} {match[2]} is {PLACES[place]}."
    if match := re.fullmatch(r"What colour is the (\w+)\?", question):
        (colour,) = [colour for colour, shape in grid.values() if shape == match[1]]
        return f"The {match[1]} is {colour}."
    if match := re.fullmatch(r"Which shape is (\w+)\?", question):
        (shape,) = [shape for colour, shape in grid.values() if colour == match[1]]
        return f"The {match[1]} shape is a {shape}."
    match = re.fullmatch(r"How many (?:(\w+) )?(\w+) are there\?", question)
    assert match is not None, question
    colour, noun = match[1], _ONE_OF[match[2]]
    n = sum(colour in (None, c) and noun in ("shape", s) for c, s in grid.values())
    what = " ".join(filter(None, [colour, noun if n == 1 else match[2]]))
    return f"There is one {what}." if n == 1 else f"There are {_NUMBERS[n]} {what}."


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_answer_is_true_and_every_thing_of_its_split(split: Split) -> None:
    kinds, counts = set(), set()
    for seed in range(200):
        scene = make_scene(random.Random(seed), split=split)
        assert 1 <= len(scene.things) <= MAX_THINGS
        assert len(_grid(scene)) == len(scene.things)  # one to a place
        for thing in scene.things:
            assert thing.colour in COLOURS
            assert thing.shape in SHAPES
            assert is_held_out(thing.colour, thing.shape, thing.place) == (split == "heldout")
        assert len(dict(scene.questions)) == len(scene.questions)
        for question, answer in scene.questions:
            assert answer == _truth(question, _grid(scene))
            kinds.add(" ".join(question.split()[:2]))
        counts.add(len(scene.things))
    assert kinds == {"What is", "Where is", "What colour", "Which shape", "How many"}
    assert counts == set(range(1, MAX_THINGS + 1))


def test_pictures_show_each_thing_in_its_colour_where_it_stands() -> None:
    for seed in range(30):
        scene = make_scene(random.Random(seed), sides=(90, 300))
        picture = scene.draw()
        assert (picture.width, picture.height) == (scene.width, scene.height)
        assert max(picture.size) <= 1.5 * min(picture.size) + 1
        for thing in scene.things:
            row, column = divmod(list(PLACES).index(thing.place), 3)
            x = (column + thing.x) * scene.width / 3
            y = (row + thing.y) * scene.height / 3
            assert picture.getpixel((int(x), int(y))) == thing.rgb
        n_paper = sum(n for n, rgb in picture.getcolors(1 << 20) or [] if rgb == scene.paper)
        assert n_paper > 0.3 * scene.width * scene.height


def test_the_same_seed_makes_the_same_picture() -> None:
    first, again = (make_scene(random.Random(5)) for _ in range(2))
    assert first == again
    assert first.draw().tobytes() == again.draw().tobytes()
    assert make_scene(random.Random(6)) != first
    assert len(make_scene(random.Random(5), n_things=4).things) == 4
