"""What devices measured, for people: one page over any number of findings, as HTML, Markdown and CSV.

Figures of phones, of desktops and of emulated devices stand in tables of their own; none is set against another's.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from runtime.bundle import Bundle
from runtime.check.judge import check
from runtime.check.verdict import Verdict
from runtime.devices.received import MEASURED, device_words, findings_of, judged_bundle
from runtime.devices.wire import AnswerRun, Condition, FindingsFile, Received
from runtime.errors import FindingsError, OutputError
from runtime.report import LatencyFile, Table, milliseconds, size_words, templates

PAGES = ("devices.html", "devices.md", "devices.csv")
# A median is slower, or faster, than another where it is so by more than this share and the ranges from p10 to p90 have
# nothing in common.
LEAST_CHANGE = 0.05
LEAST_SAMPLES = 3
# The systems' own words for a device that is not slowed down by heat.
_COOL = frozenset({"none", "nominal", "light", "0", ""})
_HEADS = {
    "phone": "Phones",
    "desktop": "Desktop, measured: says nothing about a phone",
    "emulated": "Emulated: another processor imitates the device; times say nothing about it",
    "simulator": "Simulator: a phone's system on a computer; times say nothing about a phone",
}

RULE = (
    f"A median counts as changed where it differs by more than {LEAST_CHANGE:.0%}, the ranges from p10 to p90 have "
    f"nothing in common, and both have at least {LEAST_SAMPLES} samples."
)


@dataclass(frozen=True)
class Metric:
    """One thing that is measured in milliseconds, by the name that pages use."""

    name: str
    of: Callable[[AnswerRun], Sequence[float]]


METRICS = (
    Metric("preprocessing", lambda run: (run.preprocess_ms,)),
    Metric("vision", lambda run: (run.vision_ms,)),
    Metric("image prefill", lambda run: (run.image_prefill_ms,)),
    Metric("image ready", lambda run: (run.image_ready_ms,)),
    Metric("question prefill", lambda run: (run.question_prefill_ms,)),
    Metric("TTFT from question", lambda run: (run.ttft_question_ms,)),
    Metric("TTFT from photo", lambda run: (run.ttft_photo_ms,)),
    Metric("token", lambda run: run.token_ms),
)
_STARTS = ("first start", "later start")


@dataclass(frozen=True)
class Series:
    """All samples of one metric, in milliseconds."""

    samples: tuple[float, ...]

    @property
    def p10(self) -> float:
        return float(np.percentile(self.samples, 10))

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def p90(self) -> float:
        return float(np.percentile(self.samples, 90))

    def changed_from(self, other: Series) -> bool:
        """Whether the difference is more than noise, by RULE."""
        if min(len(self.samples), len(other.samples)) < LEAST_SAMPLES:
            return False
        apart = self.p10 > other.p90 or self.p90 < other.p10
        return apart and abs(self.median / max(other.median, 1e-9) - 1) > LEAST_CHANGE


@dataclass(frozen=True)
class Measured:
    """One device and one bundle: what was found, what the judge says, and all series by metric."""

    bundle: Bundle
    file: FindingsFile
    verdict: Verdict
    series: dict[str, Series]
    twin: dict[str, Series]

    @property
    def kind(self) -> str:
        return self.file.device.kind

    @property
    def backend(self) -> str:
        """What made the bundle, and for what arithmetic."""
        made = [
            f"{part.backend} {scheme or part.precision}" for part, scheme in self.bundle.manifest.target.parts.values()
        ]
        return " + ".join(dict.fromkeys(made))

    @property
    def keep(self) -> int:
        return self.bundle.manifest.prune.keep

    @property
    def same_as(self) -> tuple[str, ...]:
        """What must be alike in two findings that are compared."""
        return self.file.device.name, self.kind, self.bundle.manifest.model, self.backend, str(self.keep)


def measured(received: Received, references: Sequence[Bundle]) -> Measured:
    """Findings beside the bundle that they are of. Raises FindingsError where none of `references` is that."""
    for reference in references:
        bundle = judged_bundle(reference, received)
        if bundle.identity == received.file.bundle:
            break
    else:
        known = ", ".join(repr(view.identity) for reference in references for view in reference.views)
        raise FindingsError(
            f"the findings are of {received.file.bundle!r}, which is none of the references: {known}; name its bundle "
            "with --reference"
        )
    verdict = check(bundle, findings_of(bundle, received))
    return Measured(bundle, received.file, verdict, *(_series(received.file, twin=twin) for twin in (False, True)))


def _series(file: FindingsFile, *, twin: bool) -> dict[str, Series]:
    found: dict[str, Series] = {}
    runs = [run for run in (file.answer.runs if file.answer else ()) if run.twin is twin and not run.warmup]
    for metric in METRICS:
        samples = tuple(ms for run in runs for ms in metric.of(run))
        if samples:
            found[metric.name] = Series(samples)
    if not twin:
        for name, starts in zip(_STARTS, (file.load.first_ms, file.load.later_ms), strict=True):
            if starts:
                found[name] = Series(starts)
    return found


@dataclass(frozen=True)
class Change:
    """One metric in two findings of the same device, bundle's model, backend and keep."""

    metric: str
    before: Series
    after: Series

    @property
    def regressed(self) -> bool:
        return self.after.changed_from(self.before) and self.after.median > self.before.median

    @property
    def words(self) -> str:
        """Slower, faster, or within noise."""
        if not self.after.changed_from(self.before):
            return "within noise"
        return "slower" if self.regressed else "faster"


