"""Text graphs with packed 4-bit and 8-bit weights: what is packed, how often stored, and what ONNX Runtime makes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from export.backends.onnx import WEIGHTS_FILE, lower
from export.blocks.nbits import MATMUL_NBITS, NBitsLinear
from export.checkpoints import RandomCheckpoint
from export.families.family import ModelEntry
from export.families.llava.family import LLAVA
from export.graphs.decoder import Context, build_text_graphs
from export.graphs.graph import Graph
from export.quantize import SCHEMES, quantize
from runtime.bundle import TensorInfo
from runtime.check.parity import BOUNDS
from runtime.errors import CheckpointError, ExportError
from runtime.text_graphs import IMAGE_PREFILL, TEXT_DECODER, TEXT_PREFILL
from tests.tiny_llava import CONFIG, TINY

# TINY, in widths that groups of 32 divide: with biases and fewer key heads than heads.
SMALL = ModelEntry(
    name="small",
    family=LLAVA,
    summary="for tests",
    hub_id=None,
    config={**CONFIG, "text_config": {**CONFIG["text_config"], "hidden_size": 96, "intermediate_size": 128}},
    prefix_tokens=7,
)
LAYERS, CUT = 3, 1
NBITS_SCHEMES = [name for name, scheme in SCHEMES.items() if scheme.form == "nbits"]


def build(quant: str | None, entry: ModelEntry = SMALL) -> dict[str, Graph]:
    """The text graphs with seeded weights; the same ones at each call, but for `quant`."""
    checkpoint = RandomCheckpoint(entry, seed=1)
    context = Context(checkpoint.geometry, SMALL.family.frame(range(7), SMALL.geometry), keep=4, cut=CUT, text=16)
    return build_text_graphs(checkpoint, context, quant=quant, chunk=8)


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A folder with the graphs in int4."""
    folder = tmp_path_factory.mktemp("int4")
    lower(build("int4"), folder)
    return folder


def nodes(file: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Each node of a graph with the initializers that it takes, by name."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        yield node, {name: constants[name] for name in node.input if name in constants}


# One layer


def numpy_weight(packed: NDArray[np.uint8], scales: NDArray[np.float32], bits: int, group: int) -> NDArray[np.float32]:
    """What MatMulNBits makes of its weights by its documentation, without zero points, number by number."""
    outputs, groups, _ = packed.shape
    out = np.empty((outputs, groups * group), np.float32)
    for row in range(outputs):
        for column in range(out.shape[1]):
            block, at = divmod(column, group)
            byte = int(packed[row, block, at * bits // 8])
            integer = byte if bits == 8 else (byte >> 4 if at % 2 else byte & 15)
            out[row, column] = (integer - 2 ** (bits - 1)) * scales[row, block]
    return out


@pytest.mark.parametrize("scheme", NBITS_SCHEMES)
def test_weights_are_rounded_to_the_nearest_step(scheme: str) -> None:
    known = SCHEMES[scheme]
    assert known.group is not None
    torch.manual_seed(0)
    layer = nn.Linear(256, 6, bias=False)
    layer.weight.data[2, :128] = 0.0
    scale_dtype = torch.float16 if known.scale_bits == 16 else torch.float32
    packed = NBitsLinear(layer, bits=known.bits, group=known.group, scale_dtype=scale_dtype)
    got = numpy_weight(packed.packed.numpy(), packed.scales.float().numpy(), known.bits, known.group)
    np.testing.assert_array_equal(got, packed.weight.numpy())
    weight = layer.weight.detach().numpy()
    step = np.abs(packed.scales.float().numpy()).repeat(known.group, axis=1)
    error = np.abs(got - weight)
    # Only the far end of the other sign has no integer: there are 8 negative ones of 4 bits and 7 positive ones.
    clipped = np.abs(weight) > (2 ** (known.bits - 1) - 1) * step
    assert (error[~clipped] <= step[~clipped] * 0.50001).all()
    assert (error <= step * 1.00001).all()
    assert np.count_nonzero(got[2, :128]) == 0


class OneLayer(Graph):
    """x (1, 5, 256) -> y (1, 5, 6)"""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def input_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="x", shape=(1, 5, 256), dtype="float32"),)

    def output_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="y", shape=(1, 5, 6), dtype="float32"),)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out


