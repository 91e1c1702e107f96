"""The command line: verbs, flags, exit codes, what a dry run says, and how an export can be interrupted."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from export import cli, outcome
from export.request import Request, describe, nearest, plan
from pruning import ARITHMETICS, METHODS, Arithmetic, Features, PruneSpec, Trace
from pruning.method import Cuts, Need
from runtime.errors import NotYetError, OutputError, PruneportError, RequestError


def request(tmp_path: Path, **changes: str | bool | None) -> Request:
    fields: dict[str, str | bool | None] = {
        "model": "pocket",
        "keep": "64",
        "target": "android",
        "output_dir": str(tmp_path / "out"),
    }
    return Request(**{**fields, **changes})  # type: ignore[arg-type]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"], version="9.8.7") == 0
    assert capsys.readouterr().out == "pruneport 9.8.7\n"


def test_no_verb_prints_the_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([], version="0") == 0
    out = capsys.readouterr().out
    assert "export" in out
    assert "verify" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["exprot"],
            "unknown verb 'exprot', did you mean 'export'?; verbs are: export, verify, ask, serve, explain, sweep, "
            "eval, clean, device, report",
        ),
        (
            ["export", "--modle", "x"],
            "unknown argument '--modle', did you mean '--model'?; see pruneport export --help",
        ),
        (["export", "--kep=3"], "unknown argument '--kep', did you mean '--keep'?; see pruneport export --help"),
        (["export", "--model"], "argument --model: expected one argument; see pruneport export --help"),
        (["export"], "the following arguments are required: --model, --keep; see pruneport export --help"),
        (["verify"], "the following arguments are required: BUNDLE; see pruneport verify --help"),
        (["verify", "a", "b"], "unrecognized arguments: b; see pruneport --help"),
        (["verify", "a", "-v", "-q"], "-v and -q contradict each other; give one of them"),
    ],
)
def test_mistyped_lines_get_one_message(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv, version="0") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"pruneport: error: {message}\n"


def test_launcher_is_the_export_verb(root: Path) -> None:
    import subprocess
    import sys

    words = ["--model", "pokcet", "--keep", "64", "--target", "android"]
    spoken = [
        subprocess.run([sys.executable, *start, *words], cwd=root, capture_output=True, text=True, check=False)
        for start in (["export.py"], ["-m", "pruneport", "export"])
    ]
    assert [done.returncode for done in spoken] == [2, 2]
    assert spoken[0].stderr == spoken[1].stderr
    assert "did you mean 'pocket'" in spoken[0].stderr
    assert len(spoken[0].stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "lava-1.5-7b"}, "unknown model 'lava-1.5-7b', did you mean 'llava-1.5-7b'?; allowed: llava-1.5-7b,"),
        ({"target": "androd"}, "unknown target 'androd', did you mean 'android'?; allowed: android, ios"),
        ({"backend": "onx"}, "unknown android backend 'onx', did you mean 'onnx'?; allowed: xnnpack, vulkan, onnx"),
        ({"precision": "fp8"}, "unknown xnnpack precision 'fp8'"),
        (
            {"quant_vision": "8da8w", "precision": "fp16", "only": "vision"},
            "precision=fp16 does not go with quant_vision=8da8w",
        ),
        (
            {"quant_vision": "8da8w", "quant_text": "8da4w-g32", "precision": "fp16"},
            "precision=fp16 does not go with quant_vision=8da8w",
        ),
        ({"quant_text": "4da4w"}, "unknown xnnpack quant_text '4da4w'"),
        ({"quant_text": "int4"}, "unknown xnnpack quant_text 'int4'"),
        (
            {"quant_text": "8da4w", "backend": "onnx"},
            "unknown onnx quant_text '8da4w'; allowed: int4-g128, int4-g64, int4, int8, none",
        ),
        ({"quant_text": "int3", "backend": "onnx"}, "unknown onnx quant_text 'int3', did you mean 'int"),
        (
            {"quant_text": "int8", "backend": "onnx", "layout": "transformers.js"},
            "quant_text=int8 does not go with layout=transformers.js, which takes none, int4, ",
        ),
        ({"quant_text": "int4", "backend": "onnx", "only": "vision"}, "quant_text=int4 has nothing to quantise"),
        (
            {"quant_vision": "int8", "backend": "onnx", "layout": "transformers.js"},
            "quant_vision=int8 does not go with layout=transformers.js, which takes none; leave --quant-vision out",
        ),
        ({"quant_text": "8da8w", "only": "vision"}, "quant_text=8da8w has nothing to quantise"),
        ({"text_tokens": "191"}, "text_tokens=191 must lie in 192..1437 (pocket knows 2048 positions"),
        ({"text_tokens": "1438"}, "text_tokens=1438 must lie in 192..1437"),
        ({"text_tokens": "many"}, "text_tokens='many' is not a whole number"),
        ({"quant_vision": "4da4w"}, "unknown xnnpack quant_vision '4da4w'"),
        ({"cut": "6"}, "cut=6 must lie in 0..5 (the decoder layers of pocket that see every image token; 0 prunes"),
        ({"cut": "-1"}, "cut=-1 must lie in 0..5"),
        ({"cut": "tower"}, "cut='tower' is not a whole number"),
        ({"cut": "2", "layout": "multimodal-runner"}, "cut=2 does not go with layout=multimodal-runner"),
        ({"layout": "runner"}, "; allowed: pruneport, multimodal-runner, transformers.js"),
        (
            {"layout": "transformers.js"},
            "layout=transformers.js is not made by backend xnnpack; take --backend onnx, or leave --layout out",
        ),
        ({"target": "ios", "layout": "transformers.js"}, "unknown layout 'transformers.js'; allowed: pruneport"),
        ({"layout": "multimodal-runner", "only": "vision"}, "has nothing to lay out: no text graphs are made here"),
        ({"only": "visoin"}, "unknown part 'visoin', did you mean 'vision'?; allowed: vision"),
        ({"only": "text"}, "unknown part 'text'"),
        ({"keep": "0"}, "keep=0 must lie in 1..576 (the image tokens of pocket)"),
        ({"keep": "-3"}, "keep=-3 must lie in 1..576 (the image tokens of pocket)"),
        ({"keep": "577"}, "keep=577 must lie in 1..576 (the image tokens of pocket)"),
        ({"keep": "6e1"}, "keep='6e1' is not a whole number; it must lie in 1..576 (the image tokens of pocket)"),
        ({"keep": "64.0"}, "keep='64.0' is not a whole number"),
        ({"keep": ""}, "keep='' is not a whole number"),
        ({"keep": "٦٤"}, "keep='٦٤' is not a whole number"),
        ({"keep": "9" * 5000}, "keep=99999999999999999999 must lie in 1..576"),
        ({"keep": "none"}, "keep='none' is neither `all` nor a share such as 11% nor a whole number in 1..576"),
        ({"keep": "0%"}, "keep=0% is not a share that can be kept; a share lies above 0% and at most at 100%: write"),
        ({"keep": "101%"}, "keep=101% is not a share that can be kept; a share lies above 0% and at most at 100%"),
        ({"keep": "-5%"}, "keep=-5% is not a share that can be kept; a share lies above 0% and at most at 100%"),
        ({"keep": "11.5.3%"}, "keep='11.5.3%' is not a share of the image tokens; a share lies above 0% and at most"),
        ({"keep": "%"}, "keep='%' is not a share of the image tokens"),
        ({"keep": "nan%"}, "keep='nan%' is not a share of the image tokens"),
        ({"keep": "٦%"}, "keep='٦%' is not a share of the image tokens"),
        ({"keep": "9" * 5000 + "%"}, "keep='99999999999999999999' is not a share of the image tokens"),
        ({"keep": "11%%"}, "keep='11%%' is not a share of the image tokens"),
        ({"keep": "100%", "twin": True}, "keep=100% makes the unpruned twin itself; leave --twin out"),
        ({"seed": "abc"}, "seed='abc' is not a whole number; it must lie in 0..4294967295"),
        ({"seed": "-1"}, "seed=-1 must lie in 0..4294967295"),
        ({"keep": "all", "twin": True}, "keep=all makes the unpruned twin itself; leave --twin out"),
        ({"method": "unifrom"}, "unknown method 'unifrom', did you mean 'uniform'?; allowed: vlm-pruner, "),
        (
            {"method": "fastv"},
            "method=fastv chooses by the question, but a photo is pruned and prefilled before anybody",
        ),
        (
            {"method": "holov"},
            "method=holov cannot prune at cut=2; it can at 0..0: take --cut 0, or leave --method out",
        ),
        ({"method": "dart", "cut": "0"}, "method=dart cannot prune at cut=0; it can at 1 or more: take --cut 1"),
        ({"method": "uniform", "keep": "all"}, "method=uniform has nothing to choose: all image tokens are kept"),
        ({"weights": "/no/such/folder"}, "weights='/no/such/folder' does not exist; give a checkpoint folder"),
        ({"weights": ""}, "weights='' does not exist; give a checkpoint folder"),
    ],
)
def test_names_and_numbers_that_mean_nothing(changes: dict[str, str | bool], message: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught:
        plan(request(tmp_path, **changes))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "nnapi", "quant_vision": "8da8w"}, "quant_vision=8da8w: not yet on backend nnapi"),
    ],
)
def test_what_later_versions_will_do(changes: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(NotYetError) as caught:
        plan(request(tmp_path, **changes))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "pocket-keep64-android-xnnpack"),
        ({"keep": "all"}, "pocket-keepall-android-xnnpack"),
        ({"keep": "576"}, "pocket-keepall-android-xnnpack"),
        ({"keep": "100%"}, "pocket-keepall-android-xnnpack"),
        ({"keep": "11%"}, "pocket-keep63-android-xnnpack"),  # 63.36
        ({"keep": "12.5%"}, "pocket-keep72-android-xnnpack"),
        ({"keep": "0.08681%"}, "pocket-keep1-android-xnnpack"),  # 0.5 and a little
        ({"keep": "0.0001%"}, "pocket-keep1-android-xnnpack"),
        ({"keep": "192,11%", "backend": "onnx"}, "pocket-keep192-63-android-onnx"),
        ({"backend": "onnx"}, "pocket-keep64-android-onnx"),
        ({"backend": "onnx", "quant_text": "none"}, "pocket-keep64-android-onnx"),
        ({"backend": "onnx", "quant_text": "int8"}, "pocket-keep64-android-onnx-text-int8"),
        (
            {"backend": "onnx", "quant_text": "int4-g64", "layout": "transformers.js"},
            "pocket-keep64-android-onnx-text-int4-g64-transformers.js",
        ),
        ({"quant_vision": "8da8w"}, "pocket-keep64-android-xnnpack-8da8w"),
        ({"cut": "0"}, "pocket-keep64-android-xnnpack-cut0"),
        ({"cut": "2"}, "pocket-keep64-android-xnnpack"),
        ({"layout": "multimodal-runner"}, "pocket-keep64-android-xnnpack-multimodal-runner"),
        ({"layout": "multimodal-runner", "cut": "0"}, "pocket-keep64-android-xnnpack-multimodal-runner"),
        ({"cut": "0", "weights": "random"}, "pocket-keep64-android-xnnpack-cut0-random"),
        ({"method": "vlm-pruner"}, "pocket-keep64-android-xnnpack"),
        ({"method": "uniform", "quant_vision": "8da8w"}, "pocket-keep64-android-xnnpack-uniform-8da8w"),
    ],
)
def test_bundle_names_say_what_was_chosen(changes: dict[str, str], name: str, tmp_path: Path) -> None:
    planned = plan(request(tmp_path, **changes))
    assert planned.bundle.path == tmp_path / "out" / name
    assert (planned.bundle.spec is None) == ("keepall" in name)


@dataclass(frozen=True)
class OwnMethod:
    """A method of this test's own, which chooses nothing."""

    needs: frozenset[Need] = frozenset()
    cuts: Cuts = field(default_factory=Cuts)
    arithmetics: tuple[Arithmetic, ...] = ARITHMETICS
    name: str = "own"
    settings: type[object] = object

    def choose(self, features: Features, spec: PruneSpec) -> Trace:
        raise NotImplementedError

    def module(self, spec: PruneSpec, arithmetic: Arithmetic) -> nn.Module:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("method", "refusal", "message"),
    [
        (
            OwnMethod(needs=frozenset({"keys", "question"})),
            RequestError,
            "method=own chooses by the question, but a photo is pruned and prefilled before anybody asks about it; "
            "take one that chooses by the image alone: vlm-pruner, ",
        ),
        (
            OwnMethod(needs=frozenset({"attention"}), cuts=Cuts(most=0)),
            RequestError,
            "method=own cannot prune at cut=2; it can at 0..0: take --cut 0, or leave --method out",
        ),
        (
            OwnMethod(cuts=Cuts(most=0)),
            RequestError,
            "method=own cannot prune at cut=2; it can at 0..0",
        ),
        (OwnMethod(cuts=Cuts(least=3)), RequestError, "method=own cannot prune at cut=2; it can at 3 or more"),
        (
            OwnMethod(arithmetics=("float16",)),
            RequestError,
            "method=own has no form for engines that compute in float32, as xnnpack does: its choices take more bits; "
            "take another --backend, or one of: vlm-pruner, ",
        ),
    ],
)
def test_methods_that_no_export_can_hold(
    method: OwnMethod, refusal: type[PruneportError], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "own", method)
    with pytest.raises(refusal) as caught:
        plan(request(tmp_path, method="own"))
    assert message in str(caught.value)
    monkeypatch.setitem(METHODS, "own", OwnMethod())
    planned = plan(request(tmp_path, method="own", twin=True))
    assert planned.bundle.spec == PruneSpec(method="own")
    assert planned.twin is not None
    assert planned.twin.name == "pocket-keepall-android-xnnpack", "the twin is the same for every method"


