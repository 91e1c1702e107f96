"""Qwen's models in folders as they are published: what is read of them, what is refused, what is answered."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import export.families
import export.golden
from export.checkpoints import FolderCheckpoint, RandomCheckpoint, entry_of_folder
from export.evaluation.eager import EagerModel
from export.evaluation.pruned_model import PrunedModel
from export.evaluation.questions import Line
from export.evaluation.run import wanted_cells
from export.evaluation.views import View
from export.families import MODELS
from export.families.family import ModelEntry
from export.families.qwen_vl.family import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from export.golden import make_golden
from export.graphs.vision import build_vision_encoder
from export.models.prompt import SampleText, end_ids, read_prompt
from export.request import Request, model_entry, plan
from pruning import DEFAULT_METHOD, METHODS, Features, PruneSpec
from runtime.bundle import ImageInfo
from runtime.errors import CheckpointError, ExportError, NotYetError, RequestError
from runtime.generation import open_graphs, start_answers
from runtime.image import preprocess
from runtime.own_tokens import own_tokens, own_words
from runtime.prompt import open_tokenizer
from tests.serving import on_the_page
from tests.small_exports import export_small
from tests.tiny_qwen import (
    PROCESSORS,
    TINY_QWEN2_VL,
    TINY_QWENS,
    as_published,
    special,
    with_tokenizer,
    write_checkpoint,
)

TIED = {entry.family.name: with_tokenizer(entry) for entry in TINY_QWENS}
QUESTION = "How many?"
ANSWER = 64
KEEP = 7

every_family = pytest.mark.parametrize("entry", TIED.values(), ids=lambda entry: entry.family.name)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Path, Any]]:
    """A folder that transformers wrote, with its model, by family."""
    made = {name: tmp_path_factory.mktemp(name) for name in TIED}
    return {name: (folder, write_checkpoint(folder, TIED[name])) for name, folder in made.items()}


def _photo(entry: ModelEntry) -> NDArray[np.uint8]:
    """Blocks of colour, as large as the graphs' images are, so that nothing is resized on the way."""
    height, width = entry.geometry.pixel_values[2:]
    patch = entry.config["vision_config"]["patch_size"]
    blocks = np.random.default_rng(3).integers(0, 255, (height // patch, width // patch, 3), dtype=np.uint8)
    return np.repeat(np.repeat(blocks, patch, axis=0), patch, axis=1)


def _with_config(folder: Path, place: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A folder like another, but for its config.json."""
    config = json.loads((folder / "config.json").read_text())
    changed = change(config)
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    (place / "config.json").write_text(json.dumps(changed if isinstance(changed, dict) else config))
    return place


@every_family
def test_folder_is_read_in_both_spellings(
    entry: ModelEntry, folders: Mapping[str, tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, model = folders[entry.family.name]
    flat = _with_config(folder, tmp_path, as_published)
    theirs = dict(model.named_parameters())
    for place in (folder, flat):
        checkpoint = FolderCheckpoint(place, entry)
        assert checkpoint.geometry == entry.geometry
        assert set(checkpoint.names()) == set(entry.tensors)
        assert end_ids(checkpoint) == (special("<|im_end|>"),)
        for tensor in entry.tensors.values():
            name = next((name for name in tensor.stored if name in theirs), "model.language_model.embed_tokens.weight")
            canonical = next(key for key, value in entry.tensors.items() if value is tensor)
            assert torch.equal(checkpoint.tensor(canonical), theirs[name])


def test_model_may_be_what_a_folder_describes(folders: Mapping[str, tuple[Path, Any]], tmp_path: Path) -> None:
    for name, (folder, _) in folders.items():
        entry = entry_of_folder(folder)
        assert entry.family.name == name
        assert entry.geometry.text == TIED[name].geometry.text
        assert entry.geometry.grid == (24, 24)  # the size of image is no part of a checkpoint
        assert FolderCheckpoint(folder, entry).geometry == entry.geometry
    (tmp_path / "config.json").write_text(json.dumps(as_published(MODELS["qwen2-vl-7b"].config)))
    assert entry_of_folder(tmp_path) is MODELS["qwen2-vl-7b"]
    (tmp_path / "config.json").write_text(json.dumps(as_published(MODELS["qwen3-vl-4b"].config)))
    assert entry_of_folder(tmp_path) is MODELS["qwen3-vl-4b"]
    (tmp_path / "config.json").write_text('{"model_type": "idefics3"}')
    with pytest.raises(CheckpointError, match="is no family that can be exported; supported: llava, qwen2_vl, "):
        entry_of_folder(tmp_path)
    with pytest.raises(RequestError, match="model=auto is what the config"):
        model_entry("auto", "random")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("qwen3_vl_moe", "a router picks a few of many MLPs"),
        ("qwen3_5", "three of four decoder layers are linear attention"),
        ("gemma4", "share keys and values"),
        ("gemma3n", "share keys and values"),
        ("lfm2_vl", "most decoder layers are convolutions"),
    ],
)
def test_families_that_graphs_cannot_hold_are_refused_with_the_reason(kind: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(CheckpointError, match=f"model_type='{kind}' is no family that can be exported .*{words}"):
        model_entry("auto", str(tmp_path))


@every_family
def test_prompt_ends_in_front_of_the_image_and_goes_on_behind_its_end(
    entry: ModelEntry, folders: Mapping[str, tuple[Path, Any]]
) -> None:
    prompt = read_prompt(folders[entry.family.name][0], entry.geometry, entry)
    assert (prompt.prefix_text or "").endswith("user\n<|vision_start|>")
    assert prompt.prefix_ids[-1] == special("<|vision_start|>")
    assert prompt.suffix_text == "<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"


def _no_rows(config: dict[str, Any]) -> None:
    config["text_config"]["rope_parameters"]["mrope_section"] = [1, 5]


def _uneven(config: dict[str, Any]) -> None:
    config["text_config"]["rope_parameters"]["mrope_section"] = [1, 2, 4]


def _stretched(config: dict[str, Any]) -> None:
    config["text_config"]["rope_parameters"] |= {"rope_type": "yarn", "factor": 4.0}


def _sliding(config: dict[str, Any]) -> None:
    config["text_config"]["use_sliding_window"] = True


def _quantised(config: dict[str, Any]) -> None:
    config["quantization_config"] = {"quant_method": "awq"}


def _other(config: dict[str, Any]) -> None:
    config["model_type"] = "qwen2_5_vl"


def _narrow(config: dict[str, Any]) -> None:
    config["vision_config"]["hidden_size"] = 64


def _turned(config: dict[str, Any]) -> None:
    config["vision_config"]["rope_parameters"]["rope_type"] = "default"


def _no_turns(config: dict[str, Any]) -> None:
    config["text_config"]["rope_parameters"]["mrope_interleaved"] = False


def _too_many_turns(config: dict[str, Any]) -> None:
    config["text_config"]["rope_parameters"]["mrope_section"] = [2, 3, 3]


def _falling(config: dict[str, Any]) -> None:
    config["vision_config"]["deepstack_visual_indexes"] = [2, 0]


def _beyond(config: dict[str, Any]) -> None:
    config["vision_config"]["deepstack_visual_indexes"] = [0, 4]


def _shallow(config: dict[str, Any]) -> None:
    config["text_config"]["num_hidden_layers"] = 3


def _no_square(config: dict[str, Any]) -> None:
    config["vision_config"]["num_position_embeddings"] = 24


@pytest.mark.parametrize(
    ("family", "change", "words"),
    [
        ("qwen3-vl", _no_turns, "mrope_interleaved=false is not what qwen3_vl is built like"),
        ("qwen3-vl", _too_many_turns, "more than every third of the 8 frequencies"),
        ("qwen3-vl", _falling, r"deepstack_visual_indexes=\[2, 0\] must ascend"),
        ("qwen3-vl", _beyond, r"deepstack_visual_indexes=\[0, 4\] names layers beyond the 4"),
        ("qwen3-vl", _shallow, "features for 3 decoder layers, and there are 3: none is left to prune in front of"),
        ("qwen3-vl", _no_square, "num_position_embeddings=24 is no square"),
        ("qwen2-vl", _no_rows, "mrope_section must be three whole numbers"),
        ("qwen2-vl", _uneven, "must add up to half of head_dim=12"),
        ("qwen2-vl", _stretched, "rope_type"),
        ("qwen2-vl", _sliding, "use_sliding_window=true; a decoder whose layers see a window"),
        ("qwen2-vl", _quantised, "already quantised"),
        ("qwen2-vl", _other, "model_type"),
        ("qwen2-vl", _narrow, "the tower gives 64 channels, but text_config.hidden_size is 48"),
        ("qwen2-vl", _turned, "allowed: rope_type axial"),
    ],
)
def test_config_that_is_not_understood_is_refused(
    family: str,
    change: Callable[[dict[str, Any]], object],
    words: str,
    folders: Mapping[str, tuple[Path, Any]],
    tmp_path: Path,
) -> None:
    folder = _with_config(folders[family][0], tmp_path, change)
    with pytest.raises(CheckpointError, match=words):
        FolderCheckpoint(folder, TIED[family])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_processor_type": "CLIPImageProcessor"}, "supported: Qwen2VLImageProcessor"),
        ({"merge_size": 4}, "merge_size is 4, but config.json says 2"),
        ({"do_normalize": False}, "only true is supported"),
        ({"resample": "bicubic"}, "one of Pillow's numbers"),
        ({"image_mean": [0.5]}, "cannot be used"),
        ({"min_pixels": 4096, "max_pixels": 4095}, "at least 4096 and at most 4095 pixels"),
        ({"size": {"shortest_edge": 0.5}}, "at least 0.5 and at most 1003520 pixels .* whole numbers"),
        ({"size": 448}, "size must be an object"),
    ],
)
def test_image_settings_that_make_other_pixels_are_refused(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=words):
        TINY_QWEN2_VL.family.image(tmp_path, TINY_QWEN2_VL.geometry)


@every_family
@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"min_pixels": 3136, "max_pixels": 100352},
        {"size": {"shortest_edge": 50176, "longest_edge": 12845056}},
        {"size": {"shortest_edge": 3136, "longest_edge": 60000}, "max_pixels": 40000},
    ],
)
def test_photo_would_have_had_the_tokens_of_transformers_processor(
    entry: ModelEntry, limits: dict[str, Any], tmp_path: Path
) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    edges = {"patch_size": entry.config["vision_config"]["patch_size"], "merge_size": 2}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**edges, **limits}))
    info = entry.family.image(tmp_path, entry.geometry)
    info = msgspec.json.decode(msgspec.json.encode(info), type=ImageInfo)  # all that a bundle knows
    theirs: Any = Qwen2VLImageProcessorPil(**copy.deepcopy({**edges, **limits}))
    sizes = [(112, 140), (56, 56), (9, 11), (30, 300), (98, 70), (427, 640), (3000, 4000), (4000, 250), (1, 40)]
    ours = [own_tokens(info, size) for size in sizes]
    assert ours == [(theirs.get_number_of_image_patches(*size, {}) // 4, 0) for size in sizes]
    seen = theirs(np.zeros((*sizes[3], 3), np.uint8), input_data_format="channels_last", return_tensors="np")
    assert ours[3] == (seen["image_grid_thw"].prod() // 4, 0)
    assert len(set(ours)) > 4


def test_image_size_must_divide_into_tokens_and_windows() -> None:
    config = TINY_QWEN2_VL.config
    with pytest.raises(RequestError, match="28 x 28 pixels; height and width must be multiples of 28"):
        replace(QWEN2_VL, image_size=(112, 100)).geometry(config)
    with pytest.raises(RequestError, match="a window of the tower, 112 x 112 pixels"):
        replace(QWEN2_5_VL, image_size=(672, 700)).geometry(MODELS["qwen2.5-vl-3b"].config)


def test_image_size_is_chosen_when_a_graph_is_made(tmp_path: Path) -> None:
    words: dict[str, Any] = {"keep": "64", "target": "android", "weights": "random", "output_dir": str(tmp_path)}
    words["force"] = True
    wide = plan(Request(model="qwen2-vl-2b", image_size="448x672", **words))
    assert wide.entry.geometry.pixel_values == (1, 3, 448, 672)
    assert wide.entry.geometry.grid == (16, 24)
    assert "image448x672" in wide.bundle.name
    square = plan(Request(model="qwen2.5-vl-3b", image_size="448", **words))
    assert square.entry.geometry.grid == (16, 16)
    third = plan(Request(model="qwen3-vl-2b", image_size="512x768", **words))
    assert third.entry.geometry.grid == (16, 24)
    assert third.cut == 3
    assert "cut" not in third.bundle.name
    for model, size, complaint in (
        ("qwen2-vl-2b", "450", "height and width must be multiples of 28"),
        ("qwen2.5-vl-3b", "448x700", "height and width must be multiples of 112"),
        ("qwen3-vl-2b", "450x768", "height and width must be multiples of 32"),
        ("qwen2-vl-2b", "1x2x3", "is no size; write N, or HxW"),
        ("qwen2-vl-2b", "wide", "is not a whole number"),
        ("pocket", "448", "leave --image-size out"),
    ):
        with pytest.raises(RequestError, match=complaint):
            plan(Request(model=model, image_size=size, **words))


def test_published_models_have_the_grid_of_the_paper() -> None:
    sizes = {"qwen2-vl-2b": 2.2, "qwen2-vl-7b": 8.3, "qwen2.5-vl-3b": 3.8, "qwen2.5-vl-7b": 8.3}
    sizes |= {"qwen3-vl-2b": 2.1, "qwen3-vl-4b": 4.4}
    for name, billions in sizes.items():
        entry = MODELS[name]
        assert entry.geometry.grid == (24, 24)
        tied = entry.tensors["lm_head.weight"].instead is not None
        head = entry.geometry.text.vocab * entry.geometry.text.hidden if tied else 0
        count = entry.vision_parameter_count(0) + entry.text_parameter_count() - head
        assert round(count / 1e9, 1) == billions


@pytest.mark.parametrize("name", [entry.name for family in (QWEN2_VL, QWEN2_5_VL, QWEN3_VL) for entry in family.models])
def test_tensors_of_published_models_are_those_of_transformers(name: str) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    entry, make = MODELS[name], cast(Any, AutoModelForImageTextToText.from_config)
    with torch.device("meta"):
        model = make(AutoConfig.for_model(**dict(entry.config)))
    spelled = {spelling: name for name, tensor in entry.tensors.items() for spelling in tensor.stored}
    theirs = {spelled[name]: tuple(value.shape) for name, value in model.named_parameters()}
    assert theirs == {name: tensor.shape for name, tensor in entry.tensors.items() if tensor.instead is None}


def test_tower_stays_unquantised_where_groups_do_not_divide_its_layers(tmp_path: Path) -> None:
    words: dict[str, Any] = {"keep": "64", "target": "android", "weights": "random", "output_dir": str(tmp_path)}
    made = {
        model: plan(Request(model=model, backend="onnx", force=True, **words)).vision.scheme
        for model in ("qwen2-vl-2b", "qwen2.5-vl-3b", "qwen3-vl-2b")
    }
    assert made == {"qwen2-vl-2b": "int8", "qwen2.5-vl-3b": None, "qwen3-vl-2b": "int8"}
    assert plan(Request(model="qwen2.5-vl-3b", backend="xnnpack", force=True, **words)).vision.scheme == "8da8w"
    with pytest.raises(RequestError, match=r"tower\.layers\.0\.mlp\.down_proj \(3420 inputs\)"):
        plan(Request(model="qwen2.5-vl-3b", backend="onnx", force=True, quant_vision="int8", **words))


def test_runtimes_that_count_positions_on_one_axis_are_refused(tmp_path: Path) -> None:
    for layout, backend in (("multimodal-runner", "xnnpack"), ("transformers.js", "onnx")):
        request = Request(
            model="qwen2-vl-2b",
            keep="64",
            target="android",
            backend=backend,
            layout=layout,
            weights="random",
            output_dir=str(tmp_path),
        )
        with pytest.raises(RequestError, match="have positions on 3; leave --layout out"):
            plan(request)
    with pytest.raises(ExportError, match="leave --layout out"):
        QWEN2_VL.hub_files(RandomCheckpoint(TINY_QWEN2_VL, seed=0), image_token="<|image_pad|>", keep=64)


@pytest.mark.parametrize(
    ("target", "backend", "way_out"),
    [("android", "vulkan", "take --backend xnnpack or onnx"), ("ios", "coreml", "take --target android")],
)
def test_backends_that_were_not_tried_are_refused(target: str, backend: str, way_out: str, tmp_path: Path) -> None:
    request = Request(
        model="qwen2-vl-2b", keep="64", target=target, backend=backend, weights="random", output_dir=str(tmp_path)
    )
    with pytest.raises(NotYetError, match=f"qwen2-vl-2b on backend {backend}: not yet, .*; {way_out}"):
        plan(request)


def test_no_image_token_is_dropped_in_front_of_the_layers_that_planes_are_for(tmp_path: Path) -> None:
    words: dict[str, Any] = {"keep": "64", "target": "android", "weights": "random", "output_dir": str(tmp_path)}
    words |= {"model": "qwen3-vl-2b", "force": True}
    assert plan(Request(cut="5", **words)).cut == 5
    with pytest.raises(
        RequestError, match=r"cut=2 must lie in 3\.\.27 .*features to every image token behind the first 3"
    ):
        plan(Request(cut="2", **words))
    checkpoint = RandomCheckpoint(TIED["qwen3-vl"], seed=0)
    with pytest.raises(ExportError, match=r"cut=2 must lie in 3\.\.4"):
        build_vision_encoder(checkpoint, TIED["qwen3-vl"], None, cut=2)
    with pytest.raises(RequestError, match=r"holov may prune at 0\.\.0, this model at 3 or more"):
        wanted_cells(["holov"], [64], None, least_cut=3)
    assert {cell.cut for cell in wanted_cells(["vlm-pruner", "divprune"], [64], None, least_cut=3)} == {3}


def test_methods_that_look_at_a_class_token_are_no_cells_of_an_evaluation() -> None:
    with pytest.raises(RequestError, match="--method visionzip chooses by the attention of the tower's class token"):
        wanted_cells(["visionzip"], [64], None, class_token=False)
    assert [cell.method for cell in wanted_cells(["divprune"], [64], None, class_token=False)] == ["divprune"]


@torch.no_grad()
@pytest.mark.parametrize("entry", [TIED["qwen2-vl"], TIED["qwen3-vl"]], ids=lambda entry: entry.family.name)
def test_evaluation_reads_as_the_desktop_does(
    entry: ModelEntry, folders: Mapping[str, tuple[Path, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export.golden, "ANSWER_TOKENS", 1)
    cut, photo = max(2, entry.geometry.least_cut), _photo(entry)
    checkpoint = FolderCheckpoint(folders[entry.family.name][0], entry)
    model = EagerModel(checkpoint, entry)
    reading = model.read(photo, [Line(image="", question=QUESTION, answer="7")], [cut])
    asked = model._tokenizer.question_ids(QUESTION)
    text = SampleText(ids=(*asked, *model._tokenizer.answer_ids("7"), 0), question=tuple(asked))
    pixels = entry.family.desktop(checkpoint, "cpu").pixels(photo)
    golden = make_golden(checkpoint, entry, None, cut=cut, pixel_values=pixels, text=text)
    np.testing.assert_allclose(reading.image[cut], golden["vision_encoder.out.hidden"], atol=1e-5)
    np.testing.assert_allclose(reading.text[cut], golden["text_prefill.out.hidden"], atol=1e-5)


def _loop(pruned: PrunedModel, view: View, keep: int, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
    """The choice as the paper tells it, in the place of the form that graphs hold."""
    trace = METHODS[DEFAULT_METHOD].choose(features, PruneSpec(grid=view.grid, keep=keep))
    return trace.tokens, trace.indices[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "backend", "keeps"),
    [
        ("qwen2-vl", "onnx", f"{KEEP},all"),
        ("qwen3-vl", "onnx", f"{KEEP},all"),
        ("qwen3-vl", "xnnpack", f"{KEEP}"),  # the text graphs are the same ones without pruning
    ],
)
def test_answers_of_a_bundle_are_those_of_transformers_generate(
    family: str,
    backend: str,
    keeps: str,
    folders: Mapping[str, tuple[Path, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    entry, photo = TIED[family], _photo(TIED[family])
    folder, model = folders[family]
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    made = export_small(entry, folder, tmp_path, backend=backend, keep=keeps)
    assert made.bundle.manifest.image.pixels is not None
    report = (made.bundle.path / "report.md").read_text(encoding="utf-8")
    assert f"; {own_words(made.bundle.manifest.image, made.bundle.photo_size)}" in report
    tokenizer = open_tokenizer(made.bundle)
    question = tokenizer.question_ids(QUESTION)
    said, kept = {}, {}
    for keep in [entry.geometry.image_tokens if word == "all" else int(word) for word in keeps.split(",")]:
        view = made.bundle.at(keep)
        with open_graphs(view) as graphs:
            answers = start_answers(view, graphs)
            seen = answers.see(preprocess(photo, view.manifest.image))
            kept[keep] = seen.kept
            said[keep] = [each.id for each in answers.answer(seen, question, max_new_tokens=ANSWER, past_end=True)]

    frame = entry.family.frame(made.bundle.manifest.prompt.prefix_ids, entry.geometry)
    ids = torch.tensor([[*frame.ids, *question]])
    settings = dict(PROCESSORS[entry.family.model_type])
    del settings["image_processor_type"]
    pictures = Qwen2VLImageProcessorPil(**settings)(photo, input_data_format="channels_last", return_tensors="pt")
    assert pictures["image_grid_thw"].tolist() == [[1, 8, 10]]  # as large as the graph's, by its own choice
    inputs = {**pictures, "input_ids": ids, "mm_token_type_ids": (ids == entry.geometry.image_token_id).int()}
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        whole = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)[0, ids.shape[1] :].tolist()
    monkeypatch.setattr(PrunedModel, "select", _loop)
    fewer = PrunedModel(model, method=DEFAULT_METHOD, keep=KEEP)
    pruned = fewer.generate(inputs, max_new_tokens=ANSWER, do_sample=False)[0].tolist()
    assert len(whole) == len(pruned) == ANSWER
    assert whole != pruned, "the case cannot tell pruned from whole"
    expected = {KEEP: pruned, entry.geometry.image_tokens: whole}
    assert said == {keep: expected[keep] for keep in said}
    if family != "qwen2-vl":
        return
    ends = end_ids(FolderCheckpoint(folder, entry))
    for keep, shown in on_the_page(made.bundle.path, tmp_path / "served", photo, QUESTION, list(said)).items():
        answer = tokenizer.text(itertools.takewhile(lambda token: token not in ends, said[keep]))
        assert (tuple(shown.kept), shown.answer) == (kept[keep], "".join(answer))
