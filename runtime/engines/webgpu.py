"""A GPU through WebGPU as a delegate of ONNX Runtime; where there is none, software may stand in for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from runtime.engines import plugin
from runtime.errors import EngineMissingError

WEBGPU = "WebGpuExecutionProvider"
_SOFTWARE_DRIVERS = ("swiftshader", "lvp", "lavapipe")
_REMEDY = (
    "check the graph on a machine with a GPU, or install libvulkan1 and name a software driver for Vulkan in "
    "VK_ICD_FILENAMES, such as the vk_swiftshader_icd.json of Debian's chromium-common"
)


def register() -> None:
    """Makes the delegate known to ONNX Runtime. Raises EngineMissingError, EngineError."""
    # Without a GPU the delegate would offer no device at all; which adapter it then takes is Vulkan's to say.
    os.environ.setdefault("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "1")
    plugin.register(WEBGPU, "onnxruntime_ep_webgpu", hardware="WebGPU", called="WebGPU", extra="webgpu")


def open_on_gpu(file: Path, options: Any, *, whole: bool) -> Any:
    """An InferenceSession on WebGPU; `options` are SessionOptions, to which this adds; `whole` refuses the CPU.

    Raises EngineMissingError where there is no adapter; other exceptions of the bindings pass. Who runs which node
    must still be read from the session.
    """
    import onnxruntime

    register()
    devices = plugin.devices(WEBGPU)
    if not devices:
        raise EngineMissingError(f"WebGPU offers no device on this machine; {_REMEDY}")
    if whole:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(devices[:1], {})
    try:
        return onnxruntime.InferenceSession(str(file), options)
    except Exception as err:
        if "WebGPU adapter" in str(err):
            raise EngineMissingError(f"WebGPU finds no adapter on this machine; {_REMEDY}") from err
        raise


def describe() -> str:
    """Which delegate runs the graph, and whether a GPU does or software in its place."""
    from importlib.metadata import version

    name = f"onnxruntime-ep-webgpu {version('onnxruntime-ep-webgpu')}"
    return name + (", GPU emulated in software" if emulated() else "")


def emulated() -> bool:
    """Whether no GPU but software runs the graphs here, so that times mean nothing."""
    drivers = os.environ.get("VK_DRIVER_FILES") or os.environ.get("VK_ICD_FILENAMES") or ""
    named = any(driver in drivers.lower() for driver in _SOFTWARE_DRIVERS)
    return named or all(device.device.type.name != "GPU" for device in plugin.devices(WEBGPU))
