r"""Verifiable tasks, gsm8k, math500, aime24, humaneval: how to ask, where the answer stands, is it right?

    ask        `Task.messages` for a chat template, `Task.raw` for a base model
    extract    `Task.extract`: text → the answer as written, None where there is none
    key        `canonical`: an answer → one string per value; equal keys are equal answers, for grading as for
               majority voting
    grade      `Task.grade`: does the text answer the problem?

**Where the answer stands.** What stands behind the last `</think>`, or the whole text without one. In it the
last \boxed{…} with balanced braces that is not empty; for gsm8k else the last `#### x`, else the last
number. Code: the last fenced block that defines a function, else the text, up to where a base model runs on.

**What is equal.** Decisions, none of them sympy's; no text is ever executed (humaneval: `sandbox`):

    numbers     exact fractions: 1,234 = 1 234 = 1234.0; 0.5 = 1/2 = \frac12 = \dfrac{1}{2}; 1\frac{4}{5} =
                9/5; 5 \times 10^{-3} = 0.005; 2^{10} = 1024. 0.333 ≠ 1/3: nothing is rounded
    units       dropped: $, \%, degrees, a trailing \text{…} and common units: 50\% = 50 ≠ 0.5; 5 cm = 5
    algebra     order of sums and products does not count; like terms are merged; numbers multiply into sums;
                roots of whole numbers are reduced, also below a bar: 2(x+1) = 2x+2, \frac{1}{\sqrt3} =
                \frac{\sqrt3}{3}. Products of sums stay: (x+1)(x+2) ≠ x^2+3x+2, which "factor" asks for
    equations   x = 5 is 5 and y = 2x is 2x; in a list only if all left sides agree. Others: the difference of
                the sides up to a factor: x + y = 1 is 2x + 2y = 2
    lists       a, b = b, a = \{a, b\} = a or b, doubles once; a \pm b is two of them; {5} = 5
    tuples      (1,2) ≠ (2,1), and intervals: [0,1) ≠ [0,1]; unions in any order; x \in I is I
    matrices    entry by entry; pmatrix = bmatrix, and not a tuple
    bases       52_8 = 52_{8} ≠ 52
    words       three letters or more, without case: \text{East} = east; (A) = A = \text{(A)}
    the rest    as LaTeX without spaces: \cot x
"""

import json
import re
from dataclasses import dataclass
from fractions import Fraction
from math import isqrt

LONGEST = 500                                   # characters of an answer that is read as mathematics
NUMBER = r"(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:/\d+)?"
ASK = "Please reason step by step, and put your final answer within \\boxed{}."
ASK_INTEGER = ASK[:-1] + " as an integer from 0 to 999."
ASK_CODE = "Complete this Python function. Reply with the whole function in one ```python block."


# ------------------------------------------------------------------------------
# the tasks
# ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Problem:
    """One line of a data file; entry_point and test are humaneval's, answer the others'."""

    id: str
    question: str
    answer: str = ""
    entry_point: str = ""
    test: str = ""


