"""Mistakes with an encoding job: each gives a clear error, and finished work stays."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3
import pytest

from dit_scale.storage import open_storage
from tests.support.encoding import clean_environment, job_command, objects, write_images
from tests.support.faults.ceph import CephServer, ceph_s3
from tests.support.faults.small_disk import small_disk
from tests.support.s3 import BUCKET
from tests.support.speed import scaled
from tests.support.tiny_vae import save_tiny_vae

pytestmark = pytest.mark.pipeline

SHARDS = 6
KEYS = ["image_size=32", "vae_batch=4", "shard_samples=6", "cpus_per_encoder=0.5", "encoders=1", "decoders=1"]
READER = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "reader-secret"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 images and an autoencoder."""
    top = tmp_path_factory.mktemp("errors")
    write_images(top / "images", 6 * SHARDS)
    save_tiny_vae(top / "vae")
    return top


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, bytes]:
    """The output of an undisturbed job."""
    encode(folder, folder / "whole", expected=0)
    return objects(folder / "whole")


@pytest.fixture(scope="module")
def ceph() -> Iterator[CephServer]:
    with ceph_s3() as server:
        yield server


def encode(
    folder: Path,
    output: str | Path,
    *keys: str,
    environment: dict[str, str] | None = None,
    expected: int = 2,
) -> str:
    """Run a job that must exit with the expected code; return its stderr."""
    command = job_command(f"source={folder}/images", f"vae={folder}/vae", f"output={output}", *KEYS, *keys)
    variables = clean_environment(**(environment or {}))
    ran = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=scaled(600.0))
    assert ran.returncode == expected, ran.stderr
    assert "Traceback" not in ran.stderr
    return ran.stderr


def client(ceph: CephServer) -> Any:
    return boto3.client(
        "s3",
        endpoint_url=ceph.environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=ceph.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=ceph.environment["AWS_SECRET_ACCESS_KEY"],
        region_name=ceph.environment["AWS_DEFAULT_REGION"],
    )


def test_missing_and_wrong_credentials(folder: Path, ceph: CephServer) -> None:
    url, nobody = f"s3://{BUCKET}/set", {"AWS_SHARED_CREDENTIALS_FILE": "/nowhere"}
    nobody |= {"AWS_EC2_METADATA_DISABLED": "true", "AWS_ENDPOINT_URL": ceph.environment["AWS_ENDPOINT_URL"]}
    error = encode(folder, url, environment=nobody)
    assert "no complete S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in error
    error = encode(folder, url, environment=ceph.environment | {"AWS_SECRET_ACCESS_KEY": "wrong"})
    assert "SignatureDoesNotMatch: the server does not accept the secret key" in error
    error = encode(folder, "s3://nobucket/set", environment=ceph.environment)
    assert "there is no bucket 'nobucket'; create it, or correct the url" in error


def test_no_permission_to_write_is_found_before_anything_is_started(folder: Path, ceph: CephServer) -> None:
    names = ("--uid=reader", "--display-name=reader")
    keys = ("--access-key=reader", "--secret-key=reader-secret")
    ceph.admin("user", "create", *names, *keys)
    allowed = {
        "Effect": "Allow",
        "Principal": {"AWS": ["arn:aws:iam:::user/reader"]},
        "Action": ["s3:GetObject", "s3:ListBucket"],
        "Resource": [f"arn:aws:s3:::{BUCKET}", f"arn:aws:s3:::{BUCKET}/*"],
    }
    with closing(client(ceph)) as s3:
        s3.put_bucket_policy(
            Bucket=BUCKET, Policy=json.dumps({"Version": "2012-10-17", "Statement": [allowed]})
        )
    error = encode(folder, f"s3://{BUCKET}/set", environment=ceph.environment | READER)
    assert "cannot write" in error
    assert "AccessDenied: the credentials do not permit this; check the bucket's policy" in error
    assert "starting Ray" not in error


