"""metadata.parquet, attribution, and preparation on Ray: what the optional packages add."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.preparation.test_prepare import SMALL, catalog, run, write_box
from trellis.preparation.attribution import attribution_lines
from trellis.preparation.metadata import read_metadata, write_metadata
from trellis.preparation.runner import Summary, prepare


def test_parquet_holds_what_the_csv_holds(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"sha256": "a", "name": "table, round", "faces": 3}, {"sha256": "b", "captions": '["x", "ü"]'}]
    write_metadata(tmp_path, rows)
    table = parquet.read_table(tmp_path / "metadata.parquet").to_pylist()
    assert table == list(read_metadata(tmp_path).values())
    assert table[1] == {"sha256": "b", "name": "", "faces": "", "captions": '["x", "ü"]'}


def test_authors_are_named_by_license() -> None:
    rows = [
        {"sha256": "1" * 64, "name": "Chair", "creator": "Ann", "license": "CC-BY"},
        {"sha256": "2" * 64, "name": "Bed", "creator": "Ann", "license": "CC-BY"},
        {"sha256": "3" * 64, "name": "Bed", "creator": "Ann", "license": "CC-BY"},  # a variant
        {"sha256": "4" * 64, "name": "Lamp", "creator": "", "license": ""},
    ]
    assert attribution_lines(rows) == [
        *("### CC-BY", "", "- Ann: Bed, Chair", ""),
        *("### unknown license", "", "- unknown author: Lamp", ""),
    ]


def test_a_prepared_folder_says_whose_work_it_holds(tmp_path: Path) -> None:
    text = "license=CC-BY 3.0\nname#1=Chair\ncreator#1=Ann\nmodel#1=/box.obj\n"
    text += "name#2=Lamp\ncreator#2=Bob\nlicense#2=GPL\nmodel#2=/bad.obj\n"
    box = write_box(tmp_path / "in" / "box.obj").read_text()
    (tmp_path / "in" / "box.obj").unlink()
    files = {"PluginFurnitureCatalog.properties": text, "box.obj": box, "bad.obj": "f 1 2 3"}
    catalog(tmp_path / "in" / "Some.sh3f", **files)
    run(str(tmp_path / "in"), "-o", str(tmp_path / "data"), *SMALL, "--limit", "0")
    attribution = (tmp_path / "data" / "ATTRIBUTION.md").read_text()
    assert "### CC-BY 3.0\n\n- Ann: Chair" in attribution
    assert "Bob" not in attribution  # not in the data


def test_two_workers_of_ray_do_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray.data")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    for name in "abc":
        write_box(tmp_path / "in" / f"{name}.obj", f"{name}.mtl", f"0.{ord(name) % 10} 0.5 0.5")
    for data in ("here", "ray"):
        run(str(tmp_path / "in"), "-o", str(tmp_path / data), *SMALL, "--voxel-resolution", "8", "--limit", "0")
    (tmp_path / "in" / "c.obj").write_text("f 1 2 3\n")  # has become bad since
    for data, ray, jobs in (("here", None, 1), ("ray", "local", 2)):
        assert prepare(tmp_path / data, ["render", "voxelize"], jobs=jobs, ray=ray) == Summary(3, 4, 1)
        assert "c.obj" in (tmp_path / data / "failures" / "render.jsonl").read_text()
    written = {
        data: {
            path.relative_to(tmp_path / data): path.read_bytes()
            for folder in ("renders", "voxels")
            for path in (tmp_path / data / folder).rglob("*")
            if path.is_file()
        }
        for data in ("here", "ray")
    }
    assert written["here"] == written["ray"]
    assert len(written["here"]) == 2 * (3 + 1 + 1 + 1)
    columns = [{sha: row["num_voxels"] for sha, row in read_metadata(tmp_path / d).items()} for d in ("here", "ray")]
    assert columns[0] == columns[1]
    assert prepare(tmp_path / "ray", ["voxelize"], jobs=2, ray="local", limit=0) == Summary(0, 0, 0)
