"""The reports: complete, safe to open, self-contained, and looked at in a browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from runtime.bundle import Bundle, DelegateCoverage, OutsideOp, PixelsInfo, read_bundle
from runtime.check.parity import BOUNDS, GraphParity, compare_kept
from runtime.check.verdict import Step, Verdict
from runtime.explain import NO_REWRITE, rewrite_for
from runtime.harness import check_bundle
from runtime.image import load_photo
from runtime.report import terminal_table, write_reports
from tests.conftest import HEADLESS_CHROMIUM, needs_chromium
from tests.sample_bundle import VISION, Sample, make_bundle


def _astronaut() -> np.ndarray:
    import skimage

    return load_photo(Path(skimage.__file__).parent / "data" / "astronaut.png")


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Verdict, Path]:
    folder = tmp_path_factory.mktemp("report")
    photo = _astronaut()
    bundle = make_bundle(folder / "sample-keep64", Sample(grid=(24, 24), patch=14, keep=64), photo)
    twin = make_bundle(folder / "sample-all", Sample(grid=(24, 24), patch=14, keep=576), photo)
    verdict = check_bundle(bundle, twin=twin, runs=3, warmup=1, out_dir=folder / "out")
    return read_bundle(bundle), verdict, folder / "out"


class _Page(HTMLParser):
    """Every tag with its attributes, and all text outside <style>."""

    VOID = frozenset(("meta", "br"))

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def _html(checked: tuple[Bundle, Verdict, Path]) -> str:
    return (checked[2] / "report.html").read_text(encoding="utf-8")


def test_html_is_one_file_that_needs_nothing(checked: tuple[Bundle, Verdict, Path]) -> None:
    page = _Page(_html(checked))
    assert page.open == [], "every element is closed"
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith("data:image/jpeg;base64,"), f"{tag} {name}={value!r}"
        assert not any(name.startswith("on") for name in attributes)
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", _html(checked))
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text)
    policies = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    assert len(_html(checked)) < 250_000


def test_picture_shows_the_tokens(checked: tuple[Bundle, Verdict, Path]) -> None:
    bundle, verdict, _ = checked
    page = _Page(_html(checked))
    paths = {attributes["class"]: attributes["d"] for tag, attributes in page.tags if tag == "path"}
    cells = {name: re.findall(r"M(\d+) (\d+)h1v1h-1z", d or "") for name, d in paths.items()}
    assert len(cells["keep"]) == 64
    assert len(cells["drop"]) == 576 - 64
    assert not set(cells["keep"]) & set(cells["drop"])
    kept = [int(row) * 24 + int(column) for column, row in cells["keep"]]
    assert tuple(kept) == verdict.graphs[0].kept_indices
    marks = [(float(a["cx"] or 0), float(a["cy"] or 0)) for tag, a in page.tags if tag == "circle"]
    golden = bundle.golden()["marks"]
    assert [int(y) * 24 + int(x) for x, y in marks] == golden.tolist()
    (image,) = [a for tag, a in page.tags if tag == "image"]
    data = base64.b64decode((image["href"] or "").partition(",")[2])
    picture = Image.open(io.BytesIO(data))
    assert picture.size == (672, 672)
    # The crop of the picture is the crop the model sees, only larger.
    from runtime.image import view

    seen = Image.fromarray(view(bundle.golden()["photo"], bundle.manifest.image)).resize((48, 48))
    difference = np.abs(np.asarray(picture.resize((48, 48)), float) - np.asarray(seen, float))
    assert difference.mean() < 4


def test_every_number_of_the_verdict_is_in_both_reports(checked: tuple[Bundle, Verdict, Path]) -> None:
    bundle, verdict, out = checked
    page, markdown = _Page(_html(checked)).text, (out / "report.md").read_text().replace("\\", "")
    (timed,) = verdict.latency
    assert timed.twin is not None
    assert timed.ratio is not None
    wanted = [
        bundle.manifest.name,
        "CPU (numpy)",
        verdict.device,
        f"{timed.ratio.median:.3f}",
        *(f"{tensor.rel:.1e}" for tensor in verdict.graphs[0].tensors),
        *(tensor.name for tensor in verdict.graphs[0].tensors),
        *(step.detail.replace("->", "→") for step in verdict.steps),
        *(info.sha256 for info in bundle.manifest.files.values()),
        "noise.png",
        "before decoder layer 1",
        "numpy " + np.__version__,
        "These are no times of a phone.",
    ]
    for text in wanted:
        assert text in page
        assert text.replace("→", "->") in markdown


def test_markdown_tables_are_even(checked: tuple[Bundle, Verdict, Path]) -> None:
    """A cell that breaks out of its row would change the number of columns."""
    blocks = re.split(r"\n(?!\|)", (checked[2] / "report.md").read_text())
    tables = [[line for line in block.splitlines() if line.startswith("|")] for block in blocks]
    assert sum(len(table) > 2 for table in tables) >= 8
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) <= 1


def _report(bundle: Bundle, verdict: Verdict, folder: Path) -> tuple[str, str]:
    folder.mkdir()
    write_reports(bundle, verdict, folder)
    return (folder / "report.html").read_text(encoding="utf-8"), (folder / "report.md").read_text(encoding="utf-8")


def test_hostile_names_stay_text(checked: tuple[Bundle, Verdict, Path], tmp_path: Path) -> None:
    bundle, verdict, _ = checked
    evil = '<script>alert(1)</script>"><img src=x onerror=y> | `a` [b](http://c)\n# x'
    manifest = msgspec.structs.replace(
        bundle.manifest,
        model=evil,
        tools={evil: evil},
        golden=msgspec.structs.replace(bundle.manifest.golden, photo=evil),
    )
    html, markdown = _report(Bundle(bundle.path, manifest), verdict, tmp_path / "out")
    page = _Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert "<script>alert(1)</script>" in page.text
    assert "<script>" not in markdown.replace("\\<", "")
    assert not re.search(r"^# x", markdown, re.M)
    assert "](http" not in markdown.replace("\\]", "")


def test_what_stayed_outside_is_told_with_its_rewrite(checked: tuple[Bundle, Verdict, Path], tmp_path: Path) -> None:
    bundle, verdict, _ = checked
    evil = "<script>alert(1)</script> | `a`"
    outside = (
        OutsideOp(op="aten.embedding", count=3, reason="mixes float32 and int64"),
        OutsideOp(op=evil, count=1, reason=evil),
    )
    taken = DelegateCoverage(delegate="XnnpackBackend", partitions=1, nodes=9, outside=outside)
    graph = msgspec.structs.replace(bundle.graph(VISION), coverage=(taken,))
    manifest = msgspec.structs.replace(bundle.manifest, graphs=(graph,))
    html, markdown = _report(Bundle(bundle.path, manifest), verdict, tmp_path / "out")
    page = _Page(html)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script>" not in markdown
    for text in (page.text, markdown.replace("\\", "")):
        assert "What stayed outside, and why" in text
        assert rewrite_for("XnnpackBackend", outside[0]) in text
        assert evil in text
        assert NO_REWRITE in text
    rows = [line for line in markdown.splitlines() if "rewrite" in line or "aten.embedding" in line]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in rows[:2]}) == 1


def _bars(html: str) -> list[tuple[str | None, float, float]]:
    """Class, place and width of each bar of the graphs' pictures."""
    bars = [attributes for tag, attributes in _Page(html).tags if tag == "rect"]
    return [(bar["class"], float(bar["x"] or "nan"), float(bar["width"] or "nan")) for bar in bars]


