"""The configuration of ``flashi2v train``: one frozen dataclass per subject, flags in Megatron's spelling.

Field names are the flags' names (``micro_batch_size`` is ``--micro-batch-size``) and the recipe's keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from megatron_flashi2v.config.adapter import AdapterArguments
from megatron_flashi2v.config.bounds import Above, AtLeast, Below, Within
from megatron_flashi2v.config.clips import EncodingArguments
from megatron_flashi2v.config.convert import parse_source
from megatron_flashi2v.config.fields import HoldsPath, Named
from megatron_flashi2v.config.recipe import FlagNames
from megatron_flashi2v.config.watch import WatchArguments


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Model."""

    model: str = "tiny"
    """Preset of dimensions: tiny, 130m, 300m, 600m, 1.3b, 3b, 7b or 14b, each with a recipe in examples/recipes."""
    num_layers: Annotated[int | None, AtLeast(1)] = None
    """Override the preset's number of transformer blocks."""
    hidden_size: Annotated[int | None, AtLeast(1)] = None
    """Override the preset's width."""
    ffn_hidden_size: Annotated[int | None, AtLeast(1)] = None
    """Override the preset's feed-forward width."""
    num_attention_heads: Annotated[int | None, AtLeast(1)] = None
    """Override the preset's number of heads."""
    text_dim: Annotated[int | None, AtLeast(1)] = None
    """Override the width of the text encoder's rows."""
    text_length: Annotated[int | None, AtLeast(1)] = None
    """Override the number of text rows."""
    latent_channels: Annotated[int | None, AtLeast(1)] = None
    """Override the channels of the VAE's latents."""
    conditioning: str = "flashi2v"
    """Image-to-video paradigm: flashi2v, repeat_concat, zero_pad_concat, wan_i2v, inpainting or text_to_video."""
    image_embed_dim: Annotated[int, AtLeast(0)] = 1280
    """Width of the image encoder's rows that wan_i2v attends to, as in Wan2.1; 0 has no such branch, as in Wan2.2."""
    phi_kernel: Literal["1x3x3", "3x3x3"] = "1x3x3"
    """Kernel of FlashI2V's latent shift."""
    phi_order: Literal["conv_then_broadcast", "repeat_then_conv"] = "conv_then_broadcast"
    """Whether the shift is computed on one frame and broadcast, or on the frame repeated over time."""


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Samples, and the noise that training adds to them."""

    data_path: Annotated[tuple[str, ...], HoldsPath()] = ()
    """Folder that `flashi2v prepare` wrote, or several, each after its weight: 0.7 FOLDER 0.3 FOLDER."""
    max_bad_samples: Annotated[int, AtLeast(0)] = 100
    """Stop when more samples than this are unreadable or malformed; others replace them, and each is recorded."""
    mock_data: bool = False
    """Train on random samples of --num-frames, --height and --width instead of on --data-path, to measure a machine."""
    online_encoding: bool = False
    """Train from --annotations and video files, encoded when needed, instead of from --data-path."""
    encoding_cache: Path | None = None
    """Folder of samples that --online-encoding encoded, for later epochs and runs; several runs can share it."""
    encoding_cache_mib: Annotated[int, AtLeast(0)] = 1024
    """Memory of each rank, in MiB, for samples that --online-encoding encoded."""
    text_drop_probability: Annotated[float, Within(0, 1)] = 0.1
    """Probability of replacing a sample's text by the empty prompt, for classifier-free guidance."""
    cutoff_ratio_min: Annotated[float, Within(0, 1)] = 0.05
    """Lower end of the Fourier high-pass cutoff ratio, drawn uniformly for each sample."""
    cutoff_ratio_max: Annotated[float, Within(0, 1)] = 0.95
    """Upper end of the Fourier high-pass cutoff ratio."""
    image_noise_log_mean: float = -3.0
    """Mean of the logarithm of the noise level on the image's latents, where the paradigm adds noise."""
    image_noise_log_std: Annotated[float, AtLeast(0)] = 0.5
    """Standard deviation of that logarithm."""
    sigma_distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of sigma before the shift."""
    sigma_logit_mean: float = 0.0
    """Mean of logit(sigma)."""
    sigma_logit_std: Annotated[float, AtLeast(0)] = 1.0
    """Standard deviation of logit(sigma)."""
    sigma_shift: Annotated[float | None, Above(0)] = None
    """Fixed shift of the training sigmas; by default it follows the resolution."""
    sigma_min: Annotated[float, Within(0, 1)] = 0.0
    """Lowest noise level to train on, after the shift, such as Wan2.2's boundary for its expert of high noise."""
    sigma_max: Annotated[float, Within(0, 1)] = 1.0
    """Highest noise level to train on."""


