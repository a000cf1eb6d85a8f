# %% [markdown]
# # Derivatives, and what they cost
#
# Training needs one derivative: the gradient of a batch's loss. A pure function has more. The
# gradient of **each example** says which words pull the model where, and how many words a batch
# needs. The **Hessian** says how steep the valley is around a trained model. Neither needs new
# code: they are `jax.vmap` and `jax.jvp` of the same loss. What they cost stands at the end.
#
# Set `TFM_RUN` to the folder of a finished run, such as `runs/pronounce`, to take that model.
# Without it a small one is trained here first, for less than a minute.

# %%
import dataclasses
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

import tfm
from experiments.data import pronunciations
from experiments.data.vocabulary import BOS
from experiments.notebooks import plots, small

plots.use_light_theme()
TINY = os.environ.get("TFM_NOTEBOOK_SIZE") == "tiny"
STEPS, LAYERS, WORDS, CHUNK, TURNS = (20, 1, 32, 16, 3) if TINY else (1200, 2, 1024, 64, 40)

pronouncer = small.pronouncer(STEPS, LAYERS)
config, params = pronouncer.model.config, pronouncer.params
print(f"{config.parameter_count():,} parameters")

lengths = {"source": 14, "target": 16}
seen_words, _, _ = pronunciations.split_by_family(pronunciations.load_cmudict())
words = [w for w in seen_words if 6 <= len(w) <= 12 and len(seen_words[w][0]) < lengths["target"]]
words = [str(w) for w in np.random.default_rng(0).choice(words, WORDS, replace=False)]
rows = {
    "source": [pronouncer.source.encode(word) for word in words],
    "target": [pronouncer.target.vocabulary.encode(seen_words[word][0]) for word in words],
}
batch = {
    side: jnp.asarray(pronunciations.padded(rows[side], lengths[side], WORDS)) for side in rows
}


def loss(params, batch, implementation="auto"):
    """Nats a sound, without dropout."""
    model = tfm.Transformer(dataclasses.replace(config, implementation=implementation))
    total, count = tfm.summed_loss(model, params, batch, bos=BOS, smoothing=0.0)
    return total / count


# %% [markdown]
# ## A gradient for each word
#
# $$g_i = \nabla_\theta\, \ell(x_i, y_i; \theta)$$
#
# `jax.vmap` maps the gradient over the words; what is kept of each is its length and its loss.
# `jax.lax.map` takes a few words at a time, since a gradient has as many numbers as the model.


# %%
def squared_norm(tree):
    return optax.tree.norm(tree, squared=True)


def gradient_of_word(params, word):
    """Its loss and its gradient; a word is a batch of one row."""
    return jax.value_and_grad(loss)(params, jax.tree.map(lambda ids: ids[None], word))


@jax.jit
def losses_and_squares(params, batch):
    def of_word(word):
        value, gradient = gradient_of_word(params, word)
        return value, squared_norm(gradient)

    return jax.lax.map(of_word, batch, batch_size=CHUNK)


losses, squares = losses_and_squares(params, batch)
lengths_of_gradients = np.sqrt(squares)

(axes,) = plots.row(1, width=6.4, height=3.4)
axes.loglog(losses, lengths_of_gradients, "o", ms=3, alpha=0.4)
axes.set(xlabel="loss of the word, nats a sound", ylabel="length of its gradient",
         title="A word that is said wrongly pulls hard")  # fmt: skip
pulling = np.argsort(-lengths_of_gradients)
offsets = [(-4, 6), (-4, -12), (-4, 6)]
for i, offset in zip(pulling[:3], offsets, strict=True):
    axes.annotate(words[i], (losses[i], lengths_of_gradients[i]), offset,
                  textcoords="offset points", ha="right", fontsize=9)  # fmt: skip
plots.show()

# %% [markdown]
# Which words pull hardest? A name, words that are not said as they are written, and compounds that
# the model reads across their seam.

# %%
said = pronouncer([words[i] for i in pulling[:8]], beam=1)
for i, heard in zip(pulling[:8], said, strict=True):
    print(f"{words[i]:<13}{lengths_of_gradients[i]:>6.1f}   {' '.join(seen_words[words[i]][0]):<34}"
          f"the model says {heard}")  # fmt: skip

