"""`pruneport ask` as its reader uses it: what comes out where, what is refused before anything runs, what is shared."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

import runtime.ask
from export import cli
from runtime.bundle import MANIFEST, Bundle, read_bundle
from runtime.errors import BundleError, RequestError
from runtime.generation import Answers, Sampling, open_graphs, start_answers
from runtime.image import enlarged_view, load_photo, preprocess
from runtime.kept_picture import draw_kept
from runtime.own_tokens import own_tokens
from runtime.prompt import Tokenizer, open_tokenizer
from runtime.session import Session
from runtime.text_graphs import VISION_ENCODER
from tests.conftest import CommandLine, desktop_answer
from tests.sample_bundle import Sample, edit_manifest, make_bundle, rehash
from tests.talkative import talkative

OTHER = "And what colour is it?"
STATS = re.compile(
    r"image ready (?P<ready>\d+) ms, TTFT (?P<ttft>[\d.]+) ms after (?P<asked>\d+) tokens, "
    r"(?:(?P<speed>[\d.]+) tokens/s|one token), KV cache (?P<cache>[\d.]+) MB, peak RSS (?P<rss>\d+) MB"
)
WEIGHTS = "weights.onnx_data"


@dataclass(frozen=True)
class Said:
    """What a command line ended with."""

    code: int
    out: str
    err: str

    @property
    def stats(self) -> list[dict[str, str]]:
        found = [STATS.fullmatch(line) for line in self.err.splitlines()]
        return [match.groupdict() for match in found if match]


Ask = Callable[..., Said]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs `pruneport ask ...` in this process."""

    def run(*words: str | Path) -> Said:
        capsys.readouterr()
        code = cli.main(["ask", *map(str, words)], version="0")
        captured = capsys.readouterr()
        return Said(code, captured.out, captured.err)

    return run


