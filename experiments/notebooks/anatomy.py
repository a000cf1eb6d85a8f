# %% [markdown]
# # Anatomy of a Transformer
#
# One sentence, eight words, goes in on the left and comes out on the right. We follow it through
# every organ: embedding, positions, heads, masks, feed-forward network, norm, output. Each organ
# is **one formula and one line of code**, and after each line an `assert` holds our result against
# what the whole model computed at that place. When this page has run to its end, nothing in the
# model is left unexplained.
#
# The model is small, but it is the real one: the architecture of
# [Attention Is All You Need](https://arxiv.org/abs/1706.03762), with one encoder layer and one
# decoder layer. Its task fits into a sentence too: *say it backwards*.

# %%
import os

import jax
import jax.numpy as jnp
import numpy as np

import tfm
from experiments.claims import study
from experiments.claims.evidence import Budget
from experiments.data.vocabulary import BOS, EOS, Vocabulary
from experiments.notebooks import plots

plots.use_light_theme()
jax.config.update("jax_default_matmul_precision", "highest")  # so that a GPU rounds as a CPU does

STEPS = 20 if os.environ.get("TFM_NOTEBOOK_SIZE") == "tiny" else 1000

# %% [markdown]
# ## A model to look into
#
# Sixteen words are all it knows. It has been shown random strings of four to eight of them, each
# with the same string reversed, and nothing else. Training takes some seconds.

# %%
WORDS = Vocabulary(("the", "a", "old", "small", "cat", "dog", "bird", "tree", "house", "saw",
                    "heard", "near", "under", "and", "sang", "slept"))  # fmt: skip
task = study.reversal(range(4, 9), symbols=len(WORDS.symbols))
model = tfm.Transformer(task.config())
trained = study.train(
    Budget(seeds=1, many=1, effort=1.0), task,
    lambda: study.Trainee(model, study.optimizer(STEPS)), STEPS, probe_at=(),
)  # fmt: skip
params = jax.tree.map(lambda leaf: leaf[0, 0], trained.params)

print(f"{model.config.parameter_count():,} parameters; d_model = {model.config.d_model}, "
      f"h = {model.config.num_heads} heads, d_ff = {model.config.d_ff}")  # fmt: skip

# %%
(axes,) = plots.row(1, width=6.4, height=2.4)
axes.semilogy(trained.loss[0, 0])
plots.level(axes, np.log(len(WORDS.symbols)), "guessing: ln 16")
axes.set(xlabel="training step", ylabel="loss, nats a word", title="Learning to speak backwards")
plots.show()

# %% [markdown]
# ## The sentence
#
# A model sees numbers, not words: every word has an **id**. Ids 0, 1 and 2 are kept for padding,
# *start* and *end*. The decoder is given the answer so far, that is, the answer moved one place to
# the right behind *start*: at each place it has to say the word that comes next.

# %%
sentence = ["the", "cat", "saw", "a", "bird", "near", "the", "tree"]
answer = sentence[::-1]
source = jnp.array(WORDS.encode(sentence))
labels = jnp.array(WORDS.encode(answer))
target = tfm.shift_right(labels, bos=BOS)

heard, said_so_far, to_say = [*sentence, "■"], ["▶", *answer], [*answer, "■"]
for name, words, ids in (("encoder in", heard, source), ("decoder in", said_so_far, target),
                         ("to be said", to_say, labels)):  # fmt: skip
    print(f"{name}  " + "".join(f"{word:>7}" for word in words))
    print(f"{'ids':>10}  " + "".join(f"{i:>7}" for i in ids))

# %% [markdown]
# ## What the model itself computes
#
# We run the whole model once and keep everything that any of its parts returns. That is what each
# step below has to agree with.


# %%
@jax.jit
def dissect(params):
    return model.apply(
        {"params": params}, source, target, return_weights=True,
        capture_intermediates=lambda module, method: True, mutable=["intermediates"],
    )  # fmt: skip


(logits, own_weights), kept = dissect(params)
own = kept["intermediates"]


def agree(ours, theirs):
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


# %% [markdown]
# ## 1 · Embedding
#
# $$x_i = E(\mathrm{id}_i)\,\sqrt{d_{\text{model}}}$$
#
# Every word is a row of one table: 64 numbers that the training has chosen. The root keeps them as
# large as the positions that are about to be added. (§3.4 of the paper)

# %%
embedded = tfm.embed(source, params["source_embedding"])

