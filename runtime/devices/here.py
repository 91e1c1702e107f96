"""This machine, by a job: in the engines of this Python, or in the native runner; the same files as a phone's.

`runtime.devices.desktop` is what checks a bundle; this is what a phone's findings are laid beside.
"""

from __future__ import annotations

import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from runtime.bundle import Bundle
from runtime.devices.remote import RemoteDevice
from runtime.devices.wire import (
    BUNDLE_DIR,
    TWIN_DIR,
    AnswerFound,
    AnswerRun,
    DeviceInfo,
    FindingsFile,
    JobFile,
    LoadFound,
    MemoryFound,
    RunnerInfo,
    StepFound,
    TimingJob,
    TroubleFound,
    now_utc,
    write_findings,
    write_job,
)
from runtime.errors import DeviceError, EngineError, EngineMissingError, ImageError
from runtime.generation import start_answers
from runtime.golden import PHOTO, PIXELS
from runtime.image import preprocess
from runtime.latency import device_name, peak_rss_bytes
from runtime.session import Session, default_threads, open_session
from runtime.text_graphs import VISION_ENCODER

Say = Callable[[str], None]


class HereDevice(RemoteDevice):
    """This machine; with `runner` the native runner built for it, which keeps packed weights in `packed` if given."""

    def __init__(
        self,
        *,
        runner: Path | None = None,
        packed: Path | None = None,
        timeout_s: float = 3600.0,
        progress: Say | None = None,
    ) -> None:
        self._runner, self._packed, self._timeout_s = runner, packed, timeout_s
        self._say = progress or (lambda message: None)

    @property
    def name(self) -> str:
        """The processor's name."""
        return device_name()

    def _find(
        self, bundle: Bundle, job: JobFile, tensors: dict[str, np.ndarray], twin: Bundle | None, out: Path
    ) -> None:
        if self._runner is None:
            write_findings(out, *_Run(bundle, job, tensors, twin, self._say).all())
            return
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".job-") as place:
            self._run_native(bundle, job, tensors, twin, Path(place), out)

    def _run_native(
        self,
        bundle: Bundle,
        job: JobFile,
        tensors: dict[str, np.ndarray],
        twin: Bundle | None,
        place: Path,
        out: Path,
    ) -> None:
        assert self._runner is not None
        write_job(place, job, tensors)
        for name, each in ((BUNDLE_DIR, bundle), (TWIN_DIR, twin)):
            if each is not None:
                (place / name).symlink_to(each.path.resolve())
        words = [str(self._runner.resolve()), str(place), str(out), "--kind", "desktop"]
        if self._packed is not None:
            self._packed.mkdir(parents=True, exist_ok=True)
            words += ["--packed", str(self._packed / f"{bundle.manifest.name}-{bundle.key}")]
        env = {**os.environ, "LD_LIBRARY_PATH": str(self._runner.resolve().parent)}
        try:
            done = subprocess.run(
                words, env=env, capture_output=True, text=True, timeout=self._timeout_s, check=False, errors="replace"
            )
        except subprocess.TimeoutExpired:
            raise DeviceError(
                f"the job did not end in {self._timeout_s:.0f} s and was stopped; allow more with --timeout"
            ) from None
        except OSError as err:
            raise DeviceError(
                f"{self._runner} cannot be started: {err.strerror}; build it, see docs/devices.md"
            ) from err
        if done.returncode:
            last = (done.stderr.strip() or "it said nothing").splitlines()[-1]
            raise DeviceError(f"the runner ended with exit code {done.returncode}: {last}")


