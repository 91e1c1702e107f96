"""Scenes and questions: what a label and an answer say is what was drawn, and what is held out is never shown."""

from __future__ import annotations

from itertools import islice
from typing import Any

import numpy as np
import pytest

from training import scenes
from training.pictures import PRINT, THINGS
from training.questions import CATEGORIES, HELD_OUT, PHRASINGS, questions_about
from training.scenes import (
    COLOURS,
    FILLS,
    GLYPHS,
    GRID,
    HELD_OUT_FONTS,
    HELD_OUT_PAIRS,
    HELD_OUT_PHOTOS,
    PATCH,
    SHAPES,
    Mixture,
    Scene,
    Sign,
    Thing,
    make_scene,
)


def test_a_seed_makes_the_same_scene() -> None:
    one, two = make_scene((4, 2), THINGS), make_scene((4, 2), THINGS)
    assert np.array_equal(one.pixels, two.pixels)
    assert (one.things, one.signs, one.corner) == (two.things, two.signs, two.corner)
    assert not np.array_equal(one.pixels, make_scene((4, 3), THINGS).pixels)


@pytest.mark.parametrize("patches", [8, 12, GRID])
def test_labels_say_what_lies_in_each_patch(patches: int) -> None:
    for number in range(20):
        scene = make_scene((5, number), THINGS, patches=patches)
        assert scene.pixels.shape == (patches * PATCH, patches * PATCH, 3)
        centres = np.argwhere(scene.labels[..., 4])
        drawn = {(int(t.y) // PATCH - scene.corner[0], int(t.x) // PATCH - scene.corner[1]) for t in scene.things}
        assert {tuple(place) for place in centres.tolist()} == drawn
        for thing in scene.things:
            if thing.radius < 1.2 * PATCH or thing.shape in ("ring", "star"):
                continue  # smaller than its patch, or hollow there
            row, column = int(thing.y) // PATCH - scene.corner[0], int(thing.x) // PATCH - scene.corner[1]
            shape, colour, fill, glyph, _ = scene.labels[row, column]
            assert (SHAPES[shape - 1], COLOURS[colour - 1], FILLS[fill - 1], glyph) == (
                thing.shape, thing.colour, thing.fill, 0,
            )  # fmt: skip


def test_every_letter_of_a_sign_is_in_the_labels_where_it_is_printed() -> None:
    found = printed = 0
    for number in range(30):
        scene = make_scene((6, number), PRINT, patches=12)
        for sign in scene.signs:
            top, bottom = (int(y) // PATCH - scene.corner[0] for y in (sign.box[1], sign.box[3]))
            there = scene.labels[max(top, 0) : bottom + 1, :, 3]
            printed += len(set(sign.text))
            found += sum(GLYPHS.index(letter) + 1 in there for letter in set(sign.text))
    assert printed > 300
    assert found > 0.93 * printed  # a thin letter may share its patches with its neighbours


def test_training_never_draws_what_is_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    fonts: set[str] = set()
    photos: set[str] = set()
    font, photo = scenes._font, scenes._photo

    def noted_font(name: str, size: int) -> Any:
        fonts.add(name)
        return font(name, size)

    def noted_photo(name: str) -> Any:
        photos.add(name)
        return photo(name)

    monkeypatch.setattr(scenes, "_font", noted_font)
    monkeypatch.setattr(scenes, "_photo", noted_photo)
    for number in range(150):
        scene = make_scene((7, number), Mixture(signs=(1, 2)), patches=12)
        assert not HELD_OUT_PAIRS & {(t.shape, t.colour) for t in scene.things}
    assert fonts
    assert photos
    assert not fonts & set(HELD_OUT_FONTS)
    assert not photos & set(HELD_OUT_PHOTOS)
    fonts.clear()
    photos.clear()
    pairs = set()
    for number in range(60):
        scene = make_scene((7, number), Mixture(signs=(1, 2)), patches=12, held_out=True)
        pairs |= {(t.shape, t.colour) for t in scene.things}
    assert fonts == set(HELD_OUT_FONTS)
    assert photos == set(HELD_OUT_PHOTOS)
    assert pairs >= HELD_OUT_PAIRS


def test_training_and_evaluation_share_no_phrasing() -> None:
    def forms(held_out: bool) -> set[str]:
        said = set()
        for number in range(40):
            scene = make_scene((8, number), Mixture(), held_out=held_out)
            for question in questions_about(scene, (8, number), held_out=held_out):
                text = question.text.lower()
                for name in (*SHAPES, *COLOURS):
                    text = text.replace(name, "#")
                said.add(text)
        return said

    assert not forms(False) & forms(True)
    assert all(len(set(texts)) == len(texts) > HELD_OUT for texts in PHRASINGS.values())


def test_training_does_not_teach_that_held_out_pairs_are_never_there() -> None:
    for number in range(60):
        scene = make_scene((9, number), Mixture(things=(3, 8)))
        for question in questions_about(scene, (9, number)):
            if question.category == "presence":
                assert not any(f"{colour} {shape}" in question.text for shape, colour in HELD_OUT_PAIRS)


def _scene(*things: Thing, signs: tuple[Sign, ...] = ()) -> Scene:
    blank = np.zeros((GRID * PATCH, GRID * PATCH, 3), np.uint8)
    return Scene(blank, things, signs, (0, 0), np.zeros((GRID, GRID, 5), np.uint8))


def test_answers_are_true() -> None:
    scene = _scene(
        Thing("circle", "red", "striped", 60, 60, 20),
        Thing("circle", "blue", "plain", 200, 60, 20),
        Thing("square", "red", "dotted", 60, 280, 20),
        Thing("star", "white", "plain", 280, 285, 20),
        signs=(Sign("STOP", (100, 100, 150, 120)), Sign("407", (100, 160, 150, 180))),
    )
    truth = {
        ("Square", "colour"): "red", ("Star", "colour"): "white",
        ("White", "shape"): "star", ("Blue", "shape"): "circle",
    }  # fmt: skip
    said: dict[str, set[str]] = {}
    for seed in range(40):
        for q in questions_about(scene, (seed,)):
            said.setdefault(q.category, set()).add(q.answer)
            text = q.text
            for (name, category), answer in truth.items():
                if q.category == category and name.lower() in text.lower():
                    assert q.answer == answer, q
            if q.category == "count":
                assert q.answer == ("2" if "circles" in text or "red things" in text else
                                    "1" if any(w in text for w in ("squares", "stars", "blue things", "white things"))
                                    else "0"), q  # fmt: skip
            if q.category == "presence":
                there = [f"{t.colour} {t.shape}" for t in scene.things]
                assert q.answer == ("yes" if any(name in text for name in there) else "no"), q
            if q.category == "reading":
                assert q.answer == ("stop" if "word" in text.lower() else "407"), q
            if q.category == "place" and "star" in text:
                assert q.answer == "bottom right", q
            if q.category == "pattern" and "square" in text:
                assert q.answer == "dotted", q
            if "the square left of the star" in text or "the red square left of the white star" in text:
                assert q.answer == "yes", q
            if "seen from the red square" in text.lower() and "red circle" in text:
                assert q.answer == "above", q
    assert set(said) == set(CATEGORIES)
    assert said["relation"] == {"yes", "no", "left", "right", "above", "below"}


def test_a_question_means_one_thing() -> None:
    for number in range(40):
        scene = make_scene((10, number), Mixture(things=(3, 9)))
        for question in islice(questions_about(scene, (10, number)), 20):
            if question.category == "colour":
                (shape,) = [s for s in SHAPES if s in question.text]
                assert [t.colour for t in scene.things if t.shape == shape] == [question.answer]
            if question.category == "shape":
                (colour,) = [c for c in COLOURS if f"{c} thing" in question.text]
                assert [t.shape for t in scene.things if t.colour == colour] == [question.answer]
