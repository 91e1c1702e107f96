"""The engines that can run a graph here, by the name the manifest uses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from runtime.bundle import GraphInfo
from runtime.engines import coreml, executorch, onnxruntime
from runtime.engines.loaded import LoadedGraph

# (the graph, its file, the files beside it, threads) -> the graph inside the engine; raises EngineError.
LoadGraph = Callable[[GraphInfo, Path, tuple[Path, ...], int], LoadedGraph]

ENGINES: dict[str, LoadGraph] = {
    "coreml": coreml.load,
    "executorch": executorch.load,
    "onnxruntime": onnxruntime.load,
}

__all__ = ["ENGINES", "LoadGraph", "LoadedGraph"]
