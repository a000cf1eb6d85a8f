import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import references
from checks import assert_close, assert_refuses, products_in

from tfm import (
    Functions,
    Transformer,
    TransformerConfig,
    cosine_schedule,
    feed_forward,
    global_norm,
    init_state,
    make_optimizer,
    make_train_step,
    paper_schedule,
    shift_right,
    skip_nonfinite,
    summed_loss,
)
from tfm.training import complete, param_shapes

BOS, EOS = 1, 2
CONFIG = TransformerConfig(
    vocab_size=10,
    d_model=32,
    d_ff=64,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    dropout_rate=0.05,
)
MODEL, STILL = Transformer(CONFIG), Transformer(replace(CONFIG, dropout_rate=0.0))
OPTIMIZER = make_optimizer(optax.constant_schedule(3e-3), clip_threshold=1.0)


@functools.cache
def initial_state():
    return jax.jit(lambda key: init_state(MODEL, OPTIMIZER, key))(jax.random.PRNGKey(0))


def fresh_state():
    """A state that may be donated."""
    return jax.tree.map(jnp.copy, initial_state())


def copy_batch(seed, rows=16, length=12):
    """Packed sequences to be copied: as many of 2 to 5 symbols as fit in each row."""
    rng = np.random.default_rng(seed)
    batch = {
        f"{side}{name}": np.zeros((rows, length), np.int32)
        for side in ("source", "target")
        for name in ("", "_segment_ids", "_positions")
    }
    for row in range(rows):
        start, segment = 0, 1
        while start + (size := rng.integers(3, 7)) <= length:
            slots = slice(start, start + size)
            symbols = [*rng.integers(3, 10, size - 1), EOS]
            for side in ("source", "target"):
                batch[side][row, slots] = symbols
                batch[f"{side}_segment_ids"][row, slots] = segment
                batch[f"{side}_positions"][row, slots] = range(size)
            start, segment = start + size, segment + 1
    return batch


class Counted:
    """A function that counts how often it is traced."""

    def __init__(self, function):
        self.function, self.traces = function, 0

    def __call__(self, *arguments):
        self.traces += 1
        return self.function(*arguments)


TRACED = Counted(make_train_step(MODEL, OPTIMIZER, bos=BOS))
step = jax.jit(TRACED, donate_argnums=0)


def train(state, batches):
    losses = []
    for batch in batches:
        state, metrics = step(state, batch)
        losses.append(metrics["loss"])
    return state, np.array(losses)


def assert_same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_papers_schedule():
    schedule = paper_schedule(512, warmup_steps=4000)
    # Step n of the paper is count n - 1 of optax.
    for n in (1, 2, 100, 3999, 4000, 4001, 100_000):
        expected = 512**-0.5 * min(n**-0.5, n * 4000**-1.5)
        assert float(schedule(n - 1)) == pytest.approx(expected, rel=1e-6)
        assert float(schedule(jnp.int32(n - 1))) == pytest.approx(expected, rel=1e-6)
    assert float(schedule(3999)) == pytest.approx(6.9877e-4, rel=1e-4)  # its peak
    assert float(paper_schedule(512, 4000, factor=2.0)(9)) == pytest.approx(2 * float(schedule(9)))


def test_the_cosine_schedule():
    schedule = cosine_schedule(peak=0.5, warmup_steps=10, total_steps=110)
    for count, expected in [(0, 0), (5, 0.25), (10, 0.5), (60, 0.25), (110, 0), (200, 0)]:
        assert float(schedule(count)) == pytest.approx(expected, abs=1e-7)
    assert float(schedule(35)) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)) / 2)


def reference_adam(gradients, rates, threshold):
    """Clipping, then Adam with the paper's numbers: the updates of each step, in float64."""
    beta1, beta2, epsilon = 0.9, 0.98, 1e-9
    m = v = np.zeros_like(gradients[0])
    for t, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        (g,) = references.clip_by_global_norm([gradient], threshold)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        yield -rate * (m / (1 - beta1**t)) / (np.sqrt(v / (1 - beta2**t)) + epsilon)


def test_the_optimizer_clips_and_then_is_the_papers_adam(rng):
    optimizer = make_optimizer(paper_schedule(16, warmup_steps=2), clip_threshold=1.5)
    gradients = [rng.standard_normal(6) * size for size in (10.0, 0.3, 4.0)]
    for gradient in gradients:
        gradient[0] = 1e-8 * np.linalg.norm(gradient)  # so small that epsilon matters
    rates = [16**-0.5 * min(n**-0.5, n * 2**-1.5) for n in (1, 2, 3)]
    update = jax.jit(optimizer.update)
    params = {"a": jnp.zeros(4), "b": jnp.zeros(2)}
    state = optimizer.init(params)
    expected = reference_adam(gradients, rates, 1.5)
    for gradient, wanted in zip(gradients, expected, strict=True):
        g = jnp.float32(gradient)
        updates, state = update({"a": g[:4], "b": g[4:]}, state, params)
        assert_close(np.concatenate([updates["a"], updates["b"]]), wanted, 1e-5)


