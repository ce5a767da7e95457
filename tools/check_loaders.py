"""Do programs that take a VAE take ours? Their own classes, from the package index, load what `sdvae convert` writes.

usage: python tools/check_loaders.py [--work DIR]

It downloads wheels without their dependencies, imports the autoencoder classes from them, exports VAEs of the real
width with random weights, loads the exports as those programs do, and compares encode and decode with ours. Needs a
package index, a minute and 3 GB of memory. Exit code 1 where a file is not taken whole or numbers differ by over 1e-4.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import sdvae

WHEELS = ("stable-diffusion-sdkit==2.1.5", "invokeai==6.14.2", "einops==0.8.2")
LEVELS = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
FLUX = {
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}
NETWORK = {"ch": 128, "out_ch": 3, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "in_channels": 3}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for wheels and exports; default: a temporary one")
    work = parser.parse_args().work or Path(tempfile.mkdtemp())
    put_wheels_on_the_path(work / "wheels")
    torch.manual_seed(0)
    problems = [
        check("CompVis ldm AutoencoderKL", work, {}, compvis_moments_and_recon),
        check("flux AutoEncoder", work, FLUX, flux_moments_and_recon),
    ]
    return int(any(problems))


def put_wheels_on_the_path(folder: Path) -> None:
    for wheel in WHEELS:
        name, version = wheel.split("==")
        pattern = f"{name.replace('-', '_')}-{version}-*.whl"
        if not list(folder.glob(pattern)):
            subprocess.run(
                [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, wheel], check=True
            )
        with zipfile.ZipFile(next(folder.glob(pattern))) as archive:
            archive.extractall(folder / "unpacked")
    sys.path.append(str(folder / "unpacked"))
    lightning: Any = types.ModuleType("pytorch_lightning")  # only the base class is used
    lightning.LightningModule = nn.Module
    sys.modules["pytorch_lightning"] = lightning


Results = tuple[torch.Tensor, torch.Tensor]


def check(name: str, work: Path, fields: dict[str, Any], run: Callable[[Path, Results], Results]) -> bool:
    """Print one line about a client; True where something is wrong."""
    vae = sdvae.AutoencoderKL(**LEVELS, **fields).eval()  # type: ignore[arg-type]
    folder = work / name.split()[0].lower()
    sdvae.save_autoencoder(vae, folder, overwrite=True)
    file = folder.with_suffix(".safetensors")
    command = ["convert", folder, file, "--to", "ldm", "--overwrite"]
    subprocess.run([sys.executable, "-m", "sdvae", *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    x = torch.rand(1, 3, 64, 96) * 2 - 1
    with torch.inference_mode():
        moments = vae.encode(x).latent_dist.parameters
        z = moments.chunk(2, dim=1)[0]
        theirs = run(file, (x, z))
        errors = [float((a - b).abs().max()) for a, b in zip(theirs, (moments, vae.decode(z).sample), strict=True)]
    bad = max(errors) > 1e-4
    print(f"{name}: {'WRONG' if bad else 'ok'}, moments differ by {errors[0]:.1e}, images by {errors[1]:.1e}")
    return bad


def compvis_moments_and_recon(file: Path, inputs: Results) -> Results:
    from ldm.models.autoencoder import AutoencoderKL

    model = AutoencoderKL(
        ddconfig=NETWORK
        | {"double_z": True, "z_channels": 4, "resolution": 256, "attn_resolutions": [], "dropout": 0.0},
        lossconfig={"target": "torch.nn.Identity"},
        embed_dim=4,
    ).eval()
    model.load_state_dict(load_file(file), strict=True)
    x, z = inputs
    return model.encode(x).parameters, model.decode(z)


def flux_moments_and_recon(file: Path, inputs: Results) -> Results:
    from invokeai.backend.flux.modules.autoencoder import AutoEncoder, AutoEncoderParams

    model = AutoEncoder(
        AutoEncoderParams(resolution=256, z_channels=16, scale_factor=0.3611, shift_factor=0.1159, **NETWORK)
    ).eval()
    model.load_state_dict(load_file(file), strict=True)
    x, z = inputs
    return model.encoder(x), model.decode((z - 0.1159) * 0.3611)  # it takes latents


if __name__ == "__main__":
    sys.exit(main())
