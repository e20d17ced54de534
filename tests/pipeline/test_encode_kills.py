"""The encoding job on two nodes and a real S3 server, with processes killed: same objects, written once."""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator

import pytest

from dit_scale.storage import open_storage
from tests.support.encode_hunt import (
    FEW,
    MANY,
    NUM_SHARDS,
    RUN_S,
    TASKS,
    Grounds,
    Hunt,
    HuntError,
    grounds,
    hunt_at_random,
)
from tests.support.faults.ceph import ceph_s3
from tests.support.faults.ray_nodes import HEAD, SECOND

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module")
def hunted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Grounds]:
    with ceph_s3() as ceph, grounds(tmp_path_factory.mktemp("hunt"), ceph) as started:
        yield started


@pytest.fixture
def hunt(hunted: Grounds, request: pytest.FixtureRequest) -> Iterator[Hunt]:
    """A job with its own output."""
    found = Hunt(hunted, request.node.name.partition("[")[0])
    try:
        yield found
    finally:
        hunted.proxy.calm()
        found.close()


def wait_for(there: Callable[[], object], hunt: Hunt) -> None:
    """Wait until the condition holds; the driver must stay alive."""
    end_s = time.monotonic() + RUN_S
    while not there():
        assert hunt.drivers[-1].poll() is None, hunt.said()
        assert time.monotonic() < end_s, hunt.said()
        time.sleep(0.05)


def hold(hunt: Hunt, key: str) -> None:
    """Wait until a process is blocked in the middle of writing an object."""
    proxy = hunt.grounds.proxy
    before = proxy.injected["stall_request"]
    proxy.set({"stall_request": 1.0}, only=rf"^PUT /\S*{key}")
    wait_for(lambda: proxy.injected["stall_request"] > before, hunt)
    hunt.look()


def writers(hunt: Hunt) -> list[int]:
    return sorted(hunt.grounds.nodes.processes(name=TASKS["writer"]))


def test_a_node_and_workers_and_drivers_die_at_random_moments(hunt: Hunt) -> None:
    draws = random.Random(0)
    hunt.start(*MANY)
    hold(hunt, r"0000[1-9]\.tar")  # or the work might be done before the node is back
    wait_for(lambda: hunt.grounds.nodes.processes(SECOND, "ray::"), hunt)
    hunt.strike("node", draws)
    hunt.recover("node", *MANY)
    hunt.grounds.proxy.down()  # what hangs there is reset
    hunt.grounds.proxy.calm()
    for victim in ("encoder", "decoder", "driver"):
        assert hunt.strike(victim, draws), hunt.said()
        hunt.recover(victim, *MANY)
        hunt.look()
    hunt_at_random(hunt, draws, most=6, victims=dict.fromkeys(("encoder", "decoder", "writer", "driver"), 1))
    assert hunt.kills["node"] == 1
    hunt.compare()


@pytest.mark.long
def test_an_encoder_finds_no_vae_for_a_while(hunt: Hunt) -> None:
    vae = hunt.grounds.folder / "vae"
    hunt.start(*FEW)
    wait_for(lambda: hunt.look() or hunt.shards_done(), hunt)
    vae.rename(vae.with_name("away"))
    try:
        assert hunt.strike("encoder", random.Random()) == "encoder"
        wait_for(lambda: "encoder 0 is not ready" in hunt.said(), hunt)
    finally:
        vae.with_name("away").rename(vae)
    hunt.finish()
    hunt.compare()


def test_killed_between_the_objects_of_a_shard_and_before_the_commit_mark(hunt: Hunt) -> None:
    hunt.start(*FEW)
    hold(hunt, "00002.idx")
    assert {"shards/00002.tar", "shards/00002.idx"} & hunt.seen.keys() == {"shards/00002.tar"}
    for writer in writers(hunt):
        os.kill(writer, signal.SIGKILL)
    hold(hunt, "00004.json")
    assert {"shards/00004.idx", "shards/00004.json"} & hunt.seen.keys() == {"shards/00004.idx"}
    hunt.strike("driver", random.Random())
    hunt.recover("driver", *FEW)
    hold(hunt, "dataset.json")
    assert hunt.shards_done() == NUM_SHARDS
    hunt.strike("driver", random.Random())
    hunt.grounds.proxy.calm()
    hunt.recover("driver", *FEW)
    hunt.finish()
    hunt.compare()


def test_a_driver_and_a_writer_that_wake_up_when_another_has_finished(hunt: Hunt) -> None:
    first = hunt.start(*FEW)
    hold(hunt, "00003.idx")
    stopped = [first.pid, *writers(hunt)]
    assert len(stopped) > 1
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    hunt.grounds.proxy.down()  # what hangs there is reset
    hunt.grounds.proxy.calm()
    hunt.start(*FEW)
    hunt.finish()
    hunt.compare()
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    assert first.wait(RUN_S) == 0, hunt.said(0)
    hunt.look()
    hunt.compare()
    check_that_a_put_and_a_bit_are_seen(hunt)


def check_that_a_put_and_a_bit_are_seen(hunt: Hunt) -> None:
    storage = open_storage(hunt.url)
    data = storage.read("shards/00001.tar")
    storage.write("shards/00001.tar", data)
    with pytest.raises(HuntError, match=r"shards/00001.tar was written again"):
        hunt.look()
    storage.write("shards/00001.tar", data[:-1] + b"\1")
    with pytest.raises(HuntError, match=r"other bytes: \['shards/00001.tar'\]"):
        hunt.compare()


@pytest.mark.long
def test_the_whole_cluster_dies(hunt: Hunt) -> None:
    """The driver reports it in one line, and a smaller cluster continues."""
    driver = hunt.start(*MANY)
    wait_for(lambda: hunt.look() or hunt.shards_done(), hunt)
    for node in (HEAD, SECOND):
        hunt.grounds.nodes.kill(node)
    assert driver.wait(RUN_S) == 2, hunt.said()
    assert "Traceback" not in hunt.said()
    last = hunt.said().splitlines()[-1]
    assert last.startswith("dit-scale encode: lost the Ray cluster at ")
    assert last.endswith("Restart it and run the same command again; finished shards are kept")
    hunt.look()
    hunt.grounds.nodes.start(HEAD)
    hunt.start(*FEW)
    hunt.finish()
    hunt.compare()
