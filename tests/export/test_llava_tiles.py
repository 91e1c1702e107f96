"""LLaVA-NeXT and LLaVA-OneVision: photos in tiles, and answers that are transformers', with and without pruning."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.checkpoints import FolderCheckpoint, RandomCheckpoint, entry_of_folder
from export.families import MODELS
from export.families.family import ModelEntry
from export.families.llava_tiles.family import LLAVA_NEXT, LLAVA_ONEVISION, LlavaTiles
from export.golden import make_golden
from export.models.prompt import SampleText, read_prompt
from export.request import Request, plan
from pruning import PruneSpec
from pruning.vlm_pruner.reference import squared_distances
from runtime.ask import open_bundle
from runtime.bundle import FrameInfo, ImageInfo
from runtime.errors import CheckpointError, ExportError, NotYetError, RequestError
from runtime.image import preprocess, tiles
from runtime.own_tokens import own_tokens, own_words
from runtime.prompt import open_tokenizer
from tests.paper_loop import PaperLoop
from tests.serving import on_the_page
from tests.small_exports import export_small
from tests.tiny_qwen import special, write_checkpoint
from tests.tiny_tiles import (
    PREPROCESSORS,
    TILE,
    TILED_NEXT,
    TILED_ONEVISION,
    TINY_NEXT,
    TINY_ONEVISION,
    in_tiles,
    with_tokenizer,
)

BASES = {entry.family.name: entry for entry in (TINY_NEXT, TINY_ONEVISION)}
TEXT = SampleText(ids=(7, 11, 13, 19, 23, 8), question=(9, 4, 31))
QUESTION = "How many?"
ATOL = 1e-4

every_base = pytest.mark.parametrize("base", BASES.values(), ids=lambda entry: entry.family.name)
every_entry = pytest.mark.parametrize(
    "entry", [TINY_NEXT, TILED_NEXT, TINY_ONEVISION, TILED_ONEVISION], ids=lambda entry: entry.name
)


def _size(entry: ModelEntry) -> tuple[int, int] | None:
    """The size of photo that the entry is for; None for the view of the whole alone."""
    assert isinstance(entry.family, LlavaTiles)
    return entry.family.image_size


def _photo(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(height * width).integers(0, 255, (height, width, 3), dtype=np.uint8)


def _processor(base: ModelEntry) -> Any:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    kinds = {"llava-next": LlavaNextImageProcessorPil, "llava-onevision": LlavaOnevisionImageProcessorPil}
    settings = {
        name: value for name, value in PREPROCESSORS[base.family.name].items() if name[:15] != "image_processor"
    }
    return cast(Any, kinds[base.family.name])(**settings)


def _own_tokens(base: ModelEntry, sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Tokens that transformers' processor puts into a prompt for photos of these sizes, ends of rows among them."""
    from transformers import LlavaNextProcessor, LlavaOnevisionProcessor

    # Without __init__, which wants a tokenizer, and torchvision for videos.
    settings: dict[str, Any] = {"image_processor": _processor(base)}
    if base is TINY_NEXT:
        theirs: Any = LlavaNextProcessor.__new__(LlavaNextProcessor)
        settings |= {"patch_size": 14, "num_additional_image_tokens": 1}
    else:
        theirs = LlavaOnevisionProcessor.__new__(LlavaOnevisionProcessor)
        settings |= {"num_image_tokens": 16, "vision_aspect_ratio": base.config["vision_aspect_ratio"]}
    vars(theirs).update(settings)
    # The class token is counted first and taken away by the strategy that the model has.
    return [
        theirs._get_number_of_features(*size, TILE, TILE) - settings.get("num_additional_image_tokens", 0)
        for size in sizes
    ]


def _folder(base: ModelEntry, place: Path, **changed: Any) -> Path:
    (place / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSORS[base.family.name], **changed}))
    return place