assert embedded.shape == (9, 64)
agree(embedded, params["source_embedding"][source] * np.sqrt(64))
agree(embedded[0], embedded[6])  # "the" and "the": one word, one row

# %%
(axes,) = plots.row(1, width=9)
plots.heat(axes, embedded, rows=heard, x="feature", y="word", title="Words as rows of numbers",
           legend="value")  # fmt: skip
plots.show()

# %% [markdown]
# Look at the two rows named *the*: they are the same. As far as the embedding goes the model could
# not say which of them comes first.

# %% [markdown]
# ## 2 · Positions
#
# $$PE(i, 2k) = \sin\frac{i}{10000^{2k/d_{\text{model}}}}, \qquad
# PE(i, 2k+1) = \cos\frac{i}{10000^{2k/d_{\text{model}}}}$$
#
# A row of clock hands. The first pair of features turns fast, once in six words; the last so slowly
# that it hardly moves in a chapter. Reading all the hands tells the place. (§3.5)

# %%
positions = tfm.sinusoidal_positions(len(source), 64)
x = embedded + positions

agree(x, own["_embed"][0])
assert jnp.abs(x[0] - x[6]).max() > 0.5  # now the first "the" and the second differ

# %%
fan, hands = plots.row(2, width=4.6)
plots.heat(fan, tfm.sinusoidal_positions(50, 64), x="feature", y="position",
           title="The first 50 positions", legend="value")  # fmt: skip
for k in (0, 4, 8):
    hands.plot(tfm.sinusoidal_positions(50, 64)[:, 2 * k], label=f"feature {2 * k}")
hands.set(xlabel="position", ylabel="value", title="Three hands, three speeds", ylim=(-1.1, 1.6))
hands.legend(ncols=3, loc="upper center")
plots.show()

# %% [markdown]
# ## 3 · Queries, keys, values, and heads
#
# $$Q = xW^Q, \quad K = xW^K, \quad V = xW^V, \qquad d_k = d_{\text{model}}/h$$
#
# Each word asks a question (its query), wears a label (its key) and has something to tell (its
# value). The 64 features are then cut into four **heads** of 16: four conversations held at once,
# each in a smaller space. (§3.2.2)

# %%
attention = params["encoder_0"]["attention"]
query, key, value = (tfm.split_heads(x @ attention[name], 4) for name in ("w_q", "w_k", "w_v"))

assert query.shape == (4, 9, 16)  # heads, words, d_k
jax.tree.map(agree, [query, key, value], own["encoder_0"]["attention"]["query_key_value"][0])
agree(tfm.merge_heads(query), x @ attention["w_q"])  # nothing is lost by cutting

# %% [markdown]
# ## 4 · Attention weights
#
# $$A = \operatorname{softmax}\!\left(\frac{QK^\top}{\sqrt{d_k}}\right)$$
#
# Where a question meets a fitting label the product is large. The softmax turns each row into
# shares that sum to one: how this word divides its attention among all words. (§3.2.1)

# %%
weights = tfm.attention_weights(query, key)

agree(weights, own_weights["encoder"][0])
agree(weights.sum(-1), 1.0)


# %%
def show_heads(weights, rows, y, x):
    for head, axes in enumerate(plots.row(4, width=2.9, sharey=True)):
        plots.heat(
            axes, weights[head], rows=rows, columns=heard, upright=False, most=1, x=x,
            y="" if head else y, title=f"Head {head + 1}", legend="share" if head == 3 else None,
        )  # fmt: skip
    plots.show()


show_heads(weights, heard, "word that looks (query)", "word looked at (key)")

# %% [markdown]
# ## 5 · The weighted sum
#
# $$\mathrm{head}_i = A_i V_i, \qquad
# \mathrm{MultiHead} = \operatorname{Concat}(\mathrm{head}_1, \dots, \mathrm{head}_h)\,W^O$$
#
# Each word takes home a mixture of what the others had to tell, in the shares just seen. The heads
# are laid side by side again, and a last matrix lets them talk to one another.

# %%
attended = tfm.merge_heads(weights @ value) @ attention["w_o"]

agree(attended, own["encoder_0"]["attention"]["attend"][0][0])
agree(attended, tfm.multi_head_attention(x, x, *(attention[f"w_{n}"] for n in "qkvo"), num_heads=4))

