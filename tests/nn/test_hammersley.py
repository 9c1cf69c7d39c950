import pytest
import torch

from tests.support.golden import golden
from trellis.nn.hammersley import hammersley, radical_inverse, sphere_hammersley


def test_points_are_the_official_ones() -> None:
    item = golden("embedders_spatial")
    points = torch.tensor([hammersley(i, 3, 32) for i in range(32)], dtype=torch.float64)
    item.check("out.hammersley3_32", points, max_abs=1e-15)


@pytest.mark.parametrize(
    ("suffix", "offset", "remap"), [("", (0, 0), False), ("_off", (0.3, 0.7), False), ("_remap_off", (0.3, 0.7), True)]
)
def test_directions_are_the_official_ones(suffix: str, offset: tuple[float, float], remap: bool) -> None:
    item = golden("embedders_spatial")
    directions = torch.tensor([sphere_hammersley(i, 32, offset, remap) for i in range(32)], dtype=torch.float64)
    item.check(f"out.sphere_hammersley_32{suffix}", directions, max_abs=1e-14)


def test_radical_inverse_mirrors_the_digits() -> None:
    assert radical_inverse(2, 0b110) == 0.375
    assert radical_inverse(3, 5) == pytest.approx(2 / 3 + 1 / 9)


def test_names_a_wrong_number_of_dimensions() -> None:
    with pytest.raises(ValueError, match=r"dims must be in 1\.\.7; got 8"):
        hammersley(0, 8, 10)
