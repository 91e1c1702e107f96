"""transformers.js runs the exported folder as it is and answers as transformers' layers behind the paper's loop."""

from __future__ import annotations

import functools
import hashlib
import http.server
import json
import queue
import shutil
import subprocess
import tempfile
import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export.blocks.nbits import NBitsLinear
from export.checkpoints import FolderCheckpoint, open_checkpoint
from export.dropin import transformers_js
from export.dropin.transformers_js import write_transformers_js
from export.families.family import Checkpoint
from export.golden import make_golden
from export.graphs.merged_decoder import build_merged_decoder
from export.graphs.vision import VisionEncoder, build_vision_encoder
from export.models.pocket import POCKET, pocket_folder
from export.models.prompt import read_prompt
from export.quantize import SCHEMES, quantize
from pruning import PruneSpec
from runtime.bundle import GraphInfo
from runtime.errors import CheckpointError, ExportError
from tests.conftest import HEADLESS_CHROMIUM, needs_chromium, needs_node
from tests.phones.machines import CACHE
from tests.talkative import talkative
from tests.tiny_llava import TINY, in_fp32, write_tiny

KEEP = 64
TOKENS = 15
LEAD = {"fp32": 0.01, "int4": 0.032}
PROGRAMS = Path(__file__).parent / "transformers_js"
ASKED = [("china", "where is the ball?"), ("flower", "where is the ball?"), ("flower", "is there a tree?")]


