from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from flashi2v_kernels.fourier_highpass import reference
from flashi2v_kernels.fourier_highpass.cutoff import prefix_sums, squared_cutoff, squared_radius_map
from flashi2v_kernels.registry import load_entry_point, specs_of

SPECS = [spec for spec in specs_of("fourier_highpass") if "cpu" in spec.devices]
IMPLEMENTATIONS = {spec.name: load_entry_point(spec) for spec in SPECS}
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 5), (3, 4, 7, 9), (2, 2, 8, 12), (1, 16, 17, 23), (2, 4, 30, 52)]


def draw(shape, dtype=torch.float32, seed=0):
    """Images with a falling spectrum, as latents have."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    noise = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (noise.cumsum(-1).cumsum(-2) / math.prod(shape[-2:]) ** 0.5 + 0.2 * noise).to(dtype)


def ratios(batch):
    return torch.tensor([0.07, 0.43, 0.91])[:batch]


def brute_force(image_HW, ratio):
    """The definition as double sums over complex exponentials, for one channel."""
    height, width = image_HW.shape
    bins = {}
    for v in range(-(height // 2), height - height // 2):
        for u in range(-(width // 2), width - width // 2):
            waves = ((y, x, cmath.exp(-2j * math.pi * (v * y / height + u * x / width)))
                     for y in range(height) for x in range(width))
            bins[v, u] = sum(float(image_HW[y, x]) * wave for y, x, wave in waves)
    held, total, cutoff = 0.0, sum(abs(value) for value in bins.values()), None
    for ring in sorted({v * v + u * u for v, u in bins}):
        held += sum(abs(value) for (v, u), value in bins.items() if v * v + u * u == ring)
        if held >= ratio * total:
            cutoff = ring
            break
    kept = {(v, u): value for (v, u), value in bins.items() if v * v + u * u >= cutoff}
    output = torch.zeros(height, width, dtype=torch.float64)
    for y in range(height):
        for x in range(width):
            waves = (value * cmath.exp(2j * math.pi * (v * y / height + u * x / width))
                     for (v, u), value in kept.items())
            output[y, x] = sum(waves, 0j).real / (height * width)
    return output


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 3)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 1.0])
def test_reference_is_the_definition(height, width, ratio):
    image = draw((1, 1, height, width), torch.float64)
    output = reference.fourier_highpass(image, torch.tensor([ratio]), return_abs=False)
    torch.testing.assert_close(output[0, 0], brute_force(image[0, 0], ratio), rtol=0, atol=1e-10)


@pytest.mark.parametrize("return_abs", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_high_and_low_pass(name, shape, dtype, return_abs, assert_near):
    images, ratio_B = draw(shape, dtype), ratios(shape[0])
    options = {"return_abs": return_abs, "return_low": True}
    actual = IMPLEMENTATIONS[name](images, ratio_B, **options)
    expected = reference.fourier_highpass(images.double(), ratio_B, **options)
    for ours, wanted in zip(actual, expected, strict=True):
        assert ours.dtype == dtype and not ours.requires_grad
        assert_near(ours, wanted, images.abs().max())  # a pass may be all but empty


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_passes_add_up_to_the_image(name):
    images = draw((3, 2, 8, 9))
    high, low = IMPLEMENTATIONS[name](images, ratios(3), return_abs=False, return_low=True)
    torch.testing.assert_close(high + low, images, rtol=0, atol=1e-5)
    assert high.square().mean() > 1e-4 and low.square().mean() > 1e-4


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_edges(name):
    function, images = IMPLEMENTATIONS[name], draw((2, 3, 7, 10))
    images -= images.mean(dim=(-2, -1), keepdim=True)
    everything = function(images, torch.zeros(2))
    torch.testing.assert_close(everything, images.abs(), rtol=0, atol=2e-6)
    assert torch.equal(function(images, torch.full((2,), -0.5)), everything)
    assert torch.equal(function(images, torch.full((2,), 1.5)), function(images, torch.ones(2)))
    # ratio 1 leaves the outermost ring: of 7x10 bins around (3, 5) those at (+-3, -5)
    last = function(images, torch.ones(2), return_abs=False)
    spectrum = torch.fft.fftshift(torch.fft.fft2(last), dim=(-2, -1)).abs()
    assert set(map(tuple, (spectrum > 1e-3).nonzero()[:, 2:].tolist())) == {(0, 0), (6, 0)}
    zeros = function(torch.zeros(2, 3, 7, 10), torch.full((2,), 0.1))
    torch.testing.assert_close(zeros, torch.full_like(zeros, 1e-6), rtol=1e-3, atol=0)
    constant = torch.full((1, 3, 7, 10), -2.5)  # the zero frequency alone holds the share: all passes
    torch.testing.assert_close(function(constant, torch.tensor([0.4])), -constant, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_samples_do_not_see_each_other(name):
    images, function = draw((3, 2, 8, 12)), IMPLEMENTATIONS[name]
    together = function(images, ratios(3))
    for sample in range(3):
        alone = function(images[sample : sample + 1], ratios(3)[sample : sample + 1])
        torch.testing.assert_close(together[sample : sample + 1], alone, rtol=0, atol=1e-6)
    assert not torch.allclose(together, function(images, ratios(3).flip(0)))


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "reference"])
def test_values_are_never_waited_for(name):
    """A fake tensor has no values: asking for one, which would wait for the device, raises."""
    with FakeTensorMode():
        output = IMPLEMENTATIONS[name](torch.randn(2, 3, 8, 12), torch.rand(2))
    assert output.shape == (2, 3, 8, 12)


def test_matmul_dft_has_no_complex_tensor(monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a complex transform was called")

    for function in ("fft2", "ifft2", "fftshift", "ifftshift", "rfft2", "irfft2"):
        monkeypatch.setattr(torch.fft, function, forbidden)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # nor may autocast round its products
        images = draw((1, 2, 8, 12))
        output = IMPLEMENTATIONS["matmul_dft"](images, torch.zeros(1))
    torch.testing.assert_close(output, images.abs(), rtol=0, atol=2e-6)


def test_cutoff_is_the_first_ring_that_reaches_the_share():
    radius = squared_radius_map(3, 5)
    assert radius.tolist() == [[5, 2, 1, 2, 5], [4, 1, 0, 1, 4], [5, 2, 1, 2, 5]]
    magnitude = torch.ones(5, 3, 5)  # rings 0, 1, 2, 4, 5 hold 1, 4, 4, 2, 4 of 15
    shares = torch.tensor([1.0, 5.0, 9.0, 11.0, 15.0]) / 15
    assert squared_cutoff(magnitude, radius, shares - 1e-4).tolist() == [0, 1, 2, 4, 5]
    assert squared_cutoff(magnitude, radius, shares + 1e-4).tolist() == [1, 2, 4, 5, 5]
    magnitude[:, 0, 0] = 2.0  # 16 in all: sixteenths are exact, and a ring that just reaches one is it
    sixteenths = torch.tensor([1.0, 5.0, 9.0, 11.0, 16.0]) / 16
    assert squared_cutoff(magnitude, radius, sixteenths).tolist() == [0, 1, 2, 4, 5]
    assert squared_cutoff(magnitude[:3], radius, torch.tensor([-1.0, 0.0, 2.0])).tolist() == [0, 0, 5]


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_wrong_shapes_are_refused(name):
    with pytest.raises(ValueError, match="one ratio each"):
        IMPLEMENTATIONS[name](draw((2, 3, 4, 5)), torch.rand(3))
    with pytest.raises(ValueError, match=r"\[B, C, H, W\]"):
        IMPLEMENTATIONS[name](draw((1, 2, 3, 4, 5)), torch.rand(1))


class Operators(TorchDispatchMode):
    """Names of the operators that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "reference"])
def test_no_operator_without_a_deterministic_implementation(name):
    """These are refused on CUDA under torch.use_deterministic_algorithms(True)."""
    images = draw((2, 3, 8, 12))
    with Operators() as called:
        IMPLEMENTATIONS[name](images, ratios(2), return_low=True)
    assert called.names
    assert not called.names & {"cumsum", "scatter_add", "scatter_add_", "index_add", "histc", "bincount", "put_"}


@pytest.mark.parametrize("numbers", [1, 2, 3, 64, 6240])
def test_prefix_sums(numbers):
    values = draw((3, numbers, 1, 1), torch.float64).flatten(1).square()
    torch.testing.assert_close(prefix_sums(values), values.cumsum(dim=1))
    single = prefix_sums(values.float()).double()
    assert ((single - values.float().double().cumsum(dim=1)).abs() <= 1e-6 * single).all()
