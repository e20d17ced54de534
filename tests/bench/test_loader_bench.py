"""The loader benchmark runs and its figures are consistent; speed is not tested."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks.loader import HAS_STREAMING
from tests.support.speed import scaled

MODULE = "benchmarks.loader"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    command = [sys.executable, "-m", MODULE, "--smoke", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=scaled(300.0), check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def of_kind(rows: list[dict[str, Any]], what: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["what"] == what]


def test_every_size_is_read_by_all(rows: list[dict[str, Any]]) -> None:
    read = of_kind(rows, "read")
    assert [(row["views"], row["record_bytes"] // 1024) for row in read] == [
        (1, 16),
        (1, 64),
        (2, 32),
        (2, 128),
    ]
    for row in read:
        assert row["samples_per_s"] > 0
        for other in ("webdataset", "streaming") if HAS_STREAMING else ("webdataset",):
            rate = row[f"{other}_samples_per_s"]
            assert row[f"{other}_ratio"] == pytest.approx(row["samples_per_s"] / rate)


def test_a_missing_package_is_named(rows: list[dict[str, Any]]) -> None:
    missing = [] if HAS_STREAMING else ["StreamingDataset: mosaicml-streaming is not installed"]
    assert [row["reason"] for row in of_kind(rows, "skipped")] == missing


def test_order_resume_and_cold_start(rows: list[dict[str, Any]]) -> None:
    assert [row["window_shards"] for row in of_kind(rows, "order") if row["ids_per_s"] > 0] == [0, 16]
    assert [row["position"] for row in of_kind(rows, "resume") if row["first_batch_s"] > 0] == [0, 10**12]
    (cold,) = of_kind(rows, "cold")
    assert 0 < cold["first_batch_s"] <= cold["all_cached_s"]
    assert 0 <= cold["shards_cached_by_then"] <= cold["shards"] == 8


def test_settings_and_versions_are_in_each_row(rows: list[dict[str, Any]]) -> None:
    assert len(rows) == 9 + (not HAS_STREAMING)
    for row in rows:
        assert (row["micro_batch"], row["rounds"]) == (4, 1)
        assert row["versions"]["torch"] == torch.__version__
