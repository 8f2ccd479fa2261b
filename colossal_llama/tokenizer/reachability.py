"""Which pieces a BPE tokenizer can ever produce, and which intermediates it takes to produce the others.

BPE joins neighbouring symbols, the pair whose joined piece has the highest score first, the leftmost on ties.
A piece comes out only when a chain of joins leads to it. What happens inside a stretch of text that ends up
as one token does not depend on the text around it: a join across the stretch's border would have made that
token impossible, and the joins inside keep their order. So a piece can be produced in some text exactly when
it is produced from its own symbols alone, with no dummy-prefix space before them; and one simulation decides
it.

The same argument shows why pieces added below all others never harm: as long as a chain of higher-scored
joins is not finished, the new, lower ones wait.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, MutableMapping, Sequence
from itertools import pairwise

Symbols = Sequence[str]


def last_parts(symbols: Symbols, scores: Mapping[str, float]) -> list[str]:
    """Joins `symbols` until at most two are left, or no join is possible.

    Args:
        symbols: what the tokenizer starts from: characters for sentencepiece, source tokens for byte-level
            BPE.
        scores: every piece that a join may produce, with its score; the highest goes first.

    Returns:
        The symbols left. A piece of the vocabulary is reachable exactly when there are one or two: the last
        two join to the piece itself.

    >>> last_parts("abcd", {"ab": -1, "cd": -2, "abcd": -3})
    ['ab', 'cd']
    """
    parts = list(symbols)
    while len(parts) > 2:
        best, best_score = -1, 0.0
        for position in range(len(parts) - 1):
            score = scores.get(parts[position] + parts[position + 1])
            if score is not None and (best < 0 or score > best_score):
                best, best_score = position, score
        if best < 0:
            break
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def unreachable_pieces(
    pieces: Iterable[str], symbols_of: Callable[[str], Symbols], scores: Mapping[str, float]
) -> dict[str, list[str]]:
    """The pieces that no text ever yields -> the symbols that stay apart when the piece is encoded.

    Args:
        pieces: pieces of the vocabulary, all of them in `scores` unless they are single symbols.
        symbols_of: a piece's starting symbols.
        scores: as in `last_parts`.
    """
    unreachable = {}
    for piece in pieces:
        parts = last_parts(symbols_of(piece), scores)
        if len(parts) > 2:
            unreachable[piece] = parts
    return unreachable


def plan_intermediates(
    unreachable: Mapping[str, list[str]],
    symbols_of: Callable[[str], Symbols],
    scores: Mapping[str, float],
    next_score: Callable[[float], float],
    forbidden: Container[str] = (),
) -> list[str]:
    """New pieces, each with a lower score than all before it, that make every unreachable piece reachable.

    The pair that most of the stuck pieces share is joined first, so that they share intermediates; then those
    that turn out superfluous are taken out again, until each one left is needed: without it, some piece of
    `unreachable` would not be produced.

    Args:
        unreachable: as `unreachable_pieces` returns it.
        symbols_of: a piece's starting symbols.
        scores: every piece of the vocabulary that a join may produce, with its score.
        next_score: the score for the piece after one of the given score.
        forbidden: strings that may not become intermediates.

    Returns:
        The intermediates, highest score first. With `forbidden`, some pieces may stay unreachable.
    """
    if not unreachable:
        return []
    scores = dict(scores)
    intermediates = _join_until_reachable(unreachable, scores, next_score, forbidden)
    helped = [piece for piece in unreachable if len(last_parts(symbols_of(piece), scores)) <= 2]
    return without_superfluous(intermediates, helped, symbols_of, scores)


def _join_until_reachable(
    unreachable: Mapping[str, list[str]],
    scores: MutableMapping[str, float],
    next_score: Callable[[float], float],
    forbidden: Container[str],
) -> list[str]:
    """Adds intermediates to `scores`, the most shared pair first, while any helps a stuck piece."""
    stuck = dict(unreachable)
    users: dict[str, set[str]] = defaultdict(set)  # joined pair -> the stuck pieces that hold it
    order: dict[str, int] = {}  # joined pair -> when it was first seen: makes ties deterministic
    queue: list[tuple[int, int, str]] = []

    def register(piece: str) -> None:
        parts = stuck[piece]
        for left, right in pairwise(parts):
            joined = left + right
            if joined in forbidden:
                continue
            users[joined].add(piece)
            heapq.heappush(queue, (-len(users[joined]), order.setdefault(joined, len(order)), joined))

    def unregister(piece: str) -> None:
        parts = stuck[piece]
        for left, right in pairwise(parts):
            users[left + right].discard(piece)

    for piece in stuck:
        register(piece)
    lowest = min(scores.values())
    intermediates = []
    while stuck and queue:
        negative_count, first_seen, joined = heapq.heappop(queue)
        count = len(users[joined])
        if count != -negative_count:
            if count:
                heapq.heappush(queue, (-count, first_seen, joined))
            continue
        lowest = next_score(lowest)
        scores[joined] = lowest
        intermediates.append(joined)
        # Everything above the new piece has been joined already, so each stuck piece continues from where
        # it is.
        for piece in sorted(users[joined]):
            unregister(piece)
            parts = last_parts(stuck[piece], scores)
            if len(parts) > 2:
                stuck[piece] = parts
                register(piece)
            else:
                del stuck[piece]
    return intermediates


def without_superfluous(
    intermediates: list[str],
    required: Iterable[str],
    symbols_of: Callable[[str], Symbols],
    scores: MutableMapping[str, float],
) -> list[str]:
    """Takes intermediates out (of `scores` too) until a required piece needs every one left."""
    kept = dict.fromkeys(intermediates)
    containing: dict[str, list[str]] = {intermediate: [] for intermediate in intermediates}
    for piece in required:
        substrings = {piece[i:j] for i in range(len(piece)) for j in range(i + 2, len(piece) + 1)}
        for substring in substrings & kept.keys():
            containing[substring].append(piece)
    changed = True
    while changed:
        changed = False
        for intermediate in reversed(list(kept)):
            score = scores.pop(intermediate)
            if unreachable_pieces(containing[intermediate], symbols_of, scores):
                scores[intermediate] = score
            else:
                del kept[intermediate]
                changed = True
    return list(kept)
