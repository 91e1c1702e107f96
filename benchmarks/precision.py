"""How exact, how large and how slow the vision graph on XNNPACK is in each way to hold and to compute it.

    python benchmarks/precision.py [--models small-0 full ...] [--only fp16 ...] [--arm SDK]

The graph goes up to the pruner, whose choices are made by the same float32 code from what each way left (keep 64).
Everything is compared with the same modules in float32 in PyTorch. Models:

    full      LLaVA-1.5-7B at full width, random weights, 336 pixels
    full-36   the same with 84 pixels, 36 image tokens: what an emulator gets through in minutes
    small-N   all 23 tower layers and both decoder layers, narrow, 144 image tokens, seed N
    spiky-N   the same with 8 channels of each norm 16 times as large as the others: trained models have such
              channels, random ones have not

With `--arm`, the folder of ExecuTorch's aarch64 wheel unpacked, the programs also run on emulated Cortex-A76 (has
float16 arithmetic) and Cortex-A72 (has not), in the kernels that a phone runs; `aarch64-linux-gnu-g++` and
`qemu-aarch64-static` must be installed. Nothing is timed there. Natively one run takes CPU seconds on two threads,
memory is what the process has more than before (`anonymous`: what cannot be dropped and read again from the file).

Writes benchmarks/results/precision.json, rows that are not asked for stay as they are in it, and the table of
docs/precision.md from it (`--tables`: only that).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import torch

    from export.backends.packed import Packed
    from export.families.family import ModelEntry
    from export.graphs.vision import VisionEncoder

DOCUMENT = ROOT / "docs/precision.md"
OUTPUTS = ("hidden", "key_0", "value_0", "key_1", "value_1")
RESULT = ROOT / "benchmarks/results/precision.json"
KEEP = 64
PHOTOS = 4
THREADS = 2
# name -> what the weights are, what is computed in
WAYS = {
    "fp16": "float16 weights, float16 arithmetic",
    "fp32": "float32 weights, float32 arithmetic",
    "fp16-stored": "float16 weights in the file, float32 arithmetic",
    "8w": "8-bit weights, a scale for each channel, float32 activations",
    "8da8w": "8-bit weights, a scale for each channel; activations rounded to 8 bits, a scale for each token",
    "8da8w-tower": "8da8w in tower and projector; decoder layers as fp16-stored",
}
MODELS = ("full", "full-36", "small-0", "small-1", "small-2", "spiky-0", "spiky-1")
ARM = {"cortex-a76": "emulated Cortex-A76", "cortex-a72": "emulated Cortex-A72"}


def model(name: str) -> tuple[ModelEntry, int]:
    """The entry and the seed of one of MODELS."""
    from export.families import MODELS as KNOWN

    llava = KNOWN["llava-1.5-7b"]
    number = name.rpartition("-")[2]
    if name == "full":
        return llava, 0
    vision, text = dict(llava.config["vision_config"]), dict(llava.config["text_config"])
    if name == "full-36":
        vision["image_size"], seed = 84, 0
    else:
        vision |= {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "image_size": 168}
        text |= {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 4, "vocab_size": 32064}
        text |= {"num_key_value_heads": 4, "num_hidden_layers": 4}
        seed = int(number)
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2
    config = {**llava.config, "vision_config": vision, "text_config": text, "image_seq_length": tokens}
    return replace(llava, name=name, hub_id=None, config=config), seed


def encoder_of(name: str, precision: str) -> VisionEncoder:
    """The vision graph of a model without its pruner."""

    from export.checkpoints import RandomCheckpoint
    from export.graphs.vision import build_vision_encoder

    entry, seed = model(name)

    class Spiky(RandomCheckpoint):
        def tensor(self, name: str) -> torch.Tensor:
            drawn = super().tensor(name)
            if "norm" in name and name.endswith(".weight"):
                drawn[:: len(drawn) // 8][:8] *= 16
            return drawn

    kind = Spiky if name.startswith("spiky") else RandomCheckpoint
    return build_vision_encoder(kind(entry, seed=seed), entry, None, precision=precision)


def photos(name: str) -> dict[str, np.ndarray]:
    """pixel_values (1, 3, H, W) float32 of PHOTOS default photos."""
    from export.calibration import default_photos
    from runtime.image import preprocess

    entry, _ = model(name)
    info = entry.family.image(None, entry.geometry)
    count = 1 if name == "full-36" else PHOTOS
    return {photo: preprocess(pixels, info) for photo, pixels in default_photos(count).items()}


def make(name: str, way: str, folder: Path) -> None:
    """Lowers one program into `folder`; for fp32 also writes what PyTorch computes."""
    import torch
    from safetensors.numpy import save_file

    from export.backends.executorch import lower
    from export.backends.xnnpack import DELEGATE
    from export.quantize import quantize

    encoder = encoder_of(name, "fp16" if way == "fp16" else "fp32")
    if way == "fp32":
        with torch.no_grad():
            for photo, pixels in photos(name).items():
                outputs = encoder(torch.from_numpy(pixels))
                save_file(named(encoder, [out.numpy() for out in outputs]), folder / f"{photo}.safetensors")
                np.ascontiguousarray(pixels).tofile(folder / f"{photo}.in")
        (folder / "prefix").write_text(str(encoder.prefix_length))
    if way == "8da8w":
        quantize(encoder, "8da8w")
    elif way == "8da8w-tower":
        quantize(encoder.tower, "8da8w")
    # Otherwise float32 layers are stored in float16 wherever that loses nothing.
    others: dict[str, Callable[[Packed], AbstractContextManager[Any]]] = {"fp32": nullcontext, "8w": eight_bit_weights}
    delegate = replace(DELEGATE, serialising=others[way]) if way in others else DELEGATE
    lower({"vision_encoder": encoder}, folder, delegate)
    os.rename(folder / "model.pte", folder / f"{way}.pte")


def named(encoder: VisionEncoder, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs by their names."""
    return {info.name: np.ascontiguousarray(array) for info, array in zip(encoder.output_infos(), arrays, strict=True)}


