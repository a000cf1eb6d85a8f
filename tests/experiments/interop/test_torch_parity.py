"""What is imported from torch's state dicts, beside what torch computes with them."""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import math
import random

import bridging
import jax
import numpy as np
import pytest

import tfm
from experiments.interop.links import tree
from experiments.interop.torch_transformer import TorchOptions, read_model

torch = pytest.importorskip("torch")
nn = torch.nn

SIZE, SOURCE_SIZE, D, COUNT = 40, 30, 32, 200
PAD, BOS, EOS, UNK = 1, 2, 3, 0  # their ids, with padding in a place of its own


def table(length, layout):
    angles = torch.arange(length)[:, None] / 10000 ** (torch.arange(0, D, 2) / D)
    pair = angles.sin(), angles.cos()
    return torch.cat(pair, 1) if layout == "halves" else torch.stack(pair, 2).flatten(1)


class Model(nn.Module):
    """What people put around `nn.Transformer`."""

    def __init__(self, positions="interleaved", scale=True, tied=False, bias=True, **options):
        super().__init__()
        self.transformer = nn.Transformer(
            D, 4, 2, 2, 48, batch_first=True, bias=bias, **options
        )  # fmt: skip
        self.src_emb, self.tgt_emb = nn.Embedding(SOURCE_SIZE, D), nn.Embedding(SIZE, D)
        self.generator = nn.Linear(D, SIZE, bias=bias)
        if tied:
            self.generator.weight = self.tgt_emb.weight
        if positions == "learned":
            self.pos_embedding = nn.Embedding(64, D)
        else:
            self.register_buffer("pe", table(64, positions)[None])
        self.scale = math.sqrt(D) if scale else 1.0

    def placed(self, embedded):
        learned = getattr(self, "pos_embedding", None)
        rows = self.pe[0] if learned is None else learned.weight
        return embedded * self.scale + rows[: embedded.shape[1]]

    def forward(self, source, target, padded):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        y = self.transformer(
            self.placed(self.src_emb(source)), self.placed(self.tgt_emb(target)), tgt_mask=mask,
            src_key_padding_mask=padded, memory_key_padding_mask=padded, tgt_is_causal=True,
        )  # fmt: skip
        return self.generator(y)


SHAPES = {
    "post-norm": ({}, {}),
    "pre-norm, gelu, halves": (
        {"norm_first": True, "activation": "gelu", "positions": "halves"},
        {"norm_first": True, "activation": "gelu"},
    ),
    "learned positions, no scale, tied": (
        {"positions": "learned", "scale": False, "tied": True}, {"scale_embeddings": False},
    ),
    "no biases": ({"bias": False}, {}),
    "another epsilon": ({"layer_norm_eps": 1e-2}, {"layer_norm_epsilon": 1e-2}),
}  # fmt: skip


def random_model(**options):
    torch.manual_seed(0)
    model = Model(**options).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.copy_(("norm" in name and "weight" in name) + 0.2 * torch.randn_like(weight))
            elif "transformer" in name:
                weight.mul_(1.5)
            else:
                weight.copy_(torch.randn_like(weight) / math.sqrt(D))
    return model


def ours_and_theirs(model, found, seed=0):
    """log-probabilities of both for the same rows, in the order of our ids."""
    rng = np.random.default_rng(seed)
    config = found.config
    source = bridging.sentences(rng, COUNT, config.source_vocab_size or config.vocab_size, 2)
    target = bridging.sentences(rng, COUNT, config.vocab_size, 2)
    target = np.where(target == 0, 3, target)
    ours = bridging.log_probs(tfm.Transformer(config), tree(found.arrays), source, target)
    with torch.inference_mode():
        ids = (torch.tensor(o[x]) for o, x in
               ((found.source_order, source), (found.target_order, target)))  # fmt: skip
        theirs = model(*ids, torch.tensor(source == 0)).log_softmax(-1).numpy()
    return ours, theirs[..., found.target_order]