def changes(after: Measured, before: Measured) -> tuple[Change, ...]:
    """What changed between two findings. Raises FindingsError where they cannot be compared."""
    if after.same_as != before.same_as:
        what = "; ".join(f"{a!r} and {b!r}" for a, b in zip(after.same_as, before.same_as, strict=True) if a != b)
        raise FindingsError(f"the two findings are of different things ({what}) and cannot be compared")
    if after.kind not in MEASURED:
        raise FindingsError(f"times of an {after.kind} device say nothing and are not compared")
    return tuple(
        Change(name, before.series[name], after.series[name]) for name in after.series if name in before.series
    )


def write_device_report(
    all_measured: Sequence[Measured], out_dir: Path, *, compared: Sequence[tuple[Measured, tuple[Change, ...]]] = ()
) -> Path:
    """Writes devices.html, devices.md and devices.csv; returns the path of the first. Raises OutputError."""
    environment, content = templates(), _content(all_measured, compared)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name in PAGES[:2]:
            text = environment.get_template(f"{name}.j2").render(content)
            (out_dir / name).write_text(text.rstrip() + "\n", encoding="utf-8")
        (out_dir / PAGES[2]).write_text(_csv(all_measured), encoding="utf-8", newline="")
    except OSError as err:
        raise OutputError(f"the report cannot be written to {out_dir}: {err.strerror or err}") from err
    return out_dir / PAGES[0]


def _content(
    all_measured: Sequence[Measured], compared: Sequence[tuple[Measured, tuple[Change, ...]]]
) -> dict[str, Any]:
    kinds = [kind for kind in _HEADS if any(each.kind == kind for each in all_measured)]
    groups = []
    for kind in kinds:
        rows = [each for each in all_measured if each.kind == kind]
        groups.append(
            {
                "kind": kind,
                "head": _HEADS[kind],
                "measured": kind in MEASURED,
                "latency": _latency_table(rows),
                "memory": _memory_table(rows),
                "lines": [_time_line(each) for each in rows if "vision" in each.series],
                "twins": [(_title(each), _twin_table(each)) for each in rows if each.twin],
                "references": [(_title(each), table) for each in rows if (table := _reference_table(each)) is not None],
            }
        )
    return {
        "groups": groups,
        "parity": _parity_table(all_measured),
        "changes": [(_title(each), _change_table(found)) for each, found in compared],
        "rule": RULE,
        "conditions": _condition_table(all_measured),
        "count": len(all_measured),
    }


def _device(each: Measured) -> str:
    """The device's name, with the word that its figures must not be read without."""
    return each.file.device.name if each.kind == "phone" else f"{each.file.device.name} ({each.kind})"


def _title(each: Measured) -> str:
    return f"{_device(each)}, {each.backend}, keep {each.keep}"


def _ms(series: dict[str, Series], name: str) -> str:
    return milliseconds(series[name].median) if name in series else ""


def _spread(series: Series | None) -> str:
    return "" if series is None else f"{milliseconds(series.p10)} to {milliseconds(series.p90)}"


def _latency_table(rows: Sequence[Measured]) -> Table:
    first = ("device", "backend", "keep", "image tokens")
    times = ("image ready", "TTFT from question", "TTFT from photo")
    last = ("its p10 to p90", "tokens/s", "runs", "threads", "flags")
    cells = []
    for each in rows:
        token = each.series.get("token")
        answer = each.file.answer
        before, after = (answer.image_tokens_before, answer.image_tokens_after) if answer else (0, 0)
        cells.append(
            (
                _device(each),
                each.backend,
                str(each.keep),
                f"{before} → {after}",
                *(_ms(each.series, name) for name in times),
                _spread(each.series.get("TTFT from photo")),
                f"{1e3 / token.median:.1f}" if token and token.median else "",
                str(len(each.series["image ready"].samples)) if "image ready" in each.series else "0",
                str(each.file.threads),
                ", ".join(_flags(each.file)) or "none",
            )
        )
    numeric = frozenset({"keep", *times, "tokens/s", "runs", "threads"})
    return Table((*first, *times, *last), tuple(cells), numeric=numeric)


