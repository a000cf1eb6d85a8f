import jax
import pytest


@pytest.fixture(autouse=True)
def strict(request):
    """JAX's own strict modes: no array gets axes unasked, no key is used twice, and no NaN comes
    out but of a test that is marked `gives_nan`."""
    finite = request.node.get_closest_marker("gives_nan") is None
    with jax.numpy_rank_promotion("raise"), jax.debug_key_reuse(True), jax.debug_nans(finite):
        yield
