import math
from typing import Any

import pytest
import torch

from tests.renderers.test_gaussians import ball
from tests.renderers.test_mesh import UV, square
from tests.renderers.test_radiance_field import voxel
from tests.support.solids import box
from trellis.renderers.camera import Cameras
from trellis.renderers.show import Shown, show
from trellis.representations.mesh import Mesh
from trellis.representations.mesh_reading import ReadMesh
from trellis.representations.texture import Texture

FRONT = Cameras.orbit(0.0, 0.0)
GREEN = (0.0, 1.0, 0.0)


def middle(shown: Shown, **options: Any) -> tuple[list[float], list[float]]:
    """Colors in the middle and in the corner of a picture."""
    picture = show(shown, FRONT, 17, GREEN, **options)
    assert picture.shape == (1, 3, 17, 17)
    return tuple([round(float(x), 2) for x in picture[0, :, at, at]] for at in (8, 0))  # type: ignore[return-value]


def test_colors_of_everything() -> None:
    orange = [0.9, 0.5, 0.1]
    field = voxel((0, 0, 0), resolution=1)
    painted = Mesh(square().vertices, square().faces, torch.tensor([orange] * 4))
    textured = ReadMesh(square(), Texture(torch.tensor([[orange]]), UV))
    for shown in (ball((0, 0, 0), (0.9, 0.5, 0.1), 0.3), field, painted, ReadMesh(painted, None), textured):
        seen, corner = middle(shown)
        assert seen == pytest.approx(orange, abs=0.03)
        assert corner[0] < 0.9 or isinstance(shown, Mesh)
    assert middle(square(0.2))[1] == list(GREEN)


def test_mesh_without_colors_is_gray_and_brighter_where_it_faces_the_camera() -> None:
    solid = box((0.4, 0.4, 0.4))
    seen = show(Mesh(solid.vertices, solid.faces), Cameras.orbit(0.9, 0.0), 32, GREEN)[0]
    left, right = seen[:, 16, 12], seen[:, 16, 24]
    assert (left == left[0]).all()
    assert abs(float(left[0] - right[0])) > 0.1
    assert middle(Mesh(solid.vertices, solid.faces)) == ([0.9] * 3, list(GREEN))


def test_normals_are_in_front_of_the_background() -> None:
    assert middle(square(0.4), what="normal") == ([0.5, 1.0, 0.5], list(GREEN))
    for shown in (ball((0, 0, 0), (1, 0, 0)), voxel()):
        with pytest.raises(ValueError, match="only meshes have normals"):
            show(shown, FRONT, 8, what="normal")


def test_depth_goes_from_white_to_black() -> None:
    reach = math.sqrt(3) / 2
    for y in (-0.4, 0.0, 0.4):
        at = square(0.4)
        moved = Mesh(at.vertices + torch.tensor([0, y, 0]), at.faces)
        gray = round((reach + y) / (2 * reach), 2)
        assert middle(moved, what="depth") == ([gray] * 3, list(GREEN))
    seen, _ = middle(ball((0, 0.4, 0), (1, 1, 1), 0.2), what="depth")
    assert seen[0] == pytest.approx((reach + 0.4) / (2 * reach), abs=0.02)


def test_alpha_is_white_on_black() -> None:
    for shown in (ball((0, 0, 0), (1, 0, 0), 0.2), square(0.4), voxel((0, 0, 0), resolution=1)):
        seen, corner = middle(shown, what="alpha")
        assert min(seen) > 0.97
        assert max(corner) < 0.01 or not isinstance(shown, Mesh)


def test_no_gradient_is_kept() -> None:
    mesh = square()
    assert not show(Mesh(mesh.vertices.requires_grad_(), mesh.faces), FRONT, 4).requires_grad


def test_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="what must be color, normal, depth, alpha; got 'heat'"):
        show(square(), FRONT, 4, what="heat")  # type: ignore[arg-type]
