from dataclasses import replace

import jax
import pytest
from checks import assert_refuses

from tfm import BASE, BIG, TransformerConfig
from tfm.training import param_shapes

DEPARTURES = {
    "the paper's": {},
    "uneven depths": {"num_encoder_layers": 3, "num_decoder_layers": 1},
    "pre-LN": {"norm_placement": "pre"},
    "projection biases": {"projection_bias": True},
    "separate vocabularies": {"source_vocab_size": 17},
    "learned positions": {"positions": "learned", "max_learned_positions": 13},
    "output bias": {"output_bias": True},
    "final norms": {"final_norm": True},
    "pre-LN without final norms": {"norm_placement": "pre", "final_norm": False},
    "an output matrix of its own": {"tied_output": False},
    "all at once": {
        "norm_placement": "pre",
        "projection_bias": True,
        "source_vocab_size": 17,
        "positions": "learned",
        "max_learned_positions": 13,
        "output_bias": True,
    },
}


def initialised_parameters(config):
    """How many numbers the model's init would draw; shapes are derived, nothing is computed."""
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config)))


def test_the_presets_hold_the_papers_numbers():
    # Table 3, and 37,000 byte pairs (§5.1).
    base = {"d_model": 512, "d_ff": 2048, "num_heads": 8, "dropout_rate": 0.1}
    big = {"d_model": 1024, "d_ff": 4096, "num_heads": 16, "dropout_rate": 0.3}
    common = {
        "vocab_size": 37_000,
        "source_vocab_size": None,
        "num_encoder_layers": 6,
        "num_decoder_layers": 6,
        "attention_dropout_rate": 0.0,
        "norm_placement": "post",
        "projection_bias": False,
        "output_bias": False,
        "positions": "sinusoidal",
    }
    for preset, numbers in [(BASE, base | common), (BIG, big | common)]:
        assert {name: getattr(preset, name) for name in numbers} == numbers


@pytest.mark.parametrize(
    ("preset", "count", "papers"), [(BASE, 63_045_632, 65e6), (BIG, 214_171_648, 213e6)]
)
def test_the_presets_are_as_large_as_the_papers(preset, count, papers):
    assert preset.parameter_count() == count == initialised_parameters(preset)
    assert abs(count / papers - 1) < 0.04  # the paper rounds, and does not say what it counts


@pytest.mark.parametrize("options", DEPARTURES.values(), ids=DEPARTURES.keys())
def test_the_formula_counts_every_parameter(options):
    config = TransformerConfig(
        vocab_size=11,
        d_model=8,
        d_ff=20,
        num_heads=2,
        num_encoder_layers=2,
        num_decoder_layers=2,
    )
    config = replace(config, **options)
    assert config.parameter_count() == initialised_parameters(config)


def test_heads_that_do_not_divide_d_model_are_refused_with_both_numbers():
    assert_refuses(lambda: TransformerConfig(d_model=50, num_heads=8), words=["50", "8"])


def test_an_odd_d_model_is_refused_for_sinusoids_only():
    assert_refuses(lambda: TransformerConfig(d_model=15, num_heads=3), words=["15", "sinusoid"])
    TransformerConfig(d_model=15, num_heads=3, positions="learned")


@pytest.mark.parametrize(
    ("platform", "dtype"), [("cpu", "float32"), ("gpu", "bfloat16"), ("tpu", "bfloat16")]
)
def test_auto_is_decided_by_the_platform(platform, dtype):
    assert TransformerConfig(compute_dtype="auto").for_platform(platform).compute_dtype == dtype
    assert (
        TransformerConfig(compute_dtype="float64").for_platform(platform).compute_dtype == "float64"
    )


def test_a_model_whose_compute_dtype_is_not_decided_is_refused():
    config = TransformerConfig(compute_dtype="auto")
    assert_refuses(param_shapes, config, words=["compute_dtype='auto'", "for_platform"])


@pytest.mark.parametrize("name", ["dropout_rate", "attention_dropout_rate"])
@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_outside_0_to_1_is_refused(name, rate):
    assert_refuses(lambda: TransformerConfig(**{name: rate}), words=[name, str(rate)])


@pytest.mark.parametrize("epsilon", [0.0, -1e-6, float("inf"), float("nan")])
def test_an_epsilon_that_is_not_positive_and_finite_is_refused(epsilon):
    words = ["layer_norm_epsilon", str(epsilon)]
    assert_refuses(lambda: TransformerConfig(layer_norm_epsilon=epsilon), words=words)


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "source_vocab_size",
        "d_model",
        "d_ff",
        "num_heads",
        "num_encoder_layers",
        "num_decoder_layers",
        "max_learned_positions",
    ],
)
def test_a_size_below_1_is_refused(name):
    assert_refuses(lambda: TransformerConfig(**{name: 0}), words=[name, "0"])
