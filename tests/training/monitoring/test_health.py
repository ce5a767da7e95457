"""Each state that a run can get into is said once, and nothing is said of a run that goes well."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest

from sdvae.training.config import DataConfig, KLConfig, LossConfig, TrainConfig, TrainingConfig
from sdvae.training.monitoring.health import BLIND_WINDOW, EXPLODED_WINDOW, WINDOW, WON_WINDOW, HealthMonitor

EVERY = 50  # steps of a log interval
STEPS = 100_000
SETTLED = STEPS // 10 // EVERY  # intervals


def monitor() -> HealthMonitor:
    training = TrainingConfig(steps=STEPS, log_every=EVERY)
    return HealthMonitor(TrainConfig(run_dir="run", data=DataConfig(path="photos"), training=training))


def healthy(interval: int, rng: random.Random) -> dict[str, float]:
    """What a run from scratch with a discriminator logs: noisy, and with slow changes of its own."""
    progress = interval * EVERY / STEPS
    logs = {
        "loss": rng.random(),
        "rec_loss": 0.05 * rng.lognormvariate(0, 0.2),
        "kl_loss": (0.004 + 0.2 * (1 - math.exp(-interval / 60)) + 0.08 * progress) * rng.lognormvariate(0, 0.25),
        "posterior_std": 0.01 + math.exp(-interval / 20) * 0.98,
        "clamped_logvar": rng.random() * 0.003,
        "grad_norm": (0.1 + 5 * math.exp(-interval / 100)) * rng.lognormvariate(0, 0.6),
    }
    if progress > 0.3:
        learned = 1 - math.exp(-(progress - 0.3) / 0.005)
        margin = learned * rng.gauss(0.3, 0.3)
        logs |= {
            "logits_real": 0.1 + margin / 2,
            "logits_fake": 0.1 - margin / 2,
            "adaptive_weight": rng.random() * 1e4,
        }
        logs["d_loss"] = 1 - 0.3 * learned + 0.1 * rng.gauss(0, 1)
    return logs


def feed(
    health: HealthMonitor, changed: Callable[[int, dict[str, float]], dict[str, float]], length: int, seed: int = 0
) -> dict[int, str]:
    """Runs `length` intervals of a healthy run with some values changed. Returns: warnings by interval."""
    rng = random.Random(seed)
    said: dict[int, str] = {}
    for interval in range(1, length + 1):
        logs = healthy(interval, rng)
        for words in health.update(interval * EVERY, logs | changed(interval, logs)):
            assert interval not in said
            said[interval] = words
    return said


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_said_of_a_noisy_run_that_goes_well(seed: int) -> None:
    assert feed(monitor(), lambda interval, logs: {}, STEPS // EVERY, seed) == {}


BAD = 1000  # interval from which on things go wrong


def since_bad(interval: int) -> int:
    return max(0, interval - BAD)


STATES: dict[str, tuple[Callable[[int, dict[str, float]], dict[str, float]], int, Sequence[str]]] = {
    # what goes wrong, within how many intervals it is said, words of the warning
    "running away": (
        lambda i, logs: {"kl_loss": logs["kl_loss"] * math.exp(since_bad(i) / 15)},
        2 * WINDOW,
        ("KL has risen from 0.2", "since step", "loss.kl.weight", "training.lr", "training.max_grad_norm"),
    ),
    "creeping up": (
        lambda i, logs: {"kl_loss": logs["kl_loss"] * (1 + since_bad(i) / 200)},
        400,
        ("KL has risen from 0.2", "goes on rising"),
    ),
    "collapsed": (
        lambda i, logs: {"kl_loss": 1e-5, "posterior_std": 0.99} if i > BAD else {},
        WINDOW,
        ("posterior has collapsed", "0.990", "loss.kl.warmup_steps"),
    ),
    "clamped": (
        lambda i, logs: {"clamped_logvar": 0.03} if i > BAD else {},
        WINDOW,
        ("of the posterior's log-variances are outside their clamp",),
    ),
    "blind": (
        lambda i, logs: {"logits_real": 0.1, "logits_fake": 0.1 + 0.1 * math.sin(i)} if i > BAD else {},
        BLIND_WINDOW + 3,
        ("tells nothing apart", "loss.adversarial.lr"),
    ),
    "winning": (
        lambda i, logs: {"d_loss": 0.001} if i > BAD else {},
        WON_WINDOW,
        ("wins outright", "loss.adversarial.r1_weight"),
    ),
    "exploding": (
        lambda i, logs: {"grad_norm": logs["grad_norm"] * 60} if i > BAD else {},
        EXPLODED_WINDOW + 2,
        ("gradient norm", "median", "training.lr"),
    ),
}


@pytest.mark.parametrize("state", STATES)
def test_a_state_is_said_once_in_words_that_help(state: str) -> None:
    changed, within, words = STATES[state]
    said = feed(monitor(), changed, BAD + 500)
    assert len(said) == 1, said
    ((interval, warning),) = said.items()
    assert BAD < interval <= BAD + within
    assert all(word in warning for word in words), warning


@pytest.mark.parametrize("state", STATES)
def test_a_state_that_has_gone_and_comes_back_is_said_again(state: str) -> None:
    changed, within, words = STATES[state]
    period, ill = 1000, max(within, 60)

    def on_and_off(interval: int, logs: dict[str, float]) -> dict[str, float]:
        phase = (interval - BAD) % period
        return changed(BAD + phase, logs) if interval > BAD and phase <= ill else {}

    said = feed(monitor(), on_and_off, BAD + 3 * period)
    said = {interval: warning for interval, warning in said.items() if words[-1] in warning}  # recovering is a rise too
    assert len(said) == 3, said
    assert all(900 < later - earlier < 1100 for earlier, later in pairwise(said))


@pytest.mark.parametrize("state", STATES)
def test_a_resumed_run_warns_as_one_that_was_not_interrupted(state: str) -> None:
    changed, _, _ = STATES[state]
    whole = feed(monitor(), changed, BAD + 300)
    for stop in (BAD + 2, BAD + 100):  # before the warning and after most of them
        rng = random.Random(0)
        health, said = monitor(), {}
        for interval in range(1, BAD + 301):
            logs = healthy(interval, rng)
            for words in health.update(interval * EVERY, logs | changed(interval, logs)):
                said[interval] = words
            if interval == stop:
                saved = json.dumps(health.state_dict())
                health = monitor()
                health.load_state_dict(json.loads(saved))
        assert said == whole


def test_the_start_of_a_run_is_not_judged_by_its_posterior() -> None:
    def collapsed(interval: int, logs: dict[str, float]) -> dict[str, float]:
        return {"kl_loss": 1e-5 * 1.05**interval, "posterior_std": 1.0}

    assert feed(monitor(), collapsed, SETTLED - 1) == {}
    training = TrainingConfig(steps=STEPS)
    slow = TrainConfig(
        run_dir="run",
        data=DataConfig(path="photos"),
        training=training,
        loss=LossConfig(kl=KLConfig(warmup_steps=STEPS // 2)),
    )
    still_warming = {"kl_loss": 1e-5, "posterior_std": 1.0}
    assert feed(HealthMonitor(slow), lambda i, logs: still_warming, STEPS // 2 // EVERY - 1) == {}
    assert len(feed(HealthMonitor(slow), lambda i, logs: still_warming, STEPS // 2 // EVERY)) == 1


def test_a_kl_that_has_come_to_rest_higher_up_is_judged_from_there() -> None:
    def two_steps(interval: int, logs: dict[str, float]) -> dict[str, float]:
        factor = 1.8 ** min(1.0, since_bad(interval) / 100) * 1.8 ** min(1.0, since_bad(interval - 400) / 100)
        return {"kl_loss": 0.2 * factor * (1 + 0.05 * math.sin(interval))}

    assert feed(monitor(), two_steps, STEPS // EVERY) == {}  # 1.8 times and 1.8 times, with a rest between them


def test_absent_and_infinite_values_change_nothing() -> None:
    health = monitor()
    assert [health.update(step, {}) for step in range(0, STEPS, EVERY)] == [[]] * (STEPS // EVERY)
    overflowing = {"grad_norm": math.inf, "kl_loss": math.nan, "rec_loss": 1.0}  # fp16 while its scale is found
    assert feed(health, lambda i, logs: overflowing if i % 3 else {}, STEPS // EVERY) == {}
    with_gaps = {"clamped_logvar": 0.03}, {"clamped_logvar": math.nan}
    (words,) = feed(monitor(), lambda i, logs: with_gaps[i % 3 == 0], 3 * WINDOW).values()
    assert words.startswith("3.0% of the posterior's")


def test_one_wild_interval_is_no_explosion() -> None:
    wild = {"grad_norm": 1e4, "kl_loss": 1.0, "clamped_logvar": 0.02, "d_loss": 0.0}
    assert feed(monitor(), lambda i, logs: wild if i % 100 == 0 and i > SETTLED else {}, STEPS // EVERY) == {}
