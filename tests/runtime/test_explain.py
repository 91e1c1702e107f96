"""Explanations: each rule finds what it is for, bundles are explained without an engine, hostile text stays text."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import msgspec
import pytest

from export import cli
from runtime.bundle import BundleWriter, DelegateCoverage, GraphInfo, OutsideOp, read_bundle
from runtime.check.verdict import Verdict
from runtime.engines.coreml import Operator
from runtime.errors import BundleError, EngineError
from runtime.explain import NO_REWRITE, RULES_FILE, Rules, explain, in_short, lint, rewrite_for, rules
from runtime.report import write_reports
from tests.sample_bundle import VISION, Sample, edit_manifest, fill, make_bundle, noise_photo, rehash

XNNPACK = "XnnpackBackend"
MODEL = f"{VISION}.mlpackage/Data/com.apple.CoreML/model.mlmodel"
NOT_LISTED = "not in the delegate's list of operators"
COPY = "dim_order_ops._to_dim_order_copy"
INTEGERS = "computes in int64; the delegate takes floating point only"
INDICES = "mixes float32 and int64; the delegate converts no data types"

# What the partitioner and `export.backends.executorch` say, and the rule that is meant.
OUTSIDE = [
    (XNNPACK, "aten.embedding", INDICES, "embedding"),
    (XNNPACK, "llama.custom_sdpa", NOT_LISTED, "attention-with-its-cache"),
    (XNNPACK, "auto_functionalized_v2", NOT_LISTED, "attention-with-its-cache"),
    (XNNPACK, "aten.sym_size.int", NOT_LISTED, "dynamic-shapes"),
    (XNNPACK, "aten._local_scalar_dense", INTEGERS, "dynamic-shapes"),
    (XNNPACK, "le", NOT_LISTED, "dynamic-shapes"),
    (XNNPACK, "aten.view_copy", "Symbolic reshape is not supported. Output shape is ...", "symbolic-reshape"),
    (XNNPACK, "aten.upsample.vec", "dynamic output sizes are not supported", "dynamic-output"),
    (XNNPACK, "aten.topk", NOT_LISTED, "sort-and-index"),
    (XNNPACK, "aten.index.Tensor", INDICES, "sort-and-index"),
    (XNNPACK, COPY, INDICES, "cast-of-indices"),
    (XNNPACK, COPY, "mixes float16 and float32; the delegate converts no data types", "cast"),
    (XNNPACK, "aten.mul.Tensor", "Mul does not support mixed input dtypes, got: [a, b]", "mixed-types"),
    (XNNPACK, "aten.mul.Tensor", INDICES, "mixed-types"),
    (XNNPACK, "aten.clone", "dtype conversion from a to b is not supported", "conversion"),
    (XNNPACK, "aten.add.Tensor", INTEGERS, "whole-numbers"),
    (XNNPACK, "aten.view_copy", INTEGERS, "whole-numbers"),
    (XNNPACK, "aten.logical_not", INTEGERS.replace("int64", "bool"), "truth-values"),
    (XNNPACK, "aten._softmax", "dim must be the last dim, got dim = 1 for tensor of rank 3", "softmax-axis"),
    (XNNPACK, "aten.mean.dim", "mean.dim only supports averaging 4D tensors, got tensor of rank 3", "mean"),
    (XNNPACK, "aten.gelu", "GELU does not support fp16", "half-gelu"),
    (XNNPACK, "aten.pow.Tensor_Scalar", "only support power == 2, got 3", "power"),
    (XNNPACK, "aten.sub.Tensor", "Sub node doesn't support alpha != 1", "alpha"),
    (XNNPACK, "aten.constant_pad_nd", "XNNPACK does not support negative padding values", "negative-padding"),
    (XNNPACK, "aten.unsqueeze_copy", "unsqueeze_copy only supported on the trailing dimension", "views"),
    ("QNNExecutionProvider", "TopK", "", "npu"),
    ("WebGpuExecutionProvider", "Cast", "", "webgpu-whole-numbers"),
    ("VulkanBackend", "aten.cumsum", "no operator implementation", "vulkan-operators"),
    ("VulkanBackend", "aten.add.Tensor", "dtype not supported", "vulkan-types"),
    ("VulkanBackend", "aten.cat.default", "op does not support high dim tensors", "vulkan-axes"),
    ("VulkanBackend", "aten.cat.default", "no valid representations", "vulkan-sizes"),
    ("NnapiExecutionProvider", "Gelu", "not in the list", "nnapi-gelu"),
    ("NnapiExecutionProvider", "Expand", "not in the list", "nnapi-expand"),
    ("NnapiExecutionProvider", "CumSum", "not in the list", "nnapi-operators"),
]

HALF, SINGLE = "float16", "float32"
ENGINE = [
    ("mul", SINGLE, (1, 64, 1, 64), "float32"),
    ("cast", "int32", (1, 64), "whole-numbers"),
    ("topk", HALF, (1, 64), "sort"),
    ("gather", HALF, (1, 64), "gather"),
    ("scatter_nd", HALF, (1, 64), "scatter"),
    ("lstm", HALF, (1, 64), "recurrent"),
    ("mul", HALF, (1, 2, 2, 2, 64), "rank"),
    ("mul", HALF, (1, 16385, 64), "long-axis"),
    ("linear", HALF, (1, 64, 64), "linear"),
    ("mul", HALF, (1, 64, 1), "short-last-axis"),
    ("reshape", HALF, (1, 64, 64), "copies"),
]


def operator(kind: str, dtype: str, shape: tuple[int, ...], name: str = "x") -> Operator:
    return Operator(kind=kind, name=name, dtype=dtype, shape=shape)


@pytest.mark.parametrize(("delegate", "op", "reason", "rule"), OUTSIDE)
def test_each_reason_finds_its_rewrite(delegate: str, op: str, reason: str, rule: str) -> None:
    expected = next(one.rewrite for one in rules().outside if one.id == rule)
    assert rewrite_for(delegate, OutsideOp(op=op, count=1, reason=reason)) == expected


def test_no_rule_is_without_an_example() -> None:
    assert {rule for *_, rule in OUTSIDE} == {rule.id for rule in rules().outside}
    assert {rule for *_, rule in ENGINE} == {rule.id for rule in rules().neural_engine}


@pytest.mark.parametrize(
    ("delegate", "op", "reason"), [(XNNPACK, "aten.erfinv", NOT_LISTED), ("CPUExecutionProvider", "aten.embedding", "")]
)
def test_what_no_rule_knows_is_said_to_be_unknown(delegate: str, op: str, reason: str) -> None:
    assert rewrite_for(delegate, OutsideOp(op=op, count=1, reason=reason)) == NO_REWRITE


@pytest.mark.parametrize(("kind", "dtype", "shape", "rule"), ENGINE)
def test_each_operator_finds_its_rule(kind: str, dtype: str, shape: tuple[int, ...], rule: str) -> None:
    found = lint("g", (operator(kind, dtype, shape),))
    assert [finding.rule.id for finding in found.findings] == [rule]
    assert found.findings[0].operators == {kind: 1}
    assert (found.operators, found.leaving) == (1, int(found.findings[0].rule.effect == "leaves"))


@pytest.mark.parametrize(
    "op",
    [
        operator("conv", HALF, (1, 64, 1, 576)),
        operator("cast", SINGLE, (1, 64, 1, 64)),  # at the edge, where others want float32
        operator("mul", HALF, (1, 1, 1)),
        operator("mul", HALF, ()),
        operator("add", HALF, (16384, 64)),
        operator("add", "type 99", (1, 64, 1)),
    ],
)
def test_what_suits_the_neural_engine_is_not_reported(op: Operator) -> None:
    assert lint("g", (op,)).findings == ()


def test_an_operator_leaves_once_and_weights_do_not_count() -> None:
    found = lint(
        "g",
        (
            operator("constexpr_lut_to_dense", SINGLE, (20000, 1), "weight"),
            operator("gather", SINGLE, (1, 64), "a"),
            operator("add", HALF, (1, 64), "b"),
        ),
    )
    assert (found.operators, found.leaving) == (2, 1)
    assert [finding.rule.id for finding in found.findings] == ["float32", "gather"]


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("outside", {"extra": 1}),
        ("outside", {"rewrite": ""}),
        ("outside", {"delegates": []}),
        ("neural_engine", {"likely": "it leaves"}),
        ("neural_engine", {"effect": "breaks"}),
        ("neural_engine", {"source": "somebody"}),
        ("neural_engine", {"when": {"kind": "weather"}}),
        ("neural_engine", {"when": {"kind": "rank", "more_than": 4, "dtypes": []}}),
        ("neural_engine", {"id": "linear"}),
    ],
)
def test_rules_are_validated(place: str, change: dict[str, Any]) -> None:
    raw = msgspec.json.decode(RULES_FILE.read_bytes())
    msgspec.convert(raw, Rules)
    raw[place][0] |= change
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(raw, Rules)


# A whole bundle


def with_coverage(folder: Path, *coverage: DelegateCoverage) -> Path:
    bundle = make_bundle(folder, Sample())
    graph = msgspec.structs.replace(read_bundle(bundle).graph(VISION), coverage=coverage)
    edit_manifest(bundle, graphs=[msgspec.to_builtins(graph)])
    return bundle


def spoken(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str | Path
) -> tuple[int, str, str]:
    monkeypatch.setenv("COLUMNS", "220")
    code = cli.main(["explain", *map(str, words)], version="0")
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_tells_what_stayed_outside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = (
        OutsideOp(op="aten.embedding", count=3, reason=INDICES),
        OutsideOp(op="\x1b]0;evil\x07[bold]x", count=1, reason="\x1b[2J"),
    )
    bundle = with_coverage(tmp_path / "b", DelegateCoverage(delegate=XNNPACK, partitions=2, nodes=41, outside=left))
    code, out, err = spoken(capsys, monkeypatch, bundle)
    assert (code, err) == (0, "")
    for text in (
        "41",
        "outside XnnpackBackend",
        f"aten.embedding: {VISION} x 3",
        "mixes float32 and int64",
        "leave it",
    ):
        assert text in out
    assert NO_REWRITE in out
    assert "[bold]x" in out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert spoken(capsys, monkeypatch, bundle, "-q") == (0, "41 nodes taken, 4 outside\n", "")


def test_nothing_outside_and_nothing_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = with_coverage(tmp_path / "a", DelegateCoverage(delegate="CPUExecutionProvider", partitions=1, nodes=9))
    code, out, _ = spoken(capsys, monkeypatch, cpu)
    assert code == 0
    assert "CPUExecutionProvider" in out
    assert "rewrite" not in out
    code, out, _ = spoken(capsys, monkeypatch, make_bundle(tmp_path / "b", Sample()))
    assert (code, out) == (0, "b: the manifest records no delegate\n")


@pytest.mark.parametrize("damage", ["absent", "no bundle", "not JSON", "not the schema", "truncated"])
def test_errors_are_those_of_verify(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = tmp_path / "b"
    if damage == "no bundle":
        bundle.mkdir()
    elif damage != "absent":
        make_bundle(bundle, Sample())
    if damage == "not JSON":
        (bundle / "manifest.json").write_text("{")
    elif damage == "not the schema":
        edit_manifest(bundle, graphs=[{"name": 3}])
    elif damage == "truncated":
        (bundle / "golden.safetensors").write_bytes(b"")
    messages = []
    for verb in ("verify", "explain"):
        assert cli.main([verb, str(bundle), "-q"], version="0") == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        messages.append(captured.err)
    assert messages[0] == messages[1]
    assert str(bundle) in messages[0]


def test_opens_no_engine(tmp_path: Path, root: Path) -> None:
    bundle = with_coverage(tmp_path / "b", DelegateCoverage(delegate=XNNPACK, partitions=1, nodes=1))
    program = f"""
