"""The transformer itself: Llama, Mistral, Yi, Qwen2, Qwen3 and Falcon over flat batches and a paged KV cache."""

import torch
import torch.nn.functional as F

from engine.attention.backend import BatchAttention
from engine.device_inputs import DeviceInputs
from engine.layers import Layer, take_layer, take_norm
from engine.model_config import ModelConfig
from engine.ops import Ops
from engine.rope import rope_tables
from engine.shard import SINGLE, WHOLE, Collectives, Shard
from engine.weights import Weights


class Transformer:
    """A shard of a decoder-only model; `weights` (of engine.weights) are emptied into it, so that none is held twice.

    `max_model_tokens` is the longest sequence that `forward` will be given, `ops` are the kernels of the device that
    the weights lie on, `collectives` joins the tensor ranks of this stage. Raises ValueError when the ranks cannot
    share the heads.
    """

    def __init__(
        self,
        model: ModelConfig,
        weights: Weights,
        max_model_tokens: int,
        ops: Ops,
        shard: Shard = WHOLE,
        collectives: Collectives = SINGLE,
    ) -> None:
        self.model, self.ops, self.shard, self.collectives = model, ops, shard, collectives
        self.n_heads = len(shard.heads(model.num_attention_heads))
        self.n_kv_heads = len(shard.kv_heads(model.num_key_value_heads))
        self.layers = [take_layer(weights, layer, model, ops) for layer in shard.layers(model.num_hidden_layers)]
        some_weight = self.layers[0].qkv.weight
        self.dtype, self.device = some_weight.dtype, some_weight.device
        self.cos, self.sin = (
            table.to(self.device) for table in rope_tables(model.rope, model.head_dim, max_model_tokens, self.dtype)
        )
        if shard.is_first:
            self.embedding = weights.pop("embedding.weight")
        if shard.is_last:
            self.norm = take_norm(weights, "norm", model, ops)
            tied_here = model.tie_word_embeddings and shard.is_first
            self.head = self.embedding.t() if tied_here else weights.pop("head.weight")

    def forward(
        self, inputs: DeviceInputs, attention: BatchAttention, hidden: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits [sampled tokens, vocab] from the last stage, hidden states [tokens, hidden] from the others.

        `hidden` is what the stage before returned, None in the first; it is overwritten. May be captured in a CUDA
        graph: shapes depend on the shapes of `inputs` alone, and the host waits for nothing.
        """
        residual = self._embed(inputs.token_ids) if hidden is None else hidden
        cos, sin = self.cos.index_select(0, inputs.positions), self.sin.index_select(0, inputs.positions)
        # What the layer before yields is added to the residual by the next norm, which reads it anyway.
        y: torch.Tensor | None = None
        for index, layer in enumerate(self.layers):
            x = layer.input_norm(residual, y)
            attended = self._attend(index, layer, x, cos, sin, inputs, attention)
            if self.shard.is_last and index == len(self.layers) - 1:
                # From here on no token reads another, so only those that yield a logit go on.
                if len(inputs.sampled) == 0:
                    return residual.new_empty((0, self.model.vocab_size))
                residual, attended, x = (tokens.index_select(0, inputs.sampled) for tokens in (residual, attended, x))
            y = self._join(layer, residual, attended, x)
        assert y is not None
        return self._logits(residual, y) if self.shard.is_last else residual.add_(y)

    def multiply(self, n_tokens: int, *, sampled: bool) -> None:
        """Multiply with each kind of matrix as a step of so many tokens does, the head's if so many may be sampled."""
        layer, x = self.layers[-1], torch.zeros(n_tokens, self.model.hidden_size, dtype=self.dtype, device=self.device)
        layer.qkv(x)
        y, attended = self._mlp(layer, x), x.new_zeros(n_tokens, self.n_heads * self.model.head_dim)
        if self.model.parallel_attention:
            layer.o.add_to(y, attended)
        else:
            layer.o(attended)
        if sampled and self.shard.is_last:
            torch.mm(x, self.head)

    def _embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        if self.shard.tp_size == 1:
            return self.embedding.index_select(0, token_ids)
        ids = self.shard.vocabulary(self.model.vocab_size)
        elsewhere = (token_ids < ids.start) | (token_ids >= ids.stop)
        rows = (token_ids - ids.start).masked_fill_(elsewhere, 0)
        embedded = self.embedding.index_select(0, rows).masked_fill_(elsewhere[:, None], 0.0)
        self.collectives.all_reduce(embedded)
        return embedded

    def _attend(
        self,
        index: int,
        layer: Layer,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        inputs: DeviceInputs,
        attention: BatchAttention,
    ) -> torch.Tensor:
        """[tokens, heads * head_dim]; `index` is the layer's place in this stage, `x` its normed input."""
        q = self.ops.rotate_and_store(
            layer.qkv(x),
            cos,
            sin,
            attention.cache[index],
            inputs.kv_slots,
            self.n_heads,
            self.n_kv_heads,
            layer.head_norms,
        )
        return attention.attend(index, q)

    def _join(self, layer: Layer, residual: torch.Tensor, attended: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The rest of a layer: what is still to be added to the residual."""
        if self.model.parallel_attention:
            y = self._mlp(layer, x if layer.mlp_norm is None else layer.mlp_norm(residual))
            layer.o.add_to(y, attended)
        else:
            assert layer.mlp_norm is not None
            attention_y = layer.o(attended)
            self.collectives.all_reduce(attention_y)
            y = self._mlp(layer, layer.mlp_norm(residual, attention_y))
        self.collectives.all_reduce(y)
        return y

    def _mlp(self, layer: Layer, x: torch.Tensor) -> torch.Tensor:
        inner = layer.up(x)
        return layer.down(self.ops.silu_and_mul(inner) if self.model.gated_mlp else F.gelu(inner))

    def _logits(self, residual: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits = self.collectives.all_gather(torch.mm(self.norm(residual, y), self.head))
        return logits[:, : self.model.vocab_size]
