"""The training loop, from a validated configuration to a trained run folder."""

from __future__ import annotations

import contextlib
import functools
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from nvlm.arch import registry
from nvlm.arch.pipeline import build_parts, build_pipeline, tile_use_of_rank
from nvlm.config.rules import check_world
from nvlm.config.values import Config, ConfigError
from nvlm.data.loader import StepData, Steps, load_steps, steps_of
from nvlm.estimate.lengths import check_vocabulary
from nvlm.export.text import training_note
from nvlm.inputs import identity
from nvlm.inputs.drawn import counts_of, told
from nvlm.llm.backend import check_precision, describe
from nvlm.llm.userbuffers import userbuffers
from nvlm.processes import groups
from nvlm.processes.device import has_cuda
from nvlm.processes.workers import Signals
from nvlm.runs.folder import latest
from nvlm.runs.ownership import begin as begin_folder
from nvlm.runs.sinks import Appended
from nvlm.train import idle
from nvlm.train.agree import agreed
from nvlm.train.begin import begin, own_encoder
from nvlm.train.checkpoint.restore import Loaded, load
from nvlm.train.checkpoint.save import Checkpoints
from nvlm.train.encoder import groups_of_encoder, wrap_encoder
from nvlm.train.evaluations import Evaluation, Evaluations
from nvlm.train.garbage import Collector
from nvlm.train.guard import Guard, broken
from nvlm.train.metrics import Metrics, print_groups, skipped_lines
from nvlm.train.optim import build_optimizer, count_groups, freeze, peak_rates, wrap
from nvlm.train.phases import Phases, build_profiler
from nvlm.train.skipped import stopped, too_many
from nvlm.train.step import Trainer, train_step
from nvlm.train.tracker import SILENT, Silent, Tracker, build_tracker
from nvlm.train.waiting import impatient
from nvlm.train.watch import Watchdog
from nvlm.vision.path import VisionPath, build_vision, load_encoder, new_encoder
from nvlm.vision.prepass import BalancedVision, build_team


def run(config: Config, run_dir: Path, refusal: str | None = None, evaluation: Evaluation | None = None) -> bool:
    """Train and evaluate; returns whether a signal ended the run.

    `refusal`: the first rank's reason not to start, which all ranks raise as a ConfigError.
    """
    with (
        groups.distributed(config.parallel, config.seed, config.train.threads) as device,
        Watchdog(60 * config.parallel.timeout_minutes, groups.rank(), groups.world_size()) as watch,
        contextlib.ExitStack() as opened,
    ):
        if reason := groups.from_first_rank(refusal):
            raise ConfigError(reason)
        check_world(config, groups.world_size())
        check_precision(config)
        opened.enter_context(userbuffers(config))
        steps = build_steps(config)
        resumed = config.resume == "auto" and latest(run_dir) is not None
        if resumed:
            groups.raised_together(lambda: identity.check_records(config, run_dir, steps.records, steps.order))
        trainer = build_trainer(config, device, begins=not resumed, encoder=own_encoder(config, run_dir, resumed))
        loaded = resume(trainer, config, run_dir)
        steps = replace(steps, ends=loaded.ends)
        idle.check_gates(trainer.pipeline.parts)
        counts = count_groups(trainer.pipeline.parts, trainer.vision.path.encoder)
        rates = peak_rates(trainer.wrapped, trainer.optimizer)
        tracker: Tracker | Silent = SILENT
        if groups.is_first_rank():
            begin_folder(config, run_dir, fresh=not resumed)
            tracker = opened.enter_context(contextlib.closing(build_tracker(config, run_dir, resumed=resumed)))
            if not resumed:
                identity.record(config, run_dir, steps.records, steps.order)
            print_groups(counts, config.stage.name, rates, trainer.origins)
            for one in told(config, counts_of(steps.records, config)):
                Console().print(one, highlight=False, soft_wrap=isinstance(one, str))
            print(describe(config))
            if line := training_note(config):
                print(f"note: {line}")
        return train(trainer, config, steps, loaded, run_dir, watch.mark, tracker, evaluation)


