"""What benchmarks/peers.py makes of its measurements, and how it keeps systems apart; nothing is built or run."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from benchmarks.peer_systems import kept, model, rows, turns
from benchmarks.peer_systems.llama_cpp import interleaved, patched
from benchmarks.peer_systems.pruneport_worker import Pruneport, Timed
from docs.tables import measured
from runtime.generation import Answers, Prefill, Token
from runtime.text_graphs import RunningGraph


def answer(ready_ms: float, first_ms: float) -> dict[str, Any]:
    return {"image_ready_ms": ready_ms, "ttft_question_ms": first_ms, "token_ms": [90.0, 100.0, 500.0]}


def row(system: str, *, ready_ms: float = 100.0, tokens_per_s: float = 10.0, **others: Any) -> dict[str, Any]:
    return {
        "system": system,
        "layers": 8,
        "processor": "A",
        "image_ready_ms": ready_ms,
        "ttft_photo_ms": ready_ms + 50.0,
        "ttft_question_ms": 50.0,
        "tokens_per_s": tokens_per_s,
        "peak_rss_bytes": 2**31,
        "file_bytes": 10**9,
        "runs": 10,
        "quiet_runs": 4,
        "foreign_cores": 0.1,
        "command": "python benchmarks/peers.py --layers 8",
        "machine": "a desk",
        "threads": 2,
        "date": "2026-11-27",
        "versions": {"this": "1.0"},
        **others,
    }


def test_a_photo_and_a_question_at_once_take_both() -> None:
    made = rows.sample(answer(1000.0, 200.0), foreign_cores=0.0)
    assert made["ttft_photo_ms"] == 1200.0
    assert made["tokens_per_s"] == 10.0  # by the median token


def test_a_median_is_of_the_runs_that_others_left_alone() -> None:
    quiet = [rows.sample(answer(ms, 1.0), foreign_cores=0.0) for ms in (10.0, 20.0, 60.0)]
    loud = [rows.sample(answer(900.0, 1.0), foreign_cores=rows.QUIET_CORES)] * 4
    made = rows.summary([*quiet, *loud])
    assert (made["image_ready_ms"], made["runs"], made["quiet_runs"]) == (20.0, 7, 3)
    assert made["foreign_cores"] == 0.0


def test_without_a_quiet_run_all_count_and_the_row_says_so() -> None:
    made = rows.summary([rows.sample(answer(ms, 1.0), foreign_cores=1.5) for ms in (10.0, 30.0, 20.0)])
    assert (made["image_ready_ms"], made["quiet_runs"], made["foreign_cores"]) == (20.0, 0, 1.5)
    with pytest.raises(ValueError, match="at least one sample"):
        rows.summary([])


def test_a_row_replaces_only_that_of_its_processor_layers_and_system() -> None:
    old = [row("x", ready_ms=1.0), row("x", ready_ms=2.0, layers=32), row("x", ready_ms=3.0, processor="B"), row("y")]
    found = rows.merged(old, [row("x", ready_ms=4.0), row("z")])
    assert [(each["system"], each["image_ready_ms"]) for each in found] == [
        ("x", 4.0),
        ("x", 2.0),
        ("x", 3.0),
        ("y", 100.0),
        ("z", 100.0),
    ]
    assert {key: len(each) for key, each in rows.groups(found).items()} == {("A", 8): 3, ("A", 32): 1, ("B", 8): 1}


def test_losses_are_told_in_both_directions() -> None:
    ours = row("pruneport-keep64", ready_ms=100.0, tokens_per_s=5.0)
    others = [
        row("llama.cpp-q4_0", ready_ms=400.0, tokens_per_s=10.0),
        row("llama.cpp-q4_0-mmproj-q8_0", ready_ms=200.0, tokens_per_s=8.0),
    ]
    against = rows.ratios([ours, *others])
    assert [line[0] for line in against] == ["pruneport-keep64 against llama.cpp's best"]
    assert against[0][1:5] == ["2.00", "1.67", "1.00", "0.50"]
    assert rows.losses([ours, *others]) == [
        "pruneport-keep64 loses to llama.cpp's best in tokens/s: 5.0 against 10.0, 2.00 times worse"
    ]
    (slow,) = rows.losses([row("pruneport-twin", ready_ms=300.0, ttft_photo_ms=1.0), row("transformers-bf16")])
    assert slow == "pruneport-twin loses to transformers bf16 in image ready: 300 ms against 100 ms, 3.00 times worse"


def test_what_pruning_brings_is_held_against_the_operations() -> None:
    pruned = row("pruneport-keep64", ready_ms=100.0, image_ready_flop=1e12)
    twin = row("pruneport-twin", ready_ms=180.0, image_ready_flop=2e12)
    assert rows.pruning([pruned]) == []
    (said,) = rows.pruning([twin, row("llama.cpp-q4_0"), pruned])
    assert "1.80 times sooner" in said
    assert "2.00 times fewer" in said
    assert "0.90 of what" in said


def test_operations_are_those_of_the_graphs() -> None:
    """Six layers more cost what six layers do, and the kept tokens alone go through those behind the cut."""
    few, many = (model.operations(layers, 64, cut=2) for layers in (8, 14))
    layer = 2 * 64 * (4 * 4096**2 + 3 * 4096 * 11008) + 4 * 64 * (64 + model.entry(8).prefix_tokens) * 4096
    assert many - few == pytest.approx(6 * layer)
    assert model.operations(8, 576, cut=2) == pytest.approx(model.operations(8, 576, cut=0))
    assert model.operations(8, 64, cut=2) > model.operations(8, 64, cut=0)


def test_rows_without_a_quiet_run_are_not_to_be_relied_on() -> None:
    loud = row("loud", quiet_runs=0, foreign_cores=1.25)
    assert rows.load([row("quiet"), row("quiet")]) == "In 8 of 20 runs others took less than 0.15 cores."
    assert rows.load([row("quiet"), loud]).endswith("took up to 1.25 cores in every run: loud.")
    assert rows.load([loud, loud]).endswith("in every run: all rows.")


def test_the_docs_show_every_group_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = [row("pruneport-keep64", ready_ms=4321.0), row("llama.cpp-q4_0"), row("pruneport-keep64", layers=32)]
    monkeypatch.setattr(measured, "RESULTS", tmp_path)
    assert measured.other_systems() == "Not measured yet.\n"
    (tmp_path / "peers.json").write_text(json.dumps({"command": "python benchmarks/peers.py", "rows": found}))
    shown = measured.other_systems()
    assert "### A, 8 layers\n\nMade by `python benchmarks/peers.py --layers 8`." in shown
    assert "### A, 32 layers" in shown
    assert "| pruneport-keep64 | 4321 | 4371 | 50 | 10.0 | 2.0 | 1.00 |" in shown
    assert "- pruneport-keep64 loses to llama.cpp's best in image ready: 4321 ms against 100 ms" in shown
    assert "In 8 of 20 runs others took less" in shown


@pytest.mark.parametrize(
    ("name", "stopped"),
    [
        pytest.param("small", [], id="fits-beside-them"),
        pytest.param("large", ["first"], id="the-least-recently-used-goes"),
        pytest.param("huge", ["first", "second"], id="none-fits-beside-it"),
        pytest.param("unknown", ["first", "second"], id="alone-the-first-time"),
    ],
)
def test_workers_stay_within_memory(name: str, stopped: list[str]) -> None:
    needs = {"first": 4, "second": 4, "small": 2, "large": 5, "huge": 10}
    assert turns.stopped_for(name, ["first", "second"], needs, 10) == stopped


ECHO = """
import json, sys
print("a library speaks")
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    if line == "end\\n":
        sys.exit("it is over")
    print(json.dumps({"line": line}), flush=True)
