"""`pruneport serve` as its reader uses it, in a browser and by keyboard; and as others must not be able to use it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import socket
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from PIL import Image

import pruneport
from export import cli
from runtime.bundle import read_bundle
from runtime.image import load_photo, preprocess
from runtime.serve.sides import Side
from tests.browser import Page, open_page
from tests.conftest import needs_chromium
from tests.sample_bundle import Sample, edit_manifest, make_bundle, noise_photo, rehash
from tests.serving import Served, png, served, text

QUESTION = "What is in this picture?"
KEEPS = (5, 2)


# The server, with a bundle that shows its tokens and cannot answer


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("shown")
    with served(make_bundle(folder / "sample", Sample(keep=4)), folder / "tmp") as running:
        yield running


@pytest.fixture(scope="module")
def photo(shown: Served, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of a photo that was handed in."""
    name: str = shown.post("/photo", png(noise_photo(), tmp_path_factory.mktemp("photo") / "a.png"))["photo"]
    return name


def test_the_page_may_load_its_own_files_and_nothing_else(shown: Served) -> None:
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/page.css", "text/css")):
        status, headers, body = shown.ask("GET", path, Origin="")
        assert (status, headers["content-type"]) == (200, f"{kind}; charset=utf-8")
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
        assert "unsafe" not in policy
        assert b"http://" not in body
        assert b"https://" not in body
        assert b"style=" not in body
    assert b"<script src=" in shown.ask("GET", "/", Host=f"localhost:{shown.port}")[2]


@pytest.mark.parametrize(
    "path", ["/../server.py", "/..%2fserver.py", "//etc/passwd", "/page.js/../../server.py", "/index.html", "/%00"]
)
def test_no_other_file_is_handed_out(shown: Served, path: str) -> None:
    status, headers, _ = shown.ask("GET", path)
    assert status == 404
    assert "content-security-policy" in headers


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{}", "127.0.0.1", "127.0.0.1:1", "127.0.0.1.evil:{}", ""]
)
@pytest.mark.parametrize(("method", "path"), [("GET", "/bundle"), ("GET", "/"), ("POST", "/photo")])
def test_who_was_led_here_by_another_name_gets_nothing(shown: Served, method: str, path: str, host: str) -> None:
    """As a page does whose name was made to point at this machine after it was loaded."""
    host = host.format(shown.port)
    status, _, body = shown.ask(method, path, b"" if method == "POST" else None, Host=host, Origin=f"http://{host}")
    assert status in (400, 421)
    assert b"sample" not in body


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": ""},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "https://127.0.0.1:{}"},
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
    ],
)
@pytest.mark.parametrize("path", ["/photo", "/kept", "/answer"])
def test_no_other_page_can_ask(shown: Served, path: str, headers: dict[str, str]) -> None:
    said = {name: text.format(shown.port) for name, text in headers.items()}
    status, _, body = shown.ask("POST", path, b"{}", **said)
    assert (status, json.loads(body)) == (403, {"error": "only this server's own page may ask"})


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "TRACE"])
def test_other_methods_do_nothing(shown: Served, method: str) -> None:
    assert shown.ask(method, "/photo", Origin="http://evil.example")[0] == 403
    assert shown.ask(method, "/photo")[0] == 405


def test_an_upload_has_a_limit(shown: Served) -> None:
    status, _, body = shown.ask("POST", "/photo", b"", Content_Length=str(2**40))
    assert status == 413
    assert json.loads(body)["error"].startswith("that is more than 64 MiB, which is the most that is taken")
    # Who does not say how much comes is stopped when it is too much.
    status, _, body = shown.ask("POST", "/kept", iter([b" " * 2**15] * 3))
    assert (status, "more than 64 KiB" in json.loads(body)["error"]) == (413, True)


