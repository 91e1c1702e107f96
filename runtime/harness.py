"""Reads a bundle back from disk, runs it in its real engine, and says what held, what failed, what went unchecked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from runtime.bundle import REPORT_FILES, SCHEMA_VERSION, Bundle, GraphInfo, read_bundle
from runtime.engines import Placement
from runtime.engines.onnxruntime import CPU
from runtime.errors import BundleError, EngineError, EngineMissingError, ImageError, OutputError
from runtime.generation import (
    IMAGE_PREFILL,
    TEXT_DECODER,
    TEXT_PREFILL,
    TOKEN_EMBEDDING,
    VISION_ENCODER,
    Answers,
    open_graphs,
    start_answers,
)
from runtime.image import preprocess
from runtime.latency import (
    AnswerLatency,
    AnswerRatio,
    AnswerTimer,
    Latency,
    Ratio,
    device_name,
    measure,
    measure_answers,
    measure_pair,
)
from runtime.parity import AnswerParity, GraphParity, bound_for, compare_answer, graph_parity
from runtime.ready_made import EMBED_TOKENS, greedy_tokens
from runtime.report import plural, write_reports
from runtime.session import Session, open_session

Status = Literal["passed", "failed", "not checked"]
Progress = Callable[[str], None]

_PIXELS = "pixel_values"
# Inputs that are what another graph gives.
_FED_BY = {
    f"{TEXT_PREFILL}.inputs_embeds": f"{TOKEN_EMBEDDING}.out.inputs_embeds",
}
_ANSWER = ("answer.question", "answer.ids", "answer.margin")
_TIMED_TOKENS = 16
# Pillow's resize may round one grey level apart between builds; a wrong crop or channel order is dozens off.
_MOST_GREY_LEVELS = 1.0


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a verdict is made of."""


class Step(_Record, frozen=True):
    """One thing that was looked at. `remedy` says how to get a "not checked" checked."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


class GraphPlacement(_Record, frozen=True):
    """Who ran what inside one graph here; where it was not `executed`, who would is not known."""

    graph: str
    delegates: dict[str, int]
    outside: dict[str, int]
    source: str
    executed: bool = True


class GraphLatency(_Record, frozen=True):
    """One graph's times, and its twin's from the same minutes; `ratio` is pruned over twin."""

    graph: str
    bundle: Latency
    twin: Latency | None = None
    ratio: Ratio | None = None


class TimedAnswers(_Record, frozen=True):
    """Whole answers, and the twin's from the same minutes."""

    bundle: AnswerLatency
    twin: AnswerLatency | None = None
    ratio: AnswerRatio | None = None


class Twin(_Record, frozen=True):
    """What the report says about the unpruned twin, besides its times; sizes in bytes."""

    name: str
    image_tokens: int
    size_bytes: int
    handed_on_bytes: int


class Verdict(_Record, frozen=True):
    """Everything a check found."""

    bundle: str
    device: str
    steps: tuple[Step, ...]
    graphs: tuple[GraphParity, ...] = ()
    answer: AnswerParity | None = None
    placements: tuple[GraphPlacement, ...] = ()
    latency: tuple[GraphLatency, ...] = ()
    answers: TimedAnswers | None = None
    twin: Twin | None = None

    @property
    def outcome(self) -> Status:
        """The worst that happened in any step: `failed`, `not checked` or `passed`."""
        if self.failed_steps:
            return "failed"
        return "not checked" if self.unchecked_steps else "passed"

    @property
    def passed(self) -> bool:
        """True when nothing failed; steps that were not checked do not count, so `outcome` says more."""
        return not self.failed_steps

    @property
    def executed(self) -> bool:
        """False where graphs were evaluated instead of run: then nothing was timed either."""
        return all(placement.executed for placement in self.placements)

    @property
    def failed_steps(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.status == "failed")

    @property
    def unchecked_steps(self) -> tuple[Step, ...]:
        return tuple(step for step in self.steps if step.status == "not checked")


