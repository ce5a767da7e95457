#!/usr/bin/env python3
"""Is a training step of sdvae faster than one written with diffusers, does it take less memory, what gives how much?

    python tools/bench/train.py                                                          # some minutes
    python tools/bench/train.py --size 32 --batch 2 --widths 16,32 --groups 4 --repeats 1  # does it run at all: seconds

A step is one update of the autoencoder and, with a discriminator, one update of that: all `training.steps` counts.
Compared, in float32, with the same weights, batches and losses (L1, LPIPS of VGG, KL; PatchGAN, hinge, balanced at the
last layer), with AdamW, clipping and averaged weights:
- ours: `sdvae train` between the loading of a batch and the log, as it runs, with accelerate.
- script: a loop as that of diffusers' examples/research_projects/autoencoderkl/train_autoencoderkl.py: diffusers'
  AutoencoderKL and the package lpips in the default layout, the balance by autograd on both losses, then backwards
  through their sum. What is wrong there is repaired here, the cheaper way where there are two: LPIPS has a gradient; no
  gradient stays behind in the discriminator, the autoencoder or LPIPS' heads; weights are averaged once per step, and
  before the discriminator sets in nothing is computed for it. No accelerate, scheduler, progress bar or log around it.
- script, two passes: the script makes its two updates by turns, on two batches, and encodes and decodes for both.
  Here, without a graph for the second one. Ours and the row `script` encode and decode once.
- script, unrepaired start: while the discriminator is still off, the script runs it and balances it all the same.

Rows `ours, ...` undo one thing each:
- default layout: training.channels_last=false (LPIPS stays in channels_last)
- package lpips: that package's module, in channels_last, in place of sdvae's
- through the sum: the balance as the script computes it, by which the discriminator is run through backwards twice
- both: the last two together, by which LPIPS is as well
- looping Adam: without torch's fused kernel

How to read the table: steps per second from the median of all repeats, with the slowest and the fastest behind it. All
rows run in one process by turns, in the other direction in every other repeat, so that a machine that warms up or is
shared slows all. `ours faster` is the row's median time by ours. `difference` is the one between the row's losses in
the first step and ours, as a part of ours; there all have the same weights, batch and noise. `peak` is by how much a
fresh process grows, from all networks in place to the most it takes in three steps (Linux only).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common import by_turns, call_child, cpu_name, peak_bytes, reset_peak, resident_bytes, versions
from sdvae._torchvision import ensure_torchvision_importable
from sdvae.data.loader import Batch
from sdvae.features.lpips import LPIPS, build_lpips
from sdvae.training import loop
from sdvae.training.build import build_autoencoder
from sdvae.training.config import (
    AdversarialConfig,
    DataConfig,
    KLConfig,
    LossConfig,
    PerceptualConfig,
    TrainConfig,
    TrainingConfig,
)
from sdvae.training.data import open_data
from sdvae.training.losses import adaptive_weight, kl_loss, l1_loss
from sdvae.training.step import Adversary, Reconstruction

ensure_torchvision_importable()  # before diffusers and lpips

PHOTOS = Path(loop.__file__).parents[1] / "assets" / "photos"
WARMUP = 2  # steps before the counted ones
KL_WEIGHT, DISC_WEIGHT, LR, BETAS, DECAY, MAX_NORM, EMA_DECAY = 1e-6, 0.5, 1e-4, (0.9, 0.999), 1e-2, 1.0, 0.999
MODES = {"on": "with discriminator", "off": "without discriminator"}
OURS: dict[str, dict[str, bool]] = {
    "ours": {},
    "ours, default layout": {"default_layout": True},
    "ours, package lpips": {"package_lpips": True},
    "ours, through the sum": {"through_sum": True},
    "ours, both": {"package_lpips": True, "through_sum": True},
    "ours, looping Adam": {"looping_adam": True},
}
SCRIPTS = {"on": ("script", "script, two passes"), "off": ("script", "script, unrepaired start")}
WITH_PEAK = ("ours", *SCRIPTS["on"], *SCRIPTS["off"])


@dataclass(frozen=True)
class Setting:
    """What all rows share."""

    widths: tuple[int, ...]
    layers: int
    groups: int
    size: int  # px
    batch: int
    is_adversarial: bool
    weights_path: Path  # of VGG
    run_dir: Path

    @property
    def model(self) -> dict[str, Any]:
        return {
            "block_out_channels": self.widths,
            "layers_per_block": self.layers,
            "norm_num_groups": self.groups,
            "sample_size": self.size,
        }

    @property
    def data(self) -> DataConfig:
        return DataConfig(path=str(PHOTOS), crop_px=self.size, crop="resized", num_val_images=0)

    def batches(self) -> list[Tensor]:
        """Two batches of crops of photographs, each (B, 3, size, size), in the default layout."""
        batches = open_data(self.data, seed=0)[0].batches(batch_size=self.batch)
        return [next(batches).x for _ in range(2)]


class PackageLPIPS(nn.Module):
    """The module of the package lpips with the weights of ours, in the place of ours."""

    def __init__(self, ours: LPIPS) -> None:
        super().__init__()
        import lpips

        with torch.device("meta"):
            self.net = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
        self.net.net, self.net.scaling_layer = ours.backbone, ours.scaling
        for index, lin in enumerate(self.net.lins):
            lin.model[1].weight = nn.Parameter(ours.get_buffer(f"head{index}"), requires_grad=False)
        self.min_px = ours.min_px

    def features(self, x: Tensor) -> list[Tensor]:
        return [x]

    def distance(self, recon: Tensor, target: Sequence[Tensor]) -> Tensor:
        distance: Tensor = self.net(recon, target[0])  # (B, 1, 1, 1)
        return distance.flatten()

    def forward(self, recon: Tensor, x: Tensor) -> Tensor:
        return self.distance(recon, [x])


def loss_through_sum(
    output: Reconstruction,
    x: Tensor,
    config: LossConfig,
    step: int,
    perceptual: LPIPS | None = None,
    adversary: Adversary | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """In place of `generator_loss`, of its losses those that are compared here: gradients of both, then of the sum."""
    assert perceptual is not None and adversary is not None
    nll = l1_loss(output.recon, x) + perceptual(output.recon, x).mean()
    g_loss = -adversary.module.logits(output.recon).mean()
    grads = [torch.autograd.grad(loss, adversary.last_layer, retain_graph=True)[0] for loss in (nll, g_loss)]
    balance = adaptive_weight(grads[0], grads[1], max_weight=config.adversarial.max_adaptive_weight / x[0].numel())
    total = nll + config.kl.weight * kl_loss(output.moments, x) + config.adversarial.weight * balance * g_loss
    return total, {"loss": total.detach(), "kl_loss": kl_loss(output.moments, x).detach()}


class Ours:
    """The step of `sdvae train`, by the object that carries a run out."""

    def __init__(
        self,
        setting: Setting,
        *,
        default_layout: bool = False,
        package_lpips: bool = False,
        through_sum: bool = False,
        looping_adam: bool = False,
    ) -> None:
        adversarial = AdversarialConfig(weight=DISC_WEIGHT if setting.is_adversarial else 0.0, disc_start=0)
        config = TrainConfig(
            run_dir=str(setting.run_dir),
            data=setting.data,
            model=setting.model,
            loss=LossConfig(
                perceptual=PerceptualConfig(weight=1.0, weights_path=str(setting.weights_path)),
                kl=KLConfig(weight=KL_WEIGHT),
                adversarial=adversarial,
            ),
            training=TrainingConfig(
                batch_size=setting.batch,
                optimizer="adamw",
                weight_decay=DECAY,
                lr=LR,
                betas=BETAS,
                warmup_steps=0,
                max_grad_norm=MAX_NORM,
                ema_decay=EMA_DECAY,
                channels_last=not default_layout,
                cpu=True,
                trackers=(),
            ),
        )
        run: Any = loop._Run(config, resume=False, overwrite=False)
        self.run = run
        if package_lpips:
            self.run.perceptual = PackageLPIPS(build_lpips("vgg", setting.weights_path))
        if looping_adam:
            for optimizer in (self.run.optimizer, *([self.run.d_optimizer] if setting.is_adversarial else [])):
                for group in optimizer.param_groups:
                    group.update(fused=False, foreach=False)
        self.patched = patch.object(loop, "generator_loss", loss_through_sum) if through_sum else nullcontext()
        self.layout = torch.contiguous_format if default_layout else torch.channels_last

    def step(self, batches: Sequence[Tensor]) -> dict[str, float]:
        with self.patched:
            logs = self.run._step(self._laid_out(batches))
        return {name: float(value) for name, value in logs.items()}

    def _laid_out(self, batches: Sequence[Tensor]) -> Iterator[Batch]:
        for x in batches:
            yield Batch(x=x.to(memory_format=self.layout), num_read=len(x), num_small=0, unreadable=())


def patch_discriminator() -> nn.Sequential:
    """The PatchGAN of pix2pix with three layers and BatchNorm, as plain torch layers."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
    for width, out_width, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
        layers += [nn.Conv2d(width, out_width, 4, stride=stride, padding=1, bias=False), nn.BatchNorm2d(out_width)]
        layers += [nn.LeakyReLU(0.2, inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(512, 1, 4, padding=1))


class Script:
    """The step as one writes it with diffusers; losses are sums over an image there, and logged per element here."""

    def __init__(self, setting: Setting, *, passes: int = 1, balances_always: bool = False) -> None:
        from diffusers import AutoencoderKL
        from diffusers.training_utils import EMAModel

        ours = build_autoencoder(setting.model, seed=0)
        self.vae: Any = AutoencoderKL(**{name: ours.config[name] for name in (*setting.model, *_BLOCK_TYPES)})
        self.vae.load_state_dict(ours.state_dict())
        self.vae.train()
        perceptual = PackageLPIPS(build_lpips("vgg", setting.weights_path))
        self.perceptual = perceptual.to(memory_format=torch.contiguous_format).net  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(self.vae.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY)
        self.ema = EMAModel(self.vae.parameters(), decay=EMA_DECAY)
        self.is_adversarial, self.passes, self.balances_always = setting.is_adversarial, passes, balances_always
        if self.is_adversarial or balances_always:
            self.discriminator = patch_discriminator()
            self.d_optimizer = torch.optim.AdamW(
                self.discriminator.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY
            )

    def step(self, batches: Sequence[Tensor]) -> dict[str, float]:
        x = batches[0]
        recon, logs = self._update_generator(x)
        if self.is_adversarial:
            if self.passes == 2:
                x = batches[1]
                with torch.no_grad():
                    recon, _ = self._reconstruct(x)
            logs |= self._update_discriminator(recon.detach(), x)
        self.ema.step(self.vae.parameters())
        return logs

    def _reconstruct(self, x: Tensor) -> tuple[Tensor, Any]:
        posterior = self.vae.encode(x).latent_dist
        return self.vae.decode(posterior.sample()).sample, posterior

    def _update_generator(self, x: Tensor) -> tuple[Tensor, dict[str, float]]:
        recon, posterior = self._reconstruct(x)
        nll = (F.l1_loss(recon, x, reduction="none") + self.perceptual(recon, x)).sum() / len(x)
        kl = posterior.kl().sum() / len(x)
        loss, logs = nll + KL_WEIGHT * kl, {"kl_loss": kl.item() / x[0].numel()}
        if self.is_adversarial or self.balances_always:
            self.discriminator.requires_grad_(False)
            g_loss = -self.discriminator(recon).mean()
            last = self.vae.decoder.conv_out.weight
            nll_grad, g_grad = (torch.autograd.grad(part, last, retain_graph=True)[0] for part in (nll, g_loss))
            balance = (nll_grad.norm() / (g_grad.norm() + 1e-4)).clamp(0.0, 1e4).detach()
            loss = loss + (DISC_WEIGHT if self.is_adversarial else 0.0) * balance * g_loss
            self.discriminator.requires_grad_(True)
            logs |= {"g_loss": g_loss.item(), "adaptive_weight": balance.item()}
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.vae.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return recon, logs | {"loss": loss.item() / x[0].numel()}

    def _update_discriminator(self, recon: Tensor, x: Tensor) -> dict[str, float]:
        real, fake = self.discriminator(x), self.discriminator(recon)
        loss = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.discriminator.parameters(), MAX_NORM)
        self.d_optimizer.step()
        self.d_optimizer.zero_grad(set_to_none=True)
        return {"d_loss": loss.item(), "logits_real": real.mean().item(), "logits_fake": fake.mean().item()}


