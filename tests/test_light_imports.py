"""What a part of the package imports, in fresh interpreters: what it does not need stays away."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RESULT = Path(__file__).parent / "report" / "data" / "result.json"

NETWORKS = {"lpips", "torchvision", "DISTS_pytorch", "torch_fidelity", "diffusers"}

# The statements of a table run one after the other in one interpreter; each shows what has been imported up to its end.
WITHOUT_TORCH = [
    ("import sdvae", {"torch", "numpy", "PIL", "diffusers", "yaml", "click"}),
    ("import sdvae.data.sources.files", {"torch", "numpy", "PIL"}),
    ("import sdvae.report.html, sdvae.report.result", {"torch", "numpy", "PIL"}),
    (
        f"sdvae.report.html.render_report(sdvae.report.result.load_result({str(RESULT)!r}))",
        {"torch", "numpy", "PIL"},
    ),
    ("import sdvae.checkpoints.formats, sdvae.checkpoints.keys, sdvae.checkpoints.compat.loaders", {"torch"}),
    ("import sdvae.cli.report, sdvae.evaluation.compare, sdvae.report.write, pathlib", {"torch"}),
    (
        f"sdvae.report.write.write_result(sdvae.report.result.load_result({str(RESULT)!r}), pathlib.Path('written'))",
        {"torch"},
    ),
]
WITH_TORCH = [("import sdvae.metrics.table", NETWORKS), ("[getattr(sdvae, name) for name in sdvae.__all__]", set())]


@pytest.mark.parametrize("table", [WITHOUT_TORCH, WITH_TORCH], ids=["without torch", "with torch"])
def test_what_is_not_needed_is_not_imported(table: list[tuple[str, set[str]]], tmp_path: Path) -> None:
    (tmp_path / "written").mkdir()
    checks = (f"{line}\nassert not (found := {away!r} & set(sys.modules)), ({line!r}, found)" for line, away in table)
    program = "\n".join(("import sys", *checks)).replace("set() &", "frozenset() &")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
