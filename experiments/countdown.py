"""Countdown: reach a two-digit target from four digits in three steps, e.g. 9875>87: → 7+5=12,12*8=96,96-9=87

With five digits it takes four steps and is harder: 98753>87: → 7+3=10,9*10=90,90-8=82,82+5=87

A task whose answers can be *verified* and where one problem has several, so that a sampler's success (pass@k)
and its diversity (distinct correct solutions) are both exact counts.

    problem    four or five digits 1–9, highest first, `>`, a target from 10 to 99, `:`      8 or 9 characters
    answer     steps `a∘b=c` joined by commas, one fewer than digits; ∘ is + − × ÷ (written + - * /), every c
               is a whole number from 1 to 99, every step uses two of the numbers still on the table, the last
               c is the target
    solution   the expression an answer computes, up to the order of sums and products (`canonical`)
    split      by the *multiset of digits*: about 8 % of the 495 of four digits and 10 % of the 1,287 of
               five are held out, so a test problem shares neither digits nor targets-with-those-digits with
               the training set
"""

import functools
import hashlib
import itertools
import re

STEP = re.compile(r"([1-9]\d?)([-+*/])([1-9]\d?)=([1-9]\d?)")


def multisets_of(digits):
    """Every multiset of so many digits 1–9, each highest first: 495 of four, 1,287 of five."""
    if digits not in (4, 5):
        raise ValueError(f"digits is {digits!r}; accepted: 4, 5")
    return tuple(itertools.combinations_with_replacement(range(9, 0, -1), digits))


def held_out(digits):
    """True for the multisets (8 to 10 %) that no training problem uses; a pure function of the digits."""
    key = "".join(map(str, sorted(digits, reverse=True)))
    return hashlib.sha256(key.encode()).digest()[0] % 100 < 8


@functools.cache
def split(digits):
    """The multisets of so many digits in two: (those of training problems, those of test problems)."""
    multisets = multisets_of(digits)
    return tuple(m for m in multisets if not held_out(m)), tuple(m for m in multisets if held_out(m))


MULTISETS = multisets_of(4)
TRAIN_MULTISETS, TEST_MULTISETS = split(4)


def combine(a, operator, b):
    """a ∘ b, or None where it is not a whole number from 1 to 99."""
    if operator == "/":
        value = a // b if a % b == 0 else 0
    else:
        value = {"+": a + b, "-": a - b, "*": a * b}[operator]
    return value if 1 <= value <= 99 else None


# ------------------------------------------------------------------------------
# problems, by forward simulation
# ------------------------------------------------------------------------------

def simulate(random, digits, fold):
    """A random walk over the table: (target, answer), or None where it leaves 1 … 99 or ends on one digit.

    digits: four or five; fold: every step after the first uses the last result, as in ((a∘b)∘c)∘d;
    otherwise any two numbers.
    """
    table, steps = list(digits), []
    random.shuffle(table)
    for step in range(len(digits) - 1):
        if not (fold and step):
            random.shuffle(table)
        a, b = table[0], table[1]
        operator = random.choice("+-*/")
        if operator in "-/" and a < b or (operator in "+*" and random.random() < 0.5):
            a, b = b, a
        value = combine(a, operator, b)
        if value is None:
            return None
        steps.append(f"{a}{operator}{b}={value}")
        table = [value] + table[2:]
    return (value, ",".join(steps)) if value >= 10 else None


def problem(random, multisets, fold_share):
    """One random (prompt, answer) on digits from `multisets`; `fold_share` are folded left to right."""
    while True:
        digits = random.choice(multisets)
        found = simulate(random, digits, fold=random.random() < fold_share)
        if found:
            return f"{''.join(map(str, digits))}>{found[0]}:", found[1]


def test_prompts(random, count, digits=4):
    """`count` different held-out prompts of so many digits, each solvable, from free walks."""
    prompts = set()
    while len(prompts) < count:
        prompts.add(problem(random, split(digits)[1], fold_share=0)[0])
    return sorted(prompts, key=lambda prompt: hashlib.sha256(prompt.encode()).digest())


# ------------------------------------------------------------------------------
# answers
# ------------------------------------------------------------------------------

def parse(prompt, answer):
    """The expression tree that `answer` computes for `prompt`, or None where it is no correct answer.

    A leaf is a digit; a node is (operator, left, right). Where a digit and an intermediate result are equal,
    the intermediate result is used first.
    """
    digits, _, target = prompt.rstrip(":").partition(">")
    table = [(int(d), int(d)) for d in digits]                   # (value, tree), newest first
    steps = answer.split(",")
    if len(steps) != len(table) - 1:
        return None
    for step in steps:
        match = STEP.fullmatch(step)
        if not match:
            return None
        operands = []
        for text in match.group(1, 3):
            entry = next((e for e in table if e[0] == int(text)), None)
            if entry is None:
                return None
            table.remove(entry)
            operands.append(entry)
        (a, left), (b, right) = operands
        value = combine(a, match[2], b)
        if value is None or value != int(match[4]):
            return None
        table.insert(0, (value, (match[2], left, right)))
    return table[0][1] if table[0][0] == int(target) else None


def is_correct(prompt, answer):
    """True where the answer uses every digit once, computes right, and reaches the target."""
    return parse(prompt, answer) is not None


def canonical(prompt, answer):
    """One string per solution, None if wrong; sums and products are sorted, so their order does not count."""
    tree = parse(prompt, answer)
    return None if tree is None else flat(tree)


def flat(tree):
    """A tree as text: a chain of + and − is one sorted list of signed terms, one of × and ÷ of factors."""
    if isinstance(tree, int):
        return str(tree)
    family = "+-" if tree[0] in "+-" else "*/"
    return "(" + " ".join(sorted(sign + flat(node) for sign, node in terms(tree, family, family[0]))) + ")"


def terms(tree, family, sign):
    """(sign, subtree) for every operand of a chain of one operator family."""
    if isinstance(tree, int) or tree[0] not in family:
        return [(sign, tree)]
    inverse = family[1 - family.index(sign)]
    right = sign if tree[0] == family[0] else inverse
    return terms(tree[1], family, sign) + terms(tree[2], family, right)
