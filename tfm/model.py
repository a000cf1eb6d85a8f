"""§3 The Transformer of Figure 1, as a linen module.

`model.apply(variables, ...)` is the functional model. Modules hold no state: the decoding cache
goes in and comes out, attention weights are a second output, dropout draws from a key that someone
passes (None means no dropout).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from tfm.cache import Cache, LayerCache, Memory, SharedCache
from tfm.config import TransformerConfig
from tfm.dropout import dropout, site_key
from tfm.embedding import embed, output_logits
from tfm.functions import Functions, call, own_module
from tfm.kernels.quantization import Quantized
from tfm.masks import causal_mask, padding_mask, segment_mask
from tfm.parallel.sharding import constrain, gather_for_compute
from tfm.shapes import as_ids, assert_broadcasts, assert_fits, assert_ids, nan_unless, with_axes
from tfm.stack import LAYERS, REMAT_LAYERS, apply_stack
from tfm.sublayers import INITIALIZERS, LayerNorm

HeadMasks = dict[str, Array]
"""What each head's output is multiplied by: 'encoder', 'decoder', 'cross' -> [N, H]; optional."""


def one_sequence(tokens: Array) -> Array:
    """The segment ids of rows that hold one sequence each: 1, and 0 where the token is padding."""
    return (tokens != 0).astype(jnp.int32)


def numbered(positions: Array | None, tokens: Array) -> Array:
    """The positions of tokens [..., L] with as many axes; 0, 1, … where none are given."""
    positions = jnp.arange(tokens.shape[-1]) if positions is None else positions
    return with_axes(positions, tokens.ndim)


def layer_keys(key: Array | None, number: int) -> list[Array | None]:
    """The dropout key of each layer; site 0 is that of the embeddings."""
    return [site_key(key, 1 + i) for i in range(number)]


