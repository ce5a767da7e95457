"""Transforms of z and of the image belong together; noise has the level it says."""

from __future__ import annotations

import pytest
import torch

from sdvae.training.equivariance import Transform, draw_transform, latent_noise


def images(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("quarter_turns", range(4))
@pytest.mark.parametrize("scale", [0.25, 0.61, 1.0])
def test_the_target_has_the_size_of_the_decoded_latent(tiny_vae, scale: float, quarter_turns: int) -> None:
    transform = Transform(scale, quarter_turns)
    x = images(0, 1, 3, 48, 96).clamp(-1, 1)
    with torch.no_grad():
        z = tiny_vae.encode(x).latent_dist.mode()
        recon = tiny_vae.decode(transform.to_z(z)).sample
    assert recon.shape == transform.to_image(x, 8).shape
    assert (recon.shape[-2] > recon.shape[-1]) == (quarter_turns % 2 == 1), "48 x 96 px, turned on its side"


@pytest.mark.parametrize("quarter_turns", range(4))
@pytest.mark.parametrize("scale", [0.4, 0.75, 1.0])
def test_image_and_z_are_treated_alike(scale: float, quarter_turns: int) -> None:
    """A smooth picture, shrunk 8 times by averaging, stands for z: both ways round give the same."""
    down, right = torch.linspace(-1, 1, 64).view(-1, 1), torch.linspace(-1, 1, 96).view(1, -1)
    x = torch.stack([down + 0 * right, right + 0 * down, down * right]).unsqueeze(0)
    transform = Transform(scale, quarter_turns)
    pooled = torch.nn.functional.avg_pool2d(transform.to_image(x, 8), 8)
    z = transform.to_z(torch.nn.functional.avg_pool2d(x, 8))
    assert z.shape == pooled.shape
    assert (z - pooled).abs().max() < 0.1  # a wrong turn or a mirror image is off by 1 and more
    assert transform.to_image(x, 8).abs().max() <= 1


def test_turns_go_counter_clockwise() -> None:
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).view(1, 1, 2, 2)
    assert Transform(1.0, 1).to_z(x).flatten().tolist() == [2, 4, 1, 3]
    assert Transform(1.0, 1).to_image(x, 1).flatten().tolist() == [2, 4, 1, 3]


def test_the_identity_returns_what_it_was_given() -> None:
    z, x = images(0, 2, 4, 4, 4), images(1, 2, 3, 32, 32)
    assert Transform(1.0, 0).to_z(z) is z and Transform(1.0, 0).to_image(x, 8) is x
    assert Transform(0.9, 0).to_z(z) is z, "3.6 positions round to 4"


def test_a_latent_never_shrinks_to_nothing() -> None:
    assert Transform(0.05, 1).to_z(images(0, 1, 4, 4, 40)).shape == (1, 4, 2, 1)
    assert Transform(0.05, 1).to_image(images(0, 1, 3, 32, 320), 8).shape == (1, 3, 16, 8)


def test_a_transform_passes_gradients_and_keeps_the_dtype() -> None:
    z = images(0, 1, 4, 8, 8).requires_grad_()
    Transform(0.5, 3).to_z(z).square().sum().backward()
    assert (z.grad != 0).all()
    assert Transform(0.5, 3).to_z(z.detach().bfloat16()).dtype == torch.bfloat16


def test_draws_follow_their_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_transform(0.3, 0.25, True, generator) for _ in range(4000)]
    some = [transform for transform in drawn if transform is not None]
    assert len(some) / len(drawn) == pytest.approx(0.3, abs=0.03)
    scales = torch.tensor([transform.scale for transform in some])
    assert 0.25 <= scales.min() < 0.27 and 0.98 < scales.max() < 1
    assert scales.mean().item() == pytest.approx(0.625, abs=0.03)
    turns = torch.bincount(torch.tensor([transform.quarter_turns for transform in some]), minlength=4)
    assert len(turns) == 4 and (turns / len(some) - 0.25).abs().max() < 0.05
    assert {t.quarter_turns for t in (draw_transform(1.0, 0.5, False, generator) for _ in range(50)) if t} == {0}
    assert all(draw_transform(0.0, 0.5, True, generator) is None for _ in range(50))
    assert all(draw_transform(1.0, 0.5, True, generator) is not None for _ in range(50))


def test_draws_are_a_matter_of_the_seed_alone() -> None:
    torch.manual_seed(3)
    first = [draw_transform(0.5, 0.25, True) for _ in range(8)]
    torch.manual_seed(3)
    assert first == [draw_transform(0.5, 0.25, True) for _ in range(8)] and None in first
    # a draw takes the same from the generator whether it transforms or not
    states = []
    for probability in (0.0, 1.0):
        torch.manual_seed(3)
        draw_transform(probability, 0.25, True)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_noise_has_a_level_per_image_in_deviations_of_the_channel() -> None:
    spreads = torch.tensor([0.1, 1.0, 20.0]).view(1, 3, 1, 1)
    z = images(0, 64, 3, 16, 16) * spreads + 5
    noise = (latent_noise(z, 0.5, torch.Generator().manual_seed(0)) - z) / spreads
    levels = noise.std(dim=(2, 3))  # (64, 3)
    assert torch.allclose(levels, levels.mean(dim=1, keepdim=True), rtol=0.25), "one level for all channels of an image"
    level = levels.mean(dim=1)
    assert level.min() < 0.05 and 0.4 < level.max() < 0.55 and level.mean().item() == pytest.approx(0.25, abs=0.05)
    assert noise.mean().abs() < 0.01


def test_noise_comes_from_the_generator_and_gives_the_encoder_no_way_out() -> None:
    z = images(0, 4, 3, 8, 8).requires_grad_()
    first, second = (latent_noise(z, 0.5, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, latent_noise(z, 0.5))
    first.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))
    assert latent_noise(z.detach().bfloat16(), 0.5).dtype == torch.bfloat16
    assert torch.isfinite(latent_noise(torch.zeros(1, 4, 1, 1), 0.5)).all()
