"""The systems that benchmarks/peers.py measures side by side: how each is made, and the worker that runs it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.peer_systems import llama_cpp, model
from benchmarks.peer_systems.kept import digest, kept, run

HERE = Path(__file__).resolve().parent
# What the model, its weights and what is asked follow from.
_MODEL = ("benchmarks/peer_systems/model.py", "export/checkpoints.py", "export/families", "export/models/prompt.py")
_EXPORT = (*_MODEL, "export", "pruning", "runtime/bundle.py")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One run: the decoder's layers, threads, tokens behind the first of each answer, and where things are kept."""

    layers: int
    threads: int
    new_tokens: int
    work: Path

    @property
    def depth(self) -> Path:
        """The folder of what is made for this many layers."""
        return self.work / f"layers-{self.layers}"

    @property
    def inputs(self) -> Path:
        """The folder of what every system is given."""
        return self.depth / "inputs"


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A system that can be started: the worker's command, and bytes of the files that it loads.

    `versions` are what its worker cannot tell; `note` says what else a reader should know. `image_ready_flop` is what
    it computes for a photo, of what prunes and of its twin.
    """

    command: tuple[str, ...]
    file_bytes: int
    versions: Mapping[str, str]
    note: str = ""
    image_ready_flop: float | None = None


def write_inputs(settings: Settings) -> None:
    """Makes what every system is given, and the references."""
    made_from = digest((*_MODEL, "runtime/image.py"), settings.layers)
    kept(settings.inputs, made_from, lambda folder: model.write_inputs(settings.layers, folder))


def _python(script: str, *words: object) -> tuple[str, ...]:
    return (sys.executable, str(HERE / script), *(str(word) for word in words))


def _pruneport(settings: Settings, *, name: str, flags: tuple[str, ...]) -> Ready:
    """Exports a bundle, unless it is there and the exporter's code has not changed since."""
    from runtime.bundle import read_bundle

    def make(folder: Path) -> None:
        # One whose own check fails computes something else, and is not timed.
        run(*_python("bundles.py", settings.layers, "--target", "android", *flags, "--output-dir", folder))

    folder = kept(settings.depth / name, digest(_EXPORT, settings.layers, flags), make)
    (path,) = (each for each in folder.iterdir() if (each / "manifest.json").is_file())
    bundle = read_bundle(path)
    files = {file for graph in bundle.manifest.graphs for file in graph.files}
    prune = bundle.manifest.prune
    return Ready(
        command=_python("pruneport_worker.py", settings.inputs, path, settings.threads, settings.new_tokens),
        file_bytes=sum((path / file).stat().st_size for file in files),
        versions={},
        note=f"pruneport export {' '.join(flags)}",
        image_ready_flop=model.operations(settings.layers, prune.keep, cut=prune.cut),
    )


def _llama(settings: Settings, *, projector: str, micro_batch: int) -> Ready:
    """Builds llama.cpp and writes the weights, unless both are there."""
    program = llama_cpp.build(settings.work)
    made_from = digest((*_MODEL, "benchmarks/peer_systems/llama_cpp.py"), settings.layers)
    folder = kept(
        settings.depth / "gguf",
        made_from,
        lambda folder: llama_cpp.write_weights(settings.work, settings.layers, folder),
    )
    files = folder / llama_cpp.TEXT, folder / llama_cpp.PROJECTORS[projector]
    asked = model.asked(settings.inputs)
    side = asked.pixels.shape[-1]
    words = (
        *files,
        settings.inputs / model.PHOTO,
        side,
        *(",".join(map(str, ids)) for ids in (asked.prefix, asked.question)),
        settings.threads,
        micro_batch,
        settings.new_tokens,
    )
    return Ready(
        command=(str(program), "work", *(str(word) for word in words)),
        file_bytes=sum(file.stat().st_size for file in files),
        versions={llama_cpp.PACKAGE: llama_cpp.VERSION},
        note=f"mmproj {projector}, ubatch {micro_batch}",
    )


def _transformers(settings: Settings, *, name: str, size: int) -> Ready:
    """Needs nothing but the packages; its file would be the weights in the type that it computes in."""
    entry = model.entry(settings.layers)
    numbers = sum(math.prod(tensor.shape) for tensor in entry.tensors.values() if tensor.needed)
    return Ready(
        command=_python(
            "transformers_worker.py", settings.inputs, settings.layers, name, settings.threads, settings.new_tokens
        ),
        file_bytes=numbers * size,
        versions={},
        note="file_bytes is what the weights take in this type",
    )


SYSTEMS: Mapping[str, Callable[[Settings], Ready]] = {
    "pruneport-keep64": partial(_pruneport, name="pruneport-keep64", flags=("--keep", "64")),
    "pruneport-twin": partial(_pruneport, name="pruneport-twin", flags=("--keep", "all")),
    "pruneport-onnx-int4": partial(
        _pruneport, name="pruneport-onnx-int4", flags=("--keep", "64", "--backend", "onnx", "--quant-text", "int4")
    ),
    "llama.cpp-q4_0": partial(_llama, projector="f16", micro_batch=512),
    "llama.cpp-q4_0-mmproj-q8_0": partial(_llama, projector="q8_0", micro_batch=1024),
    "transformers-bf16": partial(_transformers, name="bf16", size=2),
    "transformers-fp32": partial(_transformers, name="fp32", size=4),
}