@dataclass(frozen=True)
class Task:
    """How to ask a kind of problem, and how to judge a reply."""

    name: str
    instruction: str = ASK
    code: bool = False                          # judged by running it
    last_number: bool = False                   # `#### x` and the last number are answers, too
    accepts: str = ""                           # what every reference answer matches

    def load(self, path):
        """The problems of a JSONL file; ValueError with file and line for one that is not as it must be."""
        fields = (dict(id="task_id", question="prompt", entry_point="entry_point", test="test") if self.code
                  else dict(id="id", question="question", answer="answer"))
        problems, taken = [], {}
        for where, line in numbered(path):
            problem = self.problem(where, line, fields)
            if problem.id in taken:
                raise ValueError(f"{where}: the id {problem.id!r} is that of {taken[problem.id]} too")
            taken[problem.id] = where
            problems.append(problem)
        if not problems:
            raise ValueError(f"{path} holds no problem")
        return problems

    def problem(self, where, line, fields):
        """The problem of one line."""
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: {line[:60]!r} is no JSON object")
        for name in fields.values():
            if not (isinstance(entry.get(name), str) and entry[name].strip()):
                raise ValueError(f"{where}: {name!r} is {entry.get(name)!r}; expected a text for {self.name}")
        problem = Problem(**{ours: entry[theirs] for ours, theirs in fields.items()})
        if self.accepts and not re.fullmatch(self.accepts, problem.answer.strip()):
            raise ValueError(f"{where}: 'answer' is {problem.answer!r}; {self.name} has {self.accepts}")
        if self.code and f"def {problem.entry_point}(" not in problem.question:
            raise ValueError(f"{where}: 'prompt' does not define {problem.entry_point!r}")
        return problem

    def messages(self, problem):
        """The conversation that asks a chat model, zero-shot."""
        if self.code:
            content = f"{self.instruction}\n\n```python\n{problem.question.rstrip()}\n```"
        else:
            content = f"{problem.question}\n\n{self.instruction}"
        return [{"role": "user", "content": content}]

    def raw(self, problem):
        """The text that a base model goes on with; code: the function's head itself."""
        if self.code:
            return problem.question
        return f"Question: {problem.question}\n\n{self.instruction}\n\nAnswer:"

    def extract(self, text):
        """The answer in a reply as it is written, None where there is none."""
        text = text.rpartition("</think>")[2]
        if self.code:
            return code_of(text)
        text = text.split("\nQuestion:")[0]     # a base model asks itself the next one
        answer = last_boxed(text)
        if answer is None and self.last_number:
            numbers = re.findall(rf"####\s*\\?\$?\s*(-?{NUMBER})", text)
            numbers = numbers or re.findall(rf"(?<![\w.,)}}])-{NUMBER}|{NUMBER}", text)
            answer = numbers[-1] if numbers else None
        return answer

    def key(self, text):
        """What the reply votes for: equal strings are equal answers; None does not vote."""
        answer = self.extract(text)
        return answer if answer is None or self.code else canonical(answer)

    def truth(self, problem):
        """The key of the right answer; code has none."""
        return None if self.code else canonical(problem.answer)

    def grade(self, problem, text, run_programs=False):
        """True where the reply is right. Code is only run if `run_programs` says so, else ValueError."""
        if not self.code:
            return self.key(text) == self.truth(problem)
        if not run_programs:
            raise ValueError(f"{self.name} is graded by running what a model wrote; --run-programs allows it")
        from experiments import sandbox  # Linux only
        answer = self.extract(text)
        return answer is not None and sandbox.passed(program(problem, answer), problem.question, problem.test,
                                                     problem.entry_point)


TASKS = {task.name: task for task in (
    Task("gsm8k", last_number=True, accepts=r"-?\d[\d,]*(\.\d+)?"),
    Task("math500"),
    Task("aime24", ASK_INTEGER, accepts=r"\d{1,3}"),
    Task("humaneval", ASK_CODE, code=True))}


def numbered(path):
    """("file, line i", line) for each line that is not blank; ValueError where the file can not be read."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} can not be read ({getattr(error, 'strerror', None) or error})") from None
    return [(f"{path}, line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]


# ------------------------------------------------------------------------------
# where the answer stands
# ------------------------------------------------------------------------------

def last_boxed(text):
    r"""What the last balanced \boxed{…} that is not empty holds; \{ and \} do not count as braces."""
    open_braces, boxes = [], []
    for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.S):
        if match[0] == "}" and open_braces:
            start = open_braces.pop()
            boxes += [(start, text[start:match.start()].strip())] if start is not None else []
        elif match[0] == "{":
            open_braces.append(None)
        elif match[0].startswith(r"\boxed"):
            open_braces.append(match.end())
    return next((box for _, box in sorted(boxes, reverse=True) if box), None)


def code_of(text):
    """The last fenced block with a `def`, else a body that begins the text, else the last block or all."""
    blocks = re.findall(r"```[^\n`]*\n(.*?)(?:\n```|\Z)", text, re.S)
    for block in reversed(blocks):
        if re.search(r"^\s*def ", block, re.M):
            return block
    if re.match(r"\n*[ \t]", text):             # a body: ends where something else begins at the margin
        return re.split(r"\n(?=class |def |#|if |print|assert |@|from |import |```|<)", text)[0]
    text = blocks[-1] if blocks else text
    return text if text.strip() else None


def program(problem, code):
    """The whole program: an answer that is a function stands behind the prompt's imports and helpers."""
    if not re.search(rf"^def {problem.entry_point}\(", code, re.M):
        return problem.question + code
    return problem.question.split(f"def {problem.entry_point}(")[0] + "\n" + code


# ------------------------------------------------------------------------------
# answers: lists, tuples, matrices, equations
# ------------------------------------------------------------------------------