def test_only_the_precision_that_is_not_the_default_is_named(tmp_path: Path) -> None:
    names = {plan(request(tmp_path, precision=precision)).bundle.path.name for precision in ("fp32", "fp16")}
    names.add(plan(request(tmp_path)).bundle.path.name)
    assert len(names) == 2


def test_default_precision_is_the_backends_but_for_small_models_and_quantised_towers(tmp_path: Path) -> None:
    def precision(**changes: str) -> str:
        return plan(request(tmp_path, weights="random", **changes)).vision.precision

    assert precision(model="llava-1.5-7b") == "fp32"
    assert precision(model="llava-1.5-7b", precision="fp16", quant_vision="none") == "fp16"
    assert precision(model="llava-1.5-7b", target="ios") == "fp16"
    assert precision(model="llava-1.5-7b", quant_vision="8da8w") == "fp32"
    assert precision(model="llava-1.5-7b", backend="onnx") == "fp32"
    assert precision(model="pocket") == "fp32"


@pytest.mark.parametrize(
    ("words", "graph", "expected"),
    [
        ({"quant_text": "none"}, "vision_encoder", ("fp32",)),
        ({"quant_text": "none", "precision": "fp16"}, "lm_head", ("fp16",)),
        ({"quant_text": "none", "quant_vision": "8da8w"}, "vision_encoder", ("8da8w",)),
        ({"quant_text": "none", "precision": "fp16", "quant_vision": "8da8w"}, "decoder_front", ("fp16",)),
        ({"quant_text": "8da4w-g32", "precision": "fp16"}, "decoder_back", ("8da4w-g32",)),
        ({"quant_text": "8da4w", "precision": "fp16"}, "token_embedding", ("int8",)),
        ({"quant_text": "none", "precision": "fp16"}, "token_embedding", ("fp16",)),
        # The decoder layers below the cut are in the vision graph, quantised as the text graphs.
        ({"quant_text": "8da4w", "precision": "fp16"}, "vision_encoder", ("fp16", "8da8w", "8da4w-g32")),
        ({"quant_text": "8da4w", "quant_vision": "8da8w"}, "vision_encoder", ("8da8w", "8da4w-g32")),
        # These are finer than the others, because the choice of tokens hangs on them.
        ({"quant_text": "8da4w"}, "decoder_front", ("8da8w", "8da4w-g32")),
        ({"quant_text": "8da4w"}, "decoder_back", ("8da4w",)),
        ({"quant_text": "8da8w"}, "decoder_front", ("8da8w",)),
        ({"backend": "onnx", "quant_text": "int4-g128"}, "decoder_front", ("int8", "int4-g64")),
        ({"backend": "webgpu", "quant_text": "int4-g128"}, "text_decoder", ("int4-g128", "int8", "int4-g64")),
        ({"backend": "webgpu", "quant_text": "int4-g128", "cut": "0"}, "text_decoder", ("int4-g128",)),
        ({"quant_text": "8da4w", "precision": "fp16", "cut": "0"}, "vision_encoder", ("fp16",)),
        ({"backend": "onnx", "quant_text": "int4"}, "vision_encoder", ("int8", "int4")),
        ({"backend": "onnx", "quant_text": "int4"}, "token_embedding", ("int8",)),
        ({"backend": "onnx", "quant_text": "int4", "quant_vision": "none"}, "vision_encoder", ("fp32", "int8", "int4")),
        ({"backend": "onnx", "quant_text": "none"}, "token_embedding", ("fp32",)),
        ({"backend": "onnx", "quant_text": "int4", "layout": "transformers.js"}, "vision_encoder", ("fp32",)),
        ({"backend": "onnx", "quant_text": "int4", "layout": "transformers.js"}, "embed_tokens", ("fp32",)),
        ({"backend": "onnx", "quant_text": "int4", "layout": "transformers.js"}, "decoder_model_merged", ("int4",)),
        # Core ML's packages share nothing: each graph is compressed by its own scheme.
        ({"target": "ios", "quant_text": "int4"}, "vision_encoder", ("fp16",)),
        ({"target": "ios", "quant_text": "int4", "quant_vision": "pal4"}, "vision_encoder", ("pal4",)),
    ],
)
def test_a_plan_says_what_each_graph_computes_in(
    words: dict[str, str], graph: str, expected: tuple[str, ...], tmp_path: Path
) -> None:
    planned = plan(request(tmp_path, model="llava-1.5-7b", weights="random", **words))
    assert planned.arithmetic(graph) == expected


