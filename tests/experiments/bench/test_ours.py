import jax.numpy as jnp
import numpy as np
import pytest

from experiments.bench.inputs import BOS, EOS, tokens
from experiments.bench.ours import build, make_weights
from experiments.bench.workloads import Decoding, Stream
from experiments.checkpoints.safetensors_io import import_params
from tfm import Transformer, TransformerConfig, greedy, start_decoding
from tfm.training import param_shapes

TINY = TransformerConfig(
    vocab_size=50, d_model=32, d_ff=32, num_heads=2, num_encoder_layers=1, num_decoder_layers=1
)


@pytest.mark.slow
def test_hypotheses_stop_at_lengths_of_their_own(tmp_path):
    work = Decoding("x", TINY, 16, 1, peers={}, source=8, target=24, stopping=True)
    make_weights(work, tmp_path / "weights")
    model = Transformer(TINY)
    params = import_params(tmp_path / "weights", param_shapes(TINY))
    step, cache = start_decoding(model, params, jnp.int32(tokens(work)[0]), 1, work.target)
    found = greedy(step, cache, bos=BOS, eos=EOS, max_length=work.target)
    lengths = np.asarray(found.lengths)
    assert len(set(lengths.ravel().tolist())) > 3 and lengths.min() < work.target / 2
    build("tfm", work, tmp_path / "weights").run()


def test_a_stream_counts_its_real_tokens(tmp_path):
    work = Stream("x", TINY, rows=3, source=20, target=18, peers={}, examples=40)
    make_weights(work, tmp_path / "weights")
    contender = build("tfm", work, tmp_path / "weights")
    done = [contender.run() for _ in range(3)]
    assert all(0.6 * 3 * 38 < tokens <= 3 * 38 for tokens in done)
    assert abs(contender.check() - np.log(50)) < 1