class Transformer(nn.Module):
    """The encoder-decoder of Figure 1.

    Tokens are integers in [0, V); 0 is padding. A packed row holds several sequences: its segment
    ids number them from 1 (0 = padding) and its positions start at 0 in each. Without them a row
    is one sequence, and padding is where the token is 0.
    """

    config: TransformerConfig
    functions: Functions = Functions()

    def setup(self) -> None:
        c, f = self.config, self.functions
        if not isinstance(f, Functions):
            given = getattr(f, "__name__", type(f).__name__)
            raise TypeError(f"functions must be a tfm.Functions(…), not {given}")
        if c.compute_dtype == "auto":
            raise ValueError("compute_dtype='auto': decide it with config.for_platform('cpu')")
        self.target_table = self._table("embedding", c.vocab_size)
        self.source_table = self.target_table
        if c.source_vocab_size is not None:
            self.source_table = self._table("source_embedding", c.source_vocab_size)
        if c.positions == "learned":
            self.learned = {
                n: self._table(f"{n}_positions", c.max_learned_positions)
                for n in ("source", "target")
            }
        if not c.tied_output:
            self._output()
        if c.output_bias:
            self.bias = self.param("output_bias", nn.initializers.zeros, (c.padded(c.vocab_size),))
        self.own_positions = own_module(self, "sinusoidal_positions")
        encoder, decoder = REMAT_LAYERS if c.rematerialize == "layers" else LAYERS
        self.encoder = [encoder(c, f) for _ in range(c.num_encoder_layers)]
        self.decoder = [decoder(c, f) for _ in range(c.num_decoder_layers)]
        if c.has_final_norm:
            self.encoder_norm, self.decoder_norm = LayerNorm(c, f), LayerNorm(c, f)

    def _table(self, name: str, rows: int) -> Array:
        """A table of embeddings, or of learned positions."""
        c = self.config
        rows = rows if name.endswith("positions") else c.padded(rows)
        init = nn.initializers.normal(c.d_model**-0.5)
        return gather_for_compute(name, self.param(name, init, (rows, c.d_model)))

    def _output(self) -> None:
        """The output's own matrix; drawn as if nothing were padded."""
        c = self.config

        def drawn(key: Array, shape: tuple[int, int]) -> Array:
            words = INITIALIZERS[c.initializer](key, (c.d_model, c.vocab_size))
            return jnp.pad(words, [(0, 0), (0, shape[1] - c.vocab_size)])

        if not isinstance(self.get_variable("params", "output"), Quantized):
            self.param("output", drawn, (c.d_model, c.padded(c.vocab_size)))

    def _embed(
        self, side: str, ids: Array, positions: Array | None, dropout_key: Array | None
    ) -> Array:
        """Dropout(E(id)·√d_model + PE(position)): [..., L] -> [..., L, D]."""
        c = self.config
        if positions is not None:
            assert_broadcasts(f"{side}_positions", positions, ids.shape)
        table = self.source_table if side == "source" else self.target_table
        words = (side == "source" and c.source_vocab_size) or c.vocab_size
        assert_ids(side, ids, words)
        ids = as_ids(ids)
        if words < len(table):  # the rows beyond are no words: NaN, as all ids outside
            ids = jnp.where(ids < words, ids, len(table))
        x = embed(ids, table, scale=c.scale_embeddings, implementation=c.implementation)
        length = ids.shape[-1]
        if positions is not None and c.first_position:
            # A negative position stays one, which is invalid.
            positions = as_ids(positions)
            positions = jnp.where(positions < 0, positions, c.first_position + positions)
        if c.positions == "learned":
            if positions is None:
                self._check_length(side, length)
                positions = c.first_position + jnp.arange(length)
            rows = self.learned[side].at[positions].get(mode="fill", wrap_negative_indices=False)
        else:
            up_to = c.first_position + length if positions is None else positions
            layout = {} if c.sinusoid_layout == "interleaved" else {"layout": c.sinusoid_layout}
            leading = (c.first_position + length,) if positions is None else positions.shape
            shape = *leading, c.d_model
            arguments = up_to, c.d_model
            rows = call(self, "sinusoidal_positions", arguments, shape, self.own_positions, layout)
            rows = rows[c.first_position :] if positions is None else rows
        x += with_axes(rows, x.ndim)
        x = x if dropout_key is None else dropout(dropout_key, x, c.dropout_rate)
        return self.source_embedded(x) if side == "source" else self.target_embedded(x)

    def source_embedded(self, x: Array) -> Array:
        """What goes into the first layer of the encoder [..., S, D], as it is."""
        return x

    def target_embedded(self, x: Array) -> Array:
        """What goes into the first layer of the decoder [..., T, D], as it is."""
        return x

    def _check_length(self, side: str, length: int) -> None:
        """Raises ValueError where the learned positions are too few for `length`."""
        c = self.config
        if not isinstance(length, int):  # symbolic, of `jax.export`; NaN where it is too much
            return
        if c.positions == "learned" and c.first_position + length > c.max_learned_positions:
            first = f" from {c.first_position} on" if c.first_position else ""
            raise ValueError(
                f"{side} has {length} positions{first}, more than "
                f"max_learned_positions={c.max_learned_positions}"
            )

    def _head_masks(
        self, head_masks: HeadMasks | None, kind: str, layers: int
    ) -> Array | list[None]:
        """The [N, H] masks of one kind of attention, or N times None."""
        head_masks = head_masks or {}
        if unknown := head_masks.keys() - {"encoder", "decoder", "cross"}:
            raise ValueError(f"head_masks has {sorted(unknown)}, not encoder, decoder or cross")
        if kind not in head_masks:
            return [None] * layers
        assert_fits(f"head_masks[{kind!r}]", head_masks[kind], (layers, self.config.num_heads))
        return head_masks[kind]

    def logits(self, y: Array) -> Array:
        """The decoder's output [..., D] -> logits [..., V], −∞ beyond the vocabulary."""
        c = self.config
        bias = self.bias if c.output_bias else None
        output: Any = self.get_variable("params", "output")  # not tied, or of `tfm.quantize`
        w: Any = self.target_table.T if output is None else output
        if output is not None and not isinstance(output, Quantized):
            w = gather_for_compute("output", output)
        logits = output_logits(
            y, w, bias, compute_dtype=c.compute_dtype, implementation=c.implementation
        )
        logits = constrain(logits, "batch", None, "vocabulary")
        if logits.shape[-1] == c.vocab_size:
            return logits
        words = with_axes(jnp.arange(logits.shape[-1]), logits.ndim)
        return jnp.where(words < c.vocab_size, logits, -jnp.inf)

    def encode(
        self,
        source: Array,
        source_segment_ids: Array | None = None,
        source_positions: Array | None = None,
        *,
        dropout_key: Array | None = None,
        head_masks: HeadMasks | None = None,
        return_weights: bool = False,
    ) -> tuple[Array, Array | None]:
        """[..., S] ids -> [..., S, D], and with `return_weights` [N, ..., H, S, S]."""
        assert_fits("source", source, (..., None))
        segments = one_sequence(source) if source_segment_ids is None else source_segment_ids
        assert_fits("source_segment_ids", segments, source.shape, source=source)
        mask = segment_mask(segments, segments)
        x = self._embed("source", source, source_positions, site_key(dropout_key, 0))
        heads = self._head_masks(head_masks, "encoder", len(self.encoder))
        context = mask, numbered(source_positions, source)
        own = layer_keys(dropout_key, len(self.encoder)), heads
        x, (weights,) = apply_stack(self.encoder, x, context, own, return_weights)
        return self.encoder_norm(x) if self.config.has_final_norm else x, weights

    def decode(
        self,
        encoded: Array,
        target: Array,
        source_segment_ids: Array,
        target_segment_ids: Array,
        target_positions: Array | None = None,
        source_positions: Array | None = None,
        *,
        dropout_key: Array | None = None,
        head_masks: HeadMasks | None = None,
        return_weights: bool = False,
    ) -> tuple[Array, Array | None, Array | None]:
        """Decoder inputs [..., T] -> the last layer's output [..., T, D], and with `return_weights`
        [N, ..., H, T, T] and [N, ..., H, T, S]."""
        assert_fits("target", target, (..., None))
        assert_fits("target_segment_ids", target_segment_ids, target.shape, target=target)
        mask = segment_mask(target_segment_ids, target_segment_ids)
        mask &= with_axes(causal_mask(target.shape[-1]), mask.ndim)
        cross_mask = segment_mask(target_segment_ids, source_segment_ids)
        x = self._embed("target", target, target_positions, site_key(dropout_key, 0))
        heads = [
            self._head_masks(head_masks, kind, len(self.decoder)) for kind in ("decoder", "cross")
        ]
        positions = numbered(target_positions, target)
        sources = numbered(source_positions, source_segment_ids)
        context = encoded, mask, cross_mask, positions, sources
        own = layer_keys(dropout_key, len(self.decoder)), *heads
        x, (weights, cross_weights) = apply_stack(self.decoder, x, context, own, return_weights)
        x = self.decoder_norm(x) if self.config.has_final_norm else x
        return x, weights, cross_weights

    def __call__(
        self,
        source: Array,
        target: Array,
        *,
        source_segment_ids: Array | None = None,
        source_positions: Array | None = None,
        target_segment_ids: Array | None = None,
        target_positions: Array | None = None,
        dropout_key: Array | None = None,
        head_masks: HeadMasks | None = None,
        return_weights: bool = False,
        return_features: bool = False,
    ) -> Array | tuple[Array, dict[str, Any]]:
        """Logits of the next target token at each position.

        Args:
          source: [..., S] ids.
          target: [..., T] ids of the decoder's input: the labels, shifted right (`shift_right`).
          source_segment_ids, source_positions: [..., S]; target_segment_ids, target_positions:
            [..., T]; see the class.
          dropout_key: a PRNG key; None means no dropout.
          head_masks: see `HeadMasks`.
          return_weights: also return the attention weights.
          return_features: return the decoder's output [..., T, D], of which `logits` makes logits,
            in the place of the logits.

        Returns:
          logits [..., T, V]; with `return_weights` also {'encoder': [N, ..., H, S, S],
          'decoder': [N, ..., H, T, T], 'cross': [N, ..., H, T, S]}.

        Raises:
          AssertionError: shapes that do not fit; the message names the argument and both shapes.
          ValueError: more positions than learned ones, an id outside the vocabulary, or an unknown
            kind of head mask.
        """
        assert_fits("target", target, (*source.shape[:-1], None), source=source)
        return_weights = bool(return_weights)
        if source_segment_ids is None:
            source_segment_ids = one_sequence(source)
        if target_segment_ids is None:
            target_segment_ids = one_sequence(target)
        encoded, encoder_weights = self.encode(
            source,
            source_segment_ids,
            source_positions,
            dropout_key=site_key(dropout_key, 0),
            head_masks=head_masks,
            return_weights=return_weights,
        )
        y, weights, cross_weights = self.decode(
            encoded,
            target,
            source_segment_ids,
            target_segment_ids,
            target_positions,
            source_positions,
            dropout_key=site_key(dropout_key, 1),
            head_masks=head_masks,
            return_weights=return_weights,
        )
        output = y if return_features else self.logits(y)
        if not return_weights:
            return output
        return output, {"encoder": encoder_weights, "decoder": weights, "cross": cross_weights}

    def start(self, source: Array, num_hypotheses: int, max_length: int) -> tuple[Memory, Cache]:
        """Encodes the source and makes an empty cache, for `step`.

        source: [B, S] ids -> memory, and a cache of W = num_hypotheses rows and T = max_length
        positions.
        """
        c = self.config
        assert_fits("source", source, (None, None))
        if num_hypotheses < 1 or max_length < 1:
            raise ValueError(f"{num_hypotheses=} and {max_length=} must be at least 1")
        self._check_length("target", max_length)
        encoded, _ = self.encode(source)
        memory = tuple(layer.memory(encoded) for layer in self.decoder)
        batch, written = source.shape[0], max_length * num_hypotheses
        shape = (batch, c.num_heads, written, c.d_model // c.num_heads)
        zeros = jnp.zeros(shape, memory[0].value.dtype)
        layers = tuple(LayerCache(jnp.swapaxes(zeros, -1, -2), zeros) for _ in self.decoder)
        rows = jnp.zeros((batch, num_hypotheses, max_length), jnp.int32)
        return Memory(memory, padding_mask(source)), Cache(rows, SharedCache(layers))

    def step(
        self, memory: Memory, tokens: Array, index: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        """One step at position `index` for tokens [B, W] -> logits [B, W, V] and the cache."""
        x = self._embed("target", tokens[..., None], jnp.asarray(index)[None], None)[..., 0, :]
        batch, width, length = cache.rows.shape
        row = jnp.arange(width, dtype=cache.rows.dtype)
        position = with_axes(jnp.arange(length), 3)
        rows = jnp.where(position == index, row[None, :, None], cache.rows)
        written_by = rows[..., None] == with_axes(row, 4)  # [B, W hypotheses, T, W rows]
        mask = written_by & (position <= index)[..., None]
        mask = mask.reshape(batch, 1, width, length * width)
        new = []
        for layer, layer_cache, layer_memory in zip(
            self.decoder, cache.written.layers, memory.layers, strict=True
        ):
            x, written = layer.step(x, index, layer_cache, mask, layer_memory, memory.mask)
            new.append(written)
        x = self.decoder_norm(x) if self.config.has_final_norm else x
        # Beyond the cache there is no room: NaN, since another position has been overwritten.
        logits = nan_unless((index >= 0) & (index < length), self.logits(x))
        return logits, Cache(rows, SharedCache(tuple(new)))
