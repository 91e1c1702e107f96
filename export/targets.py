"""The table of targets: which backends make graphs for a phone, and whose runtimes bundles can be laid out for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from export.backends.backend import Backend
from export.backends.coreml import COREML
from export.backends.coreml_delegate import COREML_DELEGATE
from export.backends.nnapi import NNAPI
from export.backends.onnx import ONNX
from export.backends.qnn import QNN
from export.backends.vulkan import VULKAN
from export.backends.webgpu import WEBGPU
from export.backends.xnnpack import XNNPACK
from export.dropin.layout import Layout
from runtime.ready_made import MULTIMODAL_RUNNER, TRANSFORMERS_JS

if TYPE_CHECKING:
    from export.dropin.layout import WriteLayout


@dataclass(frozen=True)
class Target:
    """A kind of phone; the first backend is the default."""

    name: str
    backends: tuple[Backend, ...]

    def __post_init__(self) -> None:
        if not self.backends:
            raise ValueError(f"target {self.name!r} must have at least one backend")


TARGETS: dict[str, Target] = {
    "android": Target(name="android", backends=(XNNPACK, VULKAN, ONNX, WEBGPU, NNAPI, QNN)),
    "ios": Target(name="ios", backends=(COREML, COREML_DELEGATE)),
}


def _multimodal_runner() -> WriteLayout:
    from export.dropin.multimodal_runner import write_for_runner

    return write_for_runner


def _transformers_js() -> WriteLayout:
    from export.dropin.transformers_js import write_transformers_js

    return write_transformers_js


LAYOUTS: Mapping[str, Layout] = {
    MULTIMODAL_RUNNER: Layout(MULTIMODAL_RUNNER, XNNPACK, XNNPACK.quant_vision, XNNPACK.quant_text, _multimodal_runner),
    # It names 4-bit weights; what it calls int8 and q8 is another format, which also rounds activations.
    TRANSFORMERS_JS: Layout(TRANSFORMERS_JS, ONNX, (), ("none", "int4", "int4-g64", "int4-g128"), _transformers_js),
}
