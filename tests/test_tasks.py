r"""The four tasks: answers found and compared, programs contained, runs that go on where they stopped."""

import json
import math
import operator
import os
import re
import socket
import time

import pytest
from conftest import SHARED, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from decode import Sample, Stats
from experiments import methods, metrics, passk, sandbox, tasks
from experiments.tasks import TASKS, canonical

FILES = {"gsm8k": "gsm8k_test", "math500": "math500", "aime24": "aime24", "humaneval": "humaneval"}


def real(name):
    """The problems of a task with their whole lines, where they are at hand."""
    path = SHARED / "evals" / f"{FILES[name]}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path.name} is not at ../shared/data/evals")
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(zip(TASKS[name].load(path), map(json.loads, lines), strict=True))


# ------------------------------------------------------------------------------
# which answers are equal
# ------------------------------------------------------------------------------

SAME = r"""
1,234 | 1234
1234.0 | 1234
\$1234 | 1234
$1234$ | 1234
1234\% | 1234
10,\!080 | 10080
11,\! 111,\! 111,\! 100 | 11111111100
10{,}080 | 10080
.5 | \frac{1}{2}
0.5 | 1/2
\dfrac{1}{2} | \tfrac12
\frac 59 | \frac{5}{9}
\frac9{19} | 9/19
-\frac{1}{2} | \frac{-1}{2}
\frac{1}{-2} | -0.5
2/4 | \frac{1}{2}
1\frac{4}{5} | \frac{9}{5}
1 4/5 | 1.8
137 \frac{1}{2} | 137.5
-1\frac{1}{2} | -1.5
6.72 \times 10^{-5} | .0000672
2^{10} | 1024
042 | 42
42. | 42
+7 | 7
−3 | -3
\left( 3, \frac{\pi}{2} \right) | (3,\pi/2)
(3, 0.5\pi) | (3,\frac\pi2)
\left[0,1\right) | [0,1)
x \in [-2,7] | [-2,7]
(3,\infty) \cup (-\infty,2) | (-\infty, 2) \cup (3, +\infty)
(-∞, 0] | (-\infty, 0]
1,-2 | -2, 1
\{1,-2\} | -2,1
1 \text{ and } -2 | -2, 1
1, 2, and 3 | 3,2,1
1 \text{ or } -2 | 1,-2
x = 1 \text{ or } x = -2 | 1, -2
\{5\} | 5
1 \pm \sqrt{19} | 1+\sqrt{19}, 1-\sqrt{19}
\{1\pm\sqrt{5},-2\} | -2, 1-\sqrt5, 1+\sqrt5
90^\circ | 90
90^{\circ} | 90°
\frac{270}7\text{ degrees} | \frac{270}{7}
5.4 \text{ cents} | 5.4
864 \mbox{ inches}^2 | 864
15\mbox{ cm}^2 | 15 cm^2
12 square inches | 12
\sqrt3 | \sqrt{3}
sqrt(3) | √3
11\sqrt2 | 11\cdot\sqrt{2}
\sqrt{12} | 2\sqrt{3}
\frac{1}{\sqrt{3}} | \frac{\sqrt{3}}{3}
\frac{3\sqrt{3}}{4} | 3\sqrt{3}/4
\sqrt{\frac{1}{4}} | 1/2
\sqrt{2}\sqrt{3} | \sqrt{6}
6 - 5i | -5i + 6
2k+2 | 2(k+1)
x^{2} + 1 | 1+x^2
x^{10} | x^10
x\cdot y | yx
\frac{11+9a}{20} | \frac{11}{20} + \frac{9a}{20}
(a+5)(b+2) | (b+2)(5+a)
(1-x)(2-y) | (x-1)(y-2)
\frac{20000}{\pi} | 20000/\pi
x=5 | 5
y = 2x + 3 | 2x+3
f(x) = x^2 | x^2
5x - 7y + 11z + 4 = 0 | 10x-14y+22z = -8
\text{(C)} | C
(A) | A
\textbf{(B)} | \text{B}
\text{Evelyn} | evelyn
\text{East} | east
52_8 | 52_{8}
\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix} | \begin{bmatrix}-\frac13\\\frac{2}{3}\end{bmatrix}
\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix} | \begin{pmatrix}-1&0\\0&-1\\\end{pmatrix}
\cot x | \cot(x)
\text{no solution} | No solution
\frac{x+1}{2(y+1)} | \frac{0.5(x+1)}{y+1}
"""
DIFFERENT = r"""
0.5 | 5
-1 | 1
(1,2) | (2,1)
\frac{1}{2} | \frac{2}{1}
12 | 12x
[0,1) | [0,1]
(0,1) | [0,1]
0.333 | 1/3
50\% | 0.5
1,234 | 1.234
12 | 1,2
1,2 | 1,2,3
12 | 21
1/2 | -1/2
1\frac{1}{2} | \frac{1}{2}
2\sqrt{3} | 3\sqrt{2}
\sqrt{3} | 3
\sqrt{3} | \sqrt{5}
\sqrt[3]{2} | \sqrt{2}
x^2 | x^3
x^2 | 2x
x^{-1} | x
2x+3 | 3x+2
2x+3 | 2y+3
(x+1)(x+2) | x^2+3x+2
(x+1)(x+2) | (x+1)(x+3)
x = 1, y = 2 | x = 2, y = 1
x+y=1 | x+y=2
x < 5 | x > 5
x \le 5 | x < 5
52_8 | 52
52_8 | 52_7
528 | 52_8
\text{even} | \text{odd}
A | B
A | a
\pi | 3.14
6-5i | 6+5i
1 \pm \sqrt{19} | 1 + \sqrt{19}
1 \pm \sqrt{19} | \pm 1 + \sqrt{19}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 2 \\ 1 \end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix} 1 & 2 \end{pmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | (1,2)
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{vmatrix} 1 \\ 2 \end{vmatrix}
(1,2) | \{1,2\}
(-\infty, 2) \cup (3, \infty) | (-\infty, 3) \cup (2, \infty)
\infty | -\infty
\sin 2x | 2\sin x
\frac{a}{b} | \frac{b}{a}
a-b | b-a
2^{3} | 3^{2}
0 | \emptyset
10^5 | 10^{-5}
1 | 1, 1000
1, 000 | 1000
"""


