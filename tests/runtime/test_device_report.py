"""The page over findings: figures of different kinds apart, changes by the stated rule, readable on any screen."""

from __future__ import annotations

import csv
import re
import subprocess
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import pytest

from runtime.bundle import Bundle, read_bundle
from runtime.device_report import (
    LEAST_CHANGE,
    PAGES,
    Measured,
    Series,
    changes,
    measured,
    write_device_report,
)
from runtime.devices.wire import (
    AnswerFound,
    AnswerRun,
    Condition,
    DeviceInfo,
    FindingsFile,
    GateFound,
    LoadFound,
    MemoryFound,
    Received,
    RunnerInfo,
    StepFound,
    make_job,
    write_findings,
)
from runtime.errors import FindingsError
from tests.conftest import HEADLESS_CHROMIUM, CommandLine, needs_chromium
from tests.sample_bundle import Sample, make_bundle

Kind = Literal["phone", "emulated", "simulator", "desktop"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return read_bundle(make_bundle(tmp_path_factory.mktemp("report") / "bundle", Sample()))


def run_of(number: int, scale: float, *, twin: bool = False, warmup: bool = False) -> AnswerRun:
    jitter = 1 + number / 100
    vision, prefill, question = 100 * scale * jitter, 20 * scale * jitter, 30 * scale * jitter
    return AnswerRun(
        twin=twin,
        warmup=warmup,
        preprocess_ms=5.0,
        vision_ms=vision,
        image_prefill_ms=prefill,
        image_ready_ms=vision + prefill,
        question_prefill_ms=question,
        ttft_question_ms=question,
        ttft_photo_ms=5 + vision + prefill + question,
        token_ms=tuple(10 * scale * jitter for _ in range(7)),
    )


def file_of(bundle: Bundle, *, kind: Kind = "phone", scale: float = 1.0, name: str = "Acme One") -> FindingsFile:
    job, _ = make_job(bundle)
    runs = [run_of(9, 50, warmup=True)]
    for number in range(5):
        runs += [run_of(number, scale), run_of(number, 2 * scale, twin=True)]
    return FindingsFile(
        job=job.id,
        bundle=bundle.identity,
        device=DeviceInfo(
            name=name,
            kind=kind,
            os="Android 16",
            abi="aarch64",
            soc="AC 1",
            cores=8,
            ram_bytes=8 * 2**30,
        ),
        runner=RunnerInfo(name="runner", version="1", engine="onnxruntime", engine_version="1.2.3"),
        threads=4,
        started_utc="2026-01-31T12:00:00Z",
        ended_utc="2026-01-31T12:01:00Z",
        load=LoadFound(first_ms=(900.0,), later_ms=(90.0,)),
        gate=GateFound(waited_s=3.0, passed=True),
        conditions=(
            Condition(at_ms=0.0, celsius=30.0, battery=0.8, thermal="none", low_power=False, charging=False),
            Condition(at_ms=60000.0, celsius=38.5, battery=0.7, thermal="severe", low_power=True, charging=False),
        ),
        steps=tuple(StepFound(graph=step.graph, step=step.step) for step in job.steps),
        answer=AnswerFound(image_tokens_before=16, image_tokens_after=4, question_tokens=3, runs=tuple(runs)),
        memory=MemoryFound(peak_rss_bytes=2 * 10**9, after_close_bytes=10**8),
    )


def found(bundle: Bundle, *, kind: Kind = "phone", scale: float = 1.0, name: str = "Acme One") -> Measured:
    return measured(Received(file_of(bundle, kind=kind, scale=scale, name=name), {}), [bundle])


# Figures


def test_medians_are_those_of_the_timed_runs(bundle: Bundle) -> None:
    each = found(bundle)
    runs = [run_of(number, 1.0) for number in range(5)]
    assert each.series["TTFT from photo"].median == np.median([run.ttft_photo_ms for run in runs])
    assert len(each.series["token"].samples) == 35
    assert each.twin["vision"].median == pytest.approx(2 * each.series["vision"].median)


@pytest.mark.parametrize(
    ("before", "after", "changed"),
    [
        ((100, 101, 102), (100, 101, 102), False),
        ((100, 101, 102), (103, 104, 105), False),  # apart, but by less than the least change
        ((100, 101, 102), (110, 111, 112), True),
        ((110, 111, 112), (100, 101, 102), True),
        ((90, 100, 140), (110, 120, 130), False),  # by much, but within the noise
        ((100, 101), (200, 201, 202), False),  # too few samples
    ],
)
def test_what_counts_as_changed(before: tuple[float, ...], after: tuple[float, ...], changed: bool) -> None:
    assert Series(after).changed_from(Series(before)) is changed


def test_slower_is_a_regression_and_faster_is_none(bundle: Bundle) -> None:
    now, before = found(bundle, scale=1 + 3 * LEAST_CHANGE), found(bundle)
    assert {change.metric for change in changes(now, before) if change.regressed} >= {"vision", "token"}
    assert not any(change.regressed for change in changes(before, now))
    assert {change.words for change in changes(before, before)} == {"within noise"}


def test_only_the_same_is_compared(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(FindingsError, match="'Acme One' and 'Acme Two'"):
        changes(found(bundle), found(bundle, name="Acme Two"))
    with pytest.raises(FindingsError, match="'phone' and 'desktop'"):
        changes(found(bundle), found(bundle, kind="desktop"))
    with pytest.raises(FindingsError, match="times of an emulated device say nothing"):
        changes(found(bundle, kind="emulated"), found(bundle, kind="emulated"))


def test_findings_need_their_own_bundle(bundle: Bundle, tmp_path: Path) -> None:
    other = read_bundle(make_bundle(tmp_path / "other", Sample(seed=3)))
    with pytest.raises(FindingsError, match="name its bundle with --reference"):
        measured(Received(file_of(bundle), {}), [other])


# Pages


@pytest.fixture(scope="module")
def pages(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pages")
    phone = found(bundle)
    rows = [
        phone,
        found(bundle, kind="emulated", name="aarch64 processor"),
        found(bundle, kind="desktop", name="Tower"),
    ]
    write_device_report(rows, out, compared=[(phone, changes(phone, found(bundle, scale=0.8)))])
    return out


def test_kinds_stand_apart_and_bear_their_word(pages: Path) -> None:
    html = (pages / "devices.html").read_text()
    groups = dict(re.findall(r'<section class="group (\w+)".*?>(.*?)</section>', html, re.DOTALL))
    assert list(groups) == ["phone", "desktop", "emulated"]
    names = {"phone": "Acme One", "desktop": "Tower", "emulated": "aarch64 processor"}
    for kind, text in groups.items():
        for other, name in names.items():
            assert (name in text) is (kind == other)
        tables = re.findall(r"<tbody>(.*?)</tbody>", text, re.DOTALL)
        if kind != "phone":
            # By itself, whoever copies one table or one line copies the word, too.
            assert all(f"{names[kind]} ({kind})" in table for table in tables[:2])
            assert all(f"({kind})" in head for head in re.findall(r"<h3>[^<]*: (.*?)</h3>", text))


def test_flags_say_what_makes_times_worth_less(pages: Path) -> None:
    text = (pages / "devices.md").read_text()
    assert "throttled by heat, low-power mode, 8 °C warmer" in text.replace("\\", "")
    assert "30.0 °C → 38.5 °C" in text


def test_the_table_of_values(pages: Path) -> None:
    with (pages / "devices.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    phone = [row for row in rows if row["kind"] == "phone"]
    ready = next(row for row in phone if row["metric"] == "image ready" and row["side"] == "pruned")
    assert float(ready["median"]) == pytest.approx(120 * 1.02)
    assert ready["samples"] == "5"
    assert {row["side"] for row in phone} == {"pruned", "twin", ""}
    assert {row["unit"] for row in rows} == {"ms", "bytes"}


def test_a_hostile_name_becomes_no_markup(bundle: Bundle, tmp_path: Path) -> None:
    write_device_report([found(bundle, name="<script>alert(1)</script>|`x`")], tmp_path)
    assert "<script" not in (tmp_path / "devices.html").read_text()
    assert "\n| <script" not in (tmp_path / "devices.md").read_text()


def test_the_command_says_it_in_the_exit_code(bundle: Bundle, tmp_path: Path, command_line: CommandLine) -> None:
    for name, scale in (("now", 1.5), ("before", 1.0)):
        write_findings(tmp_path / name, file_of(bundle, scale=scale), {})
    words = ("report", tmp_path / "now", "--reference", bundle.path, "--output-dir", tmp_path / "out")
    slower = command_line(*words, "--against", tmp_path / "before")
    assert slower.returncode == 1
    assert "slower: TTFT from photo" in slower.stdout
    failed = command_line(*words)  # outputs were not sent
    assert failed.returncode == 1
    assert "failed: parity of vision_encoder: the device sent nothing for" in failed.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(PAGES)
    missing = command_line("report", tmp_path / "now")
    assert missing.returncode == 2
    assert "--reference BUNDLE" in missing.stderr
    nowhere = command_line("report", tmp_path / "nowhere", "--reference", bundle.path)
    assert nowhere.returncode == 2
    assert "has no findings.json" in nowhere.stderr


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_in_a_browser(pages: Path, tmp_path: Path, width: int) -> None:
    """Bars of the lengths that the times have, and a page no wider than the screen."""
    probe = (
        (pages / "devices.html")
        .read_text()
        .replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    )
    script = (
        "<script>document.title=JSON.stringify({wide:document.documentElement.scrollWidth,"
        "bars:[...document.querySelectorAll('.track')].map(t=>[...t.children].reduce((s,c)=>s+c.offsetWidth,0)/t.offsetWidth),"
        "boxes:[...document.querySelectorAll('section')].map(s=>s.getBoundingClientRect().right)})</script>"
    )
    page = tmp_path / "page.html"
    page.write_text(probe.replace("</body>", f"<iframe hidden></iframe>{script}</body>"))
    # Headless windows are at least 500 wide: a frame of the width that is wanted holds the page.
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe id="f" src="page.html" style="border:0;width:{width}px;height:3000px"></iframe>'
        "<script>f.onload=()=>document.body.dataset.told=f.contentDocument.title</script>"
    )
    done = subprocess.run(
        [*HEADLESS_CHROMIUM, "--allow-file-access-from-files", "--window-size=1400,3000", "--virtual-time-budget=3000",
         "--dump-dom", frame.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )  # fmt: skip
    told = re.search(r'data-told="(.*?)"', done.stdout)
    assert told, done.stderr[-500:]
    seen = msgspec.json.decode(told[1].replace("&quot;", '"'))
    assert seen["wide"] <= width
    assert max(seen["boxes"]) <= width
    pruned, twin = seen["bars"][:2]
    assert twin == pytest.approx(1.0, abs=0.02)
    times = found_times()
    assert pruned == pytest.approx(times[0] / times[1], abs=0.03)


def found_times() -> tuple[float, float]:
    """Photo to answer, pruned and twin, by the medians of the made-up runs."""
    return tuple(  # type: ignore[return-value]
        5 + (100 + 20 + 30 + 7 * 10) * scale * 1.02 for scale in (1.0, 2.0)
    )
