"""Messages to a webhook: a real server gets them once, and a broken one costs one alarm without the URL."""

from pathlib import Path
from typing import Any

import pytest

from dit_scale.elastic.launch import notify
from dit_scale.journal import Event
from dit_scale.storage import open_storage
from dit_scale.telemetry import webhook
from dit_scale.telemetry.webhook import URL_VARIABLE, Notice, Webhook
from tests.support.webhook import SECRET, receiver


def made(root: Path, alarms: list[str], node: str = "a") -> Webhook:
    return Webhook("/runs/xl2", open_storage(str(root)), node, alarms.append)


def test_one_message_for_all_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alarms: list[str] = []
    with receiver() as (url, received):
        monkeypatch.setenv(URL_VARIABLE, url)
        for node in "ab":
            made(tmp_path, alarms, node).send(Notice.DONE, 40, "all steps are taken", once="40")
        made(tmp_path, alarms).send(Notice.DONE, 80, "all steps are taken", once="80")
    assert [message["step"] for message in received.messages] == [40, 80]
    assert received.messages[0] == {
        "text": "/runs/xl2 is done at step 40: all steps are taken",
        "run": "/runs/xl2",
        "event": "done",
        "step": 40,
        "node": "a",
        "reason": "all steps are taken",
    }
    assert alarms == []


GAVE_UP = {
    "round": 3,
    "failures": 3,
    "committed_step": 20,
    "failed_node": "b",
    "rank": 1,
    "after_step": 24,
    "text": "killed",
}


@pytest.mark.parametrize(
    ("event", "details", "step"),
    [
        (Event.GAVE_UP, GAVE_UP, 24),
        (Event.GAVE_UP, GAVE_UP | {"after_step": None}, 20),
        (Event.GAVE_UP, GAVE_UP | {"after_step": None, "committed_step": -1}, 0),
        (Event.ROUND_ENDED, GAVE_UP | {"reason": "mistake", "details": {"step": 7}}, 7),
        (Event.ROUND_ENDED, GAVE_UP | {"reason": "failed", "details": {}}, None),
        (Event.JOINED, {"round": 3}, None),
    ],
)
def test_a_supervisor_that_gives_up_tells_where_it_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: Event, details: dict[str, Any], step: int | None
) -> None:
    alarms: list[str] = []
    with receiver() as (url, received):
        monkeypatch.setenv(URL_VARIABLE, url)
        notify(made(tmp_path, alarms), event, details)
    found = [(one["event"], one["step"], one["node"], one["reason"]) for one in received.messages]
    assert found == ([("gave_up", step, "b", "killed")] if step is not None else [])


def test_without_a_url_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(URL_VARIABLE, raising=False)
    made(tmp_path, []).send(Notice.DONE, 40, "", once="40")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        (f"http://127.0.0.1:1/{SECRET}", "Connection refused"),
        (f"http://host.invalid/{SECRET}", ""),
        (f"ftp://127.0.0.1/{SECRET}", "expected an http:// or https:// URL"),
        (f"http://127.0.0.1/{SECRET} and more", "InvalidURL"),
        (f"http://[{SECRET}/", "ValueError"),
    ],
)
def test_a_failure_is_said_once_and_without_the_url(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, problem: str
) -> None:
    alarms: list[str] = []
    monkeypatch.setenv(URL_VARIABLE, url)
    broken = made(tmp_path, alarms)
    for step in (1, 2):
        broken.send(Notice.ROLLED_BACK, step, "steps failed", once=str(step))
    (alarm,) = alarms
    assert alarm.startswith(f"the webhook of {URL_VARIABLE} failed, and its message is lost: ")
    assert problem in alarm
    assert SECRET not in alarm


@pytest.mark.parametrize("fault", ["answers 500", "does not answer"])
def test_a_server_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.setattr(webhook, "TIMEOUT_S", 0.3)
    alarms: list[str] = []
    with receiver() as (url, received):
        monkeypatch.setenv(URL_VARIABLE, url)
        if fault == "answers 500":
            received.status = 500
        else:
            received.hangs.set()
            monkeypatch.setattr(webhook, "TIMEOUT_S", 0.3)
        made(tmp_path, alarms).send(Notice.DONE, 1, "", once="1")
    (alarm,) = alarms
    expected = "HTTP status 500" if fault == "answers 500" else "0.3 s|timed out|TimeoutError"
    assert any(text in alarm for text in expected.split("|")), alarm


def test_a_broken_storage_does_not_prevent_the_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alarms: list[str] = []
    (tmp_path / "notices").write_text("a file where the marks belong")
    with receiver() as (url, received):
        monkeypatch.setenv(URL_VARIABLE, url)
        made(tmp_path, alarms).send(Notice.DONE, 1, "", once="1")
    assert len(received.messages) == 1
