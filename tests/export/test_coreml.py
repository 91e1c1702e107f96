"""Core ML packages: what is saved, read back and evaluated in numpy equals the graphs; what is not whole is refused."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from benchmarks.golden_cases import features_of, program_of
from benchmarks.pruner_alone import PrunerGraph, lowered
from export import cli, outcome
from export.backends import coreml as backend
from export.backends.backend import LoweredGraph
from export.blocks.attention import Part, attention
from export.checkpoints import FolderCheckpoint
from export.graphs.decoder import Context, build_text_graphs
from export.graphs.graph import Graph
from export.graphs.stateful import build_stateful_text_graphs
from export.models.prompt import read_prompt
from export.request import Request, describe, plan
from pruning import TokenPruner, reference
from runtime.bundle import GraphInfo, TensorInfo, read_bundle
from runtime.engines import coreml as engine
from runtime.engines.coreml import OPERATORS, read_package
from runtime.errors import BundleError, EngineError, EngineMissingError, ExportError, RequestError
from runtime.harness import verify
from runtime.session import open_session
from runtime.text_graphs import IMAGE_PREFILL, TEXT_DECODER, TEXT_PREFILL, VISION_ENCODER
from tests.conftest import CommandLine
from tests.pruning.test_pruner_golden import CASES, HALF_OVERLAP, HALF_SCALE, _assert_golden
from tests.tiny_llava import TINY, write_tiny

WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
MODEL = "Data/com.apple.CoreML/model.mlmodel"
More = Callable[[Any, Any], Any]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As the command line does by default: the converter's warnings are about its neighbours' versions."""
    level = logging.root.level
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)
    logging.root.setLevel(level)


# What a package holds is what the graph computes


def load(graph: GraphInfo, package: Path) -> engine.LoadedPackage:
    return engine.load(graph, package, tuple(path for path in package.rglob("*") if path.is_file()), 1)


def opened(lowered: LoweredGraph, folder: Path, name: str) -> engine.LoadedPackage:
    assert lowered.inputs is not None
    assert lowered.outputs is not None
    info = GraphInfo(
        name=name,
        file=lowered.file,
        extra_files=lowered.extra_files,
        engine="coreml",
        arithmetic=("fp32",),
        inputs=lowered.inputs,
        outputs=lowered.outputs,
        states=lowered.states,
    )
    return load(info, folder / lowered.file)


def specification_version(package: Path) -> int:
    from coremltools.proto import Model_pb2

    model = Model_pb2.Model()
    model.ParseFromString((package / MODEL).read_bytes())
    return int(model.specificationVersion)


def text_graphs(folder: Path, precision: str, *, states: bool = False) -> dict[str, Graph]:
    checkpoint = FolderCheckpoint(write_tiny(folder), TINY)
    prefix_ids = read_prompt(checkpoint.folder, checkpoint.geometry, TINY).prefix_ids
    context = Context(TINY.geometry, TINY.family.frame(prefix_ids, TINY.geometry), keep=6, cut=2, text=24)
    if states:
        return build_stateful_text_graphs(checkpoint, context, chunk=4)
    return build_text_graphs(checkpoint, context, chunk=4, precision=precision)


def cosines(graph: Graph, loaded: engine.LoadedPackage, made: LoweredGraph) -> list[float]:
    """How near each output is to the graph's own, on noise; inputs are the graph's but for int64."""
    infos = made.inputs
    assert infos is not None
    assert [info.name for info in infos] == list(graph.input_names)
    assert [info.dtype for info in infos] == [info.dtype.replace("int64", "int32") for info in graph.input_infos()]
    chance = torch.Generator().manual_seed(3)
    inputs = [
        torch.randint(0, 20, info.shape, generator=chance)
        if info.dtype == "int64"
        else torch.randn(info.shape, generator=chance).to(getattr(torch, info.dtype))
        for info in graph.input_infos()
    ]
    got = loaded.run([x.numpy().astype(info.dtype) for x, info in zip(inputs, infos, strict=True)])
    with torch.no_grad():
        expected = graph(*inputs)
    pairs = zip(got, expected if isinstance(expected, tuple) else (expected,), strict=True)
    flat = [(a.astype(np.float64).ravel(), b.double().numpy().ravel()) for a, b in pairs]
    return [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in flat]


