"""The prompt around the image, from chat templates in every place a checkpoint may keep them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from export.checkpoints import open_checkpoint
from export.families import MODELS
from export.models.pocket import POCKET, pocket_folder
from export.models.prompt import end_ids, read_prompt, read_tokenizer_files
from runtime.bundle import PromptInfo
from runtime.errors import CheckpointError
from runtime.prompt import Tokenizer
from tests.tiny_llava import TINY

TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] + ' ' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The pocket checkpoint's files, to be changed at will."""
    return shutil.copytree(pocket_folder(), tmp_path, dirs_exist_ok=True)


def read(folder: Path) -> PromptInfo:
    return read_prompt(folder, POCKET.geometry, POCKET)


def test_pocket_prompt(folder: Path) -> None:
    prompt = read(folder)
    assert prompt.prefix_text == "A person and their assistant talk about a picture in a few words. USER: "
    assert prompt.suffix_text == "\n{question} ASSISTANT:"
    assert len(prompt.prefix_ids) == 31
    assert prompt.special_ids == {"bos": 1, "eos": 2, "pad": 0, "image": 3}


def test_prefix_and_suffix_are_what_transformers_makes(folder: Path) -> None:
    from transformers import AutoProcessor

    load: Any = AutoProcessor.from_pretrained
    processor = load(folder)
    content = [{"type": "image"}, {"type": "text", "text": "what is this?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    prompt = read(folder)
    assert prompt.prefix_text is not None
    assert prompt.suffix_text is not None
    assert text == prompt.prefix_text + "<image>" + prompt.suffix_text.replace("{question}", "what is this?")
    ids = processor.tokenizer(text)["input_ids"]
    assert tuple(ids[: ids.index(3)]) == prompt.prefix_ids


def _as_json_file(folder: Path) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def _as_tokenizer_key(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))


def _as_named_templates(folder: Path) -> None:
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "rag", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": named}))


@pytest.mark.parametrize("write", [_as_json_file, _as_tokenizer_key, _as_named_templates])
def test_every_place_of_a_template(folder: Path, write: Callable[[Path], None]) -> None:
    (folder / "chat_template.jinja").unlink()
    write(folder)
    assert read(folder).prefix_text == "USER: "


def test_generation_marks_render_as_what_they_hold(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        TEMPLATE.replace("USER", "U").replace(
            "{{ part['text'] + ' ' }}", "{% generation %}{{ part['text'] }}{% endgeneration %} "
        )
    )
    assert read(folder).suffix_text == "\n{question} ASSISTANT:"


def test_a_template_that_writes_bos_does_not_get_two(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + TEMPLATE)
    ids = read(folder).prefix_ids
    assert (ids[0], ids.count(1)) == (1, 1)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    assert read(folder).prefix_ids == ids


def test_llava_gets_the_system_prompt_it_was_trained_with(folder: Path) -> None:
    entry = MODELS["llava-1.5-7b"]
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}"
        "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
        "{% for part in message['content'] %}"
        "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] + ' ' }}{% endif %}"
        "{% endfor %}{% endfor %}ASSISTANT:"
    )
    prompt = read_prompt(folder, POCKET.geometry, entry)
    assert prompt.prefix_text == f"{entry.system_prompt} USER: "


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("{% for", "cannot be rendered"),
        ("{{ messages[7]['role'] + 1 }}", "cannot be rendered"),
        ("{{ raise_exception('no images here') }}", "no images here"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "cannot be rendered"),
        ("<image>", "put the question behind the image"),
        ("<image><image>{{ messages[-1]['content'][1]['text'] }}", "image token '<image>' once"),
        ("{{ messages[-1]['content'][1]['text'] }} <image>", "question before the image"),
    ],
)
def test_templates_that_cannot_be_used(folder: Path, template: str, complaint: str) -> None:
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(CheckpointError, match=complaint):
        read(folder)


def test_a_tokenizer_without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(CheckpointError, match="no chat template"):
        read(folder)


def test_a_template_without_fast_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        read(folder)


