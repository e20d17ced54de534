"""S3 storage on a real server (Ceph) while three requests in ten meet a fault, and during an outage."""

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import boto3
import numpy as np
import pytest

from dit_scale.errors import StorageError
from dit_scale.storage import S3Storage, transfer
from dit_scale.storage import s3 as s3_module
from tests.support.faults.ceph import CephServer
from tests.support.faults.proxy import KINDS, FaultProxy
from tests.support.s3 import BUCKET
from tests.support.speed import scaled

# More than 0.3 in total: half of the kinds apply only to requests or answers that have a body.
RATES = {kind: 0.02 if kind in ("stall_request", "stall_reply", "trickle") else 0.055 for kind in KINDS}
WRITERS = 8


@pytest.fixture
def proxy(ceph: CephServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    for name, value in ceph.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3_module, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(s3_module, "LONGEST_PAUSE_S", 0.2)
    monkeypatch.setattr(transfer, "STALL_S", scaled(2.0))
    monkeypatch.setattr(s3_module, "DEADLINE_S", scaled(s3_module.DEADLINE_S))
    with FaultProxy(ceph.port) as proxy:
        proxy.stall_s = scaled(proxy.stall_s)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy


@pytest.fixture
def s3(proxy: FaultProxy, request: pytest.FixtureRequest) -> S3Storage:
    return S3Storage(BUCKET, request.node.name)


@pytest.fixture
def direct(ceph: CephServer) -> Iterator[Any]:
    """A client that talks to the server without the proxy."""
    client = boto3.client(
        "s3",
        endpoint_url=ceph.environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=ceph.environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=ceph.environment["AWS_SECRET_ACCESS_KEY"],
        region_name=ceph.environment["AWS_DEFAULT_REGION"],
    )
    yield client
    client.close()


def test_a_storm_loses_nothing(s3: S3Storage, proxy: FaultProxy, direct: Any) -> None:
    draws = np.random.default_rng(0)
    sizes = [0, 1, 3_000_000, *(int(size) for size in draws.integers(2, 100_000, 297))]
    objects = {f"objects/{number:03}": draws.bytes(size) for number, size in enumerate(sizes)}
    large = {f"large/{number}": draws.bytes(40 * 2**20) for number in range(2)}
    everything = objects | large
    proxy.set(RATES)
    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(s3.write, objects, objects.values()))
        list(pool.map(lambda key: s3.write_stream(key, pieces(large[key]), len(large[key])), large))
        assert list(pool.map(s3.read, everything)) == list(everything.values())
        assert s3.list() == sorted((key, len(data)) for key, data in everything.items())
        assert list(pool.map(s3.size, objects)) == sizes

        # The reader must detect a changed byte within a range.
        proxy.set(RATES | {"flip": 0.0})
        ranges = [(key, len(data) // 3, len(data) // 2) for key, data in everything.items()]
        got = pool.map(lambda at: s3.read_range(*at), ranges)
        assert list(got) == [everything[key][start : start + length] for key, start, length in ranges]

        proxy.set(RATES)
        removed = sorted(objects)[::2]
        list(pool.map(s3.delete, removed))
        assert not any(pool.map(s3.exists, removed))
    left = {key: data for key, data in everything.items() if key not in removed}
    proxy.calm()
    assert s3.list() == sorted((key, len(data)) for key, data in left.items())
    for key, data in left.items():
        assert direct.get_object(Bucket=BUCKET, Key=s3.prefix + key)["Body"].read() == data
    assert all(proxy.injected[kind] for kind in KINDS), proxy.injected
    assert sum(proxy.injected.values()) > 0.25 * proxy.requests


def pieces(data: bytes) -> Iterator[memoryview]:
    return (memoryview(data)[start : start + 3_000_000] for start in range(0, len(data), 3_000_000))


@pytest.mark.parametrize("same_bytes", [False, True])
def test_one_of_many_writers_wins(same_bytes: bool, s3: S3Storage, proxy: FaultProxy) -> None:
    proxy.set({"drop_reply": 0.12, "late_error": 0.12, "error": 0.06})
    with ThreadPoolExecutor(WRITERS) as pool:
        for number in range(25):
            offers = [b"nonce" if same_bytes else b"nonce %d" % writer for writer in range(WRITERS)]
            won = list(pool.map(lambda offer, key=f"attempts/{number}": s3.write_new(key, offer), offers))
            assert sum(won) == 1
            assert s3.read(f"attempts/{number}") == offers[won.index(True)]
    assert len(s3.list()) == 25
    assert proxy.injected["drop_reply"]
    assert proxy.injected["late_error"]


@pytest.mark.parametrize("kind", ["drop_reply", "late_error", "short"])
def test_a_lost_answer_to_the_last_request_of_an_upload(kind: str, s3: S3Storage, proxy: FaultProxy) -> None:
    data = np.random.default_rng(0).bytes(17 * 2**20)
    proxy.set({kind: 1.0}, only="POST .*uploadId=", at_most=2)
    s3.write_stream("key", pieces(data), len(data))
    assert proxy.injected[kind] == 2
    assert s3.read("key") == data


def test_an_upload_aborted_from_outside_is_an_error(
    s3: S3Storage, direct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same holds when an older object of the same size has the key."""
    monkeypatch.setattr(s3_module, "PART_BYTES", s3_module.MIN_PART_BYTES)
    data = np.random.default_rng(0).bytes(2 * s3_module.MIN_PART_BYTES)
    s3.write("key", data)

    def aborted_at_last() -> Iterator[memoryview]:
        yield memoryview(data[::-1])
        # More than one, if an answer came too late and the request to start the upload was repeated.
        for upload in direct.list_multipart_uploads(Bucket=BUCKET, Prefix=s3.prefix)["Uploads"]:
            direct.abort_multipart_upload(Bucket=BUCKET, Key=upload["Key"], UploadId=upload["UploadId"])

    with pytest.raises(StorageError, match=r"InternalError|the upload was aborted"):
        s3.write_stream("key", aborted_at_last(), len(data))
    assert s3.read("key") == data


@pytest.mark.parametrize("mode", ["down", "blackhole"])
def test_a_server_outage(
    mode: str, s3: S3Storage, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_module, "MAX_TRIES", 10_000)  # the deadline stops the retries
    s3.write("before", b"before")
    getattr(proxy, mode)()
    with monkeypatch.context() as patch:
        patch.setattr(transfer, "STALL_S", 0.3)
        patch.setattr(s3_module, "DEADLINE_S", 1.0)
        for verb, operation in (("read", s3.read), ("list", s3.list), ("delete", s3.delete)):
            with pytest.raises(
                StorageError, match=rf"cannot {verb} .*, tried \d+ times in \d+ s: .*no answer"
            ):
                operation("before")
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(s3.write, f"during/{number}", b"during") for number in range(2)]
        time.sleep(1)
        assert not any(write.done() for write in waiting)
        proxy.calm()
        assert [write.result() for write in waiting] == [None, None]
    assert s3.read("before") == b"before"
    assert s3.list() == [("before", 6), ("during/0", 6), ("during/1", 6)]


def test_a_server_that_hangs_and_answers_late(
    s3: S3Storage, ceph: CephServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Abandoned attempts still reach the server when it resumes."""
    monkeypatch.setattr(transfer, "STALL_S", scaled(1.0))
    ceph.gateway.send_signal(signal.SIGSTOP)
    try:
        thaw = threading.Timer(scaled(3.0), ceph.gateway.send_signal, [signal.SIGCONT])
        thaw.start()
        with ThreadPoolExecutor(WRITERS) as pool:
            won = list(pool.map(lambda writer: s3.write_new("key", b"%d" % writer), range(WRITERS)))
    finally:
        ceph.gateway.send_signal(signal.SIGCONT)
        thaw.join()
    assert sum(won) == 1
    assert s3.read("key") == b"%d" % won.index(True)
