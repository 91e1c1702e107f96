"""SmolVLM2: the marks around its image, and answers that are transformers', with and without pruning."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from export.checkpoints import FolderCheckpoint, entry_of_folder
from export.families import MODELS
from export.families.smolvlm import SMOLVLM
from export.models.prompt import read_prompt, read_tokenizer_files
from export.request import Request, plan
from pruning import PruneSpec
from runtime.ask import open_bundle
from runtime.bundle import ChatTemplate
from runtime.chat import render_chat
from runtime.errors import CheckpointError, ExportError, NotYetError, RequestError
from runtime.image import preprocess
from runtime.prompt import Tokenizer, open_tokenizer
from tests.paper_loop import PaperLoop
from tests.small_exports import export_small
from tests.tiny_smolvlm import EDGE, PREPROCESSOR, TINY_SMOLVLM, special, with_tokenizer, write_folder

QUESTION = "How many?"
ENTRY = with_tokenizer(TINY_SMOLVLM)


def _photo(height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(height * width).integers(0, 255, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint's folder, and transformers' model of it."""
    folder = tmp_path_factory.mktemp("smol") / "My SmolVLM2"
    folder.mkdir()
    return folder, write_folder(folder, ENTRY)


def _theirs(folder: Path, photo: NDArray[np.uint8]) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Ids and pixels of photo and question as transformers' processor makes them without tiles."""
    from transformers import AutoTokenizer
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    load: Any = AutoTokenizer.from_pretrained
    tokenizer = load(str(folder))
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    make: Any = SmolVLMImageProcessorPil
    settings = {name: value for name, value in PREPROCESSOR.items() if name != "image_processor_type"}
    one_step = {**settings, "do_image_splitting": False, "do_resize": False, "return_row_col_info": True}
    seen = make(**one_step)(photo, input_data_format="channels_last", return_tensors="pt")
    (rows,), (columns,) = seen.pop("rows"), seen.pop("cols")
    processing: Any = processing_smolvlm
    expanded: str = processing.get_image_prompt_string(
        rows[0], columns[0], 36, "<fake_token_around_image>", "<image>", "<global-img>"
    )
    return tokenizer(text.replace("<image>", expanded))["input_ids"], dict(seen)


def test_prompt_and_pixels_are_those_of_transformers_processor(made: tuple[Path, Any]) -> None:
    folder, photo = made[0], _photo(70, 130)
    prompt = read_prompt(folder, ENTRY.geometry, ENTRY)
    frame = SMOLVLM.frame(prompt.prefix_ids, SMOLVLM.geometry(ENTRY.config))
    tokenizer = Tokenizer(folder / "tokenizer.json", prompt, content=read_tokenizer_files(folder).content)
    ids, seen = _theirs(folder, photo)
    assert [*frame.ids, *tokenizer.question_ids(QUESTION)] == ids
    assert prompt.prefix_ids[-2:] == (special("<fake_token_around_image>"), special("<global-img>"))
    # For phones, which know no Jinja: the mark behind the image is part of the text there.
    assert prompt.suffix_text == "<fake_token_around_image>{question}<end_of_utterance>\nAssistant:"
    ours = preprocess(photo, SMOLVLM.image(folder, SMOLVLM.geometry(ENTRY.config)))
    np.testing.assert_allclose(ours, seen["pixel_values"][0], atol=1e-5)
    assert seen["pixel_attention_mask"].all()


@pytest.mark.parametrize("ending", ["", "\n", "\n  \n"])
def test_marks_change_nothing_else_of_a_template(made: tuple[Path, Any], ending: str, tmp_path: Path) -> None:
    for file in made[0].iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    template = "\n{% for m in messages %}\nU:{{ '<im' ~ 'age>' }}{{ m.content[1].text }}\n{% endfor %}" + ending
    (tmp_path / "chat_template.jinja").write_text(template)
    prompt = read_prompt(tmp_path, ENTRY.geometry, ENTRY)
    before, behind = render_chat(ChatTemplate(text=template), "{question}", now=datetime.now()).split("<image>")
    assert before == "\nU:"
    assert prompt.prefix_text == f"{before}<fake_token_around_image><global-img>"
    assert prompt.suffix_text == f"<fake_token_around_image>{behind}"


def test_published_models_are_as_large_as_they_say() -> None:
    entries = [MODELS[f"smolvlm2-{size}"] for size in ("256m", "500m", "2.2b")]
    assert [entry.geometry.grid for entry in entries] == [(8, 8), (8, 8), (9, 9)]
    whole = [entry.vision_parameter_count(0) + entry.text_parameter_count() for entry in entries]
    assert whole[0] == 256_484_928  # as counted in the published checkpoint
    assert [round(count / 1e6) for count in whole[1:]] == [507, 2247]


