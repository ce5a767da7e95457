from __future__ import annotations

import hashlib
import http.server
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdvae import files
from sdvae.checkpoints import read
from sdvae.checkpoints.fit import autoencoder_digest
from sdvae.checkpoints.read import load_network
from sdvae.checkpoints.store import load_autoencoder, save_autoencoder, to_diffusers
from sdvae.errors import CheckpointError, ConfigError, MissingWeightsError, NothingThereError, OutputExistsError
from sdvae.model.autoencoder import AutoencoderKL

from diffusers import AutoencoderKL as StockAutoencoderKL  # isort: skip  # after the repair of torchvision

WEIGHTS = "diffusion_pytorch_model.safetensors"


def fields(*widths: int, **others: Any) -> dict[str, Any]:
    n = len(widths)
    types = {"down_block_types": ("DownEncoderBlock2D",) * n, "up_block_types": ("UpDecoderBlock2D",) * n}
    return types | {"block_out_channels": widths, "norm_num_groups": 4, "sample_size": 32} | others


LAYOUTS = {
    "sd": fields(8, 16, layers_per_block=2),
    "flux": fields(
        8,
        8,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    ),
    "no attention": fields(8, 16, 16, mid_block_add_attention=False),
    "one level": fields(8, latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0]),
}


def make(cls: type = AutoencoderKL, seed: int = 0, **config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(**(config or LAYOUTS["sd"])).eval()


def same_weights(one: Any, other: Any) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def edit_config(folder: Path, **changes: Any) -> None:
    """Set fields of a saved config; a value of ... removes the field."""
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(
        json.dumps({field: value for field, value in config.items() if value is not ...})
    )


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def error_of(ref: Any, kind: type[Exception] = CheckpointError, **arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_autoencoder(ref, **arguments)
    assert type(caught.value) is kind
    return str(caught.value)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A VAE folder as diffusers writes it."""
    make(StockAutoencoderKL).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


# Both classes load what the other saved


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_class_loads_strictly_what_the_other_saved(tmp_path: Path, layout: str) -> None:
    stock = make(StockAutoencoderKL, **LAYOUTS[layout])
    stock.save_pretrained(tmp_path / "stock")
    ours = load_autoencoder(tmp_path / "stock")
    assert same_weights(ours, stock)
    assert not ours.training
    assert not any(tensor.is_meta for tensor in [*ours.parameters(), *ours.buffers()])
    assert all(parameter.requires_grad for parameter in ours.parameters())

    assert save_autoencoder(ours, tmp_path / "ours") == tmp_path / "ours"
    again, info = StockAutoencoderKL.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    assert same_weights(again, stock)
    theirs, own = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("stock", "ours"))
    assert own == theirs


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_network_on_its_own_is_saved_handed_over_and_identified_as_in_its_shell(
    tmp_path: Path, layout: str
) -> None:
    save_autoencoder(make(**LAYOUTS[layout]), tmp_path / "vae")
    network, shell = load_network(tmp_path / "vae"), load_autoencoder(tmp_path / "vae")
    assert same_weights(network, shell) and not network.training
    stock = to_diffusers(network)
    assert type(stock) is StockAutoencoderKL and same_weights(stock, shell)
    assert len({autoencoder_digest(model) for model in (network, shell, stock)}) == 1
    for name, model in {"network": network, "shell": shell, "stock": stock}.items():
        save_autoencoder(model, tmp_path / name)
    for file in ("config.json", WEIGHTS):
        assert len({(tmp_path / name / file).read_bytes() for name in ("vae", "network", "shell", "stock")}) == 1


def test_a_loaded_model_computes_what_the_stock_class_computes(saved: Path) -> None:
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        ours, stock = (
            model(x).sample for model in (load_autoencoder(saved), StockAutoencoderKL.from_pretrained(saved))
        )
    assert torch.allclose(ours, stock, atol=1e-5)


# Where the files lie


@pytest.mark.parametrize("safe", [True, False])
def test_sharded_weights_load(tmp_path: Path, safe: bool) -> None:
    stock = make(StockAutoencoderKL)
    stock.save_pretrained(tmp_path, max_shard_size="20KB", safe_serialization=safe)
    assert len(list(tmp_path.glob("*-of-*"))) > 1
    assert same_weights(load_autoencoder(tmp_path), stock)


def test_a_folder_with_only_a_pickle_or_only_a_variant_loads(tmp_path: Path) -> None:
    stock = make(StockAutoencoderKL)
    stock.save_pretrained(tmp_path / "bin", safe_serialization=False)
    stock.save_pretrained(tmp_path / "ema", variant="ema")
    assert not (tmp_path / "ema" / WEIGHTS).exists()
    for name in ("bin", "ema"):
        assert same_weights(load_autoencoder(tmp_path / name), stock)


def test_half_precision_files_load_as_float32_and_dtype_is_obeyed(tmp_path: Path) -> None:
    stock = make(StockAutoencoderKL).half()
    stock.save_pretrained(tmp_path, variant="fp16")
    assert same_weights(load_autoencoder(tmp_path), stock.float())
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert {tensor.dtype for tensor in load_autoencoder(tmp_path, dtype=dtype).state_dict().values()} == {dtype}


def test_a_pipeline_folder_loads_by_its_vae_and_subfolder_chooses_another(tmp_path: Path) -> None:
    first, second = make(StockAutoencoderKL, seed=1), make(StockAutoencoderKL, seed=2)
    first.save_pretrained(tmp_path / "vae")
    second.save_pretrained(tmp_path / "ema")
    assert same_weights(load_autoencoder(tmp_path), first)
    assert same_weights(load_autoencoder(str(tmp_path), subfolder="ema"), second)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt", ".ckpt"])
def test_a_single_file_loads_with_its_config(saved: Path, tmp_path: Path, suffix: str) -> None:
    model = load_autoencoder(saved)
    file = tmp_path / "elsewhere" / f"my{suffix}"
    file.parent.mkdir()
    if suffix == ".safetensors":
        shutil.copy(saved / WEIGHTS, file)
    else:
        torch.save({"state_dict": model.state_dict(), "step": 3} if suffix == ".ckpt" else model.state_dict(), file)

    message = error_of(file)
    assert f"{file}: norm_num_groups cannot be seen in the tensors" in message
    assert "pass config=" in message
    for config in (saved, saved / "config.json", str(saved)):
        assert same_weights(load_autoencoder(file, config=config), model)
    assert "'nowhere': neither a file nor a folder with config.json" in error_of(file, config="nowhere")
    shutil.copy(saved / "config.json", file.parent)
    assert same_weights(load_autoencoder(str(file)), model)


def test_a_config_that_is_passed_replaces_the_one_beside_the_weights(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(saved, other)
    edit_config(other, scaling_factor=0.5)
    assert load_autoencoder(saved, config=other).config.scaling_factor == 0.5


def test_legacy_attention_names_load_but_not_both_generations_at_once(saved: Path) -> None:
    expected = load_autoencoder(saved)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            for name in [name for name in tensors if f".{new}." in name]:
                tensors[name.replace(new, old)] = tensors.pop(name)

    edit_weights(saved, rename)
    assert not any(".to_q." in name for name in load_file(saved / WEIGHTS))
    assert same_weights(load_autoencoder(saved), expected)

    key = "encoder.mid_block.attentions.0.to_q.weight"
    edit_weights(saved, lambda tensors: tensors.update({key: torch.zeros(16, 16)}))
    message = error_of(saved)
    assert "1 unexpected (encoder.mid_block.attentions.0.query.weight (16, 16))" in message


def test_loaded_weights_do_not_depend_on_the_file_any_more(saved: Path) -> None:
    model = load_autoencoder(saved)
    digest = autoencoder_digest(model)
    with (saved / WEIGHTS).open("rb+") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(bytes(4096))
    assert autoencoder_digest(model) == digest


# What is refused


def test_misfitting_keys_are_counted_and_the_first_three_named(saved: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("conv_in.bias", "conv_out.bias", "conv_norm_out.bias", "conv_norm_out.weight"):
            del tensors[f"encoder.{name}"]
        tensors["extra.a"] = tensors["extra.b"] = torch.zeros(3, 5)
        tensors["quant_conv.bias"] = torch.zeros(9)

    edit_weights(saved, lambda tensors: change(tensors) or tensors.update({"extra.b": torch.zeros(2)}))
    message = error_of(saved)
    assert (
        f"{saved / WEIGHTS}: the weights do not fit {saved / 'config.json'}: 4 missing (encoder.conv_in.bias (8,); "
        in message
    )
    assert message.count("encoder.conv_") == 3
    assert "; ...); 2 unexpected (extra.a (3, 5); extra.b (2,)); " in message
    assert "1 wrongly shaped (quant_conv.bias, file (9,), model (8,))" in message


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"layers_per_block": ...}, "layers_per_block is missing, so it is 1, the weights were made with 2"),
        ({"layers_per_block": 3}, "layers_per_block is 3, the weights were made with 2"),
        ({"latent_channels": 16}, "latent_channels is 16, the weights were made with 4"),
        ({"use_quant_conv": False}, "use_quant_conv is False, the weights were made with True"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention is False, the weights were made with True"),
        ({"block_out_channels": [8, 8]}, "block_out_channels is [8, 8], the weights were made with [8, 16]"),
        (
            {"block_out_channels": ...},
            "Fields that it lacks have their defaults: block_out_channels = (64,)",
        ),
        ({"down_block_types": ...}, "down_block_types = ('DownEncoderBlock2D',)"),
        ({"norm_num_groups": ...}, "norm_num_groups = 32"),
        ({"block_out_channels": "wide"}, "no autoencoder can be built"),
        ({"layer_per_block": 2}, "unknown field `layer_per_block`: did you mean `layers_per_block`?"),
        ({"pad_mode": "reflect"}, "unknown field `pad_mode`: known are in_channels, "),
        ({"_class_name": "AutoencoderTiny"}, "describes the class AutoencoderTiny; expected AutoencoderKL"),
    ],
)
def test_a_config_that_does_not_describe_the_weights_is_explained(
    saved: Path, changes: dict[str, Any], cause: str
) -> None:
    edit_config(saved, **changes)
    message = error_of(saved)
    assert str(saved / "config.json") in message
    assert cause in message


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe", b""])
def test_a_broken_config_is_named(saved: Path, content: bytes) -> None:
    (saved / "config.json").write_bytes(content)
    assert str(saved / "config.json") in error_of(saved)


def test_a_folder_without_config_says_what_no_tensor_shows(saved: Path) -> None:
    (saved / "config.json").unlink()
    assert "put the VAE's config.json beside the file" in error_of(saved)


def test_truncated_weights_are_named(saved: Path) -> None:
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[:-100])
    assert f"{saved / WEIGHTS}: damaged: the file has {len(whole) - 100} bytes" in error_of(saved)
    (saved / WEIGHTS).unlink()
    torch.save({"a": torch.zeros(2)}, saved / "diffusion_pytorch_model.bin")
    whole = (saved / "diffusion_pytorch_model.bin").read_bytes()
    (saved / "diffusion_pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    assert f"{saved / 'diffusion_pytorch_model.bin'}: refused, for it is damaged" in error_of(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(saved: Path, value: float) -> None:
    edit_weights(saved, lambda tensors: tensors["decoder.conv_out.bias"].__setitem__(1, value))
    assert error_of(saved).endswith(f"{WEIGHTS}: `decoder.conv_out.bias` has values that are not finite")


def test_weights_too_large_for_the_dtype_asked_for_are_named(saved: Path) -> None:
    edit_weights(saved, lambda tensors: tensors["decoder.conv_out.bias"].fill_(1e5))
    load_autoencoder(saved, dtype=torch.bfloat16)
    assert "`decoder.conv_out.bias` has values that are not finite after the cast to torch.float16" in error_of(
        saved, dtype=torch.float16
    )


def test_integer_weights_are_refused(saved: Path) -> None:
    edit_weights(saved, lambda tensors: tensors.update({"quant_conv.bias": torch.zeros(8, dtype=torch.int8)}))
    assert "1 not floating point (quant_conv.bias torch.int8)" in error_of(saved)
    with pytest.raises(ConfigError, match=r"dtype is torch\.int8"):
        load_autoencoder(saved, dtype=torch.int8)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_runs_code_is_refused_and_not_run(saved: Path, tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "was-run"
    file = saved / "diffusion_pytorch_model.bin"
    (saved / WEIGHTS).unlink()
    weights = {"state_dict": {}, "x": Malicious(mark)}
    if zipped:
        torch.save(weights, file)
    else:
        file.write_bytes(pickle.dumps(weights))
    message = error_of(saved)
    assert f"{file}: refused, for it is damaged or holds more than tensors and could run code" in message
    assert not mark.exists()
    torch.load(file, weights_only=False) if zipped else pickle.loads(file.read_bytes())
    assert mark.exists()  # so the file does what this test says


def test_a_pickle_of_something_else_is_described(saved: Path) -> None:
    file = saved / "x.pt"
    torch.save({"state_dict": {"a": torch.zeros(2), "step": 3}}, file)
    assert "expected a dict of tensors, or one under `state_dict`; found a dict with a: Tensor, step: int" in error_of(
        file
    )
    torch.save([torch.zeros(2)], file)
    assert "found one list" in error_of(file)


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    make(StockAutoencoderKL).save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / f"{WEIGHTS}.index.json"
    whole = json.loads(index.read_text())
    name, shard = next(iter(whole["weight_map"].items()))

    index.write_text(json.dumps({"weight_map": whole["weight_map"] | {"extra.a": shard}}))
    assert "1 weights are not in the files that it names: extra.a" in error_of(tmp_path)
    index.write_text(json.dumps({"weight_map": {k: v for k, v in whole["weight_map"].items() if k != name}}))
    assert f"{shard} holds weights that the index does not place there: {name}" in error_of(tmp_path)
    index.write_text(json.dumps(whole))
    (tmp_path / shard).unlink()
    assert f"{tmp_path / shard}: named by the index beside it, but not there" in error_of(tmp_path)


# References that are no local path


class Hub(http.server.BaseHTTPRequestHandler):
    """The three requests that the hub client makes: list, look, fetch; answered from `folder`."""

    folder: Path
    requests: list[str]

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        self.requests.append(f"{self.command} {self.path}")
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        listing = [{"rfilename": path.relative_to(self.folder).as_posix()} for path in files]
        body, sha = b"", "f" * 40
        status = 200
        if self.path.split("?")[0] in ("/api/models/org/name", "/api/models/org/name/revision/v2"):
            body = json.dumps({"id": "org/name", "sha": sha, "siblings": listing}).encode()
        elif self.path.startswith("/org/name/resolve/"):
            body = (self.folder / self.path.split("/", 5)[5]).read_bytes()
        else:
            status = 404
        self.send_response(status)
        self.send_header("X-Repo-Commit", sha)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    do_GET = do_HEAD = answer


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub on this machine, with an empty cache, and the working directory apart from both."""
    from huggingface_hub import constants, file_download

    handler = type("Handler", (Hub,), {"folder": tmp_path / "hub", "requests": []})
    handler.folder.mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for module in (constants, file_download):  # clients before 1.0 read a copy
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    yield handler
    server.shutdown()
    server.server_close()


def fill_cache(cache: Path, folder: Path, inside: str = "", ref: str = "main") -> None:
    """Lay a folder out as the hub client's cache does."""
    repo = cache / "models--org--name"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / ref).write_text("a" * 40)
    shutil.copytree(folder, repo / "snapshots" / ("a" * 40) / inside, dirs_exist_ok=True)


@pytest.mark.parametrize("inside", ["", "vae"])
def test_only_the_vae_of_a_repository_is_fetched_and_then_serves_offline(hub: type[Hub], inside: str) -> None:
    stock = make(StockAutoencoderKL)
    stock.save_pretrained(hub.folder / inside)
    stock.save_pretrained(hub.folder / inside, variant="fp16")
    for name in ("README.md", "unet.bin"):
        (hub.folder / name).write_text("large")

    assert same_weights(load_autoencoder("org/name"), stock)
    fetched = {request.split("/")[-1] for request in hub.requests if request.startswith("GET /org")}
    assert fetched == {"config.json", WEIGHTS}

    hub.requests.clear()
    assert same_weights(load_autoencoder("org/name", local_files_only=True), stock)
    assert hub.requests == []


def test_a_sharded_repository_a_subfolder_and_a_revision_are_fetched(hub: type[Hub]) -> None:
    stock = make(StockAutoencoderKL)
    stock.save_pretrained(hub.folder / "ema", max_shard_size="20KB")
    assert same_weights(load_autoencoder("org/name", subfolder="ema", revision="v2"), stock)
    assert "GET /api/models/org/name/revision/v2" in hub.requests
    with pytest.raises(MissingWeightsError, match="--revision v3"):
        load_autoencoder("org/name", subfolder="ema", revision="v3")


def test_a_cached_repository_serves_when_the_hub_fails(
    hub: type[Hub], saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    fill_cache(tmp_path / "cache", saved, "vae")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    assert same_weights(load_autoencoder("org/name"), StockAutoencoderKL.from_pretrained(saved))


def test_a_cached_repository_serves_with_the_real_switches_and_a_missing_one_is_explained(
    saved: Path, tmp_path: Path
) -> None:
    fill_cache(tmp_path / "home" / "hub", saved)
    code = """
from sdvae.checkpoints.store import load_autoencoder
load_autoencoder("org/name")
try:
    load_autoencoder("org/other")
except Exception as error:
    print(type(error).__name__, error)
"""
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root)}
    env.pop("HF_HUB_CACHE", None)
    result = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("MissingWeightsError no VAE at 'org/other'. Looked for\n")
    for line in (
        f"folder {tmp_path / 'org' / 'other'}: not there",
        f"cache  {tmp_path / 'home' / 'hub' / 'models--org--other'}: not there",
        "hub    https://huggingface.co/org/other: OfflineModeIsEnabled: ",
        "hf download org/other config.json diffusion_pytorch_model.safetensors\n",
        'hf download org/other --include "vae/*"',
    ):
        assert line in result.stdout


