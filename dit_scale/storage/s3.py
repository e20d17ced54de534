"""A prefix of a bucket on S3, or on a server that speaks its protocol: the one door to boto3.

Credentials and endpoint come from where boto3 looks for them (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_ENDPOINT_URL, instance roles); none appear in a message.

A request that fails for a reason that may pass (no connection, 5xx, a body that breaks off or crawls)
is made again, with growing pauses, until ATTEMPTS or DEADLINE_S. Any attempt may have reached the server
although its answer did not reach us; every operation gives the right result all the same. After a
StorageError, what was to be written may be there or not.

Bytes that change on their way are noticed in uploads, and in `read` where the server sends a checksum or an
ETag that is the MD5. It is not where the server encrypts with managed keys, or others chose the sizes of
parts; and S3 has no checksum of a range. So what is read should carry its own checksum.

A process that dies in a large write leaves parts that nobody sees but that take room: give the bucket
a lifecycle rule that aborts incomplete multipart uploads.
"""

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, TypeVar

import dit_scale.storage.transfer as transfer
from dit_scale.errors import StorageError
from dit_scale.storage.base import MissingKeyError, Storage, UnavailableError, check_complete, check_key
from dit_scale.storage.transfer import BrokenError, TransferProgress

ATTEMPTS = 20
"""Times that one request is made. Where 3 of 10 fail, one request in 3e10 fails as often as this."""
SURE_ATTEMPTS = 3
"""Times that it is made at least, whatever the clock says: a long body may break off late."""
DEADLINE_S = 120.0
"""Time in which one request must succeed; no attempt begins in its last `transfer.STALL_S`."""
FIRST_PAUSE_S = 0.2
"""Pause before the second attempt; it doubles with each further one."""
LONGEST_PAUSE_S = 8.0

PART_BYTES = 16 * 2**20
"""Larger objects are uploaded in parts of this size, or of the size that makes MAX_PARTS of them."""
MIN_PART_BYTES = 5 * 2**20
"""Limit of S3, as the next two are; only the last part may be smaller."""
MAX_PARTS = 10_000
MAX_OBJECT_BYTES = 5 * 2**40

_WRITER = "writer"
"""Name of the object metadata that tells who put it."""
_PASSING_STATUS = (409, 429)
"""Two operations met; too many of them."""
_PASSING_CODES = ("BadDigest", "IncompleteBody", "RequestTimeout", "SlowDown", "XAmzContentSHA256Mismatch")
"""Errors that a body which was cut off or damaged on its way causes, and the request to slow down."""
_MISSING_CODES = ("NoSuchKey", "404")
_DENIED = "the credentials do not permit this; check the bucket's policy, and that the key is still valid"
"""Ceph also says so of a key that was taken away, as long as only one of its two records of it is gone."""

T = TypeVar("T")


