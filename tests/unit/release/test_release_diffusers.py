"""What diffusers' own tests, callbacks and caches ask of a pipeline, asked of FlashI2VPipeline."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.utils import export_to_video
from helpers.releases import CONFIG, release, train
from PIL import Image

from megatron_flashi2v import FlashI2VImageConditioning, FlashI2VPipeline
from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.sampling.image import fit_image

PARADIGMS_WITHOUT_WEIGHTS = "repeat_concat"


@pytest.fixture
def pipeline(released: Path) -> FlashI2VPipeline:
    pipeline = FlashI2VPipeline.from_pretrained(released)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def call(parts: Path) -> dict[str, Any]:
    """Of two steps, with guidance, to latents."""
    return {"image": Image.open(parts / "image.png"), "prompt": "a dog runs", "negative_prompt": "red",
            "num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "latent",
            "generator": torch.Generator().manual_seed(3)}  # fmt: skip


def without_text(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name not in ("prompt", "negative_prompt")}


def test_the_call_has_the_usual_arguments() -> None:
    parameters = inspect.signature(FlashI2VPipeline.__call__).parameters
    usual = {
        "image", "prompt", "negative_prompt", "height", "width", "num_frames", "num_inference_steps", "guidance_scale",
        "num_videos_per_prompt", "generator", "latents", "prompt_embeds", "negative_prompt_embeds", "output_type",
        "return_dict", "attention_kwargs", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
        "max_sequence_length",
    }  # fmt: skip
    assert usual <= set(parameters)
    assert all(parameters[name].default is not inspect.Parameter.empty for name in usual)


def test_text_is_encoded_apart(pipeline: FlashI2VPipeline, call: dict[str, Any]) -> None:
    """By a pipeline of text encoder and tokenizer alone, for one without them."""
    nothing = dict.fromkeys(pipeline.components)
    text = {name: pipeline.components[name] for name in ("text_encoder", "tokenizer")}
    others = {name: value for name, value in pipeline.components.items() if name not in text}
    size = {name: pipeline.config[name] for name in ("num_frames", "height", "width", "fps")}
    rows, negative = FlashI2VPipeline(**{**nothing, **text}).encode_prompt("a dog runs", "red", max_sequence_length=8)
    assert rows.shape == negative.shape == (1, 8, 16)
    blind = FlashI2VPipeline(**{**nothing, **others}, **size)
    found = blind(**without_text(call), prompt_embeds=rows, negative_prompt_embeds=negative).frames
    torch.testing.assert_close(found, pipeline(**call).frames, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="no text encoder; give prompt_embeds"):
        blind(**call)


def test_fewer_rows_are_another_condition(pipeline: FlashI2VPipeline, call: dict[str, Any]) -> None:
    """The model attends to zero rows too, as diffusers' transformer does."""
    short = pipeline(**call, max_sequence_length=5).frames
    rows, negative = pipeline.encode_prompt("a dog runs", "red", max_sequence_length=5)
    given = pipeline(**without_text(call), prompt_embeds=rows, negative_prompt_embeds=negative).frames
    assert torch.equal(short, given) and not torch.allclose(short, pipeline(**call).frames, atol=1e-3)


def test_each_prompt_may_have_its_own_negative_one(pipeline: FlashI2VPipeline, call: dict[str, Any]) -> None:
    seeds = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    words = {"prompt": ["a dog runs", "a car"], "negative_prompt": ["red", "blue street"]}
    both = pipeline(**{**call, **words, "generator": seeds}).frames
    for index, seed in enumerate(seeds):
        one = {name: value[index] for name, value in words.items()}
        alone = pipeline(**{**call, **one, "generator": seed}).frames
        torch.testing.assert_close(both[index : index + 1], alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="text rows of 3 prompts for 2"):
        pipeline(**{**call, **words, "negative_prompt": ["a"] * 3, "generator": seeds})


def test_callbacks_change_what_follows(pipeline: FlashI2VPipeline, call: dict[str, Any]) -> None:
    seen = []

    def stronger(pipe: FlashI2VPipeline, step: int, timestep: torch.Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert set(tensors) == set(pipe._callback_tensor_inputs) and pipe.num_timesteps == 2
        seen.append(pipe.do_classifier_free_guidance)
        pipe._guidance_scale += 1.0
        return tensors

    everything = {"callback_on_step_end_tensor_inputs": FlashI2VPipeline._callback_tensor_inputs}
    plain = pipeline(**call).frames
    found = pipeline(**call, callback_on_step_end=stronger, **everything).frames
    assert pipeline.guidance_scale == call["guidance_scale"] + pipeline.num_timesteps and seen == [True, True]
    assert (found - plain).abs().max() > 1e-3

    def no_guidance(pipe: FlashI2VPipeline, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": torch.zeros_like(tensors["prompt_embeds"])}

    calls = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(float(kwargs["encoder_hidden_states"].abs().max())), with_kwargs=True
    )
    pipeline(**call, callback_on_step_end=no_guidance, **everything)
    handle.remove()
    assert len(calls) == 3 and calls[0] > 0 and calls[2] == 0, "the second step is one pass, of other rows"
    assert pipeline.current_timestep is None


def test_passes_are_told_to_caches(pipeline: FlashI2VPipeline, call: dict[str, Any]) -> None:
    plain = pipeline(**call).frames
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-9))
    torch.testing.assert_close(pipeline(**call).frames, plain, atol=1e-5, rtol=1e-5)
    pipeline.transformer.disable_cache()
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    assert (pipeline(**call).frames - plain).abs().max() > 1e-4
    pipeline.transformer.disable_cache()
    steps = []

    def timestep() -> float:
        steps.append(float(pipeline.current_timestep))
        return steps[-1]

    pipeline.transformer.enable_cache(PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(100, 1001),
        spatial_attention_block_identifiers=["blocks"], current_timestep_callback=timestep,
    ))  # fmt: skip
    pipeline(**call)
    assert set(steps) == {1000.0, 875.0}, "both steps of shift 7"


