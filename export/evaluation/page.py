"""An evaluation for people: a page with plots and tables, and the summary that other programs read."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from export.evaluation.questions import QuestionSet
from export.evaluation.run import UNPRUNED, Record, Score, scores
from runtime.errors import EngineMissingError
from runtime.report import Table, templates

if TYPE_CHECKING:
    from rich.console import RenderableType

    from runtime.bundle import ImageInfo
    from runtime.kept_picture import Grids

PAGES = ("summary.json", "evaluation.html")
# The photo whose kept tokens are drawn, of those that are asked about.
SHOWN = 0


def write_pages(record: Record, questions: QuestionSet, image: ImageInfo, grids: Grids, out_dir: Path) -> None:
    """Writes summary.json and evaluation.html, in which `image` and `grids` say what of a photo is seen and as what.

    Raises EngineMissingError without matplotlib.
    """
    rows = scores(record)
    summary = {
        "model": record.model,
        "weights_sha256": record.weights_sha256,
        "questions": {"name": record.questions, "count": questions.questions, "photos": len(questions.photos)},
        "rows": rows,
    }
    encoded = msgspec.json.format(msgspec.json.encode(summary), indent=1)
    (out_dir / PAGES[0]).write_bytes(encoded + b"\n")
    page = (
        templates()
        .get_template("evaluation.html.j2")
        .render(
            model=record.model,
            count=questions.questions,
            photos=len(questions.photos),
            plot=_over_keep(rows),
            kept=_kept(record, questions, image, grids),
            accuracies=_accuracies(rows),
            categories=_categories(rows),
        )
    )
    (out_dir / PAGES[1]).write_text(page.rstrip() + "\n", encoding="utf-8")


def terminal_scores(rows: Sequence[Score]) -> RenderableType:
    """The table of a terminal: one row a method and keep."""
    from rich.table import Table as RichTable

    table = RichTable(title_justify="left")
    for head in ("method", "keep", "cut", "accuracy (95 %)", "of unpruned"):
        table.add_column(head, justify="left" if head == "method" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*_cells(row)[:5])
    return table


def terminal_categories(rows: Sequence[Score]) -> RenderableType:
    """Accuracy by category, one row a method and keep."""
    from rich.table import Table as RichTable

    names = tuple(dict.fromkeys(name for row in rows for name in row.categories))
    table = RichTable(title_justify="left")
    for head in ("method", "keep", *names):
        table.add_column(head, justify="left" if head == "method" else "right", no_wrap=True)
    for row in rows:
        shares = (f"{100 * row.categories[name].value:.1f}" if name in row.categories else "" for name in names)
        table.add_row(row.name, str(row.keep), *shares)
    return table


def _cells(row: Score) -> tuple[str, ...]:
    return (
        row.name,
        str(row.keep),
        "" if row.cut is None else str(row.cut),
        str(row.accuracy),
        f"{100 * row.relative:.1f} %",
        f"{100 * row.first.value:.1f} %",
        f"{100 * row.second.value:.1f} %",
    )


def _accuracies(rows: Sequence[Score]) -> Table:
    columns = ("method", "keep", "cut", "accuracy (95 %)", "of unpruned", "first question", "later questions")
    return Table(columns=columns, rows=tuple(_cells(row) for row in rows), numeric=frozenset(columns[1:]))


def _categories(rows: Sequence[Score]) -> Table:
    names = tuple(dict.fromkeys(name for row in rows for name in row.categories))
    return Table(
        columns=("method", "keep", *names),
        rows=tuple(
            (row.name, str(row.keep), *(str(row.categories[name]) if name in row.categories else "" for name in names))
            for row in rows
        ),
        numeric=frozenset(("keep", *names)),
    )


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise EngineMissingError(f"plots need matplotlib ({error}); pip install 'pruneport[eval]'") from error
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "pruneport", "font.family": "sans-serif", "font.size": 10}
    )
    return plt


def _over_keep(rows: Sequence[Score]) -> str:
    """Accuracy over kept tokens, a line a method, as SVG."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(9, 5))
    whole = next(row for row in rows if row.name == UNPRUNED)
    axes.axhspan(100 * whole.accuracy.low, 100 * whole.accuracy.high, color="0.85", label="unpruned")
    names = list(dict.fromkeys(row.name for row in rows if row.cut is not None))
    marks = "osv^D<>pXP*hd"
    for number, name in enumerate(names):
        line = sorted((row for row in rows if row.name == name), key=lambda row: row.keep)
        middle = [100 * row.accuracy.value for row in line]
        spread = [
            [100 * (row.accuracy.value - row.accuracy.low) for row in line],
            [100 * (row.accuracy.high - row.accuracy.value) for row in line],
        ]
        axes.errorbar(
            [row.keep * 1.015 ** (number - len(names) / 2) for row in line],
            middle,
            yerr=spread,
            label=name,
            marker=marks[number % len(marks)],
            markersize=4,
            linewidth=2.2 if name == "vlm-pruner" else 1.1,
            elinewidth=0.7,
        )
    axes.set_xscale("log", base=2)
    keeps = sorted({row.keep for row in rows if row.cut is not None})
    axes.set_xticks(keeps, [str(keep) for keep in keeps])
    axes.minorticks_off()
    axes.set_xlabel("kept image tokens")
    axes.set_ylabel("right answers, %")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, ncols=2, frameon=False)
    return _svg(plt, figure)


def _kept(record: Record, questions: QuestionSet, image: ImageInfo, grids: Grids) -> str:
    """Which tokens of one photo each method keeps at the keep that most methods have, as SVG."""
    from runtime.image import load_photo, view
    from runtime.kept_picture import draw_kept

    pruned = [cell for cell in record.cells if cell.cut is not None and any(cell.kept)]
    if not pruned:
        return ""
    plt = _pyplot()
    keeps = [cell.keep for cell in pruned]
    keep = max(set(keeps), key=lambda number: (keeps.count(number), -abs(number - 64)))
    shown = [cell for cell in pruned if cell.keep == keep]
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(2.4 * columns, 2.7 * lines), squeeze=False)
    seen = view(load_photo(questions.photos[SHOWN].photo), image)
    for place in axes.flat:
        place.axis("off")
    for place, cell in zip(axes.flat, shown, strict=False):
        place.imshow(draw_kept(seen, grids, cell.kept[SHOWN]), interpolation="none")
        place.set_title(cell.name, fontsize=9)
    figure.suptitle(f"{keep} kept tokens", fontsize=10)
    figure.tight_layout()
    return _svg(plt, figure)


def _svg(plt: Any, figure: Any) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None}, bbox_inches="tight", transparent=True)
    plt.close(figure)
    text = out.getvalue()
    return text[text.index("<svg") :]
