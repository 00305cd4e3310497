"""Our NPU implementations against the real torch_npu, whose ACL runtime is emulated (real_torch_npu.sh runs this).

No operator computes anything: fake tensors show the shapes and dtypes that torch_npu's own forward and backward give,
and a call on real ``npu:0`` tensors, once its arguments were accepted, ends at the missing operator library.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch_npu
from torch._subclasses.fake_tensor import FakeTensorMode

from flashi2v_kernels.attention import BLOCK_BACKWARD, KEY_PADDING, LOG_SUM_EXP
from flashi2v_kernels.registry import resolve
from flashi2v_kernels.rms_norm import PARTIAL_SUMS
from megatron_flashi2v.runtime.device import resolve_device

# How a call ends whose arguments were accepted: the new operator library is missing, or the old one does not compile.
ACCEPTED = r"aclnn\w+.* not in .*libopapi|OPS function error: RmsNorm"
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def real_package():
    assert "stand_in" not in torch_npu.__file__ and torch.npu.device_count() == 1


def kernel(operator, dtype, *features):
    chosen = resolve(operator, "npu", dtype, head_dim=24, features=features, needs_gradient=True)
    assert chosen.spec.package == "torch_npu", chosen.why_not
    return chosen


def draw(*shape, dtype=torch.float32, grad=True):
    return torch.empty(shape, dtype=dtype, device="npu").requires_grad_(grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [False, True])
def test_attention_of_fake_tensors(dtype, padded):
    function = kernel("attention", dtype, KEY_PADDING, LOG_SUM_EXP).function
    with FakeTensorMode():
        inputs = draw(2, 7, 3, 24, dtype=dtype), draw(2, 5, 3, 24, dtype=dtype), draw(2, 5, 3, 24, dtype=dtype)
        mask = torch.ones(2, 5, dtype=torch.bool, device="npu") if padded else None
        output, lse = function(*inputs, key_padding_mask_BK=mask, return_log_sum_exp=True)
        assert (output.shape, output.dtype) == (inputs[0].shape, dtype)
        assert (lse.shape, lse.dtype) == ((2, 3, 7), torch.float32)
        grads = torch.autograd.grad(output.sum(), inputs)
        assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in inputs]


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_backward_of_a_block_of_fake_tensors(dtype):
    backward = kernel("attention", dtype, LOG_SUM_EXP, BLOCK_BACKWARD).backward
    with FakeTensorMode():
        query, key = draw(2, 7, 3, 24, dtype=dtype, grad=False), draw(2, 5, 3, 24, dtype=dtype, grad=False)
        grads = backward(query, query, key, key, query, draw(2, 3, 7, grad=False))
        assert [tuple(g.shape) for g in grads] == [(2, 7, 3, 24), (2, 5, 3, 24), (2, 5, 3, 24)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("operator", ["rms_norm", "qk_norm_rope", "qk_norm_rope of ranks"])
def test_norm_and_rotation_of_fake_tensors(operator, dtype):
    name, _, sharded = operator.partition(" ")
    function = kernel(name, dtype, *([PARTIAL_SUMS] if sharded else [])).function
    with FakeTensorMode():
        x, weight = draw(6, 2, 3, 24, dtype=dtype), draw(72)
        tables = draw(6, 12, grad=False), draw(6, 12, grad=False)
        sums = {"sum_of_squares": draw(6, 2), "full_width": 144} if sharded else {}
        rotary = tables if name == "qk_norm_rope" else ()
        output = function(x, weight, *rotary, 1e-6, **sums)
        assert (output.shape, output.dtype) == (x.shape, dtype)
        wanted = [x, weight, *filter(torch.is_tensor, sums.values())]
        grads = torch.autograd.grad(output.float().sum(), wanted)
        assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in wanted]


@pytest.mark.parametrize("dtype", DTYPES)
def test_arguments_are_accepted(dtype):
    """On real tensors of the device, up to the operator library."""
    x, keys = (torch.empty(2, tokens, 3, 24, dtype=dtype, device="npu") for tokens in (7, 5))
    statistics, weight = torch.empty(2, 3, 7, 8, device="npu"), torch.empty(3, 24, device="npu")
    calls = {
        "attention": lambda: kernel("attention", dtype).function(x, keys, keys),
        "rms_norm": lambda: kernel("rms_norm", dtype).function(x, weight, 1e-6),
        # ours would first run other operators, on the log-sum-exp
        "attention_backward": lambda: torch_npu.npu_fusion_attention_grad(
            x, keys, keys, x, 3, "BSND", softmax_max=statistics, softmax_sum=statistics, attention_in=x,
            scale_value=0.2),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError) as ended:
            call()
        assert re.search(ACCEPTED, str(ended.value)), f"{name}: {ended.value}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"input_layout": "BSHD"}, "input_layout"), ({"input_layout": "BSND", "keep_prob": 1.5}, "keep_prob"),
     ({"input_layout": "TND"}, "actual_seq")],
)
def test_wrong_arguments_are_refused_here_and_by_the_stand_in(arguments, message):
    shape = (7, 3, 24) if arguments["input_layout"] == "TND" else (2, 7, 3, 24)
    x = torch.empty(shape, dtype=torch.bfloat16, device="npu")
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_fusion_attention(x, x, x, 3, **arguments)


def test_the_stand_ins_schemas_are_the_real_ones():
    source = (Path(__file__).parent / "stand_in" / "torch_npu" / "operators.py").read_text()
    scope: dict[str, object] = {}
    exec(source[source.index("SCHEMAS = {") : source.index("KERNELS")], scope)
    for name, schema in scope["SCHEMAS"].items():
        parsed = torch._C.parse_schema(f"npu::{name}{schema}")
        assert str(parsed) == str(getattr(torch.ops.npu, name).default._schema)


def test_the_device_is_found_and_set_up():
    device = resolve_device("auto")
    assert (device.name, device.backend) == ("npu", "hccl")
    assert "Ascend910B3" in device.describe() and f"torch_npu {torch_npu.__version__}" in device.describe()
    assert not torch.npu.conv.allow_hf32 and not torch.npu.matmul.allow_hf32
    device.hccl_buffer_sizes["default"] = 50
    assert device.group_options(None).hccl_config == {"hccl_buffer_size": 50}
    state = device.get_rng_state()
    device.manual_seed(5)
    device.set_rng_state(state)
    device.synchronize()
    held = torch.empty(1 << 20, device=device.torch_device)
    assert device.memory_allocated() >= held.nbytes <= device.max_memory_allocated()


def test_the_stand_ins_options_are_the_real_ones():
    real = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
    names = {"_timeout", "global_ranks_in_group", "group_id", "hccl_config", "is_high_priority_stream", "op_timeout"}
    assert names <= set(dir(real))
    with pytest.raises(AttributeError):
        real.hccl_bufer_size = 1


# MindSpeed's adaptor imports it, and our exchange of functions comes on top of its own.
TRANSFERRED = """
import threading
import torch, torch_npu
from torch_npu.contrib import transfer_to_npu
from megatron_flashi2v.runtime.device import bind_thread, resolve_device
from megatron_flashi2v.runtime.redirect import megatron_on

