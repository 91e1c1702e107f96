"""Exports that the machine has no memory for are refused, with what would need less; --force tries them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import export.memory
from export.request import Request, check_memory, describe, plan
from runtime.errors import RequestError


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.memory, "available_bytes", lambda: 2**30)
    request = Request(model="llava-1.5-7b", keep="64", target="android", weights="random", output_dir=str(tmp_path))
    planned = plan(replace(request, precision="fp32", force=True))
    check_memory(planned)
    assert "the system may stop the export" in describe(planned)
    refused = replace(planned, request=replace(planned.request, force=False))
    assert "refused without --force" in describe(refused)
    with pytest.raises(RequestError, match=r"RAM, 1\.0 GiB are available.*--only vision \(about .* --force"):
        check_memory(refused)


@pytest.mark.parametrize(("model", "most_gib"), [("llava-1.5-7b", 8), ("llava-1.5-13b", 12)])
def test_a_laptop_makes_the_large_models_for_onnx_runtime(model: str, most_gib: float, tmp_path: Path) -> None:
    """By the forecast: weights are read late and the text is quantised without a word."""
    request = Request(
        model=model,
        keep="64",
        target="android",
        backend="onnx",
        weights="random",
        output_dir=str(tmp_path),
        force=True,
    )
    needs = plan(request).needs
    assert needs.ram_bytes <= most_gib * 2**30
    whole = plan(replace(request, quant_text="none")).needs
    assert whole.ram_bytes > 3 * needs.ram_bytes
    assert whole.disk_bytes > 3 * needs.disk_bytes
