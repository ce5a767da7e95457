"""`sdvae reconstruct`: images -> latents -> images, with the PSNR of each and a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdvae.cli.options import announce_vae, image_options, run_options, tiling_options, vae_option, write_options
from sdvae.cli.output import print_json, print_plan, print_reasons, print_table, progress, shown
from sdvae.codec.options import DecodeOptions, EncodeOptions, RunOptions
from sdvae.errors import ConfigError, OutputExistsError

if TYPE_CHECKING:
    from sdvae.codec.image_encoder import ImageEncoder
    from sdvae.codec.planning.plan import Item
    from sdvae.codec.run import EncodeRun
    from sdvae.data.contact_sheet import SheetRow
    from sdvae.data.sources.files import FileReason, ImageFile

__all__ = ["reconstruct_command"]

DEFAULT_OUT = "sdvae-demo"
_PHOTOS = Path(__file__).parents[1] / "assets" / "photos"
_SHEET_KEY = "contact sheet"


@click.command(
    name="reconstruct",
    epilog="""\b
Examples:
  sdvae reconstruct
  sdvae reconstruct photos comparison --vae my-vae""",
)
@click.argument("images", required=False)
@click.argument("out", type=click.Path(), default=DEFAULT_OUT)
@vae_option
@image_options
@run_options
@tiling_options
@write_options
@click.pass_context
def reconstruct_command(
    ctx: click.Context, /, images: str | None, out: str, vae: str | None, dry_run: bool, as_json: bool, **options: Any
) -> None:
    """Send IMAGES through the VAE and back, and see what is lost.

    Writes OUT/latents, OUT/reconstructions and OUT/contact_sheet.png (original, reconstruction, difference), and prints
    the PSNR of each image. Without IMAGES it takes the bundled photographs; OUT is ./sdvae-demo by default.
    """
    settings = EncodeOptions(**options)
    announce_vae(vae)
    folders = Folders(Path(out))
    folders.check(settings.overwrite)
    from sdvae.codec.run import EncodeRun

    encoding = EncodeRun(_sources(images, folders.out), folders.latents, vae, settings, divided=False)
    if dry_run:
        _print_dry_run(encoding, folders, as_json)
        ctx.exit(encoding.plan.exit_code)
    report = _reconstruct(encoding, folders)
    if as_json:
        print_json(report.to_json())
    else:
        report.print()
    ctx.exit(report.exit_code)


@dataclass(frozen=True)
class Folders:
    """What lies where in the output folder."""

    out: Path

    @property
    def latents(self) -> Path:
        return self.out / "latents"

    @property
    def reconstructions(self) -> Path:
        return self.out / "reconstructions"

    @property
    def contact_sheet(self) -> Path:
        return self.out / "contact_sheet.png"

    def check(self, overwrite: bool) -> None:
        """Raises: OutputExistsError where the sheet would replace a picture that is none of ours."""
        from sdvae.codec.decoded_image import read_mark

        mark = read_mark(self.contact_sheet)
        if self.contact_sheet.exists() and not overwrite and (mark is None or mark.key != _SHEET_KEY):
            raise OutputExistsError(
                f"{self.contact_sheet} is there and was not made by sdvae: choose another OUT, or give --overwrite"
            )


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """One image and what came back."""

    key: str
    source: str
    latent: str
    reconstruction: str
    width: int
    height: int
    psnr_db: float | None  # higher is better; None: not one pixel differs


@dataclass(frozen=True, kw_only=True)
class ReconstructReport:
    """Result of `sdvae reconstruct`."""

    folders: Folders
    vae: str
    vae_digest: str
    images: tuple[Reconstruction, ...]
    failures: tuple[FileReason, ...]
    notes: tuple[FileReason, ...]
    seconds: float  # of encoding and decoding, without loading the VAE; what was up to date took none

    @property
    def mean_psnr_db(self) -> float | None:
        """Mean of the images' PSNR in dB, without those that came back unchanged; None where there is no other."""
        values = [image.psnr_db for image in self.images if image.psnr_db is not None]
        return math.fsum(values) / len(values) if values else None

    @property
    def exit_code(self) -> int:
        """0: all is done; 3: finished, but some files failed."""
        return 3 if self.failures else 0

    def to_json(self) -> dict[str, Any]:
        return {
            "command": "reconstruct",
            "out": str(self.folders.out),
            "contact_sheet": str(self.folders.contact_sheet) if self.images else None,
            "vae": self.vae,
            "vae_digest": self.vae_digest,
            "mean_psnr_db": self.mean_psnr_db,
            "images": [vars(image) for image in self.images],
            "failed": len(self.failures),
            "failures": [vars(failure) for failure in self.failures],
            "notes": [vars(note) for note in self.notes],
            "seconds": self.seconds,
            "exit_code": self.exit_code,
        }

    def print(self) -> None:
        rows = [(image.key, f"{image.width} x {image.height}", _decibels(image.psnr_db)) for image in self.images]
        if len(rows) > 1:
            rows.append(("mean", "", _decibels(self.mean_psnr_db)))
        if rows:
            print_table(("image", "pixels", "PSNR (dB)"), rows)
            click.echo(
                f"Latents, reconstructions and contact_sheet.png are in {click.format_filename(self.folders.out)}"
            )
        print_reasons("Notes", self.notes)
        print_reasons("Failed", self.failures)


