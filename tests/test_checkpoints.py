"""Reading checkpoints of both layouts lazily, and refusing every broken one with one clear message before any work."""

from __future__ import annotations

import hashlib
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from export.checkpoints import FolderCheckpoint, RandomCheckpoint, canonical_name, open_checkpoint, read_header
from export.models import MODELS
from export.models.llava import LlavaGeometry
from runtime.errors import CheckpointError, RequestError
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
    assert checkpoint.names() == tuple(TINY.geometry.tensor_shapes())
    source = RandomCheckpoint(TINY, seed=1)
    for name in checkpoint.names():
        assert torch.equal(checkpoint.tensor(name), source.tensor(name).float()), name
        assert checkpoint.shape(name) == tuple(checkpoint.tensor(name).shape)


@pytest.mark.parametrize(
    ("stored", "canonical"),
    [
        ("model.language_model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        ("language_model.model.layers.3.mlp.up_proj.weight", "language_model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.embed_tokens.weight", "language_model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("language_model.lm_head.weight", "lm_head.weight"),
        ("model.vision_tower.vision_model.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("vision_tower.pre_layrnorm.bias", "vision_tower.pre_layrnorm.bias"),
        ("model.multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_1.bias"),
        ("vision_tower.vision_model.embeddings.position_ids", None),
        ("language_model.model.layers.0.self_attn.rotary_emb.inv_freq", None),
    ],
)
def test_canonical_names(stored: str, canonical: str | None) -> None:
    assert canonical_name(stored) == canonical


def test_rows_are_those_of_the_whole_tensor(tmp_path: Path) -> None:
    checkpoint = FolderCheckpoint(write_tiny(tmp_path), TINY)
    name = "language_model.embed_tokens.weight"
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
    assert torch.equal(checkpoint.tensor("lm_head.weight"), checkpoint.tensor("language_model.embed_tokens.weight"))


def test_what_no_graph_reads_may_be_absent(tmp_path: Path) -> None:
    unread = ("model.vision_tower.post_layernorm.", "model.vision_tower.encoder.layers.2.")
    kept = {name: tensor for name, tensor in tiny_tensors().items() if not name.startswith(unread)}
    assert len(kept) < len(tiny_tensors())
    checkpoint = FolderCheckpoint(write_tiny(tmp_path, tensors=kept), TINY)
    assert not checkpoint.has("vision_tower.post_layernorm.weight")


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(tmp_path: Path, value: float) -> None:
    tensors = tiny_tensors()
    tensors["model.multi_modal_projector.linear_1.weight"][3, 4] = value
    tensors["model.language_model.embed_tokens.weight"][9, 0] = value
    checkpoint = FolderCheckpoint(write_tiny(tmp_path, tensors=tensors), TINY)
    with pytest.raises(CheckpointError, match=r"linear_1\.weight holds NaN or infinite values"):
        checkpoint.tensor("multi_modal_projector.linear_1.weight")
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        checkpoint.rows("language_model.embed_tokens.weight", [9])
    assert checkpoint.rows("language_model.embed_tokens.weight", [8]).shape == (1, 48)


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
        ("..", "only plain file names"),
        (7, "only plain file names"),
        ("pytorch_model-00001.bin", "pickles are refused"),
    ],
)
def test_index_that_leads_elsewhere(tmp_path: Path, shard: object, complaint: str) -> None:
    write_tiny(tmp_path, shards=2)
    changed(tmp_path / INDEX, lambda index: index["weight_map"].update({NORM: shard}))
    assert complaint in refusal(tmp_path)


@pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": [1]}])
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
    ],
)
def test_wrong_configs(tmp_path: Path, config: Mapping[str, Any], complaint: str) -> None:
    write_tiny(tmp_path, config=config)
    assert complaint in refusal(tmp_path)


def test_another_models_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llava-1.5-13b"].config))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("llava-1.5-7b", weights=str(tmp_path))
    message = str(caught.value)
    assert "text hidden 5120 instead of 4096" in message
    assert "say --model llava-1.5-13b" in message


def test_another_models_weights_under_the_right_config(tmp_path: Path) -> None:
    write_header_only(tmp_path / "model.safetensors", MODELS["llava-1.5-13b"].geometry)
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llava-1.5-7b"].config))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint("llava-1.5-7b", weights=str(tmp_path))
    assert "these are the weights of llava-1.5-13b" in str(caught.value)


def write_header_only(path: Path, geometry: LlavaGeometry) -> None:
    """A file of the full size in which nothing is stored but the header: the rest is a hole."""
    header, position = {}, 0
    for name, shape in geometry.tensor_shapes().items():
        size = 2 * torch.Size(shape).numel()
        spelled = stored_name(name, older_layout=False)
        header[spelled] = {"dtype": "F16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)


def test_full_size_headers_are_accepted_without_reading_weights(tmp_path: Path) -> None:
    write_header_only(tmp_path / "model.safetensors", MODELS["llava-1.5-7b"].geometry)
    (tmp_path / "config.json").write_text(json.dumps(MODELS["llava-1.5-7b"].config))
    checkpoint = open_checkpoint("llava-1.5-7b", weights=str(tmp_path))
    assert checkpoint.geometry.image_tokens == 576
    assert checkpoint.rows("language_model.embed_tokens.weight", [31999]).shape == (1, 4096)


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
    write_header_only(snapshot / "model.safetensors", MODELS["llava-1.5-7b"].geometry)
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
    name, sibling = (f"language_model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up"))
    again.tensor(sibling)
    assert torch.equal(first.tensor(name), again.tensor(name))
    assert not torch.equal(first.tensor(name), other.tensor(name))
    assert not torch.equal(first.tensor(name), first.tensor(sibling))


def test_random_rows_across_blocks() -> None:
    checkpoint = RandomCheckpoint(MODELS["llava-1.5-7b"], seed=0)
    name = "vision_tower.encoder.layers.0.mlp.fc1.weight"  # four blocks
    rows = [0, 1023, 1024, 4095]
    assert torch.equal(checkpoint.rows(name, rows), checkpoint.tensor(name)[rows])


@pytest.mark.parametrize("model", sorted(MODELS))
def test_random_weights_have_the_true_geometry(model: str) -> None:
    checkpoint = open_checkpoint(model, weights="random", seed=5)
    assert checkpoint.folder is None
    assert {name: checkpoint.shape(name) for name in checkpoint.names()} == MODELS[model].geometry.tensor_shapes()
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
