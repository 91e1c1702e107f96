"""lmms-eval's own command line on a tiny task of local photos: its registry, evaluator and data-parallel ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from export.checkpoints import open_checkpoint
from export.evaluation import run as evaluation
from export.evaluation.chat_model import ChatModel
from export.evaluation.eager import EagerModel
from export.evaluation.questions import Line
from export.models.pocket import POCKET, pocket_folder
from tests.talkative import talkative

pytestmark = pytest.mark.slow

# What `lmms_eval` with a model of ours and a task of text answers imports, beside what the tests have anyway. All that
# lmms-eval declares is a gigabyte.
NEEDED = (
    "accelerate==1.15.0",
    "datasets==5.2.0",
    "evaluate==0.4.6",
    "filelock==3.32.7",
    "loguru==0.7.3",
    "numexpr==2.14.2",
    "python-dotenv==1.2.4",
    "pytz==2026.6",
    "sacrebleu==2.6.0",
    "tenacity==9.2.1",
)
QUESTIONS = ("What is this?", "How many are there?", "What colour is it?")
TOKENS = 5


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment of its own with the wheel and lmms-eval, and the packages that run the tests behind them."""
    home = tmp_path_factory.mktemp("lmms")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (site,) = home.glob("lib/python3*/site-packages")
    (site / "behind.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    made = home / "bin" / "python"
    pip = [str(made), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "--no-deps", "--no-index", str(wheel)], check=True)
    subprocess.run([*pip, "--no-deps", "lmms-eval==0.7.3"], check=True)
    subprocess.run([*pip, *NEEDED], check=True)
    return made


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three photos, and beside them a task of lmms-eval that asks one question about each, and one about none."""
    folder = tmp_path_factory.mktemp("task")
    rng = np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(len(QUESTIONS))]
    for path in paths:
        Image.fromarray(rng.integers(0, 255, (12, 12, 3), dtype=np.uint8)).resize((360, 340)).save(path)
    rows = [{"image": str(path), "question": text, "answer": "3"} for path, text in zip(paths, QUESTIONS, strict=True)]
    rows.append({"image": "", "question": "Say something.", "answer": "3"})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "shown.py").write_text(
        "from PIL import Image\n\n\ndef images(doc):\n    return [Image.open(doc['image'])] if doc['image'] else []\n"
    )
    (folder / "photos.yaml").write_text(
        f"""
task: photos
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function shown.images
doc_to_text: question
doc_to_target: answer
generation_kwargs: {{max_new_tokens: {TOKENS}, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
    )
    return paths


def answers(python: Path, model: Path, photos: list[Path], out: Path, *launched: str, arguments: str = "") -> list[str]:
    """What lmms-eval wrote down as the answers to the task, in the order of its rows."""
    # Nothing of the checkout may be found by accident, and nothing of the hub be asked for.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(out / "cache"), "ACCELERATE_USE_CPU": "true"}
    env |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [
            *(str(python), *launched, "-m", "lmms_eval", "--model", "pruneport"),
            *("--model_args", f"pretrained={model},dtype=float32{arguments}"),
            *("--tasks", "photos", "--include_path", str(photos[0].parent)),
            *("--output_path", str(out), "--log_samples"),
        ],
        cwd=out, env=env, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    found = list(out.rglob("*samples_photos.jsonl"))
    assert len(found) == 1, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in found[0].read_text().splitlines()]
    return [row["filtered_resps"] for row in sorted(rows, key=lambda row: row["doc_id"])]


def test_unpruned_answers_are_those_of_transformers(python: Path, photos: list[Path], tmp_path: Path) -> None:
    said = answers(python, pocket_folder(), photos, tmp_path)
    whole: Any = LlavaForConditionalGeneration.from_pretrained(pocket_folder(), dtype=torch.float32)
    chat = ChatModel(str(pocket_folder()), dtype="float32")
    expected = []
    for text, shown in [*zip(QUESTIONS, ([Image.open(path)] for path in photos), strict=True), ("Say something.", [])]:
        inputs = chat.inputs(text, shown)
        ids = whole.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(chat.processor.decode(ids, skip_special_tokens=True).strip())
    assert said == expected
    assert len(set(said)) > 1


def test_pruned_answers_are_right_to_the_evaluation(
    python: Path, photos: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes share the task; what they say of each photo is what `pruneport eval` takes for right."""
    ranks = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    folder = talkative(tmp_path / "model")
    said = answers(python, folder, photos, tmp_path, *ranks, arguments=",method=vlm-pruner,keep=16")
    model = EagerModel(open_checkpoint(POCKET, weights=str(folder)), POCKET)
    chat = ChatModel(str(folder), dtype="float32", method="vlm-pruner", keep=16)
    assert chat.pruned is not None
    chooser = evaluation._Chooser(model, evaluation.Wanted("vlm-pruner", 16, 2))
    for number, (path, text) in enumerate(zip(photos, QUESTIONS, strict=True)):
        photo = np.asarray(Image.open(path))
        ids = chat.pruned.generate(chat.inputs(text, [Image.open(path)]), max_new_tokens=TOKENS + 1, do_sample=False)
        assert said[number] == chat.processor.decode(ids[0, :TOKENS], skip_special_tokens=True).strip()
        # Ids, since the letters of an untrained model's answer may be split otherwise when they are read again.
        monkeypatch.setattr(model._tokenizer, "answer_ids", lambda _, ids=ids: ids[0, :TOKENS].tolist())
        monkeypatch.setattr(model, "_ends", (int(ids[0, TOKENS]),))
        reading = model.read(photo, [Line("x", text, said[number])], [2])
        kept = chooser.choose(reading.features[2])
        assert kept is not None
        assert model.right(reading, 2, kept) == [True]
        assert chat.pruned.kept == [[kept[1][0].tolist()]]
        whole = evaluation._Chooser(model, evaluation.Wanted(evaluation.UNPRUNED, 576, 2))
        assert model.right(reading, 2, whole.choose(reading.features[2])) == [False]