class _Run:
    """One walk over a job, with the engines of this Python."""

    def __init__(
        self, bundle: Bundle, job: JobFile, tensors: dict[str, np.ndarray], twin: Bundle | None, say: Say
    ) -> None:
        self._bundle, self._job, self._tensors, self._twin, self._say = bundle.at(), job, tensors, twin, say
        self._threads = job.threads or default_threads()
        self._sent: dict[str, np.ndarray] = {}
        self._engine = ""

    def all(self) -> tuple[FindingsFile, dict[str, np.ndarray]]:
        """What came of the job, and its tensors."""
        started, refused = now_utc(), ""
        if PHOTO in self._tensors:
            try:
                self._sent[PIXELS] = preprocess(self._tensors[PHOTO], self._bundle.manifest.image)
            except ImageError as err:
                refused = str(err)
        steps: list[StepFound] = []
        answer, trouble, load = None, None, LoadFound()
        try:
            with ExitStack() as stack:
                self._say("opening the graphs")
                start = time.perf_counter()
                graphs = self._open(stack, self._bundle)
                load = LoadFound(first_ms=(_ms_since(start),))
                self._engine = next(iter(graphs.values())).engine
                steps = [self._step(graphs[step.graph], step.graph, step.step) for step in self._job.steps]
                if self._job.answer is not None:
                    answer = self._answer(stack, graphs, refused=bool(refused))
        except EngineError as err:
            trouble = _trouble(err)
        name, _, version = self._engine.partition(" ")
        file = FindingsFile(
            job=self._job.id,
            bundle=self._job.bundle,
            twin=self._job.twin.bundle if self._job.twin else None,
            device=DeviceInfo(
                name=device_name(),
                kind="desktop",
                os=f"{platform.system()} {platform.release()}",
                abi=platform.machine(),
                cores=os.cpu_count() or 1,
                ram_bytes=psutil.virtual_memory().total,
            ),
            runner=RunnerInfo(
                name="pruneport in Python",
                version=platform.python_version(),
                engine=name or "none",
                engine_version=version or "none",
            ),
            threads=self._threads,
            started_utc=started,
            ended_utc=now_utc(),
            load=load,
            photo_refused=refused,
            steps=tuple(steps),
            answer=answer,
            memory=MemoryFound(peak_rss_bytes=peak_rss_bytes(), after_close_bytes=psutil.Process().memory_info().rss),
            trouble=trouble,
        )
        return file, self._sent

    def _open(self, stack: ExitStack, bundle: Bundle) -> dict[str, Session]:
        return {
            graph.name: stack.enter_context(open_session(bundle, graph.name, threads=self._threads))
            for graph in bundle.manifest.graphs
        }

    def _step(self, session: Session, graph: str, step: str) -> StepFound:
        self._say(f"running {graph}" if graph == step else f"running {graph} at {step}")
        key, info = f"{graph}/{step}", session.graph
        inputs = {each.name: self._tensors[f"in/{key}/{each.name}"].copy() for each in (*info.inputs, *info.states)}
        try:
            self._sent |= {f"out/{key}/{name}": array.copy() for name, array in session.run(inputs).items()}
            self._sent |= {f"state/{key}/{state.name}": inputs[state.name].copy() for state in info.states}
            warmup, times = (), ()  # type: tuple[float, ...], tuple[float, ...]
            placed = session.placement()
            if self._job.timing is not None and placed.executed and not placed.emulated:
                warmup = tuple(_timed(session, inputs) for _ in range(self._job.timing.warmup))
                times = tuple(_timed(session, inputs) for _ in range(self._job.timing.runs))
        except EngineError as err:
            return StepFound(graph=graph, step=step, trouble=_trouble(err))
        return StepFound(
            graph=graph,
            step=step,
            load_ms=(session.load_ms,),
            warmup_ms=warmup,
            run_ms=times,
            delegates=placed.delegates,
            outside=placed.outside,
        )

    def _answer(self, stack: ExitStack, graphs: dict[str, Session], *, refused: bool) -> AnswerFound:
        job, prune = self._job, self._bundle.manifest.prune
        assert job.answer is not None
        self._say("answering")
        sizes: dict[str, Any] = {
            "image_tokens_before": prune.image_tokens,
            "image_tokens_after": prune.keep,
            "question_tokens": len(job.answer.question),
        }
        try:
            ours = _Side(self._bundle, graphs)
            ids, first = ours.answer(self._pixels(refused), job)
            runs = [first]
            if job.timing is not None:
                sides = [ours]
                if self._twin is not None:
                    sides.append(_Side(self._twin.at(), self._open(stack, self._twin.at())))
                runs = self._timed(sides, job.timing, refused)
        except EngineError as err:
            return AnswerFound(**sizes, trouble=_trouble(err))
        return AnswerFound(**sizes, ids=tuple(ids), cache_bytes=ours.cache_bytes, runs=tuple(runs))

    def _timed(self, sides: list[_Side], timing: TimingJob, refused: bool) -> list[AnswerRun]:
        """The first turn warms up; the order is swapped each time, so that drift hits both alike."""
        runs = []
        for turn in range(timing.answers + 1):
            self._say(f"timing answers, {turn} of {timing.answers}")
            for side in sides if turn % 2 == 0 else reversed(sides):
                _, run = side.answer(self._pixels(refused), self._job, twin=side is not sides[0], warmup=turn == 0)
                runs.append(run)
        return runs

    def _pixels(self, refused: bool) -> _Pixels:
        photo = None if refused else self._tensors.get(PHOTO)
        # Of the job, so that answers can be compared, or of its photo.
        values = self._tensors.get(PIXELS, self._sent.get(PIXELS))
        if values is None:
            raise EngineError("the job has neither pixel_values nor a photo that can be read")
        return _Pixels(values, photo)