def test_a_repository_without_a_vae_and_an_unknown_one_are_explained(hub: type[Hub], tmp_path: Path) -> None:
    (hub.folder / "model.safetensors").touch()
    message = error_of("org/name", MissingWeightsError)
    assert "the repository has no VAE with its config.json; it holds model.safetensors" in message
    message = error_of("org/unknown", MissingWeightsError, subfolder="ema")
    assert "RepositoryNotFoundError" in message
    assert "hf auth login" in message
    assert 'hf download org/unknown --include "ema/*"' in message

    fill_cache(tmp_path / "cache", hub.folder)
    message = error_of("org/name", MissingWeightsError, local_files_only=True)
    assert "there, but not with a whole VAE of this revision" in message
    assert "not asked: only what is on this machine was wanted (local_files_only)" in message


@pytest.mark.parametrize(
    "ref",
    [
        "./foo",
        "foo/bar/baz",
        "/nowhere/foo",
        "org/name.safetensors",
        "~/nowhere/at/all",
        "name",
        "org/name/",
        "a--b/c",
        "...",
    ],
)
def test_a_path_that_does_not_exist_is_never_sent_to_the_hub(hub: type[Hub], ref: str) -> None:
    message = error_of(ref, NothingThereError)
    assert f"no VAE at '{ref}': {Path(ref).expanduser().absolute()} does not exist" in message
    error_of(Path("org/name"), NothingThereError)
    assert hub.requests == []


