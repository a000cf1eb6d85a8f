"""What holds for the public functions as a whole: how they are compiled, and who calls them."""

import collections
import gc
import inspect
import operator
import pickle
import re
import sys
import weakref
from dataclasses import replace
from functools import partial, wraps

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checks import assert_close
from public_functions import B1, BATCH, CONFIG, FUNCTIONS, IDS, KEY, MODEL, W1, W2, B, X

import tfm
from tfm.config import current_fields

# They take functions and give functions, or hand parameters on, which what is compiled would copy.
MAKERS = {
    "paper_schedule", "cosine_schedule", "make_optimizer", "init_state", "make_train_step",
    "skip_nonfinite", "start_decoding", "quantize", "activations", "activation_names",
}  # fmt: skip
PUBLIC = [n for n in tfm.__all__ if inspect.isfunction(getattr(tfm, n)) and n not in MAKERS]


@pytest.mark.parametrize("name", PUBLIC)
def test_it_is_compiled_where_it_is_defined(name):
    function = getattr(tfm, name)
    assert callable(function.lower) and function.__doc__
    assert function.__name__ == name and function.__module__.startswith("tfm.")


def test_a_function_lowers_to_its_program():
    lowered = tfm.multi_head_attention.lower(X, X, *[jnp.ones((8, 8))] * 4, num_heads=2)
    assert lowered.as_text().count("stablehlo.dot_general") == 6  # four matrices, QKᵀ, and with V
    assert lowered.compile()(X, X, *[jnp.ones((8, 8))] * 4).shape == X.shape


def test_a_signature_is_that_of_the_definition():
    assert list(inspect.signature(tfm.layer_norm).parameters) == [
        "x", "scale", "bias", "epsilon", "implementation",
    ]  # fmt: skip


def leaky(x):
    return jnp.where(x > 0, x, SLOPE["now"] * x)


SLOPE = {"now": 0.1}


def test_an_activation_of_the_user_s_is_called_each_time_and_not_kept(monkeypatch):
    """It may read what changes, hold arrays, or be made for one call."""
    before = tfm.feed_forward(-X, W1, B1, W2, B, activation=leaky)
    monkeypatch.setitem(SLOPE, "now", 0.5)
    assert np.all(tfm.feed_forward(-X, W1, B1, W2, B, activation=leaky) != before)

    class Swish:
        def __init__(self, slope):
            self.slope = slope

        def __call__(self, x):
            return x * jax.nn.sigmoid(self.slope * x)

        def method(self, x):
            return self(x)

    partials = lambda own: jax.tree_util.Partial(jnp.multiply, own.slope)  # noqa: E731
    for function in (lambda own: own, lambda own: own.method, partials):
        total = lambda slope: tfm.feed_forward(  # noqa: E731
            X,
            W1,
            B1,
            W2,
            B,
            activation=function(Swish(slope)),  # noqa: B023
        ).sum()
        assert jax.grad(total)(1.0) == jax.grad(total)(1.0) != 0
    own = Swish(1.0)
    kept = weakref.ref(own)
    tfm.feed_forward(X, W1, B1, W2, B, activation=own.method)
    del own
    gc.collect()
    assert kept() is None


SIZES = {
    "causal_mask": lambda size: tfm.causal_mask(size(4)),
    "split_heads": lambda size: tfm.split_heads(X, size(2)),
    "start_decoding": lambda size: tfm.start_decoding(MODEL, PARAMS, IDS, size(2), size(3))[1],
    "greedy": lambda size: tfm.greedy(*STARTED, bos=size(1), eos=2, max_length=size(3)),
    "sample": lambda size: tfm.sample(
        *STARTED, KEY, bos=size(1), eos=2, max_length=size(3), top_k=size(2)
    ),
}
PARAMS = MODEL.init(KEY, IDS, IDS)["params"]
STARTED = tfm.start_decoding(MODEL, PARAMS, IDS, 2, 3)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("size", [np.int64, jnp.int32, np.asarray, jnp.asarray])
def test_a_size_may_be_an_array_without_axes(name, size):
    expected = SIZES[name](int)
    jax.tree.map(np.testing.assert_array_equal, SIZES[name](size), expected)