class _Pixels:
    """What is answered about, and the photo that is preprocessed for the clock."""

    def __init__(self, values: np.ndarray, photo: np.ndarray | None) -> None:
        self.values, self._photo = values, photo

    def preprocess_ms(self, bundle: Bundle) -> float:
        """How long the photo takes to become pixel values; 0 without one."""
        if self._photo is None:
            return 0.0
        start = time.perf_counter()
        preprocess(self._photo, bundle.manifest.image)
        return _ms_since(start)


class _Side:
    """A bundle, its graphs open, that times the vision graph apart from what follows."""

    def __init__(self, bundle: Bundle, graphs: dict[str, Session]) -> None:
        self._bundle = bundle
        self._vision = _Clocked(graphs[VISION_ENCODER])
        self._answers = start_answers(bundle, {**graphs, VISION_ENCODER: self._vision})
        self.cache_bytes = self._answers.cache_bytes

    def answer(
        self, pixels: _Pixels, job: JobFile, *, twin: bool = False, warmup: bool = True
    ) -> tuple[list[int], AnswerRun]:
        """The answer's ids, and what it took."""
        assert job.answer is not None
        preprocess_ms = pixels.preprocess_ms(self._bundle)
        photo = self._answers.see(pixels.values)
        tokens = list(
            self._answers.answer(photo, job.answer.question, max_new_tokens=job.answer.new_tokens, past_end=True)
        )
        vision_ms = min(self._vision.last_ms, photo.image_ready_ms)
        run = AnswerRun(
            twin=twin,
            warmup=warmup,
            preprocess_ms=preprocess_ms,
            vision_ms=vision_ms,
            image_prefill_ms=photo.image_ready_ms - vision_ms,
            image_ready_ms=photo.image_ready_ms,
            question_prefill_ms=tokens[0].ms,
            ttft_question_ms=tokens[0].ms,
            ttft_photo_ms=preprocess_ms + photo.image_ready_ms + tokens[0].ms,
            token_ms=tuple(token.ms for token in tokens[1:]),
        )
        return [token.id for token in tokens], run


class _Clocked:
    """A graph that remembers how long its last run took."""

    def __init__(self, session: Session) -> None:
        self.graph, self._session, self.last_ms = session.graph, session, 0.0

    def run(self, inputs: Any) -> dict[str, np.ndarray]:
        start = time.perf_counter()
        given = self._session.run(inputs)
        self.last_ms = _ms_since(start)
        return given


def _timed(session: Session, inputs: dict[str, np.ndarray]) -> float:
    start = time.perf_counter()
    session.run(inputs)
    return _ms_since(start)


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3


def _trouble(err: EngineError) -> TroubleFound:
    return TroubleFound(message=str(err)[:4000], missing=isinstance(err, EngineMissingError))
