"""This machine as a device: each graph is opened once in its engine, run on the golden's inputs, and timed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from itertools import islice

import numpy as np

from runtime.bundle import OWN_LAYOUT, Bundle, GraphInfo
from runtime.devices.findings import (
    AnswerFinding,
    Findings,
    GraphFinding,
    GraphLatency,
    Job,
    TimedAnswers,
    Timing,
    Trouble,
    Twin,
)
from runtime.errors import EngineError, EngineMissingError, ImageError
from runtime.generation import Answers, open_graphs, start_answers
from runtime.golden import ANSWER, ANSWER_MARGIN, PHOTO, PIXELS, QUESTION, graph_inputs, input_key, step_label, steps
from runtime.image import preprocess
from runtime.latency import AnswerTimer, device_name, measure, measure_answers, measure_pair
from runtime.placement import Placement
from runtime.ready_made import greedy_tokens
from runtime.session import Session, open_session
from runtime.text_graphs import TOKEN_EMBEDDING, VISION_ENCODER

_TIMED_TOKENS = 16


class Desktop:
    """This machine; `progress` is told what is being done."""

    def __init__(self, progress: Callable[[str], None] | None = None) -> None:
        self._say = progress or (lambda message: None)

    @property
    def name(self) -> str:
        """The processor's name."""
        return device_name()

    def run(self, bundle: Bundle, job: Job) -> Findings:
        """Runs a job here; see `runtime.devices.device.Device`."""
        self._say("hashing the files")
        bundle.check_files()
        return _Run(bundle, job, self._say).findings(self.name)


