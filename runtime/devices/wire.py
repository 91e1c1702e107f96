"""What crosses the cable: job.json and inputs.safetensors to a device, findings.json and outputs.safetensors back.

The runners in Kotlin, Swift and C++ and the desktop write and read the same. Times are milliseconds, sizes bytes.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import numpy as np

from runtime.bundle import Bundle, Count, Name, PositiveCount, TokenId, is_report
from runtime.errors import BundleError, FindingsError, OutputError
from runtime.golden import ANSWER, PHOTO, PIXELS, QUESTION, graph_inputs, input_key, steps
from runtime.text_graphs import TOKEN_EMBEDDING, VISION_ENCODER

JOB_VERSION = 1
FINDINGS_VERSION = 1
JOB, INPUTS, FINDINGS, OUTPUTS = "job.json", "inputs.safetensors", "findings.json", "outputs.safetensors"
BUNDLE_DIR, TWIN_DIR = "bundle", "twin"
MINIBENCH = "benchmark_results.json"

_MAX_FINDINGS_BYTES = 64 * 2**20
_MOST_SAMPLES = 1_000_000

Milliseconds = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Text = Annotated[str, msgspec.Meta(max_length=4000)]
Samples = Annotated[tuple[Milliseconds, ...], msgspec.Meta(max_length=_MOST_SAMPLES)]


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both files are made of: immutable, named fields only, unknown fields refused."""


class StepJob(_Record, frozen=True, kw_only=True):
    """One run of a graph on the golden's inputs; `stored` is what the graph is called in the manifest and its file.

    Its inputs and states are the tensors `in/{graph}/{step}/{name}` of inputs.safetensors.
    """

    graph: Name
    stored: Name
    step: Name


class AnswerJob(_Record, frozen=True, kw_only=True):
    """The question behind the photo, token ids, and how many tokens to answer with, past any end."""

    question: Annotated[tuple[TokenId, ...], msgspec.Meta(min_length=1)]
    new_tokens: PositiveCount


class TimingJob(_Record, frozen=True, kw_only=True):
    """Runs of each graph before and while it is timed, and of whole answers, the first of which warms up."""

    warmup: Count = 2
    runs: PositiveCount = 10
    answers: PositiveCount = 5


class TwinJob(_Record, frozen=True, kw_only=True):
    """The unpruned twin, whose answers are timed in turns with the bundle's; `vision` is its vision graph."""

    bundle: Name
    folder: Literal["twin"] = "twin"
    vision: Name


class GateJob(_Record, frozen=True, kw_only=True):
    """How cool a device must be before it is timed, in degrees Celsius, and how long it may take to become so."""

    most_celsius: Annotated[float, msgspec.Meta(gt=0, le=100)] = 37.0
    wait_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 600.0


class JobFile(_Record, frozen=True, kw_only=True):
    """job.json: what to run.

    `bundle` identifies the bundle, in `folder` beside this file; `vision` is the vision graph of the keep that is run.
    What is answered about is `pixel_values` of inputs.safetensors, or, without them, the `photo` uint8 (H, W, 3). A
    photo is preprocessed on the device, sent back to be compared, and timed. `threads` 0 leaves it to the device.
    `answer` None answers nothing; `timing` None times nothing.
    """

    id: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}$")]
    bundle: Name
    folder: Literal["bundle"] = "bundle"
    vision: Name
    steps: tuple[StepJob, ...]
    answer: AnswerJob | None = None
    threads: Annotated[int, msgspec.Meta(ge=0, le=256)] = 0
    timing: TimingJob | None = None
    twin: TwinJob | None = None
    gate: GateJob | None = None
    job_version: int = JOB_VERSION


class DeviceInfo(_Record, frozen=True, kw_only=True):
    """What ran a job; numbers are 0 where it does not tell. Only times of the kind `phone` are a phone's.

    `emulated`: another processor imitates this one. `desktop`: a computer. `simulator`: a phone's system on a computer.
    """

    name: Name
    kind: Literal["phone", "emulated", "simulator", "desktop"]
    os: Name
    abi: Name
    soc: Text = ""
    cores: Count
    ram_bytes: Count


class RunnerInfo(_Record, frozen=True, kw_only=True):
    """The program that ran the job and the engine in it; `commit` of the engine is empty where it does not tell."""

    name: Name
    version: Name
    engine: Name
    engine_version: Name
    engine_commit: Text = ""


