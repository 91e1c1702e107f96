"""Several keeps in one bundle: weights once, a view for each keep, and a switch that opens nothing."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import pruneport
import runtime.ask
import runtime.engines.executorch
import runtime.session
from export import cli
from export.families import MODELS
from export.request import MOST_KEEPS, Request, describe, plan
from export.sweep.cell import plan_cells
from export.sweep.matrix import read_matrix
from runtime.ask import OpenBundle
from runtime.bundle import MANIFEST, REPORT_FILES, VISION_ENCODER, Bundle, is_report, of_keep, read_bundle
from runtime.check.judge import check
from runtime.devices.here import HereDevice
from runtime.devices.received import findings_of, judged_bundle
from runtime.devices.wire import device_files, make_job
from runtime.engines import ENGINES
from runtime.errors import BundleError, PruneportError, RequestError
from runtime.golden import ANSWER, QUESTION
from tests.sample_bundle import Sample, edit_manifest, make_bundle, noise_photo, rehash
from tests.tiny_llava import TINY, tiny_tensors, write_tiny

# The default is not the largest, for which the text graphs must have room.
KEEPS = (2, 5)


@dataclass(frozen=True)
class Exported:
    """A bundle of both keeps, one of the larger keep alone, and the twin; all of one backend."""

    backend: str
    path: Path
    alone: Path
    twin: Path
    photo: np.ndarray

    @property
    def bundle(self) -> Bundle:
        return read_bundle(self.path)


@pytest.fixture(scope="module", params=[pytest.param(name, marks=pytest.mark.slow) for name in ("onnx", "xnnpack")])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    folder = tmp_path_factory.mktemp(request.param)
    photo = noise_photo()
    Image.fromarray(photo).save(folder / "photo.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", TINY)

        def export(keep: int | Sequence[int], *, twin: bool = False) -> Path:
            made = pruneport.export_bundle(
                model="tiny",
                keep=keep,
                method="uniform",  # whose graphs are small: a method's own are no other than in a bundle of one keep
                backend=request.param,
                quant_text="none",
                weights=write_tiny(folder / "weights"),
                image=folder / "photo.png",
                text_tokens=200,
                output_dir=folder / "bundles",
                twin=twin,
            )
            assert made.verdict.outcome == "passed", [*made.verdict.failed_steps, *made.verdict.unchecked_steps]
            return made.path

        path = export(KEEPS, twin=True)
        (twin,) = path.parent.glob("tiny-keepall-*")
        yield Exported(request.param, path, export(KEEPS[1]), twin, photo)


def test_what_lies_in_the_bundle(exported: Exported) -> None:
    bundle = exported.bundle
    bundle.check_files()
    assert bundle.manifest.name.startswith(f"tiny-keep2-5-android-{exported.backend}-uniform-")
    graphs = [graph.name for graph in bundle.manifest.graphs]
    text = ["decoder_front", "decoder_back", "lm_head", "token_embedding"]
    assert graphs == ["vision_encoder_keep2", "vision_encoder_keep5", *text]
    files = {"model.pte"}
    if exported.backend == "onnx":
        files = {"weights.onnx_data", *(f"{name}.onnx" for name in graphs)}
    goldens = {"golden-keep2.safetensors", "golden-keep5.safetensors"}
    reports = {*REPORT_FILES, *(of_keep(name, keep) for name in REPORT_FILES for keep in KEEPS)}
    assert set(bundle.manifest.files) == files | goldens | reports
    assert all(is_report(name) == (name in reports) for name in bundle.manifest.files)
    assert (bundle.keeps, bundle.manifest.prune.keep, bundle.manifest.golden.file) == (
        KEEPS,
        KEEPS[0],
        "golden-keep2.safetensors",
    )


def test_weights_are_stored_once(exported: Exported) -> None:
    """Every linear layer of tower and decoder lies in the file once, in float32 or as the same numbers in float16."""
    stored = (exported.path / ("model.pte" if exported.backend == "xnnpack" else "weights.onnx_data")).read_bytes()
    layers = {name: tensor for name, tensor in tiny_tensors().items() if ".layers." in name and tensor.dim() == 2}
    unused = "vision_tower.encoder.layers.2."  # features are those of the layer before
    assert len(layers) > 30
    for name, tensor in layers.items():
        times = stored.count(tensor.numpy().tobytes()) + stored.count(tensor.half().numpy().tobytes())
        assert times == (0 if unused in name else 1), name


def test_a_view_is_the_bundle_of_that_keep_alone(exported: Exported) -> None:
    view, alone = exported.bundle.at(KEEPS[1]), read_bundle(exported.alone)
    assert view.manifest.prune == alone.manifest.prune
    assert [graph.name for graph in view.manifest.graphs] == [graph.name for graph in alone.manifest.graphs]
    ours, theirs = view.graph(VISION_ENCODER), alone.graph(VISION_ENCODER)
    assert (ours.inputs, ours.outputs, ours.arithmetic) == (theirs.inputs, theirs.outputs, theirs.arithmetic)
    assert view.manifest.keeps == ()
    golden, expected = view.golden(), alone.golden()
    assert golden.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(golden[name], array, err_msg=name)
    assert view.at() is view
    assert view.at(KEEPS[0]).manifest.prune.keep == KEEPS[0]
    assert [at.keeps for at in exported.bundle.views] == [(2,), (5,)]
    assert alone.at() is alone is alone.at(KEEPS[1])


def test_the_check_judges_every_keep(exported: Exported) -> None:
    verdict = pruneport.verify(exported.path)
    assert verdict.outcome == "passed"
    assert tuple(verdict.keeps) == KEEPS
    names = {step.name for step in verdict.steps}
    for keep, one in verdict.keeps.items():
        assert {f"{step.name}, keep {keep}" for step in one.steps} <= names
        assert {"parity of vision_encoder", "kept tokens", "KV cache", "answer"} <= {step.name for step in one.steps}
        assert one.graphs[0].kept is not None
        assert one.graphs[0].kept.got_count == keep
    assert len(verdict.steps) == sum(len(one.steps) for one in verdict.keeps.values())


def test_a_wrong_keep_fails_the_check(exported: Exported, tmp_path: Path) -> None:
    """The second keep's golden with another answer: the first passes, and the bundle does not."""
    bundle = _copy(exported.path, tmp_path)
    golden = load_file(bundle / "golden-keep5.safetensors")
    golden["vision_encoder.out.key_0"] = golden["vision_encoder.out.key_0"] + np.float32(0.5)
    save_file(golden, bundle / "golden-keep5.safetensors")
    with pytest.raises(BundleError, match=r"golden-keep5\.safetensors was changed"):
        pruneport.verify(bundle)
    rehash(bundle, "golden-keep5.safetensors")
    verdict = pruneport.verify(bundle)
    assert verdict.outcome == "failed"
    assert verdict.keeps[2].outcome == "passed"
    assert {step.name for step in verdict.failed_steps} >= {"parity of vision_encoder, keep 5"}
    assert all(step.name.endswith(", keep 5") for step in verdict.failed_steps)


