"""Questions about a photo, put to a bundle in its engine: the answer streams, and what it took is told."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from runtime.bundle import Bundle, read_bundle
from runtime.errors import BundleError, OutputError, RequestError
from runtime.generation import (
    VISION_ENCODER,
    Answers,
    Prefill,
    Sampling,
    Token,
    check_room,
    open_graphs,
    start_answers,
)
from runtime.image import load_photo, preprocess
from runtime.latency import peak_rss_bytes
from runtime.prompt import Tokenizer, open_tokenizer

PREFILL_SUFFIX = ".safetensors"


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


@dataclass(frozen=True, kw_only=True)
class Inquiry:
    """Questions about one photo: a picture file, or a prefill that `save_prefill` wrote before."""

    photo: Path
    questions: tuple[str, ...]
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    stops: tuple[str, ...] = ()
    save_prefill: Path | None = None

    def __post_init__(self) -> None:
        for question in self.questions:
            # A name too long for the file system is no file.
            if len(question) < 256 and "\n" not in question and _is_file(question):
                raise RequestError(
                    f"the question {question!r} is a file; one photo is supported, what follows it are questions"
                )
        if "" in self.stops:
            raise RequestError("stop='' would end every answer at once; give a text, or leave --stop out")
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


def ask(
    path: Path, inquiry: Inquiry, *, compare: bool, say: Callable[[str], None], tell: Callable[[str], None]
) -> tuple[Took, ...]:
    """Asks a bundle, and with `compare` its unpruned twin beside it; answers go to `say` piece by piece.

    `tell` gets whole lines about what happens and what it took. Everything that can be refused is refused before a
    graph is opened. Raises RequestError, BundleError, ImageError, EngineError; a note of a KeyboardInterrupt says what
    was written.
    """
    bundle = read_bundle(path)
    if bundle.manifest.ready_for is not None:
        raise BundleError(
            f"{path} is made for {bundle.manifest.ready_for}: ask it there, as the README shows; "
            "for `pruneport ask` export with --prune-at decoder"
        )
    if bundle.manifest.text is None:
        raise BundleError(
            f"{path} has no text graphs and cannot be asked; export it with --prune-at decoder and without --only"
        )
    if bundle.manifest.target.name == "ios":
        raise RequestError(
            f"{path} is made for Core ML, which answers on a Mac or an iPhone and not here; what can be done here is "
            "`pruneport verify`"
        )
    tokenizer = open_tokenizer(bundle)
    ids = [tokenizer.question_ids(question) for question in inquiry.questions]
    for tokens in ids:
        check_room(len(tokens), inquiry.max_new_tokens, room=bundle.manifest.text.tokens)
    bundles = [bundle]
    if compare:
        if inquiry.photo.suffix == PREFILL_SUFFIX:
            raise RequestError(f"{inquiry.photo} is the prefill of one bundle; to compare, give the photo itself")
        bundles.append(unpruned_twin(bundle))
    seen = Prefill.load(inquiry.photo) if inquiry.photo.suffix == PREFILL_SUFFIX else load_photo(inquiry.photo)
    if isinstance(seen, Prefill):
        seen.check_made_by(bundle.identity)
    for each in bundles:
        each.check_files()
    took: list[Took] = []
    written: list[Path] = []
    try:
        for each in bundles:
            if compare:
                tell(each.manifest.name)
            with open_graphs(each) as graphs:
                if graphs[VISION_ENCODER].placement().emulated:
                    tell("the NPU is only emulated on this machine: the times below say nothing about a phone")
                answers = start_answers(each, graphs)
                photo = seen if isinstance(seen, Prefill) else answers.see(preprocess(seen, each.manifest.image))
                if inquiry.save_prefill is not None and each is bundle:
                    photo.save(inquiry.save_prefill)
                    written.append(inquiry.save_prefill)
                for question in ids:
                    one = _answer(each, answers, tokenizer, photo, question, inquiry, say=say)
                    tell(str(one))
                    took.append(one)
    except KeyboardInterrupt as stop:
        for path_written in written:
            stop.add_note(f"the prefill was written before that: {path_written}")
        raise
    return tuple(took)


def _answer(
    bundle: Bundle,
    answers: Answers,
    tokenizer: Tokenizer,
    photo: Prefill,
    question: Sequence[int],
    inquiry: Inquiry,
    *,
    say: Callable[[str], None],
) -> Took:
    times_ms: list[float] = []

    def ids(tokens: Iterable[Token]) -> Iterator[int]:
        for token in tokens:
            times_ms.append(token.ms)
            yield token.id

    tokens = answers.answer(photo, question, max_new_tokens=inquiry.max_new_tokens, sampling=inquiry.sampling)
    for piece in until_stop(tokenizer.text(ids(tokens)), inquiry.stops):
        say(piece)
    say("\n")
    return Took(
        bundle=bundle.manifest.name,
        image_ready_ms=photo.image_ready_ms,
        question_tokens=len(question),
        ttft_ms=times_ms[0] if times_ms else None,
        token_ms=tuple(times_ms[1:]),
        kv_cache_bytes=answers.cache_bytes,
        peak_rss_bytes=peak_rss_bytes(),
    )


def until_stop(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The text up to the first of `stops`; what may be the beginning of one is held back until it is not."""
    held = ""
    for piece in pieces:
        held += piece
        found = [at for at in (held.find(stop) for stop in stops) if at >= 0]
        if found:
            if min(found):
                yield held[: min(found)]
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
        same = (theirs.model, theirs.weights, theirs.target, theirs.text) == (
            ours.model,
            ours.weights,
            ours.target,
            ours.text,
        )
        if same and not theirs.prune.pruned and theirs.prune.placement == ours.prune.placement:
            return other
    raise BundleError(
        f"no unpruned twin of {bundle.path} lies beside it; export one with --keep all and the same settings, or "
        f"export both with --twin{''.join(f' (not looked at: {why})' for why in unreadable)}"
    )
