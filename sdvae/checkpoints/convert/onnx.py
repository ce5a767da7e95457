"""Export of an autoencoder to ONNX: encoder and decoder as two files, each run against torch before it is handed over.

Folders, file names, inputs, outputs and names of axes are those of optimum's exports of Stable Diffusion (optimum-onnx
0.1.0, `VaeEncoderOnnxConfig` and `VaeDecoderOnnxConfig`):

    vae_encoder/model.onnx, config.json     sample (B, 3, H, W) -> latent_parameters (B, 2 * latent_channels, h, w)
    vae_decoder/model.onnx, config.json     latent_sample (B, latent_channels, h, w) -> sample (B, 3, H, W)

latent_parameters are the moments; latent_sample is z. As everywhere, z is not scaled: scaling_factor and shift_factor
stand in config.json and in the metadata of both models, and applying them is left to the pipeline.

Left out: quantisation, and models for one runtime or device.
"""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sdvae._version import __version__
from sdvae.checkpoints import fit
from sdvae.checkpoints.fit import autoencoder_digest
from sdvae.checkpoints.formats import CONFIG_NAME, json_text
from sdvae.checkpoints.notes import NOTES_FIELD
from sdvae.errors import CheckpointError, ConfigError, OutputExistsError
from sdvae.model.layers import GroupNorm
from sdvae.model.network import Autoencoder

if TYPE_CHECKING:
    import onnx_ir

__all__ = ["DEFAULT_OPSET", "OPSETS", "TOLERANCES", "OnnxCheck", "OnnxPart", "OnnxReport", "export_onnx"]

DEFAULT_OPSET = (
    18  # optimum's; later ones say GroupNorm (21) and attention (23) in one node each, and need newer runtimes
)
OPSETS = range(18, 24)  # 18 is the first that torch's exporter writes

# Largest difference to torch that is let through, in parts of the range of torch's output.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2}

MODEL_NAME = "model.onnx"
WEIGHTS_NAME = "model.onnx_data"  # optimum's name for weights that do not fit into the model's file
_EXTERNAL_FROM_BYTES = 2**31 - 2**24  # protobuf ends at 2 GiB; the graph around the weights is far below 16 MiB

# Images of the check: batch, height and width in latent positions. Sizes differ in shape and order from the one of the
# trace, and odd ones are among them.
_CHECKED = ((1, 8, 8), (2, 9, 13), (3, 20, 6))
_TRACED = (2, 10, 14)  # no side is 1, which the trace would take for a constant


@dataclass(frozen=True, kw_only=True)
class OnnxCheck:
    """One run of a model in onnxruntime on a CPU, compared with torch in float32."""

    batch: int
    height_px: int
    width_px: int
    max_abs_error: float
    output_range: float  # max - min of torch's output
    finite: bool

    @property
    def relative_error(self) -> float:
        """The largest difference in parts of the output's range."""
        return self.max_abs_error / self.output_range if self.output_range else self.max_abs_error


@dataclass(frozen=True, kw_only=True)
class OnnxPart:
    """One of the two models."""

    path: str  # below the folder of the export, with slashes
    input: str
    input_axes: tuple[int | str, ...]  # a name is an axis of any size
    output: str
    output_axes: tuple[int | str, ...]
    size_bytes: int  # with external weights
    sha256: str  # of the model's file
    external_weights: bool  # in model.onnx_data beside it, for models of more than 2 GB
    checks: tuple[OnnxCheck, ...]


