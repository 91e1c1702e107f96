"""--resume: what a killed export finished is kept, if nothing changed, and the bundle is that of an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import export.checkpoints
import export.golden
import export.graphs.vision
import export.manifests
import runtime.harness
from export import cli
from export.backends.backend import LoweredGraph
from export.backends.onnx import ONNX, WEIGHTS_FILE, lower, lower_on
from export.backends.xnnpack import XNNPACK
from export.graphs.graph import Graph
from export.stages import KEPT, Key, Stages
from export.targets import TARGETS
from runtime.bundle import MANIFEST, REPORT_FILES, BundleWriter, TensorInfo, WeightsInfo, read_bundle
from runtime.leftovers import STAGES, clean, make_locked
from tests.export.test_pipeline import STEPS, WORDS, FakeCheckpoint, fake_golden, fake_lower, light, set_lower

__all__ = ["light"]  # a fixture

NAME = "pocket-keep64-android-xnnpack"
TWIN = "pocket-keepall-android-xnnpack"


class Killed(BaseException):
    """Stands for SIGKILL: nothing is tidied up behind it."""


def die(*args: object, **kwargs: object) -> NoReturn:
    raise Killed


@pytest.fixture
def made(light: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The expensive steps that were really done, in their order."""
    done: list[str] = []

    def golden(*args: Any, **rest: Any) -> dict[str, np.ndarray]:
        done.append("golden")
        return fake_golden(*args, **rest)

    def lowered(graphs: Mapping[str, object], out_dir: Path) -> dict[str, LoweredGraph]:
        done.append("lower")
        return fake_lower(graphs, out_dir)

    def written(self: BundleWriter, manifest: Any) -> Any:
        done.append("manifest")
        return write_manifest(self, manifest)

    write_manifest = BundleWriter.write_manifest
    monkeypatch.setattr(export.golden, "make_golden", golden)
    monkeypatch.setattr(BundleWriter, "write_manifest", written)
    set_lower(monkeypatch, lowered)
    return done


def run(folder: Path, *more: str) -> None:
    assert cli.main(["export", *WORDS, "--output-dir", str(folder), *more], version="0") == 0


def kill(folder: Path, owner: object, name: str, *more: str) -> None:
    """Runs an export that is killed when it comes to a step; its folder stays, and its lock goes, as then."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BundleWriter, "_clean_up", lambda self: None)
        patch.setattr(owner, name, die)
        with pytest.raises(Killed):
            run(folder, *more)


def partials(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if ".partial-" in path.name)


def content(bundle: Path) -> dict[str, object]:
    """Everything that two exports of one request have in common: all but times, and the reports, which hold times."""
    read_bundle(bundle).check_files()
    manifest = json.loads((bundle / MANIFEST).read_text())
    del manifest["created_utc"]
    for name in REPORT_FILES:
        manifest["files"].pop(name, None)
    left_out = {MANIFEST, *REPORT_FILES}
    files = {path.relative_to(bundle).as_posix(): path for path in sorted(bundle.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name not in left_out} | {MANIFEST: manifest}


# What a run does again that follows a kill at each step: the report adds itself to the manifest when all is finished.
AGAIN = {
    "build_vision_encoder": ["lower", "manifest", "manifest"],
    "manifest_of": ["manifest", "manifest"],
    "check_bundle": ["manifest"],
    "commit": ["manifest"],
}


@pytest.mark.parametrize(
    "step",
    [step for step in (*STEPS, (export.manifests, "manifest_of")) if step[1] in AGAIN],
    ids=lambda step: step[1],
)
def test_finished_stages_are_not_repeated(
    step: tuple[object, str], made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "undisturbed")
    assert made == ["golden", "lower", "manifest", "manifest"]
    kill(tmp_path / "out", *step)
    made.clear()
    capsys.readouterr()
    run(tmp_path / "out", "--resume")
    assert made == AGAIN[step[1]]
    assert KEPT in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == [NAME]
    assert content(tmp_path / "out" / NAME) == content(tmp_path / "undisturbed" / NAME)


def test_each_keep_is_a_stage(
    made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed while the desktop outputs of the second keep are made, those of the first are kept."""
    several, name = ["--keep", "64,16"], "pocket-keep64-16-android-xnnpack"
    run(tmp_path / "undisturbed", *several)
    assert made == ["golden", "golden", "lower", "manifest", "manifest"]
    golden = export.golden.make_golden

    def dies_at_16(checkpoint: object, entry: object, spec: Any, **rest: Any) -> dict[str, np.ndarray]:
        return die() if spec.keep == 16 else golden(checkpoint, entry, spec, **rest)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BundleWriter, "_clean_up", lambda self: None)
        patch.setattr(export.golden, "make_golden", dies_at_16)
        with pytest.raises(Killed):
            run(tmp_path / "out", *several)
    made.clear()
    capsys.readouterr()
    run(tmp_path / "out", *several, "--resume")
    assert made == ["golden", "lower", "manifest", "manifest"]
    assert f"{KEPT}: golden-keep64.safetensors" in capsys.readouterr().err
    assert content(tmp_path / "out" / name) == content(tmp_path / "undisturbed" / name)
    # In another order another keep is the default: another bundle.
    kill(tmp_path / "other", runtime.harness, "check_bundle", *several)
    made.clear()
    run(tmp_path / "other", "--keep", "16,64", "--resume")
    assert made == ["golden", "golden", "lower", "manifest", "manifest"]