def test_a_path_at_which_nothing_lies_is_wrong_usage_and_a_hub_id_that_cannot_be_had_is_not(hub: type[Hub]) -> None:
    for ref, exit_code in (("./nothing", 2), ("org/unknown", 1)):
        with pytest.raises(MissingWeightsError) as caught:
            load_autoencoder(ref)
        assert caught.value.exit_code == exit_code
        assert isinstance(caught.value, ConfigError) == (exit_code == 2)


def test_a_local_folder_hides_the_hub_id_of_the_same_name(hub: type[Hub], saved: Path) -> None:
    shutil.copytree(saved, "org/name")
    load_autoencoder("org/name")
    assert hub.requests == []
    with pytest.raises(ConfigError, match="revision does not apply: 'org/name' is a local folder"):
        load_autoencoder("org/name", revision="v2")
    with pytest.raises(ConfigError, match="subfolder does not apply"):
        load_autoencoder(f"org/name/{WEIGHTS}", subfolder="vae")


def test_a_missing_bundled_vae_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "BUNDLED_NAME", "no-such-vae")
    for ref in (None, "no-such-vae"):
        assert f"looked in {read.bundled_path()}" in error_of(ref, MissingWeightsError)


def test_the_bundled_vae_loads_by_default_and_by_name() -> None:
    assert autoencoder_digest(load_autoencoder()) == autoencoder_digest(load_autoencoder("sdvae-mini"))