@pytest.fixture
def refused(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What the one line says with which a command line is refused before a graph is opened."""

    def no_graph(*_: object, **__: object) -> None:
        raise AssertionError("a graph was opened")

    def run(*words: str | Path) -> str:
        monkeypatch.setattr(runtime.ask, "open_graphs", no_graph)
        said = ask(*words)
        assert (said.code, said.out) == (2, ""), said
        (line,) = said.err.splitlines()
        assert line.startswith("pruneport: error: ")
        return line.removeprefix("pruneport: error: ")

    return run


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of every graph that runs, in order."""
    names: list[str] = []
    run = Session.run

    def counted(self: Session, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names.append(self.graph.name)
        return run(self, inputs)

    monkeypatch.setattr(Session, "run", counted)
    return names


@dataclass(frozen=True)
class Golden:
    """The desktop's answer, as the command line should give it."""

    question: str
    question_ids: list[int]
    ids: list[int]
    text: str


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, command_line: CommandLine) -> Bundle:
    """A model that talks on and on, with 64 image tokens, for ONNX Runtime; not to be changed."""
    folder = tmp_path_factory.mktemp("talkative")
    words = ["export", "--model", "pocket", "--keep", "64", "--target", "android", "--backend", "onnx", "-q"]
    done = command_line(*words, "--weights", talkative(folder / "model"), "--output-dir", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_bundle(Path(done.stdout.strip()))


@pytest.fixture(scope="module")
def tokenizer(bundle: Bundle) -> Tokenizer:
    return open_tokenizer(bundle)


@pytest.fixture(scope="module")
def golden(bundle: Bundle, tokenizer: Tokenizer) -> Golden:
    arrays = bundle.golden()
    question, ids = arrays["answer.question"].tolist(), arrays["answer.ids"].tolist()
    # Between what the template writes around it.
    text = "".join(tokenizer.text(question)).removeprefix("\n").removesuffix(" ASSISTANT:")
    assert len(ids) == 64
    assert bundle.manifest.text is not None
    assert not set(bundle.manifest.text.end_ids) & set(ids), "the sample answer should be whole"
    return Golden(text, question, ids, "".join(tokenizer.text(ids)))


@pytest.fixture(scope="module")
def photo(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden's own photo."""
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(bundle.golden()["photo"]).save(path)
    return path


def variant(bundle: Path, target: Path, *changed: str) -> Path:
    """A bundle of the same files, of which the manifest and those named `changed` may be written to."""
    target.mkdir(parents=True)
    for path in bundle.iterdir():
        (shutil.copy if path.name in (MANIFEST, *changed) else os.link)(path, target / path.name)
    return target


def edit_record(bundle: Path, field: str, **changes: object) -> None:
    """Overwrites fields of one of the manifest's records."""
    raw = msgspec.json.decode((bundle / MANIFEST).read_bytes())
    edit_manifest(bundle, **{field: {**raw[field], **changes}})


def other_model(bundle: Path, target: Path) -> Path:
    """A bundle whose last layer says the opposite of what this one's says."""
    import onnx

    changed = variant(bundle, target, WEIGHTS)
    graph = onnx.load(bundle / "lm_head.onnx", load_external_data=False).graph
    (last,) = [tensor for tensor in graph.initializer if tensor.name == "lm_head.weight"]
    place = {entry.key: entry.value for entry in last.external_data}
    numbers = np.memmap(
        changed / WEIGHTS, np.float32, "r+", offset=int(place["offset"]), shape=(int(place["length"]) // 4,)
    )
    numbers[:] = -numbers
    numbers.flush()
    rehash(changed, WEIGHTS)
    return changed


# The answer, and where it goes


def test_golden_answer_is_all_that_stdout_gets(ask: Ask, bundle: Bundle, photo: Path, golden: Golden) -> None:
    said = ask(bundle.path, photo, golden.question)
    assert (said.code, said.out) == (0, f"{golden.text}\n")
    (stats,) = said.stats
    assert said.err.count("\n") == 1
    assert int(stats["asked"]) == len(golden.question_ids)
    assert int(stats["ready"]) > 0
    assert float(stats["ttft"]) > 0
    assert float(stats["speed"]) > 1
    cache = sum(info.size_bytes for graph in bundle.manifest.graphs for info in graph.cache)
    assert float(stats["cache"]) == pytest.approx(cache / 1e6, abs=0.051)
    assert int(stats["rss"]) * 1e6 > (bundle.path / WEIGHTS).stat().st_size


def test_answer_streams(bundle: Bundle, photo: Path, golden: Golden, tmp_path: Path) -> None:
    """Piece by piece, as it is made; what it took comes when it is whole.

    In front, of a model that takes photos of any size, how many image tokens this one would have had.
    """
    any_size = variant(bundle.path, tmp_path / "any-size")
    edit_record(any_size, "image", pixels={"token": 28, "least": 784, "most": 28 * 28 * 12})
    height, width = load_photo(photo).shape[:2]
    heard: list[tuple[str, str]] = []
    inquiry = runtime.ask.Inquiry(photo=photo, questions=(golden.question,), max_new_tokens=12)
    (said,) = runtime.ask.ask(
        any_size,
        inquiry,
        compare=False,
        say=lambda piece: heard.append(("say", piece)),
        tell=lambda line: heard.append(("tell", line)),
    )
    first = heard.pop(0)
    own = own_tokens(read_bundle(any_size).manifest.image, (height, width))
    assert own is not None
    told = f"{own.tokens} image tokens by the model's own processor for {width} x {height} pixels"
    assert first == ("tell", f"576 image tokens seen, 64 kept; {told}")
    assert [kind for kind, _ in heard] == ["say"] * (len(heard) - 1) + ["tell"]
    assert len(heard) > 10
    assert "".join(word for kind, word in heard if kind == "say") == f"{said.answer}\n"
    assert len(said.took.token_ms) == 11
    assert heard[-1][1] == str(said.took)


def test_questions_share_the_photo(ask: Ask, bundle: Bundle, photo: Path, golden: Golden, runs: list[str]) -> None:
    few = ("--max-new-tokens", "16")
    alone = ask(bundle.path, photo, OTHER, *few)
    runs.clear()
    both = ask(bundle.path, photo, golden.question, OTHER, golden.question, *few)
    assert runs.count(VISION_ENCODER) == 1
    first, second, again = both.out.splitlines()
    assert golden.text.startswith(first)
    assert f"{second}\n" == alone.out
    assert second != first == again, "greedy answers are repeatable, whatever was asked in between"
    assert len(both.stats) == 3
    assert len({stats["ready"] for stats in both.stats}) == 1


def test_quiet_says_the_answer_alone(ask: Ask, bundle: Bundle, photo: Path, golden: Golden) -> None:
    said = ask(bundle.path, photo, golden.question, "-q", "--max-new-tokens", "4")
    assert (said.code, said.err) == (0, "")
    assert golden.text.startswith(said.out.removesuffix("\n"))


@pytest.mark.parametrize("count", [1, 5])
def test_answer_is_no_longer_than_asked_for(
    count: int, ask: Ask, bundle: Bundle, photo: Path, golden: Golden, tokenizer: Tokenizer
) -> None:
    said = ask(bundle.path, photo, golden.question, "--max-new-tokens", str(count))
    assert said.out == "".join(tokenizer.text(golden.ids[:count])) + "\n"
    assert (said.stats[0]["speed"] is None) == (count == 1)


def test_sampling_is_that_of_the_library(ask: Ask, bundle: Bundle, photo: Path, tokenizer: Tokenizer) -> None:
    words = ("--temperature", "1.5", "--top-p", "0.8", "--max-new-tokens", "12")
    said = {seed: ask(bundle.path, photo, OTHER, *words, "--seed", str(seed)).out for seed in (7, 8)}
    assert said[7] != said[8]
    with open_graphs(bundle) as graphs:
        answers = start_answers(bundle, graphs)
        seen = answers.see(preprocess(load_photo(photo), bundle.manifest.image))
        sampling = Sampling(temperature=1.5, top_p=0.8, seed=7)
        tokens = answers.answer(seen, tokenizer.question_ids(OTHER), max_new_tokens=12, sampling=sampling)
        assert said[7] == "".join(tokenizer.text(token.id for token in tokens)) + "\n"


def test_stop_ends_before_the_text(ask: Ask, bundle: Bundle, photo: Path, golden: Golden, tokenizer: Tokenizer) -> None:
    # Begins within one piece and ends within a later one.
    pieces = list(tokenizer.text(golden.ids))
    start = len("".join(pieces[:6])) - 1
    stop = golden.text[start : start + len(pieces[6]) + 2]
    end = golden.text.index(stop)
    said = ask(bundle.path, photo, golden.question, "--stop", "never written", "--stop", stop)
    assert said.out == f"{golden.text[:end]}\n"
    assert 0 < end < len(golden.text) - len(stop)
    assert len(said.stats) == 1


@pytest.mark.parametrize(
    ("stops", "right"),
    [
        (["abc", "b"], "xxa"),
        (["b", "abc"], "xxa"),
        (["cdx", "bcd"], "xxa"),
        (["d", "bcd"], "xxa"),
        (["xxab"], ""),
        (["dd", "ddd"], "xxabc"),
        (["z"], "xxabcddd"),
    ],
)
def test_stops_do_not_depend_on_the_pieces(stops: list[str], right: str) -> None:
    text = "xxabcddd"
    for cuts in range(2 ** (len(text) - 1)):
        ends = [at for at in range(1, len(text)) if cuts >> (at - 1) & 1]
        pieces = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)], strict=True)]
        assert "".join(runtime.ask.until_stop(pieces, stops)) == right


