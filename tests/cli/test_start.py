"""What starting a command imports, in fresh interpreters: the libraries that take longer than the work stay away."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden" / "v0.1.0"

# All in one interpreter, since each shows what has been imported up to its end.
COMMANDS = """
reconstruct images reconstructed
encode images latents --vae vae
decode latents decoded --vae vae
inspect latents
inspect vae
verify latents --images images --vae vae
calibrate vae images
check vae images --size 32 --probe-size 32
fix-fp16 vae fixed images --size 32 --probe-size 32 --force
convert vae ldm.safetensors --to ldm
convert ldm.safetensors back --to diffusers
"""
HEAVY = {
    "accelerate",
    "datasets",
    "diffusers",
    "huggingface_hub",
    "lpips",
    "torch._dynamo",
    "torchvision",
    "transformers",
}

PROGRAM = f"""
import sys
from click.testing import CliRunner
from sdvae.cli.main import cli
for line in {COMMANDS!r}.strip().splitlines():
    result = CliRunner().invoke(cli, line.split())
    assert result.exit_code == 0, (line, result.output, result.exception)
    assert not (heavy := {HEAVY!r} & set(sys.modules)), (line, heavy)
"""


def test_commands_import_neither_diffusers_nor_transformers(tmp_path: Path) -> None:
    for name in ("images", "vae"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
