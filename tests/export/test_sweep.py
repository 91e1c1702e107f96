"""Sweeps with a worker of the tests' own: what runs beside what, what is not run again, and what a failure leaves."""

from __future__ import annotations

import fcntl
import html
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from PIL import Image

from export import cli
from export.sweep import process
from export.sweep.board import Board, terminal_table
from export.sweep.cell import RECORD, Cell, Record, plan_cells
from export.sweep.matrix import Words
from export.sweep.places import Local, NeverFits, Place
from export.sweep.process import LOG, Ended, Job, last_line, run, source_sha256
from export.sweep.report import PAGE, RESULTS, Results, crowded, troubles, write
from export.sweep.walk import Result, list_cells, run_cells
from runtime.bundle import MANIFEST, REPORT_FILES, BundleWriter
from runtime.errors import OutputError, RequestError
from runtime.harness import check_bundle
from tests.conftest import ROOT
from tests.sample_bundle import Sample, fill, noise_photo

GIB = 2**30
Worker = Callable[[Job, int], Ended]
# Far longer than anything waits here, and shorter than a test may take.
LIMIT_S = 60


def cells_of(output: Path, *ram_gib: float, force: bool = False) -> tuple[Cell, ...]:
    """Cells that are planned already, with forecasts of memory."""
    return tuple(
        Cell(
            words={"model": "sample", "keep": str(number), **({"force": "true"} if force else {})},
            bundle=f"sample-{number}",
            key=f"{number:064x}",
            folder=output / "cells" / f"sample-{number}",
            ram_bytes=int(size * GIB),
            disk_bytes=1,
        )
        for number, size in enumerate(ram_gib, 1)
    )


def ended(exit_code: int = 0) -> Ended:
    return Ended(exit_code=exit_code, started=time.time(), seconds=0.0, host="here", peak_bytes=GIB)


def number_of(job: Job) -> int:
    return int(Path(job.folder).name.rpartition("-")[2])


def make_sample(job: Job) -> None:
    """Makes a small bundle, checked, where the job's export would have made one."""
    target = Path(job.folder) / Path(job.folder).name
    target.parent.mkdir(parents=True)
    with BundleWriter(target) as writer:
        manifest = writer.write_manifest(fill(writer.path, target.name, Sample(), noise_photo()))
        check_bundle(writer.path, warmup=0, runs=1, threads=1)
        writer.commit(manifest)


class Asked:
    """A worker that notes which cells it is asked for, and says that they ended so."""

    def __init__(self, exit_code: int = 1, *, bundles: bool = False) -> None:
        self.numbers: list[int] = []
        self.exit_code = exit_code
        self.bundles = bundles

    def __call__(self, job: Job, lifeline: int) -> Ended:
        self.numbers.append(number_of(job))
        if self.bundles:
            make_sample(job)
        return ended(self.exit_code)


class Nobody:
    """A screen that nobody looks at."""

    def started(self, cell: Cell) -> None:
        pass

    def ended(self, cell: Cell, record: Record, *, before: bool = False) -> None:
        pass


def sweep(
    cells: tuple[Cell, ...],
    output: Path,
    worker: Worker,
    *,
    jobs: int = 1,
    available: Callable[[], int] = lambda: 100 * GIB,
    retry_failed: bool = False,
    reports_only: bool = False,
) -> Result:
    return run_cells(
        cells,
        output,
        place=lambda: Local(jobs, worker=worker, available=available),
        source="",
        screen=Nobody(),
        report=lambda result: write(result, output, matrix="matrix.yaml", version="0"),
        retry_failed=retry_failed,
        reports_only=reports_only,
    )


def statuses(result: Result) -> list[str]:
    return [record.status if record else "waiting" for record in result.records]


# --- what runs beside what ---


def test_cells_run_side_by_side_up_to_their_number(tmp_path: Path) -> None:
    both = threading.Barrier(2, timeout=LIMIT_S)
    lock, running, most = threading.Lock(), set[int](), 0

    def worker(job: Job, lifeline: int) -> Ended:
        nonlocal most
        with lock:
            running.add(number_of(job))
            most = max(most, len(running))
        both.wait()
        with lock:
            running.discard(number_of(job))
        return ended()

    sweep(cells_of(tmp_path, 1, 1, 1, 1), tmp_path, worker, jobs=2)
    assert most == 2


