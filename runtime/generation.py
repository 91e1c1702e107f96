"""Answers about a photo: the image is prefilled when it arrives, and a question costs only its own tokens."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np

from runtime.bundle import Bundle, FrameInfo
from runtime.errors import BundleError, EngineError, OutputError, RequestError
from runtime.hand_over import hand_over_fault, text_side
from runtime.session import Session, open_session
from runtime.text_graphs import VISION_ENCODER, RunningGraph, text_graphs


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen: greedily at temperature 0, else from the `top_p` likeliest, by a seeded draw."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 100.0:
            raise RequestError(f"temperature={self.temperature} must lie in 0..100; 0 is greedy")
        if not 0.0 < self.top_p <= 1.0:
            raise RequestError(f"top_p={self.top_p} must lie above 0 and at most at 1; 1 leaves nothing out")
        if self.seed < 0:
            raise RequestError(f"seed={self.seed} must be at least 0")

    def choose(self, logits: np.ndarray, chance: np.random.Generator) -> int:
        """One token for logits (V,); the first one on ties where it is the likeliest that counts.

        Raises EngineError for logits from which none can be chosen: not a number, or minus infinity for all.
        """
        with np.errstate(invalid="ignore"):
            largest = logits.max()  # NaN where there is one
        if np.isnan(largest) or largest == -np.inf:
            raise EngineError(
                f"the graph gave {'not a number' if np.isnan(largest) else 'minus infinity for all'} instead of "
                "logits; run `pruneport verify` on the bundle, or export it with --precision fp32"
            )
        if self.temperature == 0.0:
            return int(logits.argmax())
        scores = logits.astype(np.float64)
        # Below the largest, which may be infinite, before they are divided by what may be next to nothing.
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            weights = np.exp(np.where(scores == largest, 0.0, scores - np.float64(largest)) / self.temperature)
        order = np.argsort(-weights, kind="stable")
        shares = weights[order] / weights.sum()
        kept = len(shares)
        if self.top_p < 1.0:
            # The likeliest tokens up to and including the one that reaches top_p.
            kept = int(np.searchsorted(np.cumsum(shares), self.top_p * (1.0 - 1e-12))) + 1
        shares = shares[:kept] / shares[:kept].sum()
        return int(order[chance.choice(len(shares), p=shares)])


@dataclass(frozen=True)
class Prefill:
    """What a photo leaves in the KV cache: `key_i` and `value_i` (1, Hkv, entries, d) of every layer i.

    `bundle` names what made it; the cache of one bundle means nothing to another. `image_ready_ms` is the time from
    pixel values to this. `kept` are the image tokens that were kept, from 0; empty in one that was read from a file.
    """

    bundle: str
    caches: Mapping[str, np.ndarray] = field(repr=False)
    image_ready_ms: float
    kept: tuple[int, ...] = field(default=(), repr=False)

    def check_made_by(self, bundle: str) -> None:
        """Raises BundleError when another bundle made it."""
        if self.bundle != bundle:
            raise BundleError(f"the photo was prefilled by {self.bundle}, not by {bundle}; prefill it again")

    def save(self, path: Path) -> None:
        """Writes it as safetensors: whole or not at all. Raises OutputError."""
        from safetensors.numpy import save

        metadata = {"bundle": self.bundle, "image_ready_ms": repr(self.image_ready_ms)}
        # In the order of their axes: safetensors writes an array's memory as it lies.
        data = save({name: np.ascontiguousarray(part) for name, part in self.caches.items()}, metadata=metadata)
        target = Path(os.path.realpath(path))  # a link stays one
        try:
            # A name of its own length: one that is as long as a name may be can still be written.
            with NamedTemporaryFile(dir=target.parent, prefix=".prefill-", delete=False) as file:
                beside = Path(file.name)
                try:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                    # What any new file gets; temporary ones are for their owner alone.
                    beside.chmod(0o666 & ~_umask())
                    beside.replace(target)
                except BaseException:
                    beside.unlink(missing_ok=True)
                    raise
        except OSError as err:
            raise OutputError(
                f"{path} cannot be written: {err.strerror or err}; nothing was left behind; free some space or choose "
                "another place"
            ) from err

    @classmethod
    def load(cls, path: Path) -> Prefill:
        """Reads what `save` wrote. Raises BundleError."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                caches = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return cls(metadata["bundle"], caches, float(metadata["image_ready_ms"]))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as err:
            raise BundleError(f"{path} is not a saved prefill ({err}); prefill the photo again") from err


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@dataclass(frozen=True)
class Token:
    """One generated token, `ms` after the question (the first) or after the token before it."""

    id: int
    ms: float


