"""Which files Inception's weights may come from."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn

from dit_scale.errors import WeightsError
from dit_scale.evaluate.networks import inception, load_network
from dit_scale.evaluate.networks.inception import WEIGHTS_SHA256
from dit_scale.evaluate.networks.inception_layers import InceptionV3


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the published layout with other weights."""
    path = tmp_path_factory.mktemp("inception") / "zeros.pth"
    with torch.device("meta"):
        names = InceptionV3().state_dict()
    torch.save({name: torch.zeros(x.shape) for name, x in names.items()}, path)
    return path


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_other_weights_are_refused_by_digest(file: Path) -> None:
    with pytest.raises(WeightsError) as caught:
        load_network(f"inception:{file}")
    message = str(caught.value)
    assert _sha256(file) in message
    assert WEIGHTS_SHA256 in message
    assert "pt_inception-2015-12-05-6726825d.pth" in message
    assert f"inception-unverified:{file}" in message


def test_a_truncated_download_is_refused_by_digest_and_size(file: Path, tmp_path: Path) -> None:
    short = tmp_path / "pt_inception-2015-12-05-6726825d.pth"
    short.write_bytes(file.read_bytes()[:10_000])
    with pytest.raises(WeightsError, match=r"\(10,000 bytes\), expected 6726825d.*\(95,628,359 bytes\)"):
        load_network(f"inception:{short}")
    with pytest.raises(WeightsError, match="damaged"):
        load_network(f"inception-unverified:{short}")


def test_the_published_digest_is_accepted(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "WEIGHTS_SHA256", _sha256(file))
    identity = load_network(f"inception:{file}").identity
    assert identity.name == "inception-2015-12-05"
    assert identity.weights_sha256 == _sha256(file)


def test_the_digest_of_the_file_is_in_its_published_name() -> None:
    assert WEIGHTS_SHA256[:8] == "6726825d"
    assert len(WEIGHTS_SHA256) == 64


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["inception", "inception-unverified"])
def test_a_torchscript_program_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    with pytest.raises(WeightsError, match=r"TorchScript program.*pt_inception-2015-12-05-6726825d\.pth"):
        load_network(f"{kind}:{path}")


def test_torchvisions_inception_is_refused(file: Path, tmp_path: Path) -> None:
    state = torch.load(file, weights_only=True)
    state["fc.weight"] = torch.zeros(1000, 2048)
    state["AuxLogits.conv0.conv.weight"] = torch.zeros(128, 768, 1, 1)
    path = tmp_path / "inception_v3_google.pth"
    torch.save(state, path)
    with pytest.raises(WeightsError) as caught:
        load_network(f"inception-unverified:{path}")
    message = str(caught.value)
    assert "2 tensors differ" in message
    assert "AuxLogits.conv0.conv.weight (got (128, 768, 1, 1), expected nothing)" in message
    assert "fc.weight (got (1000, 2048), expected (1008, 2048))" in message
    assert "torchvision" in message


def test_counters_of_batches_are_ignored(file: Path, tmp_path: Path) -> None:
    state = torch.load(file, weights_only=True)
    state["Conv2d_1a_3x3.bn.num_batches_tracked"] = torch.tensor(0)
    torch.save(state, tmp_path / "counted.pth")
    load_network(f"inception-unverified:{tmp_path / 'counted.pth'}")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"cannot read .*missing\.pth \(No such file"):
        load_network(f"inception:{tmp_path / 'missing.pth'}")
    with pytest.raises(WeightsError, match="Is a directory"):
        load_network(f"inception:{tmp_path}")
