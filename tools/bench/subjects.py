"""Who is compared in network.py: a function each, from a task to a callable that takes x and gives the result.

The function loads weights, as after `from_pretrained`. All that is done to them for speed (laying out, optimizing,
compiling, opening a session) happens in the callable's first call, so that its time can be told.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import DTYPES, build_vae, run_vae
from sdvae.checkpoints.convert.onnx import export_onnx
from sdvae.model.autoencoder import AutoencoderKL  # before diffusers, for torchvision's sake
from sdvae.model.optimize import optimize

Run = Callable[[Tensor], Tensor]


class Unavailable(Exception):
    """A subject cannot take part; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Task:
    operation: str  # encode or decode
    config: str
    dtype: str
    device: str
    scratch: Path  # for exported models


def stock_vae(task: Task) -> Any:
    from diffusers import AutoencoderKL as StockAutoencoderKL

    return build_vae(StockAutoencoderKL, task.config, dtype=DTYPES[task.dtype], device=task.device)


def open_diffusers(task: Task) -> Run:
    """As one writes it first, and as diffusers' pipelines run it."""
    return _runs(task, stock_vae(task), lambda vae: vae, torch.no_grad)


def open_diffusers_channels_last(task: Task) -> Run:
    vae = stock_vae(task)
    return _runs(task, vae, lambda vae: vae.to(memory_format=torch.channels_last), torch.no_grad, channels_last=True)


def open_diffusers_compile(task: Task) -> Run:
    """The compiler knows the shape, which is its best case."""

    def compiled(vae: Any) -> Any:
        torch.compiler.reset()
        setattr(vae, task.operation, torch.compile(getattr(vae, task.operation), dynamic=False))
        return vae

    return _runs(task, stock_vae(task), compiled, torch.no_grad)


def open_sdvae_plain(task: Task) -> Run:
    """Our class as plain torch modules, without what `optimize` adds."""
    vae = build_vae(AutoencoderKL, task.config, dtype=DTYPES[task.dtype], device=task.device)

    def laid_out(vae: Any) -> Any:
        return vae.to(memory_format=torch.channels_last)

    return _runs(task, vae, laid_out, torch.inference_mode, channels_last=True)


def open_sdvae(task: Task) -> Run:
    """`sdvae.optimize` of diffusers' VAE."""
    return _runs(task, stock_vae(task), optimize, torch.inference_mode)


def open_onnxruntime(task: Task) -> Run:
    path = _exported(task, "onnxruntime")
    import onnxruntime as runtime

    def session() -> Any:
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        return runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    opened = _once(session)

    def run(x: Tensor) -> Tensor:
        (found,) = opened().run(None, {opened().get_inputs()[0].name: x.numpy()})
        return torch.from_numpy(found)

    return run


def open_openvino(task: Task) -> Run:
    path = _exported(task, "openvino")
    import openvino as vino

    opened: dict[torch.Size, Any] = {}

    def run(x: Tensor) -> Tensor:
        if x.shape not in opened:
            core = vino.Core()
            model = core.read_model(path)
            model.reshape(list(x.shape))
            settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            # by itself it computes in bfloat16 where the processor can
            settings["INFERENCE_PRECISION_HINT"] = {"float32": "f32", "float16": "f16"}[task.dtype]
            opened[x.shape] = core.compile_model(model, "CPU", settings)
        return torch.from_numpy(opened[x.shape](x.numpy())[0].copy())

    return run


SUBJECTS: dict[str, Callable[[Task], Run]] = {
    "diffusers": open_diffusers,
    "diffusers-channels-last": open_diffusers_channels_last,
    "diffusers-compile": open_diffusers_compile,
    "sdvae-plain": open_sdvae_plain,
    "sdvae": open_sdvae,
    "onnxruntime": open_onnxruntime,
    "openvino": open_openvino,
}
EXPORTED = ("onnxruntime", "openvino")
EXPORT_PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # the export is checked in onnxruntime


def why_not(name: str, *, device: str, dtype: str) -> str:
    """A reason why a subject cannot take part here, or an empty text."""
    if name not in EXPORTED:
        return ""
    if missing := [package for package in (*EXPORT_PACKAGES, name) if find_spec(package) is None]:
        return f"not installed: {', '.join(missing)}"
    if device != "cpu":
        return "measured on CPUs only"
    return "" if dtype in ("float32", "float16") else f"models are not exported in {dtype}"


def export(config: str, dtype: str, scratch: Path) -> None:
    """Write the two ONNX models that `onnxruntime` and `openvino` open, unless they are there."""
    folder = _export_folder(config, dtype, scratch)
    if folder.exists():
        return
    folder.mkdir()
    export_onnx(build_vae(AutoencoderKL, config), folder, dtype=DTYPES[dtype])


def _export_folder(config: str, dtype: str, scratch: Path) -> Path:
    return scratch / f"onnx-{config}-{dtype}"


def _exported(task: Task, name: str) -> Path:
    if reason := why_not(name, device=task.device, dtype=task.dtype):
        raise Unavailable(reason)
    return _export_folder(task.config, task.dtype, task.scratch) / f"vae_{task.operation}r" / "model.onnx"


def _runs(
    task: Task,
    vae: Any,
    prepare: Callable[[Any], Any],
    mode: Callable[[], AbstractContextManager[Any]],
    *,
    channels_last: bool = False,
) -> Run:
    loaded = [vae]  # emptied, so that what `prepare` replaces leaves memory
    prepared = _once(lambda: prepare(loaded.pop()))
    layout = torch.channels_last if channels_last else torch.preserve_format

    def run(x: Tensor) -> Tensor:
        vae = prepared()  # before inference mode begins, as one does it
        with mode():
            return run_vae(vae, task.operation, x.to(memory_format=layout))

    return run


def _once(make: Callable[[], Any]) -> Callable[[], Any]:
    made: list[Any] = []

    def get() -> Any:
        if not made:
            made.append(make())
        return made[0]

    return get
