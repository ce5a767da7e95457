"""Image files to sRGB pixels and back, and pixels to tensors in [-1, 1] and back.

What is read: all that Pillow reads, but for EPS (reading it starts Ghostscript). What is done, in this order:
the first frame or page is decoded in full, strictly; EXIF orientation is applied; palettes and gray become RGB; an
embedded colour profile is converted to sRGB; transparency is composited over a stated background.
What is left alone: gamma and chromaticity chunks of PNG, HDR gain maps, further frames. Finding files and changing
sizes are elsewhere (sources/, transforms.py). torch is imported only where a tensor is made.
"""

from __future__ import annotations

import contextlib
import functools
import io
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageCms, ImageColor, ImageFile, UnidentifiedImageError

from sdvae.data.sources.files import os_reason, refuse_unless_file
from sdvae.errors import ConfigError, ImageError, SdvaeError
from sdvae.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "DEFAULT_MAX_PIXELS",
    "EncodedImage",
    "JPEG_MARGIN",
    "PREPROCESSING_VERSION",
    "Pixels",
    "Place",
    "ReadImage",
    "image_to_x",
    "read_image",
    "read_image_bytes",
    "round_to_8_bits",
    "save_image",
    "x_to_image",
]

# Raised whenever reading the same file gives other pixel values: latents that were cached before are then stale.
PREPROCESSING_VERSION = 1

# Where a picture is resized anyway, a JPEG is decoded at 1/2, 1/4 or 1/8 while its short side stays at least this many
# times the size that is wanted, so that the antialiased resize decides the result. On 147 photographs, at the smallest
# decoding allowed, the result is from that of the whole picture (median and worst, PSNR in dB): with a margin of 1
# 41 to 35 and 27, of 2 48 to 44 and 39, of 3 52 to 51 and 43. A margin of 3 leaves a photograph of 12 megapixels whole
# for 512 px.
JPEG_MARGIN = 2

# 2**27 = 134,217,728 pixels: room for the 102 megapixel files of medium format cameras; 384 MiB as 8-bit RGB.
DEFAULT_MAX_PIXELS = 2**27

Pixels = npt.NDArray[Any]  # (H, W, 3), uint8 or uint16
Colour = tuple[int, int, int]
_T = TypeVar("_T")

