"""Why a delegate left operators outside, what rewrite would bring them in, and what likely leaves the Neural Engine.

Everything is read from the bundle on disk: what the delegates took from its manifest, what Core ML gets from its
packages. No engine is opened and nothing is hashed; that is `runtime.harness`. The rules are data, in rewrites.json.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import numpy as np

from runtime.bundle import Bundle, Count, GraphInfo, Name, OutsideOp, PositiveCount, read_bundle
from runtime.engines import core_ml_delegate
from runtime.engines.coreml import Operator, check_listed, read_package
from runtime.errors import EngineMissingError

if TYPE_CHECKING:
    from rich.console import RenderableType

RULES_FILE = Path(__file__).parent / "rewrites.json"
NO_REWRITE = "no rewrite is known for this operator"

_WEIGHT_OPERATORS = "constexpr_"  # these expand compressed weights when a package is loaded, not when it runs

Names = Annotated[tuple[Name, ...], msgspec.Meta(min_length=1)]


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What all rules share: immutable, named fields only, unknown fields refused."""


class OutsideRule(_Record, frozen=True):
    """A rewrite for what one of `delegates` leaves outside: any of `operators` (shell patterns) for that `reason`.

    `reason` is a part of the recorded one, in any case of letters; the first rule that matches is taken.
    """

    id: Name
    delegates: Names
    rewrite: Name
    operators: Names = ("*",)
    reason: str = ""

    def matches(self, delegate: str, left: OutsideOp) -> bool:
        return (
            delegate in self.delegates
            and any(fnmatchcase(left.op, pattern) for pattern in self.operators)
            and self.reason.lower() in left.reason.lower()
        )


class OperatorIs(_Record, frozen=True, tag_field="kind", tag="operator"):
    """An operator of one of these names."""

    operators: Names

    def holds(self, op: Operator) -> bool:
        return op.kind in self.operators


class DtypeIs(_Record, frozen=True, tag_field="kind", tag="dtype"):
    """A result of one of these dtypes, unless one of `except_operators` made it."""

    dtypes: Names
    except_operators: tuple[Name, ...]

    def holds(self, op: Operator) -> bool:
        return op.dtype in self.dtypes and op.kind not in self.except_operators


class RankAbove(_Record, frozen=True, tag_field="kind", tag="rank"):
    """A result of more axes."""

    more_than: PositiveCount

    def holds(self, op: Operator) -> bool:
        return len(op.shape) > self.more_than


class AxisAbove(_Record, frozen=True, tag_field="kind", tag="axis"):
    """A result with a longer axis, in elements."""

    more_than: PositiveCount

    def holds(self, op: Operator) -> bool:
        return max(op.shape, default=0) > self.more_than


class LastAxisBelow(_Record, frozen=True, tag_field="kind", tag="last_axis"):
    """A result whose last axis is shorter, in bytes, while another axis is longer than one."""

    shorter_than_bytes: PositiveCount

    def holds(self, op: Operator) -> bool:
        if max(op.shape[:-1], default=1) == 1 or op.dtype.startswith("type "):
            return False
        return op.shape[-1] * np.dtype(op.dtype).itemsize < self.shorter_than_bytes


class EngineRule(_Record, frozen=True):
    """What likely `leaves` the Neural Engine or `slows` it, how to rewrite it, and who says so."""

    id: Name
    when: OperatorIs | DtypeIs | RankAbove | AxisAbove | LastAxisBelow
    effect: Literal["leaves", "slows"]
    likely: Name
    rewrite: Name
    source: Annotated[str, msgspec.Meta(pattern=r"^https://\S+$")]

    def __post_init__(self) -> None:
        if "likely" not in self.likely:
            raise ValueError(f"{self.id}: likely={self.likely!r} must say `likely`; only Apple's compiler knows")


class Rules(_Record, frozen=True):
    """rewrites.json."""

    outside: tuple[OutsideRule, ...]
    neural_engine: tuple[EngineRule, ...]

    def __post_init__(self) -> None:
        names = [rule.id for rule in self.outside], [rule.id for rule in self.neural_engine]
        for ids in names:
            if len(set(ids)) != len(ids):
                raise ValueError(f"two rules are named alike: {', '.join(ids)}")


@cache
def rules() -> Rules:
    """The rules of this version."""
    return msgspec.json.decode(RULES_FILE.read_bytes(), type=Rules)