@dataclass(frozen=True, kw_only=True)
class ParallelArguments:
    """Layout of the model and the batch over ranks."""

    tensor_model_parallel_size: Annotated[int, AtLeast(1)] = 1
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: Annotated[int, AtLeast(1)] = 1
    """Stages of the pipeline."""
    num_virtual_stages_per_pipeline_rank: Annotated[int | None, AtLeast(1)] = None
    """Stages per pipeline rank: the interleaved schedule, with a smaller bubble and more communication."""
    pipeline_layer_split: str | None = None
    """Blocks of every stage in the activation's order, such as 7,8,8,7; by default as even as can be, with fewer on
    the first and the last stage, which hold the embeddings and the head."""
    context_parallel_size: Annotated[int, AtLeast(1)] = 1
    """Ranks that share one sample's visual tokens."""
    context_parallel_algo: Literal["ulysses", "ring", "usp"] = "ulysses"
    """ulysses: trade tokens for heads around attention; ring: pass keys and values around; usp: ulysses inside ring."""
    ulysses_degree: Annotated[int | None, AtLeast(1)] = None
    """usp: neighbouring ranks that trade tokens for heads; the ring is across them."""
    sequence_parallel: bool = False
    """Shard tokens over the tensor-parallel ranks between the matrix products."""
    use_distributed_optimizer: bool = False
    """The same as --data-parallel-sharding-strategy optim, where that is not given."""
    data_parallel_sharding_strategy: Literal["no_shard", "optim", "optim_grads", "optim_grads_params"] | None = None
    """What the data-parallel and context-parallel ranks divide among them: nothing; the optimizer's state; gradients
    too; or weights too, which are gathered block by block (FSDP). By default optim with --use-distributed-optimizer,
    else no_shard."""
    num_distributed_optimizer_instances: Annotated[int, AtLeast(1)] = 1
    """Groups of ranks that each hold everything that is sharded (HSDP), such as one for each node or rack; gradients
    are summed over the groups."""
    suggested_communication_unit_size: Annotated[int | None, AtLeast(1)] = None
    """optim_grads_params: values that are reduced at once; half as many are gathered ahead. By default those of two
    blocks, so that one block is gathered ahead. optim_grads: by default 40 million."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass is still running."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass is already running."""
    distributed_timeout_minutes: Annotated[float, Above(0)] = 60.0
    """Minutes until a collective that hangs is an error; --hang-timeout-s acts earlier, and shows where it hangs."""
    distributed_backend: Literal["auto", "gloo"] = "auto"
    """auto: NCCL on CUDA, HCCL on NPUs, gloo on CPUs; gloo: anywhere, through the host's memory, to look for faults."""
    hccl_buffer_sizes: str | None = None
    """MB of HCCL's buffers by kind of group (world, tp, pp, cp, dp, dp_cp, mp, tp_cp, tp_dp_cp, and default for the
    others), such as tp:200,dp_cp:400,default:50; by default HCCL_BUFFSIZE for all."""


@dataclass(frozen=True, kw_only=True)
class BatchArguments:
    """Batch, length of the run, precision and seed."""

    micro_batch_size: Annotated[int, AtLeast(1)] = 1
    """Samples in one forward pass of one replica."""
    global_batch_size: Annotated[int, AtLeast(1)] = 1
    """Samples in one optimizer step, over all replicas and microbatches."""
    train_iters: Annotated[int, AtLeast(1)] = 100
    """Optimizer steps of the whole run."""
    seed: int = 1234
    """Key of every draw: initial weights, order, noise, sigma, cutoff ratio, text drop."""
    bf16: bool = False
    """Compute matrix products and the residual stream in bfloat16, with fp32 master weights; without it in fp32."""
    fp32_residual_connection: bool = False
    """Keep the residual stream in fp32 under --bf16."""


