"""A prefix of a bucket on S3, or on a server that speaks its protocol: the one door to boto3.

Credentials and endpoint come from where boto3 looks for them (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_ENDPOINT_URL, instance roles); none appear in a message.
"""

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from dit_scale.errors import StorageError
from dit_scale.storage.base import MissingKeyError, Storage, check_key, whole

ATTEMPTS = 6
"""Times that one request is made of S3 before it fails."""
FIRST_PAUSE_S = 0.2
"""Pause before the second attempt; it doubles with each further one."""

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

    def read(self, key: str) -> bytes:
        return self._read_body(key)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        if length == 0:
            return b""
        data = self._read_body(key, Range=f"bytes={start}-{start + length - 1}")
        whole(len(data), length, f"{self.url}/{key} at {start}")
        return data

    def write(self, key: str, data: bytes) -> None:
        name = self._name(key)
        self._call("write", key, lambda s3: s3.put_object(Bucket=self.bucket, Key=name, Body=data))

    def write_stream(self, key: str, chunks: Iterable[memoryview], size: int) -> None:
        data = b"".join(chunks)
        whole(len(data), size, f"{self.url}/{key}")
        self.write(key, data)

    def write_new(self, key: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        name = self._name(key)
        for pause_s in _pauses():
            time.sleep(pause_s)
            try:
                self._client_here().put_object(Bucket=self.bucket, Key=name, Body=data, IfNoneMatch="*")
                return True
            except ClientError as error:
                code = error.response["Error"].get("Code")
                if code == "PreconditionFailed":
                    # boto3 repeats a put whose answer was lost; then the object that is there is ours.
                    repeated = error.response["ResponseMetadata"].get("RetryAttempts", 0) > 0
                    return repeated and self.read(key) == data
                if code != "ConditionalRequestConflict":
                    raise self._explain("write", key, error) from error
            except Exception as error:
                raise self._explain("write", key, error) from error
            # Two conditional puts met: S3 asks to try again.
        raise StorageError(f"cannot write {self.url}/{key}: {ATTEMPTS} conditional puts met another one")

    def exists(self, key: str) -> bool:
        try:
            self.size(key)
        except MissingKeyError:
            return False
        return True

    def size(self, key: str) -> int:
        name = self._name(key)
        return self._call(
            "read", key, lambda s3: s3.head_object(Bucket=self.bucket, Key=name)["ContentLength"]
        )

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        def pages(s3: Any) -> list[tuple[str, int]]:
            pager = s3.get_paginator("list_objects_v2")
            return [
                (entry["Key"][len(self.prefix) :], entry["Size"])
                for page in pager.paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
                for entry in page.get("Contents", ())
            ]

        return sorted(self._call("list", prefix, pages))

    def delete(self, key: str) -> None:
        name = self._name(key)
        self._call("delete", key, lambda s3: s3.delete_object(Bucket=self.bucket, Key=name))

    def local_path(self, key: str) -> Path | None:
        check_key(key)
        return None

    def _name(self, key: str) -> str:
        return self.prefix + check_key(key)

    def _client_here(self) -> Any:
        """This process's client: a forked child must not share its parent's connections."""
        with self._client_lock:
            if self._client_pid != os.getpid():
                self._client = _connect()
                self._client_pid = os.getpid()
        return self._client

    def _call(self, verb: str, key: str, action: Callable[[Any], T]) -> T:
        try:
            return action(self._client_here())
        except Exception as error:
            raise self._explain(verb, key, error) from error

    def _read_body(self, key: str, **wanted: str) -> bytes:
        """A body, asked for again when it breaks off: boto3 repeats requests, but not bodies."""
        from botocore.exceptions import HTTPClientError, IncompleteReadError, ResponseStreamingError

        name = self._name(key)
        for pause_s in _pauses():
            time.sleep(pause_s)
            answer = self._call("read", key, lambda s3: s3.get_object(Bucket=self.bucket, Key=name, **wanted))
            try:
                data = answer["Body"].read()
                if len(data) == answer["ContentLength"]:
                    return data
                reason = f"got {len(data)} of {answer['ContentLength']} bytes"
            except (HTTPClientError, IncompleteReadError, ResponseStreamingError, OSError) as error:
                reason = str(error)
        raise StorageError(f"cannot read {self.url}/{key}: the body broke off {ATTEMPTS} times ({reason})")

    def _explain(self, verb: str, key: str, error: Exception) -> StorageError:
        from botocore import exceptions

        where = f"cannot {verb} {self.url}/{key}"
        if isinstance(error, StorageError):
            return error
        if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
            return StorageError(
                f"{where}: no complete S3 credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "AWS_PROFILE, or run where a role is attached"
            )
        if isinstance(error, exceptions.EndpointConnectionError | exceptions.ConnectTimeoutError):
            return StorageError(
                f"{where}: no answer from the S3 server; check AWS_ENDPOINT_URL and the network"
            )
        if not isinstance(error, exceptions.ClientError):
            return StorageError(f"{where}: {type(error).__name__}: {error}")
        code = error.response["Error"].get("Code", "unknown error")
        if code in ("NoSuchKey", "404"):
            return MissingKeyError(f"{where}: there is nothing")
        advice = {
            "NoSuchBucket": f"there is no bucket {self.bucket!r}; create it, or correct the url",
            "InvalidRange": "the object is shorter than that",
            "AccessDenied": "the credentials do not permit this; check the bucket's policy",
            "403": "the credentials do not permit this; check the bucket's policy",
            "SignatureDoesNotMatch": "the server does not accept the secret key",
            "InvalidAccessKeyId": "the server does not know the access key",
            "ExpiredToken": "the session token has expired; fetch new credentials",
        }.get(code, error.response["Error"].get("Message", ""))
        return StorageError(f"{where}: {code}: {advice}")


def _connect() -> Any:
    import boto3
    from botocore.config import Config

    # Servers other than Amazon's rarely answer to bucket.host names.
    style = "path" if os.environ.get("AWS_ENDPOINT_URL") else "auto"
    retries = {"mode": "standard", "total_max_attempts": ATTEMPTS}
    config = Config(retries=retries, connect_timeout=10, read_timeout=60, s3={"addressing_style": style})
    return boto3.session.Session().client("s3", config=config)


def _pauses() -> Iterator[float]:
    """0, then pauses that double, with jitter so that many processes do not march in step."""
    yield 0.0
    for attempt in range(ATTEMPTS - 1):
        yield FIRST_PAUSE_S * 2**attempt * (0.5 + secrets.randbelow(1000) / 1000)
