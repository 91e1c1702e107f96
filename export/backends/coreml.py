"""Graphs for Core ML: a package each, those over the decoder's layers as functions of one that share its weights."""

from __future__ import annotations

import io
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.backends.backend import Backend, LoweredGraph, Variants
from export.backends.tracing import converting, trace
from runtime.bundle import DelegateCoverage, TensorInfo
from runtime.engines.coreml import CARRIED_AS, MAIN, read_package
from runtime.errors import ExportError
from runtime.text_graphs import IMAGE_PREFILL, TEXT_DECODER, TEXT_PREFILL

if TYPE_CHECKING:
    import torch

    from export.graphs.graph import Graph

# Graphs with the same weights go into one package, as functions named like them.
TOGETHER = (IMAGE_PREFILL, TEXT_PREFILL, TEXT_DECODER)
TOGETHER_FILE = f"{TEXT_DECODER}.mlpackage"
# The norms take means by linear layers of one row, whose constants must stay what they are. They are at most 8192 wide,
# and no other layer is that small in a model that is worth compressing.
_LEAST_COMPRESSED = 8193
_BLOCK = 32
_PALETTE_ROWS = 16


def lower(graphs: Mapping[str, Graph], out_dir: Path, *, min_ios: int = 18) -> dict[str, LoweredGraph]:
    """Writes `<name>.mlpackage` for each graph; those of TOGETHER are functions of one, TOGETHER_FILE, from iOS 18 on.

    `min_ios` 17 or 18 is the oldest version that runs them; 17 has neither states nor schemes other than int8.

    Graphs are converted in the precision they come in, the pruner's float32 among them; then the weights of linear
    layers are compressed as each graph says, which are none of the pruner's constants. Raises ExportError when a shape
    is symbolic, an operator cannot be converted or a weight cannot be compressed.
    """
    with converter() as ct, tempfile.TemporaryDirectory(dir=out_dir, prefix=".parts-") as parts:
        together = TOGETHER if min_ios >= 18 and set(TOGETHER) <= graphs.keys() else ()
        packages = {}
        for name, graph in graphs.items():
            package = (Path(parts) if name in together else out_dir) / f"{name}.mlpackage"
            programs = {name: trace(graph)}
            with converting("Core ML", programs):
                programs[name] = _prepared(graph, programs[name])
                if min_ios >= 18:
                    _fuse_attention(programs[name])
                model = _compressed(_convert(ct, graph, programs[name], min_ios), name, graph.compression)
            model.save(str(package))
            packages[name] = package
        if together:
            functions = ct.utils.MultiFunctionDescriptor()
            for name in together:
                functions.add_function(str(packages[name]), src_function_name=MAIN, target_function_name=name)
                packages[name] = out_dir / TOGETHER_FILE
            functions.default_function_name = TEXT_DECODER
            ct.utils.save_multifunction(functions, str(out_dir / TOGETHER_FILE))
    return {name: _lowered(name, graph, packages[name]) for name, graph in graphs.items()}


