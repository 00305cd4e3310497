"""The one builder: this rank's stages of the transformer, or the whole of it in one process."""

from __future__ import annotations

from megatron_flashi2v.config.layout import stage_layer_counts
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import ParallelArguments, RecomputeArguments
from megatron_flashi2v.models.recompute import Recompute
from megatron_flashi2v.models.spec import ModelSpec, make_spec
from megatron_flashi2v.models.stages import stages_of_rank
from megatron_flashi2v.models.transformer import DiffusionTransformer
from megatron_flashi2v.parallel.fully_sharded import hollow_parameters, parameters_on_meta
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.runtime.device import Device


def build_stages(
    spec: ModelSpec, parallel: ParallelArguments, recompute: RecomputeArguments | None = None, *, hollow: bool = False
) -> list[DiffusionTransformer]:
    """This rank's stages in the order in which the activation passes them, in training mode, with weights to be set.

    Args:
        spec: settings of all stages; the parameters lie on its device.
        parallel: the layout that the spec's groups were made for.
        recompute: activations to compute again in backward; none by default.
        hollow: make the parameters without memory, for
            :class:`~megatron_flashi2v.parallel.fully_sharded.FullyShardedStage`.
    """
    recompute = recompute or RecomputeArguments()
    pipeline = spec.groups.pp
    stages = stages_of_rank(stage_layer_counts(parallel, spec.config.num_layers), pipeline.size(), pipeline.rank())
    with parameters_on_meta(spec.megatron) if hollow else spec.device:
        built = [DiffusionTransformer(spec, stage, recompute_of(recompute, len(stage.layers))) for stage in stages]
    if hollow:
        for model in built:
            hollow_parameters(model, spec.device)
    return built


def build_model(
    config: ModelConfig, groups: Groups, device: Device, *, bf16: bool = False, attention_backend: str = "auto"
) -> DiffusionTransformer:
    """The whole transformer in evaluation mode, with weights to be set.

    Args:
        config: dimensions and paradigm.
        groups: from :func:`~megatron_flashi2v.parallel.world.single_process`.
        device: where the model lives.
        bf16: matrix products and the residual stream in bfloat16.
        attention_backend: implementation of attention, or auto.

    Raises:
        ConfigError: the attention backend cannot run here.
    """
    spec = make_spec(config, groups, device.torch_device, bf16=bf16, attention_backend=attention_backend)
    (model,) = build_stages(spec, ParallelArguments())
    return model.eval()


def recompute_of(arguments: RecomputeArguments, blocks: int) -> Recompute:
    """Activations that a stage of that many blocks computes again in backward."""
    granularity = arguments.recompute_granularity
    if granularity != "full":
        return Recompute(inside=granularity)
    if arguments.recompute_method == "block":
        return Recompute(layers=min(arguments.recompute_num_layers, blocks), group=1)
    return Recompute(layers=blocks, group=arguments.recompute_num_layers)
