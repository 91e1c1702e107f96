"""Small bundles for tests: a patch-embedding graph that keeps fixed tokens, as .onnx (made without torch) or .pte."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
from safetensors.numpy import save

from runtime.bundle import (
    MANIFEST,
    BundleWriter,
    DelegateCoverage,
    FileInfo,
    FrameInfo,
    GoldenInfo,
    GraphInfo,
    ImageInfo,
    Manifest,
    OutsideOp,
    PromptInfo,
    PruneInfo,
    TargetInfo,
    TensorInfo,
    WeightsInfo,
)
from runtime.image import preprocess, view

if TYPE_CHECKING:
    import torch

Engine = Literal["onnxruntime", "executorch"]
Arrays = dict[str, np.ndarray]

PREFIX, WIDTH, HEADS = 3, 8, 2
VISION = "vision_encoder"


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What a sample bundle is made of; `keep` equal to the number of patches makes the unpruned twin."""

    engine: Engine = "onnxruntime"
    grid: tuple[int, int] = (4, 4)
    patch: int = 7
    keep: int = 4
    cut: int = 1
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def pruned(self) -> bool:
        return self.keep < self.tokens

    @property
    def image(self) -> ImageInfo:
        rows, columns = self.grid
        return ImageInfo(
            size=(rows * self.patch, columns * self.patch),
            resize_shortest=max(rows, columns) * self.patch,
            rescale=1 / 255,
            mean=(0.5, 0.45, 0.4),
            std=(0.27, 0.26, 0.28),
        )


