"""What `encode` takes for images, from files to datasets, and how one is found again by its key."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from sdvae.cli.main import cli
from sdvae.data.sources.find import ImagesByKey, find_inputs
from sdvae.errors import ConfigError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
pytest.importorskip("datasets")
MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]


@pytest.fixture
def images(tmp_path: Path, make_images: MakeImages, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return make_images(tmp_path / "images", {"a.png": (16, 16), "sub/b.png": (24, 16)})


def write_parquet(path: Path, *contents: bytes) -> Path:
    cells = [{"bytes": content, "path": None} for content in contents]
    column = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": column}), path)
    return path


def write_tar(path: Path, images: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        tar.add(images / "a.png", "a.png")
    return path


def test_a_folder_is_of_images_before_tars_before_datasets(tmp_path: Path, images: Path) -> None:
    folder = tmp_path / "mixed"
    write_parquet(folder / "x.parquet", (images / "a.png").read_bytes())
    assert [image.key for image in find_inputs(folder)] == ["train/000000000"]
    write_tar(folder / "y.tar", images)
    assert [image.key for image in find_inputs(folder)] == ["y.tar/a.png"]
    (folder / "a.png").write_bytes((images / "a.png").read_bytes())
    assert [image.key for image in find_inputs(folder)] == ["a.png"]


def test_what_is_of_datasets_is_refused_for_files(images: Path) -> None:
    with pytest.raises(ConfigError, match="split and image_column given, but .*images is not a dataset"):
        find_inputs(images, split="test", image_column="picture")
    with pytest.raises(ConfigError, match="subset given"):
        ImagesByKey(images, subset="x")
    with pytest.raises(ConfigError, match="no such file or folder"):
        find_inputs(images / "nothing")
    (images.parent / "empty").mkdir()
    with pytest.raises(ConfigError, match="no image found"):
        find_inputs(images.parent / "empty")


def test_images_are_found_again_by_key(tmp_path: Path, images: Path) -> None:
    for packed in (images, write_tar(tmp_path / "t/0.tar", images).parent, write_parquet(tmp_path / "p", b"1", b"2")):
        if packed == tmp_path / "p":
            packed = packed.rename(tmp_path / "p.parquet")
        by_key = ImagesByKey(packed)
        assert [by_key.find(image.key) for image in find_inputs(packed)] == list(find_inputs(packed))
        assert by_key.find("nothing.png") is None


def test_the_command_encodes_a_dataset_and_verifies_it(tmp_path: Path, images: Path, vae_path: Path) -> None:
    contents = [(images / name).read_bytes() for name in ("a.png", "sub/b.png")]
    data, out = tmp_path / "data", tmp_path / "out"
    write_parquet(data / "test-00000-of-00001.parquet", contents[0], contents[1][:40], contents[1])
    which = ["--split", "test", "--image-column", "image"]

    def sdvae(*words: object) -> tuple[int, dict[str, object]]:
        result = CliRunner().invoke(cli, [*map(str, words), "--json"])
        return result.exit_code, json.loads(result.stdout)

    code, report = sdvae("encode", data, out, "--vae", vae_path, *which)
    assert (code, report["done"], report["failed"]) == (3, 2, 1)
    [failure] = report["failures"]  # type: ignore[misc]
    assert failure["key"] == "test/000000001" and failure["source"] == f"{data}[1]"  # type: ignore[index]
    assert str(data) not in failure["reason"]  # type: ignore[index]
    assert {path.name for path in (out / "test").iterdir()} == {f"00000000{i}.safetensors" for i in (0, 2)}

    code, report = sdvae("verify", out, "--images", data, "--device", "cpu", *which)
    assert (code, report["problems"], len(report["reencoded"])) == (0, [], 2)  # type: ignore[arg-type]

    write_parquet(data / "test-00000-of-00001.parquet", contents[0], contents[1], contents[0])
    code, report = sdvae("encode", data, out, "--vae", vae_path, *which)
    assert (code, report["done"], report["skipped"]) == (0, 2, 1)  # the mended row and the changed one

    result = CliRunner().invoke(cli, ["verify", str(out), "--split", "test"])
    assert result.exit_code == 2 and "--split is of the dataset that was encoded: give --images" in result.stderr