@contextmanager
def eight_bit_weights(_packed: Packed) -> Iterator[None]:
    """Has float32 linear layers written with 8-bit weights, a scale for each channel, while XNNPACK serialises."""
    import executorch.backends.xnnpack.operators.op_linear  # noqa: F401  registers the visitor for linear layers
    import torch
    from executorch.backends.xnnpack.operators import node_visitor as serialiser
    from executorch.backends.xnnpack.operators.quant_params import QuantParams
    from executorch.backends.xnnpack.utils.utils import get_input_node, get_param_tensor, is_param_node

    target = "aten.linear.default"
    usual = serialiser._node_visitor_dict[target]

    class Stored(usual):  # type: ignore[misc, valid-type]
        def define_node(self, node: Any, graph: Any, ids: Any, debug_handle: int) -> None:
            weight = get_input_node(node, 1)
            value = weight.meta.get("val")
            plain = is_param_node(self._exported_program, weight) and value.dtype == torch.float32
            if plain and min(value.shape) > 1:
                tensor = get_param_tensor(self._exported_program, weight)
                scale = (tensor.abs().amax(1) / 127).clamp(min=1e-12)
                zero = torch.zeros(len(scale), dtype=torch.int32)
                params = QuantParams(True, weight, scale, zero, 0, torch.int8, 127, -127, False, False)
                self.define_tensor(weight, graph, ids, quant_params=params)
            super().define_node(node, graph, ids, debug_handle)

    serialiser._node_visitor_dict[target] = Stored
    try:
        yield
    finally:
        serialiser._node_visitor_dict[target] = usual


