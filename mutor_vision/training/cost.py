"""What a training run costs, before one pays, as `mutor plan` shows it. Arithmetic on the configuration; no model is
built and nothing is measured.

FLOPs. A product of (m, k) and (k, n) counts 2 m n k. Counted are the linear layers, the head at every input, and the
two products of attention over the pairs that are computed: N (N + 1) / 2 of the causal inputs, and N + 1 for each input
that an auxiliary loss adds, for which the product with all N causal inputs is computed and those after its slot are
masked (with one at every slot a CPU skips half of that). A block that an auxiliary loss has of its own counts like one
over the causal inputs, and its targets count the unembedding. The backward pass counts twice the forward pass; a
teacher's blocks have none. Not counted are norms, rotary embedding, softmax, dropout, losses and the optimizer, which
together are some 1 % of it. Activation checkpointing runs each block's forward pass once more. The experiments count
with the same function.

Memory. Weights, gradients, AdamW's two moments and EMA are float32, with autocast too. Activations are what autograd
keeps of one micro-batch for the backward pass, tensor by tensor (`saved_per_layer`), and what the peak needs on top of
it. Logits exist for one chunk of inputs at a time. The sum is an upper bound: gradients grow while activations shrink.
Not counted is a token set that is kept on the GPU (1.2 GiB for two views of ImageNet's images).

Time is FLOPs over the assumed share (MFU) of the accelerator's dense peak.

Legend: N = h * w causal inputs, T = N and the added inputs, C width, F width of the feed-forward, V codebook size.
"""

import dataclasses
from dataclasses import dataclass

from mutor_vision.auxiliary_config import AuxiliaryCost
from mutor_vision.config import TrainConfig, TransformerConfig

GIB = 2**30
RESERVED = 0.08  # share of the memory left to the CUDA context, libraries' workspaces and fragmentation


@dataclass(frozen=True)
class Accelerator:
    """Peaks of dense products from the makers' data sheets."""

    bfloat16: float  # TFLOP/s
    float32: float  # TFLOP/s, without TF32
    memory: float  # GiB


ACCELERATORS = {
    "a100": Accelerator(312, 19.5, 80),
    "h100": Accelerator(989, 67, 80),
    "h200": Accelerator(989, 67, 141),
    "b200": Accelerator(2250, 75, 180),
    "rtx4090": Accelerator(165, 82.6, 24),
    "l40s": Accelerator(362, 91.6, 48),
}
CPU_CORE = 0.1  # TFLOP/s: two 256-bit multiply-adds a cycle at 3 GHz


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    blocks: int  # matrices of all blocks
    head: int
    embeddings: int  # of tokens, with the row of added inputs, and of classes
    norms: int

    @property
    def total(self) -> int:
        return self.blocks + self.head + self.embeddings + self.norms