# Saving


def test_saving_casts_a_copy_and_leaves_the_model_as_it_is(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    tiny_vae.to(memory_format=torch.channels_last)
    before = autoencoder_digest(tiny_vae)
    save_autoencoder(tiny_vae, tmp_path / "a" / "b", dtype=torch.float16)
    assert {tensor.dtype for tensor in load_file(tmp_path / "a" / "b" / WEIGHTS).values()} == {torch.float16}
    assert tiny_vae.dtype == torch.float32
    assert autoencoder_digest(tiny_vae) == before
    assert same_weights(load_autoencoder(tmp_path / "a" / "b"), tiny_vae.half().float())


def test_the_saved_config_names_the_stock_class_and_not_where_the_model_came_from(saved: Path, tmp_path: Path) -> None:
    class Own(AutoencoderKL):
        pass

    for model in (StockAutoencoderKL.from_pretrained(saved), make(Own)):
        save_autoencoder(model, tmp_path / "out", overwrite=True)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["_class_name"] == "AutoencoderKL"
        assert "_name_or_path" not in config


def test_the_model_card_of_a_folder_stays_when_its_vae_is_replaced(tmp_path: Path) -> None:
    save_autoencoder(make(seed=0), tmp_path / "vae")
    (tmp_path / "vae/README.md").write_text("words of my own\n")
    other = make(seed=1)
    save_autoencoder(other, tmp_path / "vae", overwrite=True)
    assert (tmp_path / "vae/README.md").read_text() == "words of my own\n"
    assert autoencoder_digest(load_autoencoder(tmp_path / "vae")) == autoencoder_digest(other)


def test_files_have_the_usual_permissions_and_nothing_else_is_left(tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    for _ in range(2):
        save_autoencoder(make(), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "usual").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["out", "usual"]
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", WEIGHTS]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_overwriting_replaces_the_folder_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    make(StockAutoencoderKL).save_pretrained(tmp_path / "out", max_shard_size="20KB")
    new = make(seed=1, **LAYOUTS["flux"])
    save_autoencoder(new, tmp_path / "out", overwrite=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["config.json", WEIGHTS]
    assert os.listdir(tmp_path) == ["out"]
    assert autoencoder_digest(load_autoencoder(tmp_path / "out")) == autoencoder_digest(new)


def test_saving_through_a_link_replaces_the_folder_it_points_to(tmp_path: Path) -> None:
    save_autoencoder(make(), tmp_path / "v1")
    (tmp_path / "latest").symlink_to("v1")
    save_autoencoder(make(seed=1), tmp_path / "latest", overwrite=True)
    assert (tmp_path / "latest").is_symlink()
    assert same_weights(load_autoencoder(tmp_path / "v1"), make(seed=1))


def test_nothing_is_overwritten_unasked_and_only_a_vae_folder_ever(tmp_path: Path) -> None:
    def refusal(path: Path, overwrite: bool = True) -> str:
        before = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*"))
        with pytest.raises(OutputExistsError) as caught:
            save_autoencoder(vae, path, overwrite=overwrite)
        assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == before
        assert str(path) in str(caught.value)
        return str(caught.value)

    vae, out = make(), tmp_path / "out"
    out.mkdir()
    save_autoencoder(vae, out)  # an empty folder is in nobody's way
    assert "exists and holds config.json, diffusion_pytorch_model.safetensors" in refusal(out, overwrite=False)

    (out / "thesis.tex").touch()
    (out / "photos").mkdir()
    assert "holds more than a VAE: photos/, thesis.tex; choose another path" in refusal(out)

    unet = tmp_path / "unet"
    save_autoencoder(vae, unet)
    edit_config(unet, _class_name="UNet2DConditionModel")
    assert "holds no VAE: no config.json that names AutoencoderKL" in refusal(unet)
    (unet / "config.json").unlink()
    assert "holds no VAE" in refusal(unet)

    (tmp_path / "file").touch()
    assert "is a file" in refusal(tmp_path / "file")


def test_a_model_that_could_not_be_loaded_again_is_not_saved_and_the_old_one_stays(tmp_path: Path) -> None:
    old, bad = make(), make(seed=1)
    save_autoencoder(old, tmp_path / "out")
    with torch.no_grad():
        bad.decoder.conv_out.bias[0] = 1e5
    with pytest.raises(
        CheckpointError, match=r"not saved: `decoder\.conv_out\.bias` has values that are not finite as"
    ):
        save_autoencoder(bad, tmp_path / "out", dtype=torch.float16, overwrite=True)
    bad.extra = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"not saved, .* 2 unexpected \(extra\.weight \(2, 2\); extra\.bias"):
        save_autoencoder(bad, tmp_path / "out", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert same_weights(load_autoencoder(tmp_path / "out"), old)


def test_a_failed_write_is_reported_and_leaves_the_old_one(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="limits on file sizes are a matter of POSIX")
    old = make()
    save_autoencoder(old, tmp_path / "out")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as a full disk would: the write stops halfway
    try:
        with pytest.raises(CheckpointError, match=r"out: cannot be saved: .* What was there before is unchanged"):
            save_autoencoder(make(seed=1), tmp_path / "out", overwrite=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["out"]
    assert same_weights(load_autoencoder(tmp_path / "out"), old)


def forked(work: Callable[[], None]) -> int:
    """Start `work` in a copy of this process, which has torch loaded already. Returns: its process id."""
    if pid := os.fork():
        return pid
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)  # no pytest code may run in the copy


def die_at_step(n: int) -> None:
    """Kill this process just before its n-th access to the file system (or its n-th call into libc)."""
    steps = iter(range(1, n + 1))

    def hook(event: str, _: Any) -> None:
        if event in {"open", "ctypes.dlsym"} or event.startswith(("os.", "shutil.")):
            if next(steps, n) == n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def contents(folder: Path) -> tuple[bytes, ...]:
    return tuple(path.read_bytes() for path in sorted(folder.iterdir()))


forks = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot copy a process")


@forks
@needs_fork
@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_save_killed_before_any_of_its_steps_leaves_the_old_or_the_new_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        monkeypatch.setattr(files, "_exchange", lambda *_: False)
    # The scaling factor lies in config.json, the rest in the weights: a mixture of both would be noticed.
    old, new = (make(seed=seed, **LAYOUTS["sd"], scaling_factor=1.0 + seed) for seed in range(2))
    before = contents(save_autoencoder(old, tmp_path / "old"))
    after = contents(save_autoencoder(new, tmp_path / "new"))
    if can_exchange and not files._exchange(tmp_path / "old", tmp_path / "new"):
        pytest.skip("this system or file system cannot exchange two folders")
    (tmp_path / "in").mkdir()
    out = tmp_path / "in" / "out"

    def save_and_die(step: int) -> None:
        die_at_step(step)
        save_autoencoder(new, out, overwrite=True)

    results, gaps = [], 0
    for step in range(1, 200):
        save_autoencoder(old, out, overwrite=True)  # works whatever the killed one before left behind
        _, status = os.waitpid(forked(lambda step=step: save_and_die(step)), 0)  # type: ignore[misc]
        if out.exists():
            results.append(contents(out))
        else:
            gaps += 1
            results.append(before)
            assert same_weights(load_autoencoder(out), old)
            with pytest.raises(OutputExistsError):  # protected as before
                save_autoencoder(new, out)
        assert results[-1] in (before, after)
        if status == 0:
            break
    assert len(results) > 10
    assert results == sorted(results, key=lambda result: result == after)  # once it is new it stays new
    assert results[-1] == after
    assert gaps == (0 if can_exchange else 1)


@forks
@needs_fork
def test_a_save_killed_at_any_time_leaves_the_old_or_the_new_one_whole(tmp_path: Path) -> None:
    models = [make(seed=seed, **LAYOUTS["sd"], scaling_factor=1.0 + seed) for seed in range(2)]
    whole = [contents(save_autoencoder(model, tmp_path / str(i))) for i, model in enumerate(models)]
    out = save_autoencoder(models[0], tmp_path / "out")

    def save_for_ever() -> None:
        while True:
            for model in models:
                save_autoencoder(model, out, overwrite=True)

    dice, left = random.Random(0), []
    for _ in range(10):
        pid = forked(save_for_ever)
        time.sleep(dice.uniform(0.005, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert contents(out) in whole
        left += tmp_path.glob(".*.sdvae-tmp")
    assert left, "no kill hit a save at work: this tests nothing"


def test_a_failing_second_rename_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchange", lambda *_: False)
    old, out = make(), tmp_path / "out"
    save_autoencoder(old, out)
    rename = Path.rename

    def rename_unless_new(self: Path, target: Path) -> Path:
        if self.suffix == ".sdvae-tmp":
            raise PermissionError("not here")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_unless_new)
    with pytest.raises(CheckpointError, match="not here"):
        save_autoencoder(make(seed=1), out, overwrite=True)
    assert os.listdir(tmp_path) == ["out"]
    assert same_weights(load_autoencoder(out), old)


def test_leftovers_of_killed_saves_are_removed_and_those_of_living_ones_spared(tmp_path: Path) -> None:
    dead, alive = (
        tmp_path / f".{'a' * 16}-{files._host()}-{process}-{'0' * 8}.sdvae-tmp"
        for process in (os.getpid(), os.getppid())
    )  # this process has another start, so the first is of an earlier one with the same number
    for folder in (dead, alive):
        folder.mkdir()
        (folder / "config.json").touch()
    save_autoencoder(make(), tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == sorted([alive.name, "out"])


# Conversion and identity


@pytest.mark.parametrize("layout", LAYOUTS)
def test_to_diffusers_gives_the_stock_class_with_a_copy_of_everything(layout: str) -> None:
    ours = make(**LAYOUTS[layout]).to(torch.bfloat16).train()
    stock = to_diffusers(ours)
    assert type(stock) is StockAutoencoderKL
    assert same_weights(stock, ours)
    assert (stock.training, stock.dtype, stock.device) == (True, torch.bfloat16, torch.device("cpu"))
    assert not to_diffusers(ours.eval()).training
    assert {k: v for k, v in stock.config.items() if k[0] != "_"} == {
        k: v for k, v in ours.config.items() if k[0] != "_"
    }
    with torch.no_grad():
        stock.decoder.conv_in.weight.zero_()
    assert ours.decoder.conv_in.weight.any()


def test_the_digest_depends_on_values_and_meaning_alone(tmp_path: Path) -> None:
    base = make(**LAYOUTS["sd"])
    digest = autoencoder_digest(base)
    assert digest.startswith("sha256:")
    assert len(digest) == len("sha256:") + 64

    save_autoencoder(base, tmp_path / "out")
    same = [
        to_diffusers(base),
        load_autoencoder(tmp_path / "out"),  # its config holds lists where the first one's holds tuples
        StockAutoencoderKL.from_pretrained(tmp_path / "out"),
        make().to(memory_format=torch.channels_last),
        make().double().train(),
        make(**LAYOUTS["sd"] | {"sample_size": 512, "force_upcast": False}),
    ]
    assert {autoencoder_digest(model) for model in same} == {digest}

    changed = make()
    with torch.no_grad():
        changed.decoder.conv_out.bias[0] += 1e-6
    differs = [changed, make().half()]
    for field, value in (
        ("scaling_factor", 0.2),
        ("shift_factor", 0.0),
        ("latents_mean", [0.0] * 4),
        ("norm_num_groups", 2),
        ("act_fn", "relu"),
    ):
        differs.append(make(**LAYOUTS["sd"] | {field: value}))
    assert len({digest, *map(autoencoder_digest, differs)}) == len(differs) + 1


def test_the_digest_of_a_whole_number_is_that_of_the_same_decimal() -> None:
    one, other = (make(**LAYOUTS["sd"], scaling_factor=value) for value in (1, 1.0))
    assert autoencoder_digest(one) == autoencoder_digest(other)


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_saved_weights_are_as_readable_as_any_new_file(tiny_vae: AutoencoderKL, tmp_path: Path) -> None:
    folder = save_autoencoder(tiny_vae, tmp_path / "vae")
    plain = tmp_path / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in folder.iterdir()} == {plain.stat().st_mode}
