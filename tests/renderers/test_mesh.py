import math

import pytest
import torch
from torch import Tensor

from tests.support.solids import box, torus
from trellis.renderers.camera import Cameras
from trellis.renderers.mesh import MeshImages, render_mesh
from trellis.representations.mesh import Mesh
from trellis.representations.texture import Texture

FRONT = Cameras.orbit(0.0, 0.0)  # at (0, 2, 0), x to the left


def square(side: float = 1.0) -> Mesh:
    """In the plane y = 0, seen head on from `FRONT`, its picture upright: u grows to the right, v down."""
    corners = torch.tensor([[0.5, 0, 0.5], [-0.5, 0, 0.5], [-0.5, 0, -0.5], [0.5, 0, -0.5]]) * side
    return Mesh(corners, torch.tensor([[0, 3, 2], [0, 2, 1]]), colors=torch.eye(4, 3), normals=corners + 0.5)


UV = torch.tensor([[0.0, 0], [1, 0], [1, 1], [0, 1]])


def rendered(mesh: Mesh, cameras: Cameras = FRONT, resolution: int = 32, **options: object) -> dict[str, Tensor]:
    images = render_mesh(mesh, cameras, resolution, **options)  # type: ignore[arg-type]
    return {name: image for name, image in images._asdict().items() if image is not None}


def test_head_on_square_is_what_geometry_says() -> None:
    images = rendered(square(0.6))
    side = 0.6 * 32 * 0.5 / math.tan(math.radians(20)) / 2  # pixels
    torch.testing.assert_close(images["mask"].sum(), torch.tensor(side**2), rtol=0.002, atol=0)
    torch.testing.assert_close(images["depths"][0, 16, 16], torch.tensor(2.0))
    assert images["depths"][0, 0, 0] == 0
    torch.testing.assert_close(images["normals"][0, :, 16, 16], torch.tensor([0.5, 1.0, 0.5]))
    torch.testing.assert_close(images["normals"][0, :, 0, 0], torch.tensor([0.5, 0.5, 0.5]))
    torch.testing.assert_close(
        images["normal_maps"][0, :, 16, 16], torch.tensor([0.477, 0.5, 0.477]), rtol=0, atol=0.002
    )


def test_views_are_those_of_the_cameras() -> None:
    """Depth of the nearest face of a box from each side; shapes of a batch."""
    cameras = Cameras.orbit([0.0, math.pi / 2, math.pi], 0.0)
    images = rendered(box((0.2, 0.6, 0.4)), cameras, 17, ssaa=3)
    torch.testing.assert_close(images["depths"][:, 8, 8], torch.tensor([1.7, 1.9, 1.7]))
    faces = torch.tensor([[0.5, 1, 0.5], [1, 0.5, 0.5], [0.5, 0, 0.5]])
    torch.testing.assert_close(images["normals"][:, :, 8, 8], faces)
    assert images["colors"].shape == images["normals"].shape == (3, 3, 17, 17)
    assert images["mask"].shape == (3, 17, 17)


def test_one_camera_at_a_time_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from trellis.renderers import canvas

    mesh, cameras = torus(), Cameras.orbit([0.0, 1.0, 2.0], 0.4)
    background = torch.rand(3, 3)
    together = rendered(mesh, cameras, 16, background=background)
    monkeypatch.setattr(canvas, "_AT_ONCE", 1)
    for name, image in rendered(mesh, cameras, 16, background=background).items():
        assert torch.equal(image, together[name]), name


def test_texture_with_the_colors_of_the_corners_is_the_same_picture() -> None:
    """A picture that is linear in u and v equals colors interpolated from the corners, but for its border texels."""
    u, v = torch.meshgrid((torch.arange(64) + 0.5) / 64, (torch.arange(64) + 0.5) / 64, indexing="xy")
    texture = Texture(torch.stack([u, v, 0.5 * u], -1), UV, wrap="clamp")
    mesh = Mesh(square().vertices, square().faces, colors=torch.cat([UV, 0.5 * UV[:, :1]], 1))
    cameras = Cameras.orbit([0.0, 0.5], 0.3)
    drawn = render_mesh(mesh, cameras, 64, texture=texture).colors
    expected = render_mesh(mesh, cameras, 64).colors
    assert drawn is not None
    torch.testing.assert_close(drawn, expected, rtol=0, atol=0.02)
    seamed = Texture(texture.image, UV[torch.tensor([0, 3, 2, 0, 2, 1])], torch.arange(6).view(2, 3), "clamp")
    torch.testing.assert_close(render_mesh(mesh, cameras, 64, texture=seamed).colors, drawn)


