"""JSON with a digest of itself: its bytes, what is refused, and files of earlier versions."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_scale.data.listing import pack, unpack
from dit_scale.elastic.board import Board
from dit_scale.errors import CheckpointError, DataError, StorageError
from dit_scale.sealed import sealed, unseal, unseal_any
from dit_scale.storage import open_storage
from tests.support.nodes.members import member_of

VALUES = st.integers() | st.text() | st.lists(st.integers())
TREES = st.dictionaries(st.text(max_size=3), VALUES, min_size=1, max_size=4)


def test_the_digest_is_of_all_bytes_before_its_comma() -> None:
    data = sealed({"step": 3})
    assert data == b'{"step":3,"sha256":"' + hashlib.sha256(b'{"step":3').hexdigest().encode() + b'"}'
    for indent in (None, 1):
        data = sealed({"step": 3, "names": ["a"]}, indent)
        assert hashlib.sha256(data[:-77]).hexdigest() == data[-66:-2].decode(), "as the documentation has it"
        assert json.loads(data)["step"] == 3


@given(TREES, st.sampled_from([None, 1]), st.sampled_from(["sha256", "record_sha256"]), st.data())
def test_sealed_objects_round_trip_or_are_refused(
    tree: dict[str, object], indent: int | None, key: str, data: st.DataObject
) -> None:
    whole = sealed(tree, indent, key)
    assert unseal(whole, "here", DataError, key) == tree
    assert unseal_any(whole, "here", DataError, key) == (tree, True)
    at, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    flipped = whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]
    for broken in (flipped, whole[:at]):
        for read in (unseal, unseal_any):
            with pytest.raises(DataError, match="here"):
                read(broken, "here", DataError, key)


@given(TREES)
def test_unsealed_objects_are_read_by_unseal_any(tree: dict[str, object]) -> None:
    for data in (json.dumps(tree).encode(), json.dumps(tree, indent=1).encode() + b"\n"):
        assert unseal_any(data, "here", DataError) == (tree, False)
        with pytest.raises(CheckpointError, match=r"here is damaged \(its SHA-256 is wrong\)"):
            unseal(data, "here", CheckpointError)


def test_a_sealed_file_that_was_edited_is_refused() -> None:
    """Even if an editor has reformatted it."""
    tree = json.loads(sealed({"scale": 1.0})) | {"scale": 2.0}
    for text in (
        json.dumps(tree),
        json.dumps(tree, indent=4) + "\n",
        json.dumps(tree, separators=(",", ":")),
    ):
        with pytest.raises(DataError, match="damaged"):
            unseal_any(text.encode(), "here", DataError)


@pytest.mark.parametrize("data", [b"", b"{", b"[1]", b"\xff"])
def test_other_json_is_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="here"):
        unseal_any(data, "here", DataError)


def test_the_bytes_of_a_listing() -> None:
    """The digest of the arrays, recomputed as docs/formats.md describes it."""
    arrays = {"b": np.array([1, 2, 3, 4], np.int64), "a": np.array([5], np.uint8)}
    data = pack({"kind": "x"}, arrays)
    digest = hashlib.sha256(b"a\0|u1\0(1,)\0" + b"\5" + b"b\0<i8\0(4,)\0" + arrays["b"].tobytes()).hexdigest()
    assert f'"arrays_sha256":"{digest}","facts_sha256":"'.encode() in data
    facts, found = unpack(data, "here")
    assert facts == {"kind": "x"}
    assert {name: array.tolist() for name, array in found.items()} == {"a": [5], "b": [1, 2, 3, 4]}


def test_board_objects_are_sealed(tmp_path: Path) -> None:
    board = Board(open_storage(tmp_path))
    member = member_of("node0")
    board.join(1, member)
    assert board.members(1, 0, ["node0", "node1"]) == [member, None]
    path = tmp_path / "elastic/join/000001/0/node0.json"
    path.write_bytes(path.read_bytes().replace(b'"slots":1', b'"slots":3'))
    with pytest.raises(StorageError, match=r"node0\.json is damaged"):
        board.members(1, 0, ["node0"])
