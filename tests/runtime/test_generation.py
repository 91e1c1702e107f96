"""Answers equal transformers' own generation; a photo's prefill is made once, kept and shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from export.checkpoints import FolderCheckpoint
from export.graphs.decoder import Context, build_text_graphs
from export.graphs.graph import Graph, Parts
from export.graphs.open_decoder import open_text_parts
from export.graphs.vision import build_vision_encoder
from export.models.prompt import read_prompt
from pruning import PruneSpec, reference
from pruning.vlm_pruner.settings import Settings
from runtime.bundle import GraphInfo
from runtime.errors import BundleError, EngineError, OutputError, RequestError
from runtime.generation import Answers, Prefill, Sampling
from runtime.text_graphs import (
    BLOCK,
    DECODER_FRONT,
    IMAGE_PREFILL,
    LM_HEAD,
    TEXT_DECODER,
    TOKEN_EMBEDDING,
    VISION_ENCODER,
    RunningGraph,
)
from tests.tiny_llava import TINY, write_tiny

ROOM = 24
QUESTION = [9, 17, 33, 8, 21, 40, 11]
SPEC = PruneSpec(grid=(4, 4), keep=6, settings=Settings(pivots=2, token_batch=3))


class InTorch:
    """A graph that runs where it was built, behind the interface of an open one."""

    def __init__(self, name: str, module: Graph) -> None:
        self.graph = GraphInfo(
            name=name,
            file="x",
            engine="executorch",
            arithmetic=("fp32",),
            inputs=module.input_infos(),
            outputs=module.output_infos(),
        )
        self.module = module
        self.runs = 0

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        self.runs += 1
        assert set(inputs) == {info.name for info in self.graph.inputs}
        for info in self.graph.inputs:
            assert info.fits(str(inputs[info.name].dtype), inputs[info.name].shape)
        with torch.no_grad():
            out = self.module(*(torch.from_numpy(inputs[info.name]) for info in self.graph.inputs))
        arrays = [np.asarray(x) for x in (out if isinstance(out, tuple) else (out,))]
        return {info.name: array for info, array in zip(self.graph.outputs, arrays, strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


class Make(Protocol):
    """Makes the graphs of one set."""

    def __call__(self, spec: PruneSpec | None, *, chunk: int = 4, room: int = ROOM) -> dict[str, InTorch]: ...


@pytest.fixture(params=["static", "open"])
def make(request: pytest.FixtureRequest, folder: Path) -> Make:
    return partial(_graphs, folder, request.param == "open")


def _graphs(
    folder: Path, opened: bool, spec: PruneSpec | None, *, chunk: int = 4, room: int = ROOM
) -> dict[str, InTorch]:
    checkpoint = FolderCheckpoint(folder, TINY)
    frame = TINY.family.frame(read_prompt(folder, TINY.geometry, TINY).prefix_ids, TINY.geometry)
    context = Context(TINY.geometry, frame, keep=spec.keep if spec else 16, cut=2, text=room)
    modules = {
        VISION_ENCODER: build_vision_encoder(checkpoint, TINY, spec),
        **(
            dict(Parts(open_text_parts(checkpoint, context, chunk=chunk)))
            if opened
            else build_text_graphs(checkpoint, context, chunk=chunk)
        ),
    }
    return {name: InTorch(name, module) for name, module in modules.items()}


def answers(running: Mapping[str, RunningGraph], *, name: str = "tiny", end_ids: Sequence[int] = ()) -> Answers:
    return Answers(running, bundle=name, before=TINY.prefix_tokens, first_text=TINY.prefix_tokens + 16, end_ids=end_ids)


def pixels(seed: int = 4) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((1, 3, 58, 58), dtype=np.float32)


def ids(session: Answers, photo: Prefill, question: Sequence[int] = QUESTION, **options: Any) -> list[int]:
    return [token.id for token in session.answer(photo, question, **{"max_new_tokens": 8, **options})]


def test_unpruned_answer_is_transformers_own(folder: Path, make: Make) -> None:
    from transformers import LlavaForConditionalGeneration

    whole: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    prefix = read_prompt(folder, TINY.geometry, TINY).prefix_ids
    prompt = torch.tensor([[*prefix, *[TINY.geometry.image_token_id] * 16, *QUESTION]])
    with torch.no_grad():
        expected = whole.generate(
            input_ids=prompt,
            pixel_values=torch.from_numpy(pixels()),
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
        )[0, prompt.shape[1] :].tolist()
    session = answers(make(None))
    assert ids(session, session.see(pixels())) == expected


def test_pruned_answer_is_that_of_transformers_layers_around_the_papers_loop(folder: Path, make: Make) -> None:
    """All tokens in one sequence, no cache, nothing of ours but the loop: 8 greedy tokens, each from scratch."""
    from transformers import DynamicCache, LlavaForConditionalGeneration

    whole: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    decoder: Any = whole.model.language_model
    prefix = read_prompt(folder, TINY.geometry, TINY).prefix_ids
    first, last = len(prefix), len(prefix) + 16

    def run(layers: Sequence[Any], hidden: torch.Tensor, at: torch.Tensor, cache: Any = None) -> torch.Tensor:
        count = hidden.shape[1]
        mask = torch.full((count, count), -1e9).triu(1)[None, None]
        for layer in layers:
            hidden = layer(
                hidden,
                attention_mask=mask,
                position_ids=at[None],
                position_embeddings=decoder.rotary_emb(hidden, at[None]),
                past_key_values=cache,
            )
        return hidden

    @torch.no_grad()
    def next_token(text: list[int]) -> int:
        embedded = [decoder.embed_tokens(torch.tensor([ids])) for ids in (list(prefix), text)]
        features = whole.model.get_image_features(torch.from_numpy(pixels())).pooler_output[0][None]
        at = torch.arange(last + len(text))
        cache: Any = DynamicCache(config=whole.config.text_config)
        hidden = run(decoder.layers[:2], torch.cat([embedded[0], features, embedded[1]], 1), at, cache)
        keys = cache.layers[1].keys[:, :, first:last].permute(0, 2, 1, 3).flatten(2)
        tokens, kept = reference.prune(keys, hidden[:, first:last], SPEC)
        hidden = torch.cat([hidden[:, :first], tokens, hidden[:, last:]], 1)
        at = torch.cat([at[:first], kept[0] + first, at[last:]])
        return int(whole.lm_head(decoder.norm(run(decoder.layers[2:], hidden, at))[0, -1]).argmax())

    expected: list[int] = []
    for _ in range(8):
        expected.append(next_token([*QUESTION, *expected]))
    session = answers(make(SPEC))
    assert ids(session, session.see(pixels())) == expected


@pytest.mark.parametrize("chunk", [1, 3, 7, 16])
def test_chunks_change_nothing(make: Make, chunk: int) -> None:
    """A question in pieces, with or without padding, is the question."""
    one, other = answers(make(SPEC)), answers(make(SPEC, chunk=chunk))
    assert ids(one, one.see(pixels())) == ids(other, other.see(pixels()))


def test_questions_share_the_photo_and_not_each_other(make: Make) -> None:
    running = make(SPEC)
    session = answers(running)
    photo = session.see(pixels())
    first, second = ids(session, photo), ids(session, photo, QUESTION[::-1])
    assert first != second
    assert ids(session, photo) == first
    assert running[VISION_ENCODER].runs == 1
    if IMAGE_PREFILL in running:
        assert running[IMAGE_PREFILL].runs == 1
    other = session.see(pixels(5))
    assert ids(session, other) == ids(answers(make(SPEC)), other)
    assert ids(session, photo) == first


def test_sessions_over_one_photo_do_not_disturb_each_other(make: Make) -> None:
    """What a photo left is never written again, though the session that saw it works on the very same memory."""
    running = make(SPEC)
    session, other = answers(running), answers(running)
    photo = session.see(pixels())
    left = {name: part.copy() for name, part in photo.caches.items()}
    alone = ids(session, photo), ids(other, photo, QUESTION[::-1])
    streams = (
        session.answer(photo, QUESTION, max_new_tokens=5, past_end=True),
        other.answer(photo, QUESTION[::-1], max_new_tokens=5, past_end=True),
    )
    pairs = list(zip(*streams, strict=True))
    for one, expected in zip(range(2), alone, strict=True):
        assert [pair[one].id for pair in pairs] == expected[:5]
    assert all(np.array_equal(part, left[name]) for name, part in photo.caches.items())


def test_an_open_cache_holds_a_photo_once(folder: Path) -> None:
    running = _graphs(folder, True, SPEC)
    handed: list[np.ndarray] = []
    front = running[DECODER_FRONT]
    run = front.run

    def noted(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        handed.append(inputs["past_key_0"])
        return run(inputs)

    front.run = noted  # type: ignore[method-assign]
    session = answers(running)
    photo = session.see(pixels())
    ids(session, photo)
    assert np.shares_memory(handed[0], photo.caches["key_0"])


def test_cache_is_as_large_as_on_paper(make: Make) -> None:
    session = answers(make(SPEC))
    text = TINY.geometry.text
    full, kept = TINY.prefix_tokens + 16 + ROOM, TINY.prefix_tokens + 6 + ROOM
    assert session.cache_bytes == 2 * 4 * text.kv_heads * text.head_dim * (2 * full + (text.layers - 2) * kept)


def test_prefill_outlives_the_session(make: Make, tmp_path: Path) -> None:
    session = answers(make(SPEC))
    photo = session.see(pixels())
    photo.save(tmp_path / "photo.safetensors")
    again = Prefill.load(tmp_path / "photo.safetensors")
    assert (again.bundle, again.image_ready_ms) == (photo.bundle, photo.image_ready_ms)
    assert all(np.array_equal(again.caches[name], part) for name, part in photo.caches.items())
    running = make(SPEC)
    assert ids(answers(running), again) == ids(session, photo)
    assert running[VISION_ENCODER].runs == 0


def test_prefill_of_another_bundle_is_refused(make: Make) -> None:
    photo = answers(make(SPEC), name="theirs").see(pixels())
    with pytest.raises(BundleError, match="prefilled by theirs, not by tiny"):
        answers(make(SPEC)).answer(photo, QUESTION)
    claimed = Prefill("tiny", answers(make(None)).see(pixels()).caches, 1.0)
    with pytest.raises(BundleError, match="does not fit the cache"):
        answers(make(SPEC)).answer(claimed, QUESTION)


@pytest.mark.parametrize("content", [b"", b"not a tensor", b"\x08\0\0\0\0\0\0\0{}      "])
def test_file_that_is_no_prefill(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "photo").write_bytes(content)
    with pytest.raises(BundleError, match="is not a saved prefill"):
        Prefill.load(tmp_path / "photo")
    with pytest.raises(BundleError, match="is not a saved prefill"):
        Prefill.load(tmp_path / "none")


def test_prefill_that_cannot_be_written(make: Make, tmp_path: Path) -> None:
    photo = answers(make(SPEC)).see(pixels())
    with pytest.raises(OutputError, match="cannot be written"):
        photo.save(tmp_path / "none" / "photo")


def test_what_has_no_room_is_refused_before_anything_runs(make: Make) -> None:
    running = make(SPEC)
    session = answers(running)
    photo = session.see(pixels())
    with pytest.raises(RequestError, match="need 25 entries of the text cache, which has 24"):
        session.answer(photo, QUESTION, max_new_tokens=19)
    with pytest.raises(RequestError, match="the question is empty"):
        session.answer(photo, [])
    with pytest.raises(RequestError, match="max_new_tokens=0"):
        session.answer(photo, QUESTION, max_new_tokens=0)
    assert running[TOKEN_EMBEDDING].runs == 0
    assert len(ids(session, photo, max_new_tokens=18)) == 18


def test_answer_ends_at_an_end_token(make: Make) -> None:
    session = answers(make(SPEC))
    photo = session.see(pixels())
    whole = ids(session, photo)
    end = whole[3]
    assert ids(answers(make(SPEC), end_ids=[end]), photo) == whole[: whole.index(end)]


def test_open_graphs_of_different_exports_are_refused(folder: Path) -> None:
    make = partial(_graphs, folder, True)
    ours, theirs = make(SPEC), make(SPEC, room=ROOM + 1)
    with pytest.raises(BundleError, match="different numbers of text tokens"):
        answers({**ours, DECODER_FRONT: theirs[DECODER_FRONT]})
    with pytest.raises(BundleError, match="do not fill the cache"):
        answers({name: graph for name, graph in ours.items() if name != DECODER_FRONT})
    with pytest.raises(BundleError, match="tiny has no lm_head"):
        answers({name: graph for name, graph in ours.items() if name != LM_HEAD})


def test_an_open_cache_grows_with_what_is_filled(folder: Path) -> None:
    """No entry is handed over that a question of this length cannot have filled, but for what fills up a block."""
    running = _graphs(folder, True, SPEC, chunk=4, room=3 * BLOCK)
    session = answers(running)
    photo, seen = session.see(pixels()), []
    front = running[DECODER_FRONT]
    run, prefix = front.run, TINY.prefix_tokens + 16

    def noted(inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        seen.append((int(inputs["filled"][0]), inputs["past_key_0"].shape[2], inputs["inputs_embeds"].shape[1]))
        return run(inputs)

    front.run = noted  # type: ignore[method-assign]
    ids(session, photo, [5] * 6, max_new_tokens=BLOCK + 3)
    assert [(filled, tokens) for filled, _, tokens in seen[:3]] == [(prefix, 4), (prefix + 4, 2), (prefix + 6, 1)]
    assert all(filled <= entries <= filled + BLOCK for filled, entries, _ in seen)
    assert len({entries for _, entries, _ in seen}) == 2  # it grew, once


def test_graphs_of_different_exports_are_refused(folder: Path) -> None:
    make = partial(_graphs, folder, False)
    ours, theirs = make(SPEC), make(SPEC, room=ROOM + 1)
    with pytest.raises(BundleError, match="have different caches"):
        answers({**ours, TEXT_DECODER: theirs[TEXT_DECODER]})
    shorter = make(PruneSpec(grid=(4, 4), keep=5, settings=Settings(pivots=2, token_batch=3)))
    with pytest.raises(BundleError, match="different numbers of text tokens"):
        answers({**ours, IMAGE_PREFILL: shorter[IMAGE_PREFILL]})
    with pytest.raises(BundleError, match="tiny has no image_prefill, text_decoder"):
        answers({name: graph for name, graph in ours.items() if name not in (IMAGE_PREFILL, TEXT_DECODER)})


def test_sampling_is_repeatable_and_greedy_at_zero(make: Make) -> None:
    session = answers(make(SPEC))
    photo = session.see(pixels())
    warm = [ids(session, photo, sampling=Sampling(temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]
    assert ids(session, photo, sampling=Sampling(temperature=2.0, top_p=1e-9)) == ids(session, photo)


@settings(max_examples=50, deadline=None)
@given(top_p=st.floats(0.05, 1.0), temperature=st.floats(0.1, 5.0), seed=st.integers(0, 1000))
def test_sampling_keeps_to_the_likeliest(top_p: float, temperature: float, seed: int) -> None:
    logits = np.random.default_rng(seed).standard_normal(30).astype(np.float32)
    weights = np.exp(logits.astype(np.float64) / temperature)
    shares = np.sort(weights / weights.sum())[::-1]
    allowed = int((np.cumsum(shares) < top_p - 1e-9).sum()) + 1
    chance = np.random.default_rng(seed)
    drawn = {Sampling(temperature=temperature, top_p=top_p).choose(logits, chance) for _ in range(40)}
    assert drawn <= set(np.argsort(-logits)[:allowed].tolist())


def test_sampling_follows_the_shares() -> None:
    logits = np.log(np.asarray([0.5, 0.3, 0.2], np.float32))
    chance = np.random.default_rng(0)
    drawn = [Sampling(temperature=1.0).choose(logits, chance) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.5, 0.3, 0.2], atol=0.03)


@pytest.mark.parametrize("temperature", [5e-324, 1e-310, 1e-30])
@pytest.mark.parametrize("logits", [[0.5, 2.0, -1e30], [3.0, np.inf, -np.inf], [-np.inf, -3e38, -np.inf]])
def test_next_to_no_temperature_is_greedy(temperature: float, logits: list[float]) -> None:
    scores, chance = np.asarray(logits, np.float32), np.random.default_rng(0)
    assert {Sampling(temperature=temperature).choose(scores, chance) for _ in range(9)} == {int(scores.argmax())}


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_draws_between_equals(dtype: type[np.floating[Any]]) -> None:
    logits, chance = np.asarray([1.0, 7.0, -np.inf, 7.0], dtype), np.random.default_rng(0)
    assert Sampling().choose(logits, chance) == 1
    for temperature in (5e-324, 0.01):
        assert {Sampling(temperature=temperature).choose(logits, chance) for _ in range(30)} == {1, 3}
    assert {Sampling(temperature=100.0, top_p=5e-324).choose(logits, chance) for _ in range(30)} == {1}
    assert {Sampling(temperature=100.0).choose(logits, chance) for _ in range(90)} == {0, 1, 3}


def test_top_p_one_leaves_nothing_out() -> None:
    # The second token's share is smaller than what any rounding of a sum up to 1 would see.
    logits = np.asarray([0.0, np.log(1e-13)])

    class Last:
        """A draw that always takes the last token it is offered."""

        def choice(self, count: int, p: np.ndarray) -> int:
            return count - 1

    last: Any = Last()
    assert Sampling(temperature=1.0).choose(logits, last) == 1
    assert Sampling(temperature=1.0, top_p=1 - 1e-9).choose(logits, last) == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("logits", "says"), [([1.0, np.nan], "not a number"), ([-np.inf, -np.inf], "minus infinity for all")]
)
def test_logits_that_choose_nothing(temperature: float, logits: list[float], says: str) -> None:
    with pytest.raises(EngineError, match=says):
        Sampling(temperature=temperature).choose(np.asarray(logits, np.float32), np.random.default_rng(0))


@pytest.mark.parametrize("seed", [0, 2**32 - 1, 2**64, 10**40])
def test_seeds_of_any_size_repeat(seed: int) -> None:
    logits = np.zeros(1000, np.float32)
    draws = [Sampling(temperature=1.0, seed=seed).choose(logits, np.random.default_rng(seed)) for _ in range(2)]
    assert draws[0] == draws[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 1e308}, "temperature=1e\\+308 must lie in 0..100"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"top_p": 1 + 2**-52}, "top_p=1.0000000000000002"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_sampling_that_means_nothing(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        Sampling(**options)
