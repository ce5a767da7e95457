"""A latent file -> its image: what is read, computed and written for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from sdvae.checkpoints.opened import OpenedVae
from sdvae.codec.decoded_image import ImageMark, save_marked
from sdvae.codec.engine import Member, Work, to_device
from sdvae.codec.options import DecodeOptions
from sdvae.codec.planning.plan import Item
from sdvae.data.images import x_to_image
from sdvae.data.transforms import unpad
from sdvae.errors import LatentFileError
from sdvae.latents.header import VaeRecord
from sdvae.latents.safetensors import LatentFile

__all__ = ["ImageDecoder"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageDecoder(Work):
    """Does jobs of a plan with a VAE: latent file -> image file."""

    out: Path
    options: DecodeOptions
    vae: OpenedVae
    record: VaeRecord  # of the VAE

    if_out_of_memory = "use a lower --max-memory, or a device with more memory"

    def read(self, item: Item) -> Member:
        file = LatentFile.read(item.path)
        z, channels, ratio = file.z(), self.vae.latent_channels, self.vae.spatial_compression_ratio
        if (z.shape[0], file.header.vae.spatial_compression_ratio) != (channels, ratio):
            raise LatentFileError(
                f"{item.path}: {z.shape[0]} channels at {file.header.vae.spatial_compression_ratio} px per position; "
                f"this VAE decodes {channels} at {ratio}"
            )
        return Member(item, z, file.header)

    def compute(self, batch: Sequence[Member]) -> Sequence[Tensor]:
        """Recon of each latent, (3, H, W) with the padding, on the device."""
        z = to_device([member.tensor for member in batch], self.vae)  # (B, C, h, w)
        return list(self.vae.model.decode(z).sample)

    def write(self, member: Member, computed: Tensor) -> None:
        item, header = member.job, member.header
        pixels = x_to_image(unpad(computed.cpu(), header.image.height, header.image.width))
        mark = ImageMark(
            key=item.key,
            latent_digest=header.latent_digest,
            vae_digest=self.record.digest,
            dtype=self.record.computation,
            quality=self.options.quality,
        )
        save_marked(pixels, item.output, mark)