# %% [markdown]
# ## 6 · Add and normalise
#
# $$\operatorname{LN}(x) = \frac{x - \mu}{\sqrt{\sigma^2 + \varepsilon}}\,\gamma + \beta
# \qquad\text{applied to}\qquad x + \operatorname{Sublayer}(x)$$
#
# What was heard is *added* to what was there, so a layer only ever corrects. Then each word's 64
# numbers are brought back to mean zero and deviation one, before $\gamma$ and $\beta$ let the model
# choose another scale. (§3.1)

# %%
norm = params["encoder_0"]["attention_norm"]
summed = x + attended
normed = tfm.layer_norm(summed, norm["scale"], norm["bias"])

agree(normed, own["encoder_0"]["attention_norm"]["__call__"][0])
plain = tfm.layer_norm(summed, jnp.ones(64), jnp.zeros(64))
np.testing.assert_allclose(plain.mean(-1), 0, atol=1e-5)
np.testing.assert_allclose(plain.std(-1), 1, atol=1e-4)

# %%
places = np.arange(len(heard))
(axes,) = plots.row(1, width=7, height=2.8)
for shift, name, rows in ((-0.15, "before", summed), (0.15, "after", normed)):
    axes.errorbar(places + shift, rows.mean(-1), rows.std(-1), fmt="o", capsize=4, label=name)
axes.set_xticks(places, heard)
axes.set(xlabel="word", ylabel="mean ± deviation of its features", title="One scale for every word")
axes.legend(loc="upper right", ncols=2)
axes.margins(y=0.25)
plots.show()

# %% [markdown]
# ## 7 · The feed-forward network
#
# $$\operatorname{FFN}(x) = \max(0,\; xW_1 + b_1)\,W_2 + b_2$$
#
# So far words have only been mixed. Now each word thinks for itself: 256 detectors fire or stay
# silent, and what fired is written back. No word sees another here. (§3.3)

# %%
w = params["encoder_0"]["feed_forward"]
thought = tfm.feed_forward(normed, w["w1"], w["b1"], w["w2"], w["b2"])

agree(thought, own["encoder_0"]["feed_forward"]["__call__"][0])
agree(thought[3], tfm.feed_forward(normed[3], w["w1"], w["b1"], w["w2"], w["b2"]))  # one word alone

# %%
fired = jax.nn.relu(normed @ w["w1"] + w["b1"])
order = jnp.argsort(fired.argmax(0) - 0.01 * fired.max(0))  # by the word that each answers most to
(axes,) = plots.row(1, width=9)
plots.heat(axes, fired[:, order], rows=heard, x="detector, sorted by the word it answers to most",
           y="word", title=f"{float((fired == 0).mean()):.0%} of the detectors are silent",
           legend="strength")  # fmt: skip
plots.show()

# %% [markdown]
# One more *add and normalise*, and the encoder has read the sentence.

# %%
norm = params["encoder_0"]["feed_forward_norm"]
encoded = tfm.layer_norm(normed + thought, norm["scale"], norm["bias"])

agree(encoded, own["encode"][0][0])

# %% [markdown]
# ## 8 · Masks
#
# Two rules say who may look at whom. **Causal:** when word $i$ is to be said, the words after it
# have not been said yet, so position $i$ sees positions $j \le i$ only. **Padding:** short
# sentences are filled up with zeros, and nobody looks at filling. A mask is a table of yes and no;
# where it says no the softmax gives exactly zero. (§3.2.3)

# %%
causal = tfm.causal_mask(9)
padded = jnp.concatenate([source, jnp.zeros(3, int)])
padding = tfm.padding_mask(padded)

encoded_padded, _ = model.apply({"params": params}, padded, method="encode")
agree(encoded_padded[:9], encoded)  # filling changes nothing

# %%
left, right = plots.row(2, width=3.9, height=3.2)
plots.heat(left, causal, rows=said_so_far, columns=said_so_far, upright=False, most=2,
           x="may be looked at (blue)", y="looks", title="Causal")  # fmt: skip
plots.heat(right, jnp.broadcast_to(padding[0], (12, 12)), rows=[*heard, *"···"],
           columns=[*heard, *"···"], upright=False, most=2, x="may be looked at (blue)", y="looks",
           title="Padding, three places")  # fmt: skip
plots.show()

# %% [markdown]
# ## 9 · The decoder looks back at itself
#
# $$A = \operatorname{softmax}\!\left(\frac{QK^\top}{\sqrt{d_k}}\right)
# \quad\text{over } j \le i \text{ only}$$
#
# The same organ as in the encoder, with the causal mask.

