"""This rank's stages of the model, as a run's flags want them."""

from __future__ import annotations

from megatron_flashi2v.config.layout import stage_layer_counts
from megatron_flashi2v.config.train import RecomputeArguments, TrainConfig
from megatron_flashi2v.models.recompute import Recompute
from megatron_flashi2v.models.spec import ModelSpec
from megatron_flashi2v.models.stages import stages_of_rank
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.runtime.device import Device


def build_chunks(spec: ModelSpec, config: TrainConfig, device: Device) -> list[DiffusionTransformer]:
    """This rank's stages of the model, on the device; their weights are not set yet."""
    counts = stage_layer_counts(config.parallel, spec.config.num_layers)
    pipeline = spec.groups.pp
    with device.torch_device:
        return [
            DiffusionTransformer(spec, stage, recompute_of(config.recompute, len(stage.layers)))
            for stage in stages_of_rank(counts, pipeline.size(), pipeline.rank())
        ]


def recompute_of(arguments: RecomputeArguments, blocks: int) -> Recompute:
    """What a stage of that many blocks computes again in backward."""
    granularity = arguments.recompute_granularity
    if granularity != "full":
        return Recompute(inside=granularity)
    if arguments.recompute_method == "block":
        return Recompute(layers=min(arguments.recompute_num_layers, blocks), group=1)
    return Recompute(layers=blocks, group=arguments.recompute_num_layers)
