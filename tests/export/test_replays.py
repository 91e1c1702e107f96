"""What is left out while ExecuTorch lowers changes nothing of the program, and is left out nowhere else."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.traceback import NodeSource

from export.backends import replays
from export.backends.xnnpack import SIGNS, XNNPACK
from export.graphs.graph import Graph
from runtime.bundle import TensorInfo

# Compiling the patterns that XNNPACK's passes look for takes some ten seconds on a busy machine.
# The converter warns of its own deprecations, which nobody here can act on.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(600)]


class Fusing(Graph):
    """x (1, 3, 8, 8) -> y (1, 24, 8, 8), with what XNNPACK's passes fuse, take apart and lay out anew."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.alone = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        for norm in (self.norm, self.alone):
            nn.init.uniform_(norm.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(norm.running_var, 0.5, 2.0)  # type: ignore[arg-type]

    def input_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="x", shape=(1, 3, 8, 8), dtype="float32"),)

    def output_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="y", shape=(1, 24, 8, 8), dtype="float32"),)

    def forward(self, x: Tensor) -> Tensor:
        made = torch.relu(self.norm(self.conv(x)))
        parts = [made, made + 1.0, made * 2.0, self.alone(made), 1.0 - made, torch.softmax(made, 1)]
        return torch.cat(parts, 1)


def _lowered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[bytes, int]:
    """The file, and how many times a graph was replayed on the way to it."""
    from executorch.exir.pass_base import _ExportPassBase

    folder.mkdir()
    replayed = 0
    usual = _ExportPassBase.call_submodule

    def counted(self: Any, *given: Any) -> Any:
        nonlocal replayed
        replayed += 1
        return usual(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(_ExportPassBase, "call_submodule", counted)
        (coverage,) = XNNPACK.lower({"g": Fusing().eval()}, folder)["g"].coverage
    assert not [left.op for left in coverage.outside if "norm" in left.op], "not fused"
    return (folder / "model.pte").read_bytes(), replayed


def test_the_same_program_with_fewer_replays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    brief, few = _lowered(tmp_path / "brief", monkeypatch)
    monkeypatch.setattr(replays, "left_out", nullcontext)
    full, many = _lowered(tmp_path / "full", monkeypatch)
    assert brief == full
    assert 0 < few < many


def test_everything_is_in_force_with_the_pinned_packages_and_nothing_afterwards() -> None:
    """Where an attribute is not found nothing is left out, which would go unnoticed."""
    from executorch.exir.pass_base import _ExportPassBase
    from executorch.exir.pass_manager import ExportedProgramPassManager

    places = (
        (NodeSource, "__deepcopy__"),
        (_ExportPassBase, "call"),
        (ExportedProgramPassManager, "check"),
        (torch.export.ExportedProgram, "run_decompositions"),
    )
    before = [vars(owner).get(name) for owner, name in places]
    with pytest.raises(KeyboardInterrupt), replays.left_out():
        assert all(vars(owner)[name] is not one for (owner, name), one in zip(places, before, strict=True))
        raise KeyboardInterrupt
    assert [vars(owner).get(name) for owner, name in places] == before


def test_a_pattern_holds_the_sign_that_its_pass_is_run_for() -> None:
    from executorch.backends.xnnpack._passes import XNNPACKPassManager
    from executorch.backends.xnnpack.partition.graphs import bilinear_2d, sdpa

    program = torch.export.export(nn.ReLU(), (torch.zeros(1),))
    assert set(SIGNS) <= {one.__name__ for one in XNNPACKPassManager(program).passes}
    for name, made in (("ConvertToUpsampleBilinear2d", bilinear_2d), ("ConvertToSDPAPass", sdpa)):
        for pattern in made.get_graphs():
            assert SIGNS[name] in {getattr(node.target, "_name", None) for node in pattern.graph.nodes}
