"""The tables as data: which settings, on which problems, how many samples. `experiments.run` fills them.

    stories              100 held-out openings × 16 samples of up to 160 tokens
    stories_development  the 60 openings on which settings are tuned
    countdown            240 held-out problems × 64 answers, from the bundled checkpoint
    countdown_peaky      the same problems, from a sharpened copy of it
    countdown_five       problems of five digits, from a model trained for them
    countdown_wide       the first problems again, from a model of twice the width

A setting's name is its label in the report and its key in the results; every knob is in `methods.Setting`.
The grid of temperatures comes first: a method is compared with vanilla's whole curve, never with T = 1 alone.
"""

from dataclasses import dataclass

from decode import BUNDLED
from experiments.methods import Setting

STORIES = BUNDLED.parent.parent.parent / "shared" / "data" / "stories260K"
AMATEUR = "python -m experiments.train_countdown --width 64 --steps 150 --out amateur"


@dataclass(frozen=True)
class Table:
    """What is drawn, and from what; `chunk` prompts are decoded together, which scope batch shares."""

    about: str
    task: str                                   # "stories" or "countdown"
    settings: tuple
    split: str = "held_out"                     # or "development"
    prompts: int = 240
    n: int = 64
    max_new_tokens: int = 40
    seeds: tuple = (41, 42, 43)                 # the paper's
    model: str = ""                             # a folder; "" where `recipe` has to make one first
    recipe: str = ""
    chunk: int = 40
    digits: int = 4                             # of a Countdown problem


def vanilla(*temperatures):
    """The curve that everything is compared with."""
    return [Setting(f"vanilla T {t:g}", temperature=t) for t in temperatures]


def esamp(*betas, label="esamp", **knobs):
    """ESamp at several β, all else equal."""
    return [Setting(f"{label} β {beta:g}", "esamp", beta=beta, **knobs) for beta in betas]


ESAMP = (
    *esamp(0.1, 0.25, 0.5),
    *esamp(0.25, 0.5, 0.75, label="rls", distiller="rls"),
)
ABLATIONS = (
    *esamp(0.25, label="esamp batch", scope="batch"),
    *esamp(0.5, label="rls batch", distiller="rls", scope="batch"),
    *esamp(0.25, label="esamp waves 4", waves=4),
    *esamp(0.5, label="rls waves 4", distiller="rls", waves=4),
    *esamp(0.25, label="running mean", distiller="mean"),
    *esamp(0.25, label="four blocks", distiller="swiglu4"),
    *esamp(0.25, label="mlp", distiller="mlp"),
    Setting("gaussian β 0.25", "gaussian"),
    Setting("subtract β 0.25", "subtract"),
    Setting("vocabulary β 0.25", "vocabulary"),
)
OTHERS = (
    Setting("top-k 8", top_k=8),
    Setting("top-p 0.9", top_p=0.9),
    Setting("min-p 0.05", min_p=0.05),
    *esamp(0.25, label="esamp min-p 0.05", min_p=0.05),
    *esamp(0.5, label="rls min-p 0.05", distiller="rls", min_p=0.05),
    Setting("typical 0.9", "typical"),
    Setting("fire", first_temperature=30.0),
    *esamp(0.25, label="fire + esamp", first_temperature=30.0),
    Setting("edt", "edt"),
)
STORY_SETTINGS = (*vanilla(0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0), *ESAMP, *ABLATIONS, *OTHERS)
COUNTDOWN_SETTINGS = (*vanilla(0.6, 0.8, 1.0, 1.2, 1.4), *ESAMP, *ABLATIONS, *OTHERS,
                      Setting("contrastive", "contrastive"))


def stories(about, **work):
    """A table of stories: 16 samples of up to 160 tokens."""
    return Table(about, "stories", STORY_SETTINGS, n=16, max_new_tokens=160, chunk=20,
                 model=str(STORIES) if STORIES.is_dir() else "",
                 recipe="karpathy's tinyllamas stories260K in Hugging Face layout", **work)


def countdown(about, **work):
    """A table of Countdown."""
    return Table(about, "countdown", COUNTDOWN_SETTINGS, **work)


TABLES = {
    "stories": stories("Diversity of stories at equal perplexity", prompts=100),
    "stories_development": stories("The same on the openings that settings were tuned on", prompts=60,
                                   split="development", seeds=(41,)),
    "countdown": countdown("Countdown, bundled checkpoint", model=str(BUNDLED)),
    "countdown_peaky": countdown(
        "Countdown, sharpened checkpoint",
        recipe="python -m experiments.sharpen_countdown --model checkpoints/countdown --out peaky"),
    "countdown_five": countdown(
        "Countdown with five digits", digits=5, max_new_tokens=50,
        recipe="python -m experiments.train_countdown --digits 5 --steps 600 --out five"),
    "countdown_wide": countdown(
        "Countdown, four times the parameters",
        recipe="python -m experiments.train_countdown --width 256 --steps 350 --batch 128 --out wide"),
}
