"""Scores from 0 to 1 of how well a generated text fits the expected one, as in the benchmarks of continual learning.

match        the same text, ignoring case and white space
answer       the same letter after "Answer:", as in TRACE's ScienceQA (without this word, the first letter)
rouge_l F1 of the longest common subsequence of words (Lin 2004), as in TRACE's MeetingBank. TRACE's package joins the
subsequences of single sentences; here the text is one piece bleu_1, _4 BLEU of a sentence over n-grams of 1, or of 1 to
4 words (Papineni et al. 2002), as for the reasons in TRACE's ScienceQA: for the text after "Because " if the expected
text has that. Not smoothed similarity of characters, 2 M / T of matching blocks, as in TRACE's Py150, after literals
are filled in sari         the words kept, deleted and added against the input (Xu et al. 2016), as in TRACE's 20Minuten
"""

from __future__ import annotations

import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

TextScore = Callable[[str, str, str], float]  # (input, given, expected)
ORDERS = 4  # of n-grams in SARI and BLEU
LITERAL = re.compile(r"<(?:STR|NUM|CHAR)_LIT:(.*?)>", re.S)


def matches(given: str, expected: str) -> bool:
    """Whether two values are the same, ignoring case and white space."""
    return given.lower().split() == expected.lower().split()


def same_answer(given: str, expected: str) -> bool:
    """Whether the letter is the same."""

    def letter(text: str) -> str:
        return text.partition("Answer:")[2].strip()[:1] or text.strip()[:1]

    return bool(letter(given)) and letter(given) == letter(expected)


def rouge_l(given: str, expected: str) -> float:
    """`2 P R / (P + R)` with P and R the longest common subsequence's share of both texts' words."""
    a, b = (re.findall(r"\w+", text.lower()) for text in (given, expected))
    if not a or not b:
        return 0.0
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if word == other else max(row[j], before[j + 1]))
    return 2 * row[-1] / (len(a) + len(b))


def bleu(given: str, expected: str, orders: int = ORDERS) -> float:
    """`min(1, e^(1 - r/c)) (prod_n p_n)^(1/N)` where p_n is the share of the given text's n-grams that the expected
    text has, counting each at most as often as it occurs there, and c and r are the numbers of words of the two; 0 if a
    p_n is 0."""

    def words(text: str) -> list[str]:
        reason = text.partition("Because ")[2] if "Because " in expected else text
        return [w for w in re.split(r"[\s.]+", reason) if w]

    a, b = words(given), words(expected)
    logs = 0.0
    for n in range(1, orders + 1):
        ours, theirs = Counter(_grams(a, n)), Counter(_grams(b, n))
        both = sum((ours & theirs).values())
        if not both:
            return 0.0
        logs += math.log(both / sum(ours.values())) / orders
    return math.exp(logs + min(0.0, 1 - len(b) / len(a)))


def similarity(given: str, expected: str) -> float:
    """`2 M / T`, with M the characters in matching blocks and T those of both texts."""

    def valued(text: str) -> str:
        text = text.replace("<NUM_LIT>", "0").replace("<STR_LIT>", "").replace("<CHAR_LIT>", "")
        return LITERAL.sub(r"\1", text)

    return difflib.SequenceMatcher(None, valued(given), valued(expected)).ratio() if given or expected else 1.0


def sari(source: str, given: str, references: Sequence[str]) -> float:
    """The mean over n-grams of 1 to 4 words of: F1 of the kept, precision of the deleted, and F1 of the added n-grams
    (Xu et al. 2016, eq. 3-9), with the recall of the kept ones over occurrences, as corrected in tensor2tensor."""
    before, after, *wanted = (text.lower().split() for text in (source, given, *references))
    return sum(_of_order(n, before, after, wanted) for n in range(1, ORDERS + 1)) / ORDERS


def _of_order(n: int, source: list[str], given: list[str], references: Sequence[list[str]]) -> float:
    count = len(references)
    r: Counter[tuple[str, ...]] = Counter(g for text in references for g in _grams(text, n))
    s, c = (Counter({g: k * count for g, k in Counter(_grams(text, n)).items()}) for text in (source, given))
    kept, due = s & c, s & r
    good = kept & r
    precision = _mean_score([good[g] / kept[g] for g in kept])
    recall = sum(good.values()) / sum(due.values()) if due else 1.0
    gone = s - c
    deleted = _mean_score([(gone - r)[g] / gone[g] for g in gone])
    added = set(c) - set(s)
    right = added & set(r)
    needed = set(r) - set(s)
    added_f1 = _f1(len(right) / len(added) if added else 1.0, len(right) / len(needed) if needed else 1.0)
    return (_f1(precision, recall) + deleted + added_f1) / 3


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _mean_score(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 1.0


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


TEXT_SCORES: dict[str, TextScore] = {
    "match": lambda source, given, expected: float(matches(given, expected)),
    "answer": lambda source, given, expected: float(same_answer(given, expected)),
    "rouge_l": lambda source, given, expected: rouge_l(given, expected),
    "bleu_1": lambda source, given, expected: bleu(given, expected, 1),
    "bleu_4": lambda source, given, expected: bleu(given, expected),
    "similarity": lambda source, given, expected: similarity(given, expected),
    "sari": lambda source, given, expected: sari(source, given, [expected]),
}
