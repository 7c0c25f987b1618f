"""How many letters differ."""

from __future__ import annotations


def distance(one: str, other: str) -> int:
    """The Levenshtein distance: the least number of letters to insert, delete or replace.

    Computed for all of `one` at once, in the bits of Python's integers (Myers 1999, in the form of Hyyro 2003).
    """
    if not one or not other:
        return len(one) + len(other)
    places: dict[str, int] = {}
    for number, letter in enumerate(one):
        places[letter] = places.get(letter, 0) | 1 << number
    every, last, found = (1 << len(one)) - 1, 1 << len(one) - 1, len(one)
    up, down = every, 0  # where the distance grows or shrinks by one from a row of the table to the next
    for letter in other:
        equal = places.get(letter, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        right, left = down | ~(diagonal | up) & every, up & diagonal
        found += bool(right & last) - bool(left & last)
        right, left = (right << 1 | 1) & every, left << 1 & every
        up, down = left | ~(diagonal | right) & every, right & diagonal
    return found
