"""Proves that a list of BPE merges and a table of ranks tokenise alike, or names where they do not.

tokenizer.json lists which pairs may merge, in which order; tiktoken merges any adjacent pair whose
bytes are a token, lowest id first. For trained vocabularies the two agree, but a file need not be
trained. Tokens are byte-level strings here, one character for each byte, as the file writes them.
Must never know about files or text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence


def first_disagreement(
    ranks: Mapping[str, int], merges: Sequence[Sequence[str]], *, whole_words: bool
) -> str | None:
    """Describe the first token that merges and ranks would build differently, or return None.

    By induction over ids: where all lower tokens agree, both sides reach the same pieces before
    token t is considered, so it suffices to reduce the bytes of t alone with lower ids only. If two
    pieces remain, ranks would join them, so the merge must be listed. If more remain, neither side
    builds t by merging, and only a look-up of the whole word (`whole_words`, ignore_merges in the
    file) may still return it.
    """
    # Whole-list steps, because a Llama 4 file has 440,000 merges and a start should not wait.
    pairs = set(map(tuple, merges))
    built = ["".join(pair) for pair in merges]
    if not {half for pair in pairs for half in pair}.union(built) <= ranks.keys():
        return "a merge that is no token"
    if any(len(pair) != 2 for pair in pairs):
        return "a merge of other than two tokens"
    order = [ranks[token] for token in built]
    if order != sorted(order):
        return "merges out of the order of their ids"
    n_listed = Counter(left + right for left, right in pairs)
    for token, token_id in ranks.items():
        # Where every cut of a token is listed, no order of merging can make a difference.
        if len(token) == 1 or n_listed[token] == _n_splits(token, ranks) > 0:
            continue
        pieces = tuple(_reduce(token, token_id, ranks))
        agrees = pieces in pairs if len(pieces) == 2 else whole_words
        if not agrees:
            return f"token {token[:40]!r} without the merge that builds it"
    return None


def _n_splits(token: str, ranks: Mapping[str, int]) -> int:
    """Count the ways to cut `token` into two tokens."""
    cuts = range(1, len(token))
    return sum([token[cut:] in ranks for cut in cuts if token[:cut] in ranks])


def _reduce(token: str, below: int, ranks: Mapping[str, int]) -> list[str]:
    """Merge the bytes of `token` as tiktoken does, using only tokens with an id under `below`."""
    pieces = list(token)
    while len(pieces) > 1:
        best, at = below, -1
        for place in range(len(pieces) - 1):
            rank = ranks.get(pieces[place] + pieces[place + 1], below)
            if rank < best:
                best, at = rank, place
        if at < 0:
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces
