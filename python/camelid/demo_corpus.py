"""Write the synthetic world of the demo model: documents of facts, questions and answers.

Owns the words, the sentence templates and the split between what training may state and what is
held out. `camelid demo` imports it to write a document the model never saw;
`tools/train_demo_model.py` imports it for training. Standard library only, deterministic for a
seeded `random.Random`. It must never know tensors, tokenizers or the engine.

Held out: a *triple* (subject, relation, value), for example (Mira, home, Tolland), belongs to the
held-out split when `zlib.crc32("Mira|home|Tolland") % 5 == 0`. A training document states only
training triples; a held-out document states only held-out triples, so no fact in it, and therefore
no question about it, was ever seen in training.
"""

from __future__ import annotations

import random
import re
import zlib
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]

# One triple in five is held out: every subject keeps enough values on both sides for each relation.
HELD_OUT_MODULUS = 5


def _words(text: str) -> list[str]:
    return text.split()


_PEOPLE = _words(
    """
    Ada Agnes Alma Amir Anders Anja Anton Ari Astrid Bela Bianca Boris Bruno Carla Cedric Celia
    Clara Conrad Dalia Daniel Daria Dmitri Dora Edgar Edith Elena Elias Elsa Emil Enzo Erika Esther
    Eva Fabian Farah Felix Fiona Flora Frida Gemma Georg Gita Greta Gustav Hanna Hassan Hedda Helga
    Henrik Hugo Ida Igor Ilse Ines Ingrid Irma Ivan Jakob Jana Jasper Jonas Josefa Judit Julian
    Kamal Karin Kaspar Katya Klaus Lars Laszlo Leila Lena Leo Linus Lotte Lucia Ludwig Mabel Magnus
    Maia Malik Marek Marta Matteo Mila Mira Moritz Nadia Naomi Nico Nils Nina Noor Oda Olga Omar
    Oskar Otto Paula Pavel Petra Pia Quentin Rafael Rania Renata Rosa Ruben Salma Samir Selma Sigrid
    Silas Sofia Stefan Sven Tamar Tarek Thea Tilda Timur Tomas Ulrich Uma Vera Viktor Vilma Walter
    Wanda Yara Yusuf Zara Zeno
    """
)

_TOWNS = _words(
    """
    Abberton Alderby Amsel Arden Ashmere Balmora Barrow Belmont Birkby Brindle Calder Camber Carrow
    Cedarholm Corvale Cresswell Dalby Danmere Dunford Eastwick Elmsted Fairholt Farrow Fenwick
    Fernley Galloway Garrick Glenmoor Greywell Hallam Harrow Haverly Hazelton Holmby Irondale
    Ivybridge Kelby Kestrel Kirkwall Lakeford Langdon Larkhill Lindow Lowmoor Maplewick Marlow
    Medford Merrin Millbrook Morrow Netherby Norwell Oakham Oldcastle Orford Pelham Penrose Pinewood
    Quarry Ravenhall Redmoor Ridgeway Rookby Rosedale Saltash Sandwell Selby Silverton Skelton
    Stonebridge Summerby Tarrant Thornby Tidewell Tolland Underwood Upton Valmere Wakefield Walden
    Westerly Whitby Wilden Winslow Woodhall Yarrow
    """
)

_COLOURS = _words(
    """
    amber black blue bronze brown crimson golden green grey ivory orange pink purple red scarlet
    silver violet white yellow
    """
)

_THINGS = _words(
    """
    anchor basket bell blanket book bottle bowl box brush bucket button candle carpet chair clock
    coat coin compass cup drum fan flag glove hammer hat helmet jar kettle key kite knife ladder
    lamp lantern lock map mask mirror mug needle plate purse ribbon ring rope saddle scarf shield
    shoe spoon stool sword teapot telescope tent trunk umbrella vase wallet wheel whistle
    """
)

_JOBS = _words(
    """
    baker barber beekeeper blacksmith bookbinder brewer builder butcher carpenter clerk cobbler cook
    courier dancer dentist diver doctor farmer ferryman fisher florist gardener glazier goldsmith
    guard hatter hunter jeweller joiner judge lawyer librarian locksmith mason merchant midwife
    miller miner nurse painter pilot plumber poet porter potter printer sailor sculptor shepherd
    singer surgeon tailor tanner teacher tinker trader weaver welder writer
    """
)