@every_base
@pytest.mark.parametrize("size", [(58, 58), (58, 90), (100, 160), (170, 60), (200, 40), (61, 173), (300, 299)])
def test_photo_is_cut_as_transformers_processor_cuts_it(
    base: ModelEntry, size: tuple[int, int], tmp_path: Path
) -> None:
    entry, photo = in_tiles(base, size), _photo(*size)
    info = entry.family.image(_folder(base, tmp_path), entry.geometry)
    theirs = _processor(base)(photo, input_data_format="channels_last", return_tensors="np")
    assert theirs["image_sizes"].tolist() == [list(size)]
    ours = preprocess(photo, info)
    levels = np.abs(ours - theirs["pixel_values"][0]) * np.reshape(info.std, (1, 3, 1, 1)) * 255
    assert ours.shape == theirs["pixel_values"][0].shape == entry.geometry.pixel_values
    assert levels.max() < 1e-3
    # A photo of another shape is squeezed into the same tiles, on both sides.
    desktop = entry.family.desktop(_with_folder(RandomCheckpoint(entry, seed=1), tmp_path), "cpu")
    other = _photo(75, 110)
    np.testing.assert_allclose(preprocess(other, info), desktop.pixels(other), atol=1e-5)
    assert len(tiles(other, info)) == entry.geometry.pixel_values[0] - 1


@every_base
def test_photo_would_have_had_the_tokens_of_transformers_processor(base: ModelEntry, tmp_path: Path) -> None:
    sizes = [(58, 58), (58, 90), (100, 160), (170, 60), (200, 40), (61, 173), (299, 300), (3000, 4000), (9, 11)]
    info = base.family.image(_folder(base, tmp_path), base.geometry)
    info = msgspec.json.decode(msgspec.json.encode(info), type=ImageInfo)  # all that a bundle knows
    ours = [own_tokens(info, size) for size in sizes]
    assert [sum(each) for each in ours if each] == _own_tokens(base, sizes)
    # Its ends of rows are no image tokens: those of a graph for photos of that size say how many there are.
    for size, own in zip(sizes, ours, strict=True):
        geometry = in_tiles(base, size).geometry
        assert own == (geometry.image_tokens, geometry.grid[0])
    assert len(set(ours)) > 4
    assert ours[2] is not None
    expected = "{} image tokens and {} row ends by the model's own processor for 160 x 100 pixels".format(*ours[2])
    assert own_words(info, sizes[2]) == expected


def _with_folder(checkpoint: RandomCheckpoint, folder: Path) -> RandomCheckpoint:
    class _Here(RandomCheckpoint):
        @property
        def folder(self) -> Path | None:
            return folder

    here = _Here.__new__(_Here)
    here.__dict__.update(checkpoint.__dict__)
    return here


def _whole_model(checkpoint: RandomCheckpoint, entry: ModelEntry) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    make: Any = AutoModelForImageTextToText.from_config
    config = AutoConfig.for_model(**dict(entry.config))
    model = make(config, dtype=torch.float32, attn_implementation="eager").eval()
    spelled = {spelling: name for name, tensor in entry.tensors.items() for spelling in tensor.stored}
    state = {name: checkpoint.tensor(spelled[name]).float() for name, _ in model.named_parameters()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    return model


def _seen_by(model: Any, entry: ModelEntry, pixels: torch.Tensor) -> dict[str, Any]:
    """What transformers' whole model takes of a photo: its pixels and size, or of a view alone what it packs."""
    size = _size(entry)
    if size is not None:
        return {"pixel_values": pixels[None], "image_sizes": torch.tensor([size])}
    if entry.family.name == "llava-onevision":  # one of several images: a view each
        return {"pixel_values": pixels, "image_sizes": torch.tensor([[TILE, TILE]]), "batch_num_images": [2]}
    inner = model.model  # with tiles or not at all: transformers packs a view that is alone, but asks for no such photo
    layer = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
    view = inner.multi_modal_projector(layer[:, 1:])
    packed, _ = inner.pack_image_features([view], [None], "default", image_newline=inner.image_newline)
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=packed)}}


def _logits(model: Any, seen: Mapping[str, Any], ids: list[int]) -> torch.Tensor:
    out: torch.Tensor = model(input_ids=torch.tensor([ids]), **seen, use_cache=True).logits[0]
    return out


