"""The folder of an evaluation: its result, the table of all images and the page, written from one result.

The table is there as CSV, and as Parquet where pyarrow is installed.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdvae.files import write_atomic
from sdvae.report.html import render_report
from sdvae.report.result import EvaluationResult

__all__ = ["RESULT_NAME", "csv_bytes", "parquet_bytes", "write_result"]

RESULT_NAME = "result.json"
_TEXT = ("key", "slice", "vae")
_WHOLE = ("width", "height")


def write_result(result: EvaluationResult, folder: Path) -> None:
    """Write result.json, per_image.csv (and .parquet where pyarrow is installed) and report.html.

    result.json comes first: it is what costs hours, and the same command makes the others of it. Raises: OSError.
    """
    write_atomic((json.dumps(result.to_json(), allow_nan=False) + "\n").encode(), folder / RESULT_NAME)
    write_atomic(csv_bytes(result), folder / "per_image.csv")
    if (parquet := parquet_bytes(result)) is not None:
        write_atomic(parquet, folder / "per_image.parquet")
    write_atomic(render_report(result).encode("utf-8", "surrogateescape"), folder / "report.html")


def csv_bytes(result: EvaluationResult) -> bytes:
    """One row per VAE and image: key, slice, width, height, vae, then the metrics; empty where there is no number."""
    columns = _columns(result)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))  # None becomes an empty cell
    return buffer.getvalue().encode("utf-8", "surrogateescape")


def parquet_bytes(result: EvaluationResult) -> bytes | None:
    """The same as Parquet; None where pyarrow, which comes with the extra, is not installed."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        return None
    columns = _columns(result)
    for name in _TEXT:  # Parquet holds UTF-8 alone
        columns[name] = [text.encode("utf-8", "surrogateescape").decode("utf-8", "replace") for text in columns[name]]
    types = dict.fromkeys(_TEXT, pa.string()) | dict.fromkeys(_WHOLE, pa.int32())
    schema = pa.schema([(name, types.get(name, pa.float64())) for name in columns])
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, schema=schema), buffer)
    return buffer.getvalue()


def _columns(result: EvaluationResult) -> dict[str, Sequence[Any]]:
    table = result.per_image
    repeated = {"key": "keys", "slice": "slices", "width": "widths", "height": "heights"}
    columns: dict[str, Sequence[Any]] = {
        name: [value for _ in table["values"] for value in table[source]] for name, source in repeated.items()
    }
    columns["vae"] = [id_ for id_ in table["values"] for _ in table["keys"]]
    names = list(next(iter(table["values"].values()), ()))
    return columns | {name: [value for each in table["values"].values() for value in each[name]] for name in names}
