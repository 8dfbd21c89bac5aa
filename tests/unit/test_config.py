"""Options: precedence, limits, errors that name the thing, and SGLang's flags passing through."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from alchemist.server import options
from alchemist.server.config import (
    LINEAR_MODULES,
    Config,
)
from alchemist.server.machine_memory import auto_host_bytes, physical_memory_bytes
from alchemist.server.options import TINY_OPTIONS, parse


def usage_error(capsys: pytest.CaptureFixture[str], argv: list[str], environ=None) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(argv, environ or {})
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("alchemist: error: ")
    assert message.count("\n") == 1
    return message


def test_defaults() -> None:
    config, rest = parse(["--model-path", "m"], {"PATH": "/bin"})
    assert config == Config()
    assert rest == ["--model-path", "m"]
    assert (config.objective, config.reference, config.optimizer) == ("kto", "base", "adamw")
    assert (config.lora_rank, config.lora_alpha) == (16, 32.0)
    assert config.target_modules == LINEAR_MODULES
    assert config.data_dir == str(Path.cwd() / "alchemist-data")


def test_the_embedded_model_has_a_preset_for_who_says_nothing_of_training(tmp_path: Path) -> None:
    preset = yaml.safe_load(TINY_OPTIONS.read_text())
    config = parse(["--seed", "3"], {})[0]
    assert (config.beta, config.learning_rate) == (preset["beta"], preset["learning-rate"])
    assert (config.lora_rank, config.lora_alpha) == (preset["lora-rank"], 2 * preset["lora-rank"])
    assert parse(["--train-max-wait", "7"], {})[0].train_max_wait == 7
    file = tmp_path / "c.yaml"
    file.write_text("max-grad-norm: 0.5\n")
    for argv, environ in (
        (["--optimizer", "sgd"], {}),
        (["--lora-rank", "8"], {}),
        ([], {"ALCHEMIST_TRAIN_BATCH_SIZE": "4"}),
        (["--config", str(file)], {}),
    ):
        config = parse(argv, environ)[0]
        assert (config.beta, config.learning_rate) == (Config().beta, Config().learning_rate)


def test_alpha_follows_the_rank_unless_given() -> None:
    assert parse(["--lora-rank", "4"], {})[0].lora_alpha == 8.0
    assert parse(["--lora-rank=4", "--lora-alpha=4"], {})[0].lora_alpha == 4.0


def test_command_line_over_environment_over_file(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("beta: 0.3\nlora-rank: 4\nlearning_rate: 1e-3\nno-train: true\n")
    environ = {"ALCHEMIST_BETA": "0.2", "ALCHEMIST_LORA_RANK": "8"}
    config, _ = parse(["--config", str(file), "--lora-rank", "2"], environ)
    assert (config.lora_rank, config.beta, config.learning_rate) == (2, 0.2, 1e-3)
    assert config.no_train
    by_variable, _ = parse([], {"ALCHEMIST_CONFIG": str(file), "ALCHEMIST_NO_TRAIN": "0"})
    assert by_variable.lora_rank == 4
    assert not by_variable.no_train


@pytest.mark.parametrize(
    ("word", "count"),
    [("2", 2**31), ("512MiB", 2**29), ("1.5gib", 3 * 2**29), ("0", 0), ("auto", -1)],
)
@pytest.mark.parametrize("option", ["--activation-host-gb", "--activation-memory"])
def test_activation_memory_units(option: str, word: str, count: int) -> None:
    assert parse([option, word], {})[0].activation_host_bytes == count


def test_activation_memory_larger_than_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    too_much = f"{physical_memory_bytes() // 2**30 + 1}GiB"
    message = usage_error(capsys, ["--activation-host-gb", too_much])
    assert "--activation-host-gb is " in message
    assert "this machine has" in message


def test_automatic_activation_memory_is_a_capped_tenth() -> None:
    assert auto_host_bytes(20 * 2**30) == 2 * 2**30
    assert auto_host_bytes(800 * 2**30) == 8 * 2**30


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--lora-rank", "0"], "--lora-rank is 0; allowed: 1 to 512"),
        (["--lora-rank", "9999"], "allowed: 1 to 512"),
        (["--lora-rank", "2.5"], "--lora-rank is '2.5'; allowed: a whole number"),
        (["--learning-rate", "nan"], "--learning-rate is nan; allowed: above 0"),
        (["--max-grad-norm", "-1"], "--max-grad-norm is -1.0; allowed: 0 or more"),
        (["--objective", "ppo"], "allowed: kto, apo_zero_unpaired, dpo, sft or module:function"),
        (["--target-modules", "q_proj,embed"], "--target-modules is ('q_proj', 'embed')"),
        (
            ["--activation-host-gb", "2 potatoes"],
            "--activation-host-gb is '2 potatoes'; allowed: auto",
        ),
        (["--activation-host-gb", "-1"], "a number in GiB"),
        (["--activation-device-fraction", "0"], "is 0.0; allowed: above 0, up to 1"),
        (["--activation-device-fraction", "1.5"], "is 1.5; allowed: above 0, up to 1"),
        (
            ["--activation-eviction", "fifo"],
            "--activation-eviction is 'fifo'; allowed: one of value, lru",
        ),
        (["--beta"], "--beta needs a value"),
        (["--beta", "--no-train"], "--beta needs a value"),
        (["--no-train=maybe"], "allowed: true or false"),
        (["--config", "/does/not/exist.yaml"], "/does/not/exist.yaml"),
        (["--lease-policy", "fair"], "--lease-policy is 'fair'; allowed: one of idle, share, slo,"),
        (["--lease-share", "0"], "--lease-share is 0.0; allowed: above 0"),
        (["--lease-share", "-0.1"], "--lease-share is -0.1; allowed: above 0"),
        (["--lease-share", "1.5"], "--lease-share is 1.5; allowed: above 0 and up to 1"),
        (["--lease-share", "0.5"], "is 0.5; allowed: 0.2, but with --lease-policy share"),
        (["--loss-type", "ipo"], "is 'ipo'; allowed: sigmoid, but with --objective dpo"),
        (["--label-smoothing", "0.1"], "is 0.1; allowed: 0.0, but with --objective dpo and"),
        (
            ["--objective=sft", "--beta=3"],
            "is 3.0; allowed: 0.1, but with another --objective than",
        ),
        (["--objective=sft", "--reference=served"], "--reference is 'served'; allowed: base, but"),
        (["--objective=dpo", "--undesirable-weight=0.4"], "is 0.4; allowed: 1.0, but with another"),
        (["--objective=sft", "--desirable-weight=2"], "another --objective than dpo and sft"),
        (["--lease-policy", "slo"], "--lease-policy is 'slo'; allowed: slo with --slo-ttft-ms,"),
        (["--slo-ttft-ms", "0"], "--slo-ttft-ms is 0.0; allowed: above 0"),
        (["--slo-tpot-ms", "-3"], "--slo-tpot-ms is -3.0; allowed: above 0"),
        (["--slo-tpot-ms", "fast"], "--slo-tpot-ms is 'fast'; allowed: a number"),
        (["--slo-ttft-ms", "9"], "--slo-ttft-ms is 9.0; allowed: only with --lease-policy slo"),
    ],
)
def test_bad_values_are_named(argv, named, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in usage_error(capsys, argv)


def test_lease_policies_from_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("lease-policy: slo\nslo-ttft-ms: 200\n")
    config = parse(["--config", str(file)], {"ALCHEMIST_SLO_TPOT_MS": "12.5"})[0]
    assert (config.lease_policy, config.slo_ttft_ms, config.slo_tpot_ms) == ("slo", 200.0, 12.5)
    assert Config.from_json(config.to_json()) == config
    config = parse(["--lease-policy=share", "--lease-share", "1"], {})[0]
    assert (config.lease_policy, config.lease_share, config.slo_ttft_ms) == ("share", 1.0, None)
    assert Config().lease_policy == "idle"


def test_unknown_environment_variable(capsys: pytest.CaptureFixture[str]) -> None:
    message = usage_error(capsys, [], {"ALCHEMIST_LORA_RNK": "3"})
    assert "ALCHEMIST_LORA_RNK; did you mean ALCHEMIST_LORA_RANK?" in message
    parse([], {"ALCHEMIST_RUN": "/tmp/run.json"})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("beta_: 1", "beta_; did you mean beta?"),
        ("- a\n- b", "must hold a mapping"),
        ("a: [", "expected"),
        ("sglang: 3", "sglang must be a mapping"),
        ("lora-rank: true", "--lora-rank is True; allowed: a whole number"),
        ("sglang: {prot: 1}", "prot; did you mean port?"),
        ("sglang: {disable-radix-cache: 3}", "allowed: true or false"),
    ],
)
def test_bad_files_are_named(text, named, tmp_path: Path, capsys) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert named in usage_error(capsys, ["--config", str(file)])


def test_sglang_flags_pass_through_in_full() -> None:
    """What is added where nothing is said asks for the full names."""
    argv = ["--port", "3", "--beta", "0.5", "--disable-radix-cache", "--model-path=m", "--tp", "1"]
    config, rest = parse(argv, {})
    assert config.beta == 0.5
    assert rest == ["--port", "3", "--disable-radix-cache", "--model-path=m", "--tp-size", "1"]
    _, rest = parse(["--mem-fraction", "0.3", "--model-p=m", "--max-running", "64"], {})
    assert rest == [
        "--mem-fraction-static",
        "0.3",
        "--model-path=m",
        "--max-running-requests",
        "64",
    ]


def test_sglang_mapping_of_the_file_comes_first_and_loses(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(
        "sglang:\n  port: 1\n  tp-size: 1\n  disable-radix-cache: false\n"
        "  enable_metrics: true\n  lora-paths: [a=b, c=d]\n"
    )
    _, rest = parse(["--config", str(file), "--port", "3"], {})
    assert rest == [
        *("--tp-size", "1", "--enable-metrics", "--lora-paths", "a=b", "c=d"),
        *("--port", "3"),
    ]


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--lora-rnk", "3"], "unknown flag --lora-rnk; did you mean --lora-rank?"),
        (["--prot", "3"], "unknown flag --prot; did you mean --port?"),
        (["--qqqqqqqqqqqqqqqqqqqqqqqqqqq"], "unknown flag --qqqqqqqqqqqqqqqqqqqqqqqqqqq\n"),
        (["--mem-fractoin", "1"], "did you mean --mem-fraction-static?"),
        (["--port", "x"], "--port: invalid int value: 'x'"),
        (["serve"], "unrecognized arguments: serve"),
    ],
)
def test_unknown_flags_suggest(argv, named, capsys: pytest.CaptureFixture[str]) -> None:
    assert named in usage_error(capsys, argv)


def test_help_lists_every_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], {})
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for option in options._OPTIONS:
        assert f"\n  {option}" in text
    assert text.count("(default") + text.count("default:") >= len(dataclasses.fields(Config))
    assert "--help-all" in text
    assert "--model-path MODEL_PATH" not in text


def test_help_all_adds_sglang(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help-all"], {})
    text = capsys.readouterr().out
    assert text.index("--lora-rank N") < text.index("--mem-fraction-static")


def test_json_round_trip() -> None:
    config = Config(lora_rank=4, target_modules=("v_proj", "q_proj"), beta=0.25)
    assert config.target_modules == ("q_proj", "v_proj")
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize("text", ['{"beta": "x"}', '{"nothing": 1}', '{"lora_rank": 0}', "[]", "{"])
def test_json_is_strict(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the kinds differ, all are ValueError
        Config.from_json(text)


@pytest.mark.parametrize(
    "argv",
    [
        ["--objective=dpo", "--beta=3", "--reference=served"],
        ["--objective=sft", "--beta=0.1", "--undesirable-weight=1"],
        ["--objective=apo_zero_unpaired", "--beta=3", "--undesirable-weight=0.4"],
        ["--objective=json:loads", "--beta=3", "--desirable-weight=2", "--reference=served"],
    ],
)
def test_what_an_objective_uses_or_has_its_default_is_taken(argv: list[str]) -> None:
    parse(argv, {})