def test_parameters_are_handed_on_and_not_copied():
    step, _ = STARTED
    assert all(map(operator.is_, jax.tree.leaves(step.params), jax.tree.leaves(PARAMS)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: tfm.embed(IDS), "'table'"),
        (lambda: tfm.dropout(KEY, X), "'rate'"),
        (lambda: tfm.greedy(*STARTED, eos=2, max_length=3), "'bos'"),
        (lambda: tfm.label_smoothed_cross_entropy(X), "'labels'"),
        (lambda: tfm.embed(IDS, X[0], False), "too many positional"),
    ],
)
def test_a_missing_argument_is_named(call, words):
    with pytest.raises(TypeError, match=words) as caught:
        call()
    assert not re.search(r"\b_\w+\(\)", str(caught.value))  # a name of ours alone


def test_a_bos_that_is_no_id_is_refused():
    for bos in (1.0, "a", None):
        with pytest.raises(TypeError, match="bos=.* must be an id"):
            tfm.greedy(*STARTED, bos=bos, eos=2, max_length=3)


def test_dropout_of_sixteen_bits_is_that_of_the_compiled_step():
    x = jnp.linspace(0, 1, 64, dtype=jnp.bfloat16)
    inside = jax.jit(lambda x: tfm.dropout(KEY, x, 0.3))(x)
    np.testing.assert_array_equal(tfm.dropout(KEY, x, 0.3), inside)


def test_dropout_of_nothing_uses_no_key():
    key = jax.random.key(0)
    for rate in (0, 0.0, 0.001):  # rounds to 0 of 256
        assert tfm.dropout(key, X, rate) is X


def test_dropout_takes_no_list():
    with pytest.raises(TypeError, match="x must be an array, not a list"):
        tfm.dropout(KEY, [1.0, 2.0], 0.5)


def test_a_state_of_another_class_stays_one():
    @flax.struct.dataclass
    class Ema(tfm.TrainState):
        ema: jax.Array

    optimizer = tfm.make_optimizer(tfm.paper_schedule(8), 1.0)
    state = tfm.init_state(MODEL, optimizer, KEY)
    state = Ema(state.step, state.params, state.opt_state, state.key, jnp.zeros(3))
    metrics = {"loss": jnp.ones(()), "gradient_norm": jnp.ones(())}
    guarded = tfm.skip_nonfinite(lambda s, batch: (s.replace(ema=s.ema + 1), metrics))
    assert guarded(state, BATCH)[0].ema.tolist() == [1, 1, 1]


def test_a_function_of_the_user_s_is_not_asked_for_the_formula():
    own = tfm.Functions(feed_forward=lambda x, w1, b1, w2, b2, *, compute_dtype: x)
    model = tfm.Transformer(replace(CONFIG, implementation="formula"), own)
    assert model.apply({"params": PARAMS}, IDS, IDS).shape == (2, 6, 11)


# The formula, without any kernel


def kernels_in(function, *arguments):
    """What a program has beyond plain operations: rules of differentiation, but for that of JAX's
    own relu, loops, and choices by platform."""
    program = str(jax.make_jaxpr(function)(*arguments))
    rules = set(re.findall(r"custom_[jv][jv]p_call\[\s*name=(\w+)", program)) - {"relu"}
    operations = re.findall(r"= (while|scan|platform_index|optimization_barrier)\b", program)
    return rules | set(operations)


HAS_FORMULA = [
    name for name, (function, *_) in FUNCTIONS.items()
    if "implementation" in inspect.signature(getattr(function, "func", function)).parameters
]  # fmt: skip


def with_formula(case):
    function, *arguments = case
    return partial(function, implementation="formula"), *arguments


def value_and_gradient(function, *arguments):
    floats = [
        i for i, x in enumerate(arguments) if jnp.issubdtype(jnp.result_type(x), jnp.floating)
    ]

    def total(*arguments):
        return jnp.sin(function(*arguments)).sum()

    return jax.value_and_grad(total, argnums=floats)(*arguments)


def test_every_function_with_kernels_has_its_formula():
    names = {
        getattr(FUNCTIONS[name][0], "func", FUNCTIONS[name][0]).__name__ for name in HAS_FORMULA
    }
    assert names >= {
        "attention_weights", "scaled_dot_product_attention", "multi_head_attention",
        "feed_forward", "layer_norm", "output_logits", "output_distribution", "linear",
    }  # fmt: skip