_ORIENTATION_TAG = 0x0112  # EXIF and TIFF
_PHOTOMETRIC_TAG = 0x0106  # TIFF
_UPRIGHT = {  # EXIF orientation -> what brings the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FRAME_WORDS = {"TIFF": "multipage: first of {} pages", "MPO": "first of {} pictures in the file"}
_PROFILE_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}  # Pillow mode -> colour space as ICC profiles name it
_HIGH_DEPTH_MODES = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
_NOT_IN_PILLOW = {".heic": "HEIC", ".heif": "HEIF", ".jxl": "JPEG XL"}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a picture lies in the pixels that it was reduced to.

    At 1/8, 601 px become 76: the last of them is an eighth part picture. Resizing all 76 would shift the picture.
    """

    width: int  # of the whole picture, upright, px
    height: int
    reduction: int  # 2, 4 or 8: px of the picture, along a side, for one of its pixels
    left: float  # where it begins in the pixels: below 1, and above 0 where it was turned
    top: float

    def box(self, left: float, top: float, width: float, height: float) -> tuple[float, float, float, float]:
        """A part of the whole picture, px, as left, top, right and bottom in the reduced pixels."""
        x, y = self.left + left / self.reduction, self.top + top / self.reduction
        return x, y, x + width / self.reduction, y + height / self.reduction


@dataclass(frozen=True, kw_only=True)
class ReadImage:
    """A picture as read: upright, opaque, sRGB."""

    pixels: Pixels  # (H, W, 3) uint8, or uint16 where the file is gray of more than 8 bits; its own memory
    place: Place | None = None  # of the picture in them, where it came reduced; None: all of them
    notes: tuple[str, ...] = ()  # what a user may want to know, such as "animated: first of 6 frames"


@dataclass(frozen=True)
class EncodedImage:
    """An image that is not decoded yet: a file, or the bytes of one."""

    key: str  # its name in the source, for lists and messages
    content: Path | bytes = field(repr=False)

    def read(self, *, min_side_px: int | None = None) -> ReadImage:
        """As `read_image`."""
        if isinstance(self.content, Path):
            return read_image(self.content, min_side_px=min_side_px)
        return read_image_bytes(self.content, self.key, min_side_px=min_side_px)

    def size(self) -> tuple[int, int]:
        """Width and height as stored, from the header alone.

        Raises: ImageError where there is none that can be read.
        """
        name, open_file = _opener(self.content, self.key)
        return _with_image(name, open_file, DEFAULT_MAX_PIXELS, lambda image: image.size)


def read_image(
    path: str | Path,
    *,
    background: str | Colour = "white",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    min_side_px: int | None = None,
) -> ReadImage:
    """Read the first frame of an image file as upright, opaque sRGB.

    background: what shows through where the picture is transparent: a colour name, "#rrggbb" or (r, g, b).
    max_pixels: a larger picture is refused from its header, before anything is decoded. It replaces Pillow's own
    limit: where a picture is above Pillow's and not above this one, Pillow's is lifted while that picture is read
    (one at a time).
    min_side_px: a JPEG may come at 1/2, 1/4 or 1/8 of its size, no side then below this many pixels, and the result
    says where the picture lies in them; other formats come whole. None: always whole. A JPEG of 12 megapixels takes
    200 ms whole, 40 ms at 1/4 and 17 ms at 1/8.

    Gray of 12 or 16 bits becomes 16-bit. 32-bit integers (TIFF) within 0..65535 and floats within 0..1 are taken as
    they are, other ranges are stretched to the full one. 16-bit colour is cut to 8 bits, as Pillow decodes it. The last
    three leave a note. So does a colour profile that cannot be used: it is ignored.
    CMYK without a profile is converted by the plain formula, which is brighter than ink on paper.

    May be called from several threads at once; no warning of Pillow's leaves this function (libtiff, which knows no
    Python, may still print a line on stderr about a damaged TIFF).
    Raises: ImageError, which names the file and the reason; ConfigError for a background that is no colour.
    """
    return _read(Path(path), str(path), background, max_pixels, min_side_px)


def read_image_bytes(
    data: bytes,
    name: str,
    *,
    background: str | Colour = "white",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    min_side_px: int | None = None,
) -> ReadImage:
    """As `read_image`, from the bytes of an image file. name: what errors call it."""
    return _read(data, name, background, max_pixels, min_side_px)


def image_to_x(pixels: Pixels) -> Tensor:
    """Pixels as a tensor: (H, W, 3) uint8 or uint16 -> (3, H, W) float32 in [-1, 1], 16 bits kept."""
    import torch

    half_range = np.iinfo(pixels.dtype).max / 2
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)  # (3, H, W)
    return torch.from_numpy(planes).div_(half_range).sub_(1.0)


def x_to_image(x: Tensor) -> Pixels:
    """A tensor as pixels: (3, H, W) of any float dtype -> (H, W, 3) uint8; [-1, 1] clamped, rounded to nearest.

    Raises: SdvaeError where x holds NaN, the mark of an overflow in half precision, which would turn black.
    """
    levels = x.detach().float().add(1.0).mul_(127.5)
    if levels.amax().isnan():  # the maximum takes over any NaN: half the time of isnan().any()
        raise SdvaeError("the decoded image holds NaN: if the VAE runs in float16, use bfloat16 or float32")
    planes = levels.clamp_(0.0, 255.0).round_().byte().cpu()  # (3, H, W)
    pixels: Pixels = np.stack([plane.numpy() for plane in planes], axis=-1)  # three times as fast as permute
    return pixels


def round_to_8_bits(recon: Tensor) -> Tensor:
    """What a picture file would hold. recon: [-1, 1] and beyond; not a number becomes black.

    Returns: float32 in [0, 1], multiples of 1/255.
    """
    levels = ((recon.float().nan_to_num(nan=-1.0) + 1) * 127.5).clamp_(0, 255).round_()
    return levels.div_(255)


def save_image(pixels: Pixels, path: str | Path, *, quality: int | None = None) -> None:
    """Write (H, W, 3) uint8 as .png, .webp, .jpg or .jpeg.

    quality: 1 to 100. None: WebP without loss, JPEG at 95; JPEG always keeps the full colour resolution (4:4:4).
    PNG has no quality.
    The file appears under its name complete or not at all.
    Raises: ConfigError for another suffix or a quality that does not fit; ImageError where the format cannot hold
    the size; OSError as it comes, when the disk is full or the folder missing for example.
    """
    path = Path(path)
    options = _save_options(path, quality)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"expected (H, W, 3) uint8, got {pixels.shape} {pixels.dtype}")
    height, width = pixels.shape[:2]
    limit = {"WEBP": 16383, "JPEG": 65500}.get(options["format"], 2**31 - 1)  # libwebp, libjpeg
    if max(height, width) > limit:
        raise ImageError(f"{path}: {width} x {height} px, but {options['format']} ends at {limit}: write .png instead")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, **options)
    path.parent.stat()  # a wrong path is not to make folders
    write_atomic(buffer.getvalue(), path)


def _save_options(path: Path, quality: int | None) -> dict[str, Any]:
    suffix = path.suffix.lower()
    if quality is not None and (suffix == ".png" or not 1 <= quality <= 100):
        raise ConfigError(f"{path.name}: quality {quality}: expected 1 to 100, and none for .png, which is lossless")
    if suffix == ".png":
        # Level 1 takes a third of the time of Pillow's level 6 for 1 % larger photographs.
        return {"format": "PNG", "compress_level": 1}
    if suffix == ".webp" and quality is None:
        # Method 0 takes the time of such a PNG for three quarters of its size; higher ones gain 8 % for 10 times that.
        return {"format": "WEBP", "lossless": True, "method": 0, "quality": 50}
    if suffix == ".webp":
        return {"format": "WEBP", "quality": quality}
    if suffix in (".jpg", ".jpeg"):
        return {"format": "JPEG", "quality": 95 if quality is None else quality, "subsampling": 0}
    raise ConfigError(f"{path.name}: cannot write '{suffix}': expected .png, .webp, .jpg or .jpeg")


# What the words of users mean, and refusals.


def _colour(background: str | Colour) -> Colour:
    try:
        colour = ImageColor.getrgb(background)[:3] if isinstance(background, str) else tuple(background)
    except (ValueError, TypeError):
        colour = ()
    if len(colour) != 3 or not all(isinstance(level, int) and 0 <= level <= 255 for level in colour):
        raise ConfigError(f"background {background!r}: expected a colour name, '#rrggbb' or three numbers 0 to 255")
    return colour[0], colour[1], colour[2]


def _opener(content: Path | bytes, name: str) -> tuple[str, Callable[[], BinaryIO]]:
    """What errors call an image, and how to open it. Raises: ImageError where there is nothing to open."""
    if isinstance(content, Path):
        path = content
        refuse_unless_file(path)
        # We open the file: Pillow would map an uncompressed one into memory, where a file cut short kills the process.
        return str(path), lambda: open(path, "rb")
    if not content:
        raise ImageError(f"{name}: is empty (0 bytes)")
    data = content
    return name, lambda: io.BytesIO(data)


def _too_large(name: str, claim: str, max_pixels: int) -> str:
    return (
        f"{name}: its header claims {claim}, above the limit of {max_pixels:,}: "
        "for a file that you trust raise the limit (max_pixels in Python, --max-pixels on the command line)"
    )


def _reason(name: str, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        format_name = _NOT_IN_PILLOW.get(Path(name).suffix.lower())
        if format_name:
            return f"{format_name} is not among the formats that can be read: convert it to PNG, JPEG or TIFF first"
        return "not an image of a known format, or its header is damaged"
    if isinstance(error, OSError) and error.errno is not None:
        return os_reason(error)
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    details = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, EOFError) or "truncated" in details.lower():
        return f"truncated: the file ends before the picture does ({details})"
    return f"damaged, cannot be decoded ({details})"


# Pillow's process-wide state, kept from touching other threads.


class _OnlyWhileReading(type):
    """Makes the class below match every warning of a thread that is reading an image, and none of another's."""

    def __subclasscheck__(cls, category: type) -> bool:
        return getattr(_this_thread, "reading", False)


