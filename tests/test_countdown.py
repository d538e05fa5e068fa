"""The bundled checkpoint and its recipe: the verifier against brute force, problems, resuming, the card."""

import argparse
import hashlib
import itertools
import json
import random
import re

import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from decode import ESampConfig, Sample, SamplingConfig, Text, generate, main
from experiments import countdown, sharpen_countdown, train_countdown
from experiments.countdown import canonical, is_correct, parse
from model import ModelConfig, load

CARD = ROOT / "checkpoints" / "countdown"
PROMPT = "9875>87:"


def every_answer(digits, target):
    """All correct answers by brute force, as text, written without the module's parser."""
    def walk(table, steps):
        if len(table) == 1:
            if table[0] == target:
                yield ",".join(steps)
            return
        for i, j in itertools.permutations(range(len(table)), 2):
            a, b = table[i], table[j]
            rest = [x for k, x in enumerate(table) if k not in (i, j)]
            for operator, value in (("+", a + b), ("-", a - b), ("*", a * b), ("/", a / b)):
                if value == int(value) and 1 <= value <= 99:
                    yield from walk([int(value), *rest], [*steps, f"{a}{operator}{b}={int(value)}"])
    return set(walk(list(digits), []))


@pytest.mark.parametrize("prompt", [PROMPT, "8863>96:", "4433>24:"])
def test_the_verifier_accepts_all_correct_answers_and_nothing_close(prompt):
    digits, target = [int(d) for d in prompt[:4]], int(prompt[5:7])
    answers = every_answer(digits, target)
    assert len(answers) > 3 and all(is_correct(prompt, a) for a in answers)
    noise = random.Random(0)
    for answer in sorted(answers)[:60]:
        for _ in range(20):
            i = noise.randrange(len(answer))
            changed = answer[:i] + noise.choice("0123456789+-*/=,") + answer[i + 1:]
            assert is_correct(prompt, changed) == (changed in answers), changed
        for changed in (answer + ",", answer[:-1], answer + " ", "0" + answer,
                        answer.replace("=", "=0", 1), "+" + answer):
            assert not is_correct(prompt, changed)
    assert not is_correct(prompt, "")
    for other in itertools.combinations_with_replacement(range(9, 0, -1), 4):    # right sums, other digits
        if len(set(other) - set(digits)) == 0 and sorted(other) != sorted(digits):
            assert not any(is_correct(prompt, a) for a in every_answer(other, target)), other


def test_the_verifier_of_five_digits_accepts_all_correct_answers_and_nothing_close():
    prompt = "98753>87:"
    answers, noise = every_answer((9, 8, 7, 5, 3), 87), random.Random(0)
    assert len(answers) == 1044 and all(is_correct(prompt, a) for a in answers)
    for answer in sorted(answers)[::12]:
        for _ in range(10):
            i = noise.randrange(len(answer))
            changed = answer[:i] + noise.choice("0123456789+-*/=,") + answer[i + 1:]
            assert is_correct(prompt, changed) == (changed in answers), changed
        for changed in (answer.rpartition(",")[0], answer + ",87*1=87", answer + ",", answer[:-1]):
            assert not is_correct(prompt, changed)
    assert not is_correct("9875>87:", "7+3=10,9*10=90,90-8=82,82+5=87")
    assert not is_correct(prompt, "7+5=12,12*8=96,96-9=87")                  # leaves the 3
    assert canonical(prompt, "7+3=10,9*10=90,90-8=82,82+5=87") == "(+(*(+3 +7) *9) +5 -8)"


def test_the_paper_example_and_what_counts_as_one_solution():
    assert is_correct(PROMPT, "7+5=12,12*8=96,96-9=87")
    assert not is_correct("9875>86:", "7+5=12,12*8=96,96-9=87")
    one = canonical(PROMPT, "7+5=12,12*8=96,96-9=87")
    assert one == canonical(PROMPT, "5+7=12,8*12=96,96-9=87")
    same = ["9+8=17,17+7=24,24+5=29", "5+7=12,8+9=17,17+12=29", "7+9=16,16+8=24,5+24=29"]
    assert len({canonical("9875>29:", a) for a in same}) == 1                # orders of one sum
    assert canonical("9875>13:", "9+8=17,17-7=10,10-5=5") is None
    assert canonical("9853>15:", "5-3=2,9-2=7,7+8=15") == "(+3 +8 +9 -5)"     # 9 − (5 − 3) adds the 3
    assert canonical("8432>12:", "4/2=2,8/2=4,4*3=12") == "(*2 *3 *8 /4)"
    assert len({canonical("8863>18:", a) for a in ("8-8=0", "8/8=1,6*3=18,18*1=18", "8/8=1,1*6=6,6*3=18",
                                                   "8*3=24,24-6=18,18-8=10")} - {None}) == 1
    assert canonical("9521>15:", "9-5=4,4*2=8,8+1=9") is None


