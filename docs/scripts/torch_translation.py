"""`torch.nn.Transformer` as a translation model, its batches and its training."""

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from experiments.data.token_store import Side, Store
from experiments.training.config import TrainingConfig
from tfm.config import TransformerConfig
from tfm.positions import sinusoidal_positions

MODES = {"float32": contextlib.nullcontext,
         "bfloat16": lambda: torch.autocast("cpu", torch.bfloat16)}  # fmt: skip
WARM_UP = 2  # steps of each mode that are not timed

Batch = tuple[torch.Tensor, torch.Tensor]
"""int64 [n, longest] source and target, padded with 0."""


class Peer(nn.Module):
    """`torch.nn.Transformer` with what it lacks: embeddings, positions and the output, tied."""

    def __init__(self, config: TransformerConfig, length: int) -> None:
        super().__init__()
        c = config
        self.transformer = nn.Transformer(
            c.d_model, c.num_heads, c.num_encoder_layers, c.num_decoder_layers, c.d_ff,
            c.dropout_rate, layer_norm_eps=c.layer_norm_epsilon, batch_first=True,
        )  # fmt: skip
        for layer in (*self.transformer.encoder.layers, *self.transformer.decoder.layers):
            # torch has one rate for all places; these are the two that the paper does not name.
            layer.dropout.p = c.activation_dropout_rate
            for attention in (layer.self_attn, getattr(layer, "multihead_attn", None)):
                if attention is not None:
                    attention.dropout = c.attention_dropout_rate
        self.embedding = nn.Embedding(c.vocab_size, c.d_model)
        nn.init.normal_(self.embedding.weight, std=c.d_model**-0.5)
        self.dropout = nn.Dropout(c.dropout_rate)
        positions = torch.tensor(np.asarray(sinusoidal_positions(length, c.d_model)))
        self.register_buffer("positions", positions, persistent=False)
        mask = nn.Transformer.generate_square_subsequent_mask(length)
        self.register_buffer("mask", mask, persistent=False)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        scaled = self.embedding(ids) * self.embedding.embedding_dim**0.5
        return self.dropout(scaled + self.positions[: ids.shape[1]])

    def forward(self, source: torch.Tensor, target_input: torch.Tensor) -> torch.Tensor:
        """Logits [n, T, V]. Targets need no mask of padding: it comes last, where none looks."""
        padded, length = source == 0, target_input.shape[1]
        y = self.transformer(
            self.embed(source), self.embed(target_input), src_key_padding_mask=padded,
            memory_key_padding_mask=padded, tgt_mask=self.mask[:length, :length],
            tgt_is_causal=True,
        )  # fmt: skip
        return y @ self.embedding.weight.T

    def loss(self, batch: Batch, bos: int, smoothing: float, reduction: str) -> torch.Tensor:
        """Cross-entropy of the target's tokens, padding left out: their mean or sum."""
        source, target = batch
        logits = self(source, functional.pad(target[:, :-1], (1, 0), value=bos)).float()
        return functional.cross_entropy(
            logits.flatten(0, 1), target.flatten(), ignore_index=0, label_smoothing=smoothing,
            reduction=reduction,
        )  # fmt: skip


# ---- batches


def bucketed(
    lengths: np.ndarray, slots: tuple[int, int], rng: np.random.Generator
) -> list[np.ndarray]:
    """Batches of pairs of nearly one length, padded each side within its slots, in random order.

    lengths: [N, 2] of sources and targets. Ties in length are parted anew at each call.
    """
    order = rng.permutation(len(lengths))
    order = order[np.lexsort(lengths[order].T)]  # by target, then by source
    batches, start, longest = [], 0, np.zeros(2, np.int64)
    for end, pair in enumerate(order):
        grown = np.maximum(longest, lengths[pair])
        if end > start and ((end + 1 - start) * grown > slots).any():
            batches.append(order[start:end])
            start, grown = end, lengths[pair]
        longest = grown
    batches.append(order[start:])
    return [batches[i] for i in rng.permutation(len(batches))]


def padded(sides: tuple[Side | Sequence, Side | Sequence], pairs: np.ndarray) -> Batch:
    """The chosen pairs of (sources, targets), each side as wide as its longest."""
    source, target = (
        nn.utils.rnn.pad_sequence(
            [torch.from_numpy(np.array(side[i], np.int64)) for i in pairs], batch_first=True
        )
        for side in sides
    )
    return source, target