class _WarningWhileReading(Warning, metaclass=_OnlyWhileReading):
    pass


_this_thread = threading.local()
_filter_lock = threading.Lock()
_pillow_limit_lock = threading.Lock()


@contextlib.contextmanager
def _no_warnings_in_this_thread() -> Iterator[None]:
    """Ignore warnings here; other threads keep theirs.

    warnings.catch_warnings swaps a list that all threads share: two threads that leave it in the wrong order undo each
    other's filters for good. Instead one filter stays in that list, and its category is asked for every warning
    whether this thread is reading.
    """
    with _filter_lock:  # put in front again if someone came first: an "error" filter there would raise inside Pillow
        if not warnings.filters or warnings.filters[0][2] is not _WarningWhileReading:
            warnings.simplefilter("ignore", category=_WarningWhileReading)
    _this_thread.reading = True
    try:
        yield
    finally:
        _this_thread.reading = False


@contextlib.contextmanager
def _pillow_limit_of_at_least(max_pixels: int) -> Iterator[None]:
    """Lift Image.MAX_IMAGE_PIXELS, which is one for the process, while one thread reads one very large picture.

    Another thread that reads meanwhile is still held to its own max_pixels by the check in _read.
    """
    with _pillow_limit_lock:
        before = Image.MAX_IMAGE_PIXELS
        Image.MAX_IMAGE_PIXELS = None if before is None else max(before, max_pixels)
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before


