"""The static pruner beside the paper's loop, and what it saves of the decoder's prefill, on one GPU.

    python benchmarks/cuda.py [--model llava-1.5-7b] [--layers N] [--dtype bf16|fp16|fp32] [--keep 64] [--runs 30]

All rows are milliseconds of one device, taken in turns; on a GPU by events, between which nothing else is queued.

    loop       the paper's algorithm as written, on the device: it reads numbers back at each choice
    static     the static pruner as a module, which looks at its features before it takes them
    captured   the static pruner, recorded once as a CUDA graph and replayed (GPUs only)
    twin       the decoder over prefix, image and question, up to the first token's logits; nothing is pruned
    pruned     the same with the pruner in front of layer 2, captured where there is such a row

The loop's time depends on the features: on "noise" it does the least that it can, on "smooth" ones neighbours are
alike, as in photos. All forms must keep the same tokens, or nothing is written. The decoder is transformers' own
modules with seeded random weights, which make no difference to the time. `--layers` takes fewer of its layers, where
memory does not hold all.
Writes benchmarks/results/cuda-GPU.json. With `--device cpu` the same code runs without CUDA graphs, to try it; that is
no measurement of a GPU, and is printed, not written.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from export.families.family import ModelEntry

# What the pruner is meant to reach on a GPU; docs/measurements.md says so, too.
TIMES_FASTER, MOST_MS = 10.0, 0.5
CUT = 2  # the paper's
QUESTION_TOKENS = 32
WARMUP = 3
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
Prune = Callable[["Tensor", "Tensor"], "tuple[Tensor, ...]"]


def main() -> None:
    """Measures, prints, and on a GPU writes the result file."""
    options = _parser().parse_args()
    result = measure(options)
    print(json.dumps(result, indent=2))
    for line in against_targets(result):
        print(line)
    if result["device"] != "cuda":
        print("not written: this is no GPU")
        return
    name = re.sub("[^a-z0-9]+", "-", result["machine"].lower()).strip("-")
    path = ROOT / f"benchmarks/results/cuda-{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"written: {path.relative_to(ROOT)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, help="decoder layers (default: all of the model's)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--runs", type=int, default=30)
    return parser


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Returns all rows of one device. SystemExit for a request it cannot serve, or forms that keep other tokens."""
    import torch

    from export.families import MODELS
    from pruning import PruneSpec, TokenPruner
    from runtime.latency import device_name

    if options.model not in MODELS:
        raise SystemExit(f"unknown model {options.model!r}; allowed: {', '.join(MODELS)}")
    entry = MODELS[options.model]
    most = entry.geometry.text.layers
    layers = most if options.layers is None else options.layers
    if not CUT < layers <= most:
        raise SystemExit(f"layers={layers} must lie in {CUT + 1}..{most}: pruning is in front of layer {CUT}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            f"torch {torch.__version__} finds no GPU here; run this on a machine with one, or try it with --device cpu"
        )
    device = torch.device(options.device)
    dtype: torch.dtype = getattr(torch, DTYPES[options.dtype])
    # The pruner is float32 throughout, and TF32's ten bits would choose other tokens.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    spec = PruneSpec(grid=entry.geometry.grid, keep=options.keep)
    pruner = TokenPruner(spec).to(device).eval()
    text = entry.geometry.text
    with torch.no_grad():
        pruned = []
        for kind, make in FEATURES.items():
            keys = make(spec.grid, text.kv_heads * text.head_dim, 1).to(device, dtype)
            hidden = make(spec.grid, text.hidden, 2).to(device, dtype)
            rows = pruner_rows(pruner, keys, hidden, options.runs)
            pruned.append({"features": kind, "dtype": options.dtype} | rows)
        prefill = _prefill_rows(entry, layers, pruner, dtype, device, options.runs)
    tools = {name: version(name) for name in ("torch", "transformers")}
    return {
        "command": " ".join(["python benchmarks/cuda.py", *sys.argv[1:]]),
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device_name()}; not a GPU",
        "device": device.type,
        "date": datetime.now(UTC).date().isoformat(),
        "tools": tools | ({"CUDA": torch.version.cuda} if device.type == "cuda" else {}),
        "pruner": pruned,
        "prefill": {"model": entry.name, "dtype": options.dtype} | prefill,
    }


