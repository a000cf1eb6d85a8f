"""Converts config and weights of Hugging Face's Marian models (such as OPUS-MT), without torch.

Their model is the paper's with biases in the attention, a bias on the logits, sinusoids in halves
and ε = 1e-5. Their last id is padding, which also starts the decoder. Our padding is id 0, so the
import moves it to the front and shifts the other ids up by one; the export reverses this. Where the
vocabularies differ in size, the export uses id 0 for padding, as theirs is one id for both.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save

from experiments.interop.files import BridgeError, Folder, Tensors
from experiments.interop.links import (
    Link,
    give,
    halves_from_interleaved,
    layer_parts,
    pad_first,
    reorder_features,
    reorder_ids,
    shapes_of,
    take,
)  # fmt: skip
from experiments.interop.marian_tables import (
    DECODER,
    ENCODER,
    HEAD,
    SHARED,
    find_tables,
    without_positions,
)
from tfm.config import TransformerConfig, current_fields

EPSILON = 1e-5
"""ε of torch.nn.LayerNorm, the default that Marian's code there keeps."""
ACTIVATIONS = {"relu": "relu", "swish": "swish", "silu": "swish", "gelu": "gelu"}
DEFAULTS: dict[str, Any] = {
    "model_type": None, "vocab_size": 58101, "decoder_vocab_size": None, "d_model": 1024,
    "encoder_layers": 12, "decoder_layers": 12, "encoder_attention_heads": 16,
    "decoder_attention_heads": 16, "encoder_ffn_dim": 4096, "decoder_ffn_dim": 4096,
    "activation_function": "gelu", "dropout": 0.1, "attention_dropout": 0.0,
    "activation_dropout": 0.0, "scale_embedding": False, "share_encoder_decoder_embeddings": True,
    "tie_word_embeddings": True, "max_position_embeddings": 1024, "pad_token_id": 58100,
    "eos_token_id": 0, "decoder_start_token_id": 58100,
}  # fmt: skip
"""The defaults of fields that a config.json leaves out."""
ONLY = {
    "model_type": "marian", "is_encoder_decoder": True, "normalize_before": False,
    "normalize_embedding": False, "add_final_layer_norm": False, "static_position_embeddings": True,
    "encoder_layerdrop": 0, "decoder_layerdrop": 0, "quantization_config": None,
}  # fmt: skip
"""Fields of which only this value is supported."""
NOTE = "tfm"
"""The field of config.json for our options that theirs lacks; their library preserves it."""
NOTED = ("sinusoid_layout", "projection_bias", "output_bias", "initializer", "compute_dtype",
         "implementation")  # fmt: skip


class Marian(NamedTuple):
    """An imported model with our ids, and our arrays by flat name."""

    config: TransformerConfig
    arrays: Tensors
    start: int
    eos: int
    target_order: np.ndarray  # our id -> theirs
    source_order: np.ndarray


def read_model(folder: Folder, source_pad: int | None = None) -> Marian:
    """Reads a folder's model; `source_pad` is the padding id of a separate source vocabulary.

    Raises BridgeError naming the file, and a field whose value is not supported or the tensors that
    are missing, unknown or of another shape.
    """
    path, given = folder.root / "config.json", folder.json("config.json")
    fields = _fields(path, given)
    where = folder.weights()
    tensors = without_positions(where, folder.tensors(), fields["d_model"])
    tensors, tables = find_tables(where, tensors, fields)
    _check_sizes(where, tensors, fields, tables["target"])
    config = _config(path, fields, shared="source" not in tables)
    tensors.setdefault("final_logits_bias", np.zeros((1, config.vocab_size), np.float32))
    arrays = take(where, tensors, _links(config, tables), shapes_of(config))
    target, source = _orders(path, fields, config, source_pad)
    arrays = reorder_ids(arrays, target, source)
    config, arrays = _as_noted(path, given.get(NOTE) or {}, config, arrays)
    theirs = target.tolist()
    start, eos = (theirs.index(fields[f"{n}_token_id"]) for n in ("decoder_start", "eos"))
    return Marian(config, arrays, start, eos, target, source)


