"""The folder of an evaluation comes from one object, and no torch is needed for it."""

from __future__ import annotations

import json
from pathlib import Path

from sdvae.report.result import load_result
from sdvae.report.write import write_result

DATA = Path(__file__).parent / "data"


def test_what_was_read_is_written_again(tmp_path: Path) -> None:
    write_result(load_result(DATA / "result.json"), tmp_path)
    stored, written = (json.loads((folder / "result.json").read_text()) for folder in (DATA, tmp_path))
    assert written == stored
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    rows = (tmp_path / "per_image.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + len(stored["per_image"]["keys"]) * len(stored["vaes"])
