"""downsample: torch's antialiased bilinear interpolation, its derivative, and determinism."""

import pytest
import torch
from torch.nn.functional import interpolate

from trellis.renderers.downsample import downsample


@pytest.mark.parametrize("factor", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("pixels", [1, 2, 7, 16])
def test_is_torchs_antialiased_interpolation(factor: int, pixels: int) -> None:
    samples = torch.randn(2, factor * pixels, factor * pixels, 3, dtype=torch.float64, requires_grad=True)
    expected = interpolate(samples.permute(0, 3, 1, 2), (pixels, pixels), mode="bilinear", antialias=True)
    actual = downsample(samples, factor)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    gradient = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(out, samples, gradient)[0] for out in (actual, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_no_views_and_no_channels() -> None:
    assert downsample(torch.zeros(0, 8, 8, 3), 2).shape == (0, 3, 4, 4)
    assert downsample(torch.zeros(2, 8, 8, 0), 4).shape == (2, 0, 2, 2)


def test_the_same_bytes_for_any_number_of_threads() -> None:
    samples, threads, results = torch.randn(2, 256, 256, 5, requires_grad=True), torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        out = downsample(samples, 4)
        results.append((out.detach(), torch.autograd.grad(out.square().sum(), samples)[0]))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
