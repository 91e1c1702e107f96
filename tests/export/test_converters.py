"""What a converter refuses: one error that names the operator, the module that computes it and the graph."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from export.backends.backend import Backend
from export.backends.coreml import COREML
from export.backends.onnx import ONNX
from export.backends.tracing import converting, trace
from export.backends.xnnpack import XNNPACK
from export.graphs.graph import Graph
from runtime.bundle import TensorInfo
from runtime.errors import EngineError, ExportError


@torch.library.custom_op("pruneport_tests::twirled", mutates_args=())
def twirled(x: Tensor) -> Tensor:
    """An operator that no converter can know."""
    return x + 1


@twirled.register_fake
def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Layer(nn.Module):
    """Computes what no converter knows, between operators that all know."""

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = twirled(x * 3)
        return made * 2


class TwirlingGraph(Graph):
    """x (1, 8) -> y (1, 8), by a linear layer, then by one that cannot be converted."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), Layer())

    def input_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="x", shape=(1, 8), dtype="float32"),)

    def output_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="y", shape=(1, 8), dtype="float32"),)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.layers(x)
        return made


class Undecided(TwirlingGraph):
    """Cannot even be traced: which way it goes depends on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("backend", "converter"),
    [(COREML, "Core ML"), (ONNX, "the ONNX exporter"), (XNNPACK, "ExecuTorch")],
    ids=lambda value: value.name if isinstance(value, Backend) else "",
)
def test_an_operator_that_no_converter_knows(backend: Backend, converter: str, tmp_path: Path) -> None:
    what = r"pruneport_tests\.twirled, which layers\.1 \(Layer\) of g computes: "
    says = f"^{converter} cannot convert the operator {what}.*rewrite that module without it, or choose another"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # coremltools leaves it to the garbage collector to remove a folder
        with pytest.raises(ExportError, match=says) as raised:
            backend.lower({"g": TwirlingGraph().eval()}, tmp_path)
        del raised
        gc.collect()


def test_the_node_that_a_converter_was_at() -> None:
    """Its message need not spell the operator."""
    program = trace(TwirlingGraph().eval())

    def walk() -> None:
        for node in program.graph.nodes:
            if node.name == "linear":
                raise KeyError(7)

    says = r"It cannot convert the operator aten\.linear, which layers\.0 \(Linear\) of g computes: KeyError: 7; "
    with pytest.raises(ExportError, match=says), converting("It", {"f": None, "g": program}):
        walk()


def test_whatever_else_goes_wrong_in_a_converter() -> None:
    program = trace(TwirlingGraph().eval())
    with (
        pytest.raises(ExportError, match=r"^It failed on f, g: ZeroDivisionError: first; choose another --backend"),
        converting("It", {"f": None, "g": program}),
    ):
        try:
            raise ZeroDivisionError("first\nsecond")
        except ZeroDivisionError as error:
            raise RuntimeError("long afterwards") from error
    for passes in (EngineError("clear already"), OSError("full"), KeyboardInterrupt()):
        with pytest.raises(type(passes)) as raised, converting("It", {"g": program}):
            raise passes
        assert raised.value is passes


def test_a_graph_that_cannot_be_traced() -> None:
    with pytest.raises(ExportError, match=r"^Undecided cannot be traced: .*; rewrite what stops torch\.export there$"):
        trace(Undecided())