def test_attention_kwargs_reach_the_transformer(pipeline: FlashI2VPipeline, call: dict[str, Any]) -> None:
    given, seen = {"scale": 0.5}, []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["attention_kwargs"]), with_kwargs=True
    )
    pipeline(**call, attention_kwargs=given)
    handle.remove()
    assert seen == [given] * 4 and pipeline.attention_kwargs is given


def test_images_of_other_kinds(pipeline: FlashI2VPipeline, call: dict[str, Any], parts: Path) -> None:
    bytes_HWC = np.asarray(call["image"])
    unit_CHW = torch.from_numpy(bytes_HWC.copy()).permute(2, 0, 1) / 255
    fitted = fit_image(call["image"], 16, 24)
    for image in (bytes_HWC, bytes_HWC / 255, (bytes_HWC / 255).astype(np.float32), unit_CHW, str(parts / "image.png")):
        assert torch.equal(fit_image(image, 16, 24), fitted)
    expected = pipeline(**call).frames
    for image in (bytes_HWC[None], unit_CHW[None], [bytes_HWC]):
        assert torch.equal(pipeline(**{**call, "image": image}).frames, expected)


@pytest.mark.parametrize(("image", "words"), [
    (np.zeros((3, 4, 4)), r"shape is \[3, 4, 4\]; it must be an array \[H, W, 3\]"),
    (torch.zeros(4, 4, 3), r"it must be a tensor \[3, H, W\]"),
    (torch.full((3, 4, 4), -1.0), "levels lie between -1 and -1; floating levels must have black 0 and white 1"),
    (np.full((4, 4, 3), np.nan), "levels lie between nan"),
    (np.full((4, 4, 3), 128.0), "between 128 and 128"),
    (np.zeros((4, 4, 3), np.int32), "type is torch.int32"),
    (7, "the image is a int; give a PIL image"),
])  # fmt: skip
def test_what_is_no_image_is_refused(
    pipeline: FlashI2VPipeline, call: dict[str, Any], image: object, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        pipeline(**{**call, "image": image})


def test_an_absent_file_is_named(pipeline: FlashI2VPipeline, call: dict[str, Any]) -> None:
    for image in ("absent.png", Path("absent.png")):
        with pytest.raises(DataError, match="absent.png: no such file"):
            pipeline(**{**call, "image": image})


@pytest.mark.parametrize(("changes", "words"), [
    ({"prompt_embeds": torch.zeros(1, 8, 16)}, "both prompt and prompt_embeds"),
    ({"negative_prompt_embeds": torch.zeros(1, 8, 16)}, "both negative_prompt and negative_prompt_embeds"),
    ({"prompt": None, "prompt_embeds": torch.zeros(1, 8, 15)}, r"\[1, 8, 15\]; it must be \[B, L, 16\]"),
    ({"latents": torch.zeros(1, 4, 3, 4, 5)}, r"latents have the shape .*; it must be \[1, 4, 3, 4, 6\]"),
])  # fmt: skip
def test_inputs_that_do_not_fit(
    pipeline: FlashI2VPipeline, call: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        pipeline(**{**call, **changes})


def test_components_tell_their_dtype(
    released: Path, parts: Path, tmp_path: Path, pipeline: FlashI2VPipeline
) -> None:
    """Also the one without weights, which a pipeline saves and loads like the others, in variants too."""
    train(tmp_path / "run", dataclasses.replace(CONFIG, conditioning=PARADIGMS_WITHOUT_WEIGHTS))
    for folder in (release(tmp_path, parts), released):
        component = FlashI2VImageConditioning.from_pretrained(folder / "image_conditioning", torch_dtype=torch.bfloat16)
        assert component.dtype == torch.bfloat16
        dtypes = {"vae": torch.bfloat16, "default": torch.float16}
        loaded = FlashI2VPipeline.from_pretrained(folder, torch_dtype=dtypes)
        modules = {name: part for name, part in loaded.components.items() if isinstance(part, torch.nn.Module)}
        assert {name: part.dtype for name, part in modules.items()} == {
            name: dtypes.get(name, torch.float16) for name in modules
        }
        loaded.save_pretrained(tmp_path / "again" / folder.parent.name, variant="fp16")
        again = FlashI2VPipeline.from_pretrained(tmp_path / "again" / folder.parent.name, variant="fp16")
        assert again.image_conditioning.model_config == loaded.image_conditioning.model_config


def test_frames_become_a_file(pipeline: FlashI2VPipeline, call: dict[str, Any], tmp_path: Path) -> None:
    frames = pipeline(**{**call, "output_type": "np"}).frames[0]
    export_to_video(frames, str(tmp_path / "a.mp4"), fps=8)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert len(list(container.decode(video=0))) == 5 and container.streams.video[0].average_rate == 8