@pytest.fixture
def compressible(monkeypatch: pytest.MonkeyPatch) -> None:
    """The model here is smaller than those that are worth it."""
    monkeypatch.setattr(backend, "_LEAST_COMPRESSED", 512)
    monkeypatch.setattr(backend, "_BLOCK", 16)


@pytest.mark.usefixtures("compressible")
@pytest.mark.parametrize(
    ("ios", "precision", "scheme", "least", "kind"),
    [
        (18, "fp32", None, 1 - 1e-11, ""),
        (18, "fp16", None, 1 - 1e-5, ""),
        (18, "fp16", "int8", 0.9995, "constexpr_blockwise_shift_scale"),
        (18, "fp16", "int4", 0.97, "constexpr_blockwise_shift_scale"),
        (18, "fp16", "pal4", 0.97, "constexpr_lut_to_dense"),
        (17, "fp16", None, 1 - 1e-5, ""),
        (17, "fp16", "int8", 0.9995, "constexpr_affine_dequantize"),
    ],
)
def test_one_graph(ios: int, precision: str, scheme: str | None, least: float, kind: str, tmp_path: Path) -> None:
    graph = text_graphs(tmp_path / "tiny", precision)[IMAGE_PREFILL]
    graph.compression = scheme
    made = backend.lower({IMAGE_PREFILL: graph}, tmp_path, min_ios=ios)[IMAGE_PREFILL]
    assert sorted(path.name for path in tmp_path.glob("*")) == ["image_prefill.mlpackage", "tiny"]
    assert specification_version(tmp_path / made.file) == {17: 8, 18: 9}[ios]
    assert min(cosines(graph, opened(made, tmp_path, IMAGE_PREFILL), made)) > least
    operators = opened(made, tmp_path, IMAGE_PREFILL).placement().outside
    assert {name for name in operators if name.startswith("constexpr")} == {kind} - {""}
    (coverage,) = made.coverage
    assert coverage.nodes == sum(operators.values())


class Attending(Graph):
    """Attention of 4 heads and 8 channels over one piece of keys with a mask, or over a cache beside them."""

    mask: torch.Tensor

    def __init__(self, dtype: str, *, cached: bool) -> None:
        super().__init__()
        self.names = ("query", "key", "value", *(("past_key", "past_value") if cached else ()))
        self.kind = dtype
        self.register_buffer("mask", torch.triu(torch.full((6, 6), -1e4), diagonal=1).to(getattr(torch, dtype)))

    def input_infos(self) -> tuple[TensorInfo, ...]:
        return tuple(TensorInfo(name=name, shape=(4, 6, 8), dtype=self.kind) for name in self.names)

    def output_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="mixed", shape=(4, 6, 8), dtype=self.kind),)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *past: torch.Tensor) -> torch.Tensor:
        return attention(query, [*([Part(*past)] if past else []), Part(key, value, self.mask)])


@pytest.mark.parametrize(("dtype", "least"), [("float32", 1 - 1e-11), ("float16", 1 - 1e-6)])
@pytest.mark.parametrize(("ios", "cached", "fused"), [(18, False, 1), (18, True, 0), (17, False, 0)])
def test_attention_is_one_operator(
    dtype: str, least: float, ios: int, cached: bool, fused: int, tmp_path: Path
) -> None:
    graph = Attending(dtype, cached=cached)
    made = backend.lower({"g": graph}, tmp_path, min_ios=ios)["g"]
    loaded = opened(made, tmp_path, "g")
    operators = loaded.placement().outside
    assert operators.get("scaled_dot_product_attention", 0) == fused
    assert operators.get("softmax", 0) == 1 - fused
    assert min(cosines(graph, loaded, made)) > least