@pytest.mark.parametrize(
    "words",
    [
        ["--temperature", "5e-324"],
        ["--temperature", "1e-30", "--seed", "4294967295"],
        ["--temperature", "100", "--top-p", "5e-324"],
        ["--temperature", "-0.0"],
    ],
)
def test_draws_that_leave_one_choice_are_greedy(
    words: list[str], ask: Ask, bundle: Bundle, photo: Path, golden: Golden
) -> None:
    said = ask(bundle.path, photo, golden.question, "--max-new-tokens", "5", *words)
    assert said.out == ask(bundle.path, photo, golden.question, "--max-new-tokens", "5").out
    assert said.code == 0


def test_end_token_ends_the_answer(
    ask: Ask, bundle: Bundle, photo: Path, golden: Golden, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    changed = variant(bundle.path, tmp_path / "ends")
    edit_record(changed, "text", end_ids=[golden.ids[6]])
    said = ask(changed, photo, golden.question)
    end = golden.ids.index(golden.ids[6])
    assert said.out == "".join(tokenizer.text(golden.ids[:end])) + "\n"
    edit_record(changed, "text", end_ids=[golden.ids[0]])
    said = ask(changed, photo, golden.question)
    assert (said.code, said.out) == (0, "\n")
    assert f"no answer after {len(golden.question_ids)} tokens, KV cache" in said.err


def test_question_may_begin_with_dashes(ask: Ask, bundle: Bundle, photo: Path) -> None:
    said = ask("-q", "--max-new-tokens", "2", bundle.path, photo, "--", "--what", "-v")
    assert (said.code, len(said.out.splitlines())) == (0, 2), said.err


def test_terminal_that_knows_few_characters(
    bundle: Bundle, photo: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    monkeypatch.setattr(Answers, "answer", lambda *_, **__: iter(()))
    monkeypatch.setattr(Tokenizer, "text", lambda *_: iter(["caf\u00e9 ", "\ufffd."]))
    assert cli.main(["ask", "-q", str(bundle.path), str(photo), OTHER], version="0") == 0
    assert raw.getvalue() == b"caf? ?.\n"


def test_reader_that_leaves(
    bundle: Bundle, photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert cli.main(["ask", str(bundle.path), str(photo), OTHER, "--max-new-tokens", "9"], version="0") == 2
    assert capsys.readouterr().err == (
        "pruneport: error: the answer cannot be written to standard output: Broken pipe\n"
    )


NO_TORCH = """
import sys

class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "torchvision", "transformers", "executorch"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Gone())
from pruneport import main
sys.exit(main(["ask", *sys.argv[1:]]))
"""


def test_without_torch(bundle: Bundle, photo: Path, golden: Golden, root: Path) -> None:
    words = [str(bundle.path), str(photo), golden.question]
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *words], cwd=root, capture_output=True, encoding="utf-8", check=False
    )
    assert (done.returncode, done.stdout) == (0, f"{golden.text}\n"), done.stderr


# The saved prefill


def test_saved_prefill_stands_in_for_the_photo(
    ask: Ask, bundle: Bundle, photo: Path, golden: Golden, runs: list[str], tmp_path: Path
) -> None:
    copy, saved = tmp_path / "photo.png", tmp_path / "photo.safetensors"
    shutil.copy(photo, copy)
    few = ("--max-new-tokens", "8")
    first = ask(bundle.path, copy, golden.question, "--save-prefill", saved, *few)
    assert first.code == 0
    copy.unlink()
    runs.clear()
    second = ask(bundle.path, saved, golden.question, *few)
    assert (second.code, second.out) == (0, first.out)
    assert golden.text.startswith(second.out.removesuffix("\n"))
    assert VISION_ENCODER not in runs
    assert VISION_ENCODER not in runs
    assert second.stats[0]["ready"] == first.stats[0]["ready"]


def test_prefill_of_another_bundle(
    ask: Ask, refused: Callable[..., str], bundle: Bundle, photo: Path, tmp_path: Path
) -> None:
    """Also when both have one name, as two exports of a model do."""
    saved = tmp_path / "photo.safetensors"
    other = other_model(bundle.path, tmp_path / "other")
    assert ask(other, photo, OTHER, "--save-prefill", saved, "--max-new-tokens", "1").code == 0
    name = bundle.manifest.name
    message = refused(bundle.path, saved, OTHER)
    assert re.match(rf"the photo was prefilled by {name} \w{{16}}, not by {name} \w{{16}}; prefill it again", message)
    assert "is the prefill of one bundle; to compare, give the photo itself" in refused(
        bundle.path, saved, OTHER, "--compare"
    )
    drawn = refused(bundle.path, saved, OTHER, "--draw", tmp_path / "kept.png")
    assert drawn == f"{saved} is a saved prefill, over which nothing can be drawn; give the photo"
    again = refused(bundle.path, saved, OTHER, "--save-prefill", tmp_path / "again.safetensors")
    assert "is a saved prefill already" in again


@pytest.mark.parametrize("shape", [(), (7,), (1, 6, 611, 1)])
def test_prefill_that_claims_to_be_ours(shape: tuple[int, ...], ask: Ask, bundle: Bundle, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    names = [info.name.removeprefix("past_") for graph in bundle.manifest.graphs for info in graph.cache]
    metadata = {"bundle": bundle.identity, "image_ready_ms": "1"}
    save_file({name: np.zeros(shape, np.float32) for name in names}, tmp_path / "x.safetensors", metadata)
    said = ask(bundle.path, tmp_path / "x.safetensors", OTHER)
    assert (said.code, said.out) == (2, "")
    assert "the prefill does not fit the cache of" in said.err
    assert len(said.err.splitlines()) == 1


# What is refused before a graph is opened


@pytest.mark.parametrize(
    ("question", "words", "message"),
    [
        ("x, " * 300, [], r"a question of \d+ tokens and max_new_tokens=64 need \d+ entries of the text cache, which"),
        (
            "Why?",
            ["--max-new-tokens", "512"],
            r"a question of \d+ tokens and max_new_tokens=512 need 5\d\d entries of the text cache, which has 512",
        ),
        ("", [], "the question is empty; ask something"),
        (" \n\t", [], "the question is empty; ask something"),
        ("and </s> then?", [], "the question holds the special token '</s>', which only the template may write"),
        ("and <image>?", [], "the question holds '<image>', a second image; one image is supported"),
        ("caf\udce9?", [], r"the question is not valid text: byte or surrogate '\\udce9' at 3; give it in UTF-8"),
        ("Why?", ["--stop", ""], "stop='' would end every answer at once"),
        ("Why?", ["--max-new-tokens", "0"], r"max_new_tokens=0 must lie in 1\.\.1000000"),
        ("Why?", ["--max-new-tokens", "many"], "max_new_tokens='many' is not a whole number"),
        ("Why?", ["--max-new-tokens", "-3"], r"max_new_tokens=-3 must lie in 1\.\.1000000"),
        ("Why?", ["--max-new-tokens=+-3"], r"max_new_tokens='\+-3' is not a whole number"),
        ("Why?", ["--max-new-tokens", "9" * 5000], r"max_new_tokens=9{20} must lie in 1\.\.1000000"),
        ("Why?", ["--max-new-tokens", "1000000"], r"a question of \d+ tokens and max_new_tokens=1000000 need"),
        ("Why?", ["--temperature", "1e999"], "temperature='1e999' is not a number"),
        ("Why?", ["--temperature", "1e308"], r"temperature=1e\+308 must lie in 0\.\.100"),
        ("Why?", ["--temperature", "warm"], "temperature='warm' is not a number"),
        ("Why?", ["--top-p", "1.0000001"], r"top_p=1\.0000001 must lie above 0 and at most at 1"),
        ("Why?", ["--top-p", "inf"], "top_p='inf' is not a number"),
        ("Why?", ["--seed", "4294967296"], r"seed=4294967296 must lie in 0\.\.4294967295"),
        ("Why?", ["--seed", "1.0"], r"seed='1\.0' is not a whole number"),
        ("Why?", ["--temperature", "-1"], r"temperature=-1\.0 must lie in 0\.\.100; 0 is greedy"),
        ("Why?", ["--temperature", "nan"], "temperature='nan' is not a number"),
        ("Why?", ["--top-p", "0"], r"top_p=0\.0 must lie above 0 and at most at 1"),
        ("Why?", ["--seed", "-1"], r"seed=-1 must lie in 0\.\."),
        ("Why?", ["--save-prefill", "photo.png"], r"save_prefill='photo\.png' must end in \.safetensors"),
        ("Why?", ["--save-prefill", "no/such/a.safetensors"], "no/such/a.safetensors cannot be written: no/such is no"),
        ("Why?", ["--draw", "kept"], r"draw='kept' must end in \.png, \.jpg, \.jpeg, \.webp: by that the format"),
        ("Why?", ["--draw", "no/such/a.png"], "no/such/a.png cannot be written: no/such is no folder"),
        ("Why?", ["--compare"], r"no unpruned twin of .* lies beside it; export one with --keep all"),
        ("Why?", ["-v", "-q"], "-v and -q contradict each other; give one of them"),
        ("Why?", ["--sotp", "x"], "unknown argument '--sotp', did you mean '--stop'"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, str) else "",
)
def test_request_that_cannot_be_met(
    question: str, words: list[str], message: str, refused: Callable[..., str], bundle: Bundle, photo: Path
) -> None:
    assert re.match(message, refused(bundle.path, photo, question, *words))
    # However many good ones stand before it.
    if not words:
        assert re.match(message, refused(bundle.path, photo, OTHER, question))


def test_second_photo(refused: Callable[..., str], bundle: Bundle, photo: Path) -> None:
    message = refused(bundle.path, photo, photo, OTHER)
    assert message == f"the question {str(photo)!r} is a file; one photo is supported, what follows it are questions"


def test_photo_that_is_none(refused: Callable[..., str], bundle: Bundle, tmp_path: Path) -> None:
    text, empty = tmp_path / "text.jpg", tmp_path / "empty.safetensors"
    text.write_text("no picture")
    empty.touch()
    assert "is not an image" in refused(bundle.path, text, OTHER)
    assert "does not exist" in refused(bundle.path, tmp_path / "none.jpg", OTHER)
    assert "is a folder" in refused(bundle.path, tmp_path, OTHER)
    assert "is not a saved prefill" in refused(bundle.path, empty, OTHER)
    assert "is not a saved prefill" in refused(bundle.path, tmp_path / "none.safetensors", OTHER)


def test_bytes_that_are_no_text(bundle: Bundle, photo: Path, root: Path) -> None:
    words: list[str | bytes] = [sys.executable, "-m", "pruneport", "ask", str(bundle.path), str(photo), b"caf\xe9?"]
    done = subprocess.run(words, cwd=root, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.startswith(b"pruneport: error: the question is not valid text: byte or surrogate")
    assert done.stderr.count(b"\n") == 1


# Bundles that cannot be asked


def test_bundle_that_is_none(refused: Callable[..., str], photo: Path, tmp_path: Path) -> None:
    assert "does not exist; a bundle is the folder an export wrote" in refused(tmp_path / "none", photo, OTHER)
    assert "has no manifest.json" in refused(tmp_path, photo, OTHER)
    assert "is a file; a bundle is the folder" in refused(photo, photo, OTHER)


def test_bundle_for_another_runtime(refused: Callable[..., str], bundle: Bundle, photo: Path, tmp_path: Path) -> None:
    changed = variant(bundle.path, tmp_path / "theirs")
    edit_manifest(changed, layout="transformers.js", text=None)
    message = refused(changed, photo, OTHER)
    assert message.endswith(
        "is made for transformers.js: ask it there, as the documentation shows; for `pruneport ask` export without "
        "--layout"
    )


@pytest.mark.parametrize("cut", [1, 0])
def test_bundle_of_the_vision_graph_alone(cut: int, refused: Callable[..., str], photo: Path, tmp_path: Path) -> None:
    alone = make_bundle(tmp_path / "alone", Sample(cut=cut))
    message = refused(alone, photo, OTHER)
    assert message.endswith("has no text graphs and cannot be asked; export it without --only and --layout")


def test_bundle_without_a_tokenizer(refused: Callable[..., str], bundle: Bundle, photo: Path, tmp_path: Path) -> None:
    changed = variant(bundle.path, tmp_path / "mute")
    (changed / "tokenizer.json").unlink()
    files = msgspec.json.decode((changed / MANIFEST).read_bytes())["files"]
    edit_manifest(changed, files={name: info for name, info in files.items() if name != "tokenizer.json"})
    assert "has no tokenizer.json: its checkpoint had none; it cannot be asked" in refused(changed, photo, OTHER)


def test_damaged_bundle(refused: Callable[..., str], bundle: Bundle, photo: Path, tmp_path: Path) -> None:
    changed = variant(bundle.path, tmp_path / "damaged", "decoder_back.onnx", WEIGHTS)
    weights = bytearray((changed / WEIGHTS).read_bytes())
    weights[len(weights) // 2] ^= 1
    (changed / WEIGHTS).write_bytes(weights)
    assert f"{WEIGHTS} was changed: sha256" in refused(changed, photo, OTHER)
    whole = (changed / "decoder_back.onnx").read_bytes()
    (changed / "decoder_back.onnx").write_bytes(whole[:-100])
    assert "it is truncated or was changed" in refused(changed, photo, OTHER)


def test_graph_of_another_export(refused: Callable[..., str], bundle: Bundle, photo: Path, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "other", Sample())
    mixed = variant(bundle.path, tmp_path / "mixed", f"{VISION_ENCODER}.onnx")
    shutil.copy(other / f"{VISION_ENCODER}.onnx", mixed)
    assert "it is truncated or was changed" in refused(mixed, photo, OTHER)


def test_graph_of_another_export_that_the_manifest_lists(
    ask: Ask, bundle: Bundle, photo: Path, runs: list[str], tmp_path: Path
) -> None:
    """Hashes are right, what the graphs take and give is not."""
    other = make_bundle(tmp_path / "other", Sample())
    mixed = variant(bundle.path, tmp_path / "mixed", f"{VISION_ENCODER}.onnx")
    shutil.copy(other / f"{VISION_ENCODER}.onnx", mixed)
    rehash(mixed, f"{VISION_ENCODER}.onnx")
    said = ask(mixed, photo, OTHER)
    assert (said.code, said.out, runs) == (2, "", [])
    assert "its manifest says" in said.err
    assert len(said.err.splitlines()) == 1
    graphs = [msgspec.to_builtins(graph) for graph in bundle.manifest.graphs]
    theirs = msgspec.to_builtins(read_bundle(other).manifest.graphs[0])
    edit_manifest(mixed, graphs=[theirs, *graphs[1:]])
    said = ask(mixed, photo, OTHER)
    assert (said.code, said.out, runs) == (2, "", [])
    assert "its graphs are of different exports: export again" in said.err


# Beside the unpruned twin


@pytest.fixture
def pair(bundle: Bundle, tmp_path: Path) -> tuple[Path, Path]:
    """The bundle and what passes for its twin: another model that says of itself that it is not pruned."""
    ours = variant(bundle.path, tmp_path / "bundles" / "ours")
    twin = other_model(bundle.path, tmp_path / "bundles" / "twin")
    edit_manifest(twin, name="the-twin")
    edit_record(twin, "prune", pruned=False, method=None, keep=576)
    return ours, twin


def test_compare_asks_both(
    ask: Ask,
    pair: tuple[Path, Path],
    photo: Path,
    golden: Golden,
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "250")  # so wide that no cell of the table is broken
    ours, twin = pair
    # Neither is a twin: one cannot be read, one is not finished, one is no bundle.
    damaged = variant(bundle.path, ours.with_name("a"))
    edit_manifest(damaged, schema_version=99)
    variant(twin, ours.with_name(".twin.partial-1"))
    ours.with_name("notes").mkdir()
    few = ("--max-new-tokens", "8")
    alone = ask(twin, photo, golden.question, OTHER, *few)
    assert alone.code == 0, alone.err
    drawn = tmp_path / "kept.png"
    said = ask(ours, photo, golden.question, OTHER, "--compare", *few, "--draw", drawn)
    assert said.code == 0, said.err
    kept = bundle.golden()["kept_indices"].tolist()
    manifest = bundle.manifest
    expected = draw_kept(enlarged_view(load_photo(photo), manifest.image), manifest.prune, kept)
    assert np.array_equal(load_photo(drawn), expected)
    lines = said.out.splitlines(keepends=True)
    assert golden.text.startswith(lines[0].removesuffix("\n"))
    assert "".join(lines[2:]) == alone.out
    assert lines[2:] != lines[:2]
    told = said.err.splitlines()
    assert [told[0], told[3]] == [bundle.manifest.name, "the-twin"]
    assert len(said.stats) == 4
    table = [[cell.strip() for cell in line.split("│")[1:-1]] for line in told if "│" in line]
    assert table[0] == [golden.question, lines[0].strip(), lines[2].strip()]
    assert table[1] == [OTHER, lines[1].strip(), lines[3].strip()]
    assert [row[0] for row in table[2:]] == ["image ready", "TTFT, middle", "KV cache", "peak RSS"]
    message = f"{twin} is unpruned itself; leave --compare out"
    assert ask(twin, photo, OTHER, "--compare").err == f"pruneport: error: {message}\n"


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("weights", {"sha256": "0" * 64}),
        ("target", {"precision": "fp16"}),
        ("text", {"tokens": 513}),
        ("prune", {"pruned": True, "method": "vlm-pruner", "keep": 64}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_compare_wants_the_same_settings(
    field: str, changes: dict[str, object], refused: Callable[..., str], pair: tuple[Path, Path], photo: Path
) -> None:
    ours, twin = pair
    edit_record(twin, field, **changes)
    message = refused(ours, photo, OTHER, "--compare")
    assert message.endswith("the same settings, or export both with --twin")


def test_compare_tells_of_a_twin_that_cannot_be_read(
    refused: Callable[..., str], pair: tuple[Path, Path], photo: Path
) -> None:
    ours, twin = pair
    (twin / "decoder_back.onnx").unlink()
    message = refused(ours, photo, OTHER, "--compare")
    assert "no unpruned twin" in message
    assert f"(not looked at: {twin} lacks decoder_back.onnx, which its manifest lists; export again)" in message


@pytest.mark.slow
def test_compare_in_executorch(xnnpack_bundle: Path, tmp_path: Path, command_line: CommandLine) -> None:
    """The demo's two bundles: the desktop's answers of both, from one command."""
    from runtime.text_graphs import TOKEN_EMBEDDING

    bundles = [
        read_bundle(xnnpack_bundle.with_name(name)) for name in (xnnpack_bundle.name, "pocket-keepall-android-xnnpack")
    ]
    expected = []
    for bundle in bundles:
        arrays = bundle.golden()
        assert f"{TOKEN_EMBEDDING}.in.ids" in arrays
        expected.append(desktop_answer(bundle) + "\n")
    Image.fromarray(bundles[0].golden()["photo"]).save(tmp_path / "photo.png")
    question = "What is in this picture?"
    assert open_tokenizer(bundles[0]).question_ids(question) == bundles[0].golden()["answer.question"].tolist()
    done = command_line("ask", xnnpack_bundle, tmp_path / "photo.png", question, "--compare")
    assert (done.returncode, done.stdout) == (0, "".join(expected)), done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("pocket-")]
    assert told == [bundle.manifest.name for bundle in bundles]


# Sessions over the same open graphs


@pytest.fixture(scope="module")
def graphs(bundle: Bundle) -> Iterator[dict[str, Session]]:
    with open_graphs(bundle, threads=1) as opened:
        yield opened


def test_threads_with_a_session_each(
    bundle: Bundle, graphs: dict[str, Session], photo: Path, golden: Golden, tokenizer: Tokenizer
) -> None:
    """Same graphs, same moment, other photo, other question: the same answers as one after the other."""
    pixels = preprocess(load_photo(photo), bundle.manifest.image)
    jobs = [(pixels, golden.question), (pixels[..., ::-1].copy(), OTHER)]

    def answers(job: int) -> list[list[int]]:
        session = start_answers(bundle, graphs)
        seen = session.see(jobs[job][0])
        ids = tokenizer.question_ids(jobs[job][1])
        return [[token.id for token in session.answer(seen, ids, max_new_tokens=16)] for _ in range(2)]

    in_turn = [answers(job) for job in range(2)]
    assert in_turn[0][0] == golden.ids[:16] != in_turn[1][0]
    together: dict[int, list[list[int]]] = {}
    start = threading.Barrier(2)

    def run(job: int) -> None:
        start.wait(timeout=60)
        together[job] = answers(job)

    threads = [threading.Thread(target=run, args=(job,)) for job in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert [together[job] for job in range(2)] == in_turn


MEMORY = """
import json, sys
import numpy as np
import psutil
from contextlib import ExitStack
from pathlib import Path
from runtime.bundle import read_bundle
from runtime.generation import open_graphs, start_answers

def resident():
    return psutil.Process().memory_info().rss

bundle = read_bundle(Path(sys.argv[1]))
pixels = bundle.golden()["vision_encoder.in.pixel_values"]
question = [14] * (bundle.manifest.text.tokens)  # fills every entry

with ExitStack() as stack:
    opened, sessions, taken = [], [], []

    def ask():
        sessions.append(start_answers(bundle, opened[-1]))
        return list(sessions[-1].answer(photo, question, max_new_tokens=1, past_end=True))

    for weights in range(2):
        before = resident()
        opened.append(stack.enter_context(open_graphs(bundle, threads=1)))
        if not weights:
            photo = start_answers(bundle, opened[-1]).see(pixels)
        ask()
        taken.append(resident() - before)
    before = resident()
    for _ in range(4):
        ask()
    taken.append((resident() - before) / 4)
print(json.dumps([*taken, sessions[0].cache_bytes]))
"""


def test_second_session_takes_its_cache_and_no_weights(bundle: Bundle, root: Path) -> None:
    """In a process of its own, where nothing else comes and goes. Graphs opened again are the counterexample."""
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(bundle.path)], cwd=root, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    _, graphs_again, session, cache = json.loads(done.stdout)
    weights = (bundle.path / WEIGHTS).stat().st_size
    assert 0.8 * cache < session < 1.3 * cache + 2e6 < cache + weights / 4
    assert graphs_again > cache + weights / 2


# From Python


def test_open_bundle_shares_the_photo(bundle: Bundle, photo: Path, golden: Golden, runs: list[str]) -> None:
    """As a file, as pixels and as what was seen, whatever was asked in between."""
    with runtime.ask.open_bundle(str(bundle.path)) as opened:
        seen = opened.see(load_photo(photo))
        answers = [
            "".join(opened.ask(given, golden.question, max_new_tokens=6))
            for given in (str(photo), load_photo(photo), seen)
        ]
        assert runs.count(VISION_ENCODER) == 1
        other = load_photo(photo)[:, ::-1].copy()
        assert "".join(opened.ask(other, golden.question, max_new_tokens=6)) != answers[0]
        assert runs.count(VISION_ENCODER) == 2
        assert "".join(opened.ask(seen, golden.question, max_new_tokens=6)) == answers[0]
        assert runs.count(VISION_ENCODER) == 2
    assert len(set(answers)) == 1
    assert golden.text.startswith(answers[0])


def test_answer_tells_what_it_took_so_far(bundle: Bundle, photo: Path, golden: Golden) -> None:
    with runtime.ask.open_bundle(bundle.path) as opened:
        answer = opened.ask(photo, golden.question, max_new_tokens=5, stop="no such text")
        before = answer.took
        list(answer)
        after = answer.took
    assert (before.ttft_ms, before.token_ms) == (None, ())
    assert after.ttft_ms is not None
    assert len(after.token_ms) == 4
    assert after.question_tokens == len(golden.question_ids)


def test_answer_ends_where_another_or_the_bundle_does(bundle: Bundle, photo: Path, golden: Golden) -> None:
    with runtime.ask.open_bundle(bundle.path) as opened:
        first = opened.ask(photo, golden.question)
        next(first)
        next(opened.ask(photo, OTHER))
        with pytest.raises(RequestError, match="another photo or question has taken the cache"):
            list(first)
        last = opened.ask(photo, OTHER)
        next(last)
    for late in (lambda: list(last), lambda: opened.ask(photo, OTHER)):
        with pytest.raises(RequestError, match="is closed; open it again with open_bundle"):
            late()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"question": " "}, "the question is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"temperature": float("nan")}, "temperature=nan must lie in"),
        ({"stop": ["x", ""]}, "stop='' would end every answer"),
    ],
)
def test_what_ask_refuses_at_once(
    words: dict[str, Any], message: str, bundle: Bundle, photo: Path, runs: list[str]
) -> None:
    with runtime.ask.open_bundle(bundle.path) as opened, pytest.raises(RequestError, match=message):
        opened.ask(photo, **{"question": OTHER, **words})
    assert runs == []


def test_open_bundle_hashes_first(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = variant(bundle.path, tmp_path / "b", WEIGHTS)
    with (changed / WEIGHTS).open("r+b") as file:
        file.write(b"changed")
    monkeypatch.setattr(runtime.ask, "open_graphs", lambda *_, **__: pytest.fail("a graph was opened"))
    with pytest.raises(BundleError, match="was changed: sha256"):
        runtime.ask.open_bundle(changed)