@pytest.mark.parametrize("cut", ["2", "0"])
def test_text_of_large_models_is_quantised_by_default_on_two_backends(tmp_path: Path, cut: str) -> None:
    def quant_text(**changes: str) -> str | None:
        text = plan(request(tmp_path, weights="random", cut=cut, **changes)).text
        assert text is not None
        return text.scheme

    assert quant_text(model="llava-1.5-7b") == "8da4w"
    assert quant_text(model="llava-1.5-7b", backend="onnx") == "int4-g128"
    assert quant_text(model="llava-1.5-7b", backend="webgpu") is None
    assert quant_text(model="pocket") is None


def test_twin_is_planned_beside_the_bundle(tmp_path: Path) -> None:
    planned = plan(request(tmp_path, twin=True))
    assert [bundle.path.name for bundle in planned.bundles] == [
        "pocket-keepall-android-xnnpack",
        "pocket-keep64-android-xnnpack",
    ]
    assert planned.twin is not None
    assert planned.twin.spec is None


def test_existing_bundle_is_never_overwritten(tmp_path: Path) -> None:
    path = plan(request(tmp_path)).bundle.path
    path.mkdir(parents=True)
    (path / "mine.txt").write_text("keep me")
    with pytest.raises(OutputError, match="exists and is not overwritten"):
        plan(request(tmp_path))
    assert (path / "mine.txt").read_text() == "keep me"