@pytest.mark.slow
@pytest.mark.usefixtures("compressible")
def test_functions_share_their_weights(tmp_path: Path) -> None:
    graphs = text_graphs(tmp_path / "tiny", "fp16")
    for name in (IMAGE_PREFILL, TEXT_PREFILL, TEXT_DECODER):
        graphs[name].compression = "int4"
    made = backend.lower(graphs, tmp_path)
    for name, graph in graphs.items():
        assert min(cosines(graph, opened(made[name], tmp_path, name), made[name])) > 0.97
    (tmp_path / "alone").mkdir()
    alone = backend.lower({TEXT_PREFILL: graphs[TEXT_PREFILL]}, tmp_path / "alone")[TEXT_PREFILL]
    sizes = [
        (folder / file / WEIGHTS).stat().st_size
        for folder, file in ((tmp_path, made[TEXT_PREFILL].file), (tmp_path / "alone", alone.file))
    ]
    assert sizes[0] < 1.1 * sizes[1]


@pytest.mark.slow
@pytest.mark.usefixtures("compressible")
@pytest.mark.parametrize(("scheme", "most_rel"), [(None, 0.005), ("int4", 0.25)])
def test_the_cache_as_states(tmp_path: Path, scheme: str | None, most_rel: float) -> None:
    """Functions that share their states leave in them what the same graphs with a cache of inputs and outputs give."""
    plain = text_graphs(tmp_path / "plain", "fp16")
    graphs = text_graphs(tmp_path / "tiny", "fp16", states=True)
    for name in (IMAGE_PREFILL, TEXT_PREFILL, TEXT_DECODER):
        graphs[name].compression = scheme
    made = backend.lower(graphs, tmp_path)
    infos = made[TEXT_DECODER].states
    assert [info.name for info in infos[:2]] == ["past_key_0", "past_value_0"]
    assert {info.shape[2] for info in infos} == {7 + 16 + 24, 7 + 6 + 24}  # ragged
    assert made[IMAGE_PREFILL].states == made[TEXT_PREFILL].states == infos
    chance = torch.Generator().manual_seed(3)

    def run(name: str, given: list[torch.Tensor], states: list[np.ndarray]) -> np.ndarray:
        low = made[name]
        loaded = opened(low, tmp_path, name)
        assert low.inputs is not None
        arrays = [x.numpy().astype(one.dtype) for x, one in zip(given, low.inputs, strict=True)]
        (out,) = loaded.run([*arrays, *states])
        return out

    def near(got: np.ndarray, expected: torch.Tensor) -> None:
        a, b = got.astype(np.float64).ravel(), expected.double().numpy().ravel()
        assert float(np.linalg.norm(a - b)) < most_rel * float(np.linalg.norm(b))

    def noise(info: TensorInfo) -> torch.Tensor:
        return torch.randn(info.shape, generator=chance).to(getattr(torch, info.dtype))

    states = [np.zeros(info.shape, np.float16) for info in infos]
    hidden = noise(plain[IMAGE_PREFILL].input_infos()[0])
    positions = torch.arange(13)[None]
    seen = [noise(info) for info in graphs[IMAGE_PREFILL].input_infos()[2:]]
    with torch.no_grad():
        expected = [*seen, *plain[IMAGE_PREFILL](hidden, positions)]
    near(run(IMAGE_PREFILL, [hidden, positions, *seen], states), expected[-2])
    for state, part in zip(states, expected, strict=True):
        near(state[:, :, : part.shape[2]], part)
        assert not state[:, :, part.shape[2] :].any()
    done = 0
    for name, tokens in ((TEXT_PREFILL, 4), (TEXT_DECODER, 1)):
        embeds = noise(plain[name].input_infos()[0])
        positions = torch.arange(23 + done, 23 + done + tokens)[None]
        before = [state.copy() for state in states]
        with torch.no_grad():
            logits, *new = plain[name](embeds, positions, *map(torch.from_numpy, before))
        near(run(name, [embeds, positions], states), logits)
        for state, old, part, image in zip(states, before, new, expected, strict=True):
            start = image.shape[2] + done
            near(state[:, :, start : start + tokens], part)
            state = np.delete(state, range(start, start + tokens), axis=2)
            assert np.array_equal(state, np.delete(old, range(start, start + tokens), axis=2))
        done += tokens


