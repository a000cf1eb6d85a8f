# %% [markdown]
# # A day of research
#
# In the morning an idea, at noon a function, in the afternoon an experiment, in the evening a
# verdict: what it takes to try out a new kind of attention. The idea of the day is this. Attention
# compares by **dot product**, so a long key shouts: it wins wherever it points. What if attention
# compared by **distance** instead, so that each query simply listens to the keys nearest to it?

# %%
import os
import time

import jax
import jax.numpy as jnp
import numpy as np

import tfm
from experiments.claims import study
from experiments.claims.evidence import Budget, Hypothesis, Text, judge, paired_t
from experiments.data.vocabulary import BOS
from experiments.notebooks import plots
from tfm.kernels.precision import matmul
from tfm.kernels.softmax import masked_softmax

plots.use_light_theme()
jax.config.update("jax_default_matmul_precision", "highest")  # so that a GPU rounds as a CPU does

TINY = os.environ.get("TFM_NOTEBOOK_SIZE") == "tiny"
STEPS, SEEDS, JUDGES = (20, 2, 32) if TINY else (400, 5, None)  # JUDGES: rows, None means all
COUNTS, REPEATS = ((2,), 2) if TINY else ((1, 2, 4, 8), 5)  # for the race at the end

# %% [markdown]
# ## Morning: the idea on paper
#
# $$A_{ij} \propto \exp\left(-\frac{\lVert q_i - k_j\rVert^2}{2\sqrt{d_k}}\right)$$
#
# Multiply out the square: $\lVert q\rVert^2 - 2\,q\cdot k + \lVert k\rVert^2$. The first term is
# the same for every key, and a softmax does not see what is the same for all. So
#
# $$A = \operatorname{softmax}\left(
# \frac{QK^\top - \tfrac12\lVert k_j\rVert^2}{\sqrt{d_k}}\right),$$
#
# which is the paper's attention with **one term more**: a penalty on long keys. No new parameters,
# and hardly any more work.
#
# ## Noon: the idea as a function
#
# Two numbers make it a family. `penalty` 0 is the paper's attention, 1 is the new one. `sharpness`
# 0 flattens all weights: attention that looks at everything alike. It is a bad idea on purpose; we
# shall need it.


# %%
def by_distance(query, key, mask=None, *, compute_dtype=None, penalty=1.0, sharpness=1.0):
    products = matmul(query, jnp.swapaxes(key, -1, -2), compute_dtype)
    lengths = jnp.square(key).sum(-1)[..., None, :]
    logits = (products - penalty * lengths / 2) / query.shape[-1] ** 0.5
    return masked_softmax(sharpness * logits, mask)


# %% [markdown]
# Three checks before anything is trained: it is the paper's where it should be, it is the formula
# as first written down, and it is flat where it should be.

# %%
query, key = jax.random.normal(jax.random.key(0), (2, 4, 10, 16))  # heads, places, d_k
mask = tfm.causal_mask(10)

squares = jnp.square(query[:, :, None] - key[:, None]).sum(-1)
written_down = jax.nn.softmax(-squares / (2 * jnp.sqrt(16)))
flat = mask / mask.sum(1, keepdims=True)

papers = tfm.attention_weights(query, key, mask)
np.testing.assert_allclose(by_distance(query, key, mask, penalty=0.0), papers, atol=1e-6)
np.testing.assert_allclose(by_distance(query, key), written_down, atol=1e-5)
np.testing.assert_allclose(by_distance(query, key, mask, sharpness=0.0)[0], flat, atol=1e-6)

# %% [markdown]
# A picture tells what to expect. Five keys in a plane; every point of the plane is a query,
# coloured by the key that it listens to most.

# %%
keys = jnp.array([[2.2, 0.6], [-0.8, 1.9], [0.6, 0.5], [-0.5, -0.4], [1.0, -2.0]])
ticks = jnp.linspace(-3, 3, 301)
plane = jnp.stack(jnp.meshgrid(ticks, ticks), -1).reshape(-1, 2)

left, right = plots.row(2, width=3.6, height=3.5)
for axes, name, penalty in ((left, "dot product", 0.0), (right, "distance", 1.0)):
    winner = by_distance(plane, keys, penalty=penalty).argmax(-1).reshape(301, 301)
    axes.contourf(ticks, ticks, winner, levels=np.arange(6) - 0.5, colors=plots.LINES, alpha=0.22)
    axes.scatter(*keys.T, c=plots.LINES, s=50, zorder=3)
    heard = len(np.unique(winner))
    axes.set(xlabel="first feature", ylabel="second feature", aspect="equal",
             title=f"By {name}: {heard} of 5 keys are heard")  # fmt: skip
    axes.grid(False)
