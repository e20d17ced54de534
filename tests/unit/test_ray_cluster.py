"""Placement of encoders that leaves room for decoders, and errors without a cluster."""

import itertools
import signal
import socket
from collections.abc import Iterator

import pytest
from ray._private import services

from dit_scale import signals
from dit_scale.config import EncodeConfig
from dit_scale.errors import DeviceError
from dit_scale_pipeline import ray_cluster, ray_start
from dit_scale_pipeline.ray_cluster import cluster, max_encoders, place_encoders

NODES = ([2.0], [2.0, 2.0], [1.0, 2.0], [0.25, 1.5], [4.0, 1.0], [2.0, 1.0, 1.5])


@pytest.mark.parametrize("cpus", NODES, ids=str)
@pytest.mark.parametrize(("encoder", "decoder"), [(0.5, 0.5), (0.75, 0.5), (1.0, 0.25), (1.5, 0.5)])
def test_a_decoder_finds_room_wherever_ray_puts_the_encoders(
    cpus: list[float], encoder: float, decoder: float
) -> None:
    config = EncodeConfig(cpus_per_encoder=encoder, cpus_per_decoder=decoder)
    most = max_encoders(config, "cpu", [{"CPU": amount} for amount in cpus])

    def finds_room(number: int) -> bool:
        """Whether a decoder fits for every distribution of `number` encoders."""
        ways = itertools.product(*(range(int(amount / encoder) + 1) for amount in cpus))
        left = [
            max(amount - count * encoder for amount, count in zip(cpus, way, strict=True))
            for way in ways
            if sum(way) == number
        ]
        return bool(left) and min(left) >= decoder

    room = sum(int(amount / encoder) for amount in cpus)
    assert most == max((number for number in range(1, room + 1) if finds_room(number)), default=0)


def test_room_that_no_single_node_has_is_none() -> None:
    """Each of two nodes has 0.4 of 2 CPUs left, but a decoder reserves 0.5."""
    nodes = [{"CPU": 2.0}, {"CPU": 2.0}]
    with pytest.raises(DeviceError, match=r"4 encoders leave 0.8 of 4 CPUs, .* 0.5 of one node"):
        place_encoders(EncodeConfig(encoders=4, cpus_per_encoder=0.8), nodes)
    assert place_encoders(EncodeConfig(cpus_per_encoder=0.8), nodes).encoders == 3


def test_an_address_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "CONNECT_S", 1.0)
    monkeypatch.setenv("RAY_BACKEND_LOG_LEVEL", "fatal")  # or it would stay in this process's environment
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(DeviceError, match=f"no Ray cluster at {address}: no answer"):
            with cluster(address):
                pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda one: one.name)
def test_an_interrupt_waits_until_ray_is_started(number: signal.Signals) -> None:
    handlers = {number: signal.getsignal(number) for number in signals.ALL}
    went_on = False

    def interrupted() -> None:
        nonlocal went_on
        with ray_cluster._late_interrupts():
            signal.raise_signal(number)
            went_on = True

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert went_on
        assert not signals.was_interrupted()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        assert signals.was_interrupted()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_node_that_is_slow_to_register_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: Iterator[dict[str, str] | None] = iter((None, None, {"node_id": "a"}))

    def get_node(*asked: str) -> dict[str, str]:
        if (found := next(answers)) is None:
            raise RuntimeError("no node info found")
        return found

    monkeypatch.setattr(services, "get_node", get_node)
    monkeypatch.setattr(ray_start, "PAUSE_S", 0)
    monkeypatch.setattr(ray_start, "is_starting", lambda: True)
    with ray_start.patient():
        assert services.get_node("host:1", "a") == {"node_id": "a"}
    assert services.get_node is get_node


def no_node(*asked: str) -> dict[str, str]:
    raise RuntimeError("no node info found")


def test_a_node_that_never_registers_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "get_node", no_node)
    monkeypatch.setattr(ray_start, "is_starting", lambda: True)
    monkeypatch.setattr(ray_start, "NODE_START_S", -1)
    with ray_start.patient(), pytest.raises(ray_start.NotStartedError, match="Ray did not start"):
        services.get_node("host:1", "a")


def test_a_node_process_that_has_ended_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "get_node", no_node)
    with ray_start.patient(), pytest.raises(ray_start.NotStartedError):
        services.get_node("host:1", "a")  # no process of that name was started here
