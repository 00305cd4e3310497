"""Adapters in the forms of others: what diffusers and peft write, compute and load is the truth here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from helpers.checkpoints import names
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.config.errors import UserError
from megatron_flashi2v.conversion.adapters.merging import MergedWeights
from megatron_flashi2v.conversion.adapters.reading import METADATA_KEY, open_adapter
from megatron_flashi2v.conversion.adapters.writing import caveats
from megatron_flashi2v.conversion.convert import open_weights
from megatron_flashi2v.conversion.weights import ReadOptions
from megatron_flashi2v.release import adapters
from megatron_flashi2v.release.adapters import require_equal

SETTINGS = {
    "num_attention_heads": 3, "attention_head_dim": 10, "in_channels": 12, "out_channels": 4, "text_dim": 14,
    "freq_dim": 16, "ffn_dim": 22, "num_layers": 2, "image_dim": 6, "added_kv_proj_dim": 30,
}  # fmt: skip
LAYERS = {  # diffusers' name: rank, alpha
    "blocks.0.attn1.to_q": (4, 6.0), "blocks.0.attn1.to_v": (4, 6.0), "blocks.1.attn1.to_out.0": (2, 6.0),
    "blocks.0.attn2.to_k": (4, 1.5), "blocks.1.attn2.to_q": (4, 6.0), "blocks.1.attn2.add_v_proj": (4, 6.0),
    "blocks.0.attn2.add_k_proj": (4, 6.0), "blocks.1.ffn.net.0.proj": (3, 3.0), "blocks.0.ffn.net.2": (4, 6.0),
}  # fmt: skip
EMBEDDERS = {  # outside of blocks diffusers reads no alpha of ComfyUI's form
    "condition_embedder.time_proj": (4, 4.0), "condition_embedder.text_embedder.linear_1": (2, 2.0),
    "proj_out": (4, 4.0),
}  # fmt: skip
KOHYA = {  # kohya's names of some of them
    "lora_unet_blocks_0_self_attn_q": (30, 30, 4, 6.0), "lora_unet_blocks_0_cross_attn_k_img": (30, 30, 4, 4.0),
    "lora_unet_blocks_11_ffn_2": (22, 30, 2, 1.0), "lora_unet_text_embedding_0": (14, 30, 3, 0.1),
    "lora_unet_blocks_1_cross_attn_o": (30, 30, 1, 1.0),
}  # fmt: skip


def transformer(path: Path) -> WanTransformer3DModel:
    return WanTransformer3DModel.from_pretrained(path).eval()


def pipeline(model: WanTransformer3DModel) -> WanPipeline:
    scheduler = FlowMatchEulerDiscreteScheduler()
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=scheduler, transformer=model)


@torch.no_grad()
def output(model: WanTransformer3DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    latents, rows, image = (torch.randn(s, generator=generator) for s in ((1, 12, 2, 4, 6), (1, 512, 14), (1, 5, 6)))
    return model(latents, torch.tensor([440.0]), rows, image, return_dict=False)[0]


def run(*words: object) -> int:
    return main(["convert", *map(str, words)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A base, and an adapter that peft made and diffusers saved: ranks and alphas differ by layer."""
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    model = WanTransformer3DModel(**SETTINGS)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.randn(value.shape) * (0.2 if value.dim() > 1 else 0.5) + ("norm" in name))
    model.save_pretrained(root / "base" / "transformer")
    layers = {**LAYERS, **EMBEDDERS}
    model.add_adapter(LoraConfig(
        r=4, lora_alpha=6.0, target_modules=list(layers),
        rank_pattern={f"^{name}": rank for name, (rank, _) in layers.items() if rank != 4},
        alpha_pattern={f"^{name}": alpha for name, (_, alpha) in layers.items() if alpha != 6},
    ))  # fmt: skip
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.copy_(torch.randn(value.shape) * 0.4)
    WanPipeline.save_lora_weights(
        root / "adapter", get_peft_model_state_dict(model),
        transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
    )
    return SimpleNamespace(
        base=root / "base", file=root / "adapter" / "pytorch_lora_weights.safetensors", layers=layers,
        plain=output(transformer(root / "base" / "transformer")), adapted=output(model.eval()),
    )