def _lowered(name: str, graph: Graph, package: Path) -> LoweredGraph:
    """What the saved package says about a graph."""
    (package / "Data/com.apple.CoreML/model.mlmodel").chmod(0o644)  # like the files beside it
    # For those who debug ExecuTorch programs; no part of the model.
    (package / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    function = read_package(package).function(name)
    return LoweredGraph(
        file=package.name,
        extra_files=tuple(
            path.relative_to(package.parent).as_posix() for path in sorted(package.rglob("*")) if path.is_file()
        ),
        # One program, which Core ML splits among the device's units when it loads it; nobody can tell here.
        coverage=(DelegateCoverage(delegate="CoreML", partitions=1, nodes=sum(function.operators.values())),),
        inputs=_in_order(graph.input_names, function.inputs),
        outputs=_in_order(graph.output_names, function.outputs),
        states=_in_order(tuple(info.name for info in graph.state_infos()), function.states),
    )


def _in_order(names: tuple[str, ...], infos: tuple[TensorInfo, ...]) -> tuple[TensorInfo, ...]:
    by_name = {info.name: info for info in infos}
    if by_name.keys() != set(names):
        raise ExportError(f"the converter named {sorted(by_name)} what should be {sorted(names)}; please report this")
    return tuple(by_name[name] for name in names)


def _convert(ct: Any, graph: Graph, program: torch.export.ExportedProgram, min_ios: int) -> Any:
    import numpy as np

    return ct.convert(
        program,
        minimum_deployment_target=ct.target[f"iOS{min_ios}"],
        compute_precision=ct.transform.FP16ComputePrecision(op_selector=_is_half_division),
        outputs=[
            ct.TensorType(name=info.name, dtype=np.dtype(CARRIED_AS.get(info.dtype, info.dtype)).type)
            for info in graph.output_infos()
        ],
        skip_model_load=True,
    )


def _compressed(model: Any, name: str, scheme: str | None) -> Any:
    """The converted model with every linear layer's weights as `scheme` says; None leaves them alone."""
    import coremltools.optimize.coreml as compression

    if scheme is None:
        return model
    if scheme == "pal4":
        palette = compression.OpPalettizerConfig(
            nbits=4, granularity="per_grouped_channel", group_size=_PALETTE_ROWS, weight_threshold=_LEAST_COMPRESSED
        )
        config = compression.OptimizationConfig(op_type_configs={"linear": palette})
        model = compression.palettize_weights(model, config)
    else:
        blocks = {"granularity": "per_block", "block_size": _BLOCK} if scheme == "int4" else {}
        linear = compression.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype=scheme, weight_threshold=_LEAST_COMPRESSED, **blocks
        )
        config = compression.OptimizationConfig(op_type_configs={"linear": linear})
        model = compression.linear_quantize_weights(model, config)
    # The library leaves out, with a warning, what it cannot divide into blocks.
    code = model.get_spec().mlProgram.functions[MAIN]
    # A write into a state has no output.
    made = {output.name: op for op in code.block_specializations[code.opset].operations for output in op.outputs[:1]}
    for op in made.values():
        if op.type != "linear":
            continue
        weight = made[op.inputs["weight"].arguments[0].name]
        rows, width = (side.constant.size for side in weight.outputs[0].type.tensorType.dimensions)
        if weight.type == "const" and rows * width >= _LEAST_COMPRESSED:
            raise ExportError(
                f"{scheme} cannot compress the {rows} x {width} weights of {name} ({op.outputs[0].name}); "
                "choose another scheme"
            )
    return model


