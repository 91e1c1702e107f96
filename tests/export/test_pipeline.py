"""The walk of an export with its heavy steps replaced: what is left behind when a step stops, fails or does nothing."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

import export.checkpoints
import export.golden
import export.graphs.open_decoder
import export.graphs.vision
import export.models.prompt
import runtime.harness
from export import cli, pipeline
from export.backends.backend import LoweredGraph
from export.backends.onnx import ONNX
from export.backends.xnnpack import XNNPACK
from export.families.llava.family import Llava
from export.models.pocket import POCKET
from export.pipeline import stage_count
from export.progress import Progress
from export.request import Request, plan
from export.targets import TARGETS
from runtime.bundle import BundleWriter, DelegateCoverage, ImageInfo, PromptInfo, TensorInfo, WeightsInfo, read_bundle
from runtime.check.verdict import Step, Verdict
from runtime.errors import ExportError, OutputError
from runtime.text_graphs import DECODER_BACK, DECODER_FRONT, LM_HEAD, TOKEN_EMBEDDING
from tests.export.test_converters import TwirlingGraph

WORDS = ["--model", "pocket", "--keep", "64", "--target", "android"]


class FakeCheckpoint:
    """Weights that nobody reads."""

    folder: Path | None = None
    config = POCKET.config
    geometry = POCKET.geometry

    def identity(self) -> WeightsInfo:
        return WeightsInfo(source="checkpoint", id="fake", sha256="0" * 64)

    def unread(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class FakeEncoder:
    """A graph that nobody traces."""

    keep: int
    prefix_length: int = 35
    index_name: str = "int64"
    frame = POCKET.family.frame(range(35), POCKET.geometry)

    def example_inputs(self) -> tuple[object, ...]:
        return (object(),)

    def input_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="pixel_values", shape=(1, 3, 336, 336), dtype="float32"),)

    def output_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="hidden", shape=(1, 35 + self.keep, 8), dtype="float32"),)


class FakeText(FakeEncoder):
    """A graph that goes on with what a fake encoder hands on, and that nobody traces."""

    def input_infos(self) -> tuple[TensorInfo, ...]:
        return tuple(info.with_open(1) for info in self.output_infos())


def fake_golden(checkpoint: object, entry: object, spec: Any, **rest: object) -> dict[str, np.ndarray]:
    return {} if spec is None else {"kept_indices": np.arange(spec.keep)}


def fake_lower(graphs: Mapping[str, object], out_dir: Path) -> dict[str, LoweredGraph]:
    (out_dir / "model.pte").write_bytes(b"program")
    taken = DelegateCoverage(delegate="XNNPACK", partitions=1, nodes=9)
    return {name: LoweredGraph("model.pte", (), (taken,)) for name, _ in graphs.items()}


def fake_check(path: Path, **rest: object) -> Verdict:
    read_bundle(path)
    (path / "report.md").write_text("checked")
    steps = (Step(name="parity", status="passed", detail="equal"),)
    return Verdict(bundle=path.name, device="test", steps=steps)


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces every step that needs a model or an engine by one that takes no time."""
    image = ImageInfo(size=(336, 336), resize_shortest=336, rescale=1 / 255, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    monkeypatch.setattr(export.checkpoints, "open_checkpoint", lambda *a, **k: FakeCheckpoint())
    monkeypatch.setattr(Llava, "image", lambda *a: image)
    monkeypatch.setattr(export.models.prompt, "read_prompt", lambda *a: PromptInfo(prefix_ids=(1,)))
    monkeypatch.setattr(export.golden, "golden_device", lambda reference: "cpu")
    monkeypatch.setattr(export.golden, "make_golden", fake_golden)
    monkeypatch.setattr(pipeline._Making, "_desktop_pixels", lambda self: np.zeros((1, 3, 336, 336), np.float32))
    monkeypatch.setattr(
        export.graphs.vision, "build_vision_encoder", lambda c, e, spec, **k: FakeEncoder(spec.keep if spec else 576)
    )
    names = (DECODER_FRONT, DECODER_BACK, LM_HEAD, TOKEN_EMBEDDING)
    monkeypatch.setattr(
        export.graphs.open_decoder,
        "open_text_parts",
        lambda checkpoint, context, **k: [
            ((name,), lambda name=name: {name: FakeText(context.keep)}) for name in names
        ],
    )
    set_lower(monkeypatch, fake_lower)
    monkeypatch.setattr(runtime.harness, "check_bundle", fake_check)


def set_lower(monkeypatch: pytest.MonkeyPatch, lower: Callable[..., Any]) -> None:
    android = replace(TARGETS["android"], backends=(replace(XNNPACK, lower=lower),))
    monkeypatch.setitem(TARGETS, "android", android)


def stop(*args: object, **kwargs: object) -> NoReturn:
    raise KeyboardInterrupt


# Every place where the walk can be interrupted, in order, as (module or class, attribute).
STEPS: list[tuple[object, str]] = [
    (export.checkpoints, "open_checkpoint"),
    (Llava, "image"),
    (export.golden, "make_golden"),
    (export.graphs.vision, "build_vision_encoder"),
    (export.models.prompt, "read_prompt"),
    (BundleWriter, "write_manifest"),
    (runtime.harness, "check_bundle"),
    (BundleWriter, "commit"),
]


def left_behind(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.usefixtures("light")
def test_an_operator_that_cannot_be_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    set_lower(monkeypatch, lambda graphs, folder: ONNX.lower({"vision_encoder": TwirlingGraph().eval()}, folder))
    assert cli.main(["export", *WORDS, "-q", "--output-dir", str(tmp_path / "out")], version="0") == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(
        "pruneport: error: the ONNX exporter cannot convert the operator pruneport_tests.twirled, which"
    )
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("cuda", "reference=cuda needs a GPU that torch can compute on: "),
        ("cuda:bf16", "unknown reference 'cuda:bf16', did you mean 'cuda'?; allowed: auto, cpu, cuda"),
    ],
)
def test_a_reference_that_is_not_here_is_refused_before_any_work(
    word: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(pipeline, "export", stop)
    for more in ([], ["--dry-run"]):
        words = [*WORDS, "-q", "--output-dir", str(tmp_path / "out"), "--reference", word, *more]
        assert cli.main(["export", *words], version="0") == 2
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert err.startswith(f"pruneport: error: {message}")
    assert left_behind(tmp_path) == []


@pytest.mark.usefixtures("light")
def test_the_manifest_names_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.golden, "golden_device", {"auto": "cuda"}.__getitem__)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Toaster 9000 on {device}")
    words = [*WORDS, "-q", "--output-dir", str(tmp_path)]
    assert cli.main(["export", *words, "--reference", "auto"], version="0") == 0
    golden = read_bundle(tmp_path / "pocket-keep64-android-xnnpack").manifest.golden
    assert golden.device == "cuda (Toaster 9000 on cuda; TF32 off)"


