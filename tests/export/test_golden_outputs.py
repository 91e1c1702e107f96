"""Golden outputs equal transformers' whole model, although they are made one layer at a time."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from export.checkpoints import FolderCheckpoint, RandomCheckpoint, open_checkpoint
from export.families import MODELS
from export.families.family import ModelEntry
from export.families.llava.config import LlavaGeometry
from export.golden import _Decoder, device_words, golden_device, make_golden
from export.models.pocket import POCKET, pocket_folder
from export.models.prompt import read_prompt, sample_text
from export.weights import Followed
from pruning import PruneSpec, reference
from pruning.vlm_pruner.settings import Settings
from runtime.errors import ExportError, RequestError
from tests.tiny_llava import TINY, write_tiny


def _pixels(side: int) -> np.ndarray:
    return np.random.default_rng(4).standard_normal((1, 3, side, side), dtype=np.float32)


@pytest.mark.parametrize("model", ["pocket", "tiny"])
def test_golden_is_the_whole_model_cut_at_the_layer(model: str, tmp_path: Path) -> None:
    from transformers import DynamicCache, LlavaForConditionalGeneration

    entry: ModelEntry = POCKET if model == "pocket" else TINY
    folder = pocket_folder() if model == "pocket" else write_tiny(tmp_path)
    checkpoint = FolderCheckpoint(folder, entry)
    pixels = _pixels(entry.geometry.pixel_values[-1])
    golden = make_golden(checkpoint, entry, None, pixel_values=pixels)

    whole = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    prefix = read_prompt(checkpoint.folder, checkpoint.geometry, entry).prefix_ids
    ids = torch.tensor([[*prefix, *[entry.geometry.image_token_id] * entry.geometry.image_tokens]])
    config: Any = whole.config.text_config
    cache: Any = DynamicCache(config=config)
    with torch.no_grad():
        out = whole(
            input_ids=ids, pixel_values=torch.from_numpy(pixels), past_key_values=cache, output_hidden_states=True
        )
        features = whole.model.get_image_features(torch.from_numpy(pixels)).pooler_output[0]
    np.testing.assert_allclose(golden["vision_encoder.out.hidden"], out.hidden_states[2].numpy(), atol=2e-5)
    assert golden["vision_encoder.out.positions"].tolist() == [list(range(ids.shape[1]))]
    for index in range(2):
        cached = cache.layers[index]
        np.testing.assert_allclose(golden[f"vision_encoder.out.key_{index}"], cached.keys.numpy(), atol=2e-5)
        np.testing.assert_allclose(golden[f"vision_encoder.out.value_{index}"], cached.values.numpy(), atol=2e-5)
    at_projector = make_golden(checkpoint, entry, None, cut=0, framed=False, pixel_values=pixels)
    np.testing.assert_allclose(at_projector["vision_encoder.out.image_features"][0], features.numpy(), atol=2e-5)


@pytest.mark.parametrize("cut", [2, 0])
def test_pruned_golden_is_the_papers_loop_on_the_unpruned(cut: int) -> None:
    checkpoint = RandomCheckpoint(TINY, seed=2)
    spec = PruneSpec(grid=(4, 4), keep=6, settings=Settings(pivots=2, token_batch=3))
    pixels = _pixels(58)
    full, pruned = (
        make_golden(checkpoint, TINY, chosen, cut=cut, framed=cut > 0, pixel_values=pixels) for chosen in (None, spec)
    )
    assert pruned["kept_order"].shape == pruned["kept_margin"].shape == (6,)
    assert pruned["marks"].tolist() == pruned["kept_order"][:2].tolist()
    assert sorted(pruned["kept_order"].tolist()) == pruned["kept_indices"].tolist()
    if cut:
        prefix = 7
        keys = torch.from_numpy(full["vision_encoder.out.key_1"])[0, :, prefix:].permute(1, 0, 2).reshape(1, 16, -1)
        hidden = torch.from_numpy(full["vision_encoder.out.hidden"])[:, prefix:]
        tokens, indices = reference.prune(keys, hidden, spec)
        out = pruned["vision_encoder.out.hidden"]
        np.testing.assert_array_equal(out[:, prefix:], tokens.numpy())
        np.testing.assert_array_equal(out[:, :prefix], full["vision_encoder.out.hidden"][:, :prefix])
        expected = [*range(prefix), *(prefix + indices[0]).tolist()]
        assert pruned["vision_encoder.out.positions"].tolist() == [expected]
        for name in ("key_0", "value_0", "key_1", "value_1"):  # layers before the pruning see every token
            np.testing.assert_array_equal(pruned[f"vision_encoder.out.{name}"], full[f"vision_encoder.out.{name}"])
    else:
        assert pruned["vision_encoder.out.image_features"].shape == (1, 6, 48)
        assert pruned["vision_encoder.out.kept_indices"].tolist() == [pruned["kept_indices"].tolist()]


def test_keys_at_the_projector_are_those_of_the_layer_that_made_the_features(tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    folder = write_tiny(tmp_path)
    whole = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    seen: list[torch.Tensor] = []
    tower = whole.model.vision_tower
    # Three layers, and the features are the output of the second.
    tower.encoder.layers[1].self_attn.k_proj.register_forward_hook(lambda _m, _i, out: seen.append(out))
    pixels = _pixels(58)
    with torch.no_grad():
        features = whole.model.get_image_features(torch.from_numpy(pixels)).pooler_output[0]
    spec = PruneSpec(grid=(4, 4), keep=5, settings=Settings(pivots=2, token_batch=3))
    _, indices = reference.prune(seen[0][:, 1:], features[None], spec)
    golden = make_golden(FolderCheckpoint(folder, TINY), TINY, spec, cut=0, framed=False, pixel_values=pixels)
    assert golden["kept_indices"].tolist() == indices[0].tolist()


def test_golden_needs_an_image_of_the_towers_size() -> None:
    with pytest.raises(ExportError, match=r"\(1, 3, 58, 58\), got \(1, 3, 56, 56\)"):
        make_golden(RandomCheckpoint(TINY, seed=0), TINY, None, pixel_values=_pixels(56))


def test_golden_never_shares_code_with_the_graphs(root: Path) -> None:
    files = [root / "export" / "golden.py", *(root / "export" / "families").rglob("desktop.py")]
    assert len(files) > 2
    for path in files:
        imports = [line for line in path.read_text().splitlines() if line.lstrip().startswith(("import ", "from "))]
        assert imports
        assert not [line for line in imports if re.search(r"export\.(graphs|blocks|weights)", line)], path


def test_golden_device_is_one_that_torch_has() -> None:
    assert golden_device() == golden_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert golden_device("cpu") == device_words("cpu") == "cpu"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has torch say that there is a GPU; it computes nothing."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Toaster 9000")


@pytest.mark.usefixtures("gpu")
def test_a_gpu_is_taken_where_it_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(*shape: int, device: str) -> torch.Tensor:
        assert device == "cuda"
        return torch.full(shape, 1.0)

    monkeypatch.setattr(torch, "ones", ones)
    assert golden_device("auto") == golden_device("cuda") == "cuda"
    assert golden_device("cpu") == "cpu"
    assert device_words("cuda") == "cuda (Toaster 9000; TF32 off)"


@pytest.mark.usefixtures("gpu")
def test_a_gpu_that_computes_nothing_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*shape: int, device: str) -> NoReturn:
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")

    monkeypatch.setattr(torch, "ones", refuse)
    assert golden_device("auto") == "cpu"
    with pytest.raises(
        RequestError, match=r"Toaster 9000 refuses a product of 8 x 8 \(CUDA error: no kernel image is "
    ):
        golden_device("cuda")


@pytest.mark.parametrize(
    ("made_for", "message"),
    [
        (
            None,
            rf"torch {re.escape(torch.__version__)} is built without CUDA; allowed: auto, cpu, cuda; take --reference",
        ),
        (
            "13.0",
            r"built for CUDA 13\.0, finds no GPU with a driver for it; allowed: auto, cpu, cuda; take --reference",
        ),
    ],
)
def test_a_gpu_that_is_not_there(made_for: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", made_for)
    with pytest.raises(RequestError, match=f"^reference=cuda needs a GPU that torch can compute on: .*{message} cpu"):
        golden_device("cuda")


def test_random_models_of_full_width_stay_sane_for_one_tower_layer() -> None:
    checkpoint = open_checkpoint("llava-1.5-7b", weights="random")
    tensor = checkpoint.tensor("tower.layers.0.mlp.fc1.weight").float()
    assert abs(float(tensor.std()) * 1024**0.5 - 1.0) < 0.01
    assert LlavaGeometry.from_config(MODELS["llava-1.5-7b"].config).tower_layers == 23


@pytest.mark.parametrize(("free_bytes", "fits"), [(10**9, True), (10**4, False)])
def test_layers_stay_on_a_gpu_that_has_room(free_bytes: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's memory counts there, not the machine's."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_bytes, 10**12))
    checkpoint, gpu = RandomCheckpoint(TINY, seed=0), torch.device("cuda", 0)
    desktop = TINY.family.desktop(checkpoint, "cpu")
    decoder = _Decoder(desktop, checkpoint, 2, gpu, lambda name, module: None)
    assert decoder._fits() is fits


def test_layers_that_do_not_fit_together_are_read_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Image and text take the same layer in turns; with all of them in memory the numbers are the same."""
    checkpoint = Followed(RandomCheckpoint(TINY, seed=0))
    read: list[int] = []
    checkpoint.seen = read.append
    text = sample_text(None, TINY.geometry, TINY, tokens=9)
    pixels = np.random.default_rng(0).standard_normal(TINY.geometry.pixel_values).astype(np.float32)
    spec = PruneSpec(grid=TINY.geometry.grid, keep=4)

    def made(*, fits: bool) -> dict[str, Any]:
        monkeypatch.setattr("export.memory.fits_beside", lambda size: fits)
        return make_golden(checkpoint, TINY, spec, pixel_values=pixels, text=text)

    streamed = made(fits=False)
    layers = range(TINY.geometry.text.layers)
    in_layers = sum(math.prod(TINY.tensors[name].shape) for name in TINY.tensors if name.startswith("layers."))
    below = sum(math.prod(TINY.tensors[n].shape) for n in TINY.tensors if n.startswith(("layers.0.", "layers.1.")))
    others = [math.prod(TINY.tensors[name].shape) for name in TINY.tensors if not name.startswith("layers.")]
    assert len(layers) > 2
    # Those below the cut serve the image alone, then come again for the text.
    assert sum(read) <= in_layers + below + sum(others)
    held = made(fits=True)
    assert "answer.ids" in held.keys() - streamed.keys()
    for name, array in streamed.items():
        np.testing.assert_array_equal(array, held[name], err_msg=name)
