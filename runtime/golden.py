"""The grammar of golden.safetensors: what the desktop's inputs and outputs are called, and which graph takes which.

`photo`                          (H, W, 3) uint8
`<graph>.in.<input>`             what a graph takes; an input that another graph gives is stored once, as its output
`<graph>.out.<output>`           what it gives; for graphs of any number of tokens the names are those of the steps
                                 `image_prefill`, `text_prefill` and `text_decoder`
`kept_*`, `marks`, `recovery.*`  how image tokens were chosen, and what their rows follow from
`answer.*`                       a question, its greedy answer, and by how much each token's logit led
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from runtime.bundle import OWN_LAYOUT, GraphInfo, TensorInfo
from runtime.errors import BundleError
from runtime.text_graphs import (
    DECODER_BACK,
    DECODER_FRONT,
    IMAGE_PREFILL,
    LM_HEAD,
    TEXT_DECODER,
    TEXT_PREFILL,
    TOKEN_EMBEDDING,
    VISION_ENCODER,
)

_TEXT_STEPS = (TEXT_PREFILL, TEXT_DECODER)
_STEPS = {DECODER_FRONT: _TEXT_STEPS, DECODER_BACK: (IMAGE_PREFILL, *_TEXT_STEPS), LM_HEAD: _TEXT_STEPS}

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


def steps(graph: GraphInfo, layout: str) -> tuple[str, ...]:
    """The steps at which the golden knows what a graph takes and gives, by the names that its tensors bear.

    A graph of a fixed number of tokens serves one, an open one several: the image, a prompt, and a token behind it.
    Open graphs for other people's runtimes have none; their answer tells.
    """
    if not graph.is_open:
        return (graph.name,)
    return _STEPS.get(graph.name, (graph.name,)) if layout == OWN_LAYOUT else ()


def step_label(graph: str, step: str) -> str:
    """A graph at a step, as reports call it."""
    return graph if graph == step else f"{graph} at {step}"


def graph_inputs(graph: GraphInfo, golden: _Tensors, step: str) -> dict[str, np.ndarray]:
    """The golden's inputs of a graph, in the dtypes that it takes; KeyError names a tensor that is not there.

    `step` is one of `steps`. A cache is made of what the graphs before left in it.
    """
    inputs = {}
    for info in (*graph.inputs, *graph.states):
        if info.name.startswith("past_"):
            inputs[info.name] = _cache(step, info, golden)
        elif info.name == "filled":
            first = next(info.name for info in graph.cache).removeprefix("past_")
            count = sum(golden[part].shape[2] for part in cache_parts(step, first, golden))
            inputs[info.name] = np.asarray([count], info.numpy_dtype)
        else:
            array = golden[_source(step, info.name, golden)]
            inputs[info.name] = array.astype(info.numpy_dtype, copy=False)
    return inputs


def _source(step: str, name: str, golden: _Tensors) -> str:
    """The tensor that a graph takes at a step: an input of its own, or what another one gave."""
    for key in (input_key(step, name), output_key(step, name), _fed_by(step, name)):
        if key in golden:
            return key
    # Where no layer lies before the cut, what the layers take is what the embedding gave.
    return _source(step, "inputs_embeds", golden) if name == "hidden" else input_key(step, name)


def _fed_by(graph: str, name: str) -> str:
    """The output that is an input of a graph, by its name."""
    if graph == IMAGE_PREFILL:
        return output_key(VISION_ENCODER, name)
    if graph == TEXT_PREFILL and name == "inputs_embeds":
        return output_key(TOKEN_EMBEDDING, name)
    return input_key(graph, name)


def _cache(graph: str, info: TensorInfo, golden: _Tensors) -> np.ndarray:
    """A layer's cache, keys or values, as it is before a graph runs; of an open one only what is filled."""
    shape, parts = list(info.shape), cache_parts(graph, info.name.removeprefix("past_"), golden)
    if info.dynamic:
        shape[2] = max(1, sum(golden[key].shape[2] for key in parts))
    array = np.zeros(shape, info.numpy_dtype)
    start = 0
    for key in parts:
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


def graph_output(info: TensorInfo, golden: _Tensors, step: str) -> np.ndarray:
    """What a graph has to give at a step; BundleError where it is not there, or has another shape."""
    key = output_key(step, info.name)
    if key not in golden:
        raise BundleError(f"the golden lacks {key}, an output of the graph; export again")
    if not info.fits(info.dtype, golden[key].shape):
        raise BundleError(f"the golden's {key} is {list(golden[key].shape)}, the manifest says {list(info.shape)}")
    return golden[key]
