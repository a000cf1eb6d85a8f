"""Text through Hugging Face's tokenizer and generation, beside ours: whole folders, out and in."""

import json

import bridging
import numpy as np
import pytest
import sentencepiece
from bridging import TEXT, translator_of

from experiments.data.subwords import train_subwords
from experiments.inference.predictor import Settings
from experiments.interop.files import Folder
from experiments.interop.links import flat, tree
from experiments.interop.marian import export_marian, import_marian

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Their tokenizer splits at a special symbol inside text, and warns that sacremoses is missing.
LINES = [*TEXT, "Owls, frogs & dogs: 7 of them", "äöü ßé 汉字", "a", "two  spaces"]
GERMAN = [line.replace("the", "die").replace("small", "klein").replace("saw", "sah")
          for line in TEXT]  # fmt: skip


def vocal(translator, **settings):
    """A translator whose random model says something, and ends; never padding or the start,
    nor unknown and loose bytes, which each library writes out in its own way."""
    own, target = translator.model.config, translator.target
    bytes_ = {i for i, piece in enumerate(target.pieces) if piece.startswith("<0x")}
    arrays = bridging.random_arrays(
        own, 6, end=target.eos, never={0, target.bos, target.unk} | bytes_
    )
    settings = Settings(source_length=60, target_length=12, penalty="power", **settings)
    return bridging.dataclasses.replace(translator, params=tree(arrays), settings=settings)


@pytest.mark.parametrize(("shared", "size"), [(True, 280), (False, 280), (False, 284)])
def test_an_export_translates_text_there_as_here(tmp_path, shared, size):
    source = train_subwords(TEXT, 280)
    target = source if shared else train_subwords(GERMAN + TEXT[::2], size)
    translator = vocal(translator_of(source, target), alpha=0.0, beam=4)
    export_marian(tmp_path, translator)
    transformers.logging.set_verbosity_error()
    tokenizer = transformers.MarianTokenizer.from_pretrained(tmp_path)
    model = transformers.MarianMTModel.from_pretrained(tmp_path).eval()
    ids = json.loads((tmp_path / "vocab.json").read_text())
    pieces = [source.to_pieces(source.encode(line)) for line in LINES]
    assert tokenizer(LINES).input_ids == [[ids[piece] for piece in row] for row in pieces]
    ours = translator.nbest(LINES)
    with torch.inference_mode():
        found = model.generate(
            **tokenizer(LINES, padding=True, return_tensors="pt"),
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    text = tokenizer.batch_decode(found.sequences, skip_special_tokens=True)
    same = np.array([best.text.strip() == said for (best,), said in zip(ours, text, strict=True)])
    print(f"\n{same.sum()} of {len(LINES)} translations equal, {len(set(text))} distinct")
    assert len(set(text)) >= 5
    assert same.sum() >= len(LINES) - 2  # their beam is wider: see test_marian_parity.py
    log_probs = np.array([best.log_prob for (best,) in ours])
    scores = found.sequences_scores.numpy()
    np.testing.assert_allclose(log_probs[same], scores[same], rtol=0, atol=1e-3)
    assert (scores[~same] > log_probs[~same]).all()


def joint_folder(path):
    """A folder as OPUS-MT's are: a SentencePiece model a language, one vocabulary for both."""
    for name, lines in (("source", TEXT), ("target", GERMAN)):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_prefix=str(path / name), vocab_size=40,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        (path / f"{name}.model").rename(path / f"{name}.spm")
    pieces = set()
    for name in ("source", "target"):
        model = sentencepiece.SentencePieceProcessor(str(path / f"{name}.spm"))
        pieces |= {model.id_to_piece(i) for i in range(model.get_piece_size())}
    pieces -= {"<unk>", "<s>", "</s>"}
    names = ["</s>", "<unk>", *sorted(pieces), "<pad>"]
    (path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(names)}))
    config = transformers.MarianConfig(
        vocab_size=len(names), d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
        decoder_ffn_dim=48, pad_token_id=len(names) - 1, eos_token_id=0, max_position_embeddings=64,
        decoder_start_token_id=len(names) - 1, scale_embedding=True, activation_function="swish",
    )  # fmt: skip
    transformers.MarianMTModel(config).save_pretrained(path)
    return names


def test_two_sentencepiece_models_with_one_vocabulary(tmp_path):
    names = joint_folder(tmp_path)
    ours = import_marian(Folder(tmp_path))
    size = len(names)
    assert ours.target.pieces[:3] == ("<pad>", "</s>", "<unk>")
    assert (ours.target.bos, ours.target.eos, ours.target.unk) == (0, 1, 2)
    assert ours.settings == Settings(
        source_length=64, target_length=64, beam=1, alpha=1.0, penalty="power"
    )
    tokenizer = transformers.MarianTokenizer.from_pretrained(tmp_path)
    for line, german in zip([*TEXT, "Zoë?"], [*GERMAN, "klein, 7"], strict=True):
        theirs = tokenizer(line).input_ids
        assert ours.source.encode(line) == [(i + 1) % size for i in theirs]
        theirs = tokenizer(text_target=german).input_ids
        found = ours.target.encode(german)
        assert found == [(i + 1) % size for i in theirs]
        if 2 not in found:
            assert ours.target.decode(found) == tokenizer.decode(theirs, skip_special_tokens=True)
    assert flat(ours.params)["embedding"].shape == (size, 32)
