"""Repair for a torchvision that does not match torch.

diffusers, transformers and lpips import torchvision where it is installed. A torchvision built for another torch fails
there with `RuntimeError: operator torchvision::nms does not exist`: its compiled operators cannot load, and its Python
side registers shape functions for two of them all the same. sdvae needs none of these operators, so it declares the
two by name, and the import goes through. Calling them still fails, with torchvision's own explanation.
"""

from __future__ import annotations

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import find_spec
from pathlib import Path

__all__ = ["ensure_torchvision_importable"]

# The operators for which torchvision calls `torch.library.register_fake` without asking whether they loaded
# (torchvision 0.28, _meta_registrations.py).
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

_libraries: list[object] = []  # torch forgets what a Library declared when the Library object goes


def ensure_torchvision_importable() -> None:
    """Make `import torchvision` succeed where it is installed but its operators do not fit this torch.

    To be called before the first import of diffusers, transformers or lpips; also helps after a failed one. Does
    nothing where torchvision is absent, already imported, or sound; calling it again does nothing.
    """
    if "torchvision" in sys.modules:
        return
    spec = find_spec("torchvision")  # finds without importing: a failed import leaves torchvision half registered
    if spec is None or spec.origin is None or _operators_load(Path(spec.origin).parent):
        return
    import torch

    missing = [schema for name, schema in _SCHEMAS.items() if not hasattr(torch.ops.torchvision, name)]
    if missing:
        # A fragment, because only one library in a process may own a namespace whole, and another program's may.
        library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
        for schema in missing:
            library.define(schema)  # type: ignore[no-untyped-call]
        _libraries.append(library)


def _operators_load(package: Path) -> bool:
    """Load the compiled operators as torchvision itself does; its own load afterwards finds them loaded."""
    import torch

    if sys.platform == "win32":
        os.add_dll_directory(str(package))
    for suffix in EXTENSION_SUFFIXES:
        if (extension := package / f"_C{suffix}").is_file():
            try:
                torch.ops.load_library(extension)  # type: ignore[no-untyped-call]
            except OSError:  # an undefined symbol, or a missing library of another torch or CUDA
                return False
            return True
    return False