@pytest.mark.parametrize("step", STEPS[:3], ids=lambda step: step[1])
def test_nothing_to_resume_is_just_an_export(
    step: tuple[object, str], made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kill(tmp_path, *step)
    made.clear()
    run(tmp_path, "--resume")
    assert made == ["golden", "lower", "manifest", "manifest"]
    assert "nothing to resume: no export of this request was killed" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [NAME]


def test_the_twin_is_kept_when_the_second_bundle_was_at_work(made: list[str], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BundleWriter, "_clean_up", lambda self: None)
        patch.setattr(export.golden, "make_golden", lambda *a, **k: die() if a[2] else fake_golden(*a, **k))
        with pytest.raises(Killed):
            run(tmp_path, "--twin")
    assert made == ["lower", "manifest"]
    made.clear()
    run(tmp_path, "--twin", "--resume")
    assert made == ["golden", "lower", "manifest", "manifest", "manifest"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, TWIN]


def test_a_resumed_export_can_be_killed_again(made: list[str], tmp_path: Path) -> None:
    run(tmp_path / "undisturbed")
    kill(tmp_path / "out", export.graphs.vision, "build_vision_encoder")
    kill(tmp_path / "out", export.manifests, "manifest_of", "--resume")
    kill(tmp_path / "out", runtime.harness, "check_bundle", "--resume")
    made.clear()
    run(tmp_path / "out", "--resume")
    assert made == ["manifest"]
    assert content(tmp_path / "out" / NAME) == content(tmp_path / "undisturbed" / NAME)


def test_without_the_flag_it_is_removed_and_the_flag_is_named(
    made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kill(tmp_path, runtime.harness, "check_bundle")
    (left,) = partials(tmp_path)
    made.clear()
    capsys.readouterr()
    run(tmp_path)
    said = capsys.readouterr().err
    assert f"removed {left}" in said
    assert "--resume would have gone on where it stood" in said
    assert made == ["golden", "lower", "manifest", "manifest"]


def test_the_flag_is_not_named_for_another_request(
    made: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kill(tmp_path, runtime.harness, "check_bundle")
    capsys.readouterr()
    run(tmp_path, "--text-tokens", "256")
    said = capsys.readouterr().err
    assert "removed" in said
    assert "--resume" not in said


def test_an_error_while_resuming_leaves_nothing(made: list[str], tmp_path: Path) -> None:
    kill(tmp_path, runtime.harness, "check_bundle")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.harness, "check_bundle", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert cli.main(["export", *WORDS, "--output-dir", str(tmp_path), "--resume"], version="0") == 130
    assert list(tmp_path.iterdir()) == []


def flip(path: Path) -> None:
    """Changes a byte and neither the length nor the time."""
    status = path.stat()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def link(path: Path) -> None:
    path.rename(path.with_name("moved"))
    path.symlink_to("elsewhere")


EVERYTHING = ["golden", "lower", "manifest", "manifest"]


@pytest.mark.parametrize(
    ("file", "damage", "again"),
    [
        ("golden.safetensors", flip, EVERYTHING),
        pytest.param("golden.safetensors", Path.unlink, EVERYTHING, marks=pytest.mark.slow),
        pytest.param("golden.safetensors", link, EVERYTHING, marks=pytest.mark.slow),
        pytest.param("model.pte", flip, ["lower", "manifest", "manifest"], marks=pytest.mark.slow),
        pytest.param(
            "model.pte",
            lambda path: path.write_bytes(b"prog"),
            ["lower", "manifest", "manifest"],
            marks=pytest.mark.slow,
        ),
        pytest.param(MANIFEST, flip, ["manifest", "manifest"], marks=pytest.mark.slow),
        (STAGES, lambda path: path.write_bytes(path.read_bytes()[:-9]), EVERYTHING),
        pytest.param(STAGES, lambda path: path.write_bytes(b"[" * 100_000), EVERYTHING, marks=pytest.mark.slow),
        pytest.param(STAGES, lambda path: path.write_bytes(b"\xff\xfe"), EVERYTHING, marks=pytest.mark.slow),
        pytest.param(STAGES, Path.unlink, EVERYTHING, marks=pytest.mark.slow),
    ],
)
def test_what_was_damaged_is_made_again(
    file: str, damage: Callable[[Path], object], again: Sequence[str], made: list[str], tmp_path: Path
) -> None:
    run(tmp_path / "undisturbed")
    kill(tmp_path / "out", runtime.harness, "check_bundle")
    (left,) = partials(tmp_path / "out")
    damage(left / file)
    made.clear()
    run(tmp_path / "out", "--resume")
    assert made == again
    assert content(tmp_path / "out" / NAME) == content(tmp_path / "undisturbed" / NAME)


def test_a_result_that_is_none_is_made_again(made: list[str], tmp_path: Path) -> None:
    kill(tmp_path, runtime.harness, "check_bundle")
    (left,) = partials(tmp_path)
    record = json.loads((left / STAGES).read_text())
    assert [stage["name"] for stage in record["stages"]] == ["desktop outputs", "graphs ", "manifest"]
    record["stages"][1]["result"]["graphs"] = "many"
    (left / STAGES).write_text(json.dumps(record))
    made.clear()
    run(tmp_path, "--resume")
    assert made == ["lower", "manifest", "manifest"]


def test_what_no_stage_made_is_not_taken_over(made: list[str], tmp_path: Path) -> None:
    run(tmp_path / "undisturbed")
    kill(tmp_path / "out", export.graphs.vision, "build_vision_encoder")
    (left,) = partials(tmp_path / "out")
    (left / "tmp" / "deep").mkdir(parents=True)
    for half in (left / "model.pte", left / "tmp" / "deep" / "packed", left / f"{STAGES}.partial"):
        half.write_bytes(b"half")
    outside = tmp_path / "outside"
    outside.mkdir()
    (left / "link").symlink_to(outside)
    run(tmp_path / "out", "--resume")
    assert content(tmp_path / "out" / NAME) == content(tmp_path / "undisturbed" / NAME)
    assert [path.name for path in (tmp_path / "out" / NAME).iterdir() if path.is_dir()] == []
    assert outside.is_dir()


def test_each_of_two_backends_is_a_stage(made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lowering(name: str) -> Callable[..., dict[str, LoweredGraph]]:
        def lowered(graphs: Mapping[str, object], out_dir: Path) -> dict[str, LoweredGraph]:
            made.append(name)
            if made.count("text") == 1 and name == "text":
                raise Killed
            return fake_lower(graphs, out_dir)

        return lowered

    pair = replace(ONNX, lower=lowering("vision"), lower_on=None), replace(XNNPACK, lower=lowering("text"))
    monkeypatch.setitem(TARGETS, "android", replace(TARGETS["android"], backends=pair))
    mixed = ["--backend", "vision=onnx,text=xnnpack"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BundleWriter, "_clean_up", lambda self: None)
        with pytest.raises(Killed):
            run(tmp_path / "out", *mixed)
    assert made == ["golden", "vision", "text"]
    run(tmp_path / "out", *mixed, "--resume")
    assert made == ["golden", "vision", "text", "text", "manifest", "manifest"]
    run(tmp_path / "undisturbed", *mixed)
    (resumed,), (undisturbed,) = (tmp_path / "out").iterdir(), (tmp_path / "undisturbed").iterdir()
    assert content(resumed) == content(undisturbed)


def test_stages_of_other_weights_are_not_used(
    made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kill(tmp_path, runtime.harness, "check_bundle")
    other = WeightsInfo(source="checkpoint", id="fake", sha256="1" * 64)
    monkeypatch.setattr(FakeCheckpoint, "identity", lambda self: other)
    made.clear()
    run(tmp_path, "--resume")
    assert made == EVERYTHING
    assert (
        "nothing kept from the interrupted run: its weights, or files beside them, were others"
        in capsys.readouterr().err
    )
    assert read_bundle(tmp_path / NAME).manifest.weights == other


def test_a_config_beside_the_weights_counts_as_they_do(
    made: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = tmp_path / "checkpoint" / "generation_config.json"
    beside.parent.mkdir()
    beside.write_text("{}")
    monkeypatch.setattr(FakeCheckpoint, "folder", beside.parent)
    kill(tmp_path, runtime.harness, "check_bundle")
    beside.write_text('{"eos_token_id": 7}')
    made.clear()
    run(tmp_path, "--resume")
    assert made == EVERYTHING


def test_stages_of_another_request_are_not_used(made: list[str], tmp_path: Path) -> None:
    """The bundle is called alike: only the photo is another one."""
    photo = tmp_path / "photo.png"
    Image.new("RGB", (400, 400), (10, 20, 30)).save(photo)
    kill(tmp_path / "out", runtime.harness, "check_bundle", "--image", str(photo))
    Image.new("RGB", (400, 400), (10, 20, 31)).save(photo)
    made.clear()
    run(tmp_path / "out", "--image", str(photo), "--resume")
    assert made == EVERYTHING


def test_stages_of_another_version_are_not_used(made: list[str], tmp_path: Path) -> None:
    kill(tmp_path, runtime.harness, "check_bundle")
    made.clear()
    words = ["export", *WORDS, "--output-dir", str(tmp_path), "--resume"]
    assert cli.main(words, version="another") == 0
    assert made == EVERYTHING


def test_a_running_export_keeps_its_folder(made: list[str], tmp_path: Path) -> None:
    kill(tmp_path, runtime.harness, "check_bundle")
    (left,) = partials(tmp_path)
    path, lock = make_locked(tmp_path / NAME)  # what a living export holds, with the stages of the killed one
    shutil.copytree(left, path, dirs_exist_ok=True)
    shutil.rmtree(left)
    held = {file.name: file.read_bytes() for file in path.iterdir()}
    made.clear()
    run(tmp_path, "--resume")
    assert made == EVERYTHING
    assert {file.name: file.read_bytes() for file in path.iterdir()} == held
    os.close(lock)
    assert [one.why_kept for one in clean(tmp_path)] == [""]


def test_a_folder_of_another_computer_is_not_used(made: list[str], tmp_path: Path) -> None:
    kill(tmp_path, runtime.harness, "check_bundle")
    (left,) = partials(tmp_path)
    theirs = left.rename(tmp_path / f".{NAME}.partial-1@another.host")
    made.clear()
    run(tmp_path, "--resume")
    assert made == EVERYTHING
    assert theirs.is_dir()


# ONNX: graph by graph


class Linear(Graph):
    """x (1, 32) -> y (1, 32), by the weights of a seed and by weights that all of these share."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.shared, self.own = nn.Linear(32, 32), nn.Linear(32, 32)
        for number, layer in ((99, self.shared), (seed, self.own)):
            layer.weight = nn.Parameter(torch.randn(32, 32, generator=torch.Generator().manual_seed(number)))
            layer.bias = nn.Parameter(torch.zeros(32))

    def input_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="x", shape=(1, 32), dtype="float32"),)

    def output_infos(self) -> tuple[TensorInfo, ...]:
        return (TensorInfo(name="y", shape=(1, 32), dtype="float32"),)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.own(self.shared(x))
        return made


class Dying(Linear):
    """One whose export is killed when it is traced."""

    def example_inputs(self) -> tuple[Tensor, ...]:
        raise Killed


@pytest.mark.parametrize("cut_short", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_onnx_keeps_each_graph_and_adds_to_the_weights(cut_short: bool, tmp_path: Path) -> None:
    graphs = {name: Linear(seed).eval() for seed, name in enumerate(("a", "b", "c"))}
    (tmp_path / "whole").mkdir()
    whole = lower(graphs, tmp_path / "whole")
    key = Key("request", "weights")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(BundleWriter, "_clean_up", lambda self: None)
        with BundleWriter(tmp_path / "x") as writer:
            lower_on({**graphs, "c": Dying(2)}, writer.path, Stages(writer, key))
    (left,) = partials(tmp_path)
    weights = left / WEIGHTS_FILE
    # The third graph's weights may have been on their way, or the second's may have been lost.
    weights.write_bytes(weights.read_bytes()[:-1] if cut_short else weights.read_bytes() + b"begun")
    with BundleWriter(tmp_path / "x", resume=lambda raw: True) as writer:
        stages = Stages(writer, key)
        first: dict[str, Graph] = {"a": Dying(0), "b": graphs["b"] if cut_short else Dying(1), "c": graphs["c"]}
        assert lower_on(first, writer.path, stages) == whole
        made = {path.name: path.read_bytes() for path in writer.path.iterdir() if path.name != STAGES}
    assert made == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


# A real process, really killed


@pytest.mark.slow
def test_kills_at_random_moments_of_a_real_export(root: Path, tmp_path: Path) -> None:
    words = ["--model", "pocket", "--keep", "16", "--backend", "onnx", "--method", "uniform"]
    name = "pocket-keep16-android-onnx-uniform"
    command = [sys.executable, str(root / "export.py"), *words, "--output-dir"]
    subprocess.run([*command, str(tmp_path / "undisturbed")], cwd=root, check=True, capture_output=True)
    moments = random.Random(20)
    stages = ("[2/7]", "[3/7]", "[3/7]")
    kept = 0
    for after in stages:
        with subprocess.Popen(
            [*command, str(tmp_path / "out"), "--resume"], cwd=root, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            for line in process.stderr:
                kept += KEPT in line
                if line.startswith(after):
                    break
            try:
                process.wait(moments.uniform(0.0, 5.0))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
            process.stderr.read()
        assert process.returncode in (0, -signal.SIGKILL)
        if process.returncode == 0:
            break
    if not (tmp_path / "out" / name).exists():
        ended = subprocess.run(
            [*command, str(tmp_path / "out"), "--resume"], cwd=root, check=True, capture_output=True, text=True
        )
        kept += ended.stderr.count(KEPT)
    assert kept
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    assert content(tmp_path / "out" / name) == content(tmp_path / "undisturbed" / name)
