"""cluster/monitoring: rules, dashboard and scrape configurations agree with what a node exports."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dit_scale.config import TrainConfig
from dit_scale.monitoring.families import ROW, families
from dit_scale.monitoring.follower import Follower
from tests.support.needs import needs
from tests.support.speed import scaled

FOLDER = Path(__file__).resolve().parents[2] / "cluster/monitoring"
COMPONENT = FOLDER.parent / "kubernetes/components/metrics/kustomization.yaml"
OTHERS = {
    "up",
    "node_textfile_mtime_seconds",
    "DCGM_FI_DEV_GPU_UTIL",
    "DCGM_FI_PROF_SM_ACTIVE",
    "DCGM_FI_DEV_FB_USED",
    "DCGM_FI_DEV_POWER_USAGE",
}
"""Metrics of Prometheus, node-exporter and dcgm-exporter."""
VARIABLES = {"$run": "a", "$host": "b"}


@pytest.fixture
def promtool() -> str:
    path = shutil.which("promtool")
    needs(path is not None, "promtool: apt-get install prometheus")
    return str(path)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The names of all samples that a node can export, with their labels."""
    run = tmp_path_factory.mktemp("run")
    row = {"step": 1, **{gauge.key: 1.0 for gauge in ROW}}
    (run / "metrics.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps({'step': 1, 'eval_loss': 1.0})}\n")
    config = TrainConfig(run=str(run))
    look = Follower(config, "a", run).look(1.0)
    return {
        sample.name: set(sample.labels) for family in families(look, config, "a") for sample in family.samples
    } | {"dit_scale_failed_scrapes_total": {"run", "node"}}


def run(*command: str, text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=scaled(60.0))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def dashboard() -> Any:
    return json.loads((FOLDER / "dashboard.json").read_text())


def expressions() -> list[str]:
    """Return the queries of the dashboard, with values for its variables."""
    board = dashboard()
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]
    found += [one["expr"] for one in board["annotations"]["list"]]
    for variable, value in VARIABLES.items():
        found = [text.replace(variable, value) for text in found]
    assert not any("$" in text for text in found)
    return found


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
    return list(group["rules"])


def test_each_metric_of_rules_and_dashboard_is_exported(exported: dict[str, set[str]]) -> None:
    used = [*expressions(), *(rule["expr"] for rule in rules())]
    names = {name for text in used for name in re.findall(r"\b(?:dit_scale_|DCGM_|node_|up\b)\w*", text)}
    labels = {"dit_scale_state"} & names  # a label as well
    assert names - OTHERS - labels <= exported.keys()
    assert {name for name in names if name in OTHERS} == OTHERS
    variables = [one["query"]["query"] for one in dashboard()["templating"]["list"] if one["type"] == "query"]
    for query in variables:
        name, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", query).groups()  # type: ignore[union-attr]
        assert name in OTHERS or label in exported[name]


def test_each_query_groups_by_labels_that_exist(exported: dict[str, set[str]]) -> None:
    for text in [*expressions(), *(rule["expr"] for rule in rules())]:
        known = set().union(*(labels for name, labels in exported.items() if name in text))
        for group in re.findall(r"by \(([^)]+)\)", text):
            assert {label.strip() for label in group.split(",")} <= known, text


def test_the_names_follow_the_conventions(promtool: str, tmp_path: Path) -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    from dit_scale.elastic.launch import NodeLog
    from dit_scale.monitoring.exporter import NodeCollector

    config = TrainConfig(run=str(tmp_path))
    row = {"step": 1, **{gauge.key: 1.0 for gauge in ROW}}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    registry = CollectorRegistry(auto_describe=False)
    log = NodeLog("a", tmp_path / "a.jsonl")
    registry.register(NodeCollector(Follower(config, "a", tmp_path), config, "a", log))
    text = generate_latest(registry).decode()
    assert text.count("dit_scale_loss_quarter{") == 4
    assert run(promtool, "check", "metrics", text=text) == ""


def test_rules_and_queries_are_valid(promtool: str, tmp_path: Path) -> None:
    assert f"{len(rules())} rules found" in run(promtool, "check", "rules", str(FOLDER / "alerts.yml"))
    queries = [{"record": f"query:{number}", "expr": text} for number, text in enumerate(expressions())]
    (tmp_path / "queries.yml").write_text(yaml.safe_dump({"groups": [{"name": "a", "rules": queries}]}))
    assert f"{len(queries)} rules found" in run(promtool, "check", "rules", str(tmp_path / "queries.yml"))


def test_each_alert_fires_and_does_not_fire(promtool: str) -> None:
    run(promtool, "test", "rules", str(FOLDER / "alerts_test.yml"))
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text())["tests"]
    cases = [case for test in tests for case in test["alert_rule_test"]]
    for rule in rules():
        fires = {bool(case["exp_alerts"]) for case in cases if case["alertname"] == rule["alert"]}
        assert fires == {True, False}, rule["alert"]


def test_the_example_configuration_is_valid(promtool: str) -> None:
    run(promtool, "check", "config", "--syntax-only", str(FOLDER / "prometheus.yml"))
    jobs = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    assert [job["job_name"] for job in jobs] == ["dit-scale"], "the job that the rules name"


def test_the_pods_are_found_by_their_port_and_annotations() -> None:
    """pods.yml and podmonitor.yaml name what the component sets."""
    component = yaml.safe_load(COMPONENT.read_text())
    (monitored,) = yaml.safe_load((FOLDER / "podmonitor.yaml").read_text())["spec"]["podMetricsEndpoints"]
    (job,) = yaml.safe_load((FOLDER / "pods.yml").read_text())["scrape_configs"]
    sources = [name for rule in job["relabel_configs"] for name in rule.get("source_labels", ())]
    annotated = {name.rpartition("_annotation_")[2] for name in sources if "_annotation_" in name}
    for patch in component["patches"]:
        set_by = {
            change["path"].rpartition("/")[2]: change["value"] for change in yaml.safe_load(patch["patch"])
        }
        (port,) = set_by["ports"]
        assert port["name"] == monitored["port"]
        assert set_by["-"] == f"--metrics-port={port['containerPort']}"
        assert set_by["annotations"]["prometheus.io/port"] == str(port["containerPort"])
        assert annotated <= {re.sub(r"\W", "_", name) for name in set_by["annotations"]}
