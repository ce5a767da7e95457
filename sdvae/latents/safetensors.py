"""One latent on disk: the posterior (mean and logvar) or one z, and the header that says where it comes from.

Everything stored is z space, never scaled; `LatentFile.latents` scales. docs/latent-files.md describes the format.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save
from safetensors.torch import load
from torch import Tensor

from sdvae.errors import LatentFileError
from sdvae.files import write_atomic
from sdvae.latents.header import LatentHeader, read_header
from sdvae.model.scale import LatentScale

__all__ = ["LatentFile", "check_finite", "check_tensors", "read_tensors", "to_bytes"]


@dataclass(frozen=True, kw_only=True, eq=False)
class LatentFile:
    """A latent with its header.

    tensors: `mean` and `logvar`, or `z`, by `header.space`; each (C, h, w), float16 or float32, on the CPU.
    """

    header: LatentHeader
    tensors: Mapping[str, Tensor]

    def z(self, generator: torch.Generator | None = None) -> Tensor:
        """z, not scaled: what the VAE decodes.

        generator: draw from the posterior with it; None takes the mean. A file that keeps only z gives that z.
        Returns: (C, h, w), float32.
        """
        if self.header.space == "z":
            return self.tensors["z"].float()
        mean = self.tensors["mean"].float()
        if generator is None:
            return mean
        return mean + torch.exp(0.5 * self.tensors["logvar"].float()) * torch.randn(mean.shape, generator=generator)

    def latents(self, generator: torch.Generator | None = None) -> Tensor:
        """What a diffusion model sees, scaled as `LatentScale` says. Arguments and result as `z`."""
        return LatentScale.of(asdict(self.header.vae)).to_latents(self.z(generator))

    def write(self, path: str | Path) -> None:
        """Write the file, whole or not at all; replaces what is there.

        Raises: LatentFileError for values that are not finite; OSError.
        """
        check_finite(self.header, self.tensors, Path(path))
        write_atomic(to_bytes(self.header, {name: t.numpy() for name, t in self.tensors.items()}), Path(path))

    @classmethod
    def read(cls, path: str | Path) -> LatentFile:
        """Read a file that `write` wrote. Raises: LatentFileError, which names the file and the reason."""
        header, tensors = read_tensors(Path(path))
        check_tensors(header, tensors, Path(path))
        return cls(header=header, tensors=tensors)


def to_bytes(header: LatentHeader, arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """The file. arrays: those that `header.space` names, (C, h, w), float16 or float32."""
    data: bytes = save(dict(arrays), metadata=header.to_metadata())
    return data


def read_tensors(path: Path) -> tuple[LatentHeader, dict[str, Tensor]]:
    """What a file holds, unchecked but for the names. Raises: LatentFileError."""
    header = read_header(path)
    try:
        return header, load(path.read_bytes())  # not by name: safetensors opens no path that is not UTF-8 for torch
    except (OSError, SafetensorError) as error:
        raise LatentFileError(f"{path}: cannot be read as a latent file: {error}") from error


def check_finite(header: LatentHeader, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises: LatentFileError for values that are not to be written."""
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise LatentFileError(
                f"{path}: {name} is not finite in {header.latent_dtype}; compute and store in float32"
            )


def check_tensors(header: LatentHeader, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises: LatentFileError where tensors that were read do not go with their header, or are not finite."""
    ratio, image, padding = header.vae.spatial_compression_ratio, header.image, header.padding
    covered = (image.height + padding.top + padding.bottom, image.width + padding.left + padding.right)
    for name, tensor in tensors.items():
        if tensor.ndim != 3 or (tensor.shape[1] * ratio, tensor.shape[2] * ratio) != covered:
            raise LatentFileError(
                f"{path}: damaged latent file: {name} has shape {tuple(tensor.shape)}, which at {ratio} px per "
                f"position does not cover a padded image of {covered[0]} x {covered[1]} px (height x width)"
            )
        if not torch.isfinite(tensor).all():
            raise LatentFileError(f"{path}: damaged latent file: {name} has values that are not finite")
        for statistic in ("latents_mean", "latents_std"):
            values = getattr(header.vae, statistic)
            if values is not None and len(values) != tensor.shape[0]:
                raise LatentFileError(
                    f"{path}: damaged latent file: {name} has {tensor.shape[0]} channels, but vae.{statistic} has "
                    f"{len(values)} values"
                )
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        raise LatentFileError(f"{path}: damaged latent file: its tensors differ in shape")
