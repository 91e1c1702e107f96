"""What a device is."""

from __future__ import annotations

from typing import Protocol

from runtime.bundle import Bundle
from runtime.devices.findings import Findings, Job


class Device(Protocol):
    """Something that runs the graphs of a bundle in their engines: this desktop, a phone."""

    @property
    def name(self) -> str:
        """What reports call it: the processor or the model."""

    def run(self, bundle: Bundle, job: Job) -> Findings:
        """Runs a job and tells what came of it.

        What an engine refuses is part of the findings. Raises BundleError for a bundle that cannot be trusted: every
        file is hashed before it is used.
        """