def test_graph_is_drawn_by_placement(checked: tuple[Bundle, Verdict, Path], tmp_path: Path) -> None:
    bundle, verdict, _ = checked

    def bars(*coverage: DelegateCoverage) -> list[tuple[str | None, float, float]]:
        graph = msgspec.structs.replace(bundle.graph(VISION), coverage=coverage)
        manifest = msgspec.structs.replace(bundle.manifest, graphs=(graph,))
        html, _ = _report(Bundle(bundle.path, manifest), verdict, tmp_path / str(len(list(tmp_path.iterdir()))))
        return _bars(html)

    left = OutsideOp(op="aten.embedding", count=3, reason="mixes float32 and int64")
    pieces = DelegateCoverage(delegate="X", partitions=2, nodes=47, outside=(left,), runs=(40, -2, 7, -1))
    assert bars(pieces) == [("in", 0, 40), ("out", 40, 2), ("in", 42, 7), ("out", 49, 1)]
    assert bars(DelegateCoverage(delegate="X", partitions=1, nodes=9)) == [("in", 0, 9)]
    # In what order these run nobody wrote down.
    assert not bars(DelegateCoverage(delegate="X", partitions=2, nodes=9))
    one = msgspec.structs.replace(left, count=1)
    wide = bars(DelegateCoverage(delegate="X", partitions=1, nodes=5000, outside=(one,), runs=(5000, -1)))
    assert wide[1][2] > 10  # one of 5001 nodes can still be seen


