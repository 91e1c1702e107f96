"""Graphs for Android's NNAPI: .ort files, opened by ONNX Runtime's NNAPI delegate, which exists on Android alone."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from export.backends import onnx
from export.backends.backend import Backend, LoweredGraph
from runtime.engines import onnxruntime
from runtime.errors import ExportError

if TYPE_CHECKING:
    from export.graphs.graph import Graph
    from runtime.bundle import DelegateCoverage

CONFIG_FILE = "required_operators_and_types.config"
LEFT = "not in the list of ONNX Runtime's checker for NNAPI (no device was asked)"


def lower(graphs: Mapping[str, Graph], out_dir: Path) -> dict[str, LoweredGraph]:
    """Writes `<name>.ort` for each graph, its weights inside, and the list of what a small ONNX Runtime must hold.

    Raises ExportError when a shape is symbolic, or when ONNX Runtime cannot write a graph in that format.
    """
    from onnxruntime.tools.convert_onnx_models_to_ort import OptimizationStyle, convert_onnx_models_to_ort

    lowered = {}
    with (
        TemporaryDirectory(dir=out_dir) as folder,
        warnings.catch_warnings(),
        redirect_stdout(io.StringIO()),
        onnx.quiet("ort_format_model.utils"),
    ):
        warnings.simplefilter("ignore")  # of the converter, which nobody here can act on
        made, work = Path(folder) / "onnx", Path(folder) / "ort"
        made.mkdir()
        for name, written in onnx.lower(graphs, made).items():
            _divide(made / written.file)
            lowered[name] = LoweredGraph(
                file=f"{name}.ort", extra_files=(CONFIG_FILE,), coverage=(coverage_of(made / written.file),)
            )
        try:
            convert_onnx_models_to_ort(
                made,
                output_dir=work,
                # Fusions of ONNX Runtime's own would make operators that NNAPI does not know: kept for later.
                optimization_styles=[OptimizationStyle.Runtime],
                target_platform="arm",
                enable_type_reduction=True,
            )
        # The bindings raise a family of classes derived from Exception alone, one per status code.
        except Exception as error:
            raise ExportError(f"ONNX Runtime cannot write the .ort files: {error}; choose another --backend") from error
        for name, graph in lowered.items():
            (work / f"{name}.with_runtime_opt.ort").rename(out_dir / graph.file)
        listed = (work / "required_operators_and_types.with_runtime_opt.config").read_text(encoding="utf-8")
        # Its comments name the files by their paths on this machine.
        kept = [line for line in listed.splitlines() if not line.startswith("#")]
        (out_dir / CONFIG_FILE).write_text("\n".join(kept) + "\n", encoding="utf-8")
    return lowered


def _divide(file: Path) -> None:
    """Writes every Reciprocal, which the list lacks, as a division, which it has and which computes the same."""
    from onnx import TensorProto, helper, load, save

    model = load(file, load_external_data=False)
    for node in model.graph.node:
        if node.op_type != "Reciprocal":
            continue
        one = helper.make_tensor(f"{node.output[0]}_one", TensorProto.FLOAT, [], [1.0])
        model.graph.initializer.append(one)
        node.op_type = "Div"
        node.input.insert(0, one.name)
    save(model, file)


def coverage_of(file: Path) -> DelegateCoverage:
    """What NNAPI would take of a .onnx file by the list of ONNX Runtime's checker, which knows operators by name.

    Conditions on their inputs, which the list notes in words, are not checked, nor is any phone's driver.
    """
    from onnxruntime.tools.mobile_helpers.usability_checker import check_nnapi_partitions
    from onnxruntime.tools.onnx_model_utils import ModelProtoWithShapeInfo, optimize_model

    from runtime.bundle import DelegateCoverage, OutsideOp

    with TemporaryDirectory(dir=file.parent) as folder:
        optimised = Path(folder) / file.name
        optimize_model(file, optimised, use_external_initializers=True)
        model = ModelProtoWithShapeInfo(optimised).model_with_shape_info
    found = check_nnapi_partitions(model, True)
    outside = Counter(node.op_type for node in model.graph.node)
    outside -= Counter(node.op_type for group in found.supported_groups for node in group)
    return DelegateCoverage(
        delegate=onnxruntime.NNAPI,
        partitions=len(found.supported_groups),
        nodes=sum(len(group) for group in found.supported_groups),
        outside=tuple(OutsideOp(op=op, count=count, reason=LEFT) for op, count in outside.most_common()),
        by_list=True,
    )


NNAPI = Backend(
    name="nnapi",
    engine="onnxruntime",
    # ONNX Runtime's NNAPI delegate takes no float16 tensors.
    precisions=("fp32",),
    quant_vision=(),
    quant_text=(),
    packages=("torch", "transformers", "onnx", "onnxscript", "onnxruntime"),
    lower=lower,
    # A .ort file is a flatbuffer with the weights inside, whose offsets end there.
    most_graph_bytes=2**31 - 1,
)