@pytest.mark.parametrize("name", SHAPES)
def test_log_probabilities_are_torch_s(name, tmp_path):
    options, told = SHAPES[name]
    model = random_model(**options)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    options = TorchOptions(num_heads=4, pad=PAD, bos=BOS, eos=EOS, unk=UNK, **told)
    found = read_model(tmp_path / "model.pt", options)
    ours, theirs = ours_and_theirs(model, found)
    assert theirs.std() > 0.5
    print(f"\nlargest difference of log-probabilities {np.abs(ours - theirs).max():.1e}")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_a_wrong_option_is_another_model(tmp_path):
    """So the agreement above says something about each."""
    model = random_model()
    torch.save({"state_dict": {f"module.{n}": t for n, t in model.state_dict().items()}},
               tmp_path / "model.pt")  # fmt: skip
    right = TorchOptions(num_heads=4, pad=PAD)
    ours, theirs = ours_and_theirs(model, read_model(tmp_path / "model.pt", right))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    for wrong in ({"num_heads": 8}, {"norm_first": True}, {"scale_embeddings": False},
                  {"activation": "gelu"}, {"layer_norm_epsilon": 1e-2}):  # fmt: skip
        options = TorchOptions(**({"num_heads": 4, "pad": PAD} | wrong))
        ours, theirs = ours_and_theirs(model, read_model(tmp_path / "model.pt", options))
        assert np.abs(ours - theirs).max() > 1e-2, wrong


def test_a_file_that_would_run_code_is_refused(tmp_path):
    """A pickle may call anything; weights_only=True calls nothing."""
    path = tmp_path / "model.pt"
    torch.save({"weight": torch.ones(1), "more": random.Random()}, path)
    with pytest.raises(ValueError, match="not a file of tensors alone"):
        read_model(path, TorchOptions())


def wheel(package, name):
    """A file of an installed package of trained weights, or a skip that names the package."""
    try:
        return importlib.metadata.distribution(package).locate_file(name)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {package} is not installed")


def test_trained_weights_of_lemmaturk():
    path = wheel("lemmaturk", "lemmaturk/weights/best_transformer.pth")
    theirs = importlib.import_module("lemmaturk").Lemmatizer("cpu")
    found = read_model(path, TorchOptions(pad=0, unk=1, bos=2, eos=3))
    c = found.config
    assert (c.vocab_size, c.d_model, c.num_encoder_layers, c.num_decoder_layers) == (74, 256, 3, 3)
    assert c.final_norm and c.sinusoid_layout == "interleaved" and not c.tied_output

    def forward(source, target, padded):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return theirs.model(source, target, None, mask, padded, None, padded)

    ours, log_probs = ours_and_theirs(forward, found)
    print(f"\nlargest difference of log-probabilities {np.abs(ours - log_probs).max():.1e}")
    np.testing.assert_allclose(ours, log_probs, rtol=0, atol=1e-4)

    letters = [letter for letter in theirs.char_to_idx if letter.isalpha() and letter.islower()]
    rng = random.Random(0)
    stems = ["ev", "kitap", "göz", "ağaç", "çocuk", "gel", "yaz", "oku", "güzel", "su"]
    ends = ["ler", "de", "imiz", "den", "lerin", "di", "ecek", "mek", "e", ""]
    words = [stem + end for stem in stems for end in ends]
    words += ["".join(rng.choices(letters, k=rng.randint(3, 9))) for _ in words]
    ids = [[*(theirs.char_to_idx[letter] for letter in word), 3] for word in words]
    source = bridging.padded(ids, 20)  # their padding is 0 too, so the ids are ours
    params = tree(found.arrays)
    model = tfm.Transformer(c)
    tokens, _ = bridging.beam(model, params, source, 2, 3, width=1, length=20)
    by_id = {i: symbol for symbol, i in theirs.char_to_idx.items()}
    equal = 0
    for word, row in zip(words, tokens.tolist(), strict=True):
        row = row[: len(word) + 5]  # where theirs stops
        lemma = "".join(by_id[i] for i in (row[: row.index(3)] if 3 in row else row))
        equal += lemma == theirs.lemmatize(word)
    print(f"{equal} of {len(words)} words equal")
    assert equal == len(words)


