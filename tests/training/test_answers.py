"""The decoder's training: packed questions are as good as single ones, and a run that was stopped goes on as if not."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from training import answers
from training.answers import Asked, Phase, Talker, asked_batches, open_tokenizer, train_answers, train_whole
from training.model import pocket_model
from training.optimiser import Optimiser
from training.scenes import COLOURS, GRID, SHAPES, Mixture
from training.tokenizer import SYSTEM
from training.tower import Seer, see, train_tower

PHASE = Phase(steps=4, patches=5, size=2, room=60, mixtures=(Mixture(things=(1, 3), signs=(0, 0), radius=(8, 14)),))


PACKED = ("ids", "blocks", "places", "goals", "named", "weights")


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


def _talker() -> Talker:
    torch.manual_seed(3)
    return Talker(pocket_model(), frozen_tower=True).eval()


def test_packed_questions_are_answered_as_single_ones() -> None:
    talker = _talker()
    (asked, *_) = asked_batches(5, 0, PHASE)
    with torch.no_grad():
        packed = talker(asked)
        alone, weights = [], []
        for row in range(len(asked.ids)):
            for block in range(1, int(asked.blocks[row].max()) + 1):
                mine = asked.blocks[row] == block
                single = Asked(*(x[row : row + 1] for x in asked))
                single = single._replace(**{name: getattr(single, name)[:, mine] for name in PACKED})
                alone.append(float(talker(single)))
                weights.append(float(single.weights[single.goals >= 0].sum()))
    assert len(alone) > 2
    mean = sum(a * w for a, w in zip(alone, weights, strict=True)) / sum(weights)
    assert float(packed) == pytest.approx(mean, rel=1e-5)


def test_a_packed_question_is_read_as_transformers_reads_the_whole_prompt() -> None:
    """Tower, projector, positions and mask against the library's own forward, on a whole picture."""
    talker = _talker()
    phase = dataclasses.replace(PHASE, patches=GRID, size=1, room=24)
    (asked, *_) = asked_batches(6, 0, phase)
    mine = asked.blocks[0] == 1
    ids, goals = asked.ids[0, mine], asked.goals[0, mine]
    whole = torch.cat([talker.prefix, torch.full((GRID * GRID,), 3), ids])
    from training.pictures import pixel_values

    single = asked._replace(**{name: getattr(asked, name)[:, mine] for name in PACKED})
    with torch.no_grad():
        logits = talker.model(input_ids=whole[None], pixel_values=pixel_values(asked.pixels)).logits[0, -len(ids) :]
        expected = torch.nn.functional.cross_entropy(logits[goals >= 0], goals[goals >= 0])
        assert float(talker(single)) == pytest.approx(float(expected), rel=1e-4)


def test_prompt_is_what_the_chat_template_writes() -> None:
    from jinja2 import Environment

    from training.tokenizer import TEMPLATE

    content = [{"type": "image"}, {"type": "text", "text": "How many rings are there?"}]
    text = (
        Environment()
        .from_string(TEMPLATE)
        .render(messages=[{"role": "user", "content": content}], add_generation_prompt=True)
    )
    tokenizer = open_tokenizer()
    whole = tokenizer.encode(text).ids
    at = whole.index(3)
    assert whole[:at] == tokenizer.encode(f"{SYSTEM} USER: ").ids
    behind = tokenizer.encode("\nHow many rings are there? ASSISTANT:", add_special_tokens=False).ids
    assert whole[at + 1 :] == behind


def test_a_window_is_seen_as_its_part_of_the_grid() -> None:
    torch.manual_seed(0)
    vision = pocket_model().model.vision_tower
    layers = vision.config.num_hidden_layers - 1
    pixels = torch.randn(1, 3, 336, 336)
    with torch.no_grad():
        ours = see(vision, layers, pixels, torch.zeros(1, 2, dtype=torch.long))
        theirs = vision(pixels, output_hidden_states=True).hidden_states[-2]
    assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.slow
def test_stopped_training_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("whole", "stopped"):
        torch.manual_seed(1)
        model = pocket_model()
        seer = Seer(model.model.vision_tower, model.config.vision_config.num_hidden_layers - 1)
        (tmp_path / name).mkdir()
        torch.save({"model": seer.state_dict()}, tmp_path / name / "tower.pt")
    phases = (PHASE, dataclasses.replace(PHASE, steps=2, patches=6))
    monkeypatch.setattr(answers, "SAVED_EVERY", 3)
    train_answers(tmp_path / "whole", phases=phases)

    class Stop(Exception):
        pass

    step = Optimiser.step

    def stopping(self: Optimiser, loss: torch.Tensor, number: int) -> None:
        if number == 4:
            raise Stop
        step(self, loss, number)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(Optimiser, "step", stopping)
        train_answers(tmp_path / "stopped", phases=phases)
    train_answers(tmp_path / "stopped", phases=phases)
    whole, stopped = (torch.load(tmp_path / name / "answers.pt")["model"] for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_the_last_stage_trains_all_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(4)
    before = pocket_model()
    torch.save({"model": before.state_dict()}, tmp_path / "answers.pt")
    seer = Talker(before, frozen_tower=False).seer
    torch.save({"model": seer.state_dict()}, tmp_path / "tower.pt")
    train_whole(tmp_path, phases=(dataclasses.replace(PHASE, steps=1),))
    kept = torch.load(tmp_path / "whole.pt")
    after, heads = kept["model"], kept["talker"]
    assert all(
        not torch.equal(heads[f"seer.{name}"], value) for name, value in seer.state_dict().items() if "heads" in name
    )
    for part in ("vision_tower.encoder.layers.0.", "multi_modal_projector.", "language_model.layers.0."):
        assert all(
            not torch.equal(after[name], value)
            for name, value in before.state_dict().items()
            if part in name and name.endswith("weight") and value.dim() == 2
        ), part


def test_tower_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A few steps bring the loss down; what they leave is found again."""
    train_tower(tmp_path, windows=10, wholes=0, size=4)
    assert torch.load(tmp_path / "tower.pt")["step"] == 10
    train_tower(tmp_path, windows=10, wholes=0, size=4)  # nothing is left to do


def test_a_name_is_told_where_its_thing_stands() -> None:
    """The token that ends a name, and the patch in the middle of what it means."""
    tokenizer = open_tokenizer()
    told = 0
    for asked in asked_batches(8, 0, PHASE):
        for row in range(len(asked.ids)):
            for at in (asked.named[row, :, 0] >= 0).nonzero().flatten().tolist():
                said = tokenizer.decode(asked.ids[row, : at + 1].tolist())
                assert said.endswith((*SHAPES, *COLOURS)), said
                down, right = (asked.named[row, at] - asked.corners[row]).tolist()
                shape, colour, _, _, centre = asked.labels[row, down, right].tolist()
                assert centre == 1
                last = said.split()[-1]
                assert last in (SHAPES[shape - 1], COLOURS[colour - 1])
                told += 1
    assert told > 5
