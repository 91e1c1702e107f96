"""The harness: what it passes, what it fails, what it says it could not check, and what it leaves on disk."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from safetensors.numpy import save

from runtime.bundle import REPORT_FILES, BundleWriter, read_bundle
from runtime.check.verdict import Step, Verdict
from runtime.errors import BundleError, OutputError
from runtime.harness import check_bundle, verify
from runtime.report import LatencyFile, ParityFile
from tests.sample_bundle import (
    VISION,
    Engine,
    Sample,
    edit_manifest,
    fill,
    make_bundle,
    make_golden,
    noise_photo,
    rehash,
    write_onnx,
)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "sample", Sample())


def _step(verdict: Verdict, name: str) -> Step:
    return next(step for step in verdict.steps if step.name == name)


def _change_golden(bundle: Path, **arrays: np.ndarray | None) -> None:
    """Replaces golden tensors (dots written as double underscores), removes those given as None."""
    golden = read_bundle(bundle).golden()
    for key, array in arrays.items():
        name = key.replace("__", ".")
        golden.pop(name, None)
        if array is not None:
            golden[name] = array
    (bundle / "golden.safetensors").write_bytes(save(golden))
    rehash(bundle, "golden.safetensors")


def _snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# What passes


def test_verify_passes_and_writes_nothing(bundle: Path) -> None:
    before = _snapshot(bundle.parent)
    said: list[str] = []
    verdict = verify(bundle, progress=said.append)
    assert verdict.passed
    assert not verdict.unchecked_steps
    assert [step.name for step in verdict.steps] == [
        "files",
        "preprocessing",
        f"parity of {VISION}",
        "kept tokens",
        f"delegates of {VISION}",
    ]
    assert _step(verdict, "kept tokens").detail.startswith("16 -> 4 image tokens, the same ones")
    assert verdict.latency == ()
    assert said[0] == "hashing the files"
    assert _snapshot(bundle.parent) == before


@pytest.mark.parametrize(("engine", "cut"), [("onnxruntime", 1), ("onnxruntime", 0), ("executorch", 1)])
def test_whole_walk_of_an_export(tmp_path: Path, engine: Engine, cut: int) -> None:
    """As the pipeline does it: twin and bundle side by side in their partial folders, then renamed."""
    pruned = Sample(engine=engine, cut=cut)
    twin = Sample(engine=engine, cut=cut, keep=16)
    with BundleWriter(tmp_path / "twin") as other, BundleWriter(tmp_path / "pruned") as writer:
        other_manifest = other.write_manifest(fill(other.path, "twin", twin, noise_photo()))
        manifest = writer.write_manifest(fill(writer.path, "pruned", pruned, noise_photo()))
        assert check_bundle(other.path, runs=2, warmup=0).passed
        verdict = check_bundle(writer.path, twin=other.path, runs=3, warmup=1)
        other.commit(other_manifest)
        finished = writer.commit(manifest)
    assert verdict.passed
    assert not verdict.unchecked_steps
    assert set(REPORT_FILES) < set(finished.manifest.files)
    finished.check_files()
    assert verify(finished.path).passed

    parity = msgspec.json.decode((finished.path / "parity.json").read_bytes(), type=ParityFile)
    assert parity.graphs == verdict.graphs
    assert parity.golden_device == "CPU (numpy)"
    latency = msgspec.json.decode((finished.path / "latency.json").read_bytes(), type=LatencyFile)
    (timed,) = latency.graphs
    assert timed.twin is not None
    assert timed.ratio is not None
    assert timed.bundle.runs == timed.twin.runs == 3
    assert latency.twin is not None
    assert latency.twin.image_tokens == 16
    assert _step(verdict, "twin").status == "passed"
    assert "partial" not in (finished.path / "report.md").read_text()


def test_a_golden_from_a_gpu_is_checked_without_one(bundle: Path, tmp_path: Path) -> None:
    made_on = "cuda (NVIDIA H100 80GB HBM3; TF32 off)"
    golden = msgspec.structs.replace(read_bundle(bundle).manifest.golden, device=made_on, torch="2.13.0+cu130")
    edit_manifest(bundle, golden=msgspec.to_builtins(golden))
    verdict = check_bundle(bundle, runs=1, warmup=0, out_dir=tmp_path / "out")
    assert verdict.passed
    assert f" against the {made_on} golden, worst" in _step(verdict, f"parity of {VISION}").detail
    parity = msgspec.json.decode((tmp_path / "out" / "parity.json").read_bytes(), type=ParityFile)
    assert parity.golden_device == made_on
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert f"made on {made_on} with torch 2.13.0+cu130 from noise.png" in report


def test_one_grey_level_of_the_desktops_resize_is_allowed(bundle: Path) -> None:
    pixels = read_bundle(bundle).golden()[f"{VISION}.in.pixel_values"]
    std = np.reshape(read_bundle(bundle).manifest.image.std, (1, 3, 1, 1))
    for levels, status in ((0.9, "passed"), (1.5, "failed")):
        _change_golden(bundle, vision_encoder__in__pixel_values=(pixels + levels / 255 / std).astype(np.float32))
        assert _step(verify(bundle), "preprocessing").status == status


# What fails


def test_a_graph_that_computes_something_else(bundle: Path) -> None:
    """The same shapes from other weights: hashes right, interface right, numbers wrong."""
    other = Sample(seed=1)
    write_onnx(bundle, other, make_golden(other, noise_photo()))
    rehash(bundle, f"{VISION}.onnx")
    verdict = verify(bundle)
    assert not verdict.passed
    assert [step.name for step in verdict.failed_steps] == [f"parity of {VISION}"]
    assert "hidden, key_0 outside the bound of fp32" in _step(verdict, f"parity of {VISION}").detail


def test_a_graph_that_keeps_other_tokens(bundle: Path) -> None:
    golden = make_golden(Sample(), noise_photo())
    kept = golden["kept_indices"]
    lost = int(golden["kept_order"][1])
    changed = np.sort(np.append(kept[kept != lost], next(i for i in range(16) if i not in kept)))
    golden["kept_indices"] = changed
    golden[f"{VISION}.out.positions"] = np.concatenate((np.arange(3), changed + 3))[None]
    write_onnx(bundle, Sample(), golden)
    rehash(bundle, f"{VISION}.onnx")
    verdict = verify(bundle)
    step = _step(verdict, "kept tokens")
    assert step.status == "failed"
    assert step.detail.startswith(
        "overlap 75.0% with the desktop (needed: exactly equal); first divergence at choice 1,"
    )
    assert f"token {lost}, whose margin was" in step.detail


def test_wrong_channel_order_is_seen_in_the_preprocessing(bundle: Path) -> None:
    photo = read_bundle(bundle).golden()["photo"]
    _change_golden(bundle, photo=np.ascontiguousarray(photo[..., ::-1]))
    assert _step(verify(bundle), "preprocessing").status == "failed"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_golden_with_values_that_are_no_numbers(bundle: Path, bad: float) -> None:
    golden = read_bundle(bundle).golden()
    hidden, pixels = golden[f"{VISION}.out.hidden"].copy(), golden[f"{VISION}.in.pixel_values"].copy()
    hidden[0, 0, 0] = bad
    _change_golden(bundle, vision_encoder__out__hidden=hidden)
    assert not verify(bundle).passed
    pixels[0, 0, 0, 0] = bad
    _change_golden(bundle, vision_encoder__in__pixel_values=pixels)
    assert _step(verify(bundle), "preprocessing").status == "failed"


def test_changed_byte_is_an_error_not_a_verdict(bundle: Path) -> None:
    data = bytearray((bundle / f"{VISION}.onnx").read_bytes())
    data[-1] ^= 1
    (bundle / f"{VISION}.onnx").write_bytes(data)
    with pytest.raises(BundleError, match="was changed"):
        verify(bundle)


def test_graph_the_engine_refuses(bundle: Path) -> None:
    (bundle / f"{VISION}.onnx").write_bytes(b"not a graph")
    rehash(bundle, f"{VISION}.onnx")
    step = _step(verify(bundle), f"parity of {VISION}")
    assert step.status == "failed"
    assert step.detail.startswith(f"ONNX Runtime cannot load {VISION}.onnx")


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("pte") / "b", Sample(engine="executorch"))


def test_manifest_that_promises_other_partitions(program: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(program, tmp_path / "b")
    graph = msgspec.to_builtins(read_bundle(bundle).manifest.graphs[0])
    graph["coverage"][0]["partitions"] = 7
    edit_manifest(bundle, graphs=[graph])
    step = _step(verify(bundle), f"delegates of {VISION}")
    assert (step.status, step.detail) == ("failed", "the manifest says 7 partitions, the program makes 1 delegate call")


def test_program_no_delegate_took_anything_of(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtime.engines.executorch import LoadedProgram
    from runtime.placement import Placement

    placement = Placement(outside={"aten::bmm.out": 9}, source="x")
    monkeypatch.setattr(LoadedProgram, "placement", lambda self: placement)
    step = _step(verify(program), f"delegates of {VISION}")
    assert (step.status, step.detail) == (
        "failed",
        "no delegate took anything: the plain runtime runs all 9 operators",
    )


# What could not be checked


@pytest.mark.parametrize(
    ("engine", "module"),
    [("onnxruntime", "onnxruntime"), ("executorch", "executorch.extension.pybindings._C")],
)
def test_missing_engine_is_not_checked_and_names_the_remedy(
    program: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch, engine: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    parent, _, name = module.rpartition(".")
    if parent in sys.modules:
        monkeypatch.delattr(sys.modules[parent], name, raising=False)
    verdict = verify(program if engine == "executorch" else bundle)
    step = _step(verdict, f"parity of {VISION}")
    assert step.status == "not checked"
    assert "is not installed" in step.detail
    assert step.remedy.startswith("pip install 'pruneport[")
    assert verdict.unchecked_steps == (step,)
    assert verdict.graphs == ()


def test_no_photo(bundle: Path) -> None:
    _change_golden(bundle, photo=None)
    step = _step(verify(bundle), "preprocessing")
    assert (step.status, step.remedy) == ("not checked", "export again with a photo")


def test_no_golden_inputs(bundle: Path) -> None:
    _change_golden(bundle, vision_encoder__in__pixel_values=None)
    step = _step(verify(bundle), f"parity of {VISION}")
    assert step.status == "not checked"
    assert f"lacks {VISION}.in.pixel_values" in step.detail


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": "another"}, "differs in its model"),
        ({"weights": {"source": "random", "id": "x", "sha256": "1" * 64, "seed": 1}}, "differs in its weights"),
        ({"target": {"name": "android", "backend": "onnx", "precision": "fp16"}}, "differs in its target"),
    ],
)
def test_twin_of_something_else(bundle: Path, tmp_path: Path, change: dict[str, object], says: str) -> None:
    twin = make_bundle(tmp_path / "twin", Sample(keep=16))
    edit_manifest(twin, **change)
    verdict = check_bundle(bundle, twin=twin, runs=1, warmup=0, out_dir=tmp_path / "out")
    step = _step(verdict, "twin")
    assert step.status == "not checked"
    assert says in step.detail
    assert verdict.twin is None
    assert verdict.latency[0].ratio is None


def test_twin_the_engine_refuses(bundle: Path, tmp_path: Path) -> None:
    twin = make_bundle(tmp_path / "twin", Sample(keep=16))
    (twin / f"{VISION}.onnx").write_bytes(b"not a graph")
    rehash(twin, f"{VISION}.onnx")
    verdict = check_bundle(bundle, twin=twin, runs=1, warmup=0, out_dir=tmp_path / "out")
    assert [step.name for step in verdict.failed_steps] == ["twin"]
    assert verdict.latency[0].bundle.median_ms > 0


def test_twin_that_is_pruned_itself(bundle: Path, tmp_path: Path) -> None:
    verdict = check_bundle(bundle, twin=bundle, runs=1, warmup=0, out_dir=tmp_path / "out")
    assert _step(verdict, "twin").detail == "sample is pruned itself"


# What is left on disk


def test_finished_bundle_is_not_written_over(bundle: Path, tmp_path: Path) -> None:
    edit_manifest(bundle)
    (bundle / "parity.json").write_text("{}")
    rehash(bundle, "parity.json")
    before = _snapshot(bundle)
    with pytest.raises(BundleError, match=r"already holds parity\.json; give another folder"):
        check_bundle(bundle, runs=1, warmup=0)
    assert check_bundle(bundle, runs=1, warmup=0, out_dir=tmp_path / "out").passed
    assert _snapshot(bundle) == before
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(REPORT_FILES)


def test_reports_that_cannot_be_written(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="the reports cannot be written to"):
        check_bundle(bundle, runs=1, warmup=0, out_dir=tmp_path / "file" / "out")


@pytest.mark.parametrize("walk", [verify, lambda path: check_bundle(path, runs=1)])
def test_no_bundle(tmp_path: Path, walk: Callable[[Path], Verdict]) -> None:
    with pytest.raises(BundleError, match="does not exist"):
        walk(tmp_path / "nothing")


# The answer of a bundle with text graphs


def test_answer_and_perplexity_stand_in_the_reports(onnx_bundle: Path) -> None:
    """The desktop's perplexity once more, by torch; and the numbers of parity.json in report.md."""
    import torch

    parity = msgspec.json.decode((onnx_bundle / "parity.json").read_bytes(), type=ParityFile)
    golden = read_bundle(onnx_bundle).golden()
    logits = torch.from_numpy(golden["text_prefill.out.logits"][0, :-1]).double()
    ids = torch.from_numpy(golden["token_embedding.in.ids"][0, 1:])
    expected = float(torch.nn.functional.cross_entropy(logits, ids).exp())
    (text,) = [graph.text for graph in parity.graphs if graph.text is not None]
    assert (text.tokens, text.same_top1) == (127, 1.0)
    assert text.expected_perplexity == pytest.approx(expected, rel=1e-9)
    assert text.got_perplexity == pytest.approx(expected, rel=1e-4)
    assert parity.answer is not None
    assert (parity.answer.same, parity.answer.expected_count) == (64, 64)
    latency = msgspec.json.decode((onnx_bundle / "latency.json").read_bytes(), type=LatencyFile)
    assert latency.answers is not None
    assert latency.answers.bundle.question_tokens == len(golden["answer.question"])
    report = (onnx_bundle / "report.md").read_text(encoding="utf-8")
    same = "64 of 64 greedy tokens as on the desktop, and 100.0% of the next tokens of a fixed text"
    assert same in report
    assert f"Perplexity over 127 tokens of a fixed text: {text.got_perplexity:.6g}, on the desktop" in report
    assert f"after a question of {latency.answers.bundle.question_tokens} tokens" in report
    assert f"KV cache | {latency.answers.bundle.kv_cache_bytes / 1e6:.1f} MB" in report


def test_answer_that_differs_and_one_that_cannot_be_compared(onnx_bundle: Path, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(onnx_bundle, tmp_path / "other"))
    golden = read_bundle(bundle).golden()
    ids, margin = golden["answer.ids"].copy(), golden["answer.margin"]
    ids[[9, 20]] += 1
    _change_golden(bundle, answer__ids=ids)
    verdict = verify(bundle)
    step = _step(verdict, "answer")
    assert [step.name for step in verdict.failed_steps] == ["answer"]
    assert step.detail == (
        f"62 of 64 greedy tokens as on the desktop, the first different one at 9 "
        f"(the desktop's logit led by {margin[9]:.1e})"
    )
    assert verdict.answer is not None
    assert (verdict.answer.same, verdict.answer.passed) == (62, False)
    _change_golden(bundle, answer__margin=None)
    verdict = verify(bundle)
    step = _step(verdict, "answer")
    assert (step.status, step.detail, step.remedy) == ("not checked", "the golden lacks answer.margin", "export again")
    assert verdict.answer is None
