"""Questions about a photo, put to a bundle in its engine: the answer streams, and what it took is told."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from runtime.bundle import OWN_LAYOUT, Bundle, read_bundle
from runtime.errors import BundleError, OutputError, RequestError
from runtime.generation import (
    Answers,
    Prefill,
    Sampling,
    Token,
    check_hand_over,
    check_room,
    open_graphs,
    start_answers,
)
from runtime.image import load_photo, preprocess
from runtime.kept_picture import check_picture, save_kept
from runtime.latency import peak_rss_bytes, restart_peak_rss
from runtime.memory import give_back
from runtime.own_tokens import own_words
from runtime.prompt import open_tokenizer
from runtime.session import open_session
from runtime.text_graphs import VISION_ENCODER

PREFILL_SUFFIX = ".safetensors"

Photo = str | os.PathLike[str] | np.ndarray | Prefill
"""A picture file or a saved prefill (*.safetensors), pixels uint8 (H, W, 3) RGB, or a photo that was seen before."""


@dataclass(frozen=True, kw_only=True)
class Took:
    """What one answer took; `token_ms` are the times of all tokens but the first, `ttft_ms` None means no token."""

    bundle: str
    image_ready_ms: float
    question_tokens: int
    ttft_ms: float | None
    token_ms: tuple[float, ...]
    kv_cache_bytes: int
    peak_rss_bytes: int

    def __str__(self) -> str:
        speed = f"{1e3 * len(self.token_ms) / sum(self.token_ms):.1f} tokens/s" if self.token_ms else "one token"
        first = "no answer" if self.ttft_ms is None else f"TTFT {self.ttft_ms:.1f} ms"
        return (
            f"image ready {self.image_ready_ms:.0f} ms, {first} after {self.question_tokens} tokens, "
            f"{'' if self.ttft_ms is None else f'{speed}, '}"
            f"KV cache {self.kv_cache_bytes / 1e6:.1f} MB, peak RSS {self.peak_rss_bytes / 1e6:.0f} MB"
        )


class Said(NamedTuple):
    """One bundle's whole answer to a question, and the image tokens that it was left with."""

    bundle: str
    question: str
    answer: str
    took: Took
    kept: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Inquiry:
    """Questions about one photo: a picture file, or a prefill that `save_prefill` wrote before.

    `keep` None is the bundle's first, or the one that made the prefill. `draw` is a picture file to be written: the
    photo with the tokens that were kept.
    """

    photo: Path
    questions: tuple[str, ...]
    keep: int | None = None
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    save_prefill: Path | None = None
    draw: Path | None = None

    def __post_init__(self) -> None:
        for question in self.questions:
            # A name too long for the file system is no file.
            if len(question) < 256 and "\n" not in question and _is_file(question):
                raise RequestError(
                    f"the question {question!r} is a file; one photo is supported, what follows it are questions"
                )
        check_stops(self.stops)
        if self.draw is not None:
            check_picture(self.draw)
            if self.photo.suffix == PREFILL_SUFFIX:
                raise RequestError(f"{self.photo} is a saved prefill, over which nothing can be drawn; give the photo")
        if self.save_prefill is None:
            return
        if self.photo.suffix == PREFILL_SUFFIX:
            raise RequestError(f"{self.photo} is a saved prefill already; leave --save-prefill out")
        if self.save_prefill.suffix != PREFILL_SUFFIX:
            raise RequestError(
                f"save_prefill={str(self.save_prefill)!r} must end in {PREFILL_SUFFIX}: by that it is known later"
            )
        if not self.save_prefill.parent.is_dir():
            raise OutputError(f"{self.save_prefill} cannot be written: {self.save_prefill.parent} is no folder")


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # what no file can be called
        return False


class Answer(Iterator[str]):
    """The text of an answer, piece by piece as the bundle makes it; `"".join(answer)` is all of it.

    A character that takes several tokens comes when it is whole. Raises RequestError when another photo or question
    has taken the cache meanwhile, or the bundle was closed.
    """

    def __init__(self, pieces: Iterator[str], took: Callable[[], Took]) -> None:
        self._pieces = pieces
        self._took = took

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def took(self) -> Took:
        """Times of the tokens so far, in ms, and the memory."""
        return self._took()


