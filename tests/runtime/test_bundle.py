"""The bundle on disk: what is written comes back, what is hostile is refused, what is interrupted is gone."""

from __future__ import annotations

import errno
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from export.families.llava.preprocessor import clip_preprocessor
from runtime.bundle import (
    MANIFEST,
    BundleWriter,
    ImageInfo,
    Manifest,
    PruneInfo,
    TensorInfo,
    WeightsInfo,
    read_bundle,
)
from runtime.errors import BundleError, CheckpointError, EngineMissingError, OutputError, PruneportError
from tests.sample_bundle import VISION, Sample, edit_manifest, fill, make_bundle, noise_photo, rehash


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "sample", Sample())


def _raw(bundle: Path) -> Any:
    return msgspec.json.decode((bundle / MANIFEST).read_bytes())


def _read_all(bundle: Path) -> None:
    opened = read_bundle(bundle)
    opened.check_files()
    opened.golden()


def _write(target: Path, action: Callable[[BundleWriter], object]) -> None:
    with BundleWriter(target) as writer:
        action(writer)


def _commit(writer: BundleWriter) -> None:
    writer.commit(fill(writer.path, writer.target_dir.name, Sample(), noise_photo()))


def _refused(bundle: Path, *words: str) -> None:
    with pytest.raises(BundleError) as caught:
        _read_all(bundle)
    for word in words:
        assert word in str(caught.value)


# What is written comes back


def test_round_trip(bundle: Path) -> None:
    opened = read_bundle(bundle)
    opened.check_files()
    assert opened.manifest.name == "sample"
    assert set(opened.manifest.files) == {f"{VISION}.onnx", "golden.safetensors", "tokenizer.json"}
    assert opened.size_bytes == sum(path.stat().st_size for path in bundle.iterdir() if path.name != MANIFEST)
    assert opened.graph(VISION).inputs[0].shape == (1, 3, 28, 28)
    assert opened.golden()["kept_indices"].shape == (4,)
    assert sorted(path.name for path in bundle.parent.iterdir()) == ["sample"], "the partial folder is gone"


def test_unknown_graph_names_those_there_are(bundle: Path) -> None:
    with pytest.raises(BundleError, match=f"no graph 'text_decoder'; it has: {VISION}"):
        read_bundle(bundle).graph("text_decoder")


def test_files_in_subfolders(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        manifest = fill(writer.path, "b", Sample(), noise_photo())
        (writer.path / "extra" / "deep").mkdir(parents=True)
        (writer.path / "extra" / "deep" / "notes.txt").write_text("x")
        opened = writer.commit(manifest)
    assert "extra/deep/notes.txt" in opened.manifest.files
    opened.check_files()


def test_manifest_is_rewritten_when_files_change_before_the_commit(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        first = writer.write_manifest(fill(writer.path, "b", Sample(), noise_photo()))
        (writer.path / "tokenizer.json").write_text("[]")
        (writer.path / "report.md").write_text("# done")
        opened = writer.commit(first)
    opened.check_files()
    assert "report.md" in opened.manifest.files
    assert opened.manifest.files["tokenizer.json"] != first.files["tokenizer.json"]


# What is damaged or hostile is refused


def test_changed_byte(bundle: Path) -> None:
    path = bundle / f"{VISION}.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    read_bundle(bundle)
    _refused(bundle, f"{VISION}.onnx was changed", "sha256", "copy the bundle again")


def test_truncated_file_is_seen_without_hashing(bundle: Path) -> None:
    path = bundle / f"{VISION}.onnx"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"its manifest says \d+: it is truncated or was changed"):
        read_bundle(bundle)


@pytest.mark.parametrize("name", [f"{VISION}.onnx", "golden.safetensors", "tokenizer.json"])
def test_missing_file(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    _refused(bundle, f"lacks {name}", "export again")


def test_missing_manifest(tmp_path: Path) -> None:
    _refused(tmp_path / "nothing", "does not exist")
    _refused(tmp_path, "has no manifest.json")
    (tmp_path / "file").write_text("x")
    _refused(tmp_path / "file", "is a file")


@pytest.mark.parametrize(
    "path", ["../secret", "a/../../secret", "/etc/passwd", "C:/secret", "..\\secret", "./x", "a//b", "", "a/", "a\nb"]
)
@pytest.mark.parametrize("where", ["graph", "extra", "golden", "files"])
def test_path_that_leaves_the_bundle(bundle: Path, path: str, where: str) -> None:
    raw = _raw(bundle)
    (bundle.parent / "secret").write_text("x")
    if where == "graph":
        raw["graphs"][0]["file"] = path
    elif where == "extra":
        raw["graphs"][0]["extra_files"] = [path]
    elif where == "golden":
        raw["golden"]["file"] = path
    else:
        raw["files"][path] = raw["files"]["tokenizer.json"]
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(raw))
    _refused(bundle, "not a plain relative path inside the bundle")


def test_graph_file_that_the_manifest_does_not_hash(bundle: Path) -> None:
    raw = _raw(bundle)
    del raw["files"][f"{VISION}.onnx"]
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(raw))
    _refused(bundle, f"does not list '{VISION}.onnx' among its files")


