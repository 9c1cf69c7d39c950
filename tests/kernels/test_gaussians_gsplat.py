"""Beside gsplat's definition in torch (``pip install --no-deps gsplat==1.5.3``, Apache-2.0), where it is installed.

Projection, tiles and blending are gsplat's code; what it takes from CUDA (which Gaussians a pixel meets) and from
nerfacc (sums along rays) is written here. Where the conventions differ is in benchmarks/notes/gaussians.md.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.support.gaussians import Scene, assert_images_agree, random_scene
from trellis_kernels import rasterize_gaussians, spherical_harmonics
from trellis_kernels.gaussians import reference

gsplat = pytest.importorskip("gsplat.cuda._torch_impl")
KERNEL = 0.1
SIZE = 48, 33  # width and height
FAINTEST = 0.35  # below e^4.5 / 255 nothing is seen beyond 3 standard deviations, so lists of tiles do not matter


class Theirs(NamedTuple):
    radii: Tensor  # [G, 2]
    centers: Tensor
    depths: Tensor
    conics: Tensor
    fading: Tensor


def scene_of(count: int, opacity: float = FAINTEST, size: float = 0.04) -> Scene:
    scene = random_scene(count, size=size).to(torch.float64)
    return scene._replace(opacities=opacity * scene.opacities, quats=3 * scene.quats)  # both normalise


def projected(scene: Scene, width: int, height: int) -> Theirs:
    covariances, _ = gsplat._quat_scale_to_covar_preci(scene.quats, scene.scales, compute_preci=False)
    pixels = scene.intrinsics * torch.tensor([width, height, 1.0], dtype=torch.float64)[:, None]
    projection = gsplat._fully_fused_projection(
        scene.means,
        covariances,
        scene.extrinsics,
        pixels,
        width,
        height,
        eps2d=KERNEL,
        near_plane=reference.NEAREST,
        calc_compensations=True,
    )
    return Theirs(*(tensor[0] for tensor in projection))


def ours(scene: Scene, width: int, height: int) -> reference.Projected:
    cameras = scene.extrinsics[0], scene.intrinsics[0]
    return reference.project(*scene[:4], *cameras, width, height, KERNEL)


def rendered(scene: Scene, width: int, height: int, patch: pytest.MonkeyPatch) -> tuple[Tensor, Tensor]:
    """gsplat's colors ``[H, W, C]`` and alphas ``[H, W]``, every Gaussian tried at every pixel."""
    patch.setitem(sys.modules, "nerfacc", _nerfacc())
    splats = projected(scene, width, height)
    opacities = scene.opacities * splats.fading
    with torch.no_grad():
        order = splats.depths.masked_fill((splats.radii == 0).any(-1), torch.inf).sort(stable=True).indices
        order = order[: int((splats.radii > 0).all(-1).sum())]
        y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) + 0.5 for n in (height, width)), indexing="ij")
        offsets = torch.stack([x, y], -1).view(-1, 1, 2) - splats.centers[order]
        xx, xy, yy = splats.conics[order].unbind(-1)
        sigma = 0.5 * (xx * offsets[..., 0] ** 2 + yy * offsets[..., 1] ** 2) + xy * offsets.prod(-1)
        alphas = (opacities[order] * (-sigma).exp()).clamp_max(0.999)
        alphas[(sigma < 0) | (alphas < 1 / 255)] = 0
        met = (alphas > 0) & ((1 - alphas).cumprod(-1) > 1e-4)
        pixel, rank = met.nonzero().unbind(-1)
    colors, alpha = gsplat.accumulate(
        splats.centers[None],
        splats.conics[None],
        opacities[None],
        scene.colors[None],
        order[rank],
        pixel,
        torch.zeros_like(pixel),
        width,
        height,
    )
    return colors[0] + (1 - alpha[0]) * scene.background[0], alpha[0, ..., 0]