plots.show()

# %% [markdown]
# ## Afternoon: the rule, before the run
#
# What would count as a success? It is written down *now*, while nobody knows the answer: two
# statements about the idea, each with a threshold $\delta$, and a control. The control asks whether
# this experiment could notice a bad attention at all. If it could not, the other two verdicts are
# worth nothing.

# %%
UNIT = "nats a sound, validation loss"
HYPOTHESES = {
    "better": Hypothesis(
        Text("Attention by distance learns to pronounce better than by dot product.",
             "按距离的注意力比按点积的学得更好。"),
        f"dot product minus distance, {UNIT}", 0.02),
    "no_worse": Hypothesis(
        Text("It is no worse, to 0.02 nats.", "它并不更差（相差不超过 0.02 nat）。"),
        f"dot product minus distance, {UNIT}", -0.02),
    "control": Hypothesis(
        Text("Attention that looks at everything alike is worse.", "均匀的注意力更差。"),
        f"flat minus dot product, {UNIT}", 0.02),
}  # fmt: skip

# %% [markdown]
# ## The experiment
#
# The model takes the function where its own would stand: `tfm.Functions(attention_weights=…)`.
# Every seed starts all three models from the same parameters and shows them the same words in the
# same order, so that they can be compared in pairs. And all of it, three settings times the seeds,
# is **one program**: `study.train` runs it under one `jax.vmap`.

# %%
task = study.pronunciation()
task = task._replace(valid={name: rows[:JUDGES] for name, rows in task.valid.items()})
SETTINGS = {"penalty": [0.0, 1.0, 0.0], "sharpness": [1.0, 1.0, 0.0]}
NAMES = ("dot product", "distance", "flat")


def make(penalty, sharpness):
    def weights(*arguments, **options):
        return by_distance(*arguments, **options, penalty=penalty, sharpness=sharpness)

    model = tfm.Transformer(task.config(), tfm.Functions(attention_weights=weights))
    return study.Trainee(model, study.optimizer(STEPS))


budget = Budget(seeds=SEEDS, many=SEEDS, effort=1.0)
trained = study.train(budget, task, make, STEPS, SETTINGS)
at_end = dict(zip(NAMES, trained.probes["loss"][..., 0], strict=True))
print(f"{len(NAMES)} settings × {SEEDS} seeds × {trained.loss.shape[-1]} steps")

# %%
curves, ends = plots.row(2, width=4.4, height=3.2)
stretches = trained.loss.reshape(*trained.loss.shape[:2], 20, -1).mean(-1)
steps = (np.arange(20) + 0.5) * STEPS / 20
for name, losses, colour in zip(NAMES, stretches, plots.LINES, strict=False):
    curves.fill_between(steps, losses.min(0), losses.max(0), color=colour, alpha=0.2, lw=0)
    curves.plot(steps, losses.mean(0), color=colour, label=name)
curves.set(xlabel="training step", ylabel="training loss, nats a sound",
           title="Mean, and from best to worst seed")  # fmt: skip
curves.legend()
for pair in zip(at_end["dot product"], at_end["distance"], strict=True):
    ends.plot(["dot product", "distance"], pair, "-o", color=plots.BLUE, lw=0.8, alpha=0.8)
ends.set(xlabel="attention", ylabel="validation loss, nats a sound", xlim=(-0.4, 1.4),
         title="The two at the end, a line a seed")  # fmt: skip
plots.show()

# %% [markdown]
# ## Evening: the verdict
#
# The difference of each pair, its mean, and a 95 % interval by Student's $t$:
#
# $$\bar d \pm t_{0.975}(n-1)\,\frac{s}{\sqrt n}$$
#
# An interval above $\delta$ supports the statement, one below refutes it, and one that holds
# $\delta$ leaves it open.

# %%
gain = paired_t(at_end["dot product"] - at_end["distance"])
harm = paired_t(at_end["flat"] - at_end["dot product"])
verdicts = judge(HYPOTHESES, {"better": gain, "no_worse": gain, "control": harm})

for v in verdicts:
    low, high = v["interval"]
    print(f"{v['statement']}\n    {v['effect']:+.3f} [{low:+.3f}, {high:+.3f}], "
          f"δ = {v['threshold']:+.2f}, {v['seeds']} seeds: {v['verdict']}")  # fmt: skip