@pytest.mark.parametrize("inside", [False, True])
def test_symbolic_link_to_a_file(bundle: Path, inside: bool) -> None:
    data = (bundle / "tokenizer.json").read_bytes()
    target = (bundle if inside else bundle.parent) / "elsewhere.json"
    target.write_bytes(data)
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").symlink_to(target)
    _refused(bundle, "tokenizer.json is a symbolic link")


def test_symbolic_link_to_a_folder(bundle: Path) -> None:
    outside = bundle.parent / "outside"
    outside.mkdir()
    (outside / "x").write_text("{}")
    (bundle / "sub").symlink_to(outside)
    raw = _raw(bundle)
    raw["files"]["sub/x"] = raw["files"]["tokenizer.json"]
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(raw))
    _refused(bundle, "sub is a symbolic link")


def test_folder_and_fifo_in_place_of_a_file(bundle: Path) -> None:
    (bundle / "tokenizer.json").unlink()
    (bundle / "tokenizer.json").mkdir()
    _refused(bundle, "is not a plain file")
    (bundle / "tokenizer.json").rmdir()
    os.mkfifo(bundle / "tokenizer.json")
    _refused(bundle, "is not a plain file")


def test_newer_schema(bundle: Path) -> None:
    edit_manifest(bundle, schema_version=3, something_new={"a": 1})
    _refused(bundle, "schema_version 3", "reads 2", "install a newer pruneport")


def test_earlier_schema(bundle: Path) -> None:
    edit_manifest(bundle, schema_version=1, ready_for=None)
    _refused(bundle, "schema_version 1", "of an earlier pruneport; this one reads 2: export again")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("not json", "is not JSON"),
        ("[]", "does not follow the bundle schema"),
        ('{"schema_version": "1"}', "does not follow the bundle schema"),
        ('{"schema_version": 2}', "missing required field"),
        ('{"schema_version": 2' + "0" * 400 + "}", "schema"),
        ('{"schema_version": NaN}', "is not JSON"),
        ("[" * 100_000, ""),
    ],
    ids=["empty", "cut", "text", "list", "version-text", "bare", "huge-number", "nan", "deep"],
)
def test_manifest_that_is_no_manifest(bundle: Path, text: str, says: str) -> None:
    (bundle / MANIFEST).write_text(text)
    _refused(bundle, MANIFEST, says)


def test_manifest_with_broken_utf8(bundle: Path) -> None:
    (bundle / MANIFEST).write_bytes(b'{"schema_version": 2, "name": "\xff\xfe"}')
    _refused(bundle, MANIFEST)


def test_enormous_manifest_is_not_read(bundle: Path) -> None:
    with (bundle / MANIFEST).open("r+b") as file:
        file.truncate(2**40)
    _refused(bundle, "a manifest has at most")


Edit = Callable[[Any], None]


