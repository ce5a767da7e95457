"""Notes in config.json and in the header of weights files: diffusers passes over them, and the two never disagree."""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sdvae.checkpoints.fit import autoencoder_digest
from sdvae.checkpoints.notes import (
    HEADER_KEY,
    NOTES_FIELD,
    config_to_update,
    from_metadata,
    header_metadata,
    notes_of,
    update_config,
)
from sdvae.checkpoints.store import load_autoencoder
from sdvae.errors import CheckpointError, ConfigError

WEIGHTS = "diffusion_pytorch_model.safetensors"
NOTES: dict[str, Any] = {
    "source_digest": "sha256:00",
    "source": "ünïcode/vae",
    "license": "mit",
    "calibration": {"num_images": 3, "standard_errors": {"scaling_factor": 0.01}},
    "previous": [{"scaling_factor": 0.18215}],
    "rewrites": ["folded"],
}
MakeVae = Callable[..., Path]


def config_of(folder: Path) -> dict[str, Any]:
    data = json.loads((folder / "config.json").read_text())
    assert isinstance(data, dict)
    return data


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def write_header(path: Path, metadata: dict[str, str]) -> None:
    save_file({name: tensor.clone() for name, tensor in load_file(path).items()}, path, metadata=metadata)


# ---------------------------------------------------------------------------------------------------------- the formats


def test_diffusers_and_sdvae_load_a_config_with_notes_and_neither_warns(
    make_vae: MakeVae, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = make_vae()
    plain = autoencoder_digest(load_autoencoder(folder))
    update_config(folder, {"scaling_factor": 0.3}, NOTES)
    config = config_of(folder)
    assert config[NOTES_FIELD] == NOTES and config["scaling_factor"] == 0.3
    before = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_warning()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            stock = diffusers.AutoencoderKL.from_pretrained(folder)
            built = diffusers.AutoencoderKL.from_config(config)
            ours = load_autoencoder(folder)
    finally:
        diffusers.utils.logging.set_verbosity(before)
    said = capfd.readouterr()
    assert NOTES_FIELD not in said.err + said.out and "not expected" not in said.err + said.out
    assert stock.config.scaling_factor == built.config.scaling_factor == ours.config.scaling_factor == 0.3
    update_config(folder, {"scaling_factor": 0.18215}, {})
    assert autoencoder_digest(load_autoencoder(folder)) == plain  # notes are no part of a VAE's identity


def test_a_pipeline_folder_takes_an_update_in_its_vae_and_loads(make_vae: MakeVae, tmp_path: Path) -> None:
    pipeline = tmp_path / "pipeline"
    scheduler = diffusers.DDIMScheduler()
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    vae = diffusers.AutoencoderKL.from_pretrained(make_vae())
    diffusers.LDMPipeline(vqvae=vae, unet=unet, scheduler=scheduler).save_pretrained(pipeline)
    (pipeline / "vqvae").rename(pipeline / "vae")
    update_config(pipeline, {"scaling_factor": 0.25}, NOTES)
    assert not (pipeline / "config.json").exists()
    (pipeline / "vae").rename(pipeline / "vqvae")
    loaded = diffusers.LDMPipeline.from_pretrained(pipeline)
    assert loaded.vqvae.config.scaling_factor == 0.25


def test_header_and_metadata_are_inverses(make_vae: MakeVae) -> None:
    config = config_of(make_vae())
    metadata = header_metadata(config, NOTES)
    assert metadata.keys() == {"format", HEADER_KEY} and metadata["format"] == "pt"
    assert all(isinstance(value, str) for value in metadata.values())
    fields, notes = from_metadata(metadata)
    assert notes == NOTES
    assert fields == {name: value for name, value in config.items() if not name.startswith("_")}
    assert from_metadata(header_metadata({}, {})) == ({}, {})


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"format": "sdvae-latent", HEADER_KEY: '{"vae": 1}'}])
def test_a_header_that_is_not_ours_says_nothing(metadata: dict[str, str] | None) -> None:
    assert from_metadata(metadata) == ({}, {})


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"config": []}', "{}", '{"config": {}, "previous": {}}', '{"config": {}, "rewrites": [1]}']
)
def test_a_damaged_header_is_an_error_that_names_it(text: str) -> None:
    with pytest.raises(CheckpointError, match=HEADER_KEY):
        from_metadata({"format": "pt", HEADER_KEY: text})


