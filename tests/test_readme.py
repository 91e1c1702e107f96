"""The README against the code: flags, bounds and manifest fields that it names are those there are."""

from __future__ import annotations

import json
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

from export.backends.qnn import socs
from export.cli import build_parser
from export.models import MODELS
from runtime.bundle import Manifest
from runtime.explain import rules
from runtime.parity import BOUNDS


@pytest.fixture(scope="module")
def readme(root: Path) -> str:
    return (root / "README.md").read_text(encoding="utf-8")


def section(readme: str, title: str) -> str:
    return readme.split(f"\n## {title}", 1)[1].split("\n## ", 1)[0]


def first_cells(text: str) -> list[str]:
    rows = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    return rows[1:]  # without the heading


def test_every_flag_is_listed(readme: str) -> None:
    listed = set(re.findall(r"--[a-z-]+", " ".join(first_cells(section(readme, "Flags")))))
    verbs = build_parser()[1]
    helps = verbs["export"].format_help() + verbs["ask"].format_help()
    spoken = set(re.findall(r"(?<![\w-])--[a-z-]+", helps)) - {"--help", "--quiet", "--verbose"}
    listed -= {"--quiet", "--verbose"}
    assert listed == spoken


def test_every_model_is_listed(readme: str) -> None:
    row = next(line for line in section(readme, "Flags").splitlines() if line.startswith("| `--model`"))
    assert set(re.findall(r"`([^`]+)`", row)) - {"--model"} == set(MODELS)


def test_every_manifest_field_is_listed(readme: str) -> None:
    listed = set(re.findall(r"`(\w+)`", " ".join(first_cells(section(readme, "The bundle")))))
    assert listed == set(Manifest.__struct_fields__)


def test_bounds_are_those_of_the_code(readme: str) -> None:
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in section(readme, 'What "equal" means').splitlines()
        if line.startswith("| ")
    ][1:]
    assert table == [
        [
            bound.precision,
            "reported only" if bound.most_rel is None else f"{bound.most_rel:g}",
            "reported only" if bound.least_cosine is None else f"{bound.least_cosine:g}",
            f"{bound.least_overlap:.0%}",
        ]
        for bound in BOUNDS.values()
    ]


def table(text: str, title: str) -> list[list[str]]:
    """The rows below the heading of the one table of a part of the README."""
    part = text.split(f"### {title}\n", 1)[1].split("\n#", 1)[0]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| ")][1:]


def results(root: Path, pattern: str) -> list[dict[str, Any]]:
    found = sorted((root / "benchmarks" / "results").glob(pattern))
    assert found
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def bundles(root: Path) -> dict[str, dict[str, Any]]:
    """What was measured of whole bundles, by their names in benchmarks/bundles.py."""
    (result,) = results(root, "bundles.json")
    return {bundle["bundle"]: bundle for bundle in result["bundles"]}


def test_rules_of_the_neural_engine_are_those_of_the_code(readme: str) -> None:
    assert table(readme, "Explaining") == [[f"`{rule.id}`", rule.effect, rule.source] for rule in rules().neural_engine]


def test_every_verb_is_named(readme: str) -> None:
    for verb in build_parser()[1]:
        assert f"pruneport {verb} " in section(readme, "Flags")


def test_cost_of_pruning_is_the_measured_one(readme: str, root: Path) -> None:
    assert table(readme, "What pruning costs") == [
        [
            result["graph"].removeprefix("llava-1.5-7b vision_encoder, "),
            f"{result['median_ms']['tower']:.1f}",
            f"{result['median_ms']['pruner']:.2f}",
            f"{result['overhead_percent_of_tower']['median']:.2f}%",
        ]
        for result in results(root, "pruner_overhead-*.json")
    ]


