"""CTranslate2's decoder, with the same parameters exported to its format."""

import os
import tempfile
from pathlib import Path

import ctranslate2
import numpy as np
from safetensors.numpy import load_file

from experiments.bench.contenders import Contender
from experiments.bench.inputs import BOS, EOS, tokens
from experiments.bench.workloads import Decoding
from experiments.interop.ctranslate2 import Pieces, specification

_POSITIONS = 512


def build(name: str, work: Decoding, weights: Path) -> Contender:
    source, target = ([[str(i) for i in row] for row in rows] for rows in tokens(work))
    with tempfile.TemporaryDirectory() as folder:
        names = Pieces([str(i) for i in range(work.config.vocab_size)], bos=BOS, eos=EOS, unk=0)
        spec = specification(work.config, load_file(weights), names, names, _POSITIONS)
        spec.optimize()
        spec.save(folder)
        translator = ctranslate2.Translator(
            folder, device="cpu", compute_type=work.dtype,
            inter_threads=1, intra_threads=len(os.sched_getaffinity(0)),
        )  # fmt: skip

    def run() -> object:
        return translator.translate_batch(
            source, beam_size=work.beam, max_batch_size=work.rows, length_penalty=0.6,
            min_decoding_length=1 if work.stopping else work.target,
            max_decoding_length=work.target,
        )  # fmt: skip

    def check() -> np.ndarray:
        scores = translator.score_batch(source, target)
        return np.array([s.log_probs[: work.target] for s in scores])  # without the end symbol

    return Contender(run, check)