def test_existing_twin_is_never_overwritten(tmp_path: Path) -> None:
    path = plan(request(tmp_path, keep="all")).bundle.path
    path.mkdir(parents=True)
    with pytest.raises(OutputError, match="keepall"):
        plan(request(tmp_path, twin=True))
    plan(request(tmp_path))


def test_output_under_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file, so no bundle can be put under it"):
        plan(request(tmp_path, output_dir=str(tmp_path / "file" / "deeper")))


def test_full_disk_is_noticed_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 4096, 4096))
    with pytest.raises(OutputError, match=r"has 0\.0 GiB free, the export needs about"):
        plan(request(tmp_path))


def test_needs_grow_with_the_model_and_shrink_with_precision(tmp_path: Path) -> None:
    pocket = plan(request(tmp_path)).needs
    large = plan(request(tmp_path, model="llava-1.5-7b", weights="random", precision="fp32")).needs
    half = plan(request(tmp_path, model="llava-1.5-7b", weights="random", precision="fp16")).needs
    assert pocket.ram_bytes < half.ram_bytes < large.ram_bytes
    # On XNNPACK fp32 stores what it can in float16, which the forecast must not count on.
    assert pocket.disk_bytes < half.disk_bytes < large.disk_bytes
    assert pocket.ram_available_bytes > 0


