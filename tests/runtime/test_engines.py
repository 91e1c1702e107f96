"""Engines and sessions: the same small graph as .onnx and as .pte, run, placed, and refused when it is not whole."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from runtime.bundle import BundleWriter, GraphInfo, TensorInfo, read_bundle
from runtime.engines import ENGINES
from runtime.engines.executorch import _PROBE as PROBE
from runtime.engines.executorch import _bindings, accumulator_bits
from runtime.engines.program import read_program
from runtime.errors import BundleError, EngineError, EngineMissingError
from runtime.latency import device_name, measure, measure_pair, peak_rss_bytes
from runtime.session import default_threads, open_session
from tests.sample_bundle import (
    VISION,
    Engine,
    Sample,
    edit_manifest,
    make_bundle,
    make_golden,
    noise_photo,
    rehash,
    write_pte,
)

BOTH: tuple[Engine, ...] = ("onnxruntime", "executorch")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Engine], Path]:
    made: dict[Engine, Path] = {}
    folder = tmp_path_factory.mktemp("bundles")

    def get(engine: Engine) -> Path:
        if engine not in made:
            made[engine] = make_bundle(folder / engine, Sample(engine=engine))
        return made[engine]

    return get


def _inputs(bundle: Path) -> dict[str, np.ndarray]:
    return {"pixel_values": read_bundle(bundle).golden()[f"{VISION}.in.pixel_values"]}


def test_the_table_of_engines_is_the_schemas() -> None:
    (engine,) = [field for field in msgspec.structs.fields(GraphInfo) if field.name == "engine"]
    assert sorted(engine.type.__args__) == sorted(ENGINES)


@pytest.mark.parametrize("engine", BOTH)
def test_outputs_equal_numpy(bundles: Callable[[Engine], Path], engine: Engine) -> None:
    bundle = read_bundle(bundles(engine))
    golden = bundle.golden()
    with open_session(bundle, VISION) as session:
        outputs = session.run(_inputs(bundle.path))
        assert session.engine.startswith(f"{engine} 1.")
    assert list(outputs) == ["hidden", "positions", "key_0"]
    for name, array in outputs.items():
        expected = golden[f"{VISION}.out.{name}"]
        assert array.dtype == expected.dtype
        assert np.allclose(array, expected, atol=1e-5)


@pytest.mark.parametrize("engine", BOTH)
def test_outputs_of_one_run_survive_the_next(bundles: Callable[[Engine], Path], engine: Engine) -> None:
    bundle = read_bundle(bundles(engine))
    inputs = _inputs(bundle.path)
    with open_session(bundle, VISION) as session:
        first = session.run(inputs)
        kept = first["hidden"].copy()
        session.run({"pixel_values": np.zeros_like(inputs["pixel_values"])})
    assert np.array_equal(first["hidden"], kept)


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize("make", [np.asfortranarray, lambda array: np.repeat(array, 2, axis=3)[..., ::2]])
def test_inputs_of_any_layout_and_read_only(
    bundles: Callable[[Engine], Path], engine: Engine, make: Callable[[np.ndarray], np.ndarray]
) -> None:
    bundle = read_bundle(bundles(engine))
    pixels = _inputs(bundle.path)["pixel_values"]
    odd = make(pixels)
    odd.setflags(write=False)
    before = odd.copy()
    with open_session(bundle, VISION) as session:
        assert np.array_equal(
            session.run({"pixel_values": odd})["hidden"], session.run({"pixel_values": pixels})["hidden"]
        )
    assert np.array_equal(odd, before)


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({}, r"takes the inputs \['pixel_values'\], got \[\]"),
        ({"pixels": np.zeros((1, 3, 28, 28), np.float32)}, r"got \['pixels'\]"),
        ({"pixel_values": np.zeros((1, 3, 28, 29), np.float32)}, r"got float32\[1, 3, 28, 29\]"),
        ({"pixel_values": np.zeros((1, 3, 28, 28), np.float64)}, "got float64"),
        ({"pixel_values": np.zeros((3, 28, 28), np.float32)}, r"takes pixel_values float32\[1, 3, 28, 28\]"),
    ],
    ids=["none", "name", "shape", "dtype", "rank"],
)
def test_wrong_inputs_never_reach_the_engine(
    bundles: Callable[[Engine], Path], engine: Engine, inputs: dict[str, np.ndarray], says: str
) -> None:
    with open_session(read_bundle(bundles(engine)), VISION) as session, pytest.raises(EngineError, match=says):
        session.run(inputs)


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_what_the_engine_says(bundles: Callable[[Engine], Path], engine: Engine, threads: int) -> None:
    bundle = read_bundle(bundles(engine))
    with open_session(bundle, VISION, threads=threads) as session:
        assert session.threads == threads


def test_executorch_has_one_thread_pool_for_all(bundles: Callable[[Engine], Path]) -> None:
    """So the number a session reports is asked of the engine, not remembered."""
    bundle = read_bundle(bundles("executorch"))
    with open_session(bundle, VISION, threads=2) as first, open_session(bundle, VISION, threads=1):
        assert first.threads == 1


def test_default_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, threads in ((1, 1), (2, 2), (4, 4), (64, 4), (None, 1)):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        assert default_threads() == threads


@pytest.mark.parametrize("engine", BOTH)
def test_zero_threads(bundles: Callable[[Engine], Path], engine: Engine) -> None:
    with pytest.raises(EngineError, match="threads=0 must be at least 1"):
        open_session(read_bundle(bundles(engine)), VISION, threads=0)


# Who runs what


def test_placement_in_executorch(bundles: Callable[[Engine], Path]) -> None:
    with open_session(read_bundle(bundles("executorch")), VISION) as session:
        placement = session.placement()
    assert placement.delegates == {"XnnpackBackend": 1}
    assert placement.outside == {"aten::add.out": 1}


def test_placement_in_onnxruntime(bundles: Callable[[Engine], Path]) -> None:
    with open_session(read_bundle(bundles("onnxruntime")), VISION) as session:
        placement = session.placement()
    assert placement.delegates == {}
    assert placement.outside["MatMul"] == 1


def test_program_reader_agrees_with_the_bindings(bundles: Callable[[Engine], Path]) -> None:
    path = bundles("executorch") / f"{VISION}.pte"
    program = _bindings()._load_program(str(path))
    methods = read_program(path)
    assert [method.name for method in methods] == [program.get_method_name(i) for i in range(program.num_methods())]


# What is not whole is refused


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize("size", [0, 5, 40, 300])
def test_truncated_graph_of_the_right_hash(
    bundles: Callable[[Engine], Path], tmp_path: Path, engine: Engine, size: int
) -> None:
    """The reader would see the size; this is an attacker who fixed the manifest."""
    bundle = shutil.copytree(bundles(engine), tmp_path / "b")
    file = read_bundle(bundle).manifest.graphs[0].file
    (bundle / file).write_bytes((bundle / file).read_bytes()[:size])
    rehash(bundle, file)
    with pytest.raises(EngineError, match="export again"):
        open_session(read_bundle(bundle), VISION)


def test_program_of_noise(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = tmp_path / "x.pte"
    for _ in range(200):
        path.write_bytes(rng.bytes(4) + b"ET12" + rng.bytes(int(rng.integers(0, 4000))))
        with pytest.raises(EngineError, match=r"x\.pte"):
            _needs_methods(path)


def _needs_methods(path: Path) -> None:
    if not read_program(path):
        raise EngineError(f"{path} has no methods")


def test_program_with_changed_bytes(bundles: Callable[[Engine], Path], tmp_path: Path) -> None:
    good = (bundles("executorch") / f"{VISION}.pte").read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "x.pte"
    for _ in range(300):
        data = bytearray(good)
        data[int(rng.integers(min(len(good), 3000)))] = int(rng.integers(256))
        path.write_bytes(data)
        with contextlib.suppress(EngineError):  # any other exception fails the test
            read_program(path)


def test_external_weights(bundles: Callable[[Engine], Path], tmp_path: Path) -> None:
    """A program whose .ptd is missing can bring the process down, so it must not get as far as the loader."""
    sample = Sample(engine="executorch")
    manifest = read_bundle(bundles("executorch")).manifest
    for name in ("listed", "unlisted"):
        with BundleWriter(tmp_path / name) as writer:
            shutil.copytree(bundles("executorch"), writer.path, dirs_exist_ok=True)
            if name == "listed":
                write_pte(writer.path, sample, make_golden(sample, noise_photo()), external=True)
            else:
                for part in (tmp_path / "listed").glob(f"{VISION}*"):
                    shutil.copy(part, writer.path)
            extra = ("_default_external_constant.ptd",) if name == "listed" else ()
            graph = msgspec.structs.replace(manifest.graphs[0], extra_files=extra)
            writer.commit(msgspec.structs.replace(manifest, name=name, graphs=(graph,)))
    bundle = read_bundle(tmp_path / "listed")
    with open_session(bundle, VISION) as session:
        got = session.run(_inputs(bundle.path))["hidden"]
    assert np.allclose(got, bundle.golden()[f"{VISION}.out.hidden"], atol=1e-5)
    with pytest.raises(EngineError, match=r"tensors in a \.ptd file that its manifest lacks"):
        open_session(read_bundle(tmp_path / "unlisted"), VISION)
    (bundle.path / "_default_external_constant.ptd").unlink()
    with pytest.raises(BundleError, match="lacks"):
        read_bundle(bundle.path)
    with pytest.raises(BundleError, match="lacks"):
        open_session(bundle, VISION)


@pytest.mark.parametrize("engine", BOTH)
def test_interface_that_differs_from_the_manifest(
    bundles: Callable[[Engine], Path], tmp_path: Path, engine: Engine
) -> None:
    bundle = shutil.copytree(bundles(engine), tmp_path / "b")
    graph = msgspec.to_builtins(read_bundle(bundle).manifest.graphs[0])
    graph["inputs"][0]["shape"] = [1, 3, 14, 56]
    edit_manifest(bundle, graphs=[graph])
    with pytest.raises(EngineError, match=r"has the inputs .*its manifest says pixel_values float32\[1, 3, 14, 56\]"):
        open_session(read_bundle(bundle), VISION)
    graph["inputs"][0]["shape"] = [1, 3, 28, 28]
    graph["outputs"] = graph["outputs"][:2]
    edit_manifest(bundle, graphs=[graph])
    with pytest.raises(EngineError, match="has the outputs"):
        open_session(read_bundle(bundle), VISION)


def test_program_without_the_method(bundles: Callable[[Engine], Path], tmp_path: Path) -> None:
    """A method named like the graph is preferred; another name than that or `forward` is refused."""
    from runtime.engines.program import Method, pick_method

    def method(name: str) -> Method:
        return Method(name=name, delegates={}, kernels={}, external_tensors=0)

    graph = read_bundle(bundles("executorch")).graph(VISION)
    assert pick_method(graph, (method("forward"), method(VISION)), tmp_path).name == VISION
    assert pick_method(graph, (method("a"), method("forward")), tmp_path).name == "forward"
    with pytest.raises(EngineError, match=r"has no method 'vision_encoder' or 'forward' \(it has: a\)"):
        pick_method(graph, (method("a"),), tmp_path)


def test_opening_a_program_does_not_import_the_exporter(bundles: Callable[[Engine], Path], root: Path) -> None:
    """Which takes longer than everything else that a bundle needs to be opened."""
    script = """
