"""Tuning with interpreted kernels and a fake clock."""

import contextlib
import functools
import os
import random
import subprocess
import sys
import types
from typing import ClassVar

import pytest
import torch

from fused_lora import FusedLoRALinear, apply_lora, explain
from fused_lora import tune as tune_module
from fused_lora.ops import dispatch
from fused_lora.strategy import timing, tuning_cache
from fused_lora.tune import Layer, main, parse, tune, tune_model

pytest.importorskip("triton")

from fused_lora.kernels import strategies

FP32, FP16 = torch.float32, torch.float16
SMALL = Layer(80, 32, 48, 4, FP32)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSED_LORA_CACHE", str(tmp_path))
    dispatch.clear_decisions()
    yield
    monkeypatch.undo()
    dispatch.clear_decisions()


class Clock:
    """Fake times per strategy: device times that win a given share of rounds, and host times."""

    def __init__(self, host=None, **won):
        self.host, self.won, self.asked = host or {}, won, []

    def __call__(self, calls):
        self.asked.append(set(calls))
        shares = {name: self.won.get(name, 0.0) for name in calls}
        return {
            name: timing.Times(
                [1.0 if round_ < 20 * share else 2.0 + round_ for round_ in range(20)],
                [self.host.get(name, 0.0)] * 20,
            )
            for name, share in shares.items()
        }


# share of rounds in which addmm beats split, the modelled choice; the strategy kept
NOISE = [(0.0, "split"), (0.5, "split"), (0.7, "split"), (0.75, "addmm"), (1.0, "addmm")]


@pytest.mark.parametrize("case", NOISE, ids=str)
def test_a_winner_is_faster_in_three_of_four_rounds(case):
    share, expected = case
    entries = tune([SMALL], "cpu", timer=Clock(addmm=share))
    assert {call.direction: e.strategy for call, e in entries.items()} == {
        "forward": expected,
        "backward": expected,
    }


def test_the_winner_runs_from_then_on():
    layer = FusedLoRALinear(32, 48, rank=4, impl="triton")
    assert explain(layer, tokens=80).forward == "split"
    tune([SMALL], "cpu", timer=Clock(addmm=1.0))
    decision = explain(layer, tokens=80)
    assert (decision.forward, decision.backward) == ("addmm", "addmm")
    assert "tuned entry" in decision.reason


def test_the_hosts_time_decides_where_it_is_the_longer():
    """The device needs 2 to 21 s for each strategy; the host needs 30 s for the modelled one."""
    clock = Clock(host={"split": 30.0, "seeded": 28.0, "addmm": 25.0, "torch": 1.0})
    entries = tune([SMALL], "cpu", timer=clock)
    assert {entry.strategy for entry in entries.values()} == {"torch"}
    entry = next(iter(entries.values()))
    assert entry.host_microseconds == {
        "split": 30e6,
        "seeded": 28e6,
        "addmm": 25e6,
        "torch": 1e6,
    }
    assert entry.call_time("split") == 30e6
    assert entry.call_time("torch") == entry.microseconds["torch"] == 11.5e6
    in_graphs = tune([SMALL], "cpu", timer=clock, graphs=True)
    assert {entry.strategy for entry in in_graphs.values()} == {"split"}
    entry = next(iter(in_graphs.values()))
    assert entry.call_time("split") == 11.5e6
    layer = FusedLoRALinear(32, 48, rank=4, impl="triton")
    assert "in CUDA graphs" in explain(layer, tokens=80).reason


def test_a_slow_host_wins_no_round_by_chance():
    """If the host is slower for all, one host time for all rounds would let chance win them all."""

    class Noisy(Clock):
        def __call__(self, calls):
            generator = random.Random(self.seed)
            return {
                name: timing.Times([1.0] * 30, [40 + generator.gauss(0, 1) for _ in range(30)])
                for name in calls
            }

    kept = []
    for seed in range(12):
        clock = Noisy()
        clock.seed = seed
        kept += [entry.strategy for entry in tune([SMALL], "cpu", timer=clock).values()]
    assert kept.count("split") >= 22  # of 24 choices nearly all stay with the model


