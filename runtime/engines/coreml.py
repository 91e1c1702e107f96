"""Evaluates Core ML packages operator by operator in numpy: Core ML itself runs only on Apple's systems.

What is checked is the program in the saved package and its weights: every operator is computed in float32 from what the
file holds, and its result rounded to the dtype that the file declares for it. How Apple's kernels round inside an
operator, which unit of a device takes it and how long that takes is not known here.
"""

from __future__ import annotations

import logging
import math
import struct
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle import GraphInfo, TensorInfo
from runtime.errors import EngineError, EngineMissingError
from runtime.placement import Placement

WRITE_STATE = "write_state"
DEQUANTIZE = "constexpr_affine_dequantize"
CARRIED_AS = {"int64": "int32"}  # what Core ML has for what a graph declares: it knows no int64
MAIN = "main"  # what the only function of a package is called
_MODEL, _WEIGHTS = "Data/com.apple.CoreML/model.mlmodel", "Data/com.apple.CoreML/weights"
# MIL's data types by their numbers in MIL.proto, and those of inputs and outputs in FeatureTypes.proto.
_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype(bool),
    10: np.dtype(np.float16),
    11: np.dtype(np.float32),
    21: np.dtype(np.int8),
    22: np.dtype(np.int16),
    23: np.dtype(np.int32),
    31: np.dtype(np.uint8),
    32: np.dtype(np.uint16),
    33: np.dtype(np.uint32),
}
_STRING = 2
_PACKED_BITS = {25: 4, 35: 4, 36: 2, 37: 1, 38: 6, 39: 3}  # several to a byte
_INT4 = 25
_FEATURE_DTYPES = {65552: "float16", 65568: "float32", 131104: "int32"}
_CAST_DTYPES = {"fp16": "float16", "fp32": "float32"}
# Of the blob file: mark, dtype, size in bytes, offset of the data; little endian.
_BLOB = struct.Struct("<IIQQ")
_BLOB_MARK = 0xDEADBEEF


def load(graph: GraphInfo, file: Path, extra_files: tuple[Path, ...], threads: int) -> LoadedPackage:
    """Reads a graph of a package and holds its inputs and outputs against the manifest. Raises EngineError."""
    del threads  # numpy has threads of its own
    check_listed(file, extra_files)
    function = read_package(file).function(graph.name)
    for kind, declared, found in (
        ("inputs", graph.inputs, function.inputs),
        ("outputs", graph.outputs, function.outputs),
        ("states", graph.states, function.states),
    ):
        if {info.name: info for info in declared} != {info.name: info for info in found}:
            raise EngineError(
                f"{file} has the {kind} {', '.join(map(str, found))}; its manifest says "
                f"{', '.join(map(str, declared))}; export again"
            )
    return LoadedPackage(function, graph, file)


def check_listed(file: Path, extra_files: tuple[Path, ...]) -> None:
    """EngineError when a package holds what the manifest does not list: it was not hashed, and may be a link."""
    for path in sorted(file.rglob("*")):
        if path not in extra_files and (path.is_symlink() or not path.is_dir()):
            raise EngineError(f"{path} is part of the package, but its manifest lacks it; export again")


def read_package(path: Path) -> Package:
    """The program of a .mlpackage. Raises EngineError when it is damaged, EngineMissingError without coremltools."""
    level = logging.root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about versions of packages that are not needed here
            from coremltools.proto import Model_pb2
    except ImportError as err:
        raise EngineMissingError(f"coremltools is not installed ({err}); pip install 'pruneport[coreml]'") from err
    finally:
        logging.root.setLevel(level)  # which the import changes
    model = Model_pb2.Model()
    try:
        model.ParseFromString((path / _MODEL).read_bytes())
    except OSError as err:
        raise EngineError(f"{path / _MODEL} cannot be read: {err.strerror}; export again") from err
    # protobuf's DecodeError; which class that is depends on its implementation.
    except Exception as err:
        raise EngineError(f"{path / _MODEL} is damaged ({err}); export again") from err
    if model.WhichOneof("Type") != "mlProgram":
        raise EngineError(f"{path} holds no Core ML program; export again")
    return Package(path, model)


