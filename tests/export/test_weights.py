"""Weights that wait in their checkpoint: read once, as a backend writes them, and written as if they had been there."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from export.backends import onnx
from export.backends.executorch import FILE, Delegate, lower
from export.backends.xnnpack import DELEGATE
from export.blocks.byte_embedding import GatheredByteEmbedding
from export.checkpoints import RandomCheckpoint
from export.families.family import Checkpoint
from export.graphs.decoder import Context
from export.graphs.graph import Graph, Parts
from export.graphs.open_decoder import open_text_parts
from export.graphs.vision import build_vision_encoder
from export.quantize import quantize
from export.weights import LateCheckpoint, fill, late, parts_of, read_now
from runtime.bundle import TensorInfo
from runtime.engines.executorch import _bindings
from runtime.errors import CheckpointError
from tests.export.test_nbits import SMALL
from tests.wide_family import TINY_WIDE

WIDTH, INNER, WORDS = 64, 96, 50
SHAPES = {
    "layer.up.weight": (INNER, WIDTH),
    "layer.up.bias": (INNER,),
    "layer.down.weight": (WIDTH, INNER),
    "head.weight": (WORDS, WIDTH),
    "exact.weight": (WIDTH, WIDTH),
    "words.weight": (WORDS, WIDTH),
}


class Drawn:
    """Tensors from a seed that count how often they are read; only those of `exact` are float16 numbers.

    Those of `beyond` are larger than any of these.
    """

    def __init__(self, *, beyond: str = "none") -> None:
        self.reads: Counter[str] = Counter()
        self.beyond = beyond
        self.alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
        self.most_alive = 0

    def shape(self, name: str) -> tuple[int, ...]:
        return SHAPES[name]

    def tensor(self, name: str) -> torch.Tensor:
        self.reads[name] += 1
        drawn = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(len(name)))
        if name.startswith(self.beyond):
            drawn *= 1e6
        read = drawn.half() if name.startswith("exact") else drawn
        if read.dim() > 1:
            self.alive.add(read)
            self.most_alive = max(self.most_alive, len(self.alive))
        return read


class Layer(nn.Module):
    """Two linear layers, (..., WIDTH) -> the same."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER, device="meta")
        self.down = nn.Linear(INNER, WIDTH, bias=False, device="meta")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.down(self.up(x).relu())
        return out


