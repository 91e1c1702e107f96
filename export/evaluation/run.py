"""An evaluation: every method at every keep over the same questions, cell by cell, with a record that goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from export.evaluation.questions import PhotoQuestions, QuestionSet
from export.evaluation.scores import Interval, accuracy, by_category, difference
from export.request import paper_cut
from runtime.errors import OutputError, RequestError

if TYPE_CHECKING:
    from torch import Tensor

    from export.evaluation.eager import EagerModel, Reading
    from export.families.family import Checkpoint, ModelEntry
    from pruning import Features, Method

RECORD = "evaluation.json"
UNPRUNED = "unpruned"
SAVED_EVERY = 20


class Cell(msgspec.Struct, frozen=True, kw_only=True):
    """What one method, or one bundle, answered.

    Attributes:
        key: a hash over all that decides the answers.
        name: the method, `unpruned`, or a bundle's folder.
        keep: image tokens that stay.
        cut: the decoder layer in front of which they are chosen; None where nothing is pruned.
        right: for each photo, whether each question was answered right, in the file's order.
        kept: for each photo the tokens that stayed, ascending; empty where nothing is pruned.
    """

    key: str
    name: str
    keep: int
    cut: int | None
    right: list[list[bool]]
    kept: list[list[int]]


class Record(msgspec.Struct, kw_only=True):
    """All cells of one model over one set of questions, as evaluation.json holds them."""

    model: str
    weights_sha256: str
    questions: str
    questions_sha256: str
    categories: list[list[str]]
    cells: list[Cell]

    def cell(self, name: str, keep: int | None = None) -> Cell | None:
        """The cell of a method at a keep, or of the unpruned model."""
        return next((cell for cell in self.cells if cell.name == name and keep in (None, cell.keep)), None)


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """One row of a result: accuracies, and how they stand against the unpruned model's.

    `first` is the accuracy on the first question about each photo, `second` on all that come after it, with the same
    tokens: a method that looks at the question chose them by the first.
    """

    name: str
    keep: int
    cut: int | None
    accuracy: Interval
    relative: float
    loss: Interval
    first: Interval
    second: Interval
    categories: dict[str, Interval]


@dataclass(frozen=True)
class Wanted:
    """One cell to be filled."""

    method: str
    keep: int
    cut: int


def scores(record: Record) -> list[Score]:
    """The rows of a record, the unpruned model first."""
    whole = record.cell(UNPRUNED)
    if whole is None:
        raise ValueError("a record without the unpruned model has nothing to be compared with")
    base = accuracy(whole.right)
    return [
        Score(
            name=cell.name,
            keep=cell.keep,
            cut=cell.cut,
            accuracy=(own := accuracy(cell.right)),
            relative=own.value / base.value if base.value else 0.0,
            loss=difference(cell.right, whole.right),
            first=accuracy([row[:1] for row in cell.right]),
            second=accuracy([row[1:] for row in cell.right]),
            categories={name: accuracy(part) for name, part in by_category(cell.right, record.categories).items()},
        )
        for cell in record.cells
    ]


def looks_at_class_token(method: Method) -> bool:
    """Whether a method needs the attention of the tower's class token: what asks for a question has the decoder's."""
    return "attention" in method.needs and "question" not in method.needs


def wanted_cells(
    methods: Sequence[str], keeps: Sequence[int], cut: int | None, *, class_token: bool = True, least_cut: int = 0
) -> list[Wanted]:
    """Each method at each keep, at `cut`, or where that is None at the paper's if method and model may prune there.

    RequestError for a method that is not known, may not prune at `cut`, looks at a class token where there is none, or
    prunes in front of `Geometry.least_cut` alone.
    """
    from pruning import METHODS

    cells = []
    for name in methods:
        if name not in METHODS:
            raise RequestError(f"--method {name!r} is not known; allowed: all, {', '.join(METHODS)}")
        if not class_token and looks_at_class_token(METHODS[name]):
            raise RequestError(
                f"--method {name} chooses by the attention of the tower's class token, and the tower of this model has "
                "none; leave the method out"
            )
        cuts = METHODS[name].cuts
        if cut is not None and not cuts.allow(cut):
            raise RequestError(f"--cut {cut}: {name} may prune at {cuts}; leave --cut or the method out")
        at = usual_cut(METHODS[name], least_cut) if cut is None else cut
        if at < least_cut:
            raise RequestError(
                f"{name} may prune at {cuts}, this model at {least_cut} or more: its tower adds features to every "
                f"image token behind the first {least_cut} decoder layers; leave the method out, or give another --cut"
            )
        cells += [Wanted(name, keep, at) for keep in keeps]
    return cells


def usual_cut(method: Method, least_cut: int = 0) -> int:
    """The paper's cut or a model's least, or where the method may not prune there the first at which it may."""
    usual = paper_cut(least_cut)
    return usual if method.cuts.allow(usual) else method.cuts.least


def evaluate(
    checkpoint: Checkpoint,
    entry: ModelEntry,
    questions: QuestionSet,
    cells: Sequence[Wanted],
    out_dir: Path,
    *,
    told: Callable[[str, float], None],
) -> Record:
    """Fills the cells that the record in `out_dir` lacks, and the unpruned model's; `told` hears of each photo.

    All cells advance photo by photo, so that what precedes the pruner is computed once for all of them. The record is
    written when all are through, and every few photos beside it, from where an interrupted run goes on.
    """
    identity = checkpoint.identity().sha256 or ""
    record = _record(out_dir, entry.name, identity, questions)
    tokens = checkpoint.geometry.image_tokens
    every = [Wanted(UNPRUNED, tokens, checkpoint.geometry.least_cut), *cells]
    missing = [want for want in every if not any(cell.key == _key(record, want) for cell in record.cells)]
    if not missing:
        return record
    from export.evaluation.eager import EagerModel

    model = EagerModel(checkpoint, entry)
    choosers = {want: _Chooser(model, want) for want in missing}
    begun = _Begun(out_dir, hashlib.sha256("".join(_key(record, want) for want in missing).encode()).hexdigest())
    right, kept = begun.read(len(missing))
    for number in range(len(right[0]), len(questions.photos)):
        for index, (answers, chosen) in enumerate(_asked(model, questions.photos[number], choosers)):
            right[index].append(answers)
            kept[index].append(chosen)
        told(f"{number + 1} of {len(questions.photos)} photos", (number + 1) / len(questions.photos))
        if number % SAVED_EVERY == SAVED_EVERY - 1:
            begun.write(right, kept)
    for want, answers_, chosen_ in zip(missing, right, kept, strict=True):
        pruned = want.method != UNPRUNED
        record.cells.append(
            Cell(
                key=_key(record, want),
                name=want.method,
                keep=want.keep,
                cut=want.cut if pruned else None,
                right=answers_,
                kept=chosen_,
            )
        )
    record.cells.sort(key=lambda cell: (cell.name != UNPRUNED,))
    save(record, out_dir)
    begun.remove()
    return record


def save(record: Record, out_dir: Path) -> None:
    """Writes the record, whole or not at all."""
    _write(out_dir / RECORD, msgspec.json.encode(record))


class _Chooser:
    """One cell's pruner, ready to choose."""

    def __init__(self, model: EagerModel, want: Wanted) -> None:
        from pruning import PruneSpec, selector

        self.pruned = want.method != UNPRUNED
        self._select = None
        if self.pruned:
            spec = PruneSpec(grid=model.grid, overview=model.overview, keep=want.keep, method=want.method)
            self._select = selector(spec)

    def choose(self, features: Features) -> tuple[Tensor, Tensor] | None:
        """(1, N, D) -> tokens (1, keep, D) and their indices (1, keep); None where nothing is pruned."""
        return None if self._select is None else self._select(features)