@pytest.mark.usefixtures("light")
def test_a_gpu_that_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_much(*args: object, **rest: object) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(export.golden, "make_golden", too_much)
    monkeypatch.setattr(export.golden, "golden_device", lambda reference: "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Toaster 9000")
    assert cli.main(["export", *WORDS, "-q", "--output-dir", str(tmp_path / "out")], version="0") == 2
    message = "do not fit into the memory of cuda (Toaster 9000; TF32 off); free it, or take --reference cpu"
    assert message in capsys.readouterr().err
    assert left_behind(tmp_path) == []


@pytest.mark.usefixtures("light")
def test_light_walk_makes_both_bundles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "out"
    assert cli.main(["export", *WORDS, "--twin", "-q", "--output-dir", str(out)], version="0") == 0
    assert capsys.readouterr() == (f"{out / 'pocket-keep64-android-xnnpack'}\n", "")
    assert sorted(path.name for path in out.iterdir()) == [
        "pocket-keep64-android-xnnpack",
        "pocket-keepall-android-xnnpack",
    ]
    bundle = read_bundle(out / "pocket-keep64-android-xnnpack")
    bundle.check_files()
    assert set(bundle.manifest.files) == {"model.pte", "golden.safetensors", "report.md"}
    assert bundle.manifest.prune.pruned
    assert not read_bundle(out / "pocket-keepall-android-xnnpack").manifest.prune.pruned