# %% [markdown]
# ## How many words does a batch need?
#
# The gradient of a batch of $B$ words is the true one with noise of size
# $\operatorname{tr}\Sigma/B$. Where the two are equally long is the *simple noise scale*
# (McCandlish et al. 2018, §2.2):
#
# $$B_{\text{noise}} = \frac{\operatorname{tr}\Sigma}{\lVert G\rVert^2}
# = \frac{\mathbb{E}\lVert g_i\rVert^2 - \lVert G\rVert^2}{\lVert G\rVert^2}$$
#
# A batch much smaller than this is mostly noise, and a much larger one says the same thing again:
# the scale is where more words in a batch stop shortening a training. The mean gradient of $n$
# words is itself noisy, which makes $\lVert G\rVert^2$ too large by $\operatorname{tr}\Sigma/n$:
# both are estimated without that bias.


# %%
def gradients(params, batch):
    """Σ gᵢ and Σ |gᵢ|² over the words of a batch, each word's gradient made once."""

    def of_word(word):
        _, gradient = gradient_of_word(params, word)
        return gradient, squared_norm(gradient)

    def add(sums, some):
        own = jax.vmap(of_word)(some)
        return jax.tree.map(lambda total, each: total + each.sum(0), sums, own), None

    chunks = jax.tree.map(lambda ids: ids.reshape(-1, CHUNK, *ids.shape[1:]), batch)
    start = jax.tree.map(jnp.zeros_like, params), jnp.zeros(())
    return jax.lax.scan(add, start, chunks)[0]


@jax.jit
def noise(params, batch):
    """(|G|², tr Σ), each without bias."""
    total, squares = gradients(params, batch)
    mean, each = squared_norm(total) / WORDS**2, squares / WORDS
    return (WORDS * mean - each) / (WORDS - 1), WORDS * (each - mean) / (WORDS - 1)


untrained = tfm.Transformer(config).init(
    jax.random.key(1), batch["source"][:1], batch["target"][:1]
)["params"]

(axes,) = plots.row(1, width=6.4, height=3.4)
sizes = 2.0 ** np.arange(15)
for name, model_params in (("untrained", untrained), ("trained", params)):
    length, variance = (float(x) for x in noise(model_params, batch))
    scale = variance / length
    print(f"{name}: |G|² {length:.3g}, tr Σ {variance:.3g}: {scale:,.0f} words")
    axes.semilogx(sizes, 100 * scale / (sizes + scale), label=f"{name}: half at {scale:,.0f} words")
plots.level(axes, 50, "as much noise as gradient")
axes.set(xlabel="words in a batch", ylabel="noise in its gradient, % of |g|²", ylim=(0, 102),
         title="A trained model needs larger batches")  # fmt: skip
axes.legend(loc="upper right")
plots.show()

# %% [markdown]
# ## How steep is the valley?
#
# A Hessian has as many rows as the model has parameters, and is never written down. Its product
# with a vector is the derivative of the gradient along that vector,
#
# $$Hv = \frac{d}{dt}\nabla L(\theta + tv)\Big|_{t=0}$$
#
# which is `jax.jvp` of `jax.grad`. Repeated on its own answer it finds the steepest direction
# (power iteration), and $v^\top H v$ is its curvature $\lambda$: the parabola along it is $L +
# t\,g^\top v + \tfrac12\lambda t^2$.


# %%
few = jax.tree.map(lambda ids: ids[:256], batch)


def hessian_vector(params, batch, vector, implementation="auto"):
    gradient = jax.grad(lambda p: loss(p, batch, implementation))
    return jax.jvp(gradient, (params,), (vector,))


def unit(tree):
    return optax.tree.scale(1 / optax.tree.norm(tree), tree)


@jax.jit
def along(vector):
    """(gᵀv, vᵀHv) and the direction that Hv points to."""
    gradient, product = hessian_vector(params, few, vector)
    return optax.tree.vdot(gradient, vector), optax.tree.vdot(vector, product), unit(product)


any_direction = unit(optax.tree.random_like(jax.random.key(0), params))
vector = any_direction
for _ in range(TURNS):
    steepest = vector
    slope, curvature, vector = along(vector)
print(f"the steepest direction: λ = {curvature:.1f}; plain gradient descent diverges there "
      f"beyond a rate of 2/λ = {2 / curvature:.3f}")  # fmt: skip

