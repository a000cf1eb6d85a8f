import pytest

from experiments.inference.segmentation import TooLongError, parts_of


def characters(texts):
    """A vocabulary of characters, and an end symbol."""
    return [len(text) + 1 for text in texts]


def words(texts):
    return [len(text.split()) + 1 for text in texts]


def parts(text, most, count=words):
    found = parts_of(text, count, most)
    assert "".join("".join(found).split()) == "".join(text.split())  # nothing is left out
    assert max(count(found)) <= most and all(part == part.strip() for part in found)
    return found


def test_what_fits_stays_whole():
    assert parts("One. Two. Three.", 4) == ["One. Two. Three."]


def test_a_part_is_a_sentence():
    text = 'He came. "She went!" They saw (all?) Who… did?  Yes.'
    assert parts(text, 9) == ["He came.", '"She went!"', "They saw (all?)", "Who…", "did?", "Yes."]
    assert parts("今日は。はい！「そう。」また", 9, characters) == [
        "今日は。", "はい！", "「そう。」また",
    ]  # fmt: skip
    assert parts("3.14 is pi. v1.2 is not", 4) == ["3.14 is pi.", "v1.2 is not"]


def test_a_long_sentence_is_cut_into_few_parts_after_commas():
    assert parts("a b, c d, e f, g; h. i j.", 6) == ["a b, c d,", "e f, g; h.", "i j."]


def test_then_between_words():
    assert parts("a b c d e f g, h", 4) == ["a b c", "d e f", "g,", "h"]


def test_then_between_characters():
    assert parts("abcdefghij kl", 4, characters) == ["ab", "cde", "fgh", "ij", "kl"]
    assert len(parts("x" * 5000, 100, characters)) < 100


def test_a_character_that_does_not_fit_is_named():
    with pytest.raises(TooLongError, match="'a' alone is more than 1 tokens"):
        parts_of("a", characters, 1)


def test_very_long_lines_take_few_looks():
    looked = []

    def count(texts):
        looked.append(sum(map(len, texts)))
        return words(texts)

    text = "word " * 100_000 + ". " + "Another sentence here. " * 10_000
    assert len(parts(text, 50, count)) == 2041 + 10_000
    assert sum(looked) < 10 * len(text)