def noise_photo(height: int = 40, width: int = 52, *, seed: int = 0) -> np.ndarray:
    """A uint8 (height, width, 3) photo of nothing."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_bundle(target: Path, sample: Sample, photo: np.ndarray | None = None) -> Path:
    """Writes a whole bundle without reports and returns its folder."""
    with BundleWriter(target) as writer:
        manifest = fill(writer.path, target.name, sample, noise_photo() if photo is None else photo)
        writer.commit(manifest)
    return target


def fill(folder: Path, name: str, sample: Sample, photo: np.ndarray) -> Manifest:
    """Writes the graph and the golden into a folder; returns the manifest without files."""
    golden = make_golden(sample, photo)
    (folder / "golden.safetensors").write_bytes(save(golden))
    (folder / "tokenizer.json").write_text("{}")
    write = write_onnx if sample.engine == "onnxruntime" else write_pte
    file, coverage = write(folder, sample, golden)
    outputs = {key.removeprefix(f"{VISION}.out."): array for key, array in golden.items() if ".out." in key}
    return Manifest(
        name=name,
        model="sample",
        family="llava",
        created_utc="2026-01-31T12:00:00Z",
        weights=WeightsInfo(source="checkpoint", id="sample", sha256=hashlib.sha256(b"sample").hexdigest()),
        target=TargetInfo(
            name="android", backend="xnnpack" if sample.engine == "executorch" else "onnx", precision="fp32"
        ),
        prune=PruneInfo(
            cut=sample.cut,
            image_tokens=sample.tokens,
            keep=sample.keep,
            grid=sample.grid,
            pruned=sample.pruned,
            method="most-detail" if sample.pruned else None,
            settings={"patches": 4, "threshold": 0.8} if sample.pruned else {},
            arithmetic="float32",
        ),
        graphs=(
            GraphInfo(
                name=VISION,
                file=file,
                engine=sample.engine,
                arithmetic=("fp32",),
                inputs=(_info("pixel_values", golden[f"{VISION}.in.pixel_values"]),),
                outputs=tuple(_info(key, array) for key, array in outputs.items()),
                coverage=coverage,
            ),
        ),
        image=sample.image,
        prompt=PromptInfo(prefix_ids=tuple(range(PREFIX)), prefix_text="USER: ", special_ids={"image": 32000}),
        frame=FrameInfo(before=PREFIX, image=sample.tokens, first_text=PREFIX + sample.tokens),
        golden=GoldenInfo(file="golden.safetensors", device="CPU (numpy)", torch="none", photo="noise.png"),
        tools={"numpy": np.__version__},
    )


def make_golden(sample: Sample, photo: np.ndarray) -> Arrays:
    """The sample graph in numpy, with the photo and the order in which tokens were picked."""
    pixels = preprocess(photo, sample.image)
    tokens = _patches(pixels, sample) @ weights(sample)["embed"]
    order = pick_order(photo, sample)
    kept = np.sort(order)
    golden: Arrays = {f"{VISION}.in.pixel_values": pixels, "photo": photo, "kept_indices": kept}
    golden |= {"kept_order": order, "kept_margin": np.linspace(0.1, 0.001, len(order), dtype=np.float32)}
    golden["marks"] = order[:2]
    if sample.pruned:  # no token is like any other, so that recovery mixes nothing
        golden["recovery.hidden"] = tokens[0]
        golden["recovery.similarity"] = np.eye(sample.tokens, dtype=np.float32)
        golden["recovery.share"] = np.full(1, 0.7, np.float32)
        golden["recovery.least_share"] = np.full(1, 2.0**-10, np.float32)
    if not sample.cut:
        golden[f"{VISION}.out.image_features"] = tokens[:, kept]
        golden[f"{VISION}.out.kept_indices"] = kept[None]
        return golden
    prefix = weights(sample)["prefix"]
    everything = np.concatenate((prefix, tokens), axis=1)
    heads = everything.reshape(1, -1, HEADS, WIDTH // HEADS).transpose(0, 2, 1, 3)
    golden[f"{VISION}.out.hidden"] = np.concatenate((prefix, tokens[:, kept]), axis=1)
    golden[f"{VISION}.out.positions"] = np.concatenate((np.arange(PREFIX), kept + PREFIX))[None].astype(np.int64)
    golden[f"{VISION}.out.key_0"] = np.ascontiguousarray(heads)
    return golden


def pick_order(photo: np.ndarray, sample: Sample) -> np.ndarray:
    """The `keep` patches with the most detail, most first: (keep,) int64."""
    detail = _patches(view(photo, sample.image).transpose(2, 0, 1)[None].astype(np.float32), sample).std(axis=2)[0]
    return np.argsort(-detail, kind="stable")[: sample.keep].astype(np.int64)


def weights(sample: Sample) -> Arrays:
    """Seeded weights of the sample graph."""
    rng = np.random.default_rng(sample.seed)
    size = 3 * sample.patch**2
    embed = rng.standard_normal((size, WIDTH), dtype=np.float32) / np.float32(np.sqrt(size))
    return {"embed": embed, "prefix": rng.standard_normal((1, PREFIX, WIDTH), dtype=np.float32)}


def _patches(pixels: np.ndarray, sample: Sample) -> np.ndarray:
    """(1, 3, h, w) -> (1, tokens, 3 * patch * patch)."""
    rows, columns = sample.grid
    cut = pixels.reshape(1, 3, rows, sample.patch, columns, sample.patch)
    return cut.transpose(0, 2, 4, 1, 3, 5).reshape(1, sample.tokens, -1)


def _info(name: str, array: np.ndarray) -> TensorInfo:
    return TensorInfo(name=name, shape=array.shape, dtype=str(array.dtype))


def write_onnx(folder: Path, sample: Sample, golden: Arrays) -> tuple[str, tuple[DelegateCoverage, ...]]:
    """The sample graph by hand, so that an ONNX bundle needs no torch anywhere."""
    from onnx import TensorProto, helper, numpy_helper, save_model

    rows, columns = sample.grid
    constants: Arrays = {
        **weights(sample),
        "cut": np.array((1, 3, rows, sample.patch, columns, sample.patch)),
        "flat": np.array((1, sample.tokens, 3 * sample.patch**2)),
        "kept": golden["kept_indices"],
        "zero": np.array(0),
        "by_head": np.array((1, PREFIX + sample.tokens, HEADS, WIDTH // HEADS)),
    }
    nodes = [
        helper.make_node("Reshape", ["pixel_values", "cut"], ["cut_up"]),
        helper.make_node("Transpose", ["cut_up"], ["turned"], perm=[0, 2, 4, 1, 3, 5]),
        helper.make_node("Reshape", ["turned", "flat"], ["patches"]),
        helper.make_node("MatMul", ["patches", "embed"], ["tokens"]),
    ]
    if not sample.cut:
        constants["ids"] = golden[f"{VISION}.out.kept_indices"]
        nodes += [
            helper.make_node("Gather", ["tokens", "kept"], ["image_features"], axis=1),
            helper.make_node("Add", ["ids", "zero"], ["kept_indices"]),
        ]
    else:
        constants["ids"] = golden[f"{VISION}.out.positions"]
        nodes += [
            helper.make_node("Gather", ["tokens", "kept"], ["kept_tokens"], axis=1),
            helper.make_node("Concat", ["prefix", "kept_tokens"], ["hidden"], axis=1),
            helper.make_node("Add", ["ids", "zero"], ["positions"]),
            helper.make_node("Concat", ["prefix", "tokens"], ["everything"], axis=1),
            helper.make_node("Reshape", ["everything", "by_head"], ["split"]),
            helper.make_node("Transpose", ["split"], ["key_0"], perm=[0, 2, 1, 3]),
        ]
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        VISION,
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, golden[f"{VISION}.in.pixel_values"].shape)],
        [
            helper.make_tensor_value_info(
                key.removeprefix(f"{VISION}.out."),
                TensorProto.INT64 if array.dtype == np.int64 else TensorProto.FLOAT,
                array.shape,
            )
            for key, array in golden.items()
            if ".out." in key
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 10
    save_model(model, folder / f"{VISION}.onnx")
    return f"{VISION}.onnx", ()


def write_pte(
    folder: Path, sample: Sample, golden: Arrays, *, external: bool = False
) -> tuple[str, tuple[DelegateCoverage, ...]]:
    """The sample graph through torch.export and XNNPACK."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter; the subject of these tests is what it writes
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower

        program = torch.export.export(
            _module(sample, golden), (torch.from_numpy(golden[f"{VISION}.in.pixel_values"]),), strict=False
        )
        lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch(
            ExecutorchBackendConfig(external_constants=external)
        )
        (folder / f"{VISION}.pte").write_bytes(lowered.buffer)
        if external:
            lowered.write_tensor_data_to_file(str(folder))
    from runtime.engines.program import read_program

    (method,) = read_program(folder / f"{VISION}.pte")
    return f"{VISION}.pte", (
        DelegateCoverage(
            delegate="XnnpackBackend",
            partitions=method.delegates["XnnpackBackend"],
            nodes=6,
            outside=tuple(
                OutsideOp(op=op, count=count, reason="no such operator in XNNPACK")
                for op, count in method.kernels.items()
            ),
        ),
    )