import sys
from pruneport import main
assert main(["explain", {str(bundle)!r}, "-q"]) == 0
print([name for name in ("torch", "onnxruntime", "executorch", "coremltools") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


# Core ML packages


@pytest.fixture(scope="module")
def ios(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose package holds a linear layer in float16, a topk, and a cast to float32; not to be changed."""
    with BundleWriter(tmp_path_factory.mktemp("ios") / "b") as writer:
        manifest = fill(writer.path, "b", Sample(), noise_photo())
        (graph,) = manifest.graphs
        (writer.path / MODEL).parent.mkdir(parents=True)
        (writer.path / MODEL).write_bytes(model())
        described: dict[str, Any] = {
            **{name: getattr(graph, name) for name in graph.__struct_fields__},
            "engine": "coreml",
            "file": f"{VISION}.mlpackage",
            "extra_files": (MODEL,),
            "coverage": (DelegateCoverage(delegate="CoreML", partitions=1, nodes=3),),
        }
        return writer.commit(msgspec.structs.replace(manifest, graphs=(GraphInfo(**described),))).path


def model() -> bytes:
    """A program without weights, as far as it is looked at."""
    level = logging.root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its neighbours' versions
        from coremltools.proto import Model_pb2
    logging.root.setLevel(level)  # which the import changes

    half, single, whole = 10, 11, 23
    written = Model_pb2.Model()
    function = written.mlProgram.functions["main"]
    function.opset = "CoreML8"
    block = function.block_specializations["CoreML8"]
    for kind, outputs in (
        ("const", [("weight", half, (64, 64))]),
        ("linear", [("y", half, (1, 576, 64))]),
        ("topk", [("values", half, (1, 64)), ("indices", whole, (1, 64))]),
        ("cast", [("out", single, (1, 576, 64))]),
    ):
        op = block.operations.add(type=kind)
        for name, dtype, shape in outputs:
            output = op.outputs.add(name=name)
            output.type.tensorType.dataType = dtype
            for size in shape:
                output.type.tensorType.dimensions.add().constant.size = size
    return bytes(written.SerializeToString())


def test_what_likely_leaves_the_neural_engine(
    ios: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (found,) = explain(ios).lints
    assert {finding.rule.id: finding.operators for finding in found.findings} == {
        "whole-numbers": {"topk": 1},
        "sort": {"topk": 2},
        "linear": {"linear": 1},
    }
    assert (found.operators, found.leaving, found.runs) == (4, 2, (1, -2, 1))
    code, out, _ = spoken(capsys, monkeypatch, ios)
    assert code == 0
    for text in ("not known", f"{VISION} x 2", "likely", "1 x 1 convolution", "Only Core ML"):
        assert text in out
    sources = {finding.rule.source for finding in found.findings}
    assert all(f": {source}\n" in out for source in sources)
    assert spoken(capsys, monkeypatch, ios, "-q")[1] == "2 of 4 operators likely not on the Neural Engine\n"


def test_reports_tell_it_too(ios: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heading = "What likely leaves the Neural Engine or is slow on it"
    bundle = read_bundle(ios)
    write_reports(bundle, Verdict(bundle="b", device="CPU", steps=()), tmp_path)
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert heading in text
        assert "1 x 1 convolution" in text
    monkeypatch.setitem(sys.modules, "coremltools.proto", None)
    write_reports(bundle, Verdict(bundle="b", device="CPU", steps=()), tmp_path)
    assert heading not in (tmp_path / "report.md").read_text(encoding="utf-8")


def test_without_coremltools_nothing_is_looked_at(
    ios: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "coremltools.proto", None)
    explanation = explain(ios)
    assert not explanation.complete
    assert in_short(explanation) == "not looked at"
    code, out, err = spoken(capsys, monkeypatch, ios)
    assert (code, err) == (3, "")
    assert f"not looked at: {VISION}: coremltools is not installed" in out
    assert "pip install 'pruneport[coreml]'" in out
    assert "Only Core ML" not in out


@pytest.mark.parametrize("damage", ["unlisted", "link", "not protobuf", "no program"])
def test_a_damaged_package_is_refused(damage: str, ios: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "b"
    shutil.copytree(ios, bundle)
    file = bundle / MODEL
    if damage == "unlisted":
        (file.parent / "more").write_bytes(b"")
    elif damage == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    else:
        file.write_bytes(b"\xff" * 9 if damage == "not protobuf" else b"")
        rehash(bundle, MODEL)
    with pytest.raises(BundleError if damage == "link" else EngineError, match=r"mlpackage.*"):
        explain(bundle)
