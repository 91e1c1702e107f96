"""The folder that transformers.js runs as it is: ONNX graphs, and the checkpoint's configs set to the kept tokens.

What transformers.js 4.3.1 needs beyond a checkpoint's own files:

config.json
    `text_config`: its model type and number of layers, by which the decoder's caches are counted; published files leave
    the number out. `image_token_index`: image features replace the embeddings of this id. `image_seq_length`: the
    image's length as transformers' config defines it; transformers.js does not read it. `transformers.js_config`:
    `dtype`, the precisions that the graphs' file names end in, which browsers take for 8-bit otherwise, and
    `use_external_data_format`, the graphs whose weights lie in a file of their own: browsers fetch only what is named.
generation_config.json
    `eos_token_id`, at which an answer ends; made from the tokenizer where the checkpoint has no such file.
preprocessor_config.json
    `processor_class` and `image_processor_type` choose the classes; newer checkpoints keep these settings elsewhere.
processor_config.json
    The processor writes (pixels / `patch_size`)^2 + `num_additional_image_tokens` times `image_token`. With
    `keep - N` for the second that makes `keep`. It never takes one off, as Python's processor does unless
    `vision_feature_select_strategy` is "full": the published values give 577 tokens for 576 features.
tokenizer_config.json
    `chat_template`, which this processor reads from no other file.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.backends.onnx import OPSET, coverage_of, leave_out_traces, quiet, read_when_written
from export.backends.tracing import converting, trace
from export.graphs.graph import Graph
from export.models.prompt import TokenizerFiles, end_ids, read_prompt, read_tokenizer_files
from export.quantize import SCHEMES
from export.settings import read_object, without_non_finite
from runtime.errors import CheckpointError, ExportError
from runtime.prompt import read_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from export.families.family import Checkpoint, ModelEntry
    from export.graphs.vision import VisionEncoder
    from runtime.bundle import GraphInfo

VISION, EMBEDDING, DECODER = "vision_encoder", "embed_tokens", "decoder_model_merged"
# The runtime's own names: the folder of graphs (the rest lies beside it), and what a precision adds to a file's name.
GRAPHS_FOLDER = "onnx"
SUFFIXES = {"fp32": "", "fp16": "_fp16", "q4": "_q4"}
# Protobuf ends at 2 GiB, and a browser would hold inlined weights twice, before and after parsing.
_INLINE_LIMIT_BYTES = 256 * 2**20


def write_transformers_js(
    checkpoint: Checkpoint,
    entry: ModelEntry,
    vision: VisionEncoder,
    folder: Path,
    *,
    quant_text: str | None = None,
    text_tokens: int | None = None,
    arithmetic: Callable[[str], tuple[str, ...]],
) -> tuple[GraphInfo, ...]:
    """Writes graphs, configs and tokenizer into `folder`, which exists; returns the graphs, files relative to it.

    The graphs, all in the precision of `vision` but for a decoder with 4-bit weights (`onnx/<name>.onnx`, in fp16
    `onnx/<name>_fp16.onnx`, with `quant_text` `onnx/<name>_q4.onnx`; large weights beside them in `<file>_data`):
    `vision_encoder` pixel_values (1, 3, H, W) -> image_features (1, keep, D) and what else `vision` gives;
    `embed_tokens` input_ids (1, T) -> inputs_embeds (1, T, D); `decoder_model_merged`, see `MergedDecoder`. One image
    and one conversation at a time.

    Raises:
        ExportError: a vision graph that prunes in the decoder; weights of the decoder in other than 4 bits; random
            weights, which come without a tokenizer; a graph that cannot be made.
        CheckpointError: tokenizer, template or preprocessor files that are missing or cannot be used.
    """
    from export.graphs.vision import PRECISIONS

    if vision.framed:
        raise ExportError(
            f"transformers.js takes image features alone, which a vision graph of cut {vision.cut} with the prompt in "
            "it does not give; take --cut 0"
        )
    del text_tokens  # the cache grows as far as positions are known
    if quant_text is not None and SCHEMES[quant_text].bits != 4:
        raise ExportError(f"quant_text={quant_text!r}: transformers.js has no name for such weights; take int4")
    tokenizer = read_tokenizer_files(_tokenizer_folder(checkpoint))
    configs = _configs(checkpoint, entry, tokenizer, vision.keep)
    (precision,) = (name for name, dtype in PRECISIONS.items() if dtype == vision.dtype)
    graphs = folder / GRAPHS_FOLDER
    graphs.mkdir()
    dtypes = {VISION: precision, EMBEDDING: precision, DECODER: "q4" if quant_text else precision}
    files = {name: graphs / f"{name}{SUFFIXES[dtype]}.onnx" for name, dtype in dtypes.items()}
    configs["config.json"]["transformers.js_config"] = {
        "dtype": dtypes,
        "use_external_data_format": {
            VISION: _save(vision, (), None, files[VISION], vision.input_names, vision.output_names),
            EMBEDDING: _write_embedding(checkpoint, files[EMBEDDING], precision),
            DECODER: _write_decoder(checkpoint, files[DECODER], precision, quant_text),
        },
    }
    for name, content in configs.items():
        text = json.dumps(without_non_finite(content), indent=2)
        (folder / name).write_text(text + "\n", encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer.content, encoding="utf-8")
    longest = checkpoint.geometry.text.max_positions
    return tuple(
        _info(name, file, folder, arithmetic=arithmetic(name), longest=longest) for name, file in files.items()
    )


def _info(name: str, file: Path, folder: Path, *, arithmetic: tuple[str, ...], longest: int) -> GraphInfo:
    """What the written graph says of itself; an open dimension is at most as long as the positions that are known."""
    import onnxruntime

    from runtime.bundle import GraphInfo, TensorInfo
    from runtime.engines.onnxruntime import DTYPE_BY_ONNX_TYPE

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")  # nothing is run
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def infos(tensors: list[Any]) -> tuple[TensorInfo, ...]:
        return tuple(
            TensorInfo(
                name=tensor.name,
                shape=tuple(side if isinstance(side, int) else longest for side in tensor.shape),
                dtype=DTYPE_BY_ONNX_TYPE[tensor.type],
                dynamic=tuple(axis for axis, side in enumerate(tensor.shape) if not isinstance(side, int)),
            )
            for tensor in tensors
        )

    data = file.with_name(f"{file.name}_data")
    return GraphInfo(
        name=name,
        file=file.relative_to(folder).as_posix(),
        extra_files=(data.relative_to(folder).as_posix(),) if data.exists() else (),
        engine="onnxruntime",
        arithmetic=arithmetic,
        inputs=infos(session.get_inputs()),
        outputs=infos(session.get_outputs()),
        coverage=(coverage_of(file),),
    )


def _tokenizer_folder(checkpoint: Checkpoint) -> Path:
    folder = checkpoint.folder
    if folder is None:
        raise ExportError(
            "random weights have no tokenizer, and transformers.js runs nothing without one; give a checkpoint folder "
            "with --weights DIR"
        )
    missing = [name for name in ("tokenizer.json", "tokenizer_config.json") if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{folder} has no {' and no '.join(missing)}, which transformers.js needs; save them with transformers' "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return folder


def _configs(
    checkpoint: Checkpoint, entry: ModelEntry, tokenizer: TokenizerFiles, keep: int
) -> dict[str, dict[str, Any]]:
    """The JSON files by name, with what the module's docstring lists set but `transformers.js_config`."""
    folder, geometry = _tokenizer_folder(checkpoint), checkpoint.geometry
    entry.family.image(folder, geometry)
    read_prompt(folder, geometry, entry)  # refuses what transformers.js would only find out when asked
    generation = read_object(folder / "generation_config.json") or {
        f"{role}_token_id": number for role, number in tokenizer.special_ids.items()
    }
    ends = list(end_ids(checkpoint))
    image_token = read_tokenizer(tokenizer.content).id_to_token(geometry.image_token_id)
    return {
        **entry.family.hub_files(checkpoint, image_token=image_token, keep=keep),
        "generation_config.json": {**generation, "eos_token_id": ends[0] if len(ends) == 1 else ends or None},
        "tokenizer_config.json": {
            **(read_object(folder / "tokenizer_config.json") or {}),
            "chat_template": tokenizer.template,
        },
    }