class Package:
    """A package that was read."""

    def __init__(self, path: Path, model: Any) -> None:
        self.path = path
        self._model = model

    def function(self, name: str) -> Function:
        """The function of that name, or the only one there is. Raises EngineError."""
        functions = self._model.mlProgram.functions
        name = name if name in functions else MAIN
        if name not in functions:
            raise EngineError(f"{self.path} has the functions {sorted(functions)}, not {name!r}; export again")
        # With several functions each has a description of its own.
        described = next((one for one in self._model.description.functions if one.name == name), None)
        about = self._model.description if described is None else described
        code = functions[name]
        try:
            block = code.block_specializations[code.opset]
            inputs, outputs = tuple(map(_feature, about.input)), tuple(map(_feature, about.output))
            states = tuple(map(_feature, about.state))
            return Function(self.path, block, inputs=inputs, outputs=outputs, states=states)
        except (KeyError, ValueError, IndexError, TypeError) as err:
            raise EngineError(f"{self.path} cannot be understood ({err!r}); export again") from err


def _feature(feature: Any) -> TensorInfo:
    kind = feature.type
    array = kind.stateType.arrayType if kind.WhichOneof("Type") == "stateType" else kind.multiArrayType
    return TensorInfo(name=feature.name, shape=tuple(array.shape), dtype=_FEATURE_DTYPES[array.dataType])


@dataclass(frozen=True)
class _Step:
    """One operator: what it computes from which values, and which values nobody needs afterwards."""

    name: str
    kind: str
    compute: Callable[..., Any]
    arguments: dict[str, str | list[str]]
    output: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    dead: tuple[str, ...]


@dataclass(frozen=True)
class Operator:
    """One operator of a function as the file declares it; `dtype` is numpy's name, or `type <n>` for one it lacks."""

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]


class Function:
    """One function of a package: its interface, its operators, its constants."""

    def __init__(
        self,
        path: Path,
        block: Any,
        *,
        inputs: tuple[TensorInfo, ...],
        outputs: tuple[TensorInfo, ...],
        states: tuple[TensorInfo, ...] = (),
    ) -> None:
        self.path = path
        self.inputs, self.outputs, self.states = inputs, outputs, states
        self.operators = Counter(op.type for op in block.operations if op.type != "const")
        self._block = block

    def declared(self) -> tuple[Operator, ...]:
        """Every operator but constants, an entry for each result; reads no weights and evaluates nothing."""
        return tuple(
            Operator(
                kind=op.type,
                name=output.name,
                dtype=str(_DTYPES.get(output.type.tensorType.dataType, f"type {output.type.tensorType.dataType}")),
                shape=_shape(output.type.tensorType),
            )
            for op in self._block.operations
            if op.type != "const"
            for output in op.outputs
        )

    def prepare(self) -> tuple[dict[str, Any], list[_Step]]:
        """Constants by name, those of the weight file still on disk, and steps in order. Raises EngineError."""
        constants: dict[str, Any] = {}
        weights = _Weights(self.path)
        needed = [*self._block.outputs, *(info.name for info in self.states)]
        dead: list[tuple[str, ...]] = []
        seen = set(needed)
        operations = list(self._block.operations)
        for op in reversed(operations):
            read = [binding.name for argument in op.inputs.values() for binding in argument.arguments if binding.name]
            dead.append(tuple(dict.fromkeys(name for name in read if name not in seen)))
            seen.update(read)
        steps: list[_Step] = []
        states = {info.name: info for info in self.states}
        for op, unused in zip(operations, reversed(dead), strict=True):
            if op.type != "const" and op.type not in OPERATORS:
                named = ", ".join(output.name for output in op.outputs)
                raise EngineError(f"{self.path} has the operator {op.type!r} ({named}), which is not known here")
            if op.type == WRITE_STATE:  # what it gives is the state itself
                state, data = op.inputs["input"].arguments[0].name, op.inputs["data"].arguments[0].name
                steps.append(
                    _Step(
                        name=state,
                        kind=op.type,
                        compute=OPERATORS[op.type],
                        arguments={"data": data},
                        output=state,
                        dtype=states[state].numpy_dtype,
                        shape=states[state].shape,
                        dead=tuple(name for name in unused if name not in constants),
                    )
                )
                continue
            (output,) = op.outputs
            if op.type == "const":
                constants[output.name] = weights.value(op.attributes["val"])
                continue
            arguments: dict[str, str | list[str]] = {}
            for parameter, argument in op.inputs.items():
                names = []
                for number, binding in enumerate(argument.arguments):
                    name = binding.name
                    if not name:  # a value written where it is used
                        name = f"{output.name}.{parameter}.{number}"
                        constants[name] = weights.value(binding.value)
                    names.append(name)
                arguments[parameter] = names if parameter == "values" else names[0]
            if op.type == DEQUANTIZE:  # as other operators did before iOS 18, it holds its constants itself
                for parameter in op.attributes.keys() - {"name"}:
                    arguments[parameter] = name = f"{output.name}.{parameter}"
                    constants[name] = weights.value(op.attributes[parameter])
            steps.append(
                _Step(
                    name=output.name,
                    kind=op.type,
                    compute=OPERATORS[op.type],
                    arguments=arguments,
                    output=output.name,
                    dtype=_DTYPES[output.type.tensorType.dataType],
                    shape=_shape(output.type.tensorType),
                    dead=tuple(name for name in unused if name not in constants),
                )
            )
        return constants, steps


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(side.constant.size) for side in tensor.dimensions)


