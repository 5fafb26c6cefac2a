"""From settings to processes, without starting any."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path

import pytest

from baton.cores import cpu_quota, threads_per_worker, usable_cores
from baton.errors import NoSuchModel, PortInUse
from baton.greeting import Greeting
from baton.plan import Wish, embedded_redis, free_port, make_plan, require_port, resolve_model
from baton.settings import Surroundings, surroundings
from fleet.errors import SettingsError


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    return directory


def _around(tmp_path: Path, toml: str = "", **variables: str) -> Surroundings:
    path = tmp_path / "baton.toml"
    path.write_text(toml)
    return Surroundings(environ={"PATH": "/bin", **variables}, state_dir=tmp_path / "state", toml_path=path)


def _wish(model: Path, *, num_prefill: int = 1, num_decode: int = 1, suffix: str = "", **overrides: str) -> Wish:
    return Wish(
        num_prefill=num_prefill,
        num_decode=num_decode,
        overrides={"model": str(model), **overrides},
        redis_url="unix:///run/r.sock",
        name_suffix=suffix,
    )


def test_one_process_per_worker_each_with_its_name_and_the_shared_settings(tmp_path: Path, model: Path) -> None:
    wish = _wish(model, num_prefill=2, num_decode=3, suffix="-ab", name="mine", max_num_seqs="7")
    plan = make_plan(wish, _around(tmp_path), cores=11)
    assert [spec.name for spec in plan.specs] == [
        *("prefill-0", "prefill-1", "decode-0", "decode-1", "decode-2", "gateway"),
    ]
    worker = plan.specs[2]
    assert worker.command[1:] == ("-m", "decode_svc")
    assert worker.environ["BATON_NAME"] == "mine-decode-0-ab"
    assert worker.environ["BATON_MAX_NUM_SEQS"] == "7"
    assert worker.environ["BATON_REDIS_URL"] == "unix:///run/r.sock"
    assert worker.environ["BATON_MODEL"] == str(model)
    assert worker.environ["BATON_THREADS"] == "2"
    assert worker.environ["PATH"] == "/bin"
    assert worker.grace_s > plan.decode.drain_timeout_s


def test_flags_win_over_variables_and_those_over_the_file(tmp_path: Path, model: Path) -> None:
    toml = 'port = 1001\nmax_num_seqs = 5\nthreads = 4\ndtype = "float32"\n'
    around = _around(tmp_path, toml, BATON_PORT="1002", BATON_THREADS="3")
    plan = make_plan(_wish(model, port="1003"), around, cores=8)
    assert plan.gateway.port == 1003
    assert plan.threads == 3
    assert (plan.decode.max_num_seqs, plan.decode.dtype) == (5, "float32")
    assert around.is_given("max_num_seqs")
    assert around.is_given("port")
    assert not around.is_given("redis_url")


@pytest.mark.parametrize(("overrides", "lent"), [({}, "/run/cores"), ({"threads": "3"}, "")])
def test_workers_lend_each_other_cores_unless_their_threads_are_given(
    tmp_path: Path, model: Path, overrides: dict[str, str], lent: str
) -> None:
    wish = dataclasses.replace(_wish(model), overrides={"model": str(model), **overrides}, cores_file="/run/cores")
    plan = make_plan(wish, _around(tmp_path), cores=2)
    assert plan.decode.shared_cores == lent
    assert [spec.environ.get("BATON_SHARED_CORES", "") for spec in plan.specs] == [lent] * 3
    assert ("GOMP_SPINCOUNT" in plan.specs[0].environ) == bool(lent)


def test_threads_wait_as_the_environment_says_if_it_does(tmp_path: Path, model: Path) -> None:
    wish = dataclasses.replace(_wish(model), cores_file="/run/cores")
    plan = make_plan(wish, _around(tmp_path, OMP_WAIT_POLICY="active"), cores=2)
    assert "GOMP_SPINCOUNT" not in plan.specs[0].environ


def test_a_bad_variable_names_itself(tmp_path: Path, model: Path) -> None:
    with pytest.raises(SettingsError, match="BATON_PAGE_SIZE"):
        make_plan(_wish(model), _around(tmp_path, BATON_PAGE_SIZE="0"), cores=2)


def test_the_model_is_a_directory_a_hub_id_or_the_demo(model: Path, tmp_path: Path) -> None:
    assert resolve_model(str(model)) == str(model)
    assert resolve_model("org/name") == "org/name"
    assert Path(resolve_model("demo"), "config.json").is_file()
    assert resolve_model("") == resolve_model("demo")
    with pytest.raises(NoSuchModel, match=r"holds no config\.json"):
        resolve_model(str(tmp_path))
    for missing in ("./nowhere", "/nowhere", "~/nowhere", "a/b/c"):
        with pytest.raises(NoSuchModel, match="there is no model at"):
            resolve_model(missing)


def test_a_port_in_use_is_noticed_before_anything_starts() -> None:
    in_use = pytest.raises(PortInUse, match="Address already in use; choose another with --port")
    with socket.create_server(("127.0.0.1", 0)) as server, in_use:
        require_port("127.0.0.1", server.getsockname()[1])
    require_port("127.0.0.1", free_port("127.0.0.1"))
    with pytest.raises(PortInUse, match=r"cannot listen on 192\.0\.2\.1"):
        require_port("192.0.2.1", 8000)


def test_clients_of_a_wildcard_address_are_told_one_that_works(tmp_path: Path, model: Path) -> None:
    plan = make_plan(_wish(model, host="0.0.0.0", port="8001"), _around(tmp_path), cores=2)
    assert plan.api_url == "http://127.0.0.1:8001/v1"
    assert make_plan(_wish(model, host="::1", port="81"), _around(tmp_path), cores=2).api_url == "http://[::1]:81/v1"


def test_the_embedded_redis_keeps_nothing_on_disk(tmp_path: Path) -> None:
    spec, url = embedded_redis(tmp_path, {})
    assert url == f"unix://{tmp_path}/redis.sock"
    assert spec.command[spec.command.index("--port") + 1] == "0"
    assert spec.command[spec.command.index("--save") + 1] == ""


@pytest.mark.parametrize(("workers", "cores", "threads"), [(2, 1, 1), (2, 2, 1), (2, 4, 1), (2, 5, 2), (3, 16, 5)])
def test_workers_share_the_cores_and_leave_one_to_the_gateway(workers: int, cores: int, threads: int) -> None:
    assert threads_per_worker(workers, cores) == threads


def test_a_control_groups_quota_counts(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert cpu_quota(tmp_path) == 1.5
    assert usable_cores(tmp_path) == 1
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert cpu_quota(tmp_path) is None
    (tmp_path / "cpu.max").unlink()
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000")
    assert cpu_quota(tmp_path) is None


def test_state_belongs_into_the_users_state_directory() -> None:
    assert surroundings({"HOME": "/home/u"}).state_dir == Path("/home/u/.local/state/baton")
    assert surroundings({"HOME": "/home/u", "XDG_STATE_HOME": "/s"}).state_dir == Path("/s/baton")
    assert surroundings({"HOME": "/home/u", "XDG_STATE_HOME": "relative"}).state_dir == Path(
        "/home/u/.local/state/baton"
    )


def test_the_printed_lines_are_complete() -> None:
    open_fleet = Greeting(model="m", api_url="http://h/v1", run_dir="/r", needs_key=False)
    assert "Authorization" not in open_fleet.curl_line()
    compile("\n".join(open_fleet.sdk_lines()), "sdk", "exec")
    assert len(open_fleet.sdk_lines()) == 4
    locked = Greeting(model="m", api_url="http://h/v1", run_dir="/r", needs_key=True, new_key="bt-1")
    assert '-H "Authorization: Bearer bt-1"' in locked.curl_line()
    assert 'api_key="bt-1"' in locked.sdk_lines()[1]
