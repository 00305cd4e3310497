"""The training command on a device called npu, which is emulated on the CPU: same numbers, NPU implementations."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.layouts import assert_same_metrics
from helpers.stand_in import emulated_npus
from helpers.synthetic_data import write_synthetic

from megatron_flashi2v.checkpoint.folders import find_checkpoint

pytestmark = pytest.mark.skipif(
    not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch cannot emulate a device in Python",
)

LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH = (4, 2, 4, 4), 8, 6
FLAGS = {
    "model": "tiny", "num-layers": 2, "hidden-size": 32, "ffn-hidden-size": 48, "num-attention-heads": 2,
    "latent-channels": LATENT_SHAPE[0], "text-dim": TEXT_DIM, "text-length": TEXT_LENGTH, "seed": 5,
    "train-iters": 10, "global-batch-size": 2, "lr": 1e-2,
}
COMMAND = ["-m", "megatron_flashi2v", "train", *(f"--{name}={value}" for name, value in FLAGS.items())]
# Counts the operators' calls and the host's reads, these by iteration, from the start of one to the start of the next;
# writes them down at the end.
COUNTING = """
import atexit, json, os, sys, torch_npu
from torch_npu import device
from torch_npu.operators import calls
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.training.trainer import Trainer

starts, run_iteration = [], Trainer.run_iteration

def counted(trainer):
    starts.append(len(device.reads))
    return run_iteration(trainer)

def write():
    reads = [device.reads[start:end] for start, end in zip(starts, starts[1:])]
    open(os.environ["CALLS"], "w").write(json.dumps({"calls": calls, "reads": reads}))

Trainer.run_iteration = counted
atexit.register(write)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_synthetic(tmp_path_factory.mktemp("data") / "set", 6, LATENT_SHAPE, TEXT_DIM, TEXT_LENGTH, seed=3)


def run(command: list[object], environment: dict[str, str] | None = None) -> str:
    done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True,
                          timeout=400, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def on_cpu(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    save = tmp_path_factory.mktemp("cpu") / "run"
    run([*COMMAND, "--data-path", data, "--device=cpu", "--save", save])
    return save


def test_ten_steps_equal_the_cpus_on_npu_kernels(data: Path, on_cpu: Path, tmp_path: Path) -> None:
    save, calls_file = tmp_path / "run", tmp_path / "calls.json"
    environment = {**emulated_npus(1), "CALLS": str(calls_file)}
    flags = ["--data-path", data, "--device=npu", "--distributed-backend=gloo", "--save", save,
             "--save-interval=5", "--async-save"]
    report = run(["-c", COUNTING, *COMMAND[2:], *flags], environment)
    for line in ("npu:0: Ascend910B3", "torch_npu 2.13.0", "kernel attention: npu_fusion_attention",
                 "kernel rms_norm: npu_rms_norm", "kernel qk_norm_rope: npu_rms_norm_rotary_mul",
                 "kernel fourier_highpass: matmul_dft"):
        assert line in report
    assert_same_metrics(save, on_cpu)
    assert find_checkpoint(save, 5) == save / "iter_0000005"
    counted = json.loads(calls_file.read_text())
    calls, reads = counted["calls"], counted["reads"]
    # gloo's collectives go through the host
    waits = [[place for place in iteration if "host_collectives" not in place] for iteration in reads[1:4]]
    assert all(len(places) == 1 and "parallel/agreement.py" in places[0] for places in waits), waits
    # 10 iterations of 2 microbatches through 2 blocks, each with self- and cross-attention
    attentions = 10 * 2 * 2 * 2
    assert calls["npu_fusion_attention"] == calls["npu_fusion_attention_grad"] == attentions
    assert calls["npu_rms_norm"] == calls["npu_rms_norm_backward"] == 2 * attentions  # queries and keys
    assert calls["npu_rotary_mul"] == 2 * attentions  # those of self-attention, forward and backward


def test_two_tensor_parallel_ranks(data: Path, on_cpu: Path, tmp_path: Path) -> None:
    save = tmp_path / "run"
    # as under a launcher that shows each process its own card only
    environment = {**emulated_npus(1), "ASCEND_RT_VISIBLE_DEVICES": "0"}
    report = run(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *COMMAND, "--data-path", data,
         "--device=npu", "--distributed-backend=gloo", "--save", save, "--tensor-model-parallel-size=2",
         "--sequence-parallel"],
        environment,
    )
    for line in ("kernel attention: npu_fusion_attention", "kernel rms_norm: torch (",
                 "npu_rms_norm: has no partial_sums on npu", "kernel qk_norm_rope: npu_rms_norm_rotary_mul"):
        assert line in report
    assert_same_metrics(save, on_cpu)


