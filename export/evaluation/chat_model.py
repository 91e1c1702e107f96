"""A checkpoint of transformers with its processor and chat template: texts with images in, answers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from export.evaluation.pruned_model import PrunedModel
from export.evaluation.views import LAYOUTS, OF_ANY_SIZE
from export.families import family_of, known_model
from pruning import DEFAULT_METHOD, METHODS
from runtime.errors import CheckpointError, PruneportError, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

UNPRUNED = "none"
IMAGE_MARK = "<image>"
"""Stands in a text for the next image; a text without any has its images in front."""
MOST_TOKENS = 1024
DTYPES: Mapping[str, torch.dtype | str] = {
    "auto": "auto",
    **dict.fromkeys(("float32", "fp32"), torch.float32),
    **dict.fromkeys(("float16", "fp16"), torch.float16),
    **dict.fromkeys(("bfloat16", "bf16"), torch.bfloat16),
}


class ChatModel:
    """LLaVA-1.5, LLaVA-NeXT or one of Qwen's by transformers' own code, unpruned or pruned by one method.

    Photos are prepared by Pillow, as `pruneport eval` and the papers do it, whatever else is installed.

    Attributes:
        model: transformers' model.
        processor: its processor.
        pruned: what drops image tokens; None where nothing does.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        method: str | None = None,
        keep: int | float | str | None = None,
        cut: int | None = None,
        dtype: str = "auto",
        device: torch.device | str = "cpu",
        attn_implementation: str | None = None,
        system_prompt: str | None = None,
        revision: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        """Loads a folder or a checkpoint of the hub; `keep` and `cut` as in `PrunedModel`.

        `method` None is VLM-Pruner where `keep` is given, and nothing is pruned without; `none` prunes nothing.
        `dtype` auto is that of the files. `system_prompt` None is that of `pruneport export --model` for models that
        it knows, and what the chat template does for others. `min_pixels` and `max_pixels` are Qwen's.

        Raises RequestError for arguments that contradict each other or are not known, CheckpointError for what
        transformers cannot load.
        """
        chosen = _method(method, keep)
        if dtype not in DTYPES:
            raise RequestError(f"dtype={dtype} is not known; allowed: {', '.join(DTYPES)}")
        if attn_implementation is None and chosen is not None and "attention" in METHODS[chosen].needs:
            attn_implementation = "eager"
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

        source: dict[str, Any] = {} if revision is None else {"revision": revision}
        pixels = {name: value for name, value in (("min_pixels", min_pixels), ("max_pixels", max_pixels)) if value}
        try:
            config: Any = AutoConfig.from_pretrained(pretrained, **source)
            if config.model_type not in LAYOUTS:
                raise RequestError(
                    f"pretrained={pretrained} is a model of type {config.model_type!r}; allowed: {', '.join(LAYOUTS)}"
                )
            if pixels and config.model_type not in OF_ANY_SIZE:
                raise RequestError(
                    f"{', '.join(pixels)}: only {', '.join(OF_ANY_SIZE)} take it, and this is {config.model_type}"
                )
            load: Any = AutoProcessor.from_pretrained
            self.processor: Any = load(pretrained, backend="pil", **source, **pixels)
            loaded: Any = AutoModelForImageTextToText.from_pretrained(
                pretrained, dtype=DTYPES[dtype], attn_implementation=attn_implementation, **source
            )
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(
                f"pretrained={pretrained} cannot be loaded by transformers: {' '.join(str(error).split())[:400]}; "
                "give a folder in Hugging Face's layout or a name of the hub"
            ) from error
        self.model: Any = loaded.to(device).eval()
        self._system = known_system_prompt(config) if system_prompt is None else system_prompt
        self.pruned = (
            None if chosen is None or keep is None else PrunedModel(self.model, method=chosen, keep=keep, cut=cut)
        )

    def answer(self, text: str, images: Sequence[Image], settings: Mapping[str, Any]) -> str:
        """Asks with images in their places and returns the answer, up to the first of its `until`, stripped.

        Of the settings of generation those are taken that lmms-eval's tasks share: max_new_tokens, do_sample,
        temperature, top_p, num_beams and until. Raises RequestError for images that do not match their marks.
        """
        inputs = self.inputs(text, images)
        sampled = bool(settings.get("temperature")) and settings.get("do_sample", True)
        generation = {
            "max_new_tokens": settings.get("max_new_tokens", MOST_TOKENS),
            "num_beams": settings.get("num_beams") or 1,
            "do_sample": sampled,
            "temperature": settings["temperature"] if sampled else None,
            "top_p": settings.get("top_p") if sampled else None,
            "top_k": None,
            "pad_token_id": self._pad_id(),
        }
        if self.pruned is not None:
            ids = self.pruned.generate(inputs, **generation)
        else:
            with torch.no_grad():
                ids = self.model.generate(**inputs, **generation)[:, inputs["input_ids"].shape[1] :]
        said: str = self.processor.batch_decode(ids, skip_special_tokens=True)[0]
        return until(said, settings.get("until"))

    def inputs(self, text: str, images: Sequence[Image]) -> dict[str, Any]:
        """What the model is given: the chat template's ids (1, T), the pixels, and what goes with them."""
        messages: list[dict[str, Any]] = [{"role": "user", "content": interleaved(text, images)}]
        if self._system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self._system}]})
        made = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        at = {name: value.to(self.model.device) for name, value in made.items()}
        # Only pixels have the model's dtype: ids and sizes are whole numbers.
        return {name: value.to(self.model.dtype) if value.is_floating_point() else value for name, value in at.items()}

    def _pad_id(self) -> int | None:
        """Any id for padding that never comes, so that transformers need not warn of its own choice."""
        named = self.model.generation_config.eos_token_id
        first: int | None = named[0] if isinstance(named, list) else named
        return first


