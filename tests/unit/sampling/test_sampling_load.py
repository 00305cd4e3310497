"""Checkpoints to models in one process."""

import pytest
import torch
from helpers.checkpoints import save_checkpoint

from megatron_flashi2v.checkpoint.model_state import model_pieces
from megatron_flashi2v.config.errors import CheckpointError, ConfigError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.models.build import build_model
from megatron_flashi2v.models.initialization import initialize_weights
from megatron_flashi2v.parallel.placement import ShardGrid
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.sampling.load import load_model, resolve_checkpoint, velocity_of

CONFIG = ModelConfig(
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=2,
    latent_channels=4,
    freq_dim=16,
    text_dim=16,
    text_length=8,
)


@pytest.fixture
def device():
    return resolve_device("cpu")


def randomise(model):
    """Weights without zeros, so that every input matters to the output."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))


def save(model, root, iteration=3):
    return save_checkpoint(
        root,
        iteration,
        pieces=model_pieces(model.named_parameters(), ShardGrid()),
        model_config=CONFIG,
        state={"iteration": iteration},
    )


def arguments():
    generator = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    return (
        normal(2, 4, 3, 4, 6),
        torch.tensor([900.0, 100.0]),
        normal(2, 8, 16),
        normal(2, 4, 1, 4, 6),
        {"cutoff_ratio": torch.tensor([0.1, 0.4])},
    )


def test_loaded_model_computes_what_the_saved_one_did(tmp_path, device):
    with single_process(device) as groups:
        model = build_model(CONFIG, groups, device)
        randomise(model)
        expected = velocity_of(model)(*arguments())
        save(model, tmp_path)
        loaded = load_model(resolve_checkpoint(tmp_path), groups, device)
        velocity = velocity_of(loaded)(*arguments())
    assert not loaded.training and not velocity.requires_grad
    assert velocity.dtype == torch.float32 and velocity.shape == (2, 4, 3, 4, 6)
    assert torch.equal(velocity, expected) and velocity.std() > 0.01


def test_bf16_model_takes_fp32_weights_and_answers_in_fp32(tmp_path, device):
    with single_process(device) as groups:
        model = build_model(CONFIG, groups, device)
        randomise(model)
        expected = velocity_of(model)(*arguments())
        loaded = load_model(save(model, tmp_path), groups, device, bf16=True)
        velocity = velocity_of(loaded)(*arguments())
    assert loaded.spec.dtype == torch.bfloat16 and velocity.dtype == torch.float32
    assert 0 < (velocity - expected).norm() / expected.norm() < 0.05


def map_tensors(function, value):
    """The function of a tensor, or of each of the extras."""
    return {name: function(item) for name, item in value.items()} if isinstance(value, dict) else function(value)


def test_velocity_depends_on_every_condition(device):
    with single_process(device) as groups:
        model = build_model(CONFIG, groups, device)
        randomise(model)
        velocity = velocity_of(model)
        expected = velocity(*arguments())
        for position in range(5):
            changed = list(arguments())
            changed[position] = map_tensors(lambda value: value * 0.5, changed[position])
            assert not torch.allclose(velocity(*changed), expected, atol=1e-5), position


def test_samples_of_a_batch_do_not_mix(device):
    """What allows both guidance passes in one call."""
    with single_process(device) as groups:
        model = build_model(CONFIG, groups, device)
        randomise(model)
        velocity = velocity_of(model)
        together = velocity(*arguments())
        alone = torch.cat(
            [velocity(*(map_tensors(lambda value, at=at: value[at : at + 1], item) for item in arguments()))
             for at in (0, 1)]
        )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_initialised_model_needs_no_checkpoint(device):
    """What an untrained model samples, for comparison."""
    with single_process(device) as groups:
        model = build_model(CONFIG, groups, device)
        initialize_weights(model, seed=0)
        assert torch.equal(
            velocity_of(model)(*arguments()), torch.zeros(2, 4, 3, 4, 6)
        )  # the head starts at zero


def test_unknown_attention_backend_is_the_users_error(device):
    with single_process(device) as groups, pytest.raises(ConfigError, match="no_such_kernel"):
        build_model(CONFIG, groups, device, attention_backend="no_such_kernel")


def test_absent_and_empty_folders_are_told_apart(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        resolve_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="holds no checkpoint yet"):
        resolve_checkpoint(tmp_path)


def test_another_models_folder_is_told_what_to_give(tmp_path):
    """Wan's own folder has a config.json too, but is neither a checkpoint nor a transformer of diffusers."""
    (tmp_path / "config.json").write_text('{"_class_name": "WanModel", "dim": 32}')
    with pytest.raises(CheckpointError, match="is an exported model.*flashi2v convert --from auto"):
        resolve_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "WanTransformer3DModel"}')
    assert resolve_checkpoint(tmp_path) == tmp_path


def test_latest_iteration_and_one_named_iteration_are_found(tmp_path, device):
    with single_process(device) as groups:
        model = build_model(CONFIG, groups, device)
        randomise(model)
        save(model, tmp_path, 3)
        save(model, tmp_path, 5)
    assert resolve_checkpoint(tmp_path) == tmp_path / "iter_0000005"
    assert resolve_checkpoint(tmp_path / "iter_0000003") == tmp_path / "iter_0000003"
