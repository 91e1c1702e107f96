"""Quantisation of linear layers before tracing: the table of schemes and what each does to a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from runtime.errors import ExportError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Weights in `bits` with a scale for each output channel, or for each group of `group` inputs of one.

    `form` says what a layer becomes. torchao: a linear layer whose activations are quantised to 8 bits on the fly, a
    scale for each token, as ExecuTorch knows it. nbits: an `NBitsLinear`, as ONNX Runtime knows it.
    `below_cut` names the schemes of attention and of the rest of decoder layers below the cut, None for this one: which
    tokens are kept hangs on what these compute, and 4 bits move it (benchmarks/results/kept_tokens.json).
    """

    bits: Literal[4, 8]
    group: int | None = None
    form: Literal["torchao", "nbits"] = "torchao"
    below_cut: tuple[str, str] | None = None
    # What a scale takes in the file.
    scale_bits: Literal[16, 32] = 16


SCHEMES: dict[str, Scheme] = {
    "8da8w": Scheme(bits=8),
    "8da4w": Scheme(bits=4, group=128, below_cut=("8da8w", "8da4w-g32")),
    "8da4w-g64": Scheme(bits=4, group=64, below_cut=("8da8w", "8da4w-g32")),
    "8da4w-g32": Scheme(bits=4, group=32, below_cut=("8da8w", "8da4w-g32")),
    "int4": Scheme(bits=4, group=32, form="nbits", scale_bits=32, below_cut=("int8", "int4")),
    "int4-g64": Scheme(bits=4, group=64, form="nbits", scale_bits=32, below_cut=("int8", "int4-g64")),
    "int4-g128": Scheme(bits=4, group=128, form="nbits", below_cut=("int8", "int4-g64")),
    "int8": Scheme(bits=8, group=32, form="nbits"),
}


def check_widths(scheme: str, widths: dict[str, int]) -> None:
    """Raises ExportError for layers whose input width (layer name -> width) is no multiple of the scheme's group."""
    group, form = SCHEMES[scheme].group, SCHEMES[scheme].form
    odd = [f"{name} ({width})" for name, width in widths.items() if group is not None and width % group]
    if odd:
        fits = [
            name
            for name, other in SCHEMES.items()
            if other.form == form
            and (other.group is None or all(width % other.group == 0 for width in widths.values()))
        ]
        raise ExportError(
            f"{scheme} groups {group} inputs of a layer, which does not divide the width of {', '.join(odd)}; "
            f"schemes that fit: {', '.join(fits) or 'none'}"
        )


def _plain(layer: torch.nn.Module, name: str = "") -> bool:
    """Whether a module is a linear layer that nobody has quantised."""
    import torch

    return isinstance(layer, torch.nn.Linear) and type(layer.weight.data) is torch.Tensor


def _plain_widths(module: torch.nn.Module) -> dict[str, int]:
    return {name: int(layer.in_features) for name, layer in module.named_modules() if _plain(layer)}


def quantize(module: torch.nn.Module, scheme: str) -> None:
    """Quantises every linear layer of `module` in place.

    Layers that are quantised already, as part of a graph that shares them, are left as they are. Weights that wait in
    their checkpoint (see export.weights) go on waiting.
    """
    import torch

    from export.weights import late

    if scheme not in SCHEMES:
        raise ExportError(f"the quantisation scheme {scheme!r} is not known; allowed: {', '.join(SCHEMES)}")
    known = SCHEMES[scheme]

    check_widths(scheme, _plain_widths(module))
    if known.form == "nbits":
        from export.blocks.nbits import NBitsLinear

        assert known.group is not None
        scale_dtype = torch.float16 if known.scale_bits == 16 else torch.float32
        for owner in list(module.modules()):
            for name, layer in owner.named_children():
                if isinstance(layer, torch.nn.Linear):
                    packed = NBitsLinear(layer, bits=known.bits, group=known.group, scale_dtype=scale_dtype)
                    setattr(owner, name, packed)
        return
    from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
    from torchao.quantization.granularity import PerAxis, PerGroup

    config = Int8DynamicActivationIntxWeightConfig(
        weight_dtype=getattr(torch, f"int{known.bits}"),
        weight_granularity=PerAxis(0) if known.group is None else PerGroup(known.group),
    )

    def quantised(weight: torch.Tensor) -> torch.Tensor:
        alone = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        alone.weight = torch.nn.Parameter(weight, requires_grad=False)
        quantize_(alone, config)
        return alone.weight.data

    for layer in module.modules():
        if isinstance(layer, torch.nn.Linear) and _plain(layer) and (waiting := late(layer.weight)):
            layer.weight = waiting.then(scheme, quantised).stand_in()
    quantize_(module, config, filter_fn=_plain)


def schemes_below_cut(scheme: str) -> tuple[str, str]:
    """The schemes of attention and of the rest of a decoder layer below the cut, where text graphs take `scheme`."""
    return SCHEMES[scheme].below_cut or (scheme, scheme)


def quantize_layer(layer: torch.nn.Module, scheme: str, *, below_cut: bool) -> None:
    """Quantises a decoder layer in place, a finer one where it lies below the cut: see Scheme."""
    attention, rest = schemes_below_cut(scheme) if below_cut else (scheme, scheme)
    check_widths(scheme, _plain_widths(layer))  # of the scheme that was asked for, by the layer's own names
    quantize(layer.get_submodule("self_attn"), attention)
    quantize(layer, rest)  # what is left of it
