"""Signs that a training run goes wrong, said in words while it can still be saved. Standard library only.

What is judged are the averages of a log interval, with the names that they are logged under. Nothing is stopped or
changed here: a warning says what was seen, since when, and what has helped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean, median
from typing import Any

from sdvae.training.config import TrainConfig

__all__ = ["HealthMonitor"]

# Lengths are numbers of log intervals, so that they grow with the run as `training.log_every` does.
WINDOW = 10  # an average of one interval still wavers by a fifth with its photographs, of ten by a few percent
HISTORY = 100  # values kept of each name

# The KL of a run that goes well grows while the encoder learns, fast in its first tenth, then by less than a factor 2
# (1.3 in 16,000 steps of a small f8 VAE). One that runs away doubles again and again.
KL_RISE = 2.0
KL_RECOVERED = 1.5
KL_SMALL = 0.01  # nats per image element; below it (an f8 VAE with 4 channels has 0.1 to 0.5) doubling means nothing
KL_LEVEL = 50  # intervals without a new highest mean: it has come to rest, and a further rise is counted from there

# A latent element of standard deviation 0.95 around 0 holds 0.0025 nats: nothing that a decoder could use. An element
# of an f8 latent with 4 channels stands for 48 of the image: 1e-3 nats per image element are 0.05 of the latent's.
COLLAPSED_STD, REVIVED_STD = 0.95, 0.90
COLLAPSED_KL, REVIVED_KL = 1e-3, 2e-3

# A clamped element has no gradient to leave the clamp by. One in a hundred is past a few odd pixels.
CLAMPED, UNCLAMPED = 0.01, 0.005

# Of hinge logits, which the loss pulls 2 apart. It starts with no difference and takes its time, hence the long window.
BLIND_MARGIN, SEEING_MARGIN = 0.02, 0.05
BLIND_WINDOW = 50

# At chance the losses are 1 (hinge), 0.7 (vanilla) and 0.25 (least squares); a discriminator in balance is not far off.
WON_LOSS, CONTESTED_LOSS = 0.02, 0.05
WON_WINDOW = 20

# Clipping hides an explosion from the weights but makes every step go in the direction of the worst images.
EXPLODED_GRAD, CALM_GRAD = 10.0, 5.0  # times the median of before
EXPLODED_WINDOW = 3  # one step in a thousand may be that large; three intervals on end are no accident
MIN_GRADS = 20  # for a median that means something

_WATCHED = ("kl_loss", "posterior_std", "clamped_logvar", "logits_real", "logits_fake", "d_loss", "grad_norm")


class HealthMonitor:
    """Reads what is logged and says what is wrong with it, each state once until it has gone and come back.

    A resumed run warns as one that was never interrupted: see `state_dict`.
    """

    def __init__(self, config: TrainConfig) -> None:
        training = config.training
        # until then the KL rises, and a fresh encoder's posterior is the prior, in every run
        self.settle_steps = max(training.steps // 10, training.warmup_steps, config.loss.kl.warmup_steps)
        self._history: dict[str, list[float]] = {name: [] for name in _WATCHED}  # the newest last
        self._warned: set[str] = set()
        self._kl_low: tuple[float, int] | None = None  # lowest mean of a window, and the step it ended at
        self._kl_high = (0.0, 0)  # highest mean since the lowest, and the number of intervals since

    def update(self, step: int, averages: Mapping[str, float]) -> list[str]:
        """Take in the averages of the log interval that ends with `step`. Returns: new warnings, mostly none.

        averages: by the names of the losses, without "train/"; KL in nats per image element. Any may be absent, which
        leaves what is judged by it as it was; so does a value that is not finite.
        """
        present = {name for name in _WATCHED if name in averages and math.isfinite(averages[name])}
        for name in present:
            self._history[name] = [*self._history[name], averages[name]][-HISTORY:]
        settled = step >= self.settle_steps
        # words where the state is there, "" where it is not, None in between
        verdicts: dict[str, str | None] = {}
        if settled and "kl_loss" in present:
            verdicts["rising KL"] = self._rising_kl(step)
        if settled and {"kl_loss", "posterior_std"} <= present:
            verdicts["collapsed posterior"] = self._collapsed_posterior()
        if "clamped_logvar" in present:
            verdicts["clamped logvar"] = self._clamped_logvar()
        if {"logits_real", "logits_fake"} <= present:
            verdicts["blind discriminator"] = self._blind_discriminator()
        if "d_loss" in present:
            verdicts["winning discriminator"] = self._winning_discriminator()
        if "grad_norm" in present:
            verdicts["exploding gradient"] = self._exploding_gradient()
        warnings = [words for name, words in verdicts.items() if words and name not in self._warned]
        self._warned |= {name for name, words in verdicts.items() if words}
        self._warned -= {name for name, words in verdicts.items() if words == ""}
        return warnings

    def _rising_kl(self, step: int) -> str | None:
        values = self._history["kl_loss"]
        if len(values) < 3 * WINDOW:
            return None
        earlier, before, now = (fmean(values[-(i + 1) * WINDOW : len(values) - i * WINDOW]) for i in (2, 1, 0))
        high, age = self._kl_high
        self._kl_high = (now, 0) if now > high else (high, age + 1)
        if self._kl_low is None or now <= self._kl_low[0] or self._kl_high[1] >= KL_LEVEL:
            self._kl_low, self._kl_high = (now, step), (now, 0)
            return ""
        low, since = self._kl_low
        if now < KL_RECOVERED * low:
            return ""
        if now < KL_RISE * low or now < KL_SMALL or not earlier < before < now:
            return None
        return (
            f"the KL has risen from {low:.3g} to {now:.3g} nats per image element since step {since} and goes on "
            "rising: the latent grows without need. Raise loss.kl.weight, lower training.lr, or clip gradients harder "
            "(training.max_grad_norm)"
        )

    def _collapsed_posterior(self) -> str | None:
        std, kl = self._mean("posterior_std"), self._mean("kl_loss")
        if std is None or kl is None:
            return None
        if std < REVIVED_STD or kl > REVIVED_KL:
            return ""
        if std < COLLAPSED_STD or kl > COLLAPSED_KL:
            return None
        return (
            f"the posterior has collapsed to the prior (standard deviation {std:.3f}, KL {kl:.2g} nats per image "
            "element): the latent carries nothing of the image. Lower loss.kl.weight, or let it grow over more steps "
            "(loss.kl.warmup_steps)"
        )

    def _clamped_logvar(self) -> str | None:
        part = self._mean("clamped_logvar")
        if part is None or UNCLAMPED <= part <= CLAMPED:
            return None
        if part < UNCLAMPED:
            return ""
        return (
            f"{part:.1%} of the posterior's log-variances are outside their clamp, where they have no gradient and "
            "cannot come back. Lower training.lr, lengthen training.warmup_steps, or raise loss.kl.weight"
        )

    def _blind_discriminator(self) -> str | None:
        real, fake = (self._mean(name, BLIND_WINDOW) for name in ("logits_real", "logits_fake"))
        if real is None or fake is None or BLIND_MARGIN <= real - fake <= SEEING_MARGIN:
            return None
        if real - fake > SEEING_MARGIN:
            return ""
        return (
            f"the discriminator tells nothing apart (logits of photographs {real:.3f}, of reconstructions {fake:.3f}, "
            f"over {BLIND_WINDOW} log intervals): it adds noise to the training, and no detail. Raise "
            "loss.adversarial.lr, or lower loss.adversarial.r1_weight or lecam_weight where they are used; "
            "loss.adversarial.weight=0 goes on without it"
        )

    def _winning_discriminator(self) -> str | None:
        d_loss = self._mean("d_loss", WON_WINDOW)
        if d_loss is None or WON_LOSS <= d_loss <= CONTESTED_LOSS:
            return None
        if d_loss > CONTESTED_LOSS:
            return ""
        return (
            f"the discriminator wins outright (d_loss {d_loss:.2g} over {WON_WINDOW} log intervals): it no longer "
            "learns, and its gradient says little of what to improve. Lower loss.adversarial.lr, switch on "
            "loss.adversarial.r1_weight, lecam_weight or spectral_norm, or start it later (loss.adversarial.disc_start)"
        )

    def _exploding_gradient(self) -> str | None:
        values = self._history["grad_norm"]
        past, recent = values[:-EXPLODED_WINDOW], values[-EXPLODED_WINDOW:]
        if len(past) < MIN_GRADS:
            return None
        usual = median(past)
        if recent[-1] < CALM_GRAD * usual:
            return ""
        if min(recent) < EXPLODED_GRAD * usual:
            return None
        return (
            f"the gradient norm of the autoencoder is {recent[-1]:.3g}, and was {usual:.3g} (median of {len(past)} log "
            "intervals). Lower training.lr; with a discriminator also loss.adversarial.weight or max_adaptive_weight. "
            "Keep training.max_grad_norm set"
        )

    def _mean(self, name: str, length: int = WINDOW) -> float | None:
        """Mean of the newest values; None while there are fewer than `length`."""
        values = self._history[name]
        return fmean(values[-length:]) if len(values) >= length else None

    def state_dict(self) -> dict[str, Any]:
        return {
            "history": {name: list(values) for name, values in self._history.items()},
            "warned": sorted(self._warned),
            "kl_low": self._kl_low,
            "kl_high": self._kl_high,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._history = {name: list(state["history"][name]) for name in _WATCHED}
        self._warned = set(state["warned"])
        self._kl_low = None if state["kl_low"] is None else tuple(state["kl_low"])
        self._kl_high = tuple(state["kl_high"])