def _prepared(graph: Graph, traced: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The exported program as the converter can take it."""
    import torch

    program: torch.export.ExportedProgram = traced.run_decompositions({})
    nodes = program.graph
    for node in list(nodes.nodes):
        if node.op != "call_function":
            continue
        if node.target is torch.ops.aten.alias.default:  # does nothing, and the converter does not know it
            node.replace_all_uses_with(node.args[0])
            nodes.erase_node(node)
        elif node.target is torch.ops.aten.div.Tensor and node.meta["val"].dtype == torch.float16:
            # The converter divides in float32 and stays there: without a way back all that follows would be float32.
            _halve(node, before=node.next)
    signature = program.graph_signature
    first = next(node for node in nodes.nodes if node.op != "placeholder")
    for node in nodes.find_nodes(op="placeholder"):
        if signature.inputs_to_buffers.get(node.name) in signature.buffers_to_mutate.values():
            _halve(node, before=first)  # the converter reads states into float32
    # The converter names inputs after the placeholders, which for `*past` are numbered.
    names = iter(graph.input_names)
    for spec in program.graph_signature.input_specs:
        if spec.kind == torch.export.graph_signature.InputKind.USER_INPUT:
            (node,) = (node for node in nodes.nodes if node.op == "placeholder" and node.name == spec.arg.name)
            node.name = node.target = spec.arg.name = next(names)
    program.graph_module.recompile()
    return program


def _fuse_attention(program: torch.export.ExportedProgram) -> None:
    """Makes one operator, for which Core ML has a kernel of its own, of attention over one piece of keys.

    Where a cache stands beside the new keys there are two products on either side of the softmax, and nothing is fused:
    the operator wants all keys in one tensor, which would be a copy of the cache for every token.
    """
    import torch

    aten, nodes = torch.ops.aten, program.graph
    for softmax in nodes.find_nodes(op="call_function", target=aten.softmax.int):
        scores, mask, (mixed, *others) = softmax.args[0], None, softmax.users
        if scores.target is aten.add.Tensor:
            scores, mask = scores.args
        if others or mixed.target is not aten.bmm.default or scores.target is not aten.bmm.default:
            continue
        query, turned = scores.args
        if turned.target is not aten.permute.default or mixed.args[0] is not softmax:
            continue
        with nodes.inserting_before(mixed):
            # Queries come with the scale that the operator applies.
            unscaled = nodes.call_function(aten.mul.Tensor, (query, math.sqrt(query.meta["val"].shape[-1])))
            unscaled.meta = dict(query.meta)
            fused = nodes.call_function(
                aten.scaled_dot_product_attention.default, (unscaled, turned.args[0], mixed.args[1], mask)
            )
            fused.meta = dict(mixed.meta)
        if query.meta["val"].dtype == torch.float16:
            _halve(unscaled, before=fused)  # the converter multiplies by a number in float32
        mixed.replace_all_uses_with(fused)
        nodes.erase_node(mixed)
        nodes.erase_node(softmax)
        fused.name = mixed.name  # which the program's signature may tell of
    nodes.eliminate_dead_code()
    program.graph_module.recompile()


def _halve(node: torch.fx.Node, *, before: torch.fx.Node) -> None:
    """Casts what a node gives to float16, for all who use it."""
    import torch

    with node.graph.inserting_before(before):
        half = node.graph.call_function(torch.ops.aten._to_copy.default, (node,), {"dtype": torch.float16})
    half.meta = dict(node.meta)
    node.replace_all_uses_with(half, delete_user_cb=lambda user: user is not half)


def _is_half_division(op: Any) -> bool:
    """Whether a division is float32 only because the converter made it so, between casts from and to float16."""
    from coremltools.converters.mil.mil import types

    if op.op_type != "real_div":
        return False
    cast = [var.op is not None and var.op.op_type == "cast" and var.op.x.dtype == types.fp16 for var in (op.x, op.y)]
    constant = [var.val is not None for var in (op.x, op.y)]
    after = op.outputs[0].child_ops
    return (
        any(cast)
        and all(a or b for a, b in zip(cast, constant, strict=True))
        and bool(after)
        and all(user.op_type == "cast" and user.dtype.val == "fp16" for user in after)
    )


def _teach_writing() -> None:
    """Tells the converter what `pruneport::written` is: a slice of a state that is updated in place."""
    import numpy as np
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.frontend.torch import ops
    from coremltools.converters.mil.frontend.torch.torch_op_registry import _TORCH_OPS_REGISTRY, register_torch_op

    import export.graphs.stateful  # noqa: F401 - defines the operator

    def pruneport_written(context: Any, node: Any) -> None:
        cache, new, start = ops._get_inputs(context, node, expected=3)
        before, behind = np.zeros(2, np.int32), np.zeros(1, np.int32)
        end = mb.add(x=start, y=np.int32(new.shape[2]))
        masks = [True, True, False, True]
        made = mb.slice_update(
            x=cache,
            update=new,
            begin=mb.concat(values=[before, start, behind], axis=0),
            end=mb.concat(values=[before, end, behind], axis=0),
            begin_mask=masks,
            end_mask=masks,
            name=node.name,
        )
        context.add(made)

    if "pruneport::written" not in _TORCH_OPS_REGISTRY:
        register_torch_op(pruneport_written, torch_alias=["pruneport::written"])


@contextmanager
def _writes_stay() -> Iterator[None]:
    """Leaves out a pass of the converter that fails on writes into states; all it does is to move them up.

    It looks behind the operator whose result goes into a state, where it may just have removed what it finds.
    Compressing weights runs all passes once more and takes no list of them: hence it is left out at its root.
    """
    from coremltools.converters.mil.mil.passes.defs.optimize_state import canonicalize_inplace_pattern as moving

    apply = moving.apply
    moving.apply = lambda self, program: None
    try:
        yield
    finally:
        moving.apply = apply


@contextmanager
def converter() -> Iterator[Any]:
    """coremltools, which warns about versions of its neighbours and sets up logging for the whole process."""
    level = logging.root.level
    with warnings.catch_warnings(), ExitStack() as quiet:
        warnings.simplefilter("ignore")
        if logging.root.manager.disable >= logging.WARNING:  # then nobody wants its progress bars either
            quiet.enter_context(redirect_stderr(io.StringIO()))
        try:
            import coremltools

            _teach_writing()
            with _writes_stay():
                yield coremltools
        finally:
            logging.root.setLevel(level)


IOS_18 = Backend(
    name="coreml",
    engine="coreml",
    # The Neural Engine computes in fp16 alone.
    precisions=("fp16", "fp32"),
    quant_vision=("int8", "int4", "pal4"),
    quant_text=("int4", "int8", "pal4"),
    packages=("torch", "transformers", "coremltools"),
    lower=lower,
    compresses=True,
    states=True,
    made_for="iOS 18 and later",
    min_os="18",
)
# iOS 17 knows no states, no scales or palettes for blocks of weights, and no packages of several functions, so that the
# three graphs over the decoder's layers hold their weights each.
IOS_17 = replace(
    IOS_18,
    quant_vision=("int8",),
    quant_text=("int8",),
    lower=partial(lower, min_ios=17),
    states=False,
    text_copies=3,
    variant="ios17",
    made_for="iOS 17 and later",
    min_os="17",
)
COREML = replace(IOS_18, variants=Variants("min_ios", lambda: {"17": IOS_17, "18": IOS_18}, default="18"))
