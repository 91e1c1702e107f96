"""The prompt around the image and the ids that end an answer, as transformers finds them in a checkpoint's files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from export.settings import read_object
from runtime.chat import render_chat
from runtime.errors import CheckpointError, RequestError
from runtime.prompt import QUESTION, TOKENIZER_FILE, Tokenizer, conversation_ids, read_tokenizer

if TYPE_CHECKING:
    from export.families.family import Checkpoint, Geometry, ModelEntry
    from runtime.bundle import PromptInfo

_TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "chat_template.jinja", "chat_template.json")
# What transformers reads beside tokenizer.json; its own words for a file that is no JSON name no file.
_SETTINGS_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "processor_config.json",
    "chat_template.json",
)


def read_prompt(folder: Path | None, geometry: Geometry, entry: ModelEntry) -> PromptInfo:
    """The ids and the text before the image, the chat template, and the text behind the image for phones without Jinja.

    The ids are those of the whole rendered conversation up to the image token, so that a tokenizer which treats the
    start of a text specially is honoured. To tokenise the suffix the same way on a device, tokenise the image token
    followed by the suffix and drop the ids up to and including the image token. A date before the image is that of
    the export.

    A folder without tokenizer and template (a bare `save_pretrained` of the model, or random weights) gets
    `entry.prefix_tokens` ids drawn with a fixed seed after the begin-of-text id; `prefix_text`, `suffix_text` and
    `template` are None then, which marks the prefix as a stand-in.

    Raises CheckpointError for tokenizer or template files that are there and cannot be used.
    """
    if folder is None or not has_tokenizer(folder):
        return _seeded_prompt(geometry, entry)
    return _templated_prompt(folder, geometry, entry)


def has_tokenizer(folder: Path) -> bool:
    """Whether a tokenizer or a chat template lies in the folder. Raises CheckpointError for one that is not whole."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return False
    if not (folder / TOKENIZER_FILE).is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json, but other tokenizer files; only the fast tokenizer format is read: "
            "save it with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return True


@dataclass(frozen=True)
class TokenizerFiles:
    """The tokenizer that transformers makes of a folder.

    `content` is its tokenizer.json, with the tokens that other files add and as its class rebuilds it, and without
    padding, truncation and dropout: whoever opens it gets the ids that transformers makes of one text. `special_tokens`
    are the variables of a chat template, `special_ids` the ids of `bos`, `eos` and `pad`, `template` the chat template
    that the processor takes, or without one the tokenizer.
    """

    content: str
    special_tokens: Mapping[str, str]
    special_ids: Mapping[str, int]
    template: str