# Asking for it


def asked(folder: Path, **words: Any) -> Request:
    return Request(model="llava-1.5-7b", keep="64", output_dir=str(folder), weights="random", **words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            {"target": "android", "min_ios": "17"},
            "min_ios=17 means nothing to backend xnnpack of target android; leave",
        ),
        ({"target": "ios", "min_ios": "16"}, "unknown min_ios '16'.*; allowed: 17, 18"),
        (
            {"target": "ios", "min_ios": "17", "quant_text": "int4"},
            "quant_text=int4 is not made for min_ios=17; take int8, none, or --min-ios 18",
        ),
        (
            {"target": "ios", "min_ios": "17", "quant_vision": "pal4"},
            "quant_vision=pal4 is not made for min_ios=17; take int8, none, or --min-ios 18",
        ),
    ],
    ids=["android", "unknown", "blocks", "palettes"],
)
def test_versions_that_cannot_be_met(tmp_path: Path, words: dict[str, str], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        plan(asked(tmp_path, **words))


def test_plans_for_versions(tmp_path: Path) -> None:
    old = plan(asked(tmp_path, target="ios", min_ios="17", quant_vision="int8"))
    assert old.bundle.name == "llava-1.5-7b-keep64-ios-coreml-ios17-int8-random"
    assert (old.vision.precision, old.states, old.text and old.text.scheme) == ("fp16", False, "int8")
    assert "KV cache as inputs and outputs, weights stored for each graph" in describe(old)
    new = plan(asked(tmp_path, target="ios", quant_text="int8", min_ios="18"))
    assert new.bundle.name == "llava-1.5-7b-keep64-ios-coreml-text-int8-random"
    assert new.states
    assert ", for iOS 18 and later" in describe(new)
    weights = new.entry.text_parameter_count()
    vision = plan(asked(tmp_path, target="ios", only="vision")).needs.disk_bytes
    assert (new.needs.disk_bytes - vision, old.needs.disk_bytes - vision) == (weights, 3 * weights)


@pytest.mark.usefixtures("compressible")
def test_a_width_that_blocks_do_not_divide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_BLOCK", 32)  # the model is 48 wide
    graphs = text_graphs(tmp_path / "tiny", "fp16")
    graphs[IMAGE_PREFILL].compression = "int4"
    with pytest.raises(ExportError, match=r"int4 cannot compress the \d+ x 48 weights of image_prefill"):
        backend.lower({IMAGE_PREFILL: graphs[IMAGE_PREFILL]}, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.usefixtures("one_thread")
def test_golden_selections(tmp_path: Path) -> None:
    """Converted once, for four sets of features; then the same features rounded to float16."""
    program = program_of(CASES[0])
    graph = PrunerGraph(TokenPruner(program.spec), key_width=program.key_width, hidden_width=program.hidden_width)
    coverage, loaded = lowered(graph, "coreml", tmp_path)
    assert (coverage.partitions, coverage.outside) == (1, ())
    assert {"topk", "gather", "scatter", "argsort"}.isdisjoint(loaded.placement().outside)
    cases = [case for case in CASES if program_of(case) == program]
    assert len(cases) >= 4
    for case in cases:
        keys, hidden = features_of(case.features)
        _assert_golden(case, *loaded.run([keys.numpy(), hidden.numpy()]))
        keys, hidden = keys * HALF_SCALE, hidden * HALF_SCALE
        single = reference.prune(keys, hidden, case.spec)[1]
        _, indices = loaded.run([keys.half().float().numpy(), hidden.half().float().numpy()])
        assert np.isin(indices, single.numpy()).mean() >= HALF_OVERLAP


# A whole bundle


@pytest.fixture(scope="module")
def ios_bundle(tmp_path_factory: pytest.TempPathFactory, command_line: CommandLine) -> Path:
    """The pocket model with 64 image tokens, exported for Core ML in fp32; not to be changed."""
    folder = tmp_path_factory.mktemp("ios")
    words = ["export", "--model", "pocket", "--keep", "64", "--target", "ios", "-q"]
    done = command_line(*words, "--output-dir", folder, timeout_s=600)
    assert (done.returncode, done.stderr) == (0, "")
    return Path(done.stdout.strip())


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestBundle:
    """A bundle for iOS, from the command line to its verification."""

    def test_it_is_whole_and_evaluated(self, ios_bundle: Path) -> None:
        bundle = read_bundle(ios_bundle)
        bundle.check_files()
        assert bundle.manifest.target.min_os == "18"
        assert ios_bundle.name == "pocket-keep64-ios-coreml"
        packages = {graph.name: graph.file for graph in bundle.manifest.graphs}
        assert packages == {
            VISION_ENCODER: "vision_encoder.mlpackage",
            IMAGE_PREFILL: "text_decoder.mlpackage",
            TEXT_PREFILL: "text_decoder.mlpackage",
            TEXT_DECODER: "text_decoder.mlpackage",
            "token_embedding": "token_embedding.mlpackage",
        }
        assert {f"vision_encoder.mlpackage/{name}" for name in ("Manifest.json", MODEL, WEIGHTS)} <= set(
            bundle.manifest.files
        )
        positions = bundle.graph(VISION_ENCODER).outputs[1]
        assert (positions.name, positions.dtype) == ("positions", "int32")
        report = (ios_bundle / "report.md").read_text()
        assert "no time was measured: evaluated, not executed" in report
        assert "coreml program, evaluated by numpy" in report
        assert "as run here" not in report
        latency = msgspec.json.decode((ios_bundle / "latency.json").read_bytes())
        assert (latency["graphs"], latency["answers"]) == ([], None)

    def test_it_verifies(self, ios_bundle: Path) -> None:
        verdict = verify(ios_bundle)
        assert {step.status for step in verdict.steps} == {"passed"}
        assert not verdict.executed
        assert verdict.answer is not None
        assert verdict.answer.same == verdict.answer.expected_count

    def test_the_converters_own_reader_takes_it(self, ios_bundle: Path) -> None:
        """It infers every type anew, and must come to those that the evaluation rounds to."""
        from coremltools.converters.mil.frontend.milproto.load import load
        from coremltools.proto import Model_pb2

        package = ios_bundle / "text_decoder.mlpackage"
        spec = Model_pb2.Model()
        spec.ParseFromString((package / MODEL).read_bytes())
        program = load(spec, spec.specificationVersion, str((package / WEIGHTS).parent))
        assert set(program.functions) == {IMAGE_PREFILL, TEXT_PREFILL, TEXT_DECODER}
        for name, function in program.functions.items():
            _, steps = read_package(package).function(name).prepare()
            inferred = {op.outputs[0].name: tuple(op.outputs[0].shape) for op in function.operations}
            assert {step.output: step.shape for step in steps}.items() <= inferred.items()

    def test_without_coremltools_it_is_not_checked(
        self, ios_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "coremltools.proto", None)
        assert cli.main(["verify", str(ios_bundle)], version="0") == outcome.NOT_CHECKED
        assert "pip install 'pruneport[coreml]'" in "".join(capsys.readouterr().out.split("\n"))

    def test_it_cannot_be_asked_here(self, ios_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["ask", str(ios_bundle), "x.png", "What?"], version="0") == 2
        assert "is made for Core ML, which answers on a Mac or an iPhone and not here" in capsys.readouterr().err

    def test_truncated_weights(self, ios_bundle: Path, tmp_path: Path) -> None:
        bundle = shutil.copytree(ios_bundle, tmp_path / ios_bundle.name)
        weights = bundle / "token_embedding.mlpackage" / WEIGHTS
        whole = read_bundle(bundle)
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(BundleError, match="is truncated or was changed"):
            verify(bundle)
        weights.unlink()
        with pytest.raises(BundleError, match=f"lacks token_embedding.mlpackage/{WEIGHTS}"):
            open_session(whole, "token_embedding")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_bundle_for_an_earlier_version(tmp_path: Path, command_line: CommandLine) -> None:
    """Each graph a package, the cache in the caller's hands though it is fp16, weights in int8."""
    words = ["export", "--model", "pocket", "--keep", "16", "--target", "ios", "--min-ios", "17", "-q"]
    words += ["--precision", "fp16", "--quant-text", "int8"]
    done = command_line(*words, "--output-dir", tmp_path, timeout_s=600)
    assert (done.returncode, done.stderr) == (0, "")
    bundle = read_bundle(Path(done.stdout.strip()))
    assert bundle.path.name == "pocket-keep16-ios-coreml-ios17-fp16-text-int8"
    assert bundle.manifest.target.min_os == "17"
    assert "for ios 17 (coreml, fp16" in (bundle.path / "report.md").read_text()
    for graph in bundle.manifest.graphs:
        assert graph.file == f"{graph.name}.mlpackage"
        assert specification_version(bundle.path / graph.file) == 8
        assert graph.states == ()
    caches = {info.dtype for info in bundle.graph(TEXT_DECODER).inputs if info.name.startswith("past_")}
    assert caches == {"float16"}
    verdict = verify(bundle.path)
    assert {step.status for step in verdict.steps} == {"passed"}


# What is not whole or not known is refused: one product with a matrix, and whatever a test puts behind it


def save(folder: Path, more: More = lambda mb, x: x) -> tuple[GraphInfo, Path]:
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb

    weight = np.random.default_rng(0).standard_normal((64, 64), dtype=np.float32)

    @mb.program(input_specs=[mb.TensorSpec(shape=(2, 64))], opset_version=ct.target.iOS18)  # type: ignore[untyped-decorator]
    def program(x: Any) -> Any:
        return mb.identity(x=more(mb, mb.linear(x=x, weight=weight)), name="y")

    with contextlib.redirect_stderr(io.StringIO()):
        ct.convert(
            program,
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        ).save(str(folder / "g.mlpackage"))
    infos = tuple(TensorInfo(name=name, shape=(2, 64), dtype="float32") for name in ("x", "y"))
    graph = GraphInfo(
        name="g",
        file="g.mlpackage",
        extra_files=("g.mlpackage/Manifest.json",),
        engine="coreml",
        arithmetic=("fp32",),
        inputs=infos[:1],
        outputs=infos[1:],
    )
    return graph, folder / "g.mlpackage"


def test_damaged_packages(tmp_path: Path) -> None:
    graph, package = save(tmp_path)
    whole = load(graph, package)
    x = np.ones((2, 64), np.float32)
    assert np.isfinite(whole.run([x])[0]).all()
    assert whole.engine.startswith("coreml program, evaluated by numpy")
    assert not whole.placement().executed
    good = (package / WEIGHTS).read_bytes()
    for size in (0, 50, 100, len(good) - 64):
        (package / WEIGHTS).write_bytes(good[:size])
        with pytest.raises(EngineError, match=r"weight\.bin.*export again"):
            load(graph, package)
    (package / WEIGHTS).unlink()
    with pytest.raises(EngineError, match=r"weight\.bin, the weights of the package, cannot be read"):
        load(graph, package)
    model = (package / MODEL).read_bytes()
    for size in (0, 7, len(model) // 2):
        (package / MODEL).write_bytes(model[:size])
        with pytest.raises(EngineError, match="export again"):
            load(graph, package)
    (package / MODEL).unlink()
    with pytest.raises(EngineError, match=r"model\.mlmodel cannot be read"):
        load(graph, package)


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("cumsum", lambda mb, x: mb.cumsum(x=x, axis=1)),
        ("split", lambda mb, x: mb.concat(values=mb.split(x=x, num_splits=2, axis=1), axis=1)),
    ],
)
def test_operators_that_are_not_known(name: str, more: More, tmp_path: Path) -> None:
    graph, package = save(tmp_path, more)
    with pytest.raises(EngineError, match=f"has the operator '{name}'"):
        load(graph, package)


@pytest.mark.parametrize("link", [False, True])
def test_files_that_the_manifest_lacks(link: bool, tmp_path: Path) -> None:
    """Nobody has hashed them."""
    graph, package = save(tmp_path)
    listed = tuple(path for path in package.rglob("*") if path.is_file())
    weights = package / WEIGHTS
    if link:
        weights.rename(tmp_path / "elsewhere")
        weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match=r"weight\.bin is part of the package, but its manifest lacks it"):
        engine.load(graph, package, tuple(path for path in listed if path != weights), 1)


