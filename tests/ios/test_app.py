"""The iOS app against stubs of Apple's frameworks, and the stubs against names that Apple's frameworks really have."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pruneport import __version__
from tests.conftest import ROOT
from tests.ios.toolchain import BUILT, CHECKOUT, KEPT, run
from tests.phones.machines import CACHE, need, skip_unless_ci

pytestmark = pytest.mark.slow

IOS = ROOT / "ios"
HERE = Path(__file__).parent
STUBS = HERE / "stubs"
# In the order in which they need each other.
MODULES = ("CoreML", "Darwin", "os", "UIKit", "SwiftUI", "PhotosUI", "ExecuTorch")
# Those with names in Objective-C or C, which can be looked up.
NAMED = ("CoreML", "Darwin", "os", "UIKit")
# The oldest system that the app runs on.
OLDEST = 18.0


def _compiled(*words: str) -> None:
    swift = ("swiftc", "-swift-version", "5", "-I", f"{BUILT}/stubs", "-I", f"{BUILT}/BenchCore/debug/Modules")
    done = run(*swift, *words)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "warning:" not in done.stderr, done.stderr[-4000:]


def _swift(folder: Path) -> list[str]:
    return [f"{CHECKOUT}/{path.relative_to(ROOT)}" for path in sorted(folder.glob("*.swift"))]


def test_the_app_fits_together() -> None:
    """With its tests, in Swift 5, without a warning, and isolated as Swift 6 wants it."""
    package = ("--package-path", f"{CHECKOUT}/ios/BenchCore", "--scratch-path", f"{BUILT}/BenchCore")
    done = run("swift", "build", *package)
    assert done.returncode == 0, done.stdout[-4000:]
    (KEPT / "stubs").mkdir(exist_ok=True)
    for name in MODULES:
        out = ("-o", f"{BUILT}/stubs/{name}.swiftmodule", f"{CHECKOUT}/tests/ios/stubs/{name}.swift")
        _compiled("-emit-module", "-parse-as-library", "-module-name", name, *out)
    app = ("-emit-module", "-parse-as-library", "-enable-testing", "-module-name", "Pruneport")
    strict = "-strict-concurrency=complete"
    _compiled(*app, strict, "-o", f"{BUILT}/stubs/Pruneport.swiftmodule", *_swift(IOS / "App"))
    _compiled("-typecheck", *_swift(IOS / "AppTests"))


def _declared(folder: Path) -> dict[str, float]:
    """Everything that the frameworks declare, `Class.member` or `function`, and since which system; 0 for always."""
    found: dict[str, float] = {}
    for file in sorted(folder.glob("*.d.ts")):
        holder, since, held = "", 0.0, 0.0
        for line in file.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"\s*\* @since ([\d.]+)", line):
                since = float(".".join(match[1].split(".")[:2]))
                continue
            if match := re.match(r"(?:declare class|interface|declare const enum) (\w+)", line):
                holder, held = match[1], since
                found[holder] = max(held, found.get(holder, 0.0)) if holder in found else held
            elif match := re.match(r"declare (?:function|var|const) (\w+)", line):
                found.setdefault(match[1], since)
            elif match := re.match(r"\t(?:static )?(?:readonly )?(\w+)\??\s*[(:=,<]|\t(\w+)$", line):
                found.setdefault(f"{holder}.{match[1] or match[2]}", max(since, held))
            elif line.startswith("}"):
                holder, held = "", 0.0
            if line.strip() and not line.lstrip().startswith(("*", "/*")):
                since = 0.0
    return found


@pytest.fixture(scope="module")
def declared() -> dict[str, float]:
    """What Apple's frameworks declare, from the npm package that package-lock.json pins."""
    folder = CACHE / "types-ios-9.1.2"
    if not folder.exists():
        need("npm")
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            partial = shutil.copytree(HERE / "types", Path(temporary) / "types")
            words = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(words, cwd=partial, capture_output=True, text=True, timeout=300, check=False)
            if done.returncode:
                skip_unless_ci(f"needs npm's packages from the network: {done.stderr[-300:]}")
            partial.rename(folder)
    found = _declared(folder / "node_modules" / "@nativescript" / "types-ios" / "lib" / "ios" / "objc-x86_64")
    assert len(found) > 50_000
    return found


def _stub_lines() -> Iterator[tuple[str, str]]:
    for name in NAMED:
        for number, line in enumerate((STUBS / f"{name}.swift").read_text().splitlines(), start=1):
            yield f"{name}.swift:{number}", line


def test_every_name_in_the_stubs_is_apples(declared: dict[str, float]) -> None:
    """A wrong belief that is written into a stub would pass the compiler."""
    checked = 0
    for place, line in _stub_lines():
        if re.match(r"\s*(?:@\w+ )*(?:public|case|extension|func|var) ?", line) and not line.startswith("import"):
            assert re.search(r"//[=-] \S", line), f"{place} names nothing to look it up by: {line}"
        if match := re.search(r"//= (\S+)$", line):
            assert match[1] in declared, f"{place}: there is no {match[1]}"
            assert declared[match[1]] <= OLDEST, f"{place}: {match[1]} needs iOS {declared[match[1]]}"
            checked += 1
    assert checked > 80


@pytest.mark.parametrize("name", ["MLModel.predictionFromFeaturesUsingStates", "MLModel.makeState", "UIDevice.celsius"])
def test_what_apple_lacks_is_not_found(declared: dict[str, float], name: str) -> None:
    assert name not in declared


def test_the_project_names_what_is_there() -> None:
    import yaml

    project = yaml.safe_load((IOS / "project.yml").read_text())
    app = project["targets"]["Pruneport"]
    assert app["settings"]["base"]["MARKETING_VERSION"] == __version__
    for target in project["targets"].values():
        assert all((IOS / source).is_dir() for source in target["sources"])
    assert (IOS / project["packages"]["BenchCore"]["path"] / "Package.swift").exists()
    # The version that the app tells is that of the branch that it is built from.
    version = app["info"]["properties"]["ExecuTorchVersion"]
    assert project["packages"]["ExecuTorch"]["branch"] == f"swiftpm-{version}"
    assert f'"executorch=={version}"' in (ROOT / "pyproject.toml").read_text()
    assert float(project["options"]["deploymentTarget"]["iOS"]) == OLDEST
    (plan,) = project["schemes"]["Pruneport"]["test"]["testPlans"]
    tests = json.loads((IOS / plan["path"]).read_text())["testTargets"]
    assert {test["target"]["name"] for test in tests} <= set(project["targets"])
