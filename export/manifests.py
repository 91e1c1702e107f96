"""What a manifest says of a bundle that was just made."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING

from runtime.bundle import (
    OWN_LAYOUT,
    CalibrationInfo,
    FrameInfo,
    GoldenInfo,
    GraphInfo,
    ImageInfo,
    KeepInfo,
    MadeInfo,
    Manifest,
    PruneInfo,
    RangesInfo,
    TargetInfo,
    TextInfo,
)

if TYPE_CHECKING:
    from export.families.family import Checkpoint
    from export.request import BundlePlan, KeepPlan, Plan

# Packages whose version can change what a bundle computes.
TOOLS = (
    "torch",
    "transformers",
    "executorch",
    "torchao",
    "onnx",
    "onnxruntime",
    "onnxruntime-qnn",
    "onnxscript",
    "coremltools",
    "numpy",
)


def manifest_of(
    plan: Plan,
    checkpoint: Checkpoint,
    bundle: BundlePlan,
    graphs: tuple[GraphInfo, ...],
    *,
    image: ImageInfo,
    text: TextInfo | None,
    golden: GoldenInfo,
    ranges: RangesInfo | None,
    text_ranges: RangesInfo | None,
    version: str,
) -> Manifest:
    """Puts together what was planned and what was made; `version` is pruneport's own. The files are not in it yet."""
    from export.models.prompt import read_prompt

    prompt = read_prompt(checkpoint.folder, checkpoint.geometry, plan.entry)
    frame = plan.entry.family.frame(prompt.prefix_ids, checkpoint.geometry)
    return Manifest(
        name=bundle.path.name,
        model=plan.entry.name,
        family=plan.entry.family.name,
        created_utc=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        weights=checkpoint.identity(),
        target=_target_info(plan),
        prune=_prune_info(plan, bundle.keeps[0]),
        graphs=graphs,
        image=image,
        prompt=prompt,
        frame=FrameInfo(
            before=len(frame.prefix_ids), image=len(frame.slots), first_text=len(frame.ids), breaks=frame.breaks
        ),
        golden=golden,
        tools={"pruneport": version, **tool_versions()},
        text=text,
        layout=plan.layout.runtime if plan.layout else OWN_LAYOUT,
        ranges=ranges,
        text_ranges=text_ranges,
        calibration=_calibration_info(plan),
        keeps=tuple(
            KeepInfo(prune=_prune_info(plan, each), graph=each.graph, golden=each.golden) for each in bundle.keeps
        )
        if len(bundle.keeps) > 1
        else (),
    )


def _target_info(plan: Plan) -> TargetInfo:
    vision, text = plan.vision.backend, plan.text.backend if plan.text and plan.mixed else None
    return TargetInfo(
        name=plan.target.name,
        backend=vision.name,
        precision=plan.vision.precision,
        quant_vision=plan.vision.scheme,
        quant_text=plan.text.scheme if plan.text else None,
        soc=vision.soc,
        min_os=vision.min_os,
        text=None
        if plan.text is None or text is None
        else MadeInfo(backend=text.name, precision=plan.text.precision, soc=text.soc, min_os=text.min_os),
    )


def _prune_info(plan: Plan, keep: KeepPlan) -> PruneInfo:
    from pruning import settings_numbers

    geometry, spec = plan.entry.geometry, keep.spec
    return PruneInfo(
        cut=plan.cut,
        image_tokens=geometry.image_tokens,
        keep=keep.keep,
        grid=geometry.grid,
        overview=geometry.overview,
        pruned=spec is not None,
        method=None if spec is None else spec.method,
        settings={} if spec is None else settings_numbers(spec),
        arithmetic=plan.vision.backend.pruner_arithmetic,
    )


def _calibration_info(plan: Plan) -> CalibrationInfo | None:
    from export.backends.qdq import METHOD
    from export.calibration import photos_digest

    if plan.calibration is None:
        return None
    return CalibrationInfo(photos=len(plan.calibration), sha256=photos_digest(plan.calibration), method=METHOD)


def tool_versions() -> dict[str, str]:
    installed = {distribution.metadata["Name"] for distribution in metadata.distributions()}
    versions = {name: metadata.version(name) for name in TOOLS if name in installed}
    return {"python": platform.python_version(), **versions}
