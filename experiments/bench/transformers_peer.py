"""Hugging Face transformers: its Marian model, with the same parameters."""

import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, MarianConfig, MarianMTModel

from experiments.bench.contenders import Contender
from experiments.bench.inputs import BOS, EOS, tokens
from experiments.bench.workloads import Decoding
from tfm.config import TransformerConfig
from tfm.positions import sinusoidal_positions

_POSITIONS = 512


def build(name: str, work: Decoding, weights: Path) -> Contender:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = _model(work.config, load_file(weights)).eval()
    source, target = (torch.tensor(x) for x in tokens(work))
    ones = torch.ones_like(source)
    generation = GenerationConfig(
        num_beams=work.beam, do_sample=False,
        min_new_tokens=1 if work.stopping else work.target, max_new_tokens=work.target,
        decoder_start_token_id=BOS, eos_token_id=EOS, pad_token_id=0,
    )  # fmt: skip

    @torch.inference_mode()
    def run() -> object:
        return model.generate(source, attention_mask=ones, generation_config=generation)

    @torch.inference_mode()
    def check() -> np.ndarray:
        shifted = torch.nn.functional.pad(target[:, :-1], (1, 0), value=BOS)
        logits = model(source, attention_mask=ones, decoder_input_ids=shifted).logits
        return logits.log_softmax(-1).gather(-1, target[..., None])[..., 0].numpy()

    return Contender(run, check)


def _model(config: TransformerConfig, arrays: dict[str, torch.Tensor]) -> MarianMTModel:
    c = config
    model = MarianMTModel(
        MarianConfig(
            vocab_size=c.vocab_size, d_model=c.d_model, max_position_embeddings=_POSITIONS,
            encoder_layers=c.num_encoder_layers, decoder_layers=c.num_decoder_layers,
            encoder_attention_heads=c.num_heads, decoder_attention_heads=c.num_heads,
            encoder_ffn_dim=c.d_ff, decoder_ffn_dim=c.d_ff, activation_function="relu",
            scale_embedding=True, pad_token_id=0, eos_token_id=EOS, decoder_start_token_id=BOS,
        )
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = c.layer_norm_epsilon
    state = {name: torch.zeros_like(array) for name, array in model.state_dict().items()}
    positions = torch.tensor(np.asarray(sinusoidal_positions(_POSITIONS, c.d_model)))
    for name in state:
        if name.endswith("embed_positions.weight"):
            state[name] = positions
        elif name.endswith(("shared.weight", "embed_tokens.weight", "lm_head.weight")):
            state[name] = arrays["embedding"]
    for i in range(c.num_encoder_layers):
        parts = {"attention": "self_attn"}
        state |= _layer_state(arrays, f"encoder_{i}", f"model.encoder.layers.{i}", parts)
    for i in range(c.num_decoder_layers):
        parts = {"self_attention": "self_attn", "cross_attention": "encoder_attn"}
        state |= _layer_state(arrays, f"decoder_{i}", f"model.decoder.layers.{i}", parts)
    model.load_state_dict(state)
    return model


def _layer_state(
    arrays: dict[str, torch.Tensor], ours: str, theirs: str, attentions: dict[str, str]
) -> dict[str, torch.Tensor]:
    """One layer's arrays under Marian's names; it has biases, which stay 0 where we have none."""
    state = {}
    norms = {part: f"{module}_layer_norm" for part, module in attentions.items()}
    for part, norm in (norms | {"feed_forward": "final_layer_norm"}).items():
        state[f"{theirs}.{norm}.weight"] = arrays[f"{ours}/{part}_norm/scale"]
        state[f"{theirs}.{norm}.bias"] = arrays[f"{ours}/{part}_norm/bias"]
    for part, module in attentions.items():
        for letter, projection in zip(
            "qkvo", ("q_proj", "k_proj", "v_proj", "out_proj"), strict=True
        ):
            state[f"{theirs}.{module}.{projection}.weight"] = arrays[f"{ours}/{part}/w_{letter}"].T
    for number in (1, 2):
        state[f"{theirs}.fc{number}.weight"] = arrays[f"{ours}/feed_forward/w{number}"].T
        state[f"{theirs}.fc{number}.bias"] = arrays[f"{ours}/feed_forward/b{number}"]
    return state