def bomb() -> bytes:
    """A small PNG of 3600 megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(2**20))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (bomb(), "megapixels"),
        (b"", "the photo is not an image; choose a JPEG, PNG or WebP photo (it is an empty file)"),
        (
            b"<svg onload=alert(1)>",
            "the photo is not an image; choose a JPEG, PNG or WebP photo (it is an SVG drawing)",
        ),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "only other programs can draw"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "the photo"),
    ],
)
def test_hostile_photos_are_refused(shown: Served, body: bytes, words: str) -> None:
    said = shown.post("/photo", body, status=400)["error"]
    assert words in said
    assert str(shown.folder) not in said
    assert not list(shown.folder.rglob("photo-*"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"photo": "another"}, "this photo is no longer here"),
        ({"keep": 3}, "keep=3: .* has the keep 4 alone"),
        ({"keep": "4"}, "the request is not understood"),
        ({"path": "/etc/passwd"}, "the request is not understood"),
    ],
)
def test_what_cannot_be_asked_is_refused(shown: Served, photo: str, change: dict[str, Any], words: str) -> None:
    said = shown.post("/kept", {"photo": photo, "keep": 4, **change}, status=400)["error"]
    assert re.search(words, said)


def test_a_bundle_without_text_graphs_shows_its_tokens(shown: Served, photo: str) -> None:
    facts = json.loads(shown.ask("GET", "/bundle")[2])
    assert facts["why_no_answer"].startswith("This bundle has no text graphs")
    assert (facts["keeps"], facts["image_tokens"], facts["twin"]) == ([4], 16, None)
    assert facts["device"].startswith("desktop CPU (")
    kept = shown.post("/kept", {"photo": photo, "keep": 4})["kept"]
    assert kept == read_bundle(shown.folder.parent / "sample").golden()["kept_indices"].tolist()
    refused = shown.post("/answer", {"photo": photo, "keep": 4, "question": QUESTION}, status=400)
    assert refused["error"] == facts["why_no_answer"]


def test_the_sample_is_the_photo_of_the_check(shown: Served, tmp_path: Path) -> None:
    status, headers, body = shown.ask("GET", "/sample.png")
    assert (status, headers["content-type"]) == (200, "image/png")
    (tmp_path / "sample.png").write_bytes(body)
    assert np.array_equal(load_photo(tmp_path / "sample.png"), noise_photo())


def test_only_this_machine_reaches_it(shown: Served) -> None:
    """The socket is bound to the loopback, so that no other address of this machine answers."""
    name = f"{shown.port:04X}"
    bound = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert [address for address in bound if address.endswith(f":{name}")] == [f"0100007F:{name}"]


# What is refused before anything is served


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """The one line with which a command line ends, with exit code 2."""

    def run(*words: str | Path) -> str:
        code = cli.main(["serve", *map(str, words), "-q"], version="0")
        captured = capsys.readouterr()
        assert (code, captured.out) == (2, "")
        (line,) = captured.err.splitlines()
        assert line.startswith("pruneport: error: ")
        return line.removeprefix("pruneport: error: ")

    return run


def test_a_bundle_that_is_none(refused: Callable[..., str], tmp_path: Path) -> None:
    assert "does not exist; a bundle is the folder an export wrote" in refused(tmp_path / "nothing")
    assert "has no manifest.json" in refused(tmp_path)


def test_a_bundle_that_was_changed(refused: Callable[..., str], tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "sample", Sample())
    tokenizer = bundle / "tokenizer.json"
    tokenizer.write_text("[]")
    assert "was changed: sha256 " in refused(bundle, "--port", "0")


def test_a_bundle_for_an_iphone(refused: Callable[..., str], tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "sample", Sample())
    edit_manifest(bundle, target={"name": "ios", "backend": "coreml", "precision": "fp32"})
    assert "is made for Core ML, which runs on a Mac or an iPhone and not here" in refused(bundle)


def test_a_bundle_that_does_not_say_what_it_keeps(refused: Callable[..., str], tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "sample", Sample(cut=0))
    (graph,) = json.loads((bundle / "manifest.json").read_bytes())["graphs"]
    graph["outputs"] = [info for info in graph["outputs"] if info["name"] != "kept_indices"]
    edit_manifest(bundle, layout="multimodal-runner", graphs=[graph])
    assert "is made for multimodal-runner, and its vision graph does not say which tokens it keeps" in refused(bundle)


def test_a_port_that_cannot_be_had(refused: Callable[..., str], tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "sample", Sample())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = refused(bundle, "--port", str(port))
    assert said == f"port={port} is in use; give another one with --port, or --port 0, which takes a free one"
    assert refused(bundle, "--port", "70000") == "port=70000 must lie in 0..65535"
    assert "port='http' is not a whole number" in refused(bundle, "--port", "http")


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_the_extra_is_not_installed(
    refused: Callable[..., str], missing: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    bundle = make_bundle(tmp_path / "sample", Sample())
    said = refused(bundle)
    assert said == f"the page needs {missing}, which is not installed here; run: pip install 'pruneport[serve]'"


# Answers, of a bundle of two keeps with its twin beside it


@dataclass(frozen=True)
class Made:
    """A bundle, its twin, and a photo on the disk."""

    path: Path
    twin: Path
    photo: Path

    def said(self, keep: int | None = None) -> str:
        """What the bundle says in Python; without a keep, what the twin says."""
        with pruneport.open_bundle(self.twin if keep is None else self.path, keep=keep) as asked:
            return "".join(asked.ask(self.photo, QUESTION))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    from export.families import MODELS
    from tests.tiny_llava import TINY, write_tiny  # with torch, which nothing else here needs

    folder = tmp_path_factory.mktemp("made")
    Image.fromarray(noise_photo(90, 70, seed=3)).save(folder / "photo.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", TINY)
        path = pruneport.export_bundle(
            model="tiny",
            keep=KEEPS,
            method="uniform",  # whose graphs are small
            backend="onnx",
            quant_text="none",
            text_tokens=200,
            weights=write_tiny(folder / "weights"),
            image=folder / "photo.png",
            output_dir=folder / "bundles",
            twin=True,
        ).path
    (twin,) = path.parent.glob("tiny-keepall-*")
    for bundle in (path, twin):
        give_words(bundle)
    return Made(path, twin, folder / "photo.png")


def give_words(bundle: Path) -> None:
    """Gives a bundle of the tiny model, which has no tokenizer, one with a word for each token."""
    words = {f"w{number}": number for number in range(64)}
    words["<image>"] = words.pop("w5")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<image>"])
    (bundle / "tokenizer.json").write_text(tokenizer.to_str())
    rehash(bundle, "tokenizer.json")
    prompt = json.loads((bundle / "manifest.json").read_bytes())["prompt"]
    edit_manifest(bundle, prompt={**prompt, "suffix_text": " {question} w9"})


@pytest.fixture(scope="module")
def answering(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(made.path, tmp_path_factory.mktemp("answering") / "tmp") as running:
        yield running


@pytest.mark.slow
def test_answers_are_those_of_ask(answering: Served, made: Made) -> None:
    name = answering.post("/photo", made.photo.read_bytes())["photo"]
    for keep in KEEPS:
        kept = answering.post("/kept", {"photo": name, "keep": keep})["kept"]
        assert len(kept) == keep
        events = answering.events(photo=name, keep=keep, question=QUESTION, twin=True)
        assert text(events, "bundle") == made.said(keep)
        assert text(events, "twin") == made.said()
        assert len([event for event in events if "piece" in event]) > 2, "it does not come at once"
        numbers = {event["side"]: event["numbers"] for event in events if "numbers" in event}
        assert set(numbers) == {"bundle", "twin"}
        assert numbers["bundle"]["kv_cache_bytes"] < numbers["twin"]["kv_cache_bytes"]
        assert all(value > 0 for side in numbers.values() for value in side.values())
        sides = [event["side"] for event in events]
        assert sides == sorted(sides), "one after the other, so that neither disturbs the other"


@pytest.mark.slow
def test_a_question_that_cannot_be_answered(answering: Served, made: Made) -> None:
    name = answering.post("/photo", made.photo.read_bytes())["photo"]
    for question, words in ((" ", "the question is empty"), ("why " * 300, "need")):
        last = answering.events(photo=name, keep=KEEPS[0], question=question, twin=True)[-1]
        assert last["side"] == "bundle"
        assert words in last["error"]
    assert text(answering.events(photo=name, keep=KEEPS[0], question=QUESTION), "bundle") == made.said(KEEPS[0])


@pytest.mark.slow
def test_two_tabs_are_answered_one_after_the_other(answering: Served, made: Made) -> None:
    name = answering.post("/photo", made.photo.read_bytes())["photo"]
    found: list[list[dict[str, Any]]] = []

    def tab() -> None:
        found.append(answering.events(photo=name, keep=KEEPS[0], question=QUESTION, twin=True))

    tabs = [threading.Thread(target=tab) for _ in range(4)]
    for one in tabs:
        one.start()
    for one in tabs:
        one.join()
    assert len(found) == 4
    assert {text(events, "bundle") for events in found} == {made.said(KEEPS[0])}
    assert any(events[0] == {"waiting": True} for events in found)


@pytest.mark.slow
def test_who_leaves_ends_the_answer(made: Made, tmp_path: Path) -> None:
    """Nothing of an answer that nobody reads gets into the next one; and a process that was killed is started anew."""
    pixels = preprocess(load_photo(made.photo), read_bundle(made.path).manifest.image)

    async def pieces(side: Side, *, most: int) -> list[str]:
        found: list[str] = []
        async with aclosing(side.work(KEEPS[0], pixels, QUESTION)) as events:
            async for event in events:
                if event.piece:
                    found.append(event.piece)
                    if len(found) == most:
                        break
        return found

    async def walk() -> None:
        side = Side(made.path, KEEPS[0], tmp_path)
        whole = await pieces(side, most=1000)
        assert "".join(whole) == made.said(KEEPS[0])
        assert await pieces(side, most=1) == whole[:1]
        assert await pieces(side, most=1000) == whole
        assert side._process is not None
        side._process.kill()
        with pytest.raises(pruneport.EngineError, match=r"ended \(signal 9\), perhaps for lack of memory"):
            await pieces(side, most=1000)
        assert await pieces(side, most=1000) == whole
        process = side._process
        await side.close()
        assert process.returncode is not None

    asyncio.run(walk())


@pytest.mark.slow
def test_a_side_that_fails_tells_why(made: Made, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(made.path, tmp_path / made.path.name))
    (bundle / "lm_head.onnx").write_bytes(bytes(os.path.getsize(bundle / "lm_head.onnx")))
    with pytest.raises(pruneport.BundleError, match="was changed: sha256"):
        asyncio.run(Side(bundle, KEEPS[0], tmp_path).open())


# In a browser


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Page]:
    with open_page(tmp_path / "profile") as opened:
        yield opened


def status_is(words: str) -> str:
    return f"document.getElementById('status').textContent === {json.dumps(words)}"


@pytest.mark.slow
@pytest.mark.browser
@needs_chromium
def test_by_keyboard_in_chromium(answering: Served, made: Made, page: Page) -> None:
    """A photo is chosen, the tokens are seen, a question is asked of both, with keys alone; nothing sticks out."""
    page.go(answering.address, width=1280)
    page.wait("document.getElementById('name').textContent.startsWith('tiny-keep5-2')")
    page.do("Page.setInterceptFileChooserDialog", enabled=True)
    page.tab_to("choose")
    page.key("Enter")
    node = page.until("Page.fileChooserOpened")["backendNodeId"]
    page.do("DOM.setFileInputFiles", files=[str(made.photo)], backendNodeId=node)
    ready = status_is("The photo is ready. Ask something.")
    page.wait(ready)
    kept = "document.getElementById('kept').getAttribute('d').split('M').length - 1"
    dropped = "document.getElementById('dropped').getAttribute('d').split('M').length - 1"
    assert (page.value(kept), page.value(dropped)) == (5, 11)
    shown = "getComputedStyle(document.getElementById('dropped')).fillOpacity > 0"
    page.wait(shown)
    page.tab_to("show")
    page.key(" ")
    page.wait(f"!({shown})")
    page.tab_to("question")
    page.key("Enter")
    page.wait(status_is("Done."))
    answers = [f"document.getElementById('{side}-answer').textContent" for side in ("bundle", "twin")]
    assert [page.value(answer) for answer in answers] == [made.said(5), made.said()]
    rows = page.value("[...document.querySelectorAll('#rows tr')].map(row => [...row.cells].map(c => c.textContent))")
    assert [row[0] for row in rows] == ["image ready", "TTFT", "tokens/s", "KV cache", "peak memory"]
    assert all(len(row) == 4 and float(row[3]) > 0 for row in rows)
    assert page.value("document.getElementById('device').textContent").startswith("desktop CPU (")
    # Another keep, of the same photo.
    page.tab_to("keep")
    page.key("ArrowDown")
    page.wait(f"{kept} === 2")
    page.wait(ready)
    page.tab_to("question")
    page.key("Enter")
    page.wait(status_is("Done."))
    assert page.value(answers[0]) == made.said(2)
    # What has the focus is seen to have it, and everything has a name.
    for _ in range(12):
        page.key("Tab")
        around = "getComputedStyle(document.activeElement{}).outlineStyle"
        near = [page.value(around.format(end)) for end in ("", ".nextElementSibling ?? document.body")]
        labels = page.value("[...document.activeElement.labels ?? []].map(l => getComputedStyle(l).outlineStyle)")
        assert page.value("document.activeElement === document.body") or "solid" in [*near, *labels]
    unnamed = "[...document.querySelectorAll('input, select')].filter(e => !e.labels.length).length"
    assert page.value(unnamed) == 0
    for width in (390, 1280):
        page.size(width, 800)
        assert page.value("document.documentElement.scrollWidth") <= width
    wrong = [event for event in page.happened if event.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown")]
    assert not wrong


@pytest.mark.browser
@needs_chromium
def test_a_bundle_that_cannot_answer_in_chromium(shown: Served, page: Page) -> None:
    page.go(shown.address, width=390, dark=True)
    page.wait("document.getElementById('status').textContent.startsWith('This bundle has no text graphs')")
    page.tab_to("sample")
    page.key("Enter")
    page.wait("document.getElementById('kept').getAttribute('d')?.length > 0")
    assert page.value("document.getElementById('form').hidden")
    assert page.value("document.documentElement.scrollWidth") <= 390
    # Another way to bring a photo, and one more.
    seen = "document.getElementById('seen').getAttribute('href')"
    for kind, carried in (("ClipboardEvent('paste'", "clipboardData"), ("DragEvent('drop'", "dataTransfer")):
        before = page.value(seen)
        colour = "red" if kind.startswith("Drag") else "blue"
        page.value(f"""(async () => {{
            const canvas = Object.assign(document.createElement('canvas'), {{width: 60, height: 40}});
            const context = canvas.getContext('2d');
            context.fillStyle = '{colour}';
            context.fillRect(0, 0, 60, 40);
            const photo = await new Promise((done) => canvas.toBlob(done, 'image/png'));
            const data = new DataTransfer();
            data.items.add(new File([photo], 'photo.png', {{type: 'image/png'}}));
            document.dispatchEvent(new {kind}, {{{carried}: data, bubbles: true, cancelable: true}}));
        }})()""")
        page.wait(f"{seen} !== {json.dumps(before)}")
    page.value("document.dispatchEvent(new DragEvent('drop', {dataTransfer: new DataTransfer()}))")
    assert page.value("document.getElementById('trouble').textContent") == ""
