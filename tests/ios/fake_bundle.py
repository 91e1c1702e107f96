"""Bundles whose graphs are sums: nothing computes them but a few lines here and in the tests of ios/BenchCore.

They have the inputs, outputs and states of real ones, so that a walk over them is a real walk, and what comes of it is
known to the last digit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from runtime.bundle import (
    Bundle,
    BundleWriter,
    FrameInfo,
    GoldenInfo,
    GraphInfo,
    ImageInfo,
    Manifest,
    PinpointsInfo,
    PromptInfo,
    PruneInfo,
    TargetInfo,
    TensorInfo,
    TextInfo,
    WeightsInfo,
    read_bundle,
)
from runtime.generation import Answers
from runtime.golden import graph_inputs, input_key, output_key, steps
from runtime.image import preprocess
from tests.phones.make_vectors import SumGraph, _open_graphs

Arrays = dict[str, np.ndarray]

BEFORE, IMAGE, KEEP, LAYERS, CUT, ROOM, CHUNK, WIDTH, VOCABULARY = 3, 10, 4, 3, 1, 15, 8, 4, 50
KINDS = ("open", "static", "stateful")
# More than a chunk, in a cache so small that the second one begins earlier where it is written whole.
QUESTION = tuple(range(1, 12))
NEW_TOKENS = 5


class FakeGraph(SumGraph):
    """A SumGraph that may have states: they count like inputs behind the inputs, then element k of state m (from 1)
    becomes (s + 17 * m + 3 * k) % 97."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        if not self.graph.states:
            return super().run(inputs)
        total = 0
        for number, info in enumerate((*self.graph.inputs, *self.graph.states), start=1):
            array = inputs[info.name].astype(np.int64).ravel()
            total += number * int((array * (1 + np.arange(len(array)) % 7)).sum())
        for number, info in enumerate(self.graph.states, start=1):
            values = (total + 17 * number + 3 * np.arange(inputs[info.name].size)) % 97
            inputs[info.name][...] = values.reshape(info.shape)
        given = {}
        for number, info in enumerate(self.graph.outputs, start=1):
            values = (total + 31 * number + 7 * np.arange(int(np.prod(info.shape)))) % 97
            given[info.name] = values.reshape(info.shape).astype(info.numpy_dtype)
        return given


def graphs(kind: str) -> tuple[GraphInfo, ...]:
    """The graphs of a bundle of one of KINDS: open ones for ExecuTorch, static ones, and static ones for Core ML."""
    return _open_graphs(cut=CUT) if kind == "open" else _static_graphs(stateful=kind == "stateful")


def _static_graphs(*, stateful: bool) -> tuple[GraphInfo, ...]:
    seen, kept = BEFORE + IMAGE, BEFORE + KEEP
    whole = "int32" if stateful else "int64"

    def tensor(name: str, *shape: int, dtype: str = "float32") -> TensorInfo:
        return TensorInfo(name=name, shape=shape, dtype=dtype)

    def pairs(layers: range, entries: int, prefix: str = "") -> list[TensorInfo]:
        return [tensor(f"{prefix}{kind}_{i}", 1, 2, entries, 2) for i in layers for kind in ("key", "value")]

    front, back = range(CUT), range(CUT, LAYERS)
    past = [*pairs(front, seen + ROOM, "past_"), *pairs(back, kept + ROOM, "past_")]

    def graph(
        name: str, inputs: list[TensorInfo], outputs: list[TensorInfo], states: list[TensorInfo] | None = None
    ) -> GraphInfo:
        together = stateful and states is not None
        package = f"{'text_decoder' if together else name}.mlpackage"
        return GraphInfo(
            name=name,
            file=package if stateful else "model.pte",
            extra_files=(f"{package}/Manifest.json",) if stateful else (),
            engine="coreml" if stateful else "executorch",
            arithmetic=("fp32",),
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            states=tuple(states or ()) if stateful else (),
        )

    def decoder(name: str, tokens: int) -> GraphInfo:
        takes = [tensor("inputs_embeds", 1, tokens, WIDTH), tensor("positions", 1, tokens, dtype=whole)]
        logits = tensor("logits", 1, tokens, VOCABULARY)
        if stateful:
            return graph(name, takes, [logits], past)
        return graph(name, [*takes, *past], [logits, *pairs(range(LAYERS), tokens)], past)

    handed = [tensor("hidden", 1, kept, WIDTH), tensor("positions", 1, kept, dtype=whole), *pairs(front, seen)]
    return (
        graph("vision_encoder", [tensor("pixel_values", 1, 3, 2, 2)], handed),
        graph(
            "image_prefill",
            handed if stateful else handed[:2],
            [tensor("last", 1, WIDTH)] if stateful else pairs(back, kept),
            past,
        ),
        graph(
            "token_embedding",
            [tensor("ids", 1, CHUNK, dtype=whole)],
            [tensor("inputs_embeds", 1, CHUNK, WIDTH)],
        ),
        decoder("text_prefill", CHUNK),
        decoder("text_decoder", 1),
    )


