"""cluster/slurm_sample.sh, unchanged, on a real SLURM of two nodes."""

import os
import re
import shlex
import sys
import time
from pathlib import Path

import pytest

from dit_scale import cli
from tests.support.cluster.slurm import WAIT_S, Slurm
from tests.support.tiny_run import write_run
from tests.support.tiny_vae import save_tiny_vae

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "cluster/slurm_sample.sh"
SMALL = ("--nodes=2", "--cpus-per-task=1", "--mem=1G", "--time=10")
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    top = tmp_path_factory.mktemp("slurm_sample")
    write_run(top / "run", save_tiny_vae(top / "vae"))
    return top / "run"


def arguments(run: Path, out: Path, num_images: int) -> list[str]:
    sizes = ["--images", str(num_images), "--tile", "2", "--steps", "4", "--device", "cpu"]
    return [str(run), *sizes, "--out", str(out)]


def submit(slurm: Slurm, out: Path, *words: str) -> int:
    options = [*SMALL, f"--output={out}-%j.log"]
    return slurm.submit(SCRIPT, *words, options=options, cwd=ROOT, environment=ENVIRONMENT)


def log(job: int, out: Path) -> str:
    return Path(f"{out}-{job}.log").read_text()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_documented_submissions_fit_a_real_cluster(slurm: Slurm) -> None:
    header = (ROOT / SCRIPT).read_text().partition("#SBATCH")[0].replace("\\\n#", "")
    lines = re.findall(r"^#   on .*?  (sbatch .*)$", header, re.MULTILINE)
    assert len(lines) == 2
    for line in lines:
        command, *words = shlex.split(line.replace("--nodes=4", "--nodes=2"))
        ran = slurm.run(command, "--test-only", *words, cwd=ROOT)
        assert ran.returncode == 0, ran.stderr
        begin = words.index(SCRIPT) + 1
        parsed = cli._parse(["sample", *words[begin:]])
        assert parsed.images >= 500


def test_near_its_time_limit_a_job_requeues_itself_and_resumes(
    slurm: Slurm, run: Path, tmp_path: Path
) -> None:
    """Two nodes share the images, and what is committed stays; the bytes are those of one process."""
    out = tmp_path / "samples"
    job = submit(slurm, out, *arguments(run, out, 300))
    until = time.monotonic() + WAIT_S
    while len(list((out / "parts").glob("[0-9]*.npz"))) < 6:
        assert time.monotonic() < until
        assert slurm.job(job)["JobState"] in ("PENDING", "RUNNING", "CONFIGURING"), log(job, out)
        time.sleep(0.02)
    assert slurm.run("scancel", "--signal=USR1", "--batch", str(job)).returncode == 0
    assert slurm.wait(job, "PENDING")[0] == "PENDING", log(job, out)
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "parts").glob("[0-9]*.npz")}
    assert 6 <= len(kept) < 150
    assert slurm.wait(job) == ("COMPLETED", 0), log(job, out)
    assert slurm.job(job)["Restarts"] == "1"
    assert "requeueing" in log(job, out)
    assert {f"worker {index} of 2" in log(job, out) for index in (0, 1)} == {True, False}
    assert cli.main(["sample", *arguments(run, tmp_path / "one", 300)]) == 0
    assert contents(out) == contents(tmp_path / "one")


def test_a_mistake_fails_the_job(slurm: Slurm, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples"
    job = submit(slurm, out, *arguments(run, out, 4), "--classes", "7")
    assert slurm.wait(job) == ("FAILED", 2), log(job, out)
    assert "class 7: expected 0 to 4" in log(job, out)
    assert not out.exists()
