"""The settings of encoding and decoding, with their defaults and their allowed values. No torch.

The Python functions and the command line both take their defaults from here.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sdvae.data.batches import default_workers
from sdvae.errors import ConfigError
from sdvae.latents.formats import CACHE_FORMATS, DEFAULT_KOHYA_SUFFIX, KOHYA_SUFFIXES, SHARDED_FORMATS
from sdvae.latents.parts import WHOLE, Part

__all__ = [
    "COMPUTE_DTYPES",
    "CROPS",
    "DEFAULT_SHARD_SIZE",
    "DEVICES",
    "ENGINES",
    "IMAGE_FORMATS",
    "LATENT_DTYPES",
    "STORES",
    "TILINGS",
    "DecodeOptions",
    "EncodeOptions",
    "RunOptions",
    "parse_bytes",
]

STORES = ("moments", "mode", "sample")
DEVICES = ("auto", "cpu", "cuda", "mps")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
LATENT_DTYPES = ("float16", "float32")
CROPS = ("none", "center")
ENGINES = ("local", "ray")
DEFAULT_SHARD_SIZE = 1000
TILINGS = ("auto", "exact", "blended", "off")
IMAGE_FORMATS = {"png": ".png", "webp": ".webp", "jpg": ".jpg"}


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What encoding and decoding have in common."""

    device: str = "auto"  # auto: cuda where there is one, else mps, else cpu
    dtype: str = "float32"  # of the computation
    batch_size: int | None = None  # images of equal size that go through the VAE together; None: what suits the device
    workers: int | None = None  # threads that read, and as many that write; None: one per core, at most 8
    overwrite: bool = False  # do again what is done, and replace files that sdvae did not write
    tiling: str = (
        "auto"  # exact: in strips, with the result of one pass; auto: where one pass does not fit; blended; off
    )
    max_memory: int | str | None = None  # of the process (on a CPU) or its tensors: bytes or "4GB"; None: what is free
    tile_size: int | None = None  # blended: px; None: the VAE's sample_size
    tile_overlap: float | None = None  # blended: share of a tile; None: 0.25
    shard: str | None = None  # "2/8": only the second of eight parts of the input; None: all of it

    def __post_init__(self) -> None:
        _check_choice("device", self.device, DEVICES)
        _check_choice("dtype", self.dtype, COMPUTE_DTYPES)
        _check_positive("batch_size", self.batch_size)
        _check_positive("workers", self.workers)
        _check_choice("tiling", self.tiling, TILINGS)
        _check_positive("tile_size", self.tile_size)
        if self.tiling != "blended" and (self.tile_size, self.tile_overlap) != (None, None):
            raise ConfigError(f"tile_size and tile_overlap are of blended tiling, but tiling is '{self.tiling}'")
        if self.max_memory is not None:
            parse_bytes(self.max_memory)
            if self.tiling in ("blended", "off"):
                raise ConfigError(f"max_memory is given, but tiling is '{self.tiling}'; it is kept by auto and exact")
        if self.shard is not None:
            Part.parse(self.shard)

    @property
    def opening(self) -> dict[str, Any]:
        """Keyword arguments of `open_vae`."""
        tiling = {
            "mode": self.tiling,
            "max_memory_bytes": None if self.max_memory is None else parse_bytes(self.max_memory),
            "tile_size_px": self.tile_size,
            "overlap": self.tile_overlap,
        }
        return {"device": self.device, "dtype": self.dtype, "tiling": None if self.tiling == "off" else tiling}

    @property
    def part(self) -> Part:
        """The part that `shard` means; the whole is part 1 of 1."""
        return WHOLE if self.shard is None else Part.parse(self.shard)

    @property
    def num_workers(self) -> int:
        """The number of threads, with the default filled in."""
        return default_workers() if self.workers is None else self.workers


