"""A real Prometheus scrapes the supervisors of a run on two nodes, with the shipped rules."""

import json
import os
import shutil
import signal
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from dit_scale.elastic.node.address import free_port
from tests.support.needs import needs
from tests.support.nodes.nodes import cluster, config_of
from tests.support.speed import scaled

pytestmark = pytest.mark.dist

STEPS = 100_000
"""More than this run takes before it is asked to stop."""
MONITORING = Path(__file__).resolve().parents[2] / "cluster/monitoring"
ANSWER_S = scaled(30.0)


class Prometheus:
    """A server whose scrape configuration is the shipped one, with another folder and shorter intervals."""

    def __init__(self, url: str) -> None:
        self._url = url

    def query(self, expression: str) -> dict[str, float]:
        """Return the values of an instant query by the node or instance that they belong to."""
        query = urllib.parse.urlencode({"query": expression})
        with urllib.request.urlopen(f"{self._url}/api/v1/query?{query}", timeout=ANSWER_S) as answer:
            found = json.load(answer)["data"]["result"]
        labels = [one["metric"] for one in found]
        names = [one.get("node") or one.get("instance") or "" for one in labels]
        return {name: float(one["value"][1]) for name, one in zip(names, found, strict=True)}

    def is_ready(self) -> bool:
        try:
            return self.query("vector(1)") == {"": 1.0}
        except OSError:
            return False


@contextmanager
def prometheus(folder: Path, run: str) -> Iterator[Prometheus]:
    """Run a server that finds the nodes of a run by their target files."""
    needs(shutil.which("prometheus") is not None, "prometheus: apt-get install prometheus")
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / "alerts.yml")]
    (files,) = config["scrape_configs"][0]["file_sd_configs"]
    files.update(files=[f"{run}/targets/*.json"], refresh_interval="1s")
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait()


def check_metrics(address: str) -> None:
    """Check what a node serves by the conventions for names, types and units."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=ANSWER_S) as answer:
        text = answer.read()
    assert b"dit_scale_mfu_ratio{" in text
    checked = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, b"")


def test_two_supervisors_in_prometheus(tmp_path: Path) -> None:
    config = config_of(tmp_path, STEPS)
    targets, textfiles = Path(config.run, "targets"), tmp_path / "textfiles"
    textfiles.mkdir()
    serving = ("--nodes", "2", "--metrics-port", "0", "--metrics-textfile", str(textfiles))
    with prometheus(tmp_path, config.run) as server, cluster(config) as nodes:
        a, b = (nodes.start(name, *serving) for name in "ab")
        nodes.wait(server.is_ready, "answer of Prometheus")
        nodes.wait(lambda: server.query('up{job="dit-scale"} == 1').keys() != set(), "target")
        training = 'dit_scale_state{dit_scale_state="training"} == 1'
        nodes.wait(lambda: server.query(training).keys() == {"a", "b"}, "training in Prometheus")
        nodes.wait(
            lambda: min(server.query("dit_scale_checkpoint_step").values(), default=0) > 0, "checkpoint"
        )
        assert server.query("dit_scale_nodes") == {"a": 2, "b": 2}
        assert server.query("dit_scale_target_step") == {"a": STEPS, "b": STEPS}
        nodes.wait(lambda: len(server.query("dit_scale_loss > 0")) == 2, "loss")
        assert all(0 < value <= 1 for value in server.query("dit_scale_goodput_ratio").values())

        assert len(list(textfiles.glob("dit-scale-*.prom"))) == 2
        for node in "ab":
            check_metrics(json.loads((targets / f"{node}.json").read_text())[0]["targets"][0])

        step = max(server.query("dit_scale_step").values())
        os.kill(b.ranks()[1], signal.SIGKILL)
        failed = 'dit_scale_restarts_total{reason="failed"}'
        nodes.wait(lambda: server.query(failed) == {"a": 1, "b": 1}, "restart in Prometheus")
        nodes.wait(lambda: min(server.query("dit_scale_step").values(), default=0) > step, "progress")

        killed = json.loads((targets / "b.json").read_text())[0]["targets"][0]
        b.kill()
        absent = 'ALERTS{alertname="DitScaleSupervisorAbsent"}'
        nodes.wait(lambda: server.query(absent).keys() == {killed}, "alert")
        a.process.send_signal(signal.SIGTERM)
        assert a.exit_code() == 75
        assert [path.name for path in targets.iterdir()] == ["b.json"]
        (left,) = textfiles.iterdir()
        assert left.name.startswith("dit-scale-b-"), "of the killed supervisor"
        nodes.wait(lambda: server.query('up{job="dit-scale"}').keys() == {killed}, "end of the target")
