"""What is there is looked at once: planning opens each latent, mark and image no more often than it has to."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sdvae.checkpoints.opened import OpenedVae
from sdvae.codec.options import DecodeOptions, EncodeOptions
from sdvae.codec.planning import decode, plan
from sdvae.codec.run import DecodeRun, EncodeRun, decode_folder, encode_folder

MakeImages = Callable[[Path, Mapping[str, tuple[int, int]]], Path]
OPENED: Counter[str] = Counter()  # by path, of all files that Python opens


def count_opens(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str):
        OPENED[arguments[0]] += 1


sys.addaudithook(count_opens)  # cannot be removed


def counted(function: Callable[[Path], Any], calls: Counter[str]) -> Callable[[Path], Any]:
    def call(path: Path) -> Any:
        calls[path.name] += 1
        return function(path)

    return call


NAMES = ["a.jpg", "a.png", "b.png"]


@pytest.fixture
def images(tmp_path: Path, make_images: MakeImages) -> Path:
    return make_images(tmp_path / "images", dict.fromkeys(NAMES, (16, 16)))


def test_encoding_reads_an_image_once_and_a_rerun_not_at_all(
    tmp_path: Path, images: Path, opened_vae: OpenedVae
) -> None:
    OPENED.clear()
    encode_folder(images, tmp_path / "latents", opened_vae, EncodeOptions(size=8))
    assert [OPENED[str(images / name)] for name in NAMES] == [1, 1, 1]
    OPENED.clear()
    assert encode_folder(images, tmp_path / "latents", opened_vae, EncodeOptions(size=8)).skipped == 3
    assert [OPENED[str(images / name)] for name in NAMES] == [0, 0, 0]


def test_a_rerun_reads_the_header_of_each_latent_once(
    tmp_path: Path, images: Path, opened_vae: OpenedVae, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_folder(images, tmp_path / "latents", opened_vae)
    calls: Counter[str] = Counter()
    monkeypatch.setattr(plan, "read_header", counted(plan.read_header, calls))
    found = EncodeRun(images, tmp_path / "latents", opened_vae).plan
    assert len(found.skips) == 3
    assert calls == {f"{name}.safetensors": 1 for name in NAMES}


def test_a_rerun_of_decoding_reads_each_header_and_each_mark_once(
    tmp_path: Path, images: Path, opened_vae: OpenedVae, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode_folder(images, tmp_path / "latents", opened_vae)
    decode_folder(tmp_path / "latents", tmp_path / "out", opened_vae)
    headers: Counter[str] = Counter()
    marks: Counter[str] = Counter()
    monkeypatch.setattr(plan, "read_header", counted(plan.read_header, headers))
    monkeypatch.setattr(decode, "read_mark", counted(decode.read_mark, marks))
    found = DecodeRun(tmp_path / "latents", tmp_path / "out", opened_vae, DecodeOptions()).plan
    assert len(found.skips) == 3
    assert headers == {f"{name}.safetensors": 1 for name in NAMES}
    assert {path.name for path in (tmp_path / "out").iterdir()} <= marks.keys() and set(marks.values()) == {1}


def test_a_latent_seen_from_another_folder_is_still_up_to_date(
    tmp_path: Path, make_images: MakeImages, opened_vae: OpenedVae
) -> None:
    images = make_images(tmp_path / "images", {"sub/a.png": (16, 16)})
    encode_folder(images, tmp_path / "latents", opened_vae)
    found = EncodeRun(images / "sub", tmp_path / "latents/sub", opened_vae).plan
    assert [item.action for item in found.items] == ["skip"]
