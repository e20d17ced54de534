"""Storage on disk and on S3: same behaviour, atomic writes, one winner, clear errors."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dit_scale.errors import StorageError
from dit_scale.storage import DiskStorage, MissingKeyError, S3Storage, Storage, open_storage
from dit_scale.storage import s3 as s3_module
from tests.support.s3 import BUCKET


@pytest.fixture
def s3(server: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: Any) -> S3Storage:
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    opened = open_storage(f"s3://{BUCKET}/{request.node.name}")
    assert isinstance(opened, S3Storage)
    return opened


@pytest.fixture(params=["disk", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    return open_storage(tmp_path / "set") if request.param == "disk" else request.getfixturevalue("s3")


def test_an_object_round_trip(storage: Storage) -> None:
    data = bytes(range(256)) * 33
    storage.write("shards/00000.tar", data)
    assert storage.read("shards/00000.tar") == data
    assert storage.read_range("shards/00000.tar", 250, 20) == data[250:270]
    assert storage.read_range("shards/00000.tar", 3, 0) == b""
    assert storage.size("shards/00000.tar") == len(data)
    assert storage.exists("shards/00000.tar")
    storage.write("shards/00000.tar", b"")
    assert storage.read("shards/00000.tar") == b""


def test_list_is_by_prefix_and_sorted(storage: Storage) -> None:
    assert storage.list() == []
    for key in ("b/2", "b/10", "a", "bb/1", "b/c/d"):
        storage.write(key, key.encode())
    assert storage.list() == [("a", 1), ("b/10", 4), ("b/2", 3), ("b/c/d", 5), ("bb/1", 4)]
    assert storage.list("b/") == [("b/10", 4), ("b/2", 3), ("b/c/d", 5)]
    assert storage.list("b/1") == [("b/10", 4)]
    assert [key for key, _ in storage.list("b")] == ["b/10", "b/2", "b/c/d", "bb/1"]
    assert storage.list("nothing/") == []


def test_missing_objects(storage: Storage) -> None:
    assert not storage.exists("nothing")
    for action in (storage.read, storage.size, lambda key: storage.read_range(key, 0, 1)):
        with pytest.raises(MissingKeyError, match="nothing"):
            action("nothing")
    storage.delete("nothing")


def test_delete(storage: Storage) -> None:
    storage.write("key", b"x")
    storage.delete("key")
    assert not storage.exists("key")


def test_writers_and_deleters_of_one_folder_do_not_disturb_each_other(tmp_path: Path) -> None:
    storage = DiskStorage(tmp_path)

    def come_and_go(name: str) -> None:
        for _ in range(300):
            storage.write(f"deep/er/{name}", b"x")
            storage.delete(f"deep/er/{name}")  # also deletes the folder if it is empty

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(come_and_go, "abcd"))


def test_a_range_beyond_the_end_is_an_error(storage: Storage) -> None:
    storage.write("key", b"0123456789")
    for start, length in ((5, 6), (10, 1), (20, 5)):
        with pytest.raises(StorageError, match="truncated"):
            storage.read_range("key", start, length)


def test_write_new_has_one_winner(storage: Storage) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda number: storage.write_new("attempt", b"%d" % number), range(8)))
    assert sum(won) == 1
    assert storage.read("attempt") == b"%d" % won.index(True)
    assert not storage.write_new("attempt", storage.read("attempt"))


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".", "a\0b"])
def test_keys_cannot_leave_the_url(storage: Storage, key: str) -> None:
    for action in (storage.read, storage.exists, storage.delete, storage.local_path):
        with pytest.raises(StorageError, match="expected a relative path"):
            action(key)
    with pytest.raises(StorageError, match="expected a relative path"):
        storage.write(key, b"x")


def test_urls(tmp_path: Path) -> None:
    assert open_storage(f"file://{tmp_path}").local_path("a/b") == tmp_path / "a/b"
    assert open_storage("~/x").local_path("y") == Path.home() / "x/y"
    remote = open_storage("s3://bucket/a/b/")
    assert remote.url == "s3://bucket/a/b"
    assert remote.local_path("key") is None
    assert open_storage("s3://bucket").url == "s3://bucket"
    for url in ("gs://bucket/x", "s3://", "file://host/x", "http://x/y"):
        with pytest.raises(StorageError, match="expected a folder"):
            open_storage(url)


def test_boto3_is_imported_only_for_s3() -> None:
    code = "import sys; from dit_scale import storage; storage.open_storage('/').list('x/'); "
    code += "print('boto3' in sys.modules, 'torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "False False\n"


def test_a_failed_write_leaves_the_old_object_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = DiskStorage(tmp_path)
    disk.write("key", b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"cannot write .*key: No space left.*free some space"):
        disk.write("key", b"new")
    with pytest.raises(StorageError, match="No space left"):
        disk.write_new("other", b"new")
    assert disk.read("key") == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_disk_writes_are_synced_before_they_are_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    for name in ("fsync", "replace", "link"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (events.append(name), real(*a))[1])
    disk = DiskStorage(tmp_path)
    disk.write("key", b"x")
    disk.write_new("new", b"x")
    assert events == ["fsync", "replace", "fsync", "fsync", "link", "fsync"]


def test_a_writer_in_progress_is_not_listed(tmp_path: Path) -> None:
    disk = DiskStorage(tmp_path)
    with disk._temporary(tmp_path / "key", [memoryview(b"half")]):
        assert disk.list() == []


class _FaultyS3(BaseHTTPRequestHandler):
    """Answers every GET with 1000 bytes, but cuts off the first `faults` bodies in the middle."""

    body = bytes(1000)
    faults = 0
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.body)))
        self.end_headers()
        broken = type(self).requests <= self.faults
        self.wfile.write(self.body[:500] if broken else self.body)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[type[_FaultyS3], S3Storage]]:
    handler = type("Handler", (_FaultyS3,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setattr(s3_module, "FIRST_PAUSE_S", 0.001)
    remote = S3Storage("bucket", "")
    yield handler, remote
    server.shutdown()
    server.server_close()


def test_a_truncated_body_is_read_again(faulty: tuple[type[_FaultyS3], S3Storage]) -> None:
    handler, remote = faulty
    handler.faults = 3
    assert remote.read("key") == bytes(1000)
    assert handler.requests == 4


def test_a_body_that_is_always_truncated_is_an_error(
    faulty: tuple[type[_FaultyS3], S3Storage], monkeypatch: pytest.MonkeyPatch
) -> None:
    handler, remote = faulty
    handler.faults = 10**9
    monkeypatch.setattr(s3_module, "MAX_TRIES", 4)
    with pytest.raises(
        StorageError, match=r"tried 4 times in \d+ s: .*500 read.* expected is 1000"
    ) as caught:
        remote.read("key")
    assert handler.requests == 4
    assert "very-secret" not in str(caught.value)


def test_s3_user_errors_are_explained(s3: S3Storage, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    absent = S3Storage("no-such-bucket", "")
    with pytest.raises(StorageError, match="there is no bucket 'no-such-bucket'"):
        absent.write("key", b"x")
    monkeypatch.setattr(s3_module, "MAX_TRIES", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    unreachable = S3Storage(BUCKET, "")
    with pytest.raises(StorageError, match="no answer from the S3 server; check AWS_ENDPOINT_URL"):
        unreachable.read("key")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    anonymous = S3Storage(BUCKET, "")
    with pytest.raises(StorageError, match="no complete S3 credentials; set AWS_ACCESS_KEY_ID"):
        anonymous.read("key")