def pairs(text):
    """The pairs of a table."""
    return [line.split(" | ") for line in text.strip().splitlines()]


@pytest.mark.parametrize("a, b", pairs(SAME))
def test_answers_that_mean_the_same(a, b):
    assert canonical(a) == canonical(b)


@pytest.mark.parametrize("a, b", pairs(DIFFERENT))
def test_answers_that_do_not(a, b):
    assert canonical(a) != canonical(b)


def test_there_are_enough_of_both():
    assert len(pairs(SAME)) >= 60 and len(pairs(DIFFERENT)) >= 40


@pytest.mark.parametrize("answer, key", [
    ("1,234", "1234"), (r"\frac{6}{4}", "3/2"), ("(2, 1]", "(2, 1]"), ("2,1", "{1, 2}"),
    (r"2\sqrt{12}", "4*(sqrt 3)"), ("12 34", "12 34"), ("1 234 567", "1234567"), (r"10\,080", "10080"),
    (r"x^2-y", "x^2 + -y"), ("y = x", "x"), ("x + 2y = 4", "x + 2*y + -4 = 0"), (r"\text{ East}", "east"),
    (r"\cot x", r"\cotx"), ("", ""), ("(" * 300 + ")" * 300, "(" * 300 + ")" * 300),
    ("1." + "0" * 500, "1." + "0" * 500), ("1." + "0" * 400, "1"),
    (r"9^{9^{9}}", r"9^{9^9}"), ("1/0", "1/0")])
def test_golden_keys(answer, key):
    assert canonical(answer) == key


VALUES = {"x": 0.37, "y": -1.91, r"\pi": math.pi}
TREES = st.recursive(
    st.one_of(st.integers(0, 30), st.sampled_from(["x", "y", r"\pi"])),
    lambda node: st.one_of(
        st.tuples(st.just("+"), node, node), st.tuples(st.just("-"), node, node),
        st.tuples(st.just("*"), node, node), st.tuples(st.just("/"), node, node),
        st.tuples(st.just("^"), node, st.integers(0, 3)), st.tuples(st.just("sqrt"), st.integers(0, 50))),
    max_leaves=7)


def number_of(tree):
    """What a tree is worth at VALUES."""
    if not isinstance(tree, tuple):
        return VALUES.get(tree, tree)
    if tree[0] == "sqrt":
        return math.sqrt(tree[1])
    a, b = number_of(tree[1]), number_of(tree[2])
    return {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
            "^": operator.pow}[tree[0]](a, b)


