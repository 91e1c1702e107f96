"""Questions about a scene, with the one right answer of each, in several phrasings; some phrasings are held out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from training.scenes import COLOURS, HELD_OUT_PAIRS, SHAPES, SIDE, Scene, Thing

CATEGORIES = ("colour", "shape", "pattern", "count", "relation", "place", "presence", "reading")
MOST = 5  # nobody is asked to count further


@dataclass(frozen=True)
class Question:
    """A question and its answer, in lower case, as the model is to say it.

    Attributes:
        things: what the text names that is one thing of the picture: the name as it stands there, and the thing.
    """

    category: str
    text: str
    answer: str
    things: tuple[tuple[str, Thing], ...] = ()


class _Made(NamedTuple):
    parts: tuple[str, ...]
    answer: str
    things: tuple[tuple[str, Thing], ...] = ()


# The last two of each list are held out: evaluation uses these alone.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour is the {0}?",
        "Which colour does the {0} have?",
        "Tell me the colour of the {0}.",
        "The {0} is of which colour?",
        "Name the colour that the {0} has.",
        "What is the colour of the {0}?",
        "Which colour is the {0}?",
    ),
    "shape": (
        "What shape is the {0} thing?",
        "Which shape does the {0} thing have?",
        "Tell me the shape of the {0} thing.",
        "The {0} thing is of which shape?",
        "Name the shape that the {0} thing has.",
        "What is the shape of the {0} thing?",
        "Which shape is the {0} thing?",
    ),
    "pattern": (
        "Is the {0} plain, striped or dotted?",
        "Which pattern does the {0} have?",
        "Tell me the pattern of the {0}.",
        "The {0} is of which pattern?",
        "Name the pattern that the {0} has.",
        "What is the pattern of the {0}?",
        "Which pattern is the {0}?",
    ),
    "count": (
        "How many {0} are there?",
        "Count the {0}.",
        "How many {0} can you see?",
        "Tell me how many {0} there are.",
        "What is the number of {0}?",
        "How many {0} does the picture show?",
        "Count all {0} that you can see.",
    ),
    "relation": (
        "Is the {0} {2} the {1}?",
        "Can you see the {0} {2} the {1}?",
        "Does the picture show the {0} {2} the {1}?",
        "The {0} is {2} the {1}, yes or no?",
        "Tell me, is the {0} {2} the {1}?",
        "Yes or no, is the {0} {2} the {1}?",
    ),
    "direction": (
        "Where is the {0}, seen from the {1}?",
        "Seen from the {1}, where is the {0}?",
        "In which direction from the {1} is the {0}?",
        "Tell me where the {0} is, seen from the {1}.",
        "Which direction is the {0}, seen from the {1}?",
        "In which direction is the {0}, seen from the {1}?",
    ),
    "place": (
        "Where is the {0}?",
        "In which corner is the {0}?",
        "Where in the picture is the {0}?",
        "Tell me where the {0} is.",
        "Where can you see the {0}?",
        "In which corner of the picture is the {0}?",
        "Tell me in which corner the {0} is.",
    ),
    "presence": (
        "Is there {0}?",
        "Can you see {0}?",
        "Does the picture show {0}?",
        "There is {0}, yes or no?",
        "Tell me, is there {0}?",
        "Yes or no, is there {0}?",
        "Is there {0} in the picture?",
    ),
    "word": (
        "What word is printed?",
        "Which word does the sign show?",
        "Tell me the word on the sign.",
        "Read the word.",
        "What does the printed word say?",
        "Which word is printed?",
        "Read the word on the sign.",
    ),
    "number": (
        "What number is printed?",
        "Which number does the sign show?",
        "Tell me the number on the sign.",
        "Read the number.",
        "What does the printed number say?",
        "Which number is printed?",
        "Read the number on the sign.",
    ),
}
HELD_OUT = 2
# Training asks in these ways, too: with few ways of each kind a model goes by a question's first words. The tokenizer
# learns from the ones above alone.
MORE_PHRASINGS: dict[str, tuple[str, ...]] = {
    "colour": (
        "What colour does the {0} have?",
        "Say which colour the {0} has.",
        "Can you tell me the colour of the {0}?",
        "The {0} in the picture, of which colour is it?",
    ),
    "shape": (
        "What shape does the {0} thing have?",
        "Say which shape the {0} thing has.",
        "Can you tell me the shape of the {0} thing?",
        "The {0} thing in the picture, of which shape is it?",
    ),
    "pattern": (
        "What pattern does the {0} have?",
        "Say which pattern the {0} has.",
        "Can you tell me the pattern of the {0}?",
        "The {0} in the picture, of which pattern is it?",
    ),
    "count": (
        "How many {0} are in the picture?",
        "Say how many {0} you can see.",
        "Can you count the {0}?",
        "Tell me the number of {0}.",
    ),
    "relation": (
        "Is it true that the {0} is {2} the {1}?",
        "In the picture, is the {0} {2} the {1}?",
        "Can you tell me, is the {0} {2} the {1}?",
        "Say yes or no, the {0} is {2} the {1}.",
    ),
    "direction": (
        "In which direction does the {0} lie, seen from the {1}?",
        "In which direction can you see the {0} from the {1}?",
        "Which direction from the {1} is the {0}?",
        "Which way is the {0}, seen from the {1}?",
        "What is the direction of the {0}, seen from the {1}?",
        "From the {1}, in which direction is the {0}?",
        "Say in which direction the {0} is from the {1}.",
    ),
    "place": (
        "Which corner is the {0} in?",
        "Say where the {0} is in the picture.",
        "In the picture, where is the {0}?",
        "Can you tell me where the {0} is?",
    ),
    "presence": (
        "In the picture, is there {0}?",
        "Say yes or no, there is {0}.",
        "Can you find {0}?",
        "Is it true that there is {0}?",
    ),
    "word": (
        "What word is on the sign?",
        "Can you read the word?",
        "Say which word is printed.",
        "The sign shows which word?",
    ),
    "number": (
        "What number is on the sign?",
        "Can you read the number?",
        "Say which number is printed.",
        "The sign shows which number?",
    ),
}


def _plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _with_article(name: str) -> str:
    return f"an {name}" if name[0] in "aeiou" else f"a {name}"


class _Asker:
    """What can be asked about one scene: each method gives the parts of a question and its answer, or None."""

    def __init__(self, rng: np.random.Generator, scene: Scene, held_out: bool) -> None:
        self.rng, self.scene, self.held_out = rng, scene, held_out
        self.shapes = Counter(t.shape for t in scene.things)
        self.colours = Counter(t.colour for t in scene.things)
        self.pairs = Counter((t.colour, t.shape) for t in scene.things)

    def _one(self, things: list[Thing]) -> Thing | None:
        return things[int(self.rng.integers(len(things)))] if things else None

    def _name(self, thing: Thing) -> str | None:
        """The shortest name that means this thing alone, or at times a longer one."""
        if self.shapes[thing.shape] == 1 and self.rng.random() < 0.5:
            return thing.shape
        return f"{thing.colour} {thing.shape}" if self.pairs[thing.colour, thing.shape] == 1 else None

    def colour(self) -> _Made | None:
        thing = self._one([t for t in self.scene.things if self.shapes[t.shape] == 1])
        return _Made((thing.shape,), thing.colour, ((thing.shape, thing),)) if thing else None

    def shape(self) -> _Made | None:
        thing = self._one([t for t in self.scene.things if self.colours[t.colour] == 1])
        return _Made((thing.colour,), thing.shape, ((thing.colour, thing),)) if thing else None

    def pattern(self) -> _Made | None:
        fits = [t for t in self.scene.things if t.radius >= 14]
        fill = ("plain", "striped", "dotted")[int(self.rng.integers(3))]
        thing = self._one([t for t in fits if t.fill == fill] or fits)
        name = thing and self._name(thing)
        return _Made((name,), thing.fill, ((name, thing),)) if thing and name else None

    def count(self) -> _Made | None:
        asked = {_plural(shape): self.shapes[shape] for shape in SHAPES}
        asked |= {f"{colour} things": self.colours[colour] for colour in COLOURS}
        by_number: dict[int, list[str]] = {}
        for name, number in asked.items():
            by_number.setdefault(number, []).append(name)
        least = 0 if self.rng.random() < 0.15 else 1
        numbers = [n for n in by_number if least <= n <= MOST]
        if not numbers:
            return None
        number = numbers[int(self.rng.integers(len(numbers)))]
        names = by_number[number]
        return _Made((names[int(self.rng.integers(len(names)))],), str(number))

    def _two(self) -> tuple[Thing, str, Thing, str] | None:
        if len(self.scene.things) < 2:
            return None
        first, second = (self.scene.things[i] for i in self.rng.choice(len(self.scene.things), 2, replace=False))
        one, two = self._name(first), self._name(second)
        return (first, one, second, two) if one and two else None

    def relation(self) -> _Made | None:
        found = self._two()
        if not found:
            return None
        first, one, second, two = found
        dx, dy = first.x - second.x, first.y - second.y
        ways = (("left of", -dx), ("right of", dx), ("above", -dy), ("below", dy))
        relations = [(words, far > 0) for words, far in ways if abs(far) > 24]
        if not relations:
            return None
        words, there = relations[int(self.rng.integers(len(relations)))]
        return _Made((one, two, words), "yes" if there else "no", ((one, first), (two, second)))

    def direction(self) -> _Made | None:
        found = self._two()
        if not found:
            return None
        first, one, second, two = found
        dx, dy = first.x - second.x, first.y - second.y
        if max(abs(dx), abs(dy)) < 24 or max(abs(dx), abs(dy)) < 1.6 * min(abs(dx), abs(dy)):
            return None
        answer = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else ("above" if dy < 0 else "below")
        return _Made((one, two), answer, ((one, first), (two, second)))

    def place(self) -> _Made | None:
        middle = SIDE / 2
        thing = self._one([t for t in self.scene.things if min(abs(t.x - middle), abs(t.y - middle)) > 20])
        name = thing and self._name(thing)
        if not thing or not name:
            return None
        answer = f"{'top' if thing.y < middle else 'bottom'} {'left' if thing.x < middle else 'right'}"
        return _Made((name,), answer, ((name, thing),))

    def presence(self) -> _Made | None:
        if self.rng.random() < 0.5:
            thing = self._one(list(self.scene.things))
            return _Made((_with_article(f"{thing.colour} {thing.shape}"),), "yes") if thing else None
        # Mostly a shape and a colour that are both there, but not in one thing.
        colours = sorted(self.colours) if self.rng.random() < 0.75 and self.colours else list(COLOURS)
        shapes = sorted(self.shapes) if self.rng.random() < 0.75 and self.shapes else list(SHAPES)
        absent = [(c, s) for c in colours for s in shapes if not self.pairs[c, s]]
        if not self.held_out:  # else training would teach that what it never shows is never there
            absent = [(c, s) for c, s in absent if (s, c) not in HELD_OUT_PAIRS]
        if not absent:
            return None
        colour, shape = absent[int(self.rng.integers(len(absent)))]
        return _Made((_with_article(f"{colour} {shape}"),), "no")

    def word(self) -> _Made | None:
        words = [sign.text.lower() for sign in self.scene.signs if not sign.is_number]
        return _Made((), words[0]) if len(words) == 1 else None

    def number(self) -> _Made | None:
        numbers = [sign.text for sign in self.scene.signs if sign.is_number]
        return _Made((), numbers[0]) if len(numbers) == 1 else None


KINDS = tuple(PHRASINGS)
_CATEGORY = {"direction": "relation", "word": "reading", "number": "reading"}


def questions_about(
    scene: Scene, seed: tuple[int, ...], *, held_out: bool = False, kinds: tuple[str, ...] = KINDS
) -> Iterator[Question]:
    """Asks about a scene without end, one kind after another, none twice; ends when nothing new is found."""
    rng = np.random.default_rng((*seed, 7))
    asker = _Asker(rng, scene, held_out)
    said: set[tuple[str, tuple[str, ...]]] = set()
    idle = 0
    while idle < 3 * len(kinds):
        for kind in rng.permutation(len(kinds)):
            name = kinds[kind]
            ask: Callable[[], _Made | None] = getattr(asker, name)
            made = ask()
            if not made or (name, made.parts) in said:
                idle += 1
                continue
            idle = 0
            said.add((name, made.parts))
            known = PHRASINGS[name]
            texts = known[-HELD_OUT:] if held_out else known[:-HELD_OUT] + MORE_PHRASINGS[name]
            text = texts[int(rng.integers(len(texts)))].format(*made.parts)
            yield Question(_CATEGORY.get(name, name), text[0].upper() + text[1:], made.answer, made.things)


def corpus() -> str:
    """All that is asked and answered, for the tokenizer to learn its pairs from."""
    from training.scenes import FILLS, WORDS

    parts = [f"\n{text}".format("it", "that", "so") for texts in PHRASINGS.values() for text in texts]
    parts += [*COLOURS, *SHAPES, *map(_plural, SHAPES), *FILLS, *WORDS] * 4
    parts += ["yes", "no", "left of", "right of", "above", "below", "top left", "bottom right", "things", "thing"] * 6
    return " ".join(parts)
