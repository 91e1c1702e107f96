"""Whole sweeps of the smallest cells there are, on this machine and on a Ray cluster of two workers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from export.sweep.report import PAGE, RESULTS, Results
from runtime.bundle import read_bundle
from tests.conftest import CommandLine

pytestmark = pytest.mark.slow

# Seconds each: evenly spaced tokens behind the projector, the vision graph alone.
TINY = "model: pocket\nbackend: onnx\nonly: vision\ncut: 0\nmethod: uniform\n"

# Two machines of the cluster on this one, each with one core and room for one cell. A process of its own, since Ray
# warns of things that pytest would take for errors.
CLUSTER = """
import sys
from ray.cluster_utils import Cluster

small = {"num_cpus": 1, "memory": 2 * 2**30, "object_store_memory": 80 * 2**20}
cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
cluster.add_node(**small)
print("address", cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def results(folder: Path) -> Results:
    return msgspec.json.decode((folder / RESULTS).read_bytes(), type=Results)


def test_two_cells(tmp_path: Path, command_line: CommandLine) -> None:
    matrix, out = tmp_path / "tiny.yaml", tmp_path / "out"
    matrix.write_text(TINY + "keep: [8, 16]\n")
    done = command_line("sweep", matrix, "--output-dir", out, timeout_s=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line[:18] for line in done.stderr.splitlines() if line.startswith("[")] == [
        "[1/2] passed      ",
        "[2/2] passed      ",
    ]
    assert "2 cells: 2 passed" in done.stdout
    found = results(out)
    assert found.outcome == "passed"
    for row, keep in zip(found.cells, (8, 16), strict=True):
        assert row.folder is not None
        assert row.record is not None
        assert row.record.bundle is not None
        bundle = read_bundle(out / row.folder / row.record.bundle)
        bundle.check_files()
        assert bundle.manifest.prune.keep == keep
        assert bundle.manifest.tools.items() == dict(row.record.made_of["tools"]).items()  # type: ignore[call-overload]
        assert row.record.numbers is not None
        assert row.record.numbers.bundle_bytes == bundle.size_bytes
        assert 0 < row.record.ram_peak_bytes < row.record.ram_forecast_bytes
        assert row.beside == 0
    before = (out / PAGE).read_bytes()
    again = command_line("sweep", matrix, "--output-dir", out, "-q")
    assert (again.returncode, again.stdout) == (0, f"{out / PAGE}\n"), again.stderr
    assert (out / PAGE).read_bytes() == before
    assert results(out) == found


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a Ray cluster."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        yield next(line.split()[1] for line in lines if line.startswith("address "))
        process.stdin.close()
        process.stdout.read()
    assert process.returncode == 0


def test_two_workers_of_a_ray_cluster(cluster: str, tmp_path: Path, command_line: CommandLine) -> None:
    matrix, out = tmp_path / "tiny.yaml", tmp_path / "out"
    too_large = "{model: llava-1.5-7b, weights: random, keep: 8}"
    cells = TINY.replace("\n", "\n  ")
    matrix.write_text(f"- {cells}keep: [8, 16]\n- {too_large}\n")
    done = command_line("sweep", matrix, "--output-dir", out, "--ray", cluster, timeout_s=800)
    assert done.returncode == 1, done.stdout + done.stderr
    records = [row.record for row in results(out).cells]
    assert [record and record.status for record in records] == ["passed", "passed", "error"]
    assert records[2] is not None
    assert "the largest machine of the Ray cluster gives 2.0 GiB; add a larger one" in records[2].detail
    # Neither fits beside the other, so each was on a worker of its own, at the same time.
    assert [row.beside for row in results(out).cells] == [1, 1, 0]


def test_no_cluster_is_named(tmp_path: Path, command_line: CommandLine) -> None:
    matrix = tmp_path / "tiny.yaml"
    matrix.write_text(TINY + "keep: 8\n")
    done = command_line("sweep", matrix, "--output-dir", tmp_path / "out", "-q", "--ray", "127.0.0.1:1")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("pruneport: error: no Ray cluster answers at '127.0.0.1:1' (")
    assert len(done.stderr.splitlines()) == 1