@given(st.integers(0, 10 ** 6))
@settings(max_examples=30)
def test_canonical_is_what_the_answer_computes(seed):
    """Equal canonical forms have equal values at random real digits: no two solutions are merged."""
    source = random.Random(seed)
    prompt, answer = countdown.problem(source, countdown.MULTISETS, 0.5)
    answers = sorted(every_answer([int(d) for d in prompt[:4]], int(prompt[5:7])))[:80]
    assert is_correct(prompt, answer)
    if len(set(prompt[:4])) < 4:
        return                                           # equal digits stand for each other
    values = {d: source.uniform(1, 2) for d in map(int, prompt[:4])}

    def value(tree):
        if isinstance(tree, int):
            return values[tree]
        a, b = value(tree[1]), value(tree[2])
        return {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[tree[0]]
    groups = {}
    for each in answers:
        groups.setdefault(canonical(prompt, each), []).append(value(parse(prompt, each)))
    for found in groups.values():
        assert max(found) - min(found) < 1e-9


@given(st.integers(0, 10 ** 6), st.sampled_from([0.0, 0.7, 1.0]))
def test_problems_are_correct_and_of_fixed_length(seed, fold):
    prompt, answer = countdown.problem(random.Random(seed), countdown.TRAIN_MULTISETS, fold)
    assert len(prompt) == 8 and is_correct(prompt, answer)
    assert prompt[:4] == "".join(sorted(prompt[:4], reverse=True))
    assert not countdown.held_out([int(d) for d in prompt[:4]])
    if fold == 1.0:
        results = re.findall(r"=(\d+)", answer)
        steps = [re.findall(r"\d+", step)[:2] for step in answer.split(",")]
        assert results[0] in steps[1] and results[1] in steps[2]


def test_problems_of_five_digits():
    source, (train, test) = random.Random(5), countdown.split(5)
    assert len(train) + len(test) == 1287 and 0.06 < len(test) / 1287 < 0.10 and set(train).isdisjoint(test)
    for _ in range(200):
        prompt, answer = countdown.problem(source, train, 0.7)
        assert re.fullmatch(r"[1-9]{5}>[1-9][0-9]:", prompt) and answer.count(",") == 3
        assert is_correct(prompt, answer) and not countdown.held_out([int(d) for d in prompt[:5]])
    prompts = countdown.test_prompts(source, 20, digits=5)
    assert len(set(prompts)) == 20 and all(countdown.held_out([int(d) for d in p[:5]]) for p in prompts)
    with pytest.raises(ValueError, match="digits is 6; accepted: 4, 5"):
        countdown.split(6)


def test_every_generated_step_stays_between_1_and_99():
    source, largest = random.Random(3), 0
    for _ in range(4000):
        prompt, answer = countdown.problem(source, countdown.TRAIN_MULTISETS, 0.7)
        largest = max(largest, *map(int, re.findall(r"\d+", answer)))
        assert is_correct(prompt, answer)
    assert largest == 99


def test_eight_percent_of_the_multisets_are_held_out():
    assert len(countdown.MULTISETS) == 495
    assert set(countdown.TRAIN_MULTISETS).isdisjoint(countdown.TEST_MULTISETS)
    assert 0.06 < len(countdown.TEST_MULTISETS) / 495 < 0.10
    prompts = countdown.test_prompts(random.Random(1), 50)
    assert len(set(prompts)) == 50 and all(countdown.held_out([int(d) for d in p[:4]]) for p in prompts)
    assert countdown.held_out((1, 2, 3, 4)) == countdown.held_out((4, 2, 3, 1))


def test_pass_at_k_reproduces_a_row_of_the_paper():
    """Table 2, subtraction at β = .5: 30 problems, n = 64, four of them solved once."""
    row = [100 * 4 * train_countdown.pass_at_k(64, 1, k) / 30 for k in (1, 2, 4, 8, 16, 32, 64)]
    assert [f"{x:.1f}" for x in row] == ["0.2", "0.4", "0.8", "1.7", "3.3", "6.7", "13.3"]
    assert train_countdown.pass_at_k(64, 0, 64) == 0 and train_countdown.pass_at_k(64, 64, 1) == 1


def test_the_bundled_recipe_draws_the_problems_it_drew():
    """What the bundled checkpoint and its figures were made of, as a hash; five digits draw others."""
    def digest(content):
        return hashlib.sha256(content).hexdigest()[:16]
    assert digest(train_countdown.batch(0, 0, 16).numpy().tobytes()) == "d471b7264ed11a8a"
    assert digest(train_countdown.batch(0, 7, 64).numpy().tobytes()) == "75958de8c2f48f46"
    prompts = countdown.test_prompts(random.Random("countdown test"), 200)
    assert digest(repr(prompts).encode()) == "840560b6cc34aee9"
    five = train_countdown.batch(0, 0, 16, digits=5)
    assert (five[:, 9] == train_countdown.ID[":"]).all() and five.shape[1] <= 10 + 31


def test_the_width_of_a_model_is_a_flag(tmp_path, capsys):
    assert train_countdown.config_of() == json.loads((CARD / "config.json").read_text())
    flags = ["--out", str(tmp_path), "--steps", "1", "--batch", "2", "--no-evaluation"]
    train_countdown.main(flags + ["--digits", "5", "--width", "64"])
    config = ModelConfig.read(tmp_path)
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (64, 192, 32)
    assert (config.num_attention_heads, config.num_key_value_heads) == (2, 1)
    assert set(train_countdown.evaluate(load(tmp_path), problems=2, n=4, digits=5)) == {
        "pass@1", "pass@4", "distinct"}
    with pytest.raises(SystemExit) as error:
        train_countdown.main(flags + ["--width", "100"])
    assert error.value.code == 2 and "width is 100; accepted: multiples of 64" in capsys.readouterr().err


def test_training_resumes_to_the_same_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_countdown, "SAVE_EVERY", 2)
    flags = ["--steps", "5", "--batch", "8", "--no-evaluation"]
    train_countdown.main(["--out", str(tmp_path / "whole"), *flags])
    plain, calls = train_countdown.answer_loss, []

    def killed(model, batch):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return plain(model, batch)
    monkeypatch.setattr(train_countdown, "answer_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train_countdown.main(["--out", str(tmp_path / "parts"), *flags])
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    train_countdown.main(["--out", str(tmp_path / "parts"), *flags])
    assert len(calls) == 4 + 3                           # steps 0 1 2 (3 killed), then 2 3 4
    a, b = (load(tmp_path / name).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not (tmp_path / "parts" / "train_state.pt").exists()


def test_the_loss_is_about_answers_only():
    model = train_countdown.fresh_model(0, "cpu")
    tokens = train_countdown.batch(0, 0, 16)
    assert torch.equal(tokens, train_countdown.batch(0, 0, 16))
    assert not torch.equal(tokens, train_countdown.batch(0, 1, 16))
    logits, total, count = model(tokens), 0.0, 0
    for row, ids in enumerate(tokens.tolist()):
        end = ids.index(train_countdown.EOS)
        for t in range(9, end + 1):
            total -= logits[row, t - 1].log_softmax(-1)[ids[t]].item()
            count += 1
    assert train_countdown.answer_loss(model, tokens).item() == pytest.approx(total / count, rel=1e-5)


def test_an_advantage_is_relative_to_the_answers_of_its_problem():
    reward_PK = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 0]])
    advantage_PK = sharpen_countdown.advantages(reward_PK)
    root = 3 ** 0.5
    expected = torch.tensor([[root, *[-1 / root] * 3], [0] * 4, [0] * 4, [1, -1, 1, -1]])
    torch.testing.assert_close(advantage_PK, expected, atol=1e-3, rtol=0)