_BLOCK_TYPES = ("down_block_types", "up_block_types")


def build(row: str, setting: Setting) -> Any:
    if row in OURS:
        return Ours(setting, **OURS[row])
    return Script(setting, passes=2 if "two passes" in row else 1, balances_always="unrepaired" in row)


def rows_of(mode: str) -> list[str]:
    ours = [row for row, changes in OURS.items() if mode == "on" or not changes.get("through_sum")]
    return [*ours, *SCRIPTS[mode]]


def compare_speed(mode: str, setting: Setting, repeats: int) -> dict[str, dict[str, Any]]:
    """Seconds of each row's steps, by turns, and how far its losses in the first step are from ours."""
    contenders = {row: build(row, setting) for row in rows_of(mode)}
    batches = setting.batches()
    _share_discriminator(contenders)
    times: dict[str, list[float]] = {row: [] for row in contenders}
    first: dict[str, dict[str, float]] = {}
    for repeat in range(WARMUP + repeats):
        for row in by_turns(repeat, list(contenders)):
            torch.manual_seed(repeat)  # the noise on z
            start = time.perf_counter()
            logs = contenders[row].step(batches)
            if repeat >= WARMUP:
                times[row].append(time.perf_counter() - start)
            first.setdefault(row, logs)
    return {
        row: {
            "seconds": seconds,
            "ours_faster": median(seconds) / median(times["ours"]),
            "difference": _difference(first[row], first["ours"]),
        }
        for row, seconds in times.items()
    }


