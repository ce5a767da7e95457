"""Carries an evaluation out: blocks of images are read, measured and kept; then `conclude.py`, then files.

Measuring is shared by processes and can be interrupted; all that follows is done by one process from the blocks on
disk, so no number depends on who measured what, or when.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path

from sdvae.data.batches import default_workers, read_ahead
from sdvae.errors import ConfigError, OutputExistsError, SdvaeError
from sdvae.evaluation.blocks import BlockStore
from sdvae.evaluation.conclude import conclude
from sdvae.evaluation.gates import check_gates
from sdvae.evaluation.images import BLOCK_IMAGES, Prepared, blocks_of, prepare
from sdvae.evaluation.measure import Measurement
from sdvae.evaluation.options import EvaluateOptions
from sdvae.evaluation.plan import EvaluationPlan, plan_evaluation
from sdvae.evaluation.protocol import PRESETS, Protocol
from sdvae.evaluation.published import published_rows
from sdvae.evaluation.setup import Setup, set_up
from sdvae.files import remove_leftovers
from sdvae.model.device import exact_float32
from sdvae.report.result import EvaluationResult, load_result
from sdvae.report.write import RESULT_NAME, write_result

__all__ = ["evaluate", "run_evaluation"]

OnProgress = Callable[[int, int], None]  # images that this process has measured, images that it has to measure


def evaluate(
    images: str | Path,
    out: str | Path,
    vaes: Sequence[str | Path | None] = (None,),
    *,
    reference: str | Path | None = None,
    protocol: Protocol | str = "native",
    options: EvaluateOptions | None = None,
) -> EvaluationResult | None:
    """Measure autoencoders on images, compare them with a reference, and write a report: `sdvae evaluate`.

    images: a folder, a file, a glob or a .txt list. out: folder for result.json, per_image.csv and report.html.
    vaes, reference: folders, files or hub ids of any diffusers autoencoder; None is the bundled one.
    protocol: what is measured and how, or the name of a preset.
    Returns, raises: as `run_evaluation`; ConfigError for images, gates or a folder that cannot be.
    """
    if isinstance(protocol, str):
        if protocol not in PRESETS:
            raise ConfigError(f"'{protocol}' is no preset; expected one of {', '.join(PRESETS)}")
        protocol = PRESETS[protocol]
    plan = plan_evaluation(images, vaes, reference, out, protocol, options or EvaluateOptions())
    return run_evaluation(plan)


def run_evaluation(plan: EvaluationPlan, on_progress: OnProgress | None = None) -> EvaluationResult | None:
    """Measure, and write result.json, per_image.csv and report.html into the plan's folder.

    Where the same evaluation is finished already, nothing is measured again; where it was interrupted, it goes on.
    Returns: the result; None in a process that only helps another one.
    Raises: OutputExistsError where the folder holds another evaluation; ImageError where no image can be read;
    SdvaeError where a device, a VAE, a network or a file is not there or does not fit.
    """
    setup = set_up(plan)
    processes, options = setup.processes, setup.plan.options
    store = BlockStore(plan.out / ".evaluation")
    started = time.perf_counter()
    finished = _finished(setup)
    with ExitStack() as stack:
        stack.enter_context(exact_float32())  # metrics and features are compared with those of other machines
        for subject in setup.subjects.values():
            stack.enter_context(subject.tiled(plan.protocol.tiling))
        if processes.is_main and finished is None:
            plan.out.mkdir(parents=True, exist_ok=True)
            remove_leftovers([plan.out])
            store.open(setup.inputs, overwrite=options.overwrite)
        processes.wait()
        if finished is None:
            _measure(setup, store, on_progress)
        processes.wait()
        if not processes.is_main:
            return None
        if finished is None:
            measured = store.load_into(setup.measured(store.folder), len(blocks_of(len(plan.files))))
            result = conclude(setup, measured, lambda indices: _read(setup, indices), started)
        else:
            result = finished
    result = replace(
        result,
        gates=check_gates(plan.gates, result),
        published=published_rows(options.published) if options.published else [],
    )
    write_result(result, plan.out)
    store.close(setup.inputs)
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


def _measure(setup: Setup, store: BlockStore, on_progress: OnProgress | None) -> None:
    """This process's share of the blocks, as far as they are missing."""
    plan, processes = setup.plan, setup.processes
    blocks = blocks_of(len(plan.files))
    mine = range(processes.rank, len(blocks), processes.count)
    missing = [number for number in mine if not store.has(number)]
    total = sum(len(blocks[number]) for number in mine)
    done = total - sum(len(blocks[number]) for number in missing)
    tell = on_progress if processes.is_main and on_progress is not None else lambda done, total: None
    tell(done, total)
    measurement = Measurement(
        subjects=setup.subjects,
        protocol=plan.protocol,
        metrics=setup.networks.metrics,
        swap_tests=setup.swap_tests,
        reference=None if plan.reference is None else plan.reference.id,
        swap_images=setup.swap_images,
        inception=setup.networks.inception,
        originals=setup.fid_reference is None or plan.options.save_fid_statistics is not None,
        batch_size=plan.options.batch_size,
    )
    with closing(_read(setup, [index for number in missing for index in blocks[number]])) as reading:
        for number, members in groupby(reading, key=lambda item: item[0] // BLOCK_IMAGES):
            prepared: list[Prepared] = []
            unreadable: list[tuple[str, str]] = []
            for index, item in members:
                if isinstance(item, Prepared):
                    prepared.append(item)
                else:
                    file = plan.files[index]
                    unreadable.append((file.key, str(item).removeprefix(f"{file.path}: ")))

            def tell_more(count: int, before: int = done) -> None:
                tell(before + count, total)

            store.save(number, measurement.block(prepared, unreadable, tell_more))
            done += len(prepared) + len(unreadable)
            tell(done, total)


def _read(setup: Setup, indices: Sequence[int]) -> Generator[tuple[int, Prepared | Exception], None, None]:
    """Images by their index among the plan's files, read ahead in threads; an ImageError in the place of an image."""
    plan = setup.plan

    def read(index: int) -> Prepared:
        return prepare(index, plan.files[index], plan.protocol)

    workers = plan.options.workers or default_workers()
    with closing(read_ahead(indices, read, attrgetter("num_px"), workers)) as reading:
        for index, item in reading:
            if isinstance(item, Exception) and not isinstance(item, SdvaeError):
                raise item
            yield index, item