def test_the_loss_is_the_smoothed_cross_entropy_of_real_tokens():
    batch = copy_batch(0, rows=3)
    real = batch["target_segment_ids"] != 0
    assert not real.all()
    params = initial_state().params

    @jax.jit
    def loss_and_logits(batch):
        inputs = {k: v for k, v in batch.items() if k != "target"}
        inputs["target"] = shift_right(batch["target"], BOS, batch["target_positions"])
        logits = STILL.apply({"params": params}, **inputs)
        return summed_loss(STILL, params, batch, BOS, 0.1), logits

    (loss, tokens), logits = loss_and_logits(batch)
    per_token = references.label_smoothed_cross_entropy(
        np.float64(logits)[real], batch["target"][real], 0.1
    )
    assert tokens == real.sum()
    assert float(loss) == pytest.approx(per_token.sum(), rel=1e-5)
    other = batch | {"target": np.where(real, batch["target"], 9)}
    assert loss_and_logits(other)[0][0] == loss


@pytest.mark.parametrize("at_once", [7, 1000])
def test_the_loss_in_chunks_of_tokens_is_the_loss(at_once):
    def of(logit_chunk):
        def loss(params):
            key = jax.random.PRNGKey(1)
            return summed_loss(MODEL, params, copy_batch(1), BOS, 0.1, key, logit_chunk)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(initial_state().params)

    (whole, tokens), gradients = of(None)
    (chunked, same_tokens), same_gradients = of(at_once)
    assert tokens == same_tokens
    assert_close(chunked, whole, 1e-6)
    jax.tree.map(lambda a, b: assert_close(a, b, 2e-5), same_gradients, gradients)


def test_the_loss_in_chunks_never_holds_all_logits():
    vocabulary, batch = 5_000, copy_batch(0, rows=64)
    model = Transformer(replace(CONFIG, vocab_size=vocabulary))
    params = param_shapes(model.config)

    def bytes_of(logit_chunk):
        loss = functools.partial(summed_loss, logit_chunk=logit_chunk)
        gradient = jax.jit(jax.grad(lambda p: loss(model, p, batch, BOS, 0.1)[0]))
        return gradient.lower(params).compile().memory_analysis().temp_size_in_bytes

    logits = 4 * batch["target"].size * vocabulary
    assert bytes_of(None) > logits > 2 * bytes_of(16)


def test_logit_chunk_below_1_are_refused():
    with pytest.raises(ValueError, match="logit_chunk=0 must be at least 1"):
        summed_loss(MODEL, initial_state().params, copy_batch(0), BOS, 0.1, logit_chunk=0)


def test_a_step_compiles_once_whatever_its_batch_holds():
    train(fresh_state(), [copy_batch(seed) for seed in range(4)])
    assert TRACED.traces == 1
    assert step._cache_size() == 1


