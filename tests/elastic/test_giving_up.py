"""When another try makes no sense: the exit code and the last message."""

import re
import shutil
import socket
from pathlib import Path

import pytest

from dit_scale.elastic.board import Board
from dit_scale.telemetry.webhook import URL_VARIABLE
from dit_scale.train.run_folder import root_of
from tests.support.latents import write_latents
from tests.support.nodes.nodes import cluster, config_of
from tests.support.webhook import SECRET, receiver

pytestmark = pytest.mark.dist


def test_after_three_failures_without_a_newer_checkpoint_the_samples_are_named(tmp_path: Path) -> None:
    """The first failure is a port in use, which alone would cost one try."""
    config = config_of(tmp_path, steps=2)
    for shard in (tmp_path / "data" / "shards").glob("*.tar"):
        data = bytearray(shard.read_bytes())
        data[2000:-2000] = b"\x55" * (len(data) - 4000)
        shard.write_bytes(data)
    with cluster(config) as nodes:
        node = nodes.start("a")
        nodes.wait(lambda: bool(node.events("ranks_started")), "start")
        round_ = Board(root_of(config)).sealed(1)
        assert round_ is not None
        with socket.create_server(("", round_.members[0].port)):
            nodes.wait(lambda: bool(node.events("round_ended")), "end of the round")
        assert "EADDRINUSE" in node.events("round_ended")[0]["text"]

        assert node.exit_code() == 93
        assert [reason for reason, _ in node.endings()] == ["failed"] * 3
        (report,) = node.events("gave_up")
        assert (report["rank"], report["after_step"], report["failures"]) == (0, 0, 3)
        assert "DataError" in report["text"]
        assert len(report["sample_ids"]) == config.global_batch
        damaged = re.search(r"sample (\d+):", report["text"])
        assert damaged is not None
        assert int(damaged[1]) in report["sample_ids"]
        assert node.says(
            "giving up after 3 consecutive failures without a first checkpoint. The last failure was on "
            "node a, rank 0, "
        )

        shutil.rmtree(tmp_path / "data")
        write_latents(tmp_path / "data")  # the cause is fixed
        assert nodes.start("a").exit_code() == 0


def test_three_failures_to_start_blame_no_samples(tmp_path: Path) -> None:
    config = config_of(tmp_path, steps=2)
    with cluster(config) as nodes:
        node = nodes.start("a")
        for number in (1, 2, 3):
            nodes.wait(lambda: len(node.events("ranks_started")) == number, "start")  # noqa: B023
            round_ = Board(root_of(config)).sealed(number)
            assert round_ is not None
            with socket.create_server(("", round_.members[0].port)):
                nodes.wait(lambda: len(node.events("round_ended")) == number, "end")  # noqa: B023
        assert node.exit_code() == 93
        (report,) = node.events("gave_up")
        assert (report["rank"], report["after_step"], report["sample_ids"]) == (0, None, [])
        assert "EADDRINUSE" in report["text"]
        assert node.says("The last failure was on node a, rank 0, while starting: ")
        assert not node.says("Samples of that step")


def test_a_restart_of_a_finished_run_reports_that_it_is_done(tmp_path: Path) -> None:
    config = config_of(tmp_path, steps=6)
    with cluster(config) as nodes:
        assert nodes.start("a").exit_code() == 0
        node = nodes.start("a")
        assert node.exit_code() == 0
        assert node.says("the run is done: 6 steps are taken and saved")
        fewer = nodes.start("a", config=config.model_copy(update={"steps": 4}))
        assert fewer.exit_code() == 0
        assert fewer.says("the run is done: its newest checkpoint is step 6, steps=4")
        assert fewer.says("done (a): 6 steps are taken and saved")


def test_a_mistake_ends_the_run_immediately(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    few = config.model.model_copy(update={"num_classes": 4})
    with cluster(config.model_copy(update={"model": few})) as nodes:
        node = nodes.start("a")
        assert node.exit_code() == 93
        assert [reason for reason, _ in node.endings()] == ["mistake"]
        assert node.says("ConfigError")


def test_nodes_with_different_configurations_are_named(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with cluster(config) as nodes:
        a = nodes.start("a", "--nodes", "2")
        b = nodes.start("b", "--nodes", "2", config=config.model_copy(update={"seed": 7}))
        assert (a.exit_code(), b.exit_code()) == (93, 93)
        for node in (a, b):
            assert node.says("the configuration of b differs from that of a")


def test_nodes_with_different_data_sets_are_refused_but_copies_under_other_names_are_not(
    tmp_path: Path,
) -> None:
    config = config_of(tmp_path, steps=3)
    copy, other = (config.data.model_copy(update={"url": str(tmp_path / name)}) for name in ("copy", "other"))
    shutil.copytree(config.data.url, copy.url)
    write_latents(Path(other.url), num=30)
    with cluster(config) as nodes:
        for data, code in ((other, 93), (copy, 0)):
            a = nodes.start("a", "--nodes", "2")
            b = nodes.start("b", "--nodes", "2", config=config.model_copy(update={"data": data}))
            assert (a.exit_code(), b.exit_code()) == (code, code)
            assert a.says("is not the same latent data set on all ranks")


def test_a_node_that_stays_alone_reports_what_it_waited_for(tmp_path: Path) -> None:
    with cluster(config_of(tmp_path)) as nodes:
        node = nodes.start("a", "--nodes", "2", "--gather-s", "1")
        assert node.exit_code() == 1
        assert node.says("1 of at least 2 nodes (a) joined within 1 s; check that the others are running")


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    with cluster(config_of(tmp_path)) as nodes:
        node = nodes.start("a", "--address", "203.0.113.1")
        assert node.exit_code() == 93
        assert node.says(
            "--address 203.0.113.1: Cannot assign requested address; expected a name or IP address"
        )


def test_two_nodes_send_one_message_when_they_give_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path)
    few = config.model.model_copy(update={"num_classes": 4})
    with receiver() as (url, received), cluster(config.model_copy(update={"model": few})) as nodes:
        monkeypatch.setenv(URL_VARIABLE, url)
        members = [nodes.start(name, "--nodes", "2") for name in "ab"]
        assert [node.exit_code() for node in members] == [93, 93]
        (message,) = received.messages
        assert (message["event"], message["run"]) == ("gave_up", config.run)
        (ending,) = {event["text"] for node in members for event in node.events("round_ended")}
        assert message["reason"] == ending
        assert not any(node.says(SECRET) for node in members)
