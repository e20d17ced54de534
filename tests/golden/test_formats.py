"""Formats that exist on disk and in old runs: these literals must never change.

A change that breaks one of them changes the sample order, the random draws, or bytes of existing runs that
must stay readable: it needs a new format version, not a new literal. docs/formats.md quotes them.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from dit_scale import rng
from dit_scale.checkpoint import attempts, rankfile
from dit_scale.checkpoint.attempts import AttemptRecord
from dit_scale.checkpoint.manifest import CheckpointId, Manifest
from dit_scale.checkpoint.reader import Checkpoint
from dit_scale.checkpoint.slices import ParameterSlice
from dit_scale.checkpoint.writer import write_manifest
from dit_scale.data.order import Order, permute, positions_of, round_keys, sample_ids
from dit_scale.data.shards import encode_sample
from dit_scale.rng import Purpose
from dit_scale.sealed import sealed
from dit_scale.storage import open_storage
from dit_scale_pipeline.shards_writer import IndexRow, build_shard

FORMATS = (Path(__file__).parents[2] / "docs" / "formats.md").read_text()

ORDERS = [
    (10, 0, 0, "2 0 8 1 9 7 4 5"),
    (10, 0, 1, "1 6 8 0 3 5 2 7"),
    (1000, 0, 0, "220 982 575 865 695 839 666 898"),
    (1000, 1, 0, "783 810 757 969 709 615 820 198"),
    (1281167, 0, 0, "1273905 835138 587561 672872 372343 472362 132299 325656"),
    (1281167, 0, 1, "954734 95150 1047960 883097 251231 564447 866700 54962"),
    (1281167, 42, 3, "438048 219895 371694 1246214 677322 742241 728552 992190"),
]


@pytest.mark.parametrize(("num_samples", "seed", "epoch", "expected"), ORDERS)
def test_order_of_samples(num_samples: int, seed: int, epoch: int, expected: str) -> None:
    ids = [int(sample_id) for sample_id in expected.split()]
    assert permute(np.arange(8, dtype=np.uint64), num_samples, seed, epoch).tolist() == ids
    positions = epoch * num_samples + np.arange(8, dtype=np.int64)
    assert sample_ids(positions, num_samples, seed).tolist() == ids


WINDOWS = [
    (0, 0, "18 10 19 11 9 8 0 13 2 1 14 15 3 17 4 12 16 6 7 5"),
    (0, 1, "18 19 12 14 13 15 16 17 2 1 3 0 7 5 4 6 11 8 10 9"),
    (42, 3, "0 1 3 18 2 4 19 12 8 14 9 11 15 17 10 16 13 5 7 6"),
]


@pytest.mark.parametrize(("seed", "epoch", "expected"), WINDOWS)
def test_order_in_windows(seed: int, epoch: int, expected: str) -> None:
    order = Order(20, seed, (5, 3, 4, 6, 2), window_shards=2)
    ids = order.ids(epoch * 20 + np.arange(20, dtype=np.int64))
    assert ids.tolist() == [int(sample_id) for sample_id in expected.split()]


def test_excluded_positions() -> None:
    excluded = [(2, 4), (4, 5), (7, 100)]
    assert positions_of(np.arange(6), excluded).tolist() == [0, 1, 5, 6, 100, 101]


def test_the_documentation_quotes_them() -> None:
    for order in ORDERS + WINDOWS:
        assert f"| {' | '.join(map(str, order))} |" in FORMATS
    for purpose, words in WORDS.items():
        assert f"| {purpose.name} | {purpose.value} | {words} |" in FORMATS
    for line in (INDEX + RANK_HEADER + FILE_RECORD + ATTEMPT).splitlines():
        assert f"    {line}\n" in FORMATS


def test_round_keys() -> None:
    assert [f"{key:016x}" for key in round_keys(0, 0).tolist()] == [
        "e220a8397b1dcdaf",
        "6e789e6aa1b965f4",
        "06c45d188009454f",
        "f88bb8a8724c81ec",
        "1b39896a51a8749b",
        "53cb9f0c747ea2ea",
        "2c829abe1f4532e1",
        "c584133ac916ab3c",
    ]
    assert [f"{key:016x}" for key in round_keys(0, 0, 1).tolist()] == [
        "2a98f501af37e97f",
        "fc2b89606a4b1eda",
        "612214bf3070918f",
        "6e766f5af4a87906",
        "c7ea91a7ebd2cffa",
        "19601641f1714605",
        "7ce1ff97feb47940",
        "89662a525489f124",
    ]


WORDS = {
    Purpose.TIMESTEP: "131a8a04 494efee7 e24f0e03 5128a584 18f94853 143f41f3",
    Purpose.NOISE: "97e579fe 1914825b 353f7d34 8e140425 8c5799ed 55039a7e",
    Purpose.LABEL_DROP: "faab7351 6d6dc285 801e5b4e c4f71380 eb01a08b 312a873e",
    Purpose.VIEW: "0f867cb6 5026c0d7 c0971fdd 55af23b2 64add369 c97394e7",
    Purpose.POSTERIOR: "57f1c9bc 5ae47b98 ad11292a bf335982 6e98f98f 115d0bab",
    Purpose.SAMPLE_START: "1657b92c 3984bdc7 493a7ae7 8803a121 ede8eb21 0f16bfbe",
    Purpose.SAMPLE_STEP: "456a9d19 fe96eab4 9ab22796 1c635dbd 8c64cf3f fcf32ba8",
    Purpose.HELD_OUT_TIMESTEP: "e3acf78c 2b7d5a7b 92921e98 bfcc1986 0d09e950 f4b08828",
    Purpose.HELD_OUT_NOISE: "b5bfbb40 4eef49fa 404bf135 8c2b7144 9c0b6538 1470fa07",
    Purpose.HELD_OUT_POSTERIOR: "de5abcc2 9e07b0af 3628c2d2 e31c8efb 07420b6e 23750683",
    Purpose.SAMPLE_LABEL: "d208554b 0f9d31bf a2740a72 41cabacd 6dfcca3f d244a1e9",
}
"""Words of seed 42 at position 2^32 + 5, stream 0."""


def test_every_purpose_has_its_words() -> None:
    position = torch.tensor([2**32 + 5])
    for purpose in Purpose:
        words = rng.words(42, purpose, position, 6)[0].tolist()
        assert " ".join(f"{word:08x}" for word in words) == WORDS[purpose]


def test_words_of_a_later_stream() -> None:
    words = rng.words(42, Purpose.SAMPLE_STEP, torch.tensor([2**32 + 5]), 4, stream=3)[0].tolist()
    assert [f"{word:08x}" for word in words] == ["30152883", "a04f2725", "9a3fb882", "d0fc9ad2"]


def test_integers_uniforms_and_views() -> None:
    position_N = torch.arange(8)
    timesteps = rng.integers(42, Purpose.TIMESTEP, position_N, 1000)
    assert timesteps.tolist() == [612, 987, 825, 729, 326, 314, 225, 358]
    assert rng.integers(42, Purpose.VIEW, position_N, 2).tolist() == [1, 1, 1, 1, 1, 0, 1, 0]
    uniforms = rng.uniforms(42, Purpose.LABEL_DROP, position_N[:3])
    assert [number.hex() for number in uniforms.tolist()] == [
        "0x1.0ab4e13800000p-3",
        "0x1.bec47f0800000p-2",
        "0x1.cb98a72000000p-5",
    ]


def test_normals_to_one_ulp() -> None:
    literals = ["0x1.812ac2p-1", "-0x1.6c3df4p-1", "-0x1.ac7bacp-1", "0x1.5c0ec8p+0", "0x1.fc64d8p-1"]
    expected = np.array([float.fromhex(literal) for literal in literals], dtype=np.float32)
    drawn = rng.normals(42, Purpose.NOISE, torch.tensor([0]), (5,))[0].numpy()
    assert (np.abs(drawn - expected) <= np.spacing(np.abs(expected))).all()


def test_bytes_of_a_sample() -> None:
    moments = np.arange(16, dtype=np.float16).reshape(2, 8, 1, 1)
    header = b"{'descr': '<f2', 'fortran_order': False, 'shape': (2, 8, 1, 1), }".ljust(117) + b"\n"
    body = "0000003c0040004200440045004600470048804800498049004a804a004b804b"
    assert encode_sample(moments) == b"\x93NUMPY\x01\x00\x76\x00" + header + bytes.fromhex(body)


INDEX = """\
44495453 4944580a 01000000 02000000 ffb71b95 00000000
00060000 00000000 a0000000 07000000 03000000 befb3c26
000e0000 00000000 a0000000 00000000 05000000 e762919c
"""


def test_index_bytes_of_a_shard_of_two() -> None:
    moments = np.arange(16, dtype=np.float16).reshape(2, 8, 1, 1)
    rows = [
        IndexRow(key=3, path="a", label=7, moments=moments),
        IndexRow(key=5, path="b", label=0, moments=-moments),
    ]
    shard = build_shard("00000", rows, [], latent_channels=4)
    assert shard.index.hex(" ", 4) == " ".join(INDEX.split())
    assert shard.record.sha256 == "34007739fcfbd6a6e089fe541939f69a6e09abb48530d3c9239bc250af638166"


def test_checkpoint_names() -> None:
    assert CheckpointId(400_000, 3).name == "0000400000-0003"
    assert CheckpointId.parse("0000400000-0003") == CheckpointId(400_000, 3)


RANK_HEADER = """\
{"__metadata__":{"crc32c":"{\\"master/w@4\\":[2754783522]}"},
"master/w@4":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}
"""
RANK_FILE = (
    bytes.fromhex("8000000000000000")
    + RANK_HEADER.replace("\n", "").ljust(128).encode()
    + bytes.fromhex("0000c03f000000c0")
)
"""Length of the header, the header, then 1.5 and -2."""

FILE_RECORD = """\
{"key":"rank-00000.safetensors","bytes":144,"header_bytes":136,
"header_sha256":"d4febef18ccaa7150efca01514db4d9baf1f607fed02e06aabc43853d2bfda08"}
"""
CHECKPOINT, CHECKPOINT_ID = "checkpoints/0000000003-0001", CheckpointId(3, 1)
MANIFEST = (
    '{"format":"dit-scale checkpoint","version":2,"step":3,"samples":768,"attempt":1,"config":{},'
    '"data_sha256":"d","vae_sha256":"v","model_shapes":{"w":[6]},"optimizer_groups":[],'
    '"pending_metrics":[[0.5,0.25,0.125,1.0,0.0]],"guard":{"updates":2.0},"skipped_steps":[2],'
    '"excluded_positions":[[256,512]],"quarantined":{"7":"unreadable"},"ema_since":{"late":2},"versions":{},'
    f'"written_by":{{}},"files":[{FILE_RECORD}],'
    '"sha256":"85012ec4293d8abfe585a888401885ee04da17b17b127f16a4cecbed3c3f04f5"}'
).replace("\n", "")
MANIFEST_WITHOUT_EMA_SINCE = MANIFEST.replace('"ema_since":{"late":2},', "").replace(
    "85012ec4293d8abfe585a888401885ee04da17b17b127f16a4cecbed3c3f04f5",
    "cd26224596d5225f9083c2e21c68ced2d09904efe6abe097076c92b51f457bd8",
)
ATTEMPT = """\
{"attempt":2,"resumed_from":"checkpoints/0000000003-0001","excluded_positions":[[256,512]],
"nonce":"00000000000000000000000000000000",
"sha256":"8d0bd13ff353d5f9a23c8b33adee616fe530aff32d33a74463c22bb6d562d6cc"}
"""


@pytest.mark.parametrize(
    ("text", "ema_since"), [(MANIFEST, {"late": 2}), (MANIFEST_WITHOUT_EMA_SINCE, {})], ids=["now", "before"]
)
def test_a_checkpoint_of_version_2_can_be_read(tmp_path: Path, text: str, ema_since: dict[str, int]) -> None:
    root = open_storage(tmp_path)
    root.write(f"{CHECKPOINT}/rank-00000.safetensors", RANK_FILE)
    root.write(f"{CHECKPOINT}/MANIFEST.json", text.encode())
    root.write("attempts/0001.json", sealed({"attempt": 1, "resumed_from": None, "excluded_positions": []}))
    root.write("attempts/0002.json", ATTEMPT.replace("\n", "").encode())
    assert attempts.newest(root) == AttemptRecord(2, CHECKPOINT_ID, ((256, 512),))
    assert attempts.committed(root) == [CHECKPOINT_ID]
    checkpoint = Checkpoint(root, CHECKPOINT_ID)
    manifest = checkpoint.manifest
    assert (manifest.step, manifest.samples, manifest.guard) == (3, 768, {"updates": 2.0})
    assert (manifest.skipped_steps, manifest.quarantined) == ((2,), {7: "unreadable"})
    assert manifest.ema_since == ema_since
    assert checkpoint.read("master", "w", 4, 2).tolist() == [1.5, -2.0]


def test_bytes_of_a_checkpoint(tmp_path: Path) -> None:
    root, values = open_storage(tmp_path), np.array([1.5, -2.0], "<f4")
    slices = [("master", ParameterSlice("w", start=4, length=2, offset=0))]
    record = rankfile.write(root, f"{CHECKPOINT}/rank-00000.safetensors", values.view(np.uint8), slices)
    assert root.read(f"{CHECKPOINT}/rank-00000.safetensors") == RANK_FILE
    assert record == Manifest.model_validate_json(MANIFEST).files[0]
    write_manifest(root, Manifest.model_validate_json(MANIFEST))
    assert root.read(f"{CHECKPOINT}/MANIFEST.json") == MANIFEST.encode()


def test_checksums_are_of_blocks_of_4_mib() -> None:
    assert rankfile.BLOCK_BYTES == 4_194_304
