"""Runs .pte programs through ExecuTorch's Python bindings; the only file of runtime/ that touches torch."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from runtime.bundle import GraphInfo
from runtime.engines import core_ml_delegate
from runtime.engines.loaded import LoadedGraph, check_by_place
from runtime.engines.program import Method, pick_method, placement_of, read_program
from runtime.errors import EngineError, EngineMissingError
from runtime.placement import Placement

# ExecuTorch's ScalarType numbers of the dtypes a manifest may name.
_DTYPE_BY_SCALAR_TYPE = {0: "uint8", 1: "int8", 3: "int32", 4: "int64", 5: "float16", 6: "float32", 11: "bool"}
# Kernels that live in libraries of their own; the import registers them, without it a program fails to load.
_KERNEL_LIBRARY_BY_NAMESPACE = {
    "quantized_decomposed": "executorch.kernels.quantized",
    "torchao": "executorch.kernels.quantized",
    "llama": "executorch.extension.llm.custom_ops.custom_ops",
}
_XNNPACK = "XnnpackBackend"
# executorch::runtime::set_option(char const*, Span<BackendOption>)
_SET_OPTION = "_ZN10executorch7runtime10set_optionEPKcNS0_4SpanINS0_13BackendOptionEEE"
# A float16 linear layer of 256 ones to 16 numbers; tests/runtime/test_engines.py makes it again.
_PROBE = Path(__file__).with_name("accumulator.pte")
# Delegates that are missing from builds, such as the wheel, made without an option.
_BUILD_OPTIONS = {"VulkanBackend": "EXECUTORCH_BUILD_VULKAN", core_ml_delegate.NAME: "EXECUTORCH_BUILD_COREML"}


def load(graph: GraphInfo, file: Path, extra_files: tuple[Path, ...], threads: int) -> LoadedGraph:
    """Loads a program's method and holds its inputs and outputs against the manifest. Raises EngineError.

    Where ExecuTorch cannot run Core ML and a method is one call to it, the package in that call is evaluated.
    """
    method = pick_method(graph, read_program(file), file)
    if len(extra_files) > 1:
        raise EngineError(f"{graph.name} lists {len(extra_files)} extra files; the ExecuTorch loader takes one .ptd")
    if method.external_tensors and not extra_files:
        # The loader dereferences the missing data map in some builds, so this must be caught before it.
        raise EngineError(
            f"{file} keeps {method.external_tensors} tensors in a .ptd file that its manifest lacks; export again"
        )
    bindings = _bindings()
    if core_ml_delegate.NAME not in _registered(bindings) and core_ml_delegate.is_all_of(method):
        return core_ml_delegate.load(graph, file, method, placement_of(method))
    _check_delegates(method, bindings)
    _register_kernels(method)
    with _native_log() as log:
        if bindings._threadpool_get_thread_count() != threads:
            bindings._unsafe_reset_threadpool(threads)
        try:
            program = _open_program(bindings, file, extra_files[0] if extra_files else None)
            loaded = program.opened.load_method(method.name)
            meta = loaded.method_meta()
        except (RuntimeError, ValueError) as err:
            reason = "; ".join(log()[-3:])
            raise EngineError(f"ExecuTorch cannot load {file}: {err} ({reason}); export again") from err
    inputs = [_described(meta.input_tensor_meta(i)) for i in range(meta.num_inputs())]
    outputs = [_described(meta.output_tensor_meta(i)) for i in range(meta.num_outputs())]
    check_by_place(graph.inputs, inputs, "inputs", str(file))
    check_by_place(graph.outputs, outputs, "outputs", str(file))
    return LoadedProgram(bindings, program, loaded, method, file)


@dataclass(eq=False)
class _Program:
    """A program file in memory, whose constants the bindings lock there; closed with the last method of it."""

    opened: Any


_open_programs: WeakValueDictionary[tuple[object, ...], _Program] = WeakValueDictionary()


def _open_program(bindings: Any, file: Path, data: Path | None) -> _Program:
    """The program that is open already where another method of the same file is, else opened."""
    stat = file.stat()
    key = (file.resolve(), data, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    program = _open_programs.get(key)
    if program is None:
        opened = bindings._load_program(
            str(file),
            program_verification=bindings.Verification.InternalConsistency,
            data_path=str(data) if data else None,
        )
        program = _open_programs[key] = _Program(opened)
    return program


class LoadedProgram:
    """One method of a program, ready to run."""

    def __init__(self, bindings: Any, program: _Program, loaded: Any, method: Method, file: Path) -> None:
        self.engine = f"executorch {importlib.metadata.version('executorch')}"
        self._bindings = bindings
        self._program: _Program | None = program  # owns the memory the method runs in
        self._loaded = loaded
        self._method = method
        self._file = file

    @property
    def threads(self) -> int:
        return int(self._bindings._threadpool_get_thread_count())

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        import torch

        tensors = [torch.from_numpy(array if array.flags.writeable else array.copy()) for array in inputs]
        try:
            outputs = self._loaded(tensors)
        except (RuntimeError, ValueError) as err:
            raise EngineError(f"ExecuTorch failed in {self._file}: {err}") from err
        return [output.numpy() for output in outputs]

    def placement(self) -> Placement:
        placed = placement_of(self._method)
        if _XNNPACK in placed.delegates:
            return replace(placed, accumulator_bits=accumulator_bits())
        return placed

    def close(self) -> None:
        self._loaded = self._program = None


@cache
def accumulator_bits() -> int:
    """In how many bits XNNPACK adds float16 products up on this processor, measured: 16 or 32.

    The probe multiplies 2048 and 255 ones by ones, for 8 rows and 16 columns, so that a kernel like those of a graph
    runs. float16 knows no number between 2048 and 2050, so that ones added to 2048 are lost where sums are float16.
    """
    import torch

    bindings = _bindings()
    row = torch.ones(1, 8, 256, dtype=torch.float16)
    row[:, :, 0] = 2048
    with _native_log():
        try:
            program = bindings._load_program(str(_PROBE))
            (sums,) = program.load_method("forward")([row])
        except (RuntimeError, ValueError) as err:
            raise EngineError(f"ExecuTorch cannot run {_PROBE}: {err}; install pruneport again") from err
    return 32 if float(sums.min()) >= 2048 + 254 else 16


def _bindings() -> Any:
    try:
        # Not its public name, portable_lib: that imports the whole exporter, which takes seconds and 140 MB, to say
        # that it is experimental. The library needs those of torch to be there.
        import torch  # noqa: F401
        from executorch.extension.pybindings import _C
    except ImportError as err:
        raise EngineMissingError(
            f"the ExecuTorch engine is not installed ({err}); pip install 'pruneport[executorch]'"
        ) from err
    _share_weights()
    return _C


@cache
def _share_weights() -> None:
    """Has XNNPACK hold what it packs of a weight once, for all methods and programs that name it.

    They name weights by their content. The bindings have no way to set the option, which phones' builds have on; the
    library that they load has. Where it lacks that, weights are held once for each method, as before.
    """
    maps = Path("/proc/self/maps")
    lines = maps.read_text(errors="replace").splitlines() if maps.exists() else []
    library = next((line.split(maxsplit=5)[5] for line in lines if line.endswith("/libexecutorch.so")), None)
    set_option = None if library is None else getattr(ctypes.CDLL(library), _SET_OPTION, None)
    if set_option is None:
        return
    option = _BackendOption(key=b"weight_cache_enabled", value=b"\1", kind=0)
    set_option(_XNNPACK.encode(), ctypes.byref(option), ctypes.c_size_t(1))


class _BackendOption(ctypes.Structure):
    """`executorch/runtime/backend/options.h`: a name, a value of one of several kinds, and its kind, 0 for a bool."""

    _fields_ = (("key", ctypes.c_char * 64), ("value", ctypes.c_char * 256), ("kind", ctypes.c_int32))


def _registered(bindings: Any) -> set[str]:
    return set(bindings._get_registered_backend_names())


def _check_delegates(method: Method, bindings: Any) -> None:
    """Raises EngineMissingError where the program calls a delegate that this build of ExecuTorch lacks."""
    for name in sorted(method.delegates.keys() - _registered(bindings)):
        option = f" with {_BUILD_OPTIONS[name]}" if name in _BUILD_OPTIONS else " that has it"
        raise EngineMissingError(
            f"the ExecuTorch engine installed here has no {name}; "
            f"run the bundle on a phone, or verify it with ExecuTorch built{option}",
            placement_of(method),
        )


def _register_kernels(method: Method) -> None:
    namespaces = {kernel.partition("::")[0] for kernel in method.kernels}
    for namespace in sorted(namespaces & _KERNEL_LIBRARY_BY_NAMESPACE.keys()):
        library = _KERNEL_LIBRARY_BY_NAMESPACE[namespace]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(library)
        except (ImportError, OSError) as err:
            raise EngineError(f"the program needs kernels of {library}, which cannot be loaded: {err}") from err


def _described(meta: Any) -> tuple[str, tuple[int, ...]]:
    """Data type and shape; of a dynamic axis the program says the bound."""
    return _DTYPE_BY_SCALAR_TYPE.get(meta.dtype(), f"type {meta.dtype()}"), tuple(meta.sizes())


@contextlib.contextmanager
def _native_log() -> Iterator[Any]:
    """Takes what the C++ side writes to stderr, which holds the reason of every failure, and gives it as lines."""
    sys.stderr.flush()
    try:
        saved = os.dup(2)
    except OSError:  # stderr is closed: nothing can be written to it, nothing to take
        yield list
        return
    with tempfile.TemporaryFile() as sink:

        def lines() -> list[str]:
            sink.seek(0)
            return sink.read().decode(errors="replace").splitlines()

        os.dup2(sink.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(saved, 2)
            os.close(saved)