def rewrite_for(delegate: str, left: OutsideOp) -> str:
    """The rewrite that would bring an operator into the delegate, or NO_REWRITE."""
    return next((rule.rewrite for rule in rules().outside if rule.matches(delegate, left)), NO_REWRITE)


class Left(_Record, frozen=True):
    """One kind of operator outside a delegate: how often, why, as the manifest has it, and what to do about it."""

    op: str
    count: Count
    reason: str
    rewrite: str


class Taken(_Record, frozen=True):
    """How much of a graph one delegate took when it was lowered, and what it left."""

    graph: str
    delegate: str
    nodes: Count
    partitions: Count
    outside: tuple[Left, ...]

    @property
    def outside_nodes(self) -> int:
        return sum(left.count for left in self.outside)


class Finding(_Record, frozen=True):
    """A rule that holds in a graph of a package, and for which operators, by name and count."""

    rule: EngineRule
    operators: dict[str, int]

    @property
    def count(self) -> int:
        return sum(self.operators.values())


class Lint(_Record, frozen=True):
    """What of a package's graph likely leaves the Neural Engine (`leaving` of `operators`) or slows it.

    `runs` counts them in the order of the program: those that may stay, and as negative numbers those between that
    likely leave. `not_looked_at` says why nothing is known.
    """

    graph: str
    operators: Count = 0
    leaving: Count = 0
    findings: tuple[Finding, ...] = ()
    runs: tuple[int, ...] = ()
    not_looked_at: str | None = None


class Explanation(_Record, frozen=True):
    """All that can be told about a bundle's delegates without running it."""

    name: str
    taken: tuple[Taken, ...]
    lints: tuple[Lint, ...]

    @property
    def complete(self) -> bool:
        """Whether everything could be looked at on this machine."""
        return all(lint.not_looked_at is None for lint in self.lints)


def explain(path: str | os.PathLike[str]) -> Explanation:
    """Reads a bundle and tells what each delegate took, what stayed outside and why, and which rewrite would help.

    No engine is opened and nothing is hashed. Raises BundleError, and EngineError for a damaged package.
    """
    bundle = read_bundle(Path(path))
    graphs = bundle.manifest.graphs
    return Explanation(
        name=bundle.manifest.name,
        taken=tuple(
            Taken(
                graph=graph.name,
                delegate=coverage.delegate,
                nodes=coverage.nodes,
                partitions=coverage.partitions,
                outside=tuple(
                    Left(op=left.op, count=left.count, reason=left.reason, rewrite=rewrite_for(coverage.delegate, left))
                    for left in coverage.outside
                ),
            )
            for graph in graphs
            for coverage in graph.coverage
        ),
        lints=lints(bundle),
    )


def lints(bundle: Bundle) -> tuple[Lint, ...]:
    """The lint of each graph that lies in a Core ML package. Raises EngineError for a damaged one."""
    return tuple(_lint(bundle, graph) for graph in bundle.manifest.graphs if graph.engine == "coreml" or _calls(graph))


def _calls(graph: GraphInfo) -> bool:
    """Whether a graph is one call to Core ML out of an ExecuTorch program."""
    return [(one.delegate, one.outside) for one in graph.coverage] == [(core_ml_delegate.NAME, ())]


def _lint(bundle: Bundle, graph: GraphInfo) -> Lint:
    package = bundle.path / graph.file
    try:
        if _calls(graph):
            declared = core_ml_delegate.declared(package, graph.name)
        else:
            check_listed(package, tuple(bundle.file(file) for file in graph.extra_files))
            declared = read_package(package).function(graph.name).declared()
    except EngineMissingError as err:
        return Lint(graph=graph.name, not_looked_at=str(err))
    return lint(graph.name, declared)


def lint(graph: str, declared: tuple[Operator, ...]) -> Lint:
    """Holds the rules against the operators of a graph; those that expand weights do not count."""
    operators = [op for op in declared if not op.kind.startswith(_WEIGHT_OPERATORS)]
    found = []
    leaving: set[str] = set()
    for rule in rules().neural_engine:
        held = [op for op in operators if rule.when.holds(op)]
        if held:
            found.append(Finding(rule=rule, operators=dict(Counter(op.kind for op in held).most_common())))
        if rule.effect == "leaves":
            leaving |= {op.name for op in held}
    runs = (
        sum(1 if stays else -1 for _ in ops) for stays, ops in groupby(operators, key=lambda op: op.name not in leaving)
    )
    return Lint(graph=graph, operators=len(operators), leaving=len(leaving), findings=tuple(found), runs=tuple(runs))


# In the terminal


