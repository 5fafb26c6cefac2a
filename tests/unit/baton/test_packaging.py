"""Makefile, scripts, image and compose files agree with the code they start."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from fleet.service_settings import DecodeSettings, GatewaySettings, PrefillSettings, WorkerSettings
from fleet.settings import FleetSettings

ROOT = Path(__file__).resolve().parents[3]
# Set per container by the entry point, or without use where each container holds one service.
NOT_IN_COMPOSE = {"name", "advertise_host", "shared_cores"}


def _make(*arguments: str) -> str:
    # `make test` hands its own flags down by these.
    environ = {key: value for key, value in os.environ.items() if key not in {"MAKEFLAGS", "MAKELEVEL", "MFLAGS"}}
    done = subprocess.run(["make", *arguments], cwd=ROOT, env=environ, capture_output=True, text=True, check=True)
    return done.stdout


def _section(start: str, end: str) -> str:
    text = (ROOT / "compose.yaml").read_text()
    return text[text.index(start) : text.index(end, text.index(start))]


def _variables(text: str) -> set[str]:
    return {name.lower() for name in re.findall(r"^ +BATON_([A-Z0-9_]+):", text, re.MULTILINE)}


def test_ci_runs_exactly_make_test() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "exec make test"


def test_every_target_is_listed_and_its_scripts_are_there() -> None:
    listed = _make("help")
    for target in ("install", "up", "test", "lint", "compose-test", "clean"):
        assert f"make {target} " in listed
    for name in ("install", "install-torch", "install-browser", "check", "fetch-wheels"):
        script = ROOT / "scripts" / name
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_up_passes_its_arguments_on() -> None:
    # `-o install` takes the installation for done.
    assert _make("-n", "-o", "install", "up", "ARGS=--decode 2").strip() == ".venv/bin/baton up --decode 2"


@pytest.mark.parametrize(
    ("failing", "what", "expected"),
    [
        ("ruff", "all", {"ruff"}),
        ("mypy", "lint", {"ruff", "mypy"}),
        ("mypy", "all", {"ruff", "mypy", "pytest"}),  # types are checked beside the tests
        ("pytest", "all", {"ruff", "pytest"}),
        ("", "all", {"ruff", "mypy", "lint-imports", "pytest"}),
    ],
)
def test_the_gates_stop_at_the_first_failure(tmp_path: Path, failing: str, what: str, expected: set[str]) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "check", tmp_path / "scripts" / "check")
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name in ("ruff", "mypy", "lint-imports", "pytest"):
        (tools / name).write_text(f"#!/bin/sh\necho ran {name} $*\nexit {int(name == failing)}\n")
        (tools / name).chmod(0o755)
    done = subprocess.run([tmp_path / "scripts" / "check", what], capture_output=True, text=True, check=False)
    assert done.returncode == int(bool(failing))
    ran = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("ran")}
    # What runs beside a failing test may be stopped at any point.
    assert expected <= ran <= expected | ({"mypy", "lint-imports"} if failing == "pytest" else set())


def test_installation_without_python_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "install", tmp_path / "scripts" / "install")
    done = subprocess.run(
        [tmp_path / "scripts" / "install"],
        env={"PATH": "/usr/bin:/bin", "PYTHON": "python-nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "no Python 3.11 or newer found at python-nowhere" in done.stderr
    assert "apt install" in done.stderr


def test_every_direct_dependency_is_pinned() -> None:
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    names = {re.split(r"[<>=~! \[]", each)[0].lower().replace("_", "-") for each in wanted}
    assert names <= pins


@pytest.mark.parametrize(
    ("start", "end", "fields"),
    [
        (
            "x-fleet-settings:",
            "x-worker:",
            set(FleetSettings.__struct_fields__) - NOT_IN_COMPOSE - {"liveness_file"},
        ),
        (
            "x-worker-settings:",
            "services:",
            set(WorkerSettings.__struct_fields__) - set(FleetSettings.__struct_fields__) - NOT_IN_COMPOSE
            | {"liveness_file"},
        ),
        (
            "  gateway:",
            "  prefill:",
            set(GatewaySettings.__struct_fields__) - set(FleetSettings.__struct_fields__),
        ),
        ("  prefill:", "  decode:", set(PrefillSettings.__struct_fields__) - set(WorkerSettings.__struct_fields__)),
        ("  decode:", "networks:", set(DecodeSettings.__struct_fields__) - set(WorkerSettings.__struct_fields__)),
    ],
)
def test_compose_passes_every_setting_to_the_services_that_read_it(start: str, end: str, fields: set[str]) -> None:
    section = _section(start, end) if end != "networks:" else _section(start, "\nnetworks:")
    assert _variables(section) == fields


def test_compose_refuses_to_start_without_a_secret_and_publishes_to_this_machine_alone() -> None:
    text = (ROOT / "compose.yaml").read_text()
    assert "${BATON_CLUSTER_SECRET:?" in text
    published = [line.strip() for line in text.splitlines() if line.strip().endswith(":8000")]
    assert published == ["- 127.0.0.1:${PORT:-8000}:8000"]


def test_the_image_gets_every_package_and_no_tests() -> None:
    packages = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    names = {pattern.rstrip("*") for pattern in packages}
    allowed = set((ROOT / ".dockerignore").read_text().splitlines())
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text()
    for name in names:
        assert f"!{name}" in allowed
        assert f"COPY {name}/ {name}/" in dockerfile
    assert "!tests" not in allowed


def test_the_entry_point_advertises_its_own_address_only_when_needed(tmp_path: Path) -> None:
    fake = tmp_path / "hostname"
    fake.write_text('#!/bin/sh\n[ "$1" = -i ] && echo "10.0.0.7 10.0.1.7" || echo box\n')
    fake.chmod(0o755)

    def run(**variables: str) -> list[str]:
        done = subprocess.run(
            [ROOT / "deploy" / "in-container", "env"],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin", **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        return sorted(line for line in done.stdout.splitlines() if line.startswith("BATON_"))

    assert run(BATON_BIND_HOST="0.0.0.0") == [
        "BATON_ADVERTISE_HOST=10.0.0.7",
        "BATON_BIND_HOST=0.0.0.0",
        "BATON_NAME=box",
    ]
    assert run(BATON_NAME="mine") == ["BATON_NAME=mine"]
    assert "BATON_ADVERTISE_HOST=given" in run(BATON_BIND_HOST="0.0.0.0", BATON_ADVERTISE_HOST="given")


def test_a_gpu_machine_is_sent_everything_but_what_it_has() -> None:
    listed = subprocess.run(
        [str(ROOT / "scripts" / "fetch-gpu-wheels"), "--list"], capture_output=True, text=True, check=True
    )
    wanted = set(listed.stdout.split("\n")) - {""}
    everything = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    assert wanted < everything
    left_out = {re.split(r"[>=]", one)[0] for one in everything - wanted}
    assert left_out == {"numba", "numpy", "torch"}