class _Weights:
    """The weight files of a package, mapped into memory one by one when they are needed."""

    def __init__(self, package: Path) -> None:
        self._folder = package / _WEIGHTS
        self._files: dict[str, np.ndarray] = {}

    def value(self, spec: Any) -> Any:
        """What a `Value` of MIL.proto stands for: a text, or an array."""
        tensor = spec.type.tensorType
        kind = tensor.dataType
        if spec.WhichOneof("value") == "blobFileValue":
            data = self._blob(spec.blobFileValue.fileName.rpartition("/")[2], int(spec.blobFileValue.offset))
            return _array(data, kind, _shape(tensor))
        held = spec.immediateValue.tensor
        which = held.WhichOneof("value")
        if which is None:  # an empty list
            return np.zeros(_shape(tensor), _DTYPES[kind])
        if which == "bytes":
            return _array(np.frombuffer(held.bytes.values, np.uint8), kind, _shape(tensor))
        values = getattr(held, which).values
        if kind == _STRING:
            return str(values[0])
        return np.asarray(values, _DTYPES[kind]).reshape(_shape(tensor))

    def _blob(self, name: str, offset: int) -> np.ndarray:
        path = self._folder / name
        if name not in self._files:
            try:
                self._files[name] = np.memmap(path, np.uint8, mode="r")
            except (OSError, ValueError) as err:  # ValueError: an empty file
                raise EngineError(f"{path}, the weights of the package, cannot be read: {err}; export again") from err
        file = self._files[name]
        if offset + _BLOB.size > len(file):
            raise EngineError(f"{path} has {len(file)} bytes and no weight at {offset}; export again")
        mark, _, size, start = _BLOB.unpack(file[offset : offset + _BLOB.size].tobytes())
        if mark != _BLOB_MARK or start + size > len(file):
            raise EngineError(f"{path} has {len(file)} bytes and no whole weight at {offset}; export again")
        return file[start : start + size]


def _array(data: np.ndarray, kind: int, shape: tuple[int, ...]) -> np.ndarray:
    if kind not in _PACKED_BITS:
        return data.view(_DTYPES[kind])[: math.prod(shape)].reshape(shape)
    bits = np.unpackbits(data, bitorder="little")[: math.prod(shape) * _PACKED_BITS[kind]]
    bits = bits.reshape(-1, _PACKED_BITS[kind])
    unpacked: np.ndarray = (bits << np.arange(_PACKED_BITS[kind], dtype=np.uint8)).sum(axis=1, dtype=np.uint8)
    if kind == _INT4:
        unpacked = ((unpacked ^ 8).astype(np.int8) - 8).astype(np.int8)
    return unpacked.reshape(shape)


