"""PyTorch: `nn.Transformer`'s layers with the paper's dropout sites, eager and compiled; SDPA."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from experiments.bench.contenders import Contender
from experiments.bench.inputs import BOS, CHECKED, attention_inputs, examples, tokens
from experiments.bench.workloads import Attention, Stream, Training, Workload
from tfm.config import TransformerConfig
from tfm.positions import sinusoidal_positions


def build(name: str, work: Workload, weights: Path) -> Contender:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if isinstance(work, Attention):
        return _attention(work)
    return _training(work, weights, compiled=name == "torch compile")


class Transformer(nn.Module):
    """The paper's model from PyTorch's layers: without biases in the attention, dropout within
    attention and feed-forward, and final norms."""

    def __init__(self, config: TransformerConfig, length: int) -> None:
        super().__init__()
        c = config
        sizes = {"d_model": c.d_model, "nhead": c.num_heads, "dim_feedforward": c.d_ff}
        options = {"dropout": c.dropout_rate, "batch_first": True, "layer_norm_eps": 1e-6}
        encoder = nn.TransformerEncoderLayer(**sizes, **options)
        decoder = nn.TransformerDecoderLayer(**sizes, **options)
        self.encoder = nn.TransformerEncoder(
            encoder, c.num_encoder_layers, enable_nested_tensor=False
        )
        self.decoder = nn.TransformerDecoder(decoder, c.num_decoder_layers)
        self.target_table = nn.Embedding(c.vocab_size, c.d_model)
        self.source_table = self.target_table
        if c.source_vocab_size is not None:
            self.source_table = nn.Embedding(c.source_vocab_size, c.d_model)
        self.dropout = nn.Dropout(c.dropout_rate)
        self.scale = c.d_model**0.5
        for layer in (*self.encoder.layers, *self.decoder.layers):
            layer.dropout = nn.Identity()
            for attention in (layer.self_attn, getattr(layer, "multihead_attn", None)):
                if attention is not None:
                    attention.dropout = 0.0
                    attention.in_proj_bias = attention.out_proj.bias = None
        positions = np.asarray(sinusoidal_positions(length, c.d_model))
        self.register_buffer("positions", torch.tensor(positions))
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask)

    def embed(self, table: nn.Embedding, ids: torch.Tensor) -> torch.Tensor:
        return self.dropout(table(ids) * self.scale + self.positions[: ids.shape[1]])

    def forward(
        self, source: torch.Tensor, target: torch.Tensor, padded: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits; `padded` [B, S] says which sources' tokens are padding. Targets need no such
        mask: their padding comes last, where no token of theirs looks."""
        memory = self.encoder(self.embed(self.source_table, source), src_key_padding_mask=padded)
        x = self.embed(self.target_table, target)
        mask = self.mask[: target.shape[1], : target.shape[1]]
        y = self.decoder(
            x, memory, tgt_mask=mask, tgt_is_causal=True, memory_key_padding_mask=padded
        )
        return y @ self.target_table.weight.T

    def load(self, path: Path) -> None:
        """Takes over the parameters that `safetensors_io.export_params` wrote."""
        arrays = load_file(path)
        state = {"target_table.weight": arrays["embedding"]}
        if "source_embedding" in arrays:
            state["source_table.weight"] = arrays["source_embedding"]
        for i in range(len(self.encoder.layers)):
            parts = {"attention": "self_attn"}
            state |= _layer_state(arrays, f"encoder_{i}", f"encoder.layers.{i}", parts)
        for i in range(len(self.decoder.layers)):
            parts = {"self_attention": "self_attn", "cross_attention": "multihead_attn"}
            state |= _layer_state(arrays, f"decoder_{i}", f"decoder.layers.{i}", parts)
        missing, unexpected = self.load_state_dict(state, strict=False)
        left = set(missing) - {"positions", "mask"}
        if self.source_table is self.target_table:
            left -= {"source_table.weight"}
        if left or unexpected:
            raise ValueError(f"{path}: missing {sorted(left)}, unexpected {unexpected}")


