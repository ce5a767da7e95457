"""fix-fp16 on autoencoders that were made to overflow: float16 is finite afterwards, the function the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from sdvae.checkpoints.read import Checkpoint, read_checkpoint
from sdvae.checkpoints.rewrite.fp16 import StreamScale, rescale_streams
from sdvae.checkpoints.store import save_autoencoder
from sdvae.checkpoints.write import write_diffusers_folder
from sdvae.data.images import image_to_x
from sdvae.errors import CheckpointError, ConfigError
from sdvae.model.autoencoder import AutoencoderKL
from sdvae.precision import fix as module
from sdvae.precision.fix import Fix, fix_fp16
from sdvae.precision.options import FixOptions

Pixels = NDArray[np.uint8]
BLOCK = "decoder.up_blocks.1.resnets.1"
ATTENTION = "decoder.mid_block.attentions.0"


def picture(seed: int, side: int = 32) -> Pixels:
    coarse = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (1, 3, 4, 4), dtype=np.uint8)).float()
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 255)
    return smooth[0].permute(1, 2, 0).to(torch.uint8).numpy()


IMAGES = [picture(seed) for seed in range(2)]
X = torch.stack([image_to_x(pixels) for pixels in IMAGES])

STREAM = re.compile(  # written here anew: what adds to the residual stream, and the biases of what it passes through
    r"(en|de)coder\.(conv_in|.*\.conv2|.*\.to_out\.0)\.(weight|bias)"
    r"|(en|de)coder\..*\.(conv_shortcut|(down|up)samplers\.0\.conv)\.bias"
)


def grow(vae: AutoencoderKL, exponent: int, pattern: str | re.Pattern[str] = STREAM) -> None:
    """Scale the tensors whose names match by 2 ** exponent."""
    with torch.no_grad():
        for name, tensor in vae.state_dict().items():
            if re.fullmatch(pattern, name):
                tensor.mul_(2.0**exponent)


def grow_stream(vae: AutoencoderKL) -> None:
    grow(vae, 12)


def grow_block(vae: AutoencoderKL) -> None:
    grow(vae, 18, rf"{re.escape(BLOCK)}\.conv1\.(weight|bias)")


def grow_values(vae: AutoencoderKL) -> None:
    grow(vae, 18, rf"{re.escape(ATTENTION)}\.to_v\.(weight|bias)")
    grow(vae, -18, rf"{re.escape(ATTENTION)}\.to_out\.0\.weight")


def grow_queries(vae: AutoencoderKL) -> None:
    grow(vae, 18, rf"{re.escape(ATTENTION)}\.to_q\.(weight|bias)")
    grow(vae, -18, rf"{re.escape(ATTENTION)}\.to_k\.(weight|bias)")


def all_at_once(vae: AutoencoderKL) -> None:
    for each in (grow_stream, grow_block, grow_values, grow_queries):
        each(vae)


Passes = tuple[Tensor, Tensor]


@torch.inference_mode()
def passes(vae: Any, z: Tensor | None = None) -> Passes:
    """z of the pictures, and the pictures that it makes of a z."""
    own = vae.encode(X.to(vae.dtype)).latent_dist.mean.float()
    recon = vae.decode((own if z is None else z).to(vae.dtype)).sample.float()
    return own, recon


def relative(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / (exact.max() - exact.min()))


def stock(folder: Path, dtype: torch.dtype) -> Any:
    return diffusers.AutoencoderKL.from_pretrained(folder, torch_dtype=dtype).eval()


Overflowing = Callable[[Callable[[AutoencoderKL], None]], Path]


@pytest.fixture
def overflowing(tmp_path: Path, tiny_vae: AutoencoderKL) -> Overflowing:
    def make(damage: Callable[[AutoencoderKL], None]) -> Path:
        grow(tiny_vae, 4)  # trained streams reach some tens to hundreds, those of random weights 2
        damage(tiny_vae)
        return save_autoencoder(tiny_vae, tmp_path / "overflowing")

    return make


def fixed(folder: Path, **options: Any) -> tuple[Checkpoint, Fix]:
    checkpoint = read_checkpoint(folder)
    settings = FixOptions(**{"probe_size_px": 32, "device": "cpu", **options})
    return checkpoint, fix_fp16(checkpoint, IMAGES, settings, name=str(folder))


def saved(fix: Fix, folder: Path) -> Path:
    folder.mkdir()
    write_diffusers_folder(folder, fix.tensors, fix.fields, fix.notes)
    return folder


@pytest.mark.parametrize("damage", [grow_stream, grow_block, grow_values, all_at_once])
def test_what_gives_nan_in_float16_matches_float32_afterwards_in_stock_diffusers_too(
    overflowing: Overflowing, tmp_path: Path, damage: Callable[[AutoencoderKL], None]
) -> None:
    folder = overflowing(damage)
    exact_z, exact = passes(stock(folder, torch.float32))
    z, recon = passes(stock(folder, torch.float16), exact_z)
    assert not (z.isfinite().all() and recon.isfinite().all())

    _, fix = fixed(folder)
    target = saved(fix, tmp_path / "fixed")
    z, recon = passes(stock(target, torch.float32), exact_z)
    assert relative(z, exact_z) < 1e-4 and relative(recon, exact) < 1e-4
    z, recon = passes(stock(target, torch.float16), exact_z)
    assert relative(z, exact_z) < 1e-2 and relative(recon, exact) < 1e-2
    assert max(fix.encoder_change, fix.decoder_change) < 1e-4
    assert fix.before.verdict("float16").level == "overflows" and fix.after.verdict("float16").level == "safe"
    assert fix.before.probes[0].not_finite and fix.after.probes[0].finite


def test_the_pictures_of_the_whole_way_through_float16_match_too(overflowing: Overflowing, tmp_path: Path) -> None:
    folder = overflowing(all_at_once)
    _, exact = passes(stock(folder, torch.float32))
    _, recon = passes(stock(saved(fixed(folder)[1], tmp_path / "fixed"), torch.float16))
    assert relative(recon, exact) < 1e-2


def test_queries_beyond_the_limit_are_balanced_with_the_keys(overflowing: Overflowing) -> None:
    checkpoint, fix = fixed(overflowing(grow_queries))
    assert set(fix.scale.blocks) == {f"{ATTENTION}.to_q"} and fix.scale.blocks[f"{ATTENTION}.to_q"] < 0
    peaks = {layer.name: layer.peak for layer in fix.after.layers}
    assert peaks[f"{ATTENTION}.to_q"] < 65504 / 4 and fix.after.verdict("float16").level == "safe"


def test_exponents_are_the_smallest_that_suffice_and_only_where_they_are_needed(overflowing: Overflowing) -> None:
    folder = overflowing(lambda vae: grow(vae, 12, re.compile(STREAM.pattern.replace("(en|de)", "(de)"))))
    _, fix = fixed(folder)
    assert fix.scale.encoder == 0 and dict(fix.scale.blocks) == {} and fix.scale.decoder < 0
    peak = fix.after.tightest(1)[0].peak
    assert 65504 / 8 < peak <= 65504 / 4  # two bits, and no third
    _, roomier = fixed(folder, headroom_bits=5)
    assert roomier.scale.decoder == fix.scale.decoder - 3
    _, tighter = fixed(folder, headroom_bits=0)
    assert tighter.scale.decoder == fix.scale.decoder + 2 and tighter.after.verdict("float16").level == "at risk"
    assert tighter.fields.get("force_upcast", True) is True and fix.fields["force_upcast"] is False


def test_only_a_block_is_touched_where_only_it_overflows(overflowing: Overflowing) -> None:
    checkpoint, fix = fixed(overflowing(grow_block))
    assert (fix.scale.encoder, fix.scale.decoder, set(fix.scale.blocks)) == (0, 0, {BLOCK})
    changed = {name for name, tensor in fix.tensors.items() if not torch.equal(tensor, checkpoint.tensors[name])}
    assert changed == {f"{BLOCK}.conv1.weight", f"{BLOCK}.conv1.bias"}


def test_a_second_fix_finds_nothing(overflowing: Overflowing, tmp_path: Path) -> None:
    _, fix = fixed(overflowing(all_at_once))
    _, again = fixed(saved(fix, tmp_path / "fixed"))
    assert not again.needed and again.before is again.after and again.encoder_change == again.decoder_change == 0
    assert all(torch.equal(tensor, fix.tensors[name]) for name, tensor in again.tensors.items())
    assert again.notes == fix.notes | {"source": "fixed", "source_digest": fix.after.digest}


def test_notes_say_what_was_done_to_which_vae(overflowing: Overflowing) -> None:
    _, fix = fixed(overflowing(grow_block))
    assert fix.notes["rewrites"] == [f"fix-fp16: {BLOCK} 2^{fix.scale.blocks[BLOCK]}"]
    assert fix.notes["source_digest"] == fix.before.digest


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_weights_come_in_the_type_that_is_asked_for(overflowing: Overflowing, dtype: str) -> None:
    _, fix = fixed(overflowing(all_at_once), dtype=dtype)
    assert {tensor.dtype for tensor in fix.tensors.values()} == {getattr(torch, dtype)}
    assert fix.after.probes[0].finite


def test_a_file_in_half_precision_stays_one_and_keeps_its_function(tmp_path: Path, tiny_vae: AutoencoderKL) -> None:
    grow(tiny_vae, 14)
    folder = save_autoencoder(tiny_vae, tmp_path / "half", dtype=torch.bfloat16)
    _, fix = fixed(folder)
    assert {tensor.dtype for tensor in fix.tensors.values()} == {torch.bfloat16}
    assert fix.needed and max(fix.encoder_change, fix.decoder_change) < 1e-4


# ----------------------------------------------------------------------------------- controls: a part that is forgotten


@pytest.mark.parametrize(
    "forgotten",
    [
        r".*\.conv_shortcut\.bias",
        r".*\.to_out\.0\.(weight|bias)",
        r".*\.to_out\.0\.bias",
        r".*samplers\.0\.conv\.bias",
        r"decoder\.conv_in\.bias",
        r"encoder\.down_blocks\.1\.resnets\.0\.conv2\.weight",
    ],
)
def test_a_rescaling_that_forgets_a_part_is_refused(
    overflowing: Overflowing, monkeypatch: pytest.MonkeyPatch, forgotten: str
) -> None:
    def forgetful(tensors: Mapping[str, Tensor], fields: Mapping[str, Any], scale: StreamScale) -> dict[str, Tensor]:
        result = rescale_streams(tensors, fields, scale)
        left = {name: tensor for name, tensor in tensors.items() if re.fullmatch(forgotten, name)}
        assert left
        return result | left

    folder = overflowing(grow_stream)
    monkeypatch.setattr(module, "rescale_streams", forgetful)
    with pytest.raises(CheckpointError, match="would change the (en|de)coder by"):
        fixed(folder)


# ---------------------------------------------------------------------------------------------- what cannot be repaired


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda vae: grow(vae, 20, r"decoder\.conv_out\.weight"),
            r"decoder\.conv_out reaches .* no norm comes",
        ),
        (lambda vae: grow(vae, 20, r"quant_conv\.weight"), r"quant_conv reaches"),
        (lambda vae: grow(vae, 20, r"decoder\.conv_norm_out\.weight"), r"decoder\.conv_norm_out reaches"),
        (
            lambda vae: grow(vae, 12, rf"{re.escape(ATTENTION)}\.to_[qk]\.weight"),
            r"attention logits of decoder\.mid_block\.attentions\.0 reach",
        ),
    ],
)
def test_what_no_norm_cancels_is_refused_by_name(
    overflowing: Overflowing, damage: Callable[[AutoencoderKL], None], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        fixed(overflowing(damage))


def test_where_epsilon_would_change_the_function_it_is_refused_with_the_norm_and_the_number(
    overflowing: Overflowing,
) -> None:
    def quiet_first_loud_last(vae: AutoencoderKL) -> None:
        grow(vae, 26, r"decoder\.up_blocks\.3\.resnets\.1\.conv2\.(weight|bias)")

    with pytest.raises(CheckpointError, match=r"change the decoder by .*norm.* epsilon changes it by .*--headroom"):
        fixed(overflowing(quiet_first_loud_last))


def test_epsilons_effect_is_that_of_the_flattest_input(overflowing: Overflowing) -> None:
    _, fix = fixed(overflowing(grow_stream))
    norm = next(norm for norm in fix.before.norms if norm.name == fix.epsilon_norm)
    exponent = fix.scale.encoder if norm.name.startswith("encoder") else fix.scale.decoder
    exact = abs(((norm.min_variance + 1e-6) / (norm.min_variance + 1e-6 * 4.0**-exponent)) ** 0.5 - 1)
    assert fix.epsilon_effect == pytest.approx(exact, rel=1e-6) and 0 < exact < 1e-4


@pytest.mark.parametrize("bits", [-1.0, 9.0, float("nan")])
def test_headroom_has_limits(vae_path: Path, bits: float) -> None:
    with pytest.raises(ConfigError, match="expected 0 to 8"):
        fixed(vae_path, headroom_bits=bits)