@pytest.mark.slow
@every_entry
@torch.no_grad()
def test_answers_are_those_of_transformers_model(entry: ModelEntry) -> None:
    """Logits of a text and 64 greedy tokens: of transformers' generate, and pruned of the loop inside its model."""
    checkpoint = RandomCheckpoint(entry, seed=1)
    model, frame = (
        _whole_model(checkpoint, entry),
        entry.family.frame(read_prompt(None, entry.geometry, entry).prefix_ids, entry.geometry),
    )
    pixels = preprocess(_photo(90, 120), entry.family.image(None, entry.geometry))
    seen = _seen_by(model, entry, torch.from_numpy(pixels))
    asked = [*frame.ids, *TEXT.question]
    golden = make_golden(checkpoint, entry, None, pixel_values=pixels, text=TEXT)
    theirs = _logits(model, seen, [*frame.ids, *TEXT.ids])[-len(TEXT.ids) :]
    np.testing.assert_allclose(golden["text_prefill.out.logits"][0], theirs[:-1], atol=ATOL)
    said = model.generate(
        input_ids=torch.tensor([asked]), **seen, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0, len(asked) :]
    assert golden["answer.ids"].tolist() == said.tolist()
    assert golden["answer.margin"].min() > 2 * ATOL, "too near a tie to be compared"

    geometry = entry.geometry
    spec = PruneSpec(grid=geometry.grid, overview=geometry.overview, keep=7)
    for cut in (1, 2):
        golden = make_golden(checkpoint, entry, spec, cut=cut, pixel_values=pixels, text=TEXT)
        with PaperLoop(model.model.language_model, frame, spec, cut) as loop:
            theirs = _logits(model, seen, [*frame.ids, *TEXT.ids])[-len(TEXT.ids) :]
            assert loop.kept == golden["kept_indices"].tolist()
            np.testing.assert_allclose(golden["text_prefill.out.logits"][0], theirs[:-1], atol=ATOL)
            answer: list[int] = []
            while len(answer) < len(golden["answer.ids"]):
                answer.append(int(_logits(model, seen, [*asked, *answer])[-1].argmax()))
        assert golden["answer.ids"].tolist() == answer
        assert golden["answer.margin"].min() > 2 * ATOL, "too near a tie to be compared"


def test_distances_are_between_places_in_the_photo() -> None:
    spec = PruneSpec(grid=(6, 8), overview=(3, 4), keep=4)
    distance = (squared_distances(spec) / spec.steps**2).sqrt()
    assert distance.shape == (60, 60)
    # The overview's first token lies in the middle of four of the grid, and its next one two of them to the right.
    assert distance[0, [12, 13, 20, 21]].tolist() == [0.5**0.5] * 4
    assert distance[0, 1] == distance[12, 14] == 2
    assert distance[0, 4] == distance[12, 28] == 2
    assert distance.max() == distance[12, 59] == (5**2 + 7**2) ** 0.5
    # Of one grid alone steps are tokens.
    assert PruneSpec(grid=(6, 8), keep=4).steps == 1
    assert 2**22 < sum(side**2 for side in spec.extent) <= 2**24


def test_row_ends_are_no_image_tokens() -> None:
    frame = FrameInfo(before=2, image=6, first_text=10, breaks=(6, 9))
    assert frame.image_indices(np.arange(2, 10)).tolist() == [0, 1, 2, 3, -1, 4, 5, -1]
    for breaks in ((1,), (10,), (6, 6), (9, 6)):
        with pytest.raises(ValueError, match="ascending positions inside the image"):
            FrameInfo(before=2, image=6, first_text=10, breaks=breaks)


def test_published_models_are_as_large_as_they_say() -> None:
    onevision, nexts = MODELS["llava-onevision-0.5b"], MODELS["llava-next-7b"]
    assert (onevision.geometry.grid, nexts.geometry.grid) == ((27, 27), (24, 24))
    wide = in_tiles(nexts, (480, 640)).geometry
    assert (wide.pixel_values, wide.overview, wide.grid) == ((5, 3, 336, 336), (24, 24), (36, 48))
    many = in_tiles(onevision, (2000, 3000)).geometry  # 4 x 6 tiles, averaged to nine tiles' worth of tokens
    assert (many.pixel_values, many.grid) == ((25, 3, 384, 384), (66, 99))


@pytest.mark.parametrize("name", [entry.name for family in (LLAVA_NEXT, LLAVA_ONEVISION) for entry in family.models])
def test_tensors_of_published_models_are_those_of_transformers(name: str) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    entry, make = MODELS[name], cast(Any, AutoModelForImageTextToText.from_config)
    with torch.device("meta"):
        model = make(AutoConfig.for_model(**dict(entry.config)))
    spelled = {spelling: name for name, tensor in entry.tensors.items() for spelling in tensor.stored}
    theirs = {spelled[name]: tuple(value.shape) for name, value in model.named_parameters()}
    assert theirs == {name: tensor.shape for name, tensor in entry.tensors.items() if tensor.instead is None}


