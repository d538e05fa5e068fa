"""Trains the bundled checkpoint, `checkpoints/countdown/`, from scratch with this project's `Model.forward`.

    python -m experiments.train_countdown --out checkpoints/countdown         # train, write, evaluate
    python -m experiments.train_countdown --evaluate checkpoints/countdown    # only the model card's figures
    python -m experiments.train_countdown --digits 5 --out five               # the harder task
    python -m experiments.train_countdown --width 256 --out wide              # four times the parameters

A 0.79M-parameter Qwen3-style model (query heads share kv heads, q/k norms), a character tokenizer, problems
made on the fly. Muon on the matrices, AdamW on embeddings, head and norms, both with a linear decay to zero;
fp32 on a CPU, bf16 autocast on a GPU. Seeded: step s draws its batch from (seed, s) alone, so a resumed run
sees the same problems. Progress goes to stderr; `train_state.pt` beside the output (written by this script
for this script, and removed at the end) lets a killed run go on where it was.
"""

import argparse
import json
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
from experiments.metrics import pass_at_k
from model import Model, ModelConfig, load

SPECIAL = ["<unk>", "<s>", "</s>"]
VOCABULARY = SPECIAL + list("0123456789+-*/=,>:")
ID = {token: i for i, token in enumerate(VOCABULARY)}
BOS, EOS = ID["<s>"], ID["</s>"]
FOLD_SHARE = 0.7
SAVE_EVERY = 200                                        # steps
SHAPES_THE_RUN = ("steps", "batch", "seed", "digits", "width")


def config_of(width=128):
    """config.json of a model `width` wide: MLP 3·width, heads of 32, two of them to a kv head, context 64."""
    if width < 64 or width % 64:
        raise ValueError(f"width is {width!r}; accepted: multiples of 64")
    return dict(
        architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=len(VOCABULARY), hidden_size=width,
        intermediate_size=3 * width, num_hidden_layers=4, num_attention_heads=width // 32,
        num_key_value_heads=width // 64, head_dim=32, max_position_embeddings=64, rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0), tie_word_embeddings=False,
        attention_bias=False, hidden_act="silu", use_sliding_window=False, bos_token_id=BOS,
        eos_token_id=EOS, dtype="float32")


def tokenizer():
    """One token per character, BOS in front; an unknown character becomes <unk>."""
    text = Tokenizer(models.WordLevel(ID, unk_token="<unk>"))
    text.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    text.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    text.decoder = decoders.Fuse()
    text.add_special_tokens(SPECIAL)
    return text


def prompt_ids(prompt):
    """BOS and one id per character."""
    return [BOS] + [ID[c] for c in prompt]


def padded(rows):
    """Lists of ids as one tensor (B, L), filled up with EOS."""
    longest = max(map(len, rows))
    return torch.tensor([row + [EOS] * (longest - len(row)) for row in rows])


def answer_text(ids):
    """The characters of an answer, without its EOS."""
    return "".join(VOCABULARY[i] for i in ids if i != EOS)


def batch(seed, step, size, digits=4):
    """The problems of one step: (size, L) ids padded with EOS; a pure function of (seed, step)."""
    source, (multisets, _) = random.Random(f"countdown {seed} {step}"), countdown.split(digits)
    lines = ["".join(countdown.problem(source, multisets, FOLD_SHARE)) for _ in range(size)]
    return padded([prompt_ids(line) + [EOS] for line in lines])


def answer_loss(model, token_BL):
    """Mean cross-entropy of the answer's tokens and its EOS, given the prompt (equally long in all rows)."""
    begin = token_BL[0].tolist().index(ID[":"]) + 1
    logits_BLV = model(token_BL[:, :-1])[:, begin - 1:]
    target_BL = token_BL[:, begin:].clone()
    target_BL[:, 1:][target_BL[:, :-1] == EOS] = -100           # the padding behind the first EOS
    return F.cross_entropy(logits_BLV.flatten(0, 1), target_BL.flatten(), ignore_index=-100)


def fresh_model(seed, device, width=128):
    """Seeded weights: N(0, 0.02²) for the embedding, PyTorch's own init for the rest."""
    torch.manual_seed(seed)
    model = Model(ModelConfig.from_dict(config_of(width)))
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