@contextmanager
def open_graphs(bundle: Bundle, *, threads: int | None = None) -> Iterator[dict[str, Session]]:
    """All graphs of a bundle, open in their engines; of one with several keeps those of the first.

    Raises what `open_session` raises; BundleError, before any is opened, where the vision graph does not hand on what
    the text graphs take.
    """
    bundle = bundle.at()
    check_hand_over(bundle)
    with ExitStack() as stack:
        yield {
            graph.name: stack.enter_context(open_session(bundle, graph.name, threads=threads))
            for graph in bundle.manifest.graphs
        }


def kept_tokens(seen: Mapping[str, np.ndarray], *, frame: FrameInfo) -> tuple[int, ...]:
    """The image tokens, from 0, that a vision graph says it kept; none where it does not say."""
    if "kept_indices" in seen:
        at = seen["kept_indices"].reshape(-1).astype(np.int64) + frame.before
    elif "positions" in seen:
        at = seen["positions"].reshape(-1)[frame.before :].astype(np.int64)
    else:
        return ()
    indices = frame.image_indices(at)
    return tuple(indices[indices >= 0].tolist())


def check_hand_over(bundle: Bundle) -> None:
    """Raises BundleError where the vision graph of a bundle does not hand on what its text graphs take."""
    if bundle.manifest.text is not None:
        infos = {graph.name: graph for graph in bundle.manifest.graphs}
        try:
            fault = hand_over_fault(infos[VISION_ENCODER], *text_side(infos))
        except KeyError as err:
            raise BundleError(f"{bundle.manifest.name} has no {err.args[0]}; export it whole, without --only") from err
        if fault:
            raise BundleError(f"{bundle.title}: {fault}; its graphs are of different exports: export again")


def start_answers(bundle: Bundle, graphs: Mapping[str, RunningGraph]) -> Answers:
    """A session over the open graphs of a bundle; several of them share the graphs, and so the weights.

    Of a bundle with several keeps it is the first's; `bundle.at(keep)` is the bundle of another.
    """
    bundle = bundle.at()
    text = bundle.manifest.text
    if text is None:
        raise BundleError(
            f"{bundle.manifest.name} has no text graphs and cannot answer; export it without --layout and "
            "without --only"
        )
    frame = bundle.manifest.frame
    answers = Answers(
        graphs,
        bundle=bundle.identity,
        before=frame.before,
        first_text=frame.first_text,
        breaks=frame.breaks,
        end_ids=text.end_ids,
    )
    if (answers.room, answers.chunk) != (text.tokens, text.chunk):
        raise BundleError(
            f"the manifest of {bundle.manifest.name} says {text.tokens} text tokens in chunks of {text.chunk}, its "
            f"graphs have room for {answers.room} in chunks of {answers.chunk}; export again"
        )
    return answers


def check_room(question_tokens: int, max_new_tokens: int, *, room: int) -> None:
    """Raises RequestError when question and answer do not fit into `room` entries of the KV cache."""
    if not question_tokens:
        raise RequestError("the question is empty; ask something")
    if max_new_tokens < 1:
        raise RequestError(f"max_new_tokens={max_new_tokens} must be at least 1")
    needed = question_tokens + max_new_tokens - 1  # the last token is handed out without being decoded
    if needed > room:
        raise RequestError(
            f"a question of {question_tokens} tokens and max_new_tokens={max_new_tokens} need {needed} entries of the "
            f"text cache, which has {room}; ask shorter, for fewer tokens, or export with more --text-tokens"
        )


