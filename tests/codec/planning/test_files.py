"""Outputs have one name each, the same in every run and in every part of one."""

from __future__ import annotations

from functools import partial

import pytest

from sdvae.codec.options import EncodeOptions
from sdvae.codec.planning.files import choose_names, folded, image_names, latent_names, own_keys, with_rivals
from sdvae.latents.parts import Part


def nobody(name: str) -> None:
    return None


def test_no_two_outputs_have_one_name_also_where_case_does_not_count() -> None:
    keys = ["A.jpg", "a.jpg", "a.png", "b/a.png"]
    names = choose_names(keys, keys, latent_names, nobody)
    assert names["A.jpg"] == "A.jpg.safetensors" and names["a.jpg"].startswith("a~")
    assert names["a.png"] == "a.png.safetensors" and names["b/a.png"] == "b/a.png.safetensors"
    assert len({folded(name) for name in names.values()}) == 4


def test_a_name_on_disk_stays_with_the_key_that_has_it() -> None:
    candidates = partial(image_names, suffix=".png")
    assert choose_names(["a.jpg", "a.png"], ["a.jpg", "a.png"], candidates, nobody) == {
        "a.jpg": "a.png",
        "a.png": "a.png.png",
    }
    owners = {"a.png": "a.png"}
    names = choose_names(["a.jpg", "a.png"], ["a.jpg", "a.png"], candidates, owners.get)
    assert names == {"a.jpg": "a.jpg.png", "a.png": "a.png"}


@pytest.mark.parametrize("count", [2, 3])
def test_the_parts_of_a_run_choose_the_names_of_the_whole(count: int) -> None:
    keys = sorted(f"{stem}.{suffix}" for stem in "abcdeABC" for suffix in ("jpg", "png", "webp"))
    candidates = partial(image_names, suffix=".png")
    whole = choose_names(keys, keys, candidates, nobody)
    found: dict[str, str] = {}
    for part in Part(1, count).all():
        own = own_keys(keys, EncodeOptions(shard=str(part)))
        names = choose_names(keys, own, candidates, nobody)
        assert own <= names.keys()
        found |= {key: names[key] for key in own}
    assert found == whole


def test_a_part_looks_at_rivals_of_its_own_keys_alone() -> None:
    candidates = partial(image_names, suffix=".png")
    assert with_rivals(["a.jpg", "a.png", "b.jpg"], {"a.png"}, candidates) == ["a.jpg", "a.png"]
