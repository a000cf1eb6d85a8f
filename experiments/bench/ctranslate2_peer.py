"""CTranslate2's decoder, with the same parameters in a model folder of its own form."""

import os
import tempfile
from pathlib import Path

import ctranslate2
import numpy as np
from ctranslate2.specs import LayerSpec, TransformerSpec
from safetensors.numpy import load_file

from experiments.bench.contenders import Contender
from experiments.bench.inputs import BOS, EOS, tokens
from experiments.bench.workloads import Decoding
from tfm.config import TransformerConfig
from tfm.positions import sinusoidal_positions

_POSITIONS = 512


def build(name: str, work: Decoding, weights: Path) -> Contender:
    source, target = ([[str(i) for i in row] for row in rows] for rows in tokens(work))
    with tempfile.TemporaryDirectory() as folder:
        spec = _spec(work.config, load_file(weights))
        spec.validate()
        spec.optimize()
        spec.save(folder)
        translator = ctranslate2.Translator(
            folder, device="cpu", compute_type=work.dtype,
            inter_threads=1, intra_threads=len(os.sched_getaffinity(0)),
        )  # fmt: skip

    def run() -> object:
        return translator.translate_batch(
            source, beam_size=work.beam, max_batch_size=work.rows, length_penalty=0.6,
            min_decoding_length=1 if work.stopping else work.target,
            max_decoding_length=work.target,
        )  # fmt: skip

    def check() -> np.ndarray:
        scores = translator.score_batch(source, target)
        return np.array([s.log_probs[: work.target] for s in scores])  # without the end symbol

    return Contender(run, check)


def _spec(config: TransformerConfig, arrays: dict[str, np.ndarray]) -> TransformerSpec:
    """The model as CTranslate2 describes one; its matrices are the transposes of ours."""
    layers = (config.num_encoder_layers, config.num_decoder_layers)
    spec = TransformerSpec.from_config(layers, config.num_heads, pre_norm=False)
    positions = np.asarray(sinusoidal_positions(_POSITIONS, config.d_model))
    for side in (spec.encoder, spec.decoder):
        side.position_encodings.encodings = positions
        side.scale_embeddings = True
    spec.encoder.embeddings[0].weight = arrays["embedding"]
    spec.decoder.embeddings.weight = arrays["embedding"]
    spec.decoder.projection.weight = arrays["embedding"]
    for i, layer in enumerate(spec.encoder.layer):
        _fill_layer(arrays, f"encoder_{i}", layer, {"attention": layer.self_attention})
    for i, layer in enumerate(spec.decoder.layer):
        parts = {"self_attention": layer.self_attention, "cross_attention": layer.attention}
        _fill_layer(arrays, f"decoder_{i}", layer, parts)
    names = [str(i) for i in range(config.vocab_size)]
    spec.register_source_vocabulary(names)
    spec.register_target_vocabulary(names)
    spec.config.bos_token = spec.config.decoder_start_token = str(BOS)
    spec.config.eos_token, spec.config.unk_token = str(EOS), "0"
    spec.config.layer_norm_epsilon = config.layer_norm_epsilon
    return spec


def _fill_layer(
    arrays: dict[str, np.ndarray], name: str, layer: LayerSpec, attentions: dict[str, LayerSpec]
) -> None:
    for part, spec in (*attentions.items(), ("feed_forward", layer.ffn)):
        spec.layer_norm.gamma = arrays[f"{name}/{part}_norm/scale"]
        spec.layer_norm.beta = arrays[f"{name}/{part}_norm/bias"]
    for part, spec in attentions.items():
        w = {n: arrays[f"{name}/{part}/w_{n}"].T for n in "qkvo"}
        fused = ["qkv", "o"] if len(spec.linear) == 2 else ["q", "kv", "o"]
        for linear, letters in zip(spec.linear, fused, strict=True):
            linear.weight = np.concatenate([w[n] for n in letters])
    for number, linear in ((1, layer.ffn.linear_0), (2, layer.ffn.linear_1)):
        linear.weight = np.ascontiguousarray(arrays[f"{name}/feed_forward/w{number}"].T)
        linear.bias = arrays[f"{name}/feed_forward/b{number}"]
