"""Questions with known answers: how they are read, put to the desktop model, scored and recorded."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from PIL import Image

from export.checkpoints import open_checkpoint
from export.evaluation import eager, run
from export.evaluation.eager import EagerModel
from export.evaluation.page import write_pages
from export.evaluation.questions import Line, read_questions
from export.evaluation.run import UNPRUNED, Cell, Record, evaluate, scores, wanted_cells
from export.evaluation.scores import accuracy, by_category, difference
from export.families.family import ModelEntry
from export.golden import make_golden
from export.models.pocket import POCKET
from export.models.prompt import SampleText
from pruning import METHODS, PruneSpec
from runtime.errors import OutputError, RequestError
from runtime.image import load_photo
from tests.tiny_tiles import TILED_ONEVISION

pytestmark = pytest.mark.usefixtures("one_thread")

LINES = [
    {"image": "a.png", "question": "What is this?", "answer": "a cat", "category": "what"},
    {"image": "a.png", "question": "How many are there?", "answer": "3", "category": "count"},
    {"image": "b.png", "question": "What colour is it?", "answer": "red", "category": "what"},
]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).resize((360, 340)).save(tmp_path / name)
    path = tmp_path / "asked.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)) + "\n", encoding="utf-8")
    return path


def test_questions_are_read_photo_by_photo(questions: Path) -> None:
    asked = read_questions(questions)
    assert [photo.photo.name for photo in asked.photos] == ["a.png", "b.png"]
    assert [len(photo.lines) for photo in asked.photos] == [2, 1]
    assert asked.questions == 3
    assert asked.first(1).questions == 2
    assert asked.first(1).sha256 != asked.sha256
    assert asked.first(9) is asked
    before = asked.sha256
    (questions.parent / "b.png").write_bytes((questions.parent / "a.png").read_bytes())
    assert read_questions(questions).sha256 != before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no questions"),
        ("{", "line 1"),
        ("[1]", "line 1"),
        ('{"image": "a.png", "question": "x"}', "answer"),
        ('{"image": "a.png", "question": "x", "answer": 3}', "str"),
        ('{"image": "a.png", "question": "x", "answer": "y", "colour": "z"}', "colour"),
        ('\n{"image": "a.png", "question": " ", "answer": "y"}', "line 2: question is empty"),
        ('{"image": "c.png", "question": "x", "answer": "y"}', "c.png, which cannot be read"),
    ],
)
def test_a_bad_line_is_named(questions: Path, text: str, words: str) -> None:
    questions.write_text(text, encoding="utf-8")
    with pytest.raises(RequestError, match=words):
        read_questions(questions)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"none\.jsonl cannot be read"):
        read_questions(tmp_path / "none.jsonl")


def test_intervals() -> None:
    rng = np.random.default_rng(1)
    right = [[bool(x) for x in rng.random(5) < 0.8] for _ in range(200)]
    found = accuracy(right)
    share = np.mean(right)
    # Independent answers: the interval is that of a share of 1000.
    half = 1.96 * np.sqrt(share * (1 - share) / 1000)
    assert found.value == pytest.approx(share)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.15)
    assert accuracy([[True, True], [True]]) == accuracy([[True]])
    same = difference(right, right)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    # One question in five is lost on every photo: no photo drawn again changes that.
    lost = difference([[*row[:4], False] for row in right], [[*row[:4], True] for row in right])
    assert (lost.value, lost.low, lost.high) == pytest.approx((-0.2, -0.2, -0.2))
    with pytest.raises(ValueError, match="same questions"):
        difference([[True]], [[True, False]])


def test_answers_that_hang_together_widen_the_interval() -> None:
    together = [[bool(i % 2)] * 10 for i in range(40)]
    apart = [[bool(k % 2) for k in range(10)] for _ in range(40)]
    assert accuracy(apart).high - accuracy(apart).low < 1e-9
    assert accuracy(together).high - accuracy(together).low > 0.25


def test_categories_keep_one_row_a_photo() -> None:
    parts = by_category([[True, False], [True]], [["a", "b"], ["b"]])
    assert parts == {"a": [[True], []], "b": [[False], [True]]}


@pytest.mark.parametrize(("keep", "cut"), [(64, 2), (16, 0), (576, 2)])
def test_what_counts_as_right_is_what_greedy_decoding_says(
    questions: Path, keep: int, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer that the golden side decodes token by token is right; the same with one other token is not."""
    checkpoint = open_checkpoint("pocket")
    model = EagerModel(checkpoint, POCKET)
    photo = load_photo(questions.parent / "a.png")
    asked = model._tokenizer.question_ids("How many are there?")
    spec = None if keep == 576 else PruneSpec(keep=keep)
    golden = make_golden(
        checkpoint, POCKET, spec, cut=cut, pixel_values=model._desktop.pixels(photo),
        text=SampleText(ids=tuple(asked), question=tuple(asked)),
    )  # fmt: skip
    said = golden["answer.ids"].tolist()[:6]
    other = [*said[:3], (said[3] + 1) % 300, *said[4:]]
    answers = {"as said": said[:-1], "otherwise": other[:-1], "short": said[:2]}
    monkeypatch.setattr(model._tokenizer, "answer_ids", lambda answer: answers[answer])
    monkeypatch.setattr(model, "_ends", (said[-1],))
    lines = [Line("a.png", "How many are there?", answer) for answer in ("otherwise", "as said", "short")]
    reading = model.read(photo, lines, [cut])
    chooser = run._Chooser(model, run.Wanted(UNPRUNED if spec is None else "vlm-pruner", keep, cut))
    kept = chooser.choose(reading.features[cut])
    assert (kept is None) == (spec is None)
    if kept is not None:
        assert kept[1][0].tolist() == golden["kept_indices"].tolist()
    assert model.right(reading, cut, kept) == [False, True, said[2] == said[-1]]


