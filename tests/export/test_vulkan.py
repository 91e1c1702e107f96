"""A phone's GPU through ExecuTorch's Vulkan delegate: lowered whole here, run only where a build has the delegate."""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path
from shutil import copytree
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from export.backends.executorch import FILE
from export.backends.vulkan import lower
from export.cli import main
from export.graphs.graph import Graph
from export.request import Request, plan
from runtime.bundle import MANIFEST, BundleWriter, TensorInfo, read_bundle
from runtime.check.verdict import Step, Verdict
from runtime.engines.program import read_program
from runtime.errors import EngineMissingError, NotYetError, RequestError
from runtime.explain import NO_REWRITE, rewrite_for
from runtime.harness import check_bundle, verify
from runtime.session import open_session
from tests.conftest import CommandLine
from tests.sample_bundle import VISION, Sample, fill, noise_photo

DELEGATE = "VulkanBackend"
REMEDY = "run the bundle on a phone, or verify it with ExecuTorch built with EXECUTORCH_BUILD_VULKAN"


class Product(Graph):
    """x (1, 4, WIDTH) times a stored matrix; `sums` adds what no delegate takes."""

    WIDTH = 64
    weight: Tensor

    def __init__(self, weight: Tensor, *, sums: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Buffer(weight)
        self.sums = sums

    def input_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="x", shape=(1, 4, self.WIDTH), dtype="float32"),)

    def output_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="y", shape=(1, 4, self.WIDTH), dtype="float32"),)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        y = torch.relu(x @ self.weight)
        return (torch.cumsum(y, dim=-1) * 0.5 if self.sums else y,)


def _request(folder: Path, **words: Any) -> Request:
    return Request(model="pocket", keep="64", target="android", backend="vulkan", output_dir=str(folder), **words)


def test_plan(tmp_path: Path) -> None:
    planned = plan(_request(tmp_path))
    assert planned.bundle.name == "pocket-keep64-android-vulkan"
    assert (planned.vision.arithmetic, planned.vision.backend.engine) == ("fp32", "executorch")
    assert planned.text == planned.vision
    with pytest.raises(NotYetError, match=r"quant_text=8da4w: not yet on backend vulkan"):
        plan(_request(tmp_path, quant_text="8da4w"))
    with pytest.raises(RequestError, match=r"layout=multimodal-runner is not made by backend vulkan"):
        plan(_request(tmp_path, layout="multimodal-runner"))
    with pytest.raises(RequestError, match=r"unknown vulkan precision 'int8'"):
        plan(_request(tmp_path, precision="int8"))


@pytest.mark.slow
def test_what_a_delegate_takes_leaves_and_shares(tmp_path: Path) -> None:
    """Two graphs with the same weights, one of them with an operator that Vulkan does not know."""
    weight = torch.randn(Product.WIDTH, Product.WIDTH, generator=torch.Generator().manual_seed(0))
    logs = logging.root.level, list(logging.root.handlers)
    written = lower({"whole": Product(weight), "odd": Product(weight.clone(), sums=True)}, tmp_path)
    assert (logging.root.level, logging.root.handlers) == logs
    (whole,), (odd,) = written["whole"].coverage, written["odd"].coverage
    assert (whole.delegate, whole.partitions, whole.outside, whole.runs) == (DELEGATE, 1, (), (whole.nodes,))
    assert [(left.op, left.count, left.reason) for left in odd.outside] == [
        ("aten.cumsum", 1, "no operator implementation")
    ]
    assert rewrite_for(DELEGATE, odd.outside[0]) != NO_REWRITE
    assert odd.partitions == 2
    assert [run > 0 for run in odd.runs] == [True, False, True]
    calls = {method.name: method.delegates[DELEGATE] for method in read_program(tmp_path / FILE)}
    assert calls == {"whole": 1, "odd": 2}
    assert Product.WIDTH**2 * 4 < (tmp_path / FILE).stat().st_size < 2 * Product.WIDTH**2 * 4


