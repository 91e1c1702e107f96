"""Evaluates what an ExecuTorch program hands to Core ML: the package inside its delegate call.

The call is read with ExecuTorch's own reader, the package unpacked with its own unpacker and evaluated like any other
(runtime.engines.coreml). On Apple's systems ExecuTorch has the delegate, and the program runs there as it is.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from runtime.bundle import GraphInfo, TensorInfo
from runtime.engines.coreml import CARRIED_AS, Function, LoadedPackage, Operator, read_package
from runtime.engines.loaded import check_by_place
from runtime.engines.program import Method
from runtime.errors import EngineError, EngineMissingError
from runtime.placement import Placement

NAME = "CoreMLBackend"
_MODEL = "lowered_module"


def is_all_of(method: Method) -> bool:
    """Whether a method is one call to Core ML and nothing else."""
    return method.delegates == {NAME: 1} and not method.kernels


def load(graph: GraphInfo, file: Path, method: Method, placement: Placement) -> LoadedCall:
    """The package of a method's only call, held against the manifest. Raises EngineError, EngineMissingError."""
    with _call(file, method.name) as call:
        inputs = _ordered(call.named["inputNames"], call.function.inputs)
        outputs = _ordered(call.named["outputNames"], call.function.outputs)
        taken, given = call.values[: len(inputs)], call.values[len(inputs) :]
        reads = [call.program_inputs.index(value) for value in taken]
        writes = [given.index(value) for value in call.program_outputs]
        _check(graph, file, "inputs", [graph.inputs[at] for at in reads], inputs)
        _check(graph, file, "outputs", list(graph.outputs), [outputs[at] for at in writes])
        named = msgspec.structs.replace(graph, inputs=inputs, outputs=outputs, states=())
        # Its weights are mapped into memory now, which outlives the folder.
        return LoadedCall(graph, LoadedPackage(call.function, named, file), reads, writes, placement)


def declared(file: Path, name: str) -> tuple[Operator, ...]:
    """The operators of the package in a method's only call. Raises EngineError, EngineMissingError."""
    with _call(file, name) as call:
        return call.function.declared()


@dataclass(frozen=True, kw_only=True)
class _Call:
    """A delegate call: the package's function and names, and by number the values of call and program."""

    function: Function
    named: dict[str, list[str]]
    values: list[int]
    program_inputs: list[int]
    program_outputs: list[int]


@contextmanager
def _call(file: Path, name: str) -> Iterator[_Call]:
    program, unpack = _read(file)
    with tempfile.TemporaryDirectory(prefix="pruneport-", ignore_cleanup_errors=True) as folder:
        try:
            (plan,) = (plan for plan in program.execution_plan if plan.name == name)
            ((instruction,),) = (chain.instructions for chain in plan.chains)
            content = program.backend_delegate_data[plan.delegates[0].processed.index].data
            if not unpack(bytes(content), folder):
                raise EngineError(f"{file}: the package for Core ML in {name} cannot be unpacked; export again")
            del program, content
            yield _Call(
                function=read_package(Path(folder) / _MODEL / "model.mlpackage").function(name),
                named=json.loads((Path(folder) / _MODEL / "metadata.json").read_text()),
                values=list(instruction.instr_args.args),
                program_inputs=list(plan.inputs),
                program_outputs=list(plan.outputs),
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, OSError) as err:
            raise EngineError(f"{file}: the call to Core ML in {name} cannot be read ({err!r}); export again") from err


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
    ) -> None:
        self.engine = f"executorch program, its {package.engine}"
        self._graph, self._package = graph, package
        self._reads, self._writes = reads, writes
        self._placement = dataclasses.replace(
            placement,
            executed=False,
            source=f"{placement.source}; its package evaluated operator by operator, on a device Core ML runs it",
        )

    def run(self, inputs: list[np.ndarray]) -> list[np.ndarray]:
        """Evaluates the package once."""
        wanted = [inputs[at] for at in self._reads]  # the delegate converts at its border what Core ML does not have
        outputs = self._package.run([x.astype(CARRIED_AS.get(str(x.dtype), x.dtype), copy=False) for x in wanted])
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


def _check(graph: GraphInfo, file: Path, kind: str, declared: list[TensorInfo], found: Iterable[TensorInfo]) -> None:
    carried = [msgspec.structs.replace(info, dtype=CARRIED_AS.get(info.dtype, info.dtype)) for info in declared]
    check_by_place(carried, [(info.dtype, info.shape) for info in found], kind, f"{file}: {graph.name}")