def test_cells_run_side_by_side_only_where_their_forecasts_fit(tmp_path: Path) -> None:
    """6 + 3 GiB go into 10, 6 + 6 do not: the third overtakes the second, which waits."""
    third_runs = threading.Event()
    lock, running, together = threading.Lock(), set[int](), set[frozenset[int]]()

    def worker(job: Job, lifeline: int) -> Ended:
        number = number_of(job)
        with lock:
            running.add(number)
            together.add(frozenset(running))
        if number == 3:
            third_runs.set()
        assert third_runs.wait(LIMIT_S)
        with lock:
            running.discard(number)
        return ended()

    sweep(cells_of(tmp_path, 6, 6, 3), tmp_path, worker, jobs=3, available=lambda: 10 * GIB)
    assert frozenset({1, 3}) in together
    assert not any({1, 2} <= group for group in together)


def test_memory_that_other_programs_took_is_waited_for(tmp_path: Path) -> None:
    """Beside a cell of 2 GiB there would be room for another by their forecasts, but 1 GiB is all that is left."""
    asked_beside = threading.Event()
    running: set[int] = set()

    def available() -> int:
        if running:
            asked_beside.set()
        return 1 * GIB if running else 10 * GIB

    def worker(job: Job, lifeline: int) -> Ended:
        assert not running
        running.add(number_of(job))
        assert number_of(job) == 2 or asked_beside.wait(LIMIT_S)
        running.clear()
        return ended(2)

    result = sweep(cells_of(tmp_path, 2, 2), tmp_path, worker, jobs=2, available=available)
    assert all(record is not None and record.host for record in result.records)


def test_a_cell_that_never_fits_fails_with_the_reason_and_is_judged_anew(tmp_path: Path) -> None:
    asked = Asked()
    cells = cells_of(tmp_path, 20, 1)
    result = sweep(cells, tmp_path, asked, jobs=2, available=lambda: 10 * GIB)
    assert asked.numbers == [2]
    assert result.records[0] is not None
    assert result.records[0].detail == (
        "needs about 20.0 GiB of RAM, 10.0 GiB are available while no cell runs; close other programs, take a larger "
        "machine, or try it all the same with `force: true`"
    )
    assert not cells[0].folder.exists()
    sweep(cells, tmp_path, asked, available=lambda: 30 * GIB)
    assert asked.numbers == [2, 1]


def test_a_forced_cell_runs_alone(tmp_path: Path) -> None:
    running: set[int] = set()

    def worker(job: Job, lifeline: int) -> Ended:
        assert not running
        running.add(number_of(job))
        running.discard(number_of(job))
        return ended()

    result = sweep(cells_of(tmp_path, 20, 20, force=True), tmp_path, worker, jobs=2, available=lambda: 10 * GIB)
    assert all(record is not None and record.host for record in result.records)


def test_each_cell_gets_the_cores_that_its_check_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    places = [Local(), Local(8), Local(1)]
    assert [(place._jobs, place.threads) for place in places] == [(4, 4), (8, 2), (1, None)]
    for place in places:
        place.stop()


# --- what is not run again ---


def test_a_cell_that_is_done_is_not_run_again(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, 1, 1)
    first = sweep(cells, tmp_path, Asked(0, bundles=True))
    assert statuses(first) == ["passed", "passed"]

    def no_place() -> Place:
        raise AssertionError("nothing is to be run")

    again = run_cells(cells, tmp_path, place=no_place, source="", screen=Nobody(), report=lambda result: None)
    assert again == first
    assert [line.endswith(": passed before") for line in list_cells(cells)] == [True, True]


def test_another_key_is_another_cell(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, 1)
    sweep(cells, tmp_path, Asked(0, bundles=True))
    asked = Asked(0, bundles=True)
    sweep((replace(cells[0], key="f" * 64),), tmp_path, asked)
    assert asked.numbers == [1]


