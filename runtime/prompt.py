"""Text to token ids and back: the question inside the checkpoint's chat template, and the answer as it streams."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import BundleError, RequestError

if TYPE_CHECKING:
    from runtime.bundle import Bundle, PromptInfo

QUESTION = "{question}"
"""Stands for the user's text in `PromptInfo.suffix_text`."""

TOKENIZER_FILE = "tokenizer.json"


class Tokenizer:
    """The tokenizer of a bundle together with the chat template that its manifest holds."""

    def __init__(self, path: Path, prompt: PromptInfo) -> None:
        """Raises BundleError for a file that is no tokenizer, or not that of the manifest."""
        import tokenizers

        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as err:  # the tokenizers library raises nothing narrower
            raise BundleError(f"{path} cannot be read as a tokenizer: {err}; export again") from err
        if prompt.suffix_text is None or QUESTION not in prompt.suffix_text:
            raise BundleError(f"{path.parent} has no chat template: its checkpoint had none; it cannot be asked")
        image = prompt.special_ids.get("image")
        token = None if image is None else self._tokenizer.id_to_token(image)
        if image is None or token is None:
            raise BundleError(f"{path} has no image token {image}; it belongs to another model")
        self._image_id, self._image, self._suffix = image, str(token), prompt.suffix_text
        added = self._tokenizer.get_added_tokens_decoder().values()
        self._special = sorted({token.content for token in added if token.special} | {self._image}, key=len)

    def question_ids(self, question: str) -> list[int]:
        """The ids behind the image: what the template writes there, with the question in its place.

        Raises RequestError for an empty question, text that is no Unicode, a second image, or a special token.
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
        for token in self._special:
            if token in question:
                raise RequestError(f"the question holds the special token {token!r}, which only the template may write")
        # Behind the image token, as in the whole conversation: some tokenizers treat the start of a text specially.
        text = self._image + self._suffix.replace(QUESTION, question)
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids[ids.index(self._image_id) + 1 :]

    def text(self, ids: Iterable[int]) -> Iterator[str]:
        """The answer piece by piece; a character that takes several tokens comes out when it is whole.

        What is left of one at the end comes out as the replacement character, as when all is decoded at once.
        """
        from tokenizers.decoders import DecodeStream

        stream: Any = DecodeStream(skip_special_tokens=True)
        seen, length = [], 0
        for token in ids:
            seen.append(token)
            piece = stream.step(self._tokenizer, token)
            if piece:
                length += len(piece)
                yield piece
        rest = self._tokenizer.decode(seen, skip_special_tokens=True)[length:]
        if rest:
            yield rest


def open_tokenizer(bundle: Bundle) -> Tokenizer:
    """The tokenizer of a bundle. Raises BundleError when it has none."""
    if TOKENIZER_FILE not in bundle.manifest.files:
        raise BundleError(f"{bundle.path} has no {TOKENIZER_FILE}: its checkpoint had none; it cannot be asked")
    return Tokenizer(bundle.file(TOKENIZER_FILE), bundle.manifest.prompt)