def test_entries_are_stored_layer_by_layer(monkeypatch):
    """Entries measured before an error are kept."""
    broken, directions = SMALL._replace(M=81), tune_module._directions

    def fail_for_the_second(layer, device):
        if layer == broken:
            raise torch.OutOfMemoryError("full")
        return directions(layer, device)

    monkeypatch.setattr(tune_module, "_directions", fail_for_the_second)
    with pytest.raises(torch.OutOfMemoryError):
        tune([SMALL, broken], "cpu", timer=Clock(addmm=1.0))
    assert explain(FusedLoRALinear(32, 48, rank=4, impl="triton"), tokens=80).forward == "addmm"


def test_a_device_that_is_not_the_current_one_is_made_so(monkeypatch):
    """Triton launches on the current device, so the given one is made current (a fake GPU here)."""
    entered, ran = [], []

    @contextlib.contextmanager
    def device(which):
        entered.append(which)
        yield
        entered.pop()

    other = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(tune_module, "_checked_device", lambda device: other)
    monkeypatch.setattr(tune_module, "_directions", lambda layer, device: ran.append(list(entered)))
    with pytest.raises(TypeError):  # the fake returns no directions
        tune([SMALL], other, timer=Clock())
    assert ran == [[other]]
    assert entered == [other]  # the error skipped the fake context's exit


def test_candidates_are_those_that_can_run():
    clock = Clock()
    tune([Layer(16, 32, 48, 4, FP32, 0.1), SMALL], "cpu", timer=clock)
    every = set(tuning_cache.STRATEGIES)
    thick = every - {"single_pass"}
    assert clock.asked == [thick, every, thick, thick]


# how a candidate fails, and what is reported
WRONG = [
    ("raises", "RuntimeError: no"),
    ("errs", "relative RMS error"),
    ("nan", "relative RMS error nan"),
]


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_a_wrong_candidate_is_not_timed(case, monkeypatch):
    how, expected = case
    forward = strategies.forward

    def broken(*args):
        if args[1] != "split":
            return forward(*args)
        if how == "raises":
            raise RuntimeError("no\ndetails")
        y, S = forward(*args)
        return (y * 1.001 if how == "errs" else y * float("nan")), S

    monkeypatch.setattr(strategies, "forward", broken)
    lines, clock = [], Clock()
    entries = tune([SMALL], "cpu", timer=clock, report=lines.append)
    assert clock.asked == [{"seeded", "addmm", "torch"}, {"split", "seeded", "addmm", "torch"}]
    assert [entry.strategy for entry in entries.values()] == ["seeded", "split"]
    assert f"split left out ({expected}" in lines[0]
    assert "details" not in lines[0]


def test_nothing_is_kept_where_nothing_is_right(monkeypatch):
    def fail(*args):
        raise RuntimeError("no")

    monkeypatch.setattr(tune_module, "run_forward", fail)
    monkeypatch.setattr(tune_module, "run_backward", fail)
    assert tune([SMALL], "cpu", timer=Clock()) == {}
    assert not tuning_cache.cache_path().exists()


@pytest.mark.parametrize(
    "layer", [Layer(70, 40, 24, 5, FP16, 0.3), Layer(300, 17, 33, 1, FP32, 0.1)], ids=str
)
def test_every_candidate_is_right_under_the_interpreter(layer):
    lines = []
    tune([layer], "cpu", timer=Clock(), report=lines.append)
    assert len(lines) == 2
    assert not any("left out" in line for line in lines)


def test_a_live_model_is_tuned_by_its_layers():
    model = torch.nn.Sequential(*(torch.nn.Linear(32, 48), torch.nn.Linear(48, 32)))
    apply_lora(model, rank=4, dropout=0.1)
    calls = tune_model(model, 80, timer=Clock())
    expected = {(80, 32, 48, 4, FP32, True), (80, 48, 32, 4, FP32, True)}
    assert {(c.M, c.K, c.N, c.R, c.dtype, c.dropped) for c in calls} == expected


def test_a_peft_model_is_tuned_by_its_layers():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["0", "1"], r=4)
    model = torch.nn.Sequential(torch.nn.Linear(32, 48), torch.nn.Linear(48, 32))
    calls = tune_model(peft.get_peft_model(model, config), 80, timer=Clock())
    assert {(c.K, c.N, c.R, c.dropped) for c in calls} == {(32, 48, 4, False), (48, 32, 4, False)}


def test_a_model_without_adapters_is_refused():
    with pytest.raises(ValueError, match="expected LoRA layers on one device, got 0"):
        tune_model(torch.nn.Linear(8, 8))