@pytest.mark.parametrize(("compute_dtype", "operand"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_every_product_of_a_step_has_the_operands_of_the_config(compute_dtype, operand):
    model = Transformer(replace(CONFIG, compute_dtype=compute_dtype))
    update = make_train_step(model, OPTIMIZER, bos=BOS)
    batch = copy_batch(0)
    products = products_in(update, initial_state(), batch, sums_of=batch["target"].size)
    assert set(products) == {(operand, operand, "f32")}


def test_a_start_symbol_outside_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"bos holds 10, .* \[0, 10\)"):
        make_train_step(MODEL, OPTIMIZER, bos=10)


@pytest.mark.gives_nan
def test_the_state_may_be_donated():
    # With its own step, as another test's was compiled where jax_debug_nans keeps what is donated.
    donating = jax.jit(make_train_step(MODEL, OPTIMIZER, bos=BOS), donate_argnums=0)
    state = fresh_state()
    after, _ = donating(state, copy_batch(0))
    assert state.params["embedding"].is_deleted()
    assert int(after.step) == 1
    donating(after, copy_batch(1))


def test_the_loss_falls():
    state, losses = train(fresh_state(), [copy_batch(seed) for seed in range(150)])
    assert losses[0] > math.log(10) - 0.3
    assert losses[-10:].mean() < 0.6 * losses[0]
    assert int(state.step) == 150


def test_one_seed_gives_one_result_bit_for_bit():
    batches = [copy_batch(seed) for seed in range(3)]
    assert_same_bits(train(fresh_state(), batches), train(fresh_state(), batches))


def test_training_goes_on_from_a_saved_state_bit_for_bit():
    batches = [copy_batch(seed) for seed in range(4)]
    whole, losses = train(fresh_state(), batches)
    half, first = train(fresh_state(), batches[:2])
    saved = jax.tree.map(np.asarray, half)  # all there is to keep: the dropout key hangs on step
    rest, second = train(jax.tree.map(jnp.asarray, saved), batches[2:])
    assert_same_bits(rest, whole)
    assert_same_bits(np.concatenate([first, second]), losses)


def test_dropout_changes_with_the_step():
    batch = copy_batch(0)
    other = fresh_state().replace(step=jnp.int32(1))
    here, there = (train(state, [batch])[1] for state in (fresh_state(), other))
    assert here != there
    expected = jax.random.fold_in(initial_state().key, 1)
    loss, tokens = jax.jit(summed_loss, static_argnums=(0, 3, 4))(
        MODEL, initial_state().params, batch, BOS, 0.1, expected
    )
    assert there[0] == pytest.approx(float(loss / tokens), rel=1e-6)


def clipped_update(accumulation, batch):
    """The update of plain gradient descent of rate 1, after clipping to 0.01, and the metrics."""
    optimizer = optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0))
    params = initial_state().params
    state = initial_state().replace(opt_state=optimizer.init(params))
    update = make_train_step(STILL, optimizer, bos=BOS, accumulation=accumulation)
    after, metrics = jax.jit(update)(state, batch)
    return jax.tree.map(jnp.subtract, after.params, params), metrics


def test_micro_batches_equal_one_large_batch():
    batch = copy_batch(5, rows=6)
    # The first third of the rows keeps one short sequence each: unequal token counts.
    for name in batch:
        batch[name][:2] = np.where(batch["target_segment_ids"][:2] == 1, batch[name][:2], 0)
    counts = (batch["target_segment_ids"].reshape(3, -1) != 0).sum(1)
    assert counts.max() > 2 * counts.min()
    (whole, metrics), (parts, part_metrics) = (clipped_update(k, batch) for k in (1, 3))
    assert metrics["gradient_norm"] > 10 * 0.01
    assert metrics["tokens"] == part_metrics["tokens"] == counts.sum()
    for name in ("loss", "gradient_norm"):
        assert float(part_metrics[name]) == pytest.approx(float(metrics[name]), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=0), parts, whole)
    # The update is 0.01 long, so 1e-6 is little beside it.
    assert float(global_norm(parts)) == pytest.approx(0.01, rel=1e-3)


def test_accumulation_that_does_not_divide_the_rows_is_refused():
    update = make_train_step(STILL, OPTIMIZER, bos=BOS, accumulation=3)
    batch = copy_batch(0, rows=4)
    assert_refuses(
        jax.eval_shape,
        update,
        initial_state(),
        batch,
        words=["3", "4"],
        error=(ValueError, TypeError),
    )


# ---- steps that go wrong


@jax.custom_vjp
def scale_gradient(x, factor):
    return x


scale_gradient.defvjp(lambda x, factor: (x, factor), lambda f, g: (g * f, jnp.zeros_like(f)))


@functools.partial(jax.jit, static_argnums=3)
def step_with_gradients_times(factor, state, batch, guarded):
    """A step where the gradient through the feed-forward networks is multiplied."""
    functions = Functions(
        feed_forward=lambda *a, **k: scale_gradient(feed_forward(*a, **k), factor)
    )
    step = make_train_step(Transformer(CONFIG, functions), OPTIMIZER, bos=BOS)
    return (skip_nonfinite(step) if guarded else step)(state, batch)


@pytest.mark.gives_nan
@pytest.mark.parametrize(
    ("factor", "norm", "largest"),
    [(np.nan, np.isnan, np.isnan), (np.inf, np.isnan, np.isnan), (1e15, np.isinf, np.isfinite)],
)
def test_a_step_without_a_finite_gradient_leaves_the_state_as_it_was(factor, norm, largest):
    before, metrics = step_with_gradients_times(1.0, initial_state(), copy_batch(0), True)
    assert not metrics["skipped"] and before.step == 1
    after, metrics = step_with_gradients_times(factor, before, copy_batch(1), True)
    assert metrics["skipped"] and np.isfinite(metrics["loss"])
    assert norm(metrics["gradient_norm"]) and largest(metrics["largest_gradient"])
    jax.tree.map(np.testing.assert_array_equal, after, before)
    # What optax alone makes of it: NaN everywhere, or an update of zero that nobody hears of.
    unguarded, _ = step_with_gradients_times(factor, before, copy_batch(1), False)
    first = jax.tree.leaves(unguarded.params)[0]
    assert unguarded.step == 2 and (np.isnan(first).all() or largest is np.isfinite)