class Condition(_Record, frozen=True, kw_only=True):
    """The state of the device so long after the job began; None for what its system does not tell.

    `thermal` in the system's own word, `celsius` of what its sensor lies nearest to, `battery` from 0 to 1.
    """

    at_ms: Milliseconds
    thermal: Text | None = None
    celsius: Annotated[float, msgspec.Meta(ge=-100, le=300)] | None = None
    battery: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    charging: bool | None = None
    low_power: bool | None = None


class GateFound(_Record, frozen=True, kw_only=True):
    """How long a device was waited for to cool down, and whether it did; `passed` None where it has no thermometer."""

    waited_s: Annotated[float, msgspec.Meta(ge=0)]
    passed: bool | None


class TroubleFound(_Record, frozen=True, kw_only=True):
    """Why something was not run; `missing`: the runner lacks what it needs, rather than an engine refused."""

    message: Text
    missing: bool = False


class StepFound(_Record, frozen=True, kw_only=True):
    """What came of a step; its outputs are `out/{graph}/{step}/{name}` and its states `state/...` in the file beside.

    `load_ms` is empty where the graph was open already. `pruner_share` of the time, 0 to 1, where a profile tells.
    `delegates` and `outside`: calls and operators by name, where the engine tells them on the device.
    """

    graph: Name
    step: Name
    load_ms: Samples = ()
    warmup_ms: Samples = ()
    run_ms: Samples = ()
    pruner_share: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    delegates: dict[Name, Count] | None = None
    outside: dict[Name, Count] | None = None
    trouble: TroubleFound | None = None


class AnswerRun(_Record, frozen=True, kw_only=True):
    """One photo and one question, from end to end.

    preprocess      photo to pixel values, 0 where the job gave those
    vision          the vision graph, pruner included
    image_prefill   what the text graphs do with the image's tokens
    image_ready     pixel values to the image's whole KV cache
    question_prefill  all text graphs over the question
    ttft_question   question (token ids) to first token, the image being ready
    ttft_photo      photo and question to first token
    token           each further token
    """

    twin: bool = False
    warmup: bool = False
    preprocess_ms: Milliseconds
    vision_ms: Milliseconds
    image_prefill_ms: Milliseconds
    image_ready_ms: Milliseconds
    question_prefill_ms: Milliseconds
    ttft_question_ms: Milliseconds
    ttft_photo_ms: Milliseconds
    token_ms: Samples


class AnswerFound(_Record, frozen=True, kw_only=True):
    """What was answered: greedy `ids`, and the sizes that belong to the times in `runs`."""

    ids: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=_MOST_SAMPLES)] = ()
    cache_bytes: Count | None = None
    image_tokens_before: Count = 0
    image_tokens_after: Count = 0
    question_tokens: Count = 0
    runs: Annotated[tuple[AnswerRun, ...], msgspec.Meta(max_length=100_000)] = ()
    trouble: TroubleFound | None = None


class MemoryFound(_Record, frozen=True, kw_only=True):
    """Resident memory of the runner: the highest while it ran, and what is left once all graphs are closed."""

    peak_rss_bytes: Count
    after_close_bytes: Count | None = None


class LoadFound(_Record, frozen=True, kw_only=True):
    """Opening all graphs of the bundle: the first time on this device, and each later time; empty where not measured.

    The first may prepare files, such as packed weights, that the later ones read.
    """

    first_ms: Samples = ()
    later_ms: Samples = ()


class FindingsFile(_Record, frozen=True, kw_only=True):
    """findings.json: what came of a job. `job`, `bundle` and `twin` are copied from it. `ended_utc` is set when whole.

    `accumulator_bits`: in how many bits the engine adds float16 products up, where accumulator.pte lay beside the job.
    `trouble`: why the rest is missing, where the job as a whole could not be run.
    """

    job: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{16}$")]
    bundle: Name
    twin: Name | None = None
    device: DeviceInfo
    runner: RunnerInfo
    threads: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    started_utc: Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$")]
    ended_utc: Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$")]
    load: LoadFound = LoadFound()
    gate: GateFound | None = None
    conditions: Annotated[tuple[Condition, ...], msgspec.Meta(max_length=100_000)] = ()
    photo_refused: Text = ""
    steps: Annotated[tuple[StepFound, ...], msgspec.Meta(max_length=10_000)] = ()
    answer: AnswerFound | None = None
    memory: MemoryFound | None = None
    accumulator_bits: Literal[16, 32] | None = None
    trouble: TroubleFound | None = None
    findings_version: int = FINDINGS_VERSION


