"""Text to token ids and back: the question inside the checkpoint's chat template, and the answer as it streams."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.chat import render_chat
from runtime.errors import BundleError, RequestError

if TYPE_CHECKING:
    from runtime.bundle import Bundle, ChatTemplate, PromptInfo

QUESTION = "{question}"
"""Stands for the user's text in `PromptInfo.suffix_text`."""

TOKENIZER_FILE = "tokenizer.json"

# A token that stands for one byte, where the decoder knows such tokens.
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def read_tokenizer(content: str) -> Any:
    """Reads a `tokenizers.Tokenizer` from the content of a tokenizer.json, without what was on when it was saved.

    Padding, truncation and dropout belong to the training run that saved the file; transformers, too, neither pads
    nor cuts what it is not asked to. Raises whatever the tokenizers library raises.
    """
    import tokenizers

    tokenizer: Any = tokenizers.Tokenizer.from_str(content)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if getattr(tokenizer.model, "dropout", None) is not None:
        tokenizer.model.dropout = None
    return tokenizer


def conversation_ids(tokenizer: Any, text: str, template: ChatTemplate) -> list[int]:
    """Tokenises a whole rendered conversation as transformers' processors do.

    A template that writes the begin-of-text token itself must not get a second one from the post-processor.
    """
    bos = template.special_tokens.get("bos_token")
    ids: list[int] = tokenizer.encode(text, add_special_tokens=bos is None or not text.startswith(bos)).ids
    return ids


