"""Flags made from settings, and the command line around them."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from baton.cli import build_parser, main
from baton.flags import NOT_FLAGS, add_setting_flags, overrides_of
from fleet.service_settings import SERVICES
from fleet.settings import field_names


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(allow_abbrev=False)
    add_setting_flags(made)
    return made


def test_every_setting_of_every_service_is_a_flag_exactly_once(parser: argparse.ArgumentParser) -> None:
    flags = [flag for action in parser._actions for flag in action.option_strings if not flag.startswith("--no-")]
    wanted = {"--" + name.replace("_", "-") for name in field_names(SERVICES) - NOT_FLAGS}
    assert wanted <= set(flags)
    assert len(flags) == len(set(flags))


def test_flags_become_settings_by_field_name(parser: argparse.ArgumentParser) -> None:
    given = parser.parse_args(["--max-step-tokens", "512", "--no-prefix-cache", "--insecure", "--lease-s=1.5"])
    assert overrides_of(given) == {
        "max_step_tokens": "512",
        "prefix_cache": "false",
        "insecure": "true",
        "lease_s": "1.5",
    }
    assert overrides_of(parser.parse_args([])) == {}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["up", "--port", "99999"], "argument --port: Expected `int` <= 65535"),
        (["up", "--max-num-seqs", "many"], "argument --max-num-seqs: Expected `int`"),
        (["up", "--quantization", "int4"], "argument --quantization: auto, fp8 or int8"),
        (["up", "--decode", "0"], "argument --decode: '0' is not a number of workers from 1 on"),
        (["up", "--max-num-seq", "3"], "unknown argument --max-num-seq; did you mean --max-num-seqs?"),
        (["keys", "create", "x", "--rpm", "-1"], "argument --rpm"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_bad_command_line_ends_with_code_2_and_says_why(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err


def test_an_unknown_variable_stops_the_start_and_names_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATON_MAX_NUM_SEQ", "3")
    assert main(["up"]) == 2
    assert "BATON_MAX_NUM_SEQ is not a setting of Baton; did you mean BATON_MAX_NUM_SEQS?" in capsys.readouterr().err


def test_help_and_version_need_no_torch() -> None:
    code = (
        "import sys, baton.cli\n"
        "baton.cli.build_parser()[1]['up'].format_help()\n"
        "sys.exit(','.join(sorted({'torch', 'transformers', 'litestar'} & set(sys.modules))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


def test_help_of_every_command_can_be_printed() -> None:
    parser, commands = build_parser()
    for each in (parser, *commands.values()):
        assert "usage: baton" in each.format_help()