def test_reports_of_all_and_of_each(exported: Exported) -> None:
    def parity(name: str) -> dict[str, Any]:
        return dict(json.loads((exported.path / name).read_text(encoding="utf-8")))

    graphs = [graph["graph"] for graph in parity("parity.json")["graphs"]]
    assert {"vision_encoder, keep 2", "vision_encoder, keep 5"} < set(graphs)
    for keep in KEEPS:
        own = [graph["graph"] for graph in parity(f"parity-keep{keep}.json")["graphs"]]
        assert own[0] == VISION_ENCODER
        assert [f"{name}, keep {keep}" for name in own] == [name for name in graphs if name.endswith(f", keep {keep}")]
        report = (exported.path / f"report-keep{keep}.md").read_text(encoding="utf-8")
        assert f", keep {keep}: passed" in report.splitlines()[0].replace("\\", "")
        assert f"16 -> {keep}" in report.replace("\\", "")
        latency = parity(f"latency-keep{keep}.json")
        assert latency["twin"]["image_tokens"] == 16
        assert all(timed["ratio"] is not None for timed in latency["graphs"]), "each keep is timed beside the twin"
    whole = (exported.path / "report.md").read_text(encoding="utf-8").replace("\\", "")
    assert "image tokens, keep 2" in whole
    assert "report-keep2.html, report-keep5.html" in whole


