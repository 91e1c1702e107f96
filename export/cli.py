"""The command line: flags become a Request, errors become one message and an exit code."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import NoReturn

from export.device_cli import add_device, add_report, run_device, run_report
from export.eval_cli import add_eval, run_eval
from export.outcome import (
    BAD_REQUEST,
    FAILED,
    INTERRUPTED,
    NOT_CHECKED,
    PASSED,
    Parser,
    command,
    exit_code,
    show,
    show_answers,
    show_kept,
)
from export.progress import ended_by_any_signal
from export.request import nearest
from export.streams import Stream, standard_streams
from runtime.errors import OutputError, PruneportError, RequestError
from runtime.names import readable, stored_name

EXIT_CODES = """\
exit codes: 0 checked and equal, 1 the engine's outputs differ from the desktop's, 2 the request or a file cannot be
used, 3 a step could not be checked on this machine, 130 interrupted"""


SWEEP_EXIT_CODES = """\
exit codes: 0 every cell passed, 1 a cell failed or could not be run, 2 the matrix or a file cannot be used, 3 a cell
could not be checked whole on this machine, 130 interrupted"""

OPTIMUM_PROG = "optimum-cli export pruneport"


def build_parser(*, optimum: bool = False) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser and, by name, those of its verbs; with `optimum`, `export` is `optimum-cli export pruneport`."""
    parser = Parser(
        prog=OPTIMUM_PROG if optimum else "pruneport",
        description="Exports vision-language models whose image tokens are pruned inside the graph, and checks them.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=Parser)
    return parser, {
        "export": _add_export(verbs, optimum=optimum),
        "verify": _add_verify(verbs),
        "ask": _add_ask(verbs),
        "serve": _add_serve(verbs),
        "explain": _add_explain(verbs),
        "sweep": _add_sweep(verbs),
        "eval": add_eval(verbs, _add_verbosity),
        "clean": _add_clean(verbs),
        **add_device(verbs, _add_verbosity),
        "report": add_report(verbs, _add_verbosity),
    }


def _add_export(verbs: argparse._SubParsersAction[Parser], *, optimum: bool) -> Parser:
    verb = verbs.add_parser(
        "export",
        prog=OPTIMUM_PROG if optimum else None,
        help="make a bundle from a checkpoint, check it in its engine, report",
        description="Makes a bundle from a checkpoint, checks it in its engine and reports.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    what = verb.add_argument_group("what to export")
    what.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="model to export, e.g. llava-1.5-7b or pocket; auto: that of --weights DIR",
    )
    what.add_argument(
        "--keep",
        required=True,
        metavar="N|P%|all",
        help="image tokens to keep, or their share; `all` does not prune; N,N,...: several keeps in one bundle "
        "(xnnpack, onnx)",
    )
    what.add_argument("--target", default="android", metavar="T", help="android (default) or ios")
    what.add_argument(
        "--backend",
        metavar="B",
        help="android: xnnpack (default), vulkan, onnx, webgpu, nnapi, qnn; ios: coreml, executorch; "
        "vision=B,text=B for each part its own",
    )
    what.add_argument("--soc", metavar="CHIP", help="the one chip to compile for, e.g. snapdragon-8-gen-3 (qnn)")
    what.add_argument("--min-ios", metavar="V", help="ios: the oldest version that runs it, 18 (default) or 17")
    what.add_argument("--precision", metavar="P", help="fp32 or fp16; vision=P,text=P where parts differ")
    what.add_argument("--quant-vision", metavar="Q", help="vision graph: 8da8w; coreml: int8, int4, pal4; qnn: a16w8")
    what.add_argument(
        "--quant-text",
        metavar="Q",
        help="text graphs: 8da4w[-g64|-g32] or 8da8w; onnx: int4[-g64|-g128], int8; coreml: int4, int8, pal4",
    )
    what.add_argument("--image-size", metavar="N|HxW", help="pixels of the photo, for models that take any size")
    what.add_argument("--text-tokens", default="512", metavar="N", help="room for question and answer (default 512)")
    what.add_argument(
        "--cut",
        metavar="N",
        help="prune in front of decoder layer N (default 2, as in the paper; Qwen3-VL: 3); 0: behind the projector",
    )
    what.add_argument(
        "--layout",
        default="pruneport",
        metavar="L",
        help="whose runtime runs it: pruneport (default), multimodal-runner (xnnpack) or transformers.js (onnx)",
    )
    what.add_argument(
        "--method", metavar="NAME", help="who chooses the tokens: vlm-pruner (default) or uniform (evenly spaced)"
    )
    what.add_argument("--only", metavar="PART", help="vision: the vision graph alone, without the text graphs")
    what.add_argument("--twin", action="store_true", help="export the unpruned twin too and compare both")
    source = verb.add_argument_group("what to export it from")
    source.add_argument("--weights", metavar="DIR|random", help="checkpoint folder, or `random` for seeded weights")
    source.add_argument("--seed", default="0", metavar="N", help="seed of random weights (default 0)")
    source.add_argument("--image", metavar="PHOTO", help="photo to check with (default: a sample of scikit-learn)")
    source.add_argument("--calibration", metavar="DIR", help="8 to 64 photos to quantise with, instead of the default")
    run = verb.add_argument_group("how to run")
    run.add_argument(
        "--reference",
        default="auto",
        metavar="D",
        help="where desktop outputs are made, in fp32: auto (default: a GPU if there is one), cpu, cuda",
    )
    if optimum:  # whose exporters all take the folder last
        run.add_argument("output_dir", metavar="OUT", help="where bundles go")
    else:
        run.add_argument("--output-dir", default="bundles", metavar="DIR", help="where bundles go (default bundles)")
    run.add_argument("--dry-run", action="store_true", help="say what would be made and what it needs, then stop")
    run.add_argument("--force", action="store_true", help="try it although it needs more RAM or disk than there is")
    run.add_argument("--resume", action="store_true", help="go on where an export of the same request was killed")
    _add_verbosity(run)
    return verb


def _add_verify(verbs: argparse._SubParsersAction[Parser]) -> Parser:
    verb = verbs.add_parser(
        "verify",
        help="re-check a bundle's hashes and parity from disk",
        description="Re-checks a bundle's hashes and parity from disk; writes nothing and needs no torch for ONNX.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    verb.add_argument("bundle", metavar="BUNDLE", help="the bundle's folder")
    _add_verbosity(verb)
    return verb


def _add_ask(verbs: argparse._SubParsersAction[Parser]) -> Parser:
    verb = verbs.add_parser(
        "ask",
        help="ask a bundle about a photo, in its engine on this machine",
        description="Asks a bundle about a photo, in its engine on this machine; several questions share the photo.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    verb.add_argument("bundle", metavar="BUNDLE", help="the bundle's folder")
    verb.add_argument("photo", metavar="PHOTO", help="a picture, or a prefill saved before (*.safetensors)")
    verb.add_argument("question", metavar="QUESTION", nargs="+", help="what to ask")
    verb.add_argument("--keep", metavar="N", help="which of the bundle's keeps to ask (default: its first)")
    verb.add_argument("--compare", action="store_true", help="ask the unpruned twin that lies beside the bundle, too")
    verb.add_argument("--max-new-tokens", default="64", metavar="N", help="end the answer there (default 64)")
    verb.add_argument("--temperature", default="0", metavar="T", help="0 is greedy (default)")
    verb.add_argument(
        "--top-p", default="1", metavar="P", help="draw from the likeliest, up to a share of P (default 1)"
    )
    verb.add_argument("--seed", default="0", metavar="N", help="seed of the draw (default 0)")
    verb.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end the answer before this text")
    verb.add_argument("--save-prefill", metavar="FILE", help="keep what the photo left in the cache (*.safetensors)")
    verb.add_argument("--draw", metavar="FILE", help="draw the kept tokens over the photo (*.png, *.jpg, *.webp)")
    _add_verbosity(verb)
    return verb


def _add_serve(verbs: argparse._SubParsersAction[Parser]) -> Parser:
    verb = verbs.add_parser(
        "serve",
        help="show a bundle on a page in the browser of this machine: kept tokens, answers, the twin beside it",
        description="Shows a bundle on a page in the browser of this machine, until Ctrl-C: the tokens that it keeps "
        "of a photo, its answers, and those of the unpruned twin that lies beside it.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    verb.add_argument("bundle", metavar="BUNDLE", help="the bundle's folder")
    verb.add_argument(
        "--port", default="7321", metavar="N", help="port of 127.0.0.1 (default 7321); 0 takes a free one"
    )
    _add_verbosity(verb)
    return verb


def _add_explain(verbs: argparse._SubParsersAction[Parser]) -> Parser:
    verb = verbs.add_parser(
        "explain",
        help="say what each delegate took, what stayed outside and why, and which rewrite would help",
        description="Says what each delegate took, what stayed outside and why, and which rewrite would help; for Core "
        "ML, what likely leaves the Neural Engine. Reads the bundle, opens no engine, hashes nothing.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    verb.add_argument("bundle", metavar="BUNDLE", help="the bundle's folder")
    _add_verbosity(verb)
    return verb


def _add_sweep(verbs: argparse._SubParsersAction[Parser]) -> Parser:
    verb = verbs.add_parser(
        "sweep",
        help="export every cell of a matrix of flags, with one report",
        description="Exports every cell of a matrix of flags and reports on all of them; goes on where it was stopped.",
        epilog=SWEEP_EXIT_CODES,
        allow_abbrev=False,
    )
    verb.add_argument("matrix", metavar="MATRIX", help="YAML: flags of export, each with a word or a list of words")
    verb.add_argument(
        "--output-dir", metavar="DIR", help="where cells and report go (default sweeps/ and MATRIX's name)"
    )
    verb.add_argument("--jobs", metavar="N", help="cells to run side by side (default: one for every 4 cores)")
    verb.add_argument("--ray", metavar="ADDRESS", help="run cells on a Ray cluster: its address, auto or local")
    verb.add_argument("--retry-failed", action="store_true", help="run cells again that failed before")
    verb.add_argument("--reports-only", action="store_true", help="remove a bundle's graphs when it is checked")
    verb.add_argument("--dry-run", action="store_true", help="list the cells and what they need, then stop")
    _add_verbosity(verb)
    return verb


def _add_clean(verbs: argparse._SubParsersAction[Parser]) -> Parser:
    verb = verbs.add_parser(
        "clean",
        help="remove what exports that were killed left behind",
        description="Removes the hidden folders that killed exports left in the folder where bundles go. What a "
        "running export works in, or one on another computer, is left and named.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    verb.add_argument("folder", metavar="DIR", nargs="?", default="bundles", help="where bundles go (default bundles)")
    _add_verbosity(verb)
    return verb


def _add_verbosity(group: argparse._ActionsContainer) -> None:
    group.add_argument("-v", "--verbose", action="store_true", help="show what the libraries say")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress, only the result")


def parse(argv: Sequence[str], *, optimum: bool = False) -> argparse.Namespace:
    """Parses the arguments; a mistake in them is a RequestError that names the nearest flag or verb."""
    parser, verbs = build_parser(optimum=optimum)
    names = [name for name in verbs if " " not in name]
    if argv and not argv[0].startswith("-") and argv[0] not in names:
        raise RequestError(f"unknown verb {argv[0]!r}{nearest(argv[0], names)}; verbs are: {', '.join(names)}")
    chosen = verbs[argv[0]] if argv and argv[0] in verbs else parser
    actions = [name.split()[1] for name in verbs if argv and name.startswith(f"{argv[0]} ")]
    if actions and len(argv) > 1 and not argv[1].startswith("-"):
        if argv[1] not in actions:
            near = nearest(argv[1], actions)
            raise RequestError(f"unknown action {argv[1]!r}{near}; {argv[0]} can: {', '.join(actions)}")
        chosen = verbs[f"{argv[0]} {argv[1]}"]
    # Before argparse looks: for a mistyped flag it would report the right one as missing.
    flags = re.findall(r"(?<![\w-])--[a-z-]+", chosen.format_help())
    for word in takewhile(lambda word: word != "--", argv):
        flag = word.split("=")[0]
        if flag.startswith("--") and flag not in flags:
            raise RequestError(f"unknown argument {flag!r}{nearest(flag, flags)}; see {chosen.prog} --help")
    args = parser.parse_args(_with_negative_shares(argv))
    if "quiet" in args and args.verbose and args.quiet:
        raise RequestError("-v and -q contradict each other; give one of them")
    return args


def _with_negative_shares(argv: Sequence[str]) -> list[str]:
    """Joins `--keep` and `-5%`: argparse knows negative numbers, and takes such a word for a flag."""
    words: list[str] = []
    for word in argv:
        if words and words[-1] == "--keep" and re.match(r"-[0-9.]", word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def main(argv: Sequence[str], *, version: str, optimum: bool = False) -> int:
    """Runs one command line; returns the exit code, prints at most one message for an error.

    With `optimum` it is `export` and what follows `optimum-cli export pruneport`, where the folder is no flag but OUT.
    """
    with standard_streams() as (output, error_output):
        try:
            code = _run(argv, version, output, optimum=optimum)
            output.check()
            return code
        except PruneportError as error:
            print(f"pruneport: error: {error}", file=error_output)
            return error.exit_code
        except OSError as error:
            # Folders and files can go, or refuse, at any time, and in any library.
            print(f"pruneport: error: {_system_error(error)}", file=error_output)
            return BAD_REQUEST
        except KeyboardInterrupt as stop:
            what = "; ".join(getattr(stop, "__notes__", ())) or "nothing was written"
            print(f"pruneport: interrupted, {what}", file=error_output)
            return INTERRUPTED


def _run(argv: Sequence[str], version: str, output: Stream, *, optimum: bool) -> int:
    nul = next((word for word in argv if "\0" in word), None)
    if nul is not None:
        raise RequestError(f"{readable(nul)!r} holds a NUL character, which no name of a file has; leave it out")
    args = parse(argv, optimum=optimum)
    if args.version:
        print(f"pruneport {version}")
        return PASSED
    if args.verb is None:
        build_parser()[0].print_help()
        return PASSED
    try:
        Path.cwd()
    except OSError as error:
        raise RequestError(
            f"the folder that this runs in cannot be reached: {error.strerror}; go to another one with cd"
        ) from error
    if args.verb == "export":
        return _export(args, version, output)
    if args.verb == "verify":
        return _verify(args)
    if args.verb == "ask":
        return _ask(args, output)
    if args.verb == "serve":
        with ended_by_any_signal():
            _serve(args)
    if args.verb == "clean":
        return _clean(args)
    if args.verb == "sweep":
        return _sweep(args, version, output)
    if args.verb == "device":
        with ended_by_any_signal():
            return run_device(args)
    if args.verb == "eval":
        return run_eval(args)
    if args.verb == "report":
        return run_report(args)
    return _explain(args)


def _system_error(error: OSError) -> str:
    what = f"{error.filename} cannot be used: " if error.filename is not None else ""
    return f"{what}{error.strerror or error}; check that it is there, may be read and written, and has space left"


def _export(args: argparse.Namespace, version: str, output: Stream) -> int:
    from export.request import Request, describe, plan

    request = Request(
        model=args.model,
        keep=args.keep,
        target=args.target,
        backend=args.backend,
        soc=args.soc,
        min_ios=args.min_ios,
        precision=args.precision,
        quant_vision=args.quant_vision,
        quant_text=args.quant_text,
        image_size=args.image_size,
        text_tokens=args.text_tokens,
        cut=args.cut,
        layout=args.layout,
        method=args.method,
        only=args.only,
        weights=args.weights,
        seed=args.seed,
        image=args.image,
        calibration=args.calibration,
        reference=args.reference,
        output_dir=args.output_dir,
        twin=args.twin,
        force=args.force,
    )
    planned = plan(request)
    if args.dry_run or not args.quiet:
        print(describe(planned), file=sys.stdout if args.dry_run else sys.stderr)
    if args.dry_run:
        return PASSED
    from export.pipeline import export, stage_count
    from export.progress import Progress, library_noise

    progress = Progress(stages=stage_count(planned), quiet=args.quiet)
    try:
        with library_noise(shown=args.verbose), ended_by_any_signal():
            made = export(planned, progress=progress, version=version, resume=args.resume)
    except KeyboardInterrupt:
        finished = [str(bundle.path) for bundle in planned.bundles if bundle.path.exists()]
        what = f"finished before that: {', '.join(finished)}" if finished else "nothing was written"
        print(f"pruneport: interrupted, {what}", file=sys.stderr)
        return INTERRUPTED
    if args.quiet:
        output.write_path(made.bundle.path)
    else:
        show(made.bundle, made.verdict, next_command=command("verify", str(made.bundle.path)))
    return exit_code(made.verdict)


def _verify(args: argparse.Namespace) -> int:
    from export.progress import Progress, library_noise
    from runtime.bundle import read_bundle
    from runtime.harness import verify

    path = Path(args.bundle)
    progress = Progress(stages=1, quiet=args.quiet)
    with library_noise(shown=args.verbose), progress.stage("verify from disk"):
        verdict = verify(path)
    bundle = read_bundle(path)
    if args.quiet:
        print(verdict.outcome)
    else:
        show(bundle, verdict, next_command=command("export", "--help"))
    return exit_code(verdict)


def _ask(args: argparse.Namespace, output: Stream) -> int:
    from export.progress import library_noise
    from export.request import number, whole_number
    from runtime.ask import Inquiry, ask
    from runtime.generation import Sampling

    inquiry = Inquiry(
        photo=Path(args.photo),
        questions=tuple(args.question),
        keep=None if args.keep is None else whole_number("keep", args.keep, 1, 10**6),
        max_new_tokens=whole_number("max_new_tokens", args.max_new_tokens, 1, 10**6),
        sampling=Sampling(
            temperature=number("temperature", args.temperature),
            top_p=number("top_p", args.top_p),
            seed=whole_number("seed", args.seed, 0, 2**32 - 1),
        ),
        stops=tuple(args.stop),
        save_prefill=None if args.save_prefill is None else Path(args.save_prefill),
        draw=None if args.draw is None else Path(args.draw),
    )

    def say(piece: str) -> None:
        # A terminal may know fewer characters than the model.
        encoding = output.encoding or "utf-8"
        print(piece.encode(encoding, "replace").decode(encoding), end="", file=output, flush=True)
        if output.lost is not None:
            reason = output.lost.strerror or output.lost
            raise OutputError(f"the answer cannot be written to standard output: {reason}")

    def tell(line: str) -> None:
        if not args.quiet:
            print(line, file=sys.stderr, flush=True)

    with library_noise(shown=args.verbose):
        told = ask(Path(args.bundle), inquiry, compare=args.compare, say=say, tell=tell)
    if args.compare and not args.quiet:
        show_answers(told)
        show_kept(Path(args.bundle), inquiry.photo, told[0].kept)
    return PASSED


def _serve(args: argparse.Namespace) -> NoReturn:
    from export.progress import library_noise
    from export.request import whole_number
    from runtime.serve.server import serve

    def say(address: str) -> None:
        words = address if args.quiet else f"open {address} in a browser; Ctrl-C ends it"
        print(words, flush=True)

    def tell(line: str) -> None:
        if not args.quiet:
            print(line, file=sys.stderr, flush=True)

    port = whole_number("port", args.port, 0, 65535)
    with library_noise(shown=args.verbose):
        serve(Path(args.bundle), port=port, say=say, tell=tell, verbose=args.verbose)


def _sweep(args: argparse.Namespace, version: str, output: Stream) -> int:
    from export.progress import library_noise
    from export.request import whole_number
    from export.sweep.board import Board, terminal_table
    from export.sweep.cell import plan_cells
    from export.sweep.matrix import read_matrix
    from export.sweep.places import Local, Place, Ray
    from export.sweep.process import source_sha256
    from export.sweep.report import PAGE, counted, crowded, troubles, write
    from export.sweep.walk import Result, list_cells, run_cells

    jobs = None if args.jobs is None else whole_number("jobs", args.jobs, 1, 1024)
    if args.ray is not None and jobs is not None:
        raise RequestError("--jobs means nothing with --ray, whose cluster decides; leave one of them out")
    matrix = Path(args.matrix)
    words = read_matrix(matrix)
    folder = Path(args.output_dir or Path("sweeps") / matrix.stem)
    source = source_sha256()

    def tell(line: str) -> None:
        if not args.quiet:
            print(line, file=sys.stderr, flush=True)

    def place() -> Place:
        return Local(jobs) if args.ray is None else Ray(args.ray)

    def report(result: Result) -> None:
        write(result, folder, matrix=stored_name(matrix), version=version)

    with library_noise(shown=args.verbose):
        cells = plan_cells(words, folder, version=version, source=source, tell=tell)
        if args.dry_run:
            for line in list_cells(cells):
                print(line)
            return PASSED
        board = Board(cells, stream=sys.stderr, quiet=args.quiet)
        try:
            with ended_by_any_signal(), board.live():
                result = run_cells(
                    cells,
                    folder,
                    place=place,
                    source=source,
                    screen=board,
                    report=report,
                    verbose=args.verbose,
                    retry_failed=args.retry_failed,
                    reports_only=args.reports_only,
                )
        except KeyboardInterrupt:
            print(f"pruneport: interrupted, {counted(board.result())}; the same command goes on", file=sys.stderr)
            return INTERRUPTED
    page = folder / PAGE
    if args.quiet:
        output.write_path(page)
    else:
        from rich.console import Console
        from rich.text import Text

        console = Console()
        console.print(terminal_table(result, console.width))
        for line in (*troubles(result), counted(result), crowded(result), f"report: {readable(page)}"):
            if line:
                console.print(Text(line), soft_wrap=True)
    return {"passed": PASSED, "failed": FAILED, "not checked": NOT_CHECKED}[result.outcome]


def _clean(args: argparse.Namespace) -> int:
    from runtime.leftovers import clean

    leftovers = clean(Path(args.folder))
    for leftover in leftovers:
        print(leftover)
    if not leftovers and not args.quiet:
        print(f"nothing to remove in {args.folder}")
    return PASSED


def _explain(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.text import Text

    from export.progress import library_noise
    from runtime.explain import explain, in_short, terminal_tables

    with library_noise(shown=args.verbose):
        explanation = explain(Path(args.bundle))
    if args.quiet:
        print(in_short(explanation))
    else:
        console = Console()
        for shown in terminal_tables(explanation):
            console.print(shown, soft_wrap=isinstance(shown, Text))  # an address is there to be copied
    return PASSED if explanation.complete else NOT_CHECKED
