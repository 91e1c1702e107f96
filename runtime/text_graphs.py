"""The text graphs of one bundle over one KV cache: what fills it for a photo, and what decodes behind it.

Two sets of graphs do that. Of a fixed number of tokens: `image_prefill`, `text_prefill` for a chunk, `text_decoder` for
one. Open: `decoder_front`, `decoder_back` and `lm_head`, each for any number of tokens and entries.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from runtime.bundle import VISION_ENCODER as VISION_ENCODER
from runtime.bundle import GraphInfo, Manifest, TensorInfo
from runtime.errors import BundleError

TOKEN_EMBEDDING = "token_embedding"
IMAGE_PREFILL = "image_prefill"
TEXT_PREFILL = "text_prefill"
TEXT_DECODER = "text_decoder"
DECODER_FRONT = "decoder_front"
DECODER_BACK = "decoder_back"
LM_HEAD = "lm_head"
STATIC_GRAPHS = (VISION_ENCODER, IMAGE_PREFILL, TOKEN_EMBEDDING, TEXT_PREFILL, TEXT_DECODER)
# Without `decoder_front`, which a cut in front of the first layer leaves nothing to do.
OPEN_GRAPHS = (VISION_ENCODER, TOKEN_EMBEDDING, DECODER_BACK, LM_HEAD)

# An open cache grows by so many entries: engines plan their memory anew for every new length.
BLOCK = 64

_Caches = Mapping[str, np.ndarray]
ImagePart = Mapping[str, tuple[tuple[int, ...], np.dtype[np.generic]]]


class RunningGraph(Protocol):
    """An open graph, such as a `runtime.session.Session`."""

    graph: GraphInfo

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Runs the graph once: named arrays in, named arrays out."""
        ...


