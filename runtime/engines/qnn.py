"""The Snapdragon NPU (QNN HTP) as a delegate of ONNX Runtime; on x86 its own emulator runs the graph."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runtime.engines import plugin
from runtime.errors import EngineError

QNN = "QNNExecutionProvider"


def register() -> None:
    """Makes the delegate known to ONNX Runtime. Raises EngineMissingError, EngineError."""
    plugin.register(QNN, "onnxruntime_qnn", hardware="the Snapdragon NPU", called="the QNN delegate", extra="qnn")


def add_to(options: Any, settings: Mapping[str, str] | None = None) -> None:
    """Has sessions with these SessionOptions use the HTP. For errors see `register`.

    A graph that is compiled now needs `settings` that say for which chip; one that was compiled before knows it.
    """
    register()
    devices = plugin.devices(QNN)
    if not devices:
        raise EngineError("the QNN delegate offers no device on this machine; check the graph on another one")
    # A list of provider names would be ignored for a delegate that is not built in.
    options.add_provider_for_devices(devices[:1], {"backend_path": htp_library(), **(settings or {})})


def htp_library() -> str:
    """Qualcomm's library that runs a graph on the HTP, or on x86 as the HTP would."""
    import onnxruntime_qnn

    return str(onnxruntime_qnn.get_qnn_htp_path())


def open_on_htp(file: Path, options: Any, settings: Mapping[str, str] | None = None) -> Any:
    """An InferenceSession whose every node runs on the HTP; `options` are SessionOptions, to which this adds.

    The bindings' own exceptions pass. Without the refusal of the CPU a backend that cannot be loaded would go
    unnoticed: ONNX Runtime would run the graph on the CPU, with perfect parity.
    """
    import onnxruntime

    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    add_to(options, settings)
    with _stdout_kept():
        return onnxruntime.InferenceSession(str(file), options)


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """Sends what the emulator prints on standard output, which belongs to results, to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def describe() -> str:
    """Which delegate runs the graph, and whether it is the chip or its emulator."""
    from importlib.metadata import version

    return f"onnxruntime-qnn {version('onnxruntime-qnn')}" + (", HTP emulated on x86" if emulated() else "")


def emulated() -> bool:
    """Whether the HTP is only emulated here, so that times mean nothing."""
    return platform.machine().lower() in ("x86_64", "amd64")
