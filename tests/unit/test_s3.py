"""S3 storage with failures of the server and the network: every operation, every kind of fault."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from moto.s3.models import s3_backends

from dit_scale.errors import StorageError
from dit_scale.storage import MissingKeyError, S3Storage, UnavailableError, transfer
from dit_scale.storage import s3 as s3_module
from dit_scale.storage.transfer import BrokenError, TransferProgress, WatchedBody
from tests.support.faults.proxy import KINDS, FaultProxy
from tests.support.s3 import BUCKET

PART = s3_module.MIN_PART_BYTES
DATA = np.random.default_rng(0).bytes(2 * PART + 1000)
FEW = DATA[:50_000]


@pytest.fixture
def environment(server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(s3_module, "PART_BYTES", PART)
    monkeypatch.setattr(s3_module, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(s3_module, "LONGEST_PAUSE_S", 0.01)


@pytest.fixture
def proxy(server: dict[str, str], environment: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy between the storage and its server."""
    with FaultProxy(int(server["AWS_ENDPOINT_URL"].rpartition(":")[2])) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "STALL_S", 0.5)


@pytest.fixture
def s3(environment: None, request: pytest.FixtureRequest) -> S3Storage:
    return S3Storage(BUCKET, request.node.name)


@pytest.fixture
def direct(server: dict[str, str]) -> Any:
    """A client of the server that bypasses the proxy."""
    client = boto3.client(
        "s3",
        endpoint_url=server["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    yield client
    client.close()


def pieces(data: bytes, size: int) -> Iterator[memoryview]:
    return (memoryview(data)[start : start + size] for start in range(0, len(data), size))


def unfinished(direct: Any, s3: S3Storage) -> list[str]:
    """Return the keys of uploads that were neither completed nor aborted."""
    answer = direct.list_multipart_uploads(Bucket=BUCKET, Prefix=s3.prefix)
    return [upload["Key"] for upload in answer.get("Uploads", ())]


# Faults


def read(s3: S3Storage) -> None:
    assert s3.read("there") == FEW


def read_range(s3: S3Storage) -> None:
    assert s3.read_range("there", 100, 40_000) == FEW[100:40_100]


def write(s3: S3Storage) -> None:
    s3.write("new", FEW)
    assert s3.read("new") == FEW


def write_stream(s3: S3Storage) -> None:
    s3.write_stream("big", pieces(DATA, 10**6), len(DATA))
    assert s3.read("big") == DATA


def write_new(s3: S3Storage) -> None:
    assert s3.write_new("first", FEW)
    assert not s3.write_new("first", FEW)


def exists(s3: S3Storage) -> None:
    assert s3.exists("there")
    assert not s3.exists("nothing")


def size(s3: S3Storage) -> None:
    assert s3.size("there") == len(FEW)


def list_(s3: S3Storage) -> None:
    assert ("there", len(FEW)) in s3.list()


def delete(s3: S3Storage) -> None:
    s3.delete("there")
    assert not s3.exists("there")


OPERATIONS = (read, read_range, write, write_stream, write_new, exists, size, list_, delete)


@pytest.mark.parametrize("kind", KINDS)
def test_every_operation_survives_every_fault(
    kind: str, s3: S3Storage, proxy: FaultProxy, impatient: None
) -> None:
    s3.write("there", FEW)
    met = set()
    for operation in OPERATIONS:
        if kind == "flip" and operation is read_range:
            continue  # S3 has no checksum of a range; its readers have
        before = proxy.injected[kind]
        proxy.set({kind: 1.0}, at_most=1)
        operation(s3)
        proxy.calm()
        if proxy.injected[kind] > before:
            met.add(operation)
    if kind in ("cut_request", "stall_request"):
        assert met == {write, write_stream, write_new}
    elif kind in ("cut_reply", "short", "stall_reply", "trickle"):
        assert met >= {read, read_range, list_, write_stream}
    elif kind == "flip":
        assert met >= {read, write, write_stream}
    else:
        assert met == set(OPERATIONS)


@pytest.mark.parametrize("kind", ["drop_reply", "late_error", "short"])
def test_a_lost_answer_to_the_last_request_of_an_upload(kind: str, s3: S3Storage, proxy: FaultProxy) -> None:
    proxy.set({kind: 1.0}, only="POST .*uploadId=", at_most=2)
    s3.write_stream("key", pieces(DATA, PART), len(DATA))
    assert proxy.injected[kind] == 2
    assert s3.read("key") == DATA


def test_an_upload_that_the_server_has_forgotten(s3: S3Storage, proxy: FaultProxy) -> None:
    """The upload is complete, or another client aborted it: an object of the right size proves nothing."""
    proxy.errors = [("404 Not Found", "NoSuchUpload")]
    proxy.set({"late_error": 1.0}, only="POST .*uploadId=", at_most=1)
    s3.write_stream("key", pieces(DATA, PART), len(DATA))
    assert s3.read("key") == DATA
    proxy.set({"error": 1.0}, only="POST .*uploadId=", at_most=1)
    with pytest.raises(StorageError, match=r"cannot write .*key: the upload was aborted"):
        s3.write_stream("key", pieces(DATA[::-1], PART), len(DATA))
    assert s3.read("key") == DATA
    assert proxy.injected == {"late_error": 1, "error": 1}


@pytest.mark.parametrize("kind", ["drop_reply", "late_error"])
def test_write_new_recognises_its_own_object(kind: str, s3: S3Storage, proxy: FaultProxy) -> None:
    proxy.set({kind: 1.0}, only="PUT ", at_most=1)
    assert s3.write_new("key", b"the same bytes")
    proxy.set({"error": 1.0}, only="PUT ", at_most=1)
    assert not s3.write_new("key", b"the same bytes")
    assert proxy.injected == {kind: 1, "error": 1}


def test_a_list_is_complete_across_pages(
    s3: S3Storage, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "3")
    keys = [f"folder {number}/%41+\u00e9" for number in range(10)]
    for key in keys:
        s3.write(key, key.encode())
    proxy.set({"short": 0.3, "error": 0.3})
    assert s3.list() == [(key, len(key.encode())) for key in keys]
    assert proxy.injected["short"] + proxy.injected["error"] > 0


def test_checksums_of_other_clients_are_verified(s3: S3Storage, direct: Any, proxy: FaultProxy) -> None:
    """Objects with a checksum of S3, which boto3 adds by default."""
    direct.put_object(Bucket=BUCKET, Key=f"{s3.prefix}key", Body=FEW)
    proxy.set({"flip": 1.0}, at_most=2)
    assert s3.read("key") == FEW
    assert proxy.injected["flip"] == 2


def test_an_etag_of_unknown_parts_is_accepted(s3: S3Storage, direct: Any) -> None:
    upload = {"Bucket": BUCKET, "Key": f"{s3.prefix}key"}
    upload["UploadId"] = direct.create_multipart_upload(**upload)["UploadId"]
    cut = PART + 1000
    tags = [
        direct.upload_part(**upload, PartNumber=number, Body=part)["ETag"]
        for number, part in enumerate((DATA[:cut], DATA[cut : 2 * PART]), 1)
    ]
    parts = [{"PartNumber": number, "ETag": tag} for number, tag in enumerate(tags, 1)]
    direct.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
    requests = count_gets(s3)
    assert s3.read("key") == DATA[: 2 * PART]
    assert requests == ["key"], "its parts are not ours, and nothing is asked for twice"


def count_gets(s3: S3Storage) -> list[str]:
    """Record the keys of all object requests from now on."""
    asked: list[str] = []
    events = s3._client_here().meta.events
    events.register(
        "provide-client-params.s3.GetObject",
        lambda params, **_: asked.append(params["Key"][len(s3.prefix) :]),
    )
    return asked


@pytest.mark.parametrize("encryption", [{}, {"ServerSideEncryption": "aws:kms"}])
def test_an_etag_that_is_no_md5_costs_no_second_request(
    encryption: dict[str, str], s3: S3Storage, direct: Any
) -> None:
    keys = [f"key {number}" for number in range(5)]
    for key in keys:
        direct.put_object(Bucket=BUCKET, Key=s3.prefix + key, Body=FEW, **encryption)
        stored = s3_backends["123456789012"]["aws"].buckets[BUCKET].keys[s3.prefix + key]
        stored._etag = "0123456789abcdef" * 2
    requests = count_gets(s3)
    for key in keys:
        assert s3.read(key) == FEW
    # If no answer mentions encryption, one object shows that the ETags of this server are not MD5.
    assert requests == (keys if encryption else [keys[0], *keys])


@pytest.mark.parametrize("size", [len(FEW), len(DATA)])
def test_an_etag_that_is_the_md5_of_our_parts_is_verified(
    size: int, s3: S3Storage, proxy: FaultProxy
) -> None:
    s3.write("key", DATA[:size])
    for _ in range(3):
        proxy.set({"flip": 1.0}, at_most=1)
        assert s3.read("key") == DATA[:size]
    assert proxy.injected["flip"] == 3


# Retries


@pytest.mark.parametrize("mode", ["down", "blackhole"])
def test_an_absent_server_is_an_error_within_the_deadline(
    mode: str, s3: S3Storage, proxy: FaultProxy, direct: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not s3.exists("key")  # creates the client, which may take longer than a try
    reason, stall_s = ("no answer from the S3 server; check AWS", 60.0)
    if mode == "blackhole":
        reason, stall_s = ("no answer in 0.1 s", 0.1)
    monkeypatch.setattr(transfer, "STALL_S", stall_s)
    monkeypatch.setattr(s3_module, "DEADLINE_S", stall_s + 0.3)
    getattr(proxy, mode)()
    for verb, operation in (("read", s3.read), ("list", s3.list), ("delete", s3.delete)):
        with pytest.raises(
            StorageError, match=rf"cannot {verb} s3:.*key, tried \d+ times in \d+ s: {reason}"
        ):
            operation("key")
    with pytest.raises(StorageError, match="cannot write"):
        s3.write_stream("key", pieces(DATA, PART), len(DATA))
    monkeypatch.undo()
    proxy.calm()
    assert direct.list_objects_v2(Bucket=BUCKET, Prefix=s3.prefix)["KeyCount"] == 0


def test_pauses_grow_to_a_limit() -> None:
    pauses = [s3_module._pause_s(tries) for tries in range(1, s3_module.MAX_TRIES)]
    for doublings, pause in enumerate(pauses):
        expected = min(s3_module.FIRST_PAUSE_S * 2**doublings, s3_module.LONGEST_PAUSE_S)
        assert 0.5 * expected <= pause <= 1.5 * expected
    assert len(set(pauses[-8:])) > 1
    assert 0.3**s3_module.MAX_TRIES < 1e-10


TRANSIENT = (
    ("500 Internal Server Error", "InternalError"),
    ("502 Bad Gateway", "BadGateway"),
    ("503 Slow Down", "ServiceUnavailable"),
    ("409 Conflict", "OperationAborted"),
    ("429 Too Many Requests", "TooManyRequests"),
    ("400 Bad Request", "BadDigest"),
    ("400 Bad Request", "IncompleteBody"),
    ("400 Bad Request", "RequestTimeout"),
    ("400 Bad Request", "SlowDown"),
    ("400 Bad Request", "XAmzContentSHA256Mismatch"),
)
PERMANENT = (
    ("400 Bad Request", "InvalidRequest"),
    ("403 Forbidden", "AccessDenied"),
    ("499 Client Closed Request", "Closed"),
    ("501 Not Implemented", "NotImplemented"),
)


@pytest.mark.parametrize("answer", TRANSIENT, ids=" ".join)
def test_a_transient_error_is_retried(answer: tuple[str, str], s3: S3Storage, proxy: FaultProxy) -> None:
    s3.write("there", FEW)
    requests, proxy.errors = proxy.requests, [answer]
    proxy.set({"error": 1.0}, at_most=2)
    assert s3.read("there") == FEW
    assert proxy.requests - requests == 3


@pytest.mark.parametrize("answer", PERMANENT, ids=" ".join)
def test_a_permanent_error_is_not_retried(answer: tuple[str, str], s3: S3Storage, proxy: FaultProxy) -> None:
    s3.write("there", FEW)
    requests, proxy.errors = proxy.requests, [answer]
    proxy.set({"error": 1.0})
    with pytest.raises(UnavailableError, match=rf"^cannot read s3://{BUCKET}/.*/there: {answer[1]}: "):
        s3.read("there")
    assert proxy.requests - requests == 1


class Clock:
    """Replaces the time module: only pauses take time."""

    def __init__(self) -> None:
        self.pauses_s: list[float] = []

    def monotonic(self) -> float:
        return sum(self.pauses_s)

    def sleep(self, pause_s: float) -> None:
        self.pauses_s.append(pause_s)


@pytest.fixture
def clock(environment: None, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Pauses without jitter: 1, 2, 4, 4, 4 ... s."""
    monkeypatch.setattr(s3_module, "FIRST_PAUSE_S", 1.0)
    monkeypatch.setattr(s3_module, "LONGEST_PAUSE_S", 4.0)
    monkeypatch.setattr(s3_module.secrets, "randbelow", lambda limit: limit // 2)
    clock = Clock()
    monkeypatch.setattr(s3_module, "time", clock)
    return clock


@pytest.mark.parametrize(
    ("last_start_s", "tries", "spent_s"),
    [
        (0.0, 3, 3),  # every request gets MIN_TRIES
        (6.9, 3, 3),
        (7.0, 4, 7),
        (10.9, 4, 7),
        (11.0, 5, 11),
        (10**6, 20, 71),  # MAX_TRIES
    ],
)
def test_retries_stop_at_the_deadline_or_after_max_tries(
    s3: S3Storage,
    proxy: FaultProxy,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    last_start_s: float,
    tries: int,
    spent_s: int,
) -> None:
    monkeypatch.setattr(s3_module, "DEADLINE_S", last_start_s + transfer.STALL_S)
    proxy.set({"error": 1.0})
    with pytest.raises(UnavailableError, match=rf"key, tried {tries} times in {spent_s} s: "):
        s3.read("key")
    assert clock.pauses_s == [1.0, 2.0, *[4.0] * 18][: tries - 1]
    assert proxy.requests == proxy.injected["error"] == tries


def test_aborting_a_failed_upload_has_a_deadline(s3: S3Storage, proxy: FaultProxy, clock: Clock) -> None:
    def failing() -> Iterator[memoryview]:
        yield from pieces(DATA[:PART], PART)
        raise ValueError("no more")

    proxy.set({"error": 1.0}, only="DELETE .*uploadId=")
    with pytest.raises(ValueError, match="no more"):
        s3.write_stream("key", failing(), len(DATA))
    # 19 s have passed, and the next try would start after STALL_S.
    assert clock.pauses_s == [1.0, 2.0, 4.0, 4.0, 4.0, 4.0]
    assert proxy.injected["error"] == 7


@pytest.mark.parametrize("is_tls", [True, False])
def test_an_untrusted_certificate_is_not_retried(
    is_tls: bool, s3: S3Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other TLS errors are retried: here, the server does not support TLS."""
    certificate = self_signed(tmp_path) if is_tls else None
    monkeypatch.setattr(s3_module, "MAX_TRIES", 4)
    with counting_server(certificate) as (port, connections):
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{port}")
        with pytest.raises(UnavailableError, match="CERTIFICATE_VERIFY_FAILED" if is_tls else "SSL"):
            s3.read("key")
    assert len(connections) == (1 if is_tls else 4)


@contextmanager
def counting_server(certificate: Path | None) -> Iterator[tuple[int, list[str]]]:
    """A server that closes every connection after the TLS handshake; yields its port and its clients."""
    connections: list[str] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    if certificate:
        context.load_cert_chain(certificate)

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):  # closed
            while True:
                connection, (host, _) = listener.accept()
                connections.append(host)
                with connection, suppress(OSError):
                    if certificate:
                        context.wrap_socket(connection, server_side=True).close()
                    else:
                        connection.recv(1)
                        connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield listener.getsockname()[1], connections
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


def self_signed(folder: Path) -> Path:
    """Write a file with an untrusted certificate for 127.0.0.1 and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    file = folder / "certificate.pem"
    file.write_bytes(secret + certificate.public_bytes(serialization.Encoding.PEM))
    return file


def test_user_errors_are_not_retried(s3: S3Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "FIRST_PAUSE_S", 10**6)
    with pytest.raises(StorageError, match="there is no bucket"):
        S3Storage("no-such-bucket", "").write_stream("key", pieces(DATA, PART), len(DATA))
    with pytest.raises(MissingKeyError):
        s3.read("nothing")


# Objects in parts


def test_an_upload_holds_one_part_and_is_invisible_until_complete(s3: S3Storage, direct: Any) -> None:
    def watched() -> Iterator[memoryview]:
        for number, piece in enumerate(pieces(DATA, PART)):
            assert not s3.exists("key")
            if number:
                (upload,) = direct.list_multipart_uploads(Bucket=BUCKET, Prefix=s3.prefix)["Uploads"]
                where = {"Bucket": BUCKET, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                assert len(direct.list_parts(**where)["Parts"]) == number
            yield piece

    s3.write_stream("key", watched(), len(DATA))
    assert s3.read("key") == DATA
    assert unfinished(direct, s3) == []


def test_chunks_may_share_a_buffer(s3: S3Storage) -> None:
    buffer = bytearray(1_000_003)

    def reused() -> Iterator[memoryview]:
        for piece in pieces(DATA, len(buffer)):
            buffer[: len(piece)] = piece
            yield memoryview(buffer)[: len(piece)]

    s3.write_stream("key", reused(), len(DATA))
    assert s3.read("key") == DATA


def test_chunks_may_hold_numbers(s3: S3Storage) -> None:
    values = np.arange(PART // 4 + 5, dtype=np.float32)
    s3.write_stream("key", [values[:7].data, values[7:].data], values.nbytes)
    assert s3.read("key") == values.tobytes()


class Stop(KeyboardInterrupt):
    """Like Ctrl-C, but only raised by this test."""


@pytest.mark.parametrize("end", [ValueError("no more"), Stop()])
def test_an_upload_whose_source_fails_is_aborted(end: BaseException, s3: S3Storage, direct: Any) -> None:
    def failing() -> Iterator[memoryview]:
        yield from pieces(DATA[: 2 * PART], PART)
        raise end

    with pytest.raises(type(end)):
        s3.write_stream("key", failing(), len(DATA))
    assert s3.list() == []
    assert unfinished(direct, s3) == []


@pytest.mark.parametrize("size", [10, len(DATA)])
@pytest.mark.parametrize("too_much", [-1, 1])
def test_chunks_that_do_not_add_up(size: int, too_much: int, s3: S3Storage, direct: Any) -> None:
    data = DATA[: size - 1] + bytes(1 + too_much)
    hold = "more" if too_much == 1 else str(size - 1)
    with pytest.raises(StorageError, match=f"key: expected {size} bytes, the chunks hold {hold}"):
        s3.write_stream("key", pieces(data, 10**6), size)
    assert s3.list() == []
    assert unfinished(direct, s3) == []


def test_limits_of_s3(s3: S3Storage, direct: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StorageError, match="5497558138881 bytes, and S3 takes at most 5497558138880; split"):
        s3.write_stream("key", [], 5 * 2**40 + 1)
    largest = s3_module._part_bytes(s3_module.MAX_OBJECT_BYTES)
    assert largest * s3_module.MAX_PARTS >= s3_module.MAX_OBJECT_BYTES
    monkeypatch.setattr(s3_module, "MAX_PARTS", 2)
    s3.write("key", DATA)
    assert direct.head_object(Bucket=BUCKET, Key=f"{s3.prefix}key")["ETag"].endswith('-2"')
    assert s3.read("key") == DATA


# Watched transfers


def test_a_body_is_a_file_over_the_bytes() -> None:
    progress = TransferProgress()
    body = WatchedBody(bytearray(b"0123456789"), progress)
    assert (body.readable(), body.seekable(), body.seek(0, 2), body.seek(-3, 1)) == (True, True, 10, 7)
    assert body.read() == b"789"
    assert body.seek(2) == body.tell() == 2
    assert (body.read(3), body.read(0), body.read(100), body.read(1)) == (b"234", b"", b"56789", b"")
    assert progress.bytes == 11
    progress.abandoned = True
    body.seek(0)
    with pytest.raises(BrokenError, match="abandoned"):
        body.read(1)


def test_a_try_that_stalls_is_abandoned_and_its_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "STALL_S", 0.05)
    monkeypatch.setattr(transfer, "SLOWEST_BYTES_PER_S", 1000)
    crawl, ended = threading.Event(), threading.Event()

    def crawling(progress: TransferProgress) -> None:
        try:
            progress.moved(10_000)
            while not crawl.wait(0.01):
                progress.moved(1)
        except BrokenError:
            ended.set()

    with pytest.raises(BrokenError, match=r"no answer in 0\.05 s, in which \d+ bytes of a body moved"):
        transfer.run_watched(crawling)
    assert ended.wait(60)


def test_a_try_that_makes_progress_may_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is checked ten times, and has moved just enough each time."""
    enough = int(transfer.STALL_S * transfer.SLOWEST_BYTES_PER_S)
    looks, moves, wait = threading.Semaphore(0), threading.Semaphore(0), transfer.wait
    ten = iter(range(10))

    def look(outcomes: list[Any], timeout: float) -> Any:
        if next(ten, None) is None:
            return wait(outcomes, 60)
        looks.release()
        assert moves.acquire(timeout=60)
        return wait(outcomes, 0)

    def slow(progress: TransferProgress) -> str:
        for _ in range(10):
            assert looks.acquire(timeout=60)
            progress.moved(enough)
            moves.release()
        return "done"

    monkeypatch.setattr(transfer, "wait", look)
    assert transfer.run_watched(slow) == "done"


def test_an_error_of_a_try_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        transfer.run_watched(lambda _: 1 // 0)
