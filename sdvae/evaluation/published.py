"""Reconstruction numbers that others published, to stand beside ours. Standard library only.

None of these can be reproduced to the digit, because the authors left out what changes them; each row says so.
"""

from __future__ import annotations

import copy
from typing import Any

from sdvae.errors import ConfigError

__all__ = ["PUBLISHED", "published_rows"]

_NOT_STATED = (
    "How images were resized and cropped, the window of SSIM, the definition of PSIM and the code of FID were never "
    "published: not comparable to the digit. PSIM is not LPIPS (alex)."
)
_FT_MSE_CARD = "model card of stabilityai/sd-vae-ft-mse, https://huggingface.co/stabilityai/sd-vae-ft-mse"
_SDXL_CARD = "model card of stabilityai/sdxl-vae, https://huggingface.co/stabilityai/sdxl-vae"
_LDM_README = "README of CompVis/latent-diffusion, https://github.com/CompVis/latent-diffusion"

_COCO = ("COCO 2017 val, 256 x 256", 5000)
_LAION = ("LAION-Aesthetics 5+, subset, 256 x 256", 10000)
_IMAGENET = ("ImageNet val", None)  # neither size nor number is stated


def _row(
    vae: str, dataset: tuple[str, int | None], source: str, **metrics: tuple[float, float | None]
) -> dict[str, Any]:
    """metrics: name -> (mean, standard deviation over images or None)."""
    name, num_images = dataset
    return {
        "vae": vae,
        "dataset": name,
        "num_images": num_images,
        "metrics": {metric: {"mean": mean, "std": std} for metric, (mean, std) in metrics.items()},
        "source": source,
        "caveat": _NOT_STATED,
    }


# fmt: off
PUBLISHED: dict[str, list[dict[str, Any]]] = {
    "coco": [
        _row("SD 1.x original (kl-f8)", _COCO, _FT_MSE_CARD,
             rfid=(4.99, None), psnr=(23.4, 3.8), ssim=(0.69, 0.14), psim=(1.01, 0.28)),
        _row("sd-vae-ft-ema", _COCO, _FT_MSE_CARD,
             rfid=(4.42, None), psnr=(23.8, 3.9), ssim=(0.69, 0.13), psim=(0.96, 0.27)),
        _row("sd-vae-ft-mse", _COCO, _FT_MSE_CARD,
             rfid=(4.70, None), psnr=(24.5, 3.7), ssim=(0.71, 0.13), psim=(0.92, 0.27)),
        _row("sdxl-vae", _COCO, _SDXL_CARD,
             rfid=(4.42, None), psnr=(24.7, 3.9), ssim=(0.73, 0.13), psim=(0.88, 0.27)),
    ],
    "laion": [
        _row("SD 1.x original (kl-f8)", _LAION, _FT_MSE_CARD,
             rfid=(2.61, None), psnr=(26.0, 4.4), ssim=(0.81, 0.12), psim=(0.75, 0.36)),
        _row("sd-vae-ft-ema", _LAION, _FT_MSE_CARD,
             rfid=(1.77, None), psnr=(26.7, 4.8), ssim=(0.82, 0.12), psim=(0.67, 0.34)),
        _row("sd-vae-ft-mse", _LAION, _FT_MSE_CARD,
             rfid=(1.88, None), psnr=(27.3, 4.7), ssim=(0.83, 0.11), psim=(0.65, 0.34)),
    ],
    "imagenet": [
        _row("SD 1.x original (kl-f8)", _IMAGENET, _LDM_README,
             rfid=(0.90, None), psnr=(24.19, 4.19), psim=(1.02, 0.35)),
    ],
}
# fmt: on


def published_rows(name: str) -> list[dict[str, Any]]:
    """The rows of one set of images (coco, laion, imagenet), or of all; copies, as `published` in result.json.

    Raises: ConfigError for another name.
    """
    if name != "all" and name not in PUBLISHED:
        raise ConfigError(f"no published numbers '{name}'; expected one of {', '.join(PUBLISHED)}, all")
    return copy.deepcopy([row for set_name, rows in PUBLISHED.items() if name in (set_name, "all") for row in rows])