# Gives HCCL's name to gloo, by way of the host's memory; each group's ranks and settings are written down.
HCCL = """
import atexit, json, os, sys, torch, torch_npu
from torch import distributed
from torch.distributed.distributed_c10d import ProcessGroupGloo
from megatron_flashi2v.cli.main import main
from megatron_flashi2v.runtime.host_collectives import stage_through_host

made = []

def create(group, options):
    assert options is None or isinstance(options, torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options)
    made.append([list(group.global_ranks_in_group), None if options is None else options.hccl_config])
    return ProcessGroupGloo(group.store, group.group_rank, group.group_size, group.timeout)

distributed.Backend.register_backend("hccl", create, extended_api=True, devices=["npu", "cpu"])
stage_through_host("npu")
code = main(sys.argv[1:])
if os.environ["RANK"] == "0":
    open(os.environ["GROUPS"], "w").write(json.dumps(made))
sys.exit(code)
"""


def test_the_recipes_flags_in_bf16_on_two_replicas(data: Path, tmp_path: Path) -> None:
    """What the Ascend scripts run, and each group of HCCL's with the buffer that was asked for."""
    script, groups = tmp_path / "hccl.py", tmp_path / "groups.json"
    script.write_text(HCCL)
    flags = ["--data-path", data, "--bf16", "--ema-decay=0.9", "--recompute-granularity=skip_attention",
             "--train-iters=4", "--save-interval=4"]
    run([*COMMAND, *flags, "--device=cpu", "--save", tmp_path / "cpu"])
    report = run(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script, *COMMAND[2:], *flags,
         "--device=npu", "--save", tmp_path / "npu", "--use-distributed-optimizer", "--overlap-grad-reduce",
         "--overlap-param-gather", "--hccl-buffer-sizes=world:10,dp_cp:400,default:50"],
        {**emulated_npus(1), "ASCEND_RT_VISIBLE_DEVICES": "0", "GROUPS": str(groups)},
    )
    assert "64 GiB, hccl, torch" in report and "kernel attention: npu_fusion_attention" in report
    assert_same_metrics(tmp_path / "npu", tmp_path / "cpu", relative=4e-3)  # one rounding of bf16
    made = [(tuple(ranks), config["hccl_buffer_size"]) for ranks, config in json.loads(groups.read_text())]
    assert made[0] == ((), 10)  # all ranks, without being named
    assert made.count(((0, 1), 400)) == 1 and {size for _, size in made[1:]} == {400, 50}


@pytest.mark.long
def test_two_pipeline_ranks_with_two_stages_each(data: Path, tmp_path: Path) -> None:
    flags = ["--data-path", data, "--num-layers=4", "--global-batch-size=4", "--train-iters=4"]
    run([*COMMAND, *flags, "--device=cpu", "--save", tmp_path / "cpu"])
    run(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *COMMAND, *flags, "--device=npu",
         "--distributed-backend=gloo", "--save", tmp_path / "npu", "--pipeline-model-parallel-size=2",
         "--num-virtual-stages-per-pipeline-rank=2"],
        {**emulated_npus(1), "ASCEND_RT_VISIBLE_DEVICES": "0"})
    assert_same_metrics(tmp_path / "npu", tmp_path / "cpu")


