"""A prefix of a bucket on S3, or on a server that speaks its protocol: the only module that imports boto3.

Credentials and endpoint come from where boto3 looks for them (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_ENDPOINT_URL, instance roles); no message contains them.

A request that fails for a transient reason (no connection, 5xx, a body that breaks off or stalls) is
retried with exponential backoff, up to MAX_TRIES times or DEADLINE_S. Any try may have reached the server
although its answer was lost; every operation is correct all the same. After a StorageError, the object of a
write may or may not exist.

Bytes corrupted in transit are detected in uploads, and in `read` if the server sends a checksum or if the
ETag is the MD5. The ETag is not if the server encrypts with managed keys or if the sizes of the parts are
unknown; and S3 has no checksum of a range. So the objects themselves should carry checksums.

A process that dies during a large write leaves invisible parts that take up space: give the bucket a
lifecycle rule that aborts incomplete multipart uploads.
"""

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
from dit_scale.storage.etags import etag_of, is_md5
from dit_scale.storage.transfer import BrokenError, TransferProgress

MAX_TRIES = 20
"""Tries per request. If 3 of 10 requests fail, one request in 3e10 fails this many times in a row."""
MIN_TRIES = 3
"""Tries that a request gets regardless of the deadline: a long body may break off late."""
DEADLINE_S = 120.0
"""Seconds within which a request must succeed; no try starts in the last `transfer.STALL_S` of them."""
FIRST_PAUSE_S = 0.2
"""Pause before the second try; it doubles with every further try."""
LONGEST_PAUSE_S = 8.0

PART_BYTES = 16 * 2**20
"""Larger objects are uploaded in parts of this size, or larger ones if there would be more than MAX_PARTS."""
MIN_PART_BYTES = 5 * 2**20
"""Limit of S3, like the next two; only the last part may be smaller."""
MAX_PARTS = 10_000
MAX_OBJECT_BYTES = 5 * 2**40