import sys
from pathlib import Path
from runtime.bundle import read_bundle
from runtime.session import open_session
with open_session(read_bundle(Path(sys.argv[1])), "vision_encoder"):
    heavy = ("executorch.exir", "torchao", "transformers", "torch._inductor", "torch._dynamo")
    print([name for name in heavy if name in sys.modules])
"""
    command = (sys.executable, "-c", script, str(bundles("executorch")))
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("engine", "module", "extra"),
    [
        ("onnxruntime", "onnxruntime", "onnx"),
        ("executorch", "executorch.extension.pybindings._C", "executorch"),
    ],
)
def test_engine_that_is_not_installed(
    bundles: Callable[[Engine], Path], monkeypatch: pytest.MonkeyPatch, engine: Engine, module: str, extra: str
) -> None:
    bundle = read_bundle(bundles(engine))
    monkeypatch.setitem(sys.modules, module, None)
    parent, _, name = module.rpartition(".")
    if parent in sys.modules:
        monkeypatch.delattr(sys.modules[parent], name, raising=False)
    with pytest.raises(EngineMissingError, match=rf"is not installed .*pip install 'pruneport\[{extra}\]'"):
        open_session(bundle, VISION)


def test_output_the_engine_did_not_promise(bundles: Callable[[Engine], Path]) -> None:
    """An engine whose answer is not the manifest's is caught before anything is compared."""
    with open_session(read_bundle(bundles("onnxruntime")), VISION) as session:
        first, *rest = session.graph.outputs
        wrong = TensorInfo(name=first.name, shape=(1, 2, 3), dtype=first.dtype)
        session.graph = msgspec.structs.replace(session.graph, outputs=(wrong, *rest))
        with pytest.raises(EngineError, match=r"gave hidden as float32\[1, 7, 8\], not hidden float32\[1, 2, 3\]"):
            session.run(_inputs(bundles("onnxruntime")))


