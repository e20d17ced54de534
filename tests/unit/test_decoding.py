"""Decoding in slices: bounded memory, the same bits, and options that are part of the protocol."""

import pytest
import torch

from dit_scale import vae
from tests.support.live_bytes import LiveBytes


@pytest.fixture(scope="module")
def decoder(tiny_vae: str) -> vae.Vae:
    return vae.load(tiny_vae)


def latents(num: int, size: int = 32) -> torch.Tensor:
    return torch.randn(num, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(0))


def passes_of(decoder: vae.Vae, z_BChw: torch.Tensor) -> list[tuple[int, ...]]:
    """Decode, and return the shape of the latents in each pass of the decoder."""
    seen: list[tuple[int, ...]] = []
    handle = decoder._model.decoder.register_forward_pre_hook(
        lambda _, args: seen.append(tuple(args[0].shape))
    )
    assert len(decoder.decode(z_BChw)) == len(z_BChw)
    handle.remove()
    return seen


@pytest.mark.parametrize(
    ("size", "num", "passes"),
    [(256, 32, [16, 16]), (512, 32, [4] * 8), (512, 5, [3, 2]), (32, 100, [100]), (1024, 4, [2, 2])],
)
def test_the_resolution_determines_the_slices(tiny_vae: str, size: int, num: int, passes: list[int]) -> None:
    decoder = vae.load(tiny_vae, "meta")
    side = size // 8
    found = passes_of(decoder, torch.empty(num, 4, side, side, device="meta"))
    assert found == [(count, 4, side, side) for count in passes]


@pytest.mark.parametrize("size", [256, 512, 768, 1024, 2048])
def test_no_slice_is_one_image_or_larger_than_the_limit(size: int) -> None:
    limit = vae.images_per_pass(size, size)
    for num in range(2, 100):
        slices = torch.empty(num, device="meta").tensor_split(-(-num // limit))
        assert all(2 <= len(one) <= limit for one in slices)


def test_slices_change_no_bit(decoder: vae.Vae, monkeypatch: pytest.MonkeyPatch) -> None:
    z_BChw = latents(7)
    whole = decoder.decode(z_BChw)
    monkeypatch.setattr(vae, "PIXELS_PER_PASS", 3 * 32 * 32)
    assert [shape[0] for shape in passes_of(decoder, z_BChw)] == [3, 2, 2]
    assert len(whole.unique()) > 10
    assert torch.equal(decoder.decode(z_BChw), whole)


def test_memory_is_that_of_one_slice(tiny_vae: str) -> None:
    """Live bytes of 32 images of 512 pixels, counted on the meta device: 4 images, and all finished ones."""
    decoder = vae.load(tiny_vae, "meta")

    def peak_of(num: int) -> int:
        z_BChw = torch.empty(num, 4, 64, 64, device="meta")
        with LiveBytes() as live:
            pixels_BHW3 = decoder.decode(z_BChw)
        assert pixels_BHW3.shape == (num, 512, 512, 3)
        return live.peak

    image_bytes = 512 * 512 * 3
    assert peak_of(32) <= peak_of(4) + 2 * 32 * image_bytes  # finished images, and their concatenation
    one_pass = peak_of(3)
    assert one_pass > 50 * image_bytes


def test_options_change_pixels_little(tiny_vae: str, decoder: vae.Vae) -> None:
    plain = decoder.decode(latents(4)).int()
    for dtype, channels_last, largest in ((torch.bfloat16, True, 8), (torch.float32, True, 1)):
        other = vae.load(tiny_vae, "cpu", dtype, channels_last)
        (layout,) = {
            weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions(other)
        }
        assert layout
        difference = (other.decode(latents(4)).int() - plain).abs()
        assert int(difference.max()) <= largest, f"{dtype}: largest difference {int(difference.max())}"
        if dtype == torch.bfloat16:
            assert int(difference.max()) > 0


def convolutions(decoder: vae.Vae) -> list[torch.Tensor]:
    return [weight for weight in decoder._model.decoder.parameters() if weight.dim() == 4]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_a_compiled_encoder_never_chooses_by_time(tiny_vae: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler is asked for; it then runs the graph without generating code, which takes seconds."""
    import torch._inductor.compile_fx as compiler

    asked: list[dict[str, object]] = []

    def compile_fx(graph, inputs, config_patches, **_):  # type: ignore[no-untyped-def]
        with torch._inductor.config.patch(config_patches):
            config = torch._inductor.config
            asked.append({name: getattr(config, name) for name in ("deterministic", "max_autotune")})
        return graph.forward

    monkeypatch.setattr(compiler, "compile_fx", compile_fx)
    encoder = vae.load(tiny_vae, compile=True)
    images_B3HW = torch.zeros(2, 3, 32, 32)
    assert torch.equal(encoder.encode(images_B3HW), vae.load(tiny_vae).encode(images_B3HW))
    assert asked == [{"deterministic": True, "max_autotune": False}]