def test_a_record_is_filled_once(questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, asked = open_checkpoint("pocket"), read_questions(questions)
    out_dir = tmp_path / "out"
    out_dir.mkdir()
    told: list[str] = []
    cells = wanted_cells(["vlm-pruner", "uniform"], [16, 4], None)
    record = evaluate(checkpoint, POCKET, asked, cells, out_dir, told=lambda words, _: told.append(words))
    assert told == ["1 of 2 photos", "2 of 2 photos"]
    assert [(cell.name, cell.keep, cell.cut) for cell in record.cells] == [
        (UNPRUNED, 576, None), ("vlm-pruner", 16, 2), ("vlm-pruner", 4, 2), ("uniform", 16, 2), ("uniform", 4, 2),
    ]  # fmt: skip
    assert all([len(row) for row in cell.right] == [2, 1] for cell in record.cells)
    assert [len(kept) for kept in record.cells[1].kept] == [16, 16]
    assert msgspec.json.decode((out_dir / run.RECORD).read_bytes(), type=Record) == record
    assert [p.name for p in out_dir.iterdir()] == [run.RECORD]
    rows = scores(record)
    assert rows[0].loss.value == 0
    assert set(rows[0].categories) == {"what", "count"}

    def none(*_: object) -> None:
        raise AssertionError("the model was loaded for cells that were there")

    monkeypatch.setattr(eager, "EagerModel", none)
    again = evaluate(checkpoint, POCKET, asked, cells, out_dir, told=lambda *_: None)
    assert again == record
    with pytest.raises(OutputError, match="other questions"):
        evaluate(checkpoint, POCKET, asked.first(1), cells, out_dir, told=lambda *_: None)
    (out_dir / run.RECORD).write_text("{}")
    with pytest.raises(OutputError, match="no record"):
        evaluate(checkpoint, POCKET, asked, cells, out_dir, told=lambda *_: None)


def test_an_interrupted_run_goes_on(questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, asked = open_checkpoint("pocket"), read_questions(questions)
    cells = wanted_cells(["uniform"], [16], None)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    expected = evaluate(checkpoint, POCKET, asked, cells, whole, told=lambda *_: None)
    monkeypatch.setattr(run, "SAVED_EVERY", 1)
    seen: list[str] = []

    def interrupt(words: str, _: float) -> None:
        seen.append(words)
        if len(seen) == 2:  # behind the first photo, which was saved
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, POCKET, asked, cells, stopped, told=interrupt)
    assert not (stopped / run.RECORD).exists()
    told: list[str] = []
    assert evaluate(checkpoint, POCKET, asked, cells, stopped, told=lambda words, _: told.append(words)) == expected
    assert told == ["2 of 2 photos"]


def test_cells_that_cannot_be() -> None:
    with pytest.raises(RequestError, match="not known; allowed: all, vlm-pruner"):
        wanted_cells(["best"], [64], None)
    cuts = {cell.method: cell.cut for cell in wanted_cells(list(METHODS), [64], None)}
    assert set(cuts) == set(METHODS)
    assert (cuts["vlm-pruner"], cuts["dart"], cuts["visionzip"]) == (2, 2, 0)
    with pytest.raises(RequestError, match="--cut 2: visionzip may prune at"):
        wanted_cells(["vlm-pruner", "visionzip"], [64], 2)


def test_a_method_that_looks_at_the_question_sees_the_first_one(questions: Path) -> None:
    """FastV's attention is that of the first question's last token, as transformers computes it for that one alone."""
    from transformers import LlavaForConditionalGeneration

    checkpoint = open_checkpoint("pocket")
    model = EagerModel(checkpoint, POCKET)
    photo = load_photo(questions.parent / "a.png")
    lines = [Line("a.png", text, "3") for text in ("How many are there?", "What is it?")]
    reading = model.read(photo, lines, [0, 2])
    whole = LlavaForConditionalGeneration.from_pretrained(
        checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
    )
    asked = model._tokenizer.question_ids("How many are there?")
    ids = torch.tensor([[*model._frame.ids, *asked]])
    with torch.no_grad():
        out = whole(input_ids=ids, pixel_values=torch.from_numpy(np.array(model._desktop.pixels(photo))),
                    output_attentions=True)  # fmt: skip
    prefix = len(model._frame.prefix_ids)
    expected = out.attentions[1][:, :, -1, prefix : prefix + 576].mean(1)
    found = reading.features[2].attention
    assert found is not None
    assert torch.allclose(found, expected, atol=1e-6)
    assert reading.features[0].attention is not None  # the class token's
    assert not torch.allclose(reading.features[0].attention, expected, atol=1e-3)
    kept = run._Chooser(model, run.Wanted("fastv", 16, 2)).choose(reading.features[2])
    assert kept is not None
    tokens, indices = kept
    assert set(indices[0].tolist()) == set(expected[0].topk(16).indices.tolist())
    assert tokens.shape == (1, 16, reading.image[2].shape[2])


@pytest.mark.parametrize("entry", [POCKET, TILED_ONEVISION], ids=lambda entry: entry.name)
def test_the_page_draws_kept_tokens_of_every_view(entry: ModelEntry, questions: Path, tmp_path: Path) -> None:
    asked, tokens = read_questions(questions), entry.geometry.image_tokens
    right = [[True] * len(photo.lines) for photo in asked.photos]
    kept = [[0, tokens - 1]] * len(right)
    record = Record(
        model=entry.name,
        weights_sha256="0",
        questions=str(questions),
        questions_sha256=asked.sha256,
        categories=[[line.category for line in photo.lines] for photo in asked.photos],
        cells=[
            Cell(key="a", name=UNPRUNED, keep=tokens, cut=None, right=right, kept=[[], []]),
            Cell(key="b", name="uniform", keep=2, cut=2, right=right, kept=kept),
        ],
    )
    write_pages(record, asked, entry.family.image(None, entry.geometry), entry.geometry, tmp_path)
    page = (tmp_path / "evaluation.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert page.count("<image ") == 1