def _layer_state(
    arrays: dict[str, torch.Tensor], ours: str, theirs: str, attentions: dict[str, str]
) -> dict[str, torch.Tensor]:
    """One layer's arrays under PyTorch's names, whose matrices are the transposes of ours."""
    state = {}
    for number, part in enumerate((*attentions, "feed_forward"), start=1):
        state[f"{theirs}.norm{number}.weight"] = arrays[f"{ours}/{part}_norm/scale"]
        state[f"{theirs}.norm{number}.bias"] = arrays[f"{ours}/{part}_norm/bias"]
    for part, module in attentions.items():
        w = {n: arrays[f"{ours}/{part}/w_{n}"].T for n in "qkvo"}
        state[f"{theirs}.{module}.in_proj_weight"] = torch.cat([w[n] for n in "qkv"])
        state[f"{theirs}.{module}.out_proj.weight"] = w["o"]
    for number in (1, 2):
        state[f"{theirs}.linear{number}.weight"] = arrays[f"{ours}/feed_forward/w{number}"].T
        state[f"{theirs}.linear{number}.bias"] = arrays[f"{ours}/feed_forward/b{number}"]
    return state


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""Source, target, and where the source is padding."""


def _batches(work: Training | Stream) -> Iterator[Batch]:
    """The training batches; the first one of a `Stream` has just the checked examples."""
    if isinstance(work, Stream):
        made = examples(work)
        yield _padded(made[:CHECKED])
        while True:
            yield from map(_padded, _buckets(made, work.rows * work.source))
    source, target = (torch.tensor(x) for x in tokens(work))
    yield from itertools.repeat((source, target, None))


def _buckets(made: list[dict[str, Any]], slots: int) -> list[list[dict[str, Any]]]:
    """Shuffled batches of examples of similar length, which reduces padding; each has at most
    `slots` tokens with its padding."""
    batches: list[list[dict[str, Any]]] = [[]]
    for example in sorted(made, key=lambda e: (len(e["source"]), len(e["target"]))):
        longest = max(len(e[side]) for e in (example, *batches[-1][-1:]) for side in e)
        if (len(batches[-1]) + 1) * longest > slots:
            batches.append([])
        batches[-1].append(example)
    order = np.random.default_rng(0).permutation(len(batches))
    return [batches[i] for i in order]


def _padded(batch: list[dict[str, Any]]) -> Batch:
    source, target = (
        nn.utils.rnn.pad_sequence([torch.tensor(e[side]).long() for e in batch], batch_first=True)
        for side in ("source", "target")
    )
    return source, target, source == 0


def fused_adam(model: nn.Module) -> torch.optim.Adam:
    """The paper's Adam (§5.3), at a fixed rate."""
    return torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-9, fused=True)


def smoothed_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean label-smoothed cross-entropy of the tokens that are not padding, in f32."""
    logits = logits.float().flatten(0, 1)
    return functional.cross_entropy(logits, target.flatten(), label_smoothing=0.1, ignore_index=0)


def _training(work: Training | Stream, weights: Path, compiled: bool) -> Contender:
    torch.manual_seed(0)
    batches, length = _batches(work), work.length if isinstance(work, Training) else work.source
    model = Transformer(work.config, length)
    model.load(weights)
    adam = fused_adam(model)
    bfloat16 = work.config.compute_dtype == "bfloat16"
    forward = torch.compile(model, dynamic=isinstance(work, Stream)) if compiled else model
    first = next(batches)

    def loss_of(forward: nn.Module, batch: Batch) -> torch.Tensor:
        source, target, padded = batch
        target_input = functional.pad(target[:, :-1], (1, 0), value=BOS)
        precision = torch.autocast("cpu", torch.bfloat16) if bfloat16 else contextlib.nullcontext()
        with precision:
            logits = forward(source, target_input, padded)
        return smoothed_loss(logits, target)

    def run() -> int:
        batch = next(batches)
        adam.zero_grad(set_to_none=True)
        loss_of(forward, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        return sum(int(side.count_nonzero()) for side in batch[:2])

    def check() -> np.ndarray:
        model.eval()
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = loss_of(model, first).numpy()
        model.train()
        return loss

    return Contender(run, check)


def _attention(work: Attention) -> Contender:
    inputs = [torch.tensor(x) for x in attention_inputs(work, "BHLD")]

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return functional.scaled_dot_product_attention(*inputs)

    def both() -> None:
        leaves = [x.detach().requires_grad_() for x in inputs]
        (functional.scaled_dot_product_attention(*leaves) ** 2).sum().backward()

    return Contender(both if work.backward else forward, lambda: forward().numpy())
