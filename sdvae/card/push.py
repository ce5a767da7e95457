"""A VAE folder to a repository of the Hugging Face hub: exactly its config.json, its weights and its model card.

The upload is that of diffusers' PushToHubMixin, which every model has. Its `push_to_hub` is not called, because it
saves the model anew, in the dtype in memory and with a card of its own; here the files go as they are.
"""

from __future__ import annotations

import inspect
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sdvae.checkpoints import formats
from sdvae.checkpoints.formats import CARD_NAME, CONFIG_NAME, Kind
from sdvae.checkpoints.hub import is_hub_id
from sdvae.errors import CheckpointError, ConfigError

__all__ = ["REPO_PLACEHOLDER", "PushReport", "card_digest", "push"]

REPO_PLACEHOLDER = "REPO_ID"  # in a card that does not know its repository yet

_CARD_OF = re.compile(r"<!-- Written by sdvae card.*?; vae (sha256:[0-9a-f]{64})")


def card_digest(text: str) -> str | None:
    """Digest of the VAE that a generated model card is about; None for a card that sdvae did not generate."""
    match = _CARD_OF.search(text)
    return match[1] if match else None


@dataclass(frozen=True, kw_only=True)
class PushedFile:
    name: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class PushReport:
    """What went, or would go, to the hub."""

    folder: str
    repo: str
    vae_digest: str
    files: tuple[PushedFile, ...]
    not_uploaded: tuple[str, ...]  # what else lies in the folder
    url: str | None  # of the commit or pull request; None: nothing was uploaded

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def push(
    folder: str | Path,
    repo: str,
    *,
    private: bool = False,
    message: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
) -> PushReport:
    """Upload a VAE folder in one commit; the repository is made where it is missing.

    folder: a diffusers folder of a VAE with safetensors weights and a model card. It is loaded first, as everyone who
        downloads it will.
    repo: "name" or "org/name". private: of a repository that is made now.
    create_pr: open a pull request instead of committing to the main branch.
    dry_run: check everything on this machine, and do not talk to the hub.
    Raises: ConfigError for a folder or name that cannot be pushed, a missing card, or a card of another VAE, and where
        the installed diffusers uploads in another way; CheckpointError for a VAE that does not load, and where the hub
        refuses or cannot be reached, with the remedy.
    """
    from sdvae.checkpoints.fit import autoencoder_digest
    from sdvae.checkpoints.store import load_autoencoder

    path = Path(folder).expanduser()
    _check_name(repo)
    names = _files_to_push(path)
    vae = load_autoencoder(path)
    digest = autoencoder_digest(vae)
    _check_card(path, digest, repo)
    _check_diffusers(vae)
    report = PushReport(
        folder=str(folder),
        repo=repo,
        vae_digest=digest,
        files=tuple(PushedFile(name=name, size_bytes=(path / name).stat().st_size) for name in names),
        not_uploaded=tuple(sorted({entry.name for entry in path.iterdir()} - set(names))),
        url=None,
    )
    if dry_run:
        return report
    with _staged(path, names) as staged:
        message = message or f"Upload {path.resolve().name} with sdvae"
        full_name, url = _upload(vae, staged, repo, private, message, create_pr)
    return replace(report, repo=full_name, url=url)


def _check_name(repo: str) -> None:
    if not is_hub_id(repo) and not is_hub_id(f"me/{repo}"):
        raise ConfigError(f"'{repo}' is no name of a repository; expected org/name, or name for one of your own")


def _files_to_push(path: Path) -> list[str]:
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder on this machine; what is pushed is a folder: sdvae convert {path} DIR")
    found = formats.identify(path)
    if found.kind is not Kind.FOLDER or found.config is None or found.config.parent != path:
        raise ConfigError(f"{path} is a {found.kind}; what is pushed is the folder of a VAE, with its {CONFIG_NAME}")
    weights = [found.weights.name]
    if found.weights.suffix == ".json":
        weights += sorted(set(formats.shard_names(found.weights).values()))
    if pickles := [name for name in weights if Path(name).suffix in formats.PICKLE_SUFFIXES]:
        raise ConfigError(
            f"{path / pickles[0]}: a pickle can run code of its author, so none is pushed; write safetensors first: "
            f"sdvae convert {path} DIR"
        )
    if not (path / CARD_NAME).is_file():
        raise ConfigError(f"{path} has no {CARD_NAME}; write the model card first: sdvae card {path}")
    return [CONFIG_NAME, *weights, CARD_NAME]


