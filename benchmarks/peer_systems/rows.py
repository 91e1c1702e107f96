"""From the samples of benchmarks/peers.py to rows, and from rows to what a reader wants to know of them."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# Others that take more of the machine than this, in cores, can be seen in a time.
QUIET_CORES = 0.15
OURS, LLAMA, TRANSFORMERS = "pruneport", "llama.cpp", "transformers-bf16"

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """One column of the table: a row's field, its name, and how a number of it is shown."""

    field: str
    name: str
    unit: str
    scale: float = 1.0
    digits: int = 0
    more_is_better: bool = False

    def shown(self, row: Row) -> str:
        """The number in its unit."""
        return f"{row[self.field] / self.scale:.{self.digits}f}"

    def best(self, rows: Iterable[Row]) -> Row:
        """The row that does best here."""
        return (max if self.more_is_better else min)(rows, key=lambda row: row[self.field])

    def gain(self, row: Row, other: Row) -> float:
        """How many times better `row` is than `other`; below 1 it is worse."""
        ours, theirs = row[self.field], other[self.field]
        return float(ours / theirs if self.more_is_better else theirs / ours)


MEASURES = (
    Measure("image_ready_ms", "image ready", "ms"),
    Measure("ttft_photo_ms", "TTFT photo", "ms"),
    Measure("ttft_question_ms", "TTFT question", "ms"),
    Measure("tokens_per_s", "tokens/s", "", digits=1, more_is_better=True),
    Measure("peak_rss_bytes", "peak RSS", "GiB", scale=2**30, digits=1),
    Measure("file_bytes", "files", "GB", scale=1e9, digits=2),
)


def sample(answer: Mapping[str, Any], **conditions: float) -> dict[str, Any]:
    """What one run says, in a row's units: ms, and tokens/s by the median token. `conditions` are kept beside it."""
    spent = {
        phase: {graph: round(ms, 1) for graph, ms in graphs.items()}
        for phase, graphs in answer.get("spent_ms", {}).items()
    }
    return {
        **{name: round(answer[name], 1) for name in ("encode_ms",) if name in answer},
        "image_ready_ms": round(answer["image_ready_ms"], 1),
        "ttft_photo_ms": round(answer["image_ready_ms"] + answer["ttft_question_ms"], 1),
        "ttft_question_ms": round(answer["ttft_question_ms"], 1),
        "tokens_per_s": round(1e3 / statistics.median(answer["token_ms"]), 2),
        **({"spent_ms": spent} if spent else {}),
        **conditions,
    }


