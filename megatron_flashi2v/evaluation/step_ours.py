"""The trainer's step on one random microbatch, for the benches."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.config.layout import is_fully_sharded
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import OptimizerArguments
from megatron_flashi2v.evaluation.bench_options import StepBenchmark
from megatron_flashi2v.evaluation.benchmark import interleaved_seconds
from megatron_flashi2v.flow.sigmas import timesteps_of
from megatron_flashi2v.flow.sinusoid import timestep_sinusoid
from megatron_flashi2v.models.build import build_stages
from megatron_flashi2v.models.spec import ModelSpec, make_spec
from megatron_flashi2v.parallel.agreement import share_numbers
from megatron_flashi2v.parallel.fully_sharded import FullyShardedStage
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.runtime.device import Device
from megatron_flashi2v.training.batch import Microbatch
from megatron_flashi2v.training.clipping import make_clipper
from megatron_flashi2v.training.optimizer import make_optimizer, wrap_data_parallel
from megatron_flashi2v.training.step import TrainingStep, forward_step


class OurStep:
    """The trainer's step on one random microbatch.

    Args:
        options: sizes and precision.
        config: the model.
        groups: groups of one.
        device: where it runs.
    """

    def __init__(self, options: StepBenchmark, config: ModelConfig, groups: Groups, device: Device) -> None:
        self.options = options
        parallel, optimizer = options.parallel, OptimizerArguments(lr=1e-5)
        self.spec = make_spec(
            config, groups, device.torch_device, bf16=options.bf16, attention_backend=options.attention_backend,
            elementwise_backend=options.elementwise_backend,
        )
        sharded = is_fully_sharded(parallel, torch.distributed.get_world_size())
        stages = build_stages(self.spec, parallel, options.recompute, hollow=sharded)
        self.parameters = sum(parameter.numel() for stage in stages for parameter in stage.parameters())
        models = wrap_data_parallel(stages, parallel)
        for model in models:
            _fill(model)
            model.train()
        self.step = TrainingStep(
            self.spec, stages, models, make_optimizer(models, optimizer, parallel, self.spec), make_clipper(optimizer),
            num_microbatches=1, micro_batch_size=options.micro_batch_size,
        )
        self.batch = random_batch(self.spec, options.latent_shape, options.micro_batch_size)

    def __call__(self) -> None:
        """Forward, backward and update."""
        self.losses_and_gradients()
        self.update()

    def update(self) -> None:
        """Clip and apply the gradients."""
        self.step.apply(self.step.agree(self.report).grad_norm)

    def losses_and_gradients(self) -> None:
        """Forward and backward."""
        self.report = self.step.losses_and_gradients([itertools.repeat(self.batch)], self.options.latent_shape)

    @torch.no_grad()
    def forward(self) -> None:
        """Forward without what backward needs."""
        output, loss = forward_step(self.spec, itertools.repeat(self.batch), self.step.models[0])
        loss(output)

    def breakdown(self, device: Device, rounds: int) -> dict[str, float]:
        """Median seconds of the step's parts; backward is what forward leaves of both, with recomputation."""
        parts: dict[str, Callable[[], object]] = {
            "forward": self.forward, "both": self.losses_and_gradients, "optimizer": self.update,
        }
        seconds = interleaved_seconds(parts, device, rounds, agree=agreed(device))
        forward, both, optimizer = (statistics.median(seconds[name]) for name in parts)
        return {"forward_s": forward, "backward_s": both - forward, "optimizer_s": optimizer}


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Small random weights: zeros would make some products trivial, and drawing them keyed takes minutes."""
    if isinstance(model, FullyShardedStage):
        for shard in model.parameters_of_rank():
            shard.held_weights.normal_(std=0.02)
        model.take_weights()
        return
    for parameter in model.parameters():
        parameter.normal_(std=0.02)


def agreed(device: Device) -> Callable[[float], float]:
    """The first rank's seconds for all, so that all ranks call collectives as often."""
    return lambda seconds: share_numbers(torch.tensor([seconds], device=device.torch_device))[0]


def random_batch(spec: ModelSpec, latent_shape: tuple[int, int, int], samples: int) -> Microbatch:
    """Normal latents, noise and text on the model's device."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, device=spec.device)

    config = spec.config
    image = (samples, config.latent_channels, 1, *latent_shape[1:])
    sigma_B = torch.full((samples,), 0.5)
    stored = paradigm_of(config).stored_inputs(config, (config.latent_channels, *latent_shape))
    return Microbatch(
        latents_BCTHW=normal(samples, config.latent_channels, *latent_shape),
        noise_BCTHW=normal(samples, config.latent_channels, *latent_shape),
        sigma_B=sigma_B.to(spec.device),
        sinusoid_BF=timestep_sinusoid(timesteps_of(sigma_B), config.freq_dim).to(spec.device),
        text_BLX=normal(samples, config.text_length, config.text_dim).to(torch.bfloat16),
        extras={
            "cutoff_ratio": torch.full((samples,), 0.1, device=spec.device),
            "image_noise_level": torch.full((samples,), 0.05, device=spec.device),
            "image_noise": normal(*image),
            **{name: normal(samples, *shape) for name, shape in stored.items()},
        },
    )