@pytest.mark.parametrize("text", ["", "{}", '{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer(folder: Path, text: str) -> None:
    (folder / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match="cannot be read as a tokenizer"):
        read(folder)


def test_a_tokenizer_of_another_model(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="has no token 32000"):
        read_prompt(folder, MODELS["llava-1.5-7b"].geometry, MODELS["llava-1.5-7b"])


@pytest.mark.parametrize("model", ["llava-1.5-7b", "pocket"])
def test_random_weights_get_a_seeded_stand_in(model: str) -> None:
    checkpoint = open_checkpoint(model, weights="random")
    prompt = read_prompt(checkpoint.folder, checkpoint.geometry, MODELS[model])
    assert prompt == read_prompt(checkpoint.folder, checkpoint.geometry, MODELS[model])
    assert len(prompt.prefix_ids) == 35
    assert prompt.prefix_ids[0] == 1
    assert (prompt.prefix_text, prompt.suffix_text) == (None, None)
    assert checkpoint.geometry.image_token_id not in prompt.prefix_ids
    assert max(prompt.prefix_ids) < checkpoint.geometry.text.vocab


def test_image_settings_come_from_the_checkpoint(folder: Path) -> None:
    from export.checkpoints import FolderCheckpoint

    checkpoint = FolderCheckpoint(folder, POCKET)
    assert POCKET.family.image(checkpoint.folder, checkpoint.geometry).size == (336, 336)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "image_mean": [0.5, 0.5, 0.5]}))
    assert POCKET.family.image(checkpoint.folder, checkpoint.geometry).mean == (0.5, 0.5, 0.5)
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    path.unlink()
    assert POCKET.family.image(checkpoint.folder, checkpoint.geometry).mean == (0.48145466, 0.4578275, 0.40821073)


def test_image_size_must_be_the_towers(folder: Path) -> None:

    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "crop_size": 224, "size": 224}))
    with pytest.raises(CheckpointError, match="crops to 224 x 224 pixels, but the tower takes 336 x 336"):
        POCKET.family.image(folder, POCKET.geometry)


def test_image_settings_without_a_folder_are_clips() -> None:
    assert TINY.family.image(None, TINY.geometry).size == (58, 58)


def change(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


PADDING = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
TRUNCATION = {"max_length": 6, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}


@pytest.mark.parametrize(
    "state",
    [
        {"padding": {**PADDING, "pad_token": "<pad>"}},
        {"padding": {**PADDING, "pad_token": "<pad>", "direction": "Right", "pad_to_multiple_of": 8}},
        {"truncation": TRUNCATION},
        {"truncation": {**TRUNCATION, "direction": "Left", "stride": 3}},
        {"truncation": {**TRUNCATION, "strategy": "OnlySecond"}, "padding": {**PADDING, "pad_token": "<pad>"}},
        {"dropout": 0.9},
    ],
    ids=["fixed", "multiple", "cut", "cut left", "both", "dropout"],
)
def test_state_of_a_saved_tokenizer_is_not_for_prompts(folder: Path, state: dict[str, Any]) -> None:
    plain, question = read(folder), "What is in this picture?"
    path = folder / "tokenizer.json"
    right = Tokenizer(path, plain).question_ids(question)
    if "dropout" in state:
        change(path, model=json.loads(path.read_text())["model"] | state)
    else:
        change(path, **state)
    assert read(folder).prefix_ids == plain.prefix_ids
    carried = read_tokenizer_files(folder).content
    assert Tokenizer(path, plain).question_ids(question) == right
    assert Tokenizer(path, plain, content=carried).question_ids(question) == right
    saved = json.loads(carried)
    assert (saved["padding"], saved["truncation"], saved["model"]["dropout"]) == (None, None, None)


@pytest.mark.parametrize(
    ("settings", "special_tokens_map"),
    [
        ({"eos_token": "<pad>"}, None),
        ({"eos_token": {"__type": "AddedToken", "content": "<pad>", "normalized": False}}, None),
        ({"eos_token": None}, {"eos_token": {"content": "<pad>", "normalized": False}}),
        ({"eos_token": "</s>"}, {"eos_token": "<pad>"}),
    ],
    ids=["text", "object", "special_tokens_map.json", "it has the last word"],
)
def test_special_tokens_are_those_of_transformers(
    folder: Path, settings: dict[str, Any], special_tokens_map: dict[str, Any] | None
) -> None:
    from transformers import AutoTokenizer

    change(folder / "tokenizer_config.json", **settings)
    if special_tokens_map is not None:
        (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens_map))
    prompt = read(folder)
    load: Any = AutoTokenizer.from_pretrained
    assert prompt.template is not None
    assert prompt.template.special_tokens == load(folder).special_tokens_map
    assert (prompt.special_ids["eos"], prompt.template.special_tokens["eos_token"]) == (0, "<pad>")


