"""Tar shards of prepared objects: what is in them, how they are read, and what damage does."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.prepared import FEATURES, LATENTS, STRUCTURE, prepared_root
from trellis.commands.pack import Request, run
from trellis.data import build_dataset, unpack_shards, write_shards
from trellis.data.shards import KINDS, MODELS, ShardPlace, inner_path, member_name, open_shards
from trellis.preparation.metadata import read_metadata
from trellis.training.batches import Plan, Reader

R = 16
RENDERED = {"latent_model": LATENTS, "resolution": R, "image_size": 20}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("SparseStructure", {"resolution": R, "augment": True}),
    ("Slat2RenderGeo", {**RENDERED, "views": 2}),
    ("SparseFeat2Render", {"model": FEATURES, "resolution": R, "image_size": 20}),
    ("ImageConditionedSparseStructureLatent", {"latent_model": STRUCTURE, "image_size": 28}),
    ("TextConditionedSLat", {"latent_model": LATENTS, "resolution": R, "cond_model": [FEATURES, "minilm"]}),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared_root(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def shards(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    assert write_shards(root, out, 2) == (3, 2, 2)
    return out


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    """Shards to be damaged."""
    return Path(shutil.copytree(shards, tmp_path / "copy"))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    return one == other


@pytest.mark.parametrize(("name", "args"), CASES)
def test_shards_give_the_samples_of_the_folder(root: Path, shards: Path, name: str, args: dict[str, Any]) -> None:
    folder, packed = (
        build_dataset(name, {**args, "cache": cache}, [r]) for r, cache in ((root, False), (shards, True))
    )
    assert packed.ids == folder.ids
    for index in range(3):
        assert packed.num_voxels(index) == folder.num_voxels(index)
        for seed in (1, 2, 1):  # the last from memory
            one, other = (dataset.load(index, seeded(seed)) for dataset in (folder, packed))
            assert one.keys() == other.keys()
            assert all(same(value, other[key]) for key, value in one.items())


def test_shards_go_to_worker_processes_without_what_was_kept(shards: Path) -> None:
    dataset = build_dataset("SparseStructureLatent", {"latent_model": STRUCTURE, "cache": True}, [shards, shards])
    once = [dataset.load(index, seeded())["x_0"] for index in range(6)]
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(part.cache.size == 0 < kept.cache.size for part, kept in zip(copy.parts, dataset.parts, strict=True))
    assert all(torch.equal(copy.load(index, seeded())["x_0"], value) for index, value in enumerate(once))


def test_the_order_is_that_of_webdataset(shards: Path, root: Path) -> None:
    wds = pytest.importorskip("webdataset")
    samples = list(wds.WebDataset([str(file) for file in sorted(shards.glob("*.tar"))], shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == sorted(read_metadata(root))
    sha = samples[0]["__key__"]
    assert json.loads(samples[0]["json"])["name"] == "box 0"
    assert samples[0]["renders.001.png"] == (root / "renders" / sha / "001.png").read_bytes()
    assert samples[0][f"latents.{LATENTS}.npz"] == (root / "latents" / LATENTS / f"{sha}.npz").read_bytes()


def test_packed_and_unpacked_everything_is_as_it_was(root: Path, shards: Path, tmp_path: Path) -> None:
    for _ in range(2):  # again: nothing changes
        assert not unpack_shards(shards, tmp_path / "data").damaged
    before, after = (
        {f.relative_to(r): f.read_bytes() for f in r.rglob("*") if f.is_file()} for r in (root, tmp_path / "data")
    )
    assert before.keys() == after.keys()
    assert read_metadata(root) == read_metadata(tmp_path / "data")
    assert all(after[name] == content for name, content in before.items() if not name.name.startswith("metadata"))


def test_only_what_changed_is_written_again(tmp_path: Path) -> None:
    root, out = prepared_root(tmp_path / "data", objects=2), tmp_path / "shards"
    assert write_shards(root, out, 1) == (2, 2, 2)
    first = (out / "shard-000000.tar").read_bytes()
    assert write_shards(root, out, 1) == (2, 2, 0)
    np.savez(root / "conditions" / "minilm" / f"{1:064x}.npz", tokens=np.zeros((9, 7, 6), np.float16))
    (out / "shard-000000.tar").write_bytes(b"a damaged one")
    assert write_shards(root, out, 1) == (2, 2, 2)
    assert (out / "shard-000000.tar").read_bytes() == first
    with pytest.raises(ValueError, match=r"has other shards, such as shard-000001\.tar"):
        write_shards(root, out, 2)


def test_chosen_kinds_alone_are_packed(root: Path, tmp_path: Path) -> None:
    write_shards(root, tmp_path / "out", kinds=["voxels"])
    shards = open_shards(tmp_path / "out")
    assert set(shards.spans) == {f"voxels/{sha}.ply" for sha in read_metadata(root)}
    with pytest.raises(ValueError, match=r"kinds must be of voxels, .*; got meshes"):
        write_shards(root, tmp_path / "out", kinds=["meshes"])
    (tmp_path / "data").mkdir()
    shutil.copy(root / "metadata.csv", tmp_path / "data")
    with pytest.raises(ValueError, match="must have objects with latents; it has none"):
        write_shards(tmp_path / "data", tmp_path / "none", kinds=["latents"])


@pytest.mark.parametrize("keep", [0, 100, 512, 5000, 0.5, 0.99])
def test_a_shard_cut_short_gives_the_objects_before(copy: Path, keep: float, caplog: pytest.LogCaptureFixture) -> None:
    file = copy / "shard-000000.tar"
    content = file.read_bytes()
    last = open_shards(copy).spans[f"voxels/{1:064x}.ply"].start
    cut = int(keep * len(content)) if isinstance(keep, float) else keep
    if keep == 0.99:
        cut = len(content) - 10240  # all members are whole; only the end is missing
    file.write_bytes(content[:cut])
    found = open_shards(copy)
    assert list(found.damaged) == [file]
    assert "is damaged, only what comes before is used" in caplog.text
    assert list(found.rows) == [f"{i:064x}" for i in ([0, 2] if cut > last else [2])]
    assert build_dataset("SparseStructure", {"resolution": R}, [copy]).ids == list(found.rows)


def test_a_damaged_header_does_not_pass_for_the_end(copy: Path) -> None:
    file = copy / "shard-000000.tar"
    content = bytearray(file.read_bytes())
    start = open_shards(copy).spans[f"voxels/{1:064x}.ply"].start - 512
    content[start : start + 512] = bytes(range(256)) * 2
    file.write_bytes(content)
    found = open_shards(copy)
    assert f"no end of the archive at byte {start}" in found.damaged[file]
    assert list(found.rows) == [f"{0:064x}", f"{2:064x}"]


def test_damage_inside_of_a_file_costs_one_sample(copy: Path) -> None:
    file, path = copy / "shard-000000.tar", f"ss_latents/{STRUCTURE}/{0:064x}.npz"
    span = open_shards(copy).spans[path]
    content = bytearray(file.read_bytes())
    content[span.start + span.size // 2] ^= 255
    file.write_bytes(content)
    dataset = build_dataset("SparseStructureLatent", {"latent_model": STRUCTURE}, [copy])
    with pytest.raises(ValueError, match=r"must be an \.npz with mean"):
        dataset.load(0, seeded())
    with Reader(dataset, Plan(0, 3, 1, range(1)), 0, 1) as reader:
        assert [batch["x_0"].shape for _, step in reader for batch in step] == [(3, 8, 4, 4, 4)]


def entry(name: str, content: bytes = b"{}", **changes: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, content


@pytest.mark.parametrize(
    ("bad", "kept"),
    [
        (entry("../../etc/passwd"), False),
        (entry("/etc.json"), False),
        (entry("b.voxels.ply", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), False),
        (entry("b.voxels.ply", b"", type=tarfile.DIRTYPE), False),
        (entry("b.renders.../../x"), True),  # a file of an object, but of none that there is a place for
        (entry("b.cls", b"7"), True),
        (entry("b.json", b"[" * 100_000), False),
        (entry("b.json", b"[1]"), False),
        (entry("b.voxels.ply"), False),  # no line of metadata
    ],
)
def test_strange_members_are_not_read(
    tmp_path: Path, bad: tuple[tarfile.TarInfo, bytes], kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        more = [entry("b.json")] if kept else []
        for info, content in [entry("a.json", b'{"name": 1}'), entry("a.voxels.ply"), *more, bad]:
            tar.addfile(info, io.BytesIO(content))
    found = open_shards(tmp_path)
    assert found.rows == {"a": {"name": "1", "sha256": "a"}} | ({"b": {"sha256": "b"}} if kept else {})
    assert set(found.spans) == {"voxels/a.ply"}
    assert kept or "shard.tar is damaged" in caplog.text or "object b of" in caplog.text


def test_of_an_object_that_comes_twice_the_first_counts(
    shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in "ab":
        shutil.copy(shards / "shard-000000.tar", tmp_path / f"{name}.tar")
    found = open_shards(tmp_path)
    assert len(found.rows) == 2
    assert {span.shard for span in found.spans.values()} == {0}
    assert "comes a second time" in caplog.text


def test_what_is_not_there_is_named(tmp_path: Path, shards: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no voxels/x\.ply"):
        (ShardPlace(open_shards(shards)) / "voxels" / "x.ply").read_bytes()
    with pytest.raises(ValueError, match="it has 0 shards and no whole object"):
        unpack_shards(tmp_path, tmp_path / "out")
    found = open_shards(Path(shutil.copytree(shards, tmp_path / "copy")))
    path = next(iter(found.spans))
    found.files[0].write_bytes(b"")
    with pytest.raises(OSError, match="ends inside of"):
        found.read(path)
    for path in ("voxels/a.b.ply", "renders/a/b/c.png", "raw/a.obj", "latents/.m/a.npz"):
        with pytest.raises(ValueError, match="cannot be called so in a shard"):
            member_name(path)


@settings(max_examples=20, deadline=None)
@given(st.text("aZ09_-", min_size=1), st.text("mZ0._-+", min_size=1), st.sampled_from(KINDS))
def test_names_have_an_inverse(sha: str, part: str, kind: str) -> None:
    path = f"{kind}/{part}/{sha}.npz" if kind in MODELS else f"{kind}/{sha}/{part}"
    path = f"voxels/{sha}.ply" if kind == "voxels" else path
    try:
        name = member_name(path)
    except ValueError:
        assert part[0] in ".+"
        return
    assert inner_path(name) == path


def test_the_command_packs_and_unpacks(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def pack(source: str, output: str, **options: Any) -> int:
        given = {"objects": 2, "include": (), "unpack": False, "verbose": False} | options
        return run(Request(tmp_path / source, tmp_path / output, **given))

    (tmp_path / "data").symlink_to(root)
    assert pack("data", "shards", include=("voxels", "ss_latents")) == 0
    assert "3 objects in 2 shards, 2 written" in " ".join(capsys.readouterr().out.split())
    assert pack("shards", "again", unpack=True) == 0
    assert {path.name for path in (tmp_path / "again").iterdir()} >= {"metadata.csv", "voxels", "ss_latents"}
    with (tmp_path / "shards" / "shard-000001.tar").open("r+b") as file:
        file.truncate(2000)
    assert pack("shards", "rest", unpack=True) == 1
    assert len(read_metadata(tmp_path / "rest")) == 2
    capsys.readouterr()
    assert pack("data", "shards", include=("meshes",)) == 1
    assert "kinds must be of voxels" in " ".join(capsys.readouterr().err.split())