def _module(sample: Sample, golden: Arrays) -> torch.nn.Module:
    import torch

    class Graph(torch.nn.Module):
        embed: torch.Tensor
        prefix: torch.Tensor
        choose: torch.Tensor
        ids: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            for name, array in weights(sample).items():
                self.register_buffer(name, torch.from_numpy(array))
            choose = np.eye(sample.tokens, dtype=np.float32)[golden["kept_indices"]]
            self.register_buffer("choose", torch.from_numpy(choose)[None])
            ids = "positions" if sample.cut else "kept_indices"
            self.register_buffer("ids", torch.from_numpy(golden[f"{VISION}.out.{ids}"]))

        def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
            rows, columns = sample.grid
            cut = pixels.reshape(1, 3, rows, sample.patch, columns, sample.patch)
            patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(1, sample.tokens, -1)
            tokens = patches @ self.embed
            kept = torch.bmm(self.choose, tokens)
            if not sample.cut:
                return kept, self.ids + 0
            everything = torch.cat((self.prefix, tokens), dim=1)
            heads = everything.reshape(1, -1, HEADS, WIDTH // HEADS).permute(0, 2, 1, 3)
            return torch.cat((self.prefix, kept), dim=1), self.ids + 0, heads.contiguous()

    return Graph().eval()


def edit_manifest(bundle: Path, **changes: object) -> None:
    """Overwrites top-level fields of manifest.json as an attacker would: without any check."""
    raw = msgspec.json.decode((bundle / MANIFEST).read_bytes())
    raw.update(changes)
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(raw))


def rehash(bundle: Path, relative: str) -> None:
    """Makes the manifest agree with a file that a test has changed."""
    data = (bundle / relative).read_bytes()
    raw = msgspec.json.decode((bundle / MANIFEST).read_bytes())
    raw["files"][relative] = msgspec.to_builtins(
        FileInfo(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    )
    (bundle / MANIFEST).write_bytes(msgspec.json.encode(raw))