class S3Storage(Storage):
    """A prefix of a bucket on S3 or a server that speaks its protocol."""

    def __init__(self, bucket: str, prefix: str) -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.url = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client: Any = None
        self._client_pid = 0
        self._client_lock = threading.Lock()
        self._etags_are_md5 = True
        """Until one turns out to be something else."""

    def read(self, key: str) -> bytes:
        where = self._where(key)
        doubted = set()

        def get(s3: Any, watch: TransferProgress) -> bytes:
            answer = s3.get_object(**where)
            data = _receive(answer, watch)
            if not self._etags_are_md5 or not _has_md5(answer):
                return data
            etag, mine = answer["ETag"].strip('"'), _etag(data)
            if etag != mine and mine not in doubted:
                doubted.add(mine)
                raise BrokenError(f"the bytes that came should have ETag {mine}, theirs is {etag}")
            # Bytes that come twice are right: then this server's ETags are something else.
            self._etags_are_md5 = etag == mine
            return data

        return self._call("read", key, get)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        wanted = {**self._where(key), "Range": f"bytes={start}-{start + length - 1}"}
        data = self._call("read", key, lambda s3, watch: _receive(s3.get_object(**wanted), watch))
        check_complete(len(data), length, f"{self.url}/{key} at {start}")
        return data

    def write(self, key: str, data: bytes) -> None:
        self.write_stream(key, [memoryview(data)], len(data))

    def write_stream(self, key: str, chunks: Iterable[memoryview], size: int) -> None:
        """Like `Storage.write_stream`; holds one part in memory."""
        if size > MAX_OBJECT_BYTES:
            raise StorageError(
                f"cannot write {self.url}/{key}: {size} bytes, and S3 takes at most {MAX_OBJECT_BYTES}; "
                "divide the object"
            )
        where = self._where(key)
        exact = transfer.exactly(chunks, size, f"{self.url}/{key}")
        part_bytes = _part_bytes(size)
        if size > part_bytes:
            self._upload(key, transfer.parts(exact, part_bytes))
        else:
            data = b"".join(exact)
            self._call("write", key, lambda s3, watch: s3.put_object(**where, Body=_body(data, watch)))

    def write_new(self, key: str, data: bytes) -> bool:
        """Like `Storage.write_new`, also for writers of the same bytes.

        The object carries a name of its writer that nobody else has. When the key is taken, perhaps by
        an attempt of ours whose answer was lost, that name tells who won.
        """
        from botocore.exceptions import ClientError

        where, writer = self._where(key), secrets.token_hex(16)

        def put(s3: Any, watch: TransferProgress) -> bool:
            try:
                s3.put_object(**where, Body=_body(data, watch), IfNoneMatch="*", Metadata={_WRITER: writer})
            except ClientError as error:
                if _status(error) != 412:
                    raise
                return False
            return True

        return self._call("write", key, put) or self._was_put_by(key, writer)

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except MissingKeyError:
            return False
        return True

    def size(self, key: str) -> int:
        where = self._where(key)
        return self._call("read", key, lambda s3, _: s3.head_object(**where)["ContentLength"])

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        wanted = {"Bucket": self.bucket, "Prefix": self.prefix + prefix}
        entries: Any = []
        truncated = True
        while truncated:
            page = self._call(
                "list", prefix, lambda s3, _: _with("IsTruncated", s3.list_objects_v2(**wanted))
            )
            entries += page.get("Contents", ())
            if truncated := page["IsTruncated"]:
                wanted["ContinuationToken"] = page["NextContinuationToken"]
        return sorted((entry["Key"][len(self.prefix) :], entry["Size"]) for entry in entries)

    def delete(self, key: str) -> None:
        where = self._where(key)
        self._call("delete", key, lambda s3, _: s3.delete_object(**where))

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def _where(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + check_key(key)}

    def _client_here(self) -> Any:
        """This process's client: a forked child must not share its parent's connections."""
        with self._client_lock:
            if self._client_pid != os.getpid():
                self._client = _connect()
                self._client_pid = os.getpid()
        return self._client

    def _upload(self, key: str, parts: Iterable[bytearray]) -> None:
        """Put an object in parts; nobody sees it before all of them are there."""
        where, writer = self._where(key), secrets.token_hex(16)

        def begin(s3: Any, _: TransferProgress) -> dict[str, Any]:
            return _with("UploadId", s3.create_multipart_upload(**where, Metadata={_WRITER: writer}))

        begun = self._call("write", key, begin)
        upload = {**where, "UploadId": begun["UploadId"]}
        try:
            sent = [self._send_part(key, upload, number, part) for number, part in enumerate(parts, 1)]
            self._complete(key, upload, sent, writer)
        except BaseException:
            with suppress(StorageError):
                self._call(
                    "abort", key, lambda s3, _: s3.abort_multipart_upload(**upload), 2 * transfer.STALL_S
                )
            raise

    def _send_part(self, key: str, upload: dict[str, str], number: int, part: bytearray) -> dict[str, Any]:
        answer = self._call(
            "write",
            key,
            lambda s3, watch: s3.upload_part(**upload, PartNumber=number, Body=_body(part, watch)),
        )
        return {"PartNumber": number, "ETag": answer["ETag"]}

    def _complete(
        self, key: str, upload: dict[str, str], sent: Sequence[dict[str, Any]], writer: str
    ) -> None:
        from botocore.exceptions import ClientError

        def complete(s3: Any, _: TransferProgress) -> bool:
            try:
                _with("ETag", s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": sent}))
            except ClientError as error:
                if _status(error) != 404:
                    raise
                return False
            return True

        # The server knows an upload no more that an attempt of ours completed whose answer was lost.
        if not (self._call("write", key, complete) or self._was_put_by(key, writer)):
            raise StorageError(f"cannot write {self.url}/{key}: somebody aborted the upload; write it again")

    def _was_put_by(self, key: str, writer: str) -> bool:
        """Whether the object that lies there carries this writer's name."""
        where = self._where(key)
        try:
            head = self._call("read", key, lambda s3, _: s3.head_object(**where))
        except MissingKeyError:
            return False
        return head["Metadata"].get(_WRITER) == writer

    def _call(
        self,
        verb: str,
        key: str,
        action: Callable[[Any, TransferProgress], T],
        deadline_s: float | None = None,
    ) -> T:
        """What `action` gives when no passing fault meets it any more; `deadline_s` is DEADLINE_S if None."""
        last_start_s = (DEADLINE_S if deadline_s is None else deadline_s) - transfer.STALL_S
        where = f"cannot {verb} {self.url}/{key}"
        begin_s = time.monotonic()
        attempt = 0
        while True:
            attempt += 1
            try:
                return transfer.attempt(lambda watch: action(self._client_here(), watch))
            except StorageError:
                raise
            except Exception as error:
                if not _passes(error):
                    raise self._explain(where, error) from error
                pause_s = _pause_s(attempt)
                spent_s = time.monotonic() - begin_s
                too_late = spent_s + pause_s > last_start_s and attempt >= SURE_ATTEMPTS
                if too_late or attempt >= ATTEMPTS:
                    tried = f"{where}, tried {attempt} times in {spent_s:.0f} s"
                    raise self._explain(tried, error) from error
            time.sleep(pause_s)

    def _explain(self, where: str, error: Exception) -> StorageError:
        from botocore import exceptions

        if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
            return UnavailableError(
                f"{where}: no complete S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "AWS_PROFILE, or run where a role is attached"
            )
        if isinstance(error, exceptions.EndpointConnectionError | exceptions.ConnectTimeoutError):
            return UnavailableError(
                f"{where}: no answer from the S3 server; check AWS_ENDPOINT_URL and the network"
            )
        if isinstance(error, BrokenError):
            return UnavailableError(f"{where}: {error}")
        if isinstance(error, exceptions.ReadTimeoutError):
            return UnavailableError(f"{where}: no answer in {transfer.STALL_S:g} s")
        if not isinstance(error, exceptions.ClientError):
            return UnavailableError(f"{where}: {type(error).__name__}: {error}")
        code = _code(error)
        if code in _MISSING_CODES:
            return MissingKeyError(f"{where}: there is nothing")
        advice = {
            "NoSuchBucket": f"there is no bucket {self.bucket!r}; create it, or correct the url",
            "InvalidRange": "the object is shorter than that",
            "AccessDenied": _DENIED,
            "403": _DENIED,
            "SignatureDoesNotMatch": "the server does not accept the secret key",
            "InvalidAccessKeyId": "the server does not know the access key",
            "QuotaExceeded": "the quota of the bucket or of its owner is used up; raise it, or make room: "
            "what was written before is intact",
            "ExpiredToken": "the session token has expired; fetch new credentials",
        }.get(code, error.response["Error"].get("Message", ""))
        kind = StorageError if code == "InvalidRange" else UnavailableError
        return kind(f"{where}: {code}: {advice}")


def _body(data: bytes | bytearray, watch: TransferProgress) -> bytes | transfer.WatchedBody:
    """What boto3 sends: few bytes as they are, for even at the slowest rate they are gone in STALL_S."""
    few = transfer.STALL_S * transfer.SLOWEST_BYTES_PER_S
    return bytes(data) if len(data) <= few else transfer.WatchedBody(data, watch)


def _part_bytes(size: int) -> int:
    return max(PART_BYTES, MIN_PART_BYTES, -(-size // MAX_PARTS))


def _has_md5(answer: dict[str, Any]) -> bool:
    """Whether the ETag of an object should be what `_etag` computes.

    It is another one where keys are managed elsewhere, and where others chose the sizes of its parts.
    """
    etag, encryption = answer.get("ETag", "").strip('"'), answer.get("ServerSideEncryption", "AES256")
    known_parts = "-" not in etag or _WRITER in answer.get("Metadata", {})
    return bool(etag) and known_parts and encryption == "AES256" and "SSECustomerAlgorithm" not in answer


def _etag(data: bytes) -> str:
    """The ETag of an object that was put as this module puts it: MD5, or MD5 of the parts' MD5s."""

    def md5(piece: bytes | memoryview) -> Any:
        return hashlib.md5(piece, usedforsecurity=False)

    part_bytes = _part_bytes(len(data))
    if len(data) <= part_bytes:
        return md5(data).hexdigest()
    starts = range(0, len(data), part_bytes)
    digests = b"".join(md5(memoryview(data)[start : start + part_bytes]).digest() for start in starts)
    return f"{md5(digests).hexdigest()}-{len(starts)}"


def _receive(answer: dict[str, Any], watch: TransferProgress) -> bytes:
    with closing(answer["Body"]) as body:
        return transfer.receive(body.read, watch)


def _with(field: str, answer: dict[str, Any]) -> dict[str, Any]:
    """The answer itself. boto3 takes one that broke off before its body for an empty one."""
    if field not in answer:
        raise BrokenError(f"an answer without {field}")
    return answer


def _status(error: Any) -> int:
    """Of HTTP: it comes with the head, and is known when the body with the code was lost."""
    return error.response["ResponseMetadata"].get("HTTPStatusCode", 0)


def _code(error: Any) -> str:
    return error.response["Error"].get("Code", "unknown error")


def _passes(error: Exception) -> bool:
    """Whether another attempt may succeed."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    if isinstance(error, exceptions.ClientError):
        status = _status(error)
        passing = status in _PASSING_STATUS or (status >= 500 and status != 501)
        return passing or _code(error) in _PASSING_CODES
    if isinstance(error, exceptions.SSLError):
        return "CERTIFICATE_VERIFY_FAILED" not in str(error)
    passing_types = (
        BrokenError,
        ResponseParserError,
        exceptions.ConnectionError,
        exceptions.FlexibleChecksumError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
    )
    return isinstance(error, passing_types)


def _connect() -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        # All attempts are made in one place, which knows the deadline: boto3's would multiply with them.
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=transfer.STALL_S,
        read_timeout=transfer.STALL_S,
        # Servers other than Amazon's rarely answer to bucket.host names.
        s3={"addressing_style": "path" if os.environ.get("AWS_ENDPOINT_URL") else "auto"},
        # The checksums that boto3 adds by itself are sent as trailers over TLS, which servers from before
        # them, Ceph 16 among these, refuse. Without them the SHA-256 of every body is signed instead.
        request_checksum_calculation="when_required",
    )
    return boto3.session.Session().client("s3", config=config)


def _pause_s(attempt: int) -> float:
    """Growing, and with jitter so that many processes do not march in step."""
    return min(FIRST_PAUSE_S * 2 ** (attempt - 1), LONGEST_PAUSE_S) * (0.5 + secrets.randbelow(1000) / 1000)
