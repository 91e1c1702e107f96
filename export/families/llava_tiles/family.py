"""The families LLaVA-NeXT and LLaVA-OneVision, which see a photo whole and in tiles; an entry per known model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.families.family import Checkpoint, Desktop, Frame, ModelEntry, PlainFamily, TensorEntry
from export.families.llava.config import (
    NEXT_KIND,
    ONEVISION_KIND,
    SIGLIP_WHEN_ABSENT,
    VISION_WHEN_ABSENT,
    Kind,
    with_image_token,
)
from export.families.llava.family import VICUNA_SYSTEM
from export.families.llava.tensors import other_layout, stray, tensors
from export.families.llava_tiles.config import TiledGeometry
from export.families.llava_tiles.preprocessor import image_info
from runtime.errors import ExportError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from runtime.bundle import ImageInfo

_HEADS = ("vision_tower.head.", "vision_tower.vision_model.head.")


@dataclass(frozen=True)
class LlavaTiles(PlainFamily[TiledGeometry]):
    """LLaVA-NeXT (LLaVA-1.6) or LLaVA-OneVision (arXiv 2408.03326) at one size of image, (height, width) in pixels.

    The models take photos of any size: a view of the whole, then tiles, of which there are as many as a photo's size
    asks for. A graph is static, so that one size is chosen when it is made. How a photo of that size lies in tiles is
    then the same for all, and photos of another shape are squeezed into it. Without a size the whole view is all.
    Each prompt is a prefix, one image, whose rows of tiles end with a token that no method chooses, and the question.
    """

    name: str
    kind: Kind
    image_size: tuple[int, int] | None = None

    @property
    def model_type(self) -> str:
        """What a config.json of it calls itself."""
        return self.kind.model_type

    @property
    def class_token(self) -> bool:
        """Whether its tower is CLIP's; SigLIP's has none."""
        return self.kind is NEXT_KIND

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        """What `--model` can name of it."""
        return tuple(entry for entry in _MODELS if entry.family == self)

    def resized(self, size: tuple[int, int]) -> LlavaTiles:
        """The same for photos of (height, width) pixels, in tiles."""
        return replace(self, image_size=size)

    def whole_config(self, folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Completes a config.json by the image token's id, which some leave to the tokenizer."""
        return with_image_token(folder, config)

    def geometry(self, config: Mapping[str, Any]) -> TiledGeometry:
        """Reads the sizes; CheckpointError when it is no config.json of the family, or contradicts itself."""
        return TiledGeometry.at(config, self.kind, self.image_size)

    def tensors(self, geometry: TiledGeometry) -> Mapping[str, TensorEntry]:
        """Lists every tensor of the whole model by its canonical name."""
        return tensors(geometry)

    def stray(self, stored: str) -> str | None:
        """Says what to do about a stored tensor that no model of the family has; None for no part of a model."""
        # SigLIP's pooling head, which no graph needs.
        head = not self.class_token and stored.removeprefix("model.").startswith(_HEADS)
        return None if head else stray(stored)

    def other_layout(self, stored: Sequence[str]) -> str | None:
        """Recognises what LLaVA's authors publish."""
        return other_layout(stored)

    def image(self, folder: Path | None, geometry: TiledGeometry) -> ImageInfo:
        """How a photo becomes pixel_values: from the folder's files, or as published, at the size of the graph."""
        return image_info(folder, self.model_type, geometry)

    def frame(self, prefix_ids: Sequence[int], geometry: TiledGeometry) -> Frame:
        """Lays out prefix and image: the whole view row by row, then the tiles, each row of which is ended."""
        # The view that is alone is ended as a whole.
        lines, width = geometry.grid if geometry.overview else (1, geometry.image_tokens)
        first = len(prefix_ids)
        start = first + geometry.image_tokens - lines * width
        after = start + lines * (width + 1)
        breaks = range(start + width, after, width + 1)
        return Frame(
            ids=(*prefix_ids, *(geometry.image_token_id for _ in range(after - first))),
            slots=tuple(at for at in range(first, after) if at not in breaks),
            positions=(tuple(range(after)),),
            places=tuple(
                (view, y, x)
                for view, (rows, columns) in enumerate(geometry.grids)
                for y in range(rows)
                for x in range(columns)
            ),
            first_text=after,
            breaks=tuple(breaks),
        )

    def tower(self, geometry: TiledGeometry) -> nn.Module:
        """pixel_values (V, 3, H, W) -> Seen: the tower over all views, the projector, and row ends."""
        from export.families.llava_tiles.tower import TiledTower

        return TiledTower(geometry)

    def desktop(self, checkpoint: Checkpoint, device: torch.device | str) -> Desktop:
        """The same model by transformers' own modules."""
        from export.families.llava_tiles.desktop import TiledDesktop

        return TiledDesktop(checkpoint, self.geometry(checkpoint.config), device, self.kind, self.image_size)

    def hub_files(self, checkpoint: Checkpoint, *, image_token: str, keep: int) -> dict[str, dict[str, Any]]:
        """Raises ExportError: Hugging Face's runtimes work out an image's tokens from the photo's size."""
        raise ExportError(
            f"no Hugging Face runtime takes a pruned image of {self.name}: they work out its tokens from the photo's "
            "size; leave --layout out"
        )


LLAVA_NEXT = LlavaTiles("llava-next", NEXT_KIND)
LLAVA_ONEVISION = LlavaTiles("llava-onevision", ONEVISION_KIND)

_MODELS: tuple[ModelEntry, ...] = (
    ModelEntry(
        family=LLAVA_ONEVISION,
        name="llava-onevision-0.5b",
        summary="LLaVA-OneVision with Qwen2 0.5B: 729 image tokens, more with tiles, 24 layers of width 896",
        hub_id="llava-hf/llava-onevision-qwen2-0.5b-ov-hf",
        config={
            "model_type": "llava_onevision",
            **{key: value for key, value in ONEVISION_KIND.top.items() if value is not None},
            "vision_config": dict(SIGLIP_WHEN_ABSENT),
            "text_config": {
                "model_type": "qwen2",
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "num_key_value_heads": 2,
                "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-6,
                "vocab_size": 152000,
                "bos_token_id": 151643,
                "eos_token_id": 151645,
                "rope_theta": 1000000.0,
                "tie_word_embeddings": True,
            },
        },
        # <|im_start|>user and a blank: what the published chat template puts before the image.
        prefix_tokens=3,
    ),
    ModelEntry(
        family=LLAVA_NEXT,
        name="llava-next-7b",
        summary="LLaVA-NeXT with Vicuna 7B: 576 image tokens, more with tiles, 32 layers of width 4096",
        hub_id="llava-hf/llava-v1.6-vicuna-7b-hf",
        config={
            "model_type": "llava_next",
            **{key: value for key, value in NEXT_KIND.top.items() if value is not None},
            "image_seq_length": 576,
            "vision_config": dict(VISION_WHEN_ABSENT),
            "text_config": {
                "model_type": "llama",
                "hidden_size": 4096,
                "intermediate_size": 11008,
                "num_hidden_layers": 32,
                "num_attention_heads": 32,
                "max_position_embeddings": 4096,
                "rms_norm_eps": 1e-5,
                "vocab_size": 32064,
                "bos_token_id": 1,
                "eos_token_id": 2,
            },
        },
        system_prompt=VICUNA_SYSTEM,
    ),
)