@torch.no_grad()
def test_engine_takes_scales_in_16_bits(tmp_path: Path) -> None:
    """They lie in the file in 16 bits, and the engine computes with these very numbers."""
    import onnx
    import onnxruntime

    torch.manual_seed(0)
    layer = nn.Linear(256, 6, bias=False)
    layer.weight.data[2, :128] *= 1e-3
    packed = NBitsLinear(layer, bits=4, group=128, scale_dtype=torch.float16)
    graph = OneLayer(packed).eval()
    lower({"one": graph}, tmp_path)
    kinds = {tensor.name: tensor.data_type for tensor in onnx.load(tmp_path / "one.onnx").graph.initializer}
    assert kinds == {"layer.packed": onnx.TensorProto.UINT8, "layer.scales": onnx.TensorProto.FLOAT16}
    session = onnxruntime.InferenceSession(tmp_path / "one.onnx", providers=["CPUExecutionProvider"])
    (x,) = graph.example_inputs()
    (got,) = session.run(None, {"x": x.numpy()})
    assert relative(got, graph(x).numpy()) < 0.02
    for row in range(6):  # the small weights, too
        assert cosine(got[..., row], graph(x)[..., row].numpy()) > 0.999


def test_a_scale_beyond_float16_is_refused() -> None:
    layer = nn.Linear(128, 2, bias=False)
    layer.weight.data[1, 5] = 1e6
    with pytest.raises(
        CheckpointError, match=r"the value 1e\+06, whose scale torch.float16 does not hold; take --quant"
    ):
        NBitsLinear(layer, bits=4, group=128, scale_dtype=torch.float16)


