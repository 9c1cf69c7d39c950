"""Any file that holds something to look at."""

from __future__ import annotations

from pathlib import Path

from trellis.representations.gaussian_ply import load_ply
from trellis.representations.gaussians import Gaussians
from trellis.representations.mesh_reading import SUFFIXES, ReadMesh, read_mesh
from trellis.representations.radiance_field import RadianceField

_HEADER = 64 * 1024  # bytes
FOLDER = (("mesh.glb", "mesh.obj", "mesh.stl"), ("gaussians.ply",), ("radiance_field.safetensors",))
"""What `trellis generate` writes into a folder: the first of each row that is there is read."""


def read_representation(path: str | Path) -> Gaussians | RadianceField | ReadMesh:
    """Read a mesh, Gaussians or a radiance field, in the world's axes; a PLY file is told by its content.

    Raises:
        ValueError: naming the file and what is wrong with it.
        FileNotFoundError: there is none.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    if suffix == ".safetensors":
        return RadianceField.load(path)
    if suffix == ".ply" and _holds_gaussians(path):
        return load_ply(path)
    if suffix not in SUFFIXES:
        raise ValueError(f"{path} must be a file that ends in {', '.join(SUFFIXES)} or .safetensors")
    return read_mesh(path)


def files_of(path: str | Path) -> list[Path]:
    """The file itself, or the representations in a folder written by `trellis generate`.

    Raises:
        FileNotFoundError: there is nothing at `path`, or nothing of this kind in the folder.
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    found = [next((path / name for name in row if (path / name).is_file()), None) for row in FOLDER]
    files = [file for file in found if file is not None]
    if not files:
        names = ", ".join(name for row in FOLDER for name in row)
        raise FileNotFoundError(f"no asset in the folder {path}: it has none of {names}")
    return files


def _holds_gaussians(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(_HEADER)
    return b"f_dc_0" in head.partition(b"end_header")[0]
