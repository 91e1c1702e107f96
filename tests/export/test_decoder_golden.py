"""The graphs together give the authors' logits and tokens: eager, exported, and in every engine that runs here.

Of LLaVA-1.5, or of Qwen2-VL where the vectors are: their folder then holds the config of its decoder.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from export.backends.backend import LoweredGraph
from export.backends.onnx import ONNX
from export.backends.xnnpack import XNNPACK
from export.checkpoints import RandomCheckpoint
from export.families.family import ModelEntry, Seen
from export.families.llava.family import LLAVA
from export.families.qwen_vl.family import QWEN2_VL
from export.graphs.decoder import (
    Context,
    build_text_graphs,
)
from export.graphs.graph import Graph
from export.graphs.vision import VisionEncoder, build_vision_encoder
from pruning import PruneSpec
from runtime.bundle import GraphInfo, TensorInfo

pytestmark = pytest.mark.golden

FOLDER = Path(os.environ.get("PRUNEPORT_GOLDEN") or Path(__file__).parent.parent / "golden")
LOGITS_ATOL = 1e-3  # promised by the vectors
CUT = 2
CHUNK = 16
ROOM = 64

Engine = Literal["executorch", "onnxruntime"]
Run = Callable[..., tuple[np.ndarray, ...]]

HEAD_DIM = 64


def _config() -> dict[str, Any]:
    """The decoder as its weights describe it, behind a vision tower that nobody asks for anything."""
    with safe_open(FOLDER / "decoder-weights.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - it is no mapping
    first = "model.layers.0."
    vocab, hidden = shapes["model.embed_tokens.weight"]
    return {
        "model_type": "llava",
        "image_token_index": vocab - 1,
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 336,
            "patch_size": 14,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": shapes[f"{first}mlp.gate_proj.weight"][0],
            "num_hidden_layers": len([name for name in shapes if name.endswith(".input_layernorm.weight")]),
            "num_attention_heads": shapes[f"{first}self_attn.q_proj.weight"][0] // HEAD_DIM,
            "num_key_value_heads": shapes[f"{first}self_attn.k_proj.weight"][0] // HEAD_DIM,
            "head_dim": HEAD_DIM,
            "vocab_size": vocab,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        },
    }


def _qwen_config(decoder: dict[str, Any]) -> dict[str, Any]:
    """The decoder as its config describes it, behind a vision tower that nobody asks for anything."""
    return {
        "model_type": "qwen2_vl",
        "image_token_id": decoder.pop("image_token_id"),
        "vision_config": {"depth": 1, "embed_dim": 16, "num_heads": 2, "hidden_size": decoder["hidden_size"]},
        "text_config": {key: value for key, value in decoder.items() if value is not None},
    }


@functools.cache
def _entry(grid: tuple[int, int]) -> ModelEntry:
    """The vectors' model, at a size of image that makes `grid` tokens."""
    described = FOLDER / "decoder-config.json"
    if not described.exists():
        assert grid == (24, 24)
        return ModelEntry(
            name="golden", family=LLAVA, summary="the vectors' decoder", hub_id=None, config=_config(), prefix_tokens=35
        )
    family = replace(QWEN2_VL, image_size=(grid[0] * 28, grid[1] * 28))
    config = _qwen_config(json.loads(described.read_text()))
    return ModelEntry(name="golden", family=family, summary="the vectors' decoder", hub_id=None, config=config)