# %%
y = tfm.embed(target, params["embedding"]) + positions
layer = params["decoder_0"]
self_attention = [layer["self_attention"][f"w_{n}"] for n in "qkvo"]
looked_back = tfm.multi_head_attention(y, y, *self_attention, num_heads=4, mask=causal)
norm = layer["self_attention_norm"]
y = tfm.layer_norm(y + looked_back, norm["scale"], norm["bias"])

agree(y, own["decoder_0"]["self_attention_norm"]["__call__"][0])
assert (jnp.triu(own_weights["decoder"][0], 1) == 0).all()  # not one glance ahead

# %% [markdown]
# ## 10 · The decoder looks at the sentence
#
# $$\operatorname{Attention}(Q_{\text{decoder}}, K_{\text{encoder}}, V_{\text{encoder}})$$
#
# The bridge between the two halves: queries come from what has been said, keys and values from what
# was heard.

# %%
cross = [layer["cross_attention"][f"w_{n}"] for n in "qkvo"]
query = tfm.split_heads(y @ cross[0], 4)
key = tfm.split_heads(encoded @ cross[1], 4)
cross_weights = tfm.attention_weights(query, key)

agree(cross_weights, own_weights["cross"][0])

# %%
show_heads(cross_weights, to_say, "word to be said (query)", "word heard (key)")

# %% [markdown]
# There it is. To say the first word the model looks at the last one heard, then at the one before,
# and so on, from the top right to the bottom left: a mirror, and nobody told it to. *The* is found
# at the right place both times, though both are the same row of the table. That is the work of the
# positions.

# %%
fetched = tfm.multi_head_attention(y, encoded, *cross, num_heads=4)
norm = layer["cross_attention_norm"]
y = tfm.layer_norm(y + fetched, norm["scale"], norm["bias"])
w, norm = layer["feed_forward"], layer["feed_forward_norm"]
thought = tfm.feed_forward(y, w["w1"], w["b1"], w["w2"], w["b2"])
y = tfm.layer_norm(y + thought, norm["scale"], norm["bias"])

agree(y, own["decoder_0"]["__call__"][0][0])

# %% [markdown]
# ## 11 · From features to a word
#
# $$P(\text{word}) = \operatorname{softmax}(yW + b)$$
#
# Every word's own row is compared with the 64 features at hand; $W$ is the embedding table once
# more, turned on its side, and $b$ is zero. The softmax makes the comparison a probability. (§3.4)

# %%
table = params["embedding"]
probabilities = tfm.output_distribution(y, table.T, jnp.zeros(len(table)))

agree(probabilities, jax.nn.softmax(logits))
agree(probabilities.sum(-1), 1.0)

# %%
(axes,) = plots.row(1, width=7.6, height=3.4)
plots.heat(axes, probabilities[:, EOS:], columns=["■", *WORDS.symbols], rows=to_say, upright=False,
           most=1, x="word", y="should be said", title="What the model would say next",
           legend="probability")  # fmt: skip
plots.show()

# %% [markdown]
# ## 12 · One word at a time
#
# $$P(y_1, \dots, y_n \mid x) = \prod_i P(y_i \mid y_{<i}, x)$$
#
# Until now the right beginning was given. Left alone the model says the likeliest word, hears
# itself say it, and goes on until it says *end*. The probability of the whole is the product of the
# steps, and both ways of computing it agree.


# %%
@jax.jit
def speak(params):
    step, cache = tfm.start_decoding(model, params, source[None], num_hypotheses=1, max_length=9)
    return tfm.greedy(step, cache, bos=BOS, eos=EOS, max_length=9)


spoken = speak(params)
ids = spoken.tokens[0, 0]

# %%
retold = model.apply({"params": params}, source, tfm.shift_right(ids, bos=BOS))
chosen = jnp.take_along_axis(jax.nn.log_softmax(retold), ids[:, None], axis=1)[:, 0]
agree(chosen[: spoken.lengths[0, 0]].sum(), spoken.log_probs[0, 0])

assert STEPS < 1000 or WORDS.decode(ids) == answer
print("heard:", *sentence)
print("said: ", *WORDS.decode(ids), f"  (probability {float(jnp.exp(spoken.log_probs[0, 0])):.3f})")

# %% [markdown]
# That was all of it: a lookup, clock hands, three questions a word, a softmax, a sum, a norm, a
# small network, and the table once more. The paper's model does the same with 512 features, eight
# heads and six layers on each side.
