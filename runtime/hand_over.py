"""What the vision graph hands on and what the text graphs take: one fits the other, whoever made them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from runtime.bundle import GraphInfo, TensorInfo
from runtime.text_graphs import DECODER_BACK, DECODER_FRONT, IMAGE_PREFILL, TEXT_PREFILL

_ENTRIES = 2  # the axis of a cache that the image fills in part


def hand_over_fault(vision: GraphInfo, image: GraphInfo, cache: Iterable[TensorInfo]) -> str:
    """Returns in words what one graph hands on and another cannot take as it is; nothing where all fits.

    `image` is the graph that goes on with the image's tokens, `cache` the text graphs' `past_key_i` and `past_value_i`
    (1, Hkv, entries, d) of every layer i. Dtypes must be equal: nothing is cast on the way.
    """
    given = {info.name: info for info in vision.outputs}
    for wanted in image.inputs:
        found = given.get(wanted.name)
        if wanted.name.startswith("past_") or wanted.name == "filled":
            continue  # the caller's own
        if found is None:
            return f"{image.name} takes {wanted}, which {vision.name} does not hand on"
        if not wanted.fits(found.dtype, found.shape):
            return f"{vision.name} hands on {found}, but {image.name} takes {wanted}"
    whole = {info.name.removeprefix("past_"): info for info in cache}
    for graph in (vision, image):
        for part in graph.outputs:
            if not part.name.startswith(("key_", "value_")):
                continue
            if part.name not in whole:
                return f"{graph.name} hands on {part}, but the text graphs have no cache for it"
            if not _is_part(part, whole[part.name]):
                return f"{graph.name} hands on {part}, which is no part of the text graphs' {whole[part.name]}"
    return ""


def text_side(graphs: Mapping[str, GraphInfo]) -> tuple[GraphInfo, list[TensorInfo]]:
    """The graph that goes on with the image's tokens, and the cache of all layers; KeyError names one that lacks."""
    if DECODER_BACK not in graphs:
        return graphs[IMAGE_PREFILL], list(graphs[TEXT_PREFILL].cache)
    front = graphs[DECODER_FRONT].cache if DECODER_FRONT in graphs else ()
    return graphs[DECODER_BACK], [*front, *graphs[DECODER_BACK].cache]


def _is_part(part: TensorInfo, whole: TensorInfo) -> bool:
    """Whether keys or values of some entries can be written into a cache."""
    if part.dtype != whole.dtype or not len(part.shape) == len(whole.shape) == 4:
        return False
    sizes = enumerate(zip(part.shape, whole.shape, strict=True))
    return all(some <= most if axis == _ENTRIES else some == most for axis, (some, most) in sizes)
