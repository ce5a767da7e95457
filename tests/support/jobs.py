"""Functions for processes of their own, which must be importable there."""

from __future__ import annotations

import json
from pathlib import Path

from sdvae.codec.run import decode_folder, encode_folder
from sdvae.processes import join_processes

__all__ = ["encode_and_decode", "meet_twice"]


def meet_twice() -> None:
    for _ in range(2):
        processes = join_processes("cpu")
        processes.wait()
        print(processes.rank, processes.count, processes.gather(f"from {processes.rank}"))


def encode_and_decode(images: Path, out: Path, decoded: Path, vae: Path) -> None:
    """One after the other, as a script does; prints a line of JSON for each report."""
    print(json.dumps(encode_folder(images, out, vae).to_json()))
    print(json.dumps(decode_folder(out, decoded, vae).to_json()))
