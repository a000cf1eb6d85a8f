# %% [markdown]
# # Reading a trained model
#
# A model has learned to pronounce English: letters go in, sounds come out. Nobody told it which
# letter makes which sound, nor in which order to go through a word. What has it found out, and
# where does it keep it? We look at it in three ways: **watching** where every head looks, asking
# what the cross-attention **aligns**, and **probing** what a letter's features know about its place
# in the word. What happens when a part is taken out or changed is the next notebook's question.
#
# Set `TFM_RUN` to the folder of a finished run, such as `runs/pronounce`, to read that model.
# Without it a small one is trained here first.

# %%
import os

import jax
import jax.numpy as jnp
import numpy as np

import tfm
from experiments.data import pronunciations
from experiments.data.vocabulary import BOS, EOS, PAD
from experiments.notebooks import plots, small

plots.use_light_theme()
TINY = os.environ.get("TFM_NOTEBOOK_SIZE") == "tiny"
STEPS, LAYERS, WORDS = (20, 1, 128) if TINY else (1200, 2, 1024)

# %% [markdown]
# ## The model
#
# The small one: two encoder layers and one decoder layer of four heads, 64 features, trained by the
# same code as every run of `python -m experiments.run`, for less than a minute.

# %%
pronouncer = small.pronouncer(STEPS, LAYERS)
model, params = pronouncer.model, pronouncer.params
spelling, phones = pronouncer.source.vocabulary, pronouncer.target.vocabulary
H, N = model.config.num_heads, model.config.num_encoder_layers
print(f"{model.config.parameter_count():,} parameters, {N} + {model.config.num_decoder_layers} "
      f"layers of {H} heads")  # fmt: skip

# %% [markdown]
# How well does it speak? Some words that it has never seen:

# %%
_, unseen, _ = pronunciations.split_by_family(pronunciations.load_cmudict())
words = [word for word in unseen if 6 <= len(word) <= 12][:WORDS]
said = {w: tuple(s.split()) for w, s in zip(words, pronouncer(words, beam=1), strict=True)}
right = [word for word in words if said[word] in unseen[word]]

