"""The image of cluster/Dockerfile for tests, and the podman that builds and runs it."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.needs import needs
from tests.support.speed import scaled

ROOT = Path(__file__).resolve().parents[3]
PROGRAMS = {
    "podman": "podman netavark aardvark-dns catatonit",
    "runc": "runc",
    "iptables": "iptables",
    "tini": "tini",
}
"""Program => the Debian packages to install where it is missing."""
RUNTIME = ("bash", "libstdc++6", "passwd", "python3", "tini")
"""The Dockerfile's Debian packages that its build and pods without a GPU need."""
BASE = "localhost/dit-scale-test-base"
IMAGE = f"localhost/dit-scale-test:{hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]}"
"""A tag for this checkout, because others may be tested at the same time."""
IMAGE_VARIABLE = "DIT_SCALE_TEST_IMAGE"
"""An image built with its packages. Without it, an image is built that uses those of this environment."""
WAIT_S = scaled(400.0)

_LEFT_OUT = re.compile(r"/\.$|/root$|/usr/share/(doc|info|lintian|locale|man)/")


class PodError(Exception):
    """A podman command or a pod failed."""


def podman(*arguments: str, stdin: str | None = None) -> str:
    """Run a podman command and return its output."""
    ran = subprocess.run(
        ["podman", *arguments],
        input=stdin,
        env=os.environ | {"CONTAINERS_CONF": str(Path(__file__).with_name("containers.conf"))},
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )
    if ran.returncode:
        raise PodError(f"podman {' '.join(arguments)}: {ran.stderr[-2000:]}")
    return ran.stdout.strip()


def build_image() -> str:
    """Build the image of cluster/Dockerfile on a slice of this machine, with this environment's packages.

    Skips the test where a program is missing, and fails it where DIT_SCALE_REQUIRE_ALL is 1.
    """
    missing = [packages for program, packages in PROGRAMS.items() if not shutil.which(program)]
    needs(not missing, f"podman and its helpers: apt-get install {' '.join(missing)}")
    needs(os.geteuid() == 0, "root, for pods on a separate network")
    if image := os.environ.get(IMAGE_VARIABLE):
        return image
    if not podman("images", "--quiet", BASE):
        _make_base()
    with tempfile.TemporaryDirectory() as folder:
        programs = Path(folder) / "opt/venv/bin"
        programs.mkdir(parents=True)
        for program in (Path(sys.prefix) / "bin").iterdir():
            (programs / program.name).symlink_to(program)
        podman(
            *("build", "--network=none", "--pull=never", "--file", str(ROOT / "cluster/Dockerfile")),
            *("--build-arg", f"BASE={BASE}", "--build-arg", f"DEBIAN={' '.join(RUNTIME)}"),
            *("--build-context", f"packages={folder}", "--tag", IMAGE, str(ROOT)),
        )
    return IMAGE


def _make_base() -> None:
    """Copy this machine's essential Debian packages, and RUNTIME, with dependencies: seconds, offline.

    A debootstrap takes a minute, and its Python may have another version than this one.
    """
    needs(shutil.which("apt-cache") is not None, f"a Debian, or {IMAGE_VARIABLE}")
    form = "--showformat=${db:Status-Status} ${Package} ${Essential}\n"
    rows = [line.split() for line in _lines("dpkg-query", "--show", form)]
    installed = {name: essential == "yes" for status, name, essential in rows if status == "installed"}
    wanted = [*RUNTIME, *(name for name, essential in installed.items() if essential)]
    listed = _lines("apt-cache", "depends", "--recurse", "--installed", "--important", *wanted)
    packages = installed.keys() & set(listed)
    paths = {"/etc/passwd", "/etc/group", "/etc/ld.so.cache", "/var/lib/dpkg/status"}
    paths |= {f"/{name}" for name in ("bin", "sbin", "lib", "lib64")}
    for path in map(Path, _lines("dpkg-query", "--listfiles", *sorted(packages))):
        if path.is_absolute() and not _LEFT_OUT.search(str(path)):
            paths.add(os.path.join(os.path.realpath(path.parent), path.name))  # /bin is /usr/bin
    names = "\0".join(sorted(path[1:] for path in paths if os.path.lexists(path)))
    with tempfile.NamedTemporaryFile(suffix=".tar") as tar:
        command = ["tar", "-C", "/", "--no-recursion", "--null", "--files-from=-", "-cf", tar.name]
        subprocess.run(command, input=names, text=True, check=True)
        podman("import", tar.name, BASE)


def _lines(*command: str) -> list[str]:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def environment_folders() -> list[str]:
    """Return the folders of this environment and its interpreter, for pods of an image without them."""
    if IMAGE_VARIABLE in os.environ:
        return []
    return [path for path in dict.fromkeys((sys.prefix, sys.base_prefix)) if path != "/usr"]
