"""The tables as data: which settings, on which problems, how many samples. `experiments.run` fills them.

    stories                60 held-out openings × 16 samples of up to 160 tokens
    stories_development    the 60 openings on which settings are tuned
    countdown              200 held-out problems × 64 answers, from the bundled checkpoint
    countdown_development  80 other problems, on which the ridge was tuned
    countdown_peaky        the same problems, from a sharpened copy of the checkpoint
    countdown_five         problems of five digits, from a model trained for them
    countdown_wide         those of countdown again, from a model of twice the width

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


def rls(*betas, label="rls", **knobs):
    """The closed-form Distiller as chosen in `stories_development`."""
    return esamp(*betas, label=label, **CHOSEN | knobs)


def tried(*betas, label="rls", **knobs):
    """The closed form in `stories_development`, where the ridge was 1 unless said."""
    return rls(*betas, label=label, **dict(ridge=1.0) | knobs)


CHOSEN = dict(distiller="rls", warm=True)               # the rest is the Distiller's default, a ridge of 10
STORY_GRID = vanilla(0.7, 0.8, 0.85, 0.9, 1.0, 1.1)
COUNTDOWN_GRID = vanilla(0.6, 0.8, 1.0, 1.2, 1.4)
WAVES = (
    *esamp(0.25, label="esamp waves 4", waves=4),
    *rls(0.25, label="rls waves 4", waves=4),
)
ABLATIONS = (
    *esamp(0.25, label="esamp batch", scope="batch"),
    *rls(0.5, label="rls batch", scope="batch"),
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
    *rls(1.0, label="rls min-p 0.05", min_p=0.05),
    *rls(0.5, label="rls top-k 8", top_k=8),
    Setting("typical 0.9", "typical"),
    Setting("fire", first_temperature=30.0),
    *esamp(0.25, label="fire + esamp", first_temperature=30.0),
    Setting("edt", "edt", theta=0.3),
)
CORE = (
    *esamp(0.25, 0.5),
    *rls(0.25, 0.5, 0.75),
    *esamp(0.25, label="running mean", distiller="mean"),
    *esamp(0.5, label="esamp lr 4e-3", lr=4e-3),
)
STORY_SETTINGS = (*STORY_GRID, *CORE, *WAVES, *ABLATIONS, *OTHERS)
COUNTDOWN_SETTINGS = (*COUNTDOWN_GRID, *CORE, *WAVES, *ABLATIONS, *OTHERS,
                      Setting("contrastive", "contrastive"))
OTHER_MODELS = (*COUNTDOWN_GRID, *vanilla(1.6), *esamp(0.25), *rls(0.5))
DEVELOPMENT = (
    *STORY_GRID,
    *tried(0.5, 1.0),
    *tried(0.5, label="rls ridge 10", ridge=10.0),
    *tried(1.0, label="rls min-p 0.05", min_p=0.05),
    *tried(1.0, label="rls min-p 0.05 ridge 10", ridge=10.0, min_p=0.05),
    Setting("min-p 0.05", min_p=0.05),
    *tried(0.5, label="rls cold", warm=False),
    *tried(0.5, label="rls ridge 0.1", ridge=0.1),
    *tried(0.5, label="rls 96 features", width=96),
    *tried(0.5, label="rls 768 features", width=768),
    *tried(0.5, label="rls no linear", linear=0),
    *tried(0.5, label="rls linear alone", width=1),
    *tried(0.5, label="rls forget 0.98", forget=0.98),
    *tried(0.5, label="rls raw h1, cold", distiller="rls_raw", warm=False),
    *tried(0.5, label="rls ramp 40", ramp=40),
)
COUNTDOWN_DEVELOPMENT = (
    *vanilla(1.0),
    *(rls(0.5, label=f"rls ridge {ridge:g}", ridge=ridge)[0] for ridge in (1.0, 3.0, 10.0, 30.0, 100.0)),
    *rls(0.5, label="rls cold ridge 10", ridge=10.0, warm=False),
)


def stories(about, settings, **work):
    """A table of stories: 16 samples of up to 160 tokens."""
    return Table(about, "stories", settings, n=16, max_new_tokens=160, chunk=20,
                 model=str(STORIES) if STORIES.is_dir() else "",
                 recipe="karpathy's tinyllamas stories260K in Hugging Face layout", **work)


def countdown(about, settings=OTHER_MODELS, prompts=200, **work):
    """A table of Countdown."""
    return Table(about, "countdown", settings, prompts=prompts, **work)


TABLES = {
    "stories": stories("Diversity of stories at equal perplexity", STORY_SETTINGS, prompts=60),
    "stories_development": stories("The openings on which the closed form was tuned", DEVELOPMENT, prompts=60,
                                   split="development", seeds=(41,)),
    "countdown": countdown("Countdown, bundled checkpoint", COUNTDOWN_SETTINGS, model=str(BUNDLED)),
    "countdown_development": countdown("Problems on which the ridge was tuned", COUNTDOWN_DEVELOPMENT, 80,
                                       split="development", seeds=(41,), model=str(BUNDLED)),
    "countdown_peaky": countdown(
        "Countdown, sharpened checkpoint",
        recipe="python -m experiments.sharpen_countdown --model checkpoints/countdown --out peaky"),
    "countdown_five": countdown(
        "Countdown with five digits", digits=5, max_new_tokens=50,
        recipe="python -m experiments.train_countdown --digits 5 --steps 600 --out five"),
    "countdown_wide": countdown(
        "Countdown, twice the width",
        recipe="python -m experiments.train_countdown --width 256 --steps 350 --batch 128 --out wide"),
}