class Answers:
    """Answers questions about photos with the open graphs of one bundle.

    One object answers one question at a time: it keeps the cache that it writes into. An answer that is still
    streaming when the next question is asked ends with a RequestError. Objects over the same graphs have caches of
    their own and may be used from different threads; one object may not.

    `bundle` identifies the bundle, `before` tokens stand before the image, `first_text` is the position of the first
    text token (the length of prompt prefix and unpruned image), `breaks` are those of tokens that end a row of the
    image, `end_ids` are the tokens that end an answer.

    Raises BundleError when the graphs do not belong together.
    """

    def __init__(
        self,
        graphs: Mapping[str, RunningGraph],
        *,
        bundle: str,
        before: int = 0,
        first_text: int,
        breaks: Sequence[int] = (),
        end_ids: Sequence[int] = (),
    ) -> None:
        self._graphs = graphs
        image = max(1, first_text - before - len(breaks))
        self._frame = FrameInfo(before=before, image=image, first_text=first_text, breaks=tuple(breaks))
        self.bundle = bundle
        self.end_ids = frozenset(end_ids)
        self._text = text_graphs(graphs, bundle=bundle, before=before, first_text=first_text)
        self.room, self.chunk = self._text.room, self._text.chunk
        self._seen: Prefill | None = None
        self._asked = 0

    @property
    def cache_bytes(self) -> int:
        """Bytes of the KV cache, image and text, once it is full."""
        return self._text.cache_bytes

    def see(self, pixel_values: np.ndarray) -> Prefill:
        """Prefills a photo, pixel_values (1, 3, H, W) float32, and makes the cache ready for a question about it."""
        start = time.perf_counter()
        self._asked += 1  # an answer that is still streaming loses its cache here
        seen = self._graphs[VISION_ENCODER].run({"pixel_values": pixel_values})
        caches = self._text.see(seen)
        took_ms = (time.perf_counter() - start) * 1e3
        photo = Prefill(self.bundle, caches, took_ms, kept_tokens(seen, frame=self._frame))
        self._seen = photo
        return photo

    def answer(
        self,
        photo: Prefill,
        question: Sequence[int],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        past_end: bool = False,
    ) -> Iterator[Token]:
        """Streams the tokens of an answer, without the one that ends it (or, `past_end`, as if there were none).

        `question` are the ids behind the image, the template's own included. Everything is refused before anything
        runs: RequestError for an empty question, or one that leaves no room for the answer; BundleError for the
        prefill of another bundle.
        """
        photo.check_made_by(self.bundle)
        if {name: (array.shape, array.dtype) for name, array in photo.caches.items()} != self._text.image_part:
            raise BundleError(f"the prefill does not fit the cache of {self.bundle}; prefill the photo again")
        check_room(len(question), max_new_tokens, room=self.room)
        end_ids = frozenset[int]() if past_end else self.end_ids
        return self._stream(photo, list(question), max_new_tokens, sampling or Sampling(), end_ids)

    def _stream(
        self, photo: Prefill, ids: list[int], max_new_tokens: int, sampling: Sampling, end_ids: frozenset[int]
    ) -> Iterator[Token]:
        start = time.perf_counter()
        self._asked += 1
        asked = self._asked
        chance = np.random.default_rng(sampling.seed)
        if self._seen is not photo:
            self._text.take(photo.caches)
            self._seen = photo
        logits, done = self._text.read(ids, 0), len(ids)
        for number in range(max_new_tokens):
            token = sampling.choose(logits, chance)
            if token in end_ids:
                return
            now = time.perf_counter()
            yield Token(token, (now - start) * 1e3)
            if asked != self._asked:
                raise RequestError(
                    "another photo or question has taken the cache of this session meanwhile; ask this one again"
                )
            start = time.perf_counter()
            if number + 1 < max_new_tokens:
                logits = self._text.read([token], done)
                done += 1
