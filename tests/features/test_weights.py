"""Where frozen weights come from. Downloads are from a server of this process; nothing leaves the machine."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdvae.errors import CheckpointError, MissingWeightsError
from sdvae.features import weights
from sdvae.features.weights import KNOWN_WEIGHTS, find_weights, load_weights

NAME = "vgg16-397923af.pth"
SHAPES = {"features.0.weight": torch.Size([2, 3]), "features.0.bias": torch.Size([2])}


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def place(folder: Path, name: str = NAME) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"")
    return folder / name


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache, no search path, no network: its checkpoints folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("SDVAE_WEIGHTS", raising=False)
    return tmp_path / "torch" / "hub" / "checkpoints"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder behind HTTP, from which vgg16 is downloaded as `fresh-<hash>.pth`."""
    folder = tmp_path / "served"
    folder.mkdir()
    torch.save(tensors(), folder / "weights.pth")
    digest = hashlib.sha256((folder / "weights.pth").read_bytes()).hexdigest()[:8]
    file = (folder / "weights.pth").rename(folder / f"fresh-{digest}.pth")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/{file.name}"
        monkeypatch.setitem(KNOWN_WEIGHTS, "vgg16", replace(KNOWN_WEIGHTS["vgg16"], url=url))
        monkeypatch.delenv("HF_HUB_OFFLINE")
        yield file
        server.shutdown()
        thread.join()


