"""pruneport's side of benchmarks/peers.py: a bundle through the same calls as `pruneport ask`.

pruneport_worker.py INPUTS BUNDLE THREADS NEW_TOKENS
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peer_systems import model
from benchmarks.peer_systems.worker import serve

if TYPE_CHECKING:
    import numpy as np

    from runtime.generation import Answers
    from runtime.text_graphs import RunningGraph


class Timed:
    """An open graph that adds up how long it runs; in everything else it is that graph."""

    def __init__(self, graph: RunningGraph, name: str, spent_ms: dict[str, float]) -> None:
        self._graph, self._name, self._spent_ms = graph, name, spent_ms

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the graph once."""
        start = time.perf_counter()
        outputs = self._graph.run(inputs)
        self._spent_ms[self._name] = self._spent_ms.get(self._name, 0.0) + (time.perf_counter() - start) * 1e3
        return outputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)


class Pruneport:
    """A bundle whose graphs are open; `spent_ms` is what they add their times to, by their names."""

    def __init__(
        self,
        answers: Answers,
        asked: model.Asked,
        spent_ms: dict[str, float],
        *,
        image_tokens: int,
        new_tokens: int,
    ) -> None:
        self._answers, self._asked, self._spent_ms = answers, asked, spent_ms
        self._image_tokens, self._new_tokens = image_tokens, new_tokens

    def check(self) -> tuple[str, np.ndarray]:
        """The values of the first decoder layer at the image tokens, (N, D): it sees all of them."""
        values = self._answers.see(self._asked.pixels).caches["value_0"][0]
        heads, _, size = values.shape
        return model.VALUES, values[:, -self._image_tokens :].swapaxes(0, 1).reshape(-1, heads * size)

    def run(self) -> dict[str, Any]:
        """Milliseconds of everything, once, and those of each graph in it; `token` is the mean of the further ones."""
        self._spent_ms.clear()
        photo = self._answers.see(self._asked.pixels)
        image = self._taken()
        tokens = self._answers.answer(photo, self._asked.question, max_new_tokens=self._new_tokens + 1, past_end=True)
        first = next(tokens)
        question = self._taken()
        token_ms = [token.ms for token in tokens]
        further = {name: ms / len(token_ms) for name, ms in self._taken().items()}
        return {
            "image_ready_ms": photo.image_ready_ms,
            "ttft_question_ms": first.ms,
            "token_ms": token_ms,
            "spent_ms": {"image": image, "question": question, "token": further},
        }

    def _taken(self) -> dict[str, float]:
        """What the graphs have spent since this was asked last."""
        spent = dict(self._spent_ms)
        self._spent_ms.clear()
        return spent


def main() -> None:
    """Opens the bundle and answers."""
    inputs, path, threads, new_tokens = sys.argv[1:]
    from runtime.bundle import read_bundle
    from runtime.generation import open_graphs, start_answers

    bundle = read_bundle(Path(path))
    packages = {"executorch": "executorch", "onnxruntime": "onnxruntime"}
    engines = {packages[graph.engine] for graph in bundle.manifest.graphs}
    with open_graphs(bundle, threads=int(threads)) as graphs:
        spent_ms: dict[str, float] = {}
        timed = {name: Timed(graph, name, spent_ms) for name, graph in graphs.items()}
        peer = Pruneport(
            start_answers(bundle, timed),
            model.asked(Path(inputs)),
            spent_ms,
            image_tokens=bundle.manifest.prune.image_tokens,
            new_tokens=int(new_tokens),
        )
        serve(peer, {engine: version(engine) for engine in engines})


if __name__ == "__main__":
    main()
