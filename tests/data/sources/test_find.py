"""Which images a folder, a glob, a list, tars or a dataset name, and how one is found again by its key."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner

from sdvae.cli.main import cli
from sdvae.data.sources.files import ImageFile
from sdvae.data.sources.find import ImagesByKey, find_images, find_inputs
from sdvae.errors import ConfigError

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for name in (
        "b.jpg",
        "a.PNG",
        "a.jpg",
        "Z.webp",
        "sub/a.jpg",
        "sub/deep/c.TIFF",
        "sub/notes.md",
        "sub-2/d.jpeg",
        "photo[1].jpg",
        "double.tar.png",
        "no_extension",
        "jpg",
        ".hidden.jpg",
        ".cache/e.jpg",
        "sub/.thumbs/f.jpg",
    ):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return root


def keys(spec: str | Path) -> list[str]:
    return [image.key for image in find_images(spec)]


def test_a_folder_gives_its_whole_tree_sorted_by_key(tree: Path) -> None:
    images = find_images(tree)
    assert [image.key for image in images] == [
        "Z.webp",
        "a.PNG",
        "a.jpg",
        "b.jpg",
        "double.tar.png",
        "photo[1].jpg",
        "sub-2/d.jpeg",
        "sub/a.jpg",
        "sub/deep/c.TIFF",
    ]
    assert all(image.path == tree / image.key for image in images)
    assert find_images(str(tree)) == find_images(f"{tree}/") == images


def test_a_hidden_root_is_searched(tree: Path) -> None:
    assert keys(tree / ".cache") == ["e.jpg"]


def test_a_relative_folder_and_the_current_one(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    assert keys(".") == keys(tree)
    assert keys("sub") == ["a.jpg", "deep/c.TIFF"]
    assert keys("*.jpg") == ["a.jpg", "b.jpg", "photo[1].jpg"]
    assert find_images("b.jpg") == [ImageFile("b.jpg", Path("b.jpg"))]


def test_one_file_is_taken_whatever_its_suffix(tree: Path) -> None:
    for name in ("b.jpg", "no_extension", "sub/notes.md", "photo[1].jpg", ".hidden.jpg"):
        assert find_images(tree / name) == [ImageFile(Path(name).name, tree / name)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*.jpg", ["a.jpg", "b.jpg", "photo[1].jpg"]),
        ("*", ["Z.webp", "a.PNG", "a.jpg", "b.jpg", "double.tar.png", "photo[1].jpg"]),
        ("[ab].*", ["a.PNG", "a.jpg", "b.jpg"]),
        ("s*/*.jp*", ["sub-2/d.jpeg", "sub/a.jpg"]),
        ("**/a.*", ["a.PNG", "a.jpg", "sub/a.jpg"]),
        ("**/*.TIFF", ["sub/deep/c.TIFF"]),
        ("sub/**", ["a.jpg", "deep/c.TIFF"]),
        ("sub/**/?.TIFF", ["deep/c.TIFF"]),
        ("**/deep/**/*.*", ["sub/deep/c.TIFF"]),
    ],
)
def test_a_glob_names_files_below_its_fixed_part(tree: Path, pattern: str, expected: list[str]) -> None:
    images = find_images(tree / pattern)
    root = tree / "sub" if pattern.startswith("sub/") else tree
    assert [image.key for image in images] == expected
    assert all(image.path == root / image.key for image in images)


def test_links_are_followed_but_not_in_circles(tree: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "g.jpg").touch()
    (tree / "sub" / "back").symlink_to(tree, target_is_directory=True)
    (tree / "sub" / "self").symlink_to(tree / "sub", target_is_directory=True)
    (elsewhere / "round").symlink_to(elsewhere, target_is_directory=True)
    (tree / "linked").symlink_to(elsewhere, target_is_directory=True)
    (tree / "file-link.jpg").symlink_to(elsewhere / "g.jpg")
    (tree / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tree / "itself.jpg").symlink_to(tree / "itself.jpg")
    new = {"linked/g.jpg", "file-link.jpg", "dangling.jpg", "itself.jpg"}  # the last two: for the reader to report
    found = keys(tree)
    assert new <= set(found) and len(found) == 9 + len(new)
    assert "linked/g.jpg" in keys(tree / "**" / "g.jpg")


def test_a_list_names_files_relative_to_itself(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.jpg").touch()
    (tmp_path / "other" / "x.jpg").touch()
    lines = [
        "sub/a.jpg",  # first, behind the byte order mark
        "",
        "# my choice",
        "  no_extension  ",
        "a.jpg",
        "./sub/../a.jpg",  # again
        str(tree / "b.jpg"),
        str(tmp_path / "other" / "a.jpg"),  # outside, and its name is taken
        "../other/x.jpg",
        "#not-a-file.jpg",
        "missing.jpg",
    ]
    path = tree / "list.txt"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    images = {image.key: image.path for image in find_images(path)}
    assert list(images) == ["a-2.jpg", "a.jpg", "b.jpg", "missing.jpg", "no_extension", "sub/a.jpg", "x.jpg"]
    assert images["a.jpg"].samefile(tree / "a.jpg")
    assert images["a-2.jpg"].samefile(tmp_path / "other" / "a.jpg")
    assert images["x.jpg"].samefile(tmp_path / "other" / "x.jpg")


def test_keys_of_a_list_do_not_depend_on_its_order(tree: Path, tmp_path: Path) -> None:
    lines = [str(tree / "a.jpg"), str(tree / "sub" / "a.jpg"), str(tree / "b.jpg")]
    lists = []
    for order in (1, -1):
        path = tmp_path / f"list{order}" / "list.txt"
        path.parent.mkdir()
        path.write_text("\n".join(lines[::order]))
        lists.append(find_images(path))
    assert lists[0] == lists[1]
    assert [image.key for image in lists[0]] == ["a-2.jpg", "a.jpg", "b.jpg"]


def test_a_list_with_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.jpg\n")
    assert os.fsencode(find_images(tmp_path / "list.txt")[0].path.name) == b"caf\xe9.jpg"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing", "no such file or folder"),
        ("missing/*.jpg", "no image found"),
        ("*.gif", "no image found; looked for files that match"),
        ("empty", "no image found; looked for files in it and its subfolders"),
        ("empty.txt", "no image found; looked for one path a line"),
    ],
)
def test_finding_nothing_is_a_config_error_that_says_what_was_looked_for(
    tmp_path: Path, spec: str, message: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").touch()
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(ConfigError) as caught:
        find_images(tmp_path / spec)
    assert message in str(caught.value) and str(tmp_path / spec) in str(caught.value)
    if spec in ("empty", "*.gif"):
        assert ".jpeg" in str(caught.value)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may list everything")
def test_a_folder_that_cannot_be_listed_is_not_passed_over(tree: Path) -> None:
    (tree / "sub").chmod(0)
    try:
        with pytest.raises(ConfigError, match="sub: this folder cannot be listed"):
            find_images(tree)
    finally:
        (tree / "sub").chmod(0o755)


@pytest.fixture
def images(tmp_path: Path, make_images: MakeImages, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return make_images(tmp_path / "images", {"a.png": (16, 16), "sub/b.png": (24, 16)})


def write_parquet(path: Path, *contents: bytes) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
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
