"""What a step feeds the model, and that parts of the loss add up to the global batch's mean."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.flow.sinusoid import timestep_sinusoid
from megatron_flashi2v.models.patches import output_patches, token_grid, unpatchify
from megatron_flashi2v.models.spec import ModelSpec, make_spec
from megatron_flashi2v.models.transformer import DiTInputs
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.training import step
from megatron_flashi2v.training.batch import Microbatch
from megatron_flashi2v.training.sigma_buckets import BatchLoss, loss_report

CONFIG = ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2, latent_channels=3)
GRID = token_grid((2, 4, 6), CONFIG.patch_size)
TOKENS = GRID[0] * GRID[1] * GRID[2]


@pytest.fixture(scope="module")
def spec() -> Iterator[ModelSpec]:
    with single_process(resolve_device("cpu")) as groups:
        yield make_spec(CONFIG, groups, torch.device("cpu"))


def make_batch(size: int, seed: int = 0) -> Microbatch:
    generator = torch.Generator().manual_seed(seed)
    latents, noise = (torch.randn(size, 3, 2, 4, 6, generator=generator) for _ in range(2))
    sigma_B = torch.rand(size, generator=generator)
    return Microbatch(
        latents_BCTHW=latents, noise_BCTHW=noise, sigma_B=sigma_B,
        sinusoid_BF=timestep_sinusoid(1000 * sigma_B, CONFIG.freq_dim),
        text_BLX=torch.randn(size, 4, 5, generator=generator),
        extras={"cutoff_ratio": torch.rand(size, generator=generator)},
    )


def prediction(size: int, seed: int = 9) -> Tensor:
    return torch.randn(TOKENS, size, CONFIG.patch_dim, generator=torch.Generator().manual_seed(seed))


def test_the_model_is_given_the_noisy_latents_and_the_first_frame(spec: ModelSpec) -> None:
    batch, given = make_batch(2), []

    def model(inputs: DiTInputs) -> Tensor:
        given.append(inputs)
        return prediction(2)

    velocity, loss = step.forward_step(spec, iter([batch]), model)
    (inputs,) = given
    for index, sigma in enumerate(batch.sigma_B.tolist()):
        noisy = sigma * batch.noise_BCTHW[index] + (1 - sigma) * batch.latents_BCTHW[index]
        torch.testing.assert_close(inputs.noisy_BCTHW[index], noisy)
    assert inputs.sinusoid_BF is batch.sinusoid_BF
    assert torch.equal(inputs.image_latents_BC1HW, batch.latents_BCTHW[:, :, :1])
    assert inputs.text_BLX is batch.text_BLX and inputs.extras is batch.extras
    assert torch.equal(velocity, prediction(2))
    assert torch.equal(loss(velocity)[0], step.flow_matching_loss(spec, batch, velocity)[0])


def test_loss_is_the_mean_squared_distance_to_noise_minus_latents(spec: ModelSpec) -> None:
    batch, velocity_SBP = make_batch(2), prediction(2)
    velocity_BCTHW = unpatchify(velocity_SBP, GRID, CONFIG.patch_size)
    expected = F.mse_loss(velocity_BCTHW, batch.noise_BCTHW - batch.latents_BCTHW)
    loss, report = step.flow_matching_loss(spec, batch, velocity_SBP)
    torch.testing.assert_close(loss, expected)
    perfect = output_patches(batch.noise_BCTHW - batch.latents_BCTHW, CONFIG.patch_size)
    assert step.flow_matching_loss(spec, batch, perfect)[0] == 0
    # The schedule scales the first in place; the second is for the metrics.
    kept = report.clone()
    loss *= 0.25
    assert torch.equal(report, kept) and not report.requires_grad


@pytest.mark.parametrize("cut", [1, 5, TOKENS - 1])
def test_uneven_token_shards_add_up(spec: ModelSpec, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    """Also where a rank has rows of padding, or nothing else: what the model predicts for them does not count."""
    batch, velocity = make_batch(2), prediction(2)
    whole, _ = step.flow_matching_loss(spec, batch, velocity)
    padded = torch.cat([velocity, torch.full((3, *velocity.shape[1:]), 1e3)])
    total = torch.zeros(())
    for own in (range(cut), range(cut, TOKENS), range(TOKENS, TOKENS)):
        monkeypatch.setattr(step, "own_tokens", lambda tokens, groups, own=own: own)
        last = own.stop + (3 if own.stop == TOKENS else 0)
        total += step.flow_matching_loss(spec, batch, padded[own.start : last])[0]
    torch.testing.assert_close(total, whole)


def assert_by_sigma(loss: BatchLoss, batch: Microbatch, velocity_SBP: Tensor) -> None:
    """Against the mean over each bucket's samples of their own mean squared errors, found one by one."""
    velocity_BCTHW = unpatchify(velocity_SBP, GRID, CONFIG.patch_size)
    target_BCTHW = batch.noise_BCTHW - batch.latents_BCTHW
    members: list[list[float]] = [[] for _ in range(8)]
    for velocity, target, sigma in zip(velocity_BCTHW, target_BCTHW, batch.sigma_B.tolist(), strict=True):
        members[int(sigma // 0.125)].append(F.mse_loss(velocity, target).item())
    assert loss.samples_by_sigma == tuple(map(len, members))
    for found, values in zip(loss.by_sigma, members, strict=True):
        assert found == (pytest.approx(sum(values) / len(values), rel=1e-6) if values else None)


def test_microbatches_average_to_the_global_batch(spec: ModelSpec) -> None:
    batches, velocities = [make_batch(2, seed) for seed in range(3)], [prediction(2, seed) for seed in range(3)]
    parts = [step.flow_matching_loss(spec, batch, velocity)[1]
             for batch, velocity in zip(batches, velocities, strict=True)]
    joined = Microbatch(
        **{name: torch.cat([getattr(batch, name) for batch in batches])
           for name in Microbatch.__dataclass_fields__ if name != "extras"},
        extras={},
    )
    whole, _ = step.flow_matching_loss(spec, joined, torch.cat(velocities, dim=1))
    loss, counts = step.global_batch_report(parts, spec, 3, 6, {"some": (5, 0), "none": (), "more": (2,)}).read()
    assert loss.mean == pytest.approx(whole.item(), rel=1e-6) and counts == {"some": [5, 0], "none": [], "more": [2]}
    assert_by_sigma(loss, joined, torch.cat(velocities, dim=1))


@pytest.mark.parametrize("sequence_parallel, parts_of_one_rank", [(False, 1.0), (True, 0.25)])
def test_mean_over_replicas_and_copies(
    monkeypatch: pytest.MonkeyPatch, sequence_parallel: bool, parts_of_one_rank: float
) -> None:
    """Two replicas of four tensor-parallel ranks: whole copies on each, or a quarter of the tokens on each.

    The rank whose reports these are is the one of the four that counts the samples.
    """
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda total: total.mul_(2 * 4))
    group = {size: SimpleNamespace(size=lambda size=size: size) for size in (2, 4)}
    groups = SimpleNamespace(sequence_parallel=sequence_parallel, tp=group[4], dp=group[2])
    fake = SimpleNamespace(groups=groups, device=torch.device("cpu"))
    sigma_B = torch.tensor([0.1, 0.9])
    reports = [
        loss_report(torch.tensor(part_B) * parts_of_one_rank, sigma_B, counts=True)
        for part_B in ([1.0, 2.0], [4.0, 1.0])
    ]
    loss, counts = step.global_batch_report(reports, fake, 2, 8).read()
    assert loss.mean == pytest.approx(4.0) and counts == {}
    if not sequence_parallel:
        assert loss.samples_by_sigma == (4, 0, 0, 0, 0, 0, 0, 4)
        assert loss.by_sigma == (pytest.approx(5.0), *[None] * 6, pytest.approx(3.0))


@pytest.mark.parametrize(("pipeline", "microbatches", "group"), [
    (2, 2, 2), (2, 3, 3), (2, 4, 2), (2, 5, 3), (2, 7, 4),
    (4, 4, 4), (4, 5, 5), (4, 6, 6), (4, 7, 7), (4, 8, 4), (4, 9, 5),
])
def test_groups_of_microbatches_are_the_smallest_that_the_interleaved_schedule_takes(
    pipeline: int, microbatches: int, group: int
) -> None:
    """By what megatron-core's schedules.py refuses: a size out of [PP, M], or a last group of 1 to PP - 1."""

    def is_taken(size: int) -> bool:
        return pipeline <= size <= microbatches and not 0 < microbatches % size < pipeline

    found = step.microbatch_group(microbatches, pipeline)
    assert found == group == min(filter(is_taken, range(1, microbatches + 1)))
