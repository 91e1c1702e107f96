"""llama.cpp for benchmarks/peers.py: its public sources, patched and built for this processor, and the model as GGUF.

Two lines are changed in the copy that is built, because without them there is nothing to measure:

- A compiler barrier in front of `_tile_loadconfig`, whose argument GCC 12 otherwise drops: the first matrix product on
  a processor with AMX ends in an illegal instruction.
- The class token stands in front of the patches, as in CLIP, and not behind them: as shipped the features have a cosine
  of 0.85 with those of transformers.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.peer_systems import model
from benchmarks.peer_systems.kept import StepError, digest, kept, run

if TYPE_CHECKING:
    import numpy as np

HERE = Path(__file__).resolve().parent
PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
# Where cmake and ninja are not installed they come from PyPI, into an environment of their own.
TOOLS = {"cmake": "cmake==3.31.6", "ninja": "ninja==1.11.1.4"}
PATCHES = (
    (
        "ggml/src/ggml-cpu/amx/mmq.cpp",
        "    _tile_loadconfig(&tc);\n",
        '    asm volatile("" ::: "memory");\n    _tile_loadconfig(&tc);\n',
    ),
    (
        "tools/mtmd/models/llava.cpp",
        "ggml_concat(ctx0, inp, model.class_embedding, 1)",
        "ggml_concat(ctx0, model.class_embedding, inp, 1)",
    ),
)
PROJECTORS = {"f16": "mmproj-f16.gguf", "q8_0": "mmproj-q8_0.gguf"}
TEXT = "text-q4_0.gguf"
PROGRAM = "llama-build/llama_worker"
JOBS = 2


def sources(work: Path) -> Path:
    """The folder of patched sources, fetched the first time. StepError when they are not the known ones."""
    made_from = digest((), PACKAGE, VERSION, SHA256, PATCHES)
    return kept(work / "llama.cpp", made_from, _fetch) / "vendor/llama.cpp"


def _fetch(folder: Path) -> None:
    """Unpacks the package's sources into an empty folder, and changes the two lines."""
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
    with tempfile.TemporaryDirectory(dir=folder.parent) as fetched:
        run(*pip, "--no-deps", "--no-binary", PACKAGE, "--dest", fetched, f"{PACKAGE}=={VERSION}")
        (archive,) = Path(fetched).iterdir()
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != SHA256:
            raise StepError(f"{archive.name} has the sha256 {found} instead of {SHA256}: not the known sources")
        with tarfile.open(archive) as packed:
            packed.extractall(fetched, filter="data")
        unpacked = Path(fetched) / archive.name.removesuffix(".tar.gz")
        for part in unpacked.iterdir():
            part.rename(folder / part.name)
    for name, shipped, ours in PATCHES:
        file = folder / "vendor/llama.cpp" / name
        file.write_text(patched(file.read_text(), shipped, ours))


def patched(text: str, shipped: str, ours: str) -> str:
    """`text` with its one `shipped` passage replaced. ValueError where that is not there exactly once."""
    if text.count(shipped) != 1:
        raise ValueError(f"{shipped.strip()!r} stands {text.count(shipped)} times in the sources instead of once")
    return text.replace(shipped, ours)


@cache
def build(work: Path) -> Path:
    """The worker's program, compiled with -march=native where it is not up to date; takes minutes the first time."""
    found = sources(work)
    folder = (work / PROGRAM).parent
    tools = _tools(work)
    print("building llama.cpp", flush=True)
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}", "-DCMAKE_BUILD_TYPE=Release")
    run(tools["cmake"], *generator, f"-DLLAMA_CPP={found}", "-S", str(HERE), "-B", str(folder))
    run(tools["cmake"], "--build", str(folder), "--parallel", str(JOBS), "--target", "llama_worker")
    return work / PROGRAM


def _tools(work: Path) -> dict[str, str]:
    found = {tool: shutil.which(tool) for tool in TOOLS}
    here = {tool: path for tool, path in found.items() if path}
    missing = [pin for tool, pin in TOOLS.items() if tool not in here]
    if missing:
        venv = work / "tools"
        if not venv.is_dir():
            run(sys.executable, "-m", "venv", str(venv))
        run(str(venv / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *missing)
    return {tool: here.get(tool, str(work / "tools/bin" / tool)) for tool in TOOLS}


def write_weights(work: Path, layers: int, folder: Path) -> None:
    """Writes the model into `folder`: the decoder by llama.cpp's own quantisation to Q4_0, the tower in two ways.

    In a process of its own, for the memory; the decoder in float16 is on the disk meanwhile.
    """
    half = folder / "text-f16.gguf"
    run(sys.executable, str(Path(__file__).resolve()), str(sources(work) / "gguf-py"), str(layers), str(folder))
    run(str(work / PROGRAM), "quantise", str(half), str(folder / TEXT))
    half.unlink()


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key matrix in GGUF's order: the two halves that rotate together lie beside each other."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.swapaxes(1, 2).reshape(weight.shape)


_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOWER_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_out": "self_attn.out_proj",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
    "ln1": "layer_norm1",
    "ln2": "layer_norm2",
}


