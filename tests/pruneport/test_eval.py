"""`pruneport eval` from the command line: its pages, what it remembers, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from export import cli
from runtime.bundle import read_bundle

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    rng = np.random.default_rng(3)
    lines = []
    for name in ("one.png", "two.png"):
        Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((336, 336)).save(folder / name)
        for category in ("colour", "count"):
            line = {"image": name, "question": f"What {category} is it?", "answer": "3", "category": category}
            lines.append(json.dumps(line))
    (folder / "asked.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder / "asked.jsonl"


def run(questions: Path, out: Path, *words: str | Path) -> int:
    fixed = ["eval", "--model", "pocket", "--questions", str(questions), "--output-dir", str(out)]
    return cli.main([*fixed, *map(str, words)], version="0")


@pytest.mark.slow
def test_methods_and_a_bundle_side_by_side(
    questions: Path, onnx_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(questions, out, "--keep", "64,8", "--method", "vlm-pruner,uniform", onnx_bundle) == 0
    said = capsys.readouterr().out
    for word in ("unpruned", "vlm-pruner", "uniform", "evaluation.html"):
        assert word in said
    summary = json.loads((out / "summary.json").read_text())
    assert summary["questions"] == {"name": "asked", "count": 4, "photos": 2}
    names = [(row["name"], row["keep"]) for row in summary["rows"]]
    assert names == [
        ("unpruned", 576), ("vlm-pruner", 64), ("vlm-pruner", 8), ("uniform", 64), ("uniform", 8),
        (onnx_bundle.name, 64),
    ]  # fmt: skip
    for row in summary["rows"]:
        assert 0 <= row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"] <= 1
        assert set(row["categories"]) == {"colour", "count"}
    page = (out / "evaluation.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    # The bundle chose what the desktop model chose, and answered what it answered.
    cells = {(cell["name"], cell["keep"]): cell for cell in json.loads((out / "evaluation.json").read_text())["cells"]}
    desktop, bundle = cells["vlm-pruner", 64], cells[onnx_bundle.name, 64]
    assert bundle["kept"] == desktop["kept"]
    assert bundle["right"] == desktop["right"]
    assert bundle["cut"] == read_bundle(onnx_bundle).manifest.prune.cut == 2

    # All of it is there: 1.4 % of 576 is 8.06.
    assert run(questions, out, "--keep", "1.4%,8", "--method", "uniform", "-q") == 0
    assert json.loads((out / "evaluation.json").read_text())["cells"] == list(cells.values())
    assert capsys.readouterr().out.strip() == str(out / "summary.json")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--method", "best"), "--method 'best' is not known; allowed: all, "),
        (("--keep", "0"), "keep=0 must lie in 1..576"),
        (("--keep", "577"), "keep=577 must lie in 1..576"),
        (("--keep", "8,,9"), "keep='' is not a whole number"),
        (("--keep", "8,101%"), "keep=101% is not a share that can be kept"),
        (("--keep", "-5%"), "keep=-5% is not a share that can be kept"),
        (("--cut", "99"), "cut=99 must lie in 0.."),
        (("--photos", "0"), "photos=0 must lie in 1"),
        (("--weights", "nowhere"), "nowhere does not exist"),
        (("missing-bundle",), "missing-bundle"),
    ],
)
def test_what_is_refused(
    questions: Path, words: tuple[str, ...], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(questions, tmp_path / "out", *words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("pruneport: error: ")
    assert told in line
    assert not (tmp_path / "out").exists()


def test_a_model_without_questions_asks_for_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "--model", "llava-1.5-7b"], version="0") == 2
    assert "has no questions of its own; give a file" in capsys.readouterr().err


@pytest.mark.slow
def test_a_bundle_of_other_weights(
    questions: Path, onnx_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(onnx_bundle, tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["weights"]["sha256"] = "0" * 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert run(questions, tmp_path / "out", other) == 2
    assert "holds other weights than the model it is compared with" in capsys.readouterr().err
