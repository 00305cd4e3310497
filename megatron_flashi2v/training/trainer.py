"""A training run from its configuration to its last checkpoint."""

from __future__ import annotations

import logging
import math
import time
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from flashi2v_kernels.registry import describe
from megatron_flashi2v.checkpoint.folders import (
    find_checkpoint,
    has_checkpoint,
    load_model_config,
    require_same_model,
)
from megatron_flashi2v.checkpoint.model_state import load_parameters, model_pieces, shard_grid
from megatron_flashi2v.checkpoint.optimizer_state import load_optimizer, optimizer_common_state, optimizer_pieces
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.config.errors import DataError, DivergenceError
from megatron_flashi2v.config.layout import virtual_stages
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.recipe import flat_values
from megatron_flashi2v.config.rules import num_microbatches
from megatron_flashi2v.config.train import TrainConfig
from megatron_flashi2v.conversion.initial_weights import load_initial_weights, open_initial_weights
from megatron_flashi2v.data.blend import Blend
from megatron_flashi2v.models.backend import Backend
from megatron_flashi2v.models.initialization import initialize_weights
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.parallel.agreement import gather_json
from megatron_flashi2v.parallel.groups import make_groups
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.runtime.files import atomic_write_text
from megatron_flashi2v.runtime.hang_watch import SLOW, HangWatch
from megatron_flashi2v.runtime.launch import LaunchEnvironment
from megatron_flashi2v.runtime.logging import AGREED
from megatron_flashi2v.training.bad_samples import BadSampleLedger
from megatron_flashi2v.training.batch import MicrobatchSource
from megatron_flashi2v.training.chunks import build_chunks
from megatron_flashi2v.training.clipping import make_clipper
from megatron_flashi2v.training.datasets import fit_model_to_data, open_data, open_validation_data, share_encoding
from megatron_flashi2v.training.ema import WeightAverage
from megatron_flashi2v.training.guard import UpdateGuard
from megatron_flashi2v.training.holdings import held_by_all, holding_of
from megatron_flashi2v.training.interrupts import Interrupts
from megatron_flashi2v.training.metrics import IterationMetrics
from megatron_flashi2v.training.optimizer import make_optimizer, make_scheduler, wrap_data_parallel
from megatron_flashi2v.training.run_state import load_training_state, provenance
from megatron_flashi2v.training.saver import CheckpointSaver
from megatron_flashi2v.training.step import TrainingStep
from megatron_flashi2v.training.watch import Watch
from megatron_flashi2v.training.watching.norms import NormsByPart
from megatron_flashi2v.training.watching.previews import Samples
from megatron_flashi2v.training.watching.stragglers import ReplicaClock
from megatron_flashi2v.training.watching.validation import VALIDATION_SEED, Validation, make_validation
from megatron_flashi2v.training.watching.writers import require_packages

MICROBATCHES_AHEAD = 4
"""Read while the present one is computed; a few even out slow reads, and more only cost memory."""

logger = logging.getLogger(__name__)