@dataclass(frozen=True)
class Received:
    """A findings.json and the tensors beside it, by their names."""

    file: FindingsFile
    tensors: Mapping[str, np.ndarray]


def schemas() -> dict[str, object]:
    """The JSON Schema of job.json and of findings.json, by name; docs/ holds them as files."""
    return {JOB: msgspec.json.schema(JobFile), FINDINGS: msgspec.json.schema(FindingsFile)}


def make_job(
    bundle: Bundle,
    *,
    threads: int = 0,
    timing: TimingJob | None = None,
    twin: Bundle | None = None,
    gate: GateJob | None = None,
    checks: bool = True,
) -> tuple[JobFile, dict[str, np.ndarray]]:
    """A job over the golden of a bundle, at one keep, and its tensors.

    Without `checks` the graphs are not run one by one, but the question is answered. Raises BundleError.
    """
    bundle = bundle.at()
    golden = bundle.golden()
    tensors: dict[str, np.ndarray] = {}
    listed = []
    for graph in bundle.manifest.graphs if checks else ():
        for step in steps(graph, bundle.manifest.layout):
            try:
                inputs = graph_inputs(graph, golden, step)
            except KeyError:
                continue
            listed.append(StepJob(graph=graph.name, stored=bundle.stored(graph.name).name, step=step))
            tensors |= {f"in/{graph.name}/{step}/{name}": array for name, array in inputs.items()}
    if PHOTO in golden:
        tensors[PHOTO] = golden[PHOTO]
    pixels = golden.get(input_key(VISION_ENCODER, PIXELS))
    answer = None
    if pixels is not None and bundle.manifest.text is not None:
        tensors[PIXELS] = pixels
        question = golden.get(QUESTION)
        if question is None:
            question = golden[input_key(TOKEN_EMBEDDING, "ids")][0, :16]
        count = len(golden[ANSWER]) if ANSWER in golden else 16
        answer = AnswerJob(question=tuple(question.tolist()), new_tokens=count)
    job = JobFile(
        id=secrets.token_hex(8),
        bundle=bundle.identity,
        vision=bundle.stored(VISION_ENCODER).name,
        steps=tuple(listed),
        answer=answer,
        threads=threads,
        timing=timing,
        twin=None if twin is None else TwinJob(bundle=twin.at().identity, vision=twin.at().stored(VISION_ENCODER).name),
        gate=gate,
    )
    return job, tensors


def make_question(
    bundle: Bundle, photo: np.ndarray, question: tuple[int, ...], *, new_tokens: int, threads: int = 0
) -> tuple[JobFile, dict[str, np.ndarray]]:
    """A job that asks one question, token ids, about a photo uint8 (H, W, 3), and its tensors."""
    bundle = bundle.at()
    job = JobFile(
        id=secrets.token_hex(8),
        bundle=bundle.identity,
        vision=bundle.stored(VISION_ENCODER).name,
        steps=(),
        answer=AnswerJob(question=question, new_tokens=new_tokens),
        threads=threads,
    )
    return job, {PHOTO: photo}


def device_files(bundle: Bundle) -> tuple[str, ...]:
    """What of a bundle a device needs to run it: no golden, no reports."""
    left = {view.manifest.golden.file for view in bundle.siblings}
    return tuple(file for file in bundle.manifest.files if file not in left and not is_report(file))


