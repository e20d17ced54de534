"""The one door to folders and S3: small objects under keys, written whole, never half.

    storage = open_storage("s3://bucket/imagenet256")    # or a folder, or file:///folder
    storage.write("dataset.json", data)

Keys are relative to the url, use "/" and cannot leave it. A write is seen completely or not at all.
S3 credentials and endpoint come from where boto3 looks for them (AWS_ACCESS_KEY_ID,
AWS_SECRET_ACCESS_KEY, AWS_PROFILE, AWS_ENDPOINT_URL, instance roles); none appear in a message.
"""

import errno
import os
import secrets
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from dit_scale.errors import StorageError

ATTEMPTS = 6
"""Times that one request is made of S3 before it fails."""
FIRST_PAUSE_S = 0.2
"""Pause before the second attempt; it doubles with each further one."""

T = TypeVar("T")


class MissingKeyError(StorageError):
    """There is nothing under this key."""


class Storage(ABC):
    """A flat space of immutable-by-habit objects; every method raises StorageError."""

    url: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object; MissingKeyError when there is none."""

    @abstractmethod
    def read_range(self, key: str, start: int, length: int) -> bytes:
        """Exactly `length` bytes from `start`; an object that ends earlier is an error."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Put the object, replacing what is there; durable when this returns."""

    @abstractmethod
    def write_new(self, key: str, data: bytes) -> bool:
        """Put the object only if the key is free; of many writers exactly one gets True."""

    @abstractmethod
    def exists(self, key: str) -> bool:
        """Whether the key holds an object."""

    @abstractmethod
    def size(self, key: str) -> int:
        """Bytes of the object; MissingKeyError when there is none."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        """(key, bytes) of every object whose key starts with `prefix`, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; a key that holds nothing is fine."""

    @abstractmethod
    def local_path(self, key: str) -> Path | None:
        """Where the object lies on this machine's file systems; None when it is remote."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"


def open_storage(url: str | Path) -> Storage:
    """The storage behind a folder's path, `file:///folder` or `s3://bucket/prefix`; touches nothing yet."""
    text = str(url)
    scheme, separator, rest = text.partition("://")
    if not separator:
        return DiskStorage(Path(text).expanduser())
    if scheme == "file" and rest.startswith("/"):
        return DiskStorage(Path(rest))
    if scheme == "s3" and rest.strip("/"):
        bucket, _, prefix = rest.partition("/")
        return S3Storage(bucket, prefix.strip("/"))
    raise StorageError(f"cannot open {text!r}: expected a folder, file:///folder or s3://bucket/prefix")


def _check_key(key: str) -> str:
    if not key or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise StorageError(f"key {key!r}: expected a relative path without empty parts, '.' or '..'")
    return key


class DiskStorage(Storage):
    """A folder on a local or shared file system."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(os.path.abspath(folder))
        self.url = str(self.folder)

    def read(self, key: str) -> bytes:
        with _disk_errors(self, "read", key):
            return self._path(key).read_bytes()

    def read_range(self, key: str, start: int, length: int) -> bytes:
        with _disk_errors(self, "read", key), open(self._path(key), "rb") as file:
            file.seek(start)
            data = file.read(length)
        return _whole(data, length, f"{self.url}/{key} at {start}")

    def write(self, key: str, data: bytes) -> None:
        path = self._path(key)
        with _disk_errors(self, "write", key), self._temporary(path, data) as tmp:
            os.replace(tmp, path)
            _sync_folder(path.parent)

    def write_new(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        with _disk_errors(self, "write", key), self._temporary(path, data) as tmp:
            try:
                os.link(tmp, path)
            except FileExistsError:
                # NFS may repeat a link() that had succeeded: then our own file has two names.
                if tmp.stat().st_nlink != 2:
                    return False
            _sync_folder(path.parent)
            return True

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def size(self, key: str) -> int:
        with _disk_errors(self, "read", key):
            return self._path(key).stat().st_size

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        top = self.folder / _check_key(prefix.rpartition("/")[0]) if "/" in prefix else self.folder
        found: list[tuple[str, int]] = []
        if not top.is_dir():
            return found
        with _disk_errors(self, "list", prefix):
            for folder, _, names in os.walk(top, onerror=_raise, followlinks=True):
                for name in names:
                    path = os.path.join(folder, name)
                    key = os.path.relpath(path, self.folder)
                    if key.startswith(prefix) and not _is_temporary(name):
                        with suppress(FileNotFoundError):  # deleted since, or a dangling link
                            found.append((key, os.stat(path).st_size))
        return sorted(found)

    def delete(self, key: str) -> None:
        path = self._path(key)
        with _disk_errors(self, "delete", key), suppress(FileNotFoundError):
            path.unlink()
            _sync_folder(path.parent)
            if path.parent != self.folder:
                with suppress(OSError):  # holds more
                    path.parent.rmdir()

    def local_path(self, key: str) -> Path | None:
        return self._path(key)

    def _path(self, key: str) -> Path:
        return self.folder / _check_key(key)

    @contextmanager
    def _temporary(self, path: Path, data: bytes) -> Iterator[Path]:
        """A synced file with `data` beside `path`, gone afterwards unless it was renamed."""
        _make_folder(path.parent)
        tmp = path.parent / f".{path.name}.{secrets.token_hex(8)}.tmp"
        try:
            with open(tmp, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield tmp
        finally:
            tmp.unlink(missing_ok=True)


def _raise(error: OSError) -> None:
    raise error


def _is_temporary(name: str) -> bool:
    return name.startswith(".") and name.endswith(".tmp")


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(storage: Storage, verb: str, key: str) -> Iterator[None]:
    where = f"{storage.url}/{key}"
    try:
        yield
    except FileNotFoundError:
        raise MissingKeyError(f"cannot {verb} {where}: there is nothing") from None
    except OSError as error:
        advice = {
            errno.ENOSPC: "; free some space, what was written before is intact",
            errno.EDQUOT: "; the quota is used up, what was written before is intact",
            errno.EACCES: "; check the owner and the mode of the folder",
            errno.EROFS: "; choose a folder that can be written",
            errno.EPERM: "; if this file system has no hard links, choose another or s3://",
            errno.ENOTSUP: "; if this file system has no hard links, choose another or s3://",
        }.get(error.errno or 0, "")
        raise StorageError(f"cannot {verb} {where}: {error.strerror}{advice}") from error


def _whole(data: bytes, length: int, where: str) -> bytes:
    if len(data) != length:
        raise StorageError(
            f"{where}: expected {length} bytes, got {len(data)}; the object is shorter than it was"
        )
    return data


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
        return _whole(data, length, f"{self.url}/{key} at {start}")

    def write(self, key: str, data: bytes) -> None:
        name = self._name(key)
        self._call("write", key, lambda s3: s3.put_object(Bucket=self.bucket, Key=name, Body=data))

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
        _check_key(key)
        return None

    def _name(self, key: str) -> str:
        return self.prefix + _check_key(key)

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
