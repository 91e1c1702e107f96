"""The decoder's training: many questions behind one image, in windows first and in whole pictures then."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from training.model import TEXT, pocket_model
from training.optimiser import Optimiser
from training.pictures import pixel_values
from training.questions import KINDS, Question, questions_about
from training.scenes import GRID, PATCH, Mixture, make_scene
from training.tokenizer import SYSTEM, scene_tokenizer
from training.tower import Seer, loss_of, places_of

WHOLES = (Mixture(things=(3, 9), signs=(1, 2)), Mixture(things=(5, 12), signs=(1, 3)))
SAVED_EVERY = 200


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stretch of the training over pictures of one size.

    `patches` is the side of a picture, `size` the pictures of a batch, `room` the tokens of questions for each; of
    `kinds` of questions one that stands there twice is asked twice as often.
    """

    steps: int
    patches: int
    size: int
    room: int
    mixtures: tuple[Mixture, ...]
    kinds: tuple[str, ...] = KINDS


# What is looked up is learnt in small windows, counting and reading in larger ones; whole pictures come last.
PHASES = (
    Phase(
        steps=500,
        patches=8,
        size=20,
        room=120,
        mixtures=(
            Mixture(things=(1, 4), signs=(0, 1), radius=(9, 26), height=(16, 30)),
            Mixture(things=(2, 5), signs=(0, 0), radius=(9, 20)),
            Mixture(things=(0, 2), signs=(2, 3), radius=(9, 20), height=(16, 30)),
        ),
    ),
    Phase(
        steps=550,
        patches=12,
        size=10,
        room=200,
        mixtures=(
            Mixture(things=(1, 6), signs=(0, 2)),
            Mixture(things=(2, 8), signs=(0, 2)),
            Mixture(things=(0, 3), signs=(2, 3)),
        ),
    ),
    Phase(steps=750, patches=GRID, size=5, room=260, mixtures=WHOLES),
)


# Where things are, and how many, is learnt by all parts together.
_HARD = (*KINDS, "count", "relation", "relation", "direction", "direction")
LAST = (
    Phase(
        steps=900,
        patches=12,
        size=10,
        room=240,
        mixtures=(Mixture(things=(2, 7), signs=(0, 1)), Mixture(things=(1, 5), signs=(1, 3))),
        kinds=_HARD,
    ),
    Phase(
        steps=1800,
        patches=GRID,
        size=5,
        room=300,
        mixtures=WHOLES,
        kinds=(*KINDS, "count", "count", "direction", "colour", "shape"),
    ),
)
# How many there are is what is learnt last: half of the questions ask for it in the end.
FINISH = (Phase(steps=450, patches=GRID, size=5, room=300, mixtures=WHOLES, kinds=(*KINDS, *["count"] * 8)),)
# What a patch shows and where it stands stays asked for beside the answers; its loss counts so much less. So do the
# steps to an answer, each asked for at the last token of a thing's name, a layer higher each: where the thing stands,
# how it lies to the thing named before, and what the answer will be. Without them comparing is not learnt.
_DENSE = 0.2
_NAMED = 0.1
_NAMED_LAYER = 2
# An answer of a kind that comes up once a picture counts more.
_HEAVY = {"reading": 3.0}


def open_tokenizer() -> Any:
    """Opens the tokenizer as its library does."""
    import json

    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(scene_tokenizer(TEXT["vocab_size"])))


class Asked(NamedTuple):
    """Pictures and their packed questions.

    pixels   (B, H, W, 3) uint8
    corners  (B, 2) int64
    ids      (B, T) int64, question and answer after question and answer, padded
    blocks   (B, T) int64, which question a token belongs to, from 1; 0 is padding
    places   (B, T) int64, how many tokens of its question stand before it
    goals    (B, T) int64, what the token is to be followed by where that is answer, else -100
    labels   (B, h, w, 5) uint8, what is in each patch
    named    (B, T, 2) int64, row and column of the thing whose name ends there, else -100
    early    (B, T) int64, the first token of the answer where a question's last name ends, else -100
    weights  (B, T) float32, how much a goal counts
    """

    pixels: Tensor
    corners: Tensor
    ids: Tensor
    blocks: Tensor
    places: Tensor
    goals: Tensor
    labels: Tensor
    named: Tensor
    early: Tensor
    weights: Tensor


