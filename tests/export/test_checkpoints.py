"""Reading checkpoints of both layouts lazily, and refusing every broken one with one clear message before any work."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlavaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from export.blocks.rope import _inverse_frequencies
from export.checkpoints import FolderCheckpoint, RandomCheckpoint, open_checkpoint, read_header
from export.families import MODELS
from export.families.family import ModelEntry
from export.families.llava import config as llava_config
from export.families.llava.config import LlavaGeometry
from export.families.llava.desktop import eager_config
from export.families.llava.preprocessor import clip_preprocessor, read_preprocessor
from export.settings import without_non_finite
from runtime.bundle import ImageInfo
from runtime.errors import CheckpointError, RequestError
from runtime.image import preprocess
from tests.tiny_llava import CONFIG, TINY, stored_name, tiny_tensors, write_tiny

INDEX = "model.safetensors.index.json"


def refusal(folder: Path) -> str:
    """The message that opening `folder` as the tiny model ends with."""
    with pytest.raises(CheckpointError) as caught:
        FolderCheckpoint(folder, TINY)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    return message


def changed(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites a JSON file after `change`."""
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("older_layout", [False, True])
def test_both_layouts_and_shards_give_the_same_tensors(tmp_path: Path, shards: int, older_layout: bool) -> None:
    checkpoint = FolderCheckpoint(write_tiny(tmp_path, shards=shards, older_layout=older_layout), TINY)
    assert checkpoint.geometry == TINY.geometry
    assert checkpoint.names() == tuple(TINY.tensors)
    source = RandomCheckpoint(TINY, seed=1)
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name), source.tensor(name).float()), name
        assert checkpoint.shape(name) == tuple(checkpoint.tensor(name).shape)


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("model.language_model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight"),
        ("language_model.model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight"),
        ("model.language_model.embed_tokens.weight", "embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", "tower.pre_layrnorm.bias"),
        ("vision_tower.pre_layrnorm.bias", "tower.pre_layrnorm.bias"),
        ("model.multi_modal_projector.linear_1.bias", "tower.projector.linear_1.bias"),
        ("vision_tower.vision_model.embeddings.position_ids", None),
        ("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", None),
    ],
)
def test_canonical_names(stored: str, canonical: str | None) -> None:
    spelled = {spelling: name for name, entry in MODELS["llava-1.5-7b"].tensors.items() for spelling in entry.stored}
    assert spelled.get(stored) == canonical


def test_rows_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    checkpoint = FolderCheckpoint(write_tiny(tmp_path), TINY)
    name = "embed_tokens.weight"
    assert torch.equal(checkpoint.rows(name, [5, 0, 63, 5]), checkpoint.tensor(name)[[5, 0, 63, 5]])


def test_identity_is_what_sha256sum_says(tmp_path: Path) -> None:
    single = FolderCheckpoint(write_tiny(tmp_path / "single"), TINY)
    digest = hashlib.sha256((tmp_path / "single" / "model.safetensors").read_bytes()).hexdigest()
    assert single.identity().sha256 == digest
    assert (single.identity().source, single.identity().id, single.identity().seed) == ("checkpoint", "single", None)
    sharded = FolderCheckpoint(write_tiny(tmp_path / "shards", shards=2), TINY)
    listing = "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n"
        for path in sorted((tmp_path / "shards").glob("*.safetensors"))
    )
    assert sharded.identity().sha256 == hashlib.sha256(listing.encode()).hexdigest()


def test_a_tied_output_matrix_is_the_embedding(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    del tensors["lm_head.weight"]
    write_tiny(tmp_path, tensors=tensors, config={**CONFIG, "tie_word_embeddings": True})
    checkpoint = FolderCheckpoint(tmp_path, TINY)
    assert torch.equal(checkpoint.tensor("lm_head.weight"), checkpoint.tensor("embed_tokens.weight"))


def test_what_no_graph_reads_may_be_absent(tmp_path: Path) -> None:
    unread = ("model.vision_tower.post_layernorm.", "model.vision_tower.encoder.layers.2.")
    kept = {name: tensor for name, tensor in tiny_tensors().items() if not name.startswith(unread)}
    assert len(kept) < len(tiny_tensors())
    checkpoint = FolderCheckpoint(write_tiny(tmp_path, tensors=kept), TINY)
    assert not checkpoint.has("tower.post_layernorm.weight")


def test_opening_reads_headers_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path, shards=2)

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("safetensors.safe_open", refuse)
    assert FolderCheckpoint(tmp_path, TINY).names()


# --- broken files -------------------------------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")


def test_a_file_instead_of_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    assert "is a file; give the folder" in refusal(path)


def test_missing_config(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    (tmp_path / "config.json").unlink()
    assert "no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00", "3"])