def _write_text(gguf: Any, layers: int, path: Path) -> None:
    """The decoder in float16, with a vocabulary of stand-ins: only ids are ever given."""
    import numpy as np

    weights = model.checkpoint(layers)
    sizes = weights.geometry.text
    file = gguf.GGUFWriter(path, "llama", use_temp_file=True)  # not all of it in memory at once
    file.add_name(model.entry(layers).name)
    file.add_context_length(sizes.max_positions)
    file.add_embedding_length(sizes.hidden)
    file.add_block_count(sizes.layers)
    file.add_feed_forward_length(sizes.mlp)
    file.add_head_count(sizes.heads)
    file.add_head_count_kv(sizes.kv_heads)
    file.add_rope_dimension_count(sizes.head_dim)
    file.add_rope_freq_base(sizes.rope.theta)
    file.add_layer_norm_rms_eps(sizes.norm_eps)
    file.add_vocab_size(sizes.vocab)
    file.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    special = ["<unk>", "<s>", "</s>"]
    byte = [f"<0x{number:02X}>" for number in range(256)]
    words = [f"\u2581{number}" for number in range(sizes.vocab - len(special) - len(byte))]
    kinds = gguf.TokenType
    file.add_tokenizer_model("llama")
    file.add_tokenizer_pre("default")
    file.add_token_list([*special, *byte, *words])
    file.add_token_scores([-float(number) for number in range(sizes.vocab)])
    file.add_token_types(
        [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, *[kinds.BYTE] * len(byte), *[kinds.NORMAL] * len(words)]
    )
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)

    def tensors() -> Iterator[tuple[str, str]]:
        yield "token_embd", "embed_tokens"
        for index in range(sizes.layers):
            yield from ((f"blk.{index}.{theirs}", f"layers.{index}.{ours}") for theirs, ours in _LAYER.items())
        yield "output_norm", "norm"
        yield "output", "lm_head"

    for theirs, ours in tensors():
        array = weights.tensor(f"{ours}.weight").numpy()
        for part, heads in (("q_proj", sizes.heads), ("k_proj", sizes.kv_heads)):
            if ours.endswith(part):
                array = interleaved(array, heads)
        # Vectors are added to float32 numbers.
        file.add_tensor(f"{theirs}.weight", np.ascontiguousarray(array, np.float32 if array.ndim == 1 else None))
    _finish(file)


def _write_tower(gguf: Any, layers: int, path: Path, *, quantised: bool) -> None:
    """CLIP and the projector, matrices in float16 or Q8_0."""
    import numpy as np

    weights = model.checkpoint(layers)
    geometry: Any = weights.geometry
    vision, depth = geometry.vision, geometry.tower_layers
    image = weights.family.image(None, geometry)
    kinds = gguf.LlamaFileType
    file = gguf.GGUFWriter(path, "clip")
    file.add_file_type(kinds.MOSTLY_Q8_0 if quantised else kinds.MOSTLY_F16)
    file.add_bool("clip.has_text_encoder", False)
    file.add_bool("clip.has_vision_encoder", True)
    file.add_bool("clip.has_llava_projector", True)
    file.add_string("clip.projector_type", "mlp")
    file.add_bool("clip.use_gelu", False)  # without it the activation is CLIP's quick one
    file.add_uint32("clip.vision.image_size", vision.image_size)
    file.add_uint32("clip.vision.patch_size", vision.patch_size)
    file.add_uint32("clip.vision.embedding_length", vision.hidden)
    file.add_uint32("clip.vision.feed_forward_length", vision.mlp)
    file.add_uint32("clip.vision.projection_dim", geometry.text.hidden)
    file.add_uint32("clip.vision.attention.head_count", vision.heads)
    file.add_float32("clip.vision.attention.layer_norm_epsilon", vision.norm_eps)
    # Only the layers that are run are written, and the last of them gives the features.
    file.add_uint32("clip.vision.block_count", depth)
    file.add_array("clip.vision.feature_layer", [depth])
    file.add_array("clip.vision.image_mean", list(image.mean))
    file.add_array("clip.vision.image_std", list(image.std))

    def vector(theirs: str, ours: str) -> None:
        file.add_tensor(theirs, weights.tensor(ours).numpy().astype(np.float32))

    def matrix(theirs: str, ours: str) -> None:
        array = weights.tensor(ours).numpy()
        if not quantised:
            file.add_tensor(theirs, array)
            return
        kind = gguf.GGMLQuantizationType.Q8_0
        file.add_tensor(theirs, gguf.quants.quantize(array.astype(np.float32), kind), raw_dtype=kind)

    vector("v.class_embd", "tower.embeddings.class_embedding")
    vector("v.position_embd.weight", "tower.embeddings.position_embedding.weight")
    file.add_tensor("v.patch_embd.weight", weights.tensor("tower.embeddings.patch_embedding.weight").numpy())
    for part in ("weight", "bias"):
        vector(f"v.pre_ln.{part}", f"tower.pre_layrnorm.{part}")
    for index in range(depth):
        for theirs, ours in _TOWER_LAYER.items():
            write = vector if ours.startswith("layer_norm") else matrix
            write(f"v.blk.{index}.{theirs}.weight", f"tower.layers.{index}.{ours}.weight")
            vector(f"v.blk.{index}.{theirs}.bias", f"tower.layers.{index}.{ours}.bias")
    for theirs, ours in (("mm.0", "linear_1"), ("mm.2", "linear_2")):
        matrix(f"{theirs}.weight", f"tower.projector.{ours}.weight")
        vector(f"{theirs}.bias", f"tower.projector.{ours}.bias")
    _finish(file)


def _finish(file: Any) -> None:
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def main(words: Sequence[str]) -> None:
    """Writes the GGUF files of one depth, with the writer that the sources bring along."""
    writer, layers, folder = words
    sys.path.append(writer)
    import gguf  # type: ignore[import-not-found]

    for kind, name in PROJECTORS.items():
        _write_tower(gguf, int(layers), Path(folder) / name, quantised=kind == "q8_0")
    _write_text(gguf, int(layers), Path(folder) / "text-f16.gguf")


if __name__ == "__main__":
    main(sys.argv[1:])
