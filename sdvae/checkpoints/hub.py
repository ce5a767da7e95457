"""A VAE in a repository of the Hugging Face hub, or in the hub client's cache: its folder on this machine.

Only the VAE's own files are fetched. Where the hub cannot be reached, the cache serves.
"""

from __future__ import annotations

import re
from pathlib import Path

from sdvae.checkpoints import formats
from sdvae.checkpoints.formats import CONFIG_NAME, WEIGHTS_NAME
from sdvae.errors import CheckpointError, MissingWeightsError, some

__all__ = ["hub_folder", "is_hub_id"]

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
_HUB_TIMEOUT_S = 10  # what the hub client allows for a download's first answer; listing files has no limit of its own


def is_hub_id(ref: str | Path) -> bool:
    """Whether a reference that names nothing on disk may be a repository, "org/name", rather than a path."""
    if (
        not isinstance(ref, str)
        or not _HUB_ID.fullmatch(ref)
        or Path(ref).suffix in {".json", *formats.WEIGHT_SUFFIXES}
    ):
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(ref)
    except HFValidationError:
        return False
    return True


def hub_folder(repo: str, subfolder: str | None, revision: str | None, local_files_only: bool) -> Path:
    """Folder in the hub client's cache that holds the VAE of a repository; only its own files are fetched."""
    hub = "not asked: only what is on this machine was wanted (local_files_only)"
    if not local_files_only:
        try:
            return _download(repo, subfolder, revision)
        # The client's own errors, those of httpx, and those of requests in older versions share no base. All mean the
        # same here: the hub gives nothing, so the cache serves; where that is empty too, the reason is told.
        except Exception as error:
            hub = f"{type(error).__name__}: {(str(error).strip() or 'no details').splitlines()[0]}"
    return _cached_folder(repo, subfolder, revision) or _raise_not_on_hub(repo, subfolder, revision, hub)


def _download(repo: str, subfolder: str | None, revision: str | None) -> Path:
    from huggingface_hub import HfApi, hf_hub_download

    listing = HfApi().model_info(repo, revision=revision, timeout=_HUB_TIMEOUT_S)
    names = [sibling.rfilename for sibling in listing.siblings or []]
    found = formats.find_vae_files(names, subfolder)
    if found is None or not found.has_config:
        raise CheckpointError(f"the repository has no VAE with its {CONFIG_NAME}; it holds {some(names)}")

    def fetch(name: str) -> Path:
        return Path(hf_hub_download(repo, found.path_of(name), revision=revision))

    weights = fetch(found.weights)
    if weights.suffix == ".json":
        for name in sorted(set(formats.shard_names(weights).values())):
            fetch(name)
    return fetch(CONFIG_NAME).parent


def _cached_folder(repo: str, subfolder: str | None, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for folder in ["", "vae/"] if subfolder is None else [f"{subfolder.strip('/')}/"]:
        config = try_to_load_from_cache(repo, f"{folder}{CONFIG_NAME}", revision=revision)
        if isinstance(config, str) and formats.find_vae_files(formats.list_names(Path(config).parent, []), ""):
            return Path(config).parent
    return None


def _raise_not_on_hub(repo: str, subfolder: str | None, revision: str | None, hub: str) -> Path:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    fetch = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
    commands = [f'{fetch} --include "{subfolder or "vae"}/*"']
    if subfolder is None:
        commands = [f"{fetch} {CONFIG_NAME} {WEIGHTS_NAME}", f"{commands[0]}   (where the repository is a pipeline)"]
    raise MissingWeightsError(
        f"no VAE at '{repo}'. Looked for\n"
        f"  folder {Path(repo).absolute()}: not there\n"
        f"  cache  {cache}: {'there, but not with a whole VAE of this revision' if cache.is_dir() else 'not there'}\n"
        f"  hub    {constants.ENDPOINT}/{repo}: {hub}\n"
        f"Fetch it where there is a network (`hf auth login` first, if it is private or gated):\n"
        + "".join(f"  {command}\n" for command in commands)
        + "or pass the path of a folder or file"
    )
