"""Trains the bundled checkpoint, `checkpoints/countdown/`, from scratch with this project's `Model.forward`.

    python -m experiments.train_countdown --out checkpoints/countdown         # train, write, evaluate
    python -m experiments.train_countdown --evaluate checkpoints/countdown    # only the model card's figures

A 0.79M-parameter Qwen3-style model (query heads share kv heads, q/k norms), a character tokenizer, problems
made on the fly. Muon on the matrices, AdamW on embeddings, head and norms, both with a linear decay to zero;
fp32 on a CPU, bf16 autocast on a GPU. Seeded: step s draws its batch from (seed, s) alone, so a resumed run
sees the same problems. Progress goes to stderr; `train_state.pt` beside the output (written by this script
for this script, and removed at the end) lets a killed run go on where it was.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from decode import SamplingConfig, generate
from experiments import countdown
from model import Model, ModelConfig, load

SPECIAL = ["<unk>", "<s>", "</s>"]
VOCABULARY = SPECIAL + list("0123456789+-*/=,>:")
ID = {token: i for i, token in enumerate(VOCABULARY)}
BOS, EOS = ID["<s>"], ID["</s>"]
PROMPT_LENGTH = 9                                       # BOS and eight characters
FOLD_SHARE = 0.7
SAVE_EVERY = 200                                        # steps
CONFIG = dict(
    architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=len(VOCABULARY), hidden_size=128,
    intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
    max_position_embeddings=64, rms_norm_eps=1e-6,
    rope_parameters=dict(rope_type="default", rope_theta=10000.0), tie_word_embeddings=False,
    attention_bias=False, hidden_act="silu", use_sliding_window=False, bos_token_id=BOS, eos_token_id=EOS,
    dtype="float32")


def tokenizer():
    """One token per character, BOS in front; an unknown character becomes <unk>."""
    text = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    text.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    text.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    text.decoder = decoders.Fuse()
    text.add_special_tokens(SPECIAL)
    return text


def batch(seed, step, size):
    """The problems of one step: (size, L) ids padded with EOS; a pure function of (seed, step)."""
    source = random.Random(f"countdown {seed} {step}")
    lines = ["".join(countdown.problem(source, countdown.TRAIN_MULTISETS, FOLD_SHARE)) for _ in range(size)]
    ids = [[BOS] + [ID[c] for c in line] + [EOS] for line in lines]
    longest = max(map(len, ids))
    return torch.tensor([row + [EOS] * (longest - len(row)) for row in ids])


def answer_loss(model, token_BL):
    """Mean cross-entropy of the answer's tokens and its EOS, given the prompt."""
    logits_BLV = model(token_BL[:, :-1])[:, PROMPT_LENGTH - 1:]
    target_BL = token_BL[:, PROMPT_LENGTH:].clone()
    target_BL[:, 1:][target_BL[:, :-1] == EOS] = -100           # the padding behind the first EOS
    return F.cross_entropy(logits_BLV.flatten(0, 1), target_BL.flatten(), ignore_index=-100)


def fresh_model(seed, device):
    """Seeded weights: N(0, 0.02²) for the embedding, PyTorch's own init for the rest."""
    torch.manual_seed(seed)
    model = Model(ModelConfig.from_dict(CONFIG))
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=0.02)
    return model.to(device)


def optimizers(model):
    """Muon for the blocks' matrices, AdamW for everything else.

    The weight decay keeps the residual stream at an LLM's scale (‖h¹‖ about 4, ‖h^L‖ about 13): at 0.01 and
    2,400 steps ‖h¹‖ grew to 81, and the paper's Distiller began at a loss of 5·10⁴.
    """
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    rest = [p for name, p in model.named_parameters() if not (p.dim() == 2 and ".layers." in name)]
    return [torch.optim.Muon(matrices, lr=0.02, weight_decay=0.3, adjust_lr_fn="original"),
            torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.0)]


