"""The verbs for devices: `pruneport device list|bench|ask|pull|clean`, and `pruneport report` over what they found."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from export.outcome import FAILED, NOT_CHECKED, PASSED, Parser, command, exit_code, show
from runtime.errors import RequestError

if TYPE_CHECKING:
    from runtime.bundle import Bundle
    from runtime.devices.adb import AdbDevice
    from runtime.devices.remote import RemoteDevice
    from runtime.devices.wire import Received

DEVICE_EXIT_CODES = """\
exit codes: 0 the device computes what the desktop does, 1 it does not, 2 the request, a file or the device cannot be
used, 3 a step was not run on the device, 130 interrupted"""
REPORT_EXIT_CODES = """\
exit codes: 0 all devices compute what the desktop does, 1 one does not, or is slower than before, 2 the request or a
file cannot be used, 3 a step was not run on a device, 130 interrupted"""


_PLACES = ("adb", "devicectl", "ai-hub", "here")


def add_device(
    verbs: argparse._SubParsersAction[Parser], verbosity: Callable[[argparse._ActionsContainer], None]
) -> dict[str, Parser]:
    """Adds `device` with its actions; returns the parsers by the words that name them."""
    verb = verbs.add_parser(
        "device",
        help="run a bundle on a phone, and bring back what it found",
        description="Runs a bundle on a phone over adb, in the app or in the native runner, and brings back findings.",
        epilog=DEVICE_EXIT_CODES,
        allow_abbrev=False,
    )
    actions = verb.add_subparsers(dest="action", metavar="ACTION", parser_class=type(verb))

    def action(name: str, words: str) -> Parser:
        return actions.add_parser(
            name,
            help=words,
            description=f"{words[0].upper()}{words[1:]}.",
            epilog=DEVICE_EXIT_CODES,
            allow_abbrev=False,
        )

    made = {name: action(name, words) for name, words in (
        ("list", "list the devices that adb knows, and what they are"),
        ("bench", "check a bundle on a device and time it there, in turns with its unpruned twin"),
        ("ask", "ask a bundle about a photo, on a device"),
        ("pull", "bring back the findings of a job whose cable was pulled"),
        ("clean", "remove all that was pushed to a device"),
    )}  # fmt: skip
    for name in ("bench", "ask"):
        made[name].add_argument("bundle", metavar="BUNDLE", help="the bundle's folder")
    bench, ask = made["bench"], made["ask"]
    bench.add_argument("--twin", metavar="BUNDLE", help="the unpruned twin (default: the one beside the bundle)")
    bench.add_argument(
        "--runs", default="10", metavar="N", help="timed runs of each graph (default 10), 0 times nothing"
    )
    bench.add_argument("--most-celsius", default="37", metavar="T", help="start no run above T degrees (default 37)")
    bench.add_argument("--output-dir", metavar="DIR", help="where the findings go (default findings/ and the names)")
    ask.add_argument("photo", metavar="PHOTO", help="a picture")
    ask.add_argument("question", metavar="QUESTION", help="what to ask")
    ask.add_argument("--max-new-tokens", default="64", metavar="N", help="end the answer there (default 64)")
    made["pull"].add_argument("output_dir", metavar="DIR", help="where the findings go; must not exist")
    for name in ("bench", "ask"):
        made[name].add_argument("--keep", metavar="N", help="which of the bundle's keeps to run (default: its first)")
        made[name].add_argument("--threads", default="0", metavar="N", help="threads (default 0: the device decides)")
        made[name].add_argument(
            "--timeout", default="3600", metavar="S", help="end the job after S seconds (default 3600)"
        )
    for name, parser in made.items():
        if name != "list":
            parser.add_argument("--serial", metavar="ID", help="which device (default: the only one), see device list")
            parser.add_argument(
                "--folder", metavar="DIR", help="where it goes on the device (default /data/local/tmp/...)"
            )
        if name in ("bench", "ask"):
            parser.add_argument(
                "--on",
                choices=_PLACES,
                default="adb",
                metavar="WAY",
                help=f"the way to the device: {', '.join(_PLACES)} (default adb); devicectl is Apple's, here is this "
                "machine",
            )
            parser.add_argument(
                "--runner", metavar="FILE", help="the native runner for it (default: the app, installed)"
            )
        verbosity(parser)
    return {"device": verb, **{f"device {name}": parser for name, parser in made.items()}}


def add_report(
    verbs: argparse._SubParsersAction[Parser], verbosity: Callable[[argparse._ActionsContainer], None]
) -> Parser:
    """Adds `report`."""
    verb = verbs.add_parser(
        "report",
        help="one page over what devices found, beside the desktop's outputs",
        description="Judges what devices found against the desktop's outputs, and writes devices.html, .md and .csv.",
        epilog=REPORT_EXIT_CODES,
        allow_abbrev=False,
    )
    verb.add_argument("findings", metavar="FINDINGS", nargs="+", help="folders that `pruneport device bench` wrote")
    verb.add_argument(
        "--reference", metavar="BUNDLE", action="append", default=[], help="the bundle that was run; once for each"
    )
    verb.add_argument("--against", metavar="FINDINGS", help="earlier findings: what became slower is a failure")
    verb.add_argument("--output-dir", metavar="DIR", default="report", help="where the pages go (default report)")
    verbosity(verb)
    return verb


def run_device(args: argparse.Namespace) -> int:
    """Runs one action."""
    actions = {"list": _list, "bench": _bench, "ask": _ask, "pull": _pull, "clean": _clean}
    if args.action is None:
        raise RequestError(f"device needs an action: {', '.join(actions)}; see pruneport device --help")
    return actions[args.action](args)


def _tell(args: argparse.Namespace) -> Callable[[str], None]:
    def tell(line: str) -> None:
        if not args.quiet:
            print(line, file=sys.stderr, flush=True)

    return tell


def _adb(args: argparse.Namespace) -> AdbDevice:
    from runtime.devices.adb import FOLDER, AdbDevice

    return AdbDevice(args.serial, folder=(args.folder or FOLDER).rstrip("/"), progress=_tell(args))


def _device(args: argparse.Namespace, *, gated: bool = False) -> RemoteDevice:
    """The device that the flags name, for a job."""
    from export.request import number
    from runtime.devices.adb import FOLDER, AdbDevice
    from runtime.devices.ai_hub import AiHubDevice
    from runtime.devices.devicectl import DevicectlDevice
    from runtime.devices.here import HereDevice
    from runtime.devices.wire import GateJob

    if args.on != "adb":
        for flag in ("folder",) if args.on == "here" else ("runner", "folder"):
            if getattr(args, flag) is not None:
                raise RequestError(f"--{flag} means nothing with --on {args.on}; leave one of them out")
    if args.on == "ai-hub":
        if args.serial is None:
            raise RequestError("--on ai-hub needs --serial NAME, a phone of the hub; see `qai-hub list-devices`")
        return AiHubDevice(args.serial, progress=_tell(args))
    gate = None
    if gated:
        most = number("most_celsius", args.most_celsius)
        if not 0 < most <= 100:
            raise RequestError(f"most_celsius={args.most_celsius} must lie above 0 and at most at 100")
        gate = GateJob(most_celsius=most)
    timeout_s = number("timeout", args.timeout)
    if not 0 < timeout_s <= 7 * 86400:
        raise RequestError(f"timeout={args.timeout} must lie above 0 and within a week, in seconds")
    if args.on == "here":
        runner = None if args.runner is None else Path(args.runner)
        return HereDevice(runner=runner, timeout_s=timeout_s, progress=_tell(args))
    if args.on == "devicectl":
        return DevicectlDevice(args.serial, timeout_s=timeout_s, gate=gate, progress=_tell(args))
    return AdbDevice(
        args.serial,
        runner=None if args.runner is None else Path(args.runner),
        folder=(args.folder or FOLDER).rstrip("/"),
        timeout_s=timeout_s,
        gate=gate,
        progress=_tell(args),
    )


def _list(args: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Column, Table

    from runtime.devices.adb import AdbDevice, listed
    from runtime.errors import DeviceError

    devices = listed()
    if args.quiet:
        print("\n".join(device.serial for device in devices if device.state == "device"))
        return PASSED
    if not devices:
        print("no device is connected; plug one in with USB debugging on, see `adb devices`")
        return PASSED
    table = Table(Column("serial", no_wrap=True), "state", "model", "system", "ABI", "RAM", "free")
    for device in devices:
        row = [device.serial, device.state, device.model, "", "", "", ""]
        if device.state == "device":
            try:
                about = AdbDevice(device.serial).about()
                model = about.model or "no Android device"
                sizes = (f"{count / 1e9:.1f} GB" for count in (about.ram_bytes, about.free_bytes))
                row = [device.serial, device.state, model, about.system, about.abi, *sizes]
            except DeviceError as err:
                row[2] = str(err)
        table.add_row(*row)
    Console().print(table)
    return PASSED


def _bench(args: argparse.Namespace) -> int:
    from export.request import whole_number
    from runtime.bundle import of_keep, read_bundle
    from runtime.devices.remote import MOST_ANSWERS
    from runtime.devices.wire import TimingJob, make_job, write_minibench

    bundle = read_bundle(Path(args.bundle)).at(_keep(args))
    runs = whole_number("runs", args.runs, 0, 10_000)
    threads = whole_number("threads", args.threads, 0, 256)
    device = _device(args, gated=bool(runs))
    twin = _twin(args, bundle) if runs else None
    name = f"{bundle.manifest.name}-{re.sub('[^A-Za-z0-9]+', '-', device.name).strip('-')}"
    name = of_keep(name, bundle.manifest.prune.keep) if bundle.is_view else name
    out = Path(args.output_dir) if args.output_dir else Path("findings") / name
    job, tensors = make_job(
        bundle,
        threads=threads,
        timing=TimingJob(runs=runs, answers=min(runs, MOST_ANSWERS)) if runs else None,
        twin=twin,
        gate=device.gate,
    )
    received = device.collect(bundle, job, tensors, out, twin=twin)
    write_minibench(out, received.file, bundle)
    return _judged(args, bundle, received, out, twin)


def _judged(args: argparse.Namespace, bundle: Bundle, received: Received, out: Path, twin: Bundle | None) -> int:
    from runtime.check.judge import check
    from runtime.devices.received import findings_of

    verdict = check(bundle, findings_of(bundle, received, twin=twin))
    if args.quiet:
        print(verdict.outcome)
    else:
        again = command("report", str(out), "--reference", str(bundle.path))
        show(bundle, verdict, next_command=again)
    return exit_code(verdict)


def _keep(args: argparse.Namespace) -> int | None:
    from export.request import whole_number

    return None if args.keep is None else whole_number("keep", args.keep, 1, 10**6)


def _twin(args: argparse.Namespace, bundle: Bundle) -> Bundle | None:
    """The twin that was named, or the one that lies beside the bundle; None where there is none."""
    from runtime.ask import unpruned_twin
    from runtime.bundle import read_bundle
    from runtime.errors import BundleError

    if args.twin is not None:
        twin = read_bundle(Path(args.twin))
        if twin.manifest.prune.pruned:
            raise RequestError(
                f"--twin {args.twin} is pruned itself; name the bundle that was exported with --keep all"
            )
        return twin
    if not bundle.manifest.prune.pruned:
        return None
    try:
        return unpruned_twin(bundle)
    except BundleError as err:
        _tell(args)(f"nothing to time in turns with: {err}")
        return None


def _ask(args: argparse.Namespace) -> int:
    import tempfile

    from export.request import whole_number
    from runtime.bundle import read_bundle
    from runtime.devices.wire import make_question
    from runtime.errors import DeviceError
    from runtime.generation import check_room
    from runtime.image import load_photo, view
    from runtime.prompt import open_tokenizer

    bundle = read_bundle(Path(args.bundle)).at(_keep(args))
    tokenizer = open_tokenizer(bundle)
    ids = tokenizer.question_ids(args.question)
    new_tokens = whole_number("max_new_tokens", args.max_new_tokens, 1, 10**6)
    if bundle.manifest.text is not None:
        check_room(len(ids), new_tokens, room=bundle.manifest.text.tokens)
    photo = load_photo(args.photo)
    view(photo, bundle.manifest.image)  # refused here, not on the device
    device = _device(args)
    threads = whole_number("threads", args.threads, 0, 256)
    job, tensors = make_question(bundle, photo, tuple(ids), new_tokens=new_tokens, threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        received = device.collect(bundle, job, tensors, Path(folder) / "findings")
    answer = received.file.answer
    trouble = received.file.trouble or (answer.trouble if answer else None)
    if trouble is not None or answer is None:
        raise DeviceError(f"{device.name} gave no answer: {trouble.message if trouble else 'it sent none'}")
    end = set(bundle.manifest.text.end_ids) if bundle.manifest.text else set()
    said = answer.ids[: next((at for at, token in enumerate(answer.ids) if token in end), len(answer.ids))]
    print("".join(tokenizer.text(said)))
    run = answer.runs[-1] if answer.runs else None
    if run is not None:
        words = f"image ready {run.image_ready_ms:.0f} ms, TTFT {run.ttft_question_ms:.1f} ms after {len(ids)} tokens"
        kind = received.file.device.kind
        _tell(args)(words if kind == "phone" else f"{words}; {kind}: says nothing about a phone")
    return PASSED


def _pull(args: argparse.Namespace) -> int:
    from runtime.devices.wire import read_findings

    out = _adb(args).pull(Path(args.output_dir))
    file = read_findings(out).file
    print(f"{out}: {file.bundle} on {file.device.name}, {file.started_utc}")
    return PASSED


def _clean(args: argparse.Namespace) -> int:
    device = _adb(args)
    device.clean()
    _tell(args)(f"removed from {device.shell.serial}: {args.folder or 'all that pruneport pushed'}")
    return PASSED


def run_report(args: argparse.Namespace) -> int:
    """Writes the pages, and says in the exit code what they say."""
    from runtime.bundle import read_bundle
    from runtime.device_report import changes, measured, write_device_report
    from runtime.devices.wire import read_findings

    if not args.reference:
        raise RequestError("report needs --reference BUNDLE, the bundle that the device ran; it holds what is right")
    references = [read_bundle(Path(path)) for path in args.reference]
    found = [measured(read_findings(path), references) for path in args.findings]
    compared = []
    if args.against is not None:
        before = measured(read_findings(args.against), references)
        compared = [(each, changes(each, before)) for each in found if each.same_as == before.same_as]
        if not compared:
            compared = [(found[0], changes(found[0], before))]  # says what differs
    page = write_device_report(found, Path(args.output_dir), compared=compared)
    regressed = [change for _, list_of in compared for change in list_of if change.regressed]
    failed = [each for each in found if not each.verdict.passed]
    unchecked = [each for each in found if each.verdict.outcome == "not checked"]
    if args.quiet:
        print(page)
    else:
        for each in found:
            print(f"{each.verdict.outcome}: {each.verdict.device}, {each.verdict.bundle}")
            for step in (*each.verdict.failed_steps, *each.verdict.unchecked_steps):
                print(f"  {step.status}: {step.name}: {step.detail}")
        for change in regressed:
            print(f"slower: {change.metric} {change.before.median:.1f} -> {change.after.median:.1f} ms")
        print(f"report: {page}")
    return FAILED if failed or regressed else NOT_CHECKED if unchecked else PASSED
