"""The reference's weights as its branches save them: read, converted, and run to the reference's outputs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.reference_weights import GOLDEN_CASES, golden_config, golden_weights
from safetensors.torch import load_file, save_file

from megatron_flashi2v.checkpoint.folders import find_checkpoint
from megatron_flashi2v.conditioning.interface import ConditionedInput
from megatron_flashi2v.conversion.convert import convert
from megatron_flashi2v.models.predict import predict_velocity
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.parallel.world import single_process
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.sampling.load import load_model

# From main's names to those of mindspeed_mm/models/predictor/dits/wan_dit.py in FlashI2V's branch npu; written out
# apart from the key table on purpose.
NPU_NAMES = (
    (r"^text_embedding\.0\.", "text_embedding.linear_1."),
    (r"^text_embedding\.2\.", "text_embedding.linear_2."),
    (r"_attn\.([qkv])\.", r"_attn.proj_\1."),
    (r"_attn\.o\.", "_attn.proj_out."),
    (r"_attn\.norm_([qk])\.", r"_attn.\1_norm."),
    (r"^learnable_proj\.proj\.", "learnable_proj."),
)

Save = Callable[[dict[str, torch.Tensor], Path], Path]


def npu_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        for pattern, replacement in NPU_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def save_npu(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    """As npu's training leaves it: the average beside the model, and megatron's extra states."""
    held = npu_names(weights)
    extra = {name.replace("weight", "_extra_state"): None for name in held if ".proj_" in name and "weight" in name}
    other = {name: torch.zeros_like(tensor) for name, tensor in held.items()}
    torch.save({"model": {**held, **extra}, "ema_model": other}, folder / "flashi2v.pt")
    return folder / "flashi2v.pt"


def save_pt(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    (folder / "iter_000001000").mkdir()
    torch.save(weights, folder / "iter_000001000" / "model_state_dict.pt")
    return folder / "iter_000001000"


def save_dcp(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    dcp.save(weights, checkpoint_id=folder / "dcp", no_dist=True)
    return folder / "dcp"


def save_safetensors(weights: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(weights, folder / "a.safetensors")
    return folder / "a.safetensors"


@pytest.fixture(scope="module")
def groups() -> Iterator[Groups]:
    with single_process(resolve_device("cpu")) as groups:
        yield groups


@pytest.fixture(params=GOLDEN_CASES)
def case(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def loaded(goldens: Path, case: str, tmp_path: Path, groups: Groups) -> Callable[[str, Save], DiffusionTransformer]:
    """A model in ours that came by way of a file, megatron, diffusers and megatron again."""

    def loaded(name: str, save: Save) -> DiffusionTransformer:
        heads = golden_config(goldens, case).num_attention_heads
        path = save(golden_weights(goldens, case), tmp_path)
        convert((name, path), ("megatron", tmp_path / "first"), num_attention_heads=heads, verify=True)
        convert(("megatron", tmp_path / "first"), ("diffusers", tmp_path / "export"), verify=True)
        convert(("diffusers", tmp_path / "export"), ("megatron", tmp_path / "run"), verify=True)
        folder = find_checkpoint(tmp_path / "run")
        assert folder is not None
        return load_model(folder, groups, resolve_device("cpu"))

    return loaded


@torch.no_grad()
def plain_forward(model: DiffusionTransformer, goldens: Path, case: str) -> torch.Tensor:
    stored = load_file(goldens / f"dit_{case}.io.safetensors")
    model.conditioning.forward = lambda *_: ConditionedInput(stored["x"], stored["fourier_features"])
    return predict_velocity(model, stored["x"], stored["t"], stored["context"], None, None)


@torch.no_grad()
def test_npu_release(goldens: Path, case: str, loaded: Callable[[str, Save], DiffusionTransformer]) -> None:
    """Output of npu's own code, one sample at a time, and its phi: on the frame repeated over time."""
    model = loaded("flashi2v-npu", save_npu)
    npu = load_file(goldens / f"npu_{case}.safetensors")
    image_BC1HW = load_file(goldens / f"train_{case}.safetensors")["start_frame_latents"]
    shift = model.conditioning.phi(image_BC1HW, npu["phi_repeat_then_conv"].shape[2])
    torch.testing.assert_close(shift, npu["phi_repeat_then_conv"], atol=1e-5, rtol=0)
    output = plain_forward(model, goldens, case)
    torch.testing.assert_close(output, npu["forward_batch1_concatenated"], atol=2e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("save", [save_pt, save_dcp, save_safetensors])
def test_gpu_release(
    goldens: Path, case: str, loaded: Callable[[str, Save], DiffusionTransformer], save: Save
) -> None:
    """Output of main's own code, and the DiT's input with its phi: on one frame, broadcast."""
    model = loaded("flashi2v-gpu", save)
    train = load_file(goldens / f"train_{case}.safetensors")
    shift = model.conditioning.phi(train["start_frame_latents"], train["latents"].shape[2])
    torch.testing.assert_close(shift, train["start_frame_proj"], atol=1e-5, rtol=0)
    output, expected = plain_forward(model, goldens, case), load_file(goldens / f"dit_{case}.io.safetensors")["output"]
    torch.testing.assert_close(output, expected, atol=2e-4, rtol=1e-4)
