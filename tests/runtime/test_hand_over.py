"""Whatever the vision graph hands on is taken as it is, or the difference is told."""

from __future__ import annotations

import msgspec
import pytest

from runtime.bundle import GraphInfo, TensorInfo
from runtime.hand_over import hand_over_fault


def info(name: str, *shape: int, dtype: str = "float32", dynamic: tuple[int, ...] = ()) -> TensorInfo:
    return TensorInfo(name=name, shape=shape, dtype=dtype, dynamic=dynamic)


def graph(name: str, inputs: tuple[TensorInfo, ...], outputs: tuple[TensorInfo, ...]) -> GraphInfo:
    return GraphInfo(name=name, file="x", engine="onnxruntime", arithmetic=("fp32",), inputs=inputs, outputs=outputs)


HIDDEN, POSITIONS = info("hidden", 1, 9, 32), info("positions", 1, 9, dtype="int64")
KEYS, LATER = info("key_0", 1, 2, 20, 8), info("key_1", 1, 2, 9, 8)
VISION = graph("vision_encoder", (info("pixel_values", 1, 3, 4, 4),), (HIDDEN, POSITIONS, KEYS, info("filled", 1, 1)))
IMAGE = graph("image_prefill", (HIDDEN, POSITIONS), (LATER,))
CACHE = (info("past_key_0", 1, 2, 28, 8), info("past_key_1", 1, 2, 17, 8))


def with_outputs(*outputs: TensorInfo) -> GraphInfo:
    return msgspec.structs.replace(VISION, outputs=outputs)


def with_inputs(*inputs: TensorInfo) -> GraphInfo:
    return msgspec.structs.replace(IMAGE, inputs=inputs)


@pytest.mark.parametrize(
    "image",
    [
        IMAGE,
        # As many tokens as there are, and a cache that is the text graphs' own business.
        with_inputs(info("hidden", 1, 128, 32, dynamic=(1,)), info("positions", 1, 128, dtype="int64", dynamic=(1,))),
        with_inputs(HIDDEN, POSITIONS, info("past_key_1", 1, 2, 17, 8)),
        # The keys of the layers below the cut, for a graph that writes them into states.
        with_inputs(HIDDEN, POSITIONS, KEYS),
    ],
)
def test_what_fits(image: GraphInfo) -> None:
    assert hand_over_fault(VISION, image, CACHE) == ""


def test_an_image_that_fills_the_whole_cache_fits() -> None:
    assert hand_over_fault(VISION, IMAGE, (info("past_key_0", 1, 2, 20, 8), info("past_key_1", 1, 2, 9, 8))) == ""


@pytest.mark.parametrize(
    ("vision", "image", "fault"),
    [
        (
            with_outputs(HIDDEN, info("positions", 1, 9, dtype="int32"), KEYS),
            IMAGE,
            "vision_encoder hands on positions int32[1, 9], but image_prefill takes positions int64[1, 9]",
        ),
        (
            with_outputs(HIDDEN, POSITIONS, info("key_0", 1, 2, 20, 8, dtype="float16")),
            IMAGE,
            "vision_encoder hands on key_0 float16[1, 2, 20, 8], which is no part of the text graphs' past_key_0 "
            "float32[1, 2, 28, 8]",
        ),
        (
            with_outputs(HIDDEN, POSITIONS, info("key_0", 1, 2, 20, 8, dtype="float16")),
            with_inputs(HIDDEN, POSITIONS, KEYS),
            "vision_encoder hands on key_0 float16[1, 2, 20, 8], but image_prefill takes key_0 float32[1, 2, 20, 8]",
        ),
        (
            with_outputs(POSITIONS, KEYS),
            IMAGE,
            "image_prefill takes hidden float32[1, 9, 32], which vision_encoder does not hand on",
        ),
        (
            VISION,
            with_inputs(info("hidden", 1, 8, 32, dynamic=(1,)), POSITIONS),
            "vision_encoder hands on hidden float32[1, 9, 32], but image_prefill takes hidden float32[1, <=8, 32]",
        ),
        (
            with_outputs(HIDDEN, POSITIONS, info("key_7", 1, 2, 20, 8)),
            IMAGE,
            "vision_encoder hands on key_7 float32[1, 2, 20, 8], but the text graphs have no cache for it",
        ),
        *(
            (
                with_outputs(HIDDEN, POSITIONS, info("key_0", *shape)),
                IMAGE,
                f"vision_encoder hands on key_0 float32{list(shape)}, which is no part of the text graphs' past_key_0 "
                "float32[1, 2, 28, 8]",
            )
            for shape in ((1, 2, 29, 8), (1, 3, 20, 8), (1, 2, 20, 4), (2, 20, 8), (1, 1, 2, 20, 8))
        ),
        (
            VISION,
            msgspec.structs.replace(IMAGE, outputs=(info("key_1", 1, 2, 9, 8, dtype="float16"),)),
            "image_prefill hands on key_1 float16[1, 2, 9, 8], which is no part of the text graphs' past_key_1 "
            "float32[1, 2, 17, 8]",
        ),
    ],
)
def test_what_does_not_fit_is_told(vision: GraphInfo, image: GraphInfo, fault: str) -> None:
    assert hand_over_fault(vision, image, CACHE) == fault