@dataclass
class _Side:
    """What an open bundle has of one keep: the view, its answers over the open graphs, the photo that was seen last."""

    bundle: Bundle
    answers: Answers
    last: tuple[np.ndarray, Prefill] | None = None


class OpenBundle:
    """A bundle with its graphs open in their engine, ready to be asked about photos; made by `open_bundle`.

    It answers one question at a time: the next one ends an answer that is still streaming. Leaving its `with` block, or
    `close`, lets go of the memory.

    Where a bundle has several keeps, all share the open text graphs; each has a KV cache of its own, and answers a
    question of its own. The vision graph of a keep is opened when that is first asked for, and stays open: from then
    on a switch opens nothing.
    """

    def __init__(self, bundle: Bundle, *, threads: int | None = None) -> None:
        """Opens the graphs of a bundle, or of a view of it, whose files were checked. Raises BundleError, EngineError.

        Where nobody names a keep, it is the view's, or else the bundle's first.
        """
        self.bundle = bundle.at()
        self._threads = threads
        self._tokenizer = open_tokenizer(bundle)
        self._sides: dict[int, _Side] = {}
        with ExitStack() as stack:
            self._graphs = stack.enter_context(open_graphs(self.bundle, threads=threads))
            answers = start_answers(self.bundle, self._graphs)
            self._sides[self.bundle.manifest.prune.keep] = _Side(self.bundle, answers)
            self.emulated = any(graph.placement().emulated for graph in self._graphs.values())
            self._open = stack.pop_all()
        self._closed = False

    def see(self, photo: Photo, *, keep: int | None = None) -> Prefill:
        """Prefills a photo, which then can be asked about again and again, and saved with `Prefill.save`.

        `keep` is one of the bundle's, by default the one it was opened at; a prefill is of the keep that made it. The
        photo that was seen last at a keep, pixel for pixel, is not prefilled again. Raises ImageError, RequestError for
        a keep that the bundle does not have, BundleError for the prefill of another bundle or keep, EngineError.
        """
        return self._seen(photo, keep)[1]

    def see_pixels(self, pixels: np.ndarray, *, keep: int | None = None) -> Prefill:
        """Prefills what `preprocess` made of a photo, pixel_values (1, 3, H, W) float32, as `see` does the photo."""
        self._check_open()
        return self._seen_pixels(pixels, keep)[1]

    def _seen(self, photo: Photo, keep: int | None) -> tuple[_Side, Prefill]:
        self._check_open()
        if isinstance(photo, str | os.PathLike):
            photo = _load(Path(photo))
        if isinstance(photo, Prefill):
            view = made_by(self.bundle, photo, keep)
            return self._side(view.manifest.prune.keep), photo
        return self._seen_pixels(preprocess(photo, self.bundle.manifest.image), keep)

    def _seen_pixels(self, pixels: np.ndarray, keep: int | None) -> tuple[_Side, Prefill]:
        side = self._side(keep)
        if side.last is None or not np.array_equal(side.last[0], pixels):
            side.last = pixels, side.answers.see(pixels)
        return side, side.last[1]

    def _side(self, keep: int | None) -> _Side:
        """The bundle at a keep, whose vision graph is opened where it is not yet."""
        view = self.bundle.at(keep)
        count = view.manifest.prune.keep
        if count not in self._sides:
            check_hand_over(view)
            vision = open_session(view, VISION_ENCODER, threads=self._threads)
            try:
                answers = start_answers(view, {**self._graphs, VISION_ENCODER: vision})
            except BundleError:
                vision.close()
                raise
            self._open.callback(vision.close)
            self._sides[count] = _Side(view, answers)
        return self._sides[count]

    def ask(
        self,
        photo: Photo,
        question: str,
        *,
        keep: int | None = None,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
    ) -> Answer:
        """Asks a question about a photo; the answer streams while it is read.

        `keep` is that of `see`. Questions about one photo share its prefill. `max_new_tokens` and the first text of
        `stop` end the answer, of which the latter is no part. `temperature` lies in 0..100, 0 is greedy; above it
        tokens are drawn, by `seed`, from the likeliest up to a share of `top_p`.

        Refused before anything runs: RequestError for a question, a number or a keep that cannot be answered,
        ImageError, BundleError for the prefill of another bundle.
        """
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        check_stops(stops)
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        ids = self._tokenizer.question_ids(question)
        assert self.bundle.manifest.text is not None  # or nothing could have been opened
        check_room(len(ids), max_new_tokens, room=self.bundle.manifest.text.tokens)
        side, seen = self._seen(photo, keep)
        tokens = side.answers.answer(seen, ids, max_new_tokens=max_new_tokens, sampling=sampling)
        times_ms: list[float] = []

        def took() -> Took:
            return Took(
                bundle=side.bundle.title,
                image_ready_ms=seen.image_ready_ms,
                question_tokens=len(ids),
                ttft_ms=times_ms[0] if times_ms else None,
                token_ms=tuple(times_ms[1:]),
                kv_cache_bytes=side.answers.cache_bytes,
                peak_rss_bytes=peak_rss_bytes(),
            )

        return Answer(until_stop(self._tokenizer.text(self._ids(tokens, times_ms)), stops), took)

    def _ids(self, tokens: Iterator[Token], times_ms: list[float]) -> Iterator[int]:
        while True:
            self._check_open()
            token = next(tokens, None)
            if token is None:
                return
            times_ms.append(token.ms)
            yield token.id

    def _check_open(self) -> None:
        if self._closed:
            raise RequestError(f"{self.bundle.title} is closed; open it again with open_bundle")

    def close(self) -> None:
        """Lets go of the graphs and their memory; the bundle cannot be asked afterwards."""
        self._closed = True
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_bundle(path: str | os.PathLike[str], *, keep: int | None = None, threads: int | None = None) -> OpenBundle:
    """Hashes a bundle's files and opens its graphs, to be asked. ONNX bundles need no torch for it.

    `keep` is the one to answer at where a question names none, by default the first of the bundle's. `threads` None
    means the cores of the machine, at most 4. Raises BundleError for a bundle that is damaged or that cannot be asked,
    RequestError for one that only an Apple device can run or that lacks this keep, EngineError, EngineMissingError.
    """
    bundle = _askable(Path(path)).at(keep)
    open_tokenizer(bundle)  # refused before the hashes, which take longer
    bundle.check_files()
    return OpenBundle(bundle, threads=threads)