@pytest.mark.parametrize("name", HAS_FORMULA)
def test_the_formula_has_no_kernel_and_the_same_value_and_gradient(name):
    function, *arguments = with_formula(FUNCTIONS[name])
    assert not kernels_in(function, *arguments)
    rng = np.random.default_rng(0)
    arguments = [
        jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
        if jnp.issubdtype(x.dtype, jnp.floating) else x
        for x in arguments
    ]  # fmt: skip
    tolerance = 2e-2 if "bf16" in name else 2e-5
    plain, fast = (
        value_and_gradient(function, *arguments),
        value_and_gradient(FUNCTIONS[name][0], *arguments),
    )
    jax.tree.map(lambda a, b: assert_close(a, b, tolerance * max(1, np.abs(b).max())), plain, fast)


@pytest.mark.parametrize("over", ["all", "others", "others_but_padding"])
def test_the_loss_and_the_look_up_have_their_formulas(rng, over):
    logits = jnp.asarray(rng.standard_normal((2, 6, 11)), jnp.float32)

    def loss(implementation, logits):
        return tfm.label_smoothed_cross_entropy(
            logits, IDS + 1, 0.1, over, implementation=implementation
        )

    def rows(implementation, logits):
        return tfm.embed(IDS, logits[0].T, implementation=implementation)

    for function in (loss, rows):
        plain, fast = (partial(function, name) for name in ("formula", "auto"))
        assert not kernels_in(plain, logits)
        results = value_and_gradient(plain, logits), value_and_gradient(fast, logits)
        jax.tree.map(partial(assert_close, tolerance=1e-5), *results)


def test_a_model_of_formulas_has_no_kernel_and_the_same_loss_and_gradient():
    formulas = tfm.Transformer(replace(CONFIG, implementation="formula"))
    params = MODEL.init(KEY, IDS, IDS)["params"]

    def loss(params, model):
        return tfm.summed_loss(model, params, BATCH, 1, 0.1, KEY)[0]

    assert not kernels_in(lambda p: loss(p, formulas), params)
    kernels = {"_low_precision_linear", "_low_precision_matmul", "_over_rows", "_rows", "_softmax"}
    assert kernels_in(lambda p: loss(p, MODEL), params) == kernels
    results = [jax.value_and_grad(loss)(params, model) for model in (formulas, MODEL)]
    jax.tree.map(partial(assert_close, tolerance=2e-5), *results)


def test_an_unknown_implementation_is_refused():
    for call in (
        lambda name: tfm.layer_norm(X, B, B, implementation=name),
        lambda name: tfm.feed_forward(X, W1, B1, W2, B, implementation=name),
        lambda name: tfm.embed(IDS, jnp.ones((11, 8)), implementation=name),
        lambda name: tfm.label_smoothed_cross_entropy(
            jnp.ones((2, 6, 11)), IDS, implementation=name
        ),
        lambda name: replace(CONFIG, implementation=name),
    ):
        with pytest.raises(ValueError, match="implementation='flash' must be one of"):
            call("flash")


# One home for each formula: the model calls the published functions

CALLED = [
    "attention_weights", "scaled_dot_product_attention", "split_heads", "merge_heads",
    "feed_forward", "layer_norm", "sinusoidal_positions", "embed", "output_logits", "dropout",
    "causal_mask", "segment_mask", "padding_mask", "shift_right", "label_smoothed_cross_entropy",
]  # fmt: skip


@pytest.fixture
def calls(monkeypatch, traced_anew):
    """How often each public function is called, under whatever name a module of `tfm` has it."""
    counts = collections.Counter()

    def counted(name, function):
        @wraps(function)
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    replaced = {name: counted(name, getattr(tfm, name)) for name in CALLED}
    for name, module in list(sys.modules.items()):
        if name.startswith("tfm."):
            for own in vars(module).keys() & replaced.keys():
                monkeypatch.setattr(module, own, replaced[own])
    return counts, replaced


def functions_of(replaced):
    return tfm.Functions(**{name: replaced[name] for name in tfm.Functions.__dataclass_fields__})


TWO = replace(CONFIG, num_encoder_layers=2, num_decoder_layers=2)


