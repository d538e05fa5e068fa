"""The command line: what a run prints and writes, and that bad input gets one line and exit code 2."""

import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch

import pytest
import torch
from conftest import ROOT, SHARED, write_checkpoint
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE, Unigram

import decode
import model as model_module
from decode import ESampConfig, SamplingConfig, Text, generate, main
from distiller import Distiller
from model import ModelConfig, load
from train_async import AsyncDistiller

CHAT = ("{% for m in messages %}{{ m['role'][0] | replace('u', '1') | replace('s', '2') }}{{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}={% endif %}")


@pytest.fixture
def folder(tmp_path):
    """A tiny checkpoint of its own for every test."""
    return write_checkpoint(tmp_path / "model")


def run(capsys, *argv):
    """(exit code, stdout, stderr) of `main` in this process."""
    code = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def lines(path):
    """The entries of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ------------------------------------------------------------------------------
# bad input
# ------------------------------------------------------------------------------

def edit_json(name, **changes):
    """Changes keys of a JSON file; None removes one."""
    def change(folder):
        path = folder / name
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return change


def edit_text(name, old, new):
    """Replaces text in a file, where it must be."""
    def change(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))
    return change


def edit_weights(change):
    """Rewrites model.safetensors after `change(tensors)`."""
    def edit(folder):
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    return edit


def write(name, content):
    """Replaces a file; None deletes it."""
    def edit(folder):
        path = folder / name
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return edit


def sharded(folder, drop_file):
    """Splits the weights into two shards and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n] for n in names if where[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    if drop_file:
        (folder / "model-00002-of-00002.safetensors").unlink()


def extend_index(folder):
    """One more name in the index, for a tensor that no file has."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["nope"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))


def pickled(folder):
    """Only a pickle left."""
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def put(name, value):
    """Overwrites one tensor, or removes it (None)."""
    def change(tensors):
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    return edit_weights(change)


def poison(name, value):
    """One bad number inside a tensor."""
    def change(tensors):
        tensors[name][0, 1] = value
    return edit_weights(change)


K = "model.layers.1.self_attn.k_proj.weight"
BAD_MODELS = {
    "folder is empty": (lambda f: [p.unlink() for p in f.iterdir()], "no config.json"),
    "config missing": (write("config.json", None), "no config.json"),
    "config not JSON": (write("config.json", "{"), "config.json is not valid JSON"),
    "config a list": (write("config.json", "[]"), "holds a list"),
    "config not UTF-8": (write("config.json", b"\xff{}"), "config.json is not valid JSON"),
    "wrong type": (edit_json("config.json", hidden_size="8"), "'8'"),
    "zero layers": (edit_json("config.json", num_hidden_layers=0), "num_hidden_layers is 0"),
    "absurd size": (edit_json("config.json", vocab_size=10 ** 30), "vocab_size is 1000"),
    "bool for a number": (edit_json("config.json", intermediate_size=True), "intermediate_size is True"),
    "NaN epsilon": (edit_json("config.json", rms_norm_eps=math.nan), "rms_norm_eps is nan"),
    "model_type unknown": (edit_json("config.json", model_type="mamba"), "'mamba'"),
    "model_type missing": (edit_json("config.json", model_type=None), "model_type None"),
    "RoPE unknown": (edit_json("config.json", rope_scaling={"rope_type": "yarn", "factor": 4.0}), "'yarn'"),
    "RoPE incomplete": (edit_json("config.json", rope_scaling={"rope_type": "llama3", "factor": 4.0}),
                        "low_freq_factor"),
    "RoPE not an object": (edit_json("config.json", rope_parameters=3), "RoPE parameters are 3"),
    "partial rotary": (edit_json("config.json", partial_rotary_factor=0.5), "partial_rotary_factor"),
    "quantised": (edit_json("config.json", quantization_config={"quant_method": "awq"}),
                  "quantization_config"),
    "sliding window": (edit_json("config.json", use_sliding_window=True), "sliding window"),
    "sliding layers": (edit_json("config.json", layer_types=["sliding_attention", "full_attention"]),
                       "sliding window"),
    "activation": (edit_json("config.json", hidden_act="gelu"), "'gelu'"),
    "dtype": (edit_json("config.json", torch_dtype="int8"), "'int8'"),
    "heads do not divide": (edit_json("config.json", num_attention_heads=3, head_dim=4,
                                      num_key_value_heads=2), "num_attention_heads 3 is not a multiple"),
    "width does not divide": (edit_json("config.json", num_attention_heads=3),
                              "hidden_size 8 is not a multiple"),
    "weights missing": (write("model.safetensors", None), "no model.safetensors"),
    "weights truncated": (lambda f: os.truncate(f / "model.safetensors", 3000),
                          "not a readable safetensors file"),
    "weights empty": (write("model.safetensors", ""), "not a readable safetensors file"),
    "header too long": (write("model.safetensors", (2 ** 62).to_bytes(8, "little") + b"{}"),
                        "not a readable safetensors"),
    "tensor missing": (put(K, None), K + " is missing"),
    "tensor unexpected": (put("model.layers.9.x", torch.ones(2)), "unexpected tensor model.layers.9.x"),
    "tensor misshapen": (put(K, torch.ones(4, 9)), "(4, 9)"),
    "tensor of integers": (put(K, torch.ones(4, 8, dtype=torch.int8)), "I8"),
    "NaN inside": (poison(K, math.nan), K + " holds NaN"),
    "infinity inside": (poison(K, -math.inf), K + " holds NaN or infinity"),
    "shard absent": (lambda f: sharded(f, True), "model-00002-of-00002.safetensors, which is not there"),
    "index broken": (lambda f: (sharded(f, False), write("model.safetensors.index.json", "{}")(f)),
                     "weight_map"),
    "index names too much": (lambda f: (sharded(f, False), extend_index(f)),
                             "tensor nope is missing although the index names it"),
    "index leaves the folder": (lambda f: (sharded(f, False), write(
        "model.safetensors.index.json", json.dumps({"weight_map": {K: "../x.safetensors"}}))(f)),
        "'../x.safetensors'"),
    "a pickle": (pickled, "pytorch_model.bin, which is never loaded"),
    "tokenizer missing": (write("tokenizer.json", None), "no tokenizer.json"),
    "tokenizer broken": (write("tokenizer.json", "{}"), "not a readable tokenizer"),
    "tokenizer too large": (edit_json("config.json", vocab_size=20),
                            "token id 20, but the model embeds only 20"),
    "tokenizer_config broken": (write("tokenizer_config.json", "{"),
                                "tokenizer_config.json is not valid JSON"),
    "EOS not an id": (edit_json("config.json", eos_token_id="</s>"), "eos_token_id is '</s>'"),
    "template does not compile": (edit_json("tokenizer_config.json", chat_template="{% for %}"),
                                  "template does not compile"),
    "template raises": (edit_json("tokenizer_config.json",
                                  chat_template="{{ raise_exception('no users here') }}"), "no users here"),
    "template escapes": (edit_json("tokenizer_config.json", chat_template=
                         "{{ ''.__class__.__mro__[1].__subclasses__() }}"), "SecurityError"),
    "template mutates": (edit_json("tokenizer_config.json", chat_template="{{ messages.append(1) }}"),
                         "SecurityError"),
    "template divides by zero": (edit_json("tokenizer_config.json", chat_template="{{ 1 / 0 }}"),
                                 "ZeroDivisionError"),
    "template nested deep": (edit_json("tokenizer_config.json", chat_template="{% for i in [1] %}" * 30
                                       + "{% endfor %}" * 30), "template does not compile"),
    "template writes a surrogate": (edit_json("tokenizer_config.json", chat_template="\ud800"),
                                    "can not encode"),
    "template has no default": (edit_json("tokenizer_config.json", bos_token=7,
                                          chat_template=[{"name": [], "template": "x"}]), None),
    "tokenizer without its unk": (edit_text("tokenizer.json", '"unk_token": "<unk>"', '"unk_token": "<no>"'),
                                  "the tokenizer can not encode"),
    "tokenizer adds an unknown id": (edit_text("tokenizer.json", '"ids": [\n          1\n        ]',
                                               '"ids": [99]'), "makes the id 99, but the model embeds only"),
    "template never ends": (edit_json("tokenizer_config.json",
                                      chat_template="{% for i in range(10 ** 9) %}{% endfor %}"),
                            "OverflowError"),
    "template a number": (edit_json("tokenizer_config.json", chat_template=5), "template is a int"),
    "template file not UTF-8": (write("chat_template.jinja", b"\xff"), "chat_template.jinja"),
    "template makes nothing": (edit_json("tokenizer_config.json", chat_template="{# #}"),
                               "encodes to no token"),
}
BAD_FLAGS = {
    "--n 10000000000000000000": "n is 1000", "--train-every 99999999999": "train_every is 9",
    "--distiller-width 100000000000000000": "width is 1000",
    "--beta 1e38": "reweighted logits not finite at step 1",
    "--n 0": "n is 0", "--n -1": "n is -1", "--n x": "invalid int value: 'x'", "--n 1.5": "'1.5'",
    "--max-new-tokens 0": "max_new_tokens is 0", "--top-k 0": "top_k is 0", "--top-p 0": "top_p is 0.0",
    "--top-p 1.01": "top_p is 1.01", "--top-p nan": "top_p is nan", "--min-p -0.1": "min_p is -0.1",
    "--min-p 2": "min_p is 2.0", "--temperature -1": "temperature is -1.0",
    "--temperature nan": "temperature is nan", "--temperature inf": "is inf", "--beta -0.5": "beta is -0.5",
    "--beta nan": "beta is nan", "--beta inf": "beta is inf", "--seed -1": "seed is -1",
    "--seed 9223372036854775808": "seed is 9223372036854775808", "--distiller-width 0": "width is 0",
    "--distiller-lr 0": "lr is 0.0", "--distiller-lr nan": "lr is nan", "--distiller-scope row": "'row'",
    "--train-every 0": "train_every is 0", "--batch-prompts 0": "batch_prompts is 0", "--device tpu": "'tpu'",
    "--device cuda:99": "'cuda:99'", "--dtype int8": "'int8'", "--nonsense": "--nonsense", "--out .": "'.'",
    "--out /nowhere/x.jsonl": "/nowhere/x.jsonl", "--system hi": "--system",
    "--prompts /nowhere": "--prompts '/nowhere' can not be read",
}


def assert_one_line(result, needle, out, late=False):
    """Exit code 2, nothing on stdout, one line of error that holds `needle`, no output file.

    late: found when weights are read or used, behind the line about memory.
    """
    code, stdout, stderr = result
    errors = [line for line in stderr.splitlines() if not (late and line.startswith("memory:"))]
    assert code == 2 and stdout == "" and len(errors) == 1, (code, stdout, stderr)
    assert errors[0].startswith("decode.py: error: ") and needle in errors[0], errors[0]
    assert not out.exists()


@pytest.mark.parametrize("name", BAD_MODELS)
def test_bad_models(folder, tmp_path, capsys, name):
    spoil, needle = BAD_MODELS[name]
    spoil(folder)
    out = tmp_path / "out.jsonl"
    prompt = "1x1" if "its unk" in name else "1+1"
    result = run(capsys, "--model", folder, "--prompt", prompt, "--esamp", "--out", out)
    if needle is None:
        assert result[0] == 0                            # odd, but nothing that is used
    else:
        assert_one_line(result, needle, out, late=name in ("NaN inside", "infinity inside"))


@pytest.mark.parametrize("flags", BAD_FLAGS)
def test_bad_flags(folder, tmp_path, capsys, flags):
    out, flag = tmp_path / "out.jsonl", flags.split()
    argv = ["--model", folder, "--esamp"] + ([] if flag[0] == "--prompts" else ["--prompt", "1"]) + \
        ([] if flag[0] == "--out" else ["--out", out])
    assert_one_line(run(capsys, *argv, *flag), BAD_FLAGS[flags], out, late=flags == "--beta 1e38")


PROMPT_FILES = {
    "empty": (b"\n \n", "holds no prompt"),
    "not UTF-8": (b"1+1\n2\xff2\n", "line 2: not UTF-8"),
    "broken line": (b'{"prompt": "1"}\n\n{"prompt": "1"\n', "line 3: not valid JSON"),
    "broken first line": (b'{"prompt": "1"\n', "line 1: not valid JSON"),
    "not an object": (b'{"prompt": "1"}\n[1]\n', "line 2: expected an object"),
    "neither": (b'{"id": 3}\n', "line 1: expected an object with either"),
    "both": (b'{"prompt": "1", "messages": []}\n', "line 1: expected an object with either"),
    "prompt a number": (b'{"prompt": 5}\n', "'prompt' is 5"),
    "messages empty": (b'{"messages": []}\n', "'messages'"),
    "message without content": (b'{"messages": [{"role": "user"}]}\n', "'messages'"),
    "id a list": (b'{"prompt": "1", "id": []}\n', "'id' is []"),
    "id true": (b'{"prompt": "1", "id": true}\n', "'id' is True"),
    "id twice": (b'{"prompt": "1"}\n{"prompt": "2", "id": 0}\n', "line 2: the id 0 is that of"),
    "id a surrogate": (b'{"prompt": "1", "id": "\\ud800"}\n', "'id' is"),
    "endless number": (b'{"prompt": "1", "id": ' + b"9" * 5000 + b"}\n", "line 1: not valid JSON"),
    "messages without a template": (b'{"messages": [{"role": "user", "content": "1"}]}\n',
                                    "need a chat template"),
    "lone surrogate": (b'{"prompt": "\\ud800"}\n', "lone surrogate"),
    "unknown characters": (b'{"prompt": "1"}\n{"prompt": "7 x"}\n',
                           "line 2: the tokenizer does not know the characters ' x'"),
    "too long": (b"1" * 39 + b"\n", "line 1: has 40 tokens; the context holds 40"),
}


@pytest.mark.parametrize("name", PROMPT_FILES)
def test_bad_prompt_files(folder, tmp_path, capsys, name):
    content, needle = PROMPT_FILES[name]
    (tmp_path / "prompts").write_bytes(content)
    out = tmp_path / "out.jsonl"
    result = run(capsys, "--model", folder, "--prompts", tmp_path / "prompts", "--out", out)
    assert_one_line(result, needle, out)


def test_other_bad_calls(folder, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out.jsonl"
    for argv, needle in [
        (["--model", tmp_path / "nowhere", "--prompt", "1"], "does not exist"),
        (["--model", folder / "config.json", "--prompt", "1"], "is a file, not a folder"),
        (["--model", folder], "no prompt; give --prompt"),
        (["--model", folder, "--prompt", "1", "--prompts", "x"], "not allowed with"),
        (["--prompt", "7 x"], "prompts.txt"),
        (["--model", folder, "--prompt", ""], None),
    ]:
        result = run(capsys, *argv, "--out", out)
        if needle:
            assert_one_line(result, needle, out)
        else:
            assert result[0] == 0                        # empty is fine: the tokenizer adds a BOS
            out.unlink()
    plain = json.loads((folder / "tokenizer.json").read_text()) | {"post_processor": None}
    (folder / "tokenizer.json").write_text(json.dumps(plain))
    assert_one_line(run(capsys, "--model", folder, "--prompt", "", "--out", out), "encodes to no token", out)
    for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                  RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")):
        def fail(*_args, error=error, **_kw):
            raise error
        monkeypatch.setattr(decode, "generate", fail)
        result = run(capsys, "--model", folder, "--prompt", "1", "--out", out)
        assert_one_line(result, "out of memory; lower --n", out, late=True)


def test_files_that_the_run_reads_are_not_replaced(folder, tmp_path, capsys):
    (tmp_path / "p").write_text("1+1\n")
    for out in (tmp_path / "p", folder / "model.safetensors"):
        before = out.read_bytes()
        code, _, err = run(capsys, "--model", folder, "--prompts", tmp_path / "p", "--out", out)
        assert code == 2 and "would replace a file that this run reads" in err and out.read_bytes() == before
    result = run(capsys, "--model", folder, "--prompts", tmp_path / "p", "--out", folder / "new.jsonl")
    assert result[0] == 0 and (folder / "new.jsonl").exists()


def test_closed_streams_do_not_matter(folder, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert main(["--model", str(folder), "--prompt", "1", "--n", "1"]) == 0
    assert capfd.readouterr().out.count("── ") == 1


def test_an_endless_prompt_is_not_repeated_in_its_error(folder, capsys):
    code, _, err = run(capsys, "--model", folder, "--prompt", "1" * 10000)
    assert code == 2 and len(err) < 300 and "has 10001 tokens" in err


def test_really_out_of_memory(folder, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    flags = ["--prompt", "1", "--esamp", "--distiller-width", 2 * 10 ** 9]
    result = run(capsys, "--model", folder, *flags, "--out", out)
    assert_one_line(result, "out of memory; lower --n", out, late=True)


def test_a_non_finite_logit_stops_the_run_and_writes_nothing_of_its_prompt(folder, tmp_path, capsys):
    def change(tensors):
        tensors["lm_head.weight"] *= 3e38
    edit_weights(change)(folder)
    out = tmp_path / "out.jsonl"
    result = run(capsys, "--model", folder, "--prompt", "1", "--out", out)
    assert_one_line(result, "step 0, prompt 0, sample 0", out, late=True)


def test_config_fuzz(folder, tmp_path, capsys):
    """Any value under any key: a run or one line, never a traceback."""
    prompts = ["--prompt", "1", "--n", "2", "--max-new-tokens", "2", "--esamp"]
    for name in ("config.json", "tokenizer_config.json"):
        plain = json.loads((folder / name).read_text())
        keys = [*plain, "rope_scaling", "rope_parameters", "rope_theta", "head_dim", "layer_types", "dtype",
                "chat_template", "attention_bias", "quantization_config", "sliding_window",
                "partial_rotary_factor"]
        for key in keys:
            for value in (None, "x", -1, 0, 1.5, 7, [], ["x"], {}, {"rope_type": "linear"},
                          {"content": 3}, True, 10 ** 30, math.nan):
                (folder / name).write_text(json.dumps(plain | {key: value}))
                code, _, err = run(capsys, "--model", folder, *prompts)
                assert code in (0, 2) and err.count("decode.py: error") == (code == 2), (key, value)
        (folder / name).write_text(json.dumps(plain))


# ------------------------------------------------------------------------------
# weights that are read
# ------------------------------------------------------------------------------

def test_one_file_or_shards_any_float_dtype_redundant_tensors(folder):
    plain = load(folder)
    tensors = load_file(folder / "model.safetensors")
    table = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    save_file(tensors | table, folder / "model.safetensors")
    sharded(folder, False)
    for a, b in zip(plain.state_dict().items(), load(folder).state_dict().items(), strict=True):
        assert a[0] == b[0] and torch.equal(a[1], b[1])
    half = load(folder, dtype=torch.bfloat16)
    assert half.head_weight.dtype == torch.bfloat16
    assert not half.head_weight.requires_grad and not half.training
    assert torch.equal(half.lm_head.weight, tensors["lm_head.weight"].bfloat16())


def test_the_checkpoints_dtype_is_the_default_and_a_tied_head_is_the_embedding(tmp_path):
    folder = write_checkpoint(tmp_path / "m", tie_word_embeddings=True, torch_dtype="float16")
    tensors = {k: v.bfloat16() for k, v in load_file(folder / "model.safetensors").items()}
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | head, folder / "model.safetensors")
    model = load(folder)
    assert model.head_weight is model.model.embed_tokens.weight and model.head_weight.dtype == torch.float16
    edit_json("config.json", torch_dtype=None)(folder)
    assert load(folder).head_weight.dtype == torch.bfloat16


def test_a_hub_name_is_looked_up_in_the_cache_and_refused_offline(folder, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants
    snapshot = tmp_path / "hub" / "models--Org--Name" / "snapshots" / "abc"
    (snapshot.parent.parent / "refs").mkdir(parents=True)
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    shutil.copytree(folder, snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_module.find("Org/Name") == snapshot
    assert model_module.find(str(folder)) == folder
    code, _, err = run(capsys, "--model", "Org/Other", "--prompt", "1")
    assert code == 2 and len(err.splitlines()) == 1 and "'Org/Other' is no folder here" in err
    wanted = []

    def download(name, allow_patterns=(), local_files_only=False):
        wanted.extend(allow_patterns)
        return str(snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    (snapshot / "tokenizer.json").unlink()               # an interrupted download is taken up again
    assert model_module.find("Org/Name") == snapshot
    assert {"config.json", "tokenizer.json", "model*.safetensors"} <= set(wanted)
    for name in ("pytorch_model.bin", "model.bin", "x.py", "x.pt"):
        assert not any(fnmatch(name, pattern) for pattern in wanted)


# ------------------------------------------------------------------------------
# good runs
# ------------------------------------------------------------------------------

def test_jsonl_is_what_generate_returned(folder, tmp_path, capsys):
    given, out = tmp_path / "p.jsonl", tmp_path / "out.jsonl"
    given.write_text('{"prompt": "1+1", "id": "a"}\n\n{"prompt": "77"}\n{"prompt": "9", "id": 7}\n')
    flags = ["--n", 3, "--max-new-tokens", 9, "--beta", 2, "--seed", 4, "--distiller-width", 16,
             "--distiller-lr", 0.01]
    code, screen, err = run(capsys, "--model", folder, "--esamp", "--prompts", given, "--out", out, *flags)
    *entries, last = lines(out)
    assert code == 0 and [e["prompt_id"] for e in entries] == ["a"] * 3 + [1] * 3 + [7] * 3
    assert [e["sample"] for e in entries] == [0, 1, 2] * 3
    assert [e["prompt"] for e in entries[::3]] == ["1+1", "77", "9"]
    model, text = load(folder), Text(folder, ModelConfig.read(folder))
    esamp = ESampConfig(beta=2.0, width=16, lr=0.01, seed=4)
    for i, prompt in enumerate(["1+1", "77", "9"]):
        sampling = SamplingConfig(n=3, max_new_tokens=9, seed=4)
        result = generate(model, [text.encode_raw(prompt)], sampling, esamp, eos_ids={2}, first_prompt=i)
        for s, e in zip(result.samples, entries[3 * i:], strict=False):
            assert (s.token_ids, s.logprob, s.novelty, s.finish_reason) == tuple(
                e[k] for k in ("token_ids", "logprob", "novelty", "finish_reason"))
            assert e["text"] == text.decode(s.token_ids) and e["seed"] == 4 and "</s>" not in e["text"]
            assert e["text"] in screen
    summary = last["summary"]
    assert summary["tokens"] == sum(len(e["token_ids"]) for e in entries) and summary["updates"] > 0
    assert summary["settings"]["esamp"]["beta"] == 2 and summary["settings"]["esamp"]["width"] == 16
    assert summary["settings"]["sampling"]["seed"] == 4
    assert "moved" in screen and f"{summary['updates']} updates" in screen
    assert "memory: about weights" in err and "WARNING" not in err


def test_same_seed_same_file_and_beta_zero_is_no_esamp(folder, tmp_path, capsys):
    def tokens(*flags):
        assert run(capsys, "--model", folder, "--prompt", "1", "--prompt", "22", "--n", 4, "--quiet",
                   "--out", tmp_path / "o", *flags)[0] == 0
        samples = sorted(lines(tmp_path / "o")[:-1], key=lambda e: (e["prompt_id"], e["sample"]))
        return [(e["token_ids"], e["logprob"]) for e in samples]         # prompts end in any order
    assert tokens("--esamp") == tokens("--esamp") != tokens("--esamp", "--seed", 1)
    assert tokens("--esamp", "--beta", 0) == tokens("--no-esamp") == tokens()
    assert tokens("--esamp", "--beta", 3) != tokens()
    one_by_one = tokens("--esamp", "--beta", 3)
    together = tokens("--esamp", "--beta", 3, "--batch-prompts", 2)
    assert [t for t, _ in one_by_one] == [t for t, _ in together]        # logprobs differ in their last bits
    assert tokens("--esamp", "--beta", 3, "--distiller-scope", "batch", "--batch-prompts", 2) != together


def test_lines_are_on_disk_as_soon_as_they_are_written(tmp_path):
    out = decode.Out(str(tmp_path / "o"))
    assert not (tmp_path / "o").exists()
    for count in (1, 2):
        out.write([{"n": count}])
        assert [e["n"] for e in lines(tmp_path / "o")] == list(range(1, count + 1))


def test_plain_lines_stdin_and_templates(tmp_path, capsys, monkeypatch):
    folder = write_checkpoint(tmp_path / "m", template=CHAT)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n12\r\n\n3+4\n")))
    out, flags = tmp_path / "o", ["--n", 1, "--max-new-tokens", 3, "--quiet", "--out", tmp_path / "o"]
    assert run(capsys, "--model", folder, "--prompts", "-", *flags)[0] == 0
    assert [(e["prompt_id"], e["prompt"]) for e in lines(out)[:-1]] == [(0, "12"), (1, "3+4")]
    text = Text(folder, ModelConfig.read(folder))
    user = [{"role": "user", "content": "12"}]
    assert text.encode_chat(user) == ("112=", text.tokenizer.encode("112=", add_special_tokens=False).ids)
    assert text.encode_chat([{"role": "system", "content": "0"}, *user])[0] == "20112="
    messages = tmp_path / "messages"
    messages.write_text(json.dumps({"messages": user}) + "\n")
    seen = []
    plain = decode.generate

    def recording(model, prompts, *a, **k):
        seen.extend(prompts)
        return plain(model, prompts, *a, **k)
    monkeypatch.setattr(decode, "generate", recording)
    for argv in (["--prompts", messages], ["--prompt", "12"], ["--prompt", "12", "--system", "0"],
                 ["--prompt", "12", "--raw"]):
        assert run(capsys, "--model", folder, *argv, *flags)[0] == 0
    expected = [text.tokenizer.encode(t, add_special_tokens=False).ids for t in ("112=", "112=", "20112=")]
    assert [text.tokenizer.decode(ids, skip_special_tokens=False) for ids in seen] == [
        text.tokenizer.decode(ids, skip_special_tokens=False) for ids in expected] + ["<s>12"]
    assert text.encode_raw("<s>12") == text.encode_raw("12")                 # one BOS, never two
    result = run(capsys, "--model", folder, "--prompts", messages, "--raw")
    assert_one_line(result, "--raw turns it off", tmp_path / "none")


def test_templates_have_what_real_ones_use(tmp_path):
    template = ("{%- for m in messages -%}{%- if loop.index > 9 -%}{% break %}{%- endif -%}"
                "{{ m | tojson }}{{ bos_token }}{%- endfor -%}"
                "{{ strftime_now('%Y') }}{% if add_generation_prompt %}>{% endif %}")
    folder = write_checkpoint(tmp_path / "m")
    (folder / "chat_template.jinja").write_text(template)
    text = Text(folder, ModelConfig.read(folder)).encode_chat([{"role": "user", "content": "<é>"}])[0]
    assert text == '{"role": "user", "content": "<é>"}<s>' + time.strftime("%Y") + ">"


def test_summary_warns_loudly_of_a_run_that_did_nothing(folder, tmp_path, capsys):
    _, _, err = run(capsys, "--model", folder, "--prompt", "1", "--esamp", "--max-new-tokens", 1)
    assert "WARNING: the Distiller made no update" in err and err.count("WARNING") == 1
    _, _, err = run(capsys, "--model", folder, "--prompt", "1", "--esamp", "--beta", "1e-9", "--quiet")
    assert err.startswith("WARNING: no token was moved") and len(err.splitlines()) == 1
    _, screen, err = run(capsys, "--model", folder, "--prompt", "1", "--esamp", "--beta", "0")
    assert "WARNING" not in err and "moved 0 of" in screen


def test_notes_say_what_a_flag_does_not_do(folder, capsys):
    _, _, err = run(capsys, "--model", folder, "--prompt", "1", "--n", 2, "--beta", 0.5, "--train-every", 2)
    assert "note: --train-every, --beta does nothing without --esamp" in err or "--beta, --train-every" in err
    _, _, err = run(capsys, "--model", folder, "--prompt", "1", "--n", 2, "--esamp", "--temperature", 0)
    assert "--n 1 is enough" in err and "without --esamp" not in err
    _, screen, err = run(capsys, "--model", folder, "--prompt", "1", "--n", 2, "--esamp", "--distiller",
                         "rls", "--distiller-lr", 0.1)
    assert "--distiller-lr does nothing with --distiller rls" in err and "updates; loss" in screen


def test_greedy_summary_has_no_infinite_number(folder, tmp_path, capsys):
    out = tmp_path / "o"
    flags = ["--esamp", "--temperature", 0, "--beta", 5, "--out", out]
    assert run(capsys, "--model", folder, "--prompt", "1", *flags)[0] == 0
    assert lines(out)[-1]["summary"]["kl_nats"] in (None, 0.0)


def test_a_generation_configs_sampling_values_are_not_used_and_that_is_said(folder, capsys):
    suggested = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [7, 5]}
    (folder / "generation_config.json").write_text(json.dumps(suggested))
    assert Text(folder, ModelConfig.read(folder)).eos_ids == {2, 5, 7}        # and config.json's 2
    _, _, err = run(capsys, "--model", folder, "--prompt", "1", "--n", 2)
    assert "note: generation_config.json suggests temperature 0.6, top_p 0.9; not used" in err


def test_characters_that_a_tokenizer_drops_are_named(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    Tokenizer(BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).save(str(folder / "tokenizer.json"))
    text = Text(folder, ModelConfig.read(folder))
    assert text.encode_raw("abxa") == [2, 0] and text.unknown("abxa yx") == "xy"


def test_unigram_hides_its_unknown_id(tmp_path):
    folder = write_checkpoint(tmp_path / "m")
    Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0)).save(str(folder / "tokenizer.json"))
    assert Text(folder, ModelConfig.read(folder)).unknown("axa") == "x"


def test_memory_is_what_is_allocated(folder):
    config = ModelConfig.read(folder)
    weights = sum(p.nbytes for p in load(folder).parameters())
    sampling, esamp = SamplingConfig(n=3, max_new_tokens=10), ESampConfig(width=16, train_every=4)
    blank = model_module.blank(config)
    parts = decode.memory(blank, torch.float32, [5, 7], sampling, esamp, 2)
    half = decode.memory(blank, torch.float16, [5], sampling, None, 1)
    assert parts["weights"] == weights == 2 * half["weights"] and "Distiller" not in half
    cache = model_module.KVCache(config, 6, 17, "cpu", torch.float32)
    assert parts["kv cache"] == cache.k_NBGME.nbytes + cache.v_NBGME.nbytes
    side = AsyncDistiller(Distiller(esamp, 2, 8), 6, 8, 4)
    taps = (side.shallow_BD, side.deep_BD, side.held_BD, side.predicted_BD, side.shallow_UBD, side.deep_UBD)
    assert parts["Distiller"] == 2 * esamp.bytes(8) + sum(t.nbytes for t in taps)


def test_without_a_record_the_tokens_are_the_same_and_the_figures_are_missing(folder, tmp_path, capsys):
    flags = ("--model", folder, "--prompt", "1", "--esamp", "--beta", 2, "--n", 4, "--out", tmp_path / "o")
    with_, without = [], []
    for found, extra in ((with_, ()), (without, ("--no-record",))):
        code, out, _ = run(capsys, *flags, *extra)
        assert code == 0
        found += [out, *lines(tmp_path / "o")]
    assert [e["token_ids"] for e in with_[1:-1]] == [e["token_ids"] for e in without[1:-1]]
    assert with_[1]["logprob"][0] < 0 and set(without[1]["logprob"]) == {None}
    assert without[1]["novelty"] == with_[1]["novelty"]
    summary = without[-1]["summary"]
    assert summary["moved_tokens"] is summary["kl_nats"] is summary["loss_last_10_steps_if_h1"] is None
    assert summary["updates"] == with_[-1]["summary"]["updates"] > 0
    assert "how far was not recorded" in without[0] and "moved" in with_[0]


def test_control_characters_are_shown_not_obeyed(folder, capsys):
    (folder / "generation_config.json").write_text(json.dumps({"top_k": "\x1b[2J", "eos_token_id": 2}))
    _, _, err = run(capsys, "--model", folder, "--prompt", "1", "--n", 1)
    assert "\\x1b[2J" in err and "\x1b" not in err
    assert decode.printable("a\x1b[31mb\n\tc\x00é🦄") == "a\\x1b[31mb\n\tc\\x00é🦄"


def test_a_progress_bar_on_a_terminal_only(folder, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    for stream, bar in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        assert main(["--model", str(folder), "--prompt", "1", "--n", "2"]) == 0
        assert ("step/s" in stream.getvalue()) == bar
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert main(["--model", str(folder), "--prompt", "1", "--n", "2", "--quiet"]) == 0
    assert sys.stderr.getvalue() == ""


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    words = ("--esamp", "default: 0.25", "default: 384", "examples:", "JSONL")
    assert stop.value.code == 0 and all(word in text for word in words)


def test_ids_equal_transformers_for_the_real_tokenizers():
    """Recorded by tests/record_fixtures.py: raw and templated prompts, spaces, NFC, emoji, special tokens."""
    if not (SHARED / "configs").is_dir():
        pytest.skip("real tokenizers are not at ../shared/data/configs")
    recorded = json.loads((ROOT / "tests" / "fixtures" / "token_ids.json").read_text())
    assert len(recorded) == 4
    for name, cases in recorded.items():
        text = Text(SHARED / "configs" / name, ModelConfig.read(SHARED / "configs" / name))
        for case in cases:
            given = case["given"]
            found = text.encode_raw(given) if isinstance(given, str) else text.encode_chat(given)[1]
            assert found == case["ids"], (name, given)
        assert not text.unknown("Café déjà vu 東京 🦄 \x00\u200b ok")
    assert text.template is not None


# ------------------------------------------------------------------------------
# as a user runs it
# ------------------------------------------------------------------------------

def decode_py(*argv, **kw):
    """`python decode.py …` as a process, with Ctrl-C as in a terminal even where tests run without one."""
    kw["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen([sys.executable, str(ROOT / "decode.py"), *map(str, argv)], text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", **kw)


def test_process_good_run_on_the_bundled_checkpoint(tmp_path):
    process = decode_py("--esamp", "--n", 4, "--out", tmp_path / "o", cwd=tmp_path)      # from any folder
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert out.count("── ") == 4 and "updates; loss" in out
    assert len(lines(tmp_path / "o")) == 17 and "\r" not in err


def test_process_bad_input():
    process = decode_py("--top-p", "0")
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out, err.count("\n")) == (2, "", 1) and "top_p is 0.0" in err


def test_process_ctrl_c_leaves_whole_lines_of_whole_prompts(tmp_path):
    (tmp_path / "p").write_text("9955>65:\n" * 5000)
    process = decode_py("--esamp", "--n", 3, "--prompts", tmp_path / "p", "--out", tmp_path / "o", "--quiet")
    out, deadline = tmp_path / "o", time.time() + 100
    while time.time() < deadline and not (out.exists() and out.stat().st_size > 3000):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    try:
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in err and "interrupted" in err
    entries = lines(tmp_path / "o")
    assert len(entries) % 3 == 0 and all("summary" not in e for e in entries)
    assert [e["prompt_id"] for e in entries] == [i // 3 for i in range(len(entries))]
