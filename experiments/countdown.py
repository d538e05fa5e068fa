"""Countdown: reach a two-digit target from four digits in three steps, e.g. 9875>87: → 7+5=12,12*8=96,96-9=87

A task whose answers can be *verified* and where one problem has several, so that a sampler's success (pass@k)
and its diversity (distinct correct solutions) are both exact counts.

    problem    four digits 1–9, highest first, `>`, a target from 10 to 99, `:`        always eight characters
    answer     three steps `a∘b=c` joined by commas; ∘ is + − × ÷ (written + - * /), every c is a whole number
               from 1 to 99, every step uses two of the numbers still on the table, the last c is the target
    solution   the expression an answer computes, up to the order of sums and products (`canonical`)
    split      by the *multiset of digits*: about 8 % of the 495 are held out, so a test problem shares
               neither digits nor targets-with-those-digits with the training set
"""

import hashlib
import itertools
import re

STEPS = 3
STEP = re.compile(r"([1-9]\d?)([-+*/])([1-9]\d?)=([1-9]\d?)")
MULTISETS = tuple(itertools.combinations_with_replacement(range(9, 0, -1), STEPS + 1))


def held_out(digits):
    """True for the 8 % of digit multisets that no training problem uses; a pure function of the digits."""
    key = "".join(map(str, sorted(digits, reverse=True)))
    return hashlib.sha256(key.encode()).digest()[0] % 100 < 8


TRAIN_MULTISETS = tuple(m for m in MULTISETS if not held_out(m))
TEST_MULTISETS = tuple(m for m in MULTISETS if held_out(m))


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

    fold: every step after the first uses the last result, as in ((a∘b)∘c)∘d; otherwise any two numbers.
    """
    table, steps = list(digits), []
    random.shuffle(table)
    for step in range(STEPS):
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
    """One random (prompt, answer); `fold_share` of them are folded left to right."""
    while True:
        digits = random.choice(multisets)
        found = simulate(random, digits, fold=random.random() < fold_share)
        if found:
            return f"{''.join(map(str, digits))}>{found[0]}:", found[1]


def test_prompts(random, count):
    """`count` different held-out prompts, each solvable, from free walks."""
    prompts = set()
    while len(prompts) < count:
        prompts.add(problem(random, TEST_MULTISETS, fold_share=0)[0])
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
    if len(steps) != STEPS:
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