class Trainer:
    """Builds this rank's part of a run, resumes it if there is something to resume, and trains.

    torch.distributed must be initialised, and megatron-core redirected to ``device``.

    Args:
        config: flags and recipe, already checked by ``config.rules.check_train``.
        model_config: resolved dimensions.
        launch: this process's place.
        device: what it runs on.
        hang_watch: is told what the run does; by default nothing is watched.

    Raises:
        UserError: the data or the checkpoint does not fit the configuration.
    """

    def __init__(
        self, config: TrainConfig, model_config: ModelConfig, launch: LaunchEnvironment, device: Device,
        hang_watch: HangWatch | None = None,
    ) -> None:
        self.config, self.launch, self.device = config, launch, device
        self.hang_watch = hang_watch or HangWatch(0.0, None, launch, gather_json)
        self.interrupts = Interrupts(config.checkpoint.exit_duration_minutes)
        if launch.rank == 0:
            require_packages(config.watch)
        self.data = open_data(config, model_config, device.torch_device)
        self.model_config = fit_model_to_data(model_config, self.data)
        self.validation_data: Blend | None = None
        if config.watch.valid_data_path:
            self.validation_data = open_validation_data(config, self.data, VALIDATION_SEED)
            fit_model_to_data(self.model_config, self.validation_data)
        self.hang_watch.enter("building the model", SLOW)
        self.groups = make_groups(config.parallel)
        share_encoding(self.data, self.groups, config.parallel.distributed_timeout_minutes)
        self.grid = shard_grid(self.groups)
        self.spec = make_spec(
            self.model_config, self.groups, device.torch_device, bf16=config.batch.bf16,
            fp32_residual_connection=config.batch.fp32_residual_connection,
            attention_backend=config.runtime.attention_backend,
            virtual_stages=virtual_stages(config.parallel),
            backend=Backend(
                transformer_impl=config.runtime.transformer_impl, fp8_format=config.runtime.fp8_format,
                fp8_recipe=config.runtime.fp8_recipe,
            ),
        )
        self.chunks = build_chunks(self.spec, config, device)
        peers = Peers(launch.rank, launch.world_size)
        self.hang_watch.enter("verifying the checkpoint", SLOW)
        resumed = None if config.checkpoint.load is None else find_checkpoint(config.checkpoint.load, peers=peers)
        if resumed is None:
            for chunk in self.chunks:
                initialize_weights(chunk, config.batch.seed)
            source = config.checkpoint.load_weights_source
            if source is not None:
                initial = open_initial_weights(source, self.model_config, config.checkpoint.load_weights_kind)
                logger.info("%s", initial.summary)
                load_initial_weights(initial, self.named_parameters(), self.grid)
        clock = ReplicaClock(device)
        self.hang_watch.enter("building the optimizer", SLOW)
        self.models = wrap_data_parallel(self.chunks, config, clock.meet)
        self.optimizer = make_optimizer(self.models, config, self.spec)
        self.clipper = make_clipper(config.optimizer)
        self.guard = UpdateGuard(config.faults)
        self.average = (
            None if config.optimizer.ema_decay is None
            else WeightAverage(config.optimizer, self.optimizer, self.named_parameters(), self.grid)
        )
        self.saver = CheckpointSaver(config.checkpoint, self.model_config, peers, device)
        self.provenance = provenance(config, self.data, launch)
        self.iteration, self.consumed_samples = 0, 0
        self.stop_reason: str | None = None
        self.hang_watch.enter("loading the checkpoint", SLOW)
        if resumed is not None:
            self.resume(resumed)
        elif config.checkpoint.load is not None:
            logger.info("%s holds no checkpoint: starting anew", config.checkpoint.load)
        self.data.require_whole_batches(self.consumed_samples)
        self.scheduler = make_scheduler(self.optimizer, config.optimizer, config.batch.train_iters, self.iteration)
        self.num_microbatches = num_microbatches(config, launch.world_size)
        self.step = TrainingStep(
            self.spec, self.chunks, self.models, self.optimizer, self.clipper,
            num_microbatches=self.num_microbatches, micro_batch_size=config.batch.micro_batch_size,
        )
        self.watch = Watch(
            config, self.model_config, self.groups, device, launch,
            NormsByPart(self.model_config, self.optimizer, self.named_parameters(), self.grid, device.torch_device),
            clock, self.interrupts, self.hang_watch, *self.make_lookers(),
        )

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Global names and parameters of all of this rank's stages."""
        return [named for chunk in self.chunks for named in chunk.named_parameters()]

    def train(self) -> None:
        """Run to ``train_iters``, or to the next multiple of ``exit_interval``; the last iteration is saved."""
        config = self.config
        source = self.make_source()
        self.announce()
        self.watch.begin(self.iteration, self.consumed_samples)
        if self.iteration >= config.batch.train_iters:
            logger.info("nothing to do: iteration %d of %d is done", self.iteration, config.batch.train_iters)
        self.bad_samples = self.make_bad_sample_ledger(source)
        for model in self.models:
            model.train()
        try:
            with self.interrupts:
                self.run_iterations(source)
        except BaseException:
            source.abandon()
            self.saver.abandon()
            raise
        finally:
            self.watch.end()
        self.hang_watch.enter("the end", SLOW)
        source.close()
        self.data.close()
        if self.validation_data is not None:
            self.validation_data.close()

    def make_bad_sample_ledger(self, source: MicrobatchSource) -> BadSampleLedger:
        """What the ranks agree on about samples that cannot be used."""
        return BadSampleLedger(
            self.config.checkpoint.save, self.config.data.max_bad_samples, consumed=self.consumed_samples,
            replica=self.groups.dp.rank(), reads=not source.shapes_only,
        )

    def make_source(self) -> MicrobatchSource:
        """What reads this replica's share of each global batch."""
        config = self.config
        last = config.batch.train_iters
        if config.checkpoint.exit_interval is not None:
            interval = config.checkpoint.exit_interval
            last = min(last, (self.iteration // interval + 1) * interval)
        return MicrobatchSource(
            self.data, self.model_config, config.data, config.batch, dp_rank=self.groups.dp.rank(),
            dp_size=self.groups.dp.size(), device=self.device.torch_device,
            shapes_only=self.step.reading_chunk is None,
            ahead=self.num_microbatches if self.data.encodes_together else MICROBATCHES_AHEAD,
            end=self.consumed_samples + (last - self.iteration) * config.batch.global_batch_size,
        )

    def make_lookers(self) -> tuple[Validation | None, Samples | None]:
        """What looks at the model by way of validation data."""
        config, data, save = self.config, self.validation_data, self.config.checkpoint.save
        if data is None:
            return None, None
        validation = None if config.watch.eval_interval is None else make_validation(
            config, self.model_config, data, self.step, self.device.torch_device, MICROBATCHES_AHEAD
        )
        samples = None if config.watch.sample_interval is None or save is None else Samples(
            config.watch, save, data, self.model_config, self.chunks, self.models, self.device,
            gathers_late=config.parallel.overlap_param_gather,
        )
        return validation, samples

    def run_iterations(self, source: MicrobatchSource) -> None:
        """Train up to the run's last iteration, or until it is time to leave; the last one is always saved.

        Raises:
            StorageError: the last checkpoint cannot be written; one in between is done without.
        """
        config, save_is_due = self.config, False
        while self.iteration < config.batch.train_iters:
            self.watch.before_iteration(self.iteration)
            self.watch.iteration_done(self.run_iteration(source))
            self.saver.reserve(self.pieces)
            stop = self.stop_reason
            if stop is None and self.is_due(config.checkpoint.exit_interval):
                stop = "--exit-interval asks for it"
            done = stop is not None or self.iteration == config.batch.train_iters
            save_is_due = save_is_due or self.is_due(config.checkpoint.save_interval)
            # Skipped updates may mean spoiled weights: then the newest checkpoint stays the good one.
            saves = config.checkpoint.save is not None and (done or (save_is_due and not self.guard.streak))
            if saves:
                save_is_due = False
                self.save(last=done)
            if stop is None and self.watch.looks_at(self.iteration):
                stop = self.watch.look(self.iteration, self.consumed_samples)
                if stop is not None and config.checkpoint.save is not None and not saves:
                    self.save()
            if stop is not None:
                self.saver.finish()
                logger.info("leaving at iteration %d: %s", self.iteration, stop)
                break

    def is_due(self, interval: int | None) -> bool:
        """Whether the present iteration is a multiple of an interval that was set."""
        return interval is not None and self.iteration % interval == 0

    def run_iteration(self, source: MicrobatchSource) -> IterationMetrics:
        """One optimizer step; ``stop_reason`` then says why all ranks leave after it, if they do.

        Raises:
            DivergenceError: too many updates had to be skipped; no rank goes on.
            DataError: too many samples are bad; no rank goes on.
        """
        self.hang_watch.enter(f"iteration {self.iteration + 1}")
        start = time.perf_counter()
        lr = self.optimizer.param_groups[0]["lr"]
        batches = self.step.batches(source, self.consumed_samples)
        latent_shape = self.data.latent_shape(self.consumed_samples)[1:]
        loss, totals = self.step.losses_and_gradients(batches, latent_shape, lambda: {
            "bad_samples": (len(source.bad),),
            "saving": (self.saver.working(),),
            **self.watch.counts(source.waited_s),
            "interrupts": self.interrupts.counts(),
        })
        self.hang_watch.enter(f"the update of iteration {self.iteration + 1}")
        try:
            self.bad_samples.settle(source.bad, *totals["bad_samples"])
            mean_loss, grad_norm = self.step.agree_on_norm(loss.mean)
            self.watch.gradients_ready(self.iteration + 1)
            skipped = self.guard.judge(self.iteration + 1, mean_loss, grad_norm)
        except (DataError, DivergenceError):  # on all ranks alike: they can still publish what they were saving
            self.hang_watch.enter("the last checkpoint", SLOW)
            self.saver.finish()
            raise
        if skipped is None:
            self.step.apply(grad_norm)
            if self.average is not None:
                self.average.update()
        self.scheduler.step(increment=1)
        self.device.synchronize()
        self.iteration += 1
        self.consumed_samples += self.config.batch.global_batch_size
        self.stop_reason = self.interrupts.reason(totals["interrupts"])
        seconds = time.perf_counter() - start
        metrics = IterationMetrics(
            iteration=self.iteration, consumed_samples=self.consumed_samples, loss=mean_loss, grad_norm=grad_norm,
            lr=lr, step_time_s=seconds, throughput=self.watch.throughput(latent_shape, seconds, totals),
            loss_by_sigma=loss.by_sigma, samples_by_sigma=loss.samples_by_sigma, skipped=skipped,
        )
        if self.saver.is_saving and not any(totals["saving"]):
            self.hang_watch.enter(f"saving beside iteration {self.iteration}", SLOW)
        self.saver.advance(*totals["saving"])
        return metrics

    def save(self, *, last: bool = True) -> None:
        """Write a checkpoint of the present iteration, or begin to, if it is not the run's last and --async-save is on.

        Raises:
            StorageError: on all ranks: a disk is full or refuses, and it is the last; one in between is done without.
        """
        self.hang_watch.enter(f"saving iteration {self.iteration}", SLOW)
        if self.config.parallel.overlap_param_gather:
            # The next forward pass would gather the updated shards; until then the weights here are a step old.
            for model in self.models:
                model.start_param_sync(force_sync=True)
        if self.guard.streak:
            logger.warning("the last %d updates were skipped: the weights are still those of iteration %d",
                           self.guard.streak, self.iteration - self.guard.streak, extra=AGREED)
        state = {
            "iteration": self.iteration,
            "consumed_samples": self.consumed_samples,
            **self.provenance,
            "optimizer": optimizer_common_state(self.optimizer),
            "clipper": self.clipper.state_dict(),
            "guard": self.guard.state_dict(),
            "ema": self.average.state_dict() if self.average else None,
        }
        # Weights that may be spoiled must not cost older ones.
        self.saver.save(self.iteration, self.pieces(), state, last=last, delete_older=not self.guard.streak)

    def pieces(self) -> list[TensorPiece]:
        """What this rank holds of a checkpoint's tensors."""
        parameters = self.named_parameters()
        return [*model_pieces(parameters, self.grid), *optimizer_pieces(self.optimizer, parameters, self.grid),
                *(self.average.pieces() if self.average else ())]

    def resume(self, folder: Path) -> None:
        """Load weights, optimizer and position from a checkpoint.

        Raises:
            CheckpointError: it is of another model, or damaged.
        """
        require_same_model(load_model_config(folder), self.model_config, folder)
        state = load_training_state(folder)
        parameters = self.named_parameters()
        load_parameters(folder, parameters, self.grid)
        load_optimizer(folder, self.optimizer, parameters, self.grid, state.get("optimizer", {}))
        self.iteration, self.consumed_samples = state["iteration"], state["consumed_samples"]
        self.resume_clipper(state.get("clipper"), folder)
        if "guard" in state:
            self.guard.load_state_dict(state["guard"])
        if self.average is not None:
            self.average.resume(folder, state.get("ema"))
        elif state.get("ema") is not None:
            logger.warning("%s holds a moving average of the weights, which ends here: there is no --ema-decay", folder,
                           extra=AGREED)
        if self.iteration and state["seed"] != self.config.batch.seed:
            logger.warning("--seed is %d, but %s was trained with %d: draws and the order of samples change",
                           self.config.batch.seed, folder, state["seed"], extra=AGREED)
        if self.iteration and state["data"]["fingerprint"] != self.data.fingerprint:
            logger.warning("%s was trained on other data than %s", folder, self.data.name, extra=AGREED)
        logger.info("resumed from %s at iteration %d", folder, self.iteration)

    def resume_clipper(self, state: dict[str, Any] | None, folder: Path) -> None:
        """Load the clipper's state; one of another method does not fit, and this run's starts anew."""
        if state is None:
            return
        if state["method"] == self.clipper.method:
            self.clipper.load_state_dict(state)
        else:
            logger.warning("--clip-grad-method is %s, but %s was trained with %s: clipping starts anew",
                           self.clipper.method, folder, state["method"], extra=AGREED)

    def announce(self) -> None:
        """Write what this run is made of, to the log and as config.yaml."""
        shapes = [shape[1:] for shape in self.data.latent_shapes]
        tokens = max(math.prod(self.chunks[0].grid(shape)) for shape in shapes)
        held = holding_of(self.chunks, shapes)
        logger.info("%s, launched by %s; %d processes", self.device.describe(), self.launch.launcher,
                    self.launch.world_size)
        padded = held.tokens * self.groups.token_parts
        logger.info("data: %d samples of %d visual tokens%s from %s", len(self.data), tokens,
                    f", padded to {padded}," if padded > tokens else "", self.data.name)
        for line in held_by_all(held, self.groups.pp.rank()):
            logger.info("%s", line)
        logger.info("%d microbatches of %d samples each iteration on each of %d replicas", self.num_microbatches,
                    self.config.batch.micro_batch_size, self.groups.dp.size())
        for operator, implementation, why_not in describe(self.spec.kernels.chosen):
            logger.info("kernel %s: %s%s", operator, implementation, f" ({why_not})" if why_not else "")
        if self.launch.rank == 0 and self.config.checkpoint.save is not None:
            self.warn_of_another_run(self.config.checkpoint.save)
            write_config(self.config, self.config.checkpoint.save)

    def warn_of_another_run(self, save: Path) -> None:
        """Say so if this run, which starts anew, will write beside another run's checkpoints."""
        if self.iteration == 0 and has_checkpoint(save):
            logger.warning("--save %s holds checkpoints of an earlier run, and this one starts anew beside them; "
                           "continue that run with --load %s, or choose another folder", save, save)


def write_config(config: TrainConfig, folder: Path) -> None:
    """Write the resolved flags as a recipe that ``--config`` reads back."""
    atomic_write_text(folder / "config.yaml", yaml.safe_dump(flat_values(config), sort_keys=False))
