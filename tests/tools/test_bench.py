"""The benchmarks run from end to end, on a tiny network, and their tables say what they measured."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import pytest
from forked import fork
from jobs import run_script

BENCH = Path(__file__).parents[2] / "tools" / "bench"


def run(folder: Path, script: str, *words: object) -> str:
    process = fork(run_script, BENCH / script, [str(word) for word in words], folder=folder)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


@pytest.mark.slow
def test_the_network_is_measured_and_shown(tmp_path: Path) -> None:
    path, page = tmp_path / "speed.json", tmp_path / "speed.md"
    words = ["--config", "tiny", "--sizes", 64, "--batches", 1, "--operations", "decode", "--threads", 1]
    run(tmp_path, "network.py", "--json", path, *words, "--subjects", "sdvae", "diffusers", "--repeats", 2)
    result = json.loads(path.read_text())
    (cell,) = result["cells"]
    assert cell["complete"] and not cell["left_out"] and list(cell["subjects"]) == ["diffusers", "sdvae"]
    stock, ours = cell["subjects"].values()
    assert len(ours["seconds"]) == 2 and min(ours["seconds"]) > 0
    assert ours["ratio"] == pytest.approx(median(stock["seconds"]) / median(ours["seconds"]))
    assert stock["ratio"] == 1 and 0 <= ours["difference"] < 1e-4 < cell["output_scale"]
    assert 10**8 < ours["fresh"]["resident_bytes"] <= ours["fresh"]["peak_bytes"] < 10**10

    page.write_text("before\n<!-- table -->\nold\n<!-- /table -->\nafter\n")
    run(tmp_path, "show.py", path, "--write-into", page)
    text = page.read_text()
    assert text.startswith("before\n<!-- table -->\n") and text.endswith("<!-- /table -->\nafter\n")
    assert "old" not in text
    assert f"{ours['ratio']:.2f}" in text and "decode" in text and result["machines"][0]["cpu"] in text


@pytest.mark.slow
def test_memory_is_measured_against_a_limit_and_what_does_not_fit_is_said(tmp_path: Path) -> None:
    path = tmp_path / "memory.json"
    words = ["--config", "tiny", "--sizes", 64, "--operations", "decode", "--rounds", 1, "--threads", 1]
    shown = run(tmp_path, "memory.py", "--json", path, *words, "--subjects", "diffusers", "--limits", "3GB", "10MB")
    (cell,) = json.loads(path.read_text())["cells"]
    stock, roomy, tight = cell["subjects"].values()
    assert len(stock["seconds"]) == len(roomy["seconds"]) == 1 and roomy["difference"] < 1e-5
    assert 10**8 < roomy["peak_bytes"][0] < 3 * 10**9
    assert not tight["seconds"] and "max_memory" in tight["error"]
    assert "decode 64 px | sdvae 3GB" in shown and tight["error"][:40] in shown


@pytest.mark.slow
def test_the_start_of_a_command_is_measured_against_torch(tmp_path: Path) -> None:
    path = tmp_path / "startup.json"
    shown = run(tmp_path, "startup.py", "--cells", "sdvae --help", "--repeats", 2, "--json", path)
    (cell,) = json.loads(path.read_text())["cells"].values()
    assert len(cell["pairs"]) == 2 and cell["imports"] == []
    assert all(0 < help_s < torch_s for torch_s, help_s in cell["pairs"]) and cell["ratio"] < 1
    assert "sdvae --help" in shown and f"{cell['ratio']:.2f} (" in shown