def test_what_pruning_brings_is_the_measured_one(readme: str, root: Path) -> None:
    (result,) = results(root, "answers-*.json")
    ms, faster, fewer = result["median_ms"], result["speedup"], result["flop_ratio"]
    assert table(readme, "What pruning brings") == [
        [
            what,
            f"{ms['twin'][what]:.1f}",
            f"{ms['pruned'][what]:.1f}",
            f"{faster[what]['median']:.2f}",
            f"{fewer[what]:.2f}" if what in fewer else "",
        ]
        for what in ms["twin"]
    ]
    caches = result["kv_cache_bytes"]
    part = readme.split("### What pruning brings\n", 1)[1].split("\n#", 1)[0]
    assert f"{result['twins_full_ttft_over_pruned_ttft']['median']:.1f} times sooner" in " ".join(part.split())
    assert f"{caches['pruned']:,} instead of {caches['twin']:,} bytes" in " ".join(part.split())


def test_precisions_are_the_measured_ones(readme: str, root: Path) -> None:
    assert table(readme, "Precision") == [
        [
            result["command"].split()[-1],
            f"{int(result['graph'].split()[-2]) / 1e9:.2f}",
            f"{result['peak_rss_kib'] / 2**20:.2f}",
            f"{result['engine_median_s']:.1f}",
            f"{result['parity']['worst_rel']:g}",
            f"{result['parity']['kept_overlap']:.0%}",
        ]
        for result in results(root, "export_memory-llava-1.5-7b-*.json")
    ]


def test_what_the_npu_takes_is_the_measured_one(readme: str, root: Path) -> None:
    bundle = bundles(root)["qnn-fp16"]
    assert f"\n    {bundle['command']}\n" in readme
    assert table(readme, "Snapdragon NPU") == [
        [graph["graph"], str(graph["operators"]), str(graph["outside"]), f"{graph['worst_rel']:g}"]
        for graph in bundle["graphs"]
    ]
    (result,) = results(root, "qnn-emulated.json")
    measured: dict[tuple[str, str], list[float]] = {}
    for row in result["selections"]:
        measured.setdefault((row["scheme"], row["case"].rpartition("-keep")[2]), []).append(row["overlap"])
    assert table(readme, "The pruner in float16") == [
        [scheme, keep, str(len(shares)), str(sum(share == 1 for share in shares)), f"{min(shares):.1%}"]
        for (scheme, keep), shares in measured.items()
    ]


def test_answers_by_delegate_are_the_measured_ones(readme: str, root: Path) -> None:
    (result,) = results(root, "delegates-keep*.json")
    assert len({len(row["photos"]) for row in result["delegates"]} | {10}) == 1
    assert table(readme, "Answers by delegate") == [
        [
            row["delegate"],
            "evaluated" if not row["executed"] else "emulated" if row["emulated"] else "ran",
            f"{row['mean_kept']:.1%}",
            f"{row['mean_same']:g}",
            str(sum(photo["same"] == 64 for photo in row["photos"])),
        ]
        for row in result["delegates"]
    ]


def test_core_ml_is_the_evaluated_one(readme: str, root: Path) -> None:
    assert table(readme, "Core ML") == [
        [
            f"`{bundle['command'].removeprefix('pruneport export ').replace(' --target ios', '')}`",
            str(sum(graph["operators"] for graph in bundle["graphs"])),
            f"{bundle['file_bytes'] / 1e6:.1f}",
            f"{max(graph['worst_rel'] for graph in bundle['graphs']):g}",
            f"{bundle['kept_overlap']:.1%}",
        ]
        for name, bundle in bundles(root).items()
        if name.startswith("coreml")
    ]


def test_every_chip_is_listed(readme: str) -> None:
    row = next(line for line in section(readme, "Flags").splitlines() if line.startswith("| `--soc`"))
    assert re.findall(r"`([^`]+)`", row.split("|")[2]) == list(socs())


def test_the_table_of_precisions_is_made_of_the_measurements(root: Path) -> None:
    spec = spec_from_file_location("precision", root / "benchmarks/precision.py")
    assert spec is not None
    assert spec.loader is not None
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    (result,) = results(root, "precision.json")
    text = (root / "docs/precision.md").read_text(encoding="utf-8")
    assert f"<!-- table: begin -->\n{script.table(result)}<!-- table: end -->" in text