def parameters(model: TransformerConfig) -> Parameters:
    c = model.dim
    return Parameters(
        blocks=model.layers * model.block_parameters,
        head=c * model.vocab_size,
        embeddings=c * (model.vocab_size + 1 + model.num_classes + 1),
        norms=c * (2 * model.layers + 1),
    )


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of the forward pass of one image."""

    blocks: int  # linear layers
    attention: int
    head: int
    own_layers: int  # of auxiliary losses, beside their blocks
    teachers: int  # of auxiliary losses, without a backward pass

    @property
    def forward(self) -> int:
        """Of what has a backward pass."""
        return self.blocks + self.attention + self.head + self.own_layers

    @property
    def training(self) -> int:
        """Forward and backward."""
        return 3 * self.forward + self.teachers


def auxiliary_cost(config: TrainConfig) -> AuxiliaryCost:
    """What all auxiliary losses add together."""
    costs = [own.cost(config.model) for own in config.auxiliaries.values()]
    return AuxiliaryCost(*(sum(column) for column in zip(AuxiliaryCost(), *costs, strict=True)))


def flops(config: TrainConfig) -> Flops:
    """Of the transformer with its auxiliary losses; what is compared by compute is compared by this."""
    model, n, count, more = config.model, config.model.num_tokens, parameters(config.model), auxiliary_cost(config)
    causal = n * (n + 1) // 2
    pairs = model.layers * (causal + more.inputs * (n + 1)) + more.blocks * causal
    return Flops(
        blocks=2 * ((n + more.inputs) * count.blocks + more.blocks * n * model.block_parameters),
        attention=2 * (2 * model.dim * pairs),
        head=2 * (n + more.targets) * count.head,
        own_layers=more.products,
        teachers=more.teacher_blocks * (2 * n * model.block_parameters + 2 * (2 * model.dim * causal)),
    )


def saved_per_layer(config: TrainConfig, added: int, width: int, on_cpu: bool, compiled: bool) -> dict[str, float]:
    """Bytes that one block keeps of one image for the backward pass, by tensor. added: inputs beside the image's
    tokens. width: bytes of the compute type, 4 or 2. The residual stream and the norms are float32 throughout. Compiled
    blocks compute anew what is cheap."""
    model, r = config.model, added
    inputs = model.num_tokens + r
    c, f = inputs * model.dim, inputs * model.ffn_dim
    # Autocast casts the feed-forward's input for each of two layers; compiled blocks compute norms anew, casts not.
    outputs = (0 if width == 4 else 2) if compiled else (2 if width == 4 else 3)
    return {
        "inputs of both norms": (4 + width) * c if compiled else 2 * 4 * c,  # the second is the first and a sum
        "inputs of qkv and of the feed-forward": outputs * width * c,
        "values": width * c,
        "rotated queries and keys": 2 * width * c,
        "output of attention": width * c,
        "sums of its softmax": 4 * model.heads * (inputs + (r if on_cpu else 0)),
        "its two parts before they are joined": width * c if r and not on_cpu else 0,  # a CPU merges them in place
        "mask of the added inputs": 0 if on_cpu else width * r * inputs,
        "masks of dropout": c * ((model.residual_dropout > 0) + (model.ffn_dropout > 0)),
        "gate, value and product": 3 * width * f,
    }


@dataclass(frozen=True)
class Memory:
    """Bytes on one accelerator, by what they are for."""

    weights: float
    gradients: float
    moments: float
    ema: float
    gathered: float  # FSDP: weights and gradients in full, of the block that is being computed and what is in none
    buffers: float  # rotary tables, averages' too
    cast_weights: float  # in the compute type, from the forward pass to the end of the backward pass
    activations: float  # kept from the forward to the backward pass
    workspace: float  # on top of them in the loss or in a block's backward pass, whichever needs more

    @property
    def total(self) -> float:
        return sum(dataclasses.astuple(self))


def memory(config: TrainConfig, gpus: int, micro_batch: int, on_cpu: bool = False) -> Memory:
    """micro_batch: images in one forward pass of one process."""
    from mutor_vision.objectives.cross_entropy import chunk_rows

    model, count, sharded = config.model, parameters(config.model), config.parallel == "fsdp" and gpus > 1
    more, width = auxiliary_cost(config), 2 if autocast(config, on_cpu) else 4
    own = more.blocks * (model.block_parameters + 3 * model.dim) + more.parameters  # of auxiliary losses
    share = 4 / (gpus if sharded else 1)
    state = share * (count.total + own)
    inputs = model.num_tokens + more.inputs
    gathered, cast_weights = 0.0, 2.0 * (count.blocks + count.head + own) if width == 2 else 0.0
    if sharded:  # weights of a block and of the one being fetched; gradients as computed and, to be summed, in float32
        block, rest = model.block_parameters, count.total - count.blocks + own
        gathered = 2 * width * block + 4 * (rest + more.teacher_parameters) + max((width + 4) * block, 8 * rest)
        cast_weights = 2.0 * count.head if width == 2 else 0.0
    compiled = config.compile == "on" or (config.compile == "auto" and not on_cpu)
    layer = sum(saved_per_layer(config, more.inputs, width, on_cpu, compiled).values())
    residual = 4 * inputs * model.dim  # bytes of the residual stream of one image
    kept = model.layers * (residual if config.activation_checkpointing else layer)
    kept += inputs * model.dim * (model.token_dropout > 0)  # its mask
    kept += more.blocks * sum(saved_per_layer(config, 0, width, on_cpu, False).values())
    kept += width * more.kept + 4 * more.kept_wide
    if r := more.inputs:  # rotary rows, and the mask that all layers share
        kept += 2 * 4 * inputs * model.head_dim + (4 * r * model.num_tokens if on_cpu and r < model.num_tokens else 0)
    # The loss: the last norm's input, output and gradient, and a copy of the added inputs that have a target; logits
    # and log-probabilities of a chunk; the head's gradient, of the chunk and of each cross-entropy.
    images = (3 + on_cpu + (r > 0) + 3 * more.blocks) * residual * micro_batch
    rows = min(micro_batch * model.num_tokens, chunk_rows(model.vocab_size, model.dim))
    in_loss = images + 8 * rows * model.vocab_size + 4 * count.head * (2 + (r > 0) + more.blocks)
    # A block's backward pass: gradients of two tensors in the feed-forward and of the residual stream.
    in_block = 2 * width * inputs * model.ffn_dim + 2 * residual + layer * config.activation_checkpointing
    return Memory(
        weights=state + share * more.teacher_parameters,
        gradients=state,
        moments=2 * state,
        ema=share * count.total * len(config.ema_decays),
        gathered=gathered,
        buffers=2 * 4 * (model.num_tokens + 1) * model.head_dim * (1 + len(config.ema_decays)),
        cast_weights=cast_weights,
        activations=micro_batch * kept,
        workspace=max(in_loss, micro_batch * in_block),
    )


def autocast(config: TrainConfig, on_cpu: bool) -> bool:
    """Whether products are computed in bfloat16, as runtime.start decides."""
    return config.precision == "bfloat16" or (config.precision == "auto" and not on_cpu)
