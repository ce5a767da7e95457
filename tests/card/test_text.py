"""Text from elsewhere in a model card: without folders of this machine, and without effect as Markdown or HTML."""

from __future__ import annotations

import pytest

from sdvae.card.text import cell, public_text, published


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/me/photos", "photos"),
        ("~/photos/", "photos"),
        ("../photos", "photos"),
        ("./a/photos.txt", "photos.txt"),
        (r"C:\Users\me\photos", "photos"),
        ("d:/me/photos", "photos"),
        (r"\\server\share\me\photos", "photos"),
        ("stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-mse"),  # an id of the hub is no path of this machine
        ("hf://datasets/org/name", "hf://datasets/org/name"),
        ("val/psnr", "val/psnr"),
        ("a: b", "a: b"),
    ],
)
def test_of_a_path_the_last_name_is_left_and_other_text_stays(text: str, shown: str) -> None:
    assert public_text(text) == shown


def test_paths_are_found_at_any_depth_of_the_settings_and_keys_and_numbers_stay() -> None:
    settings = {"path": "/a/b", "more": ["/c/d", {"e": "~/f"}], "steps": 3, "none": None, "/g/h": True}
    expected = {"path": "b", "more": ["d", {"e": "f"}], "steps": 3, "none": None, "/g/h": True}
    assert published(settings) == expected


def test_a_cell_is_one_line_without_markup() -> None:
    assert cell("a | b\n  <i> & c") == r"a \| b &lt;i&gt; &amp; c"
    assert cell(3) == "3"