def summary(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over the runs that others left alone, or over all where there is none, and how many were which.

    ValueError without samples.
    """
    if not samples:
        raise ValueError("a row needs at least one sample")
    quiet = [each for each in samples if each["foreign_cores"] < QUIET_CORES]
    counted = quiet or samples
    timed = [measure.field for measure in MEASURES if measure.field in samples[0]]
    return {
        **{field: round(statistics.median(each[field] for each in counted), 2) for field in timed},
        **({"spent_ms": _spent([each["spent_ms"] for each in counted])} if "spent_ms" in samples[0] else {}),
        "runs": len(samples),
        "quiet_runs": len(quiet),
        "foreign_cores": round(statistics.median(each["foreign_cores"] for each in counted), 2),
    }


def _spent(runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Medians of what each graph took in each phase."""
    return {
        phase: {graph: round(statistics.median(run[phase][graph] for run in runs), 1) for graph in graphs}
        for phase, graphs in runs[0].items()
    }


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """All rows: a new one takes the place of the old one of its processor, layers and system; others stay."""
    rows = {(row["processor"], row["layers"], row["system"]): row for row in (*old, *new)}
    return list(rows.values())


def groups(rows: Iterable[Row]) -> dict[tuple[str, int], list[Row]]:
    """The rows that may be compared with one another, by processor and layers."""
    found: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        found.setdefault((row["processor"], row["layers"]), []).append(row)
    return found


def cells(row: Row) -> list[str]:
    """A row of the table: the system, and each measure."""
    return [row["system"], *(measure.shown(row) for measure in MEASURES)]


def heads() -> list[str]:
    """The heads of the table."""
    return ["system", *(", ".join(filter(None, (measure.name, measure.unit))) for measure in MEASURES)]


def rivals(rows: Sequence[Row], measure: Measure) -> dict[str, Row]:
    """Who pruneport is compared with in one measure: the best row of llama.cpp, and transformers in bf16."""
    named = {
        "llama.cpp's best": [row for row in rows if row["system"].startswith(LLAMA)],
        "transformers bf16": [row for row in rows if row["system"] == TRANSFORMERS],
    }
    return {name: measure.best(theirs) for name, theirs in named.items() if theirs}


def ratio_heads() -> list[str]:
    """The heads of the table of `ratios`."""
    return ["", *(measure.name for measure in MEASURES)]


def ratios(rows: Sequence[Row]) -> list[list[str]]:
    """For each row of pruneport and each rival: how many times better it is, measure by measure; below 1 is worse."""
    ours = [row for row in rows if row["system"].startswith(OURS)]
    names = dict.fromkeys(name for measure in MEASURES for name in rivals(rows, measure))
    return [
        [
            f"{row['system']} against {name}",
            *(f"{measure.gain(row, rivals(rows, measure)[name]):.2f}" for measure in MEASURES),
        ]
        for row in ours
        for name in names
    ]


def losses(rows: Sequence[Row]) -> list[str]:
    """Where pruneport loses, a sentence each: every measure in which one of its rows is worse than a rival's."""
    found = []
    for row in (row for row in rows if row["system"].startswith(OURS)):
        for measure in MEASURES:
            for name, other in rivals(rows, measure).items():
                gain = measure.gain(row, other)
                if gain < 1:
                    unit = f" {measure.unit}" if measure.unit else ""
                    found.append(
                        f"{row['system']} loses to {name} in {measure.name}: {measure.shown(row)}{unit} against "
                        f"{measure.shown(other)}{unit}, {1 / gain:.2f} times worse"
                    )
    return found


def twins(rows: Sequence[Row]) -> tuple[Row, Row] | None:
    """The default bundle and its unpruned twin, None where one was not measured."""
    named = {row["system"]: row for row in rows}
    pruned, twin = named.get(f"{OURS}-keep64"), named.get(f"{OURS}-twin")
    return (pruned, twin) if pruned and twin else None


def gained(pruned: Row, twin: Row) -> tuple[float, float]:
    """How many times sooner the image is ready when it is pruned, and with how many times fewer operations."""
    return twin["image_ready_ms"] / pruned["image_ready_ms"], twin["image_ready_flop"] / pruned["image_ready_flop"]


def pruning(rows: Sequence[Row]) -> list[str]:
    """What pruning brings beside the twin, a sentence; none where one of both was not measured."""
    pair = twins(rows)
    if pair is None:
        return []
    sooner, fewer = gained(*pair)
    return [
        f"Pruned, the image is ready {sooner:.2f} times sooner than unpruned, with {fewer:.2f} times fewer operations: "
        f"{sooner / fewer:.2f} of what these would bring"
    ]


def spending(rows: Sequence[Row]) -> list[str]:
    """Where the time of pruneport's rows goes, graph by graph, a sentence each."""
    return [
        f"{row['system']} spends, in ms, for "
        + "; for ".join(
            f"the {phase} " + ", ".join(f"{ms:.1f} in {graph}" for graph, ms in graphs.items())
            for phase, graphs in row["spent_ms"].items()
        )
        for row in rows
        if "spent_ms" in row
    ]


def load(rows: Sequence[Row]) -> str:
    """How much others disturbed the measuring, in words."""
    runs, quiet = (sum(row[name] for row in rows) for name in ("runs", "quiet_runs"))
    disturbed = [row for row in rows if not row["quiet_runs"]]
    said = f"In {quiet} of {runs} runs others took less than {QUIET_CORES} cores."
    if disturbed:
        most = max(row["foreign_cores"] for row in disturbed)
        which = "all rows" if len(disturbed) == len(rows) else ", ".join(row["system"] for row in disturbed)
        said += f" Not to be relied on, for others took up to {most:.2f} cores in every run: {which}."
    return said
