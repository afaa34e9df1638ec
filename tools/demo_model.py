"""The Llama 4 text architecture as a small training module.

Owns the forward pass used for training (experts computed only for the tokens routed to them; one
document shared by many questions) and the initial weights. It must never know the corpus or the
files. Parameter names and shapes are those of transformers' `Llama4ForCausalLM`, so `state_dict()`
is the checkpoint; `train_demo_model.py --check` compares the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F  # noqa: N812  torch's own convention
from torch import Tensor, nn


@dataclass(frozen=True)
class DemoConfig:
    """Sizes of the model; the field names are those of transformers' `Llama4TextConfig`."""

    vocab_size: int
    hidden_size: int = 192
    intermediate_size: int = 64  # routed and shared experts alike
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    # QK norm bounds a logit by sqrt(head_dim) = 8: enough to pick one token out of a chunk.
    head_dim: int = 64
    num_local_experts: int = 16
    no_rope_layers: list[int] = field(default_factory=lambda: [1, 1, 0, 1, 1, 0])
    attention_chunk_size: int = 256
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    floor_scale: int = 8192
    attn_scale: float = 0.1
    max_position_embeddings: int = 8192


@dataclass
class Batch:
    """Documents, and the questions about each laid side by side as branches of one prefix.

    A branch sees the document and itself, never another branch, and its positions go on from the
    end of the document: exactly what a conversation of one document and one question computes, with
    the document paid for once.
    """

    document: Tensor  # int64 [n_documents, document_length], padded at the end
    document_lengths: Tensor  # int64 [n_documents]
    branches: Tensor  # int64 [n_documents, branch_length]
    branch_ids: Tensor  # int64 [n_documents, branch_length]; -1 on padding
    offsets: Tensor  # int64 [n_documents, branch_length], position inside the branch
    targets: Tensor  # int64 [n_documents, branch_length]; -100 where nothing is learned
    # Of images: which document tokens they stand for, and their features [n_features, hidden].
    is_feature: Tensor | None = None  # bool [n_documents, document_length]
    features: Tensor | None = None


class _RoundToInt4(torch.autograd.Function):
    """Round to the INT4 grid forward, pass the gradient straight through backward."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, w: Tensor, group: int) -> Tensor:
        q, scale = quantise_int4(w, group)
        return (q * scale).reshape(w.shape)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def quantise_int4(w: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return codes -8..7 [..., n_groups, group] and scales [..., n_groups, 1] of `w`, as floats.

    Groups run along the last axis, the input of the linear. scale = max|w| / 7.5 as compressed-
    tensors computes it.
    """
    groups = w.detach().reshape(*w.shape[:-1], -1, group)
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).clamp_min(1e-8).bfloat16().float()
    return (groups / scale).round().clamp(-8, 7), scale