def latex(tree, mirrored=False):
    """A tree as LaTeX; mirrored: sums and products the other way round, other marks."""
    if not isinstance(tree, tuple):
        return str(tree)
    if tree[0] == "sqrt":
        return rf"\sqrt{{{tree[1]}}}"
    a, b = (latex(node, mirrored) for node in tree[1:])
    if tree[0] in "+*" and mirrored:
        a, b = b, a
    forms = {"+": f"({a} + {b})", "-": f"(-({b})+{a})" if mirrored else f"({a} - {b})",
             "*": f"({a})({b})" if mirrored else rf"{{{a}}} \cdot {{{b}}}",
             "/": rf"(\frac{{{a}}}{{{b}}})" if mirrored else f"(({a})/({b}))", "^": rf"({a})^{{{b}}}"}
    return forms[tree[0]]


def worth(value):
    """What a sum of `tasks` is worth at VALUES."""
    def of(base):
        if isinstance(base, str):
            return VALUES[base]
        return worth(dict(base[1])) if base[0] == "sum" else math.sqrt(base[1])
    return sum(float(c) * math.prod(of(base) ** e for base, e in monomial) for monomial, c in value.items())


@given(TREES)
def test_algebra_keeps_the_value_and_forgets_the_order(tree):
    try:
        number = number_of(tree)
        value = tasks.expression(latex(tree))
    except ZeroDivisionError:
        return
    assert worth(value) == pytest.approx(number, rel=1e-6, abs=1e-6 * max(1, abs(number)))
    assert tasks.show(value) == tasks.show(tasks.expression(latex(tree, mirrored=True)))


@given(st.text(alphabet="0123456789xy+-*/^_(){}[],=.\\ ²٣\n", max_size=60) | st.text(max_size=60)
       | st.lists(st.sampled_from([r"\frac", r"\sqrt", "{", "}", "1", "x", r"\pm", ",", r"\text{", "^",
                                   r"\cup", "&"]), max_size=30).map("".join))
def test_nothing_written_can_break_the_key(text):
    assert isinstance(canonical(text), str)


# ------------------------------------------------------------------------------
# where the answer stands
# ------------------------------------------------------------------------------

@pytest.mark.parametrize("text, math, gsm8k", [
    (r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}", r"\frac{1}{2}"),
    (r"\boxed{1} or rather \boxed{2}", "2", "2"),
    (r"\boxed{3} and then \boxed{\frac{1}{", "3", "3"),
    (r"\boxed {\{1, 2\}}", r"\{1, 2\}", r"\{1, 2\}"),
    (r"\boxed{\left\{ x \right.}", r"\left\{ x \right.", r"\left\{ x \right."),
    (r"within \boxed{}: 5", None, "5"),
    (r"\boxed{\boxed{7}}", "7", "7"),
    (r"} \boxed{8} {", "8", "8"),
    (r"<think>\boxed{1}</think> It is \boxed{2}.", "2", "2"),
    (r"<think>\boxed{1}</think> I do not know.", None, None),
    (r"<think>\boxed{1}", "1", "1"),
    ("She earns $18 a day.\n#### 18", None, "18"),
    ("#### 1,234\nThat was 99 hours ago", None, "1,234"),
    ("#### -3", None, "-3"),
    ("It is 10-3 = 7.", None, "7"),
    ("10-3", None, "3"),
    ("a change of -3.50 dollars", None, "-3.50"),
    ("from 3, 4", None, "4"),
    ("1/2 of it", None, "1/2"),
    ("the end: .5", None, ".5"),
    ("nothing", None, None), ("", None, None),
    ("\\boxed{4}\nQuestion: and now? \\boxed{5}", "4", "4")])
def test_extraction(text, math, gsm8k):
    assert TASKS["math500"].extract(text) == TASKS["aime24"].extract(text) == math
    assert TASKS["gsm8k"].extract(text) == gsm8k


def test_extraction_takes_no_time_on_a_model_that_loops():
    assert tasks.last_boxed(r"\boxed{" * 30_000) is None
    assert tasks.last_boxed(r"\boxed{7}" * 30_000) == "7"


def test_grading_and_votes():
    problem, task = tasks.Problem("1", "?", "18"), TASKS["gsm8k"]
    assert task.grade(problem, r"\boxed{\$18.00}") and task.grade(problem, "#### 18")
    assert task.truth(problem) == "18"
    assert not task.grade(problem, r"\boxed{81}") and not task.grade(problem, "") and task.key("none") is None
    assert TASKS["aime24"].key(r"\boxed{025}") == TASKS["aime24"].truth(tasks.Problem("1", "?", "25"))


