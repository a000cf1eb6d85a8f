# %% [markdown]
# # Taking a trained model apart
#
# Looking at a trained model shows what is there, not what is needed. So we change it and see what
# it says then: **cutting out** one head at a time (how much worse, and *which mistakes* come),
# **moving** what one head computes for one word to another (what it *carries*), and stopping at
# each layer of the decoder (*when* the answer is there).
#
# Set `TFM_RUN` to the folder of a finished run, such as `runs/pronounce`, to take that model.
# Without it a small one is trained here first, for less than a minute.

# %%
import functools
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
STEPS, LAYERS, WORDS, PAIRS = (20, 1, 64, 32) if TINY else (1200, 2, 512, 384)

pronouncer = small.pronouncer(STEPS, LAYERS)
model, params = pronouncer.model, pronouncer.params
phones = pronouncer.target.vocabulary
H, N, M = (model.config.num_heads, model.config.num_encoder_layers, model.config.num_decoder_layers)
print(f"{model.config.parameter_count():,} parameters, {N} + {M} layers of {H} heads")

# %% [markdown]
# Some words that it has never seen, with their first pronunciation. The right sounds so far are
# always given (teacher forcing), so that each sound is a question of its own.

# %%
lengths = {"source": 14, "target": 16}
seen_words, unseen, _ = pronunciations.split_by_family(pronunciations.load_cmudict())


def rows(words, lexicon):
    """Letters [words, S] and sounds [words, T], padded."""
    letters = [pronouncer.source.encode(word) for word in words]
    sounds = [phones.encode(lexicon[word][0]) for word in words]
    return (pronunciations.padded(letters, lengths["source"], len(words)),
            pronunciations.padded(sounds, lengths["target"], len(words)))  # fmt: skip


words = [w for w in unseen if 6 <= len(w) <= 12 and len(unseen[w][0]) < lengths["target"]][:WORDS]
source, labels = rows(words, unseen)
so_far = tfm.shift_right(jnp.asarray(labels), bos=BOS)
real = labels != PAD

# %% [markdown]
# ## Cutting out heads
#
# A head mask multiplies one head's output by zero; what does the loss say? Every head of the model
# is cut out in turn, in one program: `jax.lax.map` over the masks. A loss is a mean over all
# sounds, so we also keep the model's answer to each.

# %%
kinds = {"encoder": N, "decoder": M, "cross": M}
heads = [(kind, layer, head) for kind, layers in kinds.items()
         for layer in range(layers) for head in range(H)]  # fmt: skip
masks = {kind: np.ones((len(heads) + 1, layers, H), np.float32) for kind, layers in kinds.items()}
for i, (kind, layer, head) in enumerate(heads):
    masks[kind][i, layer, head] = 0  # the last mask stays all ones


def without(head_masks):
    """The loss in nats a sound, and the answer to each question: [words, T]"""
    logits = model.apply({"params": params}, source, so_far, head_masks=head_masks)
    losses = tfm.label_smoothed_cross_entropy(logits, labels, 0.0)
    return jnp.where(real, losses, 0).sum() / real.sum(), logits.argmax(-1)


losses, answers = jax.jit(lambda masks: jax.lax.map(without, masks))(masks)
*cut, whole = np.asarray(losses)
answers = np.asarray(answers)
rise = np.array(cut).reshape(-1, H) - whole
print(f"loss with all heads: {whole:.3f} nats a sound")

# %%
names_of_attention = [f"{kind} {layer + 1}" for kind, layers in kinds.items()
                      for layer in range(layers)]  # fmt: skip
columns = [str(h + 1) for h in range(H)]


def show_heads(values, title, legend, form, **options):
    (axes,) = plots.row(1, width=5.6, height=0.55 * len(values) + 1)
    plots.heat(axes, values, rows=names_of_attention, columns=columns, x="head", y="attention",
               title=title, legend=legend, **options)  # fmt: skip
    largest = options.get("most", np.abs(values).max())
    for (line, head), value in np.ndenumerate(values):
        axes.text(head, line, form.format(value), ha="center", va="center", fontsize=9,
                  color="white" if abs(value) > 0.6 * largest else plots.INK)  # fmt: skip
    plots.show()


show_heads(rise, "The loss rises when this head is cut out", "rise, nats a sound", "{:+.3f}")

