import numpy as np

from experiments.bench.inputs import attention_inputs, examples, tokens
from experiments.bench.workloads import WORKLOADS, Attention, Stream, Training
from tfm import TransformerConfig


def test_workloads_are_what_their_ids_say():
    assert list(WORKLOADS) == [work.id for work in WORKLOADS.values()]
    base = WORKLOADS["T1"].config
    assert (base.d_model, base.num_encoder_layers, base.vocab_size) == (512, 6, 8000)
    assert WORKLOADS["T2"].dtype == WORKLOADS["T4-bf16"].dtype == "bfloat16"
    assert all(work.what and work.peers for work in WORKLOADS.values())


def test_a_stream_has_the_lengths_of_real_words():
    work = Stream("x", TransformerConfig(vocab_size=9), 4, 20, 18, peers={}, examples=300)
    made = examples(work)
    assert len(made) == 300
    lengths = np.array([[len(e["source"]), len(e["target"])] for e in made])
    assert (lengths >= 2).all() and (lengths <= [20, 18]).all()
    assert 7 < lengths[:, 0].mean() < 10 and lengths[:, 0].std() > 1.5
    assert all(ids.min() >= 3 and ids.max() < 9 for e in made for ids in e.values())
    for one, other in zip(made, examples(work), strict=True):
        np.testing.assert_array_equal(one["target"], other["target"])


def test_decoding_says_what_it_multiplies_and_when_it_stops():
    assert "int8" in WORKLOADS["D3"].what and WORKLOADS["D3"].dtype == "int8"
    assert "at most 64" in WORKLOADS["D2-stopping"].what
    assert "float32" in WORKLOADS["D2"].what


def test_every_contender_gets_the_same_data():
    work = Training("x", TransformerConfig(vocab_size=9), rows=3, length=4, peers={})
    for one, other in zip(tokens(work), tokens(work), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.shape == (3, 4) and one.min() >= 3 and one.max() < 9
    attention = Attention("x", 5, backward=False, peers={}, rows=2, heads=3, features=4)
    for one, other in zip(*(attention_inputs(attention, n) for n in ("BHLD", "BLHD")), strict=True):
        assert one.shape == (2, 3, 5, 4)
        np.testing.assert_array_equal(one, other.swapaxes(1, 2))