_INSTRUMENTS = _words(
    """
    accordion banjo bassoon bugle cello clarinet cornet dulcimer fiddle flute guitar harmonica harp
    harpsichord horn lute lyre mandolin marimba oboe organ piano piccolo recorder saxophone sitar
    tambourine triangle trombone trumpet tuba ukulele viola violin xylophone zither
    """
)

_ANIMALS = _words(
    """
    badger beaver buzzard canary cat cockatoo cow crane crow dog donkey dove duck falcon ferret
    finch fox frog gecko goat goose hamster hare hawk hedgehog hen heron horse lamb lizard llama
    magpie mole mouse mule newt parrot peacock pheasant pigeon pony rabbit raven robin rooster sheep
    snail sparrow squirrel starling swan toad tortoise turkey turtle weasel
    """
)

_FOODS = _words(
    """
    almonds apples apricots asparagus barley beans beetroot biscuits bread broccoli butter cabbage
    cake carrots celery cheese cherries chestnuts chocolate cinnamon cucumber custard dates
    dumplings eggs figs garlic ginger grapes honey leeks lemons lentils melons mushrooms mustard
    noodles nuts oats olives onions pancakes pasta peaches pears peas peppers pickles plums porridge
    potatoes pumpkin radishes raisins rice soup spinach toast tomatoes turnips walnuts
    """
)

_GOODS = _words(
    """
    arches armour bridges bricks buttons canals cannons castles cellars chimneys cider clocks cloth
    dolls fairs fountains furniture gates glass gloves harbours hats kites ladders lace lanterns
    leather libraries linen markets marble mills mosaics museums orchards paper parks perfume
    pottery puppets ropes roses salt ships silk soap springs statues stables tapestries tea theatres
    tiles towers toys tulips vineyards wells wine wool
    """
)

_ROOMS = _words(
    """
    attic barn basement bathroom bedroom boathouse cabin cellar chapel closet corridor courtyard
    cupboard dairy garage garden garret greenhouse hall hallway kitchen larder laundry library loft
    nursery office orchard pantry parlour porch shed stable storeroom studio study tower treehouse
    vault wardrobe workshop yard
    """
)


@dataclass(frozen=True)
class Relation:
    """One kind of fact: whose it is, what it says, how it is stated, asked and answered.

    `{s}` is the subject and `{v}` the value; the answer repeats the subject so that it reads as a
    sentence.
    """

    name: str
    subject: Literal["person", "town", "thing"]
    value: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    answer: str


_VALUES: dict[str, list[str]] = {
    "person": _PEOPLE,
    "town": _TOWNS,
    "job": _JOBS,
    "instrument": _INSTRUMENTS,
    "animal": _ANIMALS,
    "food": _FOODS,
    "good": _GOODS,
    "room": _ROOMS,
}

