"""Each case runs in a fresh process, beside a stand-in package that registers what torchvision's `__init__` does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors

REGISTERS_SHAPES = """
import torch

@torch.library.register_fake("torchvision::nms")
def meta_nms(dets, scores, iou_threshold):
    return dets

@torch.library.register_fake("torchvision::qnms")
def meta_qnms(dets, scores, iou_threshold):
    return dets
"""

# What the compiled library of a sound torchvision does on load; it fails if somebody declared the names before.
DECLARES_OPERATORS = """
import torch

library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

REPAIR = "from sdvae._torchvision import ensure_torchvision_importable as repair\nrepair()\n"


def run(code: str, site: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parent.parent
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(site), str(root)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def make_torchvision(site: Path, init: str, extension: bytes | None) -> None:
    package = site / "torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(init)
    if extension is not None:
        (package / "_C.so").write_bytes(extension)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    make_torchvision(tmp_path, REGISTERS_SHAPES, extension=b"\x7fELF not for this torch")
    return tmp_path


def test_a_second_import_succeeds_when_the_repair_comes_after_a_failed_one(broken: Path) -> None:
    failed = "try:\n    import torchvision\nexcept RuntimeError as error:\n    print(error)\n"
    result = run(f"{failed}{REPAIR}import torchvision\nrepair()", broken)
    assert result.returncode == 0, result.stderr
    assert "operator torchvision::nms does not exist" in result.stdout


def test_the_model_imports_beside_a_broken_torchvision(broken: Path) -> None:
    result = run(f"import sdvae.model.autoencoder, torchvision\n{REPAIR}", broken)
    assert result.returncode == 0, result.stderr


def test_a_torchvision_without_its_compiled_library_imports_after_the_repair(tmp_path: Path) -> None:
    make_torchvision(tmp_path, REGISTERS_SHAPES, extension=None)
    result = run(f"{REPAIR}import torchvision", tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(os.name == "nt", reason="the stand-in for a compiled library is a shared object")
def test_a_sound_torchvision_is_left_alone(tmp_path: Path) -> None:
    # Any library that loads will do: the repair must then declare nothing.
    loadable = next(Path(safetensors.__file__).parent.glob("_safetensors_rust*"))
    make_torchvision(tmp_path, DECLARES_OPERATORS + REGISTERS_SHAPES, extension=loadable.read_bytes())
    result = run(f"{REPAIR}import torchvision", tmp_path)
    assert result.returncode == 0, result.stderr


def test_where_torchvision_is_absent_not_even_torch_is_imported(tmp_path: Path) -> None:
    hide = "import sys, importlib.util\nfind = importlib.util.find_spec\n"
    hide += "importlib.util.find_spec = lambda name: None if name == 'torchvision' else find(name)\n"
    result = run(f"{hide}{REPAIR}assert 'torch' not in sys.modules", tmp_path)
    assert result.returncode == 0, result.stderr
