"""One dataclass gives flags, help and config.json; bad values are named in one sentence, whatever way they come in."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given as such_that
from hypothesis import settings
from hypothesis import strategies as st

from ddpm.commands import CommandParser
from ddpm.config import TrainConfig, add_flags, flag, from_flags, given

FIELDS = dataclasses.fields(TrainConfig)


def parse(*words, base=None):
    parser = CommandParser(prog="train")
    add_flags(parser)
    return from_flags(parser.parse_args(words), base)


# ---- flags

def test_no_flags_give_the_defaults_and_count_as_not_given():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert parse() == TrainConfig() and given(parser.parse_args([])) == {}
    assert given(parser.parse_args(["--steps", "1200"])) == {"steps": 1200}


def test_the_flags_that_scripts_rely_on():
    config = parse(*"--model iddpm --data digits --data-dir /d --steps 5 --batch-size 6 --lr 3e-4 --T 50 "
                   "--schedule cosine --seed 9 --device cuda --workers 2 --base-channels 48 --channel-mults 1,2,3 "
                   "--blocks-per-level 2 --attention-levels 1,2".split())
    assert config == TrainConfig(model="iddpm", data="digits", data_dir="/d", steps=5, batch_size=6, lr=3e-4, T=50,
                                 schedule="cosine", seed=9, device="cuda", workers=2, base_channels=48,
                                 channel_mults=(1, 2, 3), blocks_per_level=2, attention_levels=(1, 2))


@pytest.mark.parametrize("text, levels", [("none", ()), ("", ()), ("0", (0,)), ("0, 2", (0, 2))])
def test_tuples_on_the_command_line(text, levels):
    assert parse("--attention-levels", text).attention_levels == levels


@pytest.mark.parametrize("schedule", ["linear", "cosine", "variance-exploding", "sub-vp"])
def test_schedules_by_flag_and_from_a_file(schedule):
    config = parse("--schedule", schedule)
    assert config.schedule == schedule and TrainConfig.from_json(f'{{"schedule": "{schedule}"}}') == config


def test_a_flag_that_stands_alone():
    config = parse("--conditional", "--label-dropout", "0.2")
    assert config == TrainConfig(conditional=True, label_dropout=0.2) and not parse().conditional
    assert parse("--steps", "9", base=config).conditional    # not given: as it was
    assert TrainConfig.from_json(config.to_json()) == config
    assert TrainConfig().differences(config) == ["conditional", "label_dropout"]


def test_flags_lay_over_a_base():
    base = TrainConfig(T=77, lr=0.5)
    assert parse("--steps", "9", base=base) == dataclasses.replace(base, steps=9)


@pytest.mark.parametrize("words, message", [
    (["--T", "many"], "--T: invalid int value: 'many'"), (["--channel-mults", "1,x"], "integers with commas"),
    (["--model", "gan"], "--model: invalid choice: 'gan'"), (["--bogus"], "unrecognized arguments: --bogus"),
    (["--step", "3"], "unrecognized arguments: --step")])
def test_what_argparse_refuses_is_one_sentence_and_status_2(capsys, words, message):
    with pytest.raises(SystemExit) as exit:
        parse(*words)
    error = capsys.readouterr().err
    assert exit.value.code == 2 and message in error and error.startswith("error: ") and error.count("\n") == 1


def test_help_shows_every_flag_with_its_default_and_an_example():
    parser = CommandParser(prog="train")
    add_flags(parser)
    text = " ".join(parser.format_help().split())
    for f in FIELDS:
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else str(f.default)
        default = "off" if f.default is False else default
        start = text.index(f"{flag(f.name)} ", text.index("model: "))
        assert f.default is None or f"(default: {default})" in text[start:start + 400].replace("- ", "-"), f.name
        assert f.metadata["help"].split()[0] in text
    for word in ("example", "python -m ddpm.train", "training:", "network:", "running:"):
        assert word in text


def test_an_epilog_of_ones_own_is_kept():
    parser = argparse.ArgumentParser(epilog="mine")
    add_flags(parser)
    assert parser.epilog == "mine"


def test_importing_the_configuration_is_light():
    heavy = ("mlxtend", "sklearn", "scipy", "pooch", "PIL", "matplotlib", "safetensors", "requests", "pandas")
    code = f"import sys, ddpm.config, ddpm.runs, ddpm.data; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.stdout == "[]\n"


# ---- values

@pytest.mark.parametrize("settings, message", [
    ({"T": 0}, "--T must be at least 1, got 0"), ({"steps": -1}, "--steps must be at least 1, got -1"),
    ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
    ({"micro_batch": 0}, "--micro-batch must be at least 1, got 0"), ({"lr": 0}, "--lr must be above 0, got 0.0"),
    ({"lr": float("nan")}, "--lr must be a finite number, got nan"),
    ({"clip": float("inf")}, "--clip must be a finite number, got inf"),
    ({"lr": "fast"}, "--lr must be a finite number, got 'fast'"), ({"T": 1.5}, "--T must be an integer, got 1.5"),
    ({"T": True}, "--T must be an integer, got True"), ({"warmup": -1}, "--warmup must be at least 0, got -1"),
    ({"ema": 1.0}, "--ema must be at least 0 and below 1, got 1.0"),
    ({"dropout": -0.1}, "--dropout must be at least 0 and below 1, got -0.1"),
    ({"label_dropout": 0.0}, "--label-dropout must be above 0 and below 1 (guidance needs both), got 0.0"),
    ({"label_dropout": 1.0}, "--label-dropout must be above 0 and below 1"),
    ({"conditional": 1}, "--conditional must be true or false, got 1"),
    ({"conditional": "yes"}, "--conditional must be true or false, got 'yes'"),
    ({"weight_decay": -1}, "--weight-decay must be at least 0, got -1.0"),
    ({"seed": -3}, "--seed must be at least 0, got -3"), ({"workers": -1}, "--workers must be at least 0, got -1"),
    ({"model": "gan"}, "--model must be one of ddpm, iddpm, gddm, sn, npr, ocm, got 'gan'"),
    ({"schedule": ["linear"]}, "--schedule must be one of linear, cosine, variance-exploding, sub-vp, got ['l"),
    ({"device": "tpu"}, "--device must be one of cpu, cuda, got 'tpu'"),
    ({"data": ""}, "--data must be the name of a data set"),
    ({"data": None}, "--data must be text, got None"), ({"data_dir": 3}, "--data-dir must be text, got 3"),
    ({"base_channels": 33, "groups": 1, "heads": 1}, "--base-channels must be even"),
    ({"channel_mults": ()}, "--channel-mults must be one or more integers from 1 up, got none"),
    ({"channel_mults": (1, 0)}, "--channel-mults must be one or more integers from 1 up, got 1,0"),
    ({"channel_mults": 2}, "--channel-mults must be integers with commas between them, got 2"),
    ({"attention_levels": (3,)}, "--attention-levels must be among the levels 0 to 2 that --channel-mults gives, "
                                "got 3"),
    ({"attention_levels": (-1,)}, "--attention-levels must be among the levels 0 to 2"),
    ({"groups": 5}, "--groups must be a divisor of the width of every level (32,64,64 channels), got 5"),
    ({"heads": 3}, "--heads must be a divisor of the widths with attention (64 channels), got 3"),
    ({"samples": -1}, "--samples must be at least 0, got -1"), ({"save_every": 0}, "--save-every must be at least 1"),
    ({"log_every": 0}, "--log-every must be at least 1"), ({"objective": ""}, "--objective must be a name")])
def test_each_bad_value_is_named_with_its_flag(settings, message):
    with pytest.raises(ValueError) as error:
        TrainConfig(**settings)
    assert message in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--"):
        TrainConfig.from_json(json.dumps(settings))


def test_edges_are_allowed():
    TrainConfig(T=1, steps=1, batch_size=1, micro_batch=1, ema=0, clip=0, warmup=0, dropout=0, channel_mults=(1,),
                attention_levels=(), heads=1, groups=1, base_channels=2, samples=0)


def test_it_is_frozen_and_hashable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().T = 3
    assert len({TrainConfig(), TrainConfig(T=5), TrainConfig(channel_mults=[1, 2, 2])}) == 2


# ---- config.json

@such_that(st.builds(TrainConfig, T=st.integers(1, 5000), lr=st.floats(1e-12, 1e3), seed=st.integers(0, 2**63),
                     channel_mults=st.lists(st.integers(1, 4), min_size=3, max_size=4).map(tuple),
                     attention_levels=st.sets(st.integers(0, 2)).map(sorted), data=st.text(min_size=1),
                     data_dir=st.none() | st.text(), ema=st.floats(0, 0.9999)))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_json_round_trip(config):
    again = TrainConfig.from_json(config.to_json())
    assert again == config and all(type(getattr(again, f.name)) is type(getattr(config, f.name)) for f in FIELDS)


def test_json_is_complete_and_whole_numbers_do_for_floats():
    assert set(json.loads(TrainConfig().to_json())) == {f.name for f in FIELDS}
    assert isinstance(TrainConfig.from_json('{"lr": 1}').lr, float)
    assert TrainConfig.from_json('{"T": 5}') == TrainConfig(T=5)


@pytest.mark.parametrize("text, message", [
    ('{"learning_rate": 1}', "there is no setting 'learning_rate'; the settings are model,"),
    ('{"T": 5', "not JSON"), ("[1]", "must be an object of settings, got list"), ("", "not JSON")])
def test_bad_json(text, message):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        TrainConfig.from_json(text)


def test_differences_ignore_what_may_change_on_resuming():
    a = TrainConfig()
    assert a.differences(dataclasses.replace(a, steps=7, device="cuda", workers=3, data_dir="x", samples=1)) == []
    assert a.differences(dataclasses.replace(a, steps=7, base_channels=48, T=10)) == ["T", "base_channels"]
