"""Imports state dicts of `torch.nn.Transformer` and of tutorial Transformers of the same form.

A state dict has only names and arrays. What it lacks (heads, activation, norm placement, ids) is
given by flags. What has no standard name (embeddings, output, positions) is found by the usual
names, or by a flag.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np

from experiments.interop.files import BridgeError, Tensors, read_tensors
from experiments.interop.links import (
    Link,
    layer_parts,
    pad_first,
    reorder_ids,
    shapes_of,
    sinusoids,
    take,
)
from experiments.interop.torch_names import (
    SIDES,
    Around,
    Body,
    Layout,
    TorchOptions,
    find_around,
    find_body,
    with_biases,
    without_wrappers,
)
from tfm.config import TransformerConfig


class Imported(NamedTuple):
    """An imported model with our ids, and our arrays by flat name."""

    config: TransformerConfig
    arrays: Tensors
    target_order: np.ndarray  # our id -> theirs
    source_order: np.ndarray
    positions: int | None  # rows of their table of positions


def read_model(path: Path, options: TorchOptions) -> Imported:
    """Reads the model of a `.safetensors` file, or of a file that torch saved (which needs torch).

    Raises BridgeError naming the file and what is missing, unknown, of another shape, or ambiguous.
    """
    tensors = without_wrappers(read_tensors(path))
    body = find_body(path, tensors)
    tensors = with_biases(tensors, body)
    around = find_around(path, tensors, body, options)
    tensors |= around.positions
    config = _config(path, tensors, body, around, options)
    links = [*_around_links(config, around), *_layer_links(body)]
    unread = {*around.again, *(around.tables if config.positions == "sinusoidal" else ())}
    read = {name: array for name, array in tensors.items() if name not in unread}
    arrays = take(path, read, links, shapes_of(config))
    target, source = _orders(path, config, options)
    arrays = reorder_ids(arrays, target, source)
    lengths = [len(table) for table in around.positions.values()]
    return Imported(config, arrays, target, source, min(lengths, default=None))


def _layout(
    path: Path, around: Around, d_model: int, options: TorchOptions
) -> Layout | Literal["learned"]:
    """The sinusoid layout that matches their position table, else 'learned'."""
    asked = options.sinusoid_layout
    if not around.tables:
        if asked is None:
            raise BridgeError(
                f"{path}: no table of positions in it: name the formula with "
                "--torch.sinusoid-layout"
            )
        return asked
    for layout in get_args(Layout) if d_model % 2 == 0 else ():
        # In f32 the angle of position 5,000 has an error of 5e-4, which other libraries accept.
        if all(
            np.abs(table - sinusoids(len(table), d_model, layout)).max() < 2e-3
            for table in around.positions.values()
        ):
            break
    else:
        layout = "learned"
    if asked not in (None, layout):
        raise BridgeError(f"{path}: its positions are {layout}, not {asked} (sinusoid_layout)")
    return layout


def _config(
    path: Path, tensors: Tensors, body: Body, around: Around, options: TorchOptions
) -> TransformerConfig:
    layout = _layout(path, around, body.d_model, options)
    lengths = {name: len(table) for name, table in around.positions.items()}
    if layout == "learned" and len(set(lengths.values())) > 1:
        raise BridgeError(f"{path}: learned positions of two lengths are not supported: {lengths}")
    name = f"{body.prefix}encoder.layers.0.{body.dialect.feed_forward[0]}.weight"
    if name not in tensors:
        raise BridgeError(f"{path}: tensors that are missing: {name}")
    learned = {"positions": "learned", "max_learned_positions": max(lengths.values(), default=512)}
    try:
        return TransformerConfig(
            vocab_size=len(tensors[around.target]),
            source_vocab_size=(
                None if around.source == around.target else len(tensors[around.source])
            ),
            d_model=body.d_model,
            d_ff=len(tensors[name]),
            num_heads=options.num_heads,
            num_encoder_layers=body.layers["encoder"],
            num_decoder_layers=body.layers["decoder"],
            activation=options.activation,
            norm_placement="pre" if options.norm_first else "post",
            final_norm=body.final_norms,
            layer_norm_epsilon=options.layer_norm_epsilon,
            projection_bias=body.biases,
            output_bias=around.output_bias is not None,
            scale_embeddings=options.scale_embeddings,
            tied_output=around.output is None,
            **(learned if layout == "learned" else {"sinusoid_layout": layout}),
        )
    except ValueError as error:
        raise BridgeError(f"{path}: {error}") from None


def _orders(
    path: Path, config: TransformerConfig, options: TorchOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Our ids -> theirs, of the target and of the source."""
    sizes = {"": config.vocab_size, "source_": config.source_vocab_size or config.vocab_size}
    for prefix, size in sizes.items():
        for symbol in ("pad", "bos", "eos", "unk") if not prefix else ("pad", "eos", "unk"):
            value = getattr(options, prefix + symbol)
            if value is not None and not 0 <= value < size:
                raise BridgeError(f"{path}: {prefix}{symbol}={value} is outside its {size} ids")
    target = pad_first(config.vocab_size, options.pad)
    if config.source_vocab_size is None:
        return target, target
    pad = options.pad if options.source_pad is None else options.source_pad
    if pad >= config.source_vocab_size:
        raise BridgeError(f"{path}: source_pad={pad} is outside its {config.source_vocab_size} ids")
    return target, pad_first(config.source_vocab_size, pad)


def _around_links(config: TransformerConfig, around: Around) -> Iterator[Link]:
    yield Link("embedding", around.target)
    if config.source_vocab_size is not None:
        yield Link("source_embedding", around.source)
    if around.output is not None:
        yield Link("output", around.output, "transposed")
    if around.output_bias is not None:
        yield Link("output_bias", around.output_bias)
    if config.positions == "learned":
        for side, name in zip(SIDES, around.tables, strict=True):
            yield Link(f"{side}_positions", name)


def _layer_links(body: Body) -> Iterator[Link]:
    for side, count in body.layers.items():
        for i in range(count):
            yield from _one_layer(f"{side}_{i}", f"{body.prefix}{side}.layers.{i}", side, body)
        if body.final_norms:
            yield from _norm(f"{side}_norm", f"{body.prefix}{side}.norm")


def _norm(ours: str, theirs: str) -> Iterator[Link]:
    yield Link(f"{ours}/scale", f"{theirs}.weight")
    yield Link(f"{ours}/bias", f"{theirs}.bias")


def _one_layer(ours: str, theirs: str, side: str, body: Body) -> Iterator[Link]:
    dialect = body.dialect
    for part in layer_parts(side):
        norm = dialect.norms[side if part == "feed_forward" else part]
        yield from _norm(f"{ours}/{part}_norm", f"{theirs}.{norm}")
        for letters, name in dialect.projections.items() if part != "feed_forward" else ():
            for i, letter in enumerate(letters):
                their, packed = f"{theirs}.{dialect.attentions[part]}.{name}", (i, len(letters))
                yield Link(f"{ours}/{part}/w_{letter}", f"{their}weight", "transposed", packed)
                if body.biases:
                    yield Link(f"{ours}/{part}/b_{letter}", f"{their}bias", part=packed)
    for n, name in enumerate(dialect.feed_forward, start=1):
        yield Link(f"{ours}/feed_forward/w{n}", f"{theirs}.{name}.weight", "transposed")
        yield Link(f"{ours}/feed_forward/b{n}", f"{theirs}.{name}.bias")
