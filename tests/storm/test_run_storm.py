"""Loaders and complete runs on a real S3 server (Ceph) while three requests in ten meet a fault."""

import queue
import signal
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from dit_scale.checkpoint.attempts import committed
from dit_scale.checkpoint.manifest import CHECKPOINTS, EMA, MANIFEST, CheckpointId
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.config import DataConfig, TrainConfig
from dit_scale.data import download
from dit_scale.data.batch_plan import batch_plan
from dit_scale.data.loader import Loader
from dit_scale.data.shards import LatentDataset
from dit_scale.storage import transfer
from dit_scale.train.run_folder import root_of
from tests.storm import hasty, jobs
from tests.support.faults.ceph import CephServer
from tests.support.faults.proxy import KINDS, FaultProxy
from tests.support.latents import write_latents
from tests.support.ranks.jobs import in_environment, losses, saving, small_config
from tests.support.ranks.points import Hold
from tests.support.ranks.processes import TIMEOUT_S, run, start
from tests.support.ranks.runs import events, final_files, kill, wait_for
from tests.support.s3 import BUCKET
from tests.support.speed import scaled

pytestmark = pytest.mark.dist

RATES = {
    **dict.fromkeys(("error", "late_error", "drop_reply", "reset", "cut_reply", "short"), 0.045),
    "flip": 0.03,
    "stall_reply": 0.004,
    "trickle": 0.004,
    # Only requests with a body can meet these faults, and few have one.
    "cut_request": 0.1,
    "stall_request": 0.1,
}
NUM, SHARD_SAMPLES = 240, 30
CACHE_BYTES = 5 * 81_920
"""Five of the eight shards: two windows of two shards."""

SEED, GLOBAL_BATCH = 5, 20
LOADER_STEPS = 2 * NUM // GLOBAL_BATCH + 3
LOADERS = [(window_shards, world) for window_shards in (0, 2) for world in (1, 3)]

WORLD = 2

Sample = tuple[int, int, bytes]
"""Position, label, and the moments of the drawn view."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder, num=NUM, shard_samples=SHARD_SAMPLES)
    return folder


@pytest.fixture
def proxy(ceph: CephServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A proxy in front of the server, used by this process too; it injects nothing at first."""
    hasty.hurry(monkeypatch.setattr)
    with FaultProxy(ceph.port) as proxy:
        proxy.stall_s = scaled(proxy.stall_s)
        for name, value in environment_of(ceph, proxy).items():
            monkeypatch.setenv(name, value)
        yield proxy


def environment_of(ceph: CephServer, proxy: FaultProxy) -> dict[str, str]:
    return {**ceph.environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}


def write_remote_latents(url: str) -> str:
    write_latents(url, num=NUM, shard_samples=SHARD_SAMPLES)
    return url


def assert_a_storm(proxy: FaultProxy, kinds: Iterable[str]) -> None:
    print(f"{proxy.requests} requests, faults: {dict(proxy.injected)}")
    assert all(proxy.injected[kind] for kind in kinds), proxy.injected
    assert sum(proxy.injected.values()) > 0.25 * proxy.requests


def test_loaders_lose_nothing(
    data: Path, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "LOOK_AGAIN_S", 0.2)
    url = write_remote_latents(f"s3://{BUCKET}/loaders")
    # A loader makes few requests. Stall more of them, or some kind of fault would be missing by chance.
    proxy.set(RATES | {"stall_reply": 0.008, "trickle": 0.008})

    def in_the_storm(loaders: tuple[int, int]) -> list[Sample]:
        window_shards, world = loaders
        cache_dir = str(tmp_path / f"windows of {window_shards}, world {world}")
        config = DataConfig(
            url=url,
            cache_dir=cache_dir,
            cache_bytes=CACHE_BYTES,
            window_shards=window_shards,
            damaged="quarantine",
        )
        return samples_of(config, world)

    with ThreadPoolExecutor(len(LOADERS)) as pool:
        for (window_shards, _), found in zip(LOADERS, pool.map(in_the_storm, LOADERS), strict=True):
            calm = samples_of(DataConfig(url=str(data), window_shards=window_shards), world=1)
            assert_every_sample_once_an_epoch(calm, data)
            assert found == calm
    # A loader's requests have no body.
    assert_a_storm(proxy, [kind for kind in KINDS if not kind.endswith("_request")])


def samples_of(config: DataConfig, world: int) -> list[Sample]:
    """Return what the loaders of all ranks deliver together, by position."""
    plan = batch_plan(GLOBAL_BATCH, 4, world)

    def take(loader: Loader) -> list[Sample]:
        found = []
        for _ in range(LOADER_STEPS * plan.micro_steps):
            batch = next(loader)
            for row in range(int(batch.weight_B.sum())):  # fillers come last
                moments = batch.moments_B2CHW[row].numpy().tobytes()
                found.append((int(batch.position_B[row]), int(batch.y_B[row]), moments))
        return found

    with ExitStack() as stack:
        loaders = []
        for rank in range(world):
            dataset = LatentDataset.open(config.url, config.cache_dir, config.cache_bytes)
            loaders.append(Loader(dataset, config, plan, rank=rank, seed=SEED, first_step=0))
            stack.callback(loaders[-1].close)
        with ThreadPoolExecutor(world) as pool:
            found = sorted(sample for part in pool.map(take, loaders) for sample in part)
        assert not any(loader.quarantined() for loader in loaders)
    return found


