"""The encoding job as users run it: alone and on a cluster, to disk and S3, interrupted and resumed."""

import gc
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dit_scale import cli
from dit_scale.data.shards import LatentDataset, read_info
from dit_scale.storage import open_storage
from dit_scale_pipeline.inputs.saved import load_listing
from tests.support.bare import bare_python
from tests.support.encoding import ROOT, SCRIPT, clean_environment, job_command, objects, write_images
from tests.support.faults.ports import free_port
from tests.support.faults.proxy import FaultProxy
from tests.support.faults.ray_nodes import marked_processes
from tests.support.latents import edit_info
from tests.support.s3 import BUCKET, s3_server
from tests.support.speed import scaled
from tests.support.tiny_vae import save_tiny_vae

pytestmark = pytest.mark.pipeline

RAY = str(Path(sys.executable).with_name("ray"))
CONFIG = """\
image_size: 32
shard_samples: 8
vae_batch: 4
max_quarantined: 0.2
allow_empty_classes: true
cpus_per_encoder: 0.5
decoders: 1
encoders: 1
"""
DAMAGED = b"damag\xe9d.jpg"
ENCODER = ("ray::Encoder", "ray::encode")
"""Names of an encoder's process, idle and working."""
MARK = f"dit-scale-test-{uuid.uuid4().hex}"
ENVIRONMENT = clean_environment(DIT_SCALE_TEST=MARK)
"""Environment of every process that these tests start."""
HANGS_S = scaled(600.0)
"""Timeout far above the duration of any step here."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in three classes and an empty one; a damaged, a truncated and a foreign file; a tiny VAE.

    The name of the damaged file is not UTF-8. What a Mac leaves is no part of it.
    """
    top = tmp_path_factory.mktemp("encode")
    write_images(top / "images", 36)
    (top / "images/empty").mkdir()
    (top / f"images/n0/{os.fsdecode(DAMAGED)}").write_bytes(b"no picture")
    (top / "images/__MACOSX").mkdir()
    for left in ("n0/.DS_Store", "n1/._001.png", "__MACOSX/._n0"):
        (top / "images" / left).write_bytes(b"no picture")
    (top / "images/n1/notes.jpg").write_text("no picture either")
    whole = (top / "images/n2/005.JPEG").read_bytes()
    (top / "images/n2/truncated.jpg").write_bytes(whole[: len(whole) // 2])
    save_tiny_vae(top / "vae")
    (top / "config.yaml").write_text(CONFIG)
    return top


def arguments(folder: Path, output: str | Path, *overrides: str) -> list[str]:
    paths = [f"source={folder}/images", f"vae={folder}/vae", f"output={output}"]
    return ["--config", str(folder / "config.yaml"), *paths, *overrides]


def start(
    folder: Path, output: str | Path, *overrides: str, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start the script in its own session, like a terminal."""
    return subprocess.Popen(
        job_command(*arguments(folder, output, *overrides)),
        env=environment or ENVIRONMENT,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def encode(folder: Path, output: str | Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    job = start(folder, output, *overrides)
    stdout, stderr = job.communicate(timeout=HANGS_S)
    return subprocess.CompletedProcess(job.args, job.returncode, stdout, stderr)


def wait_until(there: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait until the condition holds; the process must stay alive."""
    end_s = time.monotonic() + HANGS_S
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end_s
        time.sleep(0.05)


@pytest.fixture(scope="module")
def first_try(folder: Path) -> subprocess.CompletedProcess[str]:
    """An attempt that fails near the end, because it allows only two quarantined inputs.

    By then at least two shards are done: of the batches before the last one at most three are under way in
    front of the encoder and in it, and it is not begun while two shards are being written.
    """
    return encode(folder, "latents", "max_quarantined=0.052")


@pytest.fixture(scope="module")
def kept(first_try: subprocess.CompletedProcess[str], folder: Path) -> dict[str, int]:
    """Files of the shards finished by the first attempt, with their modification times."""
    shards = folder / "latents/shards"
    done = [mark.stem for mark in shards.glob("*.json")]
    return {path.name: path.stat().st_mtime_ns for path in shards.iterdir() if path.stem in done}


@pytest.fixture(scope="module")
def latents(kept: dict[str, int], folder: Path) -> Path:
    """The data set finished by the second attempt, with leftovers of a killed writer."""
    (folder / "latents/shards/.00003.tar.0123456789abcdef.tmp").write_bytes(b"half a shard")
    ran = encode(folder, "latents")
    assert ran.returncode == 0, ran.stderr
    return folder / "latents"


@pytest.fixture(scope="module")
def s3() -> Iterator[tuple[FaultProxy, dict[str, str]]]:
    """A proxy to an S3 server, and the environment that selects it."""
    with s3_server() as environment:
        with FaultProxy(int(environment["AWS_ENDPOINT_URL"].rpartition(":")[2])) as proxy:
            yield proxy, environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}


@pytest.fixture(scope="module")
def cluster(
    s3: tuple[FaultProxy, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """Start a Ray head on loopback that can reach the S3 server; yield the environment of its drivers.

    The project is not installed for the Python of the head and its workers: they get it from the driver.
    """
    python = bare_python(tmp_path_factory.mktemp("bare"))
    address, dashboard = f"127.0.0.1:{free_port()}", free_port()
    environment = ENVIRONMENT | s3[1] | {"RAY_USAGE_STATS_ENABLED": "0"}
    # Ray's sockets lie in its folder, and a socket's path must be short.
    temporary = Path("/tmp") / f"ray-{uuid.uuid4().hex[:8]}"
    command = [str(python), "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=3"]
    command += ["--node-ip-address=127.0.0.1", f"--port={address.rpartition(':')[2]}"]
    command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--temp-dir={temporary}"]
    # the defaults of these may be taken by another Ray
    command += [f"--dashboard-agent-listen-port={free_port()}", f"--ray-client-server-port={free_port()}"]
    bare = environment | {"PATH": f"{python.parent}:{environment['PATH']}"}
    bare.pop("PYTHONPATH", None)
    head = subprocess.Popen(command, env=bare, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_until(lambda: listens(dashboard), head)
        yield environment | {"RAY_ADDRESS": address, "DASHBOARD": f"http://127.0.0.1:{dashboard}"}
    finally:
        head.terminate()
        head.communicate(timeout=HANGS_S)
        shutil.rmtree(temporary, ignore_errors=True)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_too_many_bad_inputs_stop_the_job_and_keep_what_was_done(
    first_try: subprocess.CompletedProcess[str], kept: dict[str, int], folder: Path
) -> None:
    assert first_try.returncode == 2
    assert "max_quarantined=0.052 allows 2" in first_try.stderr
    assert "n1/notes.jpg (not an image in a known format)" in first_try.stderr
    wrong = ", ".join(f"shards/0000{shard}.*" for shard in (1, 3, 4))
    assert f"delete their shards, if they exist ({wrong})" in first_try.stderr
    assert "Traceback" not in first_try.stderr
    assert len(kept) >= 2 * 3
    assert not (folder / "latents/dataset.json").exists()


def test_a_second_start_makes_no_shard_again(latents: Path, kept: dict[str, int]) -> None:
    now = {path.name: path.stat().st_mtime_ns for path in (latents / "shards").iterdir()}
    assert {name: now[name] for name in kept} == kept
    assert set(now) == {f"0000{shard}.{kind}" for shard in range(5) for kind in ("tar", "idx", "json")}


def test_a_start_after_the_end_does_nothing(latents: Path, folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in latents.rglob("*")}
    ran = encode(folder, "latents")
    assert ran.returncode == 0
    assert "complete, nothing to do" in ran.stderr
    assert "36 samples of 4 classes in 5 shards" in ran.stdout
    assert {path: path.stat().st_mtime_ns for path in latents.rglob("*")} == before


def test_another_configuration_is_refused_by_name(latents: Path, folder: Path) -> None:
    ran = encode(folder, "latents", "vae_batch=8", "image_size=64")
    assert ran.returncode == 2
    assert "image_size: 32 in the output, 64 now\n  vae_batch: 4 in the output, 8 now\n" in ran.stderr
    assert "shard_samples" not in ran.stderr


def test_what_dataset_json_says(latents: Path, folder: Path) -> None:
    info = read_info(open_storage(latents))
    assert info.latent_shape == (2, 8, 4, 4)
    assert info.class_names == ("empty", "n0", "n1", "n2")
    assert (info.samples, info.source.count) == (36, 39)
    assert [(item.path, item.reason.split(":")[0]) for item in info.quarantined] == [
        (r"n0/damag\xe9d.jpg", "not an image in a known format"),
        ("n1/notes.jpg", "not an image in a known format"),
        ("n2/truncated.jpg", "cannot be decoded"),
    ]
    assert [shard.samples for shard in info.shards] == [8, 7, 8, 7, 6]
    left_out = ("__MACOSX/", "n0/.DS_Store", "n1/._001.png")
    saved = load_listing(open_storage(latents))
    assert saved is not None
    assert (saved.ignored, f"n0/{os.fsdecode(DAMAGED)}" in saved.paths) == (left_out, True)
    text = (latents / "dataset.json").read_text()
    assert text.count(str(folder)) == 1, "the source's uri is the only path"


def test_latents_are_those_of_the_image_and_of_its_mirror(latents: Path, folder: Path) -> None:
    import torch

    from dit_scale import vae
    from dit_scale.data.pixels import center_crop, decode, to_array
    from dit_scale_pipeline.inputs import open_input

    entry = open_input(str(folder / "images")).list().entries()[3]
    pixels = to_array(center_crop(decode((folder / "images" / entry.path).read_bytes()), 32))
    model = vae.load(str(folder / "vae"))
    moments, label = LatentDataset.open(latents).read(3)
    assert label == entry.label == 1
    for view, image in enumerate((pixels, pixels[:, ::-1])):
        x_13HW = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255 * 2 - 1
        expected = model.encode(x_13HW)[0].numpy()
        assert np.abs(moments[view].astype(np.float32) - expected).max() < 2e-3
    flipped = moments[0, :, :, ::-1].astype(np.float32)
    assert np.abs(moments[1].astype(np.float32) - flipped).max() > 1e-2, "encoded, not flipped"


def test_the_tar_of_class_tars_gives_the_shards_of_its_folders(
    latents: Path, folder: Path, tmp_path: Path
) -> None:
    with tarfile.open(tmp_path / "train.tar", "w") as outer:
        for images in sorted((folder / "images").iterdir()):
            with tarfile.open(tmp_path / f"{images.name}.tar", "w") as inner:
                for image in images.iterdir():
                    inner.add(image, image.name)
            outer.add(tmp_path / f"{images.name}.tar", f"{images.name}.tar")
    for starts in range(2):
        ran = encode(folder, tmp_path / "set", f"source={tmp_path}/train.tar")
        assert ran.returncode == 0, ran.stderr
        assert "39 images of 4 classes in 1 archives: imagenet_tar" in ran.stderr
        assert ("complete, nothing to do" in ran.stderr) == bool(starts)
    expected, found = objects(latents), objects(tmp_path / "set")
    assert {key for key in expected if found[key] != expected[key]} == {"dataset.json", "listing.safetensors"}
    there, here = read_info(open_storage(latents)), read_info(open_storage(tmp_path / "set"))
    assert here.source.kind == "imagenet_tar"
    assert here.model_copy(update={"source": there.source}) == there
    assert here.source.listing_sha256 == there.source.listing_sha256


def test_a_stock_webdataset_pipeline_reads_the_shards(latents: Path) -> None:
    import webdataset

    ours = LatentDataset.open(latents)
    urls = [str(latents / shard.tar_key) for shard in ours.info.shards]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False).decode().to_tuple("latent.npy", "cls")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the shards to the collector
        found = list(pipeline)
        gc.collect()
    assert len(found) == len(ours)
    for sample_id, (moments, label) in enumerate(found):
        expected, expected_label = ours.read(sample_id)
        assert label == expected_label
        assert moments.dtype == expected.dtype
        assert np.array_equal(moments, expected)


def test_verify_finds_a_flipped_bit(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["latents", "verify", str(latents)]) == 0
    assert "sound: 36 samples in 5 shards, 4 classes, 3 of 39 inputs quarantined" in capsys.readouterr().out
    copy = Path(shutil.copytree(latents, tmp_path / "copy"))
    record = LatentDataset.open(copy).records(1)[2]
    tar = bytearray((copy / "shards/00001.tar").read_bytes())
    tar[int(record["offset"]) + 500] ^= 1
    (copy / "shards/00001.tar").write_bytes(tar)
    assert cli.main(["latents", "verify", str(copy)]) == 1
    error = capsys.readouterr().err
    assert "damaged: shards/00001.tar: its SHA-256 is not the one in dataset.json" in error
    assert f"damaged: shards/00001.tar, sample with key {record['key']:08d}: expected CRC-32C" in error
    assert cli.main(["latents", "verify", str(tmp_path)]) == 2
    assert "not a latent data set" in capsys.readouterr().err


def test_verify_finds_labels_counts_and_statistics(
    latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = read_info(open_storage(latents)).model_dump(mode="json")
    changes = (
        ({"quarantined": []}, "do not make up the 39 files"),
        ({"class_names": ["empty", "n0"]}, "expected a label below 2, got 2"),
        ({"channel_mean": [0.0] * 4}, "channel mean"),
    )
    copy = Path(shutil.copytree(latents, tmp_path / "copy"))
    for change, message in changes:
        edit_info(copy, **{**info, **change})
        assert cli.main(["latents", "verify", str(copy)]) == 1
        assert message in capsys.readouterr().err


def test_two_encoders_on_a_cluster_one_of_them_killed_write_the_same_bytes_to_s3(
    latents: Path,
    folder: Path,
    s3: tuple[FaultProxy, dict[str, str]],
    cluster: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxy, variables = s3
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    url = f"s3://{BUCKET}/set"
    proxy.set({"stall_request": 1.0}, only=r"^PUT /\S*\.tar")  # no shard gets on, and so not the job
    job = start(folder, url, "encoders=2", "decoders=2", environment=cluster)
    wait_until(lambda: proxy.injected["stall_request"], job)
    victim = min(pid for pid, name in marked_processes(MARK).items() if name.startswith(ENCODER))
    os.kill(victim, signal.SIGSTOP)  # so that it has no end of what it is given
    proxy.down()  # what hangs there is reset
    proxy.calm()
    wait_until(lambda: any(key.endswith(".json") for key, _ in open_storage(url).list("shards/")), job)
    os.kill(victim, signal.SIGKILL)
    error = job.communicate(timeout=HANGS_S)[1]
    assert job.returncode == 0, error
    assert objects(url) == objects(latents)
    assert cli.main(["latents", "verify", url]) == 0


def test_a_job_starts_with_the_encoders_that_find_room(
    latents: Path, folder: Path, cluster: dict[str, str], tmp_path: Path
) -> None:
    keys = ["encoders=2", "cpus_per_encoder=0.6", "cpus_per_decoder=0.2", "wait_s=1000000"]
    with another_job(cluster, cpus=2):
        job = start(folder, tmp_path / "set", *keys, environment=cluster)
        error = job.communicate(timeout=HANGS_S)[1]
    assert job.returncode == 0, error
    assert "starting with 1 of 2 encoders; the others may join later" in error
    assert objects(tmp_path / "set") == objects(latents)


@contextmanager
def another_job(cluster: dict[str, str], cpus: int) -> Iterator[None]:
    """Occupy some CPUs of the cluster."""
    script = f"""
import ray, time
ray.init(logging_level="error", log_to_driver=False)
holder = ray.remote(num_cpus={cpus})(type("Holder", (), {{"here": lambda self: True}})).remote()
print(ray.get(holder.here.remote()), flush=True)
time.sleep(10**6)
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, env=cluster, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "True\n"
            yield
        finally:
            process.terminate()


def test_a_submitted_job_writes_the_same_bytes(
    latents: Path, folder: Path, cluster: dict[str, str], tmp_path: Path
) -> None:
    submit = [RAY, "job", "submit", "--address", cluster["DASHBOARD"], "--working-dir", ".", "--"]
    command = [*submit, "python", SCRIPT, *arguments(folder, tmp_path / "set")]
    environment = {name: value for name, value in cluster.items() if name != "RAY_ADDRESS"}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANGS_S)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert objects(tmp_path / "set") == objects(latents)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP], ids=lambda one: one.name)
def test_an_interrupt_leaves_no_process_behind(folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    write_images(tmp_path / "images", 600)  # more than can be encoded before the signal is there
    mark = f"{MARK}-interrupt"
    environment = clean_environment(DIT_SCALE_TEST=mark)
    job = start(folder, tmp_path / "set", f"source={tmp_path}/images", environment=environment)
    wait_until(lambda: (tmp_path / "set/encode.json").exists(), job)
    assert marked_processes(mark)
    os.killpg(job.pid, number)  # as a terminal does: to the whole group
    error = job.communicate(timeout=HANGS_S)[1]
    assert job.returncode == 130, error
    assert "interrupted; run the same command again to continue" in error
    end_s = time.monotonic() + HANGS_S
    while left := marked_processes(mark):
        assert time.monotonic() < end_s, left
        time.sleep(0.1)