def _set(*keys: str | int, value: object) -> Edit:
    def edit(raw: Any) -> None:
        for key in keys[:-1]:
            raw = raw[key]
        raw[keys[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_set("graphs", 0, "inputs", 0, "dtype", value="float99"), "dtype='float99'"),
        (_set("graphs", 0, "inputs", 0, "dtype", value="object"), "must be one of float32, float16"),
        (_set("graphs", 0, "inputs", 0, "shape", value=[1, -3]), ">= 1"),
        (_set("graphs", 0, "inputs", 0, "shape", value=[10**30]), "schema"),
        (_set("graphs", 0, "inputs", 0, "shape", value=[2**31 - 1] * 3), "more than 2**40 elements"),
        (_set("graphs", 0, "inputs", 0, "shape", value=[1.5]), "int"),
        (_set("graphs", 0, "inputs", value=[]), "has no inputs"),
        (_set("graphs", 0, "engine", value="python"), "engine"),
        (_set("graphs", value=[]), "graphs is empty"),
        (_set("prune", "keep", value=17), "keep=17 must lie in 1..16"),
        (_set("prune", "keep", value=0), ">= 1"),
        (_set("prune", "keep", value=10**40), "schema"),
        (_set("prune", "grid", value=[4, 5]), "must hold image_tokens=16"),
        (_set("prune", "pruned", value=False), "must equal image_tokens=16"),
        (_set("prune", "method", value=None), "method=None must be named when pruned is true, and only then"),
        (_set("prune", "method", value=""), "length >= 1"),
        (_set("prune", "settings", value={"share": "0.7"}), "got `str` - at `$.prune.settings[...]`"),
        (_set("prune", "settings", value={"share": True}), "got `bool` - at `$.prune.settings[...]`"),
        (_set("prune", "settings", value={"share": None}), "got `null` - at `$.prune.settings[...]`"),
        (_set("prune", "settings", value={"share": [0.7]}), "got `array` - at `$.prune.settings[...]`"),
        (_set("prune", "settings", value={"": 1}), "length >= 1"),
        (_set("prune", "settings", value={"share": 2**54}), "<= 9007199254740992"),
        (_set("image", "std", value=[0.0, 1.0, 1.0]), "std positive"),
        (_set("image", "resize_shortest", value=7), "must be at least the crop"),
        (_set("image", "size", value=[10**9, 10**9]), "<= 8192"),
        (_set("image", "pixels", value={"token": 28, "least": 9, "most": 8}), "pixels.least=9 must be at most pixels."),
        (_set("image", "pixels", value={"token": 0, "least": 1, "most": 8}), ">= 1"),
        (_set("image", "pinpoints", value={"sizes": [[28, 30]], "tile": 28, "side": 2}), "whole tiles of 28 pixels"),
        (_set("image", "pinpoints", value={"sizes": [], "tile": 28, "side": 2}), "length >= 1"),
        (_set("weights", "sha256", value="zz"), "64 lower-case hexadecimal digits"),
        (_set("weights", "seed", value=3), "source='random'"),
        (_set("name", value="../evil"), "name='../evil'"),
        (_set("created_utc", value="yesterday"), "created_utc"),
        (_set("surprise", value=1), "unknown field"),
        (_set("prune", "surprise", value=1), "unknown field"),
        (_set("files", MANIFEST, value={"sha256": "0" * 64, "size_bytes": 1}), "cannot hold its own hash"),
        (_set("files", "tokenizer.json", "size_bytes", value=10**30), "schema"),
    ],
)
def test_nonsense_in_the_manifest(bundle: Path, edit: Edit, says: str) -> None:
    raw = _raw(bundle)
    edit(raw)
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(raw))
    _refused(bundle, says)


def test_number_beyond_float64(bundle: Path) -> None:
    text = (bundle / MANIFEST).read_bytes()
    assert b'"threshold": 0.8' in text
    (bundle / MANIFEST).write_bytes(text.replace(b'"threshold": 0.8', b'"threshold": 1e400'))
    _refused(bundle, "Number out of range", "settings")


def test_two_graphs_of_one_name(bundle: Path) -> None:
    raw = _raw(bundle)
    raw["graphs"].append(raw["graphs"][0])
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(raw))
    _refused(bundle, "two graphs are named alike")