def _askable(path: Path) -> Bundle:
    """Reads a bundle and refuses one that cannot be asked here."""
    bundle = read_bundle(path)
    if bundle.manifest.layout != OWN_LAYOUT:
        raise BundleError(
            f"{path} is made for {bundle.manifest.layout}: ask it there, as the documentation shows; "
            "for `pruneport ask` export without --layout"
        )
    if bundle.manifest.text is None:
        raise BundleError(f"{path} has no text graphs and cannot be asked; export it without --only and --layout")
    if bundle.manifest.target.name == "ios":
        raise RequestError(
            f"{path} is made for Core ML, which answers on a Mac or an iPhone and not here; what can be done here is "
            "`pruneport verify`"
        )
    return bundle


def _load(path: Path) -> np.ndarray | Prefill:
    return Prefill.load(path) if path.suffix == PREFILL_SUFFIX else load_photo(path)


def made_by(bundle: Bundle, photo: Prefill, keep: int | None) -> Bundle:
    """The view of a bundle that made a prefill; BundleError where none did, or another than that of `keep`."""
    views = bundle.siblings if keep is None else (bundle.at(keep),)
    for view in views:
        if view.identity == photo.bundle:
            return view
    photo.check_made_by(views[0].identity)
    return views[0]


def ask(
    path: Path, inquiry: Inquiry, *, compare: bool, say: Callable[[str], None], tell: Callable[[str], None]
) -> tuple[Said, ...]:
    """Asks a bundle, and with `compare` its unpruned twin beside it; answers go to `say` piece by piece.

    `tell` gets whole lines about what happens and what it took. Everything that can be refused is refused before a
    graph is opened. Raises RequestError, BundleError, ImageError, EngineError; a note of a KeyboardInterrupt says what
    was written.
    """
    bundle = _askable(path).at(inquiry.keep)
    assert bundle.manifest.text is not None
    tokenizer = open_tokenizer(bundle)
    for question in inquiry.questions:
        check_room(len(tokenizer.question_ids(question)), inquiry.max_new_tokens, room=bundle.manifest.text.tokens)
    bundles = [bundle]
    if compare:
        if inquiry.photo.suffix == PREFILL_SUFFIX:
            raise RequestError(f"{inquiry.photo} is the prefill of one bundle; to compare, give the photo itself")
        bundles.append(unpruned_twin(bundle))
    seen = _load(inquiry.photo)
    if isinstance(seen, Prefill):
        bundles[0] = bundle = made_by(bundle, seen, inquiry.keep)
    for each in bundles:
        each.check_files()
    told: list[Said] = []
    sampling = inquiry.sampling
    written: list[Path] = []
    try:
        for each in bundles:
            if compare:
                tell(each.title)
                # Each is to show the memory that it takes by itself.
                give_back()
                restart_peak_rss()
            with OpenBundle(each) as opened:
                if opened.emulated:
                    tell("the NPU is only emulated on this machine: the times below say nothing about a phone")
                photo = opened.see(seen)
                prune = each.manifest.prune
                if isinstance(seen, np.ndarray) and (own := own_words(each.manifest.image, seen.shape[:2])):
                    tell(f"{prune.image_tokens} image tokens seen, {prune.keep} kept; {own}")
                if inquiry.save_prefill is not None and each is bundle:
                    photo.save(inquiry.save_prefill)
                    written.append(inquiry.save_prefill)
                if inquiry.draw is not None and each is bundle:
                    assert isinstance(seen, np.ndarray)
                    save_kept(inquiry.draw, seen, each.manifest.image, prune, photo.kept)
                    written.append(inquiry.draw)
                for question in inquiry.questions:
                    answer = opened.ask(
                        photo,
                        question,
                        max_new_tokens=inquiry.max_new_tokens,
                        temperature=sampling.temperature,
                        top_p=sampling.top_p,
                        seed=sampling.seed,
                        stop=inquiry.stops,
                    )
                    pieces = []
                    for piece in answer:
                        say(piece)
                        pieces.append(piece)
                    say("\n")
                    tell(str(answer.took))
                    told.append(Said(each.title, question, "".join(pieces), answer.took, photo.kept))
    except KeyboardInterrupt as stop:
        for path_written in written:
            stop.add_note(f"{path_written} was written before that")
        raise
    return tuple(told)