for word in words[:: len(words) // 8]:
    print(f"{'✓' if word in right else '·'} {word:<13}{' '.join(said[word]):<32}"
          f"{' '.join(unseen[word][0])}")  # fmt: skip
print(f"\n{len(right)} of {len(words)} words right")

# %% [markdown]
# ## Watching one word
#
# Each square below says how a *row* divides its attention among the *columns*: the darker, the
# larger the share. ■ is the end of the word, ▶ the start of the answer. First the **encoder**,
# where letters look at letters. Look for heads that look one letter back or ahead (a shifted
# diagonal), heads that wait at one letter, and heads that look at the end.

# %%
word = next((w for w in right if len(w) == 9), words[0])
letters, sounds = [*word, "■"], [*said[word], "■"]
source, labels = jnp.array(spelling.encode(word)), jnp.array(phones.encode(said[word]))


@jax.jit
def watch(params, source, labels):
    target = tfm.shift_right(labels, bos=BOS)
    return model.apply({"params": params}, source, target, return_weights=True)[1]


weights = watch(params, source, labels)
print(word, "→", *said[word])


# %%
def show_heads(kind, rows, columns, y, x):
    cells = plots.grid(len(weights[kind]), H, 2.5, 2.5, sharex=True, sharey=True)
    for layer, line in enumerate(cells):
        for head, axes in enumerate(line):
            plots.heat(
                axes, weights[kind][layer, head], rows=rows, columns=columns, most=1,
                x=x if layer == len(cells) - 1 else "", y=y if head == 0 else "",
                title=f"Layer {layer + 1}, head {head + 1}",
            )  # fmt: skip
    plots.show()


show_heads("encoder", letters, letters, "letter that looks", "letter looked at")

# %% [markdown]
# The **decoder** looks at its own sounds so far (nothing above the diagonal: the future is
# masked) …

# %%
so_far = ["▶", *said[word]]
show_heads("decoder", so_far, so_far, "after this sound", "sound looked at")

# %% [markdown]
# … and at the letters. Here a row is a sound about to be said.

# %%
show_heads("cross", sounds, letters, "sound to be said", "letter looked at")

# %% [markdown]
# ## What the cross-attention aligns
#
# One word proves nothing, so we let all the words speak. For each head: where in the word does it
# look, on average, when so much of the answer has been said?
#
# $$\text{place}_t = \sum_j A_{tj}\, j$$

# %%
lengths = {"source": 14, "target": 16}
fitting = [w for w in words if len(unseen[w][0]) < lengths["target"]]
source = [spelling.encode(w) for w in fitting]
source = pronunciations.padded(source, lengths["source"], len(fitting))
labels = [phones.encode(unseen[w][0]) for w in fitting]
labels = pronunciations.padded(labels, lengths["target"], len(fitting))
is_sound = (labels != PAD) & (labels != EOS)

cross = np.asarray(watch(params, source, labels)["cross"])  # layers, words, heads, sounds, letters

# %%
number_of_letters = (source > EOS).sum(1)
number_of_sounds = is_sound.sum(1)
letter_place = cross @ np.arange(lengths["source"]) / (number_of_letters - 1)[:, None, None]
sound_place = np.arange(lengths["target"]) / np.maximum(number_of_sounds - 1, 1)[:, None]

plotted = plots.row(len(cross), width=4.4, height=3.4, sharey=True)
for layer, axes in enumerate(plotted):
    bins = np.round(sound_place[is_sound] * 8).astype(int)
    for head in range(H):
        places = letter_place[layer][:, head][is_sound]
        means = [places[bins == b].mean() for b in range(9)]
        axes.plot(np.arange(9) / 8, means, marker="o", ms=4, label=f"head {head + 1}")
    axes.plot([0, 1], [0, 1], color=plots.MUTED, lw=1, ls=(0, (4, 3)))
    axes.set(xlabel="place of the sound in the answer, 0 to 1", title=f"Decoder layer {layer + 1}",
             ylabel="mean place of the letters looked at" if layer == 0 else "")  # fmt: skip
    axes.legend(ncols=2)
plots.show()

# %% [markdown]
# A head that follows the dashed line reads the word from left to right, as a finger would. How
# strictly? Count the sounds for which a head's favourite letter is not further left than it was for
# the sound before.

# %%
favourite = cross.argmax(-1)  # layers, words, heads, sounds
ahead = np.diff(favourite, axis=-1) >= 0
both = is_sound[:, 1:]
moves_on = np.array([[ahead[layer][:, head][both].mean() for head in range(H)]
                     for layer in range(len(cross))])  # fmt: skip
finger = np.unravel_index(moves_on.argmax(), moves_on.shape)
for layer, shares in enumerate(moves_on):
    print(f"decoder layer {layer + 1}: " + "  ".join(f"head {h + 1} {s:.0%}"
                                                     for h, s in enumerate(shares)))  # fmt: skip
print(f"the finger: layer {finger[0] + 1}, head {finger[1] + 1}")

# %% [markdown]
# ## Which letters make which sound
#
# The finger rests on a letter while a sound is said. Averaged over all words that gives a table of
# spellings, one row a sound: a dictionary of English orthography that the model has made for
# itself.

# %%
shares = cross[finger[0]][:, finger[1]]  # words, sounds, letters
table = np.zeros((phones.size, spelling.size))
rows, columns = np.broadcast_arrays(labels[:, :, None], source[:, None, :])
np.add.at(table, (rows, columns), np.where(is_sound[:, :, None], shares, 0))
table = table[EOS + 1 :, EOS + 1 :] / np.maximum(table.sum(1)[EOS + 1 :, None], 1e-9)
assert (table.sum(1) <= 1 + 1e-6).all()  # the rest is what goes to the end of the word

order = np.lexsort((-table.max(1), table.argmax(1)))
names = np.array(phones.symbols)[order]
(axes,) = plots.row(1, width=7.2, height=6.6)
plots.heat(axes, table[order], rows=names, columns=spelling.symbols, x="letter looked at",
           y="sound", title="Where the finger rests", legend="share of the attention")  # fmt: skip
plots.show()

# %% [markdown]
# ## Probing for places
#
# Does a letter's row of features say where in the word the letter stands? A **linear probe** asks:
# one matrix, fitted by least squares on half of the words, guesses the place in the other half.
#
# $$W = (X^\top X + \lambda I)^{-1} X^\top Y$$
#
# Two questions: how many letters stand *before* (the positions say that outright), and how many
# stand *after*? No single letter can know the second before it has looked around.

# %%
LETTERS = 12
is_letter = source > EOS
before = np.where(is_letter, np.arange(lengths["source"]), 0)
after = np.where(is_letter, number_of_letters[:, None] - 1 - before, 0)
learning = np.broadcast_to((np.arange(len(source)) % 2 == 0)[:, None], source.shape)


@jax.jit
def probe(states, places):
    x = jnp.concatenate([states, jnp.ones((*states.shape[:2], 1))], -1).astype(jnp.float32)
    seen = (is_letter & learning)[..., None] * x
    y = jax.nn.one_hot(places, LETTERS)
    gram = jnp.einsum("wld,wle->de", seen, seen) + 1e-2 * jnp.eye(x.shape[-1])
    w = jnp.linalg.solve(gram, jnp.einsum("wld,wlp->dp", seen, y))
    asked = is_letter & ~learning
    return (((x @ w).argmax(-1) == places) & asked).sum() / asked.sum()


# %% [markdown]
# The probe looks at the letters alone, at letters with positions, and behind each encoder layer. An
# untrained model is the control: what it shows too is not something learned.


# %%
@jax.jit
def stages(params):
    (encoded, _), kept = model.apply(
        {"params": params}, source, method="encode",
        capture_intermediates=lambda module, method: True, mutable=["intermediates"],
    )  # fmt: skip
    own = kept["intermediates"]
    layers = [own[f"encoder_{i}"]["__call__"][0][0] for i in range(N)]
    return [tfm.embed(source, params["source_embedding"]), own["_embed"][0], *layers]


untrained = jax.jit(model.init)(jax.random.key(1), source[:1], labels[:1])["params"]
found = {
    name: {question: [float(probe(s, places)) for s in stages(p)]
           for question, places in (("before", before), ("after", after))}
    for name, p in (("trained", params), ("untrained", untrained))
}  # fmt: skip

# %%
shown = ["letters", "+ positions", *(f"layer {i + 1}" for i in range(N))]
asked = is_letter & ~learning
two = plots.row(2, width=4.4, height=3.3, sharey=True)
for axes, question, places in zip(two, ("before", "after"), (before, after), strict=True):
    for (name, accuracies), style in zip(found.items(), ("-o", "--o"), strict=True):
        axes.plot(range(len(shown)), accuracies[question], style, label=name)
    commonest = np.bincount(places[asked]).max() / asked.sum()
    plots.level(axes, commonest, "the commonest answer")
    axes.set_xticks(range(len(shown)), shown)
    axes.set(xlabel="the probe looks at", ylim=(0, 1.05), title=f"How many letters {question} it?")
two[0].set_ylabel("share of letters placed rightly")
for axes in two:
    axes.legend()
plots.show()

# %% [markdown]
# The left picture jumps where the positions are added. On the right they tell little: a late letter
# is near the end of most words. To know better a letter must have looked around, and how much of
# that is *learned* is the distance between the two lines. A probe shows what is there to be read,
# not that the model reads it: for that, go back and cut something out.