def restore(state_file, model, opts, run):
    """Takes a killed run's state from the file into model and opts: (steps done, seconds); (0, 0) if none.

    run: {flag: value} of all that shapes the run; SystemExit where the file's differs.
    """
    if not state_file.exists():
        return 0, 0.0
    state = torch.load(state_file, weights_only=True)
    if state["run"] != run:
        flags = " ".join(f"--{name} {value}" for name, value in state["run"].items())
        raise SystemExit(f"{state_file} belongs to a run with {flags}; remove it or give the same")
    model.load_state_dict(state["model"])
    for opt, saved in zip(opts, state["opts"], strict=True):
        opt.load_state_dict(saved)
    return state["step"], state["spent_s"]


def keep(state_file, model, opts, run, step, spent_s):
    """Writes what `restore` reads, whole or not at all."""
    part = state_file.with_suffix(".part")
    torch.save(dict(model=model.state_dict(), opts=[opt.state_dict() for opt in opts], run=run, step=step,
                    spent_s=spent_s), part)
    part.replace(state_file)


def train(args):
    """Runs `args.steps` steps, or goes on with the run in `train_state.pt`; returns (model, seconds)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, state_file = fresh_model(args.seed, device, args.width), Path(args.out) / "train_state.pt"
    opts, run = optimizers(model), {name: getattr(args, name) for name in SHAPES_THE_RUN}
    rates = [group["lr"] for opt in opts for group in opt.param_groups]
    start, spent_s = restore(state_file, model, opts, run)
    began = time.monotonic() - spent_s
    for step in range(start, args.steps):
        for group, rate in zip((g for opt in opts for g in opt.param_groups), rates, strict=True):
            group["lr"] = rate * min((step + 1) / 50, 1 - step / args.steps)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = answer_loss(model, batch(args.seed, step, args.batch, args.digits).to(device))
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
            keep(state_file, model, opts, run, step + 1, spent_s)
    return model, spent_s


def write(folder, model):
    """The checkpoint in Hugging Face layout, weights last."""
    dump = {"config.json": config_of(model.config.hidden_size),
            "generation_config.json": dict(bos_token_id=BOS, eos_token_id=EOS),
            "tokenizer_config.json": dict(
                tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>",
                unk_token="<unk>", clean_up_tokenization_spaces=False, model_max_length=64)}
    for name, content in dump.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer().save(str(folder / "tokenizer.json"))
    save_file({k: v.contiguous().cpu() for k, v in model.state_dict().items()}, folder / "model.safetensors",
              metadata={"format": "pt"})


def evaluate(model, problems=200, n=64, seed=0, digits=4):
    """Vanilla sampling at T = 1 on held-out problems: {"pass@k": share, …, "distinct": mean solutions}."""
    prompts = countdown.test_prompts(random.Random("countdown test"), problems, digits)
    ids = [prompt_ids(prompt) for prompt in prompts]
    answers = [[] for _ in prompts]
    for start in range(0, problems, 10):
        result = generate(model, ids[start:start + 10], SamplingConfig(n=n, max_new_tokens=40, seed=seed),
                          eos_ids={EOS}, first_prompt=start)
        for s in result.samples:
            answers[s.prompt].append(answer_text(s.token_ids))
    solutions = [[countdown.canonical(p, a) for a in found]
                 for p, found in zip(prompts, answers, strict=True)]
    correct = [sum(s is not None for s in found) for found in solutions]
    figures = {f"pass@{k}": sum(pass_at_k(n, c, k) for c in correct) / problems
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
    parser.add_argument("--digits", type=int, default=4, choices=(4, 5), help="of a problem (default 4)")
    parser.add_argument("--width", type=int, default=128, help="hidden size, a multiple of 64 (default 128)")
    parser.add_argument("--problems", type=int, default=200, help="held-out ones to evaluate (default 200)")
    parser.add_argument("--no-evaluation", action="store_true", help="stop when the checkpoint is written")
    args = parser.parse_args(argv)
    try:
        config_of(args.width)
    except ValueError as error:
        parser.error(str(error))
    folder = Path(args.out or args.evaluate)
    if args.out:
        folder.mkdir(parents=True, exist_ok=True)
        model, spent_s = train(args)
        write(folder, model)
        (folder / "train_state.pt").unlink(missing_ok=True)
        print(f"{args.steps} steps of {args.batch} problems in {spent_s:.0f} s → {folder}", file=sys.stderr)
    if not args.no_evaluation:
        for name, value in evaluate(load(folder), args.problems, digits=args.digits).items():
            print(f"{name:9} {value:.3f}")


if __name__ == "__main__":
    main()
