"""The contract of a family: what each in FAMILIES must do, and one of the tests' own that is unlike them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import export.families
import export.golden
from export import pipeline
from export.backends.xnnpack import XNNPACK
from export.checkpoints import RandomCheckpoint
from export.families import FAMILIES
from export.families.family import Family, Frame, ModelEntry
from export.families.llava_tiles.family import LlavaTiles
from export.families.qwen_vl.family import QwenVl
from export.families.smolvlm import SmolVlm
from export.golden import make_golden
from export.graphs.decoder import Context, build_text_graphs
from export.graphs.graph import Graph, Parts
from export.graphs.open_decoder import open_text_parts
from export.graphs.vision import build_vision_encoder
from export.models.prompt import SampleText, read_prompt
from export.progress import Progress
from export.request import Request, _method, paper_cut, plan
from pruning import PruneSpec
from runtime.bundle import OWN_LAYOUT, GraphInfo
from runtime.errors import RequestError
from runtime.golden import graph_inputs, output_key, steps
from runtime.image import preprocess
from runtime.text_graphs import IMAGE_PREFILL, TEXT_DECODER, TEXT_PREFILL, TOKEN_EMBEDDING, VISION_ENCODER
from tests.tiny_qwen import TINY_QWEN2_VL, TINY_QWEN3_VL, TINY_QWENS
from tests.tiny_smolvlm import TINY_SMOLVLM
from tests.tiny_tiles import TILED_NEXT, TILED_ONEVISION
from tests.wide_family import TINY_WIDE

ATOL = 1e-4
# None of these is an image token's id.
TEXT = SampleText(ids=(7, 11, 13, 19, 23, 8), question=(9, 4, 31))
# Greedy tokens that transformers is asked for.
ANSWER = 4


def test_attention_of_a_class_token_is_asked_only_of_towers_that_have_one() -> None:
    assert TINY_WIDE.family.class_token is False
    with pytest.raises(RequestError, match=f"class token, and the tower of {TINY_WIDE.name} has none; take one of: "):
        _method("visionzip", 0, TINY_WIDE, XNNPACK, pruned=True)
    assert _method("divprune", 0, TINY_WIDE, XNNPACK, pruned=True) == "divprune"


def _smallest(family: Family[Any]) -> ModelEntry:
    """The one that a test can hold whole: of a family whose models are all large, one that is made for tests."""
    small = {entry.family.name: entry for entry in (*TINY_QWENS, TILED_NEXT, TILED_ONEVISION, TINY_SMOLVLM)}
    return small.get(family.name) or min(
        family.models, key=lambda entry: entry.vision_parameter_count(0) + entry.text_parameter_count()
    )


PRODUCTS = [_smallest(family) for family in FAMILIES.values()]


def _name(entry: object) -> str:
    return entry.family.name if isinstance(entry, ModelEntry) else ""


every_family = pytest.mark.parametrize("entry", [*PRODUCTS, TINY_WIDE], ids=_name)
# In front of a layer, and behind the projector where the decoder is given nothing later.
every_cut = pytest.mark.parametrize(
    ("entry", "cut"),
    [
        pytest.param(entry, cut, id=f"{_name(entry)}-cut{cut}")
        for entry in (*PRODUCTS, TINY_WIDE)
        for cut in ((2, 0) if entry.geometry.least_cut == 0 else (entry.geometry.least_cut,))
    ],
)
# The tests' own family is exported with every change; a product's takes as long as its other exports. Some are made
# where their bundles' answers are compared (test_qwen_vl.py, test_smolvlm.py).
every_export = pytest.mark.parametrize(
    "entry",
    [
        pytest.param(each, marks=pytest.mark.slow)
        for each in (*PRODUCTS, TINY_WIDE)
        if each not in (TINY_QWEN2_VL, TINY_QWEN3_VL, TINY_SMOLVLM)
    ],
    ids=_name,
)


@pytest.fixture(scope="module")
def photo() -> NDArray[np.uint8]:
    """Blocks of colour, higher than wide."""
    blocks = np.random.default_rng(0).integers(0, 255, (20, 15, 3), dtype=np.uint8)
    return np.repeat(np.repeat(blocks, 20, axis=0), 20, axis=1)


@pytest.fixture
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the desktop answer in as many tokens as are compared."""
    monkeypatch.setattr(export.golden, "ANSWER_TOKENS", ANSWER)


