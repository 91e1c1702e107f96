"""A GPU through WebGPU as a delegate of ONNX Runtime; where there is none, software may stand in for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from runtime.errors import EngineError, EngineMissingError

WEBGPU = "WebGpuExecutionProvider"
_SOFTWARE_DRIVERS = ("swiftshader", "lvp", "lavapipe")
_REMEDY = (
    "check the graph on a machine with a GPU, or install libvulkan1 and name a software driver for Vulkan in "
    "VK_ICD_FILENAMES, such as the vk_swiftshader_icd.json of Debian's chromium-common"
)


def register() -> None:
    """Makes the delegate known to ONNX Runtime, which can be done once a process. Raises EngineMissingError."""
    try:
        import onnxruntime
        import onnxruntime_ep_webgpu
    except ImportError as err:
        raise EngineMissingError(
            f"ONNX Runtime's delegate for WebGPU is not installed ({err}); pip install 'pruneport[webgpu]'"
        ) from err
    if _devices():
        return
    # Without a GPU the delegate would offer no device at all; which adapter it then takes is Vulkan's to say.
    os.environ.setdefault("ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER", "1")
    try:
        onnxruntime.set_default_logger_severity(3)  # it warns about the setting above
        onnxruntime.register_execution_provider_library(WEBGPU, onnxruntime_ep_webgpu.get_library_path())
    # The bindings raise a family of classes derived from Exception alone, one per status code.
    except Exception as err:
        raise EngineError(f"ONNX Runtime cannot load WebGPU: {err}; reinstall 'pruneport[webgpu]'") from err
    finally:
        onnxruntime.set_default_logger_severity(2)


def _devices() -> list[Any]:
    import onnxruntime

    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == WEBGPU]


def open_on_gpu(file: Path, options: Any, *, whole: bool) -> Any:
    """An InferenceSession on WebGPU; `options` are SessionOptions, to which this adds; `whole` refuses the CPU.

    Raises EngineMissingError where there is no adapter; other exceptions of the bindings pass. Who runs which node
    must still be read from the session.
    """
    import onnxruntime

    register()
    devices = _devices()
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
    return named or all(device.device.type.name != "GPU" for device in _devices())