def test_the_policy_loss_is_the_token_mean_over_answers_and_their_eos():
    model = train_countdown.fresh_model(0, "cpu")
    prompts = [train_countdown.prompt_ids(p) for p in (PROMPT, "8863>96:")]
    answers, advantage_B = [[10, 13, 9, 2], [5, 4, 3, 6, 7, 8, 2]], torch.tensor([1.5, -0.5])
    total = 0.0
    for prompt, answer, advantage in zip(prompts, answers, advantage_B, strict=True):
        logprob_LV = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
        total -= advantage * sum(logprob_LV[8 + t, token] for t, token in enumerate(answer))
    loss = sharpen_countdown.policy_loss(model, prompts, answers, advantage_B)
    assert loss.item() == pytest.approx(total.item() / 11, rel=1e-4)


def test_a_sharpening_step_makes_a_rewarded_answer_likelier():
    model = sharpen_countdown.trainable(CARD)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    right, wrong = "7+5=12,12*8=96,96-9=87", "7+5=12,12*8=96,96-9=86"
    rows = [[train_countdown.ID[c] for c in text] + [train_countdown.EOS] for text in (right, wrong)]
    samples = [Sample(0, i, row, "stop", [-1.0] * len(row), [None] * len(row)) for i, row in enumerate(rows)]

    def likelihood(row):
        ids = train_countdown.prompt_ids(PROMPT)
        with torch.no_grad():
            return -sharpen_countdown.policy_loss(model, [ids], [row], torch.ones(1)).item()
    before, frozen = [likelihood(row) for row in rows], load(CARD).state_dict()
    assert sharpen_countdown.update(model, opt, [PROMPT], samples) == (0.5, 1.0)
    after = [likelihood(row) for row in rows]
    assert after[0] > before[0] and after[1] < before[1]
    assert not any(torch.equal(p, frozen[name]) for name, p in model.state_dict().items())   # all learn
    held = [p.clone() for p in model.parameters()]
    assert sharpen_countdown.update(model, opt, [PROMPT], [samples[0]] * 2) == (1.0, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(held, model.parameters(), strict=True))     # all right: void