def _pixels(entry: ModelEntry, photo: NDArray[np.uint8]) -> NDArray[np.float32]:
    return preprocess(photo, entry.family.image(None, entry.geometry))


def _frame(entry: ModelEntry) -> Frame:
    return entry.family.frame(read_prompt(None, entry.geometry, entry).prefix_ids, entry.geometry)


def _spec(entry: ModelEntry) -> PruneSpec:
    geometry = entry.geometry
    return PruneSpec(grid=geometry.grid, overview=geometry.overview, keep=max(geometry.image_tokens // 9, 7))


def _photo_inputs(entry: ModelEntry, ids: torch.Tensor, pixels: NDArray[np.float32]) -> dict[str, torch.Tensor]:
    """What transformers' whole model takes beside the ids, as its own processor hands it over."""
    if isinstance(entry.family, LlavaTiles):
        return {"pixel_values": torch.from_numpy(pixels)[None], "image_sizes": torch.tensor([entry.family.image_size])}
    if isinstance(entry.family, SmolVlm):
        return {"pixel_values": torch.from_numpy(pixels)[None]}  # the one view of one photo
    if not isinstance(entry.family, QwenVl):
        return {"pixel_values": torch.from_numpy(pixels)}
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    as_it_is: dict[str, Any] = {
        "do_resize": False,
        "do_rescale": False,
        "do_normalize": False,
        "input_data_format": "channels_first",
    }
    patch = entry.config["vision_config"]["patch_size"]
    made = Qwen2VLImageProcessorPil(patch_size=patch)(pixels[0], return_tensors="pt", **as_it_is)
    return {**made, "mm_token_type_ids": (ids == entry.geometry.image_token_id).int()}


def _transformers_model(entry: ModelEntry) -> Any:
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.for_model(**dict(entry.config))
    make: Any = AutoModelForImageTextToText.from_config
    return make(config, dtype=torch.float32, attn_implementation="eager").eval()


@every_family
def test_tensors_are_those_of_transformers_model(entry: ModelEntry) -> None:
    with torch.device("meta"):
        model = _transformers_model(entry)
    spelled = {spelling: name for name, tensor in entry.tensors.items() for spelling in tensor.stored}
    assert len(spelled) == sum(len(tensor.stored) for tensor in entry.tensors.values())
    theirs = {spelled[name]: tuple(value.shape) for name, value in model.named_parameters()}
    assert theirs == {name: tensor.shape for name, tensor in entry.tensors.items()}


@every_family
def test_graphs_read_all_that_is_needed_and_nothing_else(entry: ModelEntry) -> None:
    family, geometry = entry.family, entry.geometry
    read = {f"tower.{name}": value for name, value in family.tower(geometry).named_parameters()}
    for index in range(geometry.text.layers):
        read |= {f"layers.{index}.{name}": value for name, value in family.layer(geometry).named_parameters()}
    needed = {name: tensor.shape for name, tensor in entry.tensors.items() if tensor.needed}
    outside = {name: needed.pop(name) for name in ("embed_tokens.weight", "norm.weight", "lm_head.weight")}
    assert {name: tuple(value.shape) for name, value in read.items()} == needed
    hidden, vocab = geometry.text.hidden, geometry.text.vocab
    assert list(outside.values()) == [(vocab, hidden), (hidden,), (vocab, hidden)]
    assert {value.device.type for value in read.values()} == {"meta"}


def test_families_need_no_torch(root: Path) -> None:
    code = (
        "import sys\n"
        "from export.families import MODELS\n"
        "for entry in MODELS.values():\n"
        "    geometry = entry.geometry\n"
        "    assert entry.tensors and entry.family.image(None, geometry)\n"
        "    assert len(entry.family.frame([1, 2], geometry).slots) == geometry.image_tokens\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


@every_family
def test_config_calls_itself_what_the_family_says(entry: ModelEntry) -> None:
    assert entry.config["model_type"] == entry.family.model_type


@every_family
def test_frame_is_consistent(entry: ModelEntry) -> None:
    geometry = entry.geometry
    frame = entry.family.frame((1, 7, 9), geometry)
    assert frame.prefix_ids == (1, 7, 9)
    assert len(frame.slots) == geometry.image_tokens
    assert {frame.ids[slot] for slot in (*frame.slots, *frame.breaks)} == {geometry.image_token_id}
    views = enumerate((geometry.overview, geometry.grid) if geometry.overview else (geometry.grid,))
    assert frame.places == tuple((t, y, x) for t, (rows, columns) in views for y in range(rows) for x in range(columns))
    assert all(len(set(zip(*frame.positions, strict=True))) == len(frame.ids) for _ in frame.positions)
    assert frame.first_text > max(max(row) for row in frame.positions)


@every_family
def test_phone_and_desktop_prepare_the_same_pixels(entry: ModelEntry, photo: NDArray[np.uint8]) -> None:
    desktop = entry.family.desktop(RandomCheckpoint(entry, seed=1), "cpu")
    ours, theirs = _pixels(entry, photo), desktop.pixels(photo)
    assert ours.shape == theirs.shape == entry.geometry.pixel_values
    np.testing.assert_allclose(ours, theirs, atol=0.05)  # a step of one in 255, where Pillow rounds


@every_family
@pytest.mark.usefixtures("short_answers")
@torch.no_grad()
def test_desktop_equals_transformers_whole_model(entry: ModelEntry, photo: NDArray[np.uint8]) -> None:
    checkpoint, frame, pixels = RandomCheckpoint(entry, seed=1), _frame(entry), _pixels(entry, photo)
    cut = paper_cut(entry.geometry.least_cut)
    golden = make_golden(checkpoint, entry, None, cut=cut, pixel_values=pixels, text=TEXT)
    model = _transformers_model(entry)
    spelled = {spelling: name for name, tensor in entry.tensors.items() for spelling in tensor.stored}
    state = {name: checkpoint.tensor(spelled[name]).float() for name, _ in model.named_parameters()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys

    def logits(*ids: int) -> torch.Tensor:
        whole = torch.tensor([[*frame.ids, *ids]])
        out: torch.Tensor = model(input_ids=whole, **_photo_inputs(entry, whole, pixels)).logits[0, len(frame.ids) :]
        return out

    theirs = logits(*TEXT.ids)
    np.testing.assert_allclose(golden["text_prefill.out.logits"][0], theirs[:-1], atol=ATOL)
    np.testing.assert_allclose(golden["text_decoder.out.logits"][0], theirs[-1:], atol=ATOL)
    answer: list[int] = []
    for _ in range(ANSWER):
        answer.append(int(logits(*TEXT.question, *answer)[-1].argmax()))
    assert golden["answer.margin"].min() > 10 * ATOL, "too near a tie to be compared"
    assert golden["answer.ids"].tolist() == answer


def _run(graph: Graph, *inputs: object) -> dict[str, torch.Tensor]:
    out = graph(*(torch.as_tensor(x) for x in inputs))
    return dict(zip(graph.output_names, out if isinstance(out, tuple) else (out,), strict=True))


def _same(graph: str, got: Mapping[str, torch.Tensor], golden: Mapping[str, NDArray[Any]]) -> None:
    start = f"{graph}.out."
    wanted = {name.removeprefix(start): value for name, value in golden.items() if name.startswith(start)}
    # What open graphs hand one another is inside these.
    between = () if graph == VISION_ENCODER else ("hidden", "last_hidden")
    wanted = {name: value for name, value in wanted.items() if name not in between}
    assert set(got) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, atol=ATOL, err_msg=f"{graph} {name}")


every_pruning = pytest.mark.parametrize("pruned", [True, False], ids=["pruned", "unpruned"])


@pytest.mark.parametrize(
    "entry", [entry for entry in (*PRODUCTS, TINY_WIDE) if entry.geometry.least_cut == 0], ids=_name
)
@every_pruning
@torch.no_grad()
def test_features_equal_the_desktop(entry: ModelEntry, pruned: bool, photo: NDArray[np.uint8]) -> None:
    checkpoint, pixels, spec = RandomCheckpoint(entry, seed=1), _pixels(entry, photo), _spec(entry) if pruned else None
    golden = make_golden(checkpoint, entry, spec, cut=0, framed=False, pixel_values=pixels)
    _same(VISION_ENCODER, _run(build_vision_encoder(checkpoint, entry, spec, cut=0, framed=False), pixels), golden)


@every_cut
@every_pruning
@pytest.mark.usefixtures("short_answers")
@torch.no_grad()
def test_static_graphs_equal_the_desktop(entry: ModelEntry, pruned: bool, cut: int, photo: NDArray[np.uint8]) -> None:
    checkpoint, pixels, spec = RandomCheckpoint(entry, seed=1), _pixels(entry, photo), _spec(entry) if pruned else None
    golden = make_golden(checkpoint, entry, spec, cut=cut, pixel_values=pixels, text=TEXT)
    encoder = build_vision_encoder(checkpoint, entry, spec, cut=cut)
    seen = _run(encoder, pixels)
    _same(VISION_ENCODER, seen, golden)
    context = Context(entry.geometry, encoder.frame, keep=encoder.keep, cut=cut, text=len(TEXT.ids))
    graphs = build_text_graphs(checkpoint, context, chunk=len(TEXT.ids) - 1)
    image = _run(graphs[IMAGE_PREFILL], seen["hidden"], seen["positions"])
    _same(IMAGE_PREFILL, image, golden)
    _same(TOKEN_EMBEDDING, _run(graphs[TOKEN_EMBEDDING], golden["token_embedding.in.ids"]), golden)
    past = []
    for info in context.infos("", torch.float32):
        cache = torch.zeros(info.shape)
        part = (seen | image)[info.name]
        cache[:, :, : part.shape[2]] = part
        past.append(cache)
    embedded, last = golden["token_embedding.out.inputs_embeds"], golden["text_decoder.in.inputs_embeds"]
    prefilled = _run(graphs[TEXT_PREFILL], embedded, golden["text_prefill.in.positions"], *past)
    _same(TEXT_PREFILL, prefilled, golden)
    for number, (cache, new) in enumerate(zip(past, list(prefilled.values())[1:], strict=True)):
        start = context.image_entries(number // 2)
        cache[:, :, start : start + new.shape[2]] = new
    _same(TEXT_DECODER, _run(graphs[TEXT_DECODER], last, golden["text_decoder.in.positions"], *past), golden)


@every_cut
@every_pruning
@pytest.mark.usefixtures("short_answers")
@torch.no_grad()
def test_open_graphs_equal_the_desktop(entry: ModelEntry, pruned: bool, cut: int, photo: NDArray[np.uint8]) -> None:
    """Each graph at each step, on what the desktop has there, whatever graph gave that."""
    checkpoint, pixels, spec = RandomCheckpoint(entry, seed=1), _pixels(entry, photo), _spec(entry) if pruned else None
    golden = make_golden(checkpoint, entry, spec, cut=cut, pixel_values=pixels, text=TEXT)
    prefix = read_prompt(checkpoint.folder, entry.geometry, entry).prefix_ids
    frame = entry.family.frame(prefix, entry.geometry)
    keep = frame.left(spec.keep if spec else entry.geometry.image_tokens)
    context = Context(entry.geometry, frame, keep=keep, cut=cut, text=len(TEXT.ids))
    compared = set()
    for name, graph in Parts(open_text_parts(checkpoint, context, chunk=len(TEXT.ids) - 1)).items():
        info = GraphInfo(
            name=name,
            file="x",
            engine="executorch",
            arithmetic=("fp32",),
            inputs=graph.input_infos(),
            outputs=graph.output_infos(),
        )
        for step in steps(info, OWN_LAYOUT):
            inputs = graph_inputs(info, golden, step)
            for output, got in _run(graph, *(inputs[each.name] for each in info.inputs)).items():
                wanted = golden[output_key(step, output)]
                np.testing.assert_allclose(got, wanted, atol=ATOL, err_msg=f"{name} {step} {output}")
                compared.add(output_key(step, output))
    image = ("image_prefill.", "text_prefill.", "text_decoder.", "token_embedding.")
    assert compared == {name for name in golden if ".out." in name and name.startswith(image)}


@every_export
def test_export_passes_its_check(entry: ModelEntry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.families, "MODELS", {entry.name: entry})
    request = Request(
        model=entry.name,
        keep=str(_spec(entry).keep),
        target="android",
        backend="onnx",
        weights="random",
        text_tokens="192",
        output_dir=str(tmp_path),
    )
    made = pipeline.export(plan(request), progress=Progress(stages=7, quiet=True), version="0")
    assert made.verdict.outcome == "passed", [step for step in made.verdict.steps if step.status != "passed"]
    assert made.bundle.manifest.family == entry.family.name
    assert made.bundle.manifest.prune.grid == entry.geometry.grid