THREADS = """
import sys, torch
from pathlib import Path
from megatron_flashi2v.checkpoint.peers import Peers
from megatron_flashi2v.checkpoint.storage import TensorPiece
from megatron_flashi2v.config.model import ModelConfig
from megatron_flashi2v.config.train import BatchArguments, CheckpointArguments, DataArguments
from megatron_flashi2v.data.blend import Blend
from megatron_flashi2v.data.prepared import PreparedDataset
from megatron_flashi2v.runtime.device import resolve_device
from megatron_flashi2v.training.batch import MicrobatchSource
from megatron_flashi2v.training.saver import CheckpointSaver

data = PreparedDataset(Path(sys.argv[1]))
channels, text_dim, text_length = map(int, sys.argv[2:])
model = ModelConfig(num_layers=1, hidden_size=16, ffn_hidden_size=16, num_attention_heads=2,
                    latent_channels=channels, text_dim=text_dim, text_length=text_length)
device = resolve_device("npu", local_rank=1)
from torch_npu.device import pinned_by

source = MicrobatchSource(Blend([data], [1.0], batch=2, seed=7), model, DataArguments(), BatchArguments(),
                          dp_rank=0, dp_size=1, device=device.torch_device, ahead=2, end=4)
assert len(list(source.iteration(0, 2))) == 2
source.close()
read = len(pinned_by)
saves = CheckpointArguments(save=Path("."), async_save=True, save_interval=1)
saver = CheckpointSaver(saves, model, Peers(0, 1), device)
saver.reserve(lambda: [TensorPiece.whole("weight", torch.zeros(5))])
saver._reserving.join()
assert 0 < read < len(pinned_by) and set(pinned_by) == {1}, (read, pinned_by)
"""


def test_threads_use_the_card_of_their_rank(data: Path) -> None:
    """Those that read ahead and that reserve memory for checkpoints, in the process of local rank 1 of 2."""
    run(["-c", THREADS, data, LATENT_SHAPE[0], TEXT_DIM, TEXT_LENGTH], emulated_npus(2))


COLLECTIVES = """
import torch, torch_npu, torch.distributed as dist
from megatron_flashi2v.runtime.host_collectives import stage_through_host
assert stage_through_host("npu") is stage_through_host("npu")
dist.init_process_group("gloo")
rank, npu = dist.get_rank(), torch.device("npu", 0)
torch.npu.set_device(npu)
mine = torch.tensor([1.0, 2.0], device=npu) * (rank + 1)

def check(tensor, *expected):
    assert tensor.device == npu and tensor.flatten().tolist() == list(expected), (rank, tensor)

summed = mine.clone()
work = dist.all_reduce(summed, async_op=True)
work.wait()
check(summed, 3, 6)
highest = mine.bfloat16()
dist.all_reduce(highest, op=dist.ReduceOp.MAX)
check(highest, 2, 4)
gathered = torch.zeros(4, device=npu)
dist.all_gather_into_tensor(gathered, mine)
check(gathered, 1, 2, 2, 4)
parts = [torch.zeros(2, device=npu) for _ in range(2)]
dist.all_gather(parts, mine)
check(torch.cat(parts), 1, 2, 2, 4)
part = torch.zeros(1, device=npu)
dist.reduce_scatter_tensor(part, mine)
check(part, 3 * (rank + 1))
traded = torch.zeros(2, device=npu)
dist.all_to_all_single(traded, mine)
check(traded, rank + 1, 2 * (rank + 1))
sent = mine.clone()
dist.broadcast(sent, src=1)
check(sent, 2, 4)
received = torch.zeros(2, device=npu)
exchange = [dist.P2POp(dist.isend, mine, 1 - rank), dist.P2POp(dist.irecv, received, 1 - rank)]
for request in dist.batch_isend_irecv(exchange):
    request.wait()
check(received, 2 - rank, 2 * (2 - rank))
check(mine, rank + 1, 2 * (rank + 1))  # inputs stay as they are
on_host = torch.ones(1)
dist.all_reduce(on_host)
assert on_host.item() == 2
objects = [None, None]
dist.all_gather_object(objects, rank)
assert objects == [0, 1]
dist.barrier()
dist.destroy_process_group()
"""


def test_collectives_go_through_the_host(tmp_path: Path) -> None:
    script = tmp_path / "collectives.py"
    script.write_text(COLLECTIVES)
    run(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script], emulated_npus(1))