def test_model_may_be_what_a_folder_describes(made: tuple[Path, Any], tmp_path: Path) -> None:
    folder, model = made
    found = entry_of_folder(folder)
    assert (found.family, found.name, found.geometry) == (SMOLVLM, "my-smolvlm2", ENTRY.geometry)
    checkpoint = FolderCheckpoint(folder, found)
    weight = model.model.connector.modality_projection.proj.weight
    assert torch.equal(checkpoint.tensor("tower.projector.linear_1.weight"), weight)
    assert checkpoint.unread() == ()
    for changed, words in (
        ({"max_image_size": {"longest_edge": 512}}, rf"'longest_edge': 512\}}, but the tower takes .*{EDGE}"),
        ({"image_processor_type": "Idefics2ImageProcessor"}, "supported: SmolVLMImageProcessor"),
        ({"do_normalize": False}, "only true is supported"),
    ):
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PREPROCESSOR, **changed}))
        with pytest.raises(CheckpointError, match=words):
            found.family.image(tmp_path, found.geometry)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"scale_factor": 5}, "12 x 12 patches cannot be merged 5 x 5"),
        ({"scale_factor": 0}, r"scale_factor must be a whole number in 1\.\."),
        ({"model_type": "idefics3"}, "supported: smolvlm; give a checkpoint of SmolVLM2"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "supported: smolvlm_vision"),
        ({"vision_config": {"image_size": [96, 96]}}, "image_size must be a positive whole number"),
        ({"text_config": {"model_type": "qwen2"}}, "supported: llama; give a checkpoint of the SmolVLM2 family"),
        ({"text_config": {"max_position_embeddings": 36}}, "leaves no room for text beside 36 image tokens"),
        ({"text_config": None}, "no text_config"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantised"),
    ],
)
def test_config_that_is_not_understood_is_refused(changed: dict[str, Any], words: str) -> None:
    merged = {
        key: {**ENTRY.config[key], **value} if isinstance(value, dict) and key in ENTRY.config else value
        for key, value in changed.items()
    }
    with pytest.raises(CheckpointError, match=words):
        SMOLVLM.geometry({**ENTRY.config, **merged})


@pytest.mark.parametrize(
    ("size", "backend", "scheme"),
    [("256m", "onnx", "int4-g64"), ("500m", "xnnpack", "8da4w-g64"), ("2.2b", "onnx", "int4-g128")],
)
def test_default_text_scheme_divides_the_decoder(size: str, backend: str, scheme: str, tmp_path: Path) -> None:
    words: dict[str, Any] = {"weights": "random", "output_dir": str(tmp_path), "force": True, "target": "android"}
    made = plan(Request(model=f"smolvlm2-{size}", backend=backend, keep="16", **words))
    assert made.text is not None
    assert made.text.scheme == scheme
    assert scheme not in made.bundle.name  # as every default


def test_what_was_not_tried_is_refused(tmp_path: Path) -> None:
    words: dict[str, Any] = {"model": "smolvlm2-256m", "weights": "random", "output_dir": str(tmp_path), "force": True}
    words |= {"keep": "16", "target": "android"}
    with pytest.raises(NotYetError, match=r"smolvlm2-256m on backend vulkan: not yet, .*; take --backend xnnpack"):
        plan(Request(backend="vulkan", **words))
    with pytest.raises(RequestError, match="leave --layout out"):
        plan(Request(backend="onnx", layout="transformers.js", **words))
    with pytest.raises(RequestError, match=r"text between the tiles of a larger photo.*leave --image-size out"):
        plan(Request(backend="onnx", image_size="1024x1536", **words))
    with pytest.raises(RequestError, match="attention of the tower's class token, and the tower of smolvlm2-256m"):
        plan(Request(backend="onnx", method="visionzip", cut="0", **words))
    with pytest.raises(ExportError, match="leave --layout out"):
        SMOLVLM.hub_files(FolderCheckpoint.__new__(FolderCheckpoint), image_token="<image>", keep=64)


@pytest.mark.parametrize(
    ("backend", "keep"),
    [
        pytest.param("onnx", "7", marks=pytest.mark.slow),
        pytest.param("onnx", "all", marks=pytest.mark.full),
        pytest.param("xnnpack", "all", marks=pytest.mark.full),
        # Lowering the pruner takes as long as all else here.
        pytest.param("xnnpack", "7", marks=pytest.mark.full),
    ],
)
@torch.no_grad()
def test_answer_of_a_bundle_is_that_of_transformers(
    made: tuple[Path, Any], backend: str, keep: str, tmp_path: Path
) -> None:
    """generate() of the model, from a photo; pruned with the paper's loop hooked into it."""
    folder, model = made
    exported = export_small(ENTRY, folder, tmp_path, backend=backend, keep=keep)
    photo, tokenizer = _photo(90, 120), open_tokenizer(exported.bundle)
    with open_bundle(exported.bundle.path) as bundle:
        said = "".join(bundle.ask(photo, QUESTION, max_new_tokens=12))
    ids, seen = _theirs(folder, photo)
    if keep == "all":
        answer = model.generate(input_ids=torch.tensor([ids]), **seen, max_new_tokens=12, do_sample=False)
        assert said == "".join(tokenizer.text(answer[0, len(ids) :].tolist()))
        return
    frame = SMOLVLM.frame(exported.bundle.manifest.prompt.prefix_ids, SMOLVLM.geometry(ENTRY.config))
    spec = PruneSpec(grid=ENTRY.geometry.grid, keep=int(keep))
    answer_ids: list[int] = []
    with PaperLoop(model.model.text_model, frame, spec, 2) as loop:
        while len(answer_ids) < 12 and special("<end_of_utterance>") not in answer_ids:
            logits = model(input_ids=torch.tensor([[*ids, *answer_ids]]), **seen, use_cache=True).logits
            answer_ids.append(int(logits[0, -1].argmax()))
    assert len(loop.kept) == int(keep)
    assert said == "".join(tokenizer.text(answer_ids))
