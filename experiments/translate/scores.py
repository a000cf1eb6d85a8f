"""Scores of a translator, for its evaluation and for results.json."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import chex

from experiments.data.token_store import Store
from experiments.evaluation import bleu
from experiments.inference.predictor import Predictor
from experiments.translate.config import TranslateConfig
from experiments.translate.texts import Texts


def translated(translator: Predictor, sources: Sequence[str], **options: Any) -> list[str]:
    """The translation of each sentence, in parts where it is too long; '' for a blank one."""
    translations = iter(translator([s for s in sources if s.strip()], long="split", **options))
    return [next(translations) if s.strip() else "" for s in sources]


def make_evaluate(
    config: TranslateConfig, texts: Texts, translator: Predictor
) -> Callable[[chex.ArrayTree], dict[str, float]]:
    """params -> `valid_bleu` of the first `evaluated` validation pairs.

    Greedy decoding is enough to watch the training; the final result uses the beam.
    """
    sources, references = zip(*texts.valid[: config.evaluated], strict=True)
    tokenize = tokenizer(config, references)

    def evaluate(params: chex.ArrayTree) -> dict[str, float]:
        own = dataclasses.replace(translator, params=params)
        return {
            "valid_bleu": bleu.bleu(translated(own, sources, beam=1), references, tokenize).score
        }

    return evaluate


def tokenizer(config: TranslateConfig, references: Sequence[str]) -> bleu.Tokenize:
    """The one that the config names for BLEU, or that of the references' script."""
    return bleu.tokenizer_for(references) if config.bleu == "auto" else config.bleu


def scores(
    translations: list[str], references: list[str], tokenize: bleu.Tokenize = "13a"
) -> dict[str, bleu.Measure]:
    """BLEU, BLEU of the text split at spaces, and chrF."""
    return {
        "bleu": bleu.bleu(translations, references, tokenize),
        "bleu_pretokenized": bleu.bleu_pretokenized(translations, references),
        "chrf": bleu.chrf(translations, references),
    }


def results_of(
    config: TranslateConfig, store: Store, vocabulary_size: int, about: dict[str, Any],
    measured: dict[str, dict[str, bleu.Measure]], texts: Texts,
) -> dict[str, Any]:  # fmt: skip
    """The content of results.json: scores from 0 to 100, with signatures and intervals."""
    figures = {
        f"{part}_{name}": measure.score
        for part, measures in measured.items()
        for name, measure in measures.items()
    }
    details = {
        part: {name: measure.to_json() for name, measure in measures.items()}
        for part, measures in measured.items()
    }
    return figures | {
        "scores": details,
        "test_sentences": len(texts.test),
        "valid_sentences": len(texts.valid),
        "test_is_valid": not config.test,
        "cleaned": store.facts["cleaned"],
        "train_tokens": store.tokens,
        "vocabulary_size": vocabulary_size,
        **about,
        "seed": config.seed,
        "beam": config.beam,
        "alpha": config.alpha,
    }