@pytest.mark.parametrize("runs", [(9, -2), (8, -1), (9, 0, -1), (-1,)])
def test_runs_that_do_not_add_up_are_refused(runs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="runs of 'X' hold"):
        DelegateCoverage(
            delegate="X", partitions=1, nodes=9, outside=(OutsideOp(op="a", count=1, reason="b"),), runs=runs
        )


def test_random_weights_are_marked(checked: tuple[Bundle, Verdict, Path], tmp_path: Path) -> None:
    bundle, verdict, _ = checked
    weights = msgspec.structs.replace(bundle.manifest.weights, source="random", seed=7)
    manifest = msgspec.structs.replace(bundle.manifest, weights=weights)
    html, markdown = _report(Bundle(bundle.path, manifest), verdict, tmp_path / "out")
    for text in (_Page(html).text, markdown):
        assert "Random weights (seed 7)" in text
    assert "Random weights" not in _html(checked)


def test_tokens_of_a_model_that_takes_any_size_are_told(checked: tuple[Bundle, Verdict, Path], tmp_path: Path) -> None:
    bundle, verdict, _ = checked
    told = "64 (11% kept); 324 image tokens by the model's own processor for 512 x 512 pixels"
    image = msgspec.structs.replace(bundle.manifest.image, pixels=PixelsInfo(token=28, least=784, most=2**24))
    any_size = Bundle(bundle.path, msgspec.structs.replace(bundle.manifest, image=image))
    html, markdown = _report(any_size, verdict, tmp_path / "out")
    for text in (_Page(html).text, markdown, _terminal(any_size, verdict, width=200)):
        assert told in text
    assert "own processor" not in _html(checked)


def _diverged(bundle: Bundle, verdict: Verdict) -> tuple[Verdict, int, int]:
    """The verdict of an engine that swapped one choice, with the token it lost and the one it took."""
    golden = bundle.golden()
    kept = golden["kept_indices"]
    lost = int(golden["kept_order"][5])
    taken = next(token for token in range(576) if token not in kept)
    got = np.sort(np.append(kept[kept != lost], taken))
    result = compare_kept(kept, got, least_overlap=1, order=golden["kept_order"], margin=golden["kept_margin"])
    graph: GraphParity = msgspec.structs.replace(
        verdict.graphs[0], kept=result, kept_indices=tuple(int(index) for index in got)
    )
    failed = Step(name="kept tokens", status="failed", detail="overlap 98.4%")
    skipped = Step(name="twin", status="not checked", detail="no twin", remedy="export it")
    steps = (*verdict.steps[:3], failed, skipped)
    return msgspec.structs.replace(verdict, graphs=(graph,), steps=steps), lost, taken


def test_divergence_is_drawn_and_told(checked: tuple[Bundle, Verdict, Path], tmp_path: Path) -> None:
    verdict, lost, taken = _diverged(checked[0], checked[1])
    html, markdown = _report(checked[0], verdict, tmp_path / "out")
    page = _Page(html)
    paths = {attributes["class"]: attributes["d"] for tag, attributes in page.tags if tag == "path"}
    assert paths["miss"] == f"M{lost % 24} {lost // 24}h1v1h-1z"
    assert paths["extra"] == f"M{taken % 24} {taken // 24}h1v1h-1z"
    for text in (page.text, markdown.replace("\\", "")):
        assert f"First divergence in the order of selection: choice 5, token {lost};" in text
        assert f"Missing: {lost}. In their place: {taken}." in text
        assert "not checked: no twin" in text or "not checked | no twin; export it" in text
    assert ("span", {"class": "pill failed", "id": "verdict"}) in page.tags


def test_no_photo_no_latency_no_delegates(tmp_path: Path, checked: tuple[Bundle, Verdict, Path]) -> None:
    bare = msgspec.structs.replace(
        checked[1],
        graphs=(),
        placements=(),
        latency=(),
        twin=None,
        steps=(Step(name="a", status="passed", detail="b"),),
    )
    html, markdown = _report(checked[0], bare, tmp_path / "out")
    page = _Page(html)
    assert "svg" not in {tag for tag, _ in page.tags}
    assert "Latency" not in page.text
    assert "The manifest records no delegate." in page.text
    assert "Tokens kept" not in markdown