def test_every_problem_of_every_sharpening_step_has_noise_of_its_own(monkeypatch):
    monkeypatch.setattr(countdown, "problem", lambda *_, **__: (PROMPT, ""))
    args = argparse.Namespace(seed=0, problems=2, samples=2, digits=4)
    drawn = [tuple(s.token_ids) for step in (0, 1) for s in
             sharpen_countdown.rollouts(load(CARD), step, args)[1]]
    assert len(set(drawn)) == 8


def test_sharpening_resumes_to_the_same_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sharpen_countdown, "SAVE_EVERY", 1)
    flags = ["--model", str(CARD), "--steps", "2", "--problems", "2", "--samples", "4", "--no-evaluation"]
    sharpen_countdown.main(["--out", str(tmp_path / "whole"), *flags])
    plain, calls = sharpen_countdown.rollouts, []

    def killed(model, step, args):
        calls.append(step)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return plain(model, step, args)
    monkeypatch.setattr(sharpen_countdown, "rollouts", killed)
    with pytest.raises(KeyboardInterrupt):
        sharpen_countdown.main(["--out", str(tmp_path / "parts"), *flags])
    sharpen_countdown.main(["--out", str(tmp_path / "parts"), *flags])
    assert calls == [0, 1, 1]
    a, b, bundled = (load(folder).state_dict() for folder in (tmp_path / "whole", tmp_path / "parts", CARD))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], bundled[name]) for name in a)
    with pytest.raises(SystemExit) as error:
        sharpen_countdown.main(["--out", str(CARD), *flags])
    assert error.value.code == 2


def test_the_bundled_checkpoint_is_small_and_its_prompts_are_problems():
    assert sum(p.stat().st_size for p in CARD.iterdir()) < 8_000_000
    config = ModelConfig.read(CARD)
    assert config.num_attention_heads > config.num_key_value_heads
    text = Text(CARD, config)
    assert text.eos_ids == {2} and text.decode(text.encode_raw("9875>87:7+5=12")) == "9875>87:7+5=12"
    for prompt in (CARD / "prompts.txt").read_text().split():
        digits = [int(d) for d in prompt[:4]]
        assert countdown.held_out(digits) and len(every_answer(digits, int(prompt[5:7]))) > 1
    assert text.unknown("9x5 >é") == " xé"


def test_the_main_job_solves_held_out_problems(capsys):
    assert main(["--esamp", "--n", "16"]) == 0
    blocks = capsys.readouterr().out.split("── ")[1:]
    solved = [any(is_correct(b.split("\n")[0], line[6:]) for line in b.split("\n")[1:17]) for b in blocks]
    assert len(solved) == 4 and sum(solved) >= 3


def test_stories_are_told(stories_folder, capsys):
    assert main(["--model", str(stories_folder), "--esamp", "--prompt", "Once upon a time", "--n", "8",
                 "--max-new-tokens", "60"]) == 0
    told = capsys.readouterr().out
    assert told.count("there was a") >= 6 and "8 of 8 samples" in told


def test_the_readmes_story_figures(stories, stories_folder):
    """134 at the end, against 243 and 224, a fifth of the tokens moved; other CPUs round otherwise."""
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    pattern = r"(\d+)-token stories,.* end at (\d+), against (\d+) and (\d+), and move a fifth"
    claim = re.search(pattern, readme)
    text = Text(stories_folder, stories.config)
    sampling = SamplingConfig(n=16, max_new_tokens=int(claim[1]))
    ids = text.encode_raw("Once upon a time")
    result = generate(stories, [ids], sampling, ESampConfig(), eos_ids=text.eos_ids)
    figures = result.stats.summary()
    for name, claimed in zip(("", "_if_h1", "_if_running_mean"), claim.groups()[1:], strict=True):
        assert figures[f"loss_last_10_steps{name}"] == pytest.approx(float(claimed), rel=0.05)
    assert 0.15 < figures["moved_share"] < 0.25


@pytest.mark.slow
def test_the_model_cards_figures_hold_and_meet_the_bar():
    figures = train_countdown.evaluate(load(CARD))
    assert 0.15 <= figures["pass@1"] <= 0.50 and figures["pass@64"] >= 0.80
    card = (CARD / "README.md").read_text()
    for name, value in figures.items():
        claimed = float(re.search(rf"\| {name} \| ([\d.]+) \|", card)[1])
        assert value == pytest.approx(claimed, abs=0.01 if name != "distinct" else 0.05), name