END = "(?![a-zA-Z])"                            # of a command's name
REPLACED = (                                    # in this order
    ("[−–]", "-"), ("×", r"\\times "), ("÷", "/"), ("·", r"\\cdot "), ("π", r"\\pi "), ("∞", r"\\infty "),
    ("√", r"\\sqrt "), ("∪", r"\\cup "), ("±", r"\\pm "), ("≤", r"\\le "), ("≥", r"\\ge "), ("∈", r"\\in "),
    (r"\\lbrace" + END, r"\\{"), (r"\\rbrace" + END, r"\\}"), (r"\\(?:leq|leqslant)" + END, r"\\le "),
    (r"\\(?:geq|geqslant)" + END, r"\\ge "), (r"\\neq" + END, r"\\ne "), (r"\\[dtc]frac" + END, r"\\frac"),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|limits)" + END, ""),
    (r"(?<!\\)\\[()\[\]]", ""), (r",\\!\s*|\{,\}", ""), (rf"(?<!\\)\\[!,;: ]|~|\\q?quad{END}", " "),
    (rf"\^\s*\{{?\s*(?:\\circ{END}|°)\s*\}}?|\\degree{END}|°", ""), (r"\\?[$%£€]", ""),
    (r",?\s*\\(?:text|mbox|textrm|mathrm|rm)\s*\{\s*(?:and|or)\s*\}|,?\s+(?:and|or)\s+", ", "),
    (r"(?<![\\a-zA-Z])(sqrt|pi|infty)" + END, r"\\\1 "),
    (r"(?<![\\a-zA-Z])(?:infinity|inf)" + END, r"\\infty "))
WRAPPED = r"\\(?:text|mbox|textbf|textit|textrm|textup|mathrm|mathbf|operatorname|rm|bf)\s*\{([^{}]*)\}"
UNITS = (r"(square|cubic)?\s*(degrees?|dollars?|cents?|percent|units?|inch(es)?|f(ee|oo)t|yards?|miles?|"
         r"hours?|minutes?|seconds?|days?|weeks?|months?|years?|(centi|milli|kilo)?(meters?|grams?)|cm|mm|km|kg|mph|"
         r"pounds?|points?|people|students?|ways?)\s*(\^\s*(\d|\{\d\}))?")
MATRIX = r"\\begin\{(?:[pb]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{(?:[pb]?matrix|array)\}"
LEFT_SIDE = r"(?:[A-Za-z]|\\[a-z]+|[A-Z]{2,3})'?(?:_\{?\w+\}?)?(?:\^\{-1\})?(?:\([a-z](?:,[a-z])*\))?"
WORDS = r"(?=.*[A-Za-z]{3})[A-Za-z][A-Za-z '-]*"
CLOSES = {"(": ")]", "[": ")]", "{": "}"}


def canonical(answer):
    """One string for all ways to write an answer that mean the same, as this module's docstring says.

    Never raises: what is too long or not understood is its own text.
    """
    if len(answer) > LONGEST:
        return plain(answer)
    text = cleaned(answer)
    if re.fullmatch(r"[-+]?\d{1,3}([, ]\d{3})+(\.\d*)?", text):
        text = re.sub("[, ]", "", text)
    try:
        return collection(text)
    except (ValueError, ZeroDivisionError, RecursionError):
        return plain(text)


def cleaned(answer):
    """The answer without layout, currency, degrees and units, its spaces single."""
    text = answer.strip().strip("$").strip()
    for pattern, replacement in REPLACED:
        text = re.sub(pattern, replacement, text)
    text = text.strip().rstrip(".").strip()
    trailing = re.fullmatch(rf"(.*[^\s,({{_^=+*/-])\s*{WRAPPED}\s*(?:\^\s*(?:\d|\{{\d\}}))?", text, re.S)
    if trailing and re.search("[a-zA-Z]", trailing[2]) and balanced(trailing[1]):
        text = trailing[1]
    text = re.sub(WRAPPED, r"\1", text).strip()
    number = re.fullmatch(rf"(.*[\d}})])\s*(?:{UNITS})", text, re.S)
    text = number[1] if number else text
    return re.sub(r"\s+", " ", text).strip().rstrip(".")


def balanced(text):
    """True where no brace is open at the end."""
    return text.count("{") == text.count("}")


def plain(text):
    """What is left where an answer is no mathematics that is understood: LaTeX without spaces."""
    if re.fullmatch(WORDS, text):
        return " ".join(text.lower().split())
    text = re.sub(r"\^\{(\w)\}", r"^\1", re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text))
    return re.sub(r"(\\[a-z]+)\((\w)\)", r"\1\2", text)