# Decoding, from the file to pixels.


def _read(
    content: Path | bytes, name: str, background: str | Colour, max_pixels: int, min_side_px: int | None
) -> ReadImage:
    fill = _colour(background)
    name, open_file = _opener(content, name)
    return _with_image(name, open_file, max_pixels, lambda image: _decode(name, image, fill, max_pixels, min_side_px))


def _with_image(
    name: str, open_file: Callable[[], BinaryIO], max_pixels: int, use: Callable[[ImageFile.ImageFile], _T]
) -> _T:
    """What `use` makes of the opened image; whatever goes wrong is an ImageError."""

    def opened() -> _T:
        with open_file() as file, Image.open(file, formats=_formats()) as image:
            _refuse_too_large(name, image, max_pixels)
            _refuse_hollow_png(name, image, file)
            return use(image)

    try:
        with _no_warnings_in_this_thread():
            try:
                return opened()
            except Image.DecompressionBombError:
                with _pillow_limit_of_at_least(max_pixels):
                    return opened()
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        count = re.search(r"\d+", str(error))
        claim = f"{int(count[0]):,} pixels" if count else "too many pixels"
        raise ImageError(_too_large(name, claim, max_pixels)) from error
    except Exception as error:  # a damaged file makes Pillow raise nearly anything, TypeError and struct.error included
        raise ImageError(f"{name}: {_reason(name, error)}") from error


def _decode(name: str, image: ImageFile.ImageFile, fill: Colour, max_pixels: int, min_side_px: int | None) -> ReadImage:
    notes: list[str] = []
    (width, height), reduction = image.size, 1
    if min_side_px is not None and image.format in ("JPEG", "MPO"):
        drafted = image.draft(None, (min_side_px, min_side_px))
        reduction = 1 if drafted is None else round(height / drafted[1][3])
    coding = str(image.tile)  # how samples are stored; Pillow forgets it when it decodes
    image.load()
    _refuse_too_large(name, image, max_pixels)  # an .ico may hold a larger picture than its header says
    orientation = _orientation(image, notes)
    if image.mode in _HIGH_DEPTH_MODES:
        pixels = _high_depth_pixels(image, coding, orientation, fill, notes)
    else:
        if re.search(r";16[BLN]", coding):
            notes.append("16-bit colour reduced to 8 bits")
        _correct_transparent_colour(image, coding)
        pixels = np.array(_opaque_srgb(_upright(image, orientation), fill, notes))
    _note_further_frames(image, notes)  # last: counting the frames of a GIF moves through the file
    place = None if reduction == 1 else _place(width, height, reduction, orientation)
    return ReadImage(pixels=pixels, place=place, notes=tuple(notes))