@pytest.mark.usefixtures("light")
def test_light_walk_of_several_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twins: dict[str, Path | None] = {}

    def checked(path: Path, **rest: Any) -> Verdict:
        twins[path.name.lstrip(".").split(".partial")[0]] = rest["twin"]
        return fake_check(path)

    monkeypatch.setattr(runtime.harness, "check_bundle", checked)
    words = ["--model", "pocket", "--keep", "16,64,8", "--target", "android", "--twin", "-q"]
    assert cli.main(["export", *words, "--output-dir", str(tmp_path)], version="0") == 0
    name, twin = "pocket-keep16-64-8-android-xnnpack", "pocket-keepall-android-xnnpack"
    bundle = read_bundle(tmp_path / name)
    assert bundle.keeps == (16, 64, 8)
    vision = [f"vision_encoder_keep{keep}" for keep in (16, 64, 8)]
    assert [graph.name for graph in bundle.manifest.graphs] == [
        *vision,
        DECODER_FRONT,
        DECODER_BACK,
        LM_HEAD,
        TOKEN_EMBEDDING,
    ]
    assert bundle.graph(DECODER_BACK).inputs[0].shape[1] == 35 + 64, "sized for the largest"
    assert all(f"golden-keep{keep}.safetensors" in bundle.manifest.files for keep in (16, 64, 8))
    assert read_bundle(tmp_path / twin).keeps == (576,)
    assert twins[twin] is None
    assert "keepall" in str(twins[name])


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("twin", [False, True])
def test_progress_counts_every_stage(tmp_path: Path, twin: bool) -> None:
    planned = plan(Request(model="pocket", keep="64", target="android", twin=twin, output_dir=str(tmp_path)))
    stream = io.StringIO()
    pipeline.export(planned, progress=Progress(stages=stage_count(planned), stream=stream), version="0")
    said = [line for line in stream.getvalue().splitlines() if line.startswith("[")]
    stages = [line for line in said if not line.endswith(" left")]  # a slow machine says it of a long stage
    count = stage_count(planned)
    assert [line.split("]")[0] for line in stages] == [f"[{number}/{count}" for number in range(1, count + 1)]
    assert all(" s   peak " in line for line in stages)


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("twin", [[], ["--twin"], ["--keep", "64,16"]], ids=["one", "twin", "several"])
@pytest.mark.parametrize("step", [*STEPS, "lower"], ids=lambda step: step if isinstance(step, str) else step[1])
def test_ctrl_c_leaves_nothing(
    step: tuple[object, str] | str,
    twin: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if isinstance(step, str):
        set_lower(monkeypatch, stop)
    else:
        monkeypatch.setattr(*step, stop)
    out = tmp_path / "deep" / "out"
    assert cli.main(["export", *WORDS, *twin, "-q", "--output-dir", str(out)], version="0") == 130
    assert capsys.readouterr().err == "pruneport: interrupted, nothing was written\n"
    assert left_behind(tmp_path) == []


@pytest.mark.usefixtures("light")
def test_ctrl_c_between_the_two_renames_tells_the_truth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = BundleWriter.commit

    def second_is_interrupted(self: BundleWriter, manifest: Any) -> Any:
        if "keepall" not in self.path.name:
            raise KeyboardInterrupt
        return commit(self, manifest)

    monkeypatch.setattr(BundleWriter, "commit", second_is_interrupted)
    assert cli.main(["export", *WORDS, "--twin", "-q", "--output-dir", str(tmp_path)], version="0") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["pocket-keepall-android-xnnpack"]
    read_bundle(tmp_path / "pocket-keepall-android-xnnpack").check_files()
    assert capsys.readouterr().err == (
        f"pruneport: interrupted, finished before that: {tmp_path / 'pocket-keepall-android-xnnpack'}\n"
    )


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("name", ["golden.safetensors", "manifest.json", "model.pte"])
def test_failed_write_leaves_nothing(
    code: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_bytes = Path.write_bytes

    def fail(self: Path, data: bytes) -> int:
        if self.name == name:
            raise OSError(code, os.strerror(code), str(self))
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", fail)
    out = tmp_path / "out"
    assert cli.main(["export", *WORDS, "-q", "--output-dir", str(out)], version="0") == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert os.strerror(code) in err
    assert "pocket-keep64-android-xnnpack cannot be written" in err
    assert left_behind(tmp_path) == []


@pytest.mark.usefixtures("light")
def test_bundle_that_appears_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(Request(model="pocket", keep="64", target="android", output_dir=str(tmp_path)))

    def check_and_intrude(path: Path, **rest: object) -> Verdict:
        planned.bundle.path.mkdir()
        (planned.bundle.path / "theirs.txt").write_text("theirs")
        return fake_check(path)

    monkeypatch.setattr(runtime.harness, "check_bundle", check_and_intrude)
    with pytest.raises(OutputError):
        pipeline.export(planned, progress=Progress(stages=7, quiet=True), version="0")
    assert left_behind(tmp_path) == ["pocket-keep64-android-xnnpack", "pocket-keep64-android-xnnpack/theirs.txt"]


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("graph", ["vision_encoder", "decoder_back"])
def test_delegate_that_took_nothing_is_an_error(graph: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def took_nothing(graphs: Mapping[str, object], out_dir: Path) -> dict[str, LoweredGraph]:
        nothing = (DelegateCoverage(delegate="XNNPACK", partitions=0, nodes=0),)
        lowered = fake_lower(graphs, out_dir)
        return {**lowered, graph: replace(lowered[graph], coverage=nothing)}

    set_lower(monkeypatch, took_nothing)
    planned = plan(Request(model="pocket", keep="64", target="android", output_dir=str(tmp_path / "out")))
    with pytest.raises(ExportError, match=f"backend xnnpack took no node of {graph}"):
        pipeline.export(planned, progress=Progress(stages=7, quiet=True), version="0")
    assert left_behind(tmp_path) == []


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(
    ("most", "message"),
    [
        (610, "prompt and image take 611 positions; backend xnnpack counts them in float16, which is exact up to 610"),
        (1122, "prompt, image and text_tokens=512 take 1123 positions; backend xnnpack counts them in float16"),
    ],
)
def test_more_positions_than_the_engine_can_count(
    most: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = replace(XNNPACK, lower=fake_lower, most_positions=most)
    monkeypatch.setitem(TARGETS, "android", replace(TARGETS["android"], backends=(few,)))
    planned = plan(Request(model="pocket", keep="64", target="android", output_dir=str(tmp_path / "out")))
    with pytest.raises(ExportError) as caught:
        pipeline.export(planned, progress=Progress(stages=7, quiet=True), version="0")
    assert message in str(caught.value)
    assert left_behind(tmp_path) == []


@pytest.mark.usefixtures("light")
def test_each_part_goes_to_its_backend_and_lies_in_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both call their file alike."""
    asked: dict[str, list[str]] = {}

    def lowering(name: str) -> Callable[..., dict[str, LoweredGraph]]:
        def lower(graphs: Mapping[str, object], out_dir: Path) -> dict[str, LoweredGraph]:
            asked[name] = list(graphs)
            return fake_lower(graphs, out_dir)

        return lower

    pair = replace(XNNPACK, lower=lowering("xnnpack")), replace(ONNX, lower=lowering("onnx"), lower_on=None)
    monkeypatch.setitem(TARGETS, "android", replace(TARGETS["android"], backends=pair))
    request = Request(model="pocket", keep="64", target="android", output_dir=str(tmp_path))
    planned = plan(replace(request, backend="vision=onnx,text=xnnpack"))
    made = pipeline.export(planned, progress=Progress(stages=7, quiet=True), version="0")
    assert asked == {"onnx": ["vision_encoder"], "xnnpack": [DECODER_FRONT, DECODER_BACK, LM_HEAD, TOKEN_EMBEDDING]}
    graphs = made.bundle.manifest.graphs
    assert {(graph.name == "vision_encoder", graph.engine, graph.file) for graph in graphs} == {
        (True, "onnxruntime", "vision/model.pte"),
        (False, "executorch", "text/model.pte"),
    }


@pytest.mark.usefixtures("light")
def test_graphs_that_do_not_fit_together_are_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = [((name,), lambda name=name: {name: FakeText(63)}) for name in (DECODER_BACK, LM_HEAD, TOKEN_EMBEDDING)]
    monkeypatch.setattr(export.graphs.open_decoder, "open_text_parts", lambda *a, **k: others)
    planned = plan(Request(model="pocket", keep="64", target="android", output_dir=str(tmp_path / "out")))
    with pytest.raises(
        ExportError, match=r"vision_encoder hands on hidden float32\[1, 99, 8\], but decoder_back takes"
    ):
        pipeline.export(planned, progress=Progress(stages=7, quiet=True), version="0")
    assert left_behind(tmp_path) == []


@pytest.mark.usefixtures("light")
def test_pruning_that_did_nothing_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.golden, "make_golden", lambda *a, **k: {"kept_indices": np.arange(576)})
    planned = plan(Request(model="pocket", keep="64", target="android", output_dir=str(tmp_path / "out")))
    with pytest.raises(ExportError, match="kept 576 image tokens instead of 64"):
        pipeline.export(planned, progress=Progress(stages=7, quiet=True), version="0")
    assert left_behind(tmp_path) == []


@pytest.mark.usefixtures("light")
def test_graph_that_still_holds_every_token_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.graphs.vision, "build_vision_encoder", lambda *a, **k: FakeEncoder(576))
    planned = plan(Request(model="pocket", keep="64", target="android", output_dir=str(tmp_path / "out")))
    with pytest.raises(ExportError, match="hands on 576 image tokens instead of 64"):
        pipeline.export(planned, progress=Progress(stages=7, quiet=True), version="0")
    assert left_behind(tmp_path) == []


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize(("status", "code", "word"), [("failed", 1, "failed"), ("not checked", 3, "not checked")])
def test_exit_code_tells_what_the_check_found(
    status: Any, code: int, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(path: Path, **rest: object) -> Verdict:
        steps = (Step(name="parity", status=status, detail="because", remedy="do this"),)
        return Verdict(bundle=path.name, device="test", steps=steps)

    monkeypatch.setattr(runtime.harness, "check_bundle", check)
    assert cli.main(["export", *WORDS, "-q", "--output-dir", str(tmp_path)], version="0") == code
    planned = replace(
        plan(Request(model="pocket", keep="65", target="android", output_dir=str(tmp_path))),
    )
    stream = io.StringIO()
    made = pipeline.export(planned, progress=Progress(stages=7, stream=stream), version="0")
    assert made.verdict.outcome == word
    assert f"parity {word}: because; do this" in stream.getvalue()


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_that_a_library_takes_for_its_own_still_ends_the_export(
    sent: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = export.golden.make_golden

    def swallows(*args: Any, **kwargs: Any) -> Any:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), sent)
        return made(*args, **kwargs)

    monkeypatch.setattr(export.golden, "make_golden", swallows)
    # Whoever starts this suite may ignore some: a shell's background SIGINT, nohup SIGHUP.
    handler = signal.signal(sent, signal.default_int_handler if sent == signal.SIGINT else signal.SIG_DFL)
    try:
        code = cli.main(["export", *WORDS, "--output-dir", str(tmp_path / "out")], version="0")
    finally:
        signal.signal(sent, handler)
    assert code == 130
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == "pruneport: interrupted, nothing was written"
    assert [line for line in said if "desktop outputs" in line][-1].endswith("stopped")
    assert not [line for line in said if "[3/7]" in line]
    assert left_behind(tmp_path) == []


@pytest.mark.usefixtures("light")
def test_signal_that_the_process_was_started_to_ignore_stays_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = export.golden.make_golden

    def hangs_up(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), signal.SIGHUP)
        return made(*args, **kwargs)

    monkeypatch.setattr(export.golden, "make_golden", hangs_up)
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert cli.main(["export", *WORDS, "-q", "--output-dir", str(tmp_path / "out")], version="0") == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handler)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where this process may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here; the failed writes above stand in for it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.usefixtures("light")
def test_disk_that_is_really_full(
    tiny_disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", *WORDS, "-q", "--output-dir", str(tiny_disk)], version="0") == 2
    assert "free, the export needs about" in capsys.readouterr().err

    def no_forecast(*args: object, **kwargs: object) -> object:
        return replace(needs, disk_free_bytes=2**40)

    needs = plan(Request(model="pocket", keep="64", target="android")).needs
    monkeypatch.setattr("export.request._needs", no_forecast)
    assert cli.main(["export", *WORDS, "-q", "--output-dir", str(tiny_disk)], version="0") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert left_behind(tiny_disk) == []


@pytest.mark.parametrize(
    ("after", "during", "sent"),
    [
        ("[1/7]", "desktop outputs", signal.SIGINT),
        pytest.param("[3/7]", "trace and lower", signal.SIGINT, marks=pytest.mark.slow),
        ("[1/7]", "desktop outputs", signal.SIGTERM),
    ],
    ids=["golden", "lower", "terminated"],
)
def test_real_signal_leaves_nothing(after: str, during: str, sent: signal.Signals, tmp_path: Path, root: Path) -> None:
    program = (
        # A shell that starts this suite in the background makes its children ignore SIGINT.
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from pruneport import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["export", *WORDS, "--output-dir", str(tmp_path / "deep" / "out")]
    with subprocess.Popen(
        [sys.executable, "-c", program, *words],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith(after):
                break
        time.sleep(0.3)
        process.send_signal(sent)
        out, err = process.communicate(timeout=120)
    said += err.splitlines(keepends=True)
    assert process.returncode == 130, said
    assert out == ""
    assert said[-1] == "pruneport: interrupted, nothing was written\n"
    assert during in said[-2]
    assert "stopped" in said[-2]
    assert left_behind(tmp_path) == []
