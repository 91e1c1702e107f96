"""The verb `pruneport eval`: what pruning costs in answers, by method and keep, in the desktop model and in bundles."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from export.outcome import PASSED, Parser
from runtime.errors import OutputError, RequestError

if TYPE_CHECKING:
    from export.families.family import ModelEntry

EVAL_EXIT_CODES = """\
exit codes: 0 all questions were put, 2 the request or a file cannot be used, 130 interrupted"""


def add_eval(
    verbs: argparse._SubParsersAction[Parser], verbosity: Callable[[argparse._ActionsContainer], None]
) -> Parser:
    """Adds `eval`; returns its parser."""
    verb = verbs.add_parser(
        "eval",
        help="put questions with known answers to pruned models and bundles",
        description="Puts questions with known answers to the desktop model, unpruned and pruned by any methods, and "
        "to bundles; tells accuracy with intervals, as data and as a page. Goes on where it was stopped.",
        epilog=EVAL_EXIT_CODES,
        allow_abbrev=False,
    )
    verb.add_argument("bundles", metavar="BUNDLE", nargs="*", help="bundles of the same weights to ask, too")
    verb.add_argument("--model", required=True, metavar="M", help="model to ask, e.g. pocket")
    verb.add_argument("--weights", metavar="DIR", help="checkpoint folder")
    verb.add_argument(
        "--keep", default="64", metavar="N|P%,...", help="image tokens that stay, or a share (default 64)"
    )
    verb.add_argument("--method", default="vlm-pruner", metavar="NAME,...|all", help="who chooses (default vlm-pruner)")
    verb.add_argument("--cut", metavar="N", help="prune there (default: layer 2, or behind the projector)")
    verb.add_argument(
        "--questions", metavar="FILE", help="JSON lines: image, question, answer, category (default: the model's own)"
    )
    verb.add_argument("--photos", metavar="N", help="ask about the first N photos alone")
    verb.add_argument("--output-dir", metavar="DIR", help="where results go (default evaluations/MODEL)")
    verbosity(verb)
    return verb


def run_eval(args: argparse.Namespace) -> int:
    """Runs `pruneport eval`; returns the exit code."""
    from export.checkpoints import open_checkpoint
    from export.evaluation.bundles import ask_bundle, bundle_at
    from export.evaluation.page import PAGES, terminal_categories, terminal_scores, write_pages
    from export.evaluation.questions import read_questions
    from export.evaluation.run import evaluate, save, scores, wanted_cells
    from export.progress import library_noise
    from export.request import kept_tokens, model_entry, whole_number

    entry = model_entry(args.model, args.weights)
    questions = read_questions(_questions(args.questions, entry))
    questions = questions.first(None if args.photos is None else whole_number("photos", args.photos, 1, 10**6))
    checkpoint = open_checkpoint(entry, weights=args.weights)
    identity = checkpoint.identity().sha256
    bundles = [(Path(name), bundle_at(Path(name), identity or "")) for name in args.bundles]
    tokens = checkpoint.geometry.image_tokens
    keeps = list(dict.fromkeys(kept_tokens(word, tokens, entry.name) for word in args.keep.split(",")))
    class_token, least = entry.family.class_token, checkpoint.geometry.least_cut
    cut = None if args.cut is None else whole_number("cut", args.cut, least, checkpoint.geometry.text.layers - 1)
    methods = _methods(args.method, class_token=class_token)
    cells = wanted_cells(methods, keeps, cut, class_token=class_token, least_cut=least)
    out_dir = Path(args.output_dir or Path("evaluations") / entry.name)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out_dir} cannot be made: {error.strerror or error}; give another --output-dir") from error
    with library_noise(shown=args.verbose), _bar(quiet=args.quiet) as told:
        record = evaluate(checkpoint, entry, questions, cells, out_dir, told=told)
        for path, bundle in bundles:
            cell = ask_bundle(bundle, path, questions, told=told)
            record.cells = [known for known in record.cells if known.name != cell.name] + [cell]
            save(record, out_dir)
    image = entry.family.image(checkpoint.folder, checkpoint.geometry)
    write_pages(record, questions, image, checkpoint.geometry, out_dir)
    if args.quiet:
        print(out_dir / PAGES[0])
    else:
        from rich.console import Console

        console = Console()
        rows = scores(record)
        console.print(terminal_scores(rows))
        console.print(terminal_categories(rows))
        console.print(f"page: {out_dir / PAGES[1]}", soft_wrap=True)
    return PASSED


def _questions(given: str | None, entry: ModelEntry) -> Path:
    if given is not None:
        return Path(given)
    if entry.questions is None:
        raise RequestError(
            f"{entry.name} has no questions of its own; give a file of JSON lines with image, question, answer and "
            "category by --questions"
        )
    return entry.questions


def _methods(words: str, *, class_token: bool) -> list[str]:
    from export.evaluation.run import looks_at_class_token
    from pruning import METHODS

    if words == "all":
        return [name for name, method in METHODS.items() if class_token or not looks_at_class_token(method)]
    return list(dict.fromkeys(words.split(",")))


@contextmanager
def _bar(*, quiet: bool) -> Iterator[Callable[[str, float], None]]:
    """Hands out what is told of progress; a bar on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as bar:
        task = bar.add_task("asking", total=1.0)
        yield lambda words, share: bar.update(task, description=words, completed=share)