def test_config_that_is_not_json(tmp_path: Path, text: str) -> None:
    write_tiny(tmp_path)
    (tmp_path / "config.json").write_text(text)
    assert "config.json" in refusal(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert "no safetensors file at all" in refusal(tmp_path)


def test_safetensors_under_another_name(tmp_path: Path) -> None:
    write_tiny(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")
    assert "weights.safetensors without model.safetensors.index.json" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickle_weights_are_refused(tmp_path: Path, name: str) -> None:
    write_tiny(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / name)
    message = refusal(tmp_path)
    assert "pickle" in message
    assert name in message


def _save_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"")


@pytest.mark.parametrize(
    ("write", "what"),
    [
        (lambda path: torch.save({"a": torch.zeros(3)}, path), "zip archive"),
        (_save_zip, "zip archive"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=2)), "Python pickle"),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=5)), "Python pickle"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git-lfs pointer"),
        (lambda path: path.write_text("<!DOCTYPE html><html>not found</html>"), "web page"),
        (lambda path: path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(64)), "GGUF"),
        (lambda path: path.write_bytes(b"\xff" * 64), "not a safetensors file"),
    ],
)
def test_mislabelled_files(tmp_path: Path, write: Callable[[Path], object], what: str) -> None:
    write_tiny(tmp_path)
    write(tmp_path / "model.safetensors")
    message = refusal(tmp_path)
    assert what in message
    assert "model.safetensors" in message


@pytest.mark.parametrize("keep", [0, 3, 8, 100, -4])
def test_truncated_files(tmp_path: Path, keep: int) -> None:
    path = write_tiny(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert "truncated" in refusal(tmp_path)


def test_trailing_bytes(tmp_path: Path) -> None:
    path = write_tiny(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    assert "corrupt" in refusal(tmp_path)


def _with_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


NORM = "model.language_model.norm.weight"


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header[NORM].pop("dtype"),
        lambda header: header[NORM].update(shape="big"),
        lambda header: header[NORM].update(shape=[-48]),
        lambda header: header[NORM].update(shape=[48.0]),
        lambda header: header[NORM].update(data_offsets=[4, 0]),
        lambda header: header[NORM].update(data_offsets=[0]),
        lambda header: header[NORM].update(shape=[49]),
        lambda header: header.update({NORM: 7}),
        lambda header: header[NORM].update(data_offsets=[0, 192]),
    ],
)
def test_corrupt_headers(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    _with_header(write_tiny(tmp_path) / "model.safetensors", change)
    assert "corrupt" in refusal(tmp_path)


def test_header_that_is_not_json(tmp_path: Path) -> None:
    path = write_tiny(tmp_path) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[20] = 0xFF
    path.write_bytes(data)
    assert "not valid JSON" in refusal(tmp_path)


def _text(entries: dict[str, Any] | bytes, data: bytes) -> bytes:
    header = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(header).to_bytes(8, "little") + header + data


ONE = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("entries", "data"),
    [
        (b"  " + json.dumps({"a": ONE}).encode() + b"\n\t ", bytes(4)),
        ({"__metadata__": {"format": "pt"}, "a": ONE}, bytes(4)),
        ({"__metadata__": None, "a": ONE}, bytes(4)),
        ({"a": {**ONE, "more": 1}}, bytes(4)),
        ({"a": {**ONE, "shape": []}}, bytes(4)),
        ({"a": {**ONE, "shape": [0, 3], "data_offsets": [4, 4]}, "b": ONE}, bytes(4)),
        ({"a": {**ONE, "data_offsets": [4, 8]}, "b": ONE}, bytes(8)),
        ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "b": {**ONE, "data_offsets": [1, 5]}}, bytes(5)),
        ({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, bytes(1)),
        ({"a": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}, bytes(2)),
        ({"": ONE}, bytes(4)),
    ],
)
def test_headers_that_the_format_allows(tmp_path: Path, entries: dict[str, Any] | bytes, data: bytes) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(_text(entries, data))
    with safe_open(path, framework="pt") as file:
        assert set(read_header(path)) == set(file.keys())