RELATIONS: tuple[Relation, ...] = (
    Relation(
        "home",
        "person",
        "town",
        (
            "{s} lives in {v}.",
            "{s} has a house in {v}.",
            "These days {s} lives in {v}.",
            "{v} is home to {s}.",
        ),
        ("Where does {s} live?", "In which town does {s} live?"),
        "{s} lives in {v}.",
    ),
    Relation(
        "job",
        "person",
        "job",
        ("{s} works as a {v}.", "{s} is a {v} by trade.", "{s} found work as a {v}."),
        ("What is the job of {s}?", "What work does {s} do?"),
        "{s} works as a {v}.",
    ),
    Relation(
        "music",
        "person",
        "instrument",
        (
            "{s} plays the {v}.",
            "{s} practises the {v} every evening.",
            "In the band {s} plays the {v}.",
        ),
        ("Which instrument does {s} play?", "What does {s} play?"),
        "{s} plays the {v}.",
    ),
    Relation(
        "pet",
        "person",
        "animal",
        ("{s} keeps a {v}.", "{s} has a tame {v}.", "{s} looks after a {v}."),
        ("Which animal does {s} keep?", "What pet does {s} have?"),
        "{s} keeps a {v}.",
    ),
    Relation(
        "food",
        "person",
        "food",
        ("{s} loves {v}.", "{s} eats {v} every day.", "Nothing pleases {s} more than {v}."),
        ("Which food does {s} love?", "What does {s} love to eat?"),
        "{s} loves {v}.",
    ),
    Relation(
        "friend",
        "person",
        "person",
        (
            "The best friend of {s} is {v}.",
            "{s} trusts {v} above all others.",
            "{s} counts {v} as a best friend.",
        ),
        ("Who is the best friend of {s}?", "Whom does {s} trust most?"),
        "The best friend of {s} is {v}.",
    ),
    Relation(
        "owner",
        "thing",
        "person",
        ("The {s} belongs to {v}.", "The owner of the {s} is {v}.", "{v} owns the {s}."),
        ("Who owns the {s}?", "To whom does the {s} belong?"),
        "The {s} belongs to {v}.",
    ),
    Relation(
        "place",
        "thing",
        "room",
        (
            "The {s} is kept in the {v}.",
            "The {s} stands in the {v}.",
            "Someone left the {s} in the {v}.",
        ),
        ("Where is the {s}?", "In which room is the {s}?"),
        "The {s} is in the {v}.",
    ),
    Relation(
        "fame",
        "town",
        "good",
        (
            "{s} is known for its {v}.",
            "{s} is proud of its {v}.",
            "People visit {s} to see its {v}.",
        ),
        ("What is {s} known for?", "What is the town of {s} known for?"),
        "{s} is known for its {v}.",
    ),
    Relation(
        "mayor",
        "town",
        "person",
        ("The mayor of {s} is {v}.", "{s} chose {v} as its mayor.", "{v} is the mayor of {s}."),
        ("Who is the mayor of {s}?", "Whom did {s} choose as mayor?"),
        "The mayor of {s} is {v}.",
    ),
)

# Sentences that state nothing anyone asks about. Those with {p} or {t} mention a subject of the
# document, so finding the name alone does not find the fact.
_FILLERS: tuple[str, ...] = (
    "The morning was quiet.",
    "Rain fell on the hills all week.",
    "Nobody was in a hurry.",
    "The market opened early.",
    "A cold wind came from the north.",
    "Later the sun came out.",
    "The road was long and dusty.",
    "Children ran along the river.",
    "It was a good year for everyone.",
    "The bells rang at noon.",
    "In winter the days are short.",
    "Everyone waited for the boat.",
    "The old bridge was closed again.",
    "There was little news that day.",
    "Snow covered the fields.",
    "The lamps were lit at dusk.",
    "{p} was late again.",
    "{p} waved from the road.",
    "{p} walked along the river with {q}.",
    "{p} wrote a long letter.",
    "{p} met {q} at the market.",
    "{p} slept badly last night.",
    "{p} told {q} an old story.",
    "The road to {t} was closed.",
    "It rained in {t} all day.",
    "{p} once passed through {t}.",
)


@dataclass(frozen=True)
class Fact:
    """One stated fact, as (subject, relation name, value)."""

    subject: str
    relation: str
    value: str


@dataclass(frozen=True)
class Document:
    """A text and what can be asked about it.

    Every question has exactly one answer in the text; `facts[i]` is what `questions[i]` asks for.
    """

    text: str
    questions: list[tuple[str, str]]
    facts: list[Fact]


def is_held_out(subject: str, relation: str, value: str) -> bool:
    """Return whether training never states this triple.

    crc32 rather than `hash`, which differs from one Python process to the next.
    """
    return zlib.crc32(f"{subject}|{relation}|{value}".encode()) % HELD_OUT_MODULUS == 0


def count_tokens(text: str) -> int:
    """Return how many tokens the demo tokenizer makes of corpus text.

    One per word and one per run of punctuation.
    """
    return len(re.findall(r"\w+|[^\w\s]+", text))


def user_message(document: str, question: str) -> str:
    """Return the content of the user's chat message, as the model saw it in training."""
    return f"{document}\n\n{question}"


