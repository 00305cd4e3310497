"""The data of a run, opened and checked."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from megatron_flashi2v.conditioning.build import paradigm_of
from megatron_flashi2v.conditioning.wan_i2v import IMAGE_ROWS
from megatron_flashi2v.config.blend import parse_blend
from megatron_flashi2v.config.errors import ConfigError, DataError
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.prepare import EncodingConfig
from megatron_flashi2v.config.rules import check_tokens
from megatron_flashi2v.config.train import BatchArguments, DataArguments, TrainConfig
from megatron_flashi2v.data.blend import Blend, SampleSource, require_same_kind
from megatron_flashi2v.data.description import DataInfo
from megatron_flashi2v.data.mock import MockDataset
from megatron_flashi2v.data.online import OnlineDataset, Replica
from megatron_flashi2v.data.prepared import PreparedDataset
from megatron_flashi2v.parallel.agreement import gather_bytes, gather_json
from megatron_flashi2v.parallel.groups import Groups
from megatron_flashi2v.runtime.random import keyed_seed

VALIDATION_SEED = keyed_seed(0, "validation")
"""Keys the validation's order and draws, whatever the run's seed."""


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run's data, open, and the model as they fit it.

    Attributes:
        training: what is trained on.
        validation: what is not; None without --valid-data-path.
        model: dimensions, with what the data settle.
    """

    training: Blend
    validation: Blend | None
    model: ModelConfig


@contextlib.contextmanager
def opened_data(config: TrainConfig, model: ModelConfig, groups: Groups, device: torch.device) -> Iterator[RunData]:
    """Open a run's data; on the way out files and decoders are let go of.

    Args:
        config: flags and recipe, checked.
        model: dimensions.
        groups: this rank's; those of a replica share online encoding.
        device: where online encoding's encoders run.

    Raises:
        UserError: data are missing, damaged, or do not fit the model or one another.
    """
    with contextlib.ExitStack() as opened:
        encoding = EncodingConfig(
            arguments=config.encoding, text_length=model.text_length, seed=config.batch.seed
        )
        training, validation = open_data(config.data, config.batch, encoding, model, device), None
        opened.callback(training.close)
        model = fit_model_to_data(model, training)
        if config.watch.valid_data_path:
            validation = open_validation_data(
                config.watch.valid_data_path, training, batch=config.batch.global_batch_size, seed=VALIDATION_SEED
            )
            opened.callback(validation.close)
            require_fitting(fit_model_to_data(model, validation), model, training, validation)
        share_encoding(training, groups, config.parallel.distributed_timeout_minutes)
        yield RunData(training=training, validation=validation, model=model)


def open_data(
    data: DataArguments, batch: BatchArguments, encoding: EncodingConfig, model: ModelConfig, device: torch.device
) -> Blend:
    """Open the prepared data sets of ``--data-path``, the annotations of ``--online-encoding``, or ``--mock-data``.

    Args:
        data: names the data; checked.
        batch: global batch and seed.
        encoding: of ``--online-encoding`` and ``--mock-data``, ignored without them.
        model: dimensions, which ``--mock-data`` follows.
        device: where the encoders of online encoding run.

    Raises:
        ConfigError: no path was given, or the data sets do not belong together.
        DataError: one is missing, damaged or empty.
    """
    datasets: list[SampleSource]
    if data.mock_data:
        datasets, weights = [MockDataset(encoding, model)], [1.0]
    elif data.online_encoding:
        memory_bytes = data.encoding_cache_mib * 2**20
        encoding = with_stored_inputs(encoding, model)
        datasets = [OnlineDataset(encoding, device, memory_bytes=memory_bytes, cache=data.encoding_cache)]
        weights = [1.0]
    else:
        datasets, weights = _open_prepared(data.data_path, "--data-path")
    return Blend(datasets, weights, batch=batch.global_batch_size, seed=batch.seed)


def open_validation_data(data_path: Sequence[str], training: Blend, *, batch: int, seed: int) -> Blend:
    """Open the prepared data sets of ``--valid-data-path``.

    Args:
        data_path: the flag's value.
        training: data that the run trains on.
        batch: samples of a global batch.
        seed: of the order in which samples are taken.

    Raises:
        ConfigError: a data set does not belong to the training's.
        DataError: one is missing, damaged or empty.
    """
    datasets, weights = _open_prepared(data_path, "--valid-data-path")
    for dataset in datasets:
        require_same_kind(dataset, training.datasets[0])
    return Blend(datasets, weights, batch=batch, seed=seed)


def fit_model_to_data(model: ModelConfig, data: Blend) -> ModelConfig:
    """Record how captions were cleaned, and what the paradigm takes from the data; check that widths agree.

    Raises:
        ConfigError: latent channels, text width or text length differ, or latents do not divide into patches.
    """
    info = data.info
    for name, wanted, found in (("latent_channels", model.latent_channels, info.latent_shape[0]),
                                ("text_dim", model.text_dim, info.text_dim)):
        if wanted != found:
            raise ConfigError(f"{name} is {wanted} in the model, but {found} in {data.name}; they must be equal")
    if data.text_length > model.text_length:
        raise ConfigError(
            f"text_length is {model.text_length} in the model, but captions in {data.name} have up to "
            f"{data.text_length} rows; set --text-length {data.text_length}"
        )
    for shape in data.latent_shapes:
        check_tokens(model, shape[1:])
    model = dataclasses.replace(model, text_cleaning=info.text_cleaning)
    model = paradigm_of(model).fit_to_data(model, info.temporal_stride, info.inputs)
    for dataset in data.datasets:
        require_inputs(model, dataset.info, dataset.name)
        _require_same_encoder(model, data, dataset.info.image_encoder, dataset.name)
    return model


