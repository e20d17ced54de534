"""Checks of a node before a round: GPUs as listed by nvidia-smi, disks, data, folders."""

import os
import shutil
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dit_scale.config import TrainConfig
from dit_scale.elastic.node.gpus import check_device, gpu_problems, num_gpus, run_command, xid_problems
from dit_scale.elastic.node.preflight import preflight, say_unless_shared
from dit_scale.errors import ConfigError
from dit_scale.storage import open_storage
from tests.support.latents import write_latents

GIB = 2**30
Usage = namedtuple("Usage", "total used free")


def config_of(tmp_path: Path, **changes: Any) -> TrainConfig:
    write_latents(tmp_path / "data", num=4, shard_samples=4, num_classes=5)
    tree = {
        "run": str(tmp_path / "run"),
        "model": {"name": "DiT-Ti/2", "image_size": 32, "num_classes": 5},
        "data": {"url": str(tmp_path / "data")},
        "engine": {"device": "cpu"},
    }
    return TrainConfig.model_validate(tree | changes)


def node(gpus: str | None, apps: str = "", kernel: str | None = "") -> Callable[[Sequence[str]], str | None]:
    """A node on which nvidia-smi and dmesg print these texts."""

    def query(command: Sequence[str]) -> str | None:
        if command[0] == "dmesg":
            return kernel
        return apps if "compute-apps" in " ".join(command) else gpus

    return query


def gpus(*, used_mib: int = 4, ecc: str = "0", num: int = 2) -> str:
    return "".join(f"{index}, GPU-{index}a, {used_mib}, {ecc}\n" for index in range(num))


@pytest.fixture(autouse=True)
def _nothing_assigned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_healthy_node_without_gpus(tmp_path: Path) -> None:
    logged: list[str] = []
    assert preflight(config_of(tmp_path), 1, logged.append) == []
    assert logged == ["skipping the GPU checks: engine.device is cpu"]
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == []


def test_a_healthy_node_with_gpus() -> None:
    logged: list[str] = []
    assert gpu_problems("auto", 2, logged.append, node(gpus())) == []
    assert logged == []


@pytest.mark.parametrize(("visible", "num"), [("3", 1), ("GPU-1a,MIG-2b", 2), ("-1", 0), ("NoDevFiles", 0)])
def test_missing_gpus_that_were_assigned_are_a_problem(
    monkeypatch: pytest.MonkeyPatch, visible: str, num: int
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert num_gpus() == num
    problems = gpu_problems("auto", 1, lambda text: None, node(None))
    assert len(problems) == bool(num)
    assert all(f"CUDA_VISIBLE_DEVICES={visible} assigns GPUs, but nvidia-smi" in text for text in problems)
    assert gpu_problems("cpu", 1, lambda text: None, node(None)) == []


def test_a_slurm_job_without_gpus_must_ask_for_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    check_device("auto")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_PARTITION", "short")
    check_device("cpu")
    for device in ("auto", "cuda"):
        with pytest.raises(
            ConfigError, match=f"device={device}, .* partition short has no GPU: request GPUs"
        ):
            check_device(device)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    check_device("auto")


def test_a_gpu_without_an_error_counter_is_healthy() -> None:
    assert gpu_problems("auto", 2, print, node(gpus(ecc="[N/A]"))) == []


def test_no_gpu_is_a_problem_if_one_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    (problem,) = gpu_problems("cuda", 1, print, node(None))
    assert "nvidia-smi lists no GPU" in problem
    assert gpu_problems("auto", 1, print, node(None)) == []
    assert "will run on the CPU" in capsys.readouterr().out


def test_too_few_gpus() -> None:
    (problem,) = gpu_problems("auto", 4, print, node(gpus()))
    assert "2 GPUs are visible, expected 4" in problem


def test_the_process_that_uses_a_gpu_is_named() -> None:
    apps = "GPU-1a, 4711, python\nGPU-0a, 12, other\n"
    mine, other = gpu_problems("auto", 2, print, node(gpus(used_mib=9000), apps))
    assert "GPU 0 has 9000 MiB in use by 12, other" in mine
    assert "GPU 1 has 9000 MiB in use by 4711, python" in other


def test_a_gpu_that_no_rank_will_use_may_be_in_use() -> None:
    text = gpus(num=1) + "1, GPU-1a, 9000, 5\n"
    assert gpu_problems("auto", 1, print, node(text)) == []


def test_ecc_errors() -> None:
    problems = gpu_problems("auto", 2, print, node(gpus(ecc="3")))
    assert [problem.partition(",")[0] for problem in problems] == [
        "GPU 0 (GPU-0a) has 3 uncorrected ECC errors",
        "GPU 1 (GPU-1a) has 3 uncorrected ECC errors",
    ]


@pytest.mark.parametrize(
    ("assigned", "slots", "sound"),
    [
        ("0,1", 2, True),
        ("1,0", 2, True),
        ("GPU-0a", 1, True),
        ("2,3", 2, False),
        ("1", 1, False),
        ("0", 2, False),
    ],
)
def test_the_gpus_of_the_ranks_must_be_assigned(
    monkeypatch: pytest.MonkeyPatch, assigned: str, slots: int, sound: bool
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", assigned)
    problems = gpu_problems("auto", slots, print, node(gpus(num=4)))
    assert [f"CUDA_VISIBLE_DEVICES={assigned}" in problem for problem in problems] == [True] * (not sound)


KERNEL = """\
[   12.000000] NVRM: loading NVIDIA UNIX x86_64 Kernel Module
[ 1000.500000] NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus.
[ 2000.500000] NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, GPU has fallen off the bus.
[ 2000.600000] NVRM: Xid (PCI:0000:5e:00): 31, pid=99, name=python, MMU Fault
"""


def test_xid_errors_of_devices_count_and_those_of_programs_do_not() -> None:
    (problem,) = xid_problems(KERNEL, 2060.5, print)
    assert problem.startswith("Xid 79 (GPU has fallen off the bus) on the GPU at PCI:0000:3b:00, 1 min ago")
    assert xid_problems(KERNEL, 2000.5 + 2 * 86400, print) == []


def test_kernel_messages_that_cannot_be_read_are_no_problem() -> None:
    logged: list[str] = []
    assert gpu_problems("auto", 2, logged.append, node(gpus(), kernel=None)) == []
    assert logged == ["skipping the Xid check: this user cannot read the kernel messages"]


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, GIB - 1))
    problems = preflight(config_of(tmp_path), 1, print)
    assert ["TMPDIR" in problem for problem in problems] == [True, False]
    assert f"{tmp_path / 'run'} has 1.07 GB of free space" in problems[1]


