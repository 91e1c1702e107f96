"""Questions with known answers about photos: a file of JSON lines beside its photos."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from runtime.errors import RequestError

MOST_QUESTIONS = 1_000_000


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line of a questions file.

    Attributes:
        image: the photo, relative to the file's folder.
        question: what is asked, as a user would type it.
        answer: the one answer that counts as right, as the model says it.
        category: what accuracies are told apart by.
    """

    image: str
    question: str
    answer: str
    category: str = "all"


@dataclass(frozen=True)
class PhotoQuestions:
    """A photo and what is asked about it, in the file's order."""

    photo: Path
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class QuestionSet:
    """A questions file: what it asks, photo by photo, and a hash over its text and its photos."""

    name: str
    photos: tuple[PhotoQuestions, ...]
    sha256: str

    @property
    def questions(self) -> int:
        """How many there are."""
        return sum(len(photo.lines) for photo in self.photos)

    def first(self, photos: int | None) -> QuestionSet:
        """The questions about the first `photos` photos; all of them for None."""
        if photos is None or photos >= len(self.photos):
            return self
        return QuestionSet(f"{self.name}, first {photos} photos", self.photos[:photos], f"{self.sha256}-{photos}")


def read_questions(path: Path) -> QuestionSet:
    """Reads a questions file and finds its photos. RequestError for a line that is none, or a photo that is missing."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise RequestError(
            f"the questions file {path} cannot be read: {error.strerror or error}; give a file of JSON lines with "
            "image, question, answer and category"
        ) from error
    by_photo: dict[str, list[Line]] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        if not raw.strip():
            continue
        try:
            line = msgspec.json.decode(raw, type=Line)
        except msgspec.MsgspecError as error:
            raise RequestError(
                f"{path}, line {number}: {error}; a line is an object with image, question, answer and, if there are "
                "several, category"
            ) from error
        blank = [field for field in ("image", "question", "answer", "category") if not getattr(line, field).strip()]
        if blank:
            raise RequestError(f"{path}, line {number}: {blank[0]} is empty; say what it is, or leave the line out")
        by_photo.setdefault(line.image, []).append(line)
    if not by_photo:
        raise RequestError(f"{path} has no questions; give one JSON object a line")
    digest = hashlib.sha256(text)
    photos = []
    for name, lines in by_photo.items():
        photo = path.parent / name
        try:
            digest.update(photo.read_bytes())
        except OSError as error:
            raise RequestError(
                f"{path} asks about {name}, which cannot be read beside it: {error.strerror or error}; put it there"
            ) from error
        photos.append(PhotoQuestions(photo, tuple(lines)))
    return QuestionSet(path.stem, tuple(photos), digest.hexdigest())
