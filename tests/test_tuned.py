"""The tuning cache: its location, what it accepts, and how dispatch uses it."""

import json
import multiprocessing
import os
import warnings

import pytest
import torch

from fused_lora import FusedLoRALinear, explain, fused_lora_add, fused_lora_linear
from fused_lora.ops import dispatch
from fused_lora.strategy import tuning_cache
from fused_lora.strategy.tuning_cache import Call, Entry
from support import make_inputs

pytest.importorskip("triton")

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32
CALL = Call("forward", FP32, 1000, 64, 48, 4, False)
ENTRY = Entry("addmm", {"split": 12.5, "addmm": 10.0}, {"split": 6.0, "addmm": 7.0})


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_LORA_CACHE", str(tmp_path))
    forget()
    yield
    monkeypatch.undo()
    forget()


def forget():
    dispatch.clear_decisions()
    tuning_cache._warn.cache_clear()


def warnings_of(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [str(w.message) for w in caught]


def test_the_file_is_where_the_environment_says(monkeypatch):
    monkeypatch.setenv("FUSED_LORA_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert tuning_cache.cache_path().as_posix() == "/a/tuned.json"
    monkeypatch.delenv("FUSED_LORA_CACHE")
    assert tuning_cache.cache_path().as_posix() == "/b/fused_lora/tuned.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert tuning_cache.cache_path().as_posix() == "/c/.cache/fused_lora/tuned.json"


def test_what_was_stored_is_found():
    assert tuning_cache.lookup(CALL, CPU) is None
    path = tuning_cache.store({CALL: ENTRY}, CPU)
    assert path == tuning_cache.cache_path()
    assert tuning_cache.lookup(CALL, CPU) == ENTRY
    assert [p.name for p in path.parent.iterdir() if p.suffix == ".json"] == ["tuned.json"]
    other = Call("backward", FP32, 1000, 64, 48, 4, False)
    tuning_cache.store({other: ENTRY}, CPU)
    assert tuning_cache.lookup(CALL, CPU) == tuning_cache.lookup(other, CPU) == ENTRY


# what differs, and whether the entry still holds
RELATED = [
    ({"M": 513}, True),
    ({"M": 1024}, True),
    ({"M": 512}, False),
    ({"M": 1025}, False),
    ({"direction": "backward"}, False),
    ({"dtype": BF16}, False),
    ({"K": 65}, False),
    ({"N": 49}, False),
    ({"R": 5}, False),
    ({"dropped": True}, False),
    ({"aligned": False}, False),
]


@pytest.mark.parametrize("case", RELATED, ids=str)
def test_an_entry_holds_for_its_key_alone(case):
    changes, holds = case
    tuning_cache.store({CALL: ENTRY}, CPU)
    call = Call(**{**vars(CALL), **changes})
    assert (tuning_cache.lookup(call, CPU) == ENTRY) == holds


def test_a_strategy_that_cannot_run_the_call_is_not_taken():
    """A file can name any strategy for any key."""
    entry = Entry("single_pass", {"single_pass": 1.0}, {"single_pass": 1.0})
    few, many = Call("forward", FP32, 64, 64, 48, 4, False), CALL
    tuning_cache.store({few: entry, many: entry}, CPU)
    assert tuning_cache.lookup(few, CPU) == entry
    assert tuning_cache.lookup(many, CPU) is None


def file_with(entry) -> str:
    environments = {tuning_cache.environment(CPU): {CALL.key: entry}}
    return json.dumps({"format": tuning_cache.FORMAT, "environments": environments})


GOOD = {
    "strategy": "addmm",
    "microseconds": {"addmm": 1.0},
    "host_microseconds": {"addmm": 2.0},
    "graphs": False,
}
# name, the file
DAMAGED = [
    ("empty", ""),
    ("cut off", file_with(GOOD)[:-3]),
    ("a list", "[]"),
    ("no format", '{"environments": {}}'),
    ("an older format", '{"format": 1, "environments": {}}'),
    ("another format", '{"format": 3, "environments": {}}'),
    ("no environments", '{"format": 2}'),
    ("environments of another type", '{"format": 2, "environments": [1]}'),
    ("an environment of another type", '{"format": 2, "environments": {"a": "b"}}'),
    ("an entry of another type", file_with("addmm")),
    ("an unknown strategy", file_with(GOOD | {"strategy": "os.system"})),
    ("a list for a strategy", file_with(GOOD | {"strategy": ["addmm"]})),
    ("no times", file_with({"strategy": "addmm"})),
    ("no host times", file_with(GOOD | {"host_microseconds": None})),
    ("a text for graphs", file_with(GOOD | {"graphs": "yes"})),
    ("host times of another strategy", file_with(GOOD | {"host_microseconds": {"split": 1.0}})),
    ("a text for a time", file_with(GOOD | {"microseconds": {"addmm": "1"}})),
    ("an infinite time", file_with(GOOD | {"microseconds": {"addmm": float("inf")}})),
    ("deep", "[" * 100_000),
    ("a huge number", '{"format": 2' + "0" * 10_000 + "}"),
    ("huge", " " * (tuning_cache._MOST_BYTES + 1)),
    ("no text", b"\xff\xfe\x00\x01"),
]


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: case[0])
def test_a_damaged_file_is_ignored_with_one_warning(case):
    content = case[1] if isinstance(case[1], bytes) else case[1].encode()
    tuning_cache.cache_path().write_bytes(content)

    def decide():
        dispatch.clear_decisions()
        return [fused_lora_linear(**make_inputs(M, 64, 48, 4, FP32), impl="triton") for M in (2, 3)]

    _, said = warnings_of(lambda: [decide(), decide()])
    assert len(said) == 1
    assert str(tuning_cache.cache_path()) in said[0]
    assert len(said[0]) < 400
    tuning_cache.store({CALL: ENTRY}, CPU)  # replaces the damaged file
    assert tuning_cache.lookup(CALL, CPU) == ENTRY


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_in_its_place_blocks_nobody():
    os.mkfifo(tuning_cache.cache_path())
    entry, said = warnings_of(lambda: tuning_cache.lookup(CALL, CPU))
    assert entry is None
    assert "regular file" in said[0]


def test_entries_of_other_versions_are_ignored_with_one_warning():
    ours = tuning_cache.environment(CPU)
    older = ours.replace("torch ", "torch 1.")
    content = {
        "format": tuning_cache.FORMAT,
        "environments": {older: {CALL.key: GOOD}, "another GPU": {}},
    }
    tuning_cache.cache_path().write_text(json.dumps(content))
    found, said = warnings_of(lambda: [tuning_cache.lookup(CALL, CPU) for _ in range(2)])
    assert found == [None, None]
    assert len(said) == 1
    assert ours in said[0]
    assert older in said[0]
    tuning_cache.store({CALL: ENTRY}, CPU)
    kept = json.loads(tuning_cache.cache_path().read_text())["environments"]
    assert set(kept) == {ours, older, "another GPU"}


def _store(n: int) -> None:
    for M in (8, 16, 32):
        tuning_cache.store({Call("forward", FP32, M, 64, 48, n, False): ENTRY}, CPU)


def test_writers_at_one_time_lose_nothing():
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_store, args=(n,)) for n in range(1, 5)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    (entries,) = json.loads(tuning_cache.cache_path().read_text())["environments"].values()
    assert len(entries) == 12