class LoadedPackage:
    """One function of a package, ready to be evaluated."""

    threads = 1

    def __init__(self, function: Function, graph: GraphInfo, file: Path) -> None:
        self.engine = f"coreml program, evaluated by numpy {np.__version__}"
        self._function = function
        self._graph = graph
        self._file = file
        try:
            self._constants, self._steps = function.prepare()
        except (KeyError, ValueError, IndexError, TypeError) as err:
            raise EngineError(f"{file} cannot be understood ({err!r}); export again") from err

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        values = dict(self._constants)
        taken = (*self._graph.inputs, *self._graph.states)
        values.update((info.name, array) for info, array in zip(taken, inputs, strict=True))
        with np.errstate(all="ignore"):  # an overflow is a result here, which parity will see
            for step in self._steps:
                values[step.output] = self._result(step, values)
                for name in step.dead:
                    del values[name]
        outputs = [np.ascontiguousarray(values[info.name]) for info in self._graph.outputs]
        for info, array in zip(self._graph.states, inputs[len(self._graph.inputs) :], strict=True):
            if values[info.name] is not array:
                array[...] = values[info.name]
        return outputs

    def _result(self, step: _Step, values: dict[str, Any]) -> np.ndarray:
        arguments = {
            name: [values[one] for one in bound] if isinstance(bound, list) else values[bound]
            for name, bound in step.arguments.items()
        }
        try:
            result = np.asarray(step.compute(**arguments))
        except (TypeError, ValueError, IndexError, KeyError) as err:
            raise EngineError(
                f"{self._file}: the operator {step.kind} ({step.name}) cannot be evaluated: {err}"
            ) from err
        if result.shape != step.shape:
            raise EngineError(
                f"{self._file}: the operator {step.kind} ({step.name}) gives {list(result.shape)}, the package says "
                f"{list(step.shape)}; export again"
            )
        return result if result.dtype == step.dtype else result.astype(step.dtype)

    def placement(self) -> Placement:
        return Placement(
            outside=dict(self._function.operators.most_common()),
            source="the saved program, evaluated operator by operator; on a device Core ML decides where each runs",
            executed=False,
        )

    def close(self) -> None:
        self._constants, self._steps = {}, []


# The operators, after the reference of MIL. A parameter that is missing here makes the operator an error, not a guess.


def _wide(x: Any) -> Any:
    """What float16 is computed in."""
    return x.astype(np.float32) if isinstance(x, np.ndarray) and x.dtype == np.float16 else x


def _arithmetic(compute: Callable[..., Any]) -> Callable[..., Any]:
    def widened(**arguments: Any) -> Any:
        return compute(**{name: _wide(value) for name, value in arguments.items()})

    return widened


def _linear(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> np.ndarray:
    product: np.ndarray = x @ weight.T
    return product if bias is None else product + bias


def _matmul(x: np.ndarray, y: np.ndarray, transpose_x: bool = False, transpose_y: bool = False) -> np.ndarray:
    product: np.ndarray = np.matmul(x.swapaxes(-1, -2) if transpose_x else x, y.swapaxes(-1, -2) if transpose_y else y)
    return product


def _windows(x: np.ndarray, sizes: Iterable[Any], strides: Iterable[Any]) -> np.ndarray:
    """(N, C, H, W) -> (N, C, rows, columns, *sizes)"""
    view: Callable[..., np.ndarray] = np.lib.stride_tricks.sliding_window_view
    windows = view(x, tuple(map(int, sizes)), axis=(2, 3))
    down, across = map(int, strides)
    return windows[:, :, ::down, ::across]


def _no_padding(pad_type: str, pad: np.ndarray | None) -> None:
    if pad_type != "valid" and not (pad_type == "custom" and pad is not None and not pad.any()):
        raise ValueError(f"padding of the kind {pad_type!r}")


def _conv(
    x: np.ndarray,
    weight: np.ndarray,
    strides: np.ndarray,
    dilations: np.ndarray,
    groups: int,
    pad_type: str,
    pad: np.ndarray | None = None,
    bias: np.ndarray | None = None,
) -> np.ndarray:
    _no_padding(pad_type, pad)
    if x.ndim != 4 or groups != 1 or (dilations != 1).any():
        raise ValueError("only convolutions over two axes, of one group and without dilation are known")
    out = np.tensordot(_windows(x, weight.shape[2:], strides), weight, axes=((1, 4, 5), (1, 2, 3)))
    return (out if bias is None else out + bias).transpose(0, 3, 1, 2)


def _max_pool(
    x: np.ndarray,
    kernel_sizes: np.ndarray,
    strides: np.ndarray,
    pad_type: str,
    pad: np.ndarray | None = None,
    ceil_mode: bool = False,
) -> np.ndarray:
    _no_padding(pad_type, pad)
    if ceil_mode:
        raise ValueError("only pooling that leaves incomplete windows out is known")
    pooled: np.ndarray = _windows(x, kernel_sizes, strides).max(axis=(4, 5))
    return pooled


def _softmax(x: np.ndarray, axis: int = -1) -> np.ndarray:
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis=axis, keepdims=True))