def test_image_size_is_chosen_when_a_graph_is_made(tmp_path: Path) -> None:
    words: dict[str, Any] = {"keep": "64", "target": "android", "weights": "random", "output_dir": str(tmp_path)}
    words["force"] = True
    alone = plan(Request(model="llava-next-7b", **words))
    assert alone.entry.geometry.pixel_values == (1, 3, 336, 336)
    tiled = plan(Request(model="llava-next-7b", image_size="480x640", **words))
    assert tiled.entry.geometry.image_tokens == 576 + 36 * 48
    assert "image480x640" in tiled.bundle.name
    assert tiled.needs.ram_bytes > alone.needs.ram_bytes + 32 * 4 * (tiled.entry.geometry.image_tokens**2 - 576**2)
    for size, complaint in (
        ("8000x20", "leaves no row or no column of image tokens"),
        ("1x2x3", "is no size; write N, or HxW"),
    ):
        with pytest.raises(RequestError, match=complaint):
            plan(Request(model="llava-next-7b", image_size=size, **words))
    with pytest.raises(RequestError, match="overview of 27 x 27 has 8505 tokens; at most 8192 can be ranked"):
        plan(Request(model="llava-onevision-0.5b", image_size="592x1992", **words))


@every_base
def test_model_may_be_what_a_folder_describes(base: ModelEntry, tmp_path: Path) -> None:
    entry = with_tokenizer(base)
    folder = tmp_path / "My LLaVA"
    folder.mkdir()
    model = write_checkpoint(folder, entry, PREPROCESSORS[base.family.name])
    found = entry_of_folder(folder)
    assert (found.family, found.name) == (base.family, "my-llava")
    assert found.geometry == entry.geometry
    checkpoint = FolderCheckpoint(folder, found)
    assert torch.equal(checkpoint.tensor("tower.image_newline"), model.model.image_newline)
    assert torch.equal(checkpoint.tensor("lm_head.weight"), checkpoint.tensor("embed_tokens.weight"))
    assert checkpoint.unread() == ()
    prompt = read_prompt(folder, found.geometry, found)
    assert prompt.prefix_ids[-1] == special("<|vision_start|>")
    for changed, words in (
        ({"image_grid_pinpoints": [[TILE, TILE]]}, "image_grid_pinpoints are not those of config.json"),
        ({"size": {"height": TILE, "width": 72}}, "but the tower takes 58 x 58 pixels"),
        ({"image_processor_type": "CLIPImageProcessor"}, "supported: Llava(Next|Onevision)ImageProcessor"),
    ):
        with pytest.raises(CheckpointError, match=words):
            found.family.image(_folder(base, folder, **changed), found.geometry)


@pytest.mark.parametrize(
    ("base", "changed", "words"),
    [
        (TINY_NEXT, {"image_grid_pinpoints": [[58, 100]]}, r"\[58, 100\], which are no tiles of 58 pixels"),
        (TINY_NEXT, {"image_grid_pinpoints": []}, "must be a list of heights and widths"),
        (TINY_NEXT, {"vision_feature_select_strategy": "full"}, "supported: default"),
        (
            TINY_NEXT,
            {"text_config": {"model_type": "mistral", "sliding_window": 4096}},
            "sliding_window=4096; a decode",
        ),
        (TINY_NEXT, {"text_config": {"model_type": "qwen2"}}, "supported: llama, mistral"),
        (TINY_NEXT, {"image_seq_length": 576}, "make 4 x 4 = 16 image tokens"),
        (TINY_ONEVISION, {"vision_aspect_ratio": "anyres"}, "supported: anyres_max_9"),
        (TINY_ONEVISION, {"vision_feature_select_strategy": "default"}, "supported: full"),
        (
            TINY_ONEVISION,
            {"text_config": {"model_type": "qwen2", "use_sliding_window": True}},
            "use_sliding_window=True",
        ),
        (TINY_ONEVISION, {"vision_config": {"model_type": "clip_vision_model"}}, "supported: siglip_vision_model"),
        (TINY_ONEVISION, {"model_type": "llava_next"}, "supported: llava_onevision"),
    ],
    ids=lambda value: value.name if isinstance(value, ModelEntry) else None,
)
def test_config_that_is_not_understood_is_refused(base: ModelEntry, changed: dict[str, Any], words: str) -> None:
    merged = {
        key: {**base.config[key], **value} if isinstance(value, dict) else value for key, value in changed.items()
    }
    with pytest.raises(CheckpointError, match=words):
        base.family.geometry({**base.config, **merged})