def check_stops(stops: Sequence[str]) -> None:
    """Raises RequestError for a text that ends every answer."""
    if "" in stops:
        raise RequestError("stop='' would end every answer at once; give a text, or leave --stop out")


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The text up to the one of `stops` that is complete first; what may be the beginning of one is held back."""
    held = ""
    for piece in pieces:
        held += piece
        # By where they end: it must not matter in which pieces the text comes.
        found = [(at + len(stop), at) for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            _, start = min(found)
            if start:
                yield held[:start]
            return
        safe = len(held) - max((_overlap(held, stop) for stop in stops), default=0)
        if safe:
            yield held[:safe]
            held = held[safe:]
    if held:
        yield held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def unpruned_twin(bundle: Bundle) -> Bundle:
    """The finished bundle beside this one that differs in nothing but that it keeps every image token."""
    if not bundle.manifest.prune.pruned:
        raise RequestError(f"{bundle.path} is unpruned itself; leave --compare out")
    ours = bundle.manifest
    unreadable = []
    for folder in sorted(bundle.path.absolute().parent.iterdir()):
        if folder.name.startswith(".") or not (folder / "manifest.json").is_file():
            continue
        try:
            other = read_bundle(folder)
        except BundleError as err:  # it may be the twin or have nothing to do with it
            unreadable.append(str(err))
            continue
        theirs = other.manifest
        same = (theirs.model, theirs.weights, theirs.target, theirs.text, theirs.prune.cut) == (
            ours.model,
            ours.weights,
            ours.target,
            ours.text,
            ours.prune.cut,
        )
        for view in other.views if same else ():
            if not view.manifest.prune.pruned:
                return view
    raise BundleError(
        f"no unpruned twin of {bundle.path} lies beside it; export one with --keep all and the same settings, or "
        f"export both with --twin{''.join(f' (not looked at: {why})' for why in unreadable)}"
    )