@dataclass(frozen=True, kw_only=True)
class OnnxReport:
    """What was exported, and how far it is from torch."""

    vae_digest: str
    opset: int
    dtype: str  # of weights, inputs and outputs
    tolerance: float  # of `relative_error`
    torch_version: str
    onnxruntime_version: str
    parts: tuple[OnnxPart, ...]

    @property
    def max_abs_error(self) -> float:
        return max(check.max_abs_error for part in self.parts for check in part.checks)

    @property
    def max_relative_error(self) -> float:
        return max(check.relative_error for part in self.parts for check in part.checks)

    def to_json(self) -> dict[str, Any]:
        """Plain data, with the largest errors over all checks."""
        data = asdict(self) | {"max_abs_error": self.max_abs_error, "max_relative_error": self.max_relative_error}
        for part, plain in zip(self.parts, data["parts"], strict=True):
            for check, entry in zip(part.checks, plain["checks"], strict=True):
                entry["relative_error"] = check.relative_error
        return data


class _EncoderGraph(nn.Module):
    def __init__(self, vae: Autoencoder) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, sample: Tensor) -> Tensor:
        moments: Tensor = self.encoder(sample)  # (B, 2 * latent_channels, h, w)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        return moments


class _DecoderGraph(nn.Module):
    def __init__(self, vae: Autoencoder) -> None:
        super().__init__()
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def forward(self, latent_sample: Tensor) -> Tensor:
        z = latent_sample if self.post_quant_conv is None else self.post_quant_conv(latent_sample)
        recon: Tensor = self.decoder(z)  # (B, out_channels, H, W)
        return recon


def export_onnx(
    vae: Autoencoder,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    opset: int = DEFAULT_OPSET,
    notes: Mapping[str, Any] | None = None,
) -> OnnxReport:
    """Write encoder and decoder as ONNX models for any batch, height and width, and compare them with torch.

    folder: an empty one. What is in it after an error is not to be used.
    dtype: float32 or float16, of weights, inputs and outputs alike, as optimum does it. The CPU of onnxruntime computes
        most of a float16 model in float32, so the check does not see an overflow inside it (`sdvae check` does).
    opset: version of ONNX's operators.
    notes: what is known about the VAE besides its fields; they go into config.json and the models' metadata.
    Returns: what was written, with the largest errors at three sizes and batches.
    Raises: ConfigError for an impossible dtype or opset and where onnx, onnxscript or onnxruntime is not installed;
        OutputExistsError for a folder with something in it; CheckpointError for weights that are not finite in dtype,
        for a model that ONNX's checker refuses or that differs from torch by more than `TOLERANCES`.
    """
    runtime_version = _require_packages()
    if dtype not in TOLERANCES:
        raise ConfigError(f"dtype is {dtype}; ONNX models are written as torch.float32 or torch.float16")
    if opset not in OPSETS:
        raise ConfigError(f"opset is {opset}; expected {OPSETS.start} to {OPSETS.stop - 1}")
    if not folder.is_dir() or any(folder.iterdir()):
        raise OutputExistsError(f"{folder}: the export needs an existing, empty folder")
    fields = fit.config_fields(vae.config)
    metadata = _metadata(vae, fields, notes or {})
    stored = _copy(vae, dtype)
    reference = copy.deepcopy(stored).float()
    height, width = (side * vae.spatial_compression_ratio for side in _TRACED[1:])
    traces = {
        "encoder": (_EncoderGraph, torch.zeros(_TRACED[0], vae.config.in_channels, height, width, dtype=dtype)),
        "decoder": (_DecoderGraph, torch.zeros(_TRACED[0], vae.config.latent_channels, *_TRACED[1:], dtype=dtype)),
    }
    for part, (graph, example) in traces.items():
        model = _trace(graph(stored), example, _axes(part, vae.spatial_compression_ratio), opset)
        model.metadata_props.update(metadata | {"sdvae.part": part})
        _write(model, folder / f"vae_{part}", fields, notes or {})
    return OnnxReport(
        vae_digest=metadata["sdvae.vae_digest"],
        opset=opset,
        dtype=str(dtype).removeprefix("torch."),
        tolerance=TOLERANCES[dtype],
        torch_version=torch.__version__,
        onnxruntime_version=runtime_version,
        parts=tuple(check_part(reference, folder, part, dtype) for part in traces),
    )