def _check_card(path: Path, digest: str, repo: str) -> None:
    text = (path / CARD_NAME).read_text(encoding="utf-8")
    described = card_digest(text)
    if described not in (None, digest):
        raise ConfigError(
            f"{path / CARD_NAME} describes another VAE or an earlier state of this one: {described}, and the VAE is "
            f"{digest}; write it again: sdvae card {path}"
        )
    if described and REPO_PLACEHOLDER in text:
        raise ConfigError(
            f"{path / CARD_NAME} says {REPO_PLACEHOLDER} where the name of the repository belongs; write it again: "
            f"sdvae card {path} --repo {repo}"
        )


def _check_diffusers(vae: Any) -> None:
    """Raises: ConfigError where diffusers has no `_upload_folder`, whose name is private, that takes what is passed."""
    try:
        inspect.signature(vae._upload_folder).bind(Path(), "org/name", commit_message="", create_pr=False)
    except (AttributeError, TypeError) as error:
        raise ConfigError(
            f"diffusers {version('diffusers')} uploads in another way than sdvae knows: {error}. Install diffusers "
            "0.37 to 0.42, or upload the files yourself: `hf upload REPO DIR`"
        ) from error


@contextmanager
def _staged(path: Path, names: list[str]) -> Iterator[Path]:
    """A folder with these files alone, for the mixin uploads all that is in a folder."""
    with tempfile.TemporaryDirectory(prefix="sdvae-push-") as folder:
        for name in names:
            try:
                os.symlink((path / name).resolve(), Path(folder) / name)
            except OSError:  # Windows gives the right to make links to few
                shutil.copyfile(path / name, Path(folder) / name)
        yield Path(folder)


def _upload(vae: Any, folder: Path, repo: str, private: bool, message: str, create_pr: bool) -> tuple[str, str]:
    """Returns: the repository with its owner, and the address of the commit or pull request."""
    from huggingface_hub import create_repo

    try:
        with _quiet_unless_terminal():
            # None leaves it to what the owner has set up
            repo = create_repo(repo, private=private or None, exist_ok=True).repo_id
            commit = vae._upload_folder(folder, repo, commit_message=message, create_pr=create_pr)
    except (AttributeError, TypeError):  # a defect here or in a library: no refusal, and the same the next time
        raise
    # The client's own errors, those of httpx, and those of requests in older versions share no base.
    except Exception as error:
        raise CheckpointError(_explain(error, repo)) from error
    return repo, str(commit.pr_url or commit.commit_url)


@contextmanager
def _quiet_unless_terminal() -> Iterator[None]:
    """The client draws its bars into files and pipes too."""
    from huggingface_hub import utils

    if sys.stderr.isatty() or utils.are_progress_bars_disabled():  # type: ignore[attr-defined]
        yield
        return
    utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        utils.enable_progress_bars()  # type: ignore[attr-defined]


_LOGIN = "log in with a token that may write: `hf auth login`, or set HF_TOKEN"


def _explain(error: Exception, repo: str) -> str:
    from huggingface_hub import constants

    chain = list(_causes(error))  # errors of an upload come wrapped, without the answer of the hub
    what = "; ".join(dict.fromkeys((str(each).strip() or type(each).__name__).splitlines()[0] for each in chain))
    answers = (getattr(each, "response", None) for each in chain)
    status = next((answer.status_code for answer in answers if answer is not None), None)
    if constants.HF_HUB_OFFLINE:
        what, remedy = "HF_HUB_OFFLINE is set", "unset it, or push from a machine with a network"
    elif any(type(each).__name__ == "LocalTokenNotFoundError" for each in chain):
        remedy = _LOGIN
    elif status == 401:
        remedy = f"the hub does not know you; {_LOGIN}"
    elif status == 403:
        remedy = f"your token may not write there: check its permissions and that '{repo}' is yours; {_LOGIN}"
    elif status is None and any(isinstance(each, OSError) or _is_of_network(each) for each in chain):
        remedy = f"the hub at {constants.ENDPOINT} cannot be reached; try again where there is a network"
    else:
        remedy = "nothing was committed; the same command can be run again"
    return f"'{repo}' was not pushed: {what} ({remedy})"


def _is_of_network(error: BaseException) -> bool:
    return type(error).__module__.split(".")[0] in ("httpx", "httpcore")


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that it was raised from."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__
