"""Manifests as `kubectl kustomize` renders them."""

import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.support.needs import needs

ROOT = Path(__file__).resolve().parents[3]
KUBERNETES = ROOT / "cluster/kubernetes"
OVERLAYS = KUBERNETES / "overlays"


def render(folder: Path) -> list[dict[str, Any]]:
    """Return all objects of a folder."""
    needs(shutil.which("kubectl") is not None, "kubectl")
    ran = subprocess.run(
        ["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return list(yaml.safe_load_all(ran.stdout))