def test_the_search_goes_from_the_explicit_path_over_the_variable_to_the_cache(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = place(hub)
    assert find_weights("vgg16") == cached
    second, first = place(tmp_path / "second"), place(tmp_path / "first", "vgg16_features_fp16.safetensors")
    monkeypatch.setenv(
        "SDVAE_WEIGHTS", os.pathsep.join(map(str, (tmp_path / "absent", tmp_path, first.parent, second.parent)))
    )
    assert find_weights("vgg16") == first
    monkeypatch.setenv("SDVAE_WEIGHTS", str(second))
    assert find_weights("vgg16") == second
    renamed = place(tmp_path / "explicit", "mine.pth")
    assert find_weights("vgg16", renamed) == renamed
    assert find_weights("vgg16", first.parent) == first


def test_a_file_in_the_variable_serves_only_the_network_whose_name_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDVAE_WEIGHTS", str(place(tmp_path)))
    with pytest.raises(MissingWeightsError, match="a file of another name"):
        find_weights("alexnet")


def test_a_folder_with_several_files_gives_the_full_precision_one(tmp_path: Path) -> None:
    place(tmp_path, "vgg16_features_fp16.safetensors")
    assert find_weights("vgg16", tmp_path).name == "vgg16_features_fp16.safetensors"
    full = place(tmp_path)
    assert find_weights("vgg16", tmp_path) == full


def test_missing_weights_are_told_with_every_place_and_every_way(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDVAE_WEIGHTS", f"{tmp_path / 'one'}{os.pathsep}{tmp_path}")
    with pytest.raises(MissingWeightsError) as caught:
        find_weights("vgg16", option="the.option", without="`the.weight=0` does without")
    message = str(caught.value)
    url = f"https://download.pytorch.org/models/{NAME}"
    for expected in (
        f"$SDVAE_WEIGHTS, {tmp_path / 'one'}: not there",
        f"$SDVAE_WEIGHTS, {tmp_path}: holds none of {NAME}",
        f"torch hub's cache, {hub}: not there",
        f"{url}: not asked, HF_HUB_OFFLINE is set",
        "the.option: set it to",
        f"fetch {url} (528 MB) to {hub / NAME}",
        "`the.weight=0` does without",
    ):
        assert expected in message, message
    monkeypatch.delenv("SDVAE_WEIGHTS")
    with pytest.raises(MissingWeightsError, match=r"\$SDVAE_WEIGHTS: not set"):
        find_weights("vgg16")


def test_an_explicit_path_that_does_not_serve_is_an_error_even_if_the_cache_would_serve(
    tmp_path: Path, hub: Path
) -> None:
    place(hub)
    for path, reason in ((tmp_path / "absent.pth", "not there"), (tmp_path, "holds none of")):
        with pytest.raises(MissingWeightsError, match=f"the.option = {path}: {reason}"):
            find_weights("vgg16", path, option="the.option")


def test_a_download_lands_in_the_cache_and_is_found_there_afterwards(served: Path, hub: Path) -> None:
    with pytest.raises(MissingWeightsError, match="not allowed here"):
        find_weights("vgg16", allow_download=False)
    path = find_weights("vgg16")
    assert path == hub / served.name and path.read_bytes() == served.read_bytes()
    served.unlink()
    assert find_weights("vgg16") == path


def test_a_download_with_another_hash_is_refused_and_leaves_nothing(served: Path, hub: Path) -> None:
    served.write_bytes(served.read_bytes()[:-1] + b"!")
    with pytest.raises(MissingWeightsError, match="invalid hash value"):
        find_weights("vgg16")
    assert list(hub.iterdir()) == []


def test_a_server_without_the_file_is_named(served: Path, hub: Path) -> None:
    served.unlink()
    with pytest.raises(MissingWeightsError, match=f"{served.name}: HTTPError: .*404"):
        find_weights("vgg16")


def test_a_server_that_says_nothing_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/{NAME}"
        monkeypatch.setitem(KNOWN_WEIGHTS, "vgg16", replace(KNOWN_WEIGHTS["vgg16"], url=url))
        monkeypatch.setattr(weights, "_TIMEOUT_S", 0.2)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        start = time.monotonic()
        with pytest.raises(MissingWeightsError, match="[Tt]ime"):
            find_weights("vgg16")
        assert time.monotonic() - start < 5
    assert socket.getdefaulttimeout() is None


def test_every_published_name_carries_its_hash() -> None:
    for known in KNOWN_WEIGHTS.values():
        assert len(known.sha256_prefix) == 8 and int(known.sha256_prefix, 16)


@pytest.mark.parametrize("name", ["full.pth", "half.safetensors"])
def test_files_of_both_kinds_load_as_float32_without_what_is_not_asked_for(tmp_path: Path, name: str) -> None:
    content = tensors()
    if name == "full.pth":
        torch.save(content | {"classifier.0.weight": torch.zeros(5)}, tmp_path / name)
    else:
        content = {key: tensor.half() for key, tensor in content.items()}
        save_file(content, tmp_path / name)
    loaded = load_weights(tmp_path / name, SHAPES)
    assert loaded.keys() == SHAPES.keys()
    for key, tensor in loaded.items():
        torch.testing.assert_close(tensor, content[key].float(), rtol=0, atol=0)


def test_tensors_that_do_not_fit_are_named_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    save_file({"features.0.weight": torch.zeros(2, 4), "other": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError) as caught:
        load_weights(path, SHAPES)
    for expected in (str(path), "1 tensors missing (features.0.bias (2,))", "file (2, 4), expected (2, 3)", "other"):
        assert expected in str(caught.value)


def test_values_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    save_file(tensors() | {"features.0.bias": torch.tensor([1.0, torch.nan])}, tmp_path / "nan.safetensors")
    with pytest.raises(CheckpointError, match=r"not finite \(features.0.bias\)"):
        load_weights(tmp_path / "nan.safetensors", SHAPES)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_damaged_file_is_a_checkpoint_error(tmp_path: Path, suffix: str) -> None:
    whole, path = tmp_path / "whole.pth", tmp_path / f"cut{suffix}"
    torch.save(tensors(), whole)
    path.write_bytes(whole.read_bytes()[:300])
    with pytest.raises(CheckpointError, match=f"{path.name}.*damaged"):
        load_weights(path, SHAPES)


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pth", tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return Path.touch, (trace,)

    torch.save({"features.0.weight": Evil()}, path)
    with pytest.raises(CheckpointError, match="could run code"):
        load_weights(path, SHAPES)
    assert not trace.exists()


def test_a_pickle_of_something_else_is_a_checkpoint_error(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="expected a dict of tensors"):
        load_weights(tmp_path / "list.pth", SHAPES)