def _asked(
    model: EagerModel, photo: PhotoQuestions, choosers: dict[Wanted, _Chooser]
) -> Iterator[tuple[list[bool], list[int]]]:
    from runtime.image import load_photo

    cuts = sorted({want.cut for want in choosers})
    reading: Reading = model.read(load_photo(photo.photo), photo.lines, cuts)
    for want, chooser in choosers.items():
        kept = chooser.choose(reading.features[want.cut])
        yield model.right(reading, want.cut, kept), [] if kept is None else kept[1][0].tolist()


def _key(record: Record, want: Wanted) -> str:
    """What decides a cell's answers, as one hash: weights, questions, method with its constants, keep and cut."""
    from pruning import METHODS, PruneSpec, settings_numbers

    settings = (
        sorted(settings_numbers(PruneSpec(grid=(1, want.keep), keep=want.keep, method=want.method)).items())
        if want.method in METHODS
        else []
    )
    parts = (record.weights_sha256, record.questions_sha256, want.method, settings, want.keep, want.cut)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _record(out_dir: Path, model: str, weights: str, questions: QuestionSet) -> Record:
    """What an evaluation before this one left in the folder, or an empty record."""
    path = out_dir / RECORD
    fresh = Record(
        model=model,
        weights_sha256=weights,
        questions=questions.name,
        questions_sha256=questions.sha256,
        categories=[[line.category for line in photo.lines] for photo in questions.photos],
        cells=[],
    )
    if not path.exists():
        return fresh
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError) as error:
        raise OutputError(f"{path} is no record of an evaluation ({error}); give another --output-dir") from error
    if (found.weights_sha256, found.questions_sha256) != (weights, questions.sha256):
        raise OutputError(
            f"{path} holds answers of {found.model} with other weights or to other questions; give another --output-dir"
        )
    return found


class _Begun:
    """Answers of a run that is not through yet, in a file beside the record."""

    def __init__(self, out_dir: Path, key: str) -> None:
        self._path, self._key = out_dir / f".{RECORD}.begun", key

    def read(self, cells: int) -> tuple[list[list[list[bool]]], list[list[list[int]]]]:
        """Answers and kept tokens by cell and photo, as far as a run of the same cells came."""
        try:
            key, right, kept = msgspec.json.decode(
                self._path.read_bytes(), type=tuple[str, list[list[list[bool]]], list[list[list[int]]]]
            )
        except (OSError, msgspec.MsgspecError):
            key, right, kept = "", [], []
        if key != self._key or len(right) != cells:
            return [[] for _ in range(cells)], [[] for _ in range(cells)]
        return right, kept

    def write(self, right: list[list[list[bool]]], kept: list[list[list[int]]]) -> None:
        _write(self._path, msgspec.json.encode((self._key, right, kept)))

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _write(path: Path, data: bytes) -> None:
    """Writes a file whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)