@pytest.mark.parametrize("damage", [b"", b"{", b'{"status": "fine"}'])
def test_a_record_that_is_not_whole_is_none(damage: bytes, tmp_path: Path) -> None:
    cells = cells_of(tmp_path, 1)
    sweep(cells, tmp_path, Asked(0, bundles=True))
    (cells[0].folder / RECORD).write_bytes(damage)
    asked = Asked(0, bundles=True)
    assert statuses(sweep(cells, tmp_path, asked)) == ["passed"]
    assert asked.numbers == [1], "and what lay there was no hindrance"


def test_failures_are_kept_until_they_are_to_be_tried_again(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, 1, 1)
    sweep(cells[:1], tmp_path, Asked(0, bundles=True))
    assert statuses(sweep(cells, tmp_path, Asked(2))) == ["passed", "error"]
    asked = Asked(0, bundles=True)
    assert statuses(sweep(cells, tmp_path, asked)) == ["passed", "error"]
    assert asked.numbers == []
    assert statuses(sweep(cells, tmp_path, asked, retry_failed=True)) == ["passed", "passed"]
    assert asked.numbers == [2]


DRIVER = """
import sys
from pathlib import Path
from tests.export.test_sweep import cells_of, ended, make_sample, number_of, sweep

output = Path(sys.argv[1])

def worker(job, lifeline):
    if number_of(job) == 2:
        print("two", flush=True)
        sys.stdin.read()
    make_sample(job)
    return ended()

sweep(cells_of(output, 1, 1, 1), output, worker)
"""


def test_a_sweep_that_was_killed_goes_on_where_it_stood(tmp_path: Path) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"two\n"
        results = msgspec.json.decode((tmp_path / RESULTS).read_bytes(), type=Results)
        assert [row.record is not None for row in results.cells] == [True, False, False]
        with pytest.raises(OutputError, match="another sweep is running in"):
            sweep(cells_of(tmp_path, 1), tmp_path, Asked())
        driver.kill()
    asked = Asked(0, bundles=True)
    result = sweep(cells_of(tmp_path, 1, 1, 1), tmp_path, asked)
    assert asked.numbers == [2, 3]
    assert statuses(result) == ["passed"] * 3


def test_an_interrupted_sweep_ends_what_runs_and_records_nothing_of_it(tmp_path: Path) -> None:
    saw_the_end = []

    def worker(job: Job, lifeline: int) -> Ended:
        if number_of(job) == 1:
            return ended(2)
        os.kill(os.getpid(), signal.SIGINT)
        saw_the_end.append(os.read(lifeline, 1))
        return ended(130)

    cells = cells_of(tmp_path, 1, 1, 1)
    # A shell has what it starts in the background ignore the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            sweep(cells, tmp_path, worker)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert saw_the_end == [b""]
    results = msgspec.json.decode((tmp_path / RESULTS).read_bytes(), type=Results)
    assert results.outcome == "interrupted"
    assert [row.record and row.record.status for row in results.cells] == ["error", None, None]
    asked = Asked()
    sweep(cells, tmp_path, asked)
    assert asked.numbers == [2, 3]


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="wait for it, or choose another output folder"):
            sweep(cells_of(tmp_path, 1), tmp_path, Asked())
    sweep(cells_of(tmp_path, 1), tmp_path, Asked())


def test_too_small_a_disk_is_noticed_before_anything_runs(tmp_path: Path) -> None:
    cells = tuple(replace(cell, disk_bytes=2**59) for cell in cells_of(tmp_path, 1, 1))
    asked = Asked()
    with pytest.raises(OutputError, match=r"the bundles of 2 cells need about .* with --reports-only, free some space"):
        sweep(cells, tmp_path, asked)
    with pytest.raises(OutputError, match="GiB; free some space, or choose another"):
        sweep(cells, tmp_path, asked, reports_only=True)
    assert asked.numbers == []