def test_unknown_notes_stay_and_known_ones_have_their_type() -> None:
    notes = {"of_a_later_version": {"a": [1, None]}, "source": "x"}
    assert from_metadata(header_metadata({}, notes)) == ({}, notes)
    assert notes_of({NOTES_FIELD: notes}) == notes and notes_of({}) == {}
    for wrong in ([], {"source": 3}, {"previous": {"a": 1}}, {"previous": ["a"]}, {"config": {}}):
        with pytest.raises(CheckpointError, match=NOTES_FIELD):
            notes_of({NOTES_FIELD: wrong})
    with pytest.raises(ValueError):
        header_metadata({"scaling_factor": float("nan")}, {})


# ------------------------------------------------------------------------------------------------------------- updating


def test_an_update_without_a_carrier_replaces_config_json_alone(make_vae: MakeVae) -> None:
    folder = make_vae()
    before, weights = config_of(folder), (folder / WEIGHTS).stat()
    update_config(folder, {"scaling_factor": 0.5, "shift_factor": -0.25}, {"license": "mit"})
    update_config(folder, {}, {"source": "x"})
    after = config_of(folder)
    assert after.pop(NOTES_FIELD) == {"license": "mit", "source": "x"}
    assert after == before | {"scaling_factor": 0.5, "shift_factor": -0.25}
    assert (folder / WEIGHTS).stat().st_ino == weights.st_ino
    assert sorted(os.listdir(folder)) == ["config.json", WEIGHTS]


def test_headers_that_carry_the_configuration_say_the_same_afterwards(make_vae: MakeVae) -> None:
    folder = make_vae()
    config = config_of(folder)
    write_header(folder / WEIGHTS, header_metadata(config, {"source": "x"}) | {"other": "kept"})
    variant = folder / "diffusion_pytorch_model.fp16.safetensors"
    save_file({"a": torch.arange(5, dtype=torch.float16)}, variant, metadata={"format": "pt"})
    (folder / "README.md").write_text("a card")
    (folder / "images").mkdir()
    (folder / "images/a.txt").write_text("a")
    (folder / "link").symlink_to("images/a.txt")
    (folder / "linked").symlink_to("images")
    tensors, other = load_file(folder / WEIGHTS), variant.read_bytes()
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}

    update_config(folder, {"scaling_factor": 0.5}, {"source": "x", "license": "mit"})

    fields, notes = from_metadata(metadata_of(folder / WEIGHTS))
    assert fields["scaling_factor"] == config_of(folder)["scaling_factor"] == 0.5
    assert notes == config_of(folder)[NOTES_FIELD] == {"source": "x", "license": "mit"}
    assert fields == {name: value for name, value in config_of(folder).items() if not name.startswith("_")}
    assert metadata_of(folder / WEIGHTS)["other"] == "kept"
    after = load_file(folder / WEIGHTS)
    assert after.keys() == tensors.keys() and all(torch.equal(after[name], tensors[name]) for name in tensors)
    assert variant.read_bytes() == other  # a file without our header is not touched
    assert (folder / "README.md").read_text() == "a card" and (folder / "link").read_text() == "a"
    assert (folder / "link").is_symlink() and (folder / "linked").is_symlink()
    assert sorted(os.listdir(folder.parent)) == [folder.name]
    assert load_autoencoder(folder).config.scaling_factor == 0.5


