"""What a user can get wrong with files and folders: exit code 2, one message, no traceback, nothing half written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from export import cli
from export.models.pocket import pocket_folder
from tests.sample_bundle import Sample, make_bundle

Checkpoint = Path
Damage = Callable[[Checkpoint], None]
WEIGHTS = "model.safetensors"


def one_message(capsys: pytest.CaptureFixture[str]) -> str:
    """What was printed for an error: exactly one line, on stderr, that is no traceback."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("pruneport: error: ")
    assert "Traceback" not in lines[0]
    return lines[0]


def export(out: Path, *words: str | Path) -> int:
    fixed = ["--keep", "64", "--target", "android", "-q", "--output-dir", str(out)]
    return cli.main(["export", *fixed, *map(str, words)], version="0")


# --- checkpoints ---


@pytest.fixture(scope="session")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return pocket_folder()


@pytest.fixture
def checkpoint(pocket: Checkpoint, tmp_path: Path) -> Checkpoint:
    """A copy of the pocket checkpoint that a test may damage."""
    return Path(shutil.copytree(pocket, tmp_path / "checkpoint"))


def read_tensors(path: Path) -> tuple[dict[str, Any], bytes]:
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def write_tensors(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def first_of(header: dict[str, Any], part: str) -> str:
    return next(name for name in header if part in name)


def no_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def truncated(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) // 2])


def empty(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def garbage(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"\xff" * 4096)


def pickle_named_safetensors(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"PK\x03\x04" + b"\0" * 4096)


def web_page(folder: Path) -> None:
    (folder / WEIGHTS).write_text("<!DOCTYPE html><html><body>Sign in</body></html>")


def missing_tensor(folder: Path) -> None:
    header, data = read_tensors(folder / WEIGHTS)
    header["renamed"] = header.pop(first_of(header, "linear_2.weight"))
    write_tensors(folder / WEIGHTS, header, data)


def wrong_shape(folder: Path) -> None:
    header, data = read_tensors(folder / WEIGHTS)
    entry = header[first_of(header, "linear_2.weight")]
    rows, columns = entry["shape"]
    entry["shape"] = [rows * 2, columns // 2]
    write_tensors(folder / WEIGHTS, header, data)


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def config_of_another_architecture(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 768}))


def only_a_pickle(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")


@pytest.mark.parametrize(
    "damage",
    [
        no_weights,
        truncated,
        empty,
        garbage,
        pickle_named_safetensors,
        web_page,
        missing_tensor,
        wrong_shape,
        no_config,
        config_that_is_no_json,
        config_of_another_architecture,
        only_a_pickle,
    ],
    ids=lambda damage: damage.__name__,
)
def test_damaged_checkpoint(
    damage: Damage, checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(checkpoint)
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert export(tmp_path / "out", "--model", "pocket", "--weights", checkpoint) == 2
    assert str(checkpoint) in one_message(capsys)
    assert not (tmp_path / "out").exists()
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before


def test_weights_of_another_model(checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Forced, because a machine with little memory refuses it for that.
    assert export(tmp_path / "out", "--model", "llava-1.5-7b", "--weights", checkpoint, "--force") == 2
    assert "llava-1.5-7b" in one_message(capsys)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_a_file(checkpoint: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tmp_path / "out", "--model", "pocket", "--weights", checkpoint / WEIGHTS) == 2
    assert "is a file; give the folder" in one_message(capsys)
    assert not (tmp_path / "out").exists()


def test_weights_of_a_name_that_no_system_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tmp_path / "out", "--model", "pocket", "--weights", "a" * 5000) == 2
    assert os.strerror(errno.ENAMETOOLONG) in one_message(capsys)


# --- photos ---


def photo_file(folder: Path, name: str) -> Path:
    """A photo of the named kind."""
    colours = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    rgb = Image.fromarray(colours)
    path = folder / name
    if name == "cmyk.jpg":
        rgb.convert("CMYK").save(path)
    elif name == "sixteen.png":
        Image.fromarray(colours[..., 0].astype(np.uint16) * 257).save(path)
    elif name == "palette.png":
        rgb.convert("P").save(path)
    elif name == "alpha.png":
        rgb.convert("RGBA").save(path)
    elif name == "rotated.jpg":
        exif = Image.Exif()
        exif[0x0112] = 6
        rgb.save(path, exif=exif)
    elif name == "animated.gif":
        rgb.save(path, save_all=True, append_images=[rgb.rotate(90, expand=False)])
    elif name == "dot.png":
        rgb.crop((0, 0, 1, 1)).save(path)
    elif name == "grey.png":
        rgb.convert("L").save(path)
    elif name == "huge.png":
        Image.new("1", (30000, 30000)).save(path)
    elif name == "truncated.jpg":
        rgb.resize((600, 400)).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif name == "corrupt.png":
        rgb.save(path)
        raw = bytearray(path.read_bytes())
        raw[60:90] = b"\0" * 30
        path.write_bytes(raw)
    elif name == "text.jpg":
        path.write_text("not a photo")
    elif name == "empty.png":
        path.write_bytes(b"")
    else:
        raise AssertionError(name)
    return path


ODD_BUT_FINE = [
    "cmyk.jpg",
    "sixteen.png",
    "palette.png",
    "alpha.png",
    "rotated.jpg",
    "animated.gif",
    "dot.png",
    "grey.png",
]
NO_PHOTOS = ["huge.png", "truncated.jpg", "corrupt.png", "text.jpg", "empty.png"]


@pytest.mark.parametrize("name", ODD_BUT_FINE)
def test_odd_photo_is_taken(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = photo_file(tmp_path, name)
    assert export(tmp_path / "out", "--model", "pocket", "--image", photo, "--dry-run") == 0
    assert f"photo    {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", NO_PHOTOS)
def test_file_that_is_no_photo(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = photo_file(tmp_path, name)
    assert export(tmp_path / "out", "--model", "pocket", "--image", photo) == 2
    assert str(photo) in one_message(capsys)
    assert not (tmp_path / "out").exists()


def test_photo_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(tmp_path / "out", "--model", "pocket", "--image", tmp_path / "no.jpg") == 2
    assert str(tmp_path / "no.jpg") in one_message(capsys)
    assert export(tmp_path / "out", "--model", "pocket", "--image", tmp_path) == 2
    assert str(tmp_path) in one_message(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dot.png", "rotated.jpg"])
def test_odd_photo_goes_all_the_way(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = photo_file(tmp_path, name)
    assert export(tmp_path / "out", "--model", "pocket", "--backend", "onnx", "--image", photo) == 0
    bundle = Path(capsys.readouterr().out.strip())
    assert cli.main(["verify", str(bundle), "-q"], version="0") == 0


def test_no_photo_installed_asks_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("export.request.DEFAULT_PHOTOS", (("no_such_package", "photo.jpg"),))
    assert export(tmp_path / "out", "--model", "pocket") == 2
    assert "give one with --image PHOTO" in one_message(capsys)


# --- output folders ---


@pytest.fixture
def read_only_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder on a read-only file system, where this process may mount one."""
    folder = tmp_path / "frozen"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here; the refused mkdir below stands in for it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_read_only_output(read_only_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export(read_only_folder / "out", "--model", "pocket") == 2
    assert f"{read_only_folder} cannot be written to; choose another output folder" in one_message(capsys)


def test_refused_mkdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert export(tmp_path / "out", "--model", "pocket") == 2
    assert os.strerror(errno.EROFS) in one_message(capsys)
    assert list(tmp_path.iterdir()) == []


# --- bundles ---


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A small, whole ONNX bundle that a test may damage."""
    return make_bundle(tmp_path / "sample", Sample())


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def changed_byte(bundle: Path) -> None:
    path = bundle / "vision_encoder.onnx"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def shortened_file(bundle: Path) -> None:
    path = bundle / "golden.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def missing_graph(bundle: Path) -> None:
    (bundle / "vision_encoder.onnx").unlink()


def missing_manifest(bundle: Path) -> None:
    (bundle / "manifest.json").unlink()


def newer_schema(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest.update(schema_version=3))


def climbing_path(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest["graphs"][0].update(file="../vision_encoder.onnx"))


def absolute_path(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest["golden"].update(file="/etc/passwd"))


def unknown_field(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest.update(surprise=1))


def manifest_cut_short(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (changed_byte, "was changed"),
        (shortened_file, "truncated or was changed"),
        (missing_graph, "lacks vision_encoder.onnx"),
        (missing_manifest, "has no manifest.json"),
        (newer_schema, "install a newer pruneport"),
        (climbing_path, "no .."),
        (absolute_path, "plain relative path"),
        (unknown_field, "surprise"),
        (manifest_cut_short, "is not JSON"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damaged_bundle(damage: Damage, says: str, bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(bundle), "-q"], version="0") == 0
    capsys.readouterr()
    damage(bundle)
    assert cli.main(["verify", str(bundle), "-q"], version="0") == 2
    assert says in one_message(capsys)


def test_bundle_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(tmp_path / "no"), "-q"], version="0") == 2
    assert "does not exist" in one_message(capsys)


def test_verify_writes_nothing(bundle: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*")}
    assert cli.main(["verify", str(bundle), "-q"], version="0") == 0
    assert {path: path.stat().st_mtime_ns for path in bundle.rglob("*")} == before