def test_the_question_is_asked():
    problem = tasks.Problem("1", "How many?", "18")
    chat = TASKS["math500"].messages(problem)
    assert [message["role"] for message in chat] == ["user"]
    assert chat[0]["content"] == ("How many?\n\nPlease reason step by step, and put your final answer within "
                                  "\\boxed{}.")
    assert "integer from 0 to 999" in TASKS["aime24"].messages(problem)[0]["content"]
    raw = TASKS["gsm8k"].raw(problem)
    assert raw.startswith("Question: How many?") and raw.endswith("Answer:")
    assert TASKS["humaneval"].raw(ADD) == ADD.question
    assert ADD.question.strip() in TASKS["humaneval"].messages(ADD)[0]["content"]


@pytest.mark.parametrize("name, count", [("gsm8k", 1319), ("math500", 500), ("aime24", 30)])
def test_every_reference_answer_is_found_and_equal_to_itself(name, count):
    task, found = TASKS[name], real(name)
    assert len(found) == count
    for i, (problem, _) in enumerate(found):
        assert task.grade(problem, rf"So it is $\boxed{{{problem.answer}}}$.")
        other = found[i - 1][0]
        if task.truth(other) != task.truth(problem):
            assert not task.grade(problem, rf"So it is $\boxed{{{other.answer}}}$.")


@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_the_data_sets_own_solutions_are_right(name):
    assert all(TASKS[name].grade(problem, line["solution"]) for problem, line in real(name))


def test_different_references_stay_different():
    """Of math500's 500 answers, those with one key; each group was looked at."""
    groups = {}
    for problem, _ in real("math500"):
        groups.setdefault(canonical(problem.answer), set()).add(problem.answer)
    assert sorted(len(group) for group in groups.values() if len(group) > 1) == [2] * 9 + [3]
    assert groups["{-2, 1}"] == {"1,-2", "-2,1"} and groups["36"] == {"36", r"36^\circ", r"\$36"}


@pytest.mark.parametrize("line, message", [
    ("{", "not valid JSON"), ("[1]", "is no JSON object"),
    ('{"id": "b", "question": "?"}', "'answer' is None"),
    ('{"id": 1, "question": "?", "answer": "2"}', "'id' is 1"),
    ('{"id": "b", "question": " ", "answer": "2"}', "'question'"),
    ('{"id": "b", "question": "?", "answer": "two"}', "'answer' is 'two'"),
    ('{"id": "a", "question": "?", "answer": "2"}', "the id")])
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "data.jsonl"
    path.write_text('{"id": "a", "question": "?", "answer": "1"}\n\n' + line)
    with pytest.raises(ValueError, match=rf"data.jsonl, line 3: .*{message}") as error:
        TASKS["aime24"].load(path)
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bytes").write_bytes(b"\xff")
    (tmp_path / "code").write_text('{"task_id": "1", "prompt": "def f():", "entry_point": "g", "test": "?"}')
    for name in ("empty", "bytes", "code", "absent"):
        with pytest.raises(ValueError, match=name):
            TASKS["humaneval"].load(tmp_path / name)


# ------------------------------------------------------------------------------
# programs
# ------------------------------------------------------------------------------

ADD = tasks.Problem("1", '''import math


def helper(x):
    return x


def add(a, b):
    """The sum."""
''', "", "add", """
def check(f):
    assert f(1, 2) == 3 and f(2, b=2) == helper(4)
    print('fine')
""")
RIGHT = "def add(a, b):\n    return a + b\n"
TRIES = """
import ctypes, os, signal, subprocess, threading
libc = ctypes.CDLL(None)
tries = dict(
    fork=os.fork, thread=lambda: threading.Thread(target=print).start(),
    run=lambda: subprocess.run(['/bin/true']),
    memory=lambda: bytearray(3 << 30), here=lambda: open('file', 'w'), root=lambda: open('/file', 'w'),
    python=lambda: open(os.__file__, 'a'),
    remove=lambda: os.remove(os.__file__), root_id=lambda: os.setuid(0),
    kill=lambda: os.kill(2, 9), user=lambda: libc.unshare(0x10000000) < 0 and 1 / 0,
    mount=lambda: libc.mount(b'none', b'/empty', b'tmpfs', 0, None) < 0 and 1 / 0,
    memory_file=lambda: os.write(os.memfd_create('file'), b'1'),
    core=lambda: __import__('resource').setrlimit(4, (1, 1)))
def succeeded():
    found = []
    for name, function in tries.items():
        try:
            function()
            found.append(name)
        except (OSError, MemoryError, RuntimeError, ZeroDivisionError, ValueError):
            pass
    return found
"""
LOOK = """
import os, sys
places = '/proc/self', '/tmp', '/home', '/dev', '/etc', '/sys', '/work', FILE
seen = [dict(os.environ), os.listdir('.'), os.getuid() == 0, [p for p in places if os.path.exists(p)],
        os.getppid(), sys.stdin.read(), sys.argv, [os.statvfs(p).f_flag & 1 for p in ('/', os.__file__)]]
open_files = []
for fd in range(3, 256):
    try:
        os.fstat(fd)
        open_files.append(fd)
    except OSError:
        pass
def look():
    return seen, open_files
"""
REACH = """
import socket
def reach(port):
    try:
        socket.create_connection(('127.0.0.1', port), 2)
        return 'connected'
    except OSError as error:
        return error.strerror
"""


