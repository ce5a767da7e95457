"""What an audit and a rewrite of a VAE for fp16 take. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from sdvae.errors import ConfigError

__all__ = ["AuditOptions", "FixOptions"]


@dataclass(frozen=True, kw_only=True)
class AuditOptions:
    """On which images, and where, an audit measures."""

    size_px: int = 256  # side of the central squares to which images are cut
    max_images: int = 4  # evenly spaced over the sorted names
    probe_size_px: int = 64  # of two images that are really computed in half precision
    device: str = "auto"


@dataclass(frozen=True, kw_only=True)
class FixOptions(AuditOptions):
    """What a rewrite is to reach, and how its audits measure."""

    headroom_bits: float = 2.0  # of every layer below fp16's limit: 2 leave room for values four times as large
    dtype: str | None = None  # of the stored weights; None: each as it is

    def __post_init__(self) -> None:
        if not 0 <= self.headroom_bits <= 8:
            raise ConfigError(f"headroom is {self.headroom_bits:g} bits; expected 0 to 8")
