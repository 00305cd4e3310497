"""megatron-core's optimizers, saved at one layout and loaded at others: every value bit for bit.

One process plays every rank of a layout in turn, on torch's "fake" process group; nothing here needs the
ranks to exchange values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import megatron.core.optimizer
import pytest
import torch
import torch.distributed as dist
from helpers.checkpoints import read_full
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer import TransformerConfig
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_flashi2v.checkpoint.index import write_index
from megatron_flashi2v.checkpoint.model_state import load_weights, model_pieces
from megatron_flashi2v.checkpoint.optimizer_state import (
    load_optimizer,
    optimizer_common_state,
    optimizer_pieces,
    optimizer_shards,
)
from megatron_flashi2v.checkpoint.storage import keys, merge_parts, write_rank_file
from megatron_flashi2v.config.errors import CheckpointError
from megatron_flashi2v.models.weight_shards import whole_weights
from megatron_flashi2v.parallel.placement import ShardGrid
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.runtime.redirect import megatron_on

assert megatron.core.optimizer.USING_PYTORCH_OPTIMIZER  # what a plain machine has

# Name, whole shape, dimension that tensor parallelism cuts, whether it stays fp32 under bf16.
PARAMETERS = (
    ("patch_embedding.weight", (20, 15), None, False),
    ("blocks.0.mlp.linear_fc1.weight", (32, 18), 0, False),
    ("blocks.0.mlp.linear_fc1.bias", (32,), 0, False),
    ("blocks.0.norm_cross.weight", (7,), None, True),
    ("blocks.1.mlp.linear_fc2.weight", (30, 16), 1, False),
    ("blocks.1.modulation", (6, 35), None, True),
    ("head.linear.bias", (3,), None, False),
)


@dataclass(frozen=True)
class Layout:
    name: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    distributed: bool = False
    bf16: bool = False
    kind: str = "adam"

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp * self.cp


class Stage(torch.nn.Module):
    """The parameters of one stage and tensor-parallel rank, zero until they are loaded."""

    def __init__(self, layout: Layout, tp_rank: int, pp_rank: int) -> None:
        super().__init__()
        self.names: dict[str, str] = {}
        for index, (name, shape, axis, keep) in enumerate(PARAMETERS):
            if index % layout.pp != pp_rank:
                continue
            local = tuple(
                size // layout.tp if position == axis else size for position, size in enumerate(shape)
            )
            dtype = torch.bfloat16 if layout.bf16 and not keep else torch.float32
            parameter = torch.nn.Parameter(torch.zeros(local, dtype=dtype))
            attribute = name.replace(".", "_")
            self.register_parameter(attribute, parameter)
            self.names[attribute] = name

    def named(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(self.names[attribute], parameter) for attribute, parameter in self.named_parameters()]


@contextlib.contextmanager
def on_rank(layout: Layout, rank: int) -> Iterator[tuple[Stage, MegatronOptimizer, ShardGrid]]:
    """The stage and optimizer of one rank."""
    dist.init_process_group("fake", rank=rank, world_size=layout.world, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            context_parallel_size=layout.cp,
            create_gloo_process_groups=False,
        )
        grid = ShardGrid(
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=layout.tp,
            dp_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
            dp_size=layout.dp * layout.cp,
        )
        stage = Stage(layout, grid.tp_rank, parallel_state.get_pipeline_model_parallel_rank())
        config = TransformerConfig(
            num_layers=2,
            hidden_size=8,
            num_attention_heads=2,
            bf16=layout.bf16,
            context_parallel_size=layout.cp,
            tensor_model_parallel_size=layout.tp,
            pipeline_model_parallel_size=layout.pp,
            pipeline_dtype=torch.float32,
        )
        # Several buckets, so that parameters are split between ranks in many places.
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=layout.distributed,
            grad_reduce_in_fp32=True,
            bucket_size=700,
            overlap_grad_reduce=layout.distributed,
        )
        optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer=layout.kind,
                lr=0.1,
                bf16=layout.bf16,
                clip_grad=0.0,
                weight_decay=0.01,
                use_distributed_optimizer=layout.distributed,
            ),
            [DistributedDataParallel(config, ddp_config, stage)],
            use_gloo_process_groups=False,
        )
        yield stage, optimizer, grid
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def step(stage: Stage, optimizer: MegatronOptimizer, number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in stage.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
    optimizer.step()


def save_rank(
    folder: Path, layout: Layout, rank: int, stage: Stage, optimizer: MegatronOptimizer, grid: ShardGrid
) -> object:
    pieces = model_pieces(stage.named(), grid) + optimizer_pieces(optimizer, stage.named(), grid)
    return write_rank_file(folder, pieces, rank=rank, world_size=layout.world)


def trained(folder: Path, layout: Layout, steps: int = 3) -> dict[str, object]:
    """Train on one rank and save; the common state."""
    folder.mkdir()
    with on_rank(layout, 0) as (stage, optimizer, grid):
        generator = torch.Generator().manual_seed(7)
        for _, parameter in stage.named():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
        optimizer.reload_model_params()
        for number in range(steps):
            step(stage, optimizer, number)
        write_index(folder, merge_parts([save_rank(folder, layout, 0, stage, optimizer, grid)]))
        return optimizer_common_state(optimizer)


def carried_over(source: Path, target: Path, layout: Layout, common: dict[str, object]) -> None:
    """Load at a layout and save again, rank after rank."""
    target.mkdir()
    parts = []
    for rank in range(layout.world):
        with on_rank(layout, rank) as (stage, optimizer, grid):
            load_weights(source, whole_weights(stage.named(), grid))
            load_optimizer(source, optimizer, stage.named(), grid, common)
            assert optimizer_common_state(optimizer) == common or not optimizer_pieces(
                optimizer, stage.named(), grid
            )
            parts.append(save_rank(target, layout, rank, stage, optimizer, grid))
    write_index(target, merge_parts(parts))


def contents(folder: Path) -> dict[str, torch.Tensor]:
    return {key: read_full(folder, key) for key in keys(folder)}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
        assert tensor.abs().sum() > 0, f"{key} is all zeros, so it proves nothing"


@pytest.fixture(autouse=True)
def on_cpu() -> Iterator[None]:
    with megatron_on(resolve_device("cpu", 0)):
        yield


LAYOUTS = (
    Layout("distributed-dp3", dp=3, distributed=True),
    Layout("tp2", tp=2),
    Layout("tp2-dp2-distributed", tp=2, dp=2, distributed=True),
    Layout("pp3-dp2", pp=3, dp=2),
    Layout("cp2-tp2-pp2-distributed", cp=2, tp=2, pp=2, distributed=True),
    Layout("distributed-dp1", distributed=True),
    Layout("one"),
)


@pytest.mark.parametrize("bf16", [False, True])
def test_from_layout_to_layout_and_back(tmp_path: Path, bf16: bool) -> None:
    first = Layout("trained", bf16=bf16)
    common = trained(tmp_path / "trained", first)
    assert common == {"step": 3}
    expected = contents(tmp_path / "trained")
    kinds = {key.split(".")[1] for key in expected if key.startswith("optimizer.")}
    assert kinds == ({"exp_avg", "exp_avg_sq", "master"} if bf16 else {"exp_avg", "exp_avg_sq"})
    # Only what the model holds in bf16 has a master copy.
    assert sum(key.startswith("optimizer.master.") for key in expected) == (5 if bf16 else 0)
    source = tmp_path / "trained"
    for layout in LAYOUTS:
        target = tmp_path / layout.name
        carried_over(source, target, Layout(**{**layout.__dict__, "bf16": bf16}), common)
        assert_equal(contents(target), expected)
        source = target


def test_the_distributed_optimizer_continues_bit_for_bit(tmp_path: Path) -> None:
    layout = Layout("d", distributed=True, bf16=True)
    common = trained(tmp_path / "after-3", layout)
    trained(tmp_path / "after-5", layout, steps=5)
    plain = Layout("plain", bf16=True)
    for name, resumed in (("distributed", layout), ("plain", plain)):
        with on_rank(resumed, 0) as (stage, optimizer, grid):
            load_weights(tmp_path / "after-3", whole_weights(stage.named(), grid))
            load_optimizer(tmp_path / "after-3", optimizer, stage.named(), grid, common)
            for number in (3, 4):
                step(stage, optimizer, number)
            (tmp_path / name).mkdir()
            write_index(
                tmp_path / name, merge_parts([save_rank(tmp_path / name, resumed, 0, stage, optimizer, grid)])
            )
            assert optimizer_common_state(optimizer) == {"step": 5}
        assert_equal(contents(tmp_path / name), contents(tmp_path / "after-5"))


def test_the_shards_of_all_ranks_are_really_split(tmp_path: Path) -> None:
    layout = Layout("d", dp=3, distributed=True)
    held: list[dict[str, tuple[int, int] | None]] = []
    for rank in range(3):
        with on_rank(layout, rank) as (stage, optimizer, grid):
            held.append(
                {shard.name: shard.flat_range for shard in optimizer_shards(optimizer, stage.named(), grid)}
            )
            pieces = optimizer_pieces(optimizer, stage.named(), grid)
            assert not pieces  # no step was taken, and fp32 parameters have no master copy
    assert all(held)
    assert sum(len(shards) for shards in held) > len(PARAMETERS), "no parameter lies on two ranks"


def test_sgd_keeps_its_momentum(tmp_path: Path) -> None:
    common = trained(tmp_path / "a", Layout("a", kind="sgd"))
    assert common == {"step": None}
    assert "optimizer.momentum_buffer.blocks.1.mlp.linear_fc2.weight" in keys(tmp_path / "a")
    carried_over(tmp_path / "a", tmp_path / "b", Layout("b", tp=2, kind="sgd"), common)
    assert_equal(contents(tmp_path / "b"), contents(tmp_path / "a"))


def test_another_kind_of_optimizer_is_refused(tmp_path: Path) -> None:
    common = trained(tmp_path / "a", Layout("a"))
    with pytest.raises(
        CheckpointError, match=r"exp_avg, exp_avg_sq, but this optimizer \(SGD\) keeps momentum_buffer"
    ):
        carried_over(tmp_path / "a", tmp_path / "b", Layout("b", kind="sgd"), common)
    with pytest.raises(CheckpointError, match="number of steps"):
        carried_over(tmp_path / "a", tmp_path / "c", Layout("c"), {"step": None})


def test_a_checkpoint_without_moments_starts_the_optimizer_anew(tmp_path: Path) -> None:
    common = trained(tmp_path / "a", Layout("a"), steps=0)
    assert common == {"step": None}
    assert not any(key.startswith("optimizer.") for key in keys(tmp_path / "a"))
    with on_rank(Layout("b", bf16=True, distributed=True), 0) as (stage, optimizer, grid):
        load_weights(tmp_path / "a", whole_weights(stage.named(), grid))
        load_optimizer(tmp_path / "a", optimizer, stage.named(), grid, common)
        for shard in optimizer_shards(optimizer, stage.named(), grid):
            # The master copies have the stored precision, not that of the bf16 parameters.
            assert not shard.state
            assert torch.equal(shard.weights, read_full(tmp_path / "a", f"model.{shard.name}").flatten())
        step(stage, optimizer, 0)
        assert optimizer_common_state(optimizer) == {"step": 1}


def test_fp32_takes_over_the_master_copies_of_bf16(tmp_path: Path) -> None:
    common = trained(tmp_path / "bf16", Layout("a", bf16=True))
    carried_over(tmp_path / "bf16", tmp_path / "fp32", Layout("b", tp=2), common)
    bf16, fp32 = contents(tmp_path / "bf16"), contents(tmp_path / "fp32")
    for name, _, _, keep in PARAMETERS:
        exact = bf16[f"model.{name}" if keep else f"optimizer.master.{name}"]
        assert fp32[f"model.{name}"].dtype == torch.float32 and torch.equal(fp32[f"model.{name}"], exact)
        if not keep:
            assert not torch.equal(bf16[f"model.{name}"].float(), exact)
    assert not any("master" in key for key in fp32)
    # And back: the masters of a bf16 run are the fp32 run's weights.
    carried_over(tmp_path / "fp32", tmp_path / "again", Layout("c", bf16=True), common)
    assert_equal(contents(tmp_path / "again"), bf16)


def test_a_nameless_parameter_is_refused() -> None:
    with (
        on_rank(Layout("a"), 0) as (stage, optimizer, grid),
        pytest.raises(CheckpointError, match="no name"),
    ):
        optimizer_pieces(optimizer, stage.named()[1:], grid)