def test_a_full_bucket_keeps_what_was_done(
    folder: Path, ceph: CephServer, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ceph.environment.items():
        monkeypatch.setenv(name, value)
    with closing(client(ceph)) as s3:
        s3.create_bucket(Bucket="small")
    quota = ("quota", "--quota-scope=bucket", "--bucket=small", "--uid=storm")
    ceph.admin(quota[0], "set", *quota[1:], "--max-objects=14")
    ceph.admin(quota[0], "enable", *quota[1:])
    error = encode(folder, "s3://small/set", environment=ceph.environment)
    assert "QuotaExceeded: the quota of the bucket or of its owner is used up; raise it" in error
    done = objects("s3://small/set")
    finished = [key for key in done if key.endswith(".json") and key.startswith("shards/")]
    assert 0 < len(finished) < SHARDS
    assert done.items() <= whole.items()
    ceph.admin(quota[0], "disable", *quota[1:])
    error = encode(folder, "s3://small/set", environment=ceph.environment, expected=0)
    assert f"{SHARDS - len(finished)} of {SHARDS} shards to encode" in error
    assert objects("s3://small/set") == whole


def test_a_full_disk_keeps_what_was_done(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    half = sum(len(data) for key, data in whole.items() if key.startswith("shards/")) // 2 + 100_000
    with small_disk(tmp_path / "disk", half // 4096 * 4096) as disk:
        error = encode(folder, disk / "set")
        assert "No space left on device; free some space, data already written is intact" in error
        done = objects(disk / "set")
        assert any(key.endswith(".tar") for key in done)
        assert done.items() <= whole.items()
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        encode(folder, disk / "set", expected=0)
        assert objects(disk / "set") == whole


def test_a_disk_that_cannot_be_written_to(folder: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        error = encode(folder, disk / "set")
        assert "Read-only file system; choose a writable folder" in error
        assert "starting Ray" not in error


def test_a_listing_that_changed_between_two_starts(
    folder: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    images = Path(shutil.copytree(folder / "images", tmp_path / "images"))
    shutil.copytree(folder / "whole", tmp_path / "set")
    (tmp_path / "set/dataset.json").unlink()
    for name in ("tar", "idx", "json"):
        (tmp_path / f"set/shards/00002.{name}").unlink()
    before = objects(tmp_path / "set")
    (images / "n0/000.png").rename(images / "n0/new.png")
    source = f"source={images}"
    error = encode(folder, tmp_path / "set", source)
    assert "1 new (n0/new.png) and 1 missing (n0/000.png). Restore it, or encode the new source" in error
    assert objects(tmp_path / "set") == before
    (images / "n0/new.png").rename(images / "n0/000.png")
    assert "1 of 6 shards to encode" in encode(folder, tmp_path / "set", source, expected=0)
    written = {key: data for key, data in objects(tmp_path / "set").items() if key != "dataset.json"}
    assert written == {key: data for key, data in whole.items() if key != "dataset.json"}


def test_another_vae_than_that_of_the_shards(folder: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    shutil.copytree(folder / "whole", tmp_path / "set")
    (tmp_path / "set/dataset.json").unlink()
    before = objects(tmp_path / "set")
    other = save_tiny_vae(tmp_path / "vae", seed=1)
    error = encode(folder, tmp_path / "set", f"vae={other}")
    assert "vae_weights_sha256: " in error
    assert "vae is not the autoencoder that encoded the existing shards" in error
    assert "Continue with that configuration, or choose another output" in error
    assert objects(tmp_path / "set") == before


def test_a_class_without_images(folder: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(folder / "images", tmp_path / "images"))
    (images / "n9").mkdir()
    error = encode(folder, tmp_path / "set", f"source={images}")
    assert "classes without an image: n9. Add images" in error
    assert "allow_empty_classes=true" in error


def test_a_class_of_which_no_image_can_be_decoded(folder: Path, tmp_path: Path) -> None:
    images = Path(shutil.copytree(folder / "images", tmp_path / "images"))
    (images / "n9").mkdir()
    (images / "n9/only.png").write_bytes(b"no picture")
    keys = (f"source={images}", "max_quarantined=0.5")
    error = encode(folder, tmp_path / "set", *keys)
    assert "classes whose images are all quarantined: n9. Add images" in error
    assert not (tmp_path / "set/dataset.json").exists()
    encode(folder, tmp_path / "set", *keys, "allow_empty_classes=true", expected=0)


def test_a_damaged_shard_is_not_taken_for_a_finished_one(
    folder: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    shutil.copytree(folder / "whole", tmp_path / "set")
    storage = open_storage(tmp_path / "set")
    storage.delete("dataset.json")
    storage.write("shards/00003.tar", whole["shards/00003.tar"][:-512])
    error = encode(folder, tmp_path / "set")
    assert "shards/00003.tar: expected" in error
    assert "Delete shards/00003.json and shards/00003.tar, then start again" in error
    storage.delete("shards/00003.json")
    storage.delete("shards/00003.tar")
    encode(folder, tmp_path / "set", expected=0)
    assert objects(tmp_path / "set") == whole
