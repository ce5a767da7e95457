"""Which files a folder, a glob or a list names."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from sdvae.data.sources.files import IMAGE_SUFFIXES, ImageFile, file_digest, find_images, os_reason
from sdvae.errors import ConfigError, ImageError


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


def test_the_digest_of_a_file_is_of_its_bytes(tree: Path) -> None:
    assert file_digest(tree / "b.jpg") == "sha256:" + hashlib.sha256(b"b.jpg").hexdigest()


def test_the_digest_of_what_cannot_be_read_is_an_image_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"missing\.jpg: no such file"):
        file_digest(tmp_path / "missing.jpg")
    with pytest.raises(ImageError, match="is a folder"):
        file_digest(tmp_path)
    assert os_reason(PermissionError(13, "Permission denied")) == "permission denied"


def test_suffixes_are_lower_case_with_a_dot() -> None:
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in IMAGE_SUFFIXES)
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".ppm"} <= IMAGE_SUFFIXES