def _attention(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, attn_mask: np.ndarray | None = None
) -> np.ndarray:
    scores = query @ key.swapaxes(-1, -2) / math.sqrt(query.shape[-1])
    return np.asarray(_softmax(scores if attn_mask is None else scores + attn_mask) @ value)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.asarray(1.0 / (1.0 + np.exp(-x)), x.dtype)


_erf: Callable[[Any], Any] = np.frompyfunc(math.erf, 1, 1)


def _gelu(x: np.ndarray, mode: str = "EXACT") -> np.ndarray:
    if mode != "EXACT":
        raise ValueError(f"the mode {mode!r}")
    return np.asarray(0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)).astype(np.float64)))


def _pad(x: np.ndarray, pad: np.ndarray, mode: str, constant_val: Any) -> np.ndarray:
    if mode != "constant":
        raise ValueError(f"the mode {mode!r}")
    sides = [(0, 0)] * (x.ndim - len(pad) // 2) + [(int(a), int(b)) for a, b in pad.reshape(-1, 2)]
    return np.pad(x, sides, constant_values=constant_val)


def _slice_by_index(
    x: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    stride: np.ndarray | None = None,
    begin_mask: np.ndarray | None = None,
    end_mask: np.ndarray | None = None,
    squeeze_mask: np.ndarray | None = None,
) -> np.ndarray:
    def parts() -> Iterator[slice | int]:
        for axis in range(x.ndim):
            first, last = int(begin[axis]), int(end[axis])
            if squeeze_mask is not None and squeeze_mask[axis]:
                yield first
                continue
            yield slice(
                None if begin_mask is not None and begin_mask[axis] else first,
                None if end_mask is not None and end_mask[axis] else last,
                1 if stride is None else int(stride[axis]),
            )

    return x[tuple(parts())]


def _slice_update(
    x: np.ndarray,
    update: np.ndarray,
    begin: np.ndarray,
    end: np.ndarray,
    begin_mask: np.ndarray | None = None,
    end_mask: np.ndarray | None = None,
) -> np.ndarray:
    # Core ML's behaviour outside of the tensor is not defined; numpy would cut the slice off.
    masks = [np.zeros(x.ndim, bool) if mask is None else mask for mask in (begin_mask, end_mask)]
    first, last = np.where(masks[0], 0, begin), np.where(masks[1], x.shape, end)
    if (first < 0).any() or (last > x.shape).any():
        raise ValueError(f"the slice {first.tolist()} to {last.tolist()} reaches outside of {list(x.shape)}")
    whole = x.copy()
    whole[tuple(slice(int(a), int(b)) for a, b in zip(first, last, strict=True))] = update
    return whole


def _reshape(x: np.ndarray, shape: np.ndarray) -> np.ndarray:
    return x.reshape([x.shape[axis] if size == 0 else int(size) for axis, size in enumerate(shape)])


def _gather(
    x: np.ndarray, indices: np.ndarray, axis: int = 0, batch_dims: int = 0, validate_indices: bool = False
) -> np.ndarray:
    if batch_dims:
        raise ValueError(f"batch_dims={batch_dims}")
    return np.take(x, indices.astype(np.int64), axis=int(axis))


def _concat(values: list[np.ndarray], axis: int, interleave: bool = False) -> np.ndarray:
    if interleave:
        raise ValueError("interleaved parts")
    return np.concatenate(values, axis=int(axis))


def _shifted_and_scaled(data: np.ndarray, scale: np.ndarray, offset: np.ndarray | None = None) -> np.ndarray:
    """Quantised weights; each element of `scale` stands for a block of them."""
    whole = data.astype(np.float32)
    if offset is not None:
        whole = whole - _blown_up(offset.astype(np.float32), data.shape)
    scaled: np.ndarray = whole * _blown_up(scale.astype(np.float32), data.shape)
    return scaled


def _dequantised(quantized_data: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, axis: int) -> np.ndarray:
    """Weights that were quantised for iOS 17: a scale and an offset for all, or for each index of an axis."""
    along = [-1 if other == int(axis) else 1 for other in range(quantized_data.ndim)]
    offsets, scales = (np.asarray(one, np.float32).reshape(along) for one in (zero_point, scale))
    whole: np.ndarray = (quantized_data.astype(np.float32) - offsets) * scales
    return whole


def _blown_up(blocks: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    for axis, size in enumerate(shape):
        blocks = np.repeat(blocks, size // blocks.shape[axis], axis=axis)
    return blocks


def _looked_up(indices: np.ndarray, lut: np.ndarray) -> np.ndarray:
    """Palettised weights; the table's leading axes stand for blocks of them, the last two hold scalars of each."""
    if lut.shape[-1] != 1:
        raise ValueError("palettes of vectors")
    places = [
        np.arange(size).reshape([-1 if other == axis else 1 for other in range(indices.ndim)]) * lut.shape[axis] // size
        for axis, size in enumerate(indices.shape)
    ]
    return np.asarray(lut[(*places, indices, 0)])


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "abs": lambda x: np.abs(x),
    "add": lambda x, y: x + y,
    "clip": lambda x, alpha, beta: np.clip(x, alpha, beta),
    "conv": _conv,
    "gelu": _gelu,
    "greater_equal": lambda x, y: x >= y,
    "linear": _linear,
    "matmul": _matmul,
    "max_pool": _max_pool,
    "minimum": lambda x, y: np.minimum(x, y),
    "mul": lambda x, y: x * y,
    "pad": _pad,
    "real_div": lambda x, y: x / y,
    "rsqrt": lambda x, epsilon: 1.0 / np.sqrt(x + epsilon),
    "scaled_dot_product_attention": _attention,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "softmax": _softmax,
    "sqrt": lambda x: np.sqrt(x),
    "sub": lambda x, y: x - y,
}
OPERATORS: dict[str, Callable[..., Any]] = {
    # These move values and leave their dtype alone.
    "cast": lambda x, dtype: x.astype(_CAST_DTYPES.get(dtype, dtype)),
    "concat": _concat,
    DEQUANTIZE: _dequantised,
    "constexpr_blockwise_shift_scale": _shifted_and_scaled,
    "constexpr_lut_to_dense": _looked_up,
    "expand_dims": lambda x, axes: np.expand_dims(x, tuple(int(axis) for axis in axes)),
    "gather": _gather,
    "identity": lambda x: x,
    "read_state": lambda input: input,
    "reshape": _reshape,
    "select": lambda cond, a, b: np.where(cond, a, b),
    "slice_by_index": _slice_by_index,
    "slice_update": _slice_update,
    "squeeze": lambda x, axes: np.squeeze(x, tuple(int(axis) for axis in axes)),
    "transpose": lambda x, perm: x.transpose([int(axis) for axis in perm]),
    WRITE_STATE: lambda data: data,
    **{name: _arithmetic(compute) for name, compute in _ARITHMETIC.items()},
}
