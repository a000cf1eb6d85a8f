"""Output that fails costs nothing else."""

import io

from experiments.streams import Talk


def test_what_an_encoding_lacks_is_shown_all_the_same():
    raw = io.BytesIO()
    stream = Talk(io.TextIOWrapper(raw, "ascii"))
    stream.write("rɑf  ± 0.3\n")
    stream.flush()
    assert raw.getvalue() == b"r?f  ? 0.3\n"