def test_dry_run_says_what_it_would_make_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    words = ["--model", "llava-1.5-7b", "--keep", "64", "--target", "android", "--twin", "--weights", "random"]
    assert cli.main(["export", *words, "--output-dir", str(out), "--dry-run"], version="0") == 0
    text = capsys.readouterr().out
    assert str(out / "llava-1.5-7b-keep64-android-xnnpack-random") in text
    assert str(out / "llava-1.5-7b-keepall-android-xnnpack-random") in text
    assert "64 of 576 image tokens kept before decoder layer 2, chosen by vlm-pruner" in text
    assert "RAM about" in text
    assert "disk about" in text
    assert list(tmp_path.iterdir()) == []


def test_plan_describes_each_source_of_weights(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    assert "random, seed 7" in describe(plan(request(tmp_path, weights="random", seed="7")))
    assert str(folder) in describe(plan(request(tmp_path, weights=str(folder))))
    assert "the hub: llava-hf/llava-1.5-7b-hf" in describe(plan(request(tmp_path, model="llava-1.5-7b")))


def test_nearest_is_silent_when_nothing_is_near() -> None:
    assert nearest("zzz", ["android", "ios"]) == ""


def test_every_error_ends_with_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def every(base: type[PruneportError]) -> list[type[PruneportError]]:
        return [base, *(sub for child in base.__subclasses__() for sub in every(child))]

    for kind in every(PruneportError):

        def fail(argv: object, optimum: bool, kind: type[PruneportError] = kind) -> None:
            raise kind("what, got, allowed, next step")

        monkeypatch.setattr(cli, "parse", fail)
        assert cli.main([], version="0") == 2
        assert capsys.readouterr().err == "pruneport: error: what, got, allowed, next step\n"


def test_forecast_of_memory_covers_what_was_measured(root: Path, tmp_path: Path) -> None:
    """No export that was measured at full width needed more than the plan said, nor much less."""
    measured = sorted((root / "benchmarks" / "results").glob("export_memory-*.json"))
    assert measured
    for file in measured:
        result = json.loads(file.read_text(encoding="utf-8"))
        words = result["command"].split()
        flags = {flag.removeprefix("--"): value for flag, value in pairwise(words) if flag.startswith("--")}
        needs = plan(
            request(
                tmp_path, **{name: flags[name] for name in ("model", "weights", "precision", "only") if name in flags}
            )
        ).needs
        # Timing runs resets the mark that a process reports at its end, so that loading was measured by itself.
        peak_bytes = max(result["peak_rss_kib"], result["peak_rss_of_loading_kib"]) * 1024
        assert peak_bytes <= needs.ram_bytes <= 1.2 * peak_bytes, file.name


def test_next_command_is_one_line_to_copy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """However narrow the terminal, and with no markup read from a path."""
    monkeypatch.setattr("runtime.report.terminal_table", lambda bundle, verdict: "table")
    monkeypatch.setenv("COLUMNS", "40")
    command = "pruneport verify bundles/[red]a-bundle-with-a-long-name-in-a-narrow-terminal"
    nothing: Any = None
    outcome.show(nothing, nothing, next_command=command)
    assert capsys.readouterr().out == f"table\nnext: {command}\n"