def test_dispatch_asks_the_tuned_entry_before_the_model():
    layer = FusedLoRALinear(64, 48, rank=4, impl="triton")
    assert explain(layer, tokens=1000).forward == "split"
    tuning_cache.store({CALL: ENTRY}, CPU)
    dispatch.clear_decisions()
    decision = explain(layer, tokens=1000)
    assert (decision.forward, decision.backward) == ("addmm", "split")
    assert (
        f"tuned entry {CALL.key!r}: addmm chosen from split 12.5 µs (host 6.0), addmm"
        in decision.reason
    )
    explicit = explain(layer, tokens=1000, impl="triton:split")
    assert (explicit.forward, explicit.reason) == ("split", "requested")


def test_the_file_is_read_once(monkeypatch):
    tuning_cache.store({CALL: ENTRY}, CPU)
    reads, read = [], tuning_cache._read
    monkeypatch.setattr(tuning_cache, "_read", lambda path: reads.append(path) or read(path))
    for M in (5, 6, 7):
        fused_lora_linear(**make_inputs(M, 64, 48, 4, FP32), impl="triton")
    assert len(reads) == 1


def test_the_kernels_asked_for_run_the_best_of_theirs_where_pytorch_won():
    """``impl="triton"`` always runs kernels; ``impl="auto"`` runs whatever was fastest."""
    entry = Entry(
        "torch",
        {"torch": 5.0, "split": 9.0, "addmm": 8.0},
        {"torch": 5.0, "split": 6.0, "addmm": 10.0},
    )
    tuning_cache.store({CALL: entry}, CPU)
    assert entry.best(CALL.strategies) == "torch"
    decision = explain(FusedLoRALinear(64, 48, rank=4, impl="triton"), tokens=1000)
    assert decision.forward == "split"  # 9 µs; addmm needs 10 µs on the host
    assert "; split is the fastest kernel strategy" in decision.reason
    assert entry.best({"single_pass"}) is None


@pytest.mark.parametrize("strategy", tuning_cache.KERNEL_STRATEGIES)
def test_a_strategy_asked_for_is_the_one_that_runs(strategy, monkeypatch):
    from fused_lora.kernels import strategies

    ran, forward, backward = [], strategies.forward, strategies.backward
    monkeypatch.setattr(strategies, "forward", lambda *a: ran.append(a[1]) or forward(*a))
    monkeypatch.setattr(strategies, "backward", lambda *a: ran.append(a[1]) or backward(*a))
    inputs = make_inputs(5, 64, 48, 4, FP32)
    inputs["x"].requires_grad_()
    fused_lora_linear(**inputs, impl=f"triton:{strategy}").sum().backward()
    assert ran == [strategy, strategy]


def test_beside_a_base_there_is_no_strategy_to_refuse():
    inputs = make_inputs(65, 64, 48, 4, FP32)
    base = torch.randn(65, 48)
    x, A, B = (inputs[name] for name in ("x", "lora_A", "lora_B"))
    got = fused_lora_add(base, x, A, B, impl="triton:single_pass")
    torch.testing.assert_close(got, fused_lora_add(base, x, A, B, impl="triton"))


def test_a_strategy_that_cannot_run_is_an_error():
    inputs = make_inputs(65, 64, 48, 4, FP32)
    with pytest.raises(
        ValueError, match="expected split or seeded or addmm for forward float32 M128"
    ):
        fused_lora_linear(**inputs, impl="triton:single_pass")
