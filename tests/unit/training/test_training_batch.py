"""Batches: every sample and draw is a function of (seed, position), whatever the division over replicas."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from helpers.synthetic_data import write_synthetic

from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import BatchArguments, DataArguments
from megatron_flashi2v.data.blend import Blend
from megatron_flashi2v.data.order import GlobalOrder
from megatron_flashi2v.data.prepared import PreparedDataset, pad_text_rows
from megatron_flashi2v.flow.sigmas import dynamic_shift, shift_sigmas
from megatron_flashi2v.flow.sinusoid import timestep_sinusoid
from megatron_flashi2v.training.batch import Microbatch, MicrobatchSource, microbatch_positions

SAMPLES, SHAPE, TEXT_DIM, TEXT_LENGTH = 5, (2, 2, 4, 6), 6, 4
MODEL = ModelConfig(
    num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2, latent_channels=SHAPE[0],
    text_dim=TEXT_DIM, text_length=TEXT_LENGTH + 1,
)
EXTRAS = ["cutoff_ratio"]  # FlashI2V's
FIELDS = [field.name for field in dataclasses.fields(Microbatch) if field.name != "extras"] + EXTRAS
MANY = range(600)  # positions for the statistics: a mean is 0.041 standard deviations off, one time in three


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> PreparedDataset:
    folder = write_synthetic(tmp_path_factory.mktemp("data"), SAMPLES, SHAPE, TEXT_DIM, TEXT_LENGTH, seed=1)
    return PreparedDataset(folder)


def make_source(
    dataset: PreparedDataset, *, size: int = 1, dp_rank: int = 0, dp_size: int = 1, seed: int = 7,
    shapes_only: bool = False, **data: object,
) -> MicrobatchSource:
    blend = Blend([dataset], [1.0], batch=8, seed=seed)
    return MicrobatchSource(
        blend, MODEL, DataArguments(**data), BatchArguments(micro_batch_size=size, seed=seed), dp_rank=dp_rank,
        dp_size=dp_size, device=torch.device("cpu"), shapes_only=shapes_only,
    )


def value(batch: Microbatch, name: str) -> torch.Tensor:
    return batch.extras[name] if name in EXTRAS else getattr(batch, name)


def joined(batches: list[Microbatch]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([value(batch, name) for batch in batches]) for name in FIELDS}


@pytest.mark.parametrize("dp_size, size", [(1, 1), (1, 8), (2, 2), (4, 1), (8, 1)])
def test_microbatches_of_all_replicas_cover_the_global_batch_in_order(dp_size: int, size: int) -> None:
    covered = [
        position
        for index in range(8 // (dp_size * size))
        for rank in range(dp_size)
        for position in microbatch_positions(16, index, rank, dp_size, size)
    ]
    assert covered == list(range(16, 24))


@pytest.mark.parametrize("dp_size, size", [(1, 2), (1, 8), (2, 2), (4, 2)])
def test_every_division_sees_the_same_numbers(dataset: PreparedDataset, dp_size: int, size: int) -> None:
    count = 8 // (dp_size * size)
    by_rank = [
        list(make_source(dataset, size=size, dp_rank=rank, dp_size=dp_size).iteration(8, count))
        for rank in range(dp_size)
    ]
    found = joined([batches[index] for index in range(count) for batches in by_rank])
    expected = joined([make_source(dataset).load([position]).batch for position in range(8, 16)])
    for name in FIELDS:
        assert torch.equal(found[name], expected[name]), name


def test_shapes_and_dtypes(dataset: PreparedDataset) -> None:
    batch = make_source(dataset, size=3).load([0, 1, 2]).batch
    shapes = {
        "latents_BCTHW": (3, *SHAPE), "noise_BCTHW": (3, *SHAPE), "sigma_B": (3,),
        "sinusoid_BF": (3, MODEL.freq_dim), "cutoff_ratio": (3,), "text_BLX": (3, MODEL.text_length, TEXT_DIM),
    }
    assert {name: tuple(value(batch, name).shape) for name in FIELDS} == shapes
    for name in FIELDS:
        assert value(batch, name).dtype == (torch.bfloat16 if name == "text_BLX" else torch.float32)
    empty = next(make_source(dataset, size=3, shapes_only=True).iteration(0, 1))
    shapes.pop("cutoff_ratio")  # a middle stage has no conditioning
    assert {name: tuple(getattr(empty, name).shape) for name in shapes} == shapes and not empty.extras
    assert all(getattr(empty, name).is_meta for name in shapes)


def test_samples_come_in_the_global_order_with_new_draws_in_every_epoch(dataset: PreparedDataset) -> None:
    source, order = make_source(dataset, text_drop_probability=0.0), GlobalOrder(SAMPLES, 7)
    positions = range(3 * SAMPLES)
    batch = source.load(positions).batch
    for position in positions:
        sample = dataset[order.sample_index(position)]
        assert torch.equal(batch.latents_BCTHW[position], sample.latents_CTHW)
        assert torch.equal(batch.text_BLX[position], pad_text_rows(sample.text_rows_LD, MODEL.text_length))
    for name in ("noise_BCTHW", "sigma_B", "cutoff_ratio"):
        draws = value(batch, name).view(len(positions), -1)
        assert len(draws.unique(dim=0)) == len(positions), name


def test_another_seed_changes_every_draw(dataset: PreparedDataset) -> None:
    first, second = (make_source(dataset, seed=seed).load(range(20)).batch for seed in (7, 8))
    for name in FIELDS:
        assert not torch.equal(value(first, name), value(second, name)), name
    for name in ("noise_BCTHW", "sigma_B", "cutoff_ratio"):
        assert (value(first, name) != value(second, name)).all(), name


def test_draws_have_the_distributions_that_the_flags_name(dataset: PreparedDataset) -> None:
    source = make_source(
        dataset, sigma_shift=1.0, sigma_logit_mean=0.5, sigma_logit_std=0.7, cutoff_ratio_min=0.2, cutoff_ratio_max=0.6
    )
    batch = source.load(MANY).batch
    assert batch.noise_BCTHW.mean().item() == pytest.approx(0.0, abs=0.03)
    assert batch.noise_BCTHW.std().item() == pytest.approx(1.0, abs=0.03)
    logits = torch.logit(batch.sigma_B)
    assert logits.mean().item() == pytest.approx(0.5, abs=0.1)
    assert logits.std().item() == pytest.approx(0.7, abs=0.07)
    ratios = batch.extras["cutoff_ratio"]
    assert 0.2 <= ratios.min() < 0.22 and 0.58 < ratios.max() <= 0.6
    assert ratios.mean().item() == pytest.approx(0.4, abs=0.02)


def test_uniform_sigmas_and_independent_purposes(dataset: PreparedDataset) -> None:
    source = make_source(
        dataset, sigma_distribution="uniform", sigma_shift=1.0, cutoff_ratio_min=0.0, cutoff_ratio_max=1.0
    )
    batch = source.load(MANY).batch
    assert batch.sigma_B.mean().item() == pytest.approx(0.5, abs=0.05)
    assert batch.sigma_B.std().item() == pytest.approx(12**-0.5, abs=0.03)
    # Sigma and ratio are uniform draws of one position: with one key for both they would be equal.
    correlation = torch.corrcoef(torch.stack([batch.sigma_B, batch.extras["cutoff_ratio"]]))[0, 1]
    assert abs(correlation.item()) < 0.15


def test_shift_follows_the_resolution_unless_it_is_given(dataset: PreparedDataset) -> None:
    unshifted = make_source(dataset, sigma_shift=1.0).load(range(20)).batch.sigma_B
    by_resolution = make_source(dataset).load(range(20)).batch.sigma_B
    fixed = make_source(dataset, sigma_shift=3.0).load(range(20)).batch.sigma_B
    assert torch.equal(by_resolution, shift_sigmas(unshifted, dynamic_shift(*SHAPE[2:])))
    assert torch.equal(fixed, shift_sigmas(unshifted, 3.0)) and not torch.equal(fixed, unshifted)


def test_a_range_of_sigmas_is_kept_whoever_draws(dataset: PreparedDataset) -> None:
    source = make_source(dataset, sigma_min=0.6, sigma_max=0.9)
    sigma_B = source.load(MANY).batch.sigma_B
    assert 0.6 <= sigma_B.min() < 0.62 and 0.88 < sigma_B.max() <= 0.9
    alone = torch.cat([source.load([position]).batch.sigma_B for position in MANY[:5]])
    assert torch.equal(alone, sigma_B[:5])  # by position, not by microbatch


def test_sinusoids_are_those_of_the_timesteps(dataset: PreparedDataset) -> None:
    batch = make_source(dataset).load(range(5)).batch
    assert torch.equal(batch.sinusoid_BF, timestep_sinusoid(1000 * batch.sigma_B, MODEL.freq_dim))


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_share_of_dropped_texts(dataset: PreparedDataset, probability: float) -> None:
    batch = make_source(dataset, text_drop_probability=probability).load(MANY).batch
    empty = pad_text_rows(dataset.empty_text_rows_LD, MODEL.text_length)
    dropped = (batch.text_BLX == empty).flatten(1).all(dim=1)
    assert dropped.float().mean().item() == pytest.approx(probability, abs=0.06 if 0 < probability < 1 else 0)
    kept = make_source(dataset, text_drop_probability=0.0).load(MANY).batch
    assert torch.equal(batch.text_BLX[~dropped], kept.text_BLX[~dropped])
    for name in set(FIELDS) - {"text_BLX"}:  # dropping a text moves no other draw
        assert torch.equal(value(batch, name), value(kept, name)), name


def test_moving_to_a_device_moves_everything(dataset: PreparedDataset) -> None:
    moved = make_source(dataset).load([0]).batch.to(torch.device("meta"))
    assert all(value(moved, name).is_meta for name in FIELDS)