# %%
for which, i in (("most", int(np.argmax(cut))), ("least", int(np.argmin(cut)))):
    kind, layer, head = heads[i]
    print(f"needed {which}: {kind} layer {layer + 1}, head {head + 1}: {cut[i] - whole:+.3f}")

# %% [markdown]
# ### Which mistakes come?
#
# A loss hides *what* goes wrong. Sort each question by its right answer: a **vowel** (the hard part
# of English), a **consonant**, or the **end** of the word. How many more of each kind are answered
# wrongly without the head?

# %%
ends = labels == EOS
vowel_ids = [phones.encode([s])[0] for s in phones.symbols if s[0] in "AEIOU"]
vowels = np.isin(labels, vowel_ids)
answered = {"vowels": vowels, "consonants": real & ~vowels & ~ends, "ends": ends}
wrong = answers != labels  # [heads + 1, words, T]
shares = np.array([wrong[:, asked].mean(1) for asked in answered.values()])  # [kinds, heads + 1]
more = (shares[:, :-1] - shares[:, -1:]).T  # [heads, kinds]
print("wrong with all heads: "
      + "  ".join(f"{kind} {share:.1%}" for kind, share in zip(answered, shares[:, -1],
                                                               strict=True)))  # fmt: skip

hardest = np.argsort(-more.max(1))[:6]
(axes,) = plots.row(1, width=6.4, height=3.2)
places = np.arange(len(hardest))
for k, kind in enumerate(answered):
    axes.bar(places + 0.27 * (k - 1), 100 * more[hardest, k], width=0.25, label=kind)
named = [f"{heads[i][0]} {heads[i][1] + 1}\nhead {heads[i][2] + 1}" for i in hardest]
axes.set_xticks(places, named)
axes.set(xlabel="head cut out", ylabel="more answered wrongly, points",
         title="What the model gets wrong without it")  # fmt: skip
axes.legend(ncols=3)
plots.show()

# %% [markdown]
# And the mistakes themselves, for the head that is missed most: which sound becomes which?

# %%
missed = int(np.argmax(cut))
new = real & wrong[missed] & ~wrong[-1]
swaps = np.stack([labels[new], answers[missed][new]], 1)
pairs, counts = np.unique(swaps, axis=0, return_counts=True)
symbol = {EOS: "the end"} | dict(enumerate(phones.symbols, start=EOS + 1))
kind, layer, head = heads[missed]
print(f"{new.sum()} new mistakes without {kind} {layer + 1}, head {head + 1}; the commonest:")
for i in np.argsort(-counts)[:8]:
    right, said = (symbol.get(int(id_), "nothing") for id_ in pairs[i])
    print(f"{counts[i]:>5}  {right} becomes {said}")

# %% [markdown]
# ## Moving one head's output to another word
#
# Cutting out says that a head is needed, not what it carries. So take two words that differ in one
# letter and one sound, *bat* and *cat*: let the model read the first, but put into its place what
# **one head** computed for the second (*activation patching*). If the head carries the letter, the
# model now wants to say the other sound. How far does it go of the whole way?
#
# $$\text{share} = \frac{\ln P_{\text{patched}}(\text{other sound}) - \ln P(\text{other sound})}
# {\ln P_{\text{other word}}(\text{other sound}) - \ln P(\text{other sound})}$$


# %%
def twins(lexicon):
    """Pairs of words of 4 to 8 letters that differ in one letter, and in one sound at `site`."""
    waiting = {}
    for word in sorted(w for w in lexicon if 4 <= len(w) <= 8):
        for hole in range(len(word)):
            waiting.setdefault((word[:hole], word[hole + 1 :]), []).append(word)
    for one, *others in waiting.values():
        for other in others[:1]:
            sounds = lexicon[one][0], lexicon[other][0]
            apart = [i for i, (a, b) in enumerate(zip(*sounds, strict=False)) if a != b]
            if len(sounds[0]) == len(sounds[1]) < lengths["target"] and len(apart) == 1:
                yield one, other, apart[0]


every = seen_words | unseen
found_twins = list(twins(every))
np.random.default_rng(0).shuffle(found_twins)
chosen = found_twins[:PAIRS]
site = np.array([int(s) for _, _, s in chosen])


