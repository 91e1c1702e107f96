"""pruneport's side of benchmarks/peers.py: a bundle through the same calls as `pruneport ask`.

pruneport_worker.py INPUTS BUNDLE THREADS NEW_TOKENS
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peer_systems import model
from benchmarks.peer_systems.worker import serve

if TYPE_CHECKING:
    import numpy as np

    from runtime.generation import Answers


class Pruneport:
    """A bundle whose graphs are open."""

    def __init__(self, answers: Answers, asked: model.Asked, *, image_tokens: int, new_tokens: int) -> None:
        self._answers, self._asked = answers, asked
        self._image_tokens, self._new_tokens = image_tokens, new_tokens

    def check(self) -> tuple[str, np.ndarray]:
        """The values of the first decoder layer at the image tokens, (N, D): it sees all of them."""
        values = self._answers.see(self._asked.pixels).caches["value_0"][0]
        heads, _, size = values.shape
        return model.VALUES, values[:, -self._image_tokens :].swapaxes(0, 1).reshape(-1, heads * size)

    def run(self) -> dict[str, Any]:
        """Milliseconds of everything, once."""
        photo = self._answers.see(self._asked.pixels)
        tokens = self._answers.answer(photo, self._asked.question, max_new_tokens=self._new_tokens + 1, past_end=True)
        first, *rest = tokens
        return {
            "image_ready_ms": photo.image_ready_ms,
            "ttft_question_ms": first.ms,
            "token_ms": [token.ms for token in rest],
        }


def main() -> None:
    """Opens the bundle and answers."""
    inputs, path, threads, new_tokens = sys.argv[1:]
    from runtime.bundle import read_bundle
    from runtime.generation import open_graphs, start_answers

    bundle = read_bundle(Path(path))
    packages = {"executorch": "executorch", "onnxruntime": "onnxruntime"}
    engines = {packages[graph.engine] for graph in bundle.manifest.graphs}
    with open_graphs(bundle, threads=int(threads)) as graphs:
        peer = Pruneport(
            start_answers(bundle, graphs),
            model.asked(Path(inputs)),
            image_tokens=bundle.manifest.prune.image_tokens,
            new_tokens=int(new_tokens),
        )
        serve(peer, {engine: version(engine) for engine in engines})


if __name__ == "__main__":
    main()