def _nerfacc() -> ModuleType:
    """The two functions that gsplat's `accumulate` takes from nerfacc: samples are sorted by ray, front to back."""

    def render_weight_from_alpha(alphas: Tensor, ray_indices: Tensor, n_rays: int) -> tuple[Tensor, Tensor]:
        counts = torch.bincount(ray_indices, minlength=n_rays)
        place = torch.arange(len(alphas)) - (counts.cumsum(0) - counts)[ray_indices]
        dense = alphas.new_zeros(n_rays, int(counts.max()) + 1).index_put((ray_indices, place + 1), alphas)
        before = (1 - dense).cumprod(-1)[ray_indices, place]
        return alphas * before, before

    def accumulate_along_rays(weights: Tensor, values: Tensor | None, ray_indices: Tensor, n_rays: int) -> Tensor:
        terms = weights[:, None] if values is None else weights[:, None] * values
        return terms.new_zeros(n_rays, terms.shape[1]).index_add(0, ray_indices, terms)

    module: Any = ModuleType("nerfacc")
    module.render_weight_from_alpha, module.accumulate_along_rays = render_weight_from_alpha, accumulate_along_rays
    return module


def test_centers_conics_depths_and_fading_agree() -> None:
    scene = scene_of(400)
    theirs, mine = projected(scene, *SIZE), ours(scene, *SIZE)
    assert len(mine.indices) > 350
    chosen = Theirs(*(tensor[mine.indices] for tensor in theirs))
    torch.testing.assert_close(mine.depths, chosen.depths, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        mine.centers + 0.5, chosen.centers, rtol=0, atol=1e-5
    )  # they divide by z, we by z + 1e-7
    torch.testing.assert_close(mine.conics, chosen.conics, rtol=1e-9, atol=1e-9)
    fading = mine.opacities / scene.opacities[mine.indices]
    wide = 1 / (mine.conics[:, 0] * mine.conics[:, 2] - mine.conics[:, 1] ** 2)  # the determinant with the filter
    official = chosen.fading.square() * wide / (wide + 1e-6) + 1e-6
    torch.testing.assert_close(fading.square(), official, rtol=1e-8, atol=1e-12)


def test_drawn_are_those_that_gsplat_draws_except_at_the_margin() -> None:
    """Their radii are per axis and 3.33 standard deviations, ours 3 of the longer axis, the same in both."""
    scene = scene_of(400)
    wide = scene._replace(intrinsics=scene.intrinsics * torch.tensor([4.0, 4, 1]))  # many are off the picture
    theirs, mine = projected(wide, *SIZE), ours(wide, *SIZE)
    assert ((theirs.radii[mine.indices] / 3.33 * 3).amax(-1) - mine.radii <= 1).all()
    seen = torch.zeros(400, dtype=torch.bool)
    seen[mine.indices] = True
    visible = (theirs.radii > 0).all(-1)
    assert 50 < int((seen & visible).sum()) < 350
    beyond = (theirs.centers - theirs.centers.clamp(torch.zeros(2), torch.tensor(SIZE))).abs()  # the picture's border
    sigma = torch.linalg.inv(_matrices(theirs.conics)).diagonal(dim1=-2, dim2=-1).sqrt()
    assert 20 < int((seen & ~visible).sum()) < 80  # in the square of the longer axis, or in a tile at the border
    assert (beyond >= 3.33 * sigma).any(-1)[seen & ~visible].all()
    assert 0 < int((visible & ~seen).sum()) < 20  # between 3 and 3.33 standard deviations outside
    assert (beyond >= 3 * sigma - 1.5).any(-1)[visible & ~seen].all()


def _matrices(conics: Tensor) -> Tensor:
    xx, xy, yy = conics.unbind(-1)
    return torch.stack([torch.stack([xx, xy], -1), torch.stack([xy, yy], -1)], -2)