def test_reports_alone_can_be_kept(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, 1)
    result = sweep(cells, tmp_path, Asked(0, bundles=True), reports_only=True)
    bundle = cells[0].folder / cells[0].bundle
    assert {path.name for path in bundle.iterdir()} == {MANIFEST, *REPORT_FILES}
    assert result.records[0] is not None
    assert result.records[0].numbers is not None
    assert result.records[0].numbers.bundle_bytes > sum(path.stat().st_size for path in bundle.iterdir())


# --- what a key is made of ---


@pytest.fixture
def photos(tmp_path: Path) -> tuple[str, str, str]:
    """Three photos, of which the first two hold the same pixels."""
    paths = [tmp_path / name for name in ("one.png", "same.png", "other.png")]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        Image.new("RGB", (64, 64), (seed, 0, 0)).save(path)
    one, same, other = map(str, paths)
    return one, same, other


def key_of(words: Words, *, version: str = "1", source: str = "a", output: Path = Path("out")) -> str:
    fixed = {"model": "pocket", "keep": "8", "backend": "onnx", "weights": "random"}
    (cell,) = plan_cells([{**fixed, **words}], output, version=version, source=source, tell=lambda line: None)
    return cell.key


def test_a_key_is_made_of_everything_that_decides_the_result(photos: tuple[str, str, str], tmp_path: Path) -> None:
    one, same, other = photos
    plain = key_of({"image": one})
    for equal in (
        key_of({"image": same}),
        key_of({"image": one}, output=tmp_path),
        key_of({"image": one, "precision": "fp32", "target": "android", "cut": "2", "seed": "0", "twin": "false"}),
        key_of({"image": one, "force": "true"}),
    ):
        assert equal == plain
    others = [
        key_of({"image": other}),
        key_of({"image": one}, version="2"),
        key_of({"image": one}, source="b"),
        key_of({"image": one, "seed": "1"}),
        key_of({"image": one, "precision": "fp16"}),
        key_of({"image": one, "method": "uniform"}),
        key_of({"image": one, "keep": "9"}),
        key_of({"image": one, "twin": "true"}),
    ]
    assert len({plain, *others}) == 1 + len(others)


def test_tools_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = key_of({})
    monkeypatch.setattr("export.manifests.tool_versions", lambda: {"torch": "9"})
    assert key_of({}) != plain


def test_a_changed_source_is_another_pruneport(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("export", "pruning", "runtime"):
        (tmp_path / room / "sweep").mkdir(parents=True)
    monkeypatch.setattr(process, "__file__", str(tmp_path / "export" / "sweep" / "process.py"))
    hashes = {source_sha256()}
    for path, text in (("runtime/a.py", "1"), ("runtime/a.py", "2"), ("export/b.j2", "")):
        (tmp_path / path).write_text(text)
        hashes.add(source_sha256())
    assert len(hashes) == 4
    (tmp_path / "export" / "c.pyc").write_text("")
    assert source_sha256() in hashes


def planned(*words: Words) -> tuple[Cell, ...]:
    return plan_cells(words, Path("out"), version="1", source="a", tell=lambda line: None)


def test_a_word_that_every_cell_refuses_is_a_mistake() -> None:
    pocket = {"model": "pocket", "weights": "random"}
    with pytest.raises(RequestError) as caught:
        planned({**pocket, "keep": "8"}, {**pocket, "keep": "577"})
    assert str(caught.value).startswith("keep=577 can be used in no cell of the matrix: keep=577 must lie in 1..576")
    assert "a matrix may be a list of them" in str(caught.value)


def test_what_all_cells_are_refused_for_is_said_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    words = [{"model": "pocket", "weights": "random", "keep": keep} for keep in ("8", "9")]
    with pytest.raises(RequestError, match=r"^.*/file is a file, so no bundle can be put under it; choose another"):
        plan_cells(words, tmp_path / "file", version="1", source="a", tell=lambda line: None)


def test_words_that_do_not_go_together_are_a_cell_that_says_so(tmp_path: Path) -> None:
    pocket = {"model": "pocket", "weights": "random", "keep": "8"}
    schemes = [
        {**pocket, "backend": backend, "quant-text": scheme}
        for backend in ("onnx", "xnnpack")
        for scheme in ("int4", "8da4w", "none")
    ]
    cells = planned(*schemes)
    refused = [(cell.words["backend"], cell.words["quant-text"]) for cell in cells if cell.refusal]
    assert refused == [("onnx", "8da4w"), ("xnnpack", "int4")]
    result = sweep((cells[1],), tmp_path, Asked())
    (trouble,) = troubles(result)
    assert trouble.startswith("error: model=pocket weights=random: unknown onnx quant_text '8da4w'")
    assert statuses(result) == ["error"]
    assert result.outcome == "failed"
    assert "unknown onnx quant_text '8da4w'" in html.unescape((tmp_path / PAGE).read_text(encoding="utf-8"))


@pytest.mark.parametrize("spelt", [{"precision": "fp32"}, {"keep": "1.4%"}])
def test_two_spellings_of_one_cell_are_a_mistake(spelt: Words) -> None:
    pocket = {"model": "pocket", "weights": "random", "keep": "8"}
    with pytest.raises(
        RequestError, match=rf"two cells make the same pocket-keep8-android-xnnpack-random: .* {next(iter(spelt))}"
    ):
        planned(pocket, {**pocket, **spelt})


# --- one process ---


def job_in(folder: Path, source: str | None = None) -> Job:
    """A job that is started in the folder above its own."""
    return Job(
        folder=str(folder),
        flags=("--model=pocket",),
        cwd=str(folder.parent),
        source=source_sha256() if source is None else source,
        ram_bytes=1,
    )


def run_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> tuple[Ended, Record]:
    """Runs a cell whose process is a script, and judges it."""
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(text))
    monkeypatch.setattr(process, "_CHILD", script)
    (cell,) = cells_of(tmp_path, 1)
    found = run(job_in(cell.folder))
    return found, cell.judge(found)


