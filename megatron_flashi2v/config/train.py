"""The configuration of ``flashi2v train``: one frozen dataclass per subject, flags in Megatron's spelling.

Field names are the flags' names (``micro_batch_size`` is ``--micro-batch-size``) and the recipe's keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from megatron_flashi2v.config.clips import EncodingArguments
from megatron_flashi2v.config.convert import FORMAT_NAMES
from megatron_flashi2v.config.errors import ConfigError
from megatron_flashi2v.config.recipe import FlagNames
from megatron_flashi2v.config.watch import WatchArguments


@dataclass(frozen=True, kw_only=True)
class ModelArguments:
    """Which DiT is trained."""

    model: str = "tiny"
    """Preset of dimensions; each has a recipe of its name in examples/recipes."""
    num_layers: int | None = None
    """Override the preset's number of transformer blocks."""
    hidden_size: int | None = None
    """Override the preset's width."""
    ffn_hidden_size: int | None = None
    """Override the preset's feed-forward width."""
    num_attention_heads: int | None = None
    """Override the preset's number of heads."""
    text_dim: int | None = None
    """Override the width of the text encoder's rows."""
    text_length: int | None = None
    """Override the number of text rows."""
    latent_channels: int | None = None
    """Override the channels of the VAE's latents."""
    conditioning: str = "flashi2v"
    """Image-to-video paradigm: flashi2v, repeat_concat, zero_pad_concat, inpainting or text_to_video."""
    phi_kernel: Literal["1x3x3", "3x3x3"] = "1x3x3"
    """Kernel of FlashI2V's latent shift."""
    phi_order: Literal["conv_then_broadcast", "repeat_then_conv"] = "conv_then_broadcast"
    """Whether the shift is computed on one frame and broadcast, or on the frame repeated over time."""


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """Where the samples come from and what the flow adds to them."""

    data_path: tuple[str, ...] = ()
    """Folder written by `flashi2v prepare`, or several, each after its weight: 0.7 FOLDER 0.3 FOLDER."""
    max_bad_samples: int = 100
    """Unreadable or malformed samples that a run may fill with others before it stops; each is recorded."""
    online_encoding: bool = False
    """Train from --annotations and video files, encoded when needed, instead of --data-path."""
    encoding_cache: Path | None = None
    """Folder that keeps what --online-encoding encoded, for later epochs and runs; may be shared."""
    encoding_cache_mib: int = 1024
    """Memory of each rank, in MiB, for samples that --online-encoding encoded."""
    text_drop_probability: float = 0.1
    """Share of samples whose text is replaced by the empty prompt, for classifier-free guidance."""
    cutoff_ratio_min: float = 0.05
    """Lower end of the Fourier high-pass cutoff ratio, drawn uniformly per sample."""
    cutoff_ratio_max: float = 0.95
    """Upper end of the Fourier high-pass cutoff ratio."""
    image_noise_log_mean: float = -3.0
    """Mean of the logarithm of the noise level on the image's latents, where the paradigm adds noise."""
    image_noise_log_std: float = 0.5
    """Standard deviation of that logarithm."""
    sigma_distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    """Distribution of sigma before the shift."""
    sigma_logit_mean: float = 0.0
    """Mean of logit(sigma)."""
    sigma_logit_std: float = 1.0
    """Standard deviation of logit(sigma)."""
    sigma_shift: float | None = None
    """Fixed shift of the training sigmas; by default it follows the resolution."""


@dataclass(frozen=True, kw_only=True)
class ParallelArguments:
    """How the model and the batch are divided over ranks."""

    tensor_model_parallel_size: int = 1
    """Ranks that share each layer's matrices."""
    pipeline_model_parallel_size: int = 1
    """Stages of the pipeline."""
    num_virtual_stages_per_pipeline_rank: int | None = None
    """Stages per pipeline rank: the interleaved schedule, with a smaller bubble and more communication."""
    pipeline_layer_split: str | None = None
    """Blocks of every stage in the activation's order, such as 7,8,8,7; by default as even as can be, with fewer on
    the first and the last stage, which hold the embeddings and the head."""
    context_parallel_size: int = 1
    """Ranks that share one sample's visual tokens."""
    context_parallel_algo: Literal["ulysses", "ring", "usp"] = "ulysses"
    """ulysses: trade tokens for heads around attention; ring: pass keys and values around; usp: ulysses inside ring."""
    ulysses_degree: int | None = None
    """usp: neighbouring ranks that trade tokens for heads; the ring is across them."""
    sequence_parallel: bool = False
    """Shard tokens over the tensor-parallel ranks between the matrix products."""
    use_distributed_optimizer: bool = False
    """Shard the optimizer's state over the data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass is still running."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward pass is already running."""
    distributed_timeout_minutes: float = 60.0
    """Minutes until a collective that hangs is an error; --hang-timeout-s should tell of it before."""
    distributed_backend: Literal["auto", "gloo"] = "auto"
    """auto: NCCL on CUDA, HCCL on NPUs, gloo on CPUs; gloo: anywhere, through the host's memory, to look for faults."""
    hccl_buffer_sizes: str | None = None
    """MB of HCCL's buffers per kind of group (world, tp, pp, cp, dp, dp_cp, mp, tp_cp, tp_dp_cp, and default for those
    that are not named), such as tp:200,dp_cp:400,default:50; without it HCCL_BUFFSIZE for all."""