def test_a_parameter_that_is_not_known(tmp_path: Path) -> None:
    """Not every form of a known operator is: it is an error when it comes to it, not a guess."""
    graph, package = save(tmp_path, lambda mb, x: mb.gelu(x=x, mode="TANH_APPROXIMATION"))
    with pytest.raises(EngineError, match=r"the operator gelu .* cannot be evaluated: the mode 'TANH_APPROXIMATION'"):
        load(graph, package).run([np.ones((2, 64), np.float32)])


def test_another_interface_than_the_manifests(tmp_path: Path) -> None:
    graph, package = save(tmp_path)
    wrong = msgspec.structs.replace(graph.inputs[0], dtype="float16")
    with pytest.raises(EngineError, match=r"has the inputs x float32\[2, 64\]; its manifest says x float16\[2, 64\]"):
        load(msgspec.structs.replace(graph, inputs=(wrong,)), package)


def test_coremltools_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "coremltools.proto", None)
    with pytest.raises(EngineMissingError, match=r"is not installed .*pip install 'pruneport\[coreml\]'"):
        read_package(tmp_path)


def test_a_package_without_files_is_no_graph() -> None:
    info = (TensorInfo(name="x", shape=(1,), dtype="float32"),)
    with pytest.raises(ValueError, match=r"lists no file of its package g\.mlpackage"):
        GraphInfo(name="g", file="g.mlpackage", engine="coreml", arithmetic=("fp32",), inputs=info, outputs=info)


def test_slices_and_divisions_follow_the_reference() -> None:
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)

    def cut(**rest: Any) -> np.ndarray:
        return np.asarray(OPERATORS["slice_by_index"](x, **{name: np.asarray(value) for name, value in rest.items()}))

    assert np.array_equal(cut(begin=[0, 1, -2], end=[2, 3, 0], end_mask=[False, False, True]), x[:, 1:3, -2:])
    assert np.array_equal(cut(begin=[1, 0, 0], end=[2, 3, 4], squeeze_mask=[True, False, False]), x[1])
    assert np.array_equal(cut(begin=[0, 0, 1], end=[2, 3, 4], stride=[1, 1, 2]), x[:, :, 1::2])
    half = np.array([60000.0], np.float16)
    # Inside an operator nothing overflows: 1 / sqrt(60000^2) would be 0 if the square were rounded to float16.
    assert OPERATORS["rsqrt"](x=half, epsilon=np.float16(0)).dtype == np.float32
