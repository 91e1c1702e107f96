"""Delegates of ONNX Runtime that come in packages of their own and must be made known to it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from runtime.errors import EngineError, EngineMissingError


def devices(delegate: str) -> list[Any]:
    """What a delegate that is known to ONNX Runtime offers on this machine."""
    import onnxruntime

    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == delegate]


def register(delegate: str, package: str, *, hardware: str, called: str, extra: str) -> None:
    """Makes the delegate in `package` known to ONNX Runtime, which can be done once a process.

    `hardware`, `called` and `extra` (of pip) are words for errors: EngineMissingError where the package is not
    installed, EngineError where ONNX Runtime cannot load it.
    """
    try:
        import onnxruntime

        library = import_module(package)
    except ImportError as err:
        raise EngineMissingError(
            f"ONNX Runtime's delegate for {hardware} is not installed ({err}); pip install 'pruneport[{extra}]'"
        ) from err
    if devices(delegate):
        return
    onnxruntime.set_default_logger_severity(3)  # they warn about settings that are meant
    try:
        onnxruntime.register_execution_provider_library(delegate, library.get_library_path())
    # The bindings raise a family of classes derived from Exception alone, one per status code.
    except Exception as err:
        raise EngineError(f"ONNX Runtime cannot load {called}: {err}; reinstall 'pruneport[{extra}]'") from err
    finally:
        onnxruntime.set_default_logger_severity(2)
