"""What is said beside a score."""

from experiments.evaluation.cautions import FEW, cautions


def test_few_words_and_a_test_that_is_the_validation_are_told():
    assert cautions({"test_words": FEW}, "words") == []
    (few,) = cautions({"test_sentences": 3, "test_is_valid": False}, "sentences")
    assert few.startswith("3 test sentences are few")
    both = cautions({"test_words": 3, "test_is_valid": True}, "words")
    assert len(both) == 2 and "are the validation words" in both[1]