def make_document(
    rng: random.Random, *, n_tokens_target: int = 1000, split: Split = "heldout"
) -> Document:
    """Write one document and every question it answers.

    Args:
        rng: The only source of chance; equal states give equal documents.
        n_tokens_target: Length in tokens of the demo tokenizer; reached to within one sentence.
        split: Which triples may be stated. "heldout" ones never occur in training.

    Raises:
        ValueError: If `n_tokens_target` is below 16, too short for a fact and its surroundings.

    Example:
        >>> document = make_document(random.Random(7), n_tokens_target=60)
        >>> question, answer = document.questions[0]
    """
    if n_tokens_target < 16:
        raise ValueError(f"n_tokens_target is {n_tokens_target}, expected at least 16")
    cast = _choose_cast(rng, n_tokens_target)
    pending = [(relation, subject) for relation in RELATIONS for subject in cast[relation.subject]]
    rng.shuffle(pending)
    filler_share = rng.uniform(0.05, 0.30)
    sentences: list[str] = []
    facts: list[Fact] = []
    questions: list[tuple[str, str]] = []
    n_tokens = 0
    while n_tokens < n_tokens_target:
        if pending and rng.random() >= filler_share:
            relation, subject = pending.pop()
            value = _choose_value(rng, relation, subject, split)
            if value is None:
                continue
            facts.append(Fact(subject, relation.name, value))
            questions.append(
                (
                    rng.choice(relation.questions).format(s=subject),
                    relation.answer.format(s=subject, v=value),
                )
            )
            sentence = rng.choice(relation.statements).format(s=subject, v=value)
        else:
            sentence = _filler(rng, cast)
        sentences.append(sentence)
        n_tokens += count_tokens(sentence)
    return Document(_paragraphs(rng, sentences), questions, facts)


def _choose_cast(rng: random.Random, n_tokens_target: int) -> dict[str, list[str]]:
    """Choose the subjects, few enough that each carries several facts.

    The other facts of a subject are the best distractors.
    """
    n_facts = max(4, n_tokens_target // 7)
    n_people = min(len(_PEOPLE), max(2, n_facts // 7 + rng.randint(0, 3)))
    n_towns = max(1, n_facts // 12 + rng.randint(0, 2))
    n_things = max(1, n_facts // 9 + rng.randint(0, 3))
    things = [f"{colour} {thing}" for colour in _COLOURS for thing in _THINGS]
    return {
        "person": rng.sample(_PEOPLE, n_people),
        "town": rng.sample(_TOWNS, n_towns),
        "thing": rng.sample(things, n_things),
    }


def _choose_value(rng: random.Random, relation: Relation, subject: str, split: Split) -> str | None:
    """Return a value of the wanted split, or None when chance offers none in many draws."""
    for _ in range(64):
        value = rng.choice(_VALUES[relation.value])
        if value != subject and is_held_out(subject, relation.name, value) == (split == "heldout"):
            return value
    return None


def _filler(rng: random.Random, cast: dict[str, list[str]]) -> str:
    """Return a sentence that answers no question."""
    p, q = rng.sample(cast["person"], 2)
    return rng.choice(_FILLERS).format(p=p, q=q, t=rng.choice(cast["town"]))


def _paragraphs(rng: random.Random, sentences: list[str]) -> str:
    """Join sentences into paragraphs of four to nine."""
    paragraphs: list[str] = []
    start = 0
    while start < len(sentences):
        stop = start + rng.randint(4, 9)
        paragraphs.append(" ".join(sentences[start:stop]))
        start = stop
    return "\n\n".join(paragraphs)


def vocabulary_texts() -> list[str]:
    """Return texts in which every word of the corpus occurs, at a line's start and inside one."""
    words = [
        *_PEOPLE,
        *_TOWNS,
        *_COLOURS,
        *_THINGS,
        *_JOBS,
        *_INSTRUMENTS,
        *_ANIMALS,
        *_FOODS,
        *_GOODS,
        *_ROOMS,
    ]
    texts = [f"The {word}" for word in words]
    texts += [*_PEOPLE, *_TOWNS]
    for relation in RELATIONS:
        for template in (*relation.statements, *relation.questions, relation.answer):
            texts += [
                template.format(s="Mira", v="Mira"),
                "Mira. " + template.format(s="Mira", v="Mira"),
            ]
    texts += [t.format(p="Mira", q="Mira", t="Mira") for t in _FILLERS]
    texts += ["Mira. " + t.format(p="Mira", q="Mira", t="Mira") for t in _FILLERS]
    return texts