def test_every_shard_that_carries_the_configuration_is_updated(make_vae: MakeVae) -> None:
    folder = make_vae()
    stock = diffusers.AutoencoderKL.from_pretrained(folder)
    (folder / WEIGHTS).unlink()
    stock.save_pretrained(folder, max_shard_size="60KB")
    shards = sorted(folder.glob("*-of-*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        write_header(shard, header_metadata(config_of(folder), {}))
    plain = load_autoencoder(folder).state_dict()
    update_config(folder, {"scaling_factor": 0.5}, {})
    assert [from_metadata(metadata_of(shard))[0]["scaling_factor"] for shard in shards] == [0.5] * len(shards)
    after = load_autoencoder(folder).state_dict()
    assert all(torch.equal(after[name], plain[name]) for name in plain)


def test_a_failure_on_the_way_leaves_the_folder_as_it_was(make_vae: MakeVae, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_vae()
    write_header(folder / WEIGHTS, header_metadata(config_of(folder), {}))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sdvae.checkpoints.notes.shutil.copyfileobj", full)
    with pytest.raises(CheckpointError, match="unchanged"):
        update_config(folder, {"scaling_factor": 0.5}, {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(folder.parent) == [folder.name]


@pytest.mark.skipif(os.name == "nt", reason="limits on the size of files are those of POSIX")
@pytest.mark.parametrize("size", [0, 64])  # bytes that can be written before the disk is full
def test_config_json_alone_is_whole_where_the_disk_is_full(make_vae: MakeVae, size: int) -> None:
    import resource

    folder = make_vae()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert len(before["config.json"]) > size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores the signal, so writing raises OSError
    try:
        with pytest.raises(CheckpointError, match=r"config\.json: cannot be written: .* unchanged"):
            update_config(folder, {"scaling_factor": 0.5}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(folder.parent) == [folder.name]


def test_config_json_alone_is_the_old_one_until_the_new_one_is_on_the_disk(
    make_vae: MakeVae, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_vae()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def broken(descriptor: int) -> None:
        assert (folder / "config.json").read_bytes() == before["config.json"]
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("sdvae.files.os.fsync", broken)
    with pytest.raises(CheckpointError, match="unchanged"):
        update_config(folder, {"scaling_factor": 0.5}, {})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_files_keep_their_permissions(make_vae: MakeVae) -> None:
    folder = make_vae()
    (folder / "config.json").chmod(0o664)
    update_config(folder, {"scaling_factor": 0.5}, {})
    assert stat.S_IMODE((folder / "config.json").stat().st_mode) == 0o664


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
@pytest.mark.parametrize("can_link", [True, False])
def test_private_files_stay_private_where_the_folder_is_replaced(
    make_vae: MakeVae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_link: bool
) -> None:
    folder = make_vae()
    write_header(folder / WEIGHTS, header_metadata(config_of(folder), {}))
    other = folder / "diffusion_pytorch_model.fp16.safetensors"
    save_file({"a": torch.arange(5, dtype=torch.float16)}, other, metadata={"format": "pt"})
    (folder / "notes.txt").write_text("for my eyes")
    modes = {"config.json": 0o600, WEIGHTS: 0o640, other.name: 0o600, "notes.txt": 0o400}
    for name, mode in modes.items():
        (folder / name).chmod(mode)
    elsewhere = tmp_path / "another name"
    os.link(other, elsewhere)

    if not can_link:  # as on a file system without hard links

        def fail(*_: object) -> None:
            raise OSError(95, "Operation not supported")

        monkeypatch.setattr("sdvae.checkpoints.notes.os.link", fail)
    update_config(folder, {"scaling_factor": 0.5}, {})

    assert from_metadata(metadata_of(folder / WEIGHTS))[0]["scaling_factor"] == 0.5
    assert {name: stat.S_IMODE((folder / name).stat().st_mode) for name in modes} == modes
    assert stat.S_IMODE(elsewhere.stat().st_mode) == 0o600


def test_a_weights_file_that_lies_about_its_header_is_an_error_and_nothing_changes(make_vae: MakeVae) -> None:
    folder = make_vae()
    before = (folder / "config.json").read_bytes()
    (folder / "other.safetensors").write_bytes((10**12).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=r"other\.safetensors"):
        update_config(folder, {"scaling_factor": 0.5}, {})
    assert (folder / "config.json").read_bytes() == before


def test_what_must_not_be_changed_is_refused_with_what_to_do(make_vae: MakeVae, tmp_path: Path) -> None:
    folder = make_vae()
    cached = tmp_path / "models--a--b" / "snapshots" / "0"
    cached.parent.mkdir(parents=True)
    folder.rename(cached)
    cases = {
        cached: "cache of the hub",
        cached / WEIGHTS: "single file",
        tmp_path / "nothing": "no folder",
        tmp_path: "no config.json",
    }
    for ref, reason in cases.items():
        with pytest.raises(ConfigError, match=rf"{reason}(.|\n)*sdvae convert"):
            config_to_update(ref)
    with pytest.raises(ConfigError, match="sdvae convert stabilityai/sd-vae-ft-mse DIR"):
        config_to_update("stabilityai/sd-vae-ft-mse")


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_refused(make_vae: MakeVae) -> None:
    folder = make_vae()
    folder.chmod(0o555)
    try:
        with pytest.raises(ConfigError, match="no permission"):
            config_to_update(folder)
    finally:
        folder.chmod(0o755)