@pytest.mark.parametrize("bits", [4, 8])
def test_packing_is_that_of_onnx_runtimes_quantiser(bits: Literal[4, 8]) -> None:
    from onnxruntime.capi import _pybind_state as theirs

    torch.manual_seed(0)
    layer = nn.Linear(96, 40, bias=False)
    ours = NBitsLinear(layer, bits=bits, group=32)
    packed = np.zeros((40, 3, 32 * bits // 8), np.uint8)
    scales, zeros = np.zeros((40, 3), np.float32), np.zeros((40, 3), np.uint8)
    pack = theirs.quantize_matmul_4bits if bits == 4 else theirs.quantize_matmul_8bits
    pack(packed, np.ascontiguousarray(layer.weight.detach().numpy().T), scales, zeros, 32, 40, 96, True)
    np.testing.assert_array_equal(ours.packed.numpy(), packed)
    np.testing.assert_array_equal(ours.scales.numpy(), scales)


def test_width_that_no_group_divides() -> None:
    with pytest.raises(ExportError, match=r"int4 groups 32 inputs .* the width of self_attn.q_proj \(48\), .*: none"):
        build("int4", TINY)
    with pytest.raises(ExportError, match=r"int4-g64 groups 64 inputs .* schemes that fit: int4, int8$"):
        build("int4-g64")


# The graphs


def test_every_linear_layer_is_packed_and_nothing_else(lowered: Path) -> None:
    text = RandomCheckpoint(SMALL, seed=1).geometry.text
    key, queries = text.kv_heads * text.head_dim, text.heads * text.head_dim
    attention = [(text.hidden, queries), (text.hidden, key), (text.hidden, key), (queries, text.hidden)]
    mlp = [(text.hidden, text.mlp), (text.hidden, text.mlp), (text.mlp, text.hidden)]
    fine, rest = [(8, *sizes) for sizes in attention], [(4, *sizes) for sizes in attention + mlp]
    # Below the cut attention has 8 bits.
    below = fine + [(4, *sizes) for sizes in mlp]
    whole = Counter(below * CUT + rest * (LAYERS - CUT) + [(4, text.hidden, text.vocab)])
    # Behind the cut all layers are run, but of the last one only keys and values are computed.
    image = Counter(rest * (LAYERS - CUT - 1) + rest[1:3])
    for name, expected in {IMAGE_PREFILL: image, TEXT_PREFILL: whole, TEXT_DECODER: whole}.items():
        packed: Counter[tuple[int, int, int]] = Counter()
        for node, constants in nodes(lowered / f"{name}.onnx"):
            if f"{node.domain}::{node.op_type}" == MATMUL_NBITS:
                numbers = {attribute.name: attribute.i for attribute in node.attribute}
                assert (numbers["block_size"], numbers["accuracy_level"]) == (32, 4)
                packed[numbers["bits"], numbers["K"], numbers["N"]] += 1
            # A float32 matrix would be one that was forgotten; the norms' means are products with one column.
            large = [tensor.dims for tensor in constants.values() if tensor.data_type == 1 and min(tensor.dims) > 1]
            if node.op_type in ("MatMul", "Gemm", "Transpose"):
                assert not large, node
        assert packed == expected, name


def test_no_file_tells_where_it_was_made(lowered: Path, root: Path) -> None:
    files = list(lowered.glob("*.onnx"))
    assert files
    for file in files:
        raw = file.read_bytes()
        assert b"stack_trace" not in raw, file
        assert b"site-packages" not in raw, file
        assert str(root).encode() not in raw, file


def test_weights_that_graphs_share_are_stored_once(lowered: Path) -> None:
    used, stored = Counter[str](), dict[tuple[int, int], str]()
    for name in (IMAGE_PREFILL, TEXT_PREFILL, TEXT_DECODER):
        for _, constants in nodes(lowered / f"{name}.onnx"):
            for tensor in constants.values():
                if tensor.data_location == 1:
                    where = {entry.key: entry.value for entry in tensor.external_data}
                    kind = {1: "float32", 2: "uint8"}[tensor.data_type]
                    used[kind] += 1
                    stored[int(where["offset"]), int(where["length"])] = kind
    whole = 7 * LAYERS + 1
    assert used["uint8"] == 7 * (LAYERS - CUT - 1) + 2 + whole + whole
    assert Counter(stored.values())["uint8"] == whole
    embedding = 4 * SMALL.geometry.text.vocab * SMALL.geometry.text.hidden
    size = (lowered / WEIGHTS_FILE).stat().st_size
    paper = embedding + sum(length for _, length in stored)
    assert paper <= size <= paper + 64 * (len(stored) + 1)


@pytest.mark.parametrize("scheme", NBITS_SCHEMES)
@torch.no_grad()
def test_quantising_twice_gives_the_same_bytes(scheme: str) -> None:
    def packed() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 256, bias=False))
        quantize(layers, scheme)
        assert all(isinstance(layer, NBitsLinear) for layer in layers)
        return {name: tensor.clone() for name, tensor in layers.state_dict().items()}

    first, second = packed(), packed()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def relative(got: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def cosine(got: NDArray[Any], expected: NDArray[Any]) -> float:
    return float((got * expected).sum() / np.linalg.norm(got) / np.linalg.norm(expected))


@torch.no_grad()
def test_engine_computes_with_the_packed_weights(lowered: Path, one_thread: None) -> None:
    """Against the same graph in PyTorch, which rounds no activations; the weights' own rounding is far larger."""
    import onnxruntime

    packed, plain = build("int4"), build(None)
    for name in (IMAGE_PREFILL, TEXT_PREFILL, TEXT_DECODER):
        inputs = packed[name].example_inputs()
        session = onnxruntime.InferenceSession(lowered / f"{name}.onnx", providers=["CPUExecutionProvider"])
        named = {info.name: value.numpy() for info, value in zip(packed[name].input_infos(), inputs, strict=True)}
        got = session.run(None, named)
        for ours, theirs, exact in zip(got, packed[name](*inputs), plain[name](*inputs), strict=True):
            assert relative(ours, theirs.numpy()) < 0.02
            assert relative(ours, exact.numpy()) > 0.005  # keys and values of the first layer have 8-bit weights
            assert cosine(ours, exact.numpy()) > BOUNDS["int4"].least_cosine  # type: ignore[operator]


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@torch.no_grad()
def test_bound_sees_integers_in_the_wrong_order(scheme: str) -> None:
    bound = BOUNDS[scheme].least_cosine
    assert bound is not None
    right, wrong, plain = build(scheme)[TEXT_DECODER], build(scheme)[TEXT_DECODER], build(None)[TEXT_DECODER]
    for layer in wrong.modules():
        if isinstance(layer, NBitsLinear):
            layer.packed.copy_(layer.packed.flip(2))
    logits = [graph(*graph.example_inputs())[0].numpy() for graph in (right, wrong, plain)]
    assert cosine(logits[0], logits[2]) >= bound
    assert cosine(logits[1], logits[2]) < bound
