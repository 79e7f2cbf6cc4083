"""The two tiers of the suite: what runs by default, and what carries the marker ``sweep``."""

from pathlib import Path

import pytest

from support import by_default

ROOT = Path(__file__).parents[1]

# Test functions with no case in the default run: why, and which default test covers for each.
SWEPT_WHOLE = {
    "test_compile.py::test_a_slice_of_the_shipped_tiles_compiles_clean": (
        "minutes; test_a_report_continues_from_its_rows compiles the tiles of one kernel"
    ),
    "test_compile.py::test_planted_faults_are_found": (
        "ten kernels for four GPUs; test_a_report_continues_from_its_rows compiles those of one"
    ),
    "test_distributed.py::test_every_check": (
        "seven processes; test_some_checks_of_each_module runs some checks of each, and loads a"
        " saved state in as many processes as saved it"
    ),
    "test_examples.py::test_adapters": (
        "trains four kinds of adapter; test_peft_one_liner trains the same pretrained model"
    ),
    "test_examples.py::test_distributed": (
        "two processes each; test_some_checks_of_each_module trains under DDP and FSDP as well"
    ),
    "test_examples.py::test_sms_spam": (
        "builds GPT-2; test_a_gpt2_checkpoint_is_split_and_used builds a small one"
    ),
    "test_fusion.py::test_compiled_models_run_layers_alone": (
        "compiles a Llama; test_compiled of test_projections.py compiles the functions"
    ),
    "test_reports_unused.py::test_compiled_blocks_that_also_read_weights_are_merged": (
        "compiles a Mamba; test_compiled_blocks_without_gradients_raise_no_alarm compiles blocks"
    ),
    "test_torch_compile.py::test_imported_anew": (
        "a process of its own; test_whole_models_are_one_graph compiles in this one"
    ),
    "test_torch_compile.py::test_new_scales_of_a_patched_layer_are_one_more_graph": (
        "compiles a layer of PEFT; test_a_new_scale_is_no_new_graph has this library's"
    ),
    "test_reports_no_effect.py::test_the_warning_of_a_merged_state_is_the_callers": (
        "a process of its own; test_a_warning_from_within_a_library_is_its_callers has each library"
    ),
    "test_gpu_acceptance_command.py::test_a_step_that_dies_costs_itself_alone": (
        "a whole run; test_killed_half_way_it_leaves_what_it_has kills one, too"
    ),
    "test_gpu_acceptance_command.py::test_a_step_that_hangs_costs_itself_alone": (
        "waits for a limit of seconds; test_killed_half_way_it_leaves_what_it_has ends a step"
    ),
    "test_gpu_acceptance.py::test_a_failing_test_is_a_row_of_its_own": (
        "runs tests in a process; test_numerics_that_select_nothing_fail reads such a process, too"
    ),
    "test_gpu_acceptance_command.py::test_it_runs_from_a_bare_checkout": (
        "a whole process; test_without_a_gpu_nothing_runs starts the same step"
    ),
    "test_launch.py::test_the_benchmark_of_host_time_prints_both_tables": (
        "a benchmark of seconds; test_suites_run runs the other benchmarks of host time"
    ),
    "test_launch.py::test_the_real_launcher_gets_the_same_bytes": (
        "needs gcc; test_the_driver_gets_the_same_binary_and_arguments compares the same launches"
    ),
}


def test_every_test_function_has_a_case_that_runs_by_default(swept_cases):
    collected = {name.partition("::")[0] for name in swept_cases}
    if absent := {path.name for path in ROOT.glob("tests/test_*.py")} - collected:
        pytest.skip(f"needs all test files collected (pytest without arguments), missing {absent}")
    assert {name for name, swept in swept_cases.items() if all(swept)} == SWEPT_WHOLE.keys()


def test_the_sweep_is_left_out_by_default_and_runs_in_ci(pytestconfig):
    options = pytestconfig.getini("addopts")
    assert options[options.index("-m") + 1] == "not sweep"
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if "pytest" in line and "-m sweep" in line]


def test_a_case_that_is_to_run_by_default_must_be_there():
    one, two = by_default(["b"], ["a", "b"])
    assert [mark.name for mark in one.marks] == ["sweep"]
    assert two == "b"
    with pytest.raises(AssertionError):
        by_default(["c"], ["a", "b"])
