"""What benchmarks/cuda.py measures and says, tried on the CPU and small; no time that it gives here means anything."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import cuda
from benchmarks.cuda import QUESTION_TOKENS, Prefill, against_targets, in_turns, measure, noise, pruner_rows, smooth
from docs.tables import measured
from export.models.pocket import POCKET
from pruning import PruneSpec, TokenPruner
from tests.tiny_llava import TINY

CPU = torch.device("cpu")
LAYERS = POCKET.geometry.text.layers
SPEC = PruneSpec(grid=(4, 4), keep=5)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def options(**changes: Any) -> Namespace:
    words = {"device": "cpu", "model": "pocket", "layers": 3, "dtype": "bf16", "keep": 8, "runs": 1}
    return Namespace(**{**words, **changes})


@pytest.fixture
def result() -> dict[str, Any]:
    """One of a GPU that there is not, with the rows that the script makes."""
    rows = pruner_rows(TokenPruner(SPEC), smooth(SPEC.grid, 20, 1), smooth(SPEC.grid, 20, 2), 2)
    return {
        "command": "python benchmarks/cuda.py --layers 3",
        "machine": "Toaster 9000",
        "device": "cuda",
        "tools": {"torch": "0"},
        "pruner": [{"features": "smooth", "dtype": "bf16"} | rows],
        "prefill": {
            "model": "llava-1.5-7b",
            "layers": 3,
            "dtype": "bf16",
            "median_ms": {"twin": 40.0, "pruned": 8.0},
            "twin_over": {"pruned": {"median": 5.0, "least": 4.0, "most": 6.0, "runs": 2}},
        },
    }


def test_all_rows_are_made_on_a_cpu_and_name_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(cuda, "WARMUP", 0)
    monkeypatch.setattr(cuda, "ROOT", tmp_path)
    words = ["--device", "cpu", "--model", "pocket", "--layers", "3", "--keep", "8", "--runs", "1"]
    monkeypatch.setattr(sys, "argv", ["benchmarks/cuda.py", *words])
    cuda.main()
    out = capsys.readouterr().out
    assert out.endswith("not written: this is no GPU\n")
    assert list(tmp_path.iterdir()) == []
    made, _ = json.JSONDecoder().raw_decode(out)
    assert made["command"] == f"python benchmarks/cuda.py {' '.join(words)}"
    assert made["device"] == "cpu"
    assert made["machine"].startswith("desktop CPU (")
    assert made["machine"].endswith("; not a GPU")
    assert [row["features"] for row in made["pruner"]] == ["smooth", "noise"]
    for row in made["pruner"]:
        assert (row["tokens"], row["keep"], row["filled"]) == (576, 8, 0)
        assert set(row["median_ms"]) == {"loop", "static"}
        assert set(row["loop_over"]) == {"static"}
    prefill = made["prefill"]
    assert (prefill["layers"], prefill["keep"], prefill["tokens"]["image"]) == (3, 8, 576)
    assert set(prefill["median_ms"]) == {"twin", "pruned"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "pokcet"}, "unknown model 'pokcet'; allowed: llava-1.5-7b"),
        ({"layers": 2}, rf"layers=2 must lie in 3\.\.{LAYERS}"),
        ({"layers": LAYERS + 1}, rf"layers={LAYERS + 1} must lie in 3\.\.{LAYERS}"),
        ({"device": "cuda"}, "finds no GPU here; run this on a machine with one, or try it with --device cpu"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=message):
        measure(options(**changes))


def test_a_form_that_keeps_other_tokens_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(self: TokenPruner, keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden[:, :5], torch.arange(5)[None]

    monkeypatch.setattr(TokenPruner, "forward", first)
    with pytest.raises(SystemExit, match=r"static keeps \d of 5 tokens that the loop does not; nothing is measured"):
        pruner_rows(TokenPruner(SPEC), smooth(SPEC.grid, 20, 1), smooth(SPEC.grid, 20, 2), 1)


def test_smooth_neighbours_are_alike() -> None:
    for make, alike in ((smooth, True), (noise, False)):
        rows = torch.nn.functional.normalize(make((24, 24), 64, 0)[0], dim=1)
        assert (float((rows[:-1] * rows[1:]).sum(1).median()) > 0.8) is alike


def test_the_twin_is_the_pruned_prefill_that_keeps_all() -> None:
    prefill = Prefill(TINY, 3, torch.float32, CPU)
    keys, hidden = prefill.features()
    assert keys.shape == (1, 16, 16)
    assert hidden.shape == (1, 16, 48)

    def all_of_them(keys: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, torch.arange(hidden.shape[1])[None]

    twin, pruned = prefill.logits(None), prefill.logits(all_of_them)
    assert twin.shape == (1, 1, 64)
    torch.testing.assert_close(pruned, twin)
    fewer = prefill.logits(lambda keys, hidden: (hidden[:, 3:8], torch.arange(3.0, 8.0)[None]))
    assert not torch.allclose(fewer, twin, rtol=1e-3)


def test_the_prefill_is_transformers_own_model() -> None:
    """The same weights in LlamaModel, whose mask and cache are its own."""
    from transformers import LlamaForCausalLM

    from export.families.llava.desktop import eager_config

    prefill = Prefill(TINY, 3, torch.float32, CPU)
    whole: Any = LlamaForCausalLM(eager_config(TINY.config).text_config)
    whole.eval()
    whole.model.layers = torch.nn.ModuleList(prefill._layers)
    whole.model.norm, whole.lm_head = prefill._norm, prefill._head
    tokens = prefill.prefix + prefill.image + QUESTION_TOKENS
    assert prefill._prompt.shape[1] == tokens
    expected = whole(inputs_embeds=prefill._prompt).logits[:, -1:]
    torch.testing.assert_close(prefill.logits(None), expected)


def test_weights_that_a_gpu_does_not_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "Generator", lambda device: torch.default_generator)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**6, 10**9))
    with pytest.raises(SystemExit, match=r"3 layers in torch\.bfloat16 take 0\.\d GB, and 0\.0 GB are free on the GPU"):
        Prefill(POCKET, 3, torch.bfloat16, torch.device("cuda"))


def test_all_are_timed_in_turns_after_warming_up() -> None:
    called: list[str] = []
    taken = in_turns({name: partial(called.append, name) for name in ("a", "b")}, CPU, 2)
    assert called == ["a", "b"] * (cuda.WARMUP + 2)
    assert {name: len(ms) for name, ms in taken.items()} == {"a": 2, "b": 2}


def test_ratios_stand_beside_what_was_aimed_at(result: dict[str, Any], root: Path) -> None:
    (row,) = result["pruner"]
    row["median_ms"], row["loop_over"] = (
        {"loop": 90.0, "static": 9.0, "captured": 0.45},
        {"static": {"median": 10.0}, "captured": {"median": 200.0}},
    )
    (line,) = against_targets(result)
    assert line == (
        "Toaster 9000, smooth, 16 -> 5: captured takes 0.450 ms (target: under 0.5), and the loop 200.0 times as long "
        "(target: at least 10)"
    )
    page = " ".join((root / "docs/measurements.md").read_text(encoding="utf-8").split())
    assert f"at least {cuda.TIMES_FASTER:g} times faster than the loop, and to take under {cuda.MOST_MS:g} ms" in page


def test_the_docs_show_gpus_and_no_cpu(result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    assert measured.on_a_gpu().endswith("No GPU was measured yet.\n")
    tried = {**result, "device": "cpu", "machine": "desktop CPU (slow); not a GPU"}
    (tmp_path / "cuda-tried.json").write_text(json.dumps(tried), encoding="utf-8")
    assert measured.on_a_gpu().endswith("No GPU was measured yet.\n")
    (tmp_path / "cuda-toaster.json").write_text(json.dumps(result), encoding="utf-8")
    shown = measured.on_a_gpu()
    assert "Made by `python benchmarks/cuda.py --layers 3`.\n\nWhere: Toaster 9000. With torch 0." in shown
    assert "slow" not in shown
    assert f"| 16 to 5 tokens, smooth | loop | {result['pruner'][0]['median_ms']['loop']:.3f} |  |" in shown
    assert "| prefill of llava-1.5-7b, 3 layers, bf16 | pruned | 8.000 | 5.00 |" in shown