def _formats() -> tuple[str, ...]:
    """All formats that Pillow knows here, the common ones first.

    Loading all plugins beforehand, 80 ms once, is also what makes the first calls safe: while one thread registers
    plugins, Image.open in another can miss the one that it needs.
    """
    Image.preinit()
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def _refuse_too_large(name: str, image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(_too_large(name, f"{width} x {height} = {width * height:,} pixels", max_pixels))


def _refuse_hollow_png(name: str, image: Image.Image, file: BinaryIO) -> None:
    """Refuse a PNG that claims more pixels than its bytes can hold: Pillow would leave what is missing black.

    Deflate packs at most 1032 to 1, and a pixel has at least one bit.
    """
    if image.format != "PNG":
        return
    width, height = image.size
    position = file.tell()
    size_bytes = file.seek(0, io.SEEK_END)
    file.seek(position)
    if width * height > 8 * 1032 * size_bytes:
        raise ImageError(f"{name}: its header claims {width} x {height}, more than its {size_bytes:,} bytes can hold")


def _correct_transparent_colour(image: Image.Image, coding: str) -> None:
    """Bring a PNG's one transparent colour to the scale of the decoded samples, which Pillow (to 13.0) does not."""
    colour = image.info.get("transparency")
    if image.format != "PNG":
        return
    for samples, levels, factor in (("'1'", 2, 255), ("L;2", 4, 85), ("L;4", 16, 17)):  # Pillow 12.1 does it for 1 bit
        if isinstance(colour, int) and samples in coding and colour < levels:
            image.info["transparency"] = colour * factor
    if isinstance(colour, tuple) and max(colour) > 255:  # 16 bits a channel
        image.info["transparency"] = tuple(level >> 8 for level in colour)


def _orientation(image: Image.Image, notes: list[str]) -> int:
    """As EXIF counts it, 1 to 8. To be asked after decoding: in a PNG it may follow the picture."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG)
    except Exception:  # as for decoding: damaged EXIF makes Pillow raise nearly anything
        notes.append("EXIF data damaged, orientation unknown")
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image if orientation == 1 else image.transpose(_UPRIGHT[orientation])


def _place(width: int, height: int, reduction: int, orientation: int) -> Place:
    """Where a picture of this size, as stored, lies in its reduced pixels once these are upright."""
    right, bottom = ((-side % reduction) / reduction for side in (width, height))  # what the last blocks have too much
    if orientation in (5, 6, 7, 8):  # lying on its side
        width, height, right, bottom = height, width, bottom, right
    return Place(
        width=width,
        height=height,
        reduction=reduction,
        left=right if orientation in (2, 3, 6, 7) else 0.0,
        top=bottom if orientation in (3, 4, 7, 8) else 0.0,
    )


def _opaque_srgb(image: Image.Image, fill: Colour, notes: list[str]) -> Image.Image:
    profile = image.info.get("icc_profile")
    alpha = None
    if image.has_transparency_data:
        is_gray = image.mode in ("1", "L", "LA", "La")
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.getchannel("R") if is_gray else image.convert("RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in _PROFILE_SPACES:  # palettes, YCbCr, LAB, HSV, ...
        image = image.convert("RGB")
    # A profile describes the stored colours, so it comes before they are mixed with the background's.
    image = _to_srgb(image, profile, notes)
    if alpha is None or alpha.getextrema()[0] == 255:
        return image
    notes.append("transparency composited over rgb({}, {}, {})".format(*fill))
    canvas = Image.new("RGB", image.size, fill)
    canvas.paste(image, mask=alpha)  # rounds c * a + f * (255 - a) over 255 to nearest
    return canvas


def _to_srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image:
    """An image of mode L, RGB or CMYK as RGB, through its profile if that can be used."""
    if profile:
        try:
            transform = _profile_transform(profile, image.mode)
            if transform is not None:
                return transform.apply(image)
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
            notes.append(f"colour profile ignored ({error})")
    return image.convert("RGB")


# Building a transform takes as long as decoding a photograph, and a folder holds few different profiles.
@functools.lru_cache(maxsize=16)
def _profile_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None where it is sRGB, to one level, whatever its name.

    Applying a transform is safe in several threads: Little CMS copies what it caches.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space != _PROFILE_SPACES[mode]:
        raise ValueError(f"made for {space}, the picture is {_PROFILE_SPACES[mode]}")
    # Relative colorimetric with black point compensation: colours that sRGB holds stay as they are.
    transform = ImageCms.buildTransform(
        source,
        ImageCms.createProfile("sRGB"),
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
    if mode == "CMYK":
        return transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)  # 18 levels from 0 to 255
    grid = levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
    probe = Image.fromarray(grid)
    change = np.asarray(transform.apply(probe), np.int16) - np.asarray(probe.convert("RGB"), np.int16)
    return None if np.abs(change).max() <= 1 else transform


def _high_depth_pixels(image: Image.Image, coding: str, orientation: int, fill: Colour, notes: list[str]) -> Pixels:
    """Gray of more than 8 bits as (H, W, 3) uint16."""
    samples = np.asarray(_upright(image, orientation))
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
        gray = samples.astype(np.uint16)  # also from big endian
    else:
        gray = _stretched(samples, notes)
    if "I;12" in coding:  # a TIFF whose samples end at 4095
        gray = np.bitwise_or(gray << 4, gray >> 8, dtype=np.uint16)
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC_TAG) == 0:  # a TIFF where 0 is white: Pillow turns 8 bits only
        gray = np.invert(gray)
    pixels = np.repeat(gray[..., None], 3, axis=2)
    key = image.info.get("transparency")
    if isinstance(key, int) and (gray == key).any():
        notes.append("transparency composited over rgb({}, {}, {})".format(*fill))
        pixels[gray == key] = np.array(fill, np.uint16) * 257
    profile = image.info.get("icc_profile")
    if profile:
        _note_unused_profile(profile, notes)
    return pixels


def _stretched(samples: Pixels, notes: list[str]) -> Pixels:
    """32-bit integers or floats, whose range no file format fixes, as uint16."""
    finite = np.isfinite(samples)
    if not finite.any():
        raise ValueError("no finite sample value")
    low, high = float(samples[finite].min()), float(samples[finite].max())
    is_float = samples.dtype.kind == "f"
    full = 1.0 if is_float else 65535.0
    if 0 <= low and high <= full:
        notes.append(f"{'float' if is_float else 'integer'} samples taken as 0 to {full:g}")
        low, high = 0.0, full
    else:
        notes.append(f"samples from {low:g} to {high:g} stretched to the full range")
    levels = (np.where(finite, samples, low).astype(np.float64) - low) * (65535 / (high - low or 1.0))
    return np.rint(levels).astype(np.uint16)


def _note_unused_profile(profile: bytes, notes: list[str]) -> None:
    try:
        if _profile_transform(profile, "L") is not None:
            notes.append("colour profile ignored (not supported for 16-bit gray)")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
        notes.append(f"colour profile ignored ({error})")


def _note_further_frames(image: Image.Image, notes: list[str]) -> None:
    try:
        count = getattr(image, "n_frames", 1)
    except Exception:  # as for decoding; the first frame is whole
        notes.append("animated: first frame, the others are damaged")
        return
    if count > 1 and image.format != "PSD":  # whose first "frame" is all its layers together
        notes.append(_FRAME_WORDS.get(image.format or "", "animated: first of {} frames").format(count))