_WRITER = "writer"
"""Key of the object metadata that identifies the writer."""
_TRANSIENT_STATUS = (409, 429)
"""Conflicting operations; too many requests."""
_TRANSIENT_CODES = ("BadDigest", "IncompleteBody", "RequestTimeout", "SlowDown", "XAmzContentSHA256Mismatch")
"""Errors of bodies that were cut off or corrupted in transit, and the request to slow down."""
_MISSING_CODES = ("NoSuchKey", "404")
_DENIED = "the credentials do not permit this; check the bucket's policy, and that the key is still valid"
"""Ceph also answers this for a revoked key, while only one of its two records of the key is deleted."""

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
        """Assumed until one ETag turns out to be something else."""

    def read(self, key: str) -> bytes:
        target = self._target(key)
        doubted = set()

        def get(s3: Any, progress: TransferProgress) -> bytes:
            answer = s3.get_object(**target)
            data = _receive(answer, progress)
            known_parts = _WRITER in answer.get("Metadata", {})
            if not self._etags_are_md5 or not is_md5(answer, known_parts):
                return data
            theirs, ours = answer["ETag"].strip('"'), etag_of(data, _part_bytes(len(data)))
            if theirs != ours and ours not in doubted:
                doubted.add(ours)
                raise BrokenError(f"the bytes received should have ETag {ours}, theirs is {theirs}")
            # The same bytes twice are right: then the ETags of this server are not MD5.
            self._etags_are_md5 = theirs == ours
            return data

        return self._call("read", key, get)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        target = {**self._target(key), "Range": f"bytes={start}-{start + length - 1}"}
        data = self._call("read", key, lambda s3, progress: _receive(s3.get_object(**target), progress))
        check_complete(len(data), length, f"{self.url}/{key} at {start}")
        return data

    def write(self, key: str, data: bytes) -> None:
        self.write_stream(key, [memoryview(data)], len(data))

    def write_stream(self, key: str, chunks: Iterable[memoryview], size: int) -> None:
        """Like `Storage.write_stream`; holds one part in memory."""
        if size > MAX_OBJECT_BYTES:
            raise StorageError(
                f"cannot write {self.url}/{key}: {size} bytes, and S3 takes at most {MAX_OBJECT_BYTES}; "
                "split the object"
            )
        target = self._target(key)
        exact = transfer.exactly(chunks, size, f"{self.url}/{key}")
        part_bytes = _part_bytes(size)
        if size > part_bytes:
            self._upload(key, transfer.parts(exact, part_bytes))
        else:
            data = b"".join(exact)
            self._call(
                "write",
                key,
                lambda s3, progress: s3.put_object(**target, Body=transfer.body(data, progress)),
            )

    def write_new(self, key: str, data: bytes) -> bool:
        """Like `Storage.write_new`, also if several writers write the same bytes.

        The object carries a unique name of its writer. If the key is taken, perhaps by a try of ours whose
        answer was lost, that name tells which writer won.
        """
        from botocore.exceptions import ClientError

        target, writer = self._target(key), secrets.token_hex(16)

        def put(s3: Any, progress: TransferProgress) -> bool:
            body = transfer.body(data, progress)
            try:
                s3.put_object(**target, Body=body, IfNoneMatch="*", Metadata={_WRITER: writer})
            except ClientError as error:
                if _status(error) != 412:
                    raise
                return False
            return True

        return self._call("write", key, put) or self._was_written_by(key, writer)

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except MissingKeyError:
            return False
        return True

    def size(self, key: str) -> int:
        target = self._target(key)
        return self._call("read", key, lambda s3, _: s3.head_object(**target)["ContentLength"])

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        target = {"Bucket": self.bucket, "Prefix": self.prefix + prefix}
        entries: Any = []
        truncated = True
        while truncated:
            page = self._call(
                "list", prefix, lambda s3, _: _require("IsTruncated", s3.list_objects_v2(**target))
            )
            entries += page.get("Contents", ())
            if truncated := page["IsTruncated"]:
                target["ContinuationToken"] = page["NextContinuationToken"]
        return sorted((entry["Key"][len(self.prefix) :], entry["Size"]) for entry in entries)

    def delete(self, key: str) -> None:
        target = self._target(key)
        self._call("delete", key, lambda s3, _: s3.delete_object(**target))

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def _target(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self.prefix + check_key(key)}

    def _client_here(self) -> Any:
        """Return this process's client: a forked child must not share its parent's connections."""
        with self._client_lock:
            if self._client_pid != os.getpid():
                self._client = _connect()
                self._client_pid = os.getpid()
        return self._client

    def _upload(self, key: str, parts: Iterable[bytearray]) -> None:
        """Upload an object in parts; it becomes visible with the last request."""
        target, writer = self._target(key), secrets.token_hex(16)

        def start(s3: Any, _: TransferProgress) -> dict[str, Any]:
            answer = s3.create_multipart_upload(**target, Metadata={_WRITER: writer})
            return _require("UploadId", answer)

        upload = {**target, "UploadId": self._call("write", key, start)["UploadId"]}
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
        def send(s3: Any, progress: TransferProgress) -> Any:
            return s3.upload_part(**upload, PartNumber=number, Body=transfer.body(part, progress))

        return {"PartNumber": number, "ETag": self._call("write", key, send)["ETag"]}

    def _complete(
        self, key: str, upload: dict[str, str], sent: Sequence[dict[str, Any]], writer: str
    ) -> None:
        from botocore.exceptions import ClientError

        def complete(s3: Any, _: TransferProgress) -> bool:
            try:
                _require("ETag", s3.complete_multipart_upload(**upload, MultipartUpload={"Parts": sent}))
            except ClientError as error:
                if _status(error) != 404:
                    raise
                return False
            return True

        # The server has forgotten an upload that a try of ours completed although the answer was lost.
        if not (self._call("write", key, complete) or self._was_written_by(key, writer)):
            raise StorageError(f"cannot write {self.url}/{key}: the upload was aborted; write it again")

    def _was_written_by(self, key: str, writer: str) -> bool:
        """Whether the object under this key carries this writer's name."""
        target = self._target(key)
        try:
            head = self._call("read", key, lambda s3, _: s3.head_object(**target))
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
        """Return the result of `action`, retried after transient errors. Default deadline: DEADLINE_S."""
        last_start_s = (DEADLINE_S if deadline_s is None else deadline_s) - transfer.STALL_S
        where = f"cannot {verb} {self.url}/{key}"
        start_s = time.monotonic()
        tries = 0
        while True:
            tries += 1
            try:
                return transfer.run_watched(lambda progress: action(self._client_here(), progress))
            except StorageError:
                raise
            except Exception as error:
                if not _is_transient(error):
                    raise self._explain(where, error) from error
                pause_s = _pause_s(tries)
                spent_s = time.monotonic() - start_s
                too_late = spent_s + pause_s > last_start_s and tries >= MIN_TRIES
                if too_late or tries >= MAX_TRIES:
                    raise self._explain(f"{where}, tried {tries} times in {spent_s:.0f} s", error) from error
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
            return MissingKeyError(f"{where}: not found")
        advice = {
            "NoSuchBucket": f"there is no bucket {self.bucket!r}; create it, or correct the url",
            "InvalidRange": "the object is truncated",
            "AccessDenied": _DENIED,
            "403": _DENIED,
            "SignatureDoesNotMatch": "the server does not accept the secret key",
            "InvalidAccessKeyId": "the server does not know the access key",
            "QuotaExceeded": "the quota of the bucket or of its owner is used up; raise it, or free some "
            "space: data already written is intact",
            "ExpiredToken": "the session token has expired; get new credentials",
        }.get(code, error.response["Error"].get("Message", ""))
        kind = StorageError if code == "InvalidRange" else UnavailableError
        return kind(f"{where}: {code}: {advice}")


