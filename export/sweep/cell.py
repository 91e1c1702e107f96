"""One cell of a sweep: what it makes, the key that says so, and the record of what came of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from export.sweep.matrix import FLAGS, Words, as_flags, as_request, spelt_out
from export.sweep.process import LOG, Ended, Job, last_line
from runtime.errors import PruneportError, RequestError

if TYPE_CHECKING:
    from export.request import Plan

Status = Literal["passed", "failed", "not checked", "error"]
RECORD = "cell.json"
# What the bundle's name tells by itself, however it was spelt or left out.
_NAMED = {"model", "keep", "target", "backend", "soc", "min-ios", "precision", "quant-vision", "quant-text"} | {
    "text-tokens",
    "cut",
    "layout",
    "method",
    "only",
}
# What is told by its bytes instead of its path, and what changes nothing in a bundle.
_BY_CONTENT = {"weights", "image", "calibration"}
_WITHOUT_EFFECT = {"force"}


class Numbers(msgspec.Struct, frozen=True, kw_only=True):
    """What parity.json and latency.json of a bundle say, in short; None for what is not in them.

    `outputs_within` of `outputs` are within their bounds, `worst_rel` as in TensorParity; `kept_overlap` is the least
    share of kept tokens that are the desktop's; times are medians in ms, sizes in bytes. Of several keeps the outputs
    are counted together; times and answers are those of the first.
    """

    outputs: int
    outputs_within: int
    worst_rel: float | None
    kept_overlap: float | None
    answer_same: int | None
    answer_tokens: int | None
    perplexity: float | None
    desktop_perplexity: float | None
    vision_ms: float | None
    image_ready_ms: float | None
    ttft_ms: float | None
    token_ms: float | None
    kv_cache_bytes: int | None
    bundle_bytes: int
    device: str


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a cell: cell.json, and a row of results.json.

    `status` is the verdict of the bundle's check, or `error` where there is no bundle; `detail` says why it did not
    pass. `bundle` is its folder beside the record; None where there is none. `host`, `started` (seconds since 1970)
    and `seconds` are of the process. `made_of` is what `key` is the hash of.
    """

    status: Status
    detail: str
    key: str
    bundle: str | None
    numbers: Numbers | None
    ram_forecast_bytes: int
    ram_peak_bytes: int
    host: str
    started: float
    seconds: float
    made_of: dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell that is planned; `refusal` says why it cannot be run, and then nothing else is known of it.

    `bundle` is the name of the bundle, `folder` where it goes, with record and log.
    """

    words: Words
    refusal: str = ""
    bundle: str = ""
    key: str = ""
    folder: Path = Path()
    ram_bytes: int = 0
    disk_bytes: int = 0
    made_of: dict[str, object] = field(default_factory=dict)

    @property
    def forced(self) -> bool:
        """Whether it is tried although it needs more memory than there is."""
        return self.words.get("force") == "true"

    @property
    def log(self) -> Path:
        return self.folder / LOG

    def job(self, source: str, threads: int | None, *, verbose: bool = False) -> Job:
        """What a worker is told."""
        flags = (*as_flags(self.words), f"--output-dir={self.folder}", *(("-v",) if verbose else ()))
        return Job(
            folder=str(self.folder),
            flags=flags,
            cwd=str(Path.cwd()),
            source=source,
            ram_bytes=self.ram_bytes,
            threads=threads,
        )

    def record(self) -> Record | None:
        """What came of it before, with the same key; None where nothing did, or was not written down whole."""
        try:
            record = msgspec.json.decode((self.folder / RECORD).read_bytes(), type=Record)
        except (OSError, msgspec.DecodeError):
            return None
        return record if record.key == self.key else None

    def clear(self) -> None:
        """Removes what an earlier run of it left."""
        if self.folder.exists():
            shutil.rmtree(self.folder)

    def judge(self, ended: Ended) -> Record:
        """What came of the process, from its exit code and the reports in the bundle."""
        if ended.exit_code is None:
            return self.not_run(ended.error)
        status, detail, numbers = self._judged(ended.exit_code)
        return self._record(status, detail, numbers, ended)

    def not_run(self, why: str) -> Record:
        """A record of not having been run, which is not kept: the next sweep may find things otherwise."""
        return self._record("error", why, None, None)

    def write(self, record: Record) -> None:
        """Writes the record in one step: a sweep that is killed leaves a whole one or none."""
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f".{RECORD}"
        partial.write_bytes(pretty(record))
        partial.replace(self.folder / RECORD)

    def drop_graphs(self) -> None:
        """Removes what is large of its bundles, and leaves manifest and reports."""
        from runtime.bundle import MANIFEST, is_report

        for manifest in self.folder.glob(f"*/{MANIFEST}"):
            for path in manifest.parent.iterdir():
                if path.name != MANIFEST and not is_report(path.name):
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _record(self, status: Status, detail: str, numbers: Numbers | None, ended: Ended | None) -> Record:
        return Record(
            status=status,
            detail=detail,
            key=self.key,
            bundle=None if numbers is None else self.bundle,
            numbers=numbers,
            ram_forecast_bytes=self.ram_bytes,
            ram_peak_bytes=ended.peak_bytes if ended else 0,
            host=ended.host if ended else "",
            started=ended.started if ended else 0.0,
            seconds=ended.seconds if ended else 0.0,
            made_of=self.made_of,
        )

    def _judged(self, code: int) -> tuple[Status, str, Numbers | None]:
        if code < 0:
            return "error", _ended_by(-code, self.log), None
        status = _VERDICTS.get(code)
        if status is None or not (self.folder / self.bundle).is_dir():
            if not self.log.exists():
                return "error", f"{self.folder} is not seen here; workers must share the output folder", None
            said = last_line(self.log, "pruneport: ") or last_line(self.log) or "nothing was said"
            return "error", f"{said.removeprefix('pruneport: error: ')} (exit code {code})", None
        try:
            steps, numbers = _read_reports(self.folder / self.bundle)
        except (OSError, msgspec.DecodeError, PruneportError) as error:
            return "error", f"the reports in its bundle cannot be read: {error}", None
        why = [f"{name}: {detail}" for name, found, detail in steps if found == status != "passed"]
        return status, "; ".join(why), numbers


_VERDICTS: dict[int, Status] = {0: "passed", 1: "failed", 3: "not checked"}


def plan_cells(
    matrix: Sequence[Words], output: Path, *, version: str, source: str, tell: Callable[[str], None]
) -> tuple[Cell, ...]:
    """Plans every cell, reads which weights it would be made of, and gives it its key and its folder under `output`.

    Raises RequestError where all cells are refused alike, where a word of the matrix is refused in every cell that has
    it, and where two cells come out the same. One that is refused only beside some other word is a cell that says so.
    """
    identities: dict[tuple[str, str | None, int], str] = {}
    cells = [_planned(words, output, version, source, identities, tell) for words in matrix]
    refusals = {cell.refusal for cell in cells}
    if len(refusals) == 1 and all(refusals):  # nothing that one word could be blamed for
        raise RequestError(refusals.pop())
    for flag, word in dict.fromkeys((flag, word) for words in matrix for flag, word in words.items()):
        having = [cell for cell in cells if cell.words.get(flag) == word]
        if all(cell.refusal for cell in having):
            raise RequestError(
                f"{flag}={word} can be used in no cell of the matrix: {having[0].refusal}; take it out, or give it a "
                "mapping of its own: a matrix may be a list of them"
            )
    first: dict[str, Cell] = {}
    for cell in cells:
        if not cell.refusal and (other := first.setdefault(cell.key, cell)) is not cell:
            raise RequestError(
                f"two cells make the same {cell.bundle}: {spelt_out(other.words)}, and {spelt_out(cell.words)}; "
                "leave one of them out"
            )
    return tuple(cells)


def pretty(value: object) -> bytes:
    """A record as JSON that people can read."""
    return msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n"


def _planned(
    words: Words,
    output: Path,
    version: str,
    source: str,
    identities: dict[tuple[str, str | None, int], str],
    tell: Callable[[str], None],
) -> Cell:
    from export.checkpoints import open_checkpoint
    from export.request import plan

    try:
        planned = plan(as_request(words, output / "cells"))
        which = (planned.entry.name, planned.weights, planned.seed)
        if which not in identities:
            tell(f"reading the weights of {planned.entry.name}")
            checkpoint = open_checkpoint(planned.entry, weights=planned.weights, seed=planned.seed)
            identities[which] = checkpoint.identity().sha256
    except PruneportError as error:
        return Cell(words=words, refusal=str(error))
    made_of = _made_of(planned, identities[which], version, source)
    key = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
    return Cell(
        words=words,
        bundle=planned.bundle.name,
        key=key,
        folder=(output / "cells" / f"{planned.bundle.name}-{key[:8]}").absolute(),
        ram_bytes=planned.needs.ram_bytes,
        disk_bytes=planned.needs.disk_bytes,
        made_of=made_of,
    )


def _made_of(planned: Plan, weights: str, version: str, source: str) -> dict[str, object]:
    """Everything that decides what a bundle is and what its check says, but for the machine."""
    from export.calibration import photos_digest
    from export.manifests import tool_versions

    told = _NAMED | _BY_CONTENT | _WITHOUT_EFFECT
    return {
        "bundle": planned.bundle.name,
        "flags": {flag: getattr(planned.request, field.name) for flag, field in FLAGS.items() if flag not in told},
        "weights": weights,
        "photo": photos_digest({planned.photo_name: planned.photo}),
        "calibration": None if planned.calibration is None else photos_digest(planned.calibration),
        "source": source,
        "tools": {"pruneport": version, **tool_versions()},
    }


def _ended_by(number: int, log: Path) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        name = f"signal {number}"
    why = " (the system ends processes so when memory runs out)" if number == signal.SIGKILL else ""
    return f"ended by {name}{why}; {log.name} tells how far it came: {last_line(log) or 'nothing'}"


def _read_reports(bundle: Path) -> tuple[list[tuple[str, str, str]], Numbers]:
    """The steps of the check, and the numbers."""
    from runtime.bundle import VISION_ENCODER, read_bundle
    from runtime.report import LatencyFile, ParityFile

    parity = msgspec.json.decode((bundle / "parity.json").read_bytes(), type=ParityFile)
    latency = msgspec.json.decode((bundle / "latency.json").read_bytes(), type=LatencyFile)
    tensors = [tensor for graph in parity.graphs for tensor in graph.tensors]
    texts = [graph.text for graph in parity.graphs if graph.text is not None]
    answers = latency.answers.bundle if latency.answers is not None else None
    vision = [timed.bundle.median_ms for timed in latency.graphs if timed.graph.startswith(VISION_ENCODER)]
    numbers = Numbers(
        outputs=len(tensors),
        outputs_within=sum(tensor.passed for tensor in tensors),
        worst_rel=max((tensor.rel for tensor in tensors if tensor.rel is not None), default=None),
        kept_overlap=min((graph.kept.overlap for graph in parity.graphs if graph.kept is not None), default=None),
        answer_same=parity.answer.same if parity.answer else None,
        answer_tokens=parity.answer.expected_count if parity.answer else None,
        perplexity=texts[0].got_perplexity if texts else None,
        desktop_perplexity=texts[0].expected_perplexity if texts else None,
        vision_ms=vision[0] if vision else None,
        image_ready_ms=answers.image_ready.median_ms if answers else None,
        ttft_ms=answers.ttft.median_ms if answers else None,
        token_ms=answers.token.median_ms if answers else None,
        kv_cache_bytes=answers.kv_cache_bytes if answers else None,
        bundle_bytes=read_bundle(bundle).size_bytes,
        device=latency.device,
    )
    return [(step.name, step.status, step.detail) for step in parity.steps], numbers