@pytest.fixture(scope="module")
def room():
    """Skips where no sandbox can be built."""
    try:
        sandbox.probe()
    except sandbox.Refused as error:
        if "no program was run: unshare" not in str(error):
            raise
        pytest.skip(f"no sandbox here: {error}")


def does_pass(code, **limits):
    """Does a program pass ADD's check?"""
    return sandbox.passed(code, ADD.question, ADD.test, "add", **limits)


@pytest.mark.parametrize("reply, tail", [
    ("    return a + b\n", 'sum."""\n    return a + b\n'),
    ("\n    return a\n\n\n    # b\n\ndef other():\n    pass\nprint(0)", '"""\n\n    return a\n\n\n    # b\n'),
    ("    return a + b\n```\nDone.", '"""\n    return a + b'),
    ("Here:\n```python\ndef add(a, b):\n    return a\n```\nAs asked.",
     "return x\n\n\n\ndef add(a, b):\n    return a"),
    ("<think>```\ndef add(a, b): 0\n```</think>```\nimport os\ndef add(a, b):\n    1\n```\n```\nadd(1)\n```",
     "\n\nimport os\ndef add(a, b):\n    1"),
    ("```python\n    return a\n```", '"""\n    return a'),
    ("```py\ndef add(a, b):\n    retu", "\ndef add(a, b):\n    retu"),
    ("def add(a, b):\n    return a + b", "return x\n\n\n\ndef add(a, b):\n    return a + b")])
def test_the_program_of_a_reply(reply, tail):
    whole = tasks.program(ADD, TASKS["humaneval"].extract(reply))
    assert whole.startswith("import math\n\n\ndef helper(x):\n    return x\n")
    assert whole.rstrip("\n").endswith(tail.rstrip("\n"))


def test_replies_are_graded(room):
    def grade(reply):
        return TASKS["humaneval"].grade(ADD, reply, run_programs=True)
    assert grade("    return int(math.fsum([a, helper(b)]))") and grade(f"So:\n```python\n{RIGHT}```")
    assert not grade("    return a - b") and not grade("no code") and not grade(" \n")
    with pytest.raises(ValueError, match="--run-programs"):
        TASKS["humaneval"].grade(ADD, "    return a + b")


@pytest.mark.parametrize("code", [
    "import sys\nsys.exit(0)\n" + RIGHT, "def add(a, b):\n    import os\n    os._exit(0)",
    "print('loaded')\nprint('passed')\ndef add(a, b):\n    print('passed', flush=True)\n    return 0",
    "import os\nfor fd in range(256):\n    try:\n        os.write(fd, b'loaded\\n3\\n4\\n')\n"
    "    except OSError:\n        pass\nos._exit(0)",
    "class Yes(int):\n    __eq__ = lambda *_: True\n    __hash__ = None\ndef add(a, b):\n    return Yes(7)",
    "class Yes:\n    __eq__ = lambda *_: True\n    __hash__ = None\ndef add(a, b):\n    return Yes()",
    "import os\nos.kill(0, 9)\nos._exit(0)", "def add(:", "def add(a, b):\n    return add(a, b)",
    "def add(a, b):\n    return 'x' * 9_000_000"])
def test_what_does_not_pass(room, code):
    assert not does_pass(code)


def test_an_endless_loop_ends(room):
    began = time.monotonic()
    assert not does_pass("while True:\n    pass", wall_s=0.2)
    assert not does_pass("def add(a, b):\n    import time\n    time.sleep(60)", wall_s=0.4)
    assert time.monotonic() - began < 15            # the warden's limit, not its starter's