def test_a_training_step_calls_each_formula_as_often_as_figure_1_shows_it(calls):
    counts, replaced = calls
    model = tfm.Transformer(TWO, functions_of(replaced))
    params = tfm.Transformer(TWO).init(KEY, IDS, IDS)["params"]
    counts.clear()
    jax.eval_shape(lambda p: tfm.summed_loss(model, p, BATCH, 1, 0.1, KEY), params)
    assert counts == {
        "scaled_dot_product_attention": 6,  # 2 in the encoder, 2 · 2 in the decoder
        "attention_weights": 6,  # which the former multiplies by V
        "split_heads": 8,  # queries, keys and values at once; queries apart in cross-attention
        "merge_heads": 6,
        "feed_forward": 4,
        "layer_norm": 10,  # one after each sub-layer
        "sinusoidal_positions": 2,
        "embed": 2,
        "output_logits": 1,
        "dropout": 12,  # one after each sub-layer and after each embedding
        "causal_mask": 1,
        "segment_mask": 3,
        "shift_right": 1,
        "label_smoothed_cross_entropy": 1,
    }


def test_a_step_of_decoding_calls_the_same_formulas(calls):
    counts, replaced = calls
    model = tfm.Transformer(TWO, functions_of(replaced))
    params = tfm.Transformer(TWO).init(KEY, IDS, IDS)["params"]
    step, cache = tfm.start_decoding(model, params, IDS, 2, 3)
    counts.clear()
    jax.eval_shape(step, jnp.ones((2, 2), jnp.int32), 0, cache)
    assert counts == {
        "scaled_dot_product_attention": 4,
        "attention_weights": 4,
        "split_heads": 4,
        "merge_heads": 4,
        "feed_forward": 2,
        "layer_norm": 6,
        "sinusoidal_positions": 1,
        "embed": 1,
        "output_logits": 1,
    }


def test_the_weights_that_are_asked_for_are_those_that_attend(calls):
    """Once an attention: not once more beside a fused one."""
    counts, replaced = calls
    params = tfm.Transformer(TWO).init(KEY, IDS, IDS)
    counts.clear()
    model = tfm.Transformer(TWO, functions_of(replaced))
    weights = jax.eval_shape(lambda p: model.apply(p, IDS, IDS, return_weights=True), params)[1]
    assert {name: x.shape for name, x in weights.items()} == dict.fromkeys(
        ("encoder", "decoder", "cross"), (2, 2, 2, 6, 6)
    )
    assert counts["attention_weights"] == 6 and "scaled_dot_product_attention" not in counts


def test_weights_change_nothing_but_what_comes_out():
    params = MODEL.init(KEY, IDS, IDS)
    logits, _ = MODEL.apply(params, IDS, IDS, return_weights=True)
    assert_close(logits, MODEL.apply(params, IDS, IDS), 1e-6)


# Former names


def test_former_names_work_with_a_warning():
    params = MODEL.init(KEY, IDS, IDS)["params"]
    with pytest.warns(FutureWarning, match="tokens_at_once is called logit_chunk now"):
        former = tfm.summed_loss(MODEL, params, BATCH, 1, 0.1, tokens_at_once=4)
    assert_close(former, tfm.summed_loss(MODEL, params, BATCH, 1, 0.1, logit_chunk=4), 0)
    with pytest.warns(FutureWarning, match="tokens_at_once is called logit_chunk now"):
        optimizer = tfm.make_optimizer(tfm.paper_schedule(8), 1.0)
        tfm.make_train_step(MODEL, optimizer, bos=1, tokens_at_once=4)
    heads = jnp.ones((2, 4, 8))
    with pytest.warns(FutureWarning, match="'reference' is called 'formula' now"):
        tfm.scaled_dot_product_attention(heads, heads, heads, implementation="reference")


def test_the_former_name_of_a_configs_field_works_with_a_warning():
    with pytest.warns(FutureWarning, match="attention is called implementation now"):
        config = tfm.TransformerConfig(attention="chunked")
    assert config == tfm.TransformerConfig(implementation="chunked")
    with pytest.warns(FutureWarning, match="attention is called implementation now"):
        assert replace(config, attention="auto").implementation == "auto"
    with pytest.warns(FutureWarning, match="attention is called implementation now"):
        assert config.attention == "chunked"


def test_a_pickle_of_a_config_with_a_former_name_is_read():
    config = tfm.TransformerConfig(implementation="chunked")
    state = dict(vars(config))
    state["attention"] = state.pop("implementation")
    former = object.__new__(tfm.TransformerConfig)
    former.__setstate__(state)
    assert former == config == pickle.loads(pickle.dumps(config))


def test_a_configs_fields_of_a_file_are_read_under_their_present_names():
    fields = {"d_model": 8, "attention": "reference"}
    assert current_fields(fields) == {"d_model": 8, "implementation": "formula"}
    assert fields == {"d_model": 8, "attention": "reference"}