@pytest.mark.parametrize("size", [0, 4, 8, 60, 500])
def test_truncated_golden(bundle: Path, size: int) -> None:
    path = bundle / "golden.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    rehash(bundle, "golden.safetensors")
    _refused(bundle, "golden.safetensors is not a readable safetensors file")


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[99],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
        b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}',
        b"[1, 2]",
    ],
    ids=["dtype", "shape", "offsets", "bfloat16", "list"],
)
def test_hostile_golden(bundle: Path, header: bytes) -> None:
    (bundle / "golden.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    rehash(bundle, "golden.safetensors")
    if b"BF16" in header:
        # numpy has no bfloat16; what matters is that no foreign exception comes out.
        try:
            read_bundle(bundle).golden()
        except BundleError:
            return
    else:
        _refused(bundle, "golden.safetensors is not a readable safetensors file")


def test_every_single_byte_of_the_manifest_may_be_wrong(bundle: Path) -> None:
    """Whatever is written over any byte, reading gives a bundle or a BundleError, never another exception."""
    good = (bundle / MANIFEST).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for position in rng.choice(len(good), 300, replace=False):
        data = bytearray(good)
        data[position] = rng.integers(256)
        (bundle / MANIFEST).write_bytes(data)
        try:
            read_bundle(bundle)
        except BundleError:
            refused += 1
    assert refused > 100


# Structs refuse nonsense where they are built, too


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: TensorInfo(name="x", shape=(1,), dtype="bfloat16"), "dtype='bfloat16'"),
        (lambda: WeightsInfo(source="random", id="x", sha256="0" * 64), "seed=None"),
        (
            lambda: PruneInfo(
                cut=2,
                image_tokens=576,
                keep=640,
                grid=(24, 24),
                pruned=True,
                method="x",
                settings={},
                arithmetic="float32",
            ),
            "keep=640 must lie in 1..576",
        ),
        *(
            (
                lambda value=value: PruneInfo(
                    cut=2,
                    image_tokens=4,
                    keep=3,
                    grid=(2, 2),
                    pruned=True,
                    method="x",
                    settings={"share": value},
                    arithmetic="float32",
                ),
                f"settings.share={value} must be finite",
            )
            for value in (math.nan, math.inf)
        ),
    ],
)
def test_nonsense_at_construction(build: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        build()


def test_wrong_type_is_found_before_it_is_written(tmp_path: Path) -> None:
    def commit(writer: BundleWriter) -> None:
        manifest = fill(writer.path, "b", Sample(), noise_photo())
        writer.commit(msgspec.structs.replace(manifest, model=3))

    with pytest.raises(BundleError, match="does not follow the bundle schema"):
        _write(tmp_path / "b", commit)
    assert not list(tmp_path.iterdir())


CLIP = clip_preprocessor(336)


def test_image_info_from_preprocessor_config() -> None:
    info = ImageInfo.from_preprocessor(CLIP)
    assert (info.size, info.resize_shortest, info.resample) == ((336, 336), 336, "bicubic")
    assert info == ImageInfo.from_preprocessor({**CLIP, "size": 336, "crop_size": 336})
    squeezed = ImageInfo.from_preprocessor({**CLIP, "do_center_crop": False, "size": {"height": 384, "width": 384}})
    assert squeezed.size == (384, 384)
    assert not squeezed.do_center_crop


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"do_normalize": False}, "do_normalize=False"),
        ({"do_pad": True}, "do_pad"),
        ({"resample": 9}, "9"),
        ({"image_std": [1, 2]}, "length 3"),
        ({"image_std": None}, "std"),
        ({"size": {"longest_edge": 336}}, "shortest_edge"),
        ({"size": {"shortest_edge": 336}, "do_center_crop": False}, "height"),
        ({"crop_size": {"height": 400, "width": 400}}, "must be at least the crop"),
    ],
)
def test_preprocessor_config_that_cannot_be_reproduced(changes: dict[str, object], says: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(says)):
        ImageInfo.from_preprocessor({**CLIP, **changes})


# What is interrupted is gone