# %%
distances = np.linspace(-0.6, 0.6, 25)


@jax.jit
def walk(vector):
    def at(distance):
        return loss(optax.tree.add_scale(params, distance, vector), few)

    return jax.lax.map(at, distances)


(axes,) = plots.row(1, width=6.4, height=3.4)
for name, direction, color in (("steepest", steepest, plots.BLUE),
                               ("random", any_direction, plots.ORANGE)):  # fmt: skip
    slope, curvature, _ = (jax.device_get(x) for x in along(direction))
    values = np.asarray(walk(direction))
    parabola = values[len(values) // 2] + slope * distances + curvature * distances**2 / 2
    axes.plot(distances, values, color=color, label=f"{name} direction, λ = {curvature:.2g}")
    axes.plot(distances, parabola, color=color, ls=(0, (2, 2)))
axes.set(xlabel="distance from the trained model", ylabel="loss, nats a sound",
         title="The loss (lines) and the Hessian's parabola (dashes)")  # fmt: skip
axes.legend()
plots.show()

# %% [markdown]
# The parabola tells the loss near the model and is wrong further out, where the loss grows more
# slowly. A random direction is flat: nearly all of the steepness lies in a few of the directions.
#
# ## What each derivative costs
#
# Time and memory of each, of the same words, as multiples of one gradient of the batch. The memory
# is what XLA reserves for intermediate results. Forward mode (`jvp`) goes through the formulas,
# without kernels (`implementation="formula"`).

# %%
some = jax.tree.map(lambda ids: ids[:CHUNK], batch)


def of_each_word(params, batch):
    return jax.vmap(gradient_of_word, (None, 0))(params, batch)


def lengths_of_each_word(params, batch):
    return jax.vmap(squared_norm)(of_each_word(params, batch)[1])


def word_by_word(params, batch):
    return jax.lax.map(lambda word: squared_norm(gradient_of_word(params, word)[1]), batch)


def slope_along(params, batch):
    return jax.jvp(lambda p: loss(p, batch, "formula"), (params,), (any_direction,))


derivatives = {
    "loss": loss,
    "gradient": jax.value_and_grad(loss),
    "slope along a direction (jvp)": slope_along,
    "Hessian-vector product": lambda p, b: hessian_vector(p, b, any_direction),
    "… by the formulas": lambda p, b: hessian_vector(p, b, any_direction, "formula"),
    "gradient of each word, kept": of_each_word,
    "… only its length": lengths_of_each_word,
    "… word by word": word_by_word,
}


def cost(function):
    """(seconds, bytes): the fastest of a few calls, and what XLA reserves beside the result."""
    compiled = jax.jit(function).lower(params, some).compile()
    analysis = compiled.memory_analysis()
    seconds = []
    for _ in range(3 if TINY else 9):
        started = time.perf_counter()
        jax.block_until_ready(compiled(params, some))
        seconds.append(time.perf_counter() - started)
    return min(seconds), analysis.temp_size_in_bytes + analysis.output_size_in_bytes


costs = {name: cost(function) for name, function in derivatives.items()}
a_gradient = costs["gradient"]
for name, (seconds, size) in costs.items():
    print(f"{name:<30}{1e3 * seconds:>8.1f} ms {seconds / a_gradient[0]:>6.2f} ×"
          f"{size / 1e6:>9.1f} MB {size / a_gradient[1]:>6.2f} ×")  # fmt: skip

# %%
left, right = plots.row(2, width=4.6, height=3.4, sharey=True)
names = list(costs)[::-1]
for axes, which, title in ((left, 0, "Time"), (right, 1, "Memory")):
    ratios = [costs[name][which] / a_gradient[which] for name in names]
    axes.barh(names, ratios, color=plots.BLUE)
    axes.bar_label(axes.containers[0], [f"{ratio:.1f}" for ratio in ratios], padding=3, fontsize=9)
    axes.set(xlabel=f"gradients of {CHUNK} words", title=title, xlim=(0, 1.15 * max(ratios)))
plots.show()

# %% [markdown]
# The gradients of all words cost less than twice the time of their sum, and the memory of a model
# for each word where all are kept. A Hessian-vector product is some two gradients.