@dataclass(frozen=True, kw_only=True)
class BatchArguments:
    """Batch, length of the run, precision and seed."""

    micro_batch_size: int = 1
    """Samples in one forward pass of one replica."""
    global_batch_size: int = 1
    """Samples in one optimizer step, over all replicas and microbatches."""
    train_iters: int = 100
    """Optimizer steps of the whole run."""
    seed: int = 1234
    """Keys every draw: initial weights, order, noise, sigma, cutoff ratio, text drop."""
    bf16: bool = False
    """Matrix products and the residual stream in bfloat16 (fp32 master weights); fp32 without it."""
    fp32_residual_connection: bool = False
    """Keep the residual stream in fp32 under --bf16."""


@dataclass(frozen=True, kw_only=True)
class OptimizerArguments:
    """Optimizer and learning-rate schedule."""

    optimizer: Literal["adam", "sgd"] = "adam"
    """adam is AdamW."""
    lr: float = 2e-5
    """Peak learning rate."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    weight_decay: float = 0.01
    """Decoupled weight decay; biases and 1-D tensors have none."""
    adam_beta1: float = 0.9
    """First moment's decay."""
    adam_beta2: float = 0.999
    """Second moment's decay."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    sgd_momentum: float = 0.9
    """Momentum of sgd."""
    lr_decay_style: Literal["constant", "linear", "cosine", "inverse-square-root"] = "constant"
    """Shape of the schedule after the warm-up."""
    lr_decay_iters: int | None = None
    """Iterations over which the rate decays; by default the whole run."""
    lr_warmup_iters: int = 0
    """Iterations of linear warm-up."""
    clip_grad: float = 1.0
    """Global L2 norm that gradients are scaled down to, 0 turns clipping off; where adaptive methods start."""
    clip_grad_method: Literal["norm", "adaptive", "adaptive-npu"] = "norm"
    """norm: to --clip-grad; adaptive (-npu): to 3 deviations above a moving mean of norms (npu: drop extreme ones)."""
    clip_grad_ema_decay: float = 0.99
    """Decay of the adaptive methods' moving mean and variance."""
    clip_grad_extreme_norm: float = 20.0
    """Lowest norm that adaptive-npu can take for extreme; its gradient is dropped."""
    clip_grad_rules: Literal["corrected", "reference", "reference-patch"] = "corrected"
    """adaptive-npu as its authors meant it, or to the letter: reference-patch, their patch file, never scales."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, such as 0.9999; by default none is kept."""
    ema_warmup: Literal["reference", "none"] = "reference"
    """reference: update n decays by (1 + n) / (10 + n) until --ema-decay is reached; none: by --ema-decay always."""


SLOW_PHASES = 4.0
"""Times ``--hang-timeout-s`` that starting, saving and leaving may take."""


@dataclass(frozen=True, kw_only=True)
class FaultArguments:
    """Updates that must not be applied, and ranks that make no progress."""

    max_skipped_updates: int = 3
    """Updates in a row that may be skipped before the run stops: loss or gradient not finite, or a spike."""
    skip_loss_spike_factor: float | None = None
    """Skip an update whose loss is above so many times its running median, such as 3; off by default."""
    skip_grad_norm_spike_factor: float | None = None
    """Skip an update whose gradient norm is above so many times its running median, such as 10; off by default."""
    spike_window: int = 128
    """Applied updates that the running medians are taken over; nothing is a spike before there are so many."""
    hang_timeout_s: float | None = None
    """Seconds an iteration may take (4 x for starting, saving and what follows them) before the stacks of all ranks are
    written to --save's stacks/ and the run ends; 0 is never. By default never with one process, and with several 600,
    or a fifth of --distributed-timeout-minutes if that is less."""