class Stack(Graph):
    """`tokens` rows through layers that another graph may hold, too."""

    def __init__(self, tokens: int, layer: nn.Module, exact: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.tokens, self.layer, self.exact, self.head = tokens, layer, exact, head

    def input_infos(self) -> tuple[TensorInfo, ...]:
        dtype = "float16" if self.exact.weight.dtype == torch.float16 else "float32"
        return (TensorInfo(name="x", shape=(1, self.tokens, WIDTH), dtype=dtype),)

    def output_infos(self) -> tuple[TensorInfo, ...]:
        dtype = self.input_infos()[0].dtype
        return (TensorInfo(name="scores", shape=(1, self.tokens, WORDS), dtype=dtype),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.exact(self.layer(x)))
        return out


class Words(Graph):
    """A table of rows, which XNNPACK does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.words: nn.Module = nn.Embedding(WORDS, WIDTH, device="meta")

    def input_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="ids", shape=(1, 3), dtype="int64"),)

    def output_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="rows", shape=(1, 3, WIDTH), dtype="float32"),)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.words(ids)
        return out


TORCHAO, NBITS = ("8da4w-g32", "8da8w"), ("int4", "int8")


def _graphs(checkpoint: Checkpoint, dtype: torch.dtype, schemes: tuple[str, str] | None = TORCHAO) -> dict[str, Graph]:
    """Two graphs that share their layers, and a table; beside float32, one layer has one scheme, another the other."""
    layer, exact = Layer(), nn.Linear(WIDTH, WIDTH, bias=False, device="meta")
    head, words = nn.Linear(WIDTH, WORDS, bias=False, device="meta"), Words()
    fill(layer, checkpoint, "layer", dtype)
    fill(exact, checkpoint, "exact", dtype)
    fill(head, checkpoint, "head", dtype)
    fill(words.words, checkpoint, "words", dtype)
    if dtype == torch.float32 and schemes is not None:
        for part, scheme in zip((layer.up, layer.down), schemes, strict=True):
            alone = nn.ModuleDict({"it": part})  # quantising may put another module into its place
            quantize(alone, scheme)
            setattr(layer, "up" if part is layer.up else "down", alone["it"])
        if schemes == NBITS:
            words.words = GatheredByteEmbedding(words.words.get_parameter("weight"))
    graphs = {"five": Stack(5, layer, exact, head), "one": Stack(1, layer, exact, head), "words": words}
    return {name: graph.eval().requires_grad_(False) for name, graph in graphs.items()}


def _written(graphs: Mapping[str, Graph], folder: Path, delegate: Delegate = DELEGATE) -> bytes:
    folder.mkdir()
    lower(graphs, folder, delegate)
    assert [path.name for path in folder.iterdir()] == [FILE]
    return (folder / FILE).read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_each_weight_is_read_once_and_not_a_byte_differs(dtype: torch.dtype, tmp_path: Path) -> None:
    source = Drawn()
    graphs = _graphs(LateCheckpoint(cast(Checkpoint, source)), dtype)
    assert dict(source.reads) == {"layer.up.bias": 1}  # what has one axis is not worth waiting for
    late_bytes = _written(graphs, tmp_path / "late")
    assert dict(source.reads) == dict.fromkeys(SHAPES, 1)
    assert late_bytes == _written(_graphs(cast(Checkpoint, Drawn()), dtype), tmp_path / "at_once")


def test_a_delegate_that_cannot_wait_gets_the_weights_themselves(tmp_path: Path) -> None:
    graphs = _graphs(LateCheckpoint(cast(Checkpoint, Drawn())), torch.float32)
    words = graphs["words"]
    assert isinstance(words, Words)
    assert late(words.words.get_parameter("weight")) is not None
    lower({"words": words}, tmp_path, replace(DELEGATE, reads_late=False))
    assert late(words.words.get_parameter("weight")) is None
    assert torch.equal(words.words.get_parameter("weight"), Drawn().tensor("words.weight"))


def test_what_cannot_be_read_late_is_said_as_ever_and_leaves_nothing(tmp_path: Path) -> None:
    graphs = _graphs(LateCheckpoint(cast(Checkpoint, Drawn(beyond="head"))), torch.float16)
    with pytest.raises(CheckpointError, match=r"^head\.weight has values beyond the range of float16; use"):
        lower({"one": graphs["one"]}, tmp_path, DELEGATE)
    assert list(tmp_path.iterdir()) == []


def test_a_shape_that_differs_is_refused_before_anything_is_read() -> None:
    source = Drawn()
    other = nn.Linear(WIDTH, WIDTH, bias=False, device="meta")
    with pytest.raises(CheckpointError, match=r"head\.weight has shape \[50, 64\], but its place has \[64, 64\]"):
        fill(other, LateCheckpoint(cast(Checkpoint, source)), "head", torch.float32)
    assert not source.reads


def test_a_stand_in_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    psutil = pytest.importorskip("psutil")
    monkeypatch.setitem(SHAPES, "large.weight", (2**14, 2**14))
    checkpoint = LateCheckpoint(cast(Checkpoint, Drawn()))
    large = nn.Linear(2**14, 2**14, bias=False, device="meta")
    before = psutil.Process().memory_info().rss
    fill(large, checkpoint, "large", torch.float32)
    quantize(large, "8da4w")
    waiting = late(large.weight)
    assert waiting is not None
    assert waiting.key == ("large.weight", "torch.float32", "8da4w")
    assert large.weight.shape == (2**14, 2**14)
    assert psutil.Process().memory_info().rss - before < large.weight.numel() / 2


def test_a_table_that_is_rounded_while_it_is_built_is_read_before() -> None:
    """Rows in 8 bits are those of the checkpoint, also where its other weights wait."""
    checkpoint = LateCheckpoint(RandomCheckpoint(TINY_WIDE, seed=0))
    frame = TINY_WIDE.family.frame(range(TINY_WIDE.prefix_tokens), TINY_WIDE.geometry)
    context = Context(TINY_WIDE.geometry, frame, keep=4, cut=2, text=8)
    graphs = Parts(open_text_parts(checkpoint, context, chunk=4, embedding_in_bytes=True))
    ids = torch.tensor([[5, 7, 95]])
    exact = checkpoint.rows("embed_tokens.weight", ids[0].tolist()).float()[None]
    torch.testing.assert_close(
        graphs["token_embedding"](ids), exact, rtol=0, atol=float(exact.abs().max()) / 254 * 1.01
    )


@pytest.mark.parametrize(("scheme", "attention", "rest"), [("8da4w", 8, 4), ("8da4w-g64", 8, 4), ("8da8w", 8, 8)])
def test_layers_below_the_cut_are_finer_and_those_of_both_graphs_are_equal(
    scheme: str, attention: int, rest: int
) -> None:
    """The choice of tokens hangs on them, and the vision graph shares them with `decoder_front`."""
    text = {**TINY_WIDE.config["text_config"], "hidden_size": 128, "intermediate_size": 256}
    entry = replace(TINY_WIDE, config={**TINY_WIDE.config, "text_config": text})
    checkpoint = RandomCheckpoint(entry, seed=0)
    vision = build_vision_encoder(checkpoint, entry, None, quant_layers=scheme)
    context = Context(checkpoint.geometry, vision.frame, keep=4, cut=2, text=8)
    graphs = Parts(open_text_parts(checkpoint, context, chunk=4, quant=scheme))
    below, above = graphs["decoder_front"], graphs["decoder_back"]

    def steps(layer: nn.Module, name: str) -> int:
        """How many different whole numbers the rows of a weight are made of."""
        weight = layer.get_submodule(name).get_parameter("weight").data
        return len(torch.unique(parts_of(weight)["qdata"]))

    for index in range(2):
        ours, theirs = vision.decoder_layers[index], below.get_submodule(f"layers.{index}.layer")
        for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            bits = attention if name.startswith("self_attn") else rest
            assert (steps(ours, name) > 16) == (bits == 8), name
            for part, tensor in parts_of(ours.get_submodule(name).get_parameter("weight").data).items():
                same = parts_of(theirs.get_submodule(name).get_parameter("weight").data)[part]
                assert torch.equal(tensor, same), (name, part)
    assert (steps(above.get_submodule("layers.2.layer"), "self_attn.q_proj") > 16) == (rest == 8)


class Layers(Graph):
    """Three layers of two linear ones, behind one another, with a constant that all of them add."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.shift = nn.Parameter(torch.linspace(-1, 1, WIDTH), requires_grad=False)
        for layer in self.layers:
            fill(layer, checkpoint, "layer", torch.float32)

    def input_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="x", shape=(1, 5, WIDTH), dtype="float32"),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x + self.shift)
        return x


