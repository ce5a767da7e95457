"""The folder of an evaluation: its result, the table of all images and the page, written from one result."""

from __future__ import annotations

import json
from pathlib import Path

from sdvae.files import write_atomic
from sdvae.report.html import render_report
from sdvae.report.result import EvaluationResult
from sdvae.report.tables import csv_bytes, parquet_bytes

__all__ = ["RESULT_NAME", "write_result"]

RESULT_NAME = "result.json"


def write_result(result: EvaluationResult, folder: Path) -> None:
    """Write result.json, per_image.csv (and .parquet where pyarrow is installed) and report.html.

    result.json comes first: it is what costs hours, and the same command makes the others of it. Raises: OSError.
    """
    write_atomic((json.dumps(result.to_json(), allow_nan=False) + "\n").encode(), folder / RESULT_NAME)
    write_atomic(csv_bytes(result), folder / "per_image.csv")
    if (parquet := parquet_bytes(result)) is not None:
        write_atomic(parquet, folder / "per_image.parquet")
    write_atomic(render_report(result).encode("utf-8", "surrogateescape"), folder / "report.html")
