"""Import and export of Hugging Face Marian folders: weights, SentencePiece files, vocabulary.

Differences of their library:
- Its beam search divides a log-probability by nᵅ (`penalty="power"`), never by the paper's
  ((5 + n)/6)ᵅ. A model whose settings say "paper" is exported with the same α.
- Its softmax includes padding, which the search then forbids; ours excludes it from the
  distribution.
- A language token such as `>>deu<<` is a piece there; here only if the SentencePiece model has it.

For CTranslate2 export with `ctranslate2.export_ctranslate2`: that library's own converter assumes
that a Marian model starts from zeros, and a model trained here does not.
"""

from pathlib import Path
from typing import Any

from experiments.checkpoints.run_folder import named, plain, write_json
from experiments.data.subwords import Subwords
from experiments.data.subwords import read_model as read_sentencepiece
from experiments.inference.predictor import Predictor, Settings
from experiments.interop.files import BridgeError, Folder, named_few
from experiments.interop.links import flat, tree
from experiments.interop.marian_model import NOTE, model_files, read_model
from experiments.interop.pieces import numbered, pieces_of, read_ids
from tfm.model import Transformer

SPECIAL = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
"""The special symbols where tokenizer_config.json does not name them."""


def import_marian(folder: Folder) -> Predictor:
    """Imports a Hugging Face Marian folder; neither torch nor transformers is needed.

    Raises BridgeError, or SubwordError for a SentencePiece file, naming the file and what is
    missing, damaged or not supported in it: see `marian_model.read_model`.
    """
    tokenizer = folder.optional_json("tokenizer_config.json")
    names = {n: _special(folder, tokenizer, n) for n in SPECIAL}
    own = {"source": "vocab.json", "target": "vocab.json"}
    if tokenizer.get("separate_vocabs"):
        own["target"] = "target_vocab.json"
    ids = {side: read_ids(folder, name) for side, name in own.items()}
    marian = read_model(folder, ids["source"].get(names["pad"]))
    spm = {side: read_sentencepiece(folder.file(f"{side}.spm")) for side in own}
    orders = {"source": marian.source_order, "target": marian.target_order}
    sides, start = {}, ""
    for side in ("target", "source"):
        path = folder.root / own[side]
        pieces = pieces_of(path, ids[side], orders[side])
        if absent := [names[n] for n in ("eos", "unk") if names[n] not in ids[side]]:
            raise BridgeError(f"{path}: {named_few(absent)}: no such piece")
        eos, unk = (pieces.index(names[n]) for n in ("eos", "unk"))
        # A source has no start symbol: the id is that of the same piece, or padding.
        start = pieces[marian.start] if side == "target" else start
        bos = pieces.index(start) if start in pieces else 0
        sides[side] = Subwords(spm[side], pieces, bos, eos, unk)
    if sides["target"].eos != marian.eos:
        raise BridgeError(
            f"{folder.root / 'config.json'}: eos_token_id is "
            f"{sides['target'].pieces[marian.eos]!r}, but the tokenizer ends with {names['eos']!r}"
        )
    settings = _settings(folder)
    return Predictor(Transformer(marian.config), tree(marian.arrays), **sides, settings=settings)


def _special(folder: Folder, tokenizer: dict[str, Any], name: str) -> str:
    value = tokenizer.get(f"{name}_token", SPECIAL[name])
    value = value.get("content") if isinstance(value, dict) else value
    if not isinstance(value, str):
        path = folder.root / "tokenizer_config.json"
        raise BridgeError(f"{path}: {name}_token={value!r} is no piece")
    return value


def _settings(folder: Folder) -> Settings:
    """The search settings of the folder; the lengths are the model's positions."""
    given = folder.json("config.json")
    note = given.get(NOTE) or {}
    generation = given | folder.optional_json("generation_config.json")
    try:
        if isinstance(note, dict) and "settings" in note:
            return Settings(**note["settings"])
        positions = given.get("max_position_embeddings") or 1024
        longest = generation.get("max_length") or positions + 1  # includes the start symbol
        return Settings(
            source_length=positions,
            target_length=min(positions, longest - 1),
            beam=generation.get("num_beams") or 1,
            alpha=float(generation.get("length_penalty", 1.0)),
            penalty="power",
        )
    except (TypeError, ValueError) as error:
        raise BridgeError(f"{folder.root}: its settings of generation: {error}") from None


def export_marian(path: Path, translator: Predictor) -> None:
    """Writes a folder that `MarianMTModel` and `MarianTokenizer` load, into the empty `path`.

    Raises BridgeError, before anything is written, naming what their library cannot compute or the
    symbols that it cannot distinguish.
    """
    source, target, settings = translator.source, translator.target, translator.settings
    config = translator.model.config
    _check_symbols(translator)
    written = model_files(
        config, flat(translator.params), target.bos, target.eos,
        max(settings.source_length, settings.target_length),
    )  # fmt: skip
    fields = dict(written.config)
    fields[NOTE] |= {"settings": plain(settings)}
    pad, start, eos = (fields[f"{name}_token_id"] for name in ("pad", "decoder_start", "eos"))
    generation = {
        "decoder_start_token_id": start, "eos_token_id": eos, "pad_token_id": pad,
        "bad_words_ids": [[i] for i in dict.fromkeys((pad, start))],
        "num_beams": settings.beam, "length_penalty": settings.alpha,
        "max_length": settings.target_length + 1,
    }  # fmt: skip
    vocabularies = {
        "vocab.json": numbered(source.pieces, written.source_order),
        "target_vocab.json": numbered(target.pieces, written.target_order),
    }
    separate = vocabularies["vocab.json"] != vocabularies["target_vocab.json"]
    tokenizer = {
        "tokenizer_class": "MarianTokenizer", "model_max_length": settings.source_length,
        "separate_vocabs": separate,
        "pad_token": target.pieces[0], "eos_token": target.pieces[target.eos],
        "unk_token": target.pieces[target.unk],
    }  # fmt: skip
    if not separate:
        del vocabularies["target_vocab.json"]
    with named(path):
        (path / "model.safetensors").write_bytes(written.weights)
        (path / "source.spm").write_bytes(source.model)
        (path / "target.spm").write_bytes(target.model)
    objects = {"config.json": fields, "generation_config.json": generation,
               "tokenizer_config.json": tokenizer, **vocabularies}  # fmt: skip
    for name, value in objects.items():
        write_json(path / name, value)


def _check_symbols(translator: Predictor) -> None:
    """Checks that padding, end and unknown symbol have one name in both vocabularies."""
    source, target = translator.source, translator.target
    for name, ours in (("padding", (0, 0)), ("the end", (source.eos, target.eos)),
                       ("unknown", (source.unk, target.unk))):  # fmt: skip
        pieces = source.pieces[ours[0]], target.pieces[ours[1]]
        if pieces[0] != pieces[1]:
            raise BridgeError(
                f"{name} is {pieces[0]!r} in the source and {pieces[1]!r} in the target: Hugging "
                "Face's Marian has one name for both"
            )
    if translator.model.config.source_vocab_size is None and source.pieces != target.pieces:
        raise BridgeError("one embedding matrix with two vocabularies: their pieces must be equal")