# Without torch


def test_an_onnx_bundle_is_verified_where_torch_is_not_installed(
    bundles: Callable[[Engine], Path], root: Path, tmp_path: Path
) -> None:
    """A Python whose only packages are those of the wheel's core and onnxruntime: torch is not there to be imported."""
    site = tmp_path / "site"
    site.mkdir()
    import numpy

    installed = Path(numpy.__file__).parent.parent
    needed = ("numpy", "numpy.libs", "msgspec", "safetensors", "PIL", "pillow.libs", "jinja2", "markupsafe")
    for name in (*needed, "onnxruntime", "flatbuffers", "google"):
        if (installed / name).exists():
            (site / name).symlink_to(installed / name)
    script = (
        "import importlib.util, sys\n"
        "from pathlib import Path\n"
        "assert importlib.util.find_spec('torch') is None\n"
        "from runtime.harness import check_bundle, verify\n"
        "verdict = verify(Path(sys.argv[1]))\n"
        "assert verdict.passed and not verdict.unchecked_steps, verdict.steps\n"
        "check_bundle(Path(sys.argv[1]), runs=1, out_dir=Path(sys.argv[2]))\n"
        "assert 'torch' not in sys.modules\n"
        "print(len(verdict.graphs))\n"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, str(bundles("onnxruntime")), str(tmp_path / "out")],
        env={"PYTHONPATH": os.pathsep.join((str(root), str(site))), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"
    assert (tmp_path / "out" / "report.html").exists()


def test_runtime_imports_no_heavy_library(root: Path) -> None:
    script = (
        "import sys\n"
        "import runtime.harness, runtime.report, runtime.image, runtime.session\n"
        "heavy = {'torch', 'onnxruntime', 'executorch', 'jinja2', 'PIL', 'rich', 'onnx', 'safetensors'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Times


@pytest.mark.parametrize("engine", BOTH)
def test_measure(bundles: Callable[[Engine], Path], engine: Engine) -> None:
    bundle = read_bundle(bundles(engine))
    with open_session(bundle, VISION, threads=1) as session:
        latency = measure(session, _inputs(bundle.path), warmup=1, runs=7)
    assert 0 < latency.min_ms <= latency.p10_ms <= latency.median_ms <= latency.p90_ms <= latency.max_ms
    assert (latency.runs, latency.threads) == (7, 1)
    assert latency.load_ms > 0
    assert latency.device == device_name()
    assert latency.device.startswith("desktop CPU")
    assert 10e6 < latency.peak_rss_bytes <= 64e9


def test_pair_is_measured_in_turns(bundles: Callable[[Engine], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_bundle(bundles("onnxruntime"))
    inputs = _inputs(bundle.path)
    calls: list[str] = []
    with open_session(bundle, VISION) as a, open_session(bundle, VISION) as b:
        for session, name in ((a, "a"), (b, "b")):
            monkeypatch.setattr(session, "run", lambda given, name=name: calls.append(name))
        pair = measure_pair(a, inputs, b, inputs, warmup=1, runs=4)
    assert "".join(calls) == "ab" + "abbaabba"
    assert pair.ratio.p10 <= pair.ratio.median <= pair.ratio.p90


def test_slow_graph_is_run_less_often(bundles: Callable[[Engine], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.latency._time_ms", lambda session, inputs: 25_000.0)
    bundle = read_bundle(bundles("onnxruntime"))
    with open_session(bundle, VISION, threads=1) as session:
        assert measure(session, _inputs(bundle.path)).runs == 3
        pair = measure_pair(session, _inputs(bundle.path), session, _inputs(bundle.path))
    assert pair.bundle.runs == pair.twin.runs == 2


def test_ratio_sees_a_slower_graph(bundles: Callable[[Engine], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that only runs while a graph does: no other work on this machine shows."""
    bundle = read_bundle(bundles("onnxruntime"))
    inputs = _inputs(bundle.path)
    passed_ms: list[float] = []
    with open_session(bundle, VISION) as a, open_session(bundle, VISION) as b:
        monkeypatch.setattr(a, "run", lambda given: passed_ms.append(20))
        monkeypatch.setattr(b, "run", lambda given: passed_ms.append(10))
        monkeypatch.setattr("time.perf_counter", lambda: sum(passed_ms) / 1e3)
        pair = measure_pair(a, inputs, b, inputs, warmup=0, runs=5)
    assert pair.ratio.median == pytest.approx(2)
    assert pair.bundle.median_ms == pytest.approx(20)
    assert pair.twin.median_ms == pytest.approx(10)


@pytest.mark.parametrize(("warmup", "runs"), [(-1, 1), (0, 0)])
def test_counts_that_mean_nothing(bundles: Callable[[Engine], Path], warmup: int, runs: int) -> None:
    bundle = read_bundle(bundles("onnxruntime"))
    with open_session(bundle, VISION) as session, pytest.raises(ValueError, match="must be at least 0 and runs"):
        measure(session, _inputs(bundle.path), warmup=warmup, runs=runs)


def test_peak_memory_sees_an_allocation() -> None:
    before = peak_rss_bytes()
    block = np.ones(before + 50_000_000, np.uint8)
    assert peak_rss_bytes() > before + 40_000_000
    del block


# In how many bits float16 is added up


class _Ones(torch.nn.Module):
    """What the probe is made of: 256 numbers to 16 sums, in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.ones = torch.nn.Linear(256, 16, bias=False, dtype=torch.float16)
        self.ones.weight.data.fill_(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sums: torch.Tensor = self.ones(x)
        return sums


def test_the_probe_is_what_our_lowering_makes_of_a_layer_of_ones(tmp_path: Path) -> None:
    from export.backends.executorch import FILE, write_program
    from export.backends.xnnpack import DELEGATE

    def traced(graph: Any) -> torch.export.ExportedProgram:
        return torch.export.export(graph, (torch.ones(1, 8, 256, dtype=torch.float16),))

    graphs: Any = {"forward": _Ones().eval()}
    write_program(graphs, tmp_path, DELEGATE, trace=traced, copies_inputs=False)
    assert (tmp_path / FILE).read_bytes() == PROBE.read_bytes()
    (method,) = read_program(PROBE)
    assert list(method.delegates) == ["XnnpackBackend"]


def test_the_accumulator_is_measured_in_the_engine_and_told_with_the_placement(
    bundles: Callable[[Engine], Path],
) -> None:
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    if "x86" in platform.machine():
        assert accumulator_bits() == (16 if "avx512_fp16" in flags else 32)
    assert accumulator_bits() in (16, 32)
    with open_session(read_bundle(bundles("executorch")), VISION) as session:
        placement = session.placement()
        assert placement.accumulator_bits == (accumulator_bits() if "XnnpackBackend" in placement.delegates else 32)
    with open_session(read_bundle(bundles("onnxruntime")), VISION) as session:
        assert session.placement().accumulator_bits == 32  # nothing measured there: the stricter bound holds


@pytest.mark.parametrize("exact", [True, False])
def test_float32_weights_that_are_float16_numbers_take_two_bytes_and_lose_nothing(exact: bool, tmp_path: Path) -> None:
    from export.backends.executorch import FILE, write_program
    from export.backends.xnnpack import DELEGATE

    layer = torch.nn.Linear(256, 128, bias=False)
    if exact:
        layer.weight.data = layer.weight.data.half().float()
    x = torch.randn(1, 8, 256)
    graphs: Any = {"forward": layer.eval()}
    write_program(graphs, tmp_path, DELEGATE, trace=lambda graph: torch.export.export(graph, (x,)), copies_inputs=False)
    size = (tmp_path / FILE).stat().st_size
    assert 256 * 128 * 2 < size < 256 * 128 * 3 if exact else size > 256 * 128 * 4
    (got,) = _bindings()._load_for_executorch(str(tmp_path / FILE)).forward([x])
    want = layer(x).detach()
    assert float((got - want).norm() / want.norm()) < 1e-6
