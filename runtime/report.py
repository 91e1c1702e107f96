"""What a check found, for people: report.md, report.html (one file, opens offline) and the table in the terminal."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from runtime.bundle import OWN_LAYOUT, SCHEMA_VERSION, of_keep
from runtime.check.parity import AnswerParity, GraphParity
from runtime.check.verdict import GraphPlacement, Step, Verdict
from runtime.devices.findings import GraphLatency, TimedAnswers, Twin
from runtime.errors import BundleError, EngineError, OutputError
from runtime.explain import lints, rewrite_for
from runtime.image import view_jpeg
from runtime.kept_picture import token_shapes
from runtime.names import plural
from runtime.own_tokens import own_words
from runtime.session import default_threads
from runtime.text_graphs import VISION_ENCODER

if TYPE_CHECKING:
    from rich.console import RenderableType

    from runtime.bundle import Bundle, DelegateCoverage, MadeInfo, PruneInfo, TensorInfo, TextInfo
    from runtime.check.parity import Bound, KeptParity, TextParity
    from runtime.latency import AnswerLatency

_TEMPLATES = Path(__file__).parent / "templates"
NEURAL_ENGINE = "Neural Engine, likely"


class _Record(msgspec.Struct, frozen=True, kw_only=True):
    """What parity.json and latency.json are made of."""


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading; columns named in `numeric` are set flush right. `marks` holds one status a row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: frozenset[str] = frozenset()
    marks: tuple[str, ...] = ()

    def marked(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        """Each row with its status, which is empty where the table has none."""
        yield from zip(self.marks or ("",) * len(self.rows), self.rows, strict=True)


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


def write_reports(bundle: Bundle, verdict: Verdict, out_dir: Path) -> None:
    """Writes parity.json, latency.json, report.md and report.html; OutputError where they cannot be written.

    Those of a view for one keep bear it in their names.
    """
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        _write_json(out_dir / _named("parity.json", bundle), _parity_file(bundle, verdict))
        _write_json(out_dir / _named("latency.json", bundle), _latency_file(verdict))
        _write_pages(bundle, verdict, out_dir)
    except OSError as err:
        raise OutputError(f"the reports cannot be written to {out_dir}: {err.strerror or err}") from err


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


def _named(report: str, bundle: Bundle) -> str:
    return of_keep(report, bundle.manifest.prune.keep) if bundle.is_view else report


def _write_json(path: Path, record: msgspec.Struct) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")


def _write_pages(bundle: Bundle, verdict: Verdict, out_dir: Path) -> None:
    environment = templates()
    content = _content(bundle, verdict)
    for name in ("report.md", "report.html"):
        text = environment.get_template(f"{name}.j2").render(content)
        (out_dir / _named(name, bundle)).write_text(text.rstrip() + "\n", encoding="utf-8")


def templates() -> Any:
    """The environment that pages are rendered in: what is not there is an error, HTML is escaped."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = markdown_cell
    return environment