# Bundles


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample that calls Vulkan in place of XNNPACK, as lowering takes long."""
    target = tmp_path_factory.mktemp("vulkan") / "b"
    with BundleWriter(target) as writer:
        manifest = fill(writer.path, target.name, Sample(engine="executorch"), noise_photo())
        (info,) = manifest.graphs
        program = (writer.path / info.file).read_bytes()
        calls = struct.pack("<I14sx", 14, b"XnnpackBackend")
        assert program.count(calls) == 1
        (writer.path / info.file).write_bytes(program.replace(calls, struct.pack("<I13s2x", 13, DELEGATE.encode())))
        info = msgspec.structs.replace(info, coverage=(msgspec.structs.replace(info.coverage[0], delegate=DELEGATE),))
        on = msgspec.structs.replace(manifest.target, backend="vulkan")
        writer.commit(msgspec.structs.replace(manifest, graphs=(info,), target=on))
    return target


def _step(verdict: Verdict, name: str) -> Step:
    (step,) = [step for step in verdict.steps if step.name == name]
    return step


def test_bundle_is_not_checked_rather_than_passed(bundle: Path, tmp_path: Path) -> None:
    verdict = check_bundle(bundle, out_dir=tmp_path / "out")
    assert verdict.outcome == "not checked"
    (step,) = verdict.unchecked_steps
    assert (step.name, step.remedy) == (f"parity of {VISION}", REMEDY)
    assert step.detail == f"the ExecuTorch engine installed here has no {DELEGATE}"
    assert (verdict.graphs, verdict.latency, verdict.placements) == ((), (), ())
    placed = _step(verdict, f"delegates of {VISION}")
    assert placed.detail.startswith(f"{DELEGATE} in 1 partition, ")
    assert placed.detail.endswith("outside (instructions of the program file)")
    assert json.loads((tmp_path / "out" / "latency.json").read_text())["graphs"] == []
    report = (tmp_path / "out" / "report.md").read_text()
    assert "not checked" in report
    assert "passed, partly" not in report


def test_session_is_refused_at_once(bundle: Path) -> None:
    with pytest.raises(EngineMissingError, match=f"has no {DELEGATE}; {REMEDY}"):
        open_session(read_bundle(bundle), VISION)


def test_promise_that_the_program_breaks_fails_even_where_it_cannot_run(bundle: Path, tmp_path: Path) -> None:
    changed = copytree(bundle, tmp_path / "b")
    manifest = json.loads((changed / MANIFEST).read_text())
    manifest["graphs"][0]["coverage"][0]["partitions"] = 2
    (changed / MANIFEST).write_text(json.dumps(manifest))
    verdict = verify(changed)
    (step,) = verdict.failed_steps
    assert (step.name, verdict.outcome) == (f"delegates of {VISION}", "failed")
    assert "the manifest says 2 partitions, the program makes 1 delegate call" in step.detail


def test_verify_ends_with_3(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    assert main(["verify", str(bundle)], version="0") == 3
    assert f"not checked: the ExecuTorch engine installed here has no {DELEGATE}; {REMEDY}" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pocket_from_the_command_line(command_line: CommandLine, tmp_path: Path) -> None:
    """Pruner and all in one partition; nothing is called passed that was not run."""
    words = ["--model", "pocket", "--keep", "16", "--backend", "vulkan", "--only", "vision"]
    done = command_line("export", *words, "-q", "--output-dir", tmp_path / "out", timeout_s=800)
    assert done.returncode == 3, done.stdout + done.stderr
    bundle = read_bundle(Path(done.stdout.strip()))
    (graph,) = bundle.manifest.graphs
    (coverage,) = graph.coverage
    assert (coverage.delegate, coverage.partitions, coverage.outside) == (DELEGATE, 1, ())
    assert coverage.nodes > 1000
    parity = json.loads((bundle.path / "parity.json").read_text())
    status = {step["name"]: step["status"] for step in parity["steps"]}
    assert status[f"parity of {VISION}"] == "not checked"
    assert (status[f"delegates of {VISION}"], parity["graphs"]) == ("passed", [])