def test_rectangles_of_tiles_agree_up_to_the_half_pixel() -> None:
    """With our radii in their code: their rounding is exact, ours begins and ends up to a pixel early."""
    scene = scene_of(120)
    width, height = 130, 90
    mine = ours(scene, width, height)
    across, down = -(-width // 16), -(-height // 16)
    radii = mine.radii[:, None].expand(-1, 2)
    counts, _, listed = gsplat._isect_tiles(
        mine.centers[None].float() + 0.5, radii[None].int(), mine.depths[None].float(), 16, across, down
    )
    low, high = (mine.centers + 0.5 + sign * radii for sign in (-1, 1))
    first = (low / 16).floor().clamp_min(0).long()
    past = (high / 16).ceil().long().minimum(torch.tensor([across, down]))
    assert torch.equal(counts[0].long(), (past - first).clamp_min(0).prod(-1))
    assert len(listed) == int(counts.sum())
    earlier, later = first - mine.tiles[:, :2], past - mine.tiles[:, 2:]
    assert ((earlier == 0) | ((earlier == 1) & (low % 16 < 0.5))).all()
    assert ((later == 0) | ((later == 1) & ((high % 16 < 1.5) & (high % 16 > 0)))).all()
    assert (earlier == 0).float().mean() > 0.9
    assert (later == 0).float().mean() > 0.8


def test_lists_of_tiles_are_in_the_same_order() -> None:
    scene = scene_of(60, size=0.1)
    mine = ours(scene, 64, 64)
    radii = mine.radii[:, None].expand(-1, 2)
    shuffled = torch.randperm(len(mine.indices))
    _, keys, listed = gsplat._isect_tiles(
        (mine.centers[shuffled] + 0.5)[None], radii[shuffled][None].int(), mine.depths[shuffled][None].float(), 16, 4, 4
    )
    ranks = shuffled[listed.long()]
    same = (keys[1:] >> 32) == (keys[:-1] >> 32)
    assert same.sum() > 100
    assert (ranks[1:] > ranks[:-1])[same].all()


@pytest.mark.parametrize("opacity", [FAINTEST, 0.98])
def test_images_agree(opacity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faint Gaussians: everywhere. Others end at 3 standard deviations with us: at most e^-4.5 of each, a tile away."""
    scene = scene_of(300, opacity)
    expected, alphas = rendered(scene, *SIZE, monkeypatch)
    result = rasterize_gaussians(*scene.arguments(*SIZE, KERNEL))  # type: ignore[arg-type]
    assert (alphas > 0.2).float().mean() > 0.1
    difference = (result.colors[0] - expected).abs()
    assert difference.max() < 0.02
    if opacity == FAINTEST:
        assert_images_agree(result.colors[0], expected)
        assert_images_agree(result.alphas[0], alphas)
    else:
        assert (difference > 1e-4).double().mean() < 0.05


def test_opaque_gaussians_stop_at_099_with_us_and_at_0999_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = scene_of(1)._replace(opacities=torch.ones(1, dtype=torch.float64))
    scene = scene._replace(means=torch.zeros(1, 3).double(), scales=torch.full((1, 3), 3.0).double())
    _, alphas = rendered(scene, 33, 33, monkeypatch)
    result = rasterize_gaussians(*scene.arguments(33, 33, KERNEL))  # type: ignore[arg-type]
    assert alphas.max() == pytest.approx(0.999, abs=1e-6)
    assert result.alphas.max() == pytest.approx(0.99, abs=1e-6)


def test_gradients_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours, of the kernel, beside autograd through gsplat."""
    scene = scene_of(60)
    weights = torch.rand(SIZE[1], SIZE[0], 3, dtype=torch.float64) - 0.5
    names = ("means", "quats", "scales", "opacities", "colors", "extrinsics", "background")

    def gradients(draw: Any) -> tuple[Tensor, ...]:
        leaves = scene._replace(**{name: getattr(scene, name).clone().requires_grad_() for name in names})
        colors, alphas = draw(leaves)
        loss = (colors * weights).sum() + (alphas * weights[..., 0]).sum()
        return torch.autograd.grad(loss, [getattr(leaves, name) for name in names])

    def mine(leaves: Scene) -> tuple[Tensor, Tensor]:
        result = rasterize_gaussians(*leaves.arguments(*SIZE, KERNEL))  # type: ignore[arg-type]
        return result.colors[0], result.alphas[0]

    expected = gradients(lambda leaves: rendered(leaves, *SIZE, monkeypatch))
    for name, one, other in zip(names, gradients(mine), expected, strict=True):
        if name == "extrinsics":
            one, other = one[:, :3], other[:, :3]
        scale = float(other.abs().max())
        assert float((one - other).abs().max()) < 1e-4 * scale, name


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_spherical_harmonics_agree(degree: int) -> None:
    """gsplat neither adds one half nor clamps: its users do."""
    coefficients, directions = torch.randn(50, (degree + 1) ** 2, 3).double(), torch.randn(50, 3).double()
    expected = (gsplat._spherical_harmonics(degree, directions, coefficients) + 0.5).clamp_min(0)
    torch.testing.assert_close(spherical_harmonics(coefficients, directions), expected, rtol=0, atol=1e-12)
