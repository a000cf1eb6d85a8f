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


@pytest.mark.parametrize("i", [-1, 6, 100])
def test_an_id_outside_is_named(i):
    with pytest.raises(ValueError, match=rf"id {i} .* size 6"):
        PHONES.decode([3, i])


def test_an_unknown_symbol_is_named():
    with pytest.raises(ValueError, match="unknown symbol 'QQ'"):
        PHONES.encode(["AA", "QQ", "RR"])


def test_a_repeated_symbol_is_refused():
    with pytest.raises(ValueError, match="repeated: .'B'."):
        Vocabulary(("B", "AA", "B"))


def test_json_round_trip():
    assert Vocabulary.from_json(json.loads(json.dumps(PHONES.to_json()))) == PHONES