def memory() -> dict[str, int]:
    """Resident bytes of this process: all, and those that belong to no file."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(rows[key].split()[0]) * 1024 for name, key in (("resident", "VmRSS"), ("anonymous", "RssAnon"))}


def measure(name: str, way: str, folder: Path) -> None:
    """Runs a program natively in this process; writes its outputs, CPU seconds and memory."""
    from runtime.bundle import GraphInfo
    from runtime.engines import ENGINES

    encoder = shape_of(name)
    graph = GraphInfo(
        name="vision_encoder",
        file=f"{way}.pte",
        engine="executorch",
        arithmetic=("fp32",),
        inputs=encoder.input_infos(),
        outputs=outputs_of(encoder, way),
    )
    pixels = {photo: np.fromfile(folder / f"{photo}.in", np.float32) for photo in saved(folder)}
    import torch  # noqa: F401  the engine imports it

    ENGINES["executorch"]  # the loader itself
    before = memory()
    loaded = ENGINES["executorch"](graph, folder / f"{way}.pte", (), THREADS)
    seconds = []
    for index, (photo, values) in enumerate([next(iter(pixels.items())), *pixels.items()]):
        start = resource.getrusage(resource.RUSAGE_SELF)
        outputs = loaded.run([values.reshape(encoder.geometry.pixel_values)])
        end = resource.getrusage(resource.RUSAGE_SELF)
        if index:
            seconds.append(end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime)
        for number, output in enumerate(outputs):
            np.ascontiguousarray(output).tofile(folder / f"native-{way}-{photo}-{number}")
    after = memory()
    print(
        json.dumps(
            {
                "file_bytes": (folder / f"{way}.pte").stat().st_size,
                **{f"{key}_bytes": after[key] - before[key] for key in after},
                "cpu_s": round(statistics.median(seconds), 3),
            }
        )
    )


def shape_of(name: str) -> VisionEncoder:
    """The graph without its weights."""
    from export.checkpoints import RandomCheckpoint
    from export.graphs.vision import VisionEncoder
    from export.models.prompt import read_prompt

    entry, seed = model(name)
    checkpoint = RandomCheckpoint(entry, seed=seed)
    prefix = read_prompt(checkpoint.folder, checkpoint.geometry, entry).prefix_ids
    frame = entry.family.frame(prefix, entry.geometry)
    return VisionEncoder(entry.family, entry.geometry, frame, None, cut=2, framed=True)


def outputs_of(encoder: VisionEncoder, way: str) -> tuple[Any, ...]:
    """As the program has them: keys and values in the precision of the layers."""
    import msgspec

    return tuple(
        msgspec.structs.replace(info, dtype="float16") if way == "fp16" and "_" in info.name else info
        for info in encoder.output_infos()
    )


def saved(folder: Path) -> list[str]:
    """The photos that were prepared."""
    return [path.name.removesuffix(".in") for path in sorted(folder.glob("*.in"))]


def emulate(way: str, cpu: str, folder: Path, sdk: Path) -> None:
    """Runs a program in the aarch64 library on an emulated processor."""
    runner = folder.parent / "runner"
    if not runner.exists():
        (folder.parent / "runner.cpp").write_text(RUNNER)
        lib = sdk / "executorch/lib"
        include = sdk / "executorch/include"
        names = ("", "_kernels_optimized", "_kernels_quantized", "_backend_xnnpack", "_threadpool", "_etdump")
        subprocess.run(
            [
                *("aarch64-linux-gnu-g++", "-w", "-O2", "-std=c++20", "-DC10_USING_CUSTOM_GENERATED_MACROS"),
                *(f"-I{include}", f"-I{include}/executorch/runtime/core/portable_type/c10"),
                *(str(folder.parent / "runner.cpp"), "-o", str(runner)),
                *(f"-L{lib}", f"-Wl,-rpath,{lib.resolve()}", "-Wl,--no-as-needed"),
                *(f"-lexecutorch{name}" for name in names),
            ],
            check=True,
        )
    for photo in saved(folder):
        command = ["qemu-aarch64-static", "-L", "/usr/aarch64-linux-gnu", "-cpu", cpu, str(runner)]
        command += [str(folder / f"{way}.pte"), "vision_encoder", str(folder / f"{cpu}-{way}-{photo}-")]
        subprocess.run([*command, str(folder / f"{photo}.in")], check=True, stderr=subprocess.DEVNULL)


RUNNER = r"""
#include <fstream>
#include <iterator>
#include <string>
#include <vector>
#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor_ptr.h>
// program method prefix-of-outputs input
int main(int, char** argv) {
  executorch::extension::Module module(argv[1], executorch::extension::Module::LoadMode::Mmap);
  auto meta = module.method_meta(argv[2]);
  if (!meta.ok()) return 3;
  std::ifstream in(argv[4], std::ios::binary);
  std::vector<char> bytes{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
  auto info = meta->input_tensor_meta(0).get();
  std::vector<executorch::aten::SizesType> sizes(info.sizes().begin(), info.sizes().end());
  auto tensor = executorch::extension::make_tensor_ptr(sizes, bytes.data(), info.scalar_type());
  auto result = module.execute(argv[2], {executorch::runtime::EValue(tensor)});
  if (!result.ok()) return 4;
  int number = 0;
  for (auto& value : *result) {
    auto output = value.toTensor();
    std::ofstream out(argv[3] + std::to_string(number++), std::ios::binary);
    out.write(static_cast<const char*>(output.const_data_ptr()), output.nbytes());
  }
  return 0;
}
"""


def compare(name: str, way: str, where: str, folder: Path) -> list[dict[str, Any]]:
    """What each photo's outputs are off by, and which tokens stay."""
    import torch
    from safetensors.numpy import load_file

    from pruning import PruneSpec, TokenPruner

    encoder = shape_of(name)
    prefix = int((folder / "prefix").read_text())
    keep = min(KEEP, encoder.image_tokens // 3)
    pruner = TokenPruner(PruneSpec(grid=encoder.geometry.grid, keep=keep))

    def kept(outputs: Mapping[str, np.ndarray]) -> set[int]:
        last = torch.from_numpy(outputs[f"key_{encoder.cut - 1}"][0, :, prefix:].astype(np.float32))
        keys = last.permute(1, 0, 2).reshape(1, encoder.image_tokens, -1)
        hidden = torch.from_numpy(outputs["hidden"][:, prefix:].astype(np.float32))
        with torch.no_grad():
            return set(pruner.select(keys, hidden)[1].reshape(-1).long().tolist())

    rows = []
    for photo in saved(folder):
        if not (folder / f"{where}-{way}-{photo}-0").exists():
            continue
        want = load_file(folder / f"{photo}.safetensors")
        got = {
            info.name: np.fromfile(folder / f"{where}-{way}-{photo}-{number}", info.numpy_dtype).reshape(info.shape)
            for number, info in enumerate(outputs_of(encoder, way))
        }
        ours, theirs = kept(got), kept(want)
        row: dict[str, Any] = {"photo": photo, "keep": keep, "kept": round(len(ours & theirs) / keep, 4)}
        for output in OUTPUTS:
            axis = 1 if output == "hidden" else 2
            a, b = (
                np.take(side[output], range(prefix, prefix + encoder.image_tokens), axis).astype(np.float64)
                for side in (want, got)
            )
            row[output] = float(f"{np.linalg.norm(b - a) / np.linalg.norm(a):.3g}")
        rows.append(row)
    return rows


def child(step: str, *words: str) -> str:
    """Runs one step in a process of its own, so that memory is its own."""
    command = [sys.executable, __file__, "--step", step, *words]
    return subprocess.run(
        command, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ).stdout


def main() -> None:
    """Makes, runs, compares, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--arm", type=Path, metavar="SDK")
    parser.add_argument("--cpus", nargs="+", choices=ARM, default=list(ARM))
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--work", type=Path, help="keep programs and outputs in this folder, and use those there")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        step, name, way, folder = options.step
        {"make": make, "measure": measure}[step](name, way, Path(folder))
        return
    if options.tables:
        write_table(json.loads(RESULT.read_text()))
        return
    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        for name in options.models:
            folder = work / name
            folder.mkdir(parents=True, exist_ok=True)
            if not saved(folder):
                child("make", name, "fp32", str(folder))
            for way in options.only:
                if not (folder / f"{way}.pte").exists():
                    child("make", name, way, str(folder))
                took = json.loads(child("measure", name, way, str(folder)).splitlines()[-1])
                row = {"model": name, "way": way, "where": arithmetic(), **took}
                rows = put(rows, {**row, "photos": compare(name, way, "native", folder)})
                for cpu in options.cpus if options.arm else ():
                    emulate(way, cpu, folder, options.arm)
                    row = {"model": name, "way": way, "where": ARM[cpu]}
                    rows = put(rows, {**row, "photos": compare(name, way, cpu, folder)})
                if options.work is None:
                    (folder / f"{way}.pte").unlink()
    write_table(json.loads(RESULT.read_text()))


def put(rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows with `row` in its place, written to the result file."""
    key = ("model", "way", "where")
    rows = [other for other in rows if any(other[part] != row[part] for part in key)] + [row]
    rows.sort(key=lambda row: (MODELS.index(row["model"]), row["where"], list(WAYS).index(row["way"])))
    result = {
        "command": "python benchmarks/precision.py --arm SDK",
        "what": "the vision graph on XNNPACK against float32 in PyTorch; CPU seconds are this machine's alone",
        "tools": {name: version(name) for name in ("executorch", "torch", "torchao")},
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in row.items() if name != "photos"}))
    for photo in row["photos"]:
        print("   ", json.dumps(photo))
    sys.stdout.flush()
    return rows