def _share_discriminator(contenders: dict[str, Any]) -> None:
    """Ours draws one from the seed of the run, the same in all; the scripts take it over."""
    discriminator = contenders["ours"].run.discriminator
    for script in contenders.values():
        if isinstance(script, Script) and discriminator is not None:
            # strict but for the running statistics, which ours has not
            own = {name: value for name, value in script.discriminator.state_dict().items() if _is_statistic(name)}
            script.discriminator.load_state_dict(own | discriminator.net.main.state_dict())


def _is_statistic(name: str) -> bool:
    return "running" in name or "num_batches" in name


def _difference(logs: dict[str, float], ours: dict[str, float]) -> float:
    """Largest relative difference of the losses that both have; the second pass of a script sees other images."""
    names = [name for name in ("loss", "kl_loss", "g_loss", "adaptive_weight") if name in logs and name in ours]
    return max(abs(logs[name] - ours[name]) / abs(ours[name]) for name in names)


def compare_peaks(mode: str, weights_path: Path) -> dict[str, int]:
    """Growth in bytes, measured by this script with the same arguments in processes of their own."""
    command = [__file__, *sys.argv[1:], "--weights", str(weights_path), "--measure-peak", mode]

    return {row: int(call_child([*command, row])) for row in rows_of(mode) if row in WITH_PEAK}


