"""What the process of one bundle does: one job after the other, read from standard input, told on standard output.

Each bundle has a process of its own, so that the memory it takes is known, and a crash of an engine ends no server.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from runtime.ask import OpenBundle, Took, open_bundle
from runtime.bundle import Bundle, read_bundle
from runtime.errors import PruneportError
from runtime.generation import kept_tokens
from runtime.serve.messages import Event, Numbers, PhotoJob, line
from runtime.session import Session, open_session
from runtime.text_graphs import VISION_ENCODER

Say = Callable[[Event], None]


class _Asked(ExitStack):
    """An open bundle; `emulated` where its times say nothing."""

    emulated: bool

    @abstractmethod
    def work(self, job: PhotoJob, say: Say, stopped: Callable[[], bool]) -> None:
        """Does one job, and says what happens in it."""


class _Answering(_Asked):
    """A bundle that sees photos and answers."""

    def __init__(self, opened: OpenBundle) -> None:
        super().__init__()
        self._opened = self.enter_context(opened)
        self.emulated = opened.emulated

    def work(self, job: PhotoJob, say: Say, stopped: Callable[[], bool]) -> None:
        photo = self._opened.see_pixels(job.pixel_values, keep=job.keep)
        say(Event(job=job.number, kept=photo.kept, image_ready_ms=photo.image_ready_ms))
        if job.question is None:
            return
        answer = self._opened.ask(photo, job.question, keep=job.keep)
        for piece in answer:
            say(Event(job=job.number, piece=piece))
            if stopped():
                return
        say(Event(job=job.number, numbers=_numbers(answer.took)))


class _Seeing(_Asked):
    """A bundle without text graphs, which shows the tokens that it keeps."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self._bundle = bundle
        self._sessions: dict[int, Session] = {}
        self.emulated = self._session(bundle.at().manifest.prune.keep).placement().emulated

    def _session(self, keep: int) -> Session:
        if keep not in self._sessions:
            self._sessions[keep] = self.enter_context(open_session(self._bundle.at(keep), VISION_ENCODER))
        return self._sessions[keep]

    def work(self, job: PhotoJob, say: Say, stopped: Callable[[], bool]) -> None:
        session = self._session(job.keep)
        start = time.perf_counter()
        seen = session.run({"pixel_values": job.pixel_values})
        took_ms = (time.perf_counter() - start) * 1e3
        kept = kept_tokens(seen, frame=self._bundle.manifest.frame)
        say(Event(job=job.number, kept=kept, image_ready_ms=took_ms))


def open_for(path: Path, keep: int) -> _Asked:
    """Hashes a bundle's files and opens its graphs at one keep. Raises what `open_bundle` raises."""
    bundle = read_bundle(path)
    if bundle.manifest.text is not None:
        return _Answering(open_bundle(path, keep=keep))
    bundle.check_files()
    return _Seeing(bundle)


def _numbers(took: Took) -> Numbers:
    return Numbers(
        image_ready_ms=took.image_ready_ms,
        ttft_ms=took.ttft_ms,
        tokens_per_s=1e3 * len(took.token_ms) / sum(took.token_ms) if took.token_ms else None,
        tokens=len(took.token_ms) + (took.ttft_ms is not None),
        question_tokens=took.question_tokens,
        kv_cache_bytes=took.kv_cache_bytes,
        peak_rss_bytes=took.peak_rss_bytes,
    )


def main(argv: Sequence[str]) -> None:
    """Opens the bundle at a path and a keep, and does what standard input says until that ends."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what an engine prints is no message
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(waiting,), daemon=True).start()

    def say(event: Event) -> None:
        try:
            out.write(line(event))
            out.flush()
        except OSError:
            os._exit(0)  # nobody is left to tell

    path, keep = argv
    number = 0
    try:
        with open_for(Path(path), int(keep)) as asked:
            say(Event(job=0, emulated=asked.emulated, end=True))
            while True:
                told = waiting.get()
                if not told.strip():
                    continue  # the job that it was to end had ended
                job = msgspec.json.decode(told, type=PhotoJob)
                number = job.number
                _work(asked, job, say, lambda: not waiting.empty())
    except PruneportError as err:
        say(_error(number, err))


def _work(asked: _Asked, job: PhotoJob, say: Say, stopped: Callable[[], bool]) -> None:
    try:
        asked.work(job, say, stopped)
    except PruneportError as err:
        say(_error(job.number, err))
    else:
        say(Event(job=job.number, end=True))


def _error(number: int, err: PruneportError) -> Event:
    return Event(job=number, error=str(err), kind=type(err).__name__, end=True)


def _read(waiting: queue.SimpleQueue[bytes]) -> None:
    for told in sys.stdin.buffer:
        waiting.put(told)
    os._exit(0)  # the server is gone: whatever runs here is for nobody
