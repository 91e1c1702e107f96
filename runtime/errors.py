"""Every error a user can cause, as one tree under one base.

PruneportError
├── RequestError       flags that cannot mean anything, or that contradict each other
├── CheckpointError    weights, config or preprocessor settings that cannot be used
├── ImageError         a file that is no photograph this program can read
├── ExportError        a graph that could not be traced or lowered as promised
├── BundleError        a bundle that is damaged, incomplete, hostile or from a newer version
├── DeviceError        a device that cannot be reached, is full, or on which a job did not end
├── FindingsError      what a device left that is damaged, incomplete, hostile or of another bundle
├── EngineError        an engine that refuses a graph or its inputs
│   └── EngineMissingError   an engine that is not installed here
├── OutputError        a place that cannot be written: it exists, is read-only, or is full
└── NotYetError        a request that is understood and that this version cannot do

The text of an error is complete: what, what was found, what is allowed, what to do next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.placement import Placement


class PruneportError(Exception):
    """Base of everything the command line prints as one message; `exit_code` is what the process ends with."""

    exit_code = 2


class RequestError(PruneportError):
    """Flags that cannot mean anything, or that contradict each other."""


class CheckpointError(PruneportError):
    """Weights, config or preprocessor settings that cannot be used."""


class ImageError(PruneportError):
    """A file that is no photograph this program can read."""


class ExportError(PruneportError):
    """A graph that could not be traced or lowered as promised."""


class BundleError(PruneportError):
    """A bundle that is damaged, incomplete, hostile or from a newer version."""


class DeviceError(PruneportError):
    """A device that cannot be reached, is full, or on which a job did not end."""


class FindingsError(PruneportError):
    """What a device left that is damaged, incomplete, hostile or of another bundle."""


class EngineError(PruneportError):
    """An engine that refuses a graph or its inputs."""


class EngineMissingError(EngineError):
    """An engine that is not installed here; a check that needs it is then "not checked", not failed.

    `placement`: who would run what, where the file itself tells.
    """

    def __init__(self, message: str, placement: Placement | None = None) -> None:
        super().__init__(message)
        self.placement = placement


class OutputError(PruneportError):
    """A place that cannot be written: it exists, is read-only, or is full."""


class NotYetError(PruneportError):
    """A request that is understood and that this version cannot do."""
