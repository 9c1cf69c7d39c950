import math

import pytest
import torch

from tests.support.golden import golden
from trellis.renderers.camera import Cameras
from trellis.renderers.canvas import VolumeImages
from trellis.renderers.gaussians import render_gaussians
from trellis.representations.gaussians import GaussianConfig, Gaussians


def ball(center: tuple[float, float, float], color: tuple[float, float, float], scale: float = 0.05) -> Gaussians:
    """One opaque round Gaussian."""
    dc = (torch.tensor(color) - 0.5) / 0.28209479177387814
    return Gaussians(
        torch.tensor([center]) + 0.5,
        dc.view(1, 1, 3),
        torch.zeros(1, 3),
        torch.zeros(1, 4),
        torch.full((1, 1), 20.0),
        GaussianConfig(scaling_bias=scale),
    )


def test_passes_the_oracle() -> None:
    """The golden scene through the raw parametrisation, with its activations undone."""
    item = golden("render_gaussian_oracle")
    config = GaussianConfig(filter_kernel_size_3d=0.0, scaling_activation="exp")
    gaussians = Gaussians(
        item["in.xyz"] + 0.5,
        item["in.features_dc"][:, None],
        item["in.scale"].log() - config.raw_scaling_bias,
        item["in.quat_wxyz"] - torch.tensor([1.0, 0, 0, 0]),
        item["in.opacity"].logit() - config.raw_opacity_bias,
        config,
    )
    cameras = Cameras(item["in.extrinsics"][None], item["in.intrinsics"][None])
    images = render_gaussians(gaussians, cameras, resolution=64, background=item["in.bg"])
    assert isinstance(images, VolumeImages)
    different = ((images.colors[0] - item["out.color"]).abs() > 1e-4).sum()
    assert different <= max(2, item["out.color"].numel() // 1000)


def test_up_is_up_and_right_is_right() -> None:
    """From +y the x axis points to the left of the picture."""
    camera = Cameras.orbit(0.0, 0.0)
    high = render_gaussians(ball((0, 0, 0.3), (1, 0, 0)), camera, 64).alphas[0]
    assert high[:32].sum() > 10 * high[32:].sum()
    side = render_gaussians(ball((0.3, 0, 0), (1, 0, 0)), camera, 64).alphas[0]
    assert side[:, :32].sum() > 10 * side[:, 32:].sum()


def test_depth_over_alpha_is_the_distance() -> None:
    images = render_gaussians(ball((0, 0, 0), (1, 1, 1)), Cameras.orbit(0.7, 0.3), 33)
    middle = images.depths[0, 16, 16] / images.alphas[0, 16, 16]
    torch.testing.assert_close(middle, torch.tensor(2.0), rtol=1e-3, atol=1e-3)


def test_supersampling_averages() -> None:
    scene, camera = ball((0.1, 0, 0), (1, 0.5, 0)), Cameras.orbit([0.0, 1.0], 0.0)
    once, four = (render_gaussians(scene, camera, 32, (0.2, 0.2, 0.2), ssaa) for ssaa in (1, 4))
    assert four.colors.shape == once.colors.shape == (2, 3, 32, 32)
    torch.testing.assert_close(four.alphas.mean(), once.alphas.mean(), rtol=0.02, atol=0)


def test_background_and_other_colors() -> None:
    scene = ball((0, 0, 0), (1, 0, 0))
    background = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    images = render_gaussians(
        scene, Cameras.orbit([0.0, 1.0], 0.0), 33, background, colors=torch.tensor([[0.0, 1.0, 1.0]])
    )
    torch.testing.assert_close(images.colors[:, :, 0, 0], background)
    assert (images.colors[:, 1:, 16, 16] > 0.9).all()


def test_features_of_any_width_and_colors_per_camera() -> None:
    scene, cameras = ball((0, 0, 0), (1, 0, 0), 0.2), Cameras.orbit([0.0, 1.0, 2.0], 0.0)
    features = torch.arange(5.0)[None]
    images = render_gaussians(scene, cameras, 9, background=2.0, colors=features)
    assert images.colors.shape == (3, 5, 9, 9)
    alphas = images.alphas[:, None]
    torch.testing.assert_close(images.colors, alphas * features[0, :, None, None] + (1 - alphas) * 2)
    per_camera = torch.eye(3)[:, None]
    images = render_gaussians(scene, cameras, 200, ssaa=8, colors=per_camera)  # one camera at a time
    torch.testing.assert_close(images.colors[:, :, 100, 100], torch.eye(3), rtol=0, atol=0.02)


def test_median_depth_is_the_distance() -> None:
    images = render_gaussians(ball((0, 0, 0), (1, 1, 1)), Cameras.orbit(0.7, 0.3), 33)
    torch.testing.assert_close(images.median_depths[0, 16, 16], torch.tensor(2.0), rtol=1e-3, atol=1e-3)
    assert images.median_depths[0, 0, 0] == 0


def test_gradients_reach_the_parameters() -> None:
    scene = ball((0.05, 0, 0), (1, 0.5, 0))
    scene.opacity.fill_(1.0)
    names = ("xyz", "features_dc", "scaling", "rotation", "opacity")
    for name in names:
        getattr(scene, name).requires_grad_()
    images = render_gaussians(scene, Cameras.orbit([0.0, 1.0], 0.2), 16, ssaa=2)
    gradients = torch.autograd.grad(
        images.colors.square().sum() + images.depths.sum(), [getattr(scene, name) for name in names]
    )
    for name, gradient in zip(names, gradients, strict=True):
        assert gradient.isfinite().all()
        assert name == "rotation" or gradient.abs().sum() > 0


def test_double_precision_stays() -> None:
    images = render_gaussians(ball((0, 0, 0), (1, 0, 0)).to(torch.float64), Cameras.orbit(0.0, 0.0), 16)
    assert images.colors.dtype == torch.float64


def test_field_of_view_scales_the_picture() -> None:
    areas = [
        render_gaussians(ball((0, 0, 0), (1, 0, 0)), Cameras.orbit(0.0, 0.0, fov=math.radians(fov)), 64).alphas.sum()
        for fov in (20, 40)
    ]
    ratio = (math.tan(math.radians(20)) / math.tan(math.radians(10))) ** 2
    torch.testing.assert_close(areas[0] / areas[1], torch.tensor(ratio), rtol=0.05, atol=0)


def test_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="resolution and ssaa must be at least 1; got 0 and 1"):
        render_gaussians(ball((0, 0, 0), (1, 0, 0)), Cameras.orbit(0.0, 0.0), 0)
