"""What every device keeps to, and what the judge does not do."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any, NoReturn

import pytest

from runtime.bundle import read_bundle
from runtime.check.judge import check
from runtime.devices.desktop import Desktop
from runtime.devices.device import Device
from runtime.devices.findings import Job, Timing
from runtime.devices.here import HereDevice
from runtime.engines import ENGINES
from runtime.errors import BundleError
from tests.sample_bundle import Sample, make_bundle

every = pytest.mark.parametrize("device", [Desktop(), HereDevice()], ids=lambda device: type(device).__name__)


@every
def test_a_device_tells_of_every_graph_and_judges_nothing(device: Device, tmp_path: Path) -> None:
    bundle = read_bundle(make_bundle(tmp_path / "bundle", Sample()))
    findings = device.run(bundle, Job(threads=1))
    assert findings.device.startswith(device.name)
    assert [found.graph for found in findings.graphs] == [graph.name for graph in bundle.manifest.graphs]
    for found, graph in zip(findings.graphs, bundle.manifest.graphs, strict=True):
        assert found.outputs is not None
        assert {name: array.shape for name, array in found.outputs.items()} == {
            info.name: info.shape for info in graph.outputs
        }
        assert found.placement is not None
        assert found.trouble is None
        assert found.latency is None
    assert findings.pixel_values is not None
    verdict = check(bundle, findings)
    assert verdict.passed
    assert not verdict.unchecked_steps


@every
def test_a_device_times_what_it_is_asked_to(device: Device, tmp_path: Path) -> None:
    bundle = read_bundle(make_bundle(tmp_path / "bundle", Sample()))
    twin = read_bundle(make_bundle(tmp_path / "twin", Sample(keep=16)))
    findings = device.run(bundle, Job(threads=1, timing=Timing(warmup=0, runs=3, twin=twin)))
    (found,) = findings.graphs
    assert found.latency is not None
    assert found.latency.bundle.runs == 3
    # Far away, whole answers alone are timed in turns with the twin's; this bundle has no text graphs.
    assert (found.latency.ratio is not None) == isinstance(device, Desktop)
    assert findings.twin is not None
    assert findings.twin.image_tokens == 16


@every
def test_a_device_trusts_no_file_that_was_changed(device: Device, tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "bundle", Sample())
    bundle = read_bundle(path)
    golden = path / bundle.manifest.golden.file
    golden.write_bytes(golden.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(BundleError, match="was changed"):
        device.run(bundle, Job())


def test_the_judge_opens_no_engine_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_bundle(make_bundle(tmp_path / "bundle", Sample()))
    findings = Desktop().run(bundle, Job(threads=1))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    def refused(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("the judge has no engine to open")

    plain_open = builtins.open

    def reading(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        assert not set(mode) & set("wax+"), f"{file} is opened to be written"
        return plain_open(file, mode, *args, **kwargs)

    for engine in ENGINES:
        monkeypatch.setitem(ENGINES, engine, refused)
    monkeypatch.setattr(builtins, "open", reading)
    assert check(bundle, findings).passed
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
