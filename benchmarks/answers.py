"""What pruning brings to whole answers at full width, as ratios within one run on XNNPACK.

    python benchmarks/answers.py [--layers 8] [--keep 64] [--quant-text 8da4w]

Takes LLaVA-1.5-7B's geometry (CLIP ViT-L/14-336, decoder width 4096) with fewer decoder layers, so that memory holds it
twice, and seeded random weights: the graphs do the same work whatever they see. Lowers the pruned graphs and their
unpruned twin's, each in a process of its own, and then runs both in turns:

    image prefill   projected image features to the image's whole KV cache: decoder layers, pruner, `image_prefill`
    whole prefill   that and the question's chunk, up to its logits
    image ready     pixel values to the image's whole KV cache
    TTFT            question to first token, the image being ready

Floating-point operations are those of the graphs, counted on paper (two for a multiplication with its addition; the
pruner's and the tower's left out). The twin's "full TTFT" is image ready and TTFT together: what a user waits for whose
photo and question arrive at once. Writes benchmarks/results/answers-*.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import numpy as np

    from export.blocks.geometry import TextGeometry
    from export.families.family import ModelEntry
    from export.graphs.decoder import Context
    from runtime.session import Session

QUESTION_TOKENS = 40
TEXT_TOKENS = 512
AFTER_PROJECTOR = "after_projector"


def main() -> None:
    """Measures and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--quant-text", default="8da4w")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()

    import numpy as np

    from runtime.latency import device_name

    entry = _entry(options.layers)
    chance = np.random.default_rng(0)
    pixels = chance.standard_normal((1, 3, 336, 336)).astype(np.float32)
    question = chance.integers(3, entry.geometry.text.vocab, QUESTION_TOKENS).tolist()
    with tempfile.TemporaryDirectory() as name:
        folders = {side: Path(name) / side for side in ("pruned", "twin")}
        lowering = [
            multiprocessing.get_context("spawn").Process(
                target=_lower,
                args=(options.layers, options.keep if side == "pruned" else None, options.quant_text, folder),
            )
            for side, folder in folders.items()
        ]
        for process in lowering:
            process.start()
        for process in lowering:
            process.join()
            if process.exitcode:
                raise SystemExit(f"lowering ended with {process.exitcode}")
        lowering_rss = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        sizes = {side: (folder / "model.pte").stat().st_size for side, folder in folders.items()}
        sides = {side: _Side(entry, folder, threads=options.threads) for side, folder in folders.items()}
        times: dict[str, dict[str, list[float]]] = {side: {} for side in sides}
        for run in range(1 + options.runs):
            for side in ("pruned", "twin") if run % 2 else ("twin", "pruned"):
                for what, ms in sides[side].run(pixels, question).items():
                    if run:  # the first is the warm-up
                        times[side].setdefault(what, []).append(ms)
        caches = {side: opened.answers.cache_bytes for side, opened in sides.items()}
    flops = {side: opened.flops() for side, opened in sides.items()}
    full = [sum(pair) for pair in zip(times["twin"]["image ready"], times["twin"]["TTFT"], strict=True)]
    result: dict[str, Any] = {
        "command": "python " + " ".join(["benchmarks/answers.py", *sys.argv[1:]]),
        "machine": f"{device_name()}; not a phone",
        "threads": options.threads,
        "model": f"{entry.name}, random weights, tower fp32, decoder {options.quant_text}",
        "keep": options.keep,
        "question_tokens": QUESTION_TOKENS,
        "runs": options.runs,
        "median_ms": {
            side: {what: round(statistics.median(ms), 1) for what, ms in each.items()} for side, each in times.items()
        },
        "speedup": {
            what: _spread([b / a for a, b in zip(times["pruned"][what], times["twin"][what], strict=True)])
            for what in times["twin"]
        },
        "flop_ratio": {what: round(flops["twin"][what] / flops["pruned"][what], 3) for what in flops["twin"]},
        "tflop": {side: {what: round(n / 1e12, 3) for what, n in each.items()} for side, each in flops.items()},
        "twins_full_ttft_over_pruned_ttft": _spread(
            [b / a for a, b in zip(times["pruned"]["TTFT"], full, strict=True)]
        ),
        "kv_cache_bytes": caches,
        "file_bytes": sizes,
        "weight_bytes": _weight_bytes(entry, options.quant_text),
        "peak_rss_of_lowering_bytes": lowering_rss,
    }
    label = f"{options.layers}layers-{options.quant_text}-keep{options.keep}"
    (ROOT / f"benchmarks/results/answers-{label}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def _spread(ratios: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "most": round(max(ratios), 3),
    }