def test_room_for_a_checkpoint_is_needed_where_checkpoints_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = {"model": {"name": "DiT-XL/2"}}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(0, 0, 11 * GIB))
    (problem,) = preflight(config_of(tmp_path, **large), 1, print)
    assert "expected at least 11.87" in problem  # 675,129,632 parameters, four times fp32, and a GiB
    assert "(run)" in problem
    assert preflight(config_of(tmp_path, **large, checkpoint={"url": str(tmp_path / "s")}), 1, print) != []


def test_a_missing_data_set(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    (tmp_path / "data" / "dataset.json").unlink()
    (problem,) = preflight(config, 1, print)
    assert "cannot read the data set" in problem


def test_a_run_folder_that_cannot_be_written(tmp_path: Path) -> None:
    config = config_of(tmp_path, checkpoint={"url": str(tmp_path / "state")})
    (tmp_path / "run").write_text("a file")
    (problem,) = preflight(config, 1, print)
    assert problem.startswith(f"cannot write run={tmp_path / 'run'}")
    shutil.rmtree(tmp_path / "state")
    (tmp_path / "state").write_text("a file")
    assert any(
        "cannot write the root of the checkpoints" in problem for problem in preflight(config, 1, print)
    )


@pytest.mark.parametrize(
    ("kind", "most_nodes", "is_logged"),
    [("xfs\n", 2, True), ("xfs\n", 1, False), ("nfs\n", 2, False), (None, 2, False)],
)
def test_a_folder_that_only_this_node_sees_is_logged(
    tmp_path: Path, kind: str | None, most_nodes: int, is_logged: bool
) -> None:
    logged: list[str] = []
    say_unless_shared(open_storage(tmp_path / "run"), most_nodes, logged.append, lambda command: kind)
    assert [f"{tmp_path / 'run'} is on a disk of this node (xfs)" in text for text in logged] == [
        True
    ] * is_logged


def test_a_bucket_is_seen_by_all_nodes() -> None:
    say_unless_shared(open_storage("s3://bucket/run"), 2, pytest.fail)


def test_a_clock_that_differs_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, logged = config_of(tmp_path), list[str]()
    write_bytes = Path.write_bytes

    def with_old_time(path: Path, data: bytes) -> int:
        written = write_bytes(path, data)
        os.utime(path, (1e9, 1e9))
        return written

    monkeypatch.setattr(Path, "write_bytes", with_old_time)
    assert preflight(config, 1, logged.append) == []
    assert f"s from that of {config.run}" in logged[-1]


def test_a_command_that_fails_has_no_output() -> None:
    assert run_command(("true",)) == ""
    assert run_command(("false",)) is None
    assert run_command(("no-such-program",)) is None