def _memory_table(rows: Sequence[Measured]) -> Table:
    names = ("device", "backend", "keep", *_STARTS, "files", "peak RSS", "kept after closing", "KV cache", "RAM")
    cells = []
    for each in rows:
        memory, answer = each.file.memory, each.file.answer
        cells.append(
            (
                _device(each),
                each.backend,
                str(each.keep),
                *(_ms(each.series, name) for name in _STARTS),
                size_words(each.bundle.size_bytes),
                size_words(memory.peak_rss_bytes) if memory else "",
                size_words(memory.after_close_bytes) if memory and memory.after_close_bytes is not None else "",
                size_words(answer.cache_bytes) if answer and answer.cache_bytes else "",
                size_words(each.file.device.ram_bytes) if each.file.device.ram_bytes else "",
            )
        )
    return Table(names, tuple(cells), numeric=frozenset(names[2:]))


def _twin_table(each: Measured) -> Table:
    rows = []
    for name in (metric.name for metric in METRICS):
        ours, theirs = each.series.get(name), each.twin.get(name)
        if ours is None or theirs is None:
            continue
        share = f"{ours.median / theirs.median:.3f}" if theirs.median else ""
        rows.append(
            (name, milliseconds(ours.median), _spread(ours), milliseconds(theirs.median), _spread(theirs), share)
        )
    columns = ("", "pruned", "p10 to p90", "unpruned twin", "p10 to p90 of the twin", "pruned/twin")
    return Table(columns, tuple(rows), numeric=frozenset(columns[1:]))


def _reference_table(each: Measured) -> Table | None:
    """The device beside the desktop that checked the bundle; None where that timed nothing."""
    name = "latency.json" if not each.bundle.is_view else f"latency-keep{each.keep}.json"
    if name not in each.bundle.manifest.files or each.kind not in MEASURED:
        return None
    try:
        found = msgspec.json.decode(each.bundle.file(name).read_bytes(), type=LatencyFile)
    except msgspec.MsgspecError:
        return None
    if found.answers is None:
        return None
    desktop = found.answers.bundle
    rows = []
    for metric, reference in (
        ("image ready", desktop.image_ready),
        ("TTFT from question", desktop.ttft),
        ("token", desktop.token),
    ):
        if metric in each.series and reference.median_ms:
            ours = each.series[metric].median
            rows.append(
                (metric, milliseconds(ours), milliseconds(reference.median_ms), f"{ours / reference.median_ms:.2f}")
            )
    return Table(
        ("", "device", desktop.device, "device/desktop"),
        tuple(rows),
        numeric=frozenset({"device", desktop.device, "device/desktop"}),
    )


def _parity_table(all_measured: Sequence[Measured]) -> Table:
    rows, marks = [], []
    for each in all_measured:
        tensors = [tensor for graph in each.verdict.graphs for tensor in graph.tensors]
        worst = max((tensor.rel for tensor in tensors if tensor.rel is not None), default=None)
        kept = next((graph.kept for graph in each.verdict.graphs if graph.kept is not None), None)
        answer = each.verdict.answer
        trouble = [step for step in each.verdict.steps if step.status != "passed"]
        rows.append(
            (
                device_words(each.file),
                each.backend,
                str(each.keep),
                each.bundle.manifest.golden.device,
                f"{sum(tensor.passed for tensor in tensors)} of {len(tensors)}",
                "" if worst is None else f"{worst:.1e}",
                "" if kept is None else f"{kept.overlap:.1%}",
                "" if answer is None else f"{answer.same} of {len(each.file.answer.ids) if each.file.answer else 0}",
                "; ".join(f"{step.name}: {step.detail}" for step in trouble[:4]),
            )
        )
        marks.append(each.verdict.outcome)
    columns = ("device", "backend", "keep", "reference", "outputs within bounds", "worst rel", "kept tokens in common")
    return Table((*columns, "answer tokens", "trouble"), tuple(rows), frozenset({"keep"}), tuple(marks))


def _change_table(found: tuple[Change, ...]) -> Table:
    rows, marks = [], []
    for change in found:
        rows.append(
            (
                change.metric,
                milliseconds(change.before.median),
                _spread(change.before),
                milliseconds(change.after.median),
                _spread(change.after),
                f"{change.after.median / max(change.before.median, 1e-9) - 1:+.1%}",
                change.words,
            )
        )
        marks.append("failed" if change.regressed else "passed")
    columns = ("", "before", "p10 to p90 before", "now", "p10 to p90 now", "change", "verdict")
    return Table(columns, tuple(rows), frozenset(columns[1:6]), tuple(marks))