class Tokenizer:
    """The tokenizer of a bundle together with the chat template that its manifest holds."""

    def __init__(self, path: Path, prompt: PromptInfo, *, content: str | None = None) -> None:
        """Opens the tokenizer at `path`, or `content` in its place.

        Raises BundleError for a file that is no tokenizer, or not that of the manifest.
        """
        try:
            self._tokenizer: Any = read_tokenizer(path.read_text(encoding="utf-8") if content is None else content)
        except Exception as err:  # the tokenizers library raises nothing narrower
            raise BundleError(f"{path} cannot be read as a tokenizer: {err}; export again") from err
        if prompt.template is None and (prompt.suffix_text is None or QUESTION not in prompt.suffix_text):
            raise BundleError(f"{path.parent} has no chat template: its checkpoint had none; it cannot be asked")
        image = prompt.special_ids.get("image")
        token = None if image is None else self._tokenizer.id_to_token(image)
        if image is None or token is None:
            raise BundleError(f"{path} has no image token {image}; it belongs to another model")
        self._image_id, self._image, self._prompt = image, str(token), prompt
        self._has_bytes = "ByteFallback" in repr(self._tokenizer.decoder)
        replacement = [self._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "\N{REPLACEMENT CHARACTER}".encode()]
        self._broken: tuple[int, ...] = () if None in replacement else tuple(replacement)
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)

    def question_ids(self, question: str) -> list[int]:
        """The ids behind the image: what the template writes there for this question.

        Raises RequestError for an empty question, text that is no Unicode, a second image, a special token, or a
        question that the template refuses or lets change what stands before the image.
        """
        if not question.strip():
            raise RequestError("the question is empty; ask something")
        try:
            question.encode("utf-8")
        except UnicodeEncodeError as err:
            raise RequestError(
                f"the question is not valid text: byte or surrogate {question[err.start]!r} at {err.start}; "
                "give it in UTF-8"
            ) from err
        if self._image in question:
            raise RequestError(f"the question holds {self._image!r}, a second image; one image is supported")
        for token in sorted(self._special, key=len):
            if token in question:
                raise RequestError(f"the question holds the special token {token!r}, which only the template may write")
        template = self._prompt.template
        if template is None:
            ids = self._pasted(question.strip() if self._prompt.trims_question else question)
        else:
            ids = conversation_ids(self._tokenizer, self._rendered(template, question), template)
        return ids[ids.index(self._image_id) + 1 :]

    def answer_ids(self, answer: str) -> list[int]:
        """The ids of an answer, as it stands behind a question: with the space that templates leave to the model."""
        ids: list[int] = self._tokenizer.encode(f" {answer}", add_special_tokens=False).ids
        return ids

    def _pasted(self, question: str) -> list[int]:
        """The image and what follows it, where a manifest holds only the text around the question."""
        # Behind the image token, as in the whole conversation: some tokenizers treat the start of a text specially.
        text = self._image + (self._prompt.suffix_text or "").replace(QUESTION, question)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _rendered(self, template: ChatTemplate, question: str) -> str:
        """The whole conversation, with one image and the same text before it as for every question."""
        now = datetime.now()
        text = render_chat(template, question, now=now)
        before, *behind = text.split(self._image)
        if len(behind) != 1:
            raise RequestError(
                f"the chat template writes {len(behind)} images for this question, one is supported; ask otherwise"
            )
        # Against another question at the same time: what tells the date there is as old as the bundle.
        if before != render_chat(template, QUESTION, now=now).partition(self._image)[0]:
            raise RequestError(
                f"the chat template lets this question change what stands before the image ({before!r}), which is a "
                "constant of the graph; ask otherwise"
            )
        return text

    def text(self, ids: Iterable[int]) -> Iterator[str]:
        """The answer piece by piece; a character that takes several tokens comes out when it is whole.

        Together the pieces are what decoding all ids at once gives, without special tokens. Bytes that make no
        character come out as replacement characters and take nothing beside them along.
        """
        said = text = ""
        for text in self._texts(ids):
            # What ends in a replacement may be a character on its way.
            shown = text.removesuffix("\N{REPLACEMENT CHARACTER}")
            if piece := _unsaid(shown, said):
                yield piece
                said = shown
        if piece := _unsaid(text, said):
            yield piece

    def _texts(self, ids: Iterable[int]) -> Iterator[str]:
        """All of the answer so far, after each id and at the end.

        Where single bytes are tokens, the decoder spoils every byte of a run in which one is wrong. So it is given
        only whole characters, and the bytes of the replacement character for a byte that belongs to none.
        """
        sound: list[int] = []
        begun: list[tuple[int, int]] = []  # id and byte of a character that is not whole
        for number in ids:
            token = self._tokenizer.id_to_token(number)
            byte = _BYTE.fullmatch(token) if token is not None and self._has_bytes else None
            if byte is not None:
                begun.append((number, int(byte[1], 16)))
                sound += self._settled(begun)
            elif token is not None and token not in self._special:
                sound += [*self._settled(begun, at_end=True), number]
            yield self._tokenizer.decode(sound, skip_special_tokens=True)
        sound += self._settled(begun, at_end=True)
        yield self._tokenizer.decode(sound, skip_special_tokens=True)

    def _settled(self, begun: list[tuple[int, int]], *, at_end: bool = False) -> list[int]:
        """Takes from `begun` what is decided, a whole character or broken bytes, and returns its ids."""
        ids: list[int] = []
        while begun:
            try:
                bytes(byte for _, byte in begun).decode()
                ids += [number for number, _ in begun]
                begun.clear()
            except UnicodeDecodeError as err:
                if err.reason == "unexpected end of data" and not at_end:
                    break
                for number, _ in begun[: err.end]:
                    ids += self._broken or (number,)
                del begun[: err.end]
        return ids


def _unsaid(text: str, said: str) -> str:
    """What of `text` is still to be said; `said` is its beginning, unless a decoder looks behind a token."""
    if text.startswith(said):
        return text[len(said) :]
    return text[next((at for at, (new, old) in enumerate(zip(text, said, strict=False)) if new != old), len(text)) :]


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer of a bundle. Raises BundleError when it has none."""
    if TOKENIZER_FILE not in bundle.manifest.files:
        raise BundleError(f"{bundle.path} has no {TOKENIZER_FILE}: its checkpoint had none; it cannot be asked")
    return Tokenizer(bundle.file(TOKENIZER_FILE), bundle.manifest.prompt)
