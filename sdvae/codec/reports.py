"""What a run did, as plain data: the text and the JSON of the command line, and its exit code. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from sdvae.data.sources.files import FileReason

__all__ = ["CodecReport", "DecodeReport", "EncodeReport", "join_reports"]


@dataclass(frozen=True, kw_only=True)
class CodecReport:
    """Result of a run over a folder. `done + skipped + failed == total`."""

    command: ClassVar[str]

    out: str  # the output folder
    vae: str  # as the user called it
    vae_digest: str
    device: str
    dtype: str  # of the computation
    done: int
    skipped: int  # up to date already
    failed: int
    seconds: float  # from the first read to the last write, without loading the VAE
    megapixels: float  # of the images that were done, before padding
    failures: tuple[FileReason, ...]
    notes: tuple[FileReason, ...]  # about single files, e.g. that only the first frame of an animation was taken
    warnings: tuple[str, ...]  # about the run, e.g. that memory ran out and batches were split

    @property
    def total(self) -> int:
        return self.done + self.skipped + self.failed

    @property
    def images_per_s(self) -> float:
        return self.done / self.seconds if self.seconds else 0.0

    @property
    def megapixels_per_s(self) -> float:
        return self.megapixels / self.seconds if self.seconds else 0.0

    @property
    def exit_code(self) -> int:
        """0: all is done; 3: finished, but some files failed."""
        return 3 if self.failed else 0

    def to_json(self) -> dict[str, Any]:
        """All fields and rates, ready for `json.dumps`."""
        return {
            "command": self.command,
            **asdict(self),
            "total": self.total,
            "images_per_s": self.images_per_s,
            "megapixels_per_s": self.megapixels_per_s,
            "exit_code": self.exit_code,
        }


@dataclass(frozen=True, kw_only=True)
class EncodeReport(CodecReport):
    """Result of encoding a folder."""

    command = "encode"

    format: str  # of the files
    manifest: str  # path of the list of all latents in `out`, with digests


@dataclass(frozen=True, kw_only=True)
class DecodeReport(CodecReport):
    """Result of decoding a folder."""

    command = "decode"


Report = TypeVar("Report", bound=CodecReport)


def join_reports(reports: Sequence[Report]) -> Report:
    """One report of the parts of a run that went on at the same time."""
    if len(reports) == 1:
        return reports[0]
    from sdvae.latents.manifest import MANIFEST_NAME  # --help needs the reports, and no library

    # the last part to end has merged the manifests of all
    merged = [
        {"manifest": report.manifest}
        for report in reports
        if isinstance(report, EncodeReport) and Path(report.manifest).name == MANIFEST_NAME
    ]
    return replace(
        reports[0],
        device=", ".join(sorted({report.device for report in reports})),
        done=sum(report.done for report in reports),
        skipped=sum(report.skipped for report in reports),
        failed=sum(report.failed for report in reports),
        seconds=max(report.seconds for report in reports),
        megapixels=sum(report.megapixels for report in reports),
        failures=tuple(sorted((each for report in reports for each in report.failures), key=lambda each: each.key)),
        notes=tuple(sorted((each for report in reports for each in report.notes), key=lambda each: each.key)),
        warnings=tuple(dict.fromkeys(each for report in reports for each in report.warnings)),
        **(merged[0] if merged else {}),
    )
