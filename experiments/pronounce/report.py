"""The results of the pronunciation task: scores, sample words, attention maps, report."""

import shlex
import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from experiments.checkpoints.run_folder import RunFolder, write_text
from experiments.data.pronunciations import Lexicon
from experiments.data.tokenizer import InputError
from experiments.evaluation import error_rates
from experiments.evaluation.cautions import cautions
from experiments.inference.predictor import Predictor
from experiments.reporting.figures import learning_curves_file
from experiments.reporting.report import AttentionMap, Example, write_report
from experiments.reporting.tables import table

FAMILIAR = ("knowledge", "physician", "laughter", "rough", "theology", "champagne", "psychic",
            "weather", "autumn", "thorough", "mosquito", "chaos")  # fmt: skip
INVENTED = ("blorptastic", "snizzle", "quorbly", "transformerize", "phlant", "zhoodle")
NUM_EXAMPLES, NUM_MISTAKES, NUM_CONFUSIONS, NUM_MAPS = 6, 20, 20, 4


def pick(lexicon: Lexicon, n: int) -> list[str]:
    """n words to show: familiar ones if the lexicon has them, then spread over the alphabet."""
    words = sorted(lexicon)
    spread = words[:: max(1, len(words) // n)]
    return list(dict.fromkeys([*(w for w in FAMILIAR if w in lexicon), *spread]))[:n]


def _invented(pronouncer: Predictor) -> list[str]:
    def possible(word: str) -> bool:
        try:
            return bool(pronouncer.source.encode(word))
        except InputError:  # a lexicon of another alphabet
            return False

    return [word for word in INVENTED if possible(word)]


def make_examples(
    pronouncer: Predictor,
    train: Lexicon,
    test: Lexicon,
    hypotheses: dict[str, tuple[str, ...]],
) -> list[Example]:
    """Seen, unseen and invented words, and some mispronounced test words."""
    wrong = [word for word, phones in hypotheses.items() if phones not in test[word]]
    groups = {
        "seen": pick(train, NUM_EXAMPLES),
        "unseen": pick(test, NUM_EXAMPLES),
        "invented": _invented(pronouncer),
        "wrong": wrong[:: max(1, len(wrong) // NUM_MISTAKES)][:NUM_MISTAKES],
    }
    words = [(word, group) for group, members in groups.items() for word in members]
    predictions = [best for (best,) in pronouncer.nbest([word for word, _ in words])]
    known = train | test
    return [
        Example(
            word=word,
            group=group,
            hypothesis=hypothesis.text,
            references=[" ".join(r) for r in known.get(word, [])] if group != "invented" else [],
            score=hypothesis.score,
        )
        for (word, group), hypothesis in zip(words, predictions, strict=True)
    ]


def attention_maps(pronouncer: Predictor, words: list[str]) -> list[AttentionMap]:
    """The cross-attention of every head for the model's own pronunciations."""
    return [
        AttentionMap(
            word=word,
            letters=[*word, "</s>"],
            sounds=pronouncer.target.to_pieces(hypothesis.ids),
            weights=pronouncer.cross_attention(word, hypothesis),
        )
        for word, (hypothesis,) in zip(words, pronouncer.nbest(words), strict=True)
    ]


def show(results: dict[str, Any], examples: list[Example]) -> None:
    """Prints the scores and a few words."""
    console = Console()
    title = f"Seed {results['seed']}, beam {results['beam']}"
    rates = table(title, ["words"], ["count", "WER", "PER"])
    for part, name in (("valid", "validation"), ("test", "test")):
        shares = (f"{results[f'{part}_{rate}']:.2%}" for rate in ("wer", "per"))
        rates.add_row(name, f"{results[f'{part}_words']:,}", *shares)
    console.print(rates)
    for line in cautions(results, "words"):
        console.print(Text(f"note: {line}"))
    words = table("Pronounced", ["", "word", "pronunciation", "dictionary"], [])
    for example in examples:
        if example.group != "wrong":
            columns = example.hypothesis, "\n".join(example.references)
            words.add_row(example.group, *map(Text, (example.word, *columns)))
    console.print(words)


def report(
    config: dict[str, Any],
    lexicons: Any,
    folder: RunFolder,
    pronouncer: Predictor,
    results: dict[str, Any],
    hypotheses: list[tuple[str, ...]],
) -> list[Example]:
    """Writes report.html; returns the examples that it shows."""
    test = lexicons.test
    by_word = dict(zip(test, hypotheses, strict=True))
    examples = make_examples(pronouncer, lexicons.train, test, by_word)
    counts = error_rates.confusions(hypotheses, list(test.values())).most_common(NUM_CONFUSIONS)
    curves = learning_curves_file(folder.metrics())
    write_text(folder.path / "learning_curve.svg", curves)
    write_report(
        folder.report,
        title="Pronouncing with a Transformer",
        command=shlex.join(["python", "-m", "experiments.run", *sys.argv[1:]]),
        config=config,
        results=results,
        metrics=folder.metrics(),
        attention=attention_maps(pronouncer, pick(test, NUM_MAPS)),
        confusions=[(*pair, count) for pair, count in counts],
        examples=examples,
    )
    return examples
