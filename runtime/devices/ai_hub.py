"""Phones of Qualcomm's AI Hub: each graph is run and profiled there by the golden's inputs; needs an account.

The hub takes single graphs of fixed shapes: ONNX models and context binaries of the NPU. So there is no answer end to
end and no twin in turns. Nothing here was ever sent to the hub: the tests go as far as the requests.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle import Bundle, GraphInfo
from runtime.devices.remote import RemoteDevice
from runtime.devices.wire import (
    DeviceInfo,
    FindingsFile,
    JobFile,
    MemoryFound,
    RunnerInfo,
    StepFound,
    StepJob,
    TroubleFound,
    now_utc,
    write_findings,
)
from runtime.errors import DeviceError

Say = Callable[[str], None]


class AiHubDevice(RemoteDevice):
    """One kind of phone of the hub, by the name that `qai-hub list-devices` gives it."""

    def __init__(self, serial: str, *, progress: Say | None = None, hub: Any = None) -> None:
        if hub is None:
            try:
                import qai_hub as hub  # type: ignore[import-not-found,no-redef]
            except ImportError:
                raise DeviceError(
                    "the client of Qualcomm's AI Hub is not installed; pip install 'pruneport[ai-hub]', then "
                    "`qai-hub configure --api_token ...`"
                ) from None
        self._hub, self._name = hub, serial
        self._say = progress or (lambda message: None)

    @property
    def name(self) -> str:
        """The hub's name of it."""
        return self._name

    def _find(
        self, bundle: Bundle, job: JobFile, tensors: dict[str, np.ndarray], twin: Bundle | None, out: Path
    ) -> None:
        """See RemoteDevice; what the hub cannot run is named so in the findings."""
        started = now_utc()
        steps, sent, peak = [], dict[str, np.ndarray](), 0
        for step in job.steps:
            found, outputs, memory = self._step(bundle, step, tensors, timed=job.timing is not None)
            steps.append(found)
            sent |= outputs
            peak = max(peak, memory)
        file = FindingsFile(
            job=job.id,
            bundle=job.bundle,
            device=DeviceInfo(
                name=self._name, kind="phone", os="Android of the hub", abi="aarch64", cores=0, ram_bytes=0
            ),
            runner=RunnerInfo(
                name="Qualcomm AI Hub", version="cloud", engine="onnxruntime", engine_version="of the hub"
            ),
            threads=max(job.threads, 1),
            started_utc=started,
            ended_utc=now_utc(),
            steps=tuple(steps),
            memory=MemoryFound(peak_rss_bytes=peak) if peak else None,
        )
        write_findings(out, file, sent)

    def _step(
        self, bundle: Bundle, step: StepJob, tensors: dict[str, np.ndarray], *, timed: bool
    ) -> tuple[StepFound, dict[str, np.ndarray], int]:
        """What came of a step, its outputs, and its peak of memory in bytes."""
        graph = bundle.graph(step.graph)
        refused = _refused(graph)
        if refused:
            trouble = TroubleFound(message=f"{refused}; run the bundle on a phone of yours", missing=True)
            return StepFound(graph=step.graph, step=step.step, trouble=trouble), {}, 0
        key = f"{step.graph}/{step.step}"
        inputs = {info.name: [tensors[f"in/{key}/{info.name}"]] for info in graph.inputs}
        self._say(f"running {step.graph} on a {self._name} of the hub")
        device = self._hub.Device(self._name)
        model = self._hub.upload_model(str(bundle.file(graph.file)))
        inference = self._hub.submit_inference_job(
            model=model, device=device, inputs=inputs, name=f"{bundle.title} {key}"
        )
        given = inference.download_output_data()
        if not given:
            trouble = TroubleFound(
                message=f"the hub's job {inference.job_id} gave nothing: {inference.get_status().message}"
            )
            return StepFound(graph=step.graph, step=step.step, trouble=trouble), {}, 0
        outputs = {
            f"out/{key}/{info.name}": np.asarray(given[info.name][0]) for info in graph.outputs if info.name in given
        }
        if not timed:
            return StepFound(graph=step.graph, step=step.step), outputs, 0
        profile = self._hub.submit_profile_job(
            model=model, device=device, name=f"{bundle.title} {key}"
        ).download_profile()
        told = profile["execution_summary"]
        found = StepFound(
            graph=step.graph,
            step=step.step,
            load_ms=tuple(us / 1e3 for us in (told["first_load_time"], told["warm_load_time"])),
            run_ms=tuple(us / 1e3 for us in told["all_inference_times"]),
        )
        return found, outputs, int(told["estimated_inference_peak_memory"])


def _refused(graph: GraphInfo) -> str:
    """Why the hub cannot run a graph, or nothing."""
    if graph.engine != "onnxruntime":
        return f"the hub takes ONNX models, {graph.name} is for {graph.engine}"
    if graph.is_open:
        return f"the hub takes fixed shapes, {graph.name} takes any number of tokens"
    if graph.states:
        return f"the hub keeps no states, {graph.name} has some"
    return ""
