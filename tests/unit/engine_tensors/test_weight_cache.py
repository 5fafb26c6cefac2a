"""Files of packed weights: one packs, all map; what is torn or foreign is made anew, and nothing is ever fatal."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.engine_driver import Driver

from engine.cpu import weight_file
from engine.cpu.packed import Packed
from engine.cpu.weight_cache import KEPT_FILES, WeightCache
from engine.load import load_model
from engine.plan import Row
from engine.weight_loader import WeightLoader
from fleet.service_settings import DecodeSettings

MATRICES = {
    "odd": Packed(
        "twelve bits", (5, 3), {"bits": torch.arange(77, dtype=torch.uint8), "exceptions": torch.empty(0).int()}
    ),
    "large": Packed("pairs", (64, 200), {"panels": torch.randn(2, 100, 32).view(torch.int32)}),
    "scaled": Packed(
        "int8", (3, 4), {"scales": torch.randn(3).bfloat16(), "numbers": torch.tensor([[-5, 7], [1, 2]]).to(torch.int8)}
    ),
}
WRITER = """
import sys
from pathlib import Path
import torch
from engine.cpu.packed import Packed
from engine.cpu.weight_cache import WeightCache

def pack():
    print("packing", flush=True)
    sys.stdin.readline()
    return Packed("pairs", (1, 1), {"panels": torch.full((9,), 7, dtype=torch.int32)})

with WeightCache(Path(sys.argv[1]), least_bytes=0).opened("model", 100) as weights:
    weights.matrix("one", pack)
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "weights"


def cache(directory: Path, **how: Any) -> WeightCache:
    return WeightCache(directory, least_bytes=0, **how)


def never() -> Packed:
    raise AssertionError("it is in the file")


def fill(directory: Path, what: str = "model") -> dict[str, Packed]:
    with cache(directory).opened(what, 100) as weights:
        return {name: weights.matrix(name, lambda packed=packed: packed) for name, packed in MATRICES.items()}  # type: ignore[misc]


def read(directory: Path, what: str = "model") -> dict[str, Packed]:
    with cache(directory).opened(what, 100) as weights:
        return {name: weights.matrix(name, never) for name in MATRICES}


def assert_all_there(found: dict[str, Packed]) -> None:
    assert found.keys() == MATRICES.keys()
    for name, packed in found.items():
        original = MATRICES[name]
        assert (packed.form, packed.shape) == (original.form, original.shape)
        assert packed.arrays.keys() == original.arrays.keys()
        for key, array in packed.arrays.items():
            assert array.dtype == original.arrays[key].dtype
            assert array.shape == original.arrays[key].shape
            assert torch.equal(array, original.arrays[key])
            assert array.data_ptr() % 64 == 0


def only_file(directory: Path) -> Path:
    (path,) = directory.iterdir()
    return path


def test_what_one_packs_another_maps(directory: Path) -> None:
    written = fill(directory)
    assert_all_there(written)
    assert only_file(directory).suffix == ".weights"
    assert directory.stat().st_mode & 0o777 == 0o700
    assert only_file(directory).stat().st_mode & 0o777 == 0o600
    assert_all_there(read(directory))
    assert_all_there(written)
    assert f"{only_file(directory)}\n" in Path("/proc/self/maps").read_text()


def test_a_name_that_the_file_lacks_is_packed(directory: Path) -> None:
    fill(directory)
    with cache(directory).opened("model", 100) as weights:
        assert weights.matrix("other", lambda: MATRICES["odd"]) is MATRICES["odd"]


def test_other_weights_are_another_file(directory: Path) -> None:
    fill(directory)
    fill(directory, "model changed")
    assert len(list(directory.iterdir())) == 2
    assert_all_there(read(directory, "model"))


def test_a_small_model_needs_no_file(directory: Path) -> None:
    with WeightCache(directory).opened("model", 2**20) as weights:
        assert weights.matrix("odd", lambda: MATRICES["odd"]) is MATRICES["odd"]
    assert not directory.exists()


def test_a_model_that_does_not_load_leaves_nothing(directory: Path) -> None:
    with pytest.raises(ValueError, match="no such tensor"), cache(directory).opened("model", 100) as weights:  # noqa: PT012
        weights.matrix("odd", lambda: MATRICES["odd"])
        raise ValueError("no such tensor")
    assert not list(directory.iterdir())


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 4096)


def cut_to_nothing(path: Path) -> None:
    os.truncate(path, 10)


def change(at: int) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)

    return edit


def open_to_all(path: Path) -> None:
    path.chmod(0o666)


def rename_another(path: Path) -> None:
    fill(path.parent, "another model")
    (other,) = set(path.parent.iterdir()) - {path}
    other.replace(path)


