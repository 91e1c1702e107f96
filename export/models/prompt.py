"""The prompt around the image: a checkpoint's chat template rendered once and cut at the image and at the question."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.models.settings import read_object
from runtime.errors import CheckpointError
from runtime.prompt import QUESTION

if TYPE_CHECKING:
    from jinja2 import Environment

    from export.golden import SampleText
    from export.models.llava import LlavaGeometry, ModelEntry
    from runtime.bundle import PromptInfo

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")


def read_prompt(folder: Path | None, geometry: LlavaGeometry, entry: ModelEntry) -> PromptInfo:
    """The ids before the image, the text before it, and the text behind it with `{question}` where the question goes.

    The ids are those of the whole rendered conversation up to the image token, so that a tokenizer which treats the
    start of a text specially is honoured. To tokenise the suffix the same way on a device, tokenise the image token
    followed by the suffix and drop the ids up to and including the image token.

    A folder without tokenizer and template (a bare `save_pretrained` of the model, or random weights) gets
    `entry.prefix_tokens` ids drawn with a fixed seed after the begin-of-text id; `prefix_text` and `suffix_text`
    are None then, which marks the prefix as a stand-in.

    Raises CheckpointError for tokenizer or template files that are there and cannot be used.
    """
    if folder is None or not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return _seeded_prompt(geometry, entry)
    if not (folder / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json, but other tokenizer files; only the fast tokenizer format is read: "
            "save it with transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return _templated_prompt(folder, geometry, entry)


# What the text graphs are checked on; several languages and notations, so that many different tokens occur.
_TEXT = """A quiet street in the early morning: two bicycles lean against a red brick wall, and a cat sleeps on the
window sill. Behind the glass someone has put three yellow flowers into a blue jug. The sign over the door says OPEN,
24 hours, 7 days; below it a smaller one reads "Bitte klingeln". On the left a man in a grey coat unloads boxes from a
van (licence plate K-AT 2048), while a child with a violin case waits for the bus. It has rained: the pavement
shines, and in the puddles one sees the sky, 50% cloud, 50% light. What time is it? Perhaps ten past six.
"""
_QUESTION = "What is in this picture?"


def sample_text(folder: Path | None, geometry: LlavaGeometry, entry: ModelEntry, *, tokens: int) -> SampleText:
    """A fixed text of `tokens` ids and a question in the chat template; seeded ids where there is no tokenizer."""
    from export.golden import SampleText

    prompt = read_prompt(folder, geometry, entry)
    if folder is None or prompt.suffix_text is None:
        draw = random.Random(f"pruneport text {entry.name}")
        words = [draw.randrange(3, min(geometry.text.vocab, 30000)) for _ in range(tokens + 16)]
        words = [word + 1 if word == geometry.image_token_id else word for word in words]
        return SampleText(ids=tuple(words[:tokens]), question=tuple(words[tokens:]))
    from runtime.prompt import TOKENIZER_FILE, Tokenizer

    tokenizer = Tokenizer(folder / TOKENIZER_FILE, prompt)
    text = _TEXT
    while len(ids := tokenizer.question_ids(text)) < tokens:
        text += _TEXT
    return SampleText(ids=tuple(ids[:tokens]), question=tuple(tokenizer.question_ids(_QUESTION)))


def _seeded_prompt(geometry: LlavaGeometry, entry: ModelEntry) -> PromptInfo:
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
    text = entry.config["text_config"]
    return int(text["bos_token_id"]), int(text["eos_token_id"])


def _templated_prompt(folder: Path, geometry: LlavaGeometry, entry: ModelEntry) -> PromptInfo:
    from tokenizers import Tokenizer

    from runtime.bundle import PromptInfo

    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}; download it again") from error
    settings = read_object(folder / "tokenizer_config.json") or {}
    image_token = tokenizer.id_to_token(geometry.image_token_id)
    if image_token is None:
        raise CheckpointError(
            f"{path} has no token {geometry.image_token_id}, which config.json names as the image token; "
            "the tokenizer belongs to another model"
        )
    text = render_chat(
        folder,
        system=entry.system_prompt,
        bos_token=_token_text(settings.get("bos_token")),
        eos_token=_token_text(settings.get("eos_token")),
    )
    if text.count(image_token) != 1 or text.count(QUESTION) != 1:
        raise CheckpointError(
            f"the chat template in {folder} must put the image token {image_token!r} and the question each once, "
            f"got {text!r}"
        )
    before, after = text.split(image_token)
    if QUESTION not in after:
        raise CheckpointError(
            f"the chat template in {folder} puts the question before the image ({text!r}); only templates with the "
            "image first are supported, because what precedes the image is a constant of the graph"
        )
    bos = _token_text(settings.get("bos_token"))
    # A template that writes the begin-of-text token itself must not get a second one from the post-processor.
    ids = tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos))).ids
    if ids.count(geometry.image_token_id) != 1:
        raise CheckpointError(
            f"{path} does not keep {image_token!r} as one token (id {geometry.image_token_id}); "
            "the tokenizer belongs to another model"
        )
    prefix = ids[: ids.index(geometry.image_token_id)]
    if not prefix:
        raise CheckpointError(f"the chat template in {folder} puts nothing before the image; at least one id is needed")
    if max(prefix) >= geometry.text.vocab:
        raise CheckpointError(
            f"{path} makes id {max(prefix)}, beyond the {geometry.text.vocab} rows of the embedding; "
            "the tokenizer belongs to another model"
        )
    special = {"image": geometry.image_token_id}
    for role in ("bos", "eos", "pad"):
        token = _token_text(settings.get(f"{role}_token"))
        number = tokenizer.token_to_id(token) if token else None
        if number is not None:
            special[role] = number
    return PromptInfo(prefix_ids=tuple(prefix), prefix_text=before, suffix_text=after, special_ids=special)


def _token_text(token: object) -> str:
    """A special token as tokenizer_config.json spells it: plain text, or an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def render_chat(folder: Path, *, system: str | None, bos_token: str, eos_token: str) -> str:
    """The chat template of `folder`, rendered for one image and `{question}`, up to where the answer starts."""
    import jinja2

    template = template_text(folder)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    try:
        return (
            _template_environment()
            .from_string(template)
            .render(messages=messages, add_generation_prompt=True, bos_token=bos_token, eos_token=eos_token)
        )
    except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        raise CheckpointError(f"the chat template in {folder} cannot be rendered: {error}") from error


def template_text(folder: Path) -> str:
    """Newest spelling first: a .jinja file, then a JSON file, then a key of tokenizer or processor config."""
    plain = folder / "chat_template.jinja"
    if plain.is_file():
        try:
            return plain.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{plain} cannot be read: {error}") from error
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        template = (read_object(folder / name) or {}).get("chat_template")
        if isinstance(template, list):  # several named templates; "default" is the one transformers takes
            template = next((item.get("template") for item in template if item.get("name") == "default"), None)
        if isinstance(template, str):
            return template
    raise CheckpointError(
        f"{folder} has a tokenizer but no chat template (chat_template.jinja, chat_template.json, or the key "
        "chat_template in tokenizer_config.json); copy it from the model's page"
    )


def _template_environment() -> Environment:
    """Jinja as chat templates expect it; sandboxed, because the template is somebody else's program."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's text for training; rendering only needs what is inside."""

        tags = {"generation"}  # noqa: RUF012 - the name and type are Jinja's

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    refuse: Callable[[str], str] = _refuse
    environment.globals["raise_exception"] = refuse
    return environment


def _refuse(message: str) -> str:
    import jinja2

    raise jinja2.TemplateError(message)
