"""Carries an evaluation out: blocks of images are read, measured and kept; then `conclude.py`, then files.

Measuring is shared by processes and can be interrupted; all that follows is done by one process from the blocks on
disk, so no number depends on who measured what, or when.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from sdvae.data.batches import OnProgress
from sdvae.errors import ConfigError, OutputExistsError
from sdvae.evaluation.blocks import BlockStore
from sdvae.evaluation.conclude import conclude
from sdvae.evaluation.gates import check_gates
from sdvae.evaluation.measure import measure_blocks
from sdvae.evaluation.options import EvaluateOptions
from sdvae.evaluation.plan import EvaluationPlan, plan_evaluation
from sdvae.evaluation.protocol import PRESETS, Protocol
from sdvae.evaluation.published import published_rows
from sdvae.evaluation.setup import Setup, set_up
from sdvae.files import remove_leftovers
from sdvae.model.device import exact_float32
from sdvae.processes import join_processes
from sdvae.report.result import EvaluationResult, load_result
from sdvae.report.write import RESULT_NAME, write_result

__all__ = ["evaluate", "run_evaluation"]


def evaluate(
    images: str | Path,
    out: str | Path,
    vaes: Sequence[str | Path | None] = (None,),
    options: EvaluateOptions | None = None,
    *,
    reference: str | Path | None = None,
    protocol: Protocol | str = "native",
    on_progress: OnProgress | None = None,
) -> EvaluationResult | None:
    """Measure autoencoders on images, compare them with a reference, and write a report: `sdvae evaluate`.

    images: a folder, a file, a glob or a .txt list. out: folder for result.json, per_image.csv and report.html.
    vaes, reference: folders, files or hub ids of any diffusers autoencoder; None is the bundled one.
    protocol: what is measured and how, or the name of a preset.
    on_progress: is told how many images are measured, and how many are to be measured; in this process alone.
    Returns, raises: as `run_evaluation`; ConfigError for images, gates or a folder that cannot be.
    """
    if isinstance(protocol, str):
        if protocol not in PRESETS:
            raise ConfigError(f"'{protocol}' is no preset; expected one of {', '.join(PRESETS)}")
        protocol = PRESETS[protocol]
    plan = plan_evaluation(images, vaes, reference, out, protocol, options or EvaluateOptions())
    return run_evaluation(plan, on_progress)


def run_evaluation(plan: EvaluationPlan, on_progress: OnProgress | None = None) -> EvaluationResult | None:
    """Measure, and write result.json, per_image.csv and report.html into the plan's folder.

    Where the same evaluation is finished already, nothing is measured again; where it was interrupted, it goes on.
    Returns: the result; None in a process that only helps another one.
    Raises: OutputExistsError where the folder holds another evaluation; ImageError where no image can be read;
    SdvaeError where a device, a VAE, a network or a file is not there or does not fit.
    """
    processes = join_processes(plan.options.device)
    with processes.main_first():  # it downloads what must be downloaded
        setup = set_up(plan, processes)
    store = BlockStore(plan.out / ".evaluation", setup.inputs)
    started = time.perf_counter()
    result = _finished(setup)
    with ExitStack() as stack:
        stack.enter_context(exact_float32())  # metrics and features are compared with those of other machines
        for subject in setup.subjects.values():
            stack.enter_context(subject.tiled(plan.protocol.tiling))
        if result is None:
            with processes.main_first():
                if processes.is_main:
                    plan.out.mkdir(parents=True, exist_ok=True)
                    remove_leftovers([plan.out])
                    store.open(overwrite=plan.options.overwrite)
            measure_blocks(setup, store, on_progress)
        processes.gather(None)  # now all blocks are there
        if not processes.is_main:
            return None
        result = result or conclude(setup, store.load_all(setup), started)
    published = published_rows(plan.options.published) if plan.options.published else []
    result = replace(result, gates=check_gates(plan.gates, result), published=published)
    write_result(result, plan.out)
    store.close()
    return result


def _finished(setup: Setup) -> EvaluationResult | None:
    """The result that is there already, if it is of the same inputs and not to be replaced."""
    path, statistics = setup.plan.out / RESULT_NAME, setup.plan.options.save_fid_statistics
    if setup.plan.options.overwrite:
        return None
    if not path.exists():
        if statistics is not None and statistics.exists():
            raise OutputExistsError(
                f"{statistics} is there already: choose another name, or replace it with --overwrite"
            )
        return None
    try:
        result = load_result(path)
    except ConfigError:
        result = None
    if result is not None and result.environment.get("inputs") == setup.inputs:
        if statistics is not None and not statistics.exists():
            raise OutputExistsError(
                f"{path} is finished, and the features for {statistics} are gone: measure again with --overwrite"
            )
        return result
    raise OutputExistsError(
        f"{path} is of another evaluation (other images, VAEs or settings): choose another --out, or replace it "
        "with --overwrite"
    )