class ParityFile(_Record, frozen=True):
    """parity.json."""

    schema_version: int
    bundle: str
    device: str
    golden_device: str
    steps: tuple[Step, ...]
    graphs: tuple[GraphParity, ...]
    answer: AnswerParity | None
    placements: tuple[GraphPlacement, ...]


class LatencyFile(_Record, frozen=True):
    """latency.json."""

    schema_version: int
    bundle: str
    device: str
    graphs: tuple[GraphLatency, ...]
    answers: TimedAnswers | None
    twin: Twin | None


def verify(path: str | os.PathLike[str], *, threads: int | None = None, progress: Progress | None = None) -> Verdict:
    """Checks hashes, preprocessing and parity of a bundle from disk, without writing anything.

    A result that differs is a Verdict that did not pass; a bundle that cannot be trusted is a BundleError. `threads`
    None means the cores of the machine, at most 4; `progress` is told what is being done. ONNX bundles need no torch.
    """
    bundle = read_bundle(Path(path))
    return _Check(bundle, threads=threads, progress=progress).verdict()


def check_bundle(
    path: Path,
    *,
    twin: Path | None = None,
    warmup: int = 2,
    runs: int = 10,
    threads: int | None = None,
    out_dir: Path | None = None,
    progress: Progress | None = None,
) -> Verdict:
    """Does what `verify` does, measures too, and writes parity.json, latency.json, report.md and report.html.

    They go into the bundle, which must not be finished yet, or into `out_dir`. `twin` is the unpruned twin's folder.
    """
    bundle = read_bundle(path)
    listed = [name for name in REPORT_FILES if name in bundle.manifest.files]
    if out_dir is None and listed:
        raise BundleError(
            f"{path} is finished and already holds {', '.join(listed)}; give another folder for new reports, "
            "or use `pruneport verify`, which writes nothing"
        )
    check = _Check(bundle, threads=threads, progress=progress)
    check.measure(read_bundle(twin) if twin is not None else None, warmup=warmup, runs=runs)
    verdict = check.verdict()
    target = bundle.path if out_dir is None else out_dir
    try:
        target.mkdir(parents=True, exist_ok=True)
        _write_json(target / "parity.json", _parity_file(bundle, verdict))
        _write_json(target / "latency.json", _latency_file(verdict))
        write_reports(bundle, verdict, target)
    except OSError as err:
        raise OutputError(f"the reports cannot be written to {target}: {err.strerror or err}") from err
    return verdict


