"""`sdvae convert` as a user calls it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result
from safetensors.torch import save_file
from vaes import build_vae

from sdvae.checkpoints.keys import to_ldm
from sdvae.checkpoints.store import load_autoencoder
from sdvae.cli.convert import convert_command
from sdvae.cli.main import cli

KEYS = {
    "command", "status", "source", "source_kind", "source_evidence", "source_digest", "source_dtypes", "remarks",
    "target", "to", "dtypes", "num_bytes", "num_shards", "num_copied_files", "config", "rewrites", "fold",
    "verification", "onnx", "loaders", "warnings", "dry_run", "exit_code",
}  # fmt: skip


def sdvae(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["convert", *(str(argument) for argument in arguments)])


def json_of(result: Result) -> dict[str, Any]:
    data = json.loads(result.stdout)
    assert isinstance(data, dict)
    return data


def test_the_report_names_source_result_and_errors(vae_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    result = sdvae(vae_path, out, "--to", "ldm")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("source    vae: diffusers VAE folder (key `") and lines[0].endswith("), float32")
    assert lines[2].startswith(f"result    {out}: ldm, float32, ")
    assert "scale     scaling_factor 0.18215, shift_factor 0.1" in lines
    (verified,) = (line for line in lines if line.startswith("verified"))
    assert "equal to the source bit for bit; names and shapes are those of the original program" in verified
    rows = {line.split()[0]: line.split()[1] for line in lines if line.split()[0] in ("latents", "std", "recon")}
    assert rows == {"latents": "0", "std": "0", "recon": "0"}
    assert lines[-1] == "Written."
    assert "Warning: an LDM file carries no scale" in result.stderr and "--fold-scale 0.18215" in result.stderr
    assert any(line.startswith("not by    ComfyUI") for line in lines)

    other = sdvae(vae_path, out, "--to", "ldm", "--prefix", "vae.")
    assert other.exit_code == 2 and f"{out} exists, and was made without --prefix; choose another path" in other.stderr
    again = sdvae(vae_path, out, "--to", "ldm")
    assert again.exit_code == 0 and again.stdout.endswith("Up to date: nothing was written.\n")
    other = sdvae(vae_path, out, "--to", "ldm", "--dtype", "float16")
    assert other.exit_code == 2 and "exists" in other.stderr
    replaced = sdvae(vae_path, out, "--to", "ldm", "--dtype", "float16", "--overwrite")
    assert replaced.exit_code == 0 and "ldm, float16" in replaced.stdout


def test_the_report_names_the_license_and_the_number_of_weights_files(vae_path: Path, tmp_path: Path) -> None:
    arguments = (vae_path, tmp_path / "out", "--license", "mit", "--max-shard-size", "20KB")
    planned = sdvae(*arguments, "--dry-run").stdout
    assert sdvae(*arguments).exit_code == 0
    count = len(list((tmp_path / "out").glob("*.safetensors")))
    assert count > 1 and f"weights in {count} files" in planned and "license   mit" in planned


def test_a_fold_prints_what_was_verified(vae_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "folded"
    result = sdvae(vae_path, out, "--fold-scale", 0.13025, "--scaling-factor", 0.4)
    assert result.exit_code == 0, result.output
    assert "rewrite   folded scaling_factor 0.4, shift_factor 0.1 into scaling_factor 0.13025" in result.stdout
    assert "fold      exact on photographs, in float32: latents to " in result.stdout
    config = load_autoencoder(out).config
    assert (config.scaling_factor, config.shift_factor) == (0.13025, None)


def test_json_is_one_object_with_the_documented_keys(vae_path: Path, tmp_path: Path) -> None:
    data = json_of(sdvae(vae_path, tmp_path / "a", "--dtype", "bfloat16", "--json"))
    assert data.keys() == KEYS
    assert (data["command"], data["status"], data["dry_run"], data["exit_code"]) == ("convert", "written", False, 0)
    assert data["verification"]["identical"] is False
    assert [comparison["name"] for comparison in data["verification"]["comparisons"]] == [
        "latents",
        "logvar",
        "std",
        "recon",
    ]
    documented = (Path(__file__).parents[2] / "docs/convert.md").read_text()
    assert all(f"`{key}`" in documented for key in KEYS)


def test_a_dry_run_writes_nothing(vae_path: Path, tmp_path: Path) -> None:
    result = sdvae(vae_path, tmp_path / "a", "--dry-run")
    assert result.exit_code == 0 and result.stdout.endswith("Would write it. Nothing was written.\n")
    data = json_of(sdvae(vae_path, tmp_path / "a", "--dry-run", "--json"))
    assert (data["status"], data["dry_run"], data["verification"]) == ("new", True, None)
    assert not list(tmp_path.iterdir())


def test_a_guessed_scale_is_warned_of_and_not_folded(tmp_path: Path) -> None:
    bare = tmp_path / "bare.safetensors"
    save_file(to_ldm(build_vae(32, norm_num_groups=32).state_dict()), bare)
    refused = sdvae(bare, tmp_path / "a.safetensors", "--to", "ldm", "--fold-scale", 0.13025)
    assert refused.exit_code == 1 and not (tmp_path / "a.safetensors").exists()
    assert "--scaling-factor 0.18215 or --scaling-factor 0.13025" in refused.stderr
    plain = sdvae(bare, tmp_path / "a.safetensors", "--to", "ldm")
    assert plain.exit_code == 0 and "Warning: scaling_factor 0.18215 is assumed" in plain.stderr
    assert "Note: scaling_factor assumed to be 0.18215" in plain.stderr


def test_the_first_commands_of_the_documentation_can_be_pasted(vae_path: Path) -> None:
    block = (Path(__file__).parents[2] / "docs/convert.md").read_text().split("```")[1]
    lines = block.strip().splitlines()
    assert len(lines) == 4
    for line in lines:
        program, name, *arguments = shlex.split(line, comments=True)
        assert (program, name) == ("sdvae", "convert")
        with convert_command.make_context(name, arguments) as context:
            assert context.params["src"] and context.params["dst"]


def test_wrong_usage_is_2_and_what_is_there_but_holds_none_is_1(vae_path: Path, tmp_path: Path) -> None:
    usage = sdvae(vae_path, tmp_path / "a", "--to", "ldm")
    assert usage.exit_code == 2 and ".safetensors" in usage.stderr
    assert sdvae(vae_path, tmp_path / "a", "--prefix", "model.").exit_code == 2
    nowhere = tmp_path / "nowhere"
    for arguments in ((nowhere, tmp_path / "a"), (vae_path, tmp_path / "a", "--into", nowhere)):
        missing = sdvae(*arguments)
        assert missing.exit_code == 2 and f"{nowhere} does not exist" in missing.stderr
    (tmp_path / "empty").mkdir()
    assert sdvae(tmp_path / "empty", tmp_path / "a").exit_code == 1
    pipeline = sdvae(vae_path, tmp_path / "a", "--into", tmp_path / "empty")
    assert pipeline.exit_code == 1 and "model_index.json" in pipeline.stderr
