"""The grammar of golden.safetensors: what the desktop's inputs and outputs are called, and which graph takes which.

`photo`                          (H, W, 3) uint8
`<graph>.in.<input>`             what a graph takes; an input that another graph gives is stored once, as its output
`<graph>.out.<output>`           what it gives
`kept_*`, `marks`, `recovery.*`  how image tokens were chosen, and what their rows follow from
`answer.*`                       a question, its greedy answer, and by how much each token's logit led
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from runtime.bundle import GraphInfo, TensorInfo
from runtime.errors import BundleError
from runtime.generation import IMAGE_PREFILL, TEXT_DECODER, TEXT_PREFILL, TOKEN_EMBEDDING, VISION_ENCODER

PHOTO = "photo"
PIXELS = "pixel_values"
KEPT_INDICES, KEPT_ORDER, KEPT_MARGIN = "kept_indices", "kept_order", "kept_margin"
KEPT_ALTERNATIVES, MARKS = "kept_alternatives", "marks"
# What the rows of kept tokens follow from, where a method mixes dropped tokens into them.
RECOVERY_PARTS = ("hidden", "similarity", "share", "least_share")
QUESTION, ANSWER, ANSWER_MARGIN = "answer.question", "answer.ids", "answer.margin"

_Tensors = Mapping[str, np.ndarray]


def input_key(graph: str, name: str) -> str:
    """The name of what a graph takes."""
    return f"{graph}.in.{name}"


def output_key(graph: str, name: str) -> str:
    """The name of what a graph gives."""
    return f"{graph}.out.{name}"


def recovery_key(part: str) -> str:
    """The name of what the rows of kept tokens follow from."""
    return f"recovery.{part}"


def graph_inputs(graph: GraphInfo, golden: _Tensors) -> dict[str, np.ndarray]:
    """The golden's inputs of a graph, in the dtypes that it takes; KeyError names a tensor that is not there.

    A cache is made of what the graphs before left in it.
    """
    inputs = {}
    for info in (*graph.inputs, *graph.states):
        if info.name.startswith("past_"):
            inputs[info.name] = _cache(graph.name, info, golden)
            continue
        key = input_key(graph.name, info.name)
        array = golden[key if key in golden else _fed_by(graph.name, info.name)]
        inputs[info.name] = array.astype(info.numpy_dtype, copy=False)
    return inputs


def _fed_by(graph: str, name: str) -> str:
    """The output that is an input of a graph, by its name."""
    if graph == IMAGE_PREFILL:
        return output_key(VISION_ENCODER, name)
    if graph == TEXT_PREFILL and name == "inputs_embeds":
        return output_key(TOKEN_EMBEDDING, name)
    return input_key(graph, name)


def _cache(graph: str, info: TensorInfo, golden: _Tensors) -> np.ndarray:
    """A layer's cache, keys or values, as it is before a graph runs."""
    array = np.zeros(info.shape, info.numpy_dtype)
    start = 0
    for key in cache_parts(graph, info.name.removeprefix("past_"), golden):
        end = start + golden[key].shape[2]
        array[:, :, start:end] = golden[key]
        start = end
    return array


def cache_parts(graph: str, part: str, golden: _Tensors) -> list[str]:
    """Names of the tensors that fill a layer's cache, one behind the other, before a graph runs; `part` is `key_3`."""
    if graph == IMAGE_PREFILL:
        return []
    image = output_key(VISION_ENCODER, part)
    filled = [image if image in golden else output_key(IMAGE_PREFILL, part)]
    return [*filled, output_key(TEXT_PREFILL, part)] if graph == TEXT_DECODER else filled


def graph_output(graph: GraphInfo, info: TensorInfo, golden: _Tensors) -> np.ndarray:
    """What a graph has to give; BundleError where it is not there, or has another shape."""
    key = output_key(graph.name, info.name)
    if key not in golden:
        raise BundleError(f"the golden lacks {key}, an output of the graph; export again")
    if golden[key].shape != info.shape:
        raise BundleError(f"the golden's {key} is {list(golden[key].shape)}, the manifest says {list(info.shape)}")
    return golden[key]