def test_places_of_a_template_in_the_order_of_the_processor(folder: Path) -> None:
    def named(name: str) -> str:
        return TEMPLATE.replace("message['role'].upper()", f"'{name}'")

    for name, write in (
        ("TOKENIZER", lambda: change(folder / "tokenizer_config.json", chat_template=named("TOKENIZER"))),
        ("JINJA", lambda: (folder / "chat_template.jinja").write_text(named("JINJA"))),
        ("JSON", lambda: (folder / "chat_template.json").write_text(json.dumps({"chat_template": named("JSON")}))),
        ("CONFIG", lambda: change(folder / "processor_config.json", chat_template=named("CONFIG"))),
    ):
        if name == "TOKENIZER":
            (folder / "chat_template.jinja").unlink()
        write()
        assert read(folder).prefix_text == f"{name}: "


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "processor_config.json",
        "chat_template.json",
    ],
)
def test_broken_settings_are_named(folder: Path, name: str) -> None:
    (folder / name).write_text("{")
    with pytest.raises(CheckpointError, match=f"{name} is not valid JSON"):
        read(folder)


def test_template_that_is_no_text_is_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff<image>")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja cannot be read"):
        read(folder)


def test_image_token_that_is_split_is_refused(folder: Path) -> None:
    change(folder / "tokenizer_config.json", split_special_tokens=True)
    with pytest.raises(CheckpointError, match="split_special_tokens=true"):
        read(folder)


def ends(folder: Path, generation: object = None, *, outer: object = None, text: object = 2) -> tuple[int, ...]:
    """The ids that end an answer, with `eos_token_id` as given in generation_config.json, config.json, text_config."""
    from export.checkpoints import FolderCheckpoint

    config = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", eos_token_id=outer, text_config=config["text_config"] | {"eos_token_id": text})
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "digests.json").unlink(missing_ok=True)
    return end_ids(FolderCheckpoint(folder, POCKET))


@pytest.mark.parametrize(
    ("generation", "outer", "text", "right"),
    [
        (None, None, 2, (2,)),
        (None, None, None, ()),
        (None, 7, 2, (7,)),
        (None, None, [2, 5, 2], (2, 5)),
        ({"eos_token_id": 9}, 7, 2, (9,)),
        ({"eos_token_id": [639]}, None, 2, (639,)),
        ({"eos_token_id": None}, 7, 2, ()),
        ({"bos_token_id": 1}, 7, 2, ()),
    ],
)
def test_answers_end_where_generate_ends(
    folder: Path, generation: object, outer: object, text: object, right: tuple[int, ...]
) -> None:
    from transformers import GenerationConfig

    assert ends(folder, generation, outer=outer, text=text) == right
    source: dict[str, Any] = {} if generation else {"config_file_name": "config.json", "_from_model_config": True}
    named: Any = GenerationConfig.from_pretrained(folder, **source).eos_token_id
    assert right == tuple(dict.fromkeys(named if isinstance(named, list) else [] if named is None else [named]))


@pytest.mark.parametrize("named", [640, -1, "2", 2.0, True, [], [2, None], [[2]], {"id": 2}])
def test_end_that_is_no_id(folder: Path, named: object) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json says eos_token_id=.* in 0\.\.639"):
        ends(folder, {"eos_token_id": named})
    (folder / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json says eos_token_id="):
        ends(folder, text=named)


def test_broken_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid JSON"):
        ends(folder)


def test_runner_gets_the_own_tokenizer_without_its_state(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """What ExecuTorch's runner reads: the same normalizer, pre-tokenizer and decoder, nothing that pads or cuts."""
    from export.checkpoints import FolderCheckpoint
    from export.dropin.multimodal_runner import _copy_tokenizer

    made = tmp_path_factory.mktemp("runner")
    plain = json.loads((folder / "tokenizer.json").read_text())
    change(folder / "tokenizer.json", padding={**PADDING, "pad_token": "<pad>"}, truncation=TRUNCATION)
    _copy_tokenizer(FolderCheckpoint(folder, POCKET), made)
    assert json.loads((made / "tokenizer.json").read_text()) == plain