def annalog_models():
    """Their module alone: the package around it imports what reading weights does not need."""
    folder = wheel("annalog", "annalog/model_files")
    spec = importlib.util.spec_from_file_location(
        "annalog_models", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    package = importlib.util.module_from_spec(spec)
    importlib.sys.modules["annalog_models"] = package
    spec.loader.exec_module(package)
    return package


def test_trained_weights_of_annalog():
    path = wheel("annalog", "annalog/ckpt_and_vocab/Lev_extended.pt")
    models = annalog_models()
    found = read_model(path, TorchOptions(unk=0, pad=1, bos=2, eos=3))
    c = found.config
    assert (c.positions, c.max_learned_positions, c.final_norm) == ("learned", 102, False)
    sizes = (256, 3, 8, 512, 0.1, "cpu", 102)
    theirs = models.Seq2Seq(
        models.Encoder(c.source_vocab_size or c.vocab_size, *sizes),
        models.Decoder(c.vocab_size, *sizes), 1, 1, "cpu",
    ).eval()  # fmt: skip
    theirs.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    theirs.encoder.scale = theirs.decoder.scale = math.sqrt(256)

    def forward(source, target, padded):
        return theirs(source, target)[0]

    ours, log_probs = ours_and_theirs(forward, found)
    rng = np.random.default_rng(1)
    source = bridging.sentences(rng, COUNT, c.source_vocab_size or c.vocab_size, 3)
    ids = torch.tensor(found.source_order[source])
    tokens, _ = bridging.beam(tfm.Transformer(c), tree(found.arrays), source, 2, 3, width=1)
    equal = (tokens == greedy(theirs, ids, found)).all(1)
    print(f"\ngreedy: {equal.sum()} of {COUNT} equal, {len(np.unique(tokens, axis=0))} distinct")
    assert equal.all()

    # Its weights are so large that f32 has digits enough for neither: both are about as far from
    # what the same numbers give in f64, and there they agree.
    theirs.double()
    for module in theirs.modules():
        if hasattr(module, "head_dim"):
            module.scale = math.sqrt(module.head_dim)
    with jax.enable_x64(True):
        config = dataclasses.replace(c)
        object.__setattr__(config, "compute_dtype", "float64")
        arrays = {name: array.astype(np.float64) for name, array in found.arrays.items()}
        exact, exactly = ours_and_theirs(forward, found._replace(config=config, arrays=arrays))
    np.testing.assert_allclose(exact, exactly, rtol=0, atol=1e-9)
    errors = [np.abs(x - exactly).max() for x in (ours, log_probs)]
    print("largest differences of log-probabilities: "
          f"{np.abs(exact - exactly).max():.1e} in f64; of f32 from f64: "
          f"ours {errors[0]:.1e}, torch's {errors[1]:.1e}")  # fmt: skip
    assert errors[0] < 3 * errors[1]


def greedy(model, source, found):
    """The likeliest symbols one after the other, as torch computes them, as our ids."""
    tokens = torch.full((len(source), 1), int(found.target_order[2]))
    with torch.inference_mode():
        for _ in range(bridging.LENGTH):
            best = model(source, tokens)[0][:, -1].argmax(-1, keepdim=True)
            tokens = torch.cat([tokens, best], 1)
    ours = np.argsort(found.target_order)[tokens[:, 1:].numpy()]
    return np.where(np.cumsum(ours == 3, axis=1) - (ours == 3), 0, ours)


def test_json_is_what_the_vocabulary_of_lemmaturk_is():
    """Its ids are the ones told above."""
    path = wheel("lemmaturk", "lemmaturk/weights/vocab.json")
    ids = json.loads(path.read_text(encoding="utf-8"))
    assert [ids[f"<{n}>"] for n in ("PAD", "UNK", "SOS", "EOS")] == [0, 1, 2, 3]