@dataclass(frozen=True, kw_only=True)
class OptimizerArguments:
    """Optimizer and learning-rate schedule."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """adam is AdamW."""
    lr: Annotated[float, AtLeast(0)] = 2e-5
    """Peak learning rate."""
    min_lr: Annotated[float, AtLeast(0)] = 0.0
    """Learning rate at the end of the decay."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.01
    """Decoupled weight decay; biases and 1-D tensors do not decay."""
    adam_beta1: Annotated[float, AtLeast(0), Below(1)] = 0.9
    """First moment's decay."""
    adam_beta2: Annotated[float, AtLeast(0), Below(1)] = 0.999
    """Second moment's decay."""
    adam_eps: Annotated[float, Above(0)] = 1e-8
    """Adam's epsilon."""
    sgd_momentum: Annotated[float, AtLeast(0), Below(1)] = 0.9
    """Momentum of sgd."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = "constant"
    """Shape of the schedule after the warm-up."""
    lr_decay_iters: Annotated[int | None, AtLeast(1)] = None
    """Iterations over which the rate decays; by default the whole run."""
    lr_warmup_iters: Annotated[int, AtLeast(0)] = 0
    """Iterations of linear warm-up."""
    clip_grad: Annotated[float, AtLeast(0)] = 1.0
    """Scale gradients down to this global L2 norm; adaptive methods start from it; 0 turns clipping off."""
    clip_grad_method: Literal["norm", "adaptive", "adaptive-npu"] = "norm"
    """norm: clip to --clip-grad; adaptive: clip to 3 deviations above a moving mean of norms; adaptive-npu also drops
    extreme gradients."""
    clip_grad_ema_decay: Annotated[float, AtLeast(0), Below(1)] = 0.99
    """Decay of the adaptive methods' moving mean and variance."""
    clip_grad_extreme_norm: Annotated[float, Above(0)] = 20.0
    """adaptive-npu drops no gradient of a norm below this."""
    clip_grad_rules: Literal["corrected", "reference", "reference-patch"] = "corrected"
    """Rules of adaptive-npu: as its authors meant them, or to the letter of their code (reference), or of their patch
    file (reference-patch), which never scales."""
    ema_decay: Annotated[float | None, AtLeast(0), Below(1)] = None
    """Keep an exponential moving average of the weights with this decay, such as 0.9999; by default none."""
    ema_warmup: Literal["reference", "none"] = "reference"
    """reference: update n decays by (1 + n) / (10 + n) until --ema-decay is reached; none: by --ema-decay always."""


SLOW_PHASES = 4.0
"""Times ``--hang-timeout-s`` that starting, saving and leaving may take."""


@dataclass(frozen=True, kw_only=True)
class FaultArguments:
    """Updates to skip, and ranks that hang."""

    max_skipped_updates: Annotated[int, AtLeast(0)] = 3
    """Stop after skipping more updates in a row than this: for a loss or gradient that is not finite, or a spike."""
    skip_loss_spike_factor: Annotated[float | None, Above(1)] = None
    """Skip an update whose loss exceeds this many times its running median, such as 3; off by default."""
    skip_grad_norm_spike_factor: Annotated[float | None, Above(1)] = None
    """Skip an update whose gradient norm exceeds this many times its running median, such as 10; off by default."""
    spike_window: Annotated[int, AtLeast(1)] = 128
    """Applied updates in the running medians; before that many, nothing counts as a spike."""
    hang_timeout_s: Annotated[float | None, AtLeast(0)] = None
    """End the run when an iteration takes more seconds (4 x for starting, saving and leaving), after writing the stacks
    of all ranks to stacks/ under --save; 0 never does. By default 0 with one process, and with several 600, or a fifth
    of --distributed-timeout-minutes if that is less."""