"""


@pytest.fixture
def worker(tmp_path: Path) -> Callable[..., turns.Worker]:
    def start(script: str, *, limit_bytes: int = 2**40) -> turns.Worker:
        command = (sys.executable, "-c", script)
        return turns.Worker(command, log=tmp_path / "log", limit_bytes=limit_bytes, root=tmp_path)

    return start


def test_a_worker_answers_line_by_line_and_its_end_is_told(worker: Callable[..., turns.Worker]) -> None:
    echo = worker(ECHO)
    assert echo.ready == {"ready": True}
    assert echo.ask("run") == {"line": "run\n"}
    assert echo.peak_rss_bytes > 2**20
    with pytest.raises(turns.WorkerError, match="ended with 1: it is over"):
        echo.ask("end")


def test_a_worker_that_cannot_start_says_why(worker: Callable[..., turns.Worker]) -> None:
    with pytest.raises(turns.WorkerError, match="ended with 1: no model"):
        worker("raise SystemExit('no model')")


def test_a_worker_that_takes_too_much_memory_is_ended(worker: Callable[..., turns.Worker]) -> None:
    with pytest.raises(turns.WorkerError, match="took more than the"):
        worker("input()", limit_bytes=2**20)


def test_what_is_kept_is_made_again_when_its_sources_change(tmp_path: Path) -> None:
    made: list[str] = []

    def make(folder: Path) -> None:
        made.append("once more")
        (folder / "file").write_text(str(len(made)))

    folder = tmp_path / "kept"
    for made_from in ("one", "one", "other"):
        kept.kept(folder, made_from, make)
    assert (folder / "file").read_text() == "2"
    assert kept.digest(("benchmarks/peers.py",), 8) != kept.digest(("benchmarks/peers.py",), 32)
    assert kept.digest(("benchmarks/peers.py",)) != kept.digest(("benchmarks",))


def test_a_step_that_fails_says_what_it_said() -> None:
    with pytest.raises(kept.StepError, match="ended with 1: too little memory"):
        kept.run(sys.executable, "-c", "import sys; sys.exit('too little memory')")


def test_features_are_compared_with_the_reference(tmp_path: Path) -> None:
    reference = np.array([[3.0, 4.0]], np.float32)
    np.save(tmp_path / model.REFERENCES[model.FEATURES], reference)
    made = tmp_path / "made"
    (2 * reference).tofile(made)
    assert model.cosine(tmp_path, model.FEATURES, made) == pytest.approx(1.0)
    np.array([4.0, -3.0], np.float32).tofile(made)
    assert model.cosine(tmp_path, model.FEATURES, made) == pytest.approx(0.0)
    np.zeros(3, np.float32).tofile(made)
    with pytest.raises(ValueError, match="3 numbers of the image features instead of 2"):
        model.cosine(tmp_path, model.FEATURES, made)


class FakeAnswers:
    """A bundle of two heads of three numbers, one token in front of four of the image."""

    cache = np.arange(2 * 5 * 3, dtype=np.float32).reshape(1, 2, 5, 3)

    def see(self, pixel_values: np.ndarray) -> Prefill:
        return Prefill("fake", {"value_0": self.cache}, 70.0)

    def answer(self, photo: Prefill, question: list[int], **settings: Any) -> Iterator[Token]:
        assert settings == {"max_new_tokens": 3, "past_end": True}
        return iter([Token(5, 9.0), Token(6, 1.0), Token(7, 2.0)])


def test_a_bundle_is_asked_as_all_are() -> None:
    asked = model.Asked(np.zeros((1, 3, 2, 2), np.float32), [1], [8, 9])
    peer = Pruneport(cast(Answers, FakeAnswers()), asked, {}, image_tokens=4, new_tokens=2)
    compared, values = peer.check()
    assert compared == model.VALUES
    assert values.shape == (4, 6)
    assert values[0].tolist() == [*FakeAnswers.cache[0, 0, 1], *FakeAnswers.cache[0, 1, 1]]
    assert peer.run() == {
        "image_ready_ms": 70.0,
        "ttft_question_ms": 9.0,
        "token_ms": [1.0, 2.0],
        "spent_ms": {"image": {}, "question": {}, "token": {}},
    }


class FakeGraph:
    graph = "its info"

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(inputs)


def test_a_timed_graph_is_that_graph() -> None:
    spent: dict[str, float] = {}
    timed = Timed(cast(RunningGraph, FakeGraph()), "front", spent)
    one = np.ones(1)
    assert timed.run({"x": one}) == {"x": one}
    assert timed.graph == "its info"
    once = spent["front"]
    timed.run({"x": one})
    assert spent["front"] > once > 0


def test_what_graphs_spend_is_told() -> None:
    spent = ({"image": {"front": ms}, "token": {"front": 1.0, "head": 2.0}} for ms in (10.0, 40.0, 20.0))
    made = rows.summary([rows.sample({**answer(1.0, 1.0), "spent_ms": each}, foreign_cores=0.0) for each in spent])
    assert made["spent_ms"]["image"] == {"front": 20.0}
    assert rows.spending([row("llama.cpp-q4_0"), row("pruneport-twin", spent_ms=made["spent_ms"])]) == [
        "pruneport-twin spends, in ms, for the image 20.0 in front; for the token 1.0 in front, 2.0 in head"
    ]


def test_a_patch_finds_its_place_or_is_refused() -> None:
    assert patched("a b c", "b", "B") == "a B c"
    with pytest.raises(ValueError, match="2 times"):
        patched("b b", "b", "B")


def test_rotary_halves_lie_beside_each_other() -> None:
    weight = np.arange(8, dtype=np.float32)[:, None]  # two heads of four rows
    assert interleaved(weight, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_model_is_the_whole_one_with_fewer_layers() -> None:
    made = model.entry(3)
    assert made.geometry.text.layers == 3
    assert made.geometry.text.hidden == 4096
    assert made.hub_id is None