def link_elsewhere(path: Path) -> None:
    real = path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(real)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (cut, "cut short"),
        (cut_to_nothing, "cut short"),
        (change(3), "matrix odd is damaged"),
        (change(4096 + 5000), "matrix large is damaged"),
        (change(-100), "directory is damaged"),
        (change(-64), "another format"),
        (open_to_all, "only this user"),
        (rename_another, "other weights"),
    ],
)
def test_a_file_that_is_not_right_is_made_anew(
    directory: Path, spoil: Callable[[Path], None], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    fill(directory)
    spoil(only_file(directory))
    capfd.readouterr()
    assert_all_there(fill(directory))
    assert reason in "".join(capfd.readouterr())
    assert_all_there(read(directory))


def test_a_link_is_not_followed(directory: Path) -> None:
    fill(directory)
    link_elsewhere(only_file(directory))
    with cache(directory).opened("model", 100) as weights:
        assert weights.matrix("odd", lambda: MATRICES["odd"]) is MATRICES["odd"]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_full_disk_costs_only_the_sharing(
    directory: Path, failing: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    calls = iter(range(100))

    def allocate(*_: int) -> None:
        if next(calls) >= failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weight_file.os, "posix_fallocate", allocate)
    assert_all_there(fill(directory))
    assert not list(directory.iterdir())
    assert "".join(capfd.readouterr()).count("No space left on device") == 1


def test_matrices_beyond_the_room_for_them_stay_in_own_memory(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weight_file, "_ROOM", 4096)
    assert_all_there(fill(directory))
    assert not list(directory.iterdir())
    assert "larger than room was made for" in "".join(capfd.readouterr())


@pytest.mark.parametrize("mode", [0o777, 0o755, None])
def test_a_directory_that_others_could_write_to_is_not_used(directory: Path, mode: int | None) -> None:
    directory.parent.mkdir()
    if mode is None:
        directory.write_text("a file")
    else:
        directory.mkdir()
        directory.chmod(mode)
    assert_all_there(fill(directory))
    assert directory.is_file() or len(list(directory.iterdir())) == (mode == 0o755)


@contextmanager
def writer(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is packing until it gets a line."""
    command = [sys.executable, "-c", WRITER, str(directory)]
    root = Path(__file__).parents[3]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while process.stdout.readline() != "packing\n":
            assert process.poll() is None
        yield process
        process.kill()


@contextmanager
def opened_beside(directory: Path) -> Iterator[list[Packed]]:
    """Ask for the matrix in a thread; begins when that waits, ends when it has got it. It packs nines itself."""
    waits = threading.Event()
    got: list[Packed] = []

    def ask() -> None:
        with cache(directory).opened("model", 100, meanwhile=waits.set) as weights:
            own = Packed("pairs", (1, 1), {"panels": torch.full((9,), 9, dtype=torch.int32)})
            got.append(weights.matrix("one", lambda: own))

    thread = threading.Thread(target=ask)
    thread.start()
    assert waits.wait(30)
    yield got
    thread.join(30)
    assert not thread.is_alive()


def test_two_at_once_pack_once(directory: Path) -> None:
    with writer(directory) as process, opened_beside(directory) as got:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        process.wait(30)
    assert got[0].arrays["panels"].tolist() == [7] * 9
    assert len(list(directory.iterdir())) == 1


def test_when_the_writer_is_killed_the_next_one_writes(directory: Path) -> None:
    with writer(directory) as process, opened_beside(directory) as got:
        process.kill()
    assert got[0].arrays["panels"].tolist() == [9] * 9
    with cache(directory).opened("model", 100, meanwhile=never) as weights:
        assert weights.matrix("one", never).arrays["panels"].tolist() == [9] * 9
    assert only_file(directory).suffix == ".weights"


def test_a_writer_that_does_not_write_is_not_waited_for(directory: Path) -> None:
    with writer(directory), cache(directory, silence_s=0.1).opened("model", 100) as weights:
        assert weights.matrix("odd", lambda: MATRICES["odd"]) is MATRICES["odd"]


def test_unused_files_go_least_recently_used_first(directory: Path) -> None:
    used = fill(directory, "0")
    oldest = only_file(directory)
    for name in range(1, KEPT_FILES):
        fill(directory, str(name))
    os.utime(oldest, (0, 0))
    (directory / "dead.partial").touch()
    fill(directory, "one more")
    paths = list(directory.iterdir())
    assert len(paths) == KEPT_FILES + 1  # the dead one is gone, and the oldest is mapped by us
    assert_all_there(used)
    used.clear()
    fill(directory, "another")
    kept = set(paths) & set(directory.iterdir())
    assert len(kept) == KEPT_FILES - 1
    assert oldest not in kept
    assert max(paths, key=lambda path: path.stat().st_mtime_ns if path.exists() else 0) in kept


@pytest.mark.usefixtures("own_products")
@pytest.mark.parametrize("variant", ["qwen3", "llama"])
def test_a_model_from_the_file_is_the_model(
    directory: Path, checkpoint: Callable[[str], Path], variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def logits(**how: Any) -> torch.Tensor:
        driver = Driver(checkpoint(variant), dtype="bfloat16", **how)
        sizes.append(driver.model.weight_bytes)
        return driver.logits([Row(driver.admit(range(3, 40)), 0, 37, sample=True)])

    sizes: list[int] = []
    private = logits()
    assert torch.equal(logits(weight_cache=cache(directory)), private)
    monkeypatch.setattr(WeightLoader, "_matrix", lambda *_: pytest.fail("the checkpoint is read though all is packed"))
    assert torch.equal(logits(weight_cache=cache(directory)), private)
    assert len(set(sizes)) == 1
    assert len(list(directory.iterdir())) == 1


@pytest.mark.usefixtures("own_products")
def test_a_changed_checkpoint_or_other_numbers_are_another_file(directory: Path, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "qwen3")
    weights = model / "model.safetensors"

    def num_files(**how: Any) -> int:
        load_model(model, "bfloat16", weight_cache=cache(directory), **how)
        return len(list(directory.iterdir()))

    assert num_files() == num_files() == 1
    assert num_files(quantization="fp8") == 2
    assert num_files(kv_cache_dtype="fp8_e4m3") == 3
    shutil.rmtree(directory)
    assert num_files() == 1
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 1  # in no row that the fingerprint samples, or in one
    weights.write_bytes(content)
    assert num_files() == 2


def test_the_setting_names_a_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert DecodeSettings().weight_directory == Path("/somewhere/baton/weights")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert DecodeSettings().weight_directory == Path.home() / ".cache/baton/weights"
    assert DecodeSettings(weight_cache="off").weight_directory is None
    assert DecodeSettings(weight_cache="~/w").weight_directory == Path.home() / "w"