class TextGraphs(Protocol):
    """A set of text graphs with the cache that they work on.

    `room` is how many text tokens fit into it, `chunk` how many are read at a time; `image_part` the shape and dtype of
    what a photo leaves in it, by name; `cache_bytes` what all of it takes once it is full.
    """

    room: int
    chunk: int
    cache_bytes: int

    @property
    def image_part(self) -> ImagePart: ...

    def see(self, seen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The image's part of the cache of all layers, from what `vision_encoder` gave; the cache is ready with it."""
        ...

    def take(self, caches: _Caches) -> None:
        """Makes the cache ready with the image's part that `see` gave."""
        ...

    def read(self, ids: list[int], done: int) -> np.ndarray:
        """Logits (V,) behind `ids`, of any number, whose entries go into the cache behind `done` text tokens."""
        ...


def text_graphs(graphs: Mapping[str, RunningGraph], *, bundle: str, before: int, first_text: int) -> TextGraphs:
    """The set that a bundle has. `before` tokens stand before the image, `first_text` is the first text's position.

    Raises BundleError when graphs are missing or do not belong together.
    """
    is_open = DECODER_BACK in graphs
    missing = [name for name in (OPEN_GRAPHS if is_open else STATIC_GRAPHS) if name not in graphs]
    if missing:
        raise BundleError(f"{bundle} has no {', '.join(missing)}; export it whole, without --only")
    if is_open:
        return OpenTextGraphs(graphs, bundle=bundle, before=before, first_text=first_text)
    return StaticTextGraphs(graphs, bundle=bundle, first_text=first_text)


class StaticTextGraphs:
    """Graphs of fixed numbers of tokens; the cache is as large as it can become, or kept by the engine."""

    def __init__(self, graphs: Mapping[str, RunningGraph], *, bundle: str, first_text: int) -> None:
        self._graphs, self._first_text = graphs, first_text
        prefill = graphs[TEXT_PREFILL].graph
        shapes = {info.name: info for info in (*prefill.inputs, *prefill.states)}
        if set(graphs[TEXT_DECODER].graph.cache) != set(prefill.cache):
            raise BundleError(
                f"{bundle}: {TEXT_PREFILL} and {TEXT_DECODER} have different caches; they come from different exports"
            )
        self._stateful = bool(prefill.states)
        image = graphs[IMAGE_PREFILL].graph
        made = _made(graphs[VISION_ENCODER].graph, image)
        if self._stateful:  # these it does not hand out, but writes
            entries = next(info for info in image.inputs if info.name == "hidden").shape[1]
            for state in image.states:
                name = state.name.removeprefix("past_")
                shape = (*state.shape[:2], entries, state.shape[3])
                made.setdefault(name, TensorInfo(name=name, shape=shape, dtype=state.dtype))
        if {f"past_{name}" for name in made} != {name for name in shapes if name.startswith("past_")}:
            raise BundleError(
                f"{bundle}: {VISION_ENCODER} and {IMAGE_PREFILL} do not fill the cache of {TEXT_PREFILL}; export again"
            )
        self.image_part: ImagePart = {name: (info.shape, info.numpy_dtype) for name, info in made.items()}
        self._image_entries = {name: info.shape[2] for name, info in made.items()}
        self.room = _room(
            bundle, {shapes[f"past_{name}"].shape[2] - entries for name, entries in self._image_entries.items()}
        )
        self.chunk = shapes["inputs_embeds"].shape[1]
        self._past = {
            f"past_{name}": np.zeros(shapes[f"past_{name}"].shape, shapes[f"past_{name}"].numpy_dtype) for name in made
        }
        self.cache_bytes = sum(array.nbytes for array in self._past.values())

    def see(self, seen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        prefill = self._graphs[IMAGE_PREFILL]
        taken = {info.name: seen[info.name] for info in prefill.graph.inputs}
        if self._stateful:
            prefill.run({**taken, **self._past})
            return {
                name: self._past[f"past_{name}"][:, :, :entries].copy() for name, entries in self._image_entries.items()
            }
        made = {**seen, **prefill.run(taken)}
        caches = {name: made[name] for name in self._image_entries}
        self.take(caches)
        return caches

    def take(self, caches: _Caches) -> None:
        for name, part in caches.items():
            self._past[f"past_{name}"][:, :, : part.shape[2]] = part

    def read(self, ids: list[int], done: int) -> np.ndarray:
        at, logits = 0, np.zeros(0)
        while at < len(ids):
            if self._stateful and len(ids) - at > 1:
                # A chunk is written whole and must fit: the last one may begin earlier and write the same once more.
                at = min(at, self.room - self.chunk - done)
            some = ids[at : at + self.chunk]
            logits = self._decode(some, done + at)
            at += len(some)
        return logits

    def _decode(self, ids: list[int], done: int) -> np.ndarray:
        """As `read`, for at most a chunk."""
        graph = self._graphs[TEXT_DECODER if len(ids) == 1 else TEXT_PREFILL]
        size = 1 if len(ids) == 1 else self.chunk
        width = self._graphs[TOKEN_EMBEDDING].graph.inputs[0].shape[1]
        # Padding takes the last position there is; what it computes is dropped.
        positions = np.minimum(self._first_text + done + np.arange(size), self._first_text + self.room - 1)
        padded = np.zeros((1, width), self._graphs[TOKEN_EMBEDDING].graph.inputs[0].numpy_dtype)
        padded[0, : len(ids)] = ids
        embeds = self._graphs[TOKEN_EMBEDDING].run({"ids": padded})["inputs_embeds"][:, :size]
        whole = next(info for info in graph.graph.inputs if info.name == "positions").numpy_dtype
        out = graph.run({"inputs_embeds": embeds, "positions": positions[None].astype(whole), **self._past})
        for name, entries in () if self._stateful else self._image_entries.items():
            at = entries + done
            self._past[f"past_{name}"][:, :, at : at + len(ids)] = out[name][:, :, : len(ids)]
        return np.asarray(out["logits"][0, len(ids) - 1])


class OpenTextGraphs:
    """Graphs of any number of tokens; the cache holds what is filled, and grows in blocks.

    What stands before the image is the same for every photo: it is run once, and its entries are kept.
    """

    def __init__(self, graphs: Mapping[str, RunningGraph], *, bundle: str, before: int, first_text: int) -> None:
        self._graphs, self._before, self._first_text = graphs, before, first_text
        vision, back = graphs[VISION_ENCODER].graph, graphs[DECODER_BACK].graph
        front = graphs[DECODER_FRONT].graph if DECODER_FRONT in graphs else None
        handed_on = {info.name: info for info in vision.outputs}
        made = {**_made(vision), **{info.name: info for info in back.outputs if info.name.startswith(_PARTS)}}
        caches = {info.name.removeprefix("past_"): info for graph in (front, back) if graph for info in graph.cache}
        if "hidden" not in handed_on or caches.keys() != made.keys():
            raise BundleError(
                f"{bundle}: {VISION_ENCODER} and {DECODER_BACK} do not fill the cache of the layers; export again"
            )
        kept = handed_on["hidden"].shape[1]
        self._image_entries = {name: handed_on[name].shape[2] if name in handed_on else kept for name in caches}
        self.image_part: ImagePart = {
            name: ((*info.shape[:2], self._image_entries[name], info.shape[3]), info.numpy_dtype)
            for name, info in caches.items()
        }
        rooms = {name: caches[name].shape[2] - entries for name, entries in self._image_entries.items()}
        behind = _room(bundle, {rooms[name] for name in _parts(back)})
        self.room = behind if front is None else _room(bundle, {rooms[name] for name in _parts(front)})
        if self.room > behind:  # where the graphs serve several keeps, those behind the cut have room for the largest
            raise BundleError(f"{bundle}: {_room_fault({self.room, behind})}")
        self._most = {name: entries + self.room for name, entries in self._image_entries.items()}
        self.chunk = graphs[TOKEN_EMBEDDING].graph.inputs[0].shape[1]
        sizes = (info.size_bytes // info.shape[2] * self._most[name] for name, info in caches.items())
        self.cache_bytes = sum(sizes)
        self._back = {name: self.image_part[name] for name in _parts(back)}
        self._past: dict[str, np.ndarray] = {}
        self._made: dict[str, np.ndarray] = {}  # the caches of the last photo that was seen here
        self._prefix: dict[str, np.ndarray] | None = None

    def see(self, seen: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        start = self._before
        if self._prefix is None:
            nothing = {name: np.zeros((*shape[:2], 1, shape[3]), dtype) for name, (shape, dtype) in self._back.items()}
            self._prefix = self._image(seen, 0, start, nothing) if start else nothing
        new = self._image(seen, start, seen["hidden"].shape[1], self._prefix)
        caches = {}
        for name, entries in self._image_entries.items():
            # In the cache at once, with room behind it: what is handed out is a part of that, and never written again.
            cache = self._past[name] = self._made[name] = self._empty(name, entries)
            if name in new:
                cache[:, :, :start] = self._prefix[name][:, :, :start]
                cache[:, :, start:entries] = new[name]
            else:
                cache[:, :, :entries] = seen[name]
            caches[name] = cache[:, :, :entries]
        return caches

    def _image(self, seen: Mapping[str, np.ndarray], start: int, end: int, past: _Caches) -> dict[str, np.ndarray]:
        """Keys and values of the layers from the cut on, of the tokens `start` to `end` behind those before them."""
        out = self._graphs[DECODER_BACK].run(
            {
                "hidden": seen["hidden"][:, start:end],
                "positions": seen["positions"][:, start:end],
                "filled": np.asarray([start], np.int64),
                **{f"past_{name}": past[name] for name in self._back},
            }
        )
        return {name: out[name] for name in self._back}

    def take(self, caches: _Caches) -> None:
        for name, part in caches.items():
            if part.base is not None and self._made.get(name) is part.base:
                self._past[name] = part.base  # made here last: the room behind the image is this cache's own
            else:
                self._past[name] = self._grown(name, part, part.shape[2])

    def _empty(self, name: str, entries: int) -> np.ndarray:
        """A cache with room for `entries`, and for some more."""
        shape, dtype = self.image_part[name]
        room = min(-(-(entries + 1) // BLOCK) * BLOCK, self._most[name])
        return np.zeros((*shape[:2], room, shape[3]), dtype)

    def _grown(self, name: str, filled: np.ndarray, entries: int) -> np.ndarray:
        """A cache with room for `entries`, and for some more, that begins with what is `filled`."""
        grown = self._empty(name, entries)
        grown[:, :, : filled.shape[2]] = filled
        return grown

    def read(self, ids: list[int], done: int) -> np.ndarray:
        hidden = np.zeros(0)
        for at in range(0, len(ids), self.chunk):
            hidden = self._decode(ids[at : at + self.chunk], done + at)
        logits = self._graphs[LM_HEAD].run({"last_hidden": hidden[:, -1:]})["logits"]
        return np.asarray(logits[0, -1])

    def _decode(self, ids: list[int], done: int) -> np.ndarray:
        """What the last layer gives, (1, T, D), for at most a chunk."""
        positions = (self._first_text + done + np.arange(len(ids)))[None]
        hidden = self._graphs[TOKEN_EMBEDDING].run({"ids": np.asarray([ids], np.int64)})["inputs_embeds"]
        for name in (DECODER_FRONT, DECODER_BACK):
            if name not in self._graphs:
                continue
            graph = self._graphs[name]
            takes, gives = graph.graph.inputs[0].name, graph.graph.outputs[0].name
            parts = _parts(graph.graph)
            whole = graph.graph.inputs[1].numpy_dtype  # of positions
            filled = self._image_entries[parts[0]] + done
            out = graph.run(
                {
                    takes: hidden,
                    "positions": positions.astype(whole),
                    "filled": np.asarray([filled], np.int64),
                    **{f"past_{part}": self._past[part] for part in parts},
                }
            )
            hidden = out[gives]
            for part in parts:
                entries = filled + len(ids)
                if entries > self._past[part].shape[2]:
                    self._past[part] = self._grown(part, self._past[part][:, :, :filled], entries)
                self._past[part][:, :, filled:entries] = out[part]
        return hidden


def cache_on_paper(manifest: Manifest) -> tuple[int, str]:
    """Bytes that the whole KV cache of a bundle with text graphs takes, image and text; and the sum in words."""
    prune, text = manifest.prune, manifest.text
    assert text is not None
    keys = {info.name: info for graph in manifest.graphs for info in graph.cache if "_key_" in info.name}
    first, layers = next(iter(keys.values())), len(keys)
    _, heads, _, width = first.shape
    number = first.numpy_dtype.itemsize
    prefix, breaks = manifest.frame.before, len(manifest.frame.breaks)
    behind = prune.keep + (0 if prune.pruned else breaks)
    seen = prefix + prune.image_tokens + breaks + text.tokens, prefix + behind + text.tokens
    entries = prune.cut * seen[0] + (layers - prune.cut) * seen[1]
    paper = 2 * entries * heads * width * number
    rows = f"{prune.cut} x {seen[0]} + {layers - prune.cut} x {seen[1]}"
    return paper, f"2 x ({rows}) entries x {heads} heads x {width} x {number} bytes = {paper}"


_PARTS = ("key_", "value_")


def _parts(graph: GraphInfo) -> list[str]:
    """Names of the keys and values that a graph attends to."""
    return [info.name.removeprefix("past_") for info in graph.cache]


def _made(*graphs: GraphInfo) -> dict[str, TensorInfo]:
    """Keys and values that graphs give."""
    return {info.name: info for graph in graphs for info in graph.outputs if info.name.startswith(_PARTS)}


def _room(bundle: str, rooms: set[int]) -> int:
    """The number of text tokens that every layer has room for."""
    if len(rooms) != 1 or min(rooms) < 1:
        raise BundleError(f"{bundle}: {_room_fault(rooms)}")
    return rooms.pop()


def _room_fault(rooms: set[int]) -> str:
    return f"the layers have room for different numbers of text tokens, {sorted(rooms)}"