def test_shapes_by_size_and_by_model():
    assert parse("8192x4096x1024x16", 1, 1) == [(8192, 4096, 1024, 16)]
    assert (512, 14336, 4096, 8) in parse("llama3-8b", 512, 8)
    for text in ("8192x4096x1024", "8192x4096x1024x0", "8192x4096x1024x-1", "llama"):
        with pytest.raises(ValueError, match=r"expected MxKxNxR.*got"):
            parse(text, 1, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_command_without_a_gpu_says_so(capsys):
    assert main(["64x64x64x8"]) == 2
    assert "expected a GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["foo"], ["llama3-8b", "--rank", "0"], ["9x9x9x9", "--dropout", "1"]], ids=str
)
def test_the_command_refuses_what_it_cannot_tune(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert "error: expected" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FUSED_LORA_CACHE", str(tmp_path / "file" / "folder"))
    monkeypatch.setattr("fused_lora.tune._checked_device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(tune_module, "call_times", lambda calls, **options: Clock()(calls))
    assert main(["80x32x48x4", "--dtype", "float32", "--dropout", "0"]) == 1
    assert "FUSED_LORA_CACHE names another folder" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_the_command_is_a_module():
    command = [sys.executable, "-m", "fused_lora.tune", "llama3-8b"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "expected a GPU" in done.stderr


class FakeEvent:
    """An event of a clock that ticks once per entry of a log."""

    log: ClassVar[list[str]] = []

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = len(self.log)
        self.log.append("event")

    def elapsed_time(self, end):
        return float(end.at - self.at)


class FakeGraph:
    """A fake CUDA graph: it takes the calls during capture from the log and logs their replay."""

    @contextlib.contextmanager
    def capture(self):
        before = len(FakeEvent.log)
        yield
        self.calls = FakeEvent.log[before:]
        del FakeEvent.log[before:]

    def replay(self):
        FakeEvent.log.append(f"replay of {' '.join(self.calls)}")


@pytest.fixture
def fake_gpu(monkeypatch):
    """The log of operations on a fake device."""
    log, empty = FakeEvent.log, torch.empty
    log.clear()

    class Flush(torch.Tensor):
        def zero_(self):
            log.append("flush")

    monkeypatch.setattr(timing, "torch", types.SimpleNamespace(**vars(torch)))
    monkeypatch.setattr(timing.torch, "empty", lambda n, **kw: empty(1).as_subclass(Flush))
    cuda = types.SimpleNamespace(
        Event=FakeEvent,
        CUDAGraph=FakeGraph,
        graph=lambda graph, stream: graph.capture(),
        Stream=lambda device: f"a stream of {device}",
        device=contextlib.nullcontext,
        synchronize=lambda device: log.append("wait"),
        get_device_properties=lambda device: types.SimpleNamespace(L2_cache_size=50 << 20),
    )
    monkeypatch.setattr(timing.torch, "cuda", cuda)
    return log


def test_the_device_is_timed_in_interleaved_rounds_of_replays(fake_gpu):
    """The cache is overwritten before each replay, and only the replay is timed."""
    calls = {name: functools.partial(fake_gpu.append, name) for name in ("split", "addmm")}
    times = timing.device_seconds(calls, device=torch.device("cpu"), rounds=4)
    assert times == {"split": [2e-3] * 4, "addmm": [2e-3] * 4}  # two ticks: start event, replay
    warm_up, rounds = fake_gpu[:6], fake_gpu[6:-1]
    assert set(warm_up) == {"split", "addmm"}
    assert fake_gpu[-1] == "wait"
    for first in range(0, len(rounds), 8):
        both = [rounds[first : first + 4], rounds[first + 4 : first + 8]]
        assert all(part[:2] == ["flush", "event"] and part[3] == "event" for part in both)
        assert {part[2] for part in both} == {"replay of split", "replay of addmm"}


def test_the_hosts_time_is_that_of_calls_and_not_of_replays(fake_gpu, monkeypatch):
    clock = types.SimpleNamespace(perf_counter=lambda: float(len(fake_gpu)))
    monkeypatch.setattr(timing, "time", clock)
    calls = {
        "one": functools.partial(fake_gpu.append, "one"),
        "two": lambda: fake_gpu.extend(("two", "two")),
    }
    times = timing.call_times(calls, device=torch.device("cpu"), rounds=3)
    assert {name: t.host for name, t in times.items()} == {"one": [1.0] * 3, "two": [2.0] * 3}
    assert all(t.device == [2e-3] * 3 for t in times.values())
    assert times["two"].call_time() == [2.0] * 3