# The decoder, as a module


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("model", ["tiny", "pocket"])
@torch.no_grad()
def test_decoder_is_transformers_own(model: str, tiny: Path, tmp_path: Path) -> None:
    """With 2 of 6 and with 6 of 6 key heads: a prompt, more of it, then one token, all three through the cache."""
    from transformers import LlavaForConditionalGeneration

    folder, entry = (tiny, TINY) if model == "tiny" else (pocket_folder(), POCKET)
    whole: Any = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    decoder = build_merged_decoder(FolderCheckpoint(folder, entry))
    embeds, mask, _, *past = decoder.example_inputs(tokens=9, past=0)
    mask[:, :2] = 0  # padding in front, as a batch of prompts has it
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    expected = whole(inputs_embeds=embeds, attention_mask=mask, position_ids=positions)
    logits = []
    for start, end in [(0, 5), (5, 8), (8, 9)]:
        out, *past = decoder(embeds[:, start:end], mask[:, :end], positions[:, start:end], *past)
        logits.append(out)
    assert logits[-1].shape == (1, 1, entry.geometry.text.vocab)
    torch.testing.assert_close(torch.cat(logits, 1)[:, 2:], expected.logits[:, 2:], rtol=1e-5, atol=1e-5)
    caches = [part[:, :, 2:] for layer in expected.past_key_values.layers for part in (layer.keys, layer.values)]
    torch.testing.assert_close([part[:, :, 2:] for part in past], caches, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_decoder_in_half_precision(tmp_path: Path) -> None:
    """Caches are float16, what goes in and comes out is float32, and the difference is that of the precision."""
    checkpoint = FolderCheckpoint(pocket_folder(), POCKET)
    whole, half = build_merged_decoder(checkpoint), build_merged_decoder(checkpoint, precision="fp16")
    expected, got = (graph(*graph.example_inputs(tokens=20, past=7)) for graph in (whole, half))
    assert [part.dtype for part in got] == [torch.float32] + [torch.float16] * 2 * POCKET.geometry.text.layers
    assert (got[0] - expected[0]).norm() / expected[0].norm() < 5e-3


@pytest.mark.slow
@torch.no_grad()
def test_exported_decoder_takes_any_length(tiny: Path, tmp_path: Path, one_thread: None) -> None:
    """With 2 of 6 key heads, in ONNX Runtime: lengths other than the traced ones, no past at all, padding."""
    import onnxruntime

    checkpoint = FolderCheckpoint(tiny, TINY)
    transformers_js._write_decoder(checkpoint, tmp_path / "decoder.onnx", "fp32")
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx", providers=["CPUExecutionProvider"])
    decoder = build_merged_decoder(checkpoint)
    for tokens, past in [(1, 0), (1, 1), (2, 1), (7, 0), (1, 40), (50, 3)]:
        inputs = decoder.example_inputs(tokens=tokens, past=past)
        inputs[1][:, : past // 2] = 0
        named = {name: value.numpy() for name, value in zip(decoder.input_names, inputs, strict=True)}
        got = session.run(list(decoder.output_names), named)
        torch.testing.assert_close([torch.from_numpy(out) for out in got], list(decoder(*inputs)), rtol=1e-5, atol=1e-5)


# What cannot be made


def _vision(checkpoint: Checkpoint, *, cut: int = 0, precision: str = "fp32") -> VisionEncoder:
    return build_vision_encoder(checkpoint, POCKET, PruneSpec(keep=KEEP), cut=cut, framed=cut > 0, precision=precision)


def test_pruning_in_the_decoder_gives_no_image_features(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("pocket", weights="random")
    with pytest.raises(ExportError, match="a vision graph of cut 2 with the prompt in it does not give; take --cut 0"):
        write_transformers_js(checkpoint, POCKET, _vision(checkpoint, cut=2), tmp_path, arithmetic=in_fp32)


def test_only_4_bit_weights_have_a_name(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("pocket", weights="random")
    with pytest.raises(ExportError, match=r"quant_text='int8': transformers\.js has no name for such weights"):
        write_transformers_js(checkpoint, POCKET, _vision(checkpoint), tmp_path, quant_text="int8", arithmetic=in_fp32)
    assert not list(tmp_path.iterdir())


def test_random_weights_have_no_tokenizer(tmp_path: Path) -> None:
    checkpoint = open_checkpoint("pocket", weights="random")
    with pytest.raises(ExportError, match="random weights have no tokenizer"):
        write_transformers_js(checkpoint, POCKET, _vision(checkpoint), tmp_path, arithmetic=in_fp32)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", [("tokenizer.json",), ("tokenizer_config.json",), ("tokenizer.json", "config")])
def test_checkpoint_without_tokenizer(tmp_path: Path, missing: Sequence[str]) -> None:
    folder = shutil.copytree(pocket_folder(), tmp_path / "checkpoint")
    names = [name if name.endswith(".json") else f"tokenizer_{name}.json" for name in missing]
    for name in names:
        (folder / name).unlink()
    (tmp_path / "out").mkdir()
    checkpoint = FolderCheckpoint(folder, POCKET)
    vision = _vision(open_checkpoint("pocket", weights="random"))
    with pytest.raises(CheckpointError, match=f"has no {' and no '.join(names)}, which transformers.js needs"):
        write_transformers_js(checkpoint, POCKET, vision, tmp_path / "out", arithmetic=in_fp32)
    assert not list((tmp_path / "out").iterdir())


# The folder, in transformers.js


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> FolderCheckpoint:
    return FolderCheckpoint(talkative(tmp_path_factory.mktemp("talkative") / "model"), POCKET)


@pytest.fixture(scope="module", params=["fp32", "fp16", "int4"])
def exported(
    request: pytest.FixtureRequest,
    checkpoint: FolderCheckpoint,
    tmp_path_factory: pytest.TempPathFactory,
    one_thread: None,
) -> tuple[Path, tuple[GraphInfo, ...]]:
    """The folder and the graphs in it; in fp32 the decoder's weights lie in a file of their own."""
    folder = tmp_path_factory.mktemp("exported")
    quant = request.param if request.param in SCHEMES else None
    vision = _vision(checkpoint, precision="fp32" if quant else request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers_js, "_INLINE_LIMIT_BYTES", 16 * 2**20)
        return folder, write_transformers_js(checkpoint, POCKET, vision, folder, quant_text=quant, arithmetic=in_fp32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photos of the model's own size: transformers.js resizes in another way than Pillow."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    folder = tmp_path_factory.mktemp("photos")
    for name in ("china", "flower"):
        photo = load_sample_image(f"{name}.jpg")
        top, left = (photo.shape[0] - 336) // 2, (photo.shape[1] - 336) // 2
        Image.fromarray(photo[top : top + 336, left : left + 336]).save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def packages() -> Path:
    """A folder with the programs and the npm packages that package-lock.json pins; made once for each such file."""
    lock = (PROGRAMS / "package-lock.json").read_bytes()
    folder = CACHE / f"transformers_js-{hashlib.sha256(lock).hexdigest()[:16]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            partial = shutil.copytree(PROGRAMS, Path(temporary) / "packages")
            # Without install scripts: one of them would fetch GPU libraries.
            words = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(words, cwd=partial, capture_output=True, text=True, timeout=600, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            partial.rename(folder)
    for program in PROGRAMS.iterdir():
        shutil.copyfile(program, folder / program.name)
    return folder


@pytest.fixture(scope="module")
def expected(
    exported: tuple[Path, tuple[GraphInfo, ...]], checkpoint: FolderCheckpoint, photos: Path, one_thread: None
) -> dict[tuple[str, str], dict[str, Any]]:
    """Prompt, pixels and greedy answer of everything in ASKED in float32, by nothing of ours but the paper's loop.

    They are compared up to the first token that leads by less than LEAD: float16 moves the logits by a tenth of that,
    and with 4-bit weights the engine's 8-bit activations move such a lead by 0.02 at most.
    """
    told = {(photo, question): _eager(exported[0], checkpoint, photos, photo, question) for photo, question in ASKED}
    assert sum(case["sure"] for case in told.values()) >= TOKENS
    return told


@torch.no_grad()
def _eager(folder: Path, checkpoint: FolderCheckpoint, photos: Path, photo: str, question: str) -> dict[str, Any]:
    """Transformers' processor reads the exported folder, its layers the checkpoint; there is no cache."""
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    loader: Any = AutoProcessor
    processor = loader.from_pretrained(folder)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    prompt = processor.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(images=Image.open(photos / f"{photo}.png"), text=prompt, return_tensors="np")
    pixel_values = np.asarray(inputs["pixel_values"])
    golden = make_golden(checkpoint, POCKET, PruneSpec(keep=KEEP), cut=0, framed=False, pixel_values=pixel_values)
    whole: Any = LlavaForConditionalGeneration.from_pretrained(
        checkpoint.folder, dtype=torch.float32, attn_implementation="eager"
    )
    lead = LEAD["fp32"]
    if (folder / "onnx" / "decoder_model_merged_q4.onnx").exists():
        lead = LEAD["int4"]
        quantize(whole.model.language_model, "int4")
        whole.lm_head = NBitsLinear(whole.lm_head, bits=4, group=32)
    ids = torch.from_numpy(inputs["input_ids"])
    embeds = whole.model.language_model.embed_tokens(ids)
    image = torch.from_numpy(golden["vision_encoder.out.image_features"])
    assert image.shape == (1, KEEP, POCKET.geometry.text.hidden)
    embeds[ids == POCKET.geometry.image_token_id] = image[0]
    answer: list[int] = []
    sure: int | None = None
    while len(answer) < TOKENS:
        hidden = whole.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
        best = whole.lm_head(hidden[0, -1]).topk(2)
        if sure is None and float(best.values[0] - best.values[1]) < lead:
            sure = len(answer)
        answer.append(int(best.indices[0]))
        embeds = torch.cat([embeds, whole.model.language_model.embed_tokens(torch.tensor([answer[-1:]]))], 1)
    return {
        "prompt_ids": ids[0].tolist(),
        "answer_ids": answer,
        "sure": TOKENS if sure is None else sure,
        "answer": processor.tokenizer.decode(answer, skip_special_tokens=True),
        "pixel_values": pixel_values,
    }


def _compare(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert (
        got["version"]
        == json.loads((PROGRAMS / "package.json").read_text())["dependencies"]["@huggingface/transformers"]
    )
    assert got["prompt_ids"] == expected["prompt_ids"]
    assert got["pixel_shape"] == list(expected["pixel_values"].shape)
    pixels = np.asarray(got["pixel_values"]).reshape(got["pixel_shape"])
    np.testing.assert_allclose(pixels, expected["pixel_values"], rtol=0, atol=1e-6)
    assert len(got["answer_ids"]) == TOKENS
    sure = expected["sure"]
    assert got["answer_ids"][:sure] == expected["answer_ids"][:sure]
    if sure == TOKENS:
        assert got["answer"] == expected["answer"]


@pytest.mark.slow
@pytest.mark.node
def test_prompts_hold_the_kept_tokens(
    expected: dict[tuple[str, str], dict[str, Any]], checkpoint: FolderCheckpoint
) -> None:
    """And the answers depend on photo and question, or the tests below would prove little."""
    image = POCKET.geometry.image_token_id
    prefix = list(read_prompt(checkpoint.folder, checkpoint.geometry, POCKET).prefix_ids)
    for case in expected.values():
        assert case["prompt_ids"].count(image) == KEEP
        assert case["prompt_ids"][: len(prefix) + KEEP] == [*prefix, *[image] * KEEP]
    assert len({tuple(case["answer_ids"]) for case in expected.values()}) == len(ASKED)


@pytest.mark.slow
@pytest.mark.node
def test_files_are_those_named(exported: tuple[Path, tuple[GraphInfo, ...]]) -> None:
    folder, graphs = exported
    files = {file for graph in graphs for file in graph.files}
    assert files == {f"onnx/{path.name}" for path in (folder / "onnx").iterdir()}
    assert files in (
        {
            "onnx/decoder_model_merged.onnx",
            "onnx/decoder_model_merged.onnx_data",
            "onnx/embed_tokens.onnx",
            "onnx/vision_encoder.onnx",
        },
        {
            "onnx/decoder_model_merged_fp16.onnx",
            "onnx/embed_tokens_fp16.onnx",
            "onnx/vision_encoder_fp16.onnx",
        },
        {
            "onnx/decoder_model_merged_q4.onnx",
            "onnx/embed_tokens.onnx",
            "onnx/vision_encoder.onnx",
        },
    )


@pytest.mark.slow
@pytest.mark.node
@needs_node
def test_node_answers_as_eager(
    exported: tuple[Path, tuple[GraphInfo, ...]],
    expected: dict[tuple[str, str], dict[str, Any]],
    packages: Path,
    photos: Path,
) -> None:
    asked = [
        {"model": str(exported[0]), "photo": str(photos / f"{photo}.png"), "question": question, "tokens": TOKENS}
        for photo, question in ASKED
    ]
    words = ["node", "generate.mjs", json.dumps(asked)]
    done = subprocess.run(words, cwd=packages, capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    for got, case in zip(json.loads(done.stdout), ASKED, strict=True):
        _compare(got, expected[case])


@pytest.mark.slow
@pytest.mark.node
@needs_node
@needs_chromium
def test_chromium_answers_as_eager(
    exported: tuple[Path, tuple[GraphInfo, ...]],
    expected: dict[tuple[str, str], dict[str, Any]],
    packages: Path,
    photos: Path,
    tmp_path: Path,
) -> None:
    site = tmp_path / "site"
    shutil.copytree(PROGRAMS, site)
    (site / "node_modules").symlink_to(packages / "node_modules")
    (site / "models").mkdir()
    (site / "models" / "pocket").symlink_to(exported[0])
    (site / "photos").symlink_to(photos)
    photo, question = ASKED[0]
    request = {"model": "pocket", "photo": f"/photos/{photo}.png", "question": question, "tokens": TOKENS}
    with _served(site) as (port, answers):
        address = f"http://127.0.0.1:{port}/generate.html?request={urllib.parse.quote(json.dumps(request))}"
        got = _browse(address, answers, tmp_path / "profile")
    assert "error" not in got, got["error"]
    _compare(got, expected[ASKED[0]])


@contextmanager
def _served(site: Path) -> Iterator[tuple[int, queue.Queue[bytes]]]:
    """`site` on a free local port, and what is posted to it."""
    posted: queue.Queue[bytes] = queue.Queue()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing: the page reports what fails."""

    handler = functools.partial(Handler, directory=str(site))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port, posted
        server.shutdown()


def _browse(address: str, posted: queue.Queue[bytes], profile: Path) -> dict[str, Any]:
    """What the page at `address` posts back. No other host can be reached, so nothing comes from outside."""
    words = [
        *HEADLESS_CHROMIUM,
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
        f"--user-data-dir={profile}",
        address,
    ]
    said = profile.with_suffix(".log")
    with said.open("wb") as log, subprocess.Popen(words, stdout=log, stderr=log) as browser:
        try:
            result: dict[str, Any] = json.loads(posted.get(timeout=180))
        except queue.Empty:
            pytest.fail(
                f"the page reported nothing in 180 s; Chromium said: {said.read_text(errors='replace')[-2000:]}"
            )
        finally:
            browser.terminate()
    return result