def _entry(layers: int) -> ModelEntry:
    """The 7B model with fewer decoder layers."""
    from export.families import MODELS
    from export.families.family import ModelEntry

    whole = MODELS["llava-1.5-7b"]
    return ModelEntry(
        name=f"llava-1.5-7b-{layers}-layers",
        family=whole.family,
        summary="the 7B model's geometry with fewer decoder layers",
        hub_id=None,
        config={**whole.config, "text_config": {**whole.config["text_config"], "num_hidden_layers": layers}},
        prefix_tokens=whole.prefix_tokens,
    )


def _context(entry: ModelEntry, keep: int) -> Context:
    from export.graphs.decoder import Context

    frame = entry.family.frame(range(entry.prefix_tokens), entry.geometry)
    return Context(entry.geometry, frame, keep=keep, cut=2, text=TEXT_TOKENS)


def _weight_bytes(entry: ModelEntry, scheme: str) -> int:
    """What the weights take when each is stored once: quantised ones, scales included, the others in float32."""
    import math

    from export.quantize import SCHEMES

    known = SCHEMES[scheme]
    total = 0
    for name, tensor in entry.tensors.items():
        shape, numbers = tensor.shape, math.prod(tensor.shape)
        if not tensor.needed or tensor.instead:
            continue
        if len(shape) == 2 and name.startswith(("layers.", "lm_head.")):
            scales = numbers // known.group if known.group else shape[0]
            total += numbers * known.bits // 8 + scales * 2
        else:
            total += numbers * 4
    return total


