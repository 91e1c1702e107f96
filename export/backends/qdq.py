"""Quantising an ONNX graph from what photos make of it: 16-bit activations and 8-bit weights, as the HTP multiplies."""

from __future__ import annotations

from ast import literal_eval
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.backends.onnx import quiet
from export.blocks import norms
from export.blocks.attention import HIDDEN

if TYPE_CHECKING:
    from export.graphs.graph import Graph

METHOD = "MinMax"


def quantise(graph: Graph, source: Path, target: Path) -> None:
    """Writes the ONNX file `source` of a graph as `target`, with the operators of `graph.quantisable` in integers.

    Activations get 16 bits, weights 8, one scale a tensor, from the least and the largest number that
    `graph.calibration` brings about. All other operators stay as they are, and so do norms, whose squares span more
    than even steps hold, and what follows a mask, whose far negative numbers would leave no steps between the scores.
    Weights of `target` lie in a file beside it.
    """
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    class Photos(CalibrationDataReader):  # type: ignore[misc]  # the library has no types
        def __init__(self) -> None:
            self.rewind()

        def get_next(self) -> dict[str, Any] | None:
            return next(self._left, None)

        def rewind(self) -> None:
            self._left = (dict(zip(graph.input_names, inputs, strict=True)) for inputs in graph.calibration)

    folded = target.with_name(f"{target.stem}-folded.onnx")
    excluded = _fold(graph, source, folded)
    with quiet("root"):  # advice to preprocess, which `_fold` did
        config = get_qnn_qdq_config(
            folded,
            Photos(),
            calibrate_method=CalibrationMethod[METHOD],
            activation_type=QuantType.QUInt16,
            weight_type=QuantType.QUInt8,
            nodes_to_exclude=excluded,
        )
        quantize(folded, target, config)


def _fold(graph: Graph, source: Path, target: Path) -> list[str]:
    """Computes what is constant in the quantisable modules, so that weights are weights; names the nodes to leave out.

    The exporter transposes weights in the graph, where the quantiser would take them for 16-bit activations.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass
    from onnxscript import optimizer

    def quantisable(node: Any) -> bool:
        scopes = literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
        return len(scopes) > 1 and scopes[1].partition(".")[0] in graph.quantisable

    model = onnx_ir.load(source)
    with quiet("onnxscript", "onnx_ir"):
        optimizer.fold_constants(
            model,
            onnx_shape_inference=False,
            input_size_limit=2**40,
            output_size_limit=2**40,
            should_fold=lambda node: None if quantisable(node) else False,
        )
    RemoveUnusedNodesPass()(model)
    weights: Any = model.graph.initializers.values()  # none is without its numbers
    masked = {
        value
        for value in weights
        if value.dtype == onnx_ir.DataType.FLOAT
        and value.const_value.size
        and value.const_value.numpy().min() <= HIDDEN
    }
    excluded: list[str] = []
    for node in model.graph:
        after_mask = any(value in masked for value in node.inputs)
        if after_mask and node.op_type != "Softmax":
            masked.update(node.outputs)
        in_norm = norms.__name__ in node.metadata_props.get("pkg.torch.onnx.class_hierarchy", "")
        if after_mask or in_norm or not quantisable(node):
            excluded.append(str(node.name))
    onnx_ir.save(model, target, external_data=f"{target.stem}.data")
    return excluded
