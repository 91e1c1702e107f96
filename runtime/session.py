"""One graph of a bundle, open in its engine: named arrays in, named arrays out, both checked against the manifest."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import numpy as np

from runtime.bundle import Bundle, GraphInfo
from runtime.engines import ENGINES, LoadedGraph
from runtime.errors import EngineError
from runtime.placement import Placement

_MAX_DEFAULT_THREADS = 4


def default_threads() -> int:
    """Cores of this machine, at most 4: phones have about four fast cores, and more would flatter a desktop."""
    return min(os.cpu_count() or 1, _MAX_DEFAULT_THREADS)


class Session:
    """An open graph; made by `open_session`, closed by `close` or by leaving a `with` block."""

    def __init__(self, graph: GraphInfo, loaded: LoadedGraph, load_ms: float) -> None:
        self.graph = graph
        self.load_ms = load_ms
        self._loaded = loaded
        self._lock = threading.Lock()

    @property
    def engine(self) -> str:
        """Name and version, e.g. `executorch 1.5.1`."""
        return self._loaded.engine

    @property
    def threads(self) -> int:
        """Threads of one run, as the engine reports them."""
        return self._loaded.threads

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the graph once, one caller at a time: a graph has one place for what it computes.

        A graph with states takes them among the inputs, by name, and writes into them.

        Raises EngineError when an input or output is not what the manifest says.
        """
        with self._lock:
            outputs = self._loaded.run(self.check_inputs(inputs))
        if len(outputs) != len(self.graph.outputs):
            raise EngineError(f"{self.graph.name} gave {len(outputs)} outputs, not {len(self.graph.outputs)}")
        for info, array in zip(self.graph.outputs, outputs, strict=True):
            if not info.fits(str(array.dtype), array.shape):
                raise EngineError(f"{self.graph.name} gave {info.name} as {array.dtype}{list(array.shape)}, not {info}")
        return {info.name: array for info, array in zip(self.graph.outputs, outputs, strict=True)}

    def check_inputs(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The inputs in the graph's order, then its states; EngineError for a wrong name, shape or dtype."""
        wanted = (*self.graph.inputs, *self.graph.states)
        expected = {info.name for info in wanted}
        if inputs.keys() != expected:
            raise EngineError(f"{self.graph.name} takes the inputs {sorted(expected)}, got {sorted(inputs)}")
        for info in wanted:
            array = inputs[info.name]
            if not info.fits(str(array.dtype), array.shape):
                raise EngineError(f"{self.graph.name} takes {info}, got {array.dtype}{list(array.shape)}")
        return [
            *(np.ascontiguousarray(inputs[info.name]) for info in self.graph.inputs),
            *(inputs[info.name] for info in self.graph.states),
        ]

    def placement(self) -> Placement:
        """Who runs what inside the graph, from the engine or the loaded file."""
        return self._loaded.placement()

    def close(self) -> None:
        """Lets go of the graph's memory; the session cannot run afterwards."""
        self._loaded.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_session(bundle: Bundle, graph_name: str, *, threads: int | None = None) -> Session:
    """Opens one graph of a bundle in the engine it was made for.

    `threads` None means `default_threads()`. ExecuTorch has one thread pool for the whole process: the session opened
    last decides. Raises BundleError for a missing or truncated file, EngineError for everything the engine refuses.
    """
    graph, stored = bundle.graph(graph_name), bundle.stored(graph_name)
    wanted = default_threads() if threads is None else threads
    if wanted < 1:
        raise EngineError(f"threads={wanted} must be at least 1")
    files = {name: bundle.file(name) for name in graph.files}
    extra = tuple(files[name] for name in graph.extra_files)
    start = time.perf_counter()
    loaded = ENGINES[graph.engine](stored, bundle.path / graph.file, extra, wanted)
    return Session(graph, loaded, (time.perf_counter() - start) * 1e3)