def assert_adapted(made: SimpleNamespace, model: WanTransformer3DModel) -> None:
    found = output(model)
    assert (made.adapted - made.plain).abs().max() > 0.1 * made.adapted.abs().max()
    assert torch.allclose(found, made.adapted, atol=1e-4 * float(made.adapted.abs().max()), rtol=0)


def test_an_adapter_of_diffusers_is_read_with_its_scales(made: SimpleNamespace) -> None:
    adapter = open_adapter(made.file)
    assert adapter.form == "diffusers-lora" and not adapter.low_noise
    found = sorted((pair.rank, pair.alpha) for pair in adapter.pairs.values())
    assert found == sorted(made.layers.values())
    assert (adapter.pairs["blocks.0.cross_attn.k"].rank, adapter.pairs["blocks.0.cross_attn.k"].alpha) == (4, 1.5)


def test_merged_weights_give_what_load_lora_weights_gives(made: SimpleNamespace, tmp_path: Path) -> None:
    loaded = pipeline(transformer(made.base / "transformer"))
    loaded.load_lora_weights(made.file.parent)
    assert_adapted(made, loaded.transformer)  # diffusers reads its own file to the scales that it was made with
    flags = ("--adapter", made.file, "--merge", "--verify")
    assert run("--from", "diffusers", made.base, *flags, "--to", "diffusers", tmp_path / "merged") == 0
    assert_adapted(made, transformer(tmp_path / "merged" / "transformer"))
    # by way of other formats, whose tensors are fused and named otherwise
    assert run("--from", "diffusers", made.base, "--to", "megatron", tmp_path / "ours") == 0
    assert run("--from", "megatron", tmp_path / "ours", *flags, "--to", "wan", tmp_path / "wan") == 0
    assert run("--from", "auto", tmp_path / "wan", "--to", "diffusers", tmp_path / "back") == 0
    for path in (tmp_path / "merged" / "transformer").glob("*.safetensors"):
        written = load_file(tmp_path / "back" / "transformer" / path.name)
        assert all(torch.equal(written[name], tensor) for name, tensor in load_file(path).items())
    # half of it, and in bf16: the sum is rounded, not its parts
    half = ("--adapter-scale", 0.5, "--dtype", "bfloat16")
    assert run("--from", "wan", tmp_path / "wan", *flags[:3], *half, "--to", "wan", tmp_path / "half") == 0
    whole, halved = (next((tmp_path / name).glob("*.safetensors")) for name in ("wan", "half"))
    pair, name = open_adapter(made.file).pairs["blocks.0.self_attn.v"], "blocks.0.self_attn.v.weight"
    exact = load_file(whole)[name].double() + 0.5 * 6 / 4 * pair.up.read().double() @ pair.down.read().double()
    assert torch.equal(load_file(halved)[name], exact.bfloat16())


@pytest.mark.parametrize("form", ["diffusers-lora", "comfyui-lora"])
def test_what_we_write_is_what_diffusers_loads(made: SimpleNamespace, tmp_path: Path, form: str) -> None:
    assert run("--from", "auto", made.file, "--to", form, tmp_path / "out", "--verify") == 0
    loaded = pipeline(transformer(made.base / "transformer"))
    (file,) = (tmp_path / "out").iterdir()
    loaded.load_lora_weights(tmp_path / "out", weight_name=file.name)
    assert_adapted(made, loaded.transformer)
    require_equal(open_adapter(made.file), open_adapter(tmp_path / "out", form))
    assert run("--from", "auto", made.file, "--to", form, tmp_path / "out") == 1  # it exists
    assert run("--from", "auto", made.file, "--to", form, tmp_path / "out", "--overwrite") == 0
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert run("--from", "auto", made.file, "--to", form, tmp_path / "out", "--overwrite") == 1
    assert (tmp_path / "out" / "mine.txt").exists()