def _flags(file: FindingsFile) -> list[str]:
    """What makes times worth less: heat, a gate that was not passed, saving of power, charging."""
    flags = []
    if file.gate is not None and file.gate.passed is False:
        flags.append("started hot")
    if any(state.thermal is not None and state.thermal.lower() not in _COOL for state in file.conditions):
        flags.append("throttled by heat")
    if any(state.low_power for state in file.conditions):
        flags.append("low-power mode")
    if any(state.charging for state in file.conditions):
        flags.append("charging")
    degrees = [state.celsius for state in file.conditions if state.celsius is not None]
    if degrees and max(degrees) - degrees[0] > 5:
        flags.append(f"{max(degrees) - degrees[0]:.0f} °C warmer")
    return flags


def _condition_table(all_measured: Sequence[Measured]) -> Table:
    rows = []
    for each in all_measured:
        states = each.file.conditions

        def first_last(of: Callable[[Condition], str | None], states: tuple[Condition, ...] = states) -> str:
            told = [word for state in states if (word := of(state)) is not None]
            return "not told" if not told else told[0] if told[0] == told[-1] else f"{told[0]} → {told[-1]}"

        gate = each.file.gate
        rows.append(
            (
                _device(each),
                f"{each.file.device.os}, {each.file.runner.name} {each.file.runner.version}, "
                f"{each.file.runner.engine} {each.file.runner.engine_version}",
                first_last(lambda state: None if state.celsius is None else f"{state.celsius:.1f} °C"),
                first_last(lambda state: state.thermal),
                first_last(lambda state: None if state.battery is None else f"{state.battery:.0%}"),
                first_last(lambda state: None if state.low_power is None else "on" if state.low_power else "off"),
                "no gate" if gate is None else _gate_words(gate.passed, gate.waited_s),
                each.file.started_utc,
            )
        )
    columns = ("device", "runner", "temperature", "thermal state", "battery", "low-power mode", "start gate", "started")
    return Table(columns, tuple(rows))


def _gate_words(passed: bool | None, waited_s: float) -> str:
    what = {True: "passed", False: "not passed", None: "no thermometer"}[passed]
    return f"{what} after {waited_s:.0f} s"


@dataclass(frozen=True)
class TimeLine:
    """From photo to answer, pruned over twin: bars of one scale, each of named parts with their share of the width."""

    title: str
    bars: tuple[tuple[str, tuple[tuple[str, float, str], ...], str], ...]  # name, (part, share, words), total
    tokens: int


_PARTS = ("preprocessing", "vision", "image prefill", "question prefill", "answer")


def _time_line(each: Measured) -> TimeLine:
    tokens = max((len(run.token_ms) for run in each.file.answer.runs), default=0) if each.file.answer else 0
    bars = []
    for name, series in (("pruned", each.series), ("twin", each.twin)):
        if "vision" in series:
            times = {part: series[part].median for part in _PARTS[:4] if part in series}
            times["answer"] = tokens * series["token"].median if "token" in series else 0.0
            bars.append((name, times))
    longest = max(sum(times.values()) for _, times in bars) or 1.0
    return TimeLine(
        title=_title(each),
        bars=tuple(
            (
                name,
                tuple((part, ms / longest, milliseconds(ms)) for part, ms in times.items()),
                milliseconds(sum(times.values())),
            )
            for name, times in bars
        ),
        tokens=tokens,
    )


def _csv(all_measured: Sequence[Measured]) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    about_columns = ("kind", "device", "soc", "os", "backend", "model", "keep", "side", "metric", "unit", "samples")
    numbers = ("median", "p10", "p90", "min", "max")
    writer.writerow([*about_columns, *numbers, "threads", "engine", "runner", "started_utc", "flags"])
    for each in all_measured:
        file = each.file
        about = [each.kind, file.device.name, file.device.soc, file.device.os, each.backend, each.bundle.manifest.model]
        tail = [file.threads, f"{file.runner.engine} {file.runner.engine_version}", file.runner.name, file.started_utc]
        tail.append("; ".join(_flags(file)))
        for side, all_series in (
            ("pruned" if each.bundle.manifest.prune.pruned else "unpruned", each.series),
            ("twin", each.twin),
        ):
            for name, series in all_series.items():
                values = (series.median, series.p10, series.p90, min(series.samples), max(series.samples))
                told = [f"{value:.4f}" for value in values]
                writer.writerow([*about, each.keep, side, name, "ms", len(series.samples), *told, *tail])
        if file.memory is not None:
            for name, count in (
                ("peak RSS", file.memory.peak_rss_bytes),
                ("after close", file.memory.after_close_bytes),
            ):
                if count is not None:
                    writer.writerow([*about, each.keep, "", name, "bytes", 1, *[count] * 5, *tail])
    return out.getvalue()
