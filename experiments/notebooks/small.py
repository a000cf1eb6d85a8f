"""The model that the notebooks look into: a run of yours, or a small one made in a minute."""

import dataclasses
import logging
import os
import tempfile
from pathlib import Path

from IPython.utils.capture import capture_output

import tfm
from experiments.distributed.processes import Processes
from experiments.inference.predictor import Predictor
from experiments.inference.saved import load
from experiments.pronounce import task as pronounce
from experiments.training.placement import Layout
from experiments.training.run import Run


def pronouncer(steps: int, num_encoder_layers: int) -> Predictor:
    """The run in the folder TFM_RUN; without it, a model with one decoder layer trained here.

    The small one has four heads and 64 features, and is trained by the code of every run of
    `python -m experiments.run`. What the training prints is not shown.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns that it only reads
    with capture_output():
        if run := os.environ.get("TFM_RUN"):
            return load(run)
        config = dataclasses.replace(
            pronounce.PRESETS["default"],
            steps=steps,
            log_every=steps,
            evaluate_every=steps,
            save_every=steps,
            warmup_steps=steps // 10,
            learning_rate=3e-3,
            model=tfm.TransformerConfig(
                vocab_size=42,
                source_vocab_size=30,
                d_model=64,
                d_ff=256,
                num_heads=4,
                num_encoder_layers=num_encoder_layers,
                num_decoder_layers=1,
                dropout_rate=0.0,
            ),
        )
        lexicons = pronounce.load_lexicons(config)
        examples, fingerprint = pronounce.prepare(lexicons)
        identity = {"data_sha256": fingerprint}
        layout = Layout(config.mesh, config.model, config.rows)
        with tempfile.TemporaryDirectory() as folder:
            config = dataclasses.replace(config, run=Path(folder))
            run = Run(config, identity, layout, Processes())
            return pronounce.fit(run, lexicons, examples)[0]
