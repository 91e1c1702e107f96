"""The Snapdragon NPU (QNN HTP) as a delegate of ONNX Runtime; on x86 its own emulator runs the graph."""

from __future__ import annotations

import functools
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.errors import EngineError, EngineMissingError

QNN = "QNNExecutionProvider"


@functools.cache
def register() -> None:
    """Makes the delegate known to ONNX Runtime, once a process. Raises EngineMissingError."""
    try:
        import onnxruntime
        import onnxruntime_qnn
    except ImportError as err:
        raise EngineMissingError(
            f"ONNX Runtime's delegate for the Snapdragon NPU is not installed ({err}); pip install 'pruneport[qnn]'"
        ) from err
    try:
        onnxruntime.register_execution_provider_library(QNN, onnxruntime_qnn.get_library_path())
    # The bindings raise a family of classes derived from Exception alone, one per status code.
    except Exception as err:
        raise EngineError(f"ONNX Runtime cannot load the QNN delegate: {err}; reinstall 'pruneport[qnn]'") from err


def provider_options(settings: Mapping[str, str]) -> dict[str, str]:
    """What the delegate is opened with: `settings` say for which chip, the HTP library is this machine's."""
    import onnxruntime_qnn

    return {"backend_path": onnxruntime_qnn.get_qnn_htp_path(), **settings}


def open_on_htp(file: Path, options: Any, settings: Mapping[str, str]) -> Any:
    """An InferenceSession whose every node runs on the HTP; `options` are SessionOptions, to which this adds.

    The bindings' own exceptions pass. Without the refusal of the CPU a backend that cannot be loaded would go
    unnoticed: ONNX Runtime would run the graph on the CPU, with perfect parity.
    """
    import onnxruntime

    register()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return onnxruntime.InferenceSession(str(file), options, providers=[(QNN, provider_options(settings))])


def describe() -> str:
    """Which delegate runs the graph, and whether it is the chip or its emulator."""
    from importlib.metadata import version

    return f"onnxruntime-qnn {version('onnxruntime-qnn')}" + (", HTP emulated on x86" if emulated() else "")


def emulated() -> bool:
    """Whether the HTP is only emulated here, so that times mean nothing."""
    return platform.machine().lower() in ("x86_64", "amd64")
