"""One program for ExecuTorch's own multimodal runner: vision, embedding and decoder as the methods that it calls."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.backends.executorch import FILE, write_program
from export.backends.tracing import trace
from export.backends.xnnpack import DELEGATE
from export.settings import read_object
from runtime.errors import CheckpointError, ExportError
from runtime.text_graphs import TEXT_DECODER, TOKEN_EMBEDDING, VISION_ENCODER

if TYPE_CHECKING:
    from export.families.family import Checkpoint, ModelEntry
    from export.graphs.graph import Graph
    from export.graphs.vision import VisionEncoder
    from runtime.bundle import GraphInfo


def write_for_runner(
    checkpoint: Checkpoint,
    entry: ModelEntry,
    vision: VisionEncoder,
    folder: Path,
    *,
    quant_text: str | None,
    text_tokens: int,
    arithmetic: Callable[[str], tuple[str, ...]],
) -> tuple[GraphInfo, ...]:
    """Writes one program with the methods `vision_encoder`, `token_embedding` and `text_decoder`, everything that
    XNNPACK takes lowered to it, and the constants that the runner asks for.

    The KV cache holds the prompt's prefix, the kept image tokens and `text_tokens` more; a single input of the runner
    may be as long as the longest of the three. Text that is not quantised has the precision of `vision`.

    Raises ExportError for a vision graph with the prompt in it, or for more positions than the checkpoint
    knows; CheckpointError for a tokenizer with more tokens than there are logits.
    """
    import torch

    from export.graphs.ready_made import build_ready_made_graphs
    from export.models.prompt import end_ids, read_prompt
    from runtime.bundle import GraphInfo

    if vision.framed:
        raise ExportError(
            f"a ready-made runner takes image features alone, which a vision graph of cut {vision.cut} with the prompt "
            "in it does not give; take --cut 0"
        )
    _check_tokenizer(checkpoint)
    prompt = read_prompt(checkpoint.folder, checkpoint.geometry, entry)
    decoder = build_ready_made_graphs(
        checkpoint,
        tokens=max(len(prompt.prefix_ids), vision.keep, text_tokens),
        context=len(prompt.prefix_ids) + vision.keep + text_tokens,
        precision="fp16" if vision.dtype == torch.float16 and quant_text is None else "fp32",
        quant=quant_text,
    )
    graphs: dict[str, Graph] = {
        VISION_ENCODER: vision,
        TOKEN_EMBEDDING: decoder.token_embedding,
        TEXT_DECODER: decoder.text_decoder,
    }
    constants: dict[str, Any] = {
        "get_max_seq_len": decoder.text_decoder.tokens,
        "get_max_context_len": decoder.text_decoder.context,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }
    if ends := end_ids(checkpoint):  # else the runner takes what its tokenizer says
        constants["get_eos_ids"] = list(ends)
    _copy_tokenizer(checkpoint, folder)
    coverage = write_program(graphs, folder, DELEGATE, trace=trace, copies_inputs=True, constants=constants)
    return tuple(
        GraphInfo(
            name=name,
            file=FILE,
            engine="executorch",
            arithmetic=arithmetic(name),
            inputs=graph.input_infos(),
            outputs=graph.output_infos(),
            coverage=(coverage[name],),
        )
        for name, graph in graphs.items()
    )


def _copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes the checkpoint's own tokenizer.json without the padding, truncation and dropout that were on in it.

    Not the form that transformers makes of it: its Metaspace is nothing that the runner's tokenizer knows.
    """
    source = None if checkpoint.folder is None else checkpoint.folder / "tokenizer.json"
    content = None if source is None else read_object(source)
    if content is None:
        return
    content |= {"padding": None, "truncation": None}
    if (content.get("model") or {}).get("dropout") is not None:
        content["model"]["dropout"] = None
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    """The runner picks the best of as many logits as its tokenizer has tokens, and reads past the end for more."""
    path = None if checkpoint.folder is None else checkpoint.folder / "tokenizer.json"
    if path is None or not path.is_file():
        return
    from tokenizers import Tokenizer

    tokens, logits = Tokenizer.from_file(str(path)).get_vocab_size(), checkpoint.geometry.text.vocab
    if tokens > logits:
        raise CheckpointError(
            f"{path} has {tokens} tokens, but the model {logits} logits; the tokenizer belongs to another model"
        )