def _terminal(bundle: Bundle, verdict: Verdict, *, width: int = 100) -> str:
    from rich.console import Console

    console = Console(width=width, file=io.StringIO(), record=True, color_system=None)
    console.print(terminal_table(bundle, verdict))
    return console.export_text()


def test_terminal_shows_the_numbers_that_matter(checked: tuple[Bundle, Verdict, Path]) -> None:
    text = _terminal(checked[0], checked[1])
    for word in ("passed", "576 -> 64", "pruned/twin", "3 of 3 outputs", "worst rel", "3 files", VISION):
        assert word in text


def test_terminal_shows_what_failed_and_what_was_not_checked(checked: tuple[Bundle, Verdict, Path]) -> None:
    verdict, _, _ = _diverged(checked[0], checked[1])
    text = _terminal(checked[0], verdict, width=140)
    assert re.search(r"verdict +│ failed", text)
    assert "failed: overlap 98.4%" in text
    assert "not checked: no twin; export it" in text


def test_terminal_of_the_twin(tmp_path: Path) -> None:
    twin = make_bundle(tmp_path / "twin", Sample(keep=16))
    verdict = check_bundle(twin, runs=1, warmup=0, out_dir=tmp_path / "out")
    assert "16 (unpruned twin)" in _terminal(read_bundle(twin), verdict)
    page = _Page((tmp_path / "out" / "report.html").read_text())
    assert not [tag for tag, attributes in page.tags if tag == "path"], "nothing is dimmed, nothing outlined"


def test_json_files_are_json(checked: tuple[Bundle, Verdict, Path]) -> None:
    for name in ("parity.json", "latency.json"):
        content = json.loads((checked[2] / name).read_text(), parse_constant=lambda word: pytest.fail(word))
        assert content["schema_version"] == 2
    for graph in json.loads((checked[2] / "parity.json").read_text())["graphs"]:
        assert graph["bound"]["precision"] in BOUNDS


# In a browser


def _chromium(tmp_path: Path, page: Path, *options: str) -> str:
    done = subprocess.run(
        [
            *HEADLESS_CHROMIUM,
            "--hide-scrollbars",
            f"--user-data-dir={tmp_path / 'profile'}",
            *options,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    shutil.rmtree(tmp_path / "profile", ignore_errors=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.browser
@needs_chromium
def test_dom_in_chromium(checked: tuple[Bundle, Verdict, Path], tmp_path: Path) -> None:
    """What the browser made of the page: nothing was dropped and nothing was left unclosed."""
    page = _Page(_chromium(tmp_path, checked[2] / "report.html", "--dump-dom"))
    assert sum(tag == "table" for tag, _ in page.tags) == sum(tag == "table" for tag, _ in _Page(_html(checked)).tags)
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {"verdict", "picture", "summary", "latency", "twin", "delegates"} <= ids
    assert "576 → 64" in page.text


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("width", [1200, 500])
def test_picture_in_chromium(checked: tuple[Bundle, Verdict, Path], tmp_path: Path, width: int) -> None:
    """The page is light, the photo is there, dropped patches are dark, kept ones as bright as in the photo."""
    shot = tmp_path / "shot.png"
    _chromium(tmp_path, checked[2] / "report.html", f"--screenshot={shot}", f"--window-size={width},1400")
    pixels = np.asarray(Image.open(shot).convert("RGB"), float)
    assert pixels.shape == (1400, width, 3)
    assert pixels[5, 5].min() > 235, "the margin has the light background"
    # The photo is found by its size: the figure spans from its first to its last column that is not card-coloured.
    bundle, verdict, _ = checked
    from runtime.image import view

    photo = view(bundle.golden()["photo"], bundle.manifest.image).astype(float)
    rows, columns = np.nonzero(pixels[:, : width if width < 760 else width // 2].max(axis=2) < 60)
    top, left = rows.min(), columns[rows > rows.min() + 20].min()
    dark = np.flatnonzero((pixels[top + 80 : top + 300].max(axis=2) < 60).any(axis=0))
    assert len(dark) > 100, f"dimmed patches begin at {top}, {left}"
    kept = np.array(verdict.graphs[0].kept_indices)
    share = [photo[14 * (i // 24) : 14 * (i // 24) + 14, 14 * (i % 24) : 14 * (i % 24) + 14].mean() for i in kept]
    assert max(share) > 120, "some kept patches are bright"
    card = pixels[top : top + 300, left : left + 300]
    assert card.max() > 200, "and are bright in the picture, too"
    assert np.median(card.max(axis=2)) < 110, "while most of it is dimmed"