def test_existing_target_is_left_alone(bundle: Path) -> None:
    before = {path.name: path.read_bytes() for path in bundle.iterdir()}
    with pytest.raises(OutputError, match="already exists and is never overwritten"):
        _write(bundle, _commit)
    assert {path.name: path.read_bytes() for path in bundle.iterdir()} == before


def test_dangling_link_as_target(tmp_path: Path) -> None:
    (tmp_path / "b").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match="already exists"):
        _write(tmp_path / "b", _commit)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, PruneportError, MemoryError])
def test_exception_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(writer: BundleWriter) -> None:
        (writer.path / "half").write_text("x")
        raise error

    with pytest.raises(error):
        _write(tmp_path / "new" / "folders" / "b", fail)
    assert not list(tmp_path.iterdir()), "the partial folder and the parents made for it are gone"


def test_leaving_without_a_commit_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "b") as writer:
        (writer.path / "half").write_text("x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EIO])
def test_os_error_becomes_output_error(tmp_path: Path, code: int) -> None:
    def fail(writer: BundleWriter) -> None:
        (writer.path / "half").write_text("x")
        raise OSError(code, os.strerror(code))

    with pytest.raises(OutputError, match=re.escape(os.strerror(code))) as caught:
        _write(tmp_path / "b", fail)
    assert "nothing was left behind" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_interrupt_in_the_middle_of_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        _write(tmp_path / "b", _commit)
    assert not list(tmp_path.iterdir())


def test_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        _write(tmp_path / "file" / "b", _commit)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is a place nobody can write on Linux alone")
def test_parent_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="/proc/pruneport"):
        _write(Path("/proc/pruneport"), _commit)


def test_target_that_appears_meanwhile(tmp_path: Path) -> None:
    def commit(writer: BundleWriter) -> None:
        (tmp_path / "b").mkdir()
        _commit(writer)

    with pytest.raises(OutputError, match="appeared while it was being made"):
        _write(tmp_path / "b", commit)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_two_bundles_at_once(tmp_path: Path) -> None:
    parent = tmp_path / "new"
    with BundleWriter(parent / "a") as first, BundleWriter(parent / "b") as second:
        for writer in (first, second):
            writer.commit(fill(writer.path, writer.target_dir.name, Sample(), noise_photo()))
    assert sorted(path.name for path in parent.iterdir()) == ["a", "b"]


def test_the_bundle_moves_as_a_whole(tmp_path: Path) -> None:
    """The name appears only with everything behind it: it is a rename of the partial folder."""
    with BundleWriter(tmp_path / "b") as writer:
        manifest = fill(writer.path, "b", Sample(), noise_photo())
        inode = writer.path.stat().st_ino
        assert not (tmp_path / "b").exists()
        writer.commit(manifest)
    assert (tmp_path / "b").stat().st_ino == inode


def test_error_tree() -> None:
    assert issubclass(EngineMissingError, PruneportError)
    assert PruneportError.exit_code == 2
    assert str(BundleError("one clear text")) == "one clear text"


def test_manifest_schema_is_stable(bundle: Path) -> None:
    """Phones read these names: a change here is a change of the format and needs a new schema version."""
    assert list(Manifest.__struct_fields__) == list(_raw(bundle))
    assert sorted(_raw(bundle)) == [
        "calibration",
        "created_utc",
        "family",
        "files",
        "frame",
        "golden",
        "graphs",
        "image",
        "keeps",
        "layout",
        "model",
        "name",
        "prompt",
        "prune",
        "ranges",
        "schema_version",
        "target",
        "text",
        "text_ranges",
        "tools",
        "weights",
    ]
    assert sorted(_raw(bundle)["image"]) == [
        "color",
        "do_center_crop",
        "mean",
        "pinpoints",
        "pixels",
        "resample",
        "rescale",
        "resize_shortest",
        "size",
        "std",
        "tiles",
    ]
    assert sorted(_raw(bundle)["prompt"]) == [
        "prefix_ids",
        "prefix_text",
        "special_ids",
        "suffix_text",
        "template",
        "trims_question",
    ]
