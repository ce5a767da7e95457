"""An image file says what it is of, and why it cannot be read."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from sdvae.data.sources.files import IMAGE_SUFFIXES, file_digest, os_reason
from sdvae.errors import ImageError


def test_the_digest_of_a_file_is_of_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_bytes(b"b.jpg")
    assert file_digest(tmp_path / "b.jpg") == "sha256:" + hashlib.sha256(b"b.jpg").hexdigest()


def test_the_digest_of_what_cannot_be_read_is_an_image_error(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"missing\.jpg: no such file"):
        file_digest(tmp_path / "missing.jpg")
    with pytest.raises(ImageError, match="is a folder"):
        file_digest(tmp_path)
    assert os_reason(PermissionError(13, "Permission denied")) == "permission denied"


def test_suffixes_are_lower_case_with_a_dot() -> None:
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in IMAGE_SUFFIXES)
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".avif", ".ppm"} <= IMAGE_SUFFIXES