def in_short(explanation: Explanation) -> str:
    """One line: how much stayed outside, and for Core ML how much likely leaves the Neural Engine."""
    if not explanation.complete:
        return "not looked at"
    if explanation.lints:
        operators = sum(lint.operators for lint in explanation.lints)
        leaving = sum(lint.leaving for lint in explanation.lints)
        return f"{leaving} of {operators} operators likely not on the Neural Engine"
    taken = explanation.taken
    return f"{sum(one.nodes for one in taken)} nodes taken, {sum(one.outside_nodes for one in taken)} outside"


def terminal_tables(explanation: Explanation) -> tuple[RenderableType, ...]:
    """What the delegates took, what stayed outside and why, and what likely leaves the Neural Engine."""
    from rich.text import Text

    shown: list[RenderableType] = [_taken_table(explanation)]
    shown += _outside_tables(explanation)
    shown += _engine_tables(explanation)
    for reason in dict.fromkeys(lint.not_looked_at for lint in explanation.lints):
        if reason is not None:
            graphs = ", ".join(lint.graph for lint in explanation.lints if lint.not_looked_at == reason)
            shown.append(Text(_plain(f"not looked at: {graphs}: {reason}"), style="bold yellow"))
    return tuple(shown)


def _taken_table(explanation: Explanation) -> RenderableType:
    if not explanation.taken:
        return _line(f"{explanation.name}: the manifest records no delegate")
    rows = []
    undecided = {lint.graph for lint in explanation.lints}
    for taken in explanation.taken:
        outside = str(taken.outside_nodes)
        if taken.graph in undecided:  # who runs what is decided on the device
            outside = "not known"
        rows.append((taken.graph, taken.delegate, str(taken.nodes), str(taken.partitions), outside))
    return _table(explanation.name, ("graph", "delegate", "nodes taken", "partitions", "outside"), rows)


def _outside_tables(explanation: Explanation) -> list[RenderableType]:
    """A table for each delegate that left something; operators of one reason and one rewrite share a row."""
    tables: list[RenderableType] = []
    for delegate in dict.fromkeys(taken.delegate for taken in explanation.taken):
        where: dict[tuple[str, str], dict[str, list[str]]] = {}
        for taken in explanation.taken:
            for left in taken.outside if taken.delegate == delegate else ():
                operators = where.setdefault((left.reason, left.rewrite), {})
                operators.setdefault(left.op, []).append(f"{taken.graph} x {left.count}")
        rows = [
            ("\n".join(f"{op}: {', '.join(graphs)}" for op, graphs in operators.items()), reason, rewrite)
            for (reason, rewrite), operators in where.items()
        ]
        if rows:
            tables.append(_table(f"outside {delegate}", ("operator", "why it stayed outside", "rewrite"), rows))
    return tables


def _engine_tables(explanation: Explanation) -> list[RenderableType]:
    looked_at = [lint for lint in explanation.lints if lint.not_looked_at is None]
    if not looked_at:
        return []
    shares = ", ".join(f"{lint.graph} {lint.leaving} of {lint.operators}" for lint in looked_at)
    tables: list[RenderableType] = [_line(f"likely not on the Neural Engine, operators: {shares}")]
    for effect, title in (("leaves", "likely leaves the Neural Engine"), ("slows", "likely slow on the Neural Engine")):
        rows = []
        sources = []
        for rule in rules().neural_engine:
            graphs = [
                f"{lint.graph} x {finding.count}"
                for lint in looked_at
                for finding in lint.findings
                if finding.rule.id == rule.id
            ]
            if rule.effect == effect and graphs:
                rows.append((f"{rule.id}\n{', '.join(graphs)}", rule.likely, rule.rewrite))
                sources.append(f"  {rule.id}: {rule.source}")
        if rows:
            tables += [_table(title, ("what", "why", "rewrite"), rows), _line("\n".join(sources))]
    tables.append(_line("Only Core ML on a device knows; no package was run or compiled here."))
    return tables


def _table(title: str, columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(_plain(title), style="bold"), title_justify="left", show_lines="rewrite" in columns)
    for column in columns:
        numeric = column in ("nodes taken", "partitions", "outside")
        table.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_plain(cell)) for cell in row))
    return table


def _line(text: str) -> RenderableType:
    from rich.text import Text

    return Text(_plain(text))


def _plain(text: str) -> str:
    """Without control characters: a manifest may hold any, and a terminal obeys them."""
    return "".join(char if char.isprintable() or char == "\n" else " " for char in text)
