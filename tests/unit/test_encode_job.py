"""The parts of the encoding job without Ray: placement, paths, identity, and resuming from an output."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from dit_scale import dist
from dit_scale.cli import main
from dit_scale.config import EncodeConfig, load
from dit_scale.data.shards import Quarantined, VaeIdentity
from dit_scale.errors import ConfigError, DataError, DeviceError, WeightsError
from dit_scale.storage import Storage, open_storage
from dit_scale.storage.disk import DiskStorage
from dit_scale.vae_files import find_vae
from dit_scale_pipeline import output
from dit_scale_pipeline.decoder import DecodedBatch
from dit_scale_pipeline.encoder import Encoder
from dit_scale_pipeline.inputs import Entry, Listing
from dit_scale_pipeline.metrics import Metrics
from dit_scale_pipeline.progress import JobProgress
from dit_scale_pipeline.ray_cluster import Placement, _show_message, place_encoders
from dit_scale_pipeline.shards_writer import IndexRow, Shard, build_shard, write_shard
from tests.support.faults.small_disk import fill, small_disk
from tests.support.tiny_vae import save_tiny_vae

VAE = VaeIdentity(name="x", weights_sha256="1", scale=0.2, downsample=8, latent_channels=4)


def listing(num: int) -> Listing:
    return Listing("class_folders", ("a",), [f"a/{key}.png" for key in range(num)], np.zeros(num, np.int32))


def config(**changes: object) -> EncodeConfig:
    return EncodeConfig.model_validate(changes)


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(tmp_path)


def test_the_vae_runs_on_what_the_cluster_has() -> None:
    assert place_encoders(config(), [{"CPU": 2.0}]) == Placement("cpu", 1, 1)
    gpus = [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}, {"CPU": 4.0}]
    assert place_encoders(config(), gpus) == Placement("cuda", 8, 55)
    assert place_encoders(config(cpus_per_decoder=4), gpus) == Placement("cuda", 8, 6)
    assert place_encoders(config(device="cpu"), gpus) == Placement("cpu", 35, 1)
    assert place_encoders(config(encoders=3, cpus_per_encoder=0.5, decoders=7), [{"CPU": 2.0}]) == Placement(
        "cpu", 3, 7
    )


@pytest.mark.parametrize(
    ("changes", "nodes", "message"),
    [
        ({"device": "cuda"}, [{"CPU": 8.0}], r"1 encoders .*'GPU': 1.0.* do not fit .*0 GPUs, room for 0"),
        ({"encoders": 5, "cpus_per_encoder": 0.5}, [{"CPU": 2.0}], "5 encoders .* room for 4"),
        ({"encoders": 2, "cpus_per_encoder": 1.5}, [{"CPU": 2.0}, {"CPU": 1.0}], "room for 1"),
        (
            {"encoders": 4, "cpus_per_encoder": 0.5},
            [{"CPU": 2.0}],
            r"leave 0 of 2 CPUs, but a decoder reserves 0.5",
        ),
        ({}, [{"CPU": 1.0}], "leave 0 of 1 CPUs"),
        ({}, [], "room for 0"),
    ],
)
def test_what_ray_would_wait_for_forever_is_refused(
    changes: dict[str, object], nodes: list[dict[str, float]], message: str
) -> None:
    with pytest.raises(DeviceError, match=message):
        place_encoders(config(**changes), nodes)


def test_relative_paths_of_a_submitted_job_are_refused_but_for_the_vae(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_vae(tmp_path / "weights")
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for name, paths in {"output": ("/in", "out"), "source": ("in", "/out")}.items():
        arguments = [f"source={paths[0]}", f"output={paths[1]}", "vae=weights"]
        assert main(["encode", *arguments]) == 2
        said = capsys.readouterr().err
        assert f"{name}={arguments[name == 'output'].partition('=')[2]}: a submitted job runs in a" in said
    # a folder of the working directory, of which every node has a copy of its own
    assert load(EncodeConfig, None, ["vae=weights"], keep_relative=True).vae == "weights"


FREE = {"source", "output", "vae", "max_quarantined", "allow_empty_classes", "ray_address"}
FREE |= {
    "nodes",
    "wait_s",
    "encoders",
    "decoders",
    "cpus_per_encoder",
    "gpus_per_encoder",
    "cpus_per_decoder",
}
FREE |= {"device", "log_every_s", "wandb", "wandb_project"}
FREE |= {"image_column", "label_column"}  # parts of the listing
BOUND: dict[str, object] = {
    "image_size": 512,
    "shard_samples": 1,
    "vae_batch": 1,
    "precision": "bf16",
    "channels_last": True,
    "compile": True,
    "threads_per_encoder": 2,
}


def test_every_key_is_part_of_the_identity_or_is_not() -> None:
    assert FREE | BOUND.keys() == EncodeConfig.model_fields.keys(), "say where a new key belongs"


@pytest.mark.parametrize("key", BOUND)
def test_an_output_belongs_to_one_identity(storage: Storage, key: str) -> None:
    images = listing(3)
    wanted = output.identity(config(), images, VAE)
    assert output.read_identity(storage) is None
    output.claim(storage, wanted | {"device": "cpu"}, images)
    output.claim(storage, wanted | {"device": "cpu"}, images)
    found = output.read_identity(storage)
    assert found == wanted | {"device": "cpu"}
    output.check_identity(storage, found, wanted, images, images)
    with pytest.raises(ConfigError, match="device: 'cpu' in the output, 'H200' now"):
        output.claim(storage, wanted | {"device": "H200"}, images)
    other = output.identity(config(**{key: BOUND[key]}), images, VAE)
    with pytest.raises(ConfigError, match="created with another configuration"):
        output.check_identity(storage, found, other, images, images)


@pytest.mark.parametrize("begun", ["bf16", "fp32"])
def test_auto_precision_goes_on_as_the_output_was_begun(storage: Storage, begun: str) -> None:
    images, auto = listing(3), config(precision="auto")
    wanted = output.identity(auto, images, VAE)
    output.claim(storage, {**wanted, "device": "cpu", "precision": begun}, images)
    found = output.read_identity(storage)
    assert found is not None
    resumed = output.with_precision_of(found, auto)
    assert resumed.precision == begun
    output.check_identity(storage, found, output.identity(resumed, images, VAE), images, images)
    other = config(precision="fp32" if begun == "bf16" else "bf16")
    assert output.with_precision_of(found, other) == other
    with pytest.raises(ConfigError, match=f"precision: '{begun}' in the output"):
        output.check_identity(storage, found, output.identity(other, images, VAE), images, images)


def test_a_damaged_identity_is_named(storage: Storage) -> None:
    storage.write("encode.json", b"{")
    with pytest.raises(DataError, match="is damaged"):
        output.read_identity(storage)


def test_an_output_that_holds_something_else_is_refused(storage: Storage) -> None:
    storage.write("dataset.json", b"{}")
    with pytest.raises(ConfigError, match="contains another data set"):
        output.read_identity(storage)


def test_another_listing_and_another_vae_are_explained(storage: Storage) -> None:
    found = output.identity(config(), listing(3), VAE)
    wanted = output.identity(config(), listing(4), VAE.model_copy(update={"weights_sha256": "2"}))
    with pytest.raises(ConfigError) as caught:
        output.check_identity(storage, found, wanted, listing(4), listing(3))
    assert "The source has changed since this output was created: 1 new (a/3.png)" in str(caught.value)
    assert "vae is not the autoencoder that encoded the existing shards" in str(caught.value)
    assert "its shards are unchanged" in str(caught.value)


def test_labels_that_an_empty_class_moves_are_refused(storage: Storage) -> None:
    before = Listing("class_folders", ("b",), ["b/1.png"], np.array([0], np.int32))
    now = Listing("class_folders", ("a", "b"), ["b/1.png"], np.array([1], np.int32))
    assert before.sha256 == now.sha256
    wanted = output.identity(config(), before, VAE)
    with pytest.raises(ConfigError, match=r"classes without an image are new \(a\), which changes"):
        output.check_identity(storage, wanted, output.identity(config(), now, VAE), now, before)


@pytest.mark.parametrize(
    ("source", "where", "how"),
    [
        ("x", "x", "is the same place as the source"),
        ("x", "x/latents", "is inside the source"),
        ("x", "link/latents", "is inside the source"),
        ("link", "x/latents", "is inside the source"),
        ("x/n01", "x", "contains the source"),
        ("x/train-*.tar", "x", "is the same place as the source"),
        ("x/train.tar", ".", "contains the source"),
        ("s3://b/x", "s3://b/x/", "is the same place as the source"),
        ("s3://b", "s3://b/latents", "is inside the source"),
        ("s3://b/x/train.tar", "s3://b", "contains the source"),
        ("x", "y", ""),
        ("x", "x2", ""),
        ("x/train-*.tar", "x/latents", ""),
        ("s3://b/x", "s3://b/x2", ""),
        ("s3://b/x", "s3://c/x/y", ""),
        ("x", "s3://b/x", ""),
    ],
)
def test_an_output_that_would_be_listed_is_refused(
    source: str, where: str, how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x/n01").mkdir(parents=True)
    (tmp_path / "link").symlink_to("x")
    monkeypatch.chdir(tmp_path)
    job = load(EncodeConfig, None, [f"source={source}", f"output={where}"])
    if how:
        with pytest.raises(ConfigError, match=rf"output=.* {how}.*choose an output"):
            output.refuse_overlap(job, open_storage(job.output))
    else:
        output.refuse_overlap(job, open_storage(job.output))


def test_a_bad_input_whose_name_is_not_text(storage: Storage) -> None:
    entry = Entry(0, "a/caf\udce9.png", 0)
    account = DecodedBatch((), ((entry, "torn"),))
    record = write_shard(storage.url, "00000", [account], 4, np.zeros((0, 2, 8, 4, 4), np.float16))
    assert [item.path for item in record.quarantined] == ["a/caf\\xe9.png"]
    assert output.finished_shards(storage) == {"00000": record}
    metrics = Metrics(storage, config(), print)
    with pytest.raises(DataError, match=r"a/caf\\xe9.png \(torn\)"):
        with JobProgress(10, config(max_quarantined=0.0), [], Console(quiet=True), metrics) as progress:
            progress.batch_done(account)


@pytest.fixture
def shard() -> Shard:
    return build_shard("00000", [IndexRow(0, "a/0.png", 0, np.zeros((2, 8, 4, 4), np.float16))], [], 4)


def test_a_shard_without_its_mark_is_not_finished(storage: Storage, shard: Shard) -> None:
    shard.write(storage)
    assert output.finished_shards(storage) == {"00000": shard.record}
    storage.delete("shards/00000.json")
    assert output.finished_shards(storage) == {}


class Dies(Exception):
    """Do not return: the process exits."""


def test_the_mark_of_a_shard_is_put_when_all_else_is_there(
    storage: Storage, shard: Shard, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, real, lives_for = list[str](), DiskStorage.write_new, 0

    def put_or_die(self: DiskStorage, key: str, data: bytes) -> bool:
        if len(put) == lives_for:
            raise Dies
        put.append(key)
        return real(self, key, data)

    monkeypatch.setattr(DiskStorage, "write_new", put_or_die)
    while lives_for < 3:
        with pytest.raises(Dies):
            shard.write(storage)
        assert output.finished_shards(storage) == {}
        lives_for, put = lives_for + 1, []
    shard.write(storage)
    assert put == ["shards/00000.tar", "shards/00000.idx", "shards/00000.json"]
    assert output.finished_shards(storage) == {"00000": shard.record}


@pytest.mark.parametrize("data", [b"short", bytes(100_000)], ids=["too short", "too long"])
@pytest.mark.parametrize("key", ["shards/00000.tar", "shards/00000.idx", "shards/00000.json"])
def test_what_was_damaged_after_it_was_finished_is_named(
    storage: Storage, shard: Shard, key: str, data: bytes
) -> None:
    shard.write(storage)
    storage.write(key, data)
    with pytest.raises(DataError, match=rf"{key}.* damaged.*elete .*start again"):
        output.finished_shards(storage)
    with pytest.raises(DataError, match=rf"{key} exists with SHA-256 .* Delete it"):
        shard.write(storage)
    for name in ("tar", "json"):
        storage.delete(f"shards/00000.{name}")
    storage.delete(key)
    shard.write(storage)
    assert output.finished_shards(storage) == {"00000": shard.record}


def test_who_comes_second_finds_its_own_bytes(storage: Storage, shard: Shard) -> None:
    def written() -> dict[str, tuple[int, int]]:
        stats = {key: storage.local_path(key).stat() for key, _ in storage.list()}
        return {key: (stat.st_ino, stat.st_mtime_ns) for key, stat in stats.items()}

    shard.write(storage)
    before = written()
    shard.write(storage)
    assert written() == before


def test_a_class_that_lost_all_its_images_is_an_error(storage: Storage) -> None:
    images = Listing("class_folders", ("a", "b"), ["a/0.png", "b/1.png"], np.array([0, 1], np.int32))
    row = IndexRow(0, "a/0.png", 0, np.zeros((2, 8, 32, 32), np.float16))
    record = build_shard("00000", [row], [Quarantined(key=1, path="b/1.png", reason="torn")], 4).record
    claimed = output.identity(config(), images, VAE) | dict.fromkeys(output.ENCODING_KEYS, "")
    rest = {"vae": VAE, "stored": claimed, "records": [record]}
    with pytest.raises(DataError, match=r"images are all quarantined: b. .*allow_empty_classes=true"):
        output.commit(storage, config(), images, **rest)
    assert not storage.exists("dataset.json")
    info = output.commit(storage, config(allow_empty_classes=True), images, **rest)
    assert (info.samples, info.num_classes) == (1, 2)


def test_shards_are_slices_of_the_listing() -> None:
    assert output.plan_shards(listing(5), 2) == {
        "00000": range(2),
        "00001": range(2, 4),
        "00002": range(4, 5),
    }


def test_the_quarantine_is_counted_once_over_all_starts(storage: Storage) -> None:
    bad = Quarantined(key=1, path="a/1.png", reason="torn")
    record = build_shard("00000", [], [bad], 4).record
    console = Console(quiet=True)
    metrics = Metrics(storage, config(), console.print)
    with JobProgress(10, config(max_quarantined=0.1), [record], console, metrics) as progress:
        progress.shard_done(record)
        with pytest.raises(
            DataError, match=r"2 of 10 inputs .* allows 1: a/1.png \(torn\), a/2.png \(torn\)"
        ):
            progress.shard_done(
                build_shard("00001", [], [Quarantined(key=2, path="a/2.png", reason="torn")], 4).record
            )
    with pytest.raises(DataError, match="allows 0"):
        with JobProgress(10, config(max_quarantined=0.0), [record], console, metrics):
            pass


def test_rows_that_cannot_be_put_stop_no_job(tmp_path: Path) -> None:
    said: list[str] = []
    with small_disk(tmp_path / "disk", 2**20) as disk:
        storage = open_storage(disk / "set")
        metrics = Metrics(storage, config(), said.append)
        metrics.write(1, {"shards": 0})
        filler = fill(disk)
        for images in (2, 3):
            metrics.write(images, {"shards": 0})
        assert len(said) == 1
        assert "metrics.jsonl: No space left on device" in said[0]
        filler.unlink()
        metrics.close()
        rows = storage.read("metrics.jsonl").splitlines()
    assert [json.loads(row)["images"] for row in rows] == [1, 2, 3]


def tiny_encoder(folder: Path, **setting: object) -> tuple[Encoder, dict[str, str]]:
    vae = save_tiny_vae(folder / "vae")
    encoder = Encoder(config(vae=vae, vae_batch=4, **setting), find_vae(vae).identity, "cpu")
    return encoder, encoder.runtime()


def test_an_encoder_on_another_kind_of_machine_refuses(tmp_path: Path) -> None:
    encoder, runtime = tiny_encoder(tmp_path)
    with pytest.raises(DeviceError, match=r"different device .*finished shards are kept"):
        encoder.encode(np.zeros((1, 32, 32, 3), np.uint8), runtime | {"device": "cpu AVX7"})


def test_an_encoder_that_finds_another_vae_refuses(tmp_path: Path) -> None:
    encoder = Encoder(config(vae=save_tiny_vae(tmp_path / "vae")), VAE, "cpu")
    with pytest.raises(WeightsError, match=r"differs between nodes.*copy the same weights to all nodes"):
        encoder.runtime()


@pytest.mark.parametrize(
    ("setting", "tolerance"),
    [({"channels_last": True}, 1e-3), ({"precision": "bf16", "channels_last": True}, 0.1)],
)
def test_other_arithmetic_gives_nearly_the_same_latents(
    setting: dict[str, object], tolerance: float, tmp_path: Path
) -> None:
    plain, runtime = tiny_encoder(tmp_path)
    other, theirs = tiny_encoder(tmp_path, **setting)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    expected = plain.encode(pixels, runtime).astype(np.float32)
    found = other.encode(pixels, theirs)
    assert np.array_equal(found, other.encode(pixels, theirs))
    assert not np.array_equal(found, expected), "the setting arrives"
    assert np.abs(found - expected).max() < tolerance * expected.std()


@pytest.mark.parametrize("asked", ["auto", "bf16", "fp32"])
def test_an_encoder_reports_its_precision(tmp_path: Path, asked: str) -> None:
    _, runtime = tiny_encoder(tmp_path, precision=asked)
    assert runtime["precision"] == dist.choose_precision(asked, torch.device("cpu"))


def test_a_short_batch_gives_the_bits_of_a_full_one(tmp_path: Path) -> None:
    encoder, runtime = tiny_encoder(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    full, short = encoder.encode(pixels, runtime), encoder.encode(pixels[:2], runtime)
    assert full.shape == (4, 2, 8, 4, 4)
    assert full.dtype == np.float16
    assert np.array_equal(full[:2], short)
    mirrored = encoder.encode(pixels[:, :, ::-1], runtime)
    assert np.array_equal(mirrored, full[:, ::-1])


def test_the_command_line_without_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images/a").mkdir(parents=True)
    Image.new("RGB", (40, 40)).save(tmp_path / "images/a/1.png")
    vae = save_tiny_vae(tmp_path / "vae")
    paths = [f"source={tmp_path}/images", f"vae={vae}", f"output={tmp_path}/out", "vae_batch=2"]
    assert main(["encode", "--dry-run", "image_size=32", *paths]) == 0
    captured = capsys.readouterr()
    assert "latents [2, 8, 4, 4]\n1 shards" in captured.out
    assert "images/s per encoder" in captured.out
    assert "1 images of 1 classes: class_folders" in captured.err
    assert not (tmp_path / "out").exists()
    for wrong, message in (
        (["sorce=x"], "unknown key 'sorce'; did you mean 'source'?"),
        (["image_size=33"], "image_size"),
        (["--config", str(tmp_path / "none.yaml")], "no configuration file"),
        ([*paths, "source=/nowhere"], "no folder at /nowhere"),
    ):
        assert main(["encode", *wrong]) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "images/b").mkdir()
    assert main(["encode", *paths, "image_size=32"]) == 2
    assert "classes without an image: b. Add images" in capsys.readouterr().err
    (tmp_path / "images/b").rmdir()
    assert not (tmp_path / "out").exists(), "nothing is written before the listing is accepted"
    (tmp_path / "out").mkdir()
    (tmp_path / "out/encode.json").write_text(json.dumps({"image_size": 32}))
    assert main(["encode", *paths]) == 2
    assert "image_size: 32 in the output, 256 now" in capsys.readouterr().err


def test_names_with_brackets_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("images/[red]/1.png", "images/stray[red].png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    vae = save_tiny_vae(tmp_path / "vae")
    paths = [f"source={tmp_path}/images", f"vae={vae}", f"output={tmp_path}/out", "vae_batch=2"]
    assert main(["encode", "--dry-run", "image_size=32", *paths]) == 0
    assert "ignored files and folders: 1 (stray[red].png)" in capsys.readouterr().err


def test_a_message_of_the_cluster_is_one_short_line(capsys: pytest.CaptureFixture[str]) -> None:
    _show_message({"lines": ["\nA raylet died.\n" + "log\n" * 20], "pid": "raylet"}, False)
    _show_message({"lines": ["x" * 1000]}, False)
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"Ray: A raylet died.\nRay: {'x' * 200}\n")