@dataclass(frozen=True, kw_only=True)
class RecomputeArguments:
    """Trading time for activation memory."""

    recompute_granularity: Literal["full", "skip_attention", "selective"] | None = None
    """full: keep only the input of recomputed blocks; skip_attention: the input, and what self-attention takes and
    gives, which is not computed again; selective: all but the outputs of norms, modulation and GELU."""
    recompute_method: Literal["uniform", "block"] = "uniform"
    """Of full: uniform recomputes every block, in groups; block the first blocks of each stage only."""
    recompute_num_layers: int = 1
    """Of full: uniform: blocks in a group; block: blocks of each stage that are recomputed."""


@dataclass(frozen=True, kw_only=True)
class CheckpointArguments:
    """Saving and resuming."""

    save: Path | None = None
    """Folder for checkpoints, config.yaml and metrics.jsonl."""
    load: Path | None = None
    """Folder to resume from; an empty or absent one starts anew."""
    load_weights: str | None = None
    """Weights that a new run starts from, as FORMAT:PATH with a format of `flashi2v convert`, such as
    wan:Wan2.1-T2V-1.3B or megatron:runs/a: of a text-to-video or FlashI2V model, or of the run's own paradigm."""
    load_weights_kind: Literal["model", "ema"] = "model"
    """Which of the sets that --load-weights holds."""
    save_interval: int | None = None
    """Iterations between checkpoints; by default only at the end."""
    async_save: bool = False
    """Write checkpoints beside training, from a copy in host memory; all but the last of a run."""
    keep_last: int | None = None
    """Checkpoints to keep, the newest so many; by default all. Older ones go when a new one is published."""
    keep_every: int | None = None
    """Besides --keep-last, keep those of iterations that are multiples of this."""
    exit_interval: int | None = None
    """Save and leave when the iteration is a multiple of this (to split a run over several jobs)."""
    exit_duration_minutes: float | None = None
    """Save and leave, with exit code 0, after so many minutes; SIGTERM and SIGUSR1 do the same at any time."""

    @property
    def load_weights_source(self) -> tuple[str, Path] | None:
        """Format and path of ``load_weights``.

        Raises:
            ConfigError: it is not of that form.
        """
        if self.load_weights is None:
            return None
        name, colon, path = self.load_weights.partition(":")
        if not colon or not path or name not in FORMAT_NAMES:
            raise ConfigError(
                f"--load-weights is {self.load_weights!r}; give FORMAT:PATH with one of {', '.join(FORMAT_NAMES)}, "
                f"such as megatron:{path or self.load_weights}"
            )
        return name, Path(path)


@dataclass(frozen=True, kw_only=True)
class RuntimeArguments:
    """The device, kernels and what is shown."""

    device: Literal["auto", "cuda", "npu", "cpu"] = "auto"
    """auto takes the first that is there."""
    attention_backend: str = "auto"
    """Implementation of attention: auto, torch_sdpa, flash_attn_3, flash_attn_2, transformer_engine,
    npu_fusion_attention, reference ... (kernels/README.md)."""
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """Whose linears the blocks are made of: megatron-core's own, or Transformer Engine's (CUDA)."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Run the blocks' matrix products in FP8 (Transformer Engine); hybrid: e4m3 forward, e5m2 backward."""
    fp8_recipe: Literal["tensorwise", "delayed", "mxfp8", "blockwise"] = "tensorwise"
    """How FP8 scales are found; delayed keeps a history, which checkpoints do not hold."""
    use_mindspeed: bool = False
    """On NPUs: let MindSpeed, of the branch that matches megatron-core, replace parts of megatron-core."""
    deterministic: bool = False
    """Ask torch for deterministic algorithms."""
    log_interval: int = 1
    """Iterations between progress lines."""
    dry_run: bool = False
    """Print the resolved configuration and what each rank would hold, and stop."""
    world_size: int | None = None
    """Processes that --dry-run plans for; by default those that were started, or as many as one replica takes."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(FlagNames):
    """Everything that a training run depends on, grouped by subject; flags and recipe keys are flat."""

    command: ClassVar[str] = "flashi2v train"

    model: ModelArguments = field(default_factory=ModelArguments)
    data: DataArguments = field(default_factory=DataArguments)
    encoding: EncodingArguments = field(default_factory=EncodingArguments)
    parallel: ParallelArguments = field(default_factory=ParallelArguments)
    batch: BatchArguments = field(default_factory=BatchArguments)
    optimizer: OptimizerArguments = field(default_factory=OptimizerArguments)
    faults: FaultArguments = field(default_factory=FaultArguments)
    recompute: RecomputeArguments = field(default_factory=RecomputeArguments)
    checkpoint: CheckpointArguments = field(default_factory=CheckpointArguments)
    runtime: RuntimeArguments = field(default_factory=RuntimeArguments)
    watch: WatchArguments = field(default_factory=WatchArguments)
