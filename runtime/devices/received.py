"""From what a device sent back to what the judge reads: another bundle's findings are refused, gaps are named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from runtime.bundle import Bundle, GraphInfo
from runtime.devices.findings import (
    AnswerFinding,
    Findings,
    GraphFinding,
    GraphLatency,
    TimedAnswers,
    Trouble,
    Twin,
)
from runtime.devices.wire import AnswerFound, AnswerRun, FindingsFile, Received, StepFound, TroubleFound
from runtime.engines.program import pick_method, placement_of, read_program
from runtime.errors import FindingsError
from runtime.golden import PHOTO, PIXELS, graph_inputs, step_label, steps
from runtime.latency import AnswerLatency, AnswerRatio, Latency, Ratio, Spread
from runtime.placement import Placement
from runtime.text_graphs import cache_on_paper

# Times of these are those of what they are called; the others imitate a device.
MEASURED = ("phone", "desktop")


def findings_of(bundle: Bundle, received: Received, *, twin: Bundle | None = None) -> Findings:
    """What a device told about a bundle, at the keep that it ran, as `runtime.check` judges it.

    Steps that it did not run are named as not run; times of emulated devices are left out. Raises FindingsError for
    findings of another bundle, or of another twin.
    """
    file = received.file
    view = next((view for view in bundle.views if view.identity == file.bundle), None)
    if view is None:
        raise FindingsError(
            f"the findings are of {file.bundle!r}, not of {bundle.at().identity!r}; give the bundle that the device ran"
        )
    if twin is not None and file.twin not in (None, *(other.identity for other in twin.views)):
        raise FindingsError(f"the findings compare with {file.twin!r}, not with {twin.at().identity!r}")
    return _Reading(view, received, twin).findings()


def judged_bundle(bundle: Bundle, received: Received) -> Bundle:
    """The view of a bundle, at one keep, that findings are of; the bundle itself where none is."""
    return next((view for view in bundle.views if view.identity == received.file.bundle), bundle)


def device_words(file: FindingsFile) -> str:
    """A device in one line, with the word that its figures must not be read without."""
    device = file.device
    soc = f"{device.soc}, " if device.soc else ""
    return f"{device.name} ({device.kind}, {soc}{device.os}, {device.abi})"


class _Reading:
    """One walk over received findings."""

    def __init__(self, bundle: Bundle, received: Received, twin: Bundle | None) -> None:
        self._bundle, self._file, self._tensors = bundle, received.file, received.tensors
        self._twin, self._golden = twin, bundle.golden()
        self._engine = f"{self._file.runner.engine} {self._file.runner.engine_version}"
        self._timed = self._file.device.kind in MEASURED

    def findings(self) -> Findings:
        manifest, file = self._bundle.manifest, self._file
        pixels = self._tensors.get(PIXELS)
        refused = file.photo_refused
        if pixels is None and not refused and PHOTO in self._golden:
            refused = "the device sent no pixel_values of the photo"
        found = {(step.graph, step.step): step for step in file.steps}
        graphs = tuple(
            self._step(graph, step, found.get((graph.name, step)))
            for graph in manifest.graphs
            for step in steps(graph, manifest.layout)
        )
        return Findings(
            device=device_words(file),
            pixel_values=pixels,
            photo_refused=refused,
            graphs=graphs,
            answer=self._answer() if manifest.text is not None else None,
            twin=self._twin_words(),
        )

    def _step(self, graph: GraphInfo, step: str, found: StepFound | None) -> GraphFinding:
        try:
            inputs = graph_inputs(graph, self._golden, step)
        except KeyError:
            return GraphFinding(graph=graph.name, step=step)
        if found is None or found.trouble is not None:
            trouble = _not_run(self._file, found.trouble if found else None)
            return GraphFinding(graph=graph.name, step=step, engine=self._engine, trouble=trouble)
        key = f"{graph.name}/{step}"
        outputs, missing = {}, []
        for info in graph.outputs:
            array = self._tensors.get(f"out/{key}/{info.name}")
            if array is None or not info.fits(str(array.dtype), array.shape):
                what = "nothing" if array is None else f"{array.dtype}{list(array.shape)}"
                missing.append(f"{what} for {info}")
            else:
                outputs[info.name] = array
        states = {}
        for info in graph.states:
            array = self._tensors.get(f"state/{key}/{info.name}")
            if array is None or array.shape != inputs[info.name].shape:
                missing.append(f"no such state as {info}")
            else:
                states[info.name] = array
        if missing:
            trouble = Trouble(message=f"the device sent {', '.join(missing)}")
            return GraphFinding(graph=graph.name, step=step, engine=self._engine, trouble=trouble)
        return GraphFinding(
            graph=graph.name,
            step=step,
            engine=self._engine,
            outputs=outputs,
            states=states,
            placement=self._placement(graph, found),
            latency=self._latency(step_label(graph.name, step), found),
        )

    def _placement(self, graph: GraphInfo, found: StepFound) -> Placement | None:
        emulated = not self._timed
        bits = self._file.accumulator_bits or 32
        if found.delegates is not None:
            return Placement(
                delegates=dict(found.delegates),
                outside=dict(found.outside or {}),
                source="the engine on the device",
                emulated=emulated,
                accumulator_bits=bits,
            )
        if graph.engine != "executorch":
            return None
        file = self._bundle.file(graph.file)
        method = pick_method(self._bundle.stored(graph.name), read_program(file), file)
        return replace(placement_of(method), emulated=emulated, accumulator_bits=bits)

    def _latency(self, label: str, found: StepFound) -> GraphLatency | None:
        if not found.run_ms or not self._timed:
            return None
        latency = Latency.of(
            found.run_ms,
            threads=self._file.threads,
            device=device_words(self._file),
            engine=self._engine,
            load_ms=sum(found.load_ms),
            peak_rss_bytes=self._file.memory.peak_rss_bytes if self._file.memory else 0,
        )
        return GraphLatency(graph=label, bundle=latency)

    def _answer(self) -> AnswerFinding:
        found = self._file.answer
        if found is None or found.trouble is not None:
            return AnswerFinding(trouble=_not_run(self._file, found.trouble if found else None))
        return AnswerFinding(
            ids=np.asarray(found.ids, np.int64) if found.ids else None,
            cache_bytes=found.cache_bytes,
            times=self._times(found) if self._timed else None,
        )

    def _times(self, found: AnswerFound) -> TimedAnswers | None:
        ours, theirs = ([run for run in found.runs if run.twin is twin and not run.warmup] for twin in (False, True))
        if not ours:
            return None
        return TimedAnswers(
            bundle=self._answers(found, ours, found.cache_bytes or 0),
            twin=self._answers(found, theirs, self._twin_cache_bytes()) if theirs else None,
            ratio=_ratios(ours, theirs) if theirs else None,
        )

    def _twin_cache_bytes(self) -> int:
        return cache_on_paper(self._twin.at().manifest)[0] if self._twin is not None else 0

    def _answers(self, found: AnswerFound, runs: list[AnswerRun], cache_bytes: int) -> AnswerLatency:
        tokens = [ms for run in runs for ms in run.token_ms]
        return AnswerLatency(
            image_ready=Spread.of([run.image_ready_ms for run in runs]),
            ttft=Spread.of([run.ttft_question_ms for run in runs]),
            token=Spread.of(tokens or [0.0]),
            question_tokens=found.question_tokens,
            new_tokens=1 + len(runs[0].token_ms),
            kv_cache_bytes=cache_bytes,
            runs=len(runs),
            threads=self._file.threads,
            device=device_words(self._file),
            engine=self._engine,
        )

    def _twin_words(self) -> Twin | None:
        if self._twin is None or self._file.twin is None:
            return None
        return Twin.of(self._twin.at())


def _not_run(file: FindingsFile, trouble: TroubleFound | None) -> Trouble:
    trouble = trouble or file.trouble
    if trouble is None:
        return Trouble(message="the device did not run it; run the whole job", missing=True)
    message = trouble.message or "the device gave no reason"
    if trouble.missing and "; " not in message:
        message += "; run it on a device that can"
    return Trouble(message=message, missing=trouble.missing)


def _ratios(ours: list[AnswerRun], theirs: list[AnswerRun]) -> AnswerRatio:
    """Of neighbouring runs; where a run was lost, of those that have a neighbour."""
    pairs = list(zip(ours, theirs, strict=False))

    def ratio(times: list[tuple[float, float]]) -> Ratio:
        return Ratio.of([a / max(b, 1e-9) for a, b in times])

    tokens = [pair for a, b in pairs for pair in zip(a.token_ms, b.token_ms, strict=False)]
    return AnswerRatio(
        image_ready=ratio([(a.image_ready_ms, b.image_ready_ms) for a, b in pairs]),
        ttft=ratio([(a.ttft_question_ms, b.ttft_question_ms) for a, b in pairs]),
        token=ratio(tokens or [(0.0, 1.0)]),
    )
