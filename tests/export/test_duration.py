"""The forecast of time: from measured exports alone, scaled by the machine, and none where nothing was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import export.duration
from export.duration import MEASURED, Speed, this_machine
from export.families import MODELS
from export.request import Request, describe, needed_seconds, plan

REQUEST = Request(model="llava-1.5-7b", keep="64", target="android", weights="random", force=True)


def _result(root: Path, name: str) -> Any:
    return json.loads((root / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("backend", sorted(MEASURED))
def test_constants_are_those_of_the_results(backend: str, root: Path) -> None:
    small, whole = (
        _result(root, f"export_{name}") for name in (f"part-pocket-{backend}", f"whole-llava-1.5-7b-{backend}")
    )
    entry = MODELS["llava-1.5-7b"]
    billions = (entry.vision_parameter_count(0) + entry.text_parameter_count()) / 1e9
    products = sum(whole["stages"][stage]["s"] for stage in ("desktop outputs", "check in the engine"))
    copies = whole["seconds"] - products - small["seconds"]
    measured = MEASURED[backend]
    expected = (small["seconds"], products / billions, copies / billions)
    assert measured[:3] == pytest.approx(expected, rel=0.001)
    assert small["speed"] == measured.speed._asdict()


@pytest.mark.parametrize("backend", sorted(MEASURED))
def test_a_measured_export_is_forecast(
    backend: str, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = plan(replace(REQUEST, backend=backend, output_dir=str(tmp_path)))
    seconds = _result(root, f"export_whole-llava-1.5-7b-{backend}")["seconds"]
    monkeypatch.setattr(export.duration, "this_machine", lambda: MEASURED[backend].speed)
    assert needed_seconds(planned) == pytest.approx(seconds, rel=0.001)
    twin = plan(replace(REQUEST, backend=backend, output_dir=str(tmp_path), twin=True))
    assert needed_seconds(twin) == pytest.approx(2 * seconds, rel=0.001)
    monkeypatch.setattr(
        export.duration, "this_machine", lambda: Speed(*(value / 2 for value in MEASURED[backend].speed))
    )
    assert needed_seconds(planned) == pytest.approx(2 * seconds, rel=0.001)


@pytest.mark.parametrize(
    "changed",
    [{"backend": "vulkan"}, {"quant_text": "none"}, {"only": "vision"}, {"backend": "vision=onnx,text=xnnpack"}],
)
def test_none_where_nothing_was_measured(changed: dict[str, str], tmp_path: Path) -> None:
    planned = plan(replace(REQUEST, output_dir=str(tmp_path), **changed))  # type: ignore[arg-type]
    assert needed_seconds(planned) is None
    assert "no forecast of time" in describe(planned)


def test_it_is_said_beside_ram_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.duration, "this_machine", lambda: MEASURED["xnnpack"].speed)
    (line,) = [
        line for line in describe(plan(replace(REQUEST, output_dir=str(tmp_path)))).splitlines() if "RAM" in line
    ]
    assert line.endswith(" free), about 18 min of a machine that does nothing else")


def test_this_machine_has_a_speed() -> None:
    assert all(value > 0 for value in this_machine())