def kohya() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, torch.Tensor] = {}
    for layer, (columns, rows, rank, alpha) in KOHYA.items():
        tensors |= {
            f"{layer}.lora_down.weight": torch.randn(rank, columns, generator=generator).bfloat16(),
            f"{layer}.lora_up.weight": torch.randn(rows, rank, generator=generator).bfloat16(),
            f"{layer}.alpha": torch.tensor(int(alpha) if alpha > 1 else alpha),
        }
    return tensors


def test_round_trips_are_bit_equal(tmp_path: Path) -> None:
    """kohya -> diffusers -> comfyui -> diffusers, and kohya's read as ComfyUI's is."""
    tensors = kohya()
    save_file(tensors, tmp_path / "kohya.safetensors", metadata={"ss_network_module": "networks.lora"})
    first = open_adapter(tmp_path / "kohya.safetensors")
    assert first.form == "kohya-lora"
    assert {"blocks.11.ffn.2", "blocks.0.cross_attn.k_img", "text_embedding.0"} < set(first.pairs)
    comfy = {  # written out, as ComfyUI's trainers do
        f"diffusion_model.{layer}.{kind}.weight": tensors[f"lora_unet_{layer.replace('.', '_')}.{other}.weight"]
        for layer in first.pairs for kind, other in (("lora_A", "lora_down"), ("lora_B", "lora_up"))
    } | {f"diffusion_model.{layer}.alpha": torch.tensor(pair.alpha) for layer, pair in first.pairs.items()}  # fmt: skip
    save_file(comfy, tmp_path / "comfy.safetensors")
    require_equal(first, open_adapter(tmp_path / "comfy.safetensors", "comfyui-lora"))
    before = "kohya.safetensors"
    for number, form in enumerate(("diffusers-lora", "comfyui-lora", "diffusers-lora", "comfyui-lora")):
        after = f"{number}-{form}"
        assert run("--from", "auto", tmp_path / before, "--to", form, tmp_path / after, "--verify") == 0
        require_equal(first, open_adapter(tmp_path / after, form))
        before = after
    held = load_file(tmp_path / before / "lora.safetensors")
    assert torch.equal(held["diffusion_model.blocks.0.self_attn.q.lora_down.weight"],
                       tensors["lora_unet_blocks_0_self_attn_q.lora_down.weight"])  # fmt: skip
    assert held["diffusion_model.blocks.11.ffn.2.alpha"] == 1


def test_other_spellings_are_read(made: SimpleNamespace, tmp_path: Path) -> None:
    """peft's own folder, trainers' bare names, rank-stabilised scales, a pair of experts in one file."""
    first = open_adapter(made.file)
    held = {name.removeprefix("transformer."): tensor for name, tensor in load_file(made.file).items()}
    (tmp_path / "peft").mkdir()
    save_file({f"base_model.model.{name}": tensor for name, tensor in held.items()},
              tmp_path / "peft" / "adapter_model.safetensors")  # fmt: skip
    settings = {"r": 4, "lora_alpha": 6.0, "use_rslora": False,
                "alpha_pattern": {"to_k": 1.5, "ffn.net.0.proj": 3.0, r"[a-z_]+\.linear_1": 2.0,
                                  "time_proj|proj_out": 4.0}}
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(settings))
    require_equal(first, open_adapter(tmp_path / "peft"))
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({**settings, "use_rslora": True}))
    pair = open_adapter(tmp_path / "peft").pairs["blocks.1.self_attn.o"]
    assert torch.allclose(pair.product(), 6 / 2**0.5 * (pair.up.read() @ pair.down.read()))
    (tmp_path / "original").mkdir()  # of a model whose layers have Wan's own names
    save_file({f"base_model.model.{layer}.lora_{side}.weight": half.read() for layer, pair in first.pairs.items()
               for side, half in zip("AB", pair.tensors, strict=True)},
              tmp_path / "original" / "adapter_model.safetensors")  # fmt: skip
    settings |= {"alpha_pattern": {"cross_attn.k": 1.5, "ffn.0": 3.0, "text_embedding.0": 2.0,
                                   r"time_projection\.1|head.head": 4.0}}  # fmt: skip
    (tmp_path / "original" / "adapter_config.json").write_text(json.dumps(settings))
    require_equal(first, open_adapter(tmp_path / "original"))
    torch.save({name.replace(".weight", ".default.weight"): tensor for name, tensor in held.items()}, tmp_path / "a.pt")
    assert all(pair.alpha == pair.rank for pair in open_adapter(tmp_path / "a.pt").pairs.values())
    both = {f"{prefix}.{name}": tensor * factor for prefix, factor in (("transformer", 1), ("transformer_2", 3))
            for name, tensor in held.items()}  # fmt: skip
    metadata = {METADATA_KEY: json.dumps({"transformer.lora_alpha": 2, "transformer_2.lora_alpha": 5})}
    save_file(both, tmp_path / "both.safetensors", metadata=metadata)
    pair = open_adapter(tmp_path / "both.safetensors")
    assert {found.alpha for found in pair.pairs.values()} == {2} and {p.alpha for p in pair.low_noise.values()} == {5}
    for form, files in (("comfyui-lora", {"lora.safetensors", "lora_low_noise.safetensors"}),
                        ("diffusers-lora", {"pytorch_lora_weights.safetensors", "pytorch_lora_weights_2.safetensors"})):
        assert run("--from", "auto", tmp_path / "both.safetensors", "--to", form, tmp_path / form, "--verify") == 0
        assert names(tmp_path / form) == files
    out = tmp_path / "out"
    flags = ("--adapter", tmp_path / "both.safetensors", "--merge", "--to", "wan", out)
    assert run("--from", "auto", made.base, *flags) == 1
    assert not out.exists()