(one, own), (other, sound) = (rows([pair[k] for pair in chosen], every) for k in (0, 1))
shared = tfm.shift_right(jnp.asarray(own), bos=BOS)  # up to the site both words have these sounds
print(len(found_twins), "pairs, such as", ", ".join(f"{a}/{b}" for a, b, _ in chosen[:6]))

# %% [markdown]
# `tfm.activations` returns what the model computes on its way, by layer and name; `patch` puts
# something else in the place of it. The head is a traced number, so each attention compiles once.


# %%
def log_prob(logits):
    """ln P of the other word's sound where the two part: [pairs]"""
    log_probs = jax.nn.log_softmax(logits)[jnp.arange(len(site)), site]
    return log_probs[jnp.arange(len(site)), jnp.asarray(sound)[jnp.arange(len(site)), site]]


@jax.jit
def look(source):
    return tfm.activations(model, params, source, shared, names=["*/head_outputs"])


@functools.partial(jax.jit, static_argnums=0)
def with_head_of(name, head, source, elsewhere):
    patch = {name: lambda x: x.at[:, head].set(elsewhere[:, head])}
    return log_prob(tfm.activations(model, params, source, shared, names=[], patch=patch)[1])


(_, logits), (of_other, logits_of_other) = look(one), look(other)
unpatched = log_prob(logits)
way = np.asarray(log_prob(logits_of_other) - unpatched)
clear = way > 2  # where the model knows the difference: the share has a denominator
moved = {}
for kind, layers in kinds.items():
    attention = {"encoder": "encoder_{}/attention", "decoder": "decoder_{}/self_attention",
                 "cross": "decoder_{}/cross_attention"}[kind]  # fmt: skip
    for layer in range(layers):
        name = f"{attention.format(layer)}/head_outputs"
        for head in range(H):
            patched = with_head_of(name, head, one, of_other[name])
            share = np.asarray(patched - unpatched) / way
            moved[kind, layer, head] = float(np.mean(share[clear]))

# %%
table_of = np.array(list(moved.values())).reshape(-1, H)
show_heads(table_of, "How far one head moves the model to the other word's sound",
           "share of the way", "{:.0%}", most=max(1.0, float(np.abs(table_of).max())))  # fmt: skip
most = max(moved, key=moved.get)
print(f"{clear.sum()} pairs that the model tells apart; the letter goes through {most[0]} layer "
      f"{most[1] + 1}, head {most[2] + 1}: {moved[most]:.0%} of the way alone")  # fmt: skip

# %% [markdown]
# The decoder's own attention moves nothing: up to the sound where they part, the two answers are
# equal, and so is all that it sees. The encoder's heads move little where the letter itself goes
# past them along the residual stream.
#
# ## When is the answer there?
#
# The residual stream goes through the decoder from sub-layer to sub-layer, and at its end the table
# of sounds makes logits of it. What if we ask earlier? The *logit lens* makes logits of the stream
# behind each sub-layer, while the right sounds so far are given.

# %%
sublayers = {"attention": "self", "cross_attention": "cross", "feed_forward": "feed-forward"}
stops = {"target_embedded": "embedding"} | {
    f"decoder_{layer}/after_{part}": f"{name} {layer + 1}"
    for layer in range(M) for part, name in sublayers.items()
}  # fmt: skip
is_sound = real & ~ends


@jax.jit
def lens(source, labels):
    target = tfm.shift_right(labels, bos=BOS)
    seen, _ = tfm.activations(model, params, source, target, names=list(stops))
    guesses = [model.apply({"params": params}, seen[s], method="logits").argmax(-1) for s in stops]
    return [((guess == labels) & is_sound).sum() / is_sound.sum() for guess in guesses]


shares_right = [float(share) for share in lens(source, labels)]
(axes,) = plots.row(1, width=6.4, height=3.2)
axes.plot(range(len(stops)), shares_right, "-o", color=plots.BLUE)
axes.set_xticks(range(len(stops)), stops.values())
commonest = np.bincount(labels[is_sound]).max() / is_sound.sum()
plots.level(axes, commonest, "the commonest sound")
axes.set(xlabel="the stream behind", ylabel="sounds named rightly", ylim=(0, 1.02),
         title="What the stream would answer, behind each sub-layer")  # fmt: skip
plots.show()
print("  ".join(f"{n} {share:.0%}" for n, share in zip(stops.values(), shares_right, strict=True)))