def round_to_int8(x: Tensor, block: int) -> Tensor:
    """Round activations as `compute="fast"` does, a scale for each token's `block` of inputs.

    The gradient passes straight through.
    """
    blocks = x.detach().reshape(*x.shape[:-1], -1, block)
    scale = (blocks.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
    return x + ((blocks / scale).round() * scale).reshape(x.shape) - x.detach()


class Llama4Demo(nn.Module):
    """Llama 4 text model with tied embeddings; every layer is a mixture of experts."""

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(
            _Layer(config, bool(rope)) for rope in config.no_rope_layers
        )
        self.model.norm = _RmsNorm(config)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return logits of the learned positions [n_targets, vocab] and the balance loss."""
        hidden, balance = self.hidden(batch)
        return self.head(hidden[1][batch.targets >= 0]), balance

    def head(self, hidden: Tensor) -> Tensor:
        """Return logits [n, vocab] of the residual stream [n, hidden]."""
        return self.model.norm(hidden) @ self.model.embed_tokens.weight.T

    def hidden(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Return the residual stream of documents and branches before the final norm."""
        geometry = _Geometry(batch, self.config)
        document = self.model.embed_tokens(batch.document)
        if batch.is_feature is not None and batch.features is not None:
            document = document.masked_scatter(batch.is_feature[..., None], batch.features)
        xs = (document, self.model.embed_tokens(batch.branches))
        balance = xs[0].new_zeros(())
        for layer in self.model.layers:
            xs, layer_balance = layer(xs, geometry)
            balance = balance + layer_balance
        return xs, balance / len(self.model.layers)

    def logits(
        self, tokens: Tensor, is_feature: Tensor | None = None, features: Tensor | None = None
    ) -> Tensor:
        """Return logits [n_tokens, vocab] of one plain sequence [n_tokens]."""
        n = tokens.numel()
        none = tokens.new_zeros((1, 0))
        places = None if is_feature is None else is_feature[None]
        batch = Batch(
            tokens[None], tokens.new_tensor([n]), none, none, none, none, places, features
        )
        (document, _), _ = self.hidden(batch)
        return self.head(document[0])


class _Geometry:
    """What all layers of one batch share: rotations and masks."""

    def __init__(self, batch: Batch, config: DemoConfig) -> None:
        chunk = config.attention_chunk_size
        length = batch.document.shape[1]
        positions = torch.arange(length)
        branch_positions = batch.document_lengths[:, None] + batch.offsets
        frequencies = 1.0 / config.rope_theta ** (
            torch.arange(0, config.head_dim, 2).float() / config.head_dim
        )
        self.rotations = (
            _rotation(positions[None], frequencies),
            _rotation(branch_positions, frequencies),
        )
        self.temperatures = tuple(
            1.0
            + config.attn_scale
            * torch.log1p(torch.floor((p + 1.0) / config.floor_scale))[..., None, None]
            for p in (positions[None], branch_positions)
        )
        self.chunk = chunk
        # RoPE branches look back at most one chunk from the shortest document's end: keep only that
        # window of keys.
        slack = length - int(batch.document_lengths.min())
        self.window = min(length, chunk + slack)
        same_branch = (batch.branch_ids[:, :, None] == batch.branch_ids[:, None, :]) & (
            batch.offsets[:, :, None] >= batch.offsets[:, None, :]
        )
        # Padding of a branch attends to itself alone, so that no softmax row is empty.
        inside = positions[None, None] < batch.document_lengths[:, None, None]
        see_document = inside.expand(-1, branch_positions.shape[1], -1)
        same_chunk = branch_positions[:, :, None] // chunk == branch_positions[:, None, :] // chunk
        document_chunk = see_document & (
            positions[None, None] // chunk == branch_positions[:, :, None] // chunk
        )
        self.mask_global = torch.cat([see_document, same_branch], 2)[:, None]
        self.mask_local = torch.cat(
            [document_chunk[:, :, length - self.window :], same_branch & same_chunk], 2
        )[:, None]


class _Layer(nn.Module):
    def __init__(self, config: DemoConfig, rope: bool) -> None:
        super().__init__()
        self.self_attn = _Attention(config, rope)
        self.feed_forward = _Experts(config)
        self.input_layernorm = _RmsNorm(config)
        self.post_attention_layernorm = _RmsNorm(config)

    def forward(
        self, xs: tuple[Tensor, Tensor], geometry: _Geometry
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        attended = self.self_attn(
            (self.input_layernorm(xs[0]), self.input_layernorm(xs[1])), geometry
        )
        xs = (xs[0] + attended[0], xs[1] + attended[1])
        hidden = xs[0].shape[-1]
        flat = torch.cat([xs[0].reshape(-1, hidden), xs[1].reshape(-1, hidden)])
        update, balance = self.feed_forward(self.post_attention_layernorm(flat))
        first, second = (flat + update).split([xs[0].numel() // hidden, xs[1].numel() // hidden])
        return (first.view_as(xs[0]), second.view_as(xs[1])), balance


class _RmsNorm(nn.Module):
    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class _Linear(nn.Linear):
    """A linear that can train through rounding.

    `fake_group` 0 means exact weights, `fake_block` 0 exact activations.
    """

    fake_group = 0
    fake_block = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.fake_block:
            x = round_to_int8(x, self.fake_block)
        return F.linear(
            x, _RoundToInt4.apply(self.weight, self.fake_group) if self.fake_group else self.weight
        )


class _Attention(nn.Module):
    def __init__(self, config: DemoConfig, rope: bool) -> None:
        super().__init__()
        self.config, self.rope = config, rope
        n_q, n_kv = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.q_proj = _Linear(config.hidden_size, n_q, bias=False)
        self.k_proj = _Linear(config.hidden_size, n_kv, bias=False)
        self.v_proj = _Linear(config.hidden_size, n_kv, bias=False)
        self.o_proj = _Linear(n_q, config.hidden_size, bias=False)

    def forward(self, hs: tuple[Tensor, Tensor], geometry: _Geometry) -> tuple[Tensor, Tensor]:
        q, k, v = zip(*(self._project(h, geometry, i) for i, h in enumerate(hs)), strict=True)
        repeats = self.config.num_attention_heads // self.config.num_key_value_heads
        k = [x.repeat_interleave(repeats, 1) for x in k]
        v = [x.repeat_interleave(repeats, 1) for x in v]
        length = q[0].shape[2]
        chunk = geometry.chunk
        if self.rope and length > chunk:
            document = _attend_chunks(q[0], k[0], v[0], chunk)
        else:
            document = F.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True)
        branch = q[1]
        if q[1].shape[2]:
            first = length - geometry.window if self.rope else 0
            mask = geometry.mask_local if self.rope else geometry.mask_global
            keys, values = (
                torch.cat([k[0][:, :, first:], k[1]], 2),
                torch.cat([v[0][:, :, first:], v[1]], 2),
            )
            branch = F.scaled_dot_product_attention(q[1], keys, values, attn_mask=mask)
        return tuple(self.o_proj(x.transpose(1, 2).flatten(2)) for x in (document, branch))  # type: ignore[return-value]

    def _project(self, h: Tensor, geometry: _Geometry, part: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k, v as [n_documents, n_heads, length, head_dim]."""
        dim = self.config.head_dim
        q, k, v = (
            linear(h).view(*h.shape[:2], linear.out_features // dim, dim)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.rope:
            # Weightless QK norm comes after the rotation.
            q, k = (
                F.rms_norm(
                    _rotate(x, geometry.rotations[part]), (dim,), None, self.config.rms_norm_eps
                )
                for x in (q, k)
            )
        else:
            q = q * geometry.temperatures[part]
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


class _Experts(nn.Module):
    """Top-1 routed experts plus the shared one.

    The router's sigmoid scales the *input* of the routed expert.
    """

    def __init__(self, config: DemoConfig) -> None:
        super().__init__()
        n_experts, hidden, width = (
            config.num_local_experts,
            config.hidden_size,
            config.intermediate_size,
        )
        self.router = nn.Linear(hidden, n_experts, bias=False)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.empty(n_experts, hidden, 2 * width))
        self.experts.down_proj = nn.Parameter(torch.empty(n_experts, width, hidden))
        self.shared_expert = nn.Module()
        for name, shape in {
            "gate_proj": (hidden, width),
            "up_proj": (hidden, width),
            "down_proj": (width, hidden),
        }.items():
            self.shared_expert.add_module(name, _Linear(*shape, bias=False))
        self.fake_group = self.fake_block = 0

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.router(h)
        if self.fake_block:
            h = round_to_int8(h, self.fake_block)
        best, chosen = logits.max(-1)
        order = chosen.argsort()
        counts = chosen.bincount(minlength=logits.shape[1])
        routed = (h * best.sigmoid()[:, None])[order]
        gate_up_proj, down_proj = self.experts.gate_up_proj, self.experts.down_proj
        if self.fake_group:
            gate_up_proj, down_proj = (
                _RoundToInt4.apply(w.transpose(1, 2), self.fake_group).transpose(1, 2)
                for w in (gate_up_proj, down_proj)
            )
        # Each expert's rows are one contiguous slice after the sort.
        gate_up = torch.cat(
            [x @ w for x, w in zip(routed.split(counts.tolist()), gate_up_proj, strict=True)]
        )
        gate, up = gate_up.chunk(2, -1)
        act = F.silu(gate) * up
        if self.fake_block:
            act = round_to_int8(act, self.fake_block)
        inner = act.split(counts.tolist())
        out = torch.cat([x @ w for x, w in zip(inner, down_proj, strict=True)])
        shared = self.shared_expert
        both = shared.down_proj(F.silu(shared.gate_proj(h)) * shared.up_proj(h)).index_add(
            0, order, out
        )
        # Switch-transformer balance: share of tokens times mean probability, 1 when uniform.
        share = counts.float() / h.shape[0]
        return both, (logits.softmax(-1).mean(0) * share).sum() * len(counts)


def set_fake_int4(model: Llama4Demo, group: int) -> None:
    """Make every quantised linear compute with its INT4-rounded weights (0 switches back)."""
    for module in model.modules():
        if isinstance(module, (_Linear, _Experts)):
            module.fake_group = group


def set_fake_int8(model: Llama4Demo, block: int) -> None:
    """Make every quantised linear round its inputs to int8 (0 switches back)."""
    for module in model.modules():
        if isinstance(module, (_Linear, _Experts)):
            module.fake_block = block


def _rotation(positions: Tensor, frequencies: Tensor) -> Tensor:
    angles = positions[..., None].float() * frequencies
    return torch.polar(torch.ones_like(angles), angles)[:, :, None]


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate interleaved pairs of the last axis of x [n, length, heads, head_dim]."""
    cos, sin = rotation.real, rotation.imag
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2)


def _attend_chunks(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """Causal attention inside each block of `chunk` positions.

    Padded to whole chunks, which become batch entries.
    """
    n, heads, length, dim = q.shape
    padding = -length % chunk
    q, k, v = (
        F.pad(x, (0, 0, 0, padding)).reshape(n, heads, -1, chunk, dim).transpose(1, 2).flatten(0, 1)
        for x in (q, k, v)
    )
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.unflatten(0, (n, -1)).transpose(1, 2).flatten(2, 3)[:, :, :length]


# The constructed start. Plain training sat on a plateau for longer than the whole budget before any
# lookup appeared, so a few heads begin as a working (if crude) lookup and everything, they
# included, is trained from there.
#
#   residual stream   [0, 128) identity: a random code per word stem | 128: a constant | [129, 192)
# context
#   layer 0 (RoPE)    heads 0-3 attend about 1, 2, 3 and 5 tokens back (a constant key against a
# constant query turned by
#                     that many positions) and add the identities found there, projected, into the
# context
#   layer 2 (NoPE)    query = context and identity of this token, key = context of the document's:
# finds the place whose
#                     preceding words are the ones just said, and adds the identity of the word
# there to the stream
_IDENTITY, _CONSTANT = 128, 128


@torch.no_grad()
def construct_lookup(model: Llama4Demo, stems: list[str], *, seed: int) -> None:
    """Fill `model` with small random weights and the lookup circuit.

    Args:
        model: Changed in place.
        stems: For each token its text without space and case: " Mira" and "Mira" start as nearly
            the same word.
        seed: Of all random numbers used.
    """
    generator = torch.Generator().manual_seed(seed)
    config = model.config
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            late = name.endswith(("o_proj.weight", "down_proj", "down_proj.weight"))
            parameter.normal_(0.0, 0.02 if not late else 0.008, generator=generator)
    embedding = model.model.embed_tokens.weight
    codes: dict[str, Tensor] = {}
    for token, stem in enumerate(stems):
        token_code(embedding[token], stem, codes, generator)
        embedding[token, _CONSTANT] = 0.5
    projection = torch.linalg.qr(torch.randn(_IDENTITY, 64, generator=generator))[
        0
    ].T  # [64, 128], orthonormal rows
    context = config.hidden_size - _CONSTANT - 1
    _construct_previous_words(model.model.layers[0].self_attn, projection, context)
    lookup = model.config.no_rope_layers.index(0)
    _construct_match(model.model.layers[lookup].self_attn, projection, context)


def token_code(
    row: Tensor, stem: str, codes: dict[str, Tensor], generator: torch.Generator
) -> None:
    """Write a token's identity into its embedding: mostly its stem's, which is drawn once."""
    if stem not in codes:
        codes[stem] = F.normalize(torch.randn(_IDENTITY, generator=generator), dim=0)
    own = F.normalize(torch.randn(_IDENTITY, generator=generator), dim=0)
    row[:_IDENTITY] = F.normalize(codes[stem] + 0.35 * own, dim=0)


def _construct_previous_words(attention: _Attention, projection: Tensor, context: int) -> None:
    config, dim = attention.config, attention.config.head_dim
    frequencies = config.rope_theta ** -(torch.arange(0, dim, 2).float() / dim)
    # The six fastest pairs make a peak about two tokens wide; slower ones (second pair of heads) a
    # wider one.
    for head, (offset, pairs) in enumerate(
        [(1, range(6)), (2, range(6)), (3, range(1, 8)), (5, range(2, 9))]
    ):
        group = head // (config.num_attention_heads // config.num_key_value_heads)
        for pair in pairs:
            angle = -offset * frequencies[pair]
            row = head * dim + 2 * pair
            attention.q_proj.weight[row, _CONSTANT] = torch.cos(angle)
            attention.q_proj.weight[row + 1, _CONSTANT] = torch.sin(angle)
            attention.k_proj.weight[group * dim + 2 * pair, _CONSTANT] = 1.0
        attention.v_proj.weight[group * dim : (group + 1) * dim, :_IDENTITY] = projection
        for column in range(context):
            attention.o_proj.weight[_CONSTANT + 1 + column, head * dim + column] = 0.2


def _construct_match(attention: _Attention, projection: Tensor, context: int) -> None:
    config, dim = attention.config, attention.config.head_dim
    for head in range(config.num_attention_heads):
        group = head // (config.num_attention_heads // config.num_key_value_heads)
        rows = slice(head * dim, head * dim + context)
        attention.q_proj.weight[rows, _CONSTANT + 1 :] += 1.2 * torch.eye(context)
        attention.q_proj.weight[rows, :_IDENTITY] += 1.2 * projection[:context]
        half = slice(group * 64, (group + 1) * 64)
        attention.o_proj.weight[half, head * dim : (head + 1) * dim] += 0.2 * torch.eye(64)
    for group in range(config.num_key_value_heads):
        rows = slice(group * dim, group * dim + context)
        attention.k_proj.weight[rows, _CONSTANT + 1 :] += torch.eye(context)
        attention.v_proj.weight[group * dim : (group + 1) * dim, group * 64 : (group + 1) * 64] += (
            torch.eye(64)
        )
