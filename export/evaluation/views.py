"""Where a prompt of transformers holds its image tokens, and on what grid they lie, family by family."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from export.share import Share
from runtime.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

    Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class View:
    """One grid of image tokens in a prompt, row by row; an image has one of them, or a coarse and a fine one.

    Attributes:
        slots: (N,) places of the tokens among the prompt's ids, ascending.
        grid: rows and columns, N = rows * columns.
        line_ends: (rows,) places of the tokens that only end a row; none where rows have no end.
    """

    slots: tuple[int, ...]
    grid: tuple[int, int]
    line_ends: tuple[int, ...] = ()


class _Layout(NamedTuple):
    """How many rows and columns a view has, and whether a token ends each row."""

    rows: int
    columns: int
    line_ends: bool = False


def image_views(config: Any, inputs: Inputs) -> list[list[View]]:
    """Finds the views of each image of one prompt, in order: `inputs` is what a processor makes of it, ids (1, T).

    Raises RequestError for a family whose layout is not known, several prompts at once, videos, and a number of image
    tokens that the layout does not explain.
    """
    layout = layout_of(config.model_type)
    ids = inputs["input_ids"]
    if len(ids) != 1:
        raise RequestError(f"{len(ids)} prompts at once; give one: prompts of different lengths would need padding")
    if any("video" in name for name in inputs):
        raise RequestError("a prompt with a video; only images are pruned here: give its frames as images")
    places = (ids[0] == config.image_token_id).nonzero()[:, 0].tolist()
    images = layout(config, inputs) if places else []
    told = sum(rows * (columns + ends) for views in images for rows, columns, ends in views)
    if told != len(places):
        raise RequestError(
            f"the prompt has {len(places)} image tokens where {config.model_type} with these pictures should have "
            f"{told}; take processor and weights from the same checkpoint"
        )
    found: list[list[View]] = []
    begin = 0
    for views in images:
        found.append([])
        for rows, columns, ends in views:
            width = columns + ends
            lines = [places[begin + row * width : begin + (row + 1) * width] for row in range(rows)]
            slots = tuple(place for line in lines for place in line[:columns])
            found[-1].append(View(slots, (rows, columns), tuple(line[-1] for line in lines if ends)))
            begin += rows * width
    return found


def shares(keep: int | Share, sizes: Sequence[int]) -> list[int]:
    """How many tokens each view of one image keeps, in proportion to the `sizes` of the views.

    `keep` is their number, at most all of them, or their share. What proportions leave over goes to the largest
    remainders.
    """
    total = sum(sizes)
    wanted = min(keep, total) if isinstance(keep, int) else keep.of(total)
    given = [wanted * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda view: (-(wanted * sizes[view] % total), view))
    for view in order[: wanted - sum(given)]:
        given[view] += 1
    return given


def square(config: Any) -> int:
    """The rows, and columns, of patches that a tower of square images sees."""
    side: int = config.vision_config.image_size // config.vision_config.patch_size
    return side


def _llava(config: Any, inputs: Inputs) -> list[list[_Layout]]:
    """One square grid of patches an image."""
    side = square(config)
    return [[_Layout(side, side)] for _ in inputs["pixel_values"]]


def _llava_next(config: Any, inputs: Inputs) -> list[list[_Layout]]:
    """The whole image in the tower's size, and the image in tiles without their padding, whose rows are ended."""
    import torch
    from transformers.models.llava_next import modeling_llava_next

    theirs: Any = modeling_llava_next
    size, side = config.vision_config.image_size, square(config)
    found = []
    for image_size in inputs["image_sizes"].tolist():
        tiles = theirs.get_anyres_image_grid_shape(image_size, config.image_grid_pinpoints, size)
        padded = torch.empty(1, tiles[0] * side, tiles[1] * side, device="meta")
        rows, columns = theirs.unpad_image(padded, image_size).shape[1:]
        found.append([_Layout(side, side), _Layout(rows, columns, line_ends=True)])
    return found


def _qwen_vl(config: Any, inputs: Inputs) -> list[list[_Layout]]:
    """One grid of merged patches an image, of its own size."""
    merged = config.vision_config.spatial_merge_size
    return [[_Layout(rows // merged, columns // merged)] for _, rows, columns in inputs["image_grid_thw"].tolist()]


LAYOUTS: Mapping[str, Callable[[Any, Inputs], list[list[_Layout]]]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen_vl,
    "qwen2_5_vl": _qwen_vl,
    "qwen3_vl": _qwen_vl,
}
OF_ANY_SIZE = tuple(name for name, layout in LAYOUTS.items() if layout is _qwen_vl)
"""The types of model whose processor makes as many image tokens as the pixels of a photo are worth."""


def layout_of(model_type: str) -> Callable[[Any, Inputs], list[list[_Layout]]]:
    """How prompts of a type of model lay images out; RequestError for one that is not known."""
    if model_type not in LAYOUTS:
        raise RequestError(f"a model of type {model_type!r} cannot be pruned here; allowed: {', '.join(LAYOUTS)}")
    return LAYOUTS[model_type]