def _part_bytes(size: int) -> int:
    return max(PART_BYTES, MIN_PART_BYTES, -(-size // MAX_PARTS))


def _receive(answer: dict[str, Any], progress: TransferProgress) -> bytes:
    with closing(answer["Body"]) as body:
        return transfer.receive(body.read, progress)


def _require(field: str, answer: dict[str, Any]) -> dict[str, Any]:
    """Return the answer if it has the field: boto3 accepts an answer that broke off before its body."""
    if field not in answer:
        raise BrokenError(f"an answer without {field}")
    return answer


def _status(error: Any) -> int:
    """HTTP status, which is known even if the body with the error code was lost."""
    return error.response["ResponseMetadata"].get("HTTPStatusCode", 0)


def _code(error: Any) -> str:
    return error.response["Error"].get("Code", "unknown error")


def _is_transient(error: Exception) -> bool:
    """Whether a retry may succeed."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    if isinstance(error, exceptions.ClientError):
        status = _status(error)
        is_server_error = status >= 500 and status != 501  # 501: the server does not implement the request
        return is_server_error or status in _TRANSIENT_STATUS or _code(error) in _TRANSIENT_CODES
    if isinstance(error, exceptions.SSLError):
        return "CERTIFICATE_VERIFY_FAILED" not in str(error)
    transient_types = (
        BrokenError,
        ResponseParserError,
        exceptions.ConnectionError,
        exceptions.FlexibleChecksumError,
        exceptions.HTTPClientError,
        exceptions.IncompleteReadError,
    )
    return isinstance(error, transient_types)


def _connect() -> Any:
    import boto3
    from botocore.config import Config

    config = Config(
        # All retries happen in `_call`, which knows the deadline: boto3's would multiply with them.
        retries={"mode": "standard", "total_max_attempts": 1},
        connect_timeout=transfer.STALL_S,
        read_timeout=transfer.STALL_S,
        # Servers other than Amazon's rarely resolve bucket.host names.
        s3={"addressing_style": "path" if os.environ.get("AWS_ENDPOINT_URL") else "auto"},
        # By default boto3 sends checksums as trailers over TLS, which older servers, such as Ceph 16, refuse.
        # Without them the SHA-256 of every body is signed instead.
        request_checksum_calculation="when_required",
    )
    return boto3.session.Session().client("s3", config=config)


def _pause_s(tries: int) -> float:
    """Exponential backoff, with jitter so that many processes do not retry in lockstep."""
    return min(FIRST_PAUSE_S * 2 ** (tries - 1), LONGEST_PAUSE_S) * (0.5 + secrets.randbelow(1000) / 1000)
