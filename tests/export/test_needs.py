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
