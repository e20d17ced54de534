"""Serves the metrics of a node to Prometheus, or writes them for node-exporter, while it is supervised.

Nothing here can stop or delay the supervisor: scrapes run in threads of the server, and a failure costs one
alarm.
"""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from dit_scale.config import TrainConfig
from dit_scale.elastic.launch import NodeLog, Observer
from dit_scale.errors import StorageError
from dit_scale.monitoring.families import Families, families
from dit_scale.monitoring.follower import Follower
from dit_scale.storage import open_storage
from dit_scale.telemetry.sinks.identity import id_of

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric

EVERY_S = 15.0
"""Interval at which the textfile is written."""
TURN_S = 10.0
"""Longest wait for an earlier scrape, which a file server may hold up."""


class NodeCollector:
    """Collects the metrics of a node at each scrape; scrapes take turns."""

    def __init__(self, follower: Follower, config: TrainConfig, node: str, log: NodeLog) -> None:
        self._follower, self._config, self._node, self._log = follower, config, node, log
        self._taking_turns = threading.Lock()
        self._failures = 0

    def collect(self) -> Iterator["Metric"]:
        """Yield the metrics. After a failure, only the number of failures."""
        found, problem = [], f"an earlier scrape has not read them within {TURN_S:g} s"
        if self._taking_turns.acquire(timeout=TURN_S):
            try:
                found = list(families(self._follower.look(time.time()), self._config, self._node))
                problem = ""
            except Exception as error:  # whatever is wrong with a file, the supervisor must not notice
                problem = f"{type(error).__name__}: {error}"
            finally:
                self._taking_turns.release()
        if problem:
            self._failures += 1
            if self._failures == 1:
                self._log.alarm(f"the metrics for Prometheus cannot be read: {problem}")
        yield from found
        made = Families({"run": self._config.run, "node": self._node})
        text = "Scrapes that could not read the files of the run."
        yield made.counter("failed_scrapes", text, {"": self._failures})


class Target:
    """The file by which Prometheus finds a node: <run>/targets/<node>.json, for `file_sd_configs`.

    It exists while the node is supervised. A killed supervisor leaves it behind, so Prometheus notices.
    """

    def __init__(self, run: str, node: str, address: str, log: NodeLog) -> None:
        self._folder, self._key, self._log = open_storage(run), f"targets/{node}.json", log
        self.is_ipv6 = ":" in address
        self._host = f"[{address}]" if self.is_ipv6 else address

    def announce(self, port: int) -> None:
        """Write the file."""
        where = f"{self._host}:{port}"
        self._log.say(f"metrics: http://{where}/metrics")
        try:
            self._folder.write(self._key, json.dumps([{"targets": [where]}]).encode())
        except StorageError as error:
            self._log.alarm(f"Prometheus cannot find this node by its file: {error}")

    def withdraw(self) -> None:
        """Delete the file."""
        with suppress(StorageError):
            self._folder.delete(self._key)


def observer(
    config: TrainConfig, *, node: str, address: str, port: int | None, textfiles: str | None
) -> Observer:
    """Return what serves or writes the metrics of a node.

    `port` is where to serve them (0: any free port), `textfiles` the folder of node-exporter's textfile
    collector; None: neither.
    """

    @contextmanager
    def observe(heartbeats: Path, log: NodeLog) -> Iterator[None]:
        from prometheus_client import CollectorRegistry

        registry = CollectorRegistry(auto_describe=False)
        registry.register(NodeCollector(Follower(config, node, heartbeats), config, node, log))
        with ExitStack() as stack:
            if port is not None:
                stack.enter_context(_served(registry, port, log, Target(config.run, node, address, log)))
            if textfiles is not None:
                path = Path(textfiles) / f"dit-scale-{node}-{id_of(config.run)}.prom"
                stack.enter_context(_written(registry, path, log))
            yield

    return observe


@contextmanager
def _served(registry: "CollectorRegistry", port: int, log: NodeLog, target: Target) -> Iterator[None]:
    """Serve the metrics meanwhile; without the port, that costs an alarm."""
    from prometheus_client import start_http_server

    try:
        server, thread = start_http_server(port, "::" if target.is_ipv6 else "0.0.0.0", registry)
    except OSError as error:
        log.alarm(
            f"no metrics are served: port {port}: {error.strerror}; choose another one with --metrics-port, "
            "or 0 for any free port"
        )
        yield
        return
    target.announce(server.server_port)
    try:
        yield
    finally:
        target.withdraw()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def _written(registry: "CollectorRegistry", path: Path, log: NodeLog) -> Iterator[None]:
    """Write the metrics to a file every 15 s meanwhile, and delete it in the end."""
    from prometheus_client import write_to_textfile

    is_over = threading.Event()

    def write() -> None:
        has_failed = False
        while not is_over.is_set():
            try:
                write_to_textfile(str(path), registry)
            except OSError as error:
                if not has_failed:
                    log.alarm(f"{path} cannot be written: {error.strerror}; trying again every {EVERY_S:g} s")
                has_failed = True
            is_over.wait(EVERY_S)

    writer = threading.Thread(target=write, name="textfile", daemon=True)
    writer.start()
    try:
        yield
    finally:
        is_over.set()
        writer.join(EVERY_S)
        with suppress(OSError):
            path.unlink(missing_ok=True)
