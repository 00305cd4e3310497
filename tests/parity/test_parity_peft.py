"""Our adapters against peft's on diffusers' WanTransformer3DModel: outputs, gradients of A and B, a frozen base."""

from __future__ import annotations

from collections.abc import Iterator

import peft
import pytest
import torch
from diffusers import WanTransformer3DModel
from helpers.reference_weights import assert_same_gradient, random_weights

from megatron_flashi2v.checkpoint.adapter_table import adapter_mappings
from megatron_flashi2v.checkpoint.key_table import mappings
from megatron_flashi2v.conditioning.wan_i2v import GREY_CLIP, IMAGE_ROWS
from megatron_flashi2v.config.adapter import ATTENTION, LINEARS, AdapterConfig
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ParallelArguments, RecomputeArguments
from megatron_flashi2v.conversion.formats.diffusers import transformer_config
from megatron_flashi2v.models.build import build_stages
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.models.spec import make_spec
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device

# diffusers takes the last 512 rows for the text's, whatever the model.
CONFIG = ModelConfig(
    num_layers=2, hidden_size=96, ffn_hidden_size=160, num_attention_heads=4, latent_channels=4, freq_dim=32,
    text_dim=24, text_length=512, conditioning="wan_i2v", mask_channels=4, image_dim=40, image_rows=17,
)
DIFFUSERS = {
    "self_attn.q": "attn1.to_q", "self_attn.k": "attn1.to_k", "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0", "cross_attn.q": "attn2.to_q", "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v", "cross_attn.o": "attn2.to_out.0", "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2",
}  # fmt: skip


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


def adapted(
    groups: Groups, adapter: AdapterConfig, recompute: str | None, weights: dict[str, torch.Tensor]
) -> DiffusionTransformer:
    """Our model with these of diffusers' weights, those of the pairs among them; all but the pairs frozen."""
    spec = make_spec(CONFIG, groups, torch.device("cpu"), adapter=adapter)
    (model,) = build_stages(spec, ParallelArguments(), RecomputeArguments(recompute_granularity=recompute))
    rows = [*mappings(CONFIG, "diffusers"), *adapter_mappings(CONFIG, adapter, "diffusers")]
    assert {name for row in rows for name in row.external} == weights.keys()
    parameters = dict(model.named_parameters())
    assert parameters.keys() == {row.ours for row in rows}
    with torch.no_grad():
        for row in rows:
            parameters[row.ours].copy_(row.to_ours([weights[name] for name in row.external]))
            parameters[row.ours].requires_grad_("adapter" in row.ours)
    return model


@pytest.mark.parametrize("recompute, targets", [
    (None, LINEARS), (None, ("self_attn.k", "cross_attn.v", "ffn.2")),
    ("selective", LINEARS), ("skip_attention", ATTENTION), ("full", LINEARS),
], ids=["all", "three", "selective", "skip_attention", "full"])
def test_outputs_and_gradients(groups: Groups, recompute: str | None, targets: tuple[str, ...]) -> None:
    adapter = AdapterConfig(rank=3, alpha=7.0, targets=targets)
    generator = torch.Generator().manual_seed(5)
    weights = random_weights(CONFIG, "diffusers", generator)
    theirs = WanTransformer3DModel.from_config({**transformer_config(CONFIG), "rope_max_seq_len": 32})
    theirs.load_state_dict(weights, strict=True)
    shape = (2, CONFIG.latent_channels, 3, 4, 6)
    mask = torch.zeros(2, 4, *shape[2:])
    mask[:, :, 0] = 1
    noisy, clip, target = (torch.randn(shape, generator=generator) for _ in range(3))
    timestep_B, text_BLX = torch.tensor([912.5, 130.0]), torch.randn(2, 512, CONFIG.text_dim, generator=generator)
    rows_BRX = torch.randn(2, CONFIG.image_rows, CONFIG.image_dim, generator=generator)
    inputs = (torch.cat([noisy, mask, clip], dim=1), timestep_B, text_BLX, rows_BRX)
    with torch.no_grad():
        base = theirs(*inputs, return_dict=False)[0]

    torch.manual_seed(1)
    names = "|".join(DIFFUSERS[target].replace(".", r"\.") for target in targets)
    theirs.add_adapter(peft.LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=rf"blocks\.\d+\.({names})", init_lora_weights=False
    ))
    pairs = {name.replace(".default", ""): parameter
             for name, parameter in theirs.named_parameters() if "lora_" in name}
    assert len(pairs) == CONFIG.num_layers * len(targets) * 2
    model = adapted(groups, adapter, recompute, weights | {name: pair.detach() for name, pair in pairs.items()})

    velocity = predict_velocity(
        model, noisy, timestep_B, text_BLX, noisy[:, :, :1], {GREY_CLIP: clip, IMAGE_ROWS: rows_BRX}
    )
    expected = theirs(*inputs, return_dict=False)[0]
    assert (expected - base).std() > 0.03, "the adapter changes too little to prove anything"
    torch.testing.assert_close(velocity, expected, atol=1e-4, rtol=1e-4)

    (velocity - target).square().mean().backward()
    (expected - target).square().mean().backward()
    parameters = dict(model.named_parameters())
    for row in adapter_mappings(CONFIG, adapter, "diffusers"):
        wanted = pairs[row.external[0]].grad
        assert wanted.norm() > 0, f"{row.ours} has no gradient, so it proves nothing"
        assert_same_gradient(parameters[row.ours].grad, wanted, row.ours, relative=1e-4, floor=1e-4)
    assert all(parameter.grad is None for name, parameter in parameters.items() if "adapter" not in name)