def test_an_adapter_of_the_expert_for_low_noise_alone_stays_that(made: SimpleNamespace, tmp_path: Path) -> None:
    held = {name.replace("transformer.", "transformer_2."): tensor for name, tensor in load_file(made.file).items()}
    metadata = {METADATA_KEY: json.dumps({"transformer_2.lora_alpha": 5})}
    save_file(held, tmp_path / "low.safetensors", metadata=metadata)
    first = open_adapter(tmp_path / "low.safetensors")
    assert not first.pairs and {pair.alpha for pair in first.low_noise.values()} == {5}
    before = tmp_path / "low.safetensors"
    for number, form in enumerate(("diffusers-lora", "comfyui-lora", "diffusers-lora")):
        after = tmp_path / str(number)
        assert run("--from", "auto", before, "--to", form, after, "--verify") == 0
        require_equal(first, open_adapter(after, form))
        before = after
    # what is said of scales, and of layers outside of blocks, is said of these pairs too
    assert any("alphas stand in the file's metadata" in note for note in caveats(first, "diffusers-lora"))
    assert any("refuses an alpha outside of blocks (" in note for note in caveats(first, "comfyui-lora"))
    # two sources of such pairs
    save_file({**load_file(made.file), **held}, before / "pytorch_lora_weights.safetensors")
    with pytest.raises(UserError, match="pytorch_lora_weights_2.safetensors is for the expert for low noise"):
        open_adapter(before)