def collection(text):
    """The key of a list of answers in any order, or of a single one."""
    text = text.strip()
    inner = text[2:-2] if text.startswith(r"\{") and text.endswith(r"\}") else text
    sides = [part.split("=") for part in split(inner, ",")]
    if all(len(side) == 2 for side in sides) and len({side[0].strip() for side in sides}) > 1:
        return "; ".join(sorted(f"{plain(a)} = {single(b)}" for a, b in sides))       # x = 1, y = 2
    parts = {single(part) for whole in split(inner, ",") for part in plus_minus(whole)}
    return next(iter(parts)) if len(parts) == 1 else "{" + ", ".join(sorted(parts)) + "}"


def plus_minus(text):
    r"""a \pm b as [a + b, a - b]; anything else as [itself]."""
    if text.count(r"\pm") + text.count(r"\mp") != 1:
        return [text]
    return [re.sub(r"\\[pm][mp](?![a-zA-Z])", sign, text) for sign in "+-"]


def split(text, separator):
    """The parts of text between separators that stand in no bracket."""
    parts, depth, start, i = [], 0, 0, 0
    while i < len(text):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
        if text.startswith(separator, i) and depth == 0:
            parts.append(text[start:i])
            start = i + len(separator)
        i += 2 if text[i] == "\\" and text[i + 1:i + 2] in ("\\", "") and separator[0] != "\\" else 1
    return parts + [text[start:]]


def single(text):
    """The key of one answer: a matrix, a union, a tuple or interval, an equation, a word, an expression."""
    text = text.strip()
    if not text:
        raise ValueError("nothing there")
    matrix = re.fullmatch(MATRIX, text, re.S)
    if matrix:
        rows = re.split(r"\\\\(?:\s|$)?", matrix[1].strip().removesuffix("\\\\"))
        return "matrix " + "; ".join(", ".join(single(x) for x in row.split("&")) for row in rows)
    member = re.fullmatch(r"[a-zA-Z]\s*\\in(?![a-zA-Z])(.*)", text, re.S)
    if member:
        return single(member[1])
    union = split(text, r"\cup")
    if len(union) > 1:
        return " u ".join(sorted({single(part) for part in union}))
    inside = split(text[1:-1], ",") if enclosed(text) else []
    if len(inside) > 1:
        return text[0] + ", ".join(single(part) for part in inside) + text[-1]
    if enclosed(text) == "()":
        return single(text[1:-1])
    if "=" in text:
        return equation(text)
    if re.fullmatch(WORDS, text):
        return plain(text)
    return show(expression(text))