def terminal_table(bundle: Bundle, verdict: Verdict) -> RenderableType:
    """The last screen of a run: verdict and the numbers that matter."""
    from rich.table import Table as RichTable
    from rich.text import Text

    status = _status(verdict)
    style = {"passed": "bold green", "failed": "bold red"}.get(status, "bold yellow")
    table = RichTable(title=Text(bundle.title, style="bold"), show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row(Text("verdict"), Text(status, style=style))
    for label, value in _summary(bundle, verdict):
        table.add_row(Text(label), Text(value))
    # The reports leave the path out: they are written before the bundle has its final name.
    table.add_row(Text("bundle"), Text(str(bundle.path)))
    for step in (*verdict.failed_steps, *verdict.unchecked_steps):
        remedy = f"; {step.remedy}" if step.remedy else ""
        colour = "red" if step.status == "failed" else "yellow"
        table.add_row(Text(step.name), Text(f"{step.status}: {step.detail}{remedy}", style=colour))
    return table


def _summary(bundle: Bundle, verdict: Verdict) -> list[tuple[str, str]]:
    """The numbers that matter, in the order of the terminal and of the reports' first screen."""
    if not verdict.keeps:
        return _found_rows(bundle, verdict) + _bundle_rows(bundle, verdict)
    rows = []
    for at, (keep, one) in zip(bundle.views, verdict.keeps.items(), strict=True):
        rows += [(f"{label}, keep {keep}", text) for label, text in _found_rows(at, one)]
    rows += _bundle_rows(bundle, verdict)
    return [*rows, ("reports", "of each keep: " + ", ".join(_named("report.html", at) for at in bundle.views))]


def _found_rows(bundle: Bundle, verdict: Verdict) -> list[tuple[str, str]]:
    """What was found at one keep."""
    prune = bundle.manifest.prune
    rows = [("image tokens", "; ".join(filter(None, (_token_change(bundle), _own_words(bundle)))))]
    tensors = [tensor for graph in verdict.graphs for tensor in graph.tensors]
    if tensors:
        worst = max((tensor.rel for tensor in tensors if tensor.rel is not None), default=0.0)
        good = sum(tensor.passed for tensor in tensors)
        rows.append(
            (
                "parity",
                f"{good} of {len(tensors)} outputs within bounds, worst rel {worst:.1e} "
                f"({', '.join(bound.precision for bound in _bounds(verdict))})",
            )
        )
    for graph in verdict.graphs:
        if graph.kept is not None and prune.pruned:
            rows.append(("kept tokens", _kept_words(graph.kept)))
    if verdict.answer is not None:
        text = f"{verdict.answer.same} of {verdict.answer.expected_count} greedy tokens as on the desktop"
        for read in (graph.text for graph in verdict.graphs if graph.text is not None):
            text += f", and {read.same_top1:.1%} of the next tokens of a fixed text"
        rows.append(("answer", text))
    for entry in verdict.latency:
        # What the others take is in the report; here it is in the answer's times.
        if verdict.answers is not None and entry.graph != VISION_ENCODER:
            continue
        threads = plural(entry.bundle.threads, "thread")
        text = f"{milliseconds(entry.bundle.median_ms)} median of {entry.bundle.runs}, {threads}"
        if entry.twin is not None and entry.ratio is not None:
            text += f"; twin {milliseconds(entry.twin.median_ms)}; pruned/twin {entry.ratio.median:.3f}"
        rows.append((entry.graph, text))
    return rows + [(name, text) for name, text, *_ in _answer_rows(verdict)]


def _bundle_rows(bundle: Bundle, verdict: Verdict) -> list[tuple[str, str]]:
    """What holds for all keeps."""
    manifest = bundle.manifest
    rows = []
    taken: dict[str, list[DelegateCoverage]] = {}
    for coverage in (coverage for graph_info in manifest.graphs for coverage in graph_info.coverage):
        taken.setdefault(coverage.delegate, []).append(coverage)
    for delegate, parts in taken.items():
        text = (
            f"{plural(sum(c.nodes for c in parts), 'node')} in {plural(sum(c.partitions for c in parts), 'partition')}"
        )
        if not verdict.executed:
            text = f"{plural(sum(c.nodes for c in parts), 'operator')}; which unit runs each is decided on the device"
            rows.append(("program", f"{delegate}, {text}"))
            continue
        graphs = f" of {len(parts)} graphs" if len(parts) > 1 else ""
        if any(coverage.by_list for coverage in parts):
            graphs += " (by a list, not measured)"
        rows.append(("delegates", f"{delegate} {text}{graphs}, {sum(c.outside_nodes for c in parts)} outside"))
    rows.append(("files", f"{plural(len(manifest.files), 'file')}, {size_words(bundle.size_bytes)}"))
    if verdict.latency:
        rows.append(("measured on", verdict.device))
    if not verdict.executed:
        rows.append(("latency", "no time was measured: evaluated, not executed; to measure, take a Mac or an iPhone"))
    return rows


def _content(bundle: Bundle, verdict: Verdict) -> dict[str, Any]:
    """Everything the templates show, as text and tables: they decide on layout alone."""
    manifest = bundle.manifest
    golden = bundle.golden()
    return {
        "name": bundle.title,
        "status": _status(verdict),
        "subtitle": subtitle(bundle),
        "random_weights": manifest.weights.source == "random",
        "seed": manifest.weights.seed,
        "summary": _summary(bundle, verdict),
        "steps": [(step.status, step.name, step.detail, step.remedy) for step in verdict.steps],
        "picture": _picture(bundle, verdict, golden),
        "bounds": _bounds(verdict),
        "parity": [
            (
                graph.graph,
                graph.engine,
                _parity_table(graph.tensors),
                _kept_lines(graph.kept) + _tie_lines(graph) + _text_lines(graph.text),
            )
            for graph in verdict.graphs
        ],
        "answers": _answer_table(verdict),
        "latency": _latency_table(verdict),
        "device": verdict.device,
        "twin": _twin_table(bundle, verdict),
        "delegates": _delegate_table(bundle),
        "strips": _strips(bundle),
        "outside": _outside_table(bundle),
        "neural_engine": _neural_engine_table(bundle),
        "placements": [
            f"{placed.graph} as run here, from {placed.source}: delegate calls {_counts(placed.delegates)}; "
            f"plain runtime {_counts(placed.outside)}"
            if placed.executed
            else f"{placed.graph}: {placed.source}: {_counts(placed.outside)}"
            for placed in verdict.placements
        ],
        "files": _file_table(bundle),
        "interface": _interface_table(bundle),
        "provenance": _provenance_table(bundle, verdict),
    }


def _bounds(verdict: Verdict) -> list[Bound]:
    """The bounds that were applied, each once."""
    return list({graph.bound.precision: graph.bound for graph in verdict.graphs}.values())


def _answer_rows(verdict: Verdict) -> list[tuple[str, str, str, str, str]]:
    """What an answer takes: name, all of it in words, then this bundle's, the twin's and their ratio."""
    timed = verdict.answers
    if timed is None:
        return []
    ours, theirs, ratio = timed.bundle, timed.twin, timed.ratio
    rows = []

    def row(name: str, of: Callable[[AnswerLatency], str], words: str, share: float | None) -> None:
        text = of(ours) + words
        if theirs is not None and share is not None:
            text += f"; twin {of(theirs)}; pruned/twin {share:.3f}"
        rows.append((name, text, of(ours), of(theirs) if theirs else "", "" if share is None else f"{share:.3f}"))

    row(
        "image ready",
        lambda times: milliseconds(times.image_ready.median_ms),
        " after the photo",
        ratio.image_ready.median if ratio else None,
    )
    row(
        "TTFT",
        lambda times: milliseconds(times.ttft.median_ms),
        f" after a question of {ours.question_tokens} tokens",
        ratio.ttft.median if ratio else None,
    )
    row(
        "decode",
        lambda times: f"{milliseconds(times.token.median_ms)} a token, {1e3 / times.token.median_ms:.1f} tokens/s",
        "",
        ratio.token.median if ratio else None,
    )
    share = None if theirs is None else ours.kv_cache_bytes / theirs.kv_cache_bytes
    row("KV cache", lambda times: size_words(times.kv_cache_bytes), "", share)
    return rows


def _answer_table(verdict: Verdict) -> Table | None:
    rows = _answer_rows(verdict)
    if verdict.answers is None or verdict.keeps or not rows:
        return None
    if verdict.answers.twin is None:
        return Table(
            columns=("", "median"),
            rows=tuple((name, ours) for name, _, ours, *_ in rows),
            numeric=frozenset(("median",)),
        )
    return Table(
        columns=("", "pruned", "unpruned twin", "time or size, pruned / twin"),
        rows=tuple((name, ours, theirs, share) for name, _, ours, theirs, share in rows),
        numeric=frozenset(("pruned", "unpruned twin", "time or size, pruned / twin")),
    )


def _text_lines(text: TextParity | None) -> list[str]:
    if text is None:
        return []
    return [
        f"Perplexity over {text.tokens} tokens of a fixed text: {_number(text.got_perplexity, '.6g')}, on the desktop "
        f"{_number(text.expected_perplexity, '.6g')}; the likeliest next token is the same for {text.same_top1:.1%}."
    ]


def _status(verdict: Verdict) -> str:
    if verdict.failed_steps:
        return "failed"
    if verdict.unchecked_steps:
        # Where no graph ran, nothing that matters was looked at.
        return "passed, partly not checked" if verdict.graphs else "not checked"
    return "passed"


def subtitle(bundle: Bundle) -> str:
    """Says in one line which model it is, for what, and where it is pruned."""
    manifest = bundle.manifest
    target = manifest.target
    parts = target.parts
    if target.text is None:
        how = _how(parts["vision"][0], *(f"{part} {scheme}" for part, (_, scheme) in parts.items() if scheme))
    else:
        how = "; ".join(f"{part} {_how(made, scheme or '')}" for part, (made, scheme) in parts.items())
    system = f"{target.name} {target.min_os or ''}".strip()
    where = f"pruned at cut {manifest.prune.cut}" if manifest.prune.pruned else "unpruned twin"
    return f"{manifest.model} for {system} ({how}), {where}"


def _how(made: MadeInfo, *schemes: str) -> str:
    return ", ".join(filter(None, (made.backend, made.precision, *schemes, made.soc)))


def _token_change(bundle: Bundle) -> str:
    prune = bundle.manifest.prune
    if not prune.pruned:
        return f"{prune.image_tokens} (unpruned twin)"
    share = prune.keep / prune.image_tokens
    return f"{prune.image_tokens} -> {prune.keep} ({share:.0%} kept)"


def _own_words(bundle: Bundle) -> str:
    """How many the photo would have had where the model takes any size; nothing where it does not."""
    image = bundle.manifest.image
    return own_words(image, bundle.photo_size) if image.any_size else ""


def _kept_words(kept: KeptParity) -> str:
    if kept.exact:
        return f"{kept.got_count}, the same as on the desktop"
    text = f"{kept.got_count}, overlap {kept.overlap:.1%} with the desktop"
    if kept.first_divergence is not None:
        text += f", first divergence at choice {kept.first_divergence.step}"
    return text


def _kept_lines(kept: KeptParity | None) -> list[str]:
    if kept is None:
        return []
    lines = [
        f"{kept.got_count} tokens kept, {kept.expected_count} on the desktop; "
        f"sets overlap by {kept.overlap:.1%}, {kept.same_slots:.1%} of the slots hold the same token "
        f"(bound: {kept.bound})."
    ]
    if not kept.ascending:
        lines.append("The kept tokens are not strictly ascending.")
    where = kept.first_divergence
    if where is not None:
        near = (
            ""
            if where.margin is None
            else f"; its margin, the nearness of that choice to a tie, was {where.margin:.2e}"
        )
        lines.append(f"First divergence in the order of selection: choice {where.step}, token {where.index}{near}.")
        lines.append(f"Missing: {_indices(kept.missing)}. In their place: {_indices(kept.extra)}.")
    if kept.near_tie:
        lines.append(
            "Float32 cannot tell this choice from the desktop's: features moved in their last bits give it, too."
        )
    return lines


def _tie_lines(graph: GraphParity) -> list[str]:
    return [
        f"Near tie: dropped token {tie.token} was recovered into {tie.engine}, on the desktop into {tie.desktop}, to "
        f"which it is more similar by {tie.margin:.1e}; {graph.bound.precision} resolves {tie.resolution:.1e}. "
        "Both rows were compared with what this decision gives."
        for tie in graph.near_ties
    ]


def _indices(indices: tuple[int, ...]) -> str:
    return ", ".join(map(str, indices)) or "none"


def _parity_table(tensors: tuple[Any, ...]) -> Table:
    return Table(
        columns=("output", "shape", "max abs", "rel", "PSNR dB", "cosine", "compared", "bound"),
        rows=tuple(
            (
                tensor.name,
                " x ".join(map(str, tensor.shape)),
                _number(tensor.max_abs, ".1e"),
                _number(tensor.rel, ".1e"),
                "identical" if tensor.psnr_db is None and tensor.max_abs == 0 else _number(tensor.psnr_db, ".1f"),
                _number(tensor.cosine, ".7f"),
                tensor.note or tensor.compared,
                tensor.bound,
            )
            for tensor in tensors
        ),
        numeric=frozenset(("max abs", "rel", "PSNR dB", "cosine")),
        marks=tuple("passed" if tensor.passed else "failed" for tensor in tensors),
    )


def _latency_table(verdict: Verdict) -> Table | None:
    if not verdict.latency:
        return None
    rows = []
    for entry in verdict.latency:
        for label, times in ((entry.graph, entry.bundle), (f"{entry.graph}, unpruned twin", entry.twin)):
            if times is not None:
                rows.append(
                    (
                        label,
                        milliseconds(times.median_ms),
                        f"{milliseconds(times.p10_ms)} to {milliseconds(times.p90_ms)}",
                        f"{milliseconds(times.min_ms)} to {milliseconds(times.max_ms)}",
                        str(times.runs),
                        str(times.threads),
                        milliseconds(times.load_ms),
                        size_words(times.peak_rss_bytes),
                        times.engine,
                    )
                )
    return Table(
        columns=("graph", "median", "p10 to p90", "min to max", "runs", "threads", "load", "process peak", "engine"),
        rows=tuple(rows),
        numeric=frozenset(("median", "p10 to p90", "min to max", "runs", "threads", "load", "process peak")),
    )


def _twin_table(bundle: Bundle, verdict: Verdict) -> Table | None:
    """Pruned beside unpruned; the last column is pruned over twin. Of several keeps each report has its own."""
    twin = verdict.twin
    if twin is None or verdict.keeps:
        return None
    manifest = bundle.manifest
    timed = [entry for entry in verdict.latency if entry.twin is not None and entry.ratio is not None]
    handed_on = sum(
        info.size_bytes for graph in manifest.graphs if graph.name == VISION_ENCODER for info in graph.outputs
    )
    rows = [
        ("image tokens handed on", *_pair(manifest.prune.keep, twin.image_tokens, str)),
        ("bytes handed on", *_pair(handed_on, twin.handed_on_bytes, size_words)),
        ("bundle size", *_pair(bundle.size_bytes, twin.size_bytes, size_words)),
    ]
    for entry in timed:
        assert entry.twin is not None
        assert entry.ratio is not None
        spread = f"{entry.ratio.median:.3f} ({entry.ratio.p10:.3f} to {entry.ratio.p90:.3f})"
        rows.append(
            (f"{entry.graph}, median", milliseconds(entry.bundle.median_ms), milliseconds(entry.twin.median_ms), spread)
        )
    return Table(
        columns=("", "pruned", "unpruned twin", "pruned / twin"),
        rows=tuple(rows),
        numeric=frozenset(("pruned", "unpruned twin", "pruned / twin")),
    )


def _pair(ours: int, theirs: int, show: Any) -> tuple[str, str, str]:
    return show(ours), show(theirs), f"{ours / theirs:.3f}"


def _delegate_table(bundle: Bundle) -> Table | None:
    rows = tuple(
        (graph.name, coverage.delegate, str(coverage.partitions), str(coverage.nodes), str(coverage.outside_nodes))
        for graph in bundle.manifest.graphs
        for coverage in graph.coverage
    )
    columns = ("graph", "delegate", "partitions", "nodes taken", "nodes outside")
    return Table(columns=columns, rows=rows, numeric=frozenset(columns[2:])) if rows else None


@dataclass(frozen=True)
class Bar:
    """Nodes that run one after the other in one place; x and width in nodes, widened where they would not be seen."""

    x: float
    width: float
    taken: bool
    words: str


@dataclass(frozen=True)
class Strip:
    """A graph from its first node to its last, coloured by who runs them."""

    graph: str
    words: str
    bars: tuple[Bar, ...]

    @property
    def width(self) -> float:
        return self.bars[-1].x + self.bars[-1].width


def _strips(bundle: Bundle) -> list[Strip]:
    """A strip for each graph whose order of execution is known: for Core ML by what likely leaves the Neural Engine."""
    try:
        found = [(lint.graph, NEURAL_ENGINE, lint.runs) for lint in lints(bundle)]
    except (BundleError, EngineError):  # the verdict tells it: the same package could not be evaluated
        found = []
    if not found:
        for graph in bundle.manifest.graphs:
            for coverage in graph.coverage:
                whole = (coverage.nodes,) if coverage.partitions == 1 and not coverage.outside else ()
                found.append((graph.name, coverage.delegate, coverage.runs or whole))
    return [_strip(graph, delegate, runs) for graph, delegate, runs in found if any(runs)]


def _strip(graph: str, delegate: str, runs: tuple[int, ...]) -> Strip:
    least = sum(map(abs, runs)) / 250
    bars: list[Bar] = []
    x = 0.0
    for run in runs:
        width = max(abs(run), least)
        place = delegate if run > 0 else "outside"
        bars.append(
            Bar(x=round(x, 2), width=round(width, 2), taken=run > 0, words=f"{place}: {plural(abs(run), 'node')}")
        )
        x += width
    inside, outside = ([abs(run) for run in runs if (run > 0) is taken] for taken in (True, False))
    words = f"{plural(sum(inside), 'node')} in {plural(len(inside), 'run')}, {sum(outside)} outside"
    return Strip(graph=graph, words=f"{delegate}: {words}", bars=tuple(bars))


def _outside_table(bundle: Bundle) -> Table | None:
    rows = tuple(
        (graph.name, coverage.delegate, op.op, str(op.count), op.reason, rewrite_for(coverage.delegate, op))
        for graph in bundle.manifest.graphs
        for coverage in graph.coverage
        for op in coverage.outside
    )
    columns = ("graph", "delegate", "operator", "count", "why it stayed outside", "rewrite")
    return Table(columns=columns, rows=rows, numeric=frozenset(("count",))) if rows else None


def _neural_engine_table(bundle: Bundle) -> Table | None:
    """What of Core ML packages likely leaves the Neural Engine; None where there is nothing to say."""
    try:
        found = lints(bundle)
    except (BundleError, EngineError):  # the verdict tells it: the same package could not be evaluated
        return None
    rows = tuple(
        (
            lint.graph,
            finding.rule.effect,
            finding.rule.id,
            str(finding.count),
            finding.rule.likely,
            finding.rule.rewrite,
        )
        for lint in found
        for finding in lint.findings
    )
    columns = ("graph", "effect", "what", "count", "why", "rewrite")
    return Table(columns=columns, rows=rows, numeric=frozenset(("count",))) if rows else None


def _file_table(bundle: Bundle) -> Table:
    return Table(
        columns=("file", "size", "sha256"),
        rows=tuple((name, size_words(info.size_bytes), info.sha256) for name, info in bundle.manifest.files.items()),
        numeric=frozenset(("size",)),
    )


def _interface_table(bundle: Bundle) -> Table:
    return Table(
        columns=("graph", "", "name", "dtype", "shape"),
        rows=tuple(
            (graph.name, kind, info.name, info.dtype, _dimensions(info))
            for graph in bundle.manifest.graphs
            for kind, tensors in (("in", graph.inputs), ("out", graph.outputs))
            for info in tensors
        ),
    )


def _dimensions(info: TensorInfo) -> str:
    return " x ".join(f"≤{size}" if axis in info.dynamic else str(size) for axis, size in enumerate(info.shape))


def _provenance_table(bundle: Bundle, verdict: Verdict) -> Table:
    manifest = bundle.manifest
    prune, weights, golden = manifest.prune, manifest.weights, manifest.golden
    source = f"random, seed {weights.seed}" if weights.source == "random" else weights.source
    where = f"before decoder layer {prune.cut}" if prune.cut else "after the projector"
    settings = "".join(f", {name.replace('_', ' ')} {value:g}" for name, value in prune.settings.items())
    overview = "{} x {} overview and ".format(*prune.overview) if prune.overview else ""
    pruner = (
        f"{prune.method}, {where}, {overview}{prune.grid[0]} x {prune.grid[1]} grid, "
        f"keep {' or '.join(map(str, bundle.keeps))}{settings}, "
        f"computed in {prune.arithmetic}"
    )
    rows = [
        ("made", manifest.created_utc),
        ("weights", f"{weights.id} ({source}), sha256 {weights.sha256}"),
        ("desktop outputs", f"made on {golden.device} with torch {golden.torch} from {golden.photo}"),
        ("pruner", pruner if prune.pruned else f"none; {prune.image_tokens} image tokens pass through"),
        ("prompt", f"{len(manifest.prompt.prefix_ids)} tokens before the image"),
        *([("text", _text_words(manifest.text, manifest.frame.first_text))] if manifest.text is not None else []),
        *([("layout", manifest.layout)] if manifest.layout != OWN_LAYOUT else []),
        *([("fp16 range", str(manifest.ranges))] if manifest.ranges is not None else []),
        *([("fp16 range of the text graphs", str(manifest.text_ranges))] if manifest.text_ranges is not None else []),
        ("checked on", f"{verdict.device}, {plural(default_threads(), 'thread')} by default"),
        ("tools", ", ".join(f"{name} {version}" for name, version in manifest.tools.items())),
        ("bundle schema", str(manifest.schema_version)),
    ]
    return Table(columns=("", ""), rows=tuple(rows))


def _text_words(text: TextInfo, first: int) -> str:
    return f"room for {text.tokens} tokens from position {first} on, in chunks of {text.chunk} or singly"


@dataclass(frozen=True)
class Picture:
    """The photo as the model sees it, and its tokens as shapes in units of one token; `text` is the same in letters.

    Where a photo is seen in tiles, these are the tiles' tokens, and kept ones of the overview are larger shapes.
    """

    jpeg_base64: str
    rows: int
    columns: int
    dropped: str
    kept: str
    missing: str
    extra: str
    marks: tuple[tuple[float, float, int], ...]
    text: str
    caption: str


def _picture(bundle: Bundle, verdict: Verdict, golden: dict[str, np.ndarray]) -> Picture | None:
    """None when the golden holds no photo or no graph says which tokens it kept."""
    manifest = bundle.manifest
    prune = manifest.prune
    shown = next((graph for graph in verdict.graphs if graph.kept is not None), None)
    if "photo" not in golden or shown is None or shown.kept is None:
        return None
    rows, columns = prune.grid
    kept = {index for index in shown.kept_indices if 0 <= index < prune.image_tokens}
    grid = set(range(prune.overview_tokens, prune.image_tokens))
    missing, extra = set(shown.kept.missing), set(shown.kept.extra)
    marks = [int(index) for index in golden.get("marks", np.zeros(0)).reshape(-1)] if prune.pruned else []
    shapes = token_shapes(prune)
    centres = tuple(
        (x + width / 2, y + height / 2, order)
        for order, (x, y, width, height) in enumerate((shapes[index] for index in marks), 1)
    )
    letters = [
        "M" if index in marks and index in kept else "#" if index in kept else "." for index in range(len(shapes))
    ]
    return Picture(
        jpeg_base64=base64.b64encode(view_jpeg(golden["photo"], manifest.image)).decode("ascii"),
        rows=rows,
        columns=columns,
        dropped=_path(grid - kept, shapes),
        kept=_path(kept, shapes) if prune.pruned else "",
        missing=_path(missing, shapes),
        extra=_path(extra & kept, shapes),
        marks=centres,
        text="\n\n".join(_lines(letters, prune)),
        caption=f"{manifest.golden.photo}: {len(kept)} of {prune.image_tokens} patches kept",
    )


def _lines(letters: Sequence[str], prune: PruneInfo) -> Iterator[str]:
    """A letter for each token, line by line: the overview where there is one, then the grid."""
    start = 0
    for rows, columns in (*([prune.overview] if prune.overview else []), prune.grid):
        lines = [letters[start + row * columns : start + (row + 1) * columns] for row in range(rows)]
        yield "\n".join(" ".join(line) for line in lines)
        start += rows * columns


def _path(indices: set[int], shapes: Sequence[tuple[float, float, float, float]]) -> str:
    """An SVG path of rectangles, one for each token."""
    return "".join(
        f"M{x:g} {y:g}h{width:g}v{height:g}h-{width:g}z"
        for x, y, width, height in (shapes[index] for index in sorted(indices))
    )


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} x {count}" for name, count in counts.items()) or "none"


def _number(value: float | None, form: str) -> str:
    return "n/a" if value is None else format(value, form)


def milliseconds(value: float) -> str:
    """Milliseconds in words."""
    return f"{value / 1e3:.2f} s" if value >= 1e4 else f"{value:.0f} ms" if value >= 100 else f"{value:.2f} ms"


def size_words(size_bytes: int) -> str:
    """Bytes in words."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes} B"


def markdown_cell(text: str) -> str:
    """Text that cannot leave its table cell or become markup."""
    for char in "\\|<>`*_[]":
        text = text.replace(char, f"\\{char}")
    return " ".join(text.split())
