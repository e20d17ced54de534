"""The held-out loss: its draws, its tiles, and what it does with damaged samples."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dit_scale import rng
from dit_scale.data.shards import LatentDataset
from dit_scale.diffusion import schedule as schedules
from dit_scale.diffusion.gaussian import q_sample
from dit_scale.diffusion.loss import hybrid_loss
from dit_scale.errors import DataError
from dit_scale.rng import Purpose
from dit_scale.train.evaluation_loss import DRAWS, HeldOutLoss, means, timesteps
from tests.support.latents import write_latents

NUM, SEED, TIMESTEPS = 20, 3, 100
IDS = np.array([1, 4, 5, 11, 18])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_latents(tmp_path, num=NUM, shard_samples=8)
    return tmp_path


def loss_of(folder: Path, tile: int, skip_damaged: bool = False, ids: np.ndarray = IDS) -> HeldOutLoss:
    return HeldOutLoss(
        dataset=LatentDataset.open(folder),
        ids=ids,
        schedule=schedules.linear(TIMESTEPS),
        seed=SEED,
        tile=tile,
        skip_damaged=skip_damaged,
    )


def predict(x_BCHW: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
    """A model whose output depends on all its inputs, sample by sample."""
    hint_B111 = (0.01 * t_B + 0.1 * y_B)[:, None, None, None]
    return torch.cat([0.3 * x_BCHW + 0.1 * hint_B111, torch.tanh(x_BCHW)], dim=1)


def total(loss: HeldOutLoss) -> dict[str, float | None]:
    return means([loss.tile_sums(predict, number) for number in range(loss.tiles)])


def test_it_is_the_mean_over_samples_and_draws(folder: Path) -> None:
    """The losses computed again, sample by sample."""
    dataset, schedule = LatentDataset.open(folder), schedules.linear(TIMESTEPS)
    rows = []
    for sample_id in IDS.tolist():
        moments, label = dataset.read(sample_id)
        mean, std = torch.from_numpy(moments[:1].astype(np.float32)).chunk(2, dim=1)
        position = torch.tensor([sample_id])
        u = rng.uniforms(SEED, Purpose.HELD_OUT_TIMESTEP, position)
        for draw in range(DRAWS):
            t = torch.floor(TIMESTEPS * (u + draw) / DRAWS).long()
            shape = tuple(mean.shape[1:])
            z = 0.5 * (mean + std * rng.normals(SEED, Purpose.HELD_OUT_POSTERIOR, position, shape, draw))
            noise = rng.normals(SEED, Purpose.HELD_OUT_NOISE, position, shape, draw)
            x = q_sample(schedule, z, t, noise)
            output = predict(x, t, torch.tensor([label]))
            found = hybrid_loss(schedule, output, x_start_BCHW=z, x_t_BCHW=x, noise_BCHW=noise, t_B=t)
            rows.append([part.item() for part in found])
    expected = dict(zip(("loss", "mse", "vb"), np.mean(rows, axis=0).tolist(), strict=True))
    assert total(loss_of(folder, tile=2)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tile", [1, 3, 4, 8])
def test_padding_does_not_count(folder: Path, tile: int) -> None:
    loss = loss_of(folder, tile)
    assert loss.tiles == -(-len(IDS) // tile)
    assert total(loss) == pytest.approx(total(loss_of(folder, tile=5)), rel=1e-6)
    counts = [loss.tile_sums(predict, number)[-1] for number in range(loss.tiles)]
    assert sum(counts) == DRAWS * len(IDS)


def test_the_timesteps_of_a_sample_are_spread_over_the_diffusion() -> None:
    ids = torch.arange(1000)
    drawn = torch.stack([timesteps(SEED, ids, draw, 1000) for draw in range(DRAWS)])
    assert (drawn // (1000 // DRAWS) == torch.arange(DRAWS)[:, None]).all()
    assert drawn.min() < 5
    assert drawn.max() > 994
    assert abs(drawn.double().mean().item() - 499.5) < 10


def damage(folder: Path) -> None:
    """Flip a bit of a held-out sample."""
    dataset = LatentDataset.open(folder)
    record = dataset.records(0)[4]
    path = folder / "shards" / "00000.tar"
    data = bytearray(path.read_bytes())
    data[int(record["offset"]) + int(record["length"]) - 1] ^= 1
    path.write_bytes(data)


def test_a_damaged_sample_stops_the_run_or_is_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_scale.data.files.RETRY_PAUSES_S", (0.0,))
    without = total(loss_of(folder, tile=4, ids=IDS[IDS != 4]))
    damage(folder)
    with pytest.raises(DataError, match=r"sample 4: .*data\.damaged=quarantine to leave it out"):
        total(loss_of(folder, tile=4))
    assert total(loss_of(folder, tile=4, skip_damaged=True)) == pytest.approx(without, rel=1e-6)
    assert total(loss_of(folder, tile=4, skip_damaged=True, ids=np.array([4])))["loss"] is None