def endless(store: Store, slots: tuple[int, int], seed: int) -> Iterator[Batch]:
    """Batches of all pairs, parted anew for each epoch."""
    rng, every = np.random.default_rng(seed), np.arange(len(store))
    lengths = np.stack([store.source.lengths(every), store.target.lengths(every)], axis=1)
    while True:
        for pairs in bucketed(lengths, slots, rng):
            yield padded((store.source, store.target), pairs)


# ---- training


class Learner:
    """The model with its optimizer: a step at a time, in one mode."""

    def __init__(self, model: Peer, config: TrainingConfig, bos: int, mode: str) -> None:
        self.model, self.config, self.bos, self.mode = model, config, bos, MODES[mode]
        self.adam = torch.optim.Adam(
            model.parameters(), lr=0.0, betas=(0.9, 0.98), eps=1e-9, fused=True
        )

    def step(self, batch: Batch, rate: float) -> float:
        """One update; the smoothed loss. RuntimeError where the gradient is not finite."""
        self.adam.param_groups[0]["lr"] = rate
        self.adam.zero_grad(set_to_none=True)
        with self.mode():
            loss = self.model.loss(batch, self.bos, self.config.smoothing, "mean")
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip, error_if_nonfinite=True)
        self.adam.step()
        return float(loss.detach())


def steps_per_second(
    model: Peer, config: TrainingConfig, bos: int, batches: Sequence[Batch]
) -> dict[str, float]:
    """{mode: steps per second} of copies of the model, in turn on the same batches: the median."""
    learners = {mode: Learner(copy.deepcopy(model), config, bos, mode) for mode in MODES}
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    for batch in batches:
        for mode, learner in learners.items():
            begin = time.perf_counter()
            learner.step(batch, 1e-6)
            seconds[mode].append(time.perf_counter() - begin)
    return {mode: 1 / float(np.median(taken[WARM_UP:])) for mode, taken in seconds.items()}


def make_valid_loss(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], slots: tuple[int, int], bos: int
) -> Callable[[Peer], float]:
    """model -> nats a target token, without smoothing and dropout, in f32, as our runs log it."""
    sides = tuple(zip(*pairs, strict=True))
    lengths = np.array([[len(side) for side in pair] for pair in pairs])
    batches = [padded(sides, some) for some in bucketed(lengths, slots, np.random.default_rng(0))]

    @torch.no_grad()
    def valid_loss(model: Peer) -> float:
        model.eval()
        total = sum(float(model.loss(batch, bos, 0.0, "sum")) for batch in batches)
        model.train()
        return total / int(lengths[:, 1].sum())

    return valid_loss


def train(
    learner: Learner, batches: Iterator[Batch], valid_loss: Callable[[Peer], float],
    seconds: float, every: float, best: Path,
) -> dict[str, Any]:  # fmt: skip
    """Trains for so many seconds; the weights of the lowest validation loss stay in `best`.

    There is an evaluation after each `every` seconds of training, and at the end; the clock stands
    still meanwhile. Returns `steps`, `train_seconds`, `tokens` (of sources, of targets),
    `share_of_slots` that are no padding, and `curve`, a line for each evaluation.
    """
    rate, steps_asked = jax.jit(learner.config.make_learning_rate()), learner.config.steps
    spent, steps, slots, tokens = 0.0, 0, 0, np.zeros(2, np.int64)
    losses: list[float] = []
    curve: list[dict[str, float]] = []
    while spent < seconds:
        begin = time.perf_counter()
        batch = next(batches)
        losses.append(learner.step(batch, float(rate(steps_asked * spent / seconds))))
        spent += time.perf_counter() - begin
        steps += 1
        slots += sum(side.numel() for side in batch)
        tokens += [int(side.count_nonzero()) for side in batch]
        if spent >= min(seconds, every * (len(curve) + 1)):
            line = {"seconds": spent, "steps": steps, "loss": float(np.mean(losses)),
                    "valid_loss": valid_loss(learner.model)}  # fmt: skip
            print("  ".join(f"{name} {value:,.3f}" for name, value in line.items()), flush=True)
            if all(line["valid_loss"] < earlier["valid_loss"] for earlier in curve):
                save_file(learner.model.state_dict(), best)
            curve.append(line)
            losses = []
    return {
        "steps": steps, "train_seconds": spent, "tokens": tokens.tolist(),
        "share_of_slots": float(tokens.sum() / slots), "curve": curve,
    }  # fmt: skip