@pytest.mark.slow
def test_an_endless_loop_ends_by_its_own_time(room):
    began = time.monotonic()
    assert not does_pass("def add(a, b):\n    while True:\n        pass", cpu_s=1)
    assert time.monotonic() - began < 15


def test_a_program_can_do_nothing(room):
    assert sandbox.passed(TRIES, "", "def check(f):\n    assert f() == [], f()\n", "succeeded")


def test_a_program_sees_nothing(room, monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    want = ([{}, [], False, [], 0, "", ["-c", "tenant"], [1, 1]], list(sandbox.ENDS))
    look = LOOK.replace("FILE", repr(__file__))
    assert sandbox.passed(look, "", f"def check(f):\n    assert f() == {want!r}, f()\n", "look")


def test_a_program_reaches_no_network(room):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check = f"def check(f):\n    assert f({port}) == 'Network is unreachable', f({port})\n"
        assert sandbox.passed(REACH, "", check, "reach")
        socket.create_connection(("127.0.0.1", port), 2).close()


def test_no_namespace_no_program(monkeypatch):
    """The refusal is the kernel's own: these flags are no namespaces."""
    monkeypatch.setattr(sandbox, "NAMESPACES", 0x1)
    with pytest.raises(sandbox.Refused, match="no program was run: unshare: Invalid argument; Human"):
        does_pass(RIGHT)


def test_a_network_that_is_there_is_refused(room, monkeypatch):
    monkeypatch.setattr(sandbox, "NAMESPACES", sandbox.NAMESPACES & ~0x40000000)
    with pytest.raises(sandbox.Refused, match="the network has"):
        does_pass(RIGHT)


LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
KEYS = st.integers() | st.tuples(st.text(max_size=2))


@given(st.recursive(LEAVES, lambda node: (
    st.lists(node, max_size=3) | st.lists(node, max_size=3).map(tuple)
    | st.dictionaries(KEYS, node, max_size=3) | st.sets(st.integers(), max_size=3)
    | st.frozensets(KEYS, max_size=3)), max_leaves=8))
def test_plain_values_cross_unchanged(value):
    found = sandbox.unpack(json.loads(json.dumps(sandbox.pack(value))))
    assert found == value and type(found) is type(value)


def test_a_message_has_an_end():
    for data, most in ((b"12345\n", 5), (b"12345", 9), (b"", 9)):
        (reader, writer) = os.pipe()
        os.write(writer, data)
        os.close(writer)
        with pytest.raises(ValueError, match="no whole line"):
            sandbox.read_line(reader, most)
        os.close(reader)
    reader, writer = os.pipe()
    os.write(writer, b"12345\n")
    assert sandbox.read_line(reader, 6) == b"12345"
    with pytest.raises(ValueError, match="too slow"):
        sandbox.read_line(reader, 6, time.monotonic() + 0.01)
    os.close(reader), os.close(writer)


def test_other_values_do_not_cross():
    for value in (object(), [b"x"], {"a": 1j}, map(str, [])):
        with pytest.raises(TypeError, match="is not a plain value"):
            sandbox.pack(value)


def test_some_real_programs(room):
    for problem, line in real("humaneval")[32:39:6]:
        assert TASKS["humaneval"].grade(problem, line["canonical_solution"], run_programs=True)
        assert not TASKS["humaneval"].grade(problem, "    return None\n", run_programs=True)


@pytest.mark.slow
def test_all_real_programs(room):
    for problem, line in real("humaneval"):
        fenced = f"```python\n{problem.question}{line['canonical_solution']}```"
        assert TASKS["humaneval"].grade(problem, line["canonical_solution"], run_programs=True), problem.id
        assert TASKS["humaneval"].grade(problem, fenced, run_programs=True), problem.id
        assert not TASKS["humaneval"].grade(problem, "    return None\n", run_programs=True), problem.id


# ------------------------------------------------------------------------------
# the command line
# ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model of random weights and five problems whose answers are 0 … 4."""
    folder = tmp_path_factory.mktemp("passk")
    write_checkpoint(folder / "model", max_position_embeddings=300)
    lines = [json.dumps(dict(id=f"p{i}", question=f"{i}+0=?", answer=str(i))) for i in range(5)]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def flags(place, tmp_path):
    """The flags of a small run."""
    return ["--model", str(place / "model"), "--task", "gsm8k", "--data", str(place / "data.jsonl"),
            "--out", str(tmp_path / "out.jsonl"), "--n", "4", "--seeds", "1", "2", "--batch-prompts", "2",
            "--method", "vanilla", "esamp", "--max-new-tokens", "6", "--device", "cpu"]


@pytest.fixture
def calls(monkeypatch):
    """`methods.sample` replaced: of problem p the first p samples are right, at seed 3 none. Its calls."""
    made = []

    def sample(model, prompts, setting, *, n, max_new_tokens, seed, eos_ids, first_prompt=0, amateur=None):
        made.append((setting.name, seed, first_prompt, len(prompts)))
        if len(made) == sample.killed_at:
            raise KeyboardInterrupt
        places = range(first_prompt, first_prompt + len(prompts))
        rows = [Sample(p, k, [3 + (p if k < p and seed != 3 else 9), 2], "stop", [0.0] * 2, [None] * 2)
                for p in places for k in range(n)]
        return rows, Stats(tokens=2 * len(rows), samples=len(rows))
    sample.killed_at = 0
    monkeypatch.setattr(methods, "sample", sample)
    return made


def lines_of(flags):
    """The JSON lines of a run's file."""
    with open(flags[7], encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_the_table_is_right(flags, calls, capsys):
    assert passk.main(flags) == 0
    head, *entries = lines_of(flags)
    assert head["run"]["n"] == 4 and head["run"]["task"] == "gsm8k"
    assert len(entries) == 2 * 2 * 3 == len(calls)
    assert [e["correct"] for e in entries[:3]] == [[0, 1], [2, 3], [4]]
    assert entries[1]["answers"] == [["2", "2", "9", "9"], ["3", "3", "3", "9"]]
    assert entries[1]["truth"] == ["2", "3"]
    assert {e["setting"]["method"] for e in entries} == {"vanilla", "esamp"} and entries[0]["commit"]
    assert entries[0]["stats"]["tokens"] == 16 and "texts" not in entries[0]
    shown = capsys.readouterr().out
    for k in (1, 2, 4):
        values = [metrics.pass_at_k(4, c, k) for c in range(5)]
        middle, low, high = (100 * x for x in metrics.interval(values))
        assert shown.count(f" {middle:.1f} [{low:.1f}, {high:.1f}]") >= 2
    assert " 50.0 [" in shown and " 80.0 [" in shown and "maj@k" in shown
    assert "5 problems, seeds 1, 2; commit" in shown
    assert "k of 4: samples of a prompt share a Distiller (esamp), so" in shown and "k = 8" not in shown


def test_vanilla_alone_shares_nothing(flags, calls, capsys):
    assert passk.main([*flags, "--method", "vanilla", "--texts", "--limit", "3"]) == 0
    assert "share" not in capsys.readouterr().out and lines_of(flags)[1]["texts"][0] == ["9"] * 4
    assert [call[2:] for call in calls] == [(0, 2), (2, 1)] * 2


def test_a_run_goes_on_where_it_stopped(flags, calls, capsys):
    assert passk.main(flags) == 0
    whole = [{k: v for k, v in line.items() if k != "seconds"} for line in lines_of(flags)]
    table, made = capsys.readouterr().out, list(calls)
    os.remove(flags[7])
    calls.clear()
    methods.sample.killed_at = 6
    assert passk.main(flags) == 130 and len(lines_of(flags)) == 1 + 5
    with open(flags[7], "a") as file:
        file.write('{"setting": {"name": "van')
    methods.sample.killed_at = 0
    assert passk.main(flags) == 0
    assert calls[:5] + calls[6:] == made
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in lines_of(flags)] == whole
    said = capsys.readouterr()
    assert said.out == table and "dropped" in said.err
    calls.clear()
    with open(flags[7], "a") as file:
        file.write('{"setting"')
    assert passk.main(flags) == 0 and not calls and capsys.readouterr().out == table
    assert len(lines_of(flags)) == len(whole)


def test_seeds_are_averaged_and_only_those_asked_for(flags, calls, capsys):
    for seeds, mean, made in ((["1"], "50.0", {1}), (["3", "1"], "25.0", {3}), (["3"], "0.0", set())):
        calls.clear()
        assert passk.main([*flags, "--method", "vanilla", "--seeds", *seeds]) == 0
        assert re.search(rf"pass.*\n.*\nvanilla +{mean} ", capsys.readouterr().out)
        assert {call[1] for call in calls} == made


def test_other_settings_are_refused(flags, calls, capsys):
    assert passk.main(flags) == 0
    before = open(flags[7], "rb").read()
    for change, message in [
            (["--n", "8"], "line 1: was made with n 4, not 8"), (["--limit", "2"], "limit None, not 2"),
            (["--raw"], "raw False"), (["--batch-prompts", "1"], "batch_prompts 2, not 1"),
            (["--max-new-tokens", "7"], "max_new"), (["--dtype", "float16"], "dtype"),
            (["--settings", '{"name": "esamp", "beta": 1}', "--method", "esamp"], "another setting")]:
        capsys.readouterr()
        assert passk.main([*flags, *change]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1 and open(flags[7], "rb").read() == before


@pytest.mark.parametrize("change, message", [
    (["--n", "0"], "n is 0"), (["--limit", "0"], "limit is 0"), (["--seeds", "-1"], "seed is -1"),
    (["--settings", "{"], "not valid JSON"), (["--settings", "[]"], "no JSON object"),
    (["--method", "best"], "method is 'best'"),
    (["--settings", '{"heat": 1}'], "'heat'; accepted: name, method"),
    (["--settings", '{"temperature": "x"}'], "temperature"),
    (["--settings", '{"waves": 3}'], "no multiple of 3"),
    (["--settings", '[{"beta": 1}, {"beta": 1}]'], "two settings"),
    (["--method", "contrastive"], "needs --amateur"), (["--task", "chess"], "invalid choice"),
    (["--task", "humaneval"], "--run-programs"), (["--task", "aime24", "--data", "absent"], "absent"),
    (["--device", "cuda:99"], "cuda:99"), (["--model", "absent"], "absent")])
def test_bad_flags_are_one_line(flags, calls, capsys, change, message):
    assert passk.main([*flags, *change]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and not calls and not os.path.exists(flags[7])


def test_a_line_that_is_there_twice_is_named(flags, calls, capsys):
    assert passk.main(flags) == 0
    lines = open(flags[7]).readlines()
    with open(flags[7], "a") as file:
        file.write(lines[3])
    assert passk.main(flags) == 2
    assert "line 14: is there twice: setting 'vanilla', seed 1, first problem 4" in capsys.readouterr().err


def test_a_file_of_something_else_stays(flags, calls, capsys):
    for content in ('{"a": 1}\n', "hello\n", '{"run": 3}\n', "[1]\n", "no newline at all"):
        with open(flags[7], "w") as file:
            file.write(content)
        assert passk.main(flags) == 2, content
        assert open(flags[7]).read() == content


def test_settings_by_method_and_name():
    given = '[{"beta": 0.5}, {"method": "vanilla", "temperature": 0.8, "name": "cool"}]'
    made = passk.settings_of(given, ["esamp", "subtract"])
    assert [s.name for s in made] == ["esamp beta=0.5", "subtract beta=0.5", "cool"]
    assert [s.method for s in made] == ["esamp", "subtract", "vanilla"] and made[2].temperature == 0.8


def test_a_prompt_too_long_is_named(flags, calls, tmp_path, capsys):
    (tmp_path / "long").write_text(json.dumps(dict(id="p", question="1" * 300, answer="1")))
    assert passk.main([*flags, "--data", str(tmp_path / "long")]) == 2
    assert "p has " in capsys.readouterr().err


def test_the_template_is_used_unless_raw(tmp_path, flags, monkeypatch):
    template, seen = "{{ messages[0].content[:3] }}", []
    folder = write_checkpoint(tmp_path / "chat", template, max_position_embeddings=300)
    monkeypatch.setattr(methods, "sample", lambda model, prompts, *args, **_: seen.append(prompts) or 1 / 0)
    for extra in ([], ["--raw"]):
        with pytest.raises(ZeroDivisionError):
            passk.main([*flags, "--model", str(folder), *extra, "--out", str(tmp_path / f"o{len(extra)}")])
    assert [len(ids) for ids in seen[0]] == [3, 3] and all(len(ids) > 20 and ids[0] == 1 for ids in seen[1])


def test_real_decoding(flags, capsys):
    assert passk.main([*flags, "--limit", "3", "--seeds", "1"]) == 0
    entries = lines_of(flags)[1:]
    assert [e["correct"] for e in entries] == [[sum(r) for r in e["right"]] for e in entries]
    assert entries[2]["stats"]["updates"] > 0 == entries[0]["stats"]["updates"]