# As numbers these begin like a web page, a pickle, a zip archive, a GGUF file's neighbour and white space.
@pytest.mark.parametrize("start", [b" <", b"<", b"\x80\x02", b"\x80\x05", b"\n<", b"PK", b"{", b"ve", b"\xff\xff"])
def test_a_header_of_any_length(tmp_path: Path, start: bytes) -> None:
    path = write_tiny(tmp_path) / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    padded = int.from_bytes(start.ljust(2, b"\0") + b"\x01", "little")  # 65536 and more
    path.write_bytes(padded.to_bytes(8, "little") + data[8 : 8 + length].ljust(padded) + data[8 + length :])
    assert FolderCheckpoint(tmp_path, TINY).names() == tuple(TINY.tensors)
    path.write_bytes(path.read_bytes()[:-4])
    assert "truncated" in refusal(tmp_path)
    path.write_bytes(path.read_bytes()[:300])
    assert "truncated" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (b'{"a":' * 100_000, "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a":' + b"9" * 5000 + b"}", "not valid JSON"),
        (json.dumps({"a": ONE}).encode("utf-16"), "not valid JSON"),
        (b'{"a": NaN}', "malformed"),
        (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', "malformed"),
        (b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}', "malformed"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0.0, 4]}}', "malformed"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "malformed"),
        (b'{"a": {"dtype": "F32", "shape": [18446744073709551616], "data_offsets": [0, 4]}}', "malformed"),
        (json.dumps({"a": {**ONE, "shape": [2**62] * 1000}}).encode(), "cannot have 4 bytes"),
        (b'{"a": {"dtype": "F128", "shape": [1], "data_offsets": [0, 4]}}', "dtype 'F128'"),
        (b'{"a": {"dtype": "I32", "shape": [2], "data_offsets": [0, 4]}}', "cannot have 4 bytes"),
        (b'{"__metadata__": {"format": 1}}', "__metadata__"),
        (f'{{"a": {json.dumps(ONE)}, "a": {json.dumps(ONE)}}}'.encode(), "'a' stands twice"),
        (b'{"a": ["F32", [1], [0, 4]]}', "malformed"),
        (b"[]", "not a JSON object"),
        (b"", "not valid JSON"),
        (b"{}", "no tensors"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: bytes, says: str) -> None:
    (write_tiny(tmp_path) / "model.safetensors").write_bytes(_text(header, bytes(4)))
    assert says in refusal(tmp_path)


def test_a_length_beyond_all_headers(tmp_path: Path) -> None:
    (write_tiny(tmp_path) / "model.safetensors").write_bytes((2**63 - 1).to_bytes(8, "little") + b"{}")
    assert "not a safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    path = write_tiny(tmp_path) / name
    path.unlink()
    os.mkfifo(path)
    assert "is not a file" in refusal(tmp_path)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "exists", refuse)
    assert os.strerror(errno.EACCES) in refusal(tmp_path)