def train(
    trainer: Trainer,
    config: Config,
    steps: Steps,
    loaded: Loaded,
    run_dir: Path,
    on_phase: Callable[[int, str], None],
    tracker: Tracker | Silent,
    evaluation: Evaluation | None,
) -> bool:
    """The loop. SIGTERM and SIGINT end it, after saving a checkpoint; returns whether one did.

    `on_phase`: called at the start of each phase of a step. Raises BrokenRun after too many bad steps in a row.
    """
    first, guard = loaded.step, Guard(config.train.spike_factor, **loaded.numbers)
    settings, due, stop, waiting = config.train, False, False, idle.expected(config)
    active = groups.is_first_rank()
    profiler = build_profiler(run_dir) if config.profile and active else None
    with (
        Signals() as signals,
        contextlib.closing(Appended(run_dir / "skipped.jsonl")) as skipped,
        Metrics(config, run_dir, first, active, tracker) as metrics,
        Checkpoints(settings, run_dir, loaded.ends) as checkpoints,
        Phases(on_phase, profiler) as mark,
        Collector() as collect,
    ):
        evaluate = Evaluations(evaluation, trainer, signals, metrics, checkpoints, on_phase)
        if not evaluate.before(first, settings.steps, guard):
            signals.obey()
            return True
        mark(first + 1, "data")
        coming = load_steps(steps, first, config.data.workers, pinned=has_cuda())
        loader = impatient(coming, signals.came, settings.stop_seconds / 4)
        for step, found in enumerate(loader, start=first + 1):
            data = agreed(found, trainer.vision.team.replica, trainer.device)
            if groups.is_replica_writer():
                skipped.write(skipped_lines(data.skipped))
            result = train_step(trainer, data, guard, signals.came, functools.partial(mark, step))
            mark(step, "log")
            metrics.record(result, mark.lap())
            collect(step)
            waiting, warning = idle.after_step(waiting, trainer.wrapped, result.work.tiles)
            if warning and active:
                print(warning)
            last = step == settings.steps
            if why := too_many(metrics.tally, config.data.max_skipped, len(steps.records), last):
                raise stopped(metrics.tally, why, run_dir / "skipped.jsonl")
            checkpoints.poll()
            guard = result.guard
            if guard.bad_in_row >= settings.max_bad_steps:
                raise broken(guard, step, result.loss, result.grad_norm, sample_ids(data))
            due |= step % settings.save_every == 0
            # After a bad step the weights may be at fault, so a periodic save waits for a good one.
            if saved := last or result.stop or (due and not guard.bad_in_row):
                mark(step, "save")
                checkpoints.save(trainer, step, guard.numbers())
                due = False
            stop = result.stop
            if not (stop or last) and evaluate.due(step):
                mark(step, "evaluate")
                stop = not evaluate(step, guard)
                if stop and not saved:  # a resumed run begins with the evaluation that was interrupted
                    checkpoints.save(trainer, step, guard.numbers())
            if stop:
                break
            mark(step + 1, "data")
        if active:
            print(metrics.tally)
        if not stop and evaluate.due(settings.steps):
            stop = not evaluate(settings.steps, guard)
        if stop:
            _stopped(checkpoints, signals, metrics)
        return stop


def _stopped(checkpoints: Checkpoints, signals: Signals, metrics: Metrics) -> None:
    """End the run, whose last step was saved, because of a signal."""
    checkpoints.close()
    signals.obey()
    if metrics.active:
        name = signal.Signals(signals.came[0] if signals.came else signal.SIGTERM).name
        print(f"stopped by {name} after step {metrics.step}, checkpoint saved")


def sample_ids(data: StepData) -> list[str]:
    """Ids of all samples of a step, over all replicas."""
    return groups.gather_over_data([name for batch in data.micro_batches for row in batch.ids for name in row])


def resume(trainer: Trainer, config: Config, run_dir: Path) -> Loaded:
    """With resume=auto, load the newest checkpoint into `trainer`; without one, start at step 0."""
    folder = latest(run_dir) if config.resume == "auto" else None
    loaded = load(trainer, folder) if folder else Loaded(0, {}, (), (0.0, 0.0))
    if loaded.rates[0] != loaded.rates[1] and groups.is_first_rank():
        print(
            f"extended from {loaded.ends[-1]} to {config.train.steps} steps: the learning rate now follows the cosine "
            f"over {config.train.steps} steps: {loaded.rates[1]:.3g} instead of {loaded.rates[0]:.3g} at step "
            f"{loaded.step + 1}"
        )
    return loaded


def build_steps(config: Config) -> Steps:
    """This rank's training data."""
    check_vocabulary(config)
    rank, size = groups.data_rank()
    seat, seats = groups.seat()
    steps = steps_of(config, registry.placement_rule(config.arch.name))
    return replace(steps, data_rank=rank, data_size=size, seat=seat, seats=seats)


def build_trainer(config: Config, device, begins: bool = True, encoder: Path | None = None) -> Trainer:
    """Model, encoder and optimizer on `device`. If the run `begins` here, the weights come from config.init.

    `encoder`: the run's own file of the frozen encoder, if there is one.
    """
    parts = [part.to(device) for part in build_parts(config)]
    origins = begin(parts, config) if begins else {}
    for part in parts:
        freeze(part, config)
    pipeline = build_pipeline(config, parts)
    chunks = tuple(wrap(part, config) for part in parts)
    learning = own = None
    if config.stage.train_vision:
        own = groups_of_encoder()
        learning = wrap_encoder(load_encoder(config, device) if begins else new_encoder(config, device), config, own)
        path = VisionPath(learning.module.vision, config.vision, learns=True, frames=config.video.pool)
    else:
        path = build_vision(config, device, encoder)
    optimizer, schedule = build_optimizer(chunks, config, learning, own)
    megatron = parts[0].config
    megatron.grad_scale_func, megatron.finalize_model_grads_func = optimizer.scale_loss, pipeline.finalize
    if config.parallel.overlap:
        megatron.no_sync_func = chunks[0].no_sync  # reduce gradients only after the last micro-batch
    team = build_team(tile_use_of_rank(config, groups.pipeline_rank()), config.vision.balance)
    return Trainer(chunks, learning, pipeline, BalancedVision(path, team), optimizer, schedule, device, origins)