class _Run:
    """One walk over a bundle."""

    def __init__(self, bundle: Bundle, job: Job, say: Callable[[str], None]) -> None:
        self._bundle, self._job, self._say = bundle, job, say
        self._golden = bundle.golden()
        # What answers are timed by; None once a graph was seen whose times would say nothing.
        self._timing: Timing | None = job.timing
        self._twin_timed = False

    def findings(self, device: str) -> Findings:
        pixels, refused = self._pixels()
        manifest = self._bundle.manifest
        graphs = tuple(finding for graph in manifest.graphs for finding in self._graph(graph))
        asks = manifest.text is not None or manifest.layout != OWN_LAYOUT
        return Findings(
            device=device,
            pixel_values=pixels,
            photo_refused=refused,
            graphs=graphs,
            answer=self._answer() if asks else None,
            twin=Twin.of(self._job.timing.twin)
            if self._twin_timed and self._job.timing and self._job.timing.twin
            else None,
        )

    def _pixels(self) -> tuple[np.ndarray | None, str]:
        if PHOTO not in self._golden:
            return None, ""
        try:
            return preprocess(self._golden[PHOTO], self._bundle.manifest.image), ""
        except ImageError as err:
            return None, str(err)

    def _graph(self, graph: GraphInfo) -> list[GraphFinding]:
        """What comes of a graph at each of its steps, opened once."""
        with ExitStack() as stack:
            opened = cache(
                lambda: stack.enter_context(open_session(self._bundle, graph.name, threads=self._job.threads))
            )
            return [self._step(graph, step, opened) for step in steps(graph, self._bundle.manifest.layout) or ("",)]

    def _step(self, graph: GraphInfo, step: str, opened: Callable[[], Session]) -> GraphFinding:
        try:
            inputs = graph_inputs(graph, self._golden, step) if step else {}
        except KeyError:
            return GraphFinding(graph=graph.name, step=step)
        self._say(f"checking {step_label(graph.name, step or graph.name)} in {graph.engine}")
        outputs: dict[str, np.ndarray] | None = None
        states: dict[str, np.ndarray] = {}
        placement: Placement | None = None
        latency: GraphLatency | None = None
        engine = ""
        trouble: Trouble | None = None
        twin_trouble: Trouble | None = None
        try:
            session = opened()
            engine = session.engine
            if step:
                outputs = session.run(inputs)
                states = {info.name: inputs[info.name].copy() for info in graph.states}
            placement = session.placement()
            if placement.emulated or placement.stand_in or not placement.executed:
                self._timing = None
            elif self._job.timing is not None and step:
                latency, twin_trouble = self._timed(session, inputs, step, self._job.timing)
        except EngineMissingError as err:
            trouble, placement = Trouble(message=str(err), missing=True), err.placement
        except EngineError as err:
            trouble = Trouble(message=str(err))
        return GraphFinding(
            graph=graph.name,
            step=step,
            engine=engine,
            outputs=outputs,
            states=states,
            placement=placement,
            latency=latency,
            trouble=trouble,
            twin_trouble=twin_trouble,
        )

    def _timed(
        self, session: Session, inputs: dict[str, np.ndarray], step: str, timing: Timing
    ) -> tuple[GraphLatency, Trouble | None]:
        """The graph's times, and why its twin was not timed."""
        graph, twin = session.graph.name, timing.twin
        label = step_label(graph, step)
        self._say(f"timing {label}: {timing.runs} runs" + (" in turns with its twin" if twin else ""))

        def alone() -> GraphLatency:
            return GraphLatency(graph=label, bundle=measure(session, inputs, warmup=timing.warmup, runs=timing.runs))

        if twin is None:
            return alone(), None
        if reason := _why_no_twin(self._bundle, twin, graph):
            return alone(), Trouble(message=reason, missing=True)
        # Each on its own inputs: behind the cut the twin's are longer.
        try:
            with open_session(twin, graph, threads=session.threads) as other:
                theirs = graph_inputs(other.graph, twin.golden(), step)
                pair = measure_pair(session, inputs, other, theirs, warmup=timing.warmup, runs=timing.runs)
        except EngineError as err:
            return alone(), Trouble(message=str(err))
        self._twin_timed = True
        return GraphLatency(graph=label, bundle=pair.bundle, twin=pair.twin, ratio=pair.ratio), None

    def _answer(self) -> AnswerFinding:
        """The sample question end to end, as a phone asks it; and how long that takes."""
        golden = self._golden
        pixels = golden.get(input_key(VISION_ENCODER, PIXELS))
        if pixels is None:
            return AnswerFinding()
        self._say("answering the sample question")
        ids, cache_bytes, times = None, None, None
        trouble = None
        try:
            with ExitStack() as stack:
                graphs = stack.enter_context(open_graphs(self._bundle, threads=self._job.threads))
                answers = None if self._bundle.manifest.text is None else start_answers(self._bundle, graphs)
                cache_bytes = None if answers is None else answers.cache_bytes
                if all(key in golden for key in (QUESTION, ANSWER, ANSWER_MARGIN)):
                    ids = self._ids(graphs, answers, pixels, golden[QUESTION].tolist(), len(golden[ANSWER]))
                if answers is not None and self._timing is not None:
                    question = golden.get(QUESTION, golden[input_key(TOKEN_EMBEDDING, "ids")][0, :16]).tolist()
                    times = self._time_answers(stack, graphs, answers, pixels, question, self._timing)
        except EngineMissingError as err:
            trouble = Trouble(message=str(err), missing=True)
        except EngineError as err:
            trouble = Trouble(message=str(err))
        return AnswerFinding(ids=ids, cache_bytes=cache_bytes, times=times, trouble=trouble)

    def _ids(
        self, graphs: dict[str, Session], answers: Answers | None, pixels: np.ndarray, question: list[int], count: int
    ) -> np.ndarray:
        if answers is None:
            return np.asarray([*islice(greedy_tokens(self._bundle, graphs, pixels, question), count)])
        tokens = answers.answer(answers.see(pixels), question, max_new_tokens=count, past_end=True)
        return np.asarray([token.id for token in tokens])

    def _time_answers(
        self,
        stack: ExitStack,
        graphs: dict[str, Session],
        answers: Answers,
        pixels: np.ndarray,
        question: list[int],
        timing: Timing,
    ) -> TimedAnswers:
        twin = timing.twin
        if twin is not None and _why_no_twin(self._bundle, twin, TOKEN_EMBEDDING):
            twin = None
        self._say("timing answers" + (" in turns with the twin" if twin else ""))
        timers = [AnswerTimer(answers, pixels, question, new_tokens=_TIMED_TOKENS)]
        if twin is not None:
            other = stack.enter_context(open_graphs(twin, threads=self._job.threads))
            timers.append(AnswerTimer(start_answers(twin, other), pixels, question, new_tokens=_TIMED_TOKENS))
        measure_answers(timers, runs=min(timing.runs, 5))
        threads = next(iter(graphs.values())).threads
        engine = " and ".join(dict.fromkeys(graph.engine for graph in graphs.values()))
        ours, *theirs = [timer.latency(threads=threads, engine=engine) for timer in timers]
        return TimedAnswers(
            bundle=ours, twin=theirs[0] if theirs else None, ratio=timers[0].ratio(timers[1]) if theirs else None
        )


def _why_no_twin(bundle: Bundle, twin: Bundle, graph: str) -> str:
    """Why a bundle cannot serve as the twin, or nothing."""
    ours, theirs = bundle.manifest, twin.manifest
    if theirs.prune.pruned:
        return f"{theirs.name} is pruned itself"
    for what, a, b in (
        ("model", ours.model, theirs.model),
        ("weights", ours.weights, theirs.weights),
        ("target", ours.target, theirs.target),
        ("cut", ours.prune.cut, theirs.prune.cut),
        ("layout", ours.layout, theirs.layout),
    ):
        if a != b:
            return f"{theirs.name} differs in its {what}"
    if graph not in {info.name for info in theirs.graphs}:
        return f"{theirs.name} has no graph {graph}"
    return ""