class _Asked(Dataset[Asked]):
    def __init__(self, seed: int, first: int, phase: Phase) -> None:
        self.seed, self.first, self.phase = seed, first, phase
        self.tokenizer: Any = None

    def __len__(self) -> int:
        return self.phase.steps - self.first

    def __getitem__(self, step: int) -> Asked:
        if self.tokenizer is None:
            self.tokenizer = open_tokenizer()
        phase, pictures, rows, weights = self.phase, [], [], []
        for i in range(phase.size):
            at = (self.seed, (self.first + step) * phase.size + i)
            scene = make_scene(at, phase.mixtures[at[1] % len(phase.mixtures)], patches=phase.patches)
            pictures.append((scene.pixels, scene.corner, scene.labels))
            row: list[tuple[int, ...]] = []
            heavy: list[float] = []
            for block, question in enumerate(questions_about(scene, at, kinds=phase.kinds), start=1):
                asked = self.tokenizer.encode(f"\n{question.text} ASSISTANT:", add_special_tokens=False)
                said = [
                    *self.tokenizer.encode(f" {question.answer}", add_special_tokens=False).ids,
                    TEXT["eos_token_id"],
                ]
                tokens = [*asked.ids, *said]
                if len(row) + len(tokens) - 1 > phase.room:
                    break
                goals = [-100] * (len(asked.ids) - 1) + said
                spots = _spots(question, asked.offsets)
                nowhere = (-100, -100)
                last = max(spots, default=-1)
                row += [
                    (tokens[k], block, k, goals[k], said[0] if k == last else -100, *spots.get(k, nowhere))
                    for k in range(len(tokens) - 1)
                ]
                heavy += [_HEAVY.get(question.category, 1.0)] * (len(tokens) - 1)
            left = phase.room - len(row)
            rows.append(row + [(0, 0, 0, -100, -100, -100, -100)] * left)
            weights.append(heavy + [0.0] * left)
        ids, blocks, places, all_goals, early, *named = torch.tensor(rows).unbind(-1)
        return Asked(
            torch.from_numpy(np.stack([pixels for pixels, _, _ in pictures])),
            torch.tensor([corner for _, corner, _ in pictures]),
            ids,
            blocks,
            places,
            all_goals,
            torch.from_numpy(np.stack([labels for _, _, labels in pictures])),
            torch.stack(named, -1),
            early,
            torch.tensor(weights),
        )