def against_targets(result: Mapping[str, Any]) -> list[str]:
    """Holds the fastest form of the pruner against what it is meant to reach, line by line."""
    lines = []
    for row in result["pruner"]:
        form = min(row["loop_over"], key=lambda name: row["median_ms"][name])
        faster, ms = row["loop_over"][form]["median"], row["median_ms"][form]
        lines.append(
            f"{result['machine']}, {row['features']}, {row['tokens']} -> {row['keep']}: {form} takes {ms:.3f} ms "
            f"(target: under {MOST_MS:g}), and the loop {faster:.1f} times as long (target: at least {TIMES_FASTER:g})"
        )
    return lines


def noise(grid: tuple[int, int], width: int, seed: int) -> Tensor:
    """Features (1, N, width) of which no two are alike."""
    import torch

    return torch.randn(1, grid[0] * grid[1], width, generator=torch.Generator().manual_seed(seed))


def smooth(grid: tuple[int, int], width: int, seed: int) -> Tensor:
    """Features (1, N, width) that change slowly over the grid, with a tenth of noise."""
    from torch.nn import functional

    rows, columns = grid
    coarse = noise((max(2, rows // 4), max(2, columns // 4)), width, seed)
    side = (1, width, max(2, rows // 4), max(2, columns // 4))
    fine = functional.interpolate(coarse.transpose(1, 2).reshape(side), size=grid, mode="bilinear")
    return fine.flatten(2).transpose(1, 2) + 0.1 * noise(grid, width, seed + 100)


FEATURES: Mapping[str, Callable[[tuple[int, int], int, int], Tensor]] = {"smooth": smooth, "noise": noise}


class Captured:
    """A function of tensors, recorded once as a CUDA graph; what it gives back is overwritten by the next call."""

    def __init__(self, function: Prune, *inputs: Tensor) -> None:
        import torch

        self._inputs = [x.clone() for x in inputs]
        # What libraries set up at their first call cannot be recorded.
        aside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARMUP):
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        for held, given in zip(self._inputs, inputs, strict=True):
            held.copy_(given)
        self._graph.replay()
        return self._outputs


def pruner_rows(pruner: Any, keys: Tensor, hidden: Tensor, runs: int) -> dict[str, Any]:
    """The loop and the static forms on features (1, N, Dk), (1, N, D); SystemExit where they keep other tokens."""
    import torch

    from pruning import reference

    spec = pruner.spec
    forms: dict[str, Prune] = {
        "loop": lambda k, h: reference.prune(k, h, spec),
        "static": pruner,
    }
    if keys.device.type == "cuda":
        forms["captured"] = Captured(pruner.select_unread, keys, hidden)
    kept = {name: form(keys, hidden)[1].long().clone() for name, form in forms.items()}
    for name, indices in kept.items():
        if not torch.equal(indices, kept["loop"]):
            differ = int((~torch.isin(indices, kept["loop"])).sum())
            raise SystemExit(f"{name} keeps {differ} of {spec.keep} tokens that the loop does not; nothing is measured")
    taken = in_turns({name: partial(form, keys, hidden) for name, form in forms.items()}, keys.device, runs)
    return {
        "tokens": spec.tokens,
        "keep": spec.keep,
        "widths": [keys.shape[2], hidden.shape[2]],
        "filled": int(pruner.select(keys, hidden)[2].sum()),
        "median_ms": _medians(taken),
        "loop_over": {name: _spread(taken["loop"], taken[name]) for name in forms if name != "loop"},
    }


class Prefill:
    """transformers' decoder layers, last norm and output matrix, with seeded random weights, and a prompt for them."""

    def __init__(self, entry: ModelEntry, layers: int, dtype: torch.dtype, device: torch.device) -> None:
        """SystemExit where the GPU's memory does not hold the weights."""
        import torch
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

        from export.families.llava.desktop import eager_config

        config = eager_config(entry.config).text_config
        config._attn_implementation = "sdpa"
        draw = torch.Generator(device).manual_seed(0)
        with torch.device("meta"):
            modules = torch.nn.ModuleList(LlamaDecoderLayer(config, index) for index in range(layers))
            modules.append(LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps))
            modules.append(torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False))
        modules.to(dtype).eval()
        needed = sum(x.numel() * x.element_size() for x in modules.parameters())
        if device.type == "cuda" and (free := torch.cuda.mem_get_info(device)[0]) < 1.2 * needed:
            raise SystemExit(
                f"{layers} layers in {dtype} take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free on the GPU; "
                "take fewer --layers"
            )
        modules.to_empty(device=device)
        for parameter in modules.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.02, generator=draw)
            else:
                parameter.fill_(1.0)
        self._config = config
        *self._layers, self._norm, self._head = modules
        self._rotary = LlamaRotaryEmbedding(config).to(device)
        self.prefix, self.image = entry.prefix_tokens, entry.geometry.image_tokens
        tokens = self.prefix + self.image + QUESTION_TOKENS
        self._prompt = torch.randn(1, tokens, config.hidden_size, device=device, dtype=dtype, generator=draw)
        self._positions = torch.arange(tokens, device=device)[None]

    def features(self) -> tuple[Tensor, Tensor]:
        """Gives keys (1, N, Dk) and hidden states (1, N, D) of the image in front of the cut."""
        hidden, cache = self._run(self._layers[:CUT], self._prompt, self._positions)
        return self._image_keys(cache), self._image_of(hidden)

    def logits(self, prune: Prune | None) -> Tensor:
        """Gives the first token's logits (1, 1, V); `prune` gives tokens and indices of keys and hidden states."""
        import torch

        hidden, cache = self._run(self._layers[:CUT], self._prompt, self._positions)
        positions = self._positions
        if prune is not None:
            tokens, indices = prune(self._image_keys(cache), self._image_of(hidden))[:2]
            end = self.prefix + self.image
            hidden = torch.cat([hidden[:, : self.prefix], tokens, hidden[:, end:]], dim=1)
            kept = indices.long() + self.prefix
            positions = torch.cat([positions[:, : self.prefix], kept, positions[:, end:]], dim=1)
        hidden, _ = self._run(self._layers[CUT:], hidden, positions, cache)
        logits: Tensor = self._head(self._norm(hidden[:, -1:]))
        return logits

    def _run(self, layers: Any, hidden: Tensor, positions: Tensor, cache: Any = None) -> tuple[Tensor, Any]:
        """hidden (1, T, D) through some layers, causally; their keys and values are left in the cache."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self._config) if cache is None else cache
        rotary = self._rotary(hidden, position_ids=positions)
        for layer in layers:
            hidden = layer(
                hidden,
                attention_mask=None,
                position_ids=positions,
                past_key_values=cache,
                position_embeddings=rotary,
            )
        return hidden, cache

    def _image_keys(self, cache: Any) -> Tensor:
        keys: Tensor = cache.layers[CUT - 1].keys  # (1, Hkv, T, d)
        return self._image_of(keys.transpose(1, 2).flatten(2))

    def _image_of(self, states: Tensor) -> Tensor:
        return states[:, self.prefix : self.prefix + self.image]


def _prefill_rows(
    entry: ModelEntry, layers: int, pruner: Any, dtype: torch.dtype, device: torch.device, runs: int
) -> dict[str, Any]:
    """The decoder over a whole prompt, pruned and not."""
    import torch

    prefill = Prefill(entry, layers, dtype, device)
    prune: Prune = pruner.select_unread
    if device.type == "cuda":
        prune = Captured(pruner.select_unread, *prefill.features())
    for logits in (prefill.logits(None), prefill.logits(prune)):
        if not bool(torch.isfinite(logits).all()):
            raise SystemExit(f"the logits of {layers} layers in {dtype} are not finite; take another --dtype")
    taken = in_turns({"twin": lambda: prefill.logits(None), "pruned": lambda: prefill.logits(prune)}, device, runs)
    return {
        "layers": layers,
        "cut": CUT,
        "keep": pruner.spec.keep,
        "tokens": {"prefix": prefill.prefix, "image": prefill.image, "question": QUESTION_TOKENS},
        "median_ms": _medians(taken),
        "twin_over": {"pruned": _spread(taken["twin"], taken["pruned"])},
    }


def in_turns(works: Mapping[str, Callable[[], object]], device: torch.device, runs: int) -> dict[str, list[float]]:
    """Milliseconds of each, run by run, after WARMUP untimed rounds; what warms or slows one does it to all."""
    taken: dict[str, list[float]] = {name: [] for name in works}
    for number in range(-WARMUP, runs):
        for name, work in works.items():
            ms = _time_ms(work, device)
            if number >= 0:
                taken[name].append(ms)
    return taken


def _time_ms(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds until all is computed that `work` asks for; on a GPU by its own clock, from an empty queue on."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) * 1e3
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize(device)
    begin.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end))


def _medians(taken: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: round(statistics.median(ms), 4) for name, ms in taken.items()}


def _spread(slow: list[float], fast: list[float]) -> dict[str, float | int]:
    """How many times faster, turn by turn."""
    ratios = [one / other for one, other in zip(slow, fast, strict=True)]
    return {
        "median": round(statistics.median(ratios), 3),
        "least": round(min(ratios), 3),
        "most": round(max(ratios), 3),
        "runs": len(ratios),
    }


if __name__ == "__main__":
    main()
