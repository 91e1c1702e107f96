"""An iPhone or iPad over Apple's devicectl: copies bundle and job into the app's folder, launches it, copies back.

The commands and their flags are those of Xcode 15 and later. Nothing here was ever run on a Mac: the tests hold it
against a recorded `xcrun`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle import MANIFEST, Bundle
from runtime.devices.remote import RemoteDevice
from runtime.devices.wire import (
    BUNDLE_DIR,
    FINDINGS,
    OUTPUTS,
    TWIN_DIR,
    GateJob,
    JobFile,
    device_files,
    write_job,
)
from runtime.errors import DeviceError

APP = "org.pruneport.Pruneport"
_DOMAIN = ("--domain-type", "appDataContainer", "--domain-identifier", APP)
_QUICK_S = 120.0

Say = Callable[[str], None]


class DevicectlDevice(RemoteDevice):
    """One device by its name or identifier, or the only one that is connected; the app must be installed."""

    def __init__(
        self,
        serial: str | None = None,
        *,
        timeout_s: float = 3600.0,
        gate: GateJob | None = None,
        progress: Say | None = None,
        xcrun: str = "xcrun",
    ) -> None:
        self._xcrun, self._timeout_s, self.gate = xcrun, timeout_s, gate
        self._say = progress or (lambda message: None)
        self._device = self._chosen(serial)

    @property
    def name(self) -> str:
        """The name that its owner gave it."""
        return str(self._device.get("deviceProperties", {}).get("name", self._device["identifier"]))

    def _find(
        self, bundle: Bundle, job: JobFile, tensors: dict[str, np.ndarray], twin: Bundle | None, out: Path
    ) -> None:
        # The app deletes it, with all of it, when the next job comes: devicectl cannot.
        place = f"Documents/{job.id}"
        with tempfile.TemporaryDirectory() as folder:
            staged = Path(folder) / job.id
            write_job(staged, job, tensors)
            for name, each in ((BUNDLE_DIR, bundle), (TWIN_DIR, twin)):
                if each is not None:
                    _stage(each, staged / name)
            size = sum(path.stat().st_size for path in staged.rglob("*") if path.is_file())
            self._say(f"copying {size / 1e6:.1f} MB to {self.name}")
            self._do("device", "copy", "to", *self._to, *_DOMAIN, "--source", str(staged), "--destination", place)
        self._say("running the job")
        self._do(
            *("device", "process", "launch", *self._to, "--terminate-existing", "--console"),
            *("--environment-variables", json.dumps({"PRUNEPORT_JOB": job.id}), APP),
            timeout_s=self._timeout_s,
        )
        self._pull(place, out)

    @property
    def _to(self) -> tuple[str, str]:
        return ("--device", str(self._device["identifier"]))

    def _pull(self, place: str, out: Path) -> None:
        self._say("copying the findings back")
        for name in (OUTPUTS, FINDINGS):
            source = ("--source", f"{place}-findings/{name}", "--destination", str(out / name))
            self._do("device", "copy", "from", *self._to, *_DOMAIN, *source)
            if not (out / name).is_file():
                raise DeviceError(f"{self.name} left no {name}: the app ended before it was done; see its log")

    def _chosen(self, serial: str | None) -> dict[str, Any]:
        listed = self._do("list", "devices").get("devices", [])
        connected = [
            device for device in listed if device.get("connectionProperties", {}).get("tunnelState") != "unavailable"
        ]
        names = [f"{device.get('deviceProperties', {}).get('name')} ({device['identifier']})" for device in connected]
        if serial is not None:
            for device in connected:
                if serial in (device["identifier"], device.get("deviceProperties", {}).get("name")):
                    return dict(device)
            raise DeviceError(f"there is no device {serial!r}; devicectl lists: {', '.join(names) or 'none'}")
        if len(connected) != 1:
            what = f"{len(connected)} devices are connected: {', '.join(names)}; choose one with --serial"
            raise DeviceError(what if connected else "no iPhone is connected; pair one in Xcode, and unlock it")
        return dict(connected[0])

    def _do(self, *words: str, timeout_s: float = _QUICK_S) -> dict[str, Any]:
        """Runs devicectl; returns the result that it writes as JSON. Raises DeviceError."""
        with tempfile.TemporaryDirectory() as folder:
            told = Path(folder) / "told.json"
            command = (
                [self._xcrun, "devicectl", *words[:-1]] if words[-1] == APP else [self._xcrun, "devicectl", *words]
            )
            # The app's identifier is the last word, flags stand before it.
            command += ["--json-output", str(told), *([APP] if words[-1] == APP else [])]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, check=False
                )
            except FileNotFoundError:
                raise DeviceError(
                    f"{self._xcrun} is not installed; iPhones need a Mac with Xcode 15 or later"
                ) from None
            except subprocess.TimeoutExpired:
                raise DeviceError(
                    f"`devicectl {' '.join(words[:3])}` did not end in {timeout_s:.0f} s; allow more with --timeout"
                ) from None
            try:
                answer = json.loads(told.read_text())
            except (OSError, ValueError):
                answer = {}
            if not isinstance(answer, dict):
                answer = {}
            if done.returncode:
                error = answer.get("error", {}).get("userInfo", {}).get("NSLocalizedDescription", {})
                reason = error.get("string") if isinstance(error, dict) else None
                last = (done.stderr.strip() or done.stdout.strip() or "it gave no reason").splitlines()[-1]
                raise DeviceError(f"`devicectl {' '.join(words[:3])}` failed: {reason or last}")
            result = answer.get("result", {})
            return result if isinstance(result, dict) else {}


def _stage(bundle: Bundle, folder: Path) -> None:
    """Links what a device needs of a bundle into a folder that is copied whole."""
    for file in (MANIFEST, *device_files(bundle)):
        target = folder / file
        target.parent.mkdir(parents=True, exist_ok=True)
        source = bundle.path / file
        try:
            target.hardlink_to(source)
        except OSError:  # another file system
            shutil.copyfile(source, target)
