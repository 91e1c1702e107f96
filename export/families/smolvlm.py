"""The family SmolVLM2: SigLIP's tower, patches side by side in few image tokens, and a LLaMA decoder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.families.desktop import DecoderDesktop, eager, filled_in_turn
from export.families.family import (
    Checkpoint,
    ModelEntry,
    PlainFamily,
    Seen,
    TensorEntry,
    decoder_tensors,
    linear,
    tensor_entries,
)
from export.families.image_settings import COMMON, read_settings
from export.families.llava.config import (
    SIGLIP_WHEN_ABSENT,
    PlainGeometry,
    VisionGeometry,
    decisive,
    decoder_geometry,
    decoder_section,
    ties_embeddings,
)
from export.families.llava.tensors import vision_tensors
from export.settings import LARGEST_SIZE, one_of, section, shown, whole, without_nulls
from runtime.errors import CheckpointError, RequestError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from runtime.bundle import ImageInfo

_TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size")
_DECODER = (*_TOWER[:4], "num_key_value_heads", "max_position_embeddings", "rope_theta")
# What Hugging Face's config classes assume for a key that config.json leaves out.
_TOP: Mapping[str, Any] = {"image_token_id": 128257, "tie_word_embeddings": False, "scale_factor": 2}
_VISION: Mapping[str, Any] = {
    **{key: value for key, value in SIGLIP_WHEN_ABSENT.items() if key != "vision_use_head"},
    **dict(zip(_TOWER, (1152, 3072, 12, 16, 224, 32), strict=True)),
    "model_type": "smolvlm_vision",
}
_PIXELS: Mapping[str, Any] = {**COMMON, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 1}
_STORED: Mapping[str, str] = {
    "tower.layers.": "model.vision_model.encoder.layers.",
    "tower.projector.linear_1.": "model.connector.modality_projection.proj.",
    "tower.": "model.vision_model.",
    "lm_head.": "lm_head.",
    "": "model.text_model.",
}
_REMEDY = "give a checkpoint of SmolVLM2 in Hugging Face's layout"


class SmolVlm(PlainFamily[PlainGeometry]):
    """SmolVLM2 (arXiv 2504.05299): a prefix with marks of the processor at its end, one square image, the question."""

    name = model_type = "smolvlm"
    built_parts = "model.vision_model.", "model.connector.", "model.text_model.", "lm_head."
    image_marks = "<fake_token_around_image><global-img>", "<fake_token_around_image>"

    @property
    def models(self) -> tuple[ModelEntry, ...]:
        """What `--model` can name of it."""
        return _MODELS

    def resized(self, size: tuple[int, int]) -> SmolVlm:
        """Raises RequestError: larger photos are tiles with text between them, which no frame of the graphs has."""
        raise RequestError(
            "image_size is not for SmolVLM2: its processor writes text between the tiles of a larger photo, and the "
            "graphs know one image without text inside; leave --image-size out, and photos are seen whole"
        )

    def geometry(self, config: Mapping[str, Any]) -> PlainGeometry:
        """Reads the sizes; CheckpointError when it is no config.json of the family, or contradicts itself."""
        config = without_nulls(config)
        one_of("config.json: model_type", config.get("model_type"), (self.model_type,), _REMEDY)
        if not section(config, "text_config"):
            raise CheckpointError("config.json has no text_config, which says the decoder's sizes; download it again")
        top, vision = {**_TOP, **config}, {**_VISION, **section(config, "vision_config")}
        one_of("config.json: vision_config.model_type", vision["model_type"], (_VISION["model_type"],), _REMEDY)
        text = decoder_section(config, ("llama",), "SmolVLM2")
        return PlainGeometry(
            vision=VisionGeometry.from_section(vision, class_token=False),
            text=decoder_geometry(text),
            merge=whole("config.json: scale_factor", top["scale_factor"], 1, LARGEST_SIZE),
            image_token_id=whole("config.json: image_token_id", top["image_token_id"], 0, 2**31 - 1),
            tied_embeddings=ties_embeddings(top, text),
        )

    def tensors(self, geometry: PlainGeometry) -> Mapping[str, TensorEntry]:
        """Lists every tensor of the whole model by its canonical name."""
        projector = linear("tower.projector.linear_1", geometry.joined, geometry.text.hidden, bias=False)
        shapes = (*vision_tensors(geometry.vision), *projector, *decoder_tensors(geometry.text))
        return tensor_entries(shapes, _STORED, tied=geometry.tied_embeddings)

    def settings(self, folder: Path | None, size: int) -> dict[str, Any]:
        """The image settings in `folder` for `size` pixels, as published without any; CheckpointError for others'."""
        settings, given, where = read_settings(folder, "SmolVLMImageProcessor", _PIXELS, _REMEDY)
        edge = {"longest_edge": size}
        if given.get("max_image_size", edge) != edge:
            raise CheckpointError(
                f"{where}: max_image_size is {shown(given['max_image_size'])}, but the tower takes {shown(edge)}; "
                "the files belong to different models: download them again"
            )
        return {**settings, "max_image_size": edge}

    def image(self, folder: Path | None, geometry: PlainGeometry) -> ImageInfo:
        """How a photo becomes pixel_values: squeezed into the tower's square, whatever its shape."""
        from runtime.bundle import ImageInfo

        size = geometry.vision.image_size
        return ImageInfo.from_preprocessor({**self.settings(folder, size), "size": size, "do_center_crop": False})

    def tower(self, geometry: PlainGeometry) -> nn.Module:
        """pixel_values (1, 3, H, W) -> Seen: SigLIP's tower, its last norm, and one linear layer."""
        from export.blocks.projector import Projector
        from export.families.llava.tower import ClipTower

        projector = Projector(width=geometry.joined, out=geometry.text.hidden, activation=None, bias=False)
        return ClipTower(geometry.vision, projector=projector, merge=geometry.merge, post_norm=True)

    def desktop(self, checkpoint: Checkpoint, device: torch.device | str) -> SmolDesktop:
        """The same model by transformers' own modules."""
        return SmolDesktop(checkpoint, device)