def test_channels_of_a_texture_are_free() -> None:
    texture = Texture(torch.rand(4, 4, 7), UV)
    colors = render_mesh(square(), FRONT, 16, background=0.25, texture=texture).colors
    assert colors is not None
    assert colors.shape == (1, 7, 16, 16)
    background = render_mesh(square(0.1), FRONT, 16, background=torch.rand(7), texture=texture).colors
    assert background is not None
    assert len(background[0, :, 0, 0].unique()) == 7


def test_near_and_far_cut() -> None:
    """Near ends where clip space does, at near far / (2 far - near); far where it says."""
    for distance, near, far, seen in [
        (2, 1, 100, 1),
        (2, 4.1, 100, 0),
        (2, 3.9, 100, 1),
        (2, 1, 1.9, 0),
        (2, 1, 2.1, 1),
    ]:
        camera = Cameras.look_at((0.0, float(distance), 0.0))
        images = rendered(square(), camera, 8, ssaa=1, near=near, far=far, returns=["mask"])
        assert images["mask"][0, 4, 4] == seen, (near, far)


def test_camera_inside_sees_the_inside() -> None:
    images = rendered(box(), Cameras.look_at((0.0, 0.0, 0.0), (0.0, 1.0, 0.0)), 8, near=0.1)
    torch.testing.assert_close(images["mask"], torch.ones(1, 8, 8))
    torch.testing.assert_close(images["depths"], torch.full((1, 8, 8), 0.5))


def test_returns_only_what_is_asked_for_or_there() -> None:
    bare = Mesh(square().vertices, square().faces)
    assert list(rendered(bare)) == ["mask", "depths", "normals"]
    assert list(rendered(square(), returns=["colors", "mask"])) == ["mask", "colors"]
    assert render_mesh(bare, FRONT, 8, returns=[]) == MeshImages(None, None, None, None, None)


@pytest.mark.parametrize("count", [0, 4])
def test_empty_mesh_is_background(count: int) -> None:
    empty = Mesh(torch.rand(count, 3), torch.empty(0, 3, dtype=torch.int64), torch.rand(count, 3), torch.rand(count, 3))
    images = rendered(empty, resolution=8, background=(0.1, 0.2, 0.3))
    assert not images["mask"].any()
    torch.testing.assert_close(images["colors"][0, :, 3, 3], torch.tensor([0.1, 0.2, 0.3]))
    assert images["normal_maps"].shape == (1, 3, 8, 8)


def test_no_camera_is_no_picture() -> None:
    assert rendered(square(), FRONT[:0], 8)["colors"].shape == (0, 3, 8, 8)


def test_random_background_is_black_or_white_per_view() -> None:
    cameras = Cameras.orbit(torch.arange(20) * 0.3, 0.0)
    generator = torch.Generator().manual_seed(3)
    colors = rendered(square(0.1), cameras, 4, background="random", generator=generator, returns=["colors"])["colors"]
    corners = colors[:, :, 0, 0].round(decimals=5)
    assert set(corners.unique().tolist()) == {0.0, 1.0}
    assert (corners == corners[:, :1]).all()
    assert 4 < corners[:, 0].sum() < 16


def test_half_precision_is_drawn_in_float32_and_double_stays() -> None:
    for dtype, drawn in [(torch.float16, torch.float32), (torch.float64, torch.float64)]:
        assert rendered(square().to(dtype=dtype), resolution=4)["colors"].dtype == drawn


def test_gradient_of_the_silhouette_is_that_of_the_area() -> None:
    """A square's coverage grows with the square of its side."""
    scale = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    mesh = square(0.61).to(dtype=torch.float64)
    grown = Mesh(mesh.vertices * scale, mesh.faces)
    mask = render_mesh(grown, FRONT, 64, ssaa=2, returns=["mask"]).mask
    assert mask is not None
    (gradient,) = torch.autograd.grad(mask.sum(), scale)
    torch.testing.assert_close(gradient, 2 * mask.sum().detach(), rtol=0.02, atol=0)