def test_values_beyond_float32(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    name = "model.multi_modal_projector.linear_1.weight"
    tensors[name] = tensors[name].double() + 1e300
    checkpoint = FolderCheckpoint(write_tiny(tmp_path, tensors=tensors), TINY)
    with pytest.raises(CheckpointError, match="values that no float32 can"):
        checkpoint.tensor("tower.projector.linear_1.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    tensors = tiny_tensors()
    tensors["model.multi_modal_projector.linear_1.weight"][3, 4] = value
    tensors["model.language_model.embed_tokens.weight"][9, 0] = value
    checkpoint = FolderCheckpoint(write_tiny(tmp_path, tensors=tensors), TINY)
    with pytest.raises(CheckpointError, match=r"linear_1\.weight holds NaN or infinite values"):
        checkpoint.tensor("tower.projector.linear_1.weight")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        checkpoint.rows("embed_tokens.weight", [9])
    assert checkpoint.rows("embed_tokens.weight", [8]).shape == (1, 48)


def test_missing_tensor(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    del tensors["model.vision_tower.encoder.layers.0.mlp.fc1.weight"]
    message = refusal(write_tiny(tmp_path, tensors=tensors))
    assert "lacks the tensor vision_tower.encoder.layers.0.mlp.fc1.weight that tiny needs" in message


def test_the_authors_own_layout_is_named(tmp_path: Path) -> None:
    tensors = {name.replace("model.language_model.", "model."): tensor for name, tensor in tiny_tensors().items()}
    tensors["model.mm_projector.0.weight"] = torch.zeros(48, 32)
    assert "authors' own layout" in refusal(write_tiny(tmp_path, tensors=tensors))


def test_wrong_shape(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["model.multi_modal_projector.linear_2.weight"] = torch.zeros(48, 40)
    message = refusal(write_tiny(tmp_path, tensors=tensors))
    assert "linear_2.weight has shape [48, 40]" in message
    assert "[48, 48]" in message


def test_quantised_weights(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    name = "model.multi_modal_projector.linear_2.weight"
    tensors[name] = tensors[name].to(torch.int8)
    assert "has dtype I8" in refusal(write_tiny(tmp_path, tensors=tensors))


def test_the_same_tensor_under_two_names(tmp_path: Path) -> None:
    tensors = tiny_tensors()
    tensors["language_model.lm_head.weight"] = tensors["lm_head.weight"].clone()
    assert "holds lm_head.weight twice" in refusal(write_tiny(tmp_path, tensors=tensors))


# --- tensors that nobody reads ------------------------------------------------------------------------------------

LAYER = "model.language_model.layers.0"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (f"{LAYER}.self_attn.q_proj.lora_A.weight", "merge_and_unload"),
        (f"{LAYER}.self_attn.q_proj.lora_B.default.weight", "merge_and_unload"),
        (f"{LAYER}.self_attn.q_proj.base_layer.weight", "merge_and_unload"),
        (f"{LAYER}.self_attn.q_proj.lora_magnitude_vector", "merge_and_unload"),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", "merge_and_unload"),
        ("lm_head.modules_to_save.default.weight", "merge_and_unload"),
        (f"{LAYER}.mlp.up_proj.qweight", "already quantised"),
        (f"{LAYER}.mlp.up_proj.weight.absmax", "already quantised"),
        (f"{LAYER}.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", "already quantised"),
        (f"{LAYER}.mlp.up_proj.SCB", "already quantised"),
        (f"{LAYER}.mlp.up_proj.weight_scale_inv", "already quantised"),
        (f"{LAYER}.mlp.up_proj.weight_packed", "already quantised"),
        ("lm_head.bias", "has no such tensor"),
        ("model.vision_tower.head.probe", "has no such tensor"),
        ("model.vision_tower.encoder.layers.3.mlp.fc1.weight", "has no such tensor"),
        ("model.language_model.layers.3.mlp.up_proj.weight", "has no such tensor"),
        (f"{LAYER}.self_attn.q_norm.weight", "has no such tensor"),
        ("model.image_newline", "has no such tensor"),
        ("model.mm_projector.0.weight", "has no such tensor"),
    ],
)
def test_a_tensor_that_would_change_the_answers(tmp_path: Path, name: str, says: str) -> None:
    message = refusal(write_tiny(tmp_path, tensors={**tiny_tensors(), name: torch.zeros(2)}))
    assert name in message
    assert says in message


@pytest.mark.parametrize(
    ("section", "key", "part"),
    [
        ("text_config", "attention_bias", "self_attn"),
        ("text_config", "mlp_bias", "mlp"),
        (None, "multimodal_projector_bias", "linear_"),
    ],
)
def test_biases_that_config_json_does_not_announce(tmp_path: Path, section: str | None, key: str, part: str) -> None:
    message = refusal(write_tiny(tmp_path, config=_config(section, **{key: False})))
    assert part in message.split(", which")[0]
    assert f"{key} to true in config.json" in message


def test_constants_and_unrelated_tensors_are_left_alone(tmp_path: Path) -> None:
    more = {
        "model.vision_tower.vision_model.embeddings.position_ids": torch.arange(17),
        f"{LAYER}.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "logit_scale": torch.zeros(()),
    }
    checkpoint = FolderCheckpoint(write_tiny(tmp_path, tensors={**tiny_tensors(), **more}), TINY)
    assert checkpoint.unread() == ("logit_scale",)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"])
@pytest.mark.parametrize("with_base", [True, False])
def test_an_adapter_that_is_not_merged(tmp_path: Path, name: str, with_base: bool) -> None:
    if with_base:
        write_tiny(tmp_path)
    (tmp_path / name).write_text("{}")
    message = refusal(tmp_path)
    assert name in message
    assert "merge_and_unload() and save_pretrained()" in message


# --- index --------------------------------------------------------------------------------------------------------


def test_missing_shard(tmp_path: Path) -> None:
    write_tiny(tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors is missing" in refusal(tmp_path)


def test_index_naming_a_tensor_that_the_shard_lacks(tmp_path: Path) -> None:
    write_tiny(tmp_path, shards=2)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))

    def swap(index: dict[str, Any]) -> None:
        index["weight_map"][NORM] = next(shard for shard in shards if shard != index["weight_map"][NORM])

    changed(tmp_path / INDEX, swap)
    assert f"holds {NORM}, but it does not" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("shard", "complaint"),
    [
        ("../model.safetensors", "only plain file names"),
        ("/etc/passwd", "only plain file names"),
        ("a\\b.safetensors", "only plain file names"),
        ("a\0.safetensors", "only plain file names"),
        ("a\n.safetensors", "only plain file names"),
        ("\ud800.safetensors", "only plain file names"),
        ("C:a.safetensors", "only plain file names"),
        (None, "only plain file names"),
        ("a" * 5000 + ".safetensors", "only plain file names"),
        ("..", "only plain file names"),
        (7, "only plain file names"),
        ("pytorch_model-00001.bin", "pickles are refused"),
    ],
)
def test_index_that_leads_elsewhere(tmp_path: Path, shard: object, complaint: str) -> None:
    write_tiny(tmp_path, shards=2)
    changed(tmp_path / INDEX, lambda index: index["weight_map"].update({NORM: shard}))
    assert complaint in refusal(tmp_path)


def test_a_shard_holds_more_than_the_index_says(tmp_path: Path) -> None:
    write_tiny(tmp_path, shards=2)
    changed(tmp_path / INDEX, lambda index: index["weight_map"].pop(NORM))
    assert FolderCheckpoint(tmp_path, TINY).has("norm.weight")


def test_a_single_file_beside_an_index_counts_as_in_transformers(tmp_path: Path) -> None:
    write_tiny(tmp_path, shards=2)
    write_tiny(tmp_path)
    assert {path.name for path in FolderCheckpoint(tmp_path, TINY)._files} == {"model.safetensors"}


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": None}, {"weight_map": [1]}])
def test_index_without_files(tmp_path: Path, index: dict[str, Any]) -> None:
    write_tiny(tmp_path, shards=2)
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert "no weight_map" in refusal(tmp_path)


# --- config -------------------------------------------------------------------------------------------------------


def _config(section: str | None, **values: object) -> dict[str, Any]:
    config = json.loads(json.dumps(CONFIG))
    (config if section is None else config[section]).update(values)
    return dict(config)


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        (_config(None, model_type="qwen2_vl"), "model_type is 'qwen2_vl'"),
        (_config("vision_config", model_type="siglip_vision_model"), "vision_config.model_type"),
        (_config("text_config", model_type="mistral"), "text_config.model_type"),
        (_config("vision_config", hidden_size=33), "not a multiple"),
        (_config("text_config", num_key_value_heads=4), "num_key_value_heads=4"),
        (_config("text_config", hidden_size=0), "positive whole number"),
        (_config("text_config", num_hidden_layers="3"), "positive whole number"),
        (_config("text_config", head_dim=7), "must be even"),
        (_config("text_config", hidden_act="gelu"), "hidden_act"),
        (_config("vision_config", image_size=8), "smaller than patch_size"),
        (_config("vision_config", num_channels=1), "num_channels=1"),
        (_config(None, image_seq_length=17), "4 x 4 = 16 image tokens"),
        (_config(None, vision_feature_layer=-5), "vision_feature_layer"),
        (_config(None, vision_feature_layer=[-2, -5]), "one layer number"),
        (_config(None, vision_feature_select_strategy="full"), "vision_feature_select_strategy"),
        (_config(None, projector_hidden_act="relu"), "projector_hidden_act"),
        (_config(None, quantization_config={"bits": 4}), "already quantised"),
        (_config(None, text_config=[]) | {"text_config": [1]}, "text_config must be an object"),
        (_config("text_config", rope_parameters={"rope_type": "yarn"}), "rope_type"),
        (_config("text_config", rope_parameters={"rope_theta": -1}), "rope_theta"),
        (_config("text_config", rope_parameters={"rope_theta": "x"}), "not understood"),
        (_config("text_config", rope_parameters={"rope_theta": float("nan")}), "rope_theta"),
        (_config("text_config", rope_parameters={"rope_type": "linear"}), "lacks factor"),
        (_config("text_config", rope_parameters={"rope_type": "llama3", "factor": 8.0}), "lacks low_freq_factor"),
        (_config("text_config", rope_parameters={"rope_type": None, "type": "su"}), "rope_type is 'su'"),
        (_config("text_config", rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_type is 'dynamic'"),
        (_config("text_config", rope_scaling="linear"), "must be an object"),
        (_config("text_config", rope_parameters={"full_attention": {"rope_type": "default"}}), "full_attention"),
        (_config("text_config", rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor"),
        (_config("text_config", hidden_size=48.0), "positive whole number"),
        (_config("text_config", hidden_size=True), "positive whole number"),
        (_config("text_config", hidden_size=10**18), "positive whole number"),
        (_config("text_config", hidden_size=-48), "positive whole number"),
        (_config("text_config", num_attention_heads=5), "not a multiple"),
        (_config("text_config", num_key_value_heads=0), "positive whole number"),
        (_config("text_config", rms_norm_eps="1e-5"), "rms_norm_eps must be a number"),
        (_config("text_config", rms_norm_eps=float("inf")), "rms_norm_eps must be a number"),
        (_config("text_config", rms_norm_eps=-1e-5), "rms_norm_eps must be a number"),
        (_config("text_config", attention_bias=1), "attention_bias must be true or false"),
        (_config("text_config", mlp_bias="false"), "mlp_bias must be true or false"),
        (_config("text_config", max_position_embeddings=10**18), "max_position_embeddings"),
        (_config("text_config", max_position_embeddings=16), "no room for text beside 16 image tokens"),
        ({"model_type": "llava", "hidden_size": 4096, "num_attention_heads": 32}, "authors' own layout"),
        (_config("vision_config", layer_norm_eps=float("nan")), "layer_norm_eps must be a number"),
        (_config("vision_config", image_size=[56, 56]), "image_size must be a positive whole number"),
        (_config("vision_config", num_hidden_layers="3"), "num_hidden_layers must be a positive whole number"),
        (_config(None, image_token_index=5.0), "image_token_index must be a whole number"),
        (_config(None, image_token_index=-200), "no token '<image>'"),
        (_config(None, image_token_index=-1), "image_token_index must be a whole number"),
        (_config(None, image_token_index=10**18), "image_token_index must be a whole number"),
        (_config(None, image_seq_length=16.0), "image_seq_length=16.0"),
        (_config(None, vision_feature_layer="-2"), "one layer number"),
        (_config(None, vision_feature_layer=10**30), "vision_feature_layer"),
        (_config(None, tie_word_embeddings="true"), "tie_word_embeddings must be true or false"),
        (_config(None, model_type="llava_llama"), "authors' own layout"),
        (_config(None, mm_vision_tower="openai/clip-vit-large-patch14-336"), "authors' own layout"),
        (_config(None, text_config=[]), "text_config must be an object"),
        (_config("text_config", quantization_config={"quant_method": "gptq"}), "'gptq'"),
        (_config(None, compression_config={"format": "int"}), "already quantised"),
        (_config("text_config", hidden_act="x" * 9999), "hidden_act"),
    ],
)
def test_wrong_configs(tmp_path: Path, config: Mapping[str, Any], complaint: str) -> None:
    write_tiny(tmp_path, config=config)
    assert complaint in refusal(tmp_path)


def _nulled() -> list[tuple[str | None, str]]:
    """Every key that is read, by section."""
    keys: list[tuple[str | None, str]] = [(None, key) for key in llava_config._LLAVA_DEFAULTS if key != "model_type"]
    keys += [(None, "image_token_id"), (None, "image_seq_length"), (None, "quantization_config")]
    keys += [("vision_config", key) for key in llava_config._CLIP]
    keys += [("text_config", key) for key in (*llava_config._LLAMA, "rope_parameters", "rope_scaling", "rope_theta")]
    return keys


@pytest.mark.parametrize(("section", "key"), _nulled())
def test_null_means_what_leaving_the_key_out_means(section: str | None, key: str) -> None:
    absent = _config(section)
    (absent if section is None else absent[section]).pop(key, None)
    nulled = _config(section, **{key: None})
    outcomes = []
    for config in (nulled, absent):
        try:
            outcomes.append(str(LlavaGeometry.from_config(config)))
        except CheckpointError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_a_missing_section_is_the_published_one() -> None:
    config = {"model_type": "llava", "vision_config": None}
    theirs: Any = LlavaConfig.from_dict({"model_type": "llava"})
    ours = LlavaGeometry.from_config(config)
    assert (ours.vision.hidden, ours.vision.image_size) == (1024, theirs.vision_config.image_size)
    assert (ours.text.hidden, ours.text.vocab) == (theirs.text_config.hidden_size, theirs.text_config.vocab_size)
    empty = LlavaGeometry.from_config({"model_type": "llava", "vision_config": {}})
    theirs = LlavaConfig.from_dict({"vision_config": {}})
    assert empty.vision.hidden == theirs.vision_config.hidden_size


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"rope_scaling": None},
        {"rope_theta": 20000},
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 7e3},
        {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_theta": 9.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 9.0}, "rope_theta": 3.0},
        {"rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ],
)
def test_rope_is_read_as_transformers_reads_it(rope: dict[str, Any]) -> None:
    config = _config("text_config", **rope)
    if "rope_parameters" not in rope:
        del config["text_config"]["rope_parameters"]
    text = LlavaGeometry.from_config(config).text
    read: Any = LlavaConfig.from_dict(json.loads(json.dumps(config)))
    theirs = LlamaRotaryEmbedding(read.text_config)
    assert torch.allclose(_inverse_frequencies(text.rope, text.head_dim), theirs.inv_freq, rtol=1e-6)


@pytest.mark.parametrize("given", [{"image_token_index": -200}, {"image_token_id": -200}, {"image_token_index": None}])
def test_the_image_tokens_id_is_asked_of_the_tokenizer(tmp_path: Path, given: dict[str, Any]) -> None:
    config = {**CONFIG, "image_token_index": None, **given}
    write_tiny(tmp_path, config=config)
    tokens = [{"id": 3, "content": "<s>"}, {"id": 9, "content": "<image>"}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    checkpoint = FolderCheckpoint(tmp_path, TINY)
    assert checkpoint.geometry.image_token_id == checkpoint.config["image_token_index"] == 9
    assert "image_token_id" not in checkpoint.config


@pytest.mark.parametrize("text", ['{"a": ' + "9" * 5000 + "}", "[" * 100_000, '{"a":' * 100_000])
def test_json_that_no_parser_takes(tmp_path: Path, text: str) -> None:
    (write_tiny(tmp_path) / "config.json").write_text(text)
    assert "not valid JSON" in refusal(tmp_path)


def test_what_is_written_for_others_is_json() -> None:
    made = without_non_finite({"a": [float("nan"), 1.5, {"b": float("-inf")}], "c": "NaN"})
    assert made == {"a": [None, 1.5, {"b": None}], "c": "NaN"}


def test_keys_that_decide_nothing_may_hold_anything(tmp_path: Path) -> None:
    config = _config("text_config", initializer_range="wide", use_cache=None)
    config |= {"num_labels": 10**18, "dtype": [], "auto_map": 3, "temperature": float("nan")}
    checkpoint = FolderCheckpoint(write_tiny(tmp_path, config=config), TINY)
    assert eager_config(checkpoint.config).to_dict() == eager_config(CONFIG).to_dict()


def test_what_only_transformers_refuses_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise ValueError("a rule of a later version\nin two lines")

    monkeypatch.setattr(LlavaConfig, "from_dict", refuse)
    with pytest.raises(
        CheckpointError, match=r"transformers does not take it \(a rule of a later version in two lines\)"
    ):
        eager_config(CONFIG)


def test_another_models_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llava-1.5-13b"].config))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("llava-1.5-7b", weights=str(tmp_path))
    message = str(caught.value)
    assert "text hidden 5120 instead of 4096" in message
    assert "say --model llava-1.5-13b" in message


def test_another_models_weights_under_the_right_config(tmp_path: Path) -> None:
    write_header_only(tmp_path / "model.safetensors", MODELS["llava-1.5-13b"])
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llava-1.5-7b"].config))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("llava-1.5-7b", weights=str(tmp_path))
    assert "these are the weights of llava-1.5-13b" in str(caught.value)


def write_header_only(path: Path, entry: ModelEntry) -> None:
    """A file of the full size in which nothing is stored but the header: the rest is a hole."""
    header, position = {}, 0
    for name, tensor in entry.tensors.items():
        shape, size = tensor.shape, 2 * torch.Size(tensor.shape).numel()
        spelled = stored_name(name, older_layout=False)
        header[spelled] = {"dtype": "F16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)


def test_full_size_headers_are_accepted_without_reading_weights(tmp_path: Path) -> None:
    write_header_only(tmp_path / "model.safetensors", MODELS["llava-1.5-7b"])
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llava-1.5-7b"].config))
    checkpoint = open_checkpoint("llava-1.5-7b", weights=str(tmp_path))
    assert checkpoint.geometry.image_tokens == 576
    assert checkpoint.rows("embed_tokens.weight", [31999]).shape == (1, 4096)


# --- image settings -----------------------------------------------------------------------------------------------


def _prepared(folder: Path, settings: dict[str, Any], photo: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The photo as transformers prepares it by `settings`, as we do, and as transformers does by what we read."""
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    read = read_preprocessor(folder, 42)
    theirs, golden = (
        CLIPImageProcessorPil(**made)(photo, input_data_format="channels_last", return_tensors="np")["pixel_values"]
        for made in (settings, read)
    )
    return theirs, preprocess(photo, ImageInfo.from_preprocessor(read)), golden


SETTINGS = clip_preprocessor(42)
SQUARE = {"height": 42, "width": 42}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"size": 42, "crop_size": 42},
        {"size": {"shortest_edge": 60}},
        {"size": SQUARE},
        {"size": [42, 42], "crop_size": [42, 42]},
        {"size": SQUARE, "do_center_crop": False, "crop_size": None},
        {"size": SQUARE, "do_center_crop": None},
        {"do_convert_rgb": None},
        {"do_convert_rgb": False},
        {"do_pad": None},
        {"do_pad": False},
        {"image_mean": 0.5, "image_std": 0.5},
        {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]},
        {"rescale_factor": 1},
        {"resample": 0},
        {"image_processor_type": None},
        {"image_processor_type": "CLIPImageProcessorFast"},
        {"image_processor_type": "LlavaImageProcessor"},
    ],
)
def test_image_settings_give_transformers_pixels(tmp_path: Path, change: dict[str, Any]) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (67, 90, 3), dtype=np.uint8)
    theirs, ours, golden = _prepared(tmp_path, {**SETTINGS, **change}, photo)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()
    assert np.array_equal(golden, theirs)


@pytest.mark.parametrize("key", sorted(SETTINGS))
def test_image_settings_that_are_left_out_are_the_classes(tmp_path: Path, key: str) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (67, 90, 3), dtype=np.uint8)
    sized_for_default = {**clip_preprocessor(224), "image_mean": [0.1, 0.2, 0.3]}
    theirs, ours, golden = _prepared(tmp_path, {k: v for k, v in sized_for_default.items() if k != key}, photo)
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.array_equal(golden, theirs)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"do_resize": None}, "do_resize is null"),
        ({"do_rescale": False}, "do_rescale is false"),
        ({"do_normalize": None}, "do_normalize is null"),
        ({"do_normalize": 1}, "do_normalize must be true or false"),
        ({"do_center_crop": "false"}, "do_center_crop must be true or false"),
        ({"do_pad": True}, "do_pad"),
        ({"use_square_size": True}, "use_square_size"),
        *(
            ({key: None}, f"{key} is null")
            for key in ("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std")
        ),
        ({"size": 42, "do_center_crop": False}, "height"),
        ({"size": {"height": 60, "width": 60}}, "only one of both"),
        ({"size": {"shortest_edge": 42, "longest_edge": 50}}, "size must be height and width"),
        ({"size": {"shortest_edge": 30}}, "must be at least the crop"),
        ({"size": {"shortest_edge": 42.0}}, "size must be"),
        ({"size": 0}, "size must be"),
        ({"size": "42"}, "size must be"),
        ({"crop_size": {"shortest_edge": 42}}, "crop_size must be"),
        ({"size": 10**18}, "resize_shortest"),
        ({"resample": "bicubic"}, "Pillow's numbers"),
        ({"resample": True}, "Pillow's numbers"),
        ({"resample": 5}, "5"),
        ({"rescale_factor": "0.1"}, "rescale_factor must be a number"),
        ({"rescale_factor": float("inf")}, "rescale_factor must be a number"),
        ({"image_mean": [0.5, 0.5]}, "length 3"),
        ({"image_mean": [float("nan"), 0, 0]}, "finite"),
        ({"image_std": [0, 1, 1]}, "positive"),
        ({"image_processor_type": "SiglipImageProcessor"}, "'SiglipImageProcessor'"),
        ({"image_processor_type": 7}, "image_processor_type is 7"),
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_image_settings_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], says: str, nested: bool) -> None:
    settings: dict[str, Any] = {**SETTINGS, **change}
    name = "processor_config.json" if nested else "preprocessor_config.json"
    (tmp_path / name).write_text(json.dumps({"image_processor": settings} if nested else settings))
    checkpoint = FolderCheckpoint(write_tiny(tmp_path), TINY)
    with pytest.raises(CheckpointError) as caught:
        TINY.family.image(checkpoint.folder, checkpoint.geometry)
    assert str(tmp_path) in str(caught.value)
    assert says in str(caught.value)


def test_the_newer_files_image_part_counts_first(tmp_path: Path) -> None:
    newer = {**SETTINGS, "image_mean": [0.1, 0.2, 0.3]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": newer}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    assert read_preprocessor(tmp_path, 42)["image_mean"] == [0.1, 0.2, 0.3]


# --- where weights come from --------------------------------------------------------------------------------------


def test_unknown_model() -> None:
    with pytest.raises(RequestError, match=r"unknown model 'llava-2'; known: llava-1\.5-7b, llava-1\.5-13b, pocket"):
        open_checkpoint("llava-2")


def test_without_weights_the_error_names_three_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("llava-1.5-7b")
    message = str(caught.value)
    assert "llava-hf/llava-1.5-7b-hf is not in the local hub cache" in message
    for way in ("--weights DIR", "connect to the network", "--weights random"):
        assert way in message


def test_the_local_hub_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--llava-hf--llava-1.5-7b-hf"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    write_header_only(snapshot / "model.safetensors", MODELS["llava-1.5-7b"])
    (snapshot / "config.json").write_text(json.dumps(MODELS["llava-1.5-7b"].config))
    checkpoint = open_checkpoint("llava-1.5-7b")
    assert checkpoint.folder is not None
    assert checkpoint.folder.resolve() == snapshot.resolve()
    (snapshot / "model.safetensors").unlink()  # as an interrupted download leaves it
    with pytest.raises(CheckpointError, match="is incomplete and cannot be completed; three ways out"):
        open_checkpoint("llava-1.5-7b")


# --- random weights -----------------------------------------------------------------------------------------------


def test_random_weights_depend_on_seed_and_name_alone() -> None:
    first, again, other = (RandomCheckpoint(TINY, seed=seed) for seed in (3, 3, 4))
    name, sibling = (f"layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
    again.tensor(sibling)
    assert torch.equal(first.tensor(name), again.tensor(name))
    assert not torch.equal(first.tensor(name), other.tensor(name))
    assert not torch.equal(first.tensor(name), first.tensor(sibling))


def test_random_rows_across_blocks() -> None:
    checkpoint = RandomCheckpoint(MODELS["llava-1.5-7b"], seed=0)
    name = "tower.layers.0.mlp.fc1.weight"  # four blocks
    rows = [0, 1023, 1024, 4095]
    assert torch.equal(checkpoint.rows(name, rows), checkpoint.tensor(name)[rows])


@pytest.mark.parametrize("model", sorted(MODELS))
def test_random_weights_have_the_true_geometry(model: str) -> None:
    checkpoint = open_checkpoint(model, weights="random", seed=5)
    assert checkpoint.folder is None
    assert {name: checkpoint.shape(name) for name in checkpoint.names()} == {
        name: entry.shape for name, entry in MODELS[model].tensors.items()
    }
    identity = checkpoint.identity()
    assert (identity.source, identity.seed) == ("random", 5)
    assert identity.sha256 != open_checkpoint(model, weights="random", seed=6).identity().sha256


def test_random_seed_must_be_a_natural_number() -> None:
    with pytest.raises(RequestError, match="--seed -1 must lie in"):
        RandomCheckpoint(TINY, seed=-1)


def test_header_of_a_plain_file(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "a.safetensors")
    (tensor,) = read_header(tmp_path / "a.safetensors").values()
    assert (tensor.stored_name, tensor.shape, tensor.dtype) == ("a", (2, 3), "BF16")
