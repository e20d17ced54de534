"""User mistakes, and changes during a run: the log explains them, the exit code fits."""

import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from dit_scale import cli
from dit_scale.elastic.board import Board
from dit_scale.train.run_folder import root_of
from tests.support.faults.ceph import ACCESS_KEY, SECRET_KEY, ceph_s3
from tests.support.faults.proxy import FaultProxy
from tests.support.needs import needs
from tests.support.nodes.nodes import cluster, config_of
from tests.support.ranks.record import last_step
from tests.support.s3 import BUCKET

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("steps: [", (), "run.yaml is not valid YAML"),
        ("stepz: 7", (), "unknown key 'stepz'; did you mean 'steps'?"),
        ("steps: 7", ("--nodes", "3:2"), "--nodes 3:2: expected a number of nodes or LEAST:MOST"),
        ("steps: 7", ("--nodes", "0"), "--nodes 0: expected"),
        ("steps: 7", ("--address", "203.0.113.1"), "203.0.113.1: Cannot assign requested address"),
    ],
)
def test_a_mistake_is_reported_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, arguments: Sequence[str], message: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert cli.main(["launch", str(path), *arguments]) == 93
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "no-such.yaml"]) == 93
    assert "no-such.yaml" in capsys.readouterr().err


def test_a_name_that_may_resolve_later_allows_a_restart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("steps: 7")
    assert cli.main(["launch", str(path), "--address", "no-such-node.invalid"]) == 1
    assert "--address no-such-node.invalid: " in capsys.readouterr().err


REFUSED = re.compile(
    "(InvalidAccessKeyId: the server does not know the access key|(AccessDenied|403): the credentials do not "
    "permit this; check the bucket's policy, and that the key is still valid); fix the cause"
)
"""Which of them a server answers while it deletes a key depends on the moment."""


def test_a_standby_node_waits_and_expired_credentials_end_the_run_until_there_is_a_new_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ceph_s3() as server, FaultProxy(server.port) as proxy:
        proxy.errors = [("403 Forbidden", "AccessDenied")]
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        config = config_of(tmp_path, steps=100_000)
        checkpoint = config.checkpoint.model_copy(update={"url": f"s3://{BUCKET}/run"})
        config = config.model_copy(update={"checkpoint": checkpoint})
        key = ("--uid=storm", "--key-type=s3", f"--access-key={ACCESS_KEY}")
        with cluster(config) as nodes:
            a = nodes.start("a")
            nodes.wait(lambda: bool(a.events("round")), "round")
            with monkeypatch.context() as patch:
                patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
                b = nodes.start("b")
            nodes.wait(lambda: b.says("round 1 is running without this node: waiting for the next"), "wait")
            nodes.wait_for_step(1)
            nodes.wait_for_commit()
            proxy.set({"error": 1.0})  # as while the server deletes the key
            server.admin("key", "rm", *key)
            for node in (a, b):
                assert node.exit_code() == 1
                assert REFUSED.search(node.log.read_text()), node.log.read_text()[-2000:]
                assert node.processes() == {}
            assert b.says("AccessDenied: ")
            assert nodes.start("a").exit_code() == 1
            assert a.says("node excluded: cannot write the root of the checkpoints: ")

            server.admin("key", "create", *key, f"--secret-key={SECRET_KEY}")
            end = config.model_copy(update={"steps": last_step(Path(config.run) / "metrics.jsonl") + 20})
            again = [nodes.start(name, config=end) for name in "ab"]
            assert [node.exit_code() for node in again] == [0, 0]
            assert any(node.says("resumed at step ") for node in again)


def test_a_first_node_that_the_others_cannot_reach_is_named(tmp_path: Path) -> None:
    may = subprocess.run(_alone_at("192.0.2.9", "true"), capture_output=True).returncode == 0
    needs(may, "networks of its own (unshare --net, ip)")
    with cluster(config_of(tmp_path)) as nodes:
        for name, address in (("a", "192.0.2.1"), ("b", "192.0.2.2")):
            arguments = ("--nodes", "2", "--address", address)
            nodes.start(name, *arguments, fault="impatient", under=_alone_at(address))
        _, b = nodes.nodes
        nodes.wait(lambda: bool(b.events("round_ended")), "end of the round")
        round_ = Board(root_of(config_of(tmp_path))).sealed(1)
        assert round_ is not None
        assert b.endings()[0] == ("failed", "b")
        text = b.events("round_ended")[0]["text"]
        where = f"192.0.2.1:{round_.members[0].port}"
        assert f"rank 1: DitScaleError: the node of rank 0 does not respond at {where} within 2 s: " in text


def _alone_at(address: str, *command: str) -> list[str]:
    """A command in a network of its own with this address: what it sends is lost."""
    links = (
        "ip link set lo up && ip link add near type veth peer name far && ip link set far up && "
        f"ip address add {address}/24 dev near && ip link set near up"
    )
    return ["unshare", "--net", "sh", "-c", f'{links} && exec "$@"', "sh", *command]
