"""What is pushed is exactly the VAE's files, bit for bit, by the hub's own client."""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers.utils import PushToHubMixin

from sdvae.card.push import push
from sdvae.checkpoints.fit import autoencoder_digest
from sdvae.checkpoints.formats import CARD_NAME
from sdvae.checkpoints.store import load_autoencoder, save_autoencoder
from sdvae.errors import CheckpointError, ConfigError
from sdvae.model.autoencoder import AutoencoderKL

# the hub's client sends files in a way that httpx calls outdated
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")

WEIGHTS = "diffusion_pytorch_model.safetensors"


class Hub(http.server.BaseHTTPRequestHandler):
    """The requests of an upload: create a repository, ask how to send files, send large ones, commit."""

    protocol_version = "HTTP/1.1"
    requests: list[str]
    files: dict[str, bytes]  # of the repository, after the commit
    large: dict[str, bytes]  # sha256 -> content
    answers: dict[str, int]  # path -> status to refuse with
    sent: dict[str, Any]  # bodies of requests by path

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:
        path, body = self.path.split("?")[0], self.read()
        self.requests.append(f"{self.command} {self.path}")
        url = f"http://{self.headers['Host']}"
        if status := self.answers.get(path):
            self.reply({"error": "refused"}, status)
        elif not self.headers.get("Authorization"):
            self.reply({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            self.sent[path] = json.loads(body)
            name = f"{self.sent[path]['organization'] or 'me'}/{self.sent[path]['name']}"
            self.reply({"url": f"{url}/{name}", "name": name})
        elif path == "/api/validate-yaml":
            self.reply({"errors": [], "warnings": []})
        elif path.endswith("/preupload/main"):
            names = [each["path"] for each in json.loads(body)["files"]]
            modes = {name: "lfs" if name == WEIGHTS else "regular" for name in names}
            files = [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]
            self.reply({"files": files})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self.reply({"transfer": "basic", "objects": objects})
        elif path.endswith("/commit/main"):
            self.commit([json.loads(line) for line in body.splitlines()])
            pull_request = {"pullRequestUrl": f"{url}/org/name/discussions/1"} if "create_pr=1" in self.path else {}
            self.reply({"commitUrl": f"{url}/org/name/commit/abc", "commitOid": "abc", **pull_request})
        else:
            self.reply({"error": "unknown"}, 404)

    def do_PUT(self) -> None:
        content = self.read()
        self.large[self.path.rpartition("/")[2]] = content
        self.reply({}, self.answers.get("/lfs", 200))

    def do_GET(self) -> None:
        self.requests.append(f"GET {self.path}")
        if self.path.endswith("/revision/main?expand=xetEnabled"):  # asked by clients before 1.0
            self.reply({"id": "org/name", "xetEnabled": False})
        else:
            self.reply({"error": "none"}, 404)

    do_HEAD = do_GET

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            key, value = line["key"], line["value"]
            if key == "header":
                self.sent["commit"] = value
            elif key == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                content = self.large[value["oid"]]
                assert hashlib.sha256(content).hexdigest() == value["oid"] and len(content) == value["size"]
                self.files[value["path"]] = content
            else:
                raise AssertionError(key)

    def read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, data: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def connect_anew() -> None:
    """Make the client ask again whether it is offline: before 1.0 it does so once per thread."""
    if hasattr(huggingface_hub, "configure_http_backend"):
        huggingface_hub.configure_http_backend()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    """A hub on this machine, and a token for it."""
    from huggingface_hub import constants

    handler = type("Handler", (Hub,), {"requests": [], "files": {}, "large": {}, "answers": {}, "sent": {}})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", constants.ENDPOINT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    connect_anew()
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its protocol is a service of its own
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_for_the_test")
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture
def vae(tiny_vae: AutoencoderKL, tmp_path: Path) -> Path:
    folder = save_autoencoder(tiny_vae, tmp_path / "mine", dtype=torch.float16)
    (folder / CARD_NAME).write_text("---\nlicense: mit\n---\n\n# Mine\n", encoding="utf-8")
    (folder / "notes.txt").write_text("not for the world")
    return folder


def test_the_hub_has_the_files_bit_for_bit_and_no_others(
    hub: type[Hub], vae: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in vae.iterdir())
    report = push(vae, "org/name", message="First")
    assert capfd.readouterr() == ("", "")
    assert hub.files == {name: (vae / name).read_bytes() for name in ("config.json", WEIGHTS, CARD_NAME)}
    assert hub.sent["commit"]["summary"] == "First"
    assert hub.sent["/api/repos/create"] == {"name": "name", "organization": "org"}
    assert report.url is not None and report.url.endswith("/org/name/commit/abc")
    assert report.not_uploaded == ("notes.txt",)
    assert [(file.name, file.size_bytes) for file in report.files] == [
        (name, len(hub.files[name])) for name in ("config.json", WEIGHTS, CARD_NAME)
    ]
    assert sorted(path.name for path in vae.iterdir()) == before
    # what the world downloads is the same VAE
    for name, content in hub.files.items():
        (tmp_path / "down").mkdir(exist_ok=True)
        (tmp_path / "down" / name).write_bytes(content)
    assert autoencoder_digest(load_autoencoder(tmp_path / "down")) == report.vae_digest
    assert autoencoder_digest(diffusers.AutoencoderKL.from_pretrained(tmp_path / "down")) == report.vae_digest


def test_the_upload_is_that_of_diffusers_own_mixin(hub: type[Hub], vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mixins, calls = PushToHubMixin._upload_folder, []

    def watched(self: PushToHubMixin, working_dir: Path, repo_id: str, **options: Any) -> Any:
        calls.append((type(self), sorted(os.listdir(working_dir)), repo_id, options))
        return mixins(self, working_dir, repo_id, **options)

    monkeypatch.setattr(PushToHubMixin, "_upload_folder", watched)
    push(vae, "org/name", message="First", create_pr=True)
    options = {"commit_message": "First", "create_pr": True}
    assert calls == [(AutoencoderKL, [CARD_NAME, "config.json", WEIGHTS], "org/name", options)]
    assert sorted(hub.files) == calls[0][1]


def other_arguments(self: PushToHubMixin, repository: str, *, folder: Path) -> None:
    raise AssertionError


@pytest.mark.parametrize(("method", "words"), [(None, "no attribute '_upload_folder'"), (other_arguments, "too many")])
def test_a_diffusers_that_uploads_in_another_way_is_named_before_a_repository_is_made(
    hub: type[Hub], vae: Path, monkeypatch: pytest.MonkeyPatch, method: Any, words: str
) -> None:
    if method is None:
        monkeypatch.delattr(PushToHubMixin, "_upload_folder")
    else:
        monkeypatch.setattr(PushToHubMixin, "_upload_folder", method)
    for dry_run in (True, False):
        with pytest.raises(ConfigError, match=f"^diffusers {diffusers.__version__} uploads in another way.*{words}"):
            push(vae, "org/name", dry_run=dry_run)
    assert hub.requests == []


@pytest.mark.parametrize("defect", [AttributeError, TypeError])
def test_a_defect_is_not_told_as_a_refusal_of_the_hub(
    hub: type[Hub], vae: Path, monkeypatch: pytest.MonkeyPatch, defect: type[Exception]
) -> None:
    def broken(self: PushToHubMixin, *arguments: Any, **options: Any) -> None:
        raise defect("in a library")

    monkeypatch.setattr(PushToHubMixin, "_upload_folder", broken)
    with pytest.raises(defect, match="^in a library$"):
        push(vae, "org/name")


def test_a_private_repository_of_ones_own_and_a_pull_request(hub: type[Hub], vae: Path) -> None:
    report = push(vae, "name", private=True, create_pr=True)
    private = {"visibility": "private"}, {"private": True}  # the second from clients before 1.0
    assert hub.sent["/api/repos/create"] in [{"name": "name", "organization": None, **word} for word in private]
    assert report.repo == "me/name" and report.url is not None and report.url.endswith("/discussions/1")
    assert hub.sent["commit"]["summary"] == "Upload mine with sdvae"


def test_all_files_of_sharded_weights_go(hub: type[Hub], vae: Path, tmp_path: Path) -> None:
    load_autoencoder(vae).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    (tmp_path / "sharded" / CARD_NAME).write_text("# Mine\n")
    push(tmp_path / "sharded", "org/name")
    assert sorted(hub.files) == sorted(path.name for path in (tmp_path / "sharded").iterdir())
    assert len(hub.files) > 4


def test_a_dry_run_checks_the_folder_and_sends_nothing(hub: type[Hub], vae: Path) -> None:
    report = push(vae, "org/name", dry_run=True)
    assert report.url is None and len(report.files) == 3 and hub.requests == []
    (vae / WEIGHTS).write_bytes((vae / WEIGHTS).read_bytes()[:-2])
    with pytest.raises(CheckpointError):
        push(vae, "org/name", dry_run=True)


def test_a_vae_without_a_card_or_with_that_of_another_is_not_pushed(hub: type[Hub], vae: Path) -> None:
    card = "# Mine\n\n<!-- Written by sdvae card, 1.0; vae sha256:{}; text 0 -->\n"
    (vae / CARD_NAME).write_text(card.format("0" * 64))
    with pytest.raises(ConfigError, match=f"describes another VAE .* write it again: sdvae card {vae}"):
        push(vae, "org/name")
    (vae / CARD_NAME).write_text(card.format(autoencoder_digest(load_autoencoder(vae)).removeprefix("sha256:")))
    push(vae, "org/name", dry_run=True)
    (vae / CARD_NAME).unlink()
    with pytest.raises(ConfigError, match=f"write the model card first: sdvae card {vae}"):
        push(vae, "org/name")
    assert hub.requests == []


@pytest.mark.parametrize("repo", ["a/b/c", "", "org/na me", "https://hub/org/name", "-x", "org/name.safetensors"])
def test_a_name_that_is_none_is_refused_before_anything_is_sent(hub: type[Hub], vae: Path, repo: str) -> None:
    with pytest.raises(ConfigError, match="is no name of a repository"):
        push(vae, repo)
    assert hub.requests == []


def test_what_is_no_vae_folder_is_refused_with_the_way_to_one(hub: type[Hub], vae: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="sdvae convert"):
        push(vae / WEIGHTS, "org/name")
    tensors = load_autoencoder(vae).state_dict()
    torch.save(tensors, vae / "diffusion_pytorch_model.bin")
    (vae / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match="a pickle can run code of its author"):
        push(vae, "org/name")
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    vae.rename(pipeline / "vae")
    (pipeline / "model_index.json").write_text("{}")
    with pytest.raises(ConfigError, match="what is pushed is the folder of a VAE"):
        push(pipeline, "org/name")


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "the hub does not know you; .*`hf auth login`"), (403, "your token may not write there")],
)
@pytest.mark.parametrize("where", ["/api/repos/create", "/lfs", "/api/models/org/name/commit/main"])
def test_a_refusal_of_the_hub_says_what_to_do(hub: type[Hub], vae: Path, status: int, remedy: str, where: str) -> None:
    hub.answers[where] = status
    with pytest.raises(CheckpointError, match=f"'org/name' was not pushed: .*{remedy}"):
        push(vae, "org/name")
    assert hub.files == {}


def test_without_a_token_logging_in_is_named(hub: type[Hub], vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(CheckpointError, match="`hf auth login`, or set HF_TOKEN"):
        push(vae, "org/name")


def test_without_a_network_that_is_said(hub: type[Hub], vae: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    connect_anew()
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        push(vae, "org/name")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    connect_anew()
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="the hub at http://127.0.0.1:9 cannot be reached"):
        push(vae, "org/name")