# %%
panels = plots.row(2, width=4.2, height=3.2)
for axes, (estimate, differences, title) in zip(panels, (
    (gain, at_end["dot product"] - at_end["distance"], "dot product minus distance"),
    (harm, at_end["flat"] - at_end["dot product"], "flat minus dot product (control)"),
), strict=True):  # fmt: skip
    axes.plot(np.linspace(-0.15, 0.15, SEEDS), differences, "o", color=plots.BLUE, alpha=0.6)
    low, high = estimate.interval
    axes.errorbar(0.4, estimate.effect, [[estimate.effect - low], [high - estimate.effect]],
                  fmt="o", capsize=5, color=plots.ORANGE)  # fmt: skip
    axes.set_xticks([0, 0.4], ["each seed", "mean, 95 %"])
    axes.set(xlabel="the seeds, and all together", ylabel="difference, nats a sound", title=title,
             xlim=(-0.3, 0.9))  # fmt: skip
plots.level(panels[0], 0.02, "δ of better")
plots.level(panels[0], -0.02, "δ of no_worse")
plots.level(panels[1], 0.02, "δ of control")
plots.show()

# %% [markdown]
# ## Night: was one program worth it?
#
# `jax.vmap` turns the training of one model into the training of many. Is that faster than training
# them one after another? It depends on the machine: a large accelerator has room to spare in a
# model as small as this, a processor of two cores much less. So we race them, here and now,
# compilation left out, taking turns so that a disturbance meets both.

# %%
STRETCH = 5 if TINY else 20  # training steps in one run of the race
model = tfm.Transformer(task.config())
optimizer = study.optimizer(STRETCH)
train_step = tfm.make_train_step(model, optimizer, bos=BOS, smoothing=0.0)
batches = jax.tree.map(lambda rows: rows[: STRETCH * 16].reshape(STRETCH, 16, -1), task.train)


@jax.jit
def start(seed):
    return tfm.init_state(model, optimizer, jax.random.PRNGKey(seed))


def stretch(state):
    return jax.lax.scan(train_step, state, batches)[1]["loss"]


alone = jax.jit(stretch)
together = jax.jit(jax.vmap(stretch))


# %%
def seconds(work):
    started = time.perf_counter()
    losses = jax.block_until_ready(work())
    return time.perf_counter() - started, np.array(losses)


def race(count):
    each = [start(seed) for seed in range(count)]
    states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
    runners = lambda: [alone(state) for state in each], lambda: together(states)
    for compile_first in runners:
        seconds(compile_first)
    pairs = [[seconds(runner) for runner in runners] for _ in range(REPEATS)]
    for (_, apart), (_, at_once) in pairs:
        np.testing.assert_allclose(apart, at_once, rtol=0.02)  # the same training, twice
    return np.array([[one[0], many[0]] for one, many in pairs])


times = {count: race(count) for count in COUNTS}

# %%
for count, pairs in times.items():
    one, many = np.median(pairs, axis=0) / STRETCH * 1000
    ratio = np.median(pairs[:, 0] / pairs[:, 1])
    word = "faster" if ratio > 1.05 else "slower" if ratio < 0.95 else "neither faster nor slower"
    print(f"{count} seeds: {one:6.1f} ms a step one after another, {many:6.1f} ms as one program: "
          f"{ratio:.2f} × ({word})")  # fmt: skip
print(f"on {jax.devices()[0].platform}, {os.cpu_count()} cores; medians of {REPEATS} pairs")

# %%
(axes,) = plots.row(1, width=6, height=3)
ratios = np.array([pairs[:, 0] / pairs[:, 1] for pairs in times.values()])  # counts, repeats
axes.plot(COUNTS, ratios, "o", color=plots.BLUE, alpha=0.5)
axes.plot(COUNTS, np.median(ratios, axis=1), color=plots.BLUE)
plots.level(axes, 1, "no difference")
axes.set_xticks(COUNTS)
axes.set(xlabel="seeds", ylabel="times as fast as one by one", ylim=(0, 1.15 * ratios.max()),
         title="One program against one after another: pairs of runs, and median")  # fmt: skip
plots.show()

# %% [markdown]
# Whatever the race says, one program has another merit: seeds and settings are an axis of an array,
# so every comparison is paired by construction, and there is no loop to get wrong. Now put your own
# idea in the place of `by_distance`, write your rule first, and run the page again.
