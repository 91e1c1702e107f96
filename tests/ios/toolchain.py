"""Swift for the tests: Debian's own, unpacked into a root of its own in the user's cache, and run in there.

The root is entered in namespaces of its own: the checkout is mounted in it at /checkout, what else a command needs at
/exchange, and nothing of that is seen outside. Made once; later runs find it, and what they built, in the cache.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from tests.conftest import ROOT
from tests.phones.machines import CACHE, locked, made_once, need, other_debian, skip_unless_ci

RELEASE = "trixie"
NAME = f"swift-{RELEASE}-1"
# What is built, apart for each checkout: all of them lie at one path where the compiler sees them.
KEPT = CACHE / f"{NAME}-built" / hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]
# Swift's compiler only recommends C's headers and library, without which it cannot link.
PACKAGES = ("swiftlang", "libc6-dev", "libstdc++-14-dev")
VERSION = "Swift version 6.0.3"
# Debuggers, servers for editors and static libraries: a third of the whole.
LEFT_OUT = (
    "lldb*",
    "liblldb*",
    "libsourcekitdInProc*",
    "sourcekit-lsp",
    "clangd",
    "docc",
    "swift_static/*",
    "share/doc/*",
)
CHECKOUT, EXCHANGE, BUILT = "/checkout", "/exchange", "/built"
_MINUTES = 60.0


def _apt(words: list[str], env: Mapping[str, str]) -> None:
    done = subprocess.run(["apt-get", "-qq", *words], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        skip_unless_ci(f"needs Debian's {RELEASE} from the network: apt-get {words[0]} says {done.stderr[-300:]}")


def _unpack(folder: Path) -> None:
    """Fills a folder with the root. Skips where the machine cannot."""
    need("tar")
    apt, root = folder / "apt", folder / "root"
    env = other_debian(apt, RELEASE, alone=True)
    _apt(["update"], env)
    _apt(["-y", "--download-only", "install", *PACKAGES], env)
    for sub in ("usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "proc", "dev", "tmp", "checkout", "exchange", "built"):
        (root / sub).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    without = [f"--exclude={name}" for name in LEFT_OUT]
    for package in sorted((apt / "cache" / "archives").glob("*.deb")):
        with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as opened:
            tar = ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", *without, "-C", str(root)]
            subprocess.run(tar, stdin=opened.stdout, check=True)
        package.unlink()
    shutil.rmtree(apt)


# $1 is the root, $2 what is mounted at /exchange, $3 where builds are kept; the rest is run.
_ENTER = f"""
set -e
root=$1; exchange=$2; built=$3; shift 3
mount -t proc proc "$root/proc" 2>/dev/null || mount --rbind /proc "$root/proc"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
mount --bind "{ROOT}" "$root{CHECKOUT}"
mount --bind "$exchange" "$root{EXCHANGE}"
mount --bind "$built" "$root{BUILT}"
chroot=$(command -v chroot || echo /usr/sbin/chroot)
export HOME=/tmp PATH=/usr/libexec/swift/bin:/usr/bin
exec "$chroot" "$root" "$@"
"""


def _namespaces() -> list[str]:
    own = [] if os.geteuid() == 0 else ["-U", "-r"]
    return ["unshare", *own, "-m", "-p", "-f", "--kill-child"]


def run(
    *words: str, exchange: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs a program of the toolchain with `exchange` mounted at /exchange."""
    root = swift_root()
    with locked(f"{NAME}-run"):
        return _run(root, list(words), exchange, env or {})


def _run(
    root: Path, words: list[str], exchange: Path | None, env: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    KEPT.mkdir(parents=True, exist_ok=True)
    places = [str(root), str(exchange or KEPT), str(KEPT)]
    return subprocess.run(
        [*_namespaces(), "sh", "-c", _ENTER, "sh", *places, *words],
        env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=10 * _MINUTES,
    )


@cache
def swift_root() -> Path:
    """The root with Swift in it; skips where the machine cannot have one."""
    need("unshare")
    tried = subprocess.run(
        [*_namespaces(), "sh", "-c", "mount -t tmpfs tmpfs /tmp && test -e /proc/self/exe"],
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        skip_unless_ci(f"needs namespaces of its own and /proc (unshare, mount): {tried.stderr[-300:]}")
    with made_once(NAME) as folder:
        if folder is not None:
            _unpack(folder)
    root = CACHE / NAME / "root"
    told = _run(root, ["swift", "--version"], None, {})
    assert VERSION in told.stdout, told.stdout + told.stderr
    return root