def test_a_guarded_step_is_the_same_step():
    (one, _), (two, metrics) = (
        step_with_gradients_times(1.0, initial_state(), copy_batch(0), guarded)
        for guarded in (False, True)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8), one, two)
    assert metrics["largest_gradient"] <= metrics["gradient_norm"]


def test_a_batch_is_completed():
    batch = copy_batch(0)
    packed = {name: batch[name] for name in batch if not name.endswith("_positions")}
    completed = complete(packed)
    real = {side: batch[f"{side}_segment_ids"] > 0 for side in ("source", "target")}
    for side, where in real.items():
        found, right = (b[f"{side}_positions"] for b in (completed, batch))
        np.testing.assert_array_equal(found[where], right[where])
    losses = [summed_loss(STILL, initial_state().params, b, BOS, 0.1) for b in (batch, packed)]
    assert_close(losses[0], losses[1], 1e-5)
    # One sequence a row needs nothing but its tokens.
    single = {side: jnp.array([[3, 4, EOS, 0], [5, EOS, 0, 0]]) for side in ("source", "target")}
    ids = {f"{side}_segment_ids": (single[side] > 0) * 1 for side in ("source", "target")}
    positions = {f"{side}_positions": jnp.arange(4)[None].repeat(2, 0) for side in single}
    whole = single | ids | positions
    for batch in (single, single | ids, whole):
        completed = complete(batch)
        assert_same_bits(completed | positions, whole)
        for side, tokens in single.items():
            found = completed[f"{side}_positions"]
            np.testing.assert_array_equal(found[tokens > 0], [0, 1, 2, 0, 1])
    total, tokens = summed_loss(STILL, initial_state().params, whole, BOS, 0.1)
    _, metrics = make_train_step(STILL, OPTIMIZER, bos=BOS)(initial_state(), single)
    assert_close(metrics["loss"], total / tokens, 1e-6)


def test_a_batch_that_lacks_tokens_or_has_something_else_is_refused_by_name():
    batch = copy_batch(0)
    step = make_train_step(MODEL, OPTIMIZER, bos=BOS)
    for wrong, words, error in [
        ({n: batch[n] for n in batch if n != "target"}, ["no target"], ValueError),
        (batch | {"target_segments": batch["target"]}, ["'target_segments'"], ValueError),
        (batch | {"source": [[1, 2], [3, 4]]}, ["batch['source']", "list"], TypeError),
        (
            batch | {"target_positions": batch["target_positions"][:, :3]},
            ["batch['target_positions']", "(16, 3)", "(16, 12)"],
            AssertionError,
        ),
    ]:
        assert_refuses(step, initial_state(), wrong, words=words, error=error)


def test_wrong_values_that_can_be_seen_are_refused():
    batch = copy_batch(0)
    wrong = batch | {"target": batch["target"].copy()}
    wrong["target"][0, 0] = 10
    step = make_train_step(MODEL, OPTIMIZER, bos=BOS)
    words = ["batch['target']", "10", "[0, 10)"]
    assert_refuses(step, initial_state(), wrong, words=words, error=ValueError)
    loss = functools.partial(summed_loss, MODEL, initial_state().params)
    assert_refuses(loss, wrong, BOS, 0.1, words=words, error=ValueError)
    assert_refuses(loss, batch, 10, 0.1, words=["bos", "10", "[0, 10)"], error=ValueError)
    words = ["smoothing", "1.5"]
    assert_refuses(loss, batch, BOS, 1.5, words=words, error=ValueError)
    make = functools.partial(make_train_step, MODEL, OPTIMIZER, bos=BOS, smoothing=1.5)
    assert_refuses(make, words=words, error=ValueError)


def test_padding_may_stand_anywhere_in_a_row():
    row = jnp.array([[0, 0, 5, 6], [3, 0, 4, EOS]])
    completed = complete({"source": row, "target": row})
    assert completed["source_positions"].tolist() == [[0, 1, 2, 3]] * 2
    assert completed["source_segment_ids"].tolist() == [[0, 0, 1, 1], [1, 0, 1, 1]]