def _write_embedding(checkpoint: Checkpoint, file: Path, precision: str) -> bool:
    from export.graphs.decoder import build_token_embedding

    embedding = build_token_embedding(checkpoint, tokens=2, precision=precision)
    free = ({1: "sequence_length"},)
    return _save(embedding, embedding.example_inputs(), free, file, ("input_ids",), embedding.output_names)


def _write_decoder(checkpoint: Checkpoint, file: Path, precision: str, quant: str | None = None) -> bool:
    from export.graphs.merged_decoder import build_merged_decoder

    decoder = build_merged_decoder(checkpoint, precision=precision, quant=quant)
    inputs = decoder.example_inputs()
    tokens, past, total = {1: "sequence_length"}, {2: "past_sequence_length"}, {1: "total_sequence_length"}
    free = (tokens, total, tokens, (past,) * (len(inputs) - 3))
    return _save(decoder, inputs, free, file, decoder.input_names, decoder.output_names)


def _save(
    graph: torch.nn.Module,
    inputs: tuple[Tensor, ...],
    free: tuple[Any, ...] | None,
    file: Path,
    input_names: Sequence[str],
    output_names: Sequence[str],
) -> bool:
    """Converts and writes one graph; True when its weights got a file of their own.

    `free` names the dimensions that are no fixed number, for each argument of its forward; None where all are fixed, of
    a `Graph`, which knows its inputs. Weights that wait in their checkpoint are read as they are written.
    """
    import onnx_ir
    import torch

    from export.weights import Waiting

    traced = trace(graph) if isinstance(graph, Graph) and free is None else None
    waiting = Waiting()
    waiting.expect(graph)
    with warnings.catch_warnings(), quiet("torch.onnx", "onnxscript", "onnx_ir"):
        warnings.simplefilter("ignore")  # deprecations inside the converter, which nobody here can act on
        with converting("the ONNX exporter", {file.stem: traced}):
            made = torch.onnx.export(
                traced or graph,
                inputs,
                dynamo=True,
                dynamic_shapes=free,
                opset_version=OPSET,
                input_names=list(input_names),
                output_names=list(output_names),
                optimize=False,  # as in export.backends.onnx
                verbose=False,
            )
        if made is None:
            raise ExportError(f"the ONNX exporter returned nothing for {file.stem}; run again with -v to see why")
        leave_out_traces(made.model)
        read_when_written(made.model, waiting)
        weights = [value.const_value for value in made.model.graph.initializers.values()]
        large: bool = sum(weight.nbytes for weight in weights if weight is not None) > _INLINE_LIMIT_BYTES
        onnx_ir.save(made.model, file, external_data=f"{file.name}_data" if large else None)
    return large