class SmolDesktop(DecoderDesktop):
    """The tower by transformers' whole one, of which each part is filled when it runs, and the decoder."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str) -> None:
        """Raises CheckpointError for a config.json that transformers does not take."""
        from transformers import SmolVLMConfig

        self._config = eager(SmolVLMConfig, decisive(checkpoint.config, _TOP, _VISION, "llama"))
        super().__init__(checkpoint, device, self._config.text_config)

    def pixels(self, photo: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(height, width, 3) -> (1, 3, H, W), by transformers' own image processor, which squeezes in one step."""
        import numpy as np
        from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

        settings = SMOLVLM.settings(self._checkpoint.folder, self._checkpoint.geometry.pixel_values[2])
        processor = SmolVLMImageProcessorPil(**{**settings, "do_resize": False, "do_image_splitting": False})
        prepared = processor(photo, input_data_format="channels_last", return_tensors="np")
        return np.asarray(prepared["pixel_values"][0], dtype=np.float32)

    def see(self, pixel_values: Tensor) -> Seen:
        """(1, 3, H, W) -> features (1, N, D), and the last layer's keys (1, N, merge * merge * Dv)."""
        import torch
        from transformers.models.smolvlm import modeling_smolvlm

        made: Any = modeling_smolvlm
        with torch.device("meta"):
            tower = made.SmolVLMVisionTransformer(self._config.vision_config)
            connector = made.SmolVLMConnector(self._config)
        keys: list[Tensor] = []
        tower.encoder.layers[-1].self_attn.k_proj.register_forward_hook(lambda _part, _in, out: keys.append(out))
        filled_in_turn(tower, lambda part, path: self._filled(part, f"tower.{path.removeprefix('encoder.')}"))
        self._filled(connector.modality_projection.proj, "tower.projector.linear_1")
        features = connector(tower(pixel_values).last_hidden_state)
        return Seen(features, connector.pixel_shuffle(keys[0], self._config.scale_factor))


SMOLVLM = SmolVlm()


def _entry(size: str, hub: str, merge: int, tower: tuple[int, ...], decoder: tuple[float, ...]) -> ModelEntry:
    vision, text = dict(zip(_TOWER, tower, strict=True)), dict(zip(_DECODER, decoder, strict=True))
    ids = {"vocab_size": 49280, "bos_token_id": 1, "eos_token_id": 49279}
    tokens = (tower[4] // tower[5] // merge) ** 2
    return ModelEntry(
        family=SMOLVLM,
        name=f"smolvlm2-{size}",
        summary=f"SmolVLM2 {size.upper()}: {tokens} image tokens, {decoder[2]} layers of width {decoder[0]}",
        hub_id=f"HuggingFaceTB/SmolVLM2-{hub}",
        config={
            "model_type": "smolvlm",
            "image_token_id": 49190,
            "scale_factor": merge,
            "vision_config": {**_VISION, **vision},
            "text_config": {"model_type": "llama", "rms_norm_eps": 1e-5, **ids, **text},
        },
        prefix_tokens=5,  # <|im_start|>User: and the two marks
    )


_MODELS = (
    _entry("256m", "256M-Video-Instruct", 4, (768, 3072, 12, 12, 512, 16), (576, 1536, 30, 9, 3, 8192, 1e5)),
    _entry("500m", "500M-Video-Instruct", 4, (768, 3072, 12, 12, 512, 16), (960, 2560, 32, 15, 5, 8192, 1e5)),
    _entry("2.2b", "2.2B-Instruct", 3, (1152, 4304, 27, 16, 384, 14), (2048, 8192, 24, 32, 32, 16384, 273768.0)),
)
