"""Evaluates what an ExecuTorch program hands to Core ML: the package inside its delegate call.

The call is read with ExecuTorch's own reader, the package unpacked with its own unpacker and evaluated like any other
(runtime.engines.coreml). On Apple's systems ExecuTorch has the delegate, and the program runs there as it is.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from runtime.bundle import GraphInfo, TensorInfo
from runtime.engines.coreml import LoadedPackage, read_package
from runtime.engines.loaded import Placement
from runtime.engines.program import Method
from runtime.errors import EngineError, EngineMissingError

NAME = "CoreMLBackend"
_MODEL = "lowered_module"
# The delegate converts at its border what Core ML does not have.
_DTYPES = {"int64": "int32"}


def is_all_of(method: Method) -> bool:
    """Whether a method is one call to Core ML and nothing else."""
    return method.delegates == {NAME: 1} and not method.kernels


def load(graph: GraphInfo, file: Path, method: Method, placement: Placement) -> LoadedCall:
    """The package of a method's only call, held against the manifest. Raises EngineError, EngineMissingError."""
    program, unpack = _read(file)
    folder = tempfile.TemporaryDirectory(prefix="pruneport-")
    try:
        (plan,) = (plan for plan in program.execution_plan if plan.name == method.name)
        ((call,),) = (chain.instructions for chain in plan.chains)
        content = program.backend_delegate_data[plan.delegates[0].processed.index].data
        if not unpack(bytes(content), folder.name):
            raise EngineError(f"{file}: the package for Core ML in {method.name} cannot be unpacked; export again")
        named = json.loads((Path(folder.name) / _MODEL / "metadata.json").read_text())
        function = read_package(Path(folder.name) / _MODEL / "model.mlpackage").function(method.name)
        inputs = _ordered(named["inputNames"], function.inputs)
        outputs = _ordered(named["outputNames"], function.outputs)
        values = list(call.instr_args.args)
        taken, given = values[: len(inputs)], values[len(inputs) :]
        reads = [list(plan.inputs).index(value) for value in taken]
        writes = [given.index(value) for value in plan.outputs]
        _check(graph, file, "inputs", [graph.inputs[at] for at in reads], inputs)
        _check(graph, file, "outputs", list(graph.outputs), [outputs[at] for at in writes])
        package = LoadedPackage(
            function, msgspec.structs.replace(graph, inputs=inputs, outputs=outputs, states=()), file
        )
        return LoadedCall(graph, package, reads, writes, placement, folder)
    except EngineError:
        folder.cleanup()
        raise
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as err:
        folder.cleanup()
        raise EngineError(
            f"{file}: the call to Core ML in {method.name} cannot be read ({err!r}); export again"
        ) from err


class LoadedCall:
    """A program's call to Core ML, ready to be evaluated."""

    threads = 1

    def __init__(
        self,
        graph: GraphInfo,
        package: LoadedPackage,
        reads: list[int],
        writes: list[int],
        placement: Placement,
        folder: tempfile.TemporaryDirectory[str],
    ) -> None:
        self.engine = f"executorch program, its {package.engine}"
        self._graph, self._package, self._folder = graph, package, folder
        self._reads, self._writes = reads, writes
        self._placement = dataclasses.replace(
            placement,
            executed=False,
            source=f"{placement.source}; its package evaluated operator by operator, on a device Core ML runs it",
        )

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Evaluates the package once."""
        wanted = [inputs[at] for at in self._reads]
        outputs = self._package.run([x.astype(_DTYPES.get(str(x.dtype), x.dtype), copy=False) for x in wanted])
        return [
            outputs[at].astype(info.dtype, copy=False)
            for at, info in zip(self._writes, self._graph.outputs, strict=True)
        ]

    def placement(self) -> Placement:
        """The calls in the program file."""
        return self._placement

    def close(self) -> None:
        """Lets go of the package."""
        self._package.close()
        self._folder.cleanup()


def _read(file: Path) -> tuple[Any, Any]:
    """ExecuTorch's description of a program, and what unpacks a package in it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from executorch.backends.apple.coreml import executorchcoreml
            from executorch.exir._serialize._program import deserialize_pte_binary
    except ImportError as err:
        raise EngineMissingError(
            f"what ExecuTorch packs for Core ML cannot be unpacked here ({err}); verify the bundle on a Mac"
        ) from err
    try:
        return deserialize_pte_binary(file.read_bytes()).program, executorchcoreml.unflatten_directory_contents
    # Whatever is wrong with the file, ExecuTorch's reader fails in its own ways.
    except Exception as err:
        raise EngineError(f"{file} is a damaged ExecuTorch program ({err!r}); export again") from err


def _ordered(names: list[str], infos: tuple[TensorInfo, ...]) -> tuple[TensorInfo, ...]:
    by_name = {info.name: info for info in infos}
    return tuple(by_name[name] for name in names)


def _check(graph: GraphInfo, file: Path, kind: str, declared: list[TensorInfo], found: Any) -> None:
    wanted = [(_DTYPES.get(info.dtype, info.dtype), info.shape) for info in declared]
    have = [(info.dtype, info.shape) for info in found]
    if wanted != have:
        raise EngineError(f"{file}: {graph.name} has the {kind} {have}; its manifest says {wanted}; export again")