def enclosed(text):
    """The bracket pair that encloses all of text, as "()" or "[)"; "" where there is none."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0:
            whole = i == len(text) - 1 and text[0] in "([" and character in CLOSES[text[0]]
            return text[0] + character if whole else ""
    return ""


def equation(text):
    """x = 5 is 5; otherwise the difference of the sides, its first coefficient 1."""
    left, _, right = text.partition("=")
    if "=" in right:
        raise ValueError("a chain of equations")
    if re.fullmatch(LEFT_SIDE, left.strip().replace(" ", "")):
        return single(right)
    return show(dict(primitive(add(expression(left), expression(right), -1))[1])) + " = 0"


# ------------------------------------------------------------------------------
# expressions: a sum {monomial: coefficient}, a monomial ((atom, exponent), …)
# ------------------------------------------------------------------------------

GREEK = ("alpha", "beta", "gamma", "delta", "epsilon", "theta", "lambda", "mu", "pi", "rho", "sigma", "tau",
         "phi", "omega", "infty")
TOKEN = re.compile(r"\s*(?:(\d+\.?\d*|\.\d+)|\\([a-zA-Z]+)|(\S))")
TOP, OVER = ("cdot", "times", "*"), ("div", "/")
BITS = 4000                                     # of a number that a power may make


def expression(text):
    """An expression as a sum: products of sums stay closed, everything else is merged exactly.

    ValueError for what is not understood: functions, relations, two numbers side by side.
    """
    mixed = re.fullmatch(r"\s*(-?)\s*(\d+)\s+(\d+)\s*/\s*(\d+)\s*", text)
    if mixed:
        value = int(mixed[2]) + Fraction(int(mixed[3]), int(mixed[4]))
        return constant(-value if mixed[1] else value)
    tokens = [next(t for t in match.groups() if t) if match[2] is None else "\\" + match[2]
              for match in TOKEN.finditer(text.rstrip())]
    value = total(tokens)
    if tokens:
        raise ValueError(f"{tokens[0]} is left over")
    return value


def total(tokens):
    """± product ± product …, up to what belongs to neither; takes the tokens it reads from the list."""
    value, sign = {}, 1
    if tokens and tokens[0] in "+-":
        sign = -1 if tokens.pop(0) == "-" else 1
    while True:
        value = add(value, product(tokens), sign)
        if not tokens or tokens[0] not in ("+", "-"):
            return value
        sign = -1 if tokens.pop(0) == "-" else 1


def product(tokens):
    """power power …, with or without a sign between, / from left to right."""
    value, number = power(tokens)
    while tokens and tokens[0] not in ("+", "-", ")", "]", "}", "=", ","):
        operator = tokens.pop(0) if tokens[0].lstrip("\\") in TOP + OVER else ""
        factor, next_number = power(tokens, signed=bool(operator))
        if number is not None and not operator and next_number is not None:
            if not (number == int(number) >= 0 and 0 < next_number < 1):
                raise ValueError("two numbers side by side")
            value = add(value, factor)                                  # a mixed number: 1\frac{4}{5}
        else:
            value = times(value, raised(factor, -1) if operator.lstrip("\\") in OVER else factor)
        number = None if operator else next_number
    return value


def power(tokens, signed=False):
    r"""(atom ^ exponent, its value if it is a bare number or a \frac of two)."""
    if signed and tokens and tokens[0] == "-":
        tokens.pop(0)
        return times(constant(-1), power(tokens)[0]), None
    value, number = atom(tokens)
    while tokens and tokens[0] in ("^", "'"):
        if tokens.pop(0) == "'":
            raise ValueError("a derivative")
        exponent, number = argument(tokens, whole=True), None
        if is_constant(exponent) and exponent.get((), Fraction(0)).denominator == 1:
            value = raised(value, int(exponent.get((), 0)))
        else:
            value = {((("^", show(value), show(exponent)), 1),): Fraction(1)}
    return value, number


def atom(tokens):
    """A number, a letter, a bracket, a fraction or a root: (sum, its value if it is a bare number)."""
    if not tokens:
        raise ValueError("the end")
    token = tokens.pop(0)
    if token in ("(", "[", "{"):
        value = total(tokens)
        if not tokens or tokens.pop(0) not in CLOSES[token] or token == "[":
            raise ValueError("brackets")
        return value, None
    if token[0].isdigit() or token[0] == ".":
        if tokens and tokens[0] == "_":
            tokens.pop(0)
            return letter(f"{token}_{show(argument(tokens, whole=True))}"), None
        return constant(Fraction(token)), Fraction(token)
    if token == r"\frac":
        return fraction(tokens)
    if token == r"\sqrt":
        degree = "2"
        if tokens and tokens[0] == "[":
            degree = "".join(tokens[1:tokens.index("]")])
            del tokens[:tokens.index("]") + 1]
        return root(argument(tokens, whole=True), degree), None
    if not (token.isalpha() and len(token) == 1 or token[1:] in GREEK and token[0] == "\\"):
        raise ValueError(f"{token} is not understood")
    if tokens and tokens[0] == "_":
        tokens.pop(0)
        token += "_" + show(argument(tokens, whole=True))
    return letter(token), None


def argument(tokens, whole=False):
    r"""What \frac, \sqrt, ^ and _ act on: a brace, a bracket, a digit (`whole`: a number), a signed one."""
    if tokens and tokens[0] in "+-" and whole:
        return times(constant(-1 if tokens.pop(0) == "-" else 1), argument(tokens, whole))
    if tokens and tokens[0].isdigit() and not whole:
        digits = tokens.pop(0)
        tokens[:0] = [digits[1:]] if digits[1:] else []
        return constant(Fraction(digits[0]))
    return atom(tokens)[0]


def fraction(tokens):
    r"""\frac{a}{b} = a · b^-1, and its value where both are numbers."""
    above, below = argument(tokens), argument(tokens)
    value = times(above, raised(below, -1))
    return value, value.get((), Fraction(0)) if is_constant(above) and is_constant(below) else None


def constant(number):
    """A number as a sum."""
    return {(): Fraction(number)} if number else {}


def letter(name):
    """A variable as a sum."""
    return {((name, 1),): Fraction(1)}


def is_constant(value):
    """True for a sum that is one rational number."""
    return set(value) <= {()}


def add(a, b, sign=1):
    """a + sign·b."""
    value = dict(a)
    for monomial, coefficient in b.items():
        value[monomial] = value.get(monomial, 0) + sign * coefficient
    return {monomial: c for monomial, c in value.items() if c}


def primitive(value):
    """(c, items) with value = c · sum of items, whose first coefficient is 1."""
    items = sorted(value.items(), key=repr)
    lead = items[0][1] if items else Fraction(1)
    return lead, tuple((monomial, c / lead) for monomial, c in items)


def term(value):
    """(c, monomial) with value = c · monomial; a sum of several becomes one closed atom."""
    if len(value) == 1:
        (monomial, c), = value.items()
        return c, monomial
    c, items = primitive(value)
    return c, ((("sum", items), 1),)


def times(a, b):
    """a · b: numbers multiply into a sum, other factors close it."""
    for x, y in ((a, b), (b, a)):
        if is_constant(x):
            return {monomial: x[()] * c for monomial, c in y.items()} if x else {}
    (c, monomial), (d, other) = term(a), term(b)
    return gathered(c * d, monomial + other)


def gathered(c, factors):
    """c · factors with equal ones merged, roots of whole numbers reduced, a single bare sum opened."""
    exponents, radicand = {}, 1
    for base, exponent in factors:
        if isinstance(base, tuple) and base[0] == "sqrt":
            c, radicand = c * Fraction(base[1]) ** (exponent // 2), radicand * base[1] ** (exponent % 2)
        else:
            exponents[base] = exponents.get(base, 0) + exponent
    outside, radicand = square_part(radicand)
    merged = [(base, exponent) for base, exponent in exponents.items() if exponent]
    merged += [(("sqrt", radicand), 1)] if radicand > 1 else []
    if len(merged) == 1 and merged[0][1] == 1 and merged[0][0][0] == "sum":
        return {monomial: c * outside * d for monomial, d in merged[0][0][1]}
    return {tuple(sorted(merged, key=repr)): c * outside}


def raised(value, exponent):
    """value ^ exponent for a whole number; ZeroDivisionError, or ValueError for a number that is too long."""
    if is_constant(value):
        number = value.get((), Fraction(0))
        if abs(exponent) * max(number.numerator.bit_length(), number.denominator.bit_length()) > BITS:
            raise ValueError("a number that is too long")
        return constant(number ** exponent)
    c, monomial = term(value)
    power_of_c = raised(constant(c), exponent)[()]
    if any(abs(e * exponent) > BITS for _, e in monomial):
        raise ValueError("an exponent that is too large")
    return gathered(power_of_c, tuple((base, e * exponent) for base, e in monomial))


def root(value, degree):
    """The root of a sum: exact for squares, square factors of whole numbers in front, else an atom."""
    if degree != "2" or not is_constant(value) or value.get((), 0) < 0:
        return {(((f"root {degree}", show(value)), 1),): Fraction(1)}
    number = value.get((), Fraction(0))
    outside, radicand = square_part(number.numerator * number.denominator)
    factors = ((("sqrt", radicand), 1),) if radicand > 1 else ()
    return {factors: Fraction(outside, number.denominator)} if outside else {}


def square_part(n):
    """(s, m) with n = s²·m, m without a square factor as far as small divisors tell."""
    whole = isqrt(n)
    if whole * whole == n:
        return whole, 1
    outside, divisor = 1, 2
    while divisor * divisor <= n and divisor < 10_000:
        while n % (divisor * divisor) == 0:
            n, outside = n // (divisor * divisor), outside * divisor
        divisor += 1
    return outside, n


def show(value):
    """A sum as text, in sorted order: the key."""
    if is_constant(value):
        return str(value.get((), 0))
    sign = {1: "", -1: "-"}
    return " + ".join(sign.get(c, f"{c}*") + "*".join(map(factor, m)) if m else str(c)
                      for m, c in sorted(value.items(), key=repr))


def factor(pair):
    """An atom with its exponent as text."""
    base, exponent = pair
    if isinstance(base, tuple):
        base = f"({show(dict(base[1]))})" if base[0] == "sum" else " ".join(map(str, base)).join("()")
    return base if exponent == 1 else f"{base}^{exponent}"
