import json

import pytest

from experiments.data.vocabulary import BOS, EOS, PAD, Vocabulary

PHONES = Vocabulary.of([("B", "AA"), ("AA", "ZH")])


def test_symbols_are_sorted_distinct_and_follow_the_special_ids():
    assert (PAD, BOS, EOS) == (0, 1, 2)
    assert PHONES.symbols == ("AA", "B", "ZH")
    assert PHONES.size == 6
    assert PHONES.encode(["AA", "ZH", "B"]) == [3, 5, 4, EOS]
    assert PHONES.encode([]) == [EOS]


def test_a_string_is_a_sequence_of_letters():
    assert Vocabulary.of(["cab", "a'b"]).encode("a'") == [4, 3, EOS]


def test_decode_inverts_encode_and_stops_at_the_first_end():
    assert PHONES.decode(PHONES.encode(["ZH", "B", "ZH"])) == ["ZH", "B", "ZH"]
    assert PHONES.decode([BOS, 4, PAD, 3, EOS, 5, 99]) == ["B", "AA"]
    assert PHONES.decode([4, 5]) == ["B", "ZH"]


def test_json_round_trip():
    assert Vocabulary.from_json(json.loads(json.dumps(PHONES.to_json()))) == PHONES


REFUSED = {
    "id -1": (lambda: PHONES.decode([3, -1]), "id -1 .* size 6"),
    "id 6": (lambda: PHONES.decode([3, 6]), "id 6 .* size 6"),
    "id 100": (lambda: PHONES.decode([3, 100]), "id 100 .* size 6"),
    "unknown symbol": (lambda: PHONES.encode(["AA", "QQ", "RR"]), "unknown symbol 'QQ'"),
    "repeated symbol": (lambda: Vocabulary(("B", "AA", "B")), "repeated: .'B'."),
}


@pytest.mark.parametrize(("given", "words"), REFUSED.values(), ids=REFUSED)
def test_refusals(given, words):
    with pytest.raises(ValueError, match=words):
        given()