def test_only_our_own_output_is_replaced(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """diffusers and its trainers write the same file names; the source may lie there."""
    mine = tmp_path / "mine"
    mine.mkdir()
    file = mine / made.file.name
    shutil.copyfile(made.file, file)
    for flags, code, words in (
        (("--from", "auto", made.file, "--to", "diffusers-lora", mine), 1, f"{mine} exists; choose another path\n"),
        (("--from", "auto", mine, "--to", "diffusers-lora", mine), 2, "neither may lie in the other"),
        (("--from", "auto", file, "--to", "comfyui-lora", mine), 2, "neither may lie in the other"),
        (("--from", "auto", made.base, "--adapter", file, "--merge", "--to", "wan", mine), 2, "neither may lie in the"),
    ):
        assert run(*flags, "--overwrite") == code
        assert words in capsys.readouterr().err
        assert file.read_bytes() == made.file.read_bytes()


def test_nan_is_found_before_work_begins(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "nan.safetensors"
    save_file({**load_file(made.file), f"{Q}.lora_B.weight": torch.full((30, 4), torch.nan)}, file)
    words = "to_q.lora_B.weight holds values that are NaN or infinite"
    with pytest.raises(UserError, match=words):
        MergedWeights(open_weights("diffusers", made.base, ReadOptions()), open_adapter(file))
    monkeypatch.setattr(adapters, "staged_folder", None)
    assert run("--from", "auto", file, "--to", "comfyui-lora", tmp_path / "out") == 1
    assert words in capsys.readouterr().err


def test_a_part_of_merged_weights_is_that_part_of_the_whole(made: SimpleNamespace, tmp_path: Path) -> None:
    """In fused heads, plain rows and columns, and a layer whose shape is not the linear's."""
    patch = {"transformer.patch_embedding.lora_A.weight": torch.randn(2, 12, 1, 2, 2),
             "transformer.patch_embedding.lora_B.weight": torch.randn(30, 2, 1, 1, 1)}  # fmt: skip
    save_file({**load_file(made.file), **patch}, tmp_path / "a.safetensors")
    base = open_weights("diffusers", made.base, ReadOptions())
    merged = MergedWeights(base, open_adapter(tmp_path / "a.safetensors"))
    changed = 0
    for name, shape in parameter_shapes(merged.config).items():
        box = (slice(1, shape[0] - 1), *(slice(size // 3, size) for size in shape[1:]))
        whole = merged.read(name)
        torch.testing.assert_close(merged.read(name, box), whole[box], atol=1e-6, rtol=1e-6)
        changed += not torch.equal(whole, base.read(name))
    assert changed == 12


def with_tensor(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]:
    return lambda held: {**held, name: torch.ones(shape)}


Q = "transformer.blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_tensor("diffusion_model.blocks.0.self_attn.q.diff", 30, 30), "attn.q.diff is a difference of a whole"),
        (with_tensor("diffusion_model.blocks.0.self_attn.q.diff_b", 30), "q.diff_b is a difference of a whole tensor"),
        (with_tensor(f"{Q}.lora_magnitude_vector", 30), "to_q.lora_magnitude_vector is a magnitude of DoRA"),
        (with_tensor("lora_unet_blocks_0_self_attn_q.dora_scale", 30), "q.dora_scale is a magnitude of DoRA"),
        (with_tensor("lora_unet_blocks_0_self_attn_q.hada_w1_a", 30, 4), "q.hada_w1_a is a factor of LoHa"),
        (with_tensor("lora_unet_blocks_0_self_attn_q.lokr_w2", 30, 4), "q.lokr_w2 is a factor of LoKr"),
        (with_tensor(f"{Q}.lora_B.bias", 30), "to_q.lora_B.bias is a bias beside a pair"),
        (with_tensor("lora_te1_layers_0_q_proj.lora_down.weight", 4, 30), "is part of an adapter of the text encoder"),
        (with_tensor("transformer.single_blocks.0.proj.lora_A.weight", 4, 30), "belongs to no linear layer of this"),
        (with_tensor(f"{Q}.alpha", 2), "to_q.alpha has shape (2,); an alpha is one number"),
        (with_tensor("transformer.blocks.0.attn1.to_k.lora_A.weight", 4, 30), "pair of blocks.0.self_attn.k is not"),
        (with_tensor(f"{Q}.lora_B.weight", 30, 4, 3, 3), "has shapes (4, 30) and (30, 4, 3, 3); it must be [r, in]"),
        (with_tensor(f"{Q}.lora_A.other.weight", 4, 30),
         f"tensors {Q}.lora_A.other.weight and {Q}.lora_A.weight are both the lora_A or lora_down of"),
        (with_tensor("lora_unet_blocks_0_self_attn_q.lora_up.weight", 30, 4),
         f"tensors lora_unet_blocks_0_self_attn_q.lora_up.weight and {Q}.lora_B.weight are both the lora_B or"),
        (lambda held: {**held, f"{Q}.alpha": torch.ones(1), "blocks.0.self_attn.q.alpha": torch.ones(1)},
         f"tensors blocks.0.self_attn.q.alpha and {Q}.alpha are both the alpha of blocks.0.self_attn.q"),
        (with_tensor(f"{Q}.lora_B.weight", 30, 5), "has shapes (4, 30) and (30, 5); it must be [r, in] and [out, r]"),
        (lambda held: {"blocks.0.attn1.to_q.weight": torch.ones(2, 2)}, "is no adapter: none of its 1 tensors"),
    ],
)  # fmt: skip
def test_what_pairs_cannot_carry_is_named(
    made: SimpleNamespace, tmp_path: Path, change: Callable[..., Mapping[str, torch.Tensor]], words: str
) -> None:
    save_file(change(load_file(made.file)), tmp_path / "a.safetensors")
    with pytest.raises(UserError) as caught:
        open_adapter(tmp_path / "a.safetensors")
    assert words in str(caught.value) and str(tmp_path / "a.safetensors") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_tensor("x", 1), "tensor x belongs to no linear layer"),
        (lambda held: {name.replace("blocks.1", "blocks.7"): tensor for name, tensor in held.items()},
         "is for another base: {base} (wan_i2v, 2 blocks) has no blocks.7."),
        (lambda held: {**held, f"{Q}.lora_A.weight": torch.ones(4, 32)},
         "is for another base: its pair of blocks.0.self_attn.q changes a weight of shape (30, 32), {base} has one of "
         "(30, 30)"),
        (lambda held: {**held, f"{Q}.lora_A.weight": torch.full((4, 30), torch.nan)},
         "to_q.lora_A.weight holds values that are NaN or infinite"),
    ],
)  # fmt: skip
def test_an_adapter_for_another_base_is_one_message(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    change: Callable[..., Mapping[str, torch.Tensor]], words: str,
) -> None:  # fmt: skip
    save_file(change(load_file(made.file)), tmp_path / "a.safetensors")
    flags = ("--adapter", tmp_path / "a.safetensors", "--merge", "--to", "wan", tmp_path / "out")
    assert run("--from", "diffusers", made.base, *flags) == 1
    (error,) = (line for line in capsys.readouterr().err.splitlines() if "INFO" not in line)
    assert words.format(base=made.base) in error
    assert names(tmp_path) == {"a.safetensors"}


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--from wan A --adapter B --to wan C", "--adapter FILE and --merge: give both"),
        ("--from wan A --merge --to wan C", "--adapter FILE and --merge: give both"),
        ("--from kohya-lora A --to wan C", "--from kohya-lora is an adapter, and --to wan a model; give the base"),
        ("--from wan A --to comfyui-lora C", "writes an adapter, and --from wan gives a model"),
        ("--from auto A --adapter B --merge --to comfyui-lora C", "writes an adapter, and --merge gives a model"),
        ("--from wan A --adapter-scale 0.5 --to wan C", "--adapter-scale 0.5 belongs to --merge"),
        ("--from auto A --phi-order repeat_then_conv --to comfyui-lora C", "--phi-order is for a model's"),
        ("--from auto A --text-cleaning full --to comfyui-lora C", "--text-cleaning is for a model's"),
        ("--from auto A --max-shard-size 1GB --to comfyui-lora C", "--max-shard-size is for models; --to comfyui-lora"),
        ("--from wan A --text-cleaning light --to encoders C", "--text-cleaning is for a model's weights; leave it"),
        ("--from wan A --adapter B --merge --to encoders C", "--merge is for a model's weights; leave it out with"),
        ("--from wan A --weights ema --to encoders C", "--weights is for a model's weights; leave it out with"),
        ("--from wan A --report r.json --to encoders C", "--report is for a model's weights; leave it out with --to e"),
        ("--from auto A --to comfyui-lora c.safetensors", "c.safetensors must be a folder, which gets lora.s"),
    ],
)
def test_flags_that_do_not_fit(capsys: pytest.CaptureFixture[str], flags: str, words: str) -> None:
    assert run(*flags.split()) == 2
    assert words in capsys.readouterr().err


def test_an_adapter_given_as_a_model_says_what_to_do(
    made: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="is an adapter .LoRA.; give its base by --from and the adapter by --adapter"):
        open_weights("auto", made.file, ReadOptions())
    assert run("--from", "comfyui-lora", made.file, "--to", "diffusers-lora", tmp_path / "out") == 1
    assert "is in the form diffusers-lora, not comfyui-lora; give diffusers-lora" in capsys.readouterr().err
