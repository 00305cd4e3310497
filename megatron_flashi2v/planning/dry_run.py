"""``--dry-run``: the plan of a run, without its devices and, where there are none yet, its data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import yaml

from flashi2v_kernels.registry import describe
from megatron_flashi2v.checkpoint.key_table import parameter_shapes
from megatron_flashi2v.conditioning.build import BASE, paradigm_of
from megatron_flashi2v.config.blend import parse_blend
from megatron_flashi2v.config.clips import EncodingArguments
from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.config.layout import data_parallel_size, ring_degree, sharding_ranks, sharding_strategy
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.recipe import flat_values
from megatron_flashi2v.config.rules import check_tokens, num_microbatches
from megatron_flashi2v.config.train import DataArguments, ParallelArguments, RuntimeArguments, TrainConfig
from megatron_flashi2v.data.prepared import PreparedDataset
from megatron_flashi2v.encoders.video_vae import WAN_STRIDES, read_strides
from megatron_flashi2v.models.kernel_choice import default_kernels
from megatron_flashi2v.models.spec import choose_kernels
from megatron_flashi2v.planning.holdings import planned_holdings
from megatron_flashi2v.planning.state_memory import state_memory
from megatron_flashi2v.runtime.device import resolve_device


@dataclass(frozen=True)
class PlannedData:
    """Samples of a run, as far as they are known before it.

    Attributes:
        latent_shapes: latent frames, rows and columns, one for each size.
        temporal_stride: video frames for each latent frame after the first; None where it is not known.
        source: where that was read.
        inputs: shapes of what a sample holds beside latents and text, by name.
    """

    latent_shapes: tuple[tuple[int, int, int], ...]
    temporal_stride: int | None
    source: str
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def dry_run_report(config: TrainConfig, model: ModelConfig, world_size: int) -> str:
    """The layout, what its ranks hold, kernels, exact parameter counts and the configuration, as YAML with comments.

    Args:
        config: flags and recipe, checked.
        model: resolved dimensions.
        world_size: processes of the run.

    Raises:
        ConfigError: the samples' size does not divide into the model's patches, or flags or files that name the data
            are malformed.
    """
    paradigm = paradigm_of(model)
    data = planned_data(config.data, config.encoding)
    for shape in data.latent_shapes:
        check_tokens(model, shape)
    model = paradigm.fit_to_data(model, data.temporal_stride, data.inputs)
    parallel = config.parallel
    total = _parameters(model)
    without = _parameters(dataclasses.replace(model, conditioning=BASE.name))
    replicas = data_parallel_size(parallel, world_size)
    lines = [
        "# layout" + (" of one replica: --world-size plans for more" if replicas == 1 else ""),
        f"processes: {world_size}",
        f"tensor: {parallel.tensor_model_parallel_size}"
        + (" with sequence parallelism" if parallel.sequence_parallel else ""),
        f"pipeline: {parallel.pipeline_model_parallel_size}",
        f"context: {parallel.context_parallel_size}",
        f"data: {replicas}{_sharding(parallel, world_size)}",
        f"microbatches: {num_microbatches(config, world_size)} of {config.batch.micro_batch_size}",
        "",
        *held_by_ranks(config, model, data, world_size),
        "",
        *chosen_kernels(config.runtime, parallel, model, bf16=config.batch.bf16),
        "",
        "# parameters",
        f"total: {total:,}",
        f"{BASE.name}_part: {without:,}",
        f"{model.conditioning}_part: {total - without:,}",
        "",
        "# model",
        yaml.safe_dump(model.to_json(), sort_keys=False, default_flow_style=None).rstrip(),
        "",
        "# resolved configuration; what has no value is left out",
        yaml.safe_dump(given_values(config), sort_keys=False, default_flow_style=None).rstrip(),
    ]
    return "\n".join(lines) + "\n"


def given_values(config: TrainConfig) -> dict[str, Any]:
    """The flags that have a value, and so a recipe of the same run."""
    return {name: value for name, value in flat_values(config).items() if value not in (None, [])}


def planned_data(arguments: DataArguments, encoding: EncodingArguments) -> PlannedData:
    """Of the prepared folders, or by the flags of online encoding and mock data; of the released models, before there
    are data."""
    if arguments.online_encoding or arguments.mock_data:
        return _by_flags(encoding)
    infos = {}
    missing = []
    for part in parse_blend(arguments.data_path) if arguments.data_path else ():
        try:
            infos[part.folder] = PreparedDataset(part.folder).info
        except DataError:
            missing.append(part.folder)
    if not infos:
        source = "49 frames of 480 x 832 in Wan's VAE, as there are no prepared data yet"
        return PlannedData((WAN_STRIDES.latent_grid(49, 480, 832),), None, source)
    shapes = tuple(dict.fromkeys(info.latent_shape[1:] for info in infos.values()))
    source = f"the largest sample of {' '.join(map(str, infos))}"
    source += f"; no prepared data yet in {' '.join(map(str, missing))}" if missing else ""
    first = next(iter(infos.values()))
    return PlannedData(shapes, first.temporal_stride, source, first.inputs)


def _sharding(parallel: ParallelArguments, world_size: int) -> str:
    """Name what replicas and context ranks divide, and among how many."""
    what = {"no_shard": "", "optim": "the optimizer's state", "optim_grads": "gradients and the optimizer's state",
            "optim_grads_params": "weights, gradients and the optimizer's state"}
    divided = what[sharding_strategy(parallel, world_size)]
    return f"  # {divided} divided over {sharding_ranks(parallel, world_size)} ranks" if divided else ""


def held_by_ranks(config: TrainConfig, model: ModelConfig, data: PlannedData, world_size: int) -> list[str]:
    """List what each rank holds, one entry for each place in the pipeline."""
    parallel = config.parallel
    replicas = data_parallel_size(parallel, world_size)
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    lines = [
        "# held by each rank",
        f"# rank = tensor + {tensor} x (context + {context} x (data + {replicas} x pipeline)), each counted from 0",
    ]
    if config.adapter.is_partial:
        lines.append("# trained: without tensors that --load-weights may lack, which are trained too")
    for place, held in enumerate(planned_holdings(
        parallel, model, data.latent_shapes, bf16=config.batch.bf16, adapter=config.adapter
    )):
        memory = state_memory(held, config, world_size)
        parts = [f"blocks {stage.layers.start} to {stage.layers.stop - 1}" for stage in held.stages]
        if held.stages[0].is_first:
            parts.insert(0, "embeddings")
        if held.stages[-1].is_last:
            parts.append("head")
        lines += [
            f"pipeline_{place}:", f"  holds: {', '.join(parts)}", f"  parameters: {held.parameters:,}",
            *([f"  trained: {held.trained:,}"] if held.trained < held.parameters else []),
            f"  visual_tokens: {held.tokens:,}  # {data.source}",
            f"  state_gb: {memory.kept / 1e9:.3f}  # weights {memory.weights / 1e9:.3f}, gradients "
            f"{memory.gradients / 1e9:.3f}, optimizer {memory.optimizer / 1e9:.3f}, average {memory.average / 1e9:.3f}",
            *([f"  in_flight_gb: {memory.in_flight / 1e9:.3f}  # gathered weights, gradients being reduced, at most"]
              if memory.in_flight else []),
        ]
    return lines


def chosen_kernels(
    runtime: RuntimeArguments, parallel: ParallelArguments, model: ModelConfig, *, bf16: bool
) -> list[str]:
    """List the implementation of every operator that this machine would run, and why not a preferred one.

    A dry run may happen where the training's devices are not: then it says so.
    """
    try:
        device = resolve_device(runtime.device)
        kernels = choose_kernels(
            device.torch_device, torch.bfloat16 if bf16 else torch.float32, model,
            runtime.attention_backend, ring=ring_degree(parallel) > 1,
            tensor_parallel=parallel.tensor_model_parallel_size > 1,
        )
    except ConfigError as error:
        return [f"# kernels: not those of the training, for on this machine: {error}"]
    default = default_kernels(kernels.chosen, device.name, runtime.attention_backend)
    if default is not None:
        return [f"# kernels: {default}"]
    return [f"# kernels on this machine's {device.name}",
            *(f"{operator}: {name}" + (f"  # {why_not}" if why_not else "")
              for operator, name, why_not in describe(kernels.chosen))]


def _by_flags(encoding: EncodingArguments) -> PlannedData:
    clip, vae, whose = encoding.clips.wanted, encoding.sources.vae, "the VAE of --vae"
    if vae is not None and vae.exists():
        strides = read_strides(vae)
    else:
        strides, whose = WAN_STRIDES, "Wan's VAE, as --vae is not there yet"
    shape = strides.latent_grid(clip.num_frames, clip.height, clip.width)
    return PlannedData(
        (shape,), strides.temporal, f"{clip.num_frames} frames of {clip.height} x {clip.width} in {whose}"
    )


def _parameters(model: ModelConfig) -> int:
    """Values in all tensors of the whole model."""
    return sum(math.prod(shape) for shape in parameter_shapes(model).values())