@pytest.mark.parametrize(
    ("script", "detail"),
    [
        (
            "import os; os.kill(os.getpid(), 9)",
            "ended by SIGKILL (the system ends processes so when memory runs out); ",
        ),
        (
            "print('[3/7] lower'); import faulthandler; faulthandler._sigsegv()",
            "ended by SIGSEGV; log.txt tells how far",
        ),
        ("import os; os.abort()", "ended by SIGABRT; log.txt tells how far it came: nothing"),
        ("import sys; sys.exit('pruneport: error: no such thing')", "no such thing (exit code 1)"),
        ("raise ValueError('deep inside')", "ValueError: deep inside (exit code 1)"),
        ("import sys; print('said'); sys.exit(7)", "said (exit code 7)"),
        ("", "nothing was said (exit code 0)"),
    ],
)
def test_a_process_that_fails_is_a_failed_cell(
    script: str, detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, record = run_script(tmp_path, monkeypatch, script)
    assert record.status == "error"
    assert record.detail.startswith(detail)
    assert (record.host, record.seconds) == (found.host, found.seconds)
    assert record.ram_peak_bytes > 2**20


def test_the_log_says_how_far_a_killed_cell_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import os; print('[3/7] lower', flush=True); os.kill(os.getpid(), 9)"
    assert run_script(tmp_path, monkeypatch, script)[1].detail.endswith("log.txt tells how far it came: [3/7] lower")
    log = tmp_path / "cells" / "sample-1" / LOG
    assert last_line(log, "[") == "[3/7] lower"
    assert last_line(log, "pruneport") == ""


def test_what_a_process_leaves_behind_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with subprocess.Popen(["cat", str(pipe)], stdout=subprocess.PIPE) as reader:
        run_script(
            tmp_path,
            monkeypatch,
            f"""
            import subprocess
            holder = subprocess.Popen(["sh", "-c", "echo open; exec sleep 600"], stdout=open({str(pipe)!r}, "w"))
            """,
        )
        # Its end comes when the last one that holds the pipe open is gone.
        assert reader.communicate(timeout=LIMIT_S)[0] in (b"open\n", b"")


def test_another_pruneport_on_a_worker_is_refused(tmp_path: Path) -> None:
    found = run(job_in(tmp_path / "cell", source="another"))
    assert found.exit_code is None
    assert "another pruneport" in found.error
    assert cells_of(tmp_path, 1)[0].judge(found).detail == found.error


def test_a_worker_that_cannot_reach_the_folder_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = run(job_in(tmp_path / "file" / "cell"))
    assert (
        found.error
        == f"{tmp_path}/file/cell cannot be written: Not a directory; all workers must reach the output folder"
    )


def test_a_cell_ends_with_its_sweep_and_leaves_nothing(tmp_path: Path) -> None:
    """Also where the sweep is killed: the system closes the pipe for it."""
    out = tmp_path / "out"
    words = ["export", "--model=pocket", "--keep=64", "--backend=onnx", f"--output-dir={out}"]
    child = subprocess.Popen(
        [sys.executable, "-P", str(process._CHILD), process.home(), *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        while not child.stdout.readline().startswith("[1/"):
            assert child.poll() is None
        child.stdin.close()
        rest = child.stdout.read()
    assert child.returncode == 130, rest
    assert "interrupted, nothing was written" in rest
    assert not out.exists()


# --- what is shown ---


def test_the_report_holds_every_cell_and_escapes_what_it_shows(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, 1, 1, 1)
    cells[1].words["image"] = "<script>alert(1)</script>"
    sweep(cells[:1], tmp_path, Asked(0, bundles=True))
    result = sweep(cells[:2], tmp_path, Asked(2))
    result = Result(cells, (*result.records, None))
    write(result, tmp_path, matrix="a&b.yaml", version="1.2")
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "a&amp;b.yaml" in page
    assert "3 cells: 1 passed, 1 error, 1 waiting" in page
    assert 'href="cells/sample-1/sample-1/report.html"' in page
    assert 'href="cells/sample-2/log.txt"' in page
    assert "http:" not in page
    assert "https:" not in page
    rows = json.loads((tmp_path / RESULTS).read_bytes())["cells"]
    assert [row["record"] and row["record"]["status"] for row in rows] == ["passed", "error", None]
    numbers = rows[0]["record"]["numbers"]
    assert (numbers["kept_overlap"], numbers["outputs"]) == (1.0, numbers["outputs_within"])
    assert rows[1]["command"] == "pruneport export --model=sample --keep=2 '--image=<script>alert(1)</script>'"


def test_times_of_cells_side_by_side_are_told_apart() -> None:
    cells = cells_of(Path("out"), 1, 1, 1)
    records = [cell.judge(ended(2)) for cell in cells]
    alone = [msgspec.structs.replace(record, started=10.0 * at, seconds=10.0) for at, record in enumerate(records)]
    assert crowded(Result(cells, tuple(alone))) == ""
    # The first lasts as long as the two others, which come one after the other.
    long = msgspec.structs.replace(alone[0], started=10.0, seconds=20.0)
    assert crowded(Result(cells, (long, alone[1], alone[2]))).startswith("Up to 2 cells ran side by side")
    elsewhere = msgspec.structs.replace(long, host="there")
    assert crowded(Result(cells, (elsewhere, alone[1], alone[2]))) == ""


def test_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    from io import StringIO

    cells = cells_of(tmp_path, 1, 1)
    for quiet, lines in ((False, 3), (True, 0)):
        stream = StringIO()
        board = Board(cells, stream=stream, quiet=quiet)
        with board.live():
            board.started(cells[0])
            board.ended(cells[0], cells[0].not_run("no room"))
            board.ended(cells[1], cells[1].judge(ended(2)), before=True)
        assert len(stream.getvalue().splitlines()) == lines + (not quiet)
    stream = StringIO()
    Board(cells, stream=stream).ended(cells[0], cells[0].not_run("no room"))
    assert stream.getvalue() == "[1/2] error       keep=1\n      no room\n"


def test_the_live_table_shows_what_runs_however_low_the_terminal() -> None:
    from rich.console import Console

    cells = cells_of(Path("out"), *(1 for _ in range(50)))
    board = Board(cells, stream=sys.stderr)
    for cell in cells[:40]:
        board.ended(cell, msgspec.structs.replace(cell.not_run(""), status="passed"))
    board.started(cells[45])
    console = Console(width=100, height=12, force_terminal=True, no_color=True)
    with console.capture() as capture:
        console.print(board)
    text = capture.get()
    assert len(text.splitlines()) <= 12
    assert "running" in text
    assert "50 cells: 40 passed, 9 waiting, 1 running" in text
    with console.capture() as capture:
        console.print(terminal_table(board.result(), 100))
    assert len(capture.get().splitlines()) > 50


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_narrow_terminal_leaves_columns_out_and_cuts_nothing(width: int, tmp_path: Path) -> None:
    from rich.console import Console

    cells = cells_of(tmp_path, 1, 1)
    result = sweep(cells, tmp_path, Asked(0, bundles=True))
    for record in result.records:
        assert record is not None
        assert record.numbers is not None
    full = msgspec.structs.replace(
        result.records[0].numbers,  # type: ignore[union-attr, type-var]
        answer_same=64,
        answer_tokens=64,
        image_ready_ms=12345.6,
        ttft_ms=1234.5,
        token_ms=123.45,
        bundle_bytes=10**10,
    )
    records = tuple(
        msgspec.structs.replace(record, numbers=full, seconds=1000.0) for record in result.records if record
    )
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(terminal_table(Result(cells, records), width))
    text = capture.get()
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines())
    assert "TTFT" in text
    assert ("GiB" in text) == (width == 200)


# --- the command ---


def sweep_command(*words: str | Path) -> int:
    return cli.main(["sweep", *map(str, words)], version="0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "jobs=0 must lie in 1..1024"),
        (["--jobs", "2", "--ray", "auto"], "--jobs means nothing with --ray, whose cluster decides"),
        ([], "has no keep; every cell needs model and keep"),
    ],
)
def test_bad_input_ends_before_anything_runs(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    matrix = tmp_path / "matrix.yaml"
    matrix.write_text("model: pocket\n")
    assert sweep_command(matrix, "--output-dir", tmp_path / "out", *words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("pruneport: error: ")
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == [matrix]


def test_ray_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    matrix = tmp_path / "matrix.yaml"
    matrix.write_text("model: pocket\nkeep: 8\nweights: random\n")
    assert sweep_command(matrix, "--output-dir", tmp_path / "out", "--ray", "auto", "-q") == 2
    assert capsys.readouterr().err == (
        "pruneport: error: --ray needs Ray, not installed here; run: pip install 'pruneport[ray]'\n"
    )


def test_a_dry_run_lists_the_cells_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    matrix = tmp_path / "matrix.yaml"
    matrix.write_text("model: pocket\nkeep: [8, 16]\nweights: random\n")
    assert sweep_command(matrix, "--output-dir", tmp_path / "out", "--dry-run", "-q") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "[1/2] model=pocket keep=8 weights=random",
        "[2/2] model=pocket keep=16 weights=random",
    ]
    assert all("RAM about" in line for line in lines)
    assert list(tmp_path.iterdir()) == [matrix]


class Away:
    """A place whose workers are lost."""

    threads: int | None = None

    def has_room(self, cell: Cell, running: Sequence[Cell]) -> bool:
        if cell.ram_bytes > GIB:
            raise NeverFits("no")
        return True

    def start(self, job: Job) -> Future[Ended]:
        future: Future[Ended] = Future()
        future.set_exception(ConnectionError("first line\nthe node is gone"))
        return future

    def stop(self) -> None:
        pass


def test_a_lost_worker_is_a_failed_cell_that_is_tried_again(tmp_path: Path) -> None:
    cells = cells_of(tmp_path, 1, 2)
    result = run_cells(cells, tmp_path, place=Away, source="", screen=Nobody(), report=lambda result: None)
    assert [record and record.detail for record in result.records] == [
        "its worker was lost: ConnectionError: the node is gone",
        "no",
    ]
    asked = Asked()
    sweep(cells, tmp_path, asked)
    assert asked.numbers == [1, 2]
