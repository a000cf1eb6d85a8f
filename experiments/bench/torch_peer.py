"""PyTorch: `nn.Transformer`'s layers with the paper's dropout sites, eager and compiled; SDPA."""

import contextlib
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from experiments.bench.contenders import Contender
from experiments.bench.inputs import BOS, attention_inputs, tokens
from experiments.bench.workloads import Attention, Training, Workload
from tfm.config import TransformerConfig
from tfm.positions import sinusoidal_positions


def build(name: str, work: Workload, weights: Path) -> Contender:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if isinstance(work, Attention):
        return _attention(work)
    return _training(work, weights, compiled=name == "torch compile")


class Transformer(nn.Module):
    """The paper's model from PyTorch's own layers, without what the paper has not: no biases in
    the attention, no dropout within attention and feed-forward, no final norms."""

    def __init__(self, config: TransformerConfig, length: int) -> None:
        super().__init__()
        c = config
        sizes = {"d_model": c.d_model, "nhead": c.num_heads, "dim_feedforward": c.d_ff}
        options = {"dropout": c.dropout_rate, "batch_first": True, "layer_norm_eps": 1e-6}
        encoder = nn.TransformerEncoderLayer(**sizes, **options)
        decoder = nn.TransformerDecoderLayer(**sizes, **options)
        self.encoder = nn.TransformerEncoder(encoder, c.num_encoder_layers)
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
        return self.dropout(table(ids) * self.scale + self.positions)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        memory = self.encoder(self.embed(self.source_table, source))
        x = self.embed(self.target_table, target)
        y = self.decoder(x, memory, tgt_mask=self.mask, tgt_is_causal=True)
        return y @ self.target_table.weight.T

    def load(self, path: Path) -> None:
        """Takes over the parameters that `tfm.sharing.export_params` wrote."""
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


def _training(work: Training, weights: Path, compiled: bool) -> Contender:
    torch.manual_seed(0)
    model = Transformer(work.config, work.length)
    model.load(weights)
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, betas=(0.9, 0.98), eps=1e-9, fused=True)
    source, target = (torch.tensor(x) for x in tokens(work))
    target_input = functional.pad(target[:, :-1], (1, 0), value=BOS)
    bfloat16 = work.config.compute_dtype == "bfloat16"
    forward = torch.compile(model) if compiled else model

    def loss_of(forward: nn.Module) -> torch.Tensor:
        precision = torch.autocast("cpu", torch.bfloat16) if bfloat16 else contextlib.nullcontext()
        with precision:
            logits = forward(source, target_input)
        logits = logits.float().flatten(0, 1)
        return functional.cross_entropy(logits, target.flatten(), label_smoothing=0.1)

    def run() -> None:
        adam.zero_grad(set_to_none=True)
        loss_of(forward).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()

    def check() -> np.ndarray:
        model.eval()
        with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            loss = loss_of(model).numpy()
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