device = resolve_device("npu")
npu, outer = device.torch_device, torch.cuda.synchronize
assert torch.cuda is not torch.npu  # or our exchange would change what it calls
with megatron_on(device):
    assert torch.cuda.current_device() == npu and not torch.cuda.is_available()
    for made in (torch.empty(2, device="cuda"), torch.empty(2).to("cuda:0"), torch.empty(2).cuda(),
                 torch.nn.Linear(2, 2, device="meta").to_empty(device="cuda").weight):
        assert made.device == npu, made.device
    assert torch.empty(2, device="cuda").type() == "torch.cuda.FloatTensor"
    torch.cuda.synchronize()
    torch.cuda.manual_seed(3)
    torch.cuda.set_rng_state(torch.cuda.get_rng_state())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        stream.wait_stream(torch.cuda.default_stream())
    with torch.device("meta"):
        assert torch.empty(1).device.type == "meta"
    thread = threading.Thread(target=bind_thread, args=(npu,))
    thread.start()
    thread.join()
assert torch.cuda.synchronize is outer and torch.cuda.current_device() == 0
print("transferred")
"""


def test_megatrons_redirection_over_transfer_to_npu():
    command = [sys.executable, "-W", "ignore", "-c", TRANSFERRED]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.stdout.endswith("transferred\n"), done.stdout[-2000:] + done.stderr[-4000:]