def train(args):
    """Runs `args.steps` steps, or goes on with the run in `train_state.pt`; returns (model, seconds)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, state_file = fresh_model(args.seed, device), Path(args.out) / "train_state.pt"
    opts, start, spent_s = optimizers(model), 0, 0.0
    rates = [group["lr"] for opt in opts for group in opt.param_groups]
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        if state["run"] != [args.steps, args.batch, args.seed]:
            raise SystemExit(f"{state_file} belongs to a run with --steps, --batch, --seed {state['run']}; "
                             "remove it or give the same")
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
        start, spent_s = state["step"], state["spent_s"]
    began = time.monotonic() - spent_s
    for step in range(start, args.steps):
        for group, rate in zip((g for opt in opts for g in opt.param_groups), rates, strict=True):
            group["lr"] = rate * min((step + 1) / 50, 1 - step / args.steps)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = answer_loss(model, batch(args.seed, step, args.batch).to(device))
        loss.backward()
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        spent_s = time.monotonic() - began
        if (step + 1) % 50 == 0:
            left_s = spent_s / (step + 1) * (args.steps - step - 1)
            print(f"step {step + 1}/{args.steps}  loss {loss.item():.4f}  "
                  f"{spent_s:.0f} s, {left_s:.0f} s left", file=sys.stderr, flush=True)
        if (step + 1) % SAVE_EVERY == 0:
            torch.save(dict(model=model.state_dict(), opts=[o.state_dict() for o in opts], step=step + 1,
                            spent_s=spent_s, run=[args.steps, args.batch, args.seed]),
                       state_file.with_suffix(".part"))
            state_file.with_suffix(".part").replace(state_file)
    return model, spent_s


def write(folder, model):
    """The checkpoint in Hugging Face layout, weights last."""
    dump = {"config.json": CONFIG,
            "generation_config.json": dict(bos_token_id=BOS, eos_token_id=EOS),
            "tokenizer_config.json": dict(
                tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>",
                unk_token="<unk>", clean_up_tokenization_spaces=False, model_max_length=64)}
    for name, content in dump.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer().save(str(folder / "tokenizer.json"))
    save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, folder / "model.safetensors",
              metadata={"format": "pt"})


def pass_at_k(correct, n, k):
    """1 − C(n − c, k) / C(n, k): the chance that k of n samples, c of them correct, hold a correct one."""
    return 1 - math.comb(n - correct, k) / math.comb(n, k)


def evaluate(model, problems=200, n=64, seed=0):
    """Vanilla sampling at T = 1 on held-out problems: {"pass@k": share, …, "distinct": mean solutions}."""
    prompts = countdown.test_prompts(random.Random("countdown test"), problems)
    ids = [[BOS] + [ID[c] for c in prompt] for prompt in prompts]
    answers = [[] for _ in prompts]
    for start in range(0, problems, 10):
        result = generate(model, ids[start:start + 10], SamplingConfig(n=n, max_new_tokens=40, seed=seed),
                          eos_ids={EOS}, first_prompt=start)
        for s in result.samples:
            answers[s.prompt].append("".join(VOCABULARY[i] for i in s.token_ids if i != EOS))
    solutions = [[countdown.canonical(p, a) for a in found]
                 for p, found in zip(prompts, answers, strict=True)]
    correct = [sum(s is not None for s in found) for found in solutions]
    figures = {f"pass@{k}": sum(pass_at_k(c, n, k) for c in correct) / problems
               for k in (1, 4, 16, 64) if k <= n}
    return figures | {"distinct": sum(len(set(found) - {None}) for found in solutions) / problems}


def main(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", help="folder to write the checkpoint to")
    what.add_argument("--evaluate", metavar="FOLDER", help="train nothing; pass@k of an existing checkpoint")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps (default 500)")
    parser.add_argument("--batch", type=int, default=256, help="problems per step (default 256)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the problems (default 0)")
    parser.add_argument("--no-evaluation", action="store_true", help="stop when the checkpoint is written")
    args = parser.parse_args(argv)
    folder = Path(args.out or args.evaluate)
    if args.out:
        folder.mkdir(parents=True, exist_ok=True)
        model, spent_s = train(args)
        write(folder, model)
        (folder / "train_state.pt").unlink(missing_ok=True)
        print(f"{args.steps} steps of {args.batch} problems in {spent_s:.0f} s → {folder}", file=sys.stderr)
    if not args.no_evaluation:
        for name, value in evaluate(load(folder)).items():
            print(f"{name:9} {value:.3f}")


if __name__ == "__main__":
    main()