def test_backends_and_runtimes_that_were_not_tried_are_refused(tmp_path: Path) -> None:
    words: dict[str, Any] = {"keep": "64", "weights": "random", "output_dir": str(tmp_path), "force": True}
    with pytest.raises(
        NotYetError, match=r"llava-next-7b on backend vulkan: not yet, .*; take --backend xnnpack or onnx"
    ):
        plan(Request(model="llava-next-7b", target="android", backend="vulkan", **words))
    with pytest.raises(RequestError, match="where its rows end; leave --layout out"):
        plan(Request(model="llava-onevision-0.5b", target="android", backend="onnx", layout="transformers.js", **words))
    with pytest.raises(RequestError, match="attention of the tower's class token, and the tower of llava-onevision"):
        plan(
            Request(
                model="llava-onevision-0.5b", target="android", backend="onnx", method="visionzip", cut="0", **words
            )
        )
    with pytest.raises(ExportError, match="leave --layout out"):
        LLAVA_NEXT.hub_files(RandomCheckpoint(TINY_NEXT, seed=0), image_token="<image>", keep=64)


@pytest.mark.parametrize(
    ("entry", "backend", "keep"),
    [
        pytest.param(TILED_ONEVISION, "onnx", "all", marks=pytest.mark.slow),
        pytest.param(TILED_NEXT, "xnnpack", "all", marks=pytest.mark.slow),
        # Lowering the pruner takes as long as all else here.
        pytest.param(TILED_ONEVISION, "xnnpack", "7", marks=pytest.mark.full),
    ],
    ids=lambda value: value.name if isinstance(value, ModelEntry) else value,
)
def test_answer_of_a_bundle_is_that_of_transformers_generate(
    entry: ModelEntry, backend: str, keep: str, tmp_path: Path
) -> None:
    """From a folder and a photo, through the processor and generate() of transformers; pruned as the check has it."""
    entry = with_tokenizer(entry)
    folder = tmp_path / "folder"
    folder.mkdir()
    model = write_checkpoint(folder, entry, PREPROCESSORS[entry.family.name])
    made = export_small(entry, folder, tmp_path, backend=backend, keep=keep)
    manifest = made.bundle.manifest
    assert len(manifest.frame.breaks) == (1 if _size(entry) is None else entry.geometry.grid[0])
    assert manifest.image.tiles == (None if _size(entry) is None else entry.family.image(None, entry.geometry).tiles)
    report = (made.bundle.path / "report.md").read_text(encoding="utf-8")
    assert manifest.image.pinpoints is not None
    assert f"; {own_words(manifest.image, made.bundle.photo_size)}" in report
    if keep != "all":
        return
    size = _size(entry)
    assert size is not None
    photo, tokenizer = _photo(*size), open_tokenizer(made.bundle)
    with open_bundle(made.bundle.path) as bundle:
        said = "".join(bundle.ask(photo, QUESTION, max_new_tokens=12))
        whole = "".join(bundle.ask(photo, QUESTION))
        assert bundle.bundle.manifest.prune.overview == entry.geometry.overview
    frame = entry.family.frame(manifest.prompt.prefix_ids, entry.geometry)
    ids = torch.tensor([[*frame.ids, *tokenizer.question_ids(QUESTION)]])
    seen = _processor(entry)(photo, input_data_format="channels_last", return_tensors="pt")
    with torch.no_grad():
        theirs = model.generate(
            input_ids=ids,
            pixel_values=seen["pixel_values"],
            image_sizes=seen["image_sizes"],
            max_new_tokens=12,
            do_sample=False,
        )[0, ids.shape[1] :]
    assert said == "".join(tokenizer.text(theirs.tolist()))
    if backend == "onnx":
        count = entry.geometry.image_tokens
        page = on_the_page(made.bundle.path, tmp_path / "served", photo, QUESTION, [count])
        assert page == {count: (list(range(count)), whole)}
