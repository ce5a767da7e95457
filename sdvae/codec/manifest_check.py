"""How files and latents of a cache differ from what its manifest says of them, and from each other."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

from sdvae.codec.reencoding import StoredLatent, short_digest
from sdvae.data.sources.files import file_digest
from sdvae.latents.header import LatentHeader
from sdvae.latents.manifest import CacheSettings, Manifest, ManifestFile

__all__ = ["bytes_differ", "common_settings", "item_differs", "settings_differ"]


def bytes_differ(path: Path, listed: ManifestFile) -> str | None:
    """By size, then by digest; None where they are those of the manifest. Raises: OSError."""
    size = path.stat().st_size
    if size != listed.size_bytes:
        return f"has {size} bytes; the manifest says {listed.size_bytes}"
    if (digest := file_digest(path)) != listed.digest:
        return f"its bytes changed: {short_digest(digest)}; the manifest says {short_digest(listed.digest)}"
    return None


def item_differs(item: StoredLatent, listed: ManifestFile, index: int) -> str | None:
    """What the manifest says otherwise of a latent."""
    source, entry = item.header.source, listed.items[index]
    if source.key != entry.key:
        return f"the manifest has {entry.key!r} here"
    found = (source.digest, source.width, source.height, tuple(next(iter(item.tensors.values())).shape))
    said = (entry.source_digest, entry.source_width, entry.source_height, entry.shape)
    names = ("source_digest", "source_width", "source_height", "shape")
    wrong = [f"{name} {a}, in the manifest {b}" for name, a, b in zip(names, found, said, strict=True) if a != b]
    return "; ".join(wrong) or None


def settings_differ(header: LatentHeader, expected: CacheSettings) -> str | None:
    """What decides a latent differently from the rest of the cache; what the VAE was called does not count."""
    found = CacheSettings.of(header)
    found = replace(found, vae=replace(found.vae, name=expected.vae.name))
    if not found.preprocessing.differs_for(header.source, expected.preprocessing):
        found = replace(found, preprocessing=expected.preprocessing)
    if found.vae.digest != expected.vae.digest:
        digests = [short_digest(settings.vae.digest) for settings in (found, expected)]
        return f"made by another VAE than the rest: {digests[0]}, not {digests[1]}"
    differing = [name for name in CacheSettings.__dataclass_fields__ if getattr(found, name) != getattr(expected, name)]
    return f"made with other settings than the rest: {', '.join(differing)}" if differing else None


def common_settings(manifest: Manifest) -> CacheSettings | None:
    """The settings of the most files; the first of those that tie."""
    counts = Counter(digest for file in manifest.files.values() for digest in file.settings)
    return manifest.settings[max(counts, key=lambda digest: counts[digest])] if counts else None
