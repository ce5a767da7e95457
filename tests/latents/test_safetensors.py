"""The latent file: what is written is read, and what is damaged is named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sdvae.errors import LatentFileError
from sdvae.latents.header import (
    LatentHeader,
    Padding,
    Preprocessing,
    Size,
    SourceRecord,
    VaeRecord,
    is_latent_file,
    read_header,
)
from sdvae.latents.safetensors import LatentFile


def header(**changes: object) -> LatentHeader:
    full = LatentHeader(
        space="moments",
        store="moments",
        latent_dtype="float32",
        seed=None,
        source=SourceRecord(
            key="sub/a.jpg", digest="sha256:00", size_bytes=9, mtime_ns=1795363908741071399, width=101, height=67
        ),
        image=Size(width=20, height=13),
        padding=Padding(top=0, left=0, bottom=3, right=4),
        preprocessing=Preprocessing(version=1, background="white", size=13, crop="none"),
        vae=VaeRecord(
            name="my-vae",
            digest="sha256:11",
            dtype="float32",
            spatial_compression_ratio=8,
            scaling_factor=0.5,
            shift_factor=0.25,
        ),
        notes=("animated: first of 6 frames",),
        sdvae_version="0.1.0",
    )
    return replace(full, **changes)  # type: ignore[arg-type]


def latent_file(**changes: object) -> LatentFile:
    torch.manual_seed(0)
    tensors = {"mean": torch.randn(4, 2, 3), "logvar": torch.randn(4, 2, 3)}
    return LatentFile(header=header(**changes), tensors=tensors)


def rewrite_header(path: Path, **changes: object) -> None:
    """Change fields of the JSON in a file, as a later version or a careless hand would."""
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    data = json.loads(metadata["sdvae"])
    for name, value in changes.items():
        if value is None:
            del data[name]
        else:
            data[name] = value
    save_file(tensors, path, metadata={**metadata, "sdvae": json.dumps(data)})


def test_what_is_written_is_read_back_equal(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "a.jpg.safetensors"
    written = latent_file()
    written.write(path)
    read = LatentFile.read(path)
    assert read.header == written.header == read_header(path)
    assert read.tensors.keys() == {"mean", "logvar"}
    for name, tensor in written.tensors.items():
        assert torch.equal(read.tensors[name], tensor)
    assert [entry.name for entry in path.parent.iterdir()] == ["a.jpg.safetensors"]
    assert is_latent_file(path)


def test_a_key_that_is_no_utf8_survives(tmp_path: Path) -> None:
    source = replace(header().source, key=b"caf\xe9.jpg".decode("utf-8", "surrogateescape"))
    latent_file(source=source).write(tmp_path / "x.safetensors")
    assert read_header(tmp_path / "x.safetensors").source.key == source.key


def test_latents_are_shifted_and_scaled_and_z_is_not() -> None:
    file = latent_file()
    assert torch.equal(file.z(), file.tensors["mean"])
    assert torch.equal(file.latents(), (file.tensors["mean"] - 0.25) * 0.5)


STATISTICS = {"latents_mean": (0.5, -1.0, 0.0, 2.0), "latents_std": (2.0, 0.5, 1.0, 4.0)}


def vae_with(**changes: object) -> VaeRecord:
    return replace(header().vae, **changes)  # type: ignore[arg-type]


def test_latents_of_a_vae_with_statistics_are_those_of_sdxl_pipelines(tmp_path: Path) -> None:
    latent_file(vae=vae_with(**STATISTICS)).write(tmp_path / "a.safetensors")
    file = LatentFile.read(tmp_path / "a.safetensors")
    assert (file.header.vae.latents_mean, file.header.vae.latents_std) == tuple(STATISTICS.values())
    # as StableDiffusionXLImg2ImgPipeline.prepare_latents writes it, with a batch dimension; shift_factor is not read
    mean, std = (torch.tensor(values).view(1, 4, 1, 1) for values in STATISTICS.values())
    expected = (file.z()[None] - mean) * 0.5 / std
    torch.testing.assert_close(file.latents()[None], expected, atol=0, rtol=1e-6)


@pytest.mark.parametrize("given", STATISTICS)
def test_one_of_the_statistics_alone_does_not_count(given: str) -> None:
    file = latent_file(vae=vae_with(**{given: STATISTICS[given]}))
    assert torch.equal(file.latents(), (file.z() - 0.25) * 0.5)


def test_statistics_for_another_number_of_channels_are_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    latent_file(vae=vae_with(latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16)).write(path)
    with pytest.raises(LatentFileError, match=r"a.safetensors: .*4 channels, but vae.latents_mean has 16 values"):
        LatentFile.read(path)


OLD_HEADER = """{"format_version": 1, "space": "moments", "store": "moments", "latent_dtype": "float32", "seed": null,
"source": {"key": "sub/a.jpg", "digest": "sha256:00", "size_bytes": 9, "mtime_ns": 1795363908741071399, "width": 101,
"height": 67}, "image": {"width": 20, "height": 13}, "padding": {"top": 0, "left": 0, "bottom": 3, "right": 4},
"preprocessing": {"version": 1, "background": "white", "size": 13, "crop": "none", "digest":
"sha256:06ade8f1"}, "vae": {"name": "my-vae", "digest": "sha256:11", "dtype": "float32",
"spatial_compression_ratio": 8, "scaling_factor": 0.5, "shift_factor": 0.25}, "notes": ["animated: first of 6 frames"],
"sdvae_version": "0.1.0"}"""
# What the marks of decoded images hold.
OLD_DIGEST = "sha256:cad1df752daf7d17ab64ff197d46bc25a3a092d17f38a1c1f67de5ceb73e9a0d"


def test_a_file_of_before_the_statistics_reads_as_one_without_them(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = dict(latent_file().tensors)
    save_file(tensors, path, metadata={"format": "sdvae-latent", "sdvae": OLD_HEADER})
    file = LatentFile.read(path)
    assert file.header == header() and file.header.vae.latents_mean is None and file.header.vae.latents_std is None
    assert torch.equal(file.latents(), (tensors["mean"] - 0.25) * 0.5)
    assert file.header.latent_digest == OLD_DIGEST


def test_a_draw_has_the_mean_and_the_spread_of_the_posterior() -> None:
    file = LatentFile(
        header=header(), tensors={"mean": torch.full((4, 2, 3), 3.0), "logvar": torch.full((4, 2, 3), -2.0)}
    )
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([file.z(generator) for _ in range(500)])
    assert abs(draws.mean() - 3.0) < 0.02
    assert abs(draws.std() - torch.tensor(-1.0).exp()) < 0.01


def test_a_value_that_the_dtype_cannot_hold_is_an_error_and_leaves_no_file(tmp_path: Path) -> None:
    tensors = {"mean": torch.full((4, 2, 3), 1e5).half(), "logvar": torch.zeros(4, 2, 3).half()}
    with pytest.raises(LatentFileError, match=r"mean is not finite in float16; .*float32"):
        LatentFile(header=header(latent_dtype="float16"), tensors=tensors).write(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": 2}, "format version 2; this sdvae reads versions up to 1: upgrade"),
        ({"space": "moment"}, "space is 'moment'"),
        ({"space": "z"}, "holds the tensors|space is 'z', but store"),
        ({"seed": "0"}, "seed is '0'; expected int"),
        ({"vae": {"name": "x"}}, "vae has no digest, dtype"),
        ({"vae": None}, "the header has no vae"),
        ({"image": {"width": 200, "height": 13}}, r"has shape \(4, 2, 3\)"),
    ],
)
def test_a_wrong_header_is_named(tmp_path: Path, changes: dict[str, object], reason: str) -> None:
    path = tmp_path / "a.safetensors"
    latent_file().write(path)
    rewrite_header(path, **changes)
    with pytest.raises(LatentFileError, match=reason) as caught:
        LatentFile.read(path)
    assert str(path) in str(caught.value)


def test_fields_of_a_later_writer_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    latent_file().write(path)
    rewrite_header(path, mood="cheerful")
    assert read_header(path) == header()


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_file_that_is_cut_off_is_an_error_already_when_planning(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "a.safetensors"
    latent_file().write(path)
    path.write_bytes(path.read_bytes()[:kept])
    for read in (read_header, LatentFile.read):
        with pytest.raises(LatentFileError, match="cannot be read as a latent file"):
            read(path)


def test_weights_are_no_latent_file(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file({"encoder.conv_in.weight": torch.zeros(1)}, path, metadata={"format": "pt"})
    assert not is_latent_file(path)
    with pytest.raises(LatentFileError, match="no latent file of sdvae"):
        read_header(path)


def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    latent_file().write(path)
    save_file(
        {"mean": torch.full((4, 2, 3), float("nan")), "logvar": torch.zeros(4, 2, 3)},
        path,
        metadata=header().to_metadata(),
    )
    with pytest.raises(LatentFileError, match="mean has values that are not finite"):
        LatentFile.read(path)


def test_the_latent_digest_follows_the_content_and_not_the_copy() -> None:
    first = header()
    touched = replace(first, source=replace(first.source, mtime_ns=5), sdvae_version="9")
    other_bytes = replace(first, source=replace(first.source, digest="sha256:22"))
    other_store = replace(first, space="z", store="mode")
    assert touched.latent_digest == first.latent_digest
    assert len({first.latent_digest, other_bytes.latent_digest, other_store.latent_digest}) == 3