def require_fitting(fitted: ModelConfig, model: ModelConfig, training: Blend, validation: Blend) -> None:
    """Refuse validation data that would make another model than the training data do.

    Raises:
        ConfigError: the image encoder's rows are others than in training.
    """
    if fitted.image_rows != model.image_rows:
        raise ConfigError(
            f"{validation.name} holds {fitted.image_rows} rows of an image encoder, {training.name} "
            f"{model.image_rows}; prepare both with the same one"
        )
    _require_same_encoder(model, training, validation.info.image_encoder, validation.name)


def _require_same_encoder(model: ModelConfig, data: Blend, encoder: Mapping[str, Any], name: str) -> None:
    """Refuse rows of another image encoder than the first data set's, where the model takes them."""
    takes_rows = IMAGE_ROWS in paradigm_of(model).stored_inputs(model, data.info.latent_shape)
    if takes_rows and encoder != data.info.image_encoder:
        raise ConfigError(
            f"{name} has rows of the image encoder {dict(encoder)}, {data.name} of {dict(data.info.image_encoder)}; "
            "prepare all of them with one"
        )


def require_inputs(model: ModelConfig, info: DataInfo, name: str) -> None:
    """Refuse data that lack what the paradigm takes beside latents and text, or hold it of other widths.

    Raises:
        ConfigError: names the data, the tensor and the cure.
    """
    for what, shape in paradigm_of(model).stored_inputs(model, info.latent_shape).items():
        if what not in info.inputs:
            cure = (
                "--image-encoder, or train with --image-embed-dim 0, without the branch for its rows"
                if what == IMAGE_ROWS else "--image-encoder or --grey-clip"
            )
            raise ConfigError(
                f"{name} holds no {what}, which --conditioning {model.conditioning} takes; prepare it again with {cure}"
            )
        if info.inputs[what] != shape:
            raise ConfigError(
                f"{what} in {name} are {info.inputs[what]}, the model takes {shape}; set --image-embed-dim to the "
                "width of the image encoder's rows"
            )


def with_stored_inputs(encoding: EncodingConfig, model: ModelConfig) -> EncodingConfig:
    """What online encoding makes of a clip, with what the paradigm takes beside latents and text.

    Raises:
        ConfigError: it takes an image encoder's rows, and --image-encoder is not given.
    """
    paradigm, arguments = paradigm_of(model), encoding.arguments
    # Sizes do not matter here.
    if not paradigm.stored_inputs(model, (model.latent_channels, 1, 1, 1)):
        return encoding
    if paradigm.image_rows(model) and arguments.sources.image_encoder is None:
        raise ConfigError(
            f"--image-encoder must be given: --conditioning {model.conditioning} takes its rows (without their branch: "
            "--image-embed-dim 0)"
        )
    clips = dataclasses.replace(arguments.clips, grey_clip=True)
    return dataclasses.replace(encoding, arguments=dataclasses.replace(arguments, clips=clips))


def share_encoding(data: Blend, groups: Groups, timeout_minutes: float) -> None:
    """Let the ranks of each replica (tensor, context and pipeline parallel) share online encoding; all ranks call it.

    The group is of its own, over gloo and host memory: the thread that reads ahead exchanges samples there while the
    other groups train.

    Args:
        data: what is read.
        groups: this rank's.
        timeout_minutes: how long a rank waits for the others' part.
    """
    online = [dataset for dataset in data.datasets if isinstance(dataset, OnlineDataset)]
    world = torch.distributed.get_world_size()
    if not online or world == groups.dp.size():
        return
    replicas: list[int] = gather_json(groups.dp.rank())
    mine = None
    for replica in sorted(set(replicas)):
        ranks = [rank for rank, of in enumerate(replicas) if of == replica]
        group = torch.distributed.new_group(ranks, timeout=timedelta(minutes=timeout_minutes), backend="gloo")
        if replica == groups.dp.rank():
            mine = group
    for dataset in online:
        dataset.replica = Replica(
            rank=torch.distributed.get_rank(mine),
            size=torch.distributed.get_world_size(mine),
            gather=partial(gather_bytes, group=mine),
        )


def _open_prepared(data_path: Sequence[str], flag: str) -> tuple[list[SampleSource], list[float]]:
    """Data sets and their weights."""
    parts = parse_blend(data_path, flag)
    datasets: list[SampleSource] = []
    for part in parts:
        if part.folder.is_file():
            raise DataError(f"{flag} {part.folder} is a file; give the folder that `flashi2v prepare` wrote")
        dataset = PreparedDataset(part.folder)
        if not len(dataset):
            raise DataError(f"{flag} {part.folder} holds no samples; prepare it again")
        datasets.append(dataset)
    return datasets, [part.weight for part in parts]