def _lower(layers: int, keep: int | None, scheme: str, folder: Path) -> None:
    """Lowers all graphs of one side into `folder`, and writes down there what they are."""
    import msgspec
    import torch

    from export.backends.xnnpack import lower
    from export.checkpoints import open_checkpoint
    from export.graphs.decoder import build_text_graphs
    from export.graphs.graph import Graph
    from export.graphs.vision import build_vision_encoder
    from pruning import PruneSpec
    from runtime.bundle import GraphInfo, TensorInfo
    from runtime.text_graphs import VISION_ENCODER

    entry = _entry(layers)
    checkpoint = open_checkpoint(entry, weights="random", seed=0)
    spec = None if keep is None else PruneSpec(keep=keep)
    encoder = build_vision_encoder(checkpoint, entry, spec, quant_layers=scheme)
    width, tokens = entry.geometry.text.hidden, encoder.image_tokens
    context = _context(entry, encoder.keep)
    if context.prefix != encoder.prefix_length:
        raise SystemExit(f"the prompt has {encoder.prefix_length} tokens instead of {context.prefix}")

    class AfterProjector(Graph):
        """What `vision_encoder` does with image features (1, N, D), over the same layers."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = encoder

        def input_infos(self) -> tuple[TensorInfo, ...]:
            return (TensorInfo(name="image_features", shape=(1, tokens, width), dtype="float32"),)

        def output_infos(self) -> tuple[TensorInfo, ...]:
            return encoder.output_infos()

        def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return self.encoder.from_features(features, features)  # the tower's keys are not asked for here

    graphs: dict[str, Graph] = {
        VISION_ENCODER: encoder,
        AFTER_PROJECTOR: AfterProjector().eval(),
        **build_text_graphs(checkpoint, context, quant=scheme),
    }
    folder.mkdir()
    lowered = lower(graphs, folder)
    infos = [
        GraphInfo(
            name=name,
            file=lowered[name].file,
            engine="executorch",
            arithmetic=("fp32",),
            inputs=graph.input_infos(),
            outputs=graph.output_infos(),
            coverage=lowered[name].coverage,
        )
        for name, graph in graphs.items()
    ]
    (folder / "graphs.json").write_bytes(msgspec.json.encode(infos))


class _Side:
    """All graphs of one model, pruned or not, open in the engine."""

    def __init__(self, entry: ModelEntry, folder: Path, *, threads: int) -> None:
        import msgspec

        from export.graphs.decoder import PROMPT_CHUNK
        from runtime.bundle import GraphInfo
        from runtime.engines import ENGINES
        from runtime.generation import Answers
        from runtime.session import Session
        from runtime.text_graphs import TEXT_DECODER

        self.text: TextGeometry = entry.geometry.text
        self.chunk = PROMPT_CHUNK
        self.sessions: dict[str, Session] = {}
        for info in msgspec.json.decode((folder / "graphs.json").read_bytes(), type=list[GraphInfo]):
            session = Session(info, ENGINES[info.engine](info, folder / info.file, (), threads), 0.0)
            if session.threads != threads:
                raise SystemExit(f"the engine runs {session.threads} threads instead of {threads}")
            self.sessions[info.name] = session
        kept = self.sessions["image_prefill"].graph.inputs[0].shape[1] - entry.prefix_tokens
        self.context = _context(entry, kept)
        self.answers = Answers(self.sessions, bundle=folder.name, first_text=self.context.first_text)
        past = self.sessions[TEXT_DECODER].graph.inputs[2]
        if past.shape[2] != self.context.entries(0):
            raise SystemExit(f"{past} does not have {self.context.entries(0)} entries")

    def run(self, pixels: np.ndarray, question: list[int]) -> dict[str, float]:
        """Milliseconds of everything, once."""
        import numpy as np

        from runtime.text_graphs import IMAGE_PREFILL, TEXT_PREFILL

        photo = self.answers.see(pixels)
        first, second, *_ = self.answers.answer(photo, question, max_new_tokens=3, past_end=True)
        (features,) = self.sessions[AFTER_PROJECTOR].graph.inputs
        some = np.random.default_rng(1).standard_normal(features.shape).astype(np.float32)
        start = time.perf_counter()
        seen = self.sessions[AFTER_PROJECTOR].run({"image_features": some})
        self.sessions[IMAGE_PREFILL].run({name: seen[name] for name in ("hidden", "positions")})
        image_ms = (time.perf_counter() - start) * 1e3
        zeros = {info.name: np.zeros(info.shape, info.numpy_dtype) for info in self.sessions[TEXT_PREFILL].graph.inputs}
        positions = self.context.first_text + np.arange(self.chunk, dtype=np.int64)[None]
        start = time.perf_counter()
        self.sessions[TEXT_PREFILL].run({**zeros, "positions": positions})
        return {
            "image prefill": image_ms,
            "whole prefill": image_ms + (time.perf_counter() - start) * 1e3,
            "image ready": photo.image_ready_ms,
            "TTFT": first.ms,
            "token": second.ms,
        }

    def flops(self) -> dict[str, float]:
        """Floating-point operations of both prefills."""
        text, context = self.text, self.context
        queries, keys = text.heads * text.head_dim, text.kv_heads * text.head_dim

        def layer(tokens: int, seen: int) -> float:
            linear = 2 * queries + 2 * keys + 3 * text.mlp
            return 2.0 * tokens * text.hidden * linear + 4.0 * tokens * seen * queries

        image = context.first_text - context.prefix
        kept = context.prefix + context.keep
        prefill = context.cut * layer(image, context.first_text)
        prefill += (context.layers - context.cut - 1) * layer(kept, kept)
        prefill += 2.0 * kept * text.hidden * 2 * keys  # of the last layer only keys and values
        question = sum(layer(self.chunk, context.entries(i) + self.chunk) for i in range(context.layers))
        question += 2.0 * self.chunk * text.hidden * text.vocab
        return {"image prefill": prefill, "whole prefill": prefill + question}


if __name__ == "__main__":
    main()