@dataclass(frozen=True, kw_only=True)
class RecomputeArguments:
    """Recomputation, which trades time for activation memory."""

    recompute_granularity: Literal["full", "skip_attention", "selective"] | None = None
    """full: keep only the input of recomputed blocks; skip_attention: keep also the inputs and outputs of
    self-attention, which is not computed again; selective: keep all but the outputs of norms, modulation and GELU."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """For full: uniform recomputes every block, in groups; block only the first blocks of each stage."""
    recompute_num_layers: Annotated[int, AtLeast(1)] = 1
    """For full: with uniform, blocks in a group; with block, recomputed blocks of each stage."""


@dataclass(frozen=True, kw_only=True)
class CheckpointArguments:
    """Saving and resuming."""

    save: Path | None = None
    """Folder for checkpoints, config.yaml and metrics.jsonl. A run goes on from the checkpoints that it holds."""
    load: Path | None = None
    """Start from another folder's newest checkpoint, or from one iter_* folder, with its optimizer and position."""
    fresh: bool = False
    """Start anew although --save holds a run: set that folder aside, whole, as SAVE.before-TIME."""
    override_opt_param_scheduler: bool = False
    """Let a resumed run change the schedule under way: learning rate, decay, warm-up, weight decay, global batch."""
    load_weights: Annotated[str | None, Named("load_weights", "FORMAT:PATH"), HoldsPath()] = None
    """Start a new run from weights, as FORMAT:PATH with a format of `flashi2v convert`, such as wan:Wan2.1-T2V-1.3B or
    megatron:runs/a, of a text-to-video or FlashI2V model, or of the run's own paradigm."""
    load_weights_kind: Literal["model", "ema"] = "model"
    """Set to take from --load-weights: the trained weights, or their moving average."""
    save_interval: Annotated[int | None, AtLeast(1)] = None
    """Iterations between checkpoints; by default only the end is saved."""
    async_save: bool = False
    """Write all checkpoints but the last while training goes on, from a copy in host memory."""
    keep_last: Annotated[int | None, AtLeast(1)] = None
    """Keep this many checkpoints, the newest; by default all. Older ones are deleted when a new one is published."""
    keep_every: Annotated[int | None, AtLeast(1)] = None
    """Besides --keep-last, keep checkpoints of iterations that are multiples of this."""
    exit_interval: Annotated[int | None, AtLeast(1)] = None
    """Save and leave when the iteration is a multiple of this, to split a run over several jobs."""
    exit_duration_minutes: Annotated[float | None, Above(0)] = None
    """Save and leave after this many minutes; SIGTERM, SIGUSR1 and Ctrl-C do the same at any time."""
    exit_code_when_unfinished: Annotated[int, Within(0, 255)] = 0
    """Exit code of a run that saved and left before --train-iters, for launchers that take 0 for finished."""

    @property
    def load_weights_source(self) -> tuple[str, Path] | None:
        """Format and path of ``load_weights``.

        Raises:
            ConfigError: it is not of that form.
        """
        return None if self.load_weights is None else parse_source("--load-weights", self.load_weights)


@dataclass(frozen=True, kw_only=True)
class BackendArguments:
    """Linears of the blocks, and their precision."""

    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Linears of the blocks: megatron-core's own, or Transformer Engine's (CUDA)."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Compute the blocks' matrix products in FP8 (Transformer Engine); hybrid: e4m3 forward, e5m2 backward."""
    fp8_recipe: Literal["tensorwise", "delayed", "mxfp8", "blockwise"] = "tensorwise"
    """How FP8 scales are found; delayed keeps a history, which checkpoints do not hold."""


@dataclass(frozen=True, kw_only=True)
class RuntimeArguments:
    """Device, kernels and progress lines."""

    device: Literal["auto", "cuda", "npu", "cpu"] = "auto"
    """Device; auto takes the first that is there."""
    attention_backend: str = "auto"
    """Implementation of attention: auto, torch_sdpa, torch_cudnn, flash_attn_4, flash_attn_3, flash_attn_2,
    transformer_engine, npu_fusion_attention, reference ... (kernels/README.md)."""
    backend: BackendArguments = field(default_factory=BackendArguments)
    use_mindspeed: bool = False
    """On NPUs, let MindSpeed, of the branch that matches megatron-core, replace parts of megatron-core."""
    deterministic: bool = False
    """Use deterministic algorithms only; an operation that has none is an error."""
    log_interval: Annotated[int, AtLeast(1)] = 1
    """Iterations between progress lines."""
    dry_run: bool = False
    """Print the resolved configuration and the parameters and tokens of each rank, and stop."""
    world_size: Annotated[int | None, AtLeast(1)] = None
    """Processes that --dry-run plans for; by default those that were started, or those of one replica."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(FlagNames):
    """Everything that a training run depends on, grouped by subject; flags and recipe keys are flat."""

    command: ClassVar[str] = "flashi2v train"
    everyday: ClassVar[tuple[str, ...]] = (
        "model", "data_path", "global_batch_size", "train_iters", "lr", "bf16", "save",
    )

    model: ModelArguments = field(default_factory=ModelArguments)
    data: DataArguments = field(default_factory=DataArguments)
    encoding: EncodingArguments = field(default_factory=EncodingArguments)
    parallel: ParallelArguments = field(default_factory=ParallelArguments)
    batch: BatchArguments = field(default_factory=BatchArguments)
    optimizer: OptimizerArguments = field(default_factory=OptimizerArguments)
    adapter: AdapterArguments = field(default_factory=AdapterArguments)
    faults: FaultArguments = field(default_factory=FaultArguments)
    recompute: RecomputeArguments = field(default_factory=RecomputeArguments)
    checkpoint: CheckpointArguments = field(default_factory=CheckpointArguments)
    runtime: RuntimeArguments = field(default_factory=RuntimeArguments)
    watch: WatchArguments = field(default_factory=WatchArguments)