class GoldenCheckpoint(RandomCheckpoint):
    """The vectors' decoder behind a vision tower that nobody asks for anything."""

    def __init__(self, entry: ModelEntry) -> None:
        super().__init__(entry, seed=0)
        stored = load_file(FOLDER / "decoder-weights.safetensors")
        self._stored = {name.removeprefix("model."): tensor for name, tensor in stored.items()}

    def tensor(self, name: str) -> torch.Tensor:
        if name in self._stored:
            return self._stored[name].float()
        return super().tensor(name)

    def rows(self, name: str, indices: Sequence[int]) -> torch.Tensor:
        return self.tensor(name)[list(indices)]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One answer of decoder.json, pruned or not."""

    name: str
    grid: tuple[int, int]
    keep: int
    tokens: tuple[int, ...]
    pruned: bool

    @property
    def entry(self) -> ModelEntry:
        return _entry(self.grid)

    @property
    def sizes(self) -> str:
        """What cases have in common whose text graphs are the same."""
        return f"{self.grid[0]}x{self.grid[1]}-{self.keep}"

    def __str__(self) -> str:
        return f"{self.name}-{'pruned' if self.pruned else 'unpruned'}"

    def tensor(self, what: str) -> torch.Tensor:
        return _tensors()[f"{self.name}.{what}"]

    @property
    def logits(self) -> np.ndarray:
        return np.asarray(self.tensor("logits" if self.pruned else "unpruned_logits"))


@functools.cache
def _tensors() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "decoder.safetensors")


def _cases() -> tuple[Case, ...]:
    cases = []
    for row in json.loads((FOLDER / "decoder.json").read_text()):
        rows, columns = row.get("grid", (24, 24))
        for pruned, tokens in ((True, "tokens"), (False, "unpruned_tokens")):
            keep = row["keep"] if pruned else rows * columns
            case = Case(name=row["name"], grid=(rows, columns), keep=keep, tokens=tuple(row[tokens]), pruned=pruned)
            cases.append(case)
    return tuple(cases)


CASES = _cases()


def _context(case: Case) -> Context:
    geometry = case.entry.geometry
    frame = case.entry.family.frame(case.tensor("prefix_ids").tolist(), geometry)
    return Context(geometry, frame, keep=case.keep, cut=CUT, text=ROOM)


class _FromFeatures(Graph):
    """The vision graph from the projector's output on, which is where the vectors begin."""

    def __init__(self, encoder: VisionEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def input_infos(self) -> tuple[TensorInfo, ...]:
        geometry = self.encoder.geometry
        shape = 1, geometry.image_tokens, geometry.text.hidden
        return (TensorInfo(name="features", shape=shape, dtype="float32"),)

    def output_infos(self) -> tuple[TensorInfo, ...]:
        return self.encoder.output_infos()

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.encoder.from_seen(Seen(features, features))


@functools.cache
def _modules(case: Case) -> Mapping[str, Graph]:
    checkpoint = GoldenCheckpoint(case.entry)
    spec = PruneSpec(grid=case.grid, keep=case.keep) if case.pruned else None
    context = _context(case)
    prefix_ids = [int(i) for i in case.tensor("prefix_ids")]
    encoder = build_vision_encoder(checkpoint, case.entry, spec, cut=CUT, prefix_ids=prefix_ids)
    return {"vision": _FromFeatures(encoder), **build_text_graphs(checkpoint, context, chunk=CHUNK)}


def _answer(case: Case, run: Mapping[str, Run]) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Logits (9, V), 8 greedy tokens and kept positions, through the graphs as a phone would call them."""
    context = _context(case)
    features = case.tensor("image_embeds").float()[None].numpy()
    hidden, positions, *caches = run["vision"](features)[: 2 + 2 * CUT]
    caches += run["image_prefill"](hidden, positions)
    past = []
    for index in range(context.layers):
        for part in caches[2 * index : 2 * index + 2]:
            assert part.shape[2] == context.image_entries(index)
            room = np.zeros((1, context.kv_heads, context.text, context.head_dim), np.float32)
            past.append(np.concatenate([part, room], axis=2))

    table = GoldenCheckpoint(case.entry).tensor("embed_tokens.weight").numpy()
    done = 0

    def decode(embeds: np.ndarray, chunk: int) -> np.ndarray:
        nonlocal done
        count = len(embeds)
        padded = np.zeros((1, chunk, embeds.shape[1]), np.float32)
        padded[0, :count] = embeds
        at = np.minimum(context.first_text + done + np.arange(chunk), context.positions - 1)[None].astype(np.int64)
        logits, *new = run["text_prefill" if chunk > 1 else "text_decoder"](padded, at, *past)
        for number, part in enumerate(new):
            start = context.image_entries(number // 2) + done
            past[number][:, :, start : start + count] = part[:, :, :count]
        done += count
        return np.asarray(logits[0, count - 1])

    ids = [int(i) for i in case.tensor("text_ids")]
    for start in range(0, len(ids), CHUNK):
        some = ids[start : start + CHUNK]
        embedded = run["token_embedding"](np.asarray([some + [0] * (CHUNK - len(some))], np.int64))[0][0, : len(some)]
        np.testing.assert_array_equal(embedded, table[some])
        last = decode(embedded.astype(np.float16).astype(np.float32), CHUNK)
    logits, tokens = [last], []
    for _ in case.tokens:
        tokens.append(int(logits[-1].argmax()))
        logits.append(decode(table[tokens[-1:]], 1))
    return np.stack(logits), tokens, positions[0, context.prefix :] - context.prefix


def _check(case: Case, run: Mapping[str, Run]) -> None:
    logits, tokens, kept = _answer(case, run)
    if case.pruned:
        np.testing.assert_array_equal(kept, case.tensor("indices").numpy())
    assert tokens == list(case.tokens)
    np.testing.assert_allclose(logits, case.logits, rtol=0.0, atol=LOGITS_ATOL)


def _in_torch(module: Callable[..., object]) -> Run:
    def run(*inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        with torch.no_grad():
            out = module(*map(torch.from_numpy, inputs))
        return tuple(np.asarray(x) for x in (out if isinstance(out, tuple) else (out,)))

    return run


every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_positions_on_every_axis(case: Case) -> None:
    stored = _tensors().get(f"{case.name}.position_ids")
    context = _context(case)
    assert len(context.rotary) == (1 if stored is None else 3)
    if stored is None:
        assert context.rotary == (tuple(range(context.positions)),)
    else:
        assert stored.tolist() == [list(axis[: stored.shape[1]]) for axis in context.rotary]


@every_case
def test_eager(case: Case) -> None:
    _check(case, {name: _in_torch(module) for name, module in _modules(case).items()})


@every_case
def test_exported(case: Case) -> None:
    run = {}
    for name, module in _modules(case).items():
        with torch.no_grad():
            program = torch.export.export(module, module.example_inputs(), strict=False)
        run[name] = _in_torch(program.module())
    _check(case, run)


def _lowered(modules: Mapping[str, Graph], engine: Engine, folder: Path) -> dict[str, Run]:
    lower = {"executorch": XNNPACK, "onnxruntime": ONNX}[engine].lower
    from runtime.engines import ENGINES

    def opened(name: str, written: LoweredGraph) -> Run:
        graph = GraphInfo(
            name=name,
            file=written.file,
            extra_files=written.extra_files,
            engine=engine,
            arithmetic=("fp32",),
            inputs=modules[name].input_infos(),
            outputs=modules[name].output_infos(),
        )
        loaded = ENGINES[engine](graph, folder / written.file, tuple(folder / file for file in written.extra_files), 2)
        return lambda *inputs: tuple(loaded.run(list(inputs)))

    return {name: opened(name, written) for name, written in lower(modules, folder).items()}


@pytest.fixture(scope="session")
def text_graphs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case, Engine], dict[str, Run]]:
    """The graphs behind the vision graph, in an engine: made once for all cases that keep as many tokens."""
    made: dict[tuple[str, Engine], dict[str, Run]] = {}

    def make(case: Case, engine: Engine) -> dict[str, Run]:
        if (case.sizes, engine) not in made:
            text = {name: module for name, module in _modules(case).items() if name != "vision"}
            made[case.sizes, engine] = _lowered(text, engine, tmp_path_factory.mktemp(f"{engine}{case.sizes}"))
        return made[case.sizes, engine]

    return make


def _engine_cases() -> list[object]:
    """Each case in each engine; those that share graphs run in one process."""
    return [
        pytest.param(case, engine, marks=pytest.mark.xdist_group(f"{engine}{case.sizes}"), id=f"{engine}-{case}")
        for engine in ("executorch", "onnxruntime")
        for case in CASES
    ]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("case", "engine"), _engine_cases())
def test_engine(
    case: Case, engine: Engine, text_graphs: Callable[[Case, Engine], dict[str, Run]], tmp_path: Path
) -> None:
    vision = _lowered({"vision": _modules(case)["vision"]}, engine, tmp_path)
    _check(case, {**vision, **text_graphs(case, engine)})