def assert_every_sample_once_an_epoch(samples: list[Sample], data: Path) -> None:
    dataset = LatentDataset.open(data)
    ids = {view.tobytes(): number for number in range(NUM) for view in dataset.read(number)[0]}
    assert [position for position, _, _ in samples] == list(range(LOADER_STEPS * GLOBAL_BATCH))
    for epoch in range(2):
        seen = Counter(ids[moments] for _, _, moments in samples[epoch * NUM : (epoch + 1) * NUM])
        assert seen == dict.fromkeys(range(NUM), 1)


def config_of(folder: Path, url: str, state: str = "") -> TrainConfig:
    """A run with one average and a cache smaller than its data: it needs the server until the last step."""
    config = saving(
        small_config(folder, Path(), "DiT-Ti/2"), steps=32, every_steps=16, ema_every_steps=32, url=state
    )
    data = DataConfig(url=url, cache_dir=str(folder / "cache"), cache_bytes=CACHE_BYTES // 2)
    return config.model_copy(update={"data": data, "ema": config.ema[1:]})


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    config = config_of(tmp_path_factory.mktemp("straight"), str(data))
    assert run(WORLD, jobs.train, config) == [0] * WORLD
    return config


def manifests(config: TrainConfig) -> set[str]:
    """Return all folders with a manifest, whether readers accept it or not."""
    ending = f"/{MANIFEST}"
    return {key.removesuffix(ending) for key, _ in root_of(config).list() if key.endswith(ending)}


@pytest.mark.long
def test_a_run_that_is_killed_and_resumed_in_a_storm(
    ceph: CephServer, proxy: FaultProxy, straight: TrainConfig, tmp_path: Path
) -> None:
    """Killed during the last save: its average is committed, the checkpoint itself is not."""
    environment = environment_of(ceph, proxy)
    url = write_remote_latents(f"s3://{BUCKET}/killed/data")
    proxy.set(RATES)
    config = config_of(tmp_path / "run", url, f"s3://{BUCKET}/killed/state")
    hold = Hold(tmp_path, "writer: before the manifest", 3)
    ranks, answers = start(WORLD, in_environment, environment, jobs.train, config, hold)
    try:
        wait_for(hold, answers)
    finally:
        kill(ranks)
    first, killed = CheckpointId(16, 1), CheckpointId(32, 1)
    assert manifests(config) == {first.path(), killed.path(EMA)}
    assert committed(root_of(config)) == [first]

    assert run(WORLD, in_environment, environment, jobs.train, config) == [0] * WORLD
    assert [event["resumed_from"] for event in events(config, "start")] == [None, first.path()]
    assert final_files(config) == final_files(straight)
    assert losses(config) == losses(straight)
    assert_a_storm(proxy, KINDS)
    proxy.calm()
    last = CheckpointId(32, 2)
    assert committed(root_of(config)) == [last, first]
    assert manifests(config) == {last.path(), first.path(), last.path(EMA)}
    for checkpoint_id, folder in ((last, CHECKPOINTS), (first, CHECKPOINTS), (last, EMA)):
        Checkpoint(root_of(config), checkpoint_id, folder).verify()


def test_a_run_whose_server_hangs_for_a_while(
    ceph: CephServer, proxy: FaultProxy, straight: TrainConfig, tmp_path: Path
) -> None:
    """Requests time out, but still reach the server when it resumes."""
    url = write_remote_latents(f"s3://{BUCKET}/hanging/data")
    config = config_of(tmp_path / "run", url, f"s3://{BUCKET}/hanging/state")
    hold = Hold(tmp_path, "writer: before reading again", 1)
    ranks, answers = start(WORLD, in_environment, environment_of(ceph, proxy), jobs.train, config, hold)
    try:
        wait_for(hold, answers)
        ceph.gateway.send_signal(signal.SIGSTOP)
        hold.go.touch()
        with pytest.raises(queue.Empty):
            answers.get(timeout=3 * transfer.STALL_S)
        ceph.gateway.send_signal(signal.SIGCONT)
        assert finish(answers) == [(None, 0)] * WORLD
    finally:
        ceph.gateway.send_signal(signal.SIGCONT)
        kill(ranks)
    assert final_files(config) == final_files(straight)
    assert losses(config) == losses(straight)


def finish(answers: Any) -> list[Any]:
    return [answers.get(timeout=TIMEOUT_S)[1:] for _ in range(WORLD)]