def measure_peak(row: str, setting: Setting) -> int:
    """Bytes by which this process grows in three steps, from when all networks are there."""
    contender, batches = build(row, setting), setting.batches()
    before = resident_bytes()
    reset_peak()
    for _ in range(3):  # the optimizer's states come with the first
        contender.step(batches)
    return peak_bytes() - before


def write_random_vgg(folder: Path) -> Path:
    """Weights for VGG-16 that keep the scale of what passes through: times and memory do not depend on them."""
    widths = {0: (3, 64), 2: (64, 64), 5: (64, 128), 7: (128, 128), 10: (128, 256), 12: (256, 256), 14: (256, 256)}
    widths |= {17: (256, 512)} | {index: (512, 512) for index in (19, 21, 24, 26, 28)}
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}
    for index, (width, out_width) in widths.items():
        kernel = torch.randn(out_width, width, 3, 3, generator=generator) * (2 / (9 * width)) ** 0.5
        weights |= {f"features.{index}.weight": kernel, f"features.{index}.bias": torch.zeros(out_width)}
    path = folder / "vgg16.pth"
    torch.save(weights, path)
    return path


def as_table(report: dict[str, Any]) -> str:
    head = (
        "widths {widths}, {layers} layers per block, {size_px} px, batch {batch}, {threads} threads, "
        "{repeats} repeats, torch {torch}, diffusers {diffusers}, {cpu}"
    )
    lines = [head.format(**report["setting"])]
    for mode, rows in report["modes"].items():
        title = MODES[mode]
        lines += ["", f"{title:28}{'steps per second':>24}{'ours faster':>13}{'difference':>12}{'peak, MB':>10}"]
        for row, result in rows.items():
            rates = [1 / seconds for seconds in result["seconds"]]
            rate = f"{1 / median(result['seconds']):.3f} ({min(rates):.3f} .. {max(rates):.3f})"
            peak = f"{result['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in result else ""
            lines.append(f"{row:28}{rate:>24}{result['ours_faster']:>13.2f}{result['difference']:>12.0e}{peak:>10}")
    return "\n".join(lines)


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="32,64,128,128", help="block_out_channels (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=1, help="layers_per_block (default: %(default)s)")
    parser.add_argument("--groups", type=int, default=16, help="norm_num_groups (default: %(default)s)")
    parser.add_argument("--size", type=int, default=64, help="side of the square images, px (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images per step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="counted steps of each (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: %(default)s)")
    parser.add_argument("--disc", choices=(*MODES, "both"), default="both", help="(default: %(default)s)")
    parser.add_argument("--weights", type=Path, metavar="PATH", help="of VGG for LPIPS; default: random ones")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all numbers there")
    parser.add_argument(
        "--measure-peak", nargs=2, metavar=("MODE", "ROW"), help=argparse.SUPPRESS
    )  # how the script calls itself
    arguments = parser.parse_args(words)
    try:
        arguments.widths = tuple(int(width) for width in arguments.widths.split(","))
    except ValueError:
        parser.error("--widths must be whole numbers with commas between them")
    if arguments.size < 24 or arguments.size % 2 ** (len(arguments.widths) - 1):
        parser.error(f"--size must be a multiple of {2 ** (len(arguments.widths) - 1)}, at least 24")
    if min(arguments.batch, arguments.repeats, arguments.threads, arguments.layers, arguments.groups) < 1:
        parser.error("--batch, --repeats, --threads, --layers and --groups must be at least 1")
    if any(width < 1 or width % arguments.groups for width in arguments.widths):
        parser.error(f"--widths must be multiples of --groups, which is {arguments.groups}")
    return arguments


def description(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "widths": "-".join(map(str, arguments.widths)),
        "layers": arguments.layers,
        "groups": arguments.groups,
        "size_px": arguments.size,
        "batch": arguments.batch,
        "repeats": arguments.repeats,
        "threads": arguments.threads,
        "vgg_weights": "random" if arguments.weights is None else str(arguments.weights),
        **versions("torch", "diffusers"),
        "cpu": cpu_name(),
    }


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")  # torchvision's on arguments of lpips, accelerate's on missing trackers
    with tempfile.TemporaryDirectory() as folder:
        weights_path = arguments.weights or write_random_vgg(Path(folder))

        def setting(mode: str) -> Setting:
            return Setting(
                widths=arguments.widths,
                layers=arguments.layers,
                groups=arguments.groups,
                size=arguments.size,
                batch=arguments.batch,
                is_adversarial=mode == "on",
                weights_path=weights_path,
                run_dir=Path(folder) / "run",
            )

        if arguments.measure_peak:
            mode, row = arguments.measure_peak
            print(measure_peak(row, setting(mode)))
            return
        modes: dict[str, dict[str, dict[str, Any]]] = {}
        for mode in MODES if arguments.disc == "both" else (arguments.disc,):
            peaks = compare_peaks(mode, weights_path) if sys.platform == "linux" else {}
            modes[mode] = compare_speed(mode, setting(mode), arguments.repeats)
            for row, peak in peaks.items():
                modes[mode][row]["peak_bytes"] = peak
    report = {"setting": description(arguments), "modes": modes}
    print(as_table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