def table(result: Mapping[str, Any]) -> str:
    """The rows of a result file as Markdown."""
    lines = [
        f"Made by `{result['command']}`; rows with a command of their own by that.",
        "",
        "| model | way | arithmetic | photos | largest relative error | kept tokens in common, worst and mean "
        "| file, MB | resident, MB | CPU, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        errors = [value for photo in row["photos"] for name, value in photo.items() if name in OUTPUTS]
        kept = [photo["kept"] for photo in row["photos"]]
        took = [f"{row[key] / 1e6:.0f}" if key in row else "" for key in ("file_bytes", "resident_bytes")]
        took.append(f"{row['cpu_s']:.3f}" if "cpu_s" in row else "")
        cells = (row["model"], row["way"], row["where"], str(len(kept)), f"{max(errors):.2g}")
        shares = f"{min(kept):.0%}, {statistics.mean(kept):.0%}"
        lines.append(f"| {' | '.join((*cells, shares, *took))} |")
    commands = [f"- {row['model']}, {row['way']}: `{row['command']}`" for row in result["rows"] if "command" in row]
    lines += ["", *commands] if commands else []
    return "\n".join(lines) + "\n"


def write_table(result: Mapping[str, Any]) -> None:
    """Puts the table between the marks of docs/precision.md."""
    text = DOCUMENT.read_text()
    begin, end = "<!-- table: begin -->\n", "<!-- table: end -->"
    before, _, rest = text.partition(begin)
    DOCUMENT.write_text(before + begin + table(result) + end + rest.partition(end)[2])


def version(package: str) -> str:
    """The installed version."""
    from importlib.metadata import version

    return version(package)


def arithmetic() -> str:
    """This machine as the tables name it."""
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    half = "with" if "avx512_fp16" in flags else "without"
    return f"native {platform.machine()} {half} float16 arithmetic"


if __name__ == "__main__":
    main()