# Asking


class Numbers:
    """A tokenizer for a model that has none: a question is the golden's, and a token its number."""

    def __init__(self, bundle: Bundle) -> None:
        self._question = bundle.at().golden()[QUESTION].tolist()

    def question_ids(self, question: str) -> list[int]:
        return list(self._question)

    def text(self, ids: Iterator[int]) -> Iterator[str]:
        for number in ids:
            yield f"{number} "


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each graph and each program was opened."""
    counts: Counter[str] = Counter()

    def counted(load: Callable[..., Any]) -> Callable[..., Any]:
        def run(graph: Any, *rest: Any) -> Any:
            counts[graph.name] += 1
            return load(graph, *rest)

        return run

    class Program(runtime.engines.executorch._Program):
        def __init__(self, opened: Any) -> None:
            counts["program"] += 1
            super().__init__(opened)

    engines = {name: counted(load) for name, load in ENGINES.items()}
    monkeypatch.setattr(runtime.session, "ENGINES", engines)
    monkeypatch.setattr(runtime.engines.executorch, "_Program", Program)
    monkeypatch.setattr(runtime.ask, "open_tokenizer", Numbers)
    return counts


def _expected(bundle: Bundle, keep: int) -> str:
    """The desktop's greedy answer at a keep, up to the token that ends it."""
    ids = bundle.at(keep).golden()[ANSWER].tolist()
    assert bundle.manifest.text is not None
    ends = [number for number, token in enumerate(ids) if token in bundle.manifest.text.end_ids]
    return "".join(f"{token} " for token in ids[: min(ends, default=len(ids))])


def test_switching_opens_nothing(exported: Exported, opened: Counter[str]) -> None:
    bundle = exported.bundle
    answers = {keep: _expected(bundle, keep) for keep in KEEPS}
    assert answers[2] != answers[5], "the keeps should answer differently, or nothing is shown here"
    with pruneport.open_bundle(exported.path) as asked:
        assert "".join(asked.ask(exported.photo, "?")) == answers[2]
        graphs = {graph.name: 1 for graph in bundle.manifest.graphs if graph.name != "vision_encoder_keep5"}
        program = {"program": 1} if exported.backend == "xnnpack" else {}
        assert opened == {**graphs, **program}, "the other keep's vision graph waits until it is asked for"
        assert "".join(asked.ask(exported.photo, "?", keep=5)) == answers[5]
        everything = {**graphs, "vision_encoder_keep5": 1, **program}
        assert opened == everything
        seen = {keep: asked.see(exported.photo, keep=keep) for keep in KEEPS}
        for keep in (2, 5, 2, 5):
            assert "".join(asked.ask(exported.photo, "?", keep=keep)) == answers[keep]
            assert "".join(asked.ask(seen[keep], "?")) == answers[keep], "a prefill knows its keep"
        assert opened == everything
        sizes = {keep: {array.shape[2] for array in seen[keep].caches.values()} for keep in KEEPS}
        assert sizes == {2: {7 + 16, 7 + 2}, 5: {7 + 16, 7 + 5}}


def test_two_keeps_answer_at_once(exported: Exported, opened: Counter[str]) -> None:
    bundle = exported.bundle
    with OpenBundle(bundle) as asked:
        streams = {keep: asked.ask(exported.photo, "?", keep=keep) for keep in KEEPS}
        pieces: dict[int, str] = dict.fromkeys(KEEPS, "")
        while streams:
            for keep, stream in list(streams.items()):
                piece = next(stream, None)
                if piece is None:
                    del streams[keep]
                else:
                    pieces[keep] += piece
        assert pieces == {keep: _expected(bundle, keep) for keep in KEEPS}