def _check_sizes(path: Path, tensors: Tensors, fields: dict[str, Any], table: str) -> None:
    """Refuses a config whose layers or features are not in the file, before building the shapes."""
    for side in ("encoder", "decoder"):
        last = f"model.{side}.layers.{fields[f'{side}_layers'] - 1}."
        if not any(name.startswith(last) for name in tensors):
            raise BridgeError(
                f"{path}: tensors that are missing: all of {last[:-1]}, though the config says "
                f"{side}_layers={fields[f'{side}_layers']}"
            )
    wanted = [fields["decoder_vocab_size"], fields["d_model"]]
    shape = list(tensors[table].shape) if table in tensors else None
    if shape != wanted:
        how = f"of another shape: {table} {shape}, not" if shape else f"missing: {table}"
        raise BridgeError(f"{path}: tensors that are {how} {wanted}")


def _fields(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    """The fields that are read, each checked for the type of its default."""
    for name, value in ONLY.items():
        if given.get(name, value) != value:
            raise BridgeError(f"{path}: {name}={given[name]!r} is not supported, only {value!r}")
    fields = DEFAULTS | {n: given[n] for n in DEFAULTS if given.get(n) is not None}
    if isinstance(fields["eos_token_id"], list) and len(fields["eos_token_id"]) == 1:
        fields["eos_token_id"] = fields["eos_token_id"][0]
    fields["decoder_vocab_size"] = fields["decoder_vocab_size"] or fields["vocab_size"]
    for name, default in (DEFAULTS | {"decoder_vocab_size": 1}).items():
        kind = (int, float) if isinstance(default, float) else type(default)
        if default is not None and (
            not isinstance(fields[name], kind)
            or (isinstance(fields[name], bool) and kind is not bool)
        ):
            raise BridgeError(f"{path}: {name}={fields[name]!r} is not supported")
    for name in ("attention_heads", "ffn_dim"):
        two = [f"{side}_{name}" for side in ("encoder", "decoder")]
        if fields[two[0]] != fields[two[1]]:
            values = " and ".join(f"{n}={fields[n]}" for n in two)
            raise BridgeError(f"{path}: {values} must be equal")
    if fields["activation_function"] not in ACTIVATIONS:
        raise BridgeError(
            f"{path}: activation_function={fields['activation_function']!r} is not supported, "
            f"only {', '.join(ACTIVATIONS)}"
        )
    if fields["share_encoder_decoder_embeddings"] and (
        fields["decoder_vocab_size"] != fields["vocab_size"]
    ):
        raise BridgeError(
            f"{path}: share_encoder_decoder_embeddings=True with two sizes, "
            f"vocab_size={fields['vocab_size']} and "
            f"decoder_vocab_size={fields['decoder_vocab_size']}"
        )
    return fields


def _config(path: Path, fields: dict[str, Any], shared: bool) -> TransformerConfig:
    try:
        return TransformerConfig(
            vocab_size=fields["decoder_vocab_size"],
            source_vocab_size=None if shared else fields["vocab_size"],
            d_model=fields["d_model"],
            d_ff=fields["encoder_ffn_dim"],
            num_heads=fields["encoder_attention_heads"],
            num_encoder_layers=fields["encoder_layers"],
            num_decoder_layers=fields["decoder_layers"],
            dropout_rate=float(fields["dropout"]),
            attention_dropout_rate=float(fields["attention_dropout"]),
            activation_dropout_rate=float(fields["activation_dropout"]),
            activation=ACTIVATIONS[fields["activation_function"]],
            norm_placement="post",
            layer_norm_epsilon=EPSILON,
            projection_bias=True,
            output_bias=True,
            positions="sinusoidal",
            sinusoid_layout="halves",
            scale_embeddings=fields["scale_embedding"],
            tied_output=fields["tie_word_embeddings"],
        )
    except ValueError as error:
        raise BridgeError(f"{path}: {error}") from None


def _orders(
    path: Path, fields: dict[str, Any], config: TransformerConfig, source_pad: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Our ids -> theirs, of the target and of the source."""
    for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id"):
        if not 0 <= fields[name] < config.vocab_size:
            raise BridgeError(
                f"{path}: {name}={fields[name]} is outside the vocabulary of {config.vocab_size}"
            )
    pad = fields["pad_token_id"]
    target = pad_first(config.vocab_size, pad)
    if config.source_vocab_size is None:
        return target, target
    source_pad = pad if source_pad is None else source_pad
    if not 0 <= source_pad < config.source_vocab_size:
        raise BridgeError(
            f"{path}: padding, {source_pad}, is outside the source's vocabulary of "
            f"{config.source_vocab_size}"
        )
    return target, pad_first(config.source_vocab_size, source_pad)


def _links(config: TransformerConfig, tables: dict[str, str]) -> Iterator[Link]:
    yield Link("embedding", tables["target"])
    if "source" in tables:
        yield Link("source_embedding", tables["source"])
    if "output" in tables:
        yield Link("output", tables["output"], "transposed")
    yield Link("output_bias", "final_logits_bias", "row")
    counts = {"encoder": config.num_encoder_layers, "decoder": config.num_decoder_layers}
    modules = {"attention": "self_attn", "self_attention": "self_attn",
               "cross_attention": "encoder_attn"}  # fmt: skip
    projections = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}
    for side, count in counts.items():
        for i in range(count):
            ours, theirs = f"{side}_{i}", f"model.{side}.layers.{i}"
            for part in layer_parts(side):
                attends = part in modules
                module = f"{theirs}.{modules.get(part)}"
                norm = f"{module}_layer_norm" if attends else f"{theirs}.final_layer_norm"
                yield Link(f"{ours}/{part}_norm/scale", f"{norm}.weight")
                yield Link(f"{ours}/{part}_norm/bias", f"{norm}.bias")
                for letter, name in projections.items() if attends else ():
                    yield Link(f"{ours}/{part}/w_{letter}", f"{module}.{name}.weight", "transposed")
                    yield Link(f"{ours}/{part}/b_{letter}", f"{module}.{name}.bias")
            for n in (1, 2):
                yield Link(f"{ours}/feed_forward/w{n}", f"{theirs}.fc{n}.weight", "transposed")
                yield Link(f"{ours}/feed_forward/b{n}", f"{theirs}.fc{n}.bias")


def _attention_biases(arrays: Tensors) -> list[str]:
    return [name for name in arrays if name.rpartition("/")[2] in ("b_q", "b_k", "b_v", "b_o")]


def _as_noted(
    path: Path, note: dict[str, Any], config: TransformerConfig, arrays: Tensors
) -> tuple[TransformerConfig, Tensors]:
    """Restores the options of a model that was exported from here, by its note in config.json.

    Biases that it did not have are removed again if they are still zero.
    """
    try:
        note = current_fields(note)
        noted = dataclasses.replace(config, **{n: note[n] for n in NOTED if n in note})
    except (TypeError, ValueError) as error:
        raise BridgeError(f"{path}: {NOTE}: {error}") from None
    without = [] if noted.projection_bias else _attention_biases(arrays)
    if any(arrays[name].any() for name in without):
        noted, without = dataclasses.replace(noted, projection_bias=True), []
    if not noted.output_bias:
        if arrays["output_bias"].any():
            noted = dataclasses.replace(noted, output_bias=True)
        else:
            without = [*without, "output_bias"]
    arrays = {name: array for name, array in arrays.items() if name not in without}
    if noted.sinusoid_layout == "interleaved":
        arrays = reorder_features(arrays, np.argsort(halves_from_interleaved(noted.d_model)))
    elif noted.sinusoid_layout != "halves":
        raise BridgeError(f"{path}: {NOTE}: sinusoid_layout={noted.sinusoid_layout!r}")
    return noted, arrays


def refuse_what_marian_lacks(config: TransformerConfig) -> None:
    """Raises BridgeError naming a field whose value Marian's code there cannot compute."""
    allowed = {
        "norm_placement": ("post",), "final_norm": (None, False), "positions": ("sinusoidal",),
        "sinusoid_layout": ("interleaved", "halves"), "first_position": (0,),
        "layer_norm_epsilon": (EPSILON,),
    }  # fmt: skip
    for name, values in allowed.items():
        if (value := getattr(config, name)) not in values:
            raise BridgeError(
                f"{name}={value!r}: Hugging Face's Marian has only "
                f"{' or '.join(map(repr, values))}, so this model cannot be written exactly as one"
            )


class Written(NamedTuple):
    """The result of `model_files`."""

    config: dict[str, Any]
    weights: bytes
    target_order: np.ndarray  # our id -> theirs
    source_order: np.ndarray


def model_files(
    config: TransformerConfig, arrays: Tensors, start: int, eos: int, positions: int
) -> Written:
    """config.json and the bytes of model.safetensors.

    Raises BridgeError as `refuse_what_marian_lacks`.
    """
    refuse_what_marian_lacks(config)
    v = config.vocab_size
    source_size = config.source_vocab_size or v
    # Their id is ours minus one, with padding last; but padding must be an id of both vocabularies.
    shift = 1 if source_size == v else 0
    target, source = (np.roll(np.arange(n), shift) for n in (v, source_size))
    arrays = reorder_ids(arrays, np.argsort(target), np.argsort(source))
    if config.sinusoid_layout == "interleaved":
        arrays = reorder_features(arrays, halves_from_interleaved(config.d_model))
    # Biases that our model lacks become zeros.
    shapes = shapes_of(dataclasses.replace(config, projection_bias=True, output_bias=True))
    lacking = shapes.keys() - shapes_of(config).keys()
    arrays = arrays | {name: np.zeros(shapes[name], np.float32) for name in lacking}
    shared = config.source_vocab_size is None
    tables = {"target": SHARED if shared else DECODER}
    tables |= {} if shared else {"source": ENCODER}
    tables |= {} if config.tied_output else {"output": HEAD}
    tensors = give(arrays, _links(config, tables))
    if shared and not config.tied_output:  # untied, their library reads one matrix per side
        tensors |= dict.fromkeys((ENCODER, DECODER), tensors[SHARED])
    fields = _written_fields(config, positions) | {
        "pad_token_id": int(target[0]), "eos_token_id": int(target[eos]),
        "decoder_start_token_id": int(target[start]),
    }  # fmt: skip
    return Written(fields, save(tensors, {"format": "pt"}), target, source)


def _written_fields(config: TransformerConfig, positions: int) -> dict[str, Any]:
    c = config
    return {
        "architectures": ["MarianMTModel"], "model_type": "marian", "is_encoder_decoder": True,
        "vocab_size": c.source_vocab_size or c.vocab_size, "decoder_vocab_size": c.vocab_size,
        "d_model": c.d_model, "encoder_ffn_dim": c.d_ff, "decoder_ffn_dim": c.d_ff,
        "encoder_layers": c.num_encoder_layers, "decoder_layers": c.num_decoder_layers,
        "num_hidden_layers": c.num_encoder_layers,
        "encoder_attention_heads": c.num_heads, "decoder_attention_heads": c.num_heads,
        "activation_function": c.activation, "dropout": c.dropout_rate,
        "attention_dropout": c.attention_dropout_rate,
        "activation_dropout": c.activation_dropout_rate,
        "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0,
        "scale_embedding": c.scale_embeddings, "static_position_embeddings": True,
        "normalize_before": False, "normalize_embedding": False, "add_final_layer_norm": False,
        "share_encoder_decoder_embeddings": c.source_vocab_size is None,
        "tie_word_embeddings": c.tied_output, "max_position_embeddings": positions,
        "forced_eos_token_id": None, "use_cache": True, "dtype": "float32",
        NOTE: {name: getattr(c, name) for name in NOTED},
    }  # fmt: skip
