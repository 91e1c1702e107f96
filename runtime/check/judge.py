"""The judge: what a device told, against what the desktop computed. It opens no engine and writes nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec
import numpy as np

from runtime.bundle import Bundle, GraphInfo
from runtime.check.parity import AnswerParity, GraphParity, bound_for, compare_answer, graph_parity
from runtime.check.verdict import GraphPlacement, Step, Verdict
from runtime.devices.findings import AnswerFinding, Findings, GraphFinding, Trouble
from runtime.engines.onnxruntime import CPU
from runtime.golden import (
    ANSWER,
    ANSWER_MARGIN,
    PIXELS,
    QUESTION,
    cache_parts,
    graph_inputs,
    input_key,
    output_key,
    step_label,
)
from runtime.names import plural
from runtime.placement import Placement
from runtime.ready_made import EMBED_TOKENS
from runtime.text_graphs import TOKEN_EMBEDDING, VISION_ENCODER, cache_on_paper

# Pillow's resize may round one grey level apart between builds; a wrong crop or channel order is dozens off.
_MOST_GREY_LEVELS = 1.0
_AGAIN = "export again"


def check(bundle: Bundle, findings: Findings) -> Verdict:
    """What held, what failed and what went unchecked of what a device told about a bundle.

    Raises BundleError for a golden that contradicts itself or the manifest.
    """
    return _Judge(bundle, findings).verdict()


class _Judge:
    """The steps of one check, in the order in which a report shows them."""

    def __init__(self, bundle: Bundle, findings: Findings) -> None:
        self._bundle, self._findings = bundle, findings
        self._golden = bundle.golden()
        self._steps: list[Step] = []
        self._graphs: list[GraphParity] = []
        self._answer: AnswerParity | None = None
        self._placed: set[str] = set()

    def verdict(self) -> Verdict:
        count, size_mb = len(self._bundle.manifest.files), self._bundle.size_bytes / 1e6
        self._passed("files", f"{plural(count, 'file')}, {size_mb:.1f} MB, every hash as in the manifest")
        self._judge_preprocessing()
        for found in self._findings.graphs:
            self._judge_graph(self._bundle.graph(found.graph), found)
        if self._findings.answer is not None:
            self._judge_answer(self._findings.answer)
        return Verdict(
            bundle=self._bundle.manifest.name,
            device=self._findings.device,
            steps=tuple(self._steps),
            graphs=tuple(self._graphs),
            answer=self._answer,
            placements=tuple(
                GraphPlacement(
                    graph=found.graph,
                    delegates=found.placement.delegates,
                    outside=found.placement.outside,
                    source=found.placement.source,
                    executed=found.placement.executed,
                )
                for found in {found.graph: found for found in self._findings.graphs}.values()
                if found.placement is not None and found.opened
            ),
            latency=tuple(found.latency for found in self._findings.graphs if found.latency is not None),
            answers=self._findings.answer.times if self._findings.answer else None,
            twin=self._findings.twin,
        )

    def _passed(self, name: str, detail: str) -> None:
        self._steps.append(Step(name=name, status="passed", detail=detail))

    def _failed(self, name: str, detail: str) -> None:
        # During an export the bundle lies in a temporary folder, whose name means nothing in a report.
        inside = detail.replace(f"{self._bundle.path}{os.sep}", "")
        self._steps.append(Step(name=name, status="failed", detail=inside))

    def _not_checked(self, name: str, detail: str, remedy: str) -> None:
        self._steps.append(Step(name=name, status="not checked", detail=detail, remedy=remedy))

    def _judge_preprocessing(self) -> None:
        name = "preprocessing"
        wanted = next((array for key, array in self._golden.items() if key.endswith(f".in.{PIXELS}")), None)
        got = self._findings.pixel_values
        if self._findings.photo_refused:
            self._failed(name, self._findings.photo_refused)
        elif wanted is None or got is None:
            self._not_checked(name, "the golden holds no photo with its pixel_values", "export again with a photo")
        elif got.shape != wanted.shape:
            self._failed(name, f"gives {list(got.shape)}, the golden has {list(wanted.shape)}")
        else:
            image = self._bundle.manifest.image
            to_grey = np.asarray(image.std, np.float64).reshape(1, 3, 1, 1) / image.rescale
            levels = float(np.abs((got.astype(np.float64) - wanted) * to_grey).max())
            detail = f"photo to {PIXELS} within {levels:.2g} grey levels of the golden (at most {_MOST_GREY_LEVELS:g})"
            # Written so that a NaN in the golden fails.
            (self._passed if levels <= _MOST_GREY_LEVELS * 1.001 else self._failed)(name, detail)

    def _judge_graph(self, graph: GraphInfo, found: GraphFinding) -> None:
        name = f"parity of {step_label(graph.name, found.step)}" if found.step else f"delegates of {graph.name}"
        if found.step:
            try:
                inputs = graph_inputs(graph, self._golden, found.step)
            except KeyError as err:
                self._not_checked(name, f"the golden lacks {err.args[0]}", _AGAIN)
                return
            if found.outputs is not None:
                self._compare(graph, found, inputs)
        again = graph.name in self._placed
        self._placed.add(graph.name)
        if found.placement is not None and found.opened and not again:
            self._judge_placement(graph, found.placement)
        if found.latency is not None:
            self._judge_twin(found)
        if found.trouble is not None:
            self._trouble(name, found.trouble)
        # Where the file itself tells who would run the graph, that is held against the manifest all the same.
        if found.placement is not None and not found.opened and not again:
            self._judge_placement(graph, found.placement)

    def _trouble(self, name: str, trouble: Trouble) -> None:
        """Makes a step of what was not run: not checked where the engine is missing, else failed."""
        if trouble.missing:
            what, _, remedy = trouble.message.rpartition("; ")
            self._not_checked(name, what, remedy)
        else:
            self._failed(name, trouble.message)

    def _judge_twin(self, found: GraphFinding) -> None:
        trouble, latency = found.twin_trouble, found.latency
        assert latency is not None
        if trouble is not None and trouble.missing:
            self._not_checked("twin", trouble.message, "export the twin (--keep all) with the same settings")
        elif trouble is not None:
            self._failed("twin", trouble.message)
        elif latency.ratio is not None:
            turns = f"{latency.bundle.runs} turns"
            self._passed("twin", f"{latency.graph} takes {latency.ratio.median:.3f} of its twin's time, {turns}")

    def _compare(self, graph: GraphInfo, found: GraphFinding, inputs: Mapping[str, np.ndarray]) -> None:
        assert found.outputs is not None
        golden, got, prune = self._golden, dict(found.outputs), self._bundle.manifest.prune
        if graph.states:
            before = {info.name: inputs[info.name] for info in graph.states}
            graph, golden, written = self._states(graph, found.step, before, found.states)
            got |= written
        result = graph_parity(
            self._bundle.manifest,
            graph,
            golden,
            got,
            step=found.step,
            engine=found.engine,
            accumulator_bits=found.placement.accumulator_bits if found.placement else 32,
        )
        self._graphs.append(result)
        bad = [tensor.name for tensor in result.tensors if not tensor.passed]
        worst = max((tensor.rel for tensor in result.tensors if tensor.rel is not None), default=0.0)
        detail = f"{plural(len(result.tensors), 'output')} against the {self._bundle.manifest.golden.device} golden"
        if bad:
            notes = "".join(f"; {tensor.name}: {tensor.note}" for tensor in result.tensors if tensor.note)
            outside = f"{', '.join(bad)} outside the bound of {result.bound.precision}"
            self._failed(f"parity of {result.graph}", f"{outside}{notes}{_ties(result)}")
        else:
            self._passed(f"parity of {result.graph}", f"{detail}, worst relative error {worst:.1e}{_ties(result)}")
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
        step: str,
        before: Mapping[str, np.ndarray],
        after: Mapping[str, np.ndarray],
    ) -> tuple[GraphInfo, dict[str, np.ndarray], dict[str, np.ndarray]]:
        """What a graph wrote into its states, as outputs like the golden's; a step of whether it wrote nothing else."""
        golden = self._golden
        outputs = {info.name: info for info in graph.outputs}
        wanted, written, touched = dict(golden), {}, []
        for info in graph.states:
            part = info.name.removeprefix("past_")
            key = output_key(step, part)
            wanted.setdefault(key, golden.get(output_key(VISION_ENCODER, part), np.zeros(0)))
            start = sum(golden[known].shape[2] for known in cache_parts(step, part, golden))
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

    def _judge_answer(self, found: AnswerFinding) -> None:
        name, golden = "answer", self._golden
        if input_key(VISION_ENCODER, PIXELS) not in golden:
            self._not_checked(name, "the golden holds no pixel_values", _AGAIN)
            return
        if found.cache_bytes is not None:
            self._judge_cache(found.cache_bytes)
        keys = (QUESTION, ANSWER, ANSWER_MARGIN)
        missing = [key for key in keys if key not in golden]
        if found.ids is not None:
            self._compare_answer(found.ids)
        elif found.trouble is None and len(missing) < len(keys):
            self._not_checked(name, f"the golden lacks {', '.join(missing)}", _AGAIN)
        elif found.trouble is None:
            remedy = "export on a machine whose memory holds the decoder in float32 three times"
            self._not_checked(name, "the desktop could not hold the decoder to answer with", remedy)
        if found.trouble is not None:
            self._trouble(name, found.trouble)

    def _judge_cache(self, cache_bytes: int) -> None:
        """The bytes that the KV cache takes, against the sum on paper."""
        paper, on_paper = cache_on_paper(self._bundle.manifest)
        detail = f"{cache_bytes} bytes; on paper {on_paper}"
        (self._passed if cache_bytes == paper else self._failed)("KV cache", detail)

    def _compare_answer(self, got: np.ndarray) -> None:
        expected, margin = self._golden[ANSWER], self._golden[ANSWER_MARGIN]
        bounds = [bound_for(graph) for graph in self._bundle.manifest.graphs]
        # Where a near tie fell the other way, the desktop answered about another image.
        otherwise = any(graph.near_ties or (graph.kept is not None and graph.kept.near_tie) for graph in self._graphs)
        exact = not otherwise and all(bound.least_overlap >= 1 for bound in bounds)
        answer = compare_answer(expected, got, margin=margin, exact=exact)
        self._answer = answer
        detail = f"{answer.same} of {len(expected)} greedy tokens as on the desktop"
        where = answer.first_divergence
        if where is not None:
            detail += f", the first different one at {where.step} (the desktop's logit led by {where.margin:.1e})"
            if answer.passed:
                detail += "; reported, not judged"
        (self._passed if answer.passed else self._failed)("answer", detail)


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