def _require_packages() -> str:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"ONNX models are written and checked with the packages onnx, onnxscript and onnxruntime, and "
            f"{error.name} is not installed: pip install 'sdvae[onnx]'"
        ) from error
    return str(onnxruntime.__version__)


def _metadata(vae: Autoencoder, fields: Mapping[str, Any], notes: Mapping[str, Any]) -> dict[str, str]:
    """What a model's file says about itself; values are JSON, but for names."""
    metadata = {
        "sdvae.version": __version__,
        "sdvae.vae_digest": autoencoder_digest(vae),
        "sdvae.scaling_factor": json.dumps(fields["scaling_factor"]),
        "sdvae.shift_factor": json.dumps(fields["shift_factor"]),
    }
    return metadata | ({"sdvae.notes": json.dumps(dict(notes), sort_keys=True)} if notes else {})


def _copy(vae: Autoencoder, dtype: torch.dtype) -> Autoencoder:
    """The VAE on the CPU, in torch's default memory layout, with torch's own GroupNorm.

    Ours asks for the size of the image, which would be a condition on sizes in the trace.
    """
    plain = fit.build(fit.config_fields(vae.config), "configuration")
    tensors = {name: t.detach().to(device="cpu", dtype=dtype).contiguous() for name, t in vae.state_dict().items()}
    if name := fit.first_not_finite(tensors):
        raise CheckpointError(f"the VAE is not exported: `{name}` has values that are not finite as {dtype}")
    plain.load_state_dict(tensors, strict=True, assign=True)
    for parent in list(plain.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(child, GroupNorm):
                setattr(parent, child_name, _plain_group_norm(child))
    plain.eval().requires_grad_(False)
    return plain


def _plain_group_norm(norm: GroupNorm) -> nn.GroupNorm:
    plain = nn.GroupNorm(norm.num_groups, norm.num_channels, eps=norm.eps, device="meta")
    plain.weight, plain.bias = norm.weight, norm.bias
    return plain


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """Names of a part's input and output and of their axes for batch, height and width: those that optimum gives."""

    input: str
    inputs: tuple[str, str, str]
    output: str
    outputs: tuple[str, str, str]


def _axes(part: str, ratio: int) -> _Axes:
    inputs, outputs, side, sign = {
        "encoder": ("sample", "latent_parameters", "sample", "/"),
        "decoder": ("latent_sample", "sample", "latent", "*"),
    }[part]
    height, width = f"{side}_height", f"{side}_width"
    return _Axes(
        input=inputs,
        inputs=("batch_size", height, width),
        output=outputs,
        outputs=("batch_size", f"{height} {sign} {ratio}", f"{width} {sign} {ratio}"),
    )


def _trace(graph: nn.Module, example: Tensor, axes: _Axes, opset: int) -> onnx_ir.Model:
    dims = (torch.export.Dim(axes.inputs[0]), None, *(torch.export.Dim(name) for name in axes.inputs[1:]))
    with _quiet():
        program = torch.onnx.export(
            graph.eval(),
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=[axes.input],
            output_names=[axes.output],
            dynamic_shapes=({index: dim for index, dim in enumerate(dims) if dim is not None},),
            verbose=False,
        )
    assert program is not None
    model = program.model
    _forget_origin(model)
    _name_axes(model.graph.outputs[0], axes.outputs)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    exporter = logging.getLogger("torch.onnx._internal.exporter._registration")  # tells of every missing torchvision
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # torch 2.13 copies its own trees of arguments through a class that it deprecates
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        exporter.setLevel(level)


def _forget_origin(model: onnx_ir.Model) -> None:
    """Remove what the exporter notes about each node: stack traces with paths of this machine among it."""
    model.doc_string = model.graph.doc_string = None
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _name_axes(value: onnx_ir.Value, names: tuple[str, str, str]) -> None:
    import onnx_ir

    assert value.shape is not None
    batch, height, width = names
    value.shape = onnx_ir.Shape([batch, value.shape[1], height, width])


def _write(model: onnx_ir.Model, folder: Path, fields: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    import onnx
    import onnx_ir

    size_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    config = {"_class_name": "AutoencoderKL", **fields} | ({NOTES_FIELD: dict(notes)} if notes else {})
    try:
        folder.mkdir()
        (folder / CONFIG_NAME).write_text(json_text(config), encoding="utf-8")
        external = WEIGHTS_NAME if size_bytes > _EXTERNAL_FROM_BYTES else None
        onnx_ir.save(model, folder / MODEL_NAME, external_data=external)
        onnx.checker.check_model(folder / MODEL_NAME, full_check=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written: {error}") from error
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise CheckpointError(f"{folder / MODEL_NAME}: onnx's own checker refuses the model: {error}") from error


def check_part(vae: Autoencoder, folder: Path, part: str, dtype: torch.dtype) -> OnnxPart:
    """Run a model that was written in onnxruntime, and torch beside it, at three sizes and batches.

    vae: in float32. part: `encoder` or `decoder`. dtype: of the model.
    Raises: CheckpointError beyond `TOLERANCES`.
    """
    path = folder / f"vae_{part}" / MODEL_NAME
    session = _session(path)
    source, result = session.get_inputs()[0], session.get_outputs()[0]
    ratio = vae.spatial_compression_ratio
    sizes = [(batch, height * ratio, width * ratio) for batch, height, width in _CHECKED]
    checks = tuple(_compare(vae, session, part, dtype, size) for size in sizes)
    worst = max(checks, key=lambda check: check.relative_error)
    if not all(check.finite for check in checks) or not worst.relative_error <= TOLERANCES[dtype]:
        raise CheckpointError(
            f"{path}: differs from torch by {worst.max_abs_error:.2g} at {worst.batch} x {worst.height_px} x "
            f"{worst.width_px}, where the output spans {worst.output_range:.2g}; allowed are {TOLERANCES[dtype]:g} of "
            f"that{'' if all(check.finite for check in checks) else ', and not all of its values are finite'}. "
            f"It is not to be used"
        )
    weights = path.with_name(WEIGHTS_NAME)
    return OnnxPart(
        path=path.relative_to(folder).as_posix(),
        input=source.name,
        input_axes=tuple(source.shape),
        output=result.name,
        output_axes=tuple(result.shape),
        size_bytes=path.stat().st_size + (weights.stat().st_size if weights.exists() else 0),
        sha256=_file_sha256(path),
        external_weights=weights.exists(),
        checks=checks,
    )


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # it does not read OMP_NUM_THREADS
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no other base
        raise CheckpointError(f"{path}: onnxruntime {onnxruntime.__version__} cannot load it: {error}") from error


def _compare(vae: Autoencoder, session: Any, part: str, dtype: torch.dtype, size: tuple[int, int, int]) -> OnnxCheck:
    batch, height, width = size
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, vae.config.in_channels, height, width, generator=generator).mul_(2).sub_(1).to(dtype)
    with torch.no_grad():
        moments = vae._moments(x.float())
        # real z, at its true scale; the decoder's answer to noise of another scale would say little
        given = x if part == "encoder" else moments.chunk(2, dim=1)[0].to(dtype)
        expected = moments if part == "encoder" else vae._recon(given.float())
    try:
        (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
    except Exception as error:  # its errors share no other base
        raise CheckpointError(f"the ONNX {part} does not run on {batch} x {height} x {width}: {error}") from error
    result = torch.from_numpy(found).float()
    if result.shape != expected.shape:
        raise CheckpointError(f"the ONNX {part} gives {tuple(result.shape)} where torch gives {tuple(expected.shape)}")
    return OnnxCheck(
        batch=batch,
        height_px=height,
        width_px=width,
        max_abs_error=(result - expected).abs().max().item(),
        output_range=(expected.max() - expected.min()).item(),
        finite=bool(result.isfinite().all()),
    )


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