def test_a_prefill_is_of_its_keep(exported: Exported, opened: Counter[str], tmp_path: Path) -> None:
    with pruneport.open_bundle(exported.path, keep=5) as asked:
        seen = asked.see(exported.photo)
        with pytest.raises(BundleError, match=r"prefilled by tiny.*, keep 5 .*, not by tiny.*, keep 2 "):
            asked.ask(seen, "?", keep=2)
        seen.save(tmp_path / "five.safetensors")
    with pruneport.open_bundle(exported.path) as asked:
        assert "".join(asked.ask(tmp_path / "five.safetensors", "?")) == _expected(exported.bundle, 5)
    with pruneport.open_bundle(exported.alone) as asked, pytest.raises(BundleError, match="prefilled by tiny-keep2-5"):
        asked.see(seen)


def test_ask_on_the_command_line(
    exported: Exported, opened: Counter[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(exported.photo).save(photo)

    def ask(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["ask", str(exported.path), str(photo), "What?", "--max-new-tokens", "64", *words], version="0")
        return code, *capsys.readouterr()

    for keep, words in ((2, []), (2, ["--keep", "2"]), (5, ["--keep", "5"])):
        code, out, _ = ask(*words)
        assert (code, out.strip()) == (0, _expected(exported.bundle, keep).strip())
    code, out, err = ask("--keep", "5", "--compare")
    assert code == 0
    assert out.splitlines()[0].strip() == _expected(exported.bundle, 5).strip()
    titles = [line for line in err.splitlines() if line.startswith("tiny-")]
    assert titles == [f"{exported.path.name}, keep 5", exported.twin.name]
    opened.clear()
    for word, message in (
        ("4", f"keep=4: {exported.path} has the keeps 2, 5; take one that it has, or export again with --keep 2,5,4"),
        ("x", "keep='x' is not a whole number"),
        ("0", "keep=0 must lie in 1.."),
    ):
        code, out, err = ask("--keep", word)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"pruneport: error: {message}")
    assert not opened, "refused before a graph is opened"


def test_a_bundle_of_one_keep_names_it(exported: Exported) -> None:
    with pytest.raises(RequestError, match=r"keep=2: .* has the keep 5 alone; .* --keep 5,2$"):
        pruneport.open_bundle(exported.alone, keep=2)


# What cannot be asked for


@pytest.mark.parametrize(
    ("keep", "more", "message"),
    [
        ("64,64", {}, "keep=64,64 names 64 twice; name each keep once"),
        ("all,576", {}, "keep=all,576 names 576 twice"),
        ("11%,63", {}, "keep=11%,63 names 63 twice; name each keep once"),
        ("64,0%", {}, "keep=0% is not a share that can be kept"),
        ("64,", {}, "keep='64,' has nothing on one side of a comma; write numbers such as 192,128,64"),
        (",", {}, "keep=',' has nothing on one side of a comma"),
        ("0,64", {}, "keep=0 must lie in 1..576"),
        ("577,64", {}, "keep=577 must lie in 1..576"),
        ("64,many", {}, "keep='many' is neither `all` nor a share such as 11% nor a whole number"),
        ("64,1.5", {}, "keep='1.5' is not a whole number"),
        (",".join(map(str, range(1, MOST_KEEPS + 2))), {}, "keep=1,2,3,4,5,6,7,8,9 names 9 keeps; one bundle holds at"),
        ("64,576", {"twin": True}, "keep=64,576 makes the unpruned twin itself; leave --twin out"),
        ("64,16", {"backend": "vulkan"}, "keep=64,16: backend vulkan makes graphs for one number of image tokens"),
        ("64,16", {"target": "ios"}, "keep=64,16: backend coreml makes graphs for one number of image tokens alone"),
        (
            "64,16",
            {"backend": "vision=qnn,text=xnnpack", "soc": "snapdragon-8-gen-3"},
            "keep=64,16: backend qnn makes graphs for one number of image tokens alone; give one keep, or take a "
            "backend that makes several in one bundle: xnnpack (android), onnx (android)",
        ),
        (
            "64,16",
            {"layout": "multimodal-runner"},
            "keep=64,16 does not go with layout=multimodal-runner, whose runtime knows one number of image tokens",
        ),
    ],
)
def test_refused_requests(keep: str, more: dict[str, Any], message: str, tmp_path: Path) -> None:
    words = {"model": "pocket", "target": "android", "output_dir": str(tmp_path / "out"), **more}
    with pytest.raises(PruneportError) as refused:
        plan(Request(keep=keep, **words))
    assert str(refused.value).startswith(message)
    assert refused.value.exit_code == 2
    assert not list(tmp_path.iterdir())


def test_plan_of_several(tmp_path: Path) -> None:
    def planned(keep: str, **more: Any) -> Any:
        return plan(Request(model="pocket", keep=keep, target="android", output_dir=str(tmp_path), **more))

    several, one = planned("192,all,64"), planned("64")
    assert several.bundle.name == "pocket-keep192-all-64-android-xnnpack"
    assert [(each.keep, each.spec is None) for each in several.bundle.keeps] == [(192, False), (576, True), (64, False)]
    assert [each.graph for each in several.bundle.keeps] == [f"vision_encoder_keep{keep}" for keep in (192, 576, 64)]
    assert (one.bundle.graphs, one.bundle.keeps[0].golden) == ((VISION_ENCODER,), "golden.safetensors")
    assert several.needs.ram_bytes == one.needs.ram_bytes, "weights are there once"
    assert several.needs.disk_bytes > one.needs.disk_bytes
    assert "192 or 576 or 64 of 576 image tokens kept" in describe(several)
    mixed = planned("64,16", backend="vision=onnx,text=xnnpack")
    assert mixed.recipe("vision_encoder_keep16").backend.name == "onnx"
    assert mixed.recipe("decoder_back").backend.name == "xnnpack"
    twin = planned("64,16", twin=True).twin
    assert twin is not None
    assert (twin.name, twin.graphs) == ("pocket-keepall-android-xnnpack", (VISION_ENCODER,))


def test_cells_of_a_sweep(tmp_path: Path) -> None:
    """A cell may be of several keeps; what a sweep leaves of its bundle are all reports."""
    (tmp_path / "matrix.yaml").write_text(
        "model: pocket\nkeep: ['64,16', 64]\nbackend: [onnx, vulkan]\nweights: random\n"
    )
    cells = plan_cells(
        read_matrix(tmp_path / "matrix.yaml"), tmp_path / "out", version="0", source="a", tell=lambda line: None
    )
    assert [cell.bundle for cell in cells] == [
        "pocket-keep64-16-android-onnx-random",
        "",
        "pocket-keep64-android-onnx-random",
        "pocket-keep64-android-vulkan-random",
    ]
    assert "backend vulkan makes graphs for one number of image tokens" in cells[1].refusal
    assert cells[0].job("a", None).flags[1] == "--keep=64,16"
    folder = cells[0].folder / cells[0].bundle
    folder.mkdir(parents=True)
    reports = [*REPORT_FILES, *(of_keep(name, keep) for name in REPORT_FILES for keep in (64, 16))]
    for name in (MANIFEST, *reports, "vision_encoder_keep64.onnx", "golden-keep16.safetensors"):
        (folder / name).write_text("x")
    cells[0].drop_graphs()
    assert {path.name for path in folder.iterdir()} == {MANIFEST, *reports}


# Manifests that contradict themselves


def _copy(bundle: Path, folder: Path) -> Path:
    return Path(shutil.copytree(bundle, folder / bundle.name))


@pytest.fixture
def several(tmp_path: Path) -> Callable[..., Path]:
    """A sample bundle whose manifest is made to say that it has two keeps, with changes to that."""

    def make(change: Callable[[dict[str, Any]], object] = lambda raw: None) -> Path:
        path = make_bundle(tmp_path / "sample", Sample(keep=4))
        raw = msgspec.json.decode((path / MANIFEST).read_bytes())
        (graph,) = raw["graphs"]
        raw["graphs"] = [{**graph, "name": f"vision_encoder_keep{keep}"} for keep in (4, 8)]
        shutil.copy(path / "golden.safetensors", path / "golden-keep8.safetensors")
        raw["files"]["golden-keep8.safetensors"] = raw["files"]["golden.safetensors"]
        raw["keeps"] = [
            {
                "prune": {**raw["prune"], "keep": keep},
                "graph": f"vision_encoder_keep{keep}",
                "golden": "golden.safetensors" if keep == 4 else "golden-keep8.safetensors",
            }
            for keep in (4, 8)
        ]
        change(raw)
        edit_manifest(path, **raw)
        return path

    return make


def test_manifest_of_several(several: Callable[..., Path]) -> None:
    bundle = read_bundle(several())
    assert bundle.keeps == (4, 8)
    assert bundle.at(8).manifest.golden.file == "golden-keep8.safetensors"
    assert len({view.identity for view in bundle.views} | {bundle.identity}) == 3
    with pytest.raises(BundleError, match="has no graph 'vision_encoder'; it has: vision_encoder_keep4, "):
        bundle.graph(VISION_ENCODER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["keeps"].pop(), "keeps lists [4]; it must be empty, or list two keeps or more"),
        (lambda raw: raw["keeps"].append(raw["keeps"][0]), "keeps lists [4, 8, 4]"),
        (lambda raw: raw["keeps"].reverse(), "prune and golden must be those of the first of keeps"),
        (lambda raw: raw["keeps"][1].update(graph="elsewhere"), "keeps names the graphs"),
        (lambda raw: raw["keeps"][1].update(graph="vision_encoder_keep4"), "keeps names the graphs"),
        (lambda raw: raw["keeps"][1].update(golden="golden.safetensors"), "two keeps have the same golden file"),
        (lambda raw: raw["keeps"][1].update(golden="../golden.safetensors"), "is not a plain relative path"),
        (lambda raw: raw["keeps"][1]["prune"].update(cut=0), "keeps differ in their cut, image_tokens or grid"),
        (lambda raw: raw["graphs"].append({**raw["graphs"][0], "name": VISION_ENCODER}), "but one for each keep"),
        (lambda raw: raw["files"].pop("golden-keep8.safetensors"), "does not list 'golden-keep8.safetensors'"),
    ],
)
def test_manifests_that_contradict_themselves(
    change: Callable[[dict[str, Any]], object], message: str, several: Callable[..., Path]
) -> None:
    path = several(change)
    with pytest.raises(BundleError) as refused:
        read_bundle(path)
    assert message in str(refused.value)


def test_manifests_from_before_are_read(tmp_path: Path) -> None:
    path = make_bundle(tmp_path / "sample", Sample())
    raw = msgspec.json.decode((path / MANIFEST).read_bytes())
    del raw["keeps"]
    (path / MANIFEST).write_bytes(msgspec.json.encode(raw))
    bundle = read_bundle(path)
    assert bundle.keeps == (4,)
    assert bundle.at(4) is bundle


def test_a_job_runs_one_keep(exported: Exported, tmp_path: Path) -> None:
    """On a device each keep is a run of its own, over the same files, and findings say which."""
    from tests.phones.machines import native_runner

    runner = native_runner() if exported.backend == "xnnpack" else None
    for keep in KEEPS:
        view = exported.bundle.at(keep)
        job, tensors = make_job(view)
        assert not {file for file in device_files(view) if "golden" in file or is_report(file)}
        received = HereDevice(runner=runner).collect(view, job, tensors, tmp_path / str(keep))
        assert received.file.answer is not None
        assert received.file.answer.image_tokens_after == keep
        assert judged_bundle(exported.bundle, received).keeps == (keep,)
        verdict = check(view, findings_of(exported.bundle, received))
        assert verdict.passed, verdict.failed_steps
        assert verdict.answer is not None