def make_fake_bundle(target: Path, kind: str, *, pruned: bool = True) -> Bundle:
    """Writes a bundle of one of KINDS with its golden; `pruned` False makes only its manifest say that it is a twin."""
    infos = graphs(kind)
    room = 90 if kind == "open" else ROOM
    image = ImageInfo(
        size=(2, 2),
        resize_shortest=2,
        rescale=0.5,
        mean=(1.0, 2.0, 3.0),
        std=(1.0, 0.5, 2.0),
        pinpoints=PinpointsInfo(sizes=((2, 4),), tile=2, side=1),  # which the app has no use for, and reads over
    )
    golden = _golden(infos, image)
    with BundleWriter(target) as writer:
        (writer.path / "golden.safetensors").write_bytes(save(golden))
        for file in {file for info in infos for file in info.files}:
            (writer.path / file).parent.mkdir(exist_ok=True)
            (writer.path / file).write_bytes(file.encode() + bytes([pruned]))
        writer.commit(
            Manifest(
                name=target.name,
                model="sums",
                family="llava",
                created_utc="2026-01-31T12:00:00Z",
                weights=WeightsInfo(source="checkpoint", id="sums", sha256=hashlib.sha256(b"sums").hexdigest()),
                target=TargetInfo(
                    name="ios",
                    backend="coreml" if kind == "stateful" else "xnnpack",
                    precision="fp32",
                    quant_text="int4",
                ),
                prune=PruneInfo(
                    cut=CUT,
                    image_tokens=IMAGE if pruned else KEEP,
                    keep=KEEP,
                    grid=(2, 5) if pruned else (2, 2),
                    pruned=pruned,
                    method="sums" if pruned else None,
                    settings={},
                    arithmetic="float32",
                ),
                graphs=infos,
                image=image,
                prompt=PromptInfo(prefix_ids=tuple(range(BEFORE))),
                frame=FrameInfo(before=BEFORE, image=IMAGE if pruned else KEEP, first_text=BEFORE + IMAGE),
                golden=GoldenInfo(file="golden.safetensors", device="CPU (numpy)", torch="none", photo="noise"),
                tools={"numpy": np.__version__},
                text=TextInfo(tokens=room, chunk=CHUNK),
            )
        )
    return read_bundle(target)


def _golden(infos: tuple[GraphInfo, ...], image: ImageInfo) -> Arrays:
    """What each graph takes and gives at each of its steps, and a question's greedy answer."""
    photo = np.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    # Whole numbers, which the sums need, and not the photo's: what is answered about are the job's pixel values.
    golden: Arrays = {"photo": photo, input_key("vision_encoder", "pixel_values"): np.full((1, 3, 2, 2), 2, np.float32)}
    assert preprocess(photo, image).shape == (1, 3, 2, 2)
    calls: list[list[object]] = []
    running = {info.name: FakeGraph(info, calls) for info in infos}
    answers = Answers(running, bundle="sums", before=BEFORE, first_text=BEFORE + IMAGE)
    seen = answers.see(golden[input_key("vision_encoder", "pixel_values")])
    told = answers.answer(seen, QUESTION, max_new_tokens=NEW_TOKENS, past_end=True)
    golden["answer.question"] = np.asarray(QUESTION, np.int64)
    golden["answer.ids"] = np.asarray([token.id for token in told], np.int64)
    golden["answer.margin"] = np.ones(NEW_TOKENS, np.float32)
    random = np.random.default_rng(4)
    golden[input_key("token_embedding", "ids")] = np.arange(CHUNK, dtype=np.int64)[None]
    for info in infos:
        for step in steps(info, "pruneport"):
            for taken in info.inputs:
                key = input_key(step, taken.name)
                if not taken.name.startswith("past_") and key not in golden and taken.name != "filled":
                    count = {"image_prefill": 3, "text_prefill": CHUNK, "text_decoder": 1}.get(step, CHUNK)
                    shape = [count if axis in taken.dynamic else size for axis, size in enumerate(taken.shape)]
                    golden[key] = random.integers(0, 50, shape).astype(taken.numpy_dtype)
    if any(info.states for info in infos):  # what the desktop computes and these graphs only write
        for step, count in (("image_prefill", BEFORE + KEEP), ("text_prefill", CHUNK)):
            for part in (f"{kind}_{layer}" for layer in range(LAYERS) for kind in ("key", "value")):
                golden[output_key(step, part)] = random.integers(0, 50, (1, 2, count, 2)).astype(np.float32)
    for info in infos:
        for step in steps(info, "pruneport"):
            try:
                inputs = graph_inputs(info, golden, step)
            except KeyError:
                continue
            made = running[info.name].run(inputs)
            golden |= {output_key(step, name): array for name, array in made.items()}
    return golden
