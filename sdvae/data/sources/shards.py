"""Images in tar shards, as WebDataset lays them out: files that share a name up to its first dot are one sample.

The only file that knows the library `webdataset`, which is imported when shards are looked for. It opens shards and
reads them in order; loader.py shuffles them and keeps the position, because its shuffling cannot be resumed exactly.
"""

from __future__ import annotations

import glob
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sdvae.data.images import EncodedImage
from sdvae.data.sources.files import IMAGE_SUFFIXES, os_reason
from sdvae.errors import ConfigError, ImageError

__all__ = ["TarShards", "find_shards"]

_TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


class TarShards:
    """Tar files (`loader.ShardedImages`), on disk or behind URLs."""

    def __init__(self, urls: list[str]) -> None:
        self.urls = urls

    @property
    def num_shards(self) -> int:
        return len(self.urls)

    def read_shard(self, index: int) -> Iterator[EncodedImage | ImageError]:
        from webdataset.gopen import gopen
        from webdataset.tariterators import group_by_keys

        url, number = self.urls[index], 0
        failures: list[Exception] = []
        try:
            with gopen(url) as stream:
                for sample in group_by_keys(_members(stream, url, failures)):
                    image = _image_of(sample, url)
                    if failures and isinstance(image, ImageError):
                        break  # the sample in which the shard is cut off
                    yield image
                    number += 1
        except Exception as error:  # tar, gzip, curl, shell commands: each fails in its own ways; other shards go on
            failures.append(error)
        if failures:
            reason = " ".join(f"{type(failures[0]).__name__}: {failures[0]}".split())
            yield ImageError(f"{url}: the shard cannot be read after {number} samples ({reason})")
        elif number == 0:
            yield ImageError(f"{url}: the shard holds no sample")


def find_shards(spec: str) -> list[str]:
    """Paths and URLs of the shards that `spec` names, in order.

    - A folder: the .tar, .tar.gz and .tgz files in it.
    - A .txt list: one shard a line, paths relative to the folder of the list; empty lines and lines that begin with #
      do not count.
    - Else paths, globs and URLs (http, https, file, pipe, ...), with braces such as `{000..127}`; several are
      separated by `::`.
    Raises: ConfigError where `webdataset` is not installed, nothing is found, or a local file is not there.
    """
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise ConfigError(
            "data.source=webdataset needs the package webdataset, which is not installed: pip install 'sdvae[train]'"
        ) from error
    path = Path(spec).expanduser()
    if path.is_dir():
        urls = sorted(str(file) for file in path.iterdir() if file.name.endswith(_TAR_SUFFIXES))
    elif path.suffix == ".txt" and path.is_file():
        urls = [url for line in _lines(path) for url in expand_urls(_beside(path, line))]
    else:
        urls = [found for url in expand_urls(spec) for found in _globbed(url)]
    if not urls:
        raise ConfigError(f"{spec}: no tar shard found; expected {', '.join(_TAR_SUFFIXES)} files, URLs or a .txt list")
    missing = [url for url in urls if not _is_remote(url) and not Path(url).is_file()]
    if missing:
        raise ConfigError(
            f"{spec}: {len(missing)} of {len(urls)} tar shards are not there, the first of them {missing[0]}"
        )
    return urls


def _is_remote(url: str) -> bool:
    return "://" in url or url.startswith(("pipe:", "file:"))


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise ConfigError(f"{path}: {os_reason(error)}") from error
    return [line for line in lines if line and not line.startswith("#")]


def _beside(list_path: Path, line: str) -> str:
    return line if _is_remote(line) else str(list_path.parent / line)


def _globbed(url: str) -> list[str]:
    if _is_remote(url):
        return [url]
    url = str(Path(url).expanduser())
    return sorted(glob.glob(url, recursive=True)) if glob.has_magic(url) else [url]


def _members(stream: Any, url: str, failures: list[Exception]) -> Iterator[dict[str, Any]]:
    """The files in a shard. An error ends them instead of being raised: the sample before it is to be kept."""
    from webdataset.tariterators import tar_file_iterator

    try:
        for member in tar_file_iterator(stream):
            yield {**member, "__url__": url}
    except Exception as error:  # as in read_shard
        failures.append(error)


def _image_of(sample: Mapping[str, Any], url: str) -> EncodedImage | ImageError:
    """The first member that is an image; members are called by what follows the first dot of their names."""
    key, names = sample["__key__"], [name for name in sample if not name.startswith("__")]
    for name in names:
        if f".{name.rpartition('.')[2]}" in IMAGE_SUFFIXES:
            return EncodedImage(f"{url}: {key}.{name}", sample[name])
    return ImageError(f"{url}: {key}: no image among its files ({', '.join(names)})")