def read_tokenizer_files(folder: Path) -> TokenizerFiles:
    """Opens a folder's tokenizer and chat template by transformers itself. Raises CheckpointError."""
    from transformers import AutoTokenizer

    path = folder / TOKENIZER_FILE
    for name in _SETTINGS_FILES:
        read_object(folder / name)
    for template in (folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))):
        try:
            template.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{template} cannot be read: {error}; download it again") from error
    try:
        load: Any = AutoTokenizer.from_pretrained
        made = load(str(folder), local_files_only=True, trust_remote_code=False)
        content: str = read_tokenizer(made.backend_tokenizer.to_str()).to_str()
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}; download it again") from error
    if made.split_special_tokens:
        raise CheckpointError(
            f"{folder}/tokenizer_config.json says split_special_tokens=true, with which the image token is no token; "
            "set it to false"
        )
    ids = {role: getattr(made, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    return TokenizerFiles(
        content=content,
        special_tokens=dict(made.special_tokens_map),
        special_ids={role: number for role, number in ids.items() if number is not None},
        template=_template_text(folder, made),
    )


def _template_text(folder: Path, tokenizer: Any) -> str:
    """The template that the processor takes (by its config, chat_template.json, .jinja files), or else the tokenizer.

    Where no processor can be made of the folder, the tokenizer's comes first.
    """
    from transformers.processing_utils import ProcessorMixin

    has_processor = any((folder / name).is_file() for name in ("config.json", "preprocessor_config.json"))
    try:
        found = ProcessorMixin.get_processor_dict(str(folder), local_files_only=True)[0].get("chat_template")
        if isinstance(found, dict):  # several named templates
            found = found.get("default")
        if tokenizer.chat_template is not None and not (has_processor and isinstance(found, str)):
            found = tokenizer.get_chat_template()
    except (OSError, ValueError, KeyError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"the chat template in {folder} cannot be read: {reason}") from error
    if not isinstance(found, str):
        raise CheckpointError(
            f"{folder} has a tokenizer but no chat template (chat_template.jinja, chat_template.json, or the key "
            "chat_template in tokenizer_config.json); copy it from the model's page"
        )
    return found


# What the text graphs are checked on; several languages and notations, so that many different tokens occur.
_TEXT = """A quiet street in the early morning: two bicycles lean against a red brick wall, and a cat sleeps on the
window sill. Behind the glass someone has put three yellow flowers into a blue jug. The sign over the door says OPEN,
24 hours, 7 days; below it a smaller one reads "Bitte klingeln". On the left a man in a grey coat unloads boxes from a
van (licence plate K-AT 2048), while a child with a violin case waits for the bus. It has rained: the pavement
shines, and in the puddles one sees the sky, 50% cloud, 50% light. What time is it? Perhaps ten past six.
"""
_QUESTION = "What is in this picture?"


@dataclass(frozen=True, kw_only=True)
class SampleText:
    """What the text graphs are checked on behind the image: a fixed text, its last id decoded alone; and a question."""

    ids: tuple[int, ...]
    question: tuple[int, ...]


def sample_text(folder: Path | None, geometry: Geometry, entry: ModelEntry, *, tokens: int) -> SampleText:
    """A fixed text of `tokens` ids and a question in the chat template; seeded ids where there is no tokenizer."""
    prompt = read_prompt(folder, geometry, entry)
    if folder is None or prompt.template is None:
        draw = random.Random(f"pruneport text {entry.name}")
        words = [draw.randrange(3, min(geometry.text.vocab, 30000)) for _ in range(tokens + 16)]
        words = [word + 1 if word == geometry.image_token_id else word for word in words]
        return SampleText(ids=tuple(words[:tokens]), question=tuple(words[tokens:]))
    files = read_tokenizer_files(folder)
    tokenizer = Tokenizer(folder / TOKENIZER_FILE, prompt, content=files.content)
    text = _TEXT
    try:
        while len(ids := tokenizer.question_ids(text)) < tokens and len(text) < 2 * tokens * len(_TEXT):
            text += _TEXT
    except RequestError:  # a template that takes no long question
        ids = []
    if len(ids) < tokens:  # or cuts it short
        ids = read_tokenizer(files.content).encode(_TEXT * tokens, add_special_tokens=False).ids
    return SampleText(ids=tuple(ids[:tokens]), question=tuple(tokenizer.question_ids(_QUESTION)))


def _seeded_prompt(geometry: Geometry, entry: ModelEntry) -> PromptInfo:
    from runtime.bundle import PromptInfo

    bos, eos = _text_ids(entry)
    # Ids below 3 are the specials of LLaMA vocabularies; Python's generator is stable across versions and machines.
    draw = random.Random(f"pruneport prefix {entry.name}")
    words = [number for number in range(3, min(geometry.text.vocab, 30000)) if number != geometry.image_token_id]
    ids = [bos, *(draw.choice(words) for _ in range(entry.prefix_tokens - 1))]
    return PromptInfo(
        prefix_ids=tuple(ids),
        prefix_text=None,
        suffix_text=None,
        special_ids={"bos": bos, "eos": eos, "image": geometry.image_token_id},
    )


def _text_ids(entry: ModelEntry) -> tuple[int, int]:
    text = entry.config.get("text_config", entry.config)  # published files of some families have one level
    ids = (text.get("bos_token_id"), text.get("eos_token_id"))
    bos, eos = (number if type(number) is int else usual for number, usual in zip(ids, (1, 2), strict=True))
    return bos, eos


def _templated_prompt(folder: Path, geometry: Geometry, entry: ModelEntry) -> PromptInfo:
    from runtime.bundle import ChatTemplate, PromptInfo

    path = folder / TOKENIZER_FILE
    files = read_tokenizer_files(folder)
    tokenizer = read_tokenizer(files.content)
    image = tokenizer.id_to_token(geometry.image_token_id)
    if image is None:
        raise CheckpointError(
            f"{path} has no token {geometry.image_token_id}, which config.json names as the image token; "
            "the tokenizer belongs to another model"
        )
    text = _marked(files.template, image, entry.family.image_marks)
    template = ChatTemplate(text=text, system=entry.system_prompt, special_tokens=dict(files.special_tokens))
    now = datetime.now()
    try:
        text = render_chat(template, QUESTION, now=now)
    except RequestError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    before, *behind = text.split(image)
    if len(behind) != 1:
        raise CheckpointError(f"the chat template in {folder} must put the image token {image!r} once, got {text!r}")
    behinds = set()
    for question in _QUESTIONS:
        try:
            first, _, last = render_chat(template, question, now=now).partition(image)
        except RequestError:  # it may take others
            continue
        if first != before:
            raise CheckpointError(
                f"the chat template in {folder} puts the question before the image, or what depends on it ({first!r}); "
                "only templates with the image first are supported, because what precedes the image is a constant of "
                "the graph"
            )
        behinds.add(last)
    if len(behinds) < 2:
        raise CheckpointError(f"the chat template in {folder} must put the question behind the image, got {text!r}")
    ids = conversation_ids(tokenizer, text, template)
    if ids.count(geometry.image_token_id) != 1:
        raise CheckpointError(
            f"{path} does not keep {image!r} as one token (id {geometry.image_token_id}); "
            "the tokenizer belongs to another model"
        )
    prefix = ids[: ids.index(geometry.image_token_id)]
    if not prefix:
        raise CheckpointError(f"the chat template in {folder} puts nothing before the image; at least one id is needed")
    if max(ids) >= geometry.text.vocab:
        raise CheckpointError(
            f"{path} makes id {max(ids)}, beyond the {geometry.text.vocab} rows of the embedding; "
            "the tokenizer belongs to another model"
        )
    prompt = PromptInfo(
        prefix_ids=tuple(prefix),
        prefix_text=before,
        special_ids={"image": geometry.image_token_id, **files.special_ids},
        template=template,
    )
    return _with_suffix(prompt, behind[0], path, files.content)


def _marked(template: str, image: str, marks: tuple[str, str]) -> str:
    """The template, which then writes what a processor adds around the image tokens, too."""
    before, behind = marks
    if not before and not behind:
        return template
    # A line end behind a tag is not written, nor is one at the end of a template.
    ends = '{{ "" }}{% endfilter %}'
    wanted = json.dumps(f"{before}{image}{behind}")
    return f"{{% filter replace({json.dumps(image)}, {wanted}) %}}\n{template.removesuffix(chr(10))}{ends}"


# Questions in which a template that does more than paste is likely to show it.
_QUESTIONS = (
    _QUESTION,
    " \n\tIs it 'red' or \"blue\"? \n",
    "<b>&amp;</b> \\n {{ x }} {% y %} %s {0}",
    "na\u00efve \u6f22\u5b57 \U0001f642 \ufb01 \u00df",
    "yes",
    f"1{' and what else' * 400}",
)
# The uses of a text that put it as it is into another, or that say nothing about it.
_PASTING = frozenset({"__new__", "__getattribute__", "__str__", "__add__", "__sizeof__", "__getnewargs__", "maketrans"})


class _Watched(str):
    """A question that notes how a template uses it, other than to paste it."""

    def __new__(cls, text: str, uses: set[str]) -> Self:
        made = super().__new__(cls, text)
        made._uses = uses
        return made

    _uses: set[str]

    def __str__(self) -> str:
        return self

    def __bool__(self) -> bool:
        return True  # no question is empty


def _noting(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def use(self: _Watched, *arguments: Any, **named: Any) -> Any:
        told = [argument for argument in (*arguments, *named.values()) if argument is not None]
        self._uses.add(f"{name} {told}" if told else name)
        return plain(self, *arguments, **named)

    return use


for _name, _plain in vars(str).items():
    if callable(_plain) and _name not in _PASTING:
        setattr(_Watched, _name, _noting(_name, _plain))


def _with_suffix(prompt: PromptInfo, behind: str, path: Path, content: str) -> PromptInfo:
    """The prompt with the text behind the image, if pasting the question there is all that the template does."""
    import msgspec

    assert prompt.template is not None
    uses: set[str] = set()
    render_chat(prompt.template, _Watched(QUESTION, uses), now=datetime.now())
    long_ago = render_chat(prompt.template, QUESTION, now=datetime(2001, 2, 3, 4, 5, 6))
    if not uses <= {"strip"} or behind.count(QUESTION) != 1 or not long_ago.endswith(behind):
        return prompt
    whole = msgspec.structs.replace(prompt, suffix_text=behind, trims_question="strip" in uses)
    ours = Tokenizer(path, prompt, content=content)
    pasting = Tokenizer(path, msgspec.structs.replace(whole, template=None), content=content)
    try:
        same = all(ours.question_ids(question) == pasting.question_ids(question) for question in _QUESTIONS)
    except RequestError:
        same = False
    return whole if same else prompt


def end_ids(checkpoint: Checkpoint) -> tuple[int, ...]:
    """The ids at which transformers' generate() ends an answer; none where nothing names any.

    generation_config.json alone where there is one, even if it names none; else config.json, and what that leaves out
    its `text_config`. The tokenizer's files have no say. Raises CheckpointError for what is no id of the vocabulary.
    """
    folder, key = checkpoint.folder, "eos_token_id"
    generation = None if folder is None else read_object(folder / "generation_config.json")
    if generation is not None:
        where, named = f"{folder}/generation_config.json", generation.get(key)
    else:
        text = checkpoint.config.get("text_config") or {}
        where = "config.json" if folder is None else f"{folder}/config.json"
        named = text.get(key) if checkpoint.config.get(key) is None else checkpoint.config[key]
    if named is None:
        return ()
    ids = named if isinstance(named, list) else [named]
    vocab = checkpoint.geometry.text.vocab
    if not ids or any(type(number) is not int or not 0 <= number < vocab for number in ids):
        raise CheckpointError(
            f"{where} says {key}={named!r}, which must be an id or a list of ids in 0..{vocab - 1}, the rows of the "
            "embedding, or null; correct it, or download it again"
        )
    return tuple(dict.fromkeys(ids))