def test_a_large_graph_is_opened_in_pieces_of_whole_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a piece is opened its weights are in memory twice; the numbers are those of one piece."""
    x = torch.randn(1, 5, WIDTH, generator=torch.Generator().manual_seed(1))

    def lowered(name: str) -> tuple[int, int, torch.Tensor]:
        graph = Layers(cast(Checkpoint, Drawn())).eval().requires_grad_(False)
        (tmp_path / name).mkdir()
        (taken,) = lower({"all": graph}, tmp_path / name, DELEGATE)["all"].coverage
        assert taken.outside_nodes == 0
        program = _bindings()._load_program(str(tmp_path / name / FILE))
        (out,) = program.load_method("all")([x])
        return taken.partitions, taken.nodes, out.clone()

    whole = lowered("whole")
    monkeypatch.setattr("export.backends.xnnpack.PIECE_NUMBERS", WIDTH * INNER)
    pieces = lowered("pieces")
    assert (whole[0], pieces[0]) == (1, 3)
    assert whole[1] == pieces[1]
    assert torch.equal(whole[2], pieces[2])


# ONNX


def _onnx_files(graphs: Mapping[str, Graph], folder: Path) -> dict[str, bytes]:
    folder.mkdir()
    onnx.lower(graphs, folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
    ("dtype", "schemes"), [(torch.float32, NBITS), (torch.float32, None), (torch.float16, None)], ids=str
)
def test_onnx_reads_each_weight_once_and_not_a_byte_differs(
    dtype: torch.dtype, schemes: tuple[str, str] | None, tmp_path: Path
) -> None:
    source = Drawn()
    graphs = _graphs(LateCheckpoint(cast(Checkpoint, source)), dtype, schemes)
    assert dict(source.reads) == {"layer.up.bias": 1}
    late_files = _onnx_files(graphs, tmp_path / "late")
    assert dict(source.reads) == dict.fromkeys(SHAPES, 1)
    assert source.most_alive == 1  # each is let go of before the next is read
    assert not source.alive
    assert set(late_files) == {"five.onnx", "one.onnx", "words.onnx", onnx.WEIGHTS_FILE}
    at_once = _onnx_files(_graphs(cast(Checkpoint, Drawn()), dtype, schemes), tmp_path / "at_once")
    assert late_files == at_once


def test_packed_weights_can_be_read_now() -> None:
    graphs = _graphs(LateCheckpoint(cast(Checkpoint, Drawn())), torch.float32, NBITS)
    expected = _graphs(cast(Checkpoint, Drawn()), torch.float32, NBITS)
    for name, graph in graphs.items():
        read_now(graph)
        held, wanted = graph.state_dict(), expected[name].state_dict()
        assert held.keys() == wanted.keys()
        assert all(late(held[key]) is None and torch.equal(held[key], wanted[key]) for key in held), name


def test_what_onnx_cannot_read_late_is_said_as_ever(tmp_path: Path) -> None:
    graphs = _graphs(LateCheckpoint(cast(Checkpoint, Drawn(beyond="head"))), torch.float16)
    with pytest.raises(CheckpointError, match=r"^head\.weight has values beyond the range of float16; use"):
        onnx.lower({"one": graphs["one"]}, tmp_path)


@pytest.mark.slow
def test_no_stand_in_is_left_in_onnx_graphs(tmp_path: Path) -> None:
    """All text graphs, with the embedding in 8 bits: as with weights that were there, and the rows are no zeros."""
    import onnxruntime

    source = RandomCheckpoint(SMALL, seed=1)
    context = Context(SMALL.geometry, SMALL.family.frame(range(7), SMALL.geometry), keep=4, cut=1, text=8)
    files = {}
    for name, checkpoint in (("late", LateCheckpoint(source)), ("at_once", source)):
        parts = Parts(open_text_parts(checkpoint, context, chunk=4, quant="int4", embedding_in_bytes=True))
        files[name] = _onnx_files(parts, tmp_path / name)
        gc.collect()
    assert files["late"] == files["at_once"]
    ids = torch.tensor([[5, 7, SMALL.geometry.text.vocab - 1]])
    session = onnxruntime.InferenceSession(tmp_path / "late/token_embedding.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"ids": ids.numpy()})
    table = source.tensor("embed_tokens.weight").float()
    assert torch.equal(torch.from_numpy(got), GatheredByteEmbedding(table)(ids))
    exact = table[ids]
    assert (exact.abs().amax(dim=2) > 0).all()
    step = exact.view(1, 3, -1, 32).abs().amax(dim=3, keepdim=True) / 127
    error = (torch.from_numpy(got) - exact).view(1, 3, -1, 32).abs()
    assert (error <= step * 0.50001).all()