def test_gradients_reach_everything() -> None:
    mesh = square(0.8).to(dtype=torch.float64)
    image = torch.rand(8, 8, 3, dtype=torch.float64, requires_grad=True)
    leaves = [mesh.vertices, mesh.colors, UV.double()]
    vertices, colors, uv = (leaf.requires_grad_() for leaf in leaves if leaf is not None)
    extrinsics = Cameras.orbit(0.3, 0.2).extrinsics.double().requires_grad_()
    cameras = Cameras(extrinsics, FRONT.intrinsics.double())
    background = torch.rand(3, dtype=torch.float64, requires_grad=True)
    plain = render_mesh(Mesh(vertices, mesh.faces, colors), cameras, 16, background, 2)
    drawn = render_mesh(Mesh(vertices, mesh.faces), cameras, 16, background, 2, Texture(image, uv))
    total = sum(
        (x.square().sum() for x in (plain.colors, plain.depths, drawn.colors) if x is not None), torch.zeros(())
    )
    for gradient in torch.autograd.grad(total, [vertices, colors, image, uv, extrinsics, background]):
        assert gradient.isfinite().all()
        assert gradient.abs().sum() > 0


def test_pictures_and_gradients_do_not_depend_on_the_number_of_threads() -> None:
    cameras = Cameras.orbit([0.3, 1.0, 2.0], 0.2)
    shape = torus(96, 48)
    image = torch.rand(16, 16, 3)
    uv = torch.rand(len(shape.vertices), 2)

    def results() -> list[Tensor]:
        assert shape.colors is not None
        leaves = [x.clone().requires_grad_() for x in (shape.vertices, shape.colors, image, uv)]
        vertices, colors, texels, at = leaves
        images = [*render_mesh(Mesh(vertices, shape.faces, colors, uv.new_zeros(len(uv), 3)), cameras, 48, 0.3)]
        images += [render_mesh(Mesh(vertices, shape.faces), cameras, 48, texture=Texture(texels, at)).colors]
        made = [x for x in images if x is not None]
        return [*made, *torch.autograd.grad(sum((x.square().sum() for x in made), torch.zeros(())), leaves)]

    torch.use_deterministic_algorithms(False)  # not even then
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results()
        for count in (2, 5):
            torch.set_num_threads(count)
            for one, other in zip(results(), expected, strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


def test_says_what_is_wrong() -> None:
    mesh = square()
    with pytest.raises(ValueError, match="resolution and ssaa must be at least 1; got 4 and 0"):
        render_mesh(mesh, FRONT, 4, ssaa=0)
    with pytest.raises(ValueError, match=r"returns must be among mask, depths, .*; got 'shade'"):
        render_mesh(mesh, FRONT, 4, returns=["shade"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"background must be a number, \[C\] or \[V, C\] with C=3, V=1; got \[2, 3\]"):
        render_mesh(mesh, FRONT, 4, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="background must be a color or 'random'; got 'pink'"):
        render_mesh(mesh, FRONT, 4, "pink")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="background 'random' needs a generator"):
        render_mesh(mesh, FRONT, 4, "random")
    with pytest.raises(ValueError, match=r"faces must be in \[0, 4\); got 0 to 9"):
        render_mesh(Mesh(mesh.vertices, torch.tensor([[0, 1, 9]])), FRONT, 4)
    with pytest.raises(ValueError, match="near and far must be 0 < near < far"):
        render_mesh(mesh, FRONT, 4, near=2, far=1)
    with pytest.raises(ValueError, match="texture must have as many faces as the mesh, 2; got 1"):
        render_mesh(mesh, FRONT, 4, texture=Texture(torch.rand(2, 2, 3), UV, torch.tensor([[0, 1, 2]])))
    with pytest.raises(ValueError, match="wrap must be 'repeat', 'clamp' or 'zero'; got 'mirror'"):
        Texture(torch.rand(2, 2, 3), UV, wrap="mirror")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="filter must be 'linear' or 'nearest'; got 'cubic'"):
        Texture(torch.rand(2, 2, 3), UV, filter="cubic")  # type: ignore[arg-type]