def _spots(question: Question, offsets: Sequence[tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """Row and column of each thing that is named, by the token that its name ends in."""
    spots = {}
    text = f"\n{question.text}".lower()
    for name, thing in question.things:
        end = text.index(name) + len(name)
        token = next(k for k, (_, last) in enumerate(offsets) if last >= end)
        spots[token] = (int(thing.y) // PATCH, int(thing.x) // PATCH)
    return spots


def asked_batches(seed: int, first: int, phase: Phase) -> Iterator[Asked]:
    """The batches of a phase from number `first` on."""
    return iter(DataLoader(_Asked(seed, first, phase), batch_size=None, num_workers=1, prefetch_factor=4))


class Talker(torch.nn.Module):
    """The whole model over packed questions; a tower that is not frozen is asked what its patches show as well."""

    prefix: Tensor

    def __init__(self, model: Any, *, frozen_tower: bool) -> None:
        super().__init__()
        self.model = model
        self.frozen_tower = frozen_tower
        self.seer = Seer(model.model.vision_tower, model.config.vision_config.num_hidden_layers - 1)
        self.seer.requires_grad_(not frozen_tower)
        width = model.config.text_config.hidden_size
        self.where_norm, self.lies_norm, self.early_norm = (torch.nn.LayerNorm(width) for _ in range(3))
        self.where = torch.nn.ModuleList(torch.nn.Linear(width, GRID) for _ in range(2))
        self.lies = torch.nn.ModuleList(torch.nn.Linear(width, 2) for _ in range(2))
        self.early = torch.nn.Linear(width, model.config.text_config.vocab_size)
        self.hidden: dict[int, Tensor] = {}
        for index in range(_NAMED_LAYER, _NAMED_LAYER + 3):
            layer = model.model.language_model.layers[index]
            layer.register_forward_hook(partial(self._keep, index))
        prefix = open_tokenizer().encode(f"{SYSTEM} USER: ").ids
        self.register_buffer("prefix", torch.tensor(prefix), persistent=False)

    def _keep(self, index: int, layer: Any, inputs: Any, out: Any) -> None:
        self.hidden[index] = out[0] if isinstance(out, tuple) else out

    def forward(self, asked: Asked) -> Tensor:
        """-> the mean loss of the answers' tokens, and of what the tower is asked.

        `right` is the share of the answers' tokens that are the most likely ones.
        """
        parts = self.model.model
        size, (rows, columns) = len(asked.pixels), (s // 14 for s in asked.pixels.shape[1:3])
        with torch.set_grad_enabled(not self.frozen_tower and torch.is_grad_enabled()):
            seen = self.seer.see(pixel_values(asked.pixels), asked.corners)
        image = parts.multi_modal_projector(seen[:, 1:])
        embed = parts.language_model.embed_tokens
        hidden = torch.cat([embed(self.prefix).expand(size, -1, -1), image, embed(asked.ids)], 1)
        before, tokens = len(self.prefix), rows * columns
        down, right = places_of(rows, columns, asked.corners)
        places = torch.cat(
            [
                torch.arange(before).expand(size, -1),
                before + (down * GRID + right).flatten(1),
                before + GRID * GRID + asked.places,
            ],
            1,
        )
        end = before + tokens
        block = torch.cat([torch.zeros(size, end, dtype=torch.long), asked.blocks], 1)
        at = torch.arange(hidden.shape[1])
        causal = at[:, None] >= at[None, :]
        mask = causal & ((block[:, None, :] == 0) & (at < end) | (block[:, :, None] == block[:, None, :]))
        out = parts.language_model(
            inputs_embeds=hidden, attention_mask=mask[:, None], position_ids=places, use_cache=False
        ).last_hidden_state[:, end:]
        goal = asked.goals
        logits = self.model.lm_head(out[goal >= 0])
        wanted = goal[goal >= 0]
        self.right = float((logits.argmax(-1) == wanted).float().mean())
        heavy = asked.weights[goal >= 0]
        loss = (F.cross_entropy(logits.float(), wanted, reduction="none") * heavy).sum() / heavy.sum()
        if self.frozen_tower:
            return loss
        loss = loss + _NAMED * self._of_names(asked, end)
        return loss + _DENSE * loss_of(*self.seer.told(seen), asked.labels, asked.corners)

    def _of_names(self, asked: Asked, end: int) -> Tensor:
        """-> the loss of where named things stand, of how one lies to the one named before it, and of early answers."""
        named = asked.named[..., 0] >= 0
        spots, blocks = asked.named[named], asked.blocks[named]
        picture = torch.arange(len(named))[:, None].expand_as(named)[named]
        after = torch.zeros(len(spots), dtype=torch.bool)
        after[1:] = (blocks[1:] == blocks[:-1]) & (picture[1:] == picture[:-1])
        far = spots - spots.roll(1, 0)
        names = self.where_norm(self.hidden[_NAMED_LAYER][:, end:][named])
        pairs = self.lies_norm(self.hidden[_NAMED_LAYER + 1][:, end:][named])
        loss: Tensor = names.new_zeros((), dtype=torch.float32)
        for axis, (where, lies) in enumerate(zip(self.where, self.lies, strict=True)):
            missed = F.cross_entropy(where(names).float(), spots[:, axis], reduction="sum")
            told = after & (far[:, axis].abs() > 1)
            turned = F.cross_entropy(lies(pairs[told]).float(), (far[told, axis] > 0).long(), reduction="sum")
            loss = loss + missed / max(len(spots), 1) + 2 * turned / max(int(told.sum()), 1)
        ended = asked.early >= 0
        answers = self.early(self.early_norm(self.hidden[_NAMED_LAYER + 2][:, end:][ended]))
        return loss + 3 * F.cross_entropy(answers.float(), asked.early[ended])


def train_answers(run: Path, *, phases: tuple[Phase, ...] = PHASES, rate: float = 2e-3) -> None:
    """Trains projector and decoder behind the trained tower, which is frozen; goes on where it stopped."""
    torch.manual_seed(2)
    model = pocket_model()
    if not (run / "answers.pt").exists():
        tower = torch.load(run / "tower.pt")["model"]
        model.model.vision_tower.load_state_dict(
            {name.removeprefix("vision."): value for name, value in tower.items() if name.startswith("vision.")}
        )
    _train(run / "answers.pt", Talker(model, frozen_tower=True), phases, rate=rate, seed=21)


def train_whole(run: Path, *, phases: tuple[Phase, ...] = LAST, rate: float = 1.2e-3) -> None:
    """Trains tower, projector and decoder together, from where `train_answers` ended; goes on where it stopped."""
    torch.manual_seed(3)
    talker = Talker(pocket_model(), frozen_tower=False)
    if not (run / "whole.pt").exists():
        heads = torch.load(run / "tower.pt")["model"]
        talker.seer.load_state_dict(heads)
        talker.model.load_state_dict(torch.load(run / "answers.pt")["model"])
    _train(run / "whole.pt", talker, phases, rate=rate, seed=31)


def train_finish(run: Path, *, phases: tuple[Phase, ...] = FINISH, rate: float = 5e-4) -> None:
    """Goes on from where `train_whole` ended, at a lower rate, with more to count; goes on where it stopped."""
    torch.manual_seed(4)
    talker = Talker(pocket_model(), frozen_tower=False)
    if not (run / "finish.pt").exists():
        talker.load_state_dict(torch.load(run / "whole.pt")["talker"])
    _train(run / "finish.pt", talker, phases, rate=rate, seed=41)


def _train(state: Path, talker: Talker, phases: tuple[Phase, ...], *, rate: float, seed: int) -> None:
    """Takes all steps that `state` does not hold yet; each phase has scenes of its own seed."""
    steps = sum(phase.steps for phase in phases)
    optimiser, done = Optimiser(talker, rate=rate, steps=steps), 0
    if state.exists():
        kept = torch.load(state)
        talker.load_state_dict(kept["talker"])
        optimiser.load(kept["optimiser"])
        done = kept["step"]
    began, scores, before = time.time(), [], 0
    for number, phase in enumerate(phases):
        for asked in asked_batches(seed + number, max(done - before, 0), phase) if done < before + phase.steps else ():
            with torch.autocast("cpu", torch.bfloat16):
                loss = talker(asked)
            optimiser.step(loss, done)
            scores.append([loss.item(), talker.right])
            done += 1
            if done % 50 == 0:
                mean = np.mean(scores, axis=0)
                print(
                    f"{state.stem} {done}/{steps} loss {mean[0]:.3f} right {mean[1]:.3f} {time.time() - began:.0f} s",
                    flush=True,
                )
                scores = []
            if done % SAVED_EVERY == 0 or done == steps:
                whole = {
                    "model": talker.model.state_dict(),
                    "talker": talker.state_dict(),
                    "optimiser": optimiser.state(),
                    "step": done,
                }
                torch.save(whole, state.with_suffix(".new"))
                state.with_suffix(".new").rename(state)
        before += phase.steps
