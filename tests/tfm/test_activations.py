"""What a model computes on its way: seen, and replaced."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tfm

CONFIG = tfm.TransformerConfig(
    vocab_size=11, d_model=8, d_ff=12, num_heads=2, num_encoder_layers=2, num_decoder_layers=2
)
MODEL = tfm.Transformer(CONFIG)
SOURCE, TARGET = jnp.array([[3, 4, 5, 2, 0], [6, 3, 2, 0, 0]]), jnp.array([[1, 7, 8], [1, 9, 2]])


@pytest.fixture(scope="module")
def params():
    return MODEL.init(jax.random.key(0), SOURCE, TARGET)["params"]


def see(params, model=MODEL, **options):
    return tfm.activations(model, params, SOURCE, TARGET, **options)


def close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_placement", ["post", "pre"])
def test_every_name_is_seen_in_the_order_of_computation(norm_placement):
    config = dataclasses.replace(CONFIG, norm_placement=norm_placement)
    model = tfm.Transformer(config)
    params = model.init(jax.random.key(0), SOURCE, TARGET)["params"]
    seen, logits = see(params, model)
    assert list(seen) == tfm.activation_names(config)
    np.testing.assert_array_equal(seen["logits"], logits)
    plain = model.apply({"params": params}, SOURCE, TARGET)
    close(logits, plain)
    heads, stream = (2, 2, 3, 4), (2, 3, 8)
    shapes = {name.split("/", 1)[1]: x.shape for name, x in seen.items() if "decoder_1/" in name}
    assert shapes == {
        "self_attention/queries": heads,
        "self_attention/keys": heads,
        "self_attention/values": heads,
        "self_attention/attention_weights": (2, 2, 3, 3),
        "self_attention/head_outputs": heads,
        "self_attention/output": stream,
        "after_attention": stream,
        "cross_attention/queries": heads,
        "cross_attention/keys": (2, 2, 5, 4),
        "cross_attention/values": (2, 2, 5, 4),
        "cross_attention/attention_weights": (2, 2, 3, 5),
        "cross_attention/head_outputs": heads,
        "cross_attention/output": stream,
        "after_cross_attention": stream,
        "feed_forward": stream,
        "after_feed_forward": stream,
    }


def test_what_is_seen_is_what_the_formulas_say(params):
    seen, _ = see(params)
    layer, own = "decoder_0/cross_attention/", params["decoder_0"]["cross_attention"]
    query, key, value, weights, heads = (seen[layer + name] for name in (
        "queries", "keys", "values", "attention_weights", "head_outputs"))  # fmt: skip
    stream = seen["decoder_0/after_attention"]
    close(query, tfm.split_heads(jnp.matmul(stream, own["w_q"], precision="highest"), 2))
    close(weights, tfm.attention_weights(query, key, tfm.padding_mask(SOURCE)))
    close(heads, jnp.matmul(weights, value, precision="highest"))
    output = jnp.matmul(tfm.merge_heads(heads), own["w_o"], precision="highest")
    close(seen[layer + "output"], output)
    norm = params["decoder_0"]["cross_attention_norm"]
    close(seen["decoder_0/after_cross_attention"], tfm.layer_norm(stream + output, **norm))


def test_a_patch_of_a_head_is_its_head_mask(params):
    silence = {"encoder_1/attention/head_outputs": lambda x: x.at[:, 1].set(0)}
    _, logits = see(params, names=[], patch=silence)
    masks = jnp.array([[1.0, 1.0], [1.0, 0.0]])
    masked = MODEL.apply({"params": params}, SOURCE, TARGET, head_masks={"encoder": masks})
    close(logits, masked)
    assert np.abs(logits - MODEL.apply({"params": params}, SOURCE, TARGET)).max() > 1e-3


@pytest.mark.parametrize("name", tfm.activation_names(CONFIG))
def test_every_name_can_be_patched(params, name):
    """It is what is seen, and what goes on."""

    def otherwise(x):
        return x + jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)

    before, logits = see(params, names=[name])
    seen, changed = see(params, names=[name], patch={name: otherwise})
    close(seen[name], otherwise(before[name]))
    assert np.abs(changed - logits).max() > 1e-4


def test_a_pattern_is_all_that_fit(params):
    seen, _ = see(params, names=["decoder_*/feed_forward", "logits"])
    assert list(seen) == ["decoder_0/feed_forward", "decoder_1/feed_forward", "logits"]
    silenced, _ = see(params, names=["*/feed_forward"], patch={"*/feed_forward": jnp.zeros_like})
    assert not any(x.any() for x in silenced.values()) and len(silenced) == 4


@pytest.mark.parametrize("changes", [{"rematerialize": "layers"}, {"implementation": "chunked"},
                                     {"compute_dtype": "bfloat16"}], ids=str)  # fmt: skip
def test_the_output_is_that_of_the_model(params, changes):
    model = tfm.Transformer(dataclasses.replace(CONFIG, **changes))
    plain = model.apply({"params": params}, SOURCE, TARGET)
    seen, logits = see(params, model, names=["*/queries", "*/output"])
    close(logits, plain)
    assert len(seen) == 2 * 6

    def total(params):
        return sum(x.sum() for x in see(params, model, names=["*/output"])[0].values())

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(jax.grad(total)(params)))


def test_it_is_traced_anew(params):
    for factor in (1.0, 2.0):
        seen, _ = see(params, patch={"logits": lambda x: factor * jnp.ones_like(x)})  # noqa: B023
        assert np.all(seen["logits"] == factor)


def test_under_jit_and_vmap(params):
    alone, logits = see(params)
    jitted, again = jax.jit(see)(params)
    jax.tree.map(close, (jitted, again), (alone, logits))
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), params)
    mapped, _ = jax.vmap(see)(stacked)
    jax.tree.map(lambda a, b: close(a[1], b), mapped, alone)


def test_weights_come_out_as_they_are_asked_for(params):
    seen, (logits, weights) = see(params, return_weights=True)
    of_layer = seen["encoder_1/attention/attention_weights"]
    np.testing.assert_array_equal(of_layer, weights["encoder"][1])
    assert logits.shape == (2, 3, 11)


def test_flax_s_own_interceptors_see_the_same(params):
    def zero(next_function, args, kwargs, context):
        value = next_function(*args, **kwargs)
        return value * 0 if context.method_name == "head_outputs" else value

    with nn.intercept_methods(zero):
        logits = MODEL.apply({"params": params}, SOURCE, TARGET)
    _, patched = see(params, patch={"*/head_outputs": jnp.zeros_like})
    close(logits, patched)


@pytest.mark.parametrize("options", [{"names": ["decoder_2/feed_forward"]},
                                     {"patch": {"decoder_2/feed_forward": jnp.sin}}])  # fmt: skip
def test_an_unknown_name_lists_those_that_there_are(params, options):
    told = r"decoder_2/feed_forward'; did you mean decoder_.*there are source_embedded, "
    with pytest.raises(ValueError, match=told):
        see(params, **options)


def test_a_loop_of_layers_is_refused_by_name(params):
    with pytest.raises(ValueError, match="scan_layers"):
        see(params, tfm.Transformer(dataclasses.replace(CONFIG, scan_layers=True)))


@pytest.mark.parametrize(("wrong", "words"), [(lambda x: x[:1], "(1, 3, 8)"),
                                              (lambda x: x > 0, "bool"),
                                              (lambda x: None, "NoneType")])  # fmt: skip
def test_a_patch_of_another_form_is_named(params, wrong, words):
    with pytest.raises(TypeError) as caught:
        see(params, patch={"decoder_0/feed_forward": wrong})
    assert all(w in str(caught.value) for w in ("decoder_0/feed_forward", words, "(2, 3, 8)"))


def test_a_patch_that_is_no_function_and_names_that_are_one_string_are_told(params):
    with pytest.raises(TypeError, match="patch of logits must be a function: lambda x: value"):
        see(params, patch={"logits": jnp.ones((2, 3, 11))})
    with pytest.raises(TypeError, match=r"names='logits' must be a list of names"):
        see(params, names="logits")