def _method(method: str | None, keep: int | float | str | None) -> str | None:
    """The method that is meant, or None for nothing pruned; RequestError where the two contradict each other."""
    if method == UNPRUNED:
        if keep is not None:
            raise RequestError(f"method={UNPRUNED} prunes nothing, and keep={keep} asks for it; leave one of them out")
        return None
    if keep is None:
        if method is not None:
            raise RequestError(f"method={method} needs keep, the number of image tokens that stay; give keep=64, say")
        return None
    chosen = DEFAULT_METHOD if method is None else method
    if chosen not in METHODS:
        raise RequestError(f"method={chosen} is not known; allowed: {UNPRUNED}, {', '.join(METHODS)}")
    return chosen


def known_system_prompt(config: Any) -> str | None:
    """The system prompt of the model of `--model` that has the same sizes; None where none has or it has none."""
    family = family_of(config.model_type)
    if family is None:
        return None
    with suppress(PruneportError):  # a layout or a size that is not exported can be evaluated nevertheless
        entry = known_model(family, family.geometry(config.to_dict()))
        return entry.system_prompt if entry else None
    return None


def interleaved(text: str, images: Sequence[Image]) -> list[dict[str, Any]]:
    """Puts each image in the place of its mark, or all in front of a text without marks: a message's content."""
    parts = text.split(IMAGE_MARK)
    if len(parts) == 1:
        parts = ["" for _ in images] + parts
    if len(parts) != len(images) + 1:
        raise RequestError(
            f"the text has {len(parts) - 1} marks {IMAGE_MARK} for {len(images)} images; one for each, or none"
        )
    content: list[dict[str, Any]] = []
    for number, part in enumerate(parts):
        if number:
            content.append({"type": "image", "image": images[number - 1].convert("RGB")})
        if part.strip():
            content.append({"type": "text", "text": part})
    return content


def until(said: str, stops: str | Sequence[str] | None) -> str:
    """Cuts an answer off at the first place where any of `stops` begins, and strips it."""
    texts = [stops] if isinstance(stops, str) else list(stops or ())
    ends = [at for stop in texts if stop and (at := said.strip().find(stop)) >= 0]
    return said.strip()[: min(ends, default=None)].strip()
