"""Initial weights: keyed by name, the same at every layout, with Wan's distributions and the paradigm's zeros."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from helpers.paradigms import PARADIGMS, stored_inputs
from torch import Tensor, nn

from megatron_flashi2v.checkpoint.key_table import mappings, parameter_shapes
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.models.build import build_model
from megatron_flashi2v.models.initialization import initialize_weights
from megatron_flashi2v.models.placement import parameter_box, sharded_dim
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.placement import ShardGrid
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device

CONFIG = ModelConfig(
    num_layers=2, hidden_size=48, ffn_hidden_size=80, num_attention_heads=4, latent_channels=4, freq_dim=32,
    text_dim=24, text_length=5, phi_hidden_channels=8,
)
ZEROS = {
    "head.linear.weight",
    "conditioning.phi.conv_out.weight",
    "conditioning.fourier_embedding.conv_out.weight",
}


@dataclass(frozen=True)
class FakeGroup:
    """A place in a tensor-parallel group, without processes."""

    ranks: int
    place: int

    def size(self) -> int:
        return self.ranks

    def rank(self) -> int:
        return self.place


@dataclass(frozen=True)
class FakeGroups:
    """As much of a rank's groups as initialisation needs."""

    tp: FakeGroup


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


@pytest.fixture(scope="module")
def make(groups: Groups) -> Callable[..., DiffusionTransformer]:
    def make(config: ModelConfig = CONFIG, seed: int = 1) -> DiffusionTransformer:
        model = build_model(config, groups, resolve_device("cpu"))
        initialize_weights(model, seed)
        return model

    return make


def weights(model: DiffusionTransformer) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def share(name: str, whole: Tensor, ranks: int, rank: int) -> Tensor:
    """The slice of a tensor that one of several tensor-parallel ranks holds."""
    shape, dim = list(whole.shape), sharded_dim(name)
    if dim is not None:
        shape[dim] //= ranks
    return whole[parameter_box(name, shape, ShardGrid(tp_rank=rank, tp_size=ranks)).slices]


def test_a_rank_draws_from_the_whole_tensor(
    make: Callable[..., DiffusionTransformer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """:func:`initialize_weights` as the second of two ranks runs it."""
    model, whole = make(), weights(make(seed=3))
    for prefix, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            local = share(f"{prefix}.{name}".lstrip("."), parameter, 2, 1)
            setattr(module, name, nn.Parameter(torch.empty_like(local)))
    fake = dataclasses.replace(model.spec, groups=FakeGroups(FakeGroup(2, 1)))
    monkeypatch.setattr(model, "spec", fake)
    initialize_weights(model, 3)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, share(name, whole[name], 2, 1)), name


def test_a_slice_of_fused_rows_is_whole_heads(make: Callable[..., DiffusionTransformer]) -> None:
    model = make()
    parameters, half = dict(model.named_parameters()), CONFIG.hidden_size // 2
    fused = [row for row in mappings(CONFIG, "wan") if len(row.external) > 1 and len(row.shape) == 2]
    assert fused
    for row in fused:
        whole = parameters[row.ours]
        second = share(row.ours, whole.detach(), 2, 1)
        shape, heads = (half, CONFIG.hidden_size), CONFIG.num_attention_heads // 2
        parts_of_slice = row.transform.to_external(second, shape, heads)
        for part, of_slice in zip(row.to_external(whole.detach()), parts_of_slice, strict=True):
            assert torch.equal(of_slice, part[half:]), row.ours


def test_weights_depend_on_seed_and_name_alone(make: Callable[..., DiffusionTransformer]) -> None:
    first, again, other = weights(make()), weights(make()), weights(make(seed=2))
    deeper = weights(make(dataclasses.replace(CONFIG, num_layers=3)))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]) and torch.equal(tensor, deeper[name]), name
        constant = tensor.unique().numel() == 1
        assert torch.equal(tensor, other[name]) == constant, name
    assert not torch.equal(first["blocks.0.mlp.linear_fc1.weight"], first["blocks.1.mlp.linear_fc1.weight"])


def test_distributions(make: Callable[..., DiffusionTransformer]) -> None:
    width = CONFIG.hidden_size
    assert set(parameter_shapes(CONFIG)) >= ZEROS
    for name, tensor in weights(make()).items():
        if name in ZEROS or name.endswith("bias"):
            assert not tensor.any(), name
        elif name.endswith("modulation"):
            assert tensor.std().item() == pytest.approx(width**-0.5, rel=0.2), name
        elif tensor.ndim == 1:
            assert (tensor == 1).all(), name
        elif name.startswith("text_embedding.") or name.startswith("time_embedding.linear"):
            assert tensor.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            fan_in = tensor[0].numel()
            fan_out = width if "linear_qkv" in name or "linear_kv" in name else tensor.shape[0]
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert tensor.abs().max() <= bound, name
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name
            assert abs(tensor.mean().item()) < 0.1 * bound, name


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in PARADIGMS if name != "text_to_video"])
def test_step_0_is_the_text_to_video_model(make: Callable[..., DiffusionTransformer], name: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    head = normal(CONFIG.patch_dim, CONFIG.hidden_size)
    extras = {
        "cutoff_ratio": torch.tensor([0.1, 0.6]), "image_noise_level": torch.tensor([0.3, 0.4]),
        "image_noise": normal(2, 4, 1, 4, 6),
    }
    arguments = (normal(2, 4, 3, 4, 6), torch.tensor([900.0, 31.0]), normal(2, 5, 24), normal(2, 4, 1, 4, 6), extras)
    config = dataclasses.replace(CONFIG, conditioning=name, image_dim=20, image_rows=5)
    extras.update(stored_inputs(config, arguments[0]))
    outputs = []
    for conditioning in (name, "text_to_video"):
        model = make(dataclasses.replace(config, conditioning=conditioning))
        model.head.linear.weight.copy_(head)  # it starts at zero, which would make any two models equal
        outputs.append(predict_velocity(model, *arguments))
    assert outputs[0].std() > 0.5
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-6)
    # The comparison can fail: with the zeros replaced the image matters.
    model = make(config)
    model.head.linear.weight.copy_(head)
    columns = model.patch_embedding.weight[:, CONFIG.patch_dim :]
    assert not columns.any()
    zeros = [columns] if columns.numel() else [
        model.get_parameter(zero) for zero in ZEROS - {"head.linear.weight"}
    ]
    if name == "wan_i2v":
        fused = model.get_parameter("blocks.1.cross_attention.linear_kv_image.weight")
        keys, values = fused.unflatten(0, (CONFIG.num_attention_heads, 2, -1)).unbind(1)
        assert keys.all() and not values.any()
        zeros.append(values)
    for zero in zeros:
        zero.copy_(0.1 * normal(*zero.shape))
        assert not torch.allclose(predict_velocity(model, *arguments), outputs[0], atol=1e-3)
        zero.zero_()