@dataclass(frozen=True, kw_only=True)
class EncodeOptions(RunOptions):
    """How images become latent files."""

    format: str = "safetensors"  # safetensors and kohya-npz: a file for each image; webdataset and parquet: shards
    shard_size: int | None = None  # webdataset and parquet: images in a shard; None: 1000
    kohya_suffix: str | None = None  # kohya-npz: sd or sdxl, which of its trainers looks for the file; None: sd
    flip: bool = False  # kohya-npz: encode the mirrored image too, for its flip_aug
    store: str = "moments"  # moments: mean and logvar; mode: z = mean; sample: one draw of z
    latent_dtype: str = "float16"  # of the tensors in the file
    seed: int = 0  # of the draw, for store=sample and kohya-npz; each image has its own stream
    size: int | None = None  # length of the short side in px after resizing; None: as it is
    crop: str = "none"  # center: cut the resized image to size x size
    background: str = "white"  # colour under transparent pixels
    max_pixels: int | None = None  # larger images are refused; None: the limit of `read_image`
    split: str | None = None  # datasets: which split; None: train
    subset: str | None = None  # datasets: the configuration's name, where there are several
    image_column: str | None = None  # datasets: None: image
    engine: str = "local"  # local: in this process; ray: by workers on the machines of a Ray cluster
    ray_workers: int | None = None  # engine ray: processes with a VAE each; None: one per GPU, else per CPU core

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("format", self.format, CACHE_FORMATS)
        self._check_format_takes("shard_size", self.shard_size is not None, SHARDED_FORMATS)
        self._check_format_takes("kohya_suffix", self.kohya_suffix is not None, ("kohya-npz",))
        self._check_format_takes("flip", self.flip, ("kohya-npz",))
        _check_choice("kohya_suffix", self.trainer_suffix, KOHYA_SUFFIXES)
        _check_positive("shard_size", self.shard_size)
        _check_choice("store", self.store, STORES)
        _check_choice("latent_dtype", self.latent_dtype, LATENT_DTYPES)
        _check_choice("crop", self.crop, CROPS)
        _check_positive("size", self.size)
        _check_positive("max_pixels", self.max_pixels)
        _check_choice("engine", self.engine, ENGINES)
        _check_positive("ray_workers", self.ray_workers)
        if self.ray_workers is not None and self.engine != "ray":
            raise ConfigError(f"ray_workers is given, but the engine is {self.engine}; give --engine ray as well")
        if self.shard is not None and self.engine == "ray":
            raise ConfigError("shard is given with the engine ray, which divides the images itself: leave out one")
        if self.crop != "none" and self.size is None:
            raise ConfigError(f"crop is '{self.crop}', but no size is given; give both, for example size 512")
        _check_colour(self.background)

    def _check_format_takes(self, name: str, given: bool, formats: Collection[str]) -> None:
        if given and self.format not in formats:
            have = " and ".join(formats) + (" has" if len(formats) == 1 else " have")
            raise ConfigError(f"{name} is given, but the format {self.format} has no place for it; {have}")

    @property
    def images_per_shard(self) -> int:
        """The number of images in a shard, with the default filled in."""
        return DEFAULT_SHARD_SIZE if self.shard_size is None else self.shard_size

    @property
    def trainer_suffix(self) -> str:
        """One of `KOHYA_SUFFIXES`, with the default filled in."""
        return DEFAULT_KOHYA_SUFFIX if self.kohya_suffix is None else self.kohya_suffix

    @property
    def draws(self) -> bool:
        """Whether the seed decides anything: where z is drawn from the posterior."""
        return self.store == "sample" or (self.store == "moments" and self.format == "kohya-npz")


@dataclass(frozen=True, kw_only=True)
class DecodeOptions(RunOptions):
    """How latent files become images."""

    format: str = "png"  # png, webp or jpg
    quality: int | None = None  # 1..100 for jpg and webp; None: the default of the format
    allow_other_vae: bool = False  # decode latents that another VAE made

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_choice("format", self.format, IMAGE_FORMATS)
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ConfigError(f"quality is {self.quality}; expected 1 to 100")
        if self.quality is not None and self.format == "png":
            raise ConfigError("quality is given, but png is lossless; leave it out or choose the format webp or jpg")


def parse_bytes(size: int | str) -> int:
    """A number of bytes: 4000000000, "4GB" (10 ** 9), "4GiB" (2 ** 30), "500MB". Raises: ConfigError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?\s*", str(size), re.IGNORECASE)
    if match is None or not (number := float(match[1])):
        raise ConfigError(f"max_memory is '{size}'; expected a size such as 4GB, 500MB or 4GiB")
    return int(number * (1024 if match[3] else 1000) ** " kmgt".index(match[2].lower() or " "))


def _check_choice(name: str, value: str, known: Collection[str]) -> None:
    if value not in known:
        raise ConfigError(f"{name} is '{value}'; expected one of {', '.join(known)}")


def _check_positive(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ConfigError(f"{name} is {value}; expected 1 or more")


def _check_colour(value: str) -> None:
    from PIL import ImageColor

    try:
        ImageColor.getrgb(value)
    except ValueError:
        raise ConfigError(f"background is '{value}'; expected a colour name or #rrggbb") from None