class _Check:
    """One walk over a bundle: opens each graph once, compares it, and times it if asked to."""

    def __init__(self, bundle: Bundle, *, threads: int | None, progress: Progress | None) -> None:
        self.bundle = bundle
        self.threads = threads
        self.say = progress or (lambda message: None)
        self.steps: list[Step] = []
        self.graphs: list[GraphParity] = []
        self.placements: list[GraphPlacement] = []
        self.latency: list[GraphLatency] = []
        self.answer: AnswerParity | None = None
        self.answers: TimedAnswers | None = None
        self.twin: Twin | None = None
        self._timing: tuple[Bundle | None, int, int] | None = None

    def measure(self, twin: Bundle | None, *, warmup: int, runs: int) -> None:
        """Asks for times as well."""
        self._timing = (twin, warmup, runs)

    def verdict(self) -> Verdict:
        """Walks, and gives what was found."""
        self.say("hashing the files")
        self.bundle.check_files()
        count, size_mb = len(self.bundle.manifest.files), self.bundle.size_bytes / 1e6
        self._passed("files", f"{plural(count, 'file')}, {size_mb:.1f} MB, every hash as in the manifest")
        golden = self.bundle.golden()
        self._check_preprocessing(golden)
        for graph in self.bundle.manifest.graphs:
            self._check_graph(graph, golden)
        if self.bundle.manifest.text is not None or self.bundle.manifest.ready_for is not None:
            self._check_answer(golden)
        return Verdict(
            bundle=self.bundle.manifest.name,
            device=device_name(),
            steps=tuple(self.steps),
            graphs=tuple(self.graphs),
            answer=self.answer,
            placements=tuple(self.placements),
            latency=tuple(self.latency),
            answers=self.answers,
            twin=self.twin,
        )

    def _passed(self, name: str, detail: str) -> None:
        self.steps.append(Step(name=name, status="passed", detail=detail))

    def _failed(self, name: str, detail: str) -> None:
        # During an export the bundle lies in a temporary folder, whose name means nothing in a report.
        inside = detail.replace(f"{self.bundle.path}{os.sep}", "")
        self.steps.append(Step(name=name, status="failed", detail=inside))

    def _not_checked(self, name: str, detail: str, remedy: str) -> None:
        self.steps.append(Step(name=name, status="not checked", detail=detail, remedy=remedy))

    def _check_preprocessing(self, golden: dict[str, np.ndarray]) -> None:
        name = "preprocessing"
        pixels = next((array for key, array in golden.items() if key.endswith(f".in.{_PIXELS}")), None)
        if pixels is None or "photo" not in golden:
            self._not_checked(name, "the golden holds no photo with its pixel_values", "export again with a photo")
            return
        image = self.bundle.manifest.image
        try:
            ours = preprocess(golden["photo"], image)
        except ImageError as err:
            self._failed(name, str(err))
            return
        if ours.shape != pixels.shape:
            self._failed(name, f"gives {list(ours.shape)}, the golden has {list(pixels.shape)}")
            return
        to_grey = np.asarray(image.std, np.float64).reshape(1, 3, 1, 1) / image.rescale
        levels = float(np.abs((ours.astype(np.float64) - pixels) * to_grey).max())
        detail = f"photo to {_PIXELS} within {levels:.2g} grey levels of the golden (at most {_MOST_GREY_LEVELS:g})"
        # Written so that a NaN in the golden fails.
        (self._passed if levels <= _MOST_GREY_LEVELS * 1.001 else self._failed)(name, detail)

    def _check_graph(self, graph: GraphInfo, golden: dict[str, np.ndarray]) -> None:
        name = f"parity of {graph.name}"
        if any(info.dynamic for info in graph.inputs):
            self._check_open(graph)
            return
        try:
            inputs = golden_inputs(graph, golden)
        except KeyError as err:
            self._not_checked(name, f"the golden lacks {err.args[0]}", "export again")
            return
        self.say(f"checking {graph.name} in {graph.engine}")
        with self._engine_errors(name, graph), open_session(self.bundle, graph.name, threads=self.threads) as session:
            self._compare(session, inputs, golden)
            placement = self._check_placement(session)
            if placement.emulated or placement.stand_in or not placement.executed:
                self._timing = None
            if self._timing is not None:
                twin, warmup, runs = self._timing
                self._time(session, inputs, twin, warmup=warmup, runs=runs)

    @contextmanager
    def _engine_errors(self, name: str, graph: GraphInfo | None = None) -> Iterator[None]:
        """Makes a step of what the engine refuses: not checked where it is missing, else failed.

        Where the file itself tells who would run `graph`, that is held against the manifest all the same.
        """
        try:
            yield
        except EngineMissingError as err:
            what, _, remedy = str(err).rpartition("; ")
            self._not_checked(name, what, remedy)
            if graph is not None and err.placement is not None:
                self._judge_placement(graph, err.placement)
        except EngineError as err:
            self._failed(name, str(err))

    def _check_open(self, graph: GraphInfo) -> None:
        """A graph that takes any number of tokens has no outputs of its own to compare: the answer will tell."""
        with (
            self._engine_errors(f"delegates of {graph.name}"),
            open_session(self.bundle, graph.name, threads=self.threads) as session,
        ):
            self._check_placement(session)

    def _check_answer(self, golden: dict[str, np.ndarray]) -> None:
        """The sample question end to end, as a phone asks it; and how long that takes."""
        name = "answer"
        pixels = golden.get(f"{VISION_ENCODER}.in.{_PIXELS}")
        if pixels is None:
            self._not_checked(name, "the golden holds no pixel_values", "export again")
            return
        self.say("answering the sample question")
        with self._engine_errors(name), ExitStack() as stack:
            graphs = stack.enter_context(open_graphs(self.bundle, threads=self.threads))
            answers = None if self.bundle.manifest.text is None else start_answers(self.bundle, graphs)
            if answers is not None:
                self._check_cache(answers)
            missing = [key for key in _ANSWER if key not in golden]
            if not missing:
                self._compare_answer(graphs, answers, pixels, golden)
            elif len(missing) < len(_ANSWER):
                self._not_checked(name, f"the golden lacks {', '.join(missing)}", "export again")
            else:
                remedy = "export on a machine whose memory holds the decoder in float32 three times"
                self._not_checked(name, "the desktop could not hold the decoder to answer with", remedy)
            if answers is None:
                return
            question = golden.get("answer.question", golden[f"{TOKEN_EMBEDDING}.in.ids"][0, :16])
            if self._timing is not None and all(placed.executed for placed in self.placements):
                self._time_answers(stack, graphs, answers, pixels, question.tolist())

    def _check_cache(self, answers: Answers) -> None:
        """The bytes that the KV cache takes, against the sum on paper."""
        manifest = self.bundle.manifest
        prune, text = manifest.prune, manifest.text
        assert text is not None
        decoder = self.bundle.graph(TEXT_DECODER)
        _, heads, _, width = next(info for info in decoder.cache if info.name == "past_key_0").shape
        number = next(info for info in decoder.cache if info.name == "past_key_0").numpy_dtype.itemsize
        layers = sum(info.name.startswith("past_key_") for info in decoder.cache)
        prefix = text.first_position - prune.image_tokens
        seen = prefix + prune.image_tokens + text.tokens, prefix + prune.keep + text.tokens
        entries = prune.cut * seen[0] + (layers - prune.cut) * seen[1]
        paper = 2 * entries * heads * width * number
        rows = f"{prune.cut} x {seen[0]} + {layers - prune.cut} x {seen[1]}"
        on_paper = f"2 x ({rows}) entries x {heads} heads x {width} x {number} bytes = {paper}"
        detail = f"{answers.cache_bytes} bytes; on paper {on_paper}"
        (self._passed if answers.cache_bytes == paper else self._failed)("KV cache", detail)

    def _compare_answer(
        self,
        graphs: dict[str, Session],
        answers: Answers | None,
        pixels: np.ndarray,
        golden: dict[str, np.ndarray],
    ) -> None:
        expected, question = golden["answer.ids"], golden["answer.question"].tolist()
        if answers is None:
            got = np.asarray([*islice(greedy_tokens(self.bundle, graphs, pixels, question), len(expected))])
        else:
            photo = answers.see(pixels)
            tokens = answers.answer(photo, question, max_new_tokens=len(expected), past_end=True)
            got = np.asarray([token.id for token in tokens])
        bounds = [bound_for(self.bundle.manifest, graph.name) for graph in self.bundle.manifest.graphs]
        # Where a near tie fell the other way, the desktop answered about another image.
        otherwise = any(graph.near_ties or (graph.kept is not None and graph.kept.near_tie) for graph in self.graphs)
        exact = not otherwise and all(bound.least_overlap >= 1 for bound in bounds)
        self.answer = compare_answer(expected, got, margin=golden["answer.margin"], exact=exact)
        detail = f"{self.answer.same} of {len(expected)} greedy tokens as on the desktop"
        where = self.answer.first_divergence
        if where is not None:
            detail += f", the first different one at {where.step} (the desktop's logit led by {where.margin:.1e})"
            if self.answer.passed:
                detail += "; reported, not judged"
        (self._passed if self.answer.passed else self._failed)("answer", detail)

    def _time_answers(
        self,
        stack: ExitStack,
        graphs: dict[str, Session],
        answers: Answers,
        pixels: np.ndarray,
        question: list[int],
    ) -> None:
        assert self._timing is not None
        twin, _, runs = self._timing
        self.say("timing answers" + (" in turns with the twin" if twin else ""))
        timers = [AnswerTimer(answers, pixels, question, new_tokens=_TIMED_TOKENS)]
        other = None
        if twin is not None and not _why_no_twin(self.bundle, twin, TEXT_DECODER):
            other = stack.enter_context(open_graphs(twin, threads=self.threads))
            timers.append(AnswerTimer(start_answers(twin, other), pixels, question, new_tokens=_TIMED_TOKENS))
        measure_answers(timers, runs=min(runs, 5))
        shown = next(iter(graphs.values()))
        ours, *theirs = [timer.latency(threads=shown.threads, engine=shown.engine) for timer in timers]
        self.answers = TimedAnswers(
            bundle=ours,
            twin=theirs[0] if theirs else None,
            ratio=timers[0].ratio(timers[1]) if theirs else None,
        )

    def _compare(self, session: Session, inputs: dict[str, np.ndarray], golden: dict[str, np.ndarray]) -> None:
        graph, prune = session.graph, self.bundle.manifest.prune
        before = {info.name: inputs[info.name].copy() for info in graph.states}
        got = session.run(inputs)
        if graph.states:
            graph, golden, written = self._states(graph, before, inputs, golden)
            got |= written
        result = graph_parity(
            self.bundle.manifest,
            graph,
            golden,
            got,
            engine=session.engine,
            accumulator_bits=session.placement().accumulator_bits,
        )
        self.graphs.append(result)
        bad = [tensor.name for tensor in result.tensors if not tensor.passed]
        worst = max((tensor.rel for tensor in result.tensors if tensor.rel is not None), default=0.0)
        detail = f"{plural(len(result.tensors), 'output')} against the {self.bundle.manifest.golden.device} golden"
        if bad:
            notes = "".join(f"; {tensor.name}: {tensor.note}" for tensor in result.tensors if tensor.note)
            outside = f"{', '.join(bad)} outside the bound of {result.bound.precision}"
            self._failed(f"parity of {graph.name}", f"{outside}{notes}{_ties(result)}")
        else:
            self._passed(f"parity of {graph.name}", f"{detail}, worst relative error {worst:.1e}{_ties(result)}")
        kept = result.kept
        if kept is None:
            return
        if kept.passed and kept.got_count == prune.keep:
            how = "the same ones as on the desktop" if kept.exact else f"overlap {kept.overlap:.1%} with the desktop"
            if kept.near_tie:
                how += "; a choice that float32 cannot tell from the desktop's"
            self._passed("kept tokens", f"{prune.image_tokens} -> {kept.got_count} image tokens, {how}")
        else:
            self._failed("kept tokens", _why_not_kept(result, prune.keep))

    def _states(
        self,
        graph: GraphInfo,
        before: dict[str, np.ndarray],
        after: dict[str, np.ndarray],
        golden: dict[str, np.ndarray],
    ) -> tuple[GraphInfo, dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What a graph wrote into its states, as outputs like the golden's; a step of whether it wrote nothing else."""
        outputs = {info.name: info for info in graph.outputs}
        wanted, written, touched = dict(golden), {}, []
        for info in graph.states:
            part = info.name.removeprefix("past_")
            key = f"{graph.name}.out.{part}"
            wanted.setdefault(key, golden.get(f"{VISION_ENCODER}.out.{part}", np.zeros(0)))
            start = sum(golden[known].shape[2] for known in _filled(graph.name, part, golden))
            end = start + wanted[key].shape[2]
            written[part] = after[info.name][:, :, start:end]
            outputs[part] = msgspec.structs.replace(info, name=part, shape=written[part].shape)
            rest = [(array[:, :, :start], array[:, :, end:]) for array in (before[info.name], after[info.name])]
            if not all(np.array_equal(a, b) for a, b in zip(*rest, strict=True)):
                touched.append(info.name)
        name = f"states of {graph.name}"
        if touched:
            self._failed(name, f"{', '.join(touched)} changed beside the entries of the new tokens")
        else:
            self._passed(name, f"{plural(len(graph.states), 'state')}, nothing changed but the new tokens' entries")
        return msgspec.structs.replace(graph, outputs=tuple(outputs.values())), wanted, written

    def _check_placement(self, session: Session) -> Placement:
        graph, placement = session.graph, session.placement()
        self.placements.append(
            GraphPlacement(
                graph=graph.name,
                delegates=placement.delegates,
                outside=placement.outside,
                source=placement.source,
                executed=placement.executed,
            )
        )
        self._judge_placement(graph, placement)
        return placement

    def _judge_placement(self, graph: GraphInfo, placement: Placement) -> None:
        """A step of whether the delegates take what the manifest promises."""
        name = f"delegates of {graph.name}"
        if graph.name in (TOKEN_EMBEDDING, EMBED_TOKENS) and not placement.delegates:
            self._passed(name, "none, and none is needed: it looks rows up in a table")
            return
        promised = sum(coverage.partitions for coverage in graph.coverage)
        calls, outside = sum(placement.delegates.values()), sum(placement.outside.values())
        if not placement.executed and not placement.delegates:
            self._passed(name, f"{plural(outside, 'operator')} in one program ({placement.source})")
        elif graph.engine == "onnxruntime" and all(coverage.delegate == CPU for coverage in graph.coverage):
            # No delegate was promised; what can be said is who ran the nodes.
            where = f"{plural(outside, 'node')} on the CPU provider, {plural(calls, 'part')} elsewhere"
            self._passed(name, f"{where} ({placement.source})")
        elif placement.stand_in:
            self._not_checked(name, placement.stand_in, "run the bundle on an Android phone")
        elif calls == 0:
            self._failed(name, f"no delegate took anything: the plain runtime runs all {outside} operators")
        elif graph.engine == "onnxruntime" and outside > sum(coverage.outside_nodes for coverage in graph.coverage):
            self._failed(name, f"the CPU runs {plural(outside, 'node')} that the manifest promises to a delegate")
        elif promised != calls:
            promise = f"the manifest says {plural(promised, 'partition')}"
            self._failed(name, f"{promise}, the program makes {plural(calls, 'delegate call')}")
        else:
            parts = ", ".join(f"{key} in {plural(count, 'partition')}" for key, count in placement.delegates.items())
            how = f"{placement.source}; emulated, so not timed" if placement.emulated else placement.source
            self._passed(name, f"{parts}, {plural(outside, 'operator')} outside ({how})")

    def _time(
        self, session: Session, inputs: dict[str, np.ndarray], twin: Bundle | None, *, warmup: int, runs: int
    ) -> None:
        graph = session.graph.name
        self.say(f"timing {graph}: {runs} runs" + (" in turns with its twin" if twin else ""))
        reason = _why_no_twin(self.bundle, twin, graph)
        if twin is None or reason:
            self.latency.append(GraphLatency(graph=graph, bundle=measure(session, inputs, warmup=warmup, runs=runs)))
            if reason:
                self._not_checked("twin", reason, "export the twin (--keep all) with the same settings")
            return
        # Each on its own inputs: behind the cut the twin's are longer.
        try:
            with open_session(twin, graph, threads=session.threads) as other:
                pair = measure_pair(
                    session, inputs, other, golden_inputs(other.graph, twin.golden()), warmup=warmup, runs=runs
                )
        except EngineError as err:
            self.latency.append(GraphLatency(graph=graph, bundle=measure(session, inputs, warmup=warmup, runs=runs)))
            self._failed("twin", str(err))
            return
        self.latency.append(GraphLatency(graph=graph, bundle=pair.bundle, twin=pair.twin, ratio=pair.ratio))
        self.twin = _twin(twin)
        self._passed("twin", f"{graph} takes {pair.ratio.median:.3f} of its twin's time, {runs} turns")


def _twin(twin: Bundle) -> Twin:
    prune = twin.manifest.prune
    handed_on = next((graph for graph in twin.manifest.graphs if graph.name == VISION_ENCODER), None)
    return Twin(
        name=twin.manifest.name,
        image_tokens=prune.keep,
        size_bytes=twin.size_bytes,
        handed_on_bytes=sum(info.size_bytes for info in handed_on.outputs) if handed_on else 0,
    )


def golden_inputs(graph: GraphInfo, golden: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The golden's inputs of a graph, in the dtypes that it takes; KeyError names a tensor that is not there.

    An input that is another graph's output is stored once, as that; a cache is made of what the graphs before left.
    """
    inputs = {}
    for info in (*graph.inputs, *graph.states):
        name = info.name
        if name.startswith("past_"):
            array = np.zeros(info.shape, info.numpy_dtype)
            start = 0
            for key in _filled(graph.name, name.removeprefix("past_"), golden):
                end = start + golden[key].shape[2]
                array[:, :, start:end] = golden[key]
                start = end
        else:
            key = f"{graph.name}.in.{name}"
            fed = (
                f"{VISION_ENCODER}.out.{name}"
                if graph.name == IMAGE_PREFILL
                else _FED_BY.get(f"{graph.name}.{name}", key)
            )
            array = golden[key if key in golden else fed]
        inputs[name] = array.astype(info.numpy_dtype, copy=False)
    return inputs


def _filled(graph: str, part: str, golden: dict[str, np.ndarray]) -> list[str]:
    """The golden's tensors that fill a layer's cache, one behind the other, before `graph` runs."""
    if graph == IMAGE_PREFILL:
        return []
    image = f"{VISION_ENCODER}.out.{part}"
    filled = [image if image in golden else f"{IMAGE_PREFILL}.out.{part}"]
    return [*filled, f"{TEXT_PREFILL}.out.{part}"] if graph == TEXT_DECODER else filled


def _ties(result: GraphParity) -> str:
    """How many near ties fell otherwise than on the desktop, or nothing."""
    count = len(result.near_ties)
    return f"; {plural(count, 'near tie')} of recovery decided otherwise, see the report" if count else ""


def _why_not_kept(result: GraphParity, keep: int) -> str:
    kept = result.kept
    assert kept is not None
    if kept.got_count != keep:
        return f"{kept.got_count} tokens came out, keep={keep} was asked for"
    if not kept.ascending:
        return "the kept tokens are not strictly ascending"
    text = f"overlap {kept.overlap:.1%} with the desktop (needed: {kept.bound})"
    if kept.first_divergence is not None:
        where = kept.first_divergence
        near = "" if where.margin is None else f", whose margin was {where.margin:.1e}"
        text += f"; first divergence at choice {where.step}, token {where.index}{near}"
    return text


def _why_no_twin(bundle: Bundle, twin: Bundle | None, graph: str) -> str:
    """Why a bundle cannot serve as the twin, or nothing."""
    if twin is None:
        return ""
    ours, theirs = bundle.manifest, twin.manifest
    if theirs.prune.pruned:
        return f"{theirs.name} is pruned itself"
    for what, a, b in (
        ("model", ours.model, theirs.model),
        ("weights", ours.weights, theirs.weights),
        ("target", ours.target, theirs.target),
        ("cut", ours.prune.cut, theirs.prune.cut),
        ("layout", ours.ready_for, theirs.ready_for),
    ):
        if a != b:
            return f"{theirs.name} differs in its {what}"
    if graph not in {info.name for info in theirs.graphs}:
        return f"{theirs.name} has no graph {graph}"
    return ""


def _parity_file(bundle: Bundle, verdict: Verdict) -> ParityFile:
    return ParityFile(
        schema_version=SCHEMA_VERSION,
        bundle=verdict.bundle,
        device=verdict.device,
        golden_device=bundle.manifest.golden.device,
        steps=verdict.steps,
        graphs=verdict.graphs,
        answer=verdict.answer,
        placements=verdict.placements,
    )


def _latency_file(verdict: Verdict) -> LatencyFile:
    return LatencyFile(
        schema_version=SCHEMA_VERSION,
        bundle=verdict.bundle,
        device=verdict.device,
        graphs=verdict.latency,
        answers=verdict.answers,
        twin=verdict.twin,
    )


def _write_json(path: Path, record: msgspec.Struct) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
