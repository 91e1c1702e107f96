"""NNAPI through ONNX Runtime: .ort files that the CPU runs here, and a delegate that is never said to have run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from export.backends.nnapi import CONFIG_FILE, LEFT, lower
from export.graphs.graph import Graph
from export.request import Request, plan
from runtime.bundle import BundleWriter, DelegateCoverage, GraphInfo, TensorInfo, read_bundle
from runtime.check.verdict import Step, Verdict
from runtime.engines import ENGINES
from runtime.engines.onnxruntime import NNAPI
from runtime.errors import RequestError
from runtime.explain import NO_REWRITE, rewrite_for
from runtime.harness import check_bundle
from tests.conftest import CommandLine
from tests.sample_bundle import VISION, Sample, fill, noise_photo


class Odd(Graph):
    """x (1, 4, 64): a product of 1 / sqrt(x * x + 1) and its running sum, which the list lacks; `alone`: of x."""

    weight: Tensor

    def __init__(self, *, alone: bool = False) -> None:
        super().__init__()
        self.weight = torch.nn.Buffer(torch.eye(64) * 2)
        self.alone = alone

    def input_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="x", shape=(1, 4, 64), dtype="float32"),)

    def output_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="y", shape=(1, 4, 64), dtype="float32"),)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (torch.cumsum(x if self.alone else torch.rsqrt(x * x + 1) @ self.weight, dim=-1),)


def _request(folder: Path, **words: Any) -> Request:
    words = {"model": "pocket", **words}
    return Request(keep="64", target="android", backend="nnapi", output_dir=str(folder), **words)


def test_plan(tmp_path: Path) -> None:
    planned = plan(_request(tmp_path))
    assert (planned.bundle.name, planned.vision.precision) == ("pocket-keep64-android-nnapi", "fp32")
    with pytest.raises(RequestError, match=r"unknown nnapi precision 'fp16'.*allowed: fp32"):
        plan(_request(tmp_path, precision="fp16"))


def test_graph_above_two_gib_is_refused_in_the_plan(tmp_path: Path) -> None:
    words: dict[str, Any] = {"model": "llava-1.5-7b", "weights": "random", "only": "vision"}
    with pytest.raises(RequestError, match=r"vision_encoder of llava-1.5-7b has about 2\.\d GiB .* at most 2\.0 GiB"):
        plan(_request(tmp_path, **words))
    smaller = plan(_request(tmp_path, **words, cut="0"))
    assert smaller.bundle.name.startswith("llava-1.5-7b-keep64-android-nnapi-cut0-vision")


def test_ort_files_run_and_what_the_list_leaves_is_named(tmp_path: Path) -> None:
    graphs = {"part": Odd(), "none": Odd(alone=True)}
    written = lower(graphs, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none.ort", "part.ort", CONFIG_FILE]
    config = (tmp_path / CONFIG_FILE).read_text()
    assert "CumSum" in config
    assert str(tmp_path) not in config
    (part,), (none,) = written["part"].coverage, written["none"].coverage
    assert (part.delegate, part.nodes, part.partitions) == (NNAPI, 5, 1)  # the reciprocal of the root as a division
    assert (none.nodes, none.partitions) == (0, 0)
    assert part.by_list
    for coverage in (part, none):
        assert [(left.op, left.count, left.reason) for left in coverage.outside] == [("CumSum", 1, LEFT)]
    assert rewrite_for(NNAPI, part.outside[0]) != NO_REWRITE
    graph = graphs["part"]
    info = GraphInfo(
        name="part",
        file="part.ort",
        engine="onnxruntime",
        arithmetic=("fp32",),
        inputs=graph.input_infos(),
        outputs=graph.output_infos(),
        coverage=(part,),
    )
    loaded = ENGINES["onnxruntime"](info, tmp_path / "part.ort", (), 1)
    x = np.random.default_rng(0).standard_normal((1, 4, 64), dtype=np.float32)
    np.testing.assert_allclose(loaded.run([x])[0], np.cumsum(2 / np.sqrt(x * x + 1), axis=-1), rtol=1e-4, atol=1e-4)
    assert "on the CPU in the place of NNAPI" in loaded.engine
    placement = loaded.placement()
    assert placement.delegates == {}
    assert "NNAPI exists on Android alone" in placement.stand_in


def _step(verdict: Verdict, name: str) -> Step:
    (step,) = [step for step in verdict.steps if step.name == name]
    return step


def test_bundle_is_compared_and_its_delegate_not_checked(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        manifest = fill(writer.path, "b", Sample(), noise_photo())
        (graph,) = manifest.graphs
        told = DelegateCoverage(delegate=NNAPI, partitions=1, nodes=9, by_list=True)
        graph = msgspec.structs.replace(graph, coverage=(told,))
        on = msgspec.structs.replace(manifest.target, backend="nnapi")
        writer.commit(msgspec.structs.replace(manifest, graphs=(graph,), target=on))
    verdict = check_bundle(tmp_path / "b", out_dir=tmp_path / "out")
    assert verdict.outcome == "not checked"
    assert _step(verdict, f"parity of {VISION}").status == "passed"
    (step,) = verdict.unchecked_steps
    assert (step.name, step.remedy) == (f"delegates of {VISION}", "run the bundle on an Android phone")
    assert step.detail.startswith("NNAPI exists on Android alone: here ONNX Runtime's CPU ran")
    assert json.loads((tmp_path / "out" / "latency.json").read_text())["graphs"] == []
    assert "9 nodes in 1 partition (by a list, not measured), 0 outside" in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_pocket_from_the_command_line(command_line: CommandLine, tmp_path: Path) -> None:
    words = ["--model", "pocket", "--keep", "16", "--backend", "nnapi", "--only", "vision"]
    done = command_line("export", *words, "-q", "--output-dir", tmp_path / "out", timeout_s=800)
    assert done.returncode == 3, done.stdout + done.stderr
    bundle = read_bundle(Path(done.stdout.strip()))
    (graph,) = bundle.manifest.graphs
    assert (graph.file, graph.extra_files) == ("vision_encoder.ort", (CONFIG_FILE,))
    (coverage,) = graph.coverage
    assert (coverage.partitions, {left.op: left.count for left in coverage.outside}) == (3, {"Gelu": 1, "Expand": 1})
    assert coverage.nodes > 1000
    parity = json.loads((bundle.path / "parity.json").read_text())
    status = {step["name"]: step["status"] for step in parity["steps"]}
    assert status.pop(f"delegates of {VISION}") == "not checked"
    assert set(status.values()) == {"passed"}
    assert parity["graphs"][0]["kept"]["exact"]