def _sources(images: str | None, out: Path) -> list[ImageFile]:
    """The images, without those below the output folder: they come from an earlier run."""
    from sdvae.data.sources.find import find_images

    below = out.resolve()
    found = find_images(_PHOTOS if images is None else images)
    found = [image for image in found if not image.path.resolve().is_relative_to(below)]
    if not found:
        raise ConfigError(f"all images in {images} lie in {out}, the folder of the output: give another OUT")
    return found


def _print_dry_run(encoding: EncodeRun, folders: Folders, as_json: bool) -> None:
    plan = encoding.plan
    then = f"each latent is decoded to {folders.reconstructions}, and {folders.contact_sheet} is written"
    if as_json:
        print_json({"command": "reconstruct", "dry_run": True, **plan.to_json(), "then": then})
    else:
        print_plan(plan, "encode")
        click.echo(f"Then {then}.")


def _reconstruct(encoding: EncodeRun, folders: Folders) -> ReconstructReport:
    from sdvae.codec.planning.decode import LatentSource
    from sdvae.codec.run import DecodeRun

    with progress("encode") as on_progress:
        encoded = encoding.run(on_progress)
    failed = {failure.key for failure in encoded.failures}
    items = {item.key: item for item in encoding.plan.items if item.key not in failed}
    latents = [LatentSource(item.key, item.output) for item in items.values()]
    common = {field.name: getattr(encoding.options, field.name) for field in fields(RunOptions)}
    decoding = DecodeRun(latents, folders.reconstructions, encoding.vae, DecodeOptions(**common), divided=False)
    with progress("decode") as on_progress:
        decoded = decoding.run(on_progress)
    failed |= {failure.key for failure in decoded.failures}
    pairs = [(items[item.key], item) for item in decoding.plan.items if item.key not in failed]
    images, rows = _measure(pairs, encoding.encoder)
    report = ReconstructReport(
        folders=folders,
        vae=encoded.vae,
        vae_digest=encoded.vae_digest,
        images=tuple(images),
        failures=encoded.failures + decoded.failures,
        notes=encoded.notes,
        seconds=encoded.seconds + decoded.seconds,
    )
    if rows:
        _save_sheet(rows, report)
    return report


def _measure(pairs: Sequence[tuple[Item, Item]], encoder: ImageEncoder) -> tuple[list[Reconstruction], list[SheetRow]]:
    """PSNR of each (encoded, decoded) pair, and the first rows of the contact sheet."""
    from sdvae.data.contact_sheet import MAX_ROWS, sheet_row
    from sdvae.data.images import image_to_x, read_image, x_to_image
    from sdvae.metrics.table import psnr

    images: list[Reconstruction] = []
    rows: list[SheetRow] = []
    for encoded, decoded in pairs:
        original = x_to_image(image_to_x(encoder.load(encoded).pixels))  # 16 bits become 8
        recon = read_image(decoded.output).pixels
        height, width = original.shape[:2]
        value = psnr(original, recon)
        images.append(
            Reconstruction(
                key=encoded.key,
                source=str(encoded.path),
                latent=str(encoded.output),
                reconstruction=str(decoded.output),
                width=width,
                height=height,
                psnr_db=value if math.isfinite(value) else None,
            )
        )
        if len(rows) < MAX_ROWS:
            details = f"{_decibels(images[-1].psnr_db)} dB   {width} x {height} px"
            rows.append(sheet_row(original, recon, shown(encoded.key), details))
    return images, rows


def _save_sheet(rows: Sequence[SheetRow], report: ReconstructReport) -> None:
    from sdvae.codec.decoded_image import ImageMark, save_marked
    from sdvae.data.contact_sheet import contact_sheet

    count = len(report.images)
    extent = f"{count} image{'s' if count > 1 else ''}" + (
        f", the first {len(rows)} shown" if len(rows) < count else ""
    )
    name = shown(report.vae)
    title = f"VAE {name if len(name) <= 60 else Path(name).name}"
    subtitle = f"PSNR {_decibels(report.mean_psnr_db)} dB, mean of {extent}"
    mark = ImageMark(key=_SHEET_KEY, latent_digest="", vae_digest=report.vae_digest)
    save_marked(contact_sheet(rows, title, subtitle), report.folders.contact_sheet, mark)


def _decibels(value: float | None) -> str:
    return "equal" if value is None else f"{value:.2f}"
