"""The parts of the encoding job that need no Ray: placing, paths, identity, what a later start finds."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from data_pipeline import output
from data_pipeline.encode_latents import choose_device, main, resolve_paths
from data_pipeline.encoder import Encoder
from data_pipeline.images import Entry, Listing
from data_pipeline.progress import Watch
from data_pipeline.shards_writer import Row, build_shard
from dit_scale.config import EncodeConfig
from dit_scale.data.shards import Quarantined, VaeIdentity
from dit_scale.errors import ConfigError, DataError, DeviceError
from dit_scale.storage import Storage, open_storage
from tests.tiny_vae import save_tiny_vae

VAE = VaeIdentity(name="x", weights_sha256="1", scale=0.2, downsample=8, latent_channels=4)


def listing(num: int) -> Listing:
    entries = tuple(Entry(key, f"a/{key}.png", 0) for key in range(num))
    return Listing(entries, ("a",), (), (), "digest")


def config(**changes: object) -> EncodeConfig:
    return EncodeConfig.model_validate(changes)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path)


def test_the_device_is_what_the_cluster_has() -> None:
    assert choose_device(config(), [{"CPU": 2.0}]) == "cpu"
    assert choose_device(config(), [{"CPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}]) == "cuda"
    assert choose_device(config(device="cpu"), [{"CPU": 8.0, "GPU": 1.0}]) == "cpu"
    assert choose_device(config(encoders=3), [{"CPU": 2.0}]) == "cpu"


@pytest.mark.parametrize(
    ("changes", "nodes", "message"),
    [
        ({"device": "cuda"}, [{"CPU": 8.0}], r"1 encoders .*'GPU': 1.0.* do not fit .*0 GPUs, room for 0"),
        ({"encoders": 5}, [{"CPU": 2.0}], "5 encoders .* room for 4"),
        ({"encoders": 2, "cpus_per_encoder": 1.5}, [{"CPU": 2.0}, {"CPU": 1.0}], "room for 1"),
        ({"encoders": 4}, [{"CPU": 2.0}], r"leave 0 of 2 CPUs, a decoder reserves 0.5"),
        ({}, [], "room for 0"),
    ],
)
def test_what_ray_would_wait_for_forever_is_refused(
    changes: dict[str, object], nodes: list[dict[str, float]], message: str
) -> None:
    with pytest.raises(DeviceError, match=message):
        choose_device(config(**changes), nodes)


def test_paths_are_made_absolute_for_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    found = resolve_paths(config(source="in", output="s3://b/x", vae="weights"))
    assert (found.source, found.output, found.vae) == (
        f"{tmp_path}/in",
        "s3://b/x",
        f"{tmp_path}/weights",
    )
    assert resolve_paths(config(vae="stabilityai/sd-vae-ft-ema")).vae == "stabilityai/sd-vae-ft-ema"
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert resolve_paths(config(source="/in", output="/out", vae="weights")).vae == "weights"
    with pytest.raises(ConfigError, match="output=out: a submitted job runs in a temporary copy"):
        resolve_paths(config(source="/in", output="out"))


def test_an_output_belongs_to_one_identity(storage: Storage) -> None:
    wanted = output.identity(config(), listing(3), VAE)
    assert output.check_identity(storage, wanted) is None
    output.claim(storage, wanted | {"device": "cpu"})
    output.claim(storage, wanted | {"device": "cpu"})
    assert output.check_identity(storage, wanted) == wanted | {"device": "cpu"}
    with pytest.raises(ConfigError, match="device: 'cpu' there, 'H200' here"):
        output.claim(storage, wanted | {"device": "H200"})
    free = {"output", "vae", "source", "encoders", "decoders", "max_quarantined", "ray_address", "device"}
    free |= {"cpus_per_encoder", "gpus_per_encoder", "cpus_per_decoder"}
    bound = {
        "image_size": 512,
        "shard_samples": 1,
        "vae_batch": 1,
        "precision": "bf16",
        "threads_per_encoder": 2,
    }
    assert free | bound.keys() == EncodeConfig.model_fields.keys(), "say where a new key belongs"
    for key, value in bound.items():
        with pytest.raises(ConfigError, match="begun with another configuration"):
            output.check_identity(storage, output.identity(config(**{key: value}), listing(3), VAE))
    storage.write("encode.json", b"{")
    with pytest.raises(DataError, match="is damaged"):
        output.check_identity(storage, wanted)


def test_an_output_that_holds_something_else_is_refused(storage: Storage) -> None:
    storage.write("dataset.json", b"{}")
    with pytest.raises(ConfigError, match="holds another data set"):
        output.check_identity(storage, {})


def test_only_whole_shards_count_as_finished(storage: Storage) -> None:
    row = Row(0, "a/0.png", 0, np.zeros((2, 8, 4, 4), np.float16))
    for number in range(4):
        build_shard(f"0000{number}", [row], [], 4).put(storage)
    storage.write("shards/00001.tar", b"short")
    storage.delete("shards/00002.idx")
    storage.write("shards/00003.json", b"{}")
    assert list(output.finished_shards(storage)) == ["00000"]


def test_shards_are_slices_of_the_listing() -> None:
    assert output.plan(listing(5), 2) == {"00000": range(2), "00001": range(2, 4), "00002": range(4, 5)}


def test_the_quarantine_is_counted_once_over_all_starts() -> None:
    bad = Quarantined(key=1, path="a/1.png", reason="torn")
    record = build_shard("00000", [], [bad], 4).record
    console = Console(quiet=True)
    with Watch(10, 0.1, [record], console) as watch:
        watch.shard(record)
        with pytest.raises(
            DataError, match=r"2 of 10 inputs .* allows 1: a/1.png \(torn\), a/2.png \(torn\)"
        ):
            watch.shard(
                build_shard("00001", [], [Quarantined(key=2, path="a/2.png", reason="torn")], 4).record
            )
    with pytest.raises(DataError, match="allows 0"), Watch(10, 0.0, [record], console):
        pass


def test_a_short_batch_gives_the_bits_of_a_full_one(tmp_path: Path) -> None:
    encoder = Encoder(config(vae=save_tiny_vae(tmp_path / "vae"), vae_batch=4), "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    full, short = encoder.encode(pixels), encoder.encode(pixels[:2])
    assert full.shape == (4, 2, 8, 4, 4)
    assert full.dtype == np.float16
    assert np.array_equal(full[:2], short)
    mirrored = encoder.encode(pixels[:, :, ::-1])
    assert np.array_equal(mirrored, full[:, ::-1])


def test_the_command_line_without_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images/a").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "images/a/1.png")
    vae = save_tiny_vae(tmp_path / "vae")
    paths = [f"source={tmp_path}/images", f"vae={vae}", f"output={tmp_path}/out", "vae_batch=2"]
    assert main(["--dry-run", "image_size=32", *paths]) == 0
    captured = capsys.readouterr()
    assert "latents [2, 8, 4, 4]\n1 shards" in captured.out
    assert "images/s per encoder" in captured.out
    assert "1 files in 1 class folders" in captured.err
    assert not (tmp_path / "out").exists()
    for wrong, message in (
        (["sorce=x"], "unknown key 'sorce'; did you mean 'source'?"),
        (["image_size=33"], "image_size"),
        (["--config", str(tmp_path / "none.yaml")], "no configuration file"),
        ([*paths, "source=/nowhere"], "no folder at /nowhere"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    (tmp_path / "out/encode.json").write_text(json.dumps({"image_size": 32}))
    assert main(paths) == 2
    assert "image_size: 32 there, 256 here" in capsys.readouterr().err
