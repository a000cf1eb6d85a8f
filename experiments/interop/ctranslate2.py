"""Export to CTranslate2, which serves translation models on CPUs and GPUs.

Its beam search divides a hypothesis's log-probability by nᵅ, where the paper's divides by
((5 + n)/6)ᵅ: with α = 0.6 the two may rank hypotheses of different lengths differently. Pass it
`length_penalty=0` for plain log-probabilities, and `min_decoding_length=0` where an empty
translation may be the best: by default it forbids one.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from experiments.checkpoints.run_folder import named
from experiments.errors import not_installed
from experiments.interop.files import BridgeError, Tensors
from experiments.interop.links import flat, layer_parts, sinusoids
from tfm.config import TransformerConfig

if TYPE_CHECKING:
    from ctranslate2.specs import LayerSpec, TransformerSpec

    from experiments.inference.predictor import Predictor

POSITIONS = 1024
"""Rows of a table of sinusoids, unless the model was trained for longer sentences."""
NEVER = -1e9
"""The bias on the logits of what is never generated: its probability is 0 in f32."""


class Pieces(NamedTuple):
    """The symbols of one side in the order of their ids, with the special ones."""

    pieces: Sequence[str]
    bos: int
    eos: int
    unk: int


def specification(
    config: TransformerConfig,
    arrays: Tensors,
    source: Pieces,
    target: Pieces,
    positions: int = POSITIONS,
    never: Sequence[int] = (),
    add_source_eos: bool = False,
) -> "TransformerSpec":
    """The validated CTranslate2 specification of a model; its matrices are transposed.

    Args:
      arrays: f32 parameters by flat name.
      positions: rows of the table of sinusoids.
      never: ids that are never generated.
      add_source_eos: whether the library appends the end symbol to each source.
    """
    from ctranslate2.specs import TransformerSpec, common_spec

    activations = {"relu": "RELU", "swish": "SWISH", "gelu": "GELU"}
    spec = TransformerSpec.from_config(
        (config.num_encoder_layers, config.num_decoder_layers),
        config.num_heads,
        pre_norm=config.has_final_norm,  # with final norms
        activation=getattr(common_spec.Activation, activations[config.activation]),
    )
    for side, filled in (("encoder", spec.encoder), ("decoder", spec.decoder)):
        filled.pre_norm = config.norm_placement == "pre"
        filled.scale_embeddings = config.scale_embeddings
        filled.position_encodings.encodings = _positions(config, arrays, side, positions)
        if config.has_final_norm:
            _fill_norm(arrays, f"{side}_norm", filled.layer_norm)
        for i, layer in enumerate(filled.layer):
            _fill_layer(arrays, f"{side}_{i}", side, layer)
    table = arrays["embedding"]
    spec.encoder.embeddings[0].weight = arrays.get("source_embedding", table)
    spec.decoder.embeddings.weight = table
    spec.decoder.projection.weight = arrays["output"].T if "output" in arrays else table
    bias = arrays.get("output_bias", np.zeros(len(table), np.float32)).copy()
    bias[list(never)] = NEVER
    if bias.any():
        spec.decoder.projection.bias = bias
    spec.register_source_vocabulary(list(source.pieces))
    spec.register_target_vocabulary(list(target.pieces))
    settings = spec.config
    settings.bos_token = settings.decoder_start_token = target.pieces[target.bos]
    settings.eos_token, settings.unk_token = (target.pieces[i] for i in (target.eos, target.unk))
    settings.layer_norm_epsilon = config.layer_norm_epsilon
    settings.add_source_eos = add_source_eos
    spec.validate()
    return spec


def _positions(config: TransformerConfig, arrays: Tensors, side: str, positions: int) -> np.ndarray:
    first = config.first_position
    if config.positions == "learned":
        return arrays[f"{'source' if side == 'encoder' else 'target'}_positions"][first:]
    return sinusoids(first + positions, config.d_model, config.sinusoid_layout)[first:]


def _fill_norm(arrays: Tensors, name: str, spec: "LayerSpec") -> None:
    spec.gamma, spec.beta = arrays[f"{name}/scale"], arrays[f"{name}/bias"]


def _fill_layer(arrays: Tensors, name: str, side: str, layer: "LayerSpec") -> None:
    for part in layer_parts(side):
        if part == "feed_forward":
            spec = layer.ffn
            for number, linear in ((1, spec.linear_0), (2, spec.linear_1)):
                linear.weight = np.ascontiguousarray(arrays[f"{name}/{part}/w{number}"].T)
                linear.bias = arrays[f"{name}/{part}/b{number}"]
        else:
            spec = layer.attention if part == "cross_attention" else layer.self_attention
            packed = ("q", "kv", "o") if part == "cross_attention" else ("qkv", "o")
            for linear, letters in zip(spec.linear, packed, strict=True):
                w = [arrays[f"{name}/{part}/w_{letter}"].T for letter in letters]
                linear.weight = np.concatenate(w)
                if f"{name}/{part}/b_q" in arrays:
                    b = [arrays[f"{name}/{part}/b_{letter}"] for letter in letters]
                    linear.bias = np.concatenate(b)
        _fill_norm(arrays, f"{name}/{part}_norm", spec.layer_norm)


def export_ctranslate2(path: Path, translator: "Predictor", int8: bool = False) -> None:
    """Writes a model folder into the empty `path`: model.bin, config.json, vocabularies, and the
    SentencePiece files, which CTranslate2 itself does not read.

    Its input is the pieces of a source; it appends the end symbol (`add_source_eos`). With `int8`
    matrices are held in 8 bits, with one scale per row.

    Raises BridgeError where ctranslate2 is not installed.
    """
    try:
        import ctranslate2  # noqa: F401
    except ImportError:
        raise BridgeError(not_installed("ctranslate2")) from None
    source, target, settings = translator.source, translator.target, translator.settings
    # Copies, since quantizing overwrites its input.
    arrays = {name: array.copy() for name, array in flat(translator.params).items()}
    spec = specification(
        translator.model.config,
        arrays,
        Pieces(source.pieces, source.bos, source.eos, source.unk),
        Pieces(target.pieces, target.bos, target.eos, target.unk),
        positions=max(POSITIONS, settings.source_length, settings.target_length),
        never=tuple(dict.fromkeys((0, target.bos))),
        add_source_eos=True,
    )
    spec.optimize(quantization="int8" if int8 else "float32")
    with named(path):
        spec.save(str(path))
        (path / "source.spm").write_bytes(source.model)
        (path / "target.spm").write_bytes(target.model)
