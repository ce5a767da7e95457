"""The folder of an evaluation comes from one object, and no torch is needed for it.

Tables of images survive names that spoil CSV, and numbers that do not exist.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest

from sdvae.report.result import EvaluationResult, load_result
from sdvae.report.write import csv_bytes, parquet_bytes, write_result

DATA = Path(__file__).parent / "data"


def test_what_was_read_is_written_again(tmp_path: Path) -> None:
    write_result(load_result(DATA / "result.json"), tmp_path)
    stored, written = (json.loads((folder / "result.json").read_text()) for folder in (DATA, tmp_path))
    assert written == stored
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    rows = (tmp_path / "per_image.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + len(stored["per_image"]["keys"]) * len(stored["vaes"])


KEYS = ["a,b/one.png", 'say "hi".png', "two\nlines\r.png", "caf\u00e9 \u732b.png", "bytes \udcff.png", "=1+1.png"]
VALUES = {
    "mine": {
        "psnr": [20.5, None, 1e-17, 0.1 + 0.2, 100.0, -1.0],
        "ms_ssim": [None, None, None, None, None, None],
    },
    "theirs": {"psnr": [30.0, 31.0, 32.0, 33.0, 34.0, 35.0], "ms_ssim": [0.5, None, 0.0, 0.25, 1.0, 0.75]},
}


@pytest.fixture
def result() -> EvaluationResult:
    table = {
        "keys": KEYS,
        "widths": [10, 20, 30, 40, 50, 60],
        "heights": [11, 21, 31, 41, 51, 61],
        "slices": ["a,b", "", "", "", "", ""],
        "values": VALUES,
    }
    return EvaluationResult(
        created="",
        sdvae_version="",
        protocol={},
        dataset={},
        environment={},
        metrics=[],
        skipped_metrics=[],
        vaes=[],
        comparisons=[],
        per_image=table,
    )


def test_csv_gives_every_name_and_number_back(result: EvaluationResult) -> None:
    text = csv_bytes(result).decode("utf-8", "surrogateescape")
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    assert list(rows[0]) == ["key", "slice", "width", "height", "vae", "psnr", "ms_ssim"]
    assert [(row["vae"], row["key"]) for row in rows] == [(id_, key) for id_ in ("mine", "theirs") for key in KEYS]
    for place, row in enumerate(rows):
        id_, image = ("mine", "theirs")[place // len(KEYS)], place % len(KEYS)
        assert (row["slice"], int(row["width"]), int(row["height"])) == (
            "a,b" if image == 0 else "",
            10 * image + 10,
            10 * image + 11,
        )
        for name in ("psnr", "ms_ssim"):
            expected = VALUES[id_][name][image]
            assert (row[name] == "") if expected is None else (float(row[name]) == expected)


def test_csv_is_utf_8_with_plain_line_ends_and_keeps_bytes_of_names_that_are_not(result: EvaluationResult) -> None:
    data = csv_bytes(result)
    assert "caf\u00e9 \u732b.png".encode() in data
    assert b"bytes \xff.png" in data
    assert data.startswith(b"key,slice,width,height,vae,psnr,ms_ssim\n") and data.endswith(b"\n")


def test_parquet_has_types_that_do_not_depend_on_the_numbers(result: EvaluationResult) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    data = parquet_bytes(result)
    assert data is not None
    table = pq.read_table(io.BytesIO(data))
    types = dict(zip(table.schema.names, table.schema.types, strict=True))
    assert types["key"] == types["slice"] == types["vae"] == pa.string()
    assert types["width"] == types["height"] == pa.int32()
    assert types["psnr"] == types["ms_ssim"] == pa.float64()
    assert table["psnr"].to_pylist() == VALUES["mine"]["psnr"] + VALUES["theirs"]["psnr"]
    assert table["ms_ssim"].to_pylist() == VALUES["mine"]["ms_ssim"] + VALUES["theirs"]["ms_ssim"]
    assert table["key"].to_pylist() == 2 * [key.replace("\udcff", "\ufffd") for key in KEYS]


def test_without_pyarrow_there_is_no_parquet(result: EvaluationResult, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    assert parquet_bytes(result) is None
