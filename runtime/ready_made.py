"""Graphs that lie as other people's runtimes expect them, called here in the order in which those call them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from runtime.bundle import Bundle
from runtime.errors import BundleError
from runtime.text_graphs import TEXT_DECODER, TOKEN_EMBEDDING, VISION_ENCODER, RunningGraph

TRANSFORMERS_JS = "transformers.js"
MULTIMODAL_RUNNER = "multimodal-runner"

EMBED_TOKENS = "embed_tokens"
DECODER_MODEL_MERGED = "decoder_model_merged"

_Decode = Callable[[np.ndarray], np.ndarray]


def greedy_tokens(
    bundle: Bundle, graphs: Mapping[str, RunningGraph], pixel_values: np.ndarray, question: Sequence[int]
) -> Iterator[int]:
    """The greedy answer without end: prompt prefix, image, question, then one token after the other.

    pixel_values (1, 3, H, W) float32. Positions are contiguous: the kept image tokens count, the dropped ones do not.
    """
    start = {TRANSFORMERS_JS: _merged, MULTIMODAL_RUNNER: _cached}.get(bundle.manifest.layout)
    if start is None:
        raise BundleError(f"how {bundle.manifest.layout!r} calls graphs is not known here; install a newer pruneport")
    embed, decode = start(graphs)
    decode(embed(bundle.manifest.prompt.prefix_ids))
    decode(graphs[VISION_ENCODER].run({"pixel_values": pixel_values})["image_features"])
    logits = decode(embed(question))
    while True:
        token = int(logits[0, -1].argmax())
        yield token
        logits = decode(embed([token]))


def _embedding(graph: RunningGraph) -> Callable[[Sequence[int]], np.ndarray]:
    (name,) = (info.name for info in graph.graph.inputs)
    return lambda ids: graph.run({name: np.asarray([ids], np.int64)})["inputs_embeds"]


def _cached(graphs: Mapping[str, RunningGraph]) -> tuple[Callable[[Sequence[int]], np.ndarray], _Decode]:
    """The KV cache is inside; the caller says how many tokens came before."""
    done = 0

    def decode(embeds: np.ndarray) -> np.ndarray:
        nonlocal done
        out = graphs[TEXT_DECODER].run({"inputs_embeds": embeds, "input_pos": np.asarray([done], np.int64)})
        done += embeds.shape[1]
        return out["logits"]

    return _embedding(graphs[TOKEN_EMBEDDING]), decode


def _merged(graphs: Mapping[str, RunningGraph]) -> tuple[Callable[[Sequence[int]], np.ndarray], _Decode]:
    """The KV cache goes in and comes out, longer by the new tokens."""
    decoder = graphs[DECODER_MODEL_MERGED]
    prefix = "past_key_values"
    past = {
        info.name: np.zeros((1, info.shape[1], 0, info.shape[3]), info.numpy_dtype)
        for info in decoder.graph.inputs
        if info.name.startswith(prefix)
    }

    def decode(embeds: np.ndarray) -> np.ndarray:
        nonlocal past
        done, tokens = next(iter(past.values())).shape[2], embeds.shape[1]
        out = decoder.run(
            {
                "inputs_embeds": embeds,
                "attention_mask": np.ones((1, done + tokens), np.int64),
                "position_ids": np.arange(done, done + tokens, dtype=np.int64)[None],
                **past,
            }
        )
        past = {name: out[name.replace(prefix, "present", 1)] for name in past}
        return out["logits"]

    return _embedding(graphs[EMBED_TOKENS]), decode
