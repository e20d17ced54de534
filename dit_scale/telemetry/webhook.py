"""Messages to a chat or a pager: a POST of JSON when a run is done, gives up, or rolls back.

    export DIT_SCALE_WEBHOOK_URL=https://hooks.slack.com/services/...

The URL is a secret: it comes from the environment of the process alone, and no message, log or file names it.
"""

import json
import os
import threading
import urllib.request
from enum import StrEnum
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit

from dit_scale.errors import StorageError
from dit_scale.lines import Alarm
from dit_scale.storage import Storage

URL_VARIABLE = "DIT_SCALE_WEBHOOK_URL"
TIMEOUT_S = 4.0
"""Longest wait for the server. Training pauses for it; heartbeats may be that late."""


class Notice(StrEnum):
    """What a message is about. The values are a format: add to them, never change them."""

    DONE = "done"
    """The run has reached its last step."""
    GAVE_UP = "gave_up"
    """The run has failed, and no restart follows."""
    ROLLED_BACK = "rolled_back"
    """Steps failed: the run continues from an earlier checkpoint without their samples."""


TEXTS = {Notice.DONE: "is done", Notice.GAVE_UP: "gave up", Notice.ROLLED_BACK: "rolled back"}


class Webhook:
    """Sends the messages of one process. A failure costs one alarm; sending blocks for at most TIMEOUT_S."""

    def __init__(self, run: str, root: Storage, node: str, alarm: Alarm) -> None:
        """`root` is the state root of the run, where messages that were sent are marked."""
        self._url = os.environ.get(URL_VARIABLE, "")
        self._run, self._root, self._node, self._alarm = run, root, node, alarm
        self._has_failed = False

    def send(self, notice: Notice, step: int, reason: str, *, once: str, node: str = "") -> None:
        """Send a message, unless a process of this run has sent one with this notice and `once` before.

        `node` is where it happened; by default the node of this process.
        """
        if not self._url or not self._claim(f"notices/{notice}-{once}"):
            return
        message = {
            "text": f"{self._run} {TEXTS[notice]} at step {step}: {reason}",
            "run": self._run,
            "event": notice,
            "step": step,
            "node": node or self._node,
            "reason": reason,
        }
        if (problem := self._post(json.dumps(message).encode())) and not self._has_failed:
            self._has_failed = True
            self._alarm(f"the webhook of {URL_VARIABLE} failed, and its message is lost: {problem}")

    def _claim(self, key: str) -> bool:
        """Whether this process is the first to send the message. A broken storage does not prevent it."""
        try:
            return self._root.write_new(key, b"")
        except StorageError:
            return True

    def _post(self, body: bytes) -> str:
        """Send a body and return what went wrong; empty if nothing."""
        problems = [f"no answer within {TIMEOUT_S:g} s"]

        def post() -> None:
            problems[0] = _post(self._url, body)

        # In a thread, because a timeout of a socket does not cover the look-up of the server's name.
        thread = threading.Thread(target=post, name="webhook", daemon=True)
        thread.start()
        thread.join(TIMEOUT_S)
        return problems[0]


def _post(url: str, body: bytes) -> str:
    """Send a body and return what went wrong, in words that cannot contain the URL; empty if nothing."""
    try:
        if urlsplit(url).scheme not in ("http", "https"):
            return "expected an http:// or https:// URL"
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=TIMEOUT_S).close()
    except HTTPError as error:
        return f"the server answered with HTTP status {error.code}"
    except (URLError, OSError) as error:
        cause = error.reason if isinstance(error, URLError) else error
        return (cause.strerror if isinstance(cause, OSError) else None) or type(cause).__name__
    except Exception as error:  # messages of a malformed URL quote it
        return type(error).__name__
    return ""
