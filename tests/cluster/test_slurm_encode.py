"""cluster/slurm_encode_latents.sh, unchanged, on a real SLURM of two nodes."""

import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dit_scale.config import EncodeConfig, load
from dit_scale.storage import open_storage
from dit_scale_pipeline import output
from dit_scale_pipeline.decoder import read_batch
from dit_scale_pipeline.encoder import Encoder
from dit_scale_pipeline.job import make_plan
from dit_scale_pipeline.shards_writer import write_shard
from tests.support.cluster.slurm import START_S, WAIT_S, Slurm
from tests.support.tiny_vae import save_tiny_vae

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "cluster/slurm_encode_latents.sh"
CONFIG = """\
image_size: 32
shard_samples: 2
vae_batch: 2
device: cpu
encoders: 2
# two do not fit on a node of one CPU: both nodes must have joined
cpus_per_encoder: 0.6
cpus_per_decoder: 0.2
decoders: 1
"""
SMALL = ("--nodes=2", "--cpus-per-task=1", "--gpus-per-node=1", "--mem=1G", "--time=10")
"""A request that leaves room for another job on the same nodes."""
NUM_SHARDS = 60
ENVIRONMENT = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def processes(output: Path) -> dict[str, dict[str, str]]:
    """Return command line => environment of the running processes of the job that writes this output."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            lines = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            if f"DIT_SCALE_TEST={output}" in lines:
                command = (folder / "cmdline").read_text().replace("\0", " ")
                found[command] = dict(line.split("=", 1) for line in lines if "=" in line)
        except OSError:
            continue
    return found


def client_server(output: Path) -> str:
    """Return the command line of the Ray client server, which starts with the head of a job's cluster."""
    until = time.monotonic() + WAIT_S
    while not (found := [line for line in processes(output) if "ray.util.client.server" in line]):
        assert time.monotonic() < until
        time.sleep(0.1)
    return found[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small images in three classes, a tiny VAE, a configuration."""
    top = tmp_path_factory.mktemp("slurm_encode")
    draws = np.random.default_rng(0)
    for number in range(2 * NUM_SHARDS):
        path = top / f"images/n{number % 3}/{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (32, 40, 3), dtype=np.uint8)).save(path)
    save_tiny_vae(top / "vae")
    (top / "config.yaml").write_text(CONFIG)
    return top


def arguments(folder: Path, output: Path) -> list[str]:
    paths = [f"source={folder}/images", f"vae={folder}/vae", f"output={output}"]
    return ["--config", str(folder / "config.yaml"), *paths]


def submit(slurm: Slurm, folder: Path, output: Path, *overrides: str) -> int:
    return slurm.submit(
        SCRIPT,
        *arguments(folder, output),
        *overrides,
        options=[*SMALL, f"--output={output}-%j.log"],
        cwd=ROOT,
        environment=ENVIRONMENT | {"DIT_SCALE_TEST": str(output)},
    )


def log(job: int, output: Path) -> str:
    return Path(f"{output}-{job}.log").read_text()


def shards(output: Path) -> dict[str, int]:
    """Return the files of finished shards and when they were written."""
    done = {mark.stem for mark in (output / "shards").glob("*.json")}
    return {p.name: p.stat().st_mtime_ns for p in (output / "shards").glob("*") if p.stem in done}


def wait_for_shards(slurm: Slurm, job: int, output: Path) -> None:
    """Wait until some shards are finished, but not most of them."""
    while len(shards(output)) < 6:
        state = slurm.job(job)["JobState"]
        assert state in ("PENDING", "RUNNING", "CONFIGURING"), log(job, output)
        time.sleep(0.02)


def objects(output: Path) -> list[str]:
    """Check that the data set is complete and that a killed writer left nothing."""
    storage = open_storage(output)
    assert list(storage.leftovers("shards/")) == []
    keys = [key for key, _ in storage.list()]
    return sorted(key for key in keys if key.startswith("shards/") or key == "dataset.json")


def assert_same_files(output: Path, reference: Path) -> None:
    """Compare the objects of two data sets byte for byte, except the journal and the metrics."""
    names = objects(reference)
    assert len(names) == 3 * NUM_SHARDS + 1
    assert objects(output) == names
    for name in names:
        assert (output / name).read_bytes() == (reference / name).read_bytes(), name


def assert_nothing_is_left(job: int, output: Path) -> None:
    """Check that no process of the job and no folder of its Ray cluster is left."""
    until = time.monotonic() + START_S
    while (left := processes(output)) and time.monotonic() < until:
        time.sleep(0.1)
    assert left == {}
    assert list(Path("/tmp").glob(f"ds-{job}-*")) == []


@pytest.fixture(scope="module")
def reference(folder: Path) -> Path:
    """A data set made by a plain loop in this process, without Ray."""
    config = load(EncodeConfig, folder / "config.yaml", arguments(folder, folder / "reference")[2:])
    plan = make_plan(config, None, Console(quiet=True))
    encoder = Encoder(config, plan.vae, "cpu")
    runtime = encoder.runtime()
    claimed = output.claim(open_storage(config.output), {**plan.identity, **runtime}, plan.listing)
    records = []
    for name, rows in plan.shards.items():
        entries = plan.listing.entries(rows)
        pixels, account = read_batch(config.source, plan.listing.kind, entries, config.image_size)
        moments = encoder.encode(pixels, runtime)
        channels = plan.vae.latent_channels
        records.append(write_shard(config.output, name, [account], channels, moments))
    storage = open_storage(config.output)
    output.commit(storage, config, plan.listing, vae=plan.vae, stored=claimed, records=records)
    return folder / "reference"


def test_the_real_request_fits_a_real_cluster(slurm: Slurm) -> None:
    """On two nodes of 64 CPUs and 8 GPUs the shipped request fits, and an impossible request is refused."""
    assert slurm.run("sbatch", "--test-only", SCRIPT, cwd=ROOT).returncode == 0
    for too_much in ("--nodes=3", "--gpus-per-node=9", "--cpus-per-task=65"):
        ran = slurm.run("sbatch", "--test-only", too_much, SCRIPT, cwd=ROOT)
        assert "Requested node configuration is not available" in ran.stderr


@pytest.mark.long
def test_a_cancelled_job_does_not_affect_another_on_the_same_nodes(
    slurm: Slurm, folder: Path, reference: Path, tmp_path: Path
) -> None:
    output, other_output = tmp_path / "set", tmp_path / "other"
    job = submit(slurm, folder, output)
    other = submit(slurm, folder, other_output, "shard_samples=1", "vae_batch=1")
    # the client server's port is the only one with a default, and it fails when another user has it
    clients = [client_server(written) for written in (output, other_output)]
    wait_for_shards(slurm, other, other_output)
    living = processes(other_output)
    raylets = {line: env for line, env in living.items() if line.split(" ")[0].endswith("/raylet")}
    assert slurm.run("scancel", str(other)).returncode == 0
    assert slurm.wait(other)[0] == "CANCELLED"
    assert_nothing_is_left(other, other_output)
    assert slurm.wait(job) == ("COMPLETED", 0), log(job, output)
    assert_same_files(output, reference)
    assert_nothing_is_left(job, output)

    ports = {int(line.partition("--port=")[2].split()[0]) for line in clients}
    assert len(ports) == 2
    assert min(ports) >= 20000
    assert sorted(env["SLURMD_NODENAME"] for env in raylets.values()) == ["node1", "node2"]
    for line, env in raylets.items():
        resources = line.partition("--static_resource_list=")[2].split()[0].split(",")
        assert [resources[resources.index(kind) + 1] for kind in ("CPU", "GPU")] == ["1", "1"], resources
        assert len(env["CUDA_VISIBLE_DEVICES"]) == 1
        assert env["RAY_AUTH_MODE"] == "token"
        assert len(env["RAY_AUTH_TOKEN"]) == 64
        assert env["RAY_AUTH_TOKEN"] not in log(other, other_output)


def test_near_its_time_limit_a_job_requeues_itself_and_keeps_its_shards(
    slurm: Slurm, folder: Path, reference: Path, tmp_path: Path
) -> None:
    output = tmp_path / "set"
    job = submit(slurm, folder, output)
    wait_for_shards(slurm, job, output)
    assert slurm.run("scancel", "--signal=USR1", "--batch", str(job)).returncode == 0
    assert slurm.wait(job, "PENDING")[0] == "PENDING", log(job, output)
    assert_nothing_is_left(job, output)
    kept = shards(output)
    assert 0 < len(kept) < 3 * NUM_SHARDS
    assert slurm.wait(job) == ("COMPLETED", 0), log(job, output)
    assert slurm.job(job)["Restarts"] == "1"
    assert "requeueing" in log(job, output)
    now = shards(output)
    assert {name: now[name] for name in kept} == kept
    assert_same_files(output, reference)
    assert_nothing_is_left(job, output)


def test_a_configuration_error_fails_the_job(slurm: Slurm, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "set"
    options = ["--nodes=1", *SMALL[1:], f"--output={output}-%j.log"]
    words = [*arguments(folder, output), "shard_sample=2"]
    variables = ENVIRONMENT | {"DIT_SCALE_TEST": str(output)}
    job = slurm.submit(SCRIPT, *words, options=options, cwd=ROOT, environment=variables)
    elsewhere = slurm.submit(ROOT / SCRIPT, options=options, cwd=tmp_path)
    assert slurm.wait(elsewhere) == ("FAILED", 2)
    assert "submit from the root of the project" in log(elsewhere, output)
    assert slurm.wait(job) == ("FAILED", 2)
    assert "unknown key 'shard_sample'; did you mean 'shard_samples'?" in log(job, output)
    assert_nothing_is_left(job, output)