def write_job(folder: Path, job: JobFile, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes job.json and inputs.safetensors."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / INPUTS)
    (folder / JOB).write_bytes(msgspec.json.format(msgspec.json.encode(job)) + b"\n")


def read_job(folder: Path) -> JobFile:
    """Reads job.json. Raises BundleError."""
    path = folder / JOB
    try:
        job = msgspec.json.decode(path.read_bytes(), type=JobFile)
    except OSError as err:
        raise BundleError(f"{path} cannot be read: {err.strerror}") from err
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BundleError(f"{path} is no job: {err}; make it again") from err
    if job.job_version != JOB_VERSION:
        raise BundleError(f"{path} has job_version {job.job_version}, this pruneport runs {JOB_VERSION}; make it again")
    return job


class _Version(msgspec.Struct):
    """The one field that is read before the rest, so that newer findings get a message of their own."""

    findings_version: int


def read_findings(folder: str | os.PathLike[str]) -> Received:
    """Reads what a device left in a folder, which it trusts in nothing. Raises FindingsError.

    The tensors are empty where the device wrote none.
    """
    folder = Path(folder)
    path = folder / FINDINGS
    again = "pull it again, or run the job again"
    try:
        size_bytes = path.stat().st_size
        if size_bytes > _MAX_FINDINGS_BYTES:
            raise FindingsError(f"{path} has {size_bytes} bytes; findings have at most {_MAX_FINDINGS_BYTES}")
        raw = path.read_bytes()
    except FileNotFoundError:
        raise FindingsError(f"{folder} has no {FINDINGS}; give the folder that `pruneport device` wrote") from None
    except NotADirectoryError:
        raise FindingsError(f"{folder} is a file; give the folder that holds {FINDINGS}") from None
    except OSError as err:
        raise FindingsError(f"{path} cannot be read: {err.strerror}") from err
    try:
        version = msgspec.json.decode(raw, type=_Version).findings_version
        if version != FINDINGS_VERSION:
            raise FindingsError(
                f"{path} has findings_version {version}, this pruneport reads {FINDINGS_VERSION}; "
                "use the pruneport and the runner of one release"
            )
        file = msgspec.json.decode(raw, type=FindingsFile)
    except msgspec.ValidationError as err:
        raise FindingsError(f"{path} does not follow the schema of findings: {err}; {again}") from err
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise FindingsError(f"{path} is not whole JSON: {err}; {again}") from err
    except RecursionError:
        raise FindingsError(f"{path} is nested too deeply to be findings; {again}") from None
    return Received(file, _read_tensors(folder / OUTPUTS, again))


def _read_tensors(path: Path, again: str) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if not path.exists():
        return {}
    if path.is_symlink() or not path.is_file():
        raise FindingsError(f"{path} is not a plain file; {again}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as err:
        raise FindingsError(f"{path} is not a whole safetensors file ({err}); {again}") from err


def now_utc() -> str:
    """This moment as findings spell it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_findings(folder: Path, file: FindingsFile, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes outputs.safetensors, then findings.json: where that is there, all is."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, folder / OUTPUTS)
    beside = folder / f".{FINDINGS}"
    beside.write_bytes(msgspec.json.format(msgspec.json.encode(file)) + b"\n")
    beside.replace(folder / FINDINGS)


def minibench(file: FindingsFile, bundle: Bundle) -> list[dict[str, object]]:
    """The same in the shape of ExecuTorch's minibench, `benchmark_results.json`: medians of the bundle's own runs."""
    target = bundle.manifest.target
    model = {
        "name": bundle.manifest.model,
        "backend": target.backend,
        "quantization": target.quant_text or target.quant_vision or target.precision,
    }
    device = {
        "device": file.device.name,
        "arch": file.device.abi,
        "os": file.device.os,
        "totalMem": file.device.ram_bytes,
        "kind": file.device.kind,
    }
    runs = [run for run in (file.answer.runs if file.answer else ()) if not run.twin and not run.warmup]
    tokens = [ms for run in runs for ms in run.token_ms]
    metrics: dict[str, list[float]] = {
        "model_load_time(ms)": list(file.load.later_ms or file.load.first_ms),
        "image_ready(ms)": [run.image_ready_ms for run in runs],
        "ttft_from_question(ms)": [run.ttft_question_ms for run in runs],
        "ttft_from_photo(ms)": [run.ttft_photo_ms for run in runs],
        "token_per_sec": [1e3 / float(np.median(tokens))] if tokens and np.median(tokens) else [],
        "peak_rss(bytes)": [float(file.memory.peak_rss_bytes)] if file.memory else [],
        **{f"{step.graph}@{step.step}(ms)": list(step.run_ms) for step in file.steps if step.run_ms},
    }
    return [
        {
            "benchmarkModel": model,
            "metric": name,
            "actualValue": float(np.median(samples)),
            "targetValue": 0.0,
            "deviceInfo": device,
        }
        for name, samples in metrics.items()
        if samples
    ]


def write_minibench(folder: Path, file: FindingsFile, bundle: Bundle) -> None:
    """Writes benchmark_results.json beside findings. Raises OutputError."""
    path = folder / MINIBENCH
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(minibench(file, bundle))) + b"\n")
    except OSError as err:
        raise OutputError(f"{path} cannot be written: {err.strerror or err}") from err
