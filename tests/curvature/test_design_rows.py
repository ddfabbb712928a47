"""What must be right, or raise: every row, and the tests that hold it.

The rows are those of the specification of curvature: losses, layers, batches and side effects. A test is named by its
file (below ``tests/``) and function; one that is renamed or removed fails here, so that no row is left without one.
"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from tests.curvature import cases

TESTS = Path(__file__).parent.parent

DIAGONALS = "curvature/test_exact_diagonals.py"
KRONECKER = "curvature/kronecker"
LOSSES = f"{KRONECKER}/test_losses.py"
EXACT = f"{KRONECKER}/test_exact.py"
ROWS = f"{KRONECKER}/test_layer_rows.py"
STRUCTURE = f"{KRONECKER}/test_structure.py"
ATTENTION = f"{KRONECKER}/test_attention.py"
TRANSFORMERS = f"{KRONECKER}/test_transformers.py"
TRAINING = f"{KRONECKER}/test_training.py"
SAMPLES = f"{KRONECKER}/test_sample_rows.py"
REST = f"{KRONECKER}/test_diagonal_part.py"
BAD = "curvature/test_bad_input.py"
EXACT_GN = f"{DIAGONALS}::test_gauss_newton_diagonal_is_exact"
EXACT_EF = f"{DIAGONALS}::test_per_sample_empirical_fisher_equals_the_loop_over_samples"
LITERAL = f"{LOSSES}::test_type_2_equals_the_literal_formula"
GEOMETRY = f"{ROWS}::test_convolutions"
HESSIAN = "curvature/matrix_free/test_hessian.py"
LAWS = "laws/test_estimator_conformance.py"

#: Row: (what the parametrised tests call it in ``cases.py`` or beside themselves, the tests).
TABLE: dict[str, tuple[str, ...]] = {
    # losses
    "mean reduction": (LITERAL, EXACT_GN, EXACT_EF),
    "sum reduction": (LITERAL, EXACT_GN, EXACT_EF),
    "class weights": (
        LITERAL,
        f"{EXACT}::test_weights_of_samples_enter_both_factors",
        f"{TRANSFORMERS}::test_masked_labels_and_class_weights_enter_every_layer",
    ),
    "ignore_index": (
        LITERAL,
        f"{LOSSES}::test_masked_samples_count_as_removed",
        f"{TRANSFORMERS}::test_a_masked_sample_counts_as_removed_and_a_weight_of_two_as_two_samples",
    ),
    "label smoothing": (LITERAL, EXACT_GN),
    "padding masks": (f"{LOSSES}::test_padding_mask_of_a_sequence_counts_tokens_as_removed", EXACT_GN),
    "sequence outputs": (
        f"{EXACT}::test_expand_is_exact_for_a_loss_at_every_position_of_a_linear_network",
        f"{LOSSES}::test_class_axis_in_the_second_place",
        f"{SAMPLES}::test_flattened_outputs_of_positions_that_mix_are_refused",
    ),
    "regression": (f"{EXACT}::test_kfac_equals_gauss_newton_for_deep_linear_network", EXACT_GN),
    "binary": (f"{LOSSES}::test_binary_cross_entropy_and_squares_equal_the_literal_formula", EXACT_GN),
    "custom losses": (
        f"{EXACT}::test_custom_loss_of_no_likelihood_is_exact_for_one_sample",
        f"{LOSSES}::test_huber_loss_is_exact_by_elements",
        f"{BAD}::test_every_estimator_answers_or_refuses",
    ),
    # layers
    "Linear": (f"{ROWS}::test_linear_with_many_axes_and_without_any", EXACT_GN),
    "Conv1d, Conv2d, Conv3d: stride, padding, dilation, groups, padding modes": (
        GEOMETRY,
        f"{ROWS}::test_even_kernel_with_same_padding_pads_unevenly",
        f"{EXACT}::test_reduce_is_exact_for_the_mean_over_pixels_of_convolutions",
        f"{EXACT}::test_expand_is_exact_for_a_loss_at_every_pixel_of_a_convolution",
        EXACT_GN,
    ),
    "ConvTranspose": (
        f"{ROWS}::test_transposed_convolutions",
        f"{ROWS}::test_transposed_convolution_with_output_size",
        f"{EXACT}::test_expand_is_exact_for_a_transposed_convolution",
    ),
    "Embedding": (
        f"{ROWS}::test_embedding",
        f"{SAMPLES}::test_positions_looked_up_once_are_those_of_every_sample",
        EXACT_GN,
    ),
    "Layer, RMS, Group and BatchNorm": (
        f"{REST}::test_norm_layers_have_their_exact_diagonal",
        f"{REST}::test_batch_norm_in_training_mode_is_refused",
        f"{SAMPLES}::test_norm_of_positions_first_has_its_exact_diagonal",
    ),
    "MultiheadAttention": (
        f"{ATTENTION}::test_every_call_has_the_blocks_of_attention_written_out",
        f"{ATTENTION}::test_projections_of_other_dimensions_are_a_block_each_and_their_packed_bias_another",
        f"{ATTENTION}::test_parts_that_are_frozen",
        f"{ATTENTION}::test_frozen_attention_on_the_fast_path_leaves_the_rest_exact",
        f"{ATTENTION}::test_unbatched_attention",
    ),
    "Transformer layers, in training and in evaluation": (
        f"{ATTENTION}::test_transformer_layers",
        f"{ATTENTION}::test_encoder_whose_first_layers_are_frozen",
    ),
    "weights tied": (
        f"{STRUCTURE}::test_calls_and_tied_weights_are_positions_that_sum",
        f"{KRONECKER}/test_tied.py::test_the_block_is_the_nearest_product_to_the_sum_of_both_uses",
        f"{KRONECKER}/test_tied.py::test_ekfac_measures_both_uses_with_their_cross_terms",
        f"{KRONECKER}/test_tied.py::test_a_tied_block_may_be_further_from_gauss_newton_than_the_diagonal",
    ),
    "a module called twice": (
        f"{STRUCTURE}::test_calls_and_tied_weights_are_positions_that_sum",
        f"{STRUCTURE}::test_reduce_adds_the_calls_of_a_module",
        f"{ROWS}::test_attention_called_twice_keeps_its_calls_apart",
    ),
    "frozen parameters": (f"{EXACT}::test_frozen_weight_or_bias_leaves_the_other_alone", EXACT_GN),
    "in-place activations": (f"{ROWS}::test_in_place_activation_on_a_view_of_the_output", EXACT_GN),
    "activation checkpointing": (
        f"{STRUCTURE}::test_activation_checkpointing",
        f"{HESSIAN}::test_checkpointed_activations_are_run_again_at_the_observed_parameters",
    ),
    "no rule: the diagonal, said once": (
        f"{REST}::test_what_no_rule_covers_has_its_exact_diagonal_and_is_said_once",
        f"{BAD}::test_a_layer_without_a_rule_has_the_exact_diagonal_and_is_named_once",
        f"{REST}::test_fallback_follows_the_kind_of_fisher",
    ),
    "rows that are not the samples'": (
        f"{SAMPLES}::test_the_samples_may_be_the_second_axis_of_a_layers_positions",
        f"{SAMPLES}::test_rows_in_another_order_are_refused_where_samples_are_told_apart",
        f"{SAMPLES}::test_rows_that_all_samples_share_are_refused_and_may_be_excluded",
        f"{SAMPLES}::test_any_two_samples_that_meet_are_found",
    ),
    "autocast": (
        f"{TRAINING}::test_autocast_changes_curvature_by_its_rounding_alone",
        "optimizers/test_mixed_precision.py::test_autocast_bfloat16_trains_with_float32_state",
    ),
    # batches
    "uneven last batch, any split": (
        f"{STRUCTURE}::test_any_split_of_the_data_gives_the_same",
        f"{DIAGONALS}::test_a_split_batch_gives_the_same_diagonal",
        f"{HESSIAN}::test_split_with_uneven_last_part_equals_one_batch",
    ),
    "accumulation over micro-batches": (
        "optimizers/test_accumulation.py::test_micro_batches_equal_one_batch",
        f"{STRUCTURE}::test_micro_batches_of_one_step_add_up_to_the_large_batch",
        f"{KRONECKER}/test_ekfac.py::test_micro_batches_of_the_first_step_give_the_whole_batchs_estimate",
    ),
    "any number of ranks": (
        "distributed/test_ranks.py::test_two_ranks_equal_one_process",
        "distributed/test_ranks.py::test_four_ranks_equal_one_process",
    ),
    # side effects
    ".grad, random state, requires_grad, buffers, modes": (
        "curvature/test_estimate.py::test_estimate_leaves_no_trace",
        "curvature/test_estimate.py::test_buffers_return_after_an_error_too",
        f"{STRUCTURE}::test_estimate_leaves_everything_as_it_was",
        f"{HESSIAN}::test_nothing_else_is_touched",
        f"{LAWS}::test_registered_estimator_keeps_the_law",
    ),
    "same seed, same result": (
        f"{LOSSES}::test_sampling_is_seeded_and_leaves_the_global_generator_alone",
        f"{TRAINING}::test_resume_is_bit_exact",
        "optimizers/test_state.py::test_resume_through_disk_is_bit_exact",
    ),
    "no memory growth over 1000 steps": (
        f"{STRUCTURE}::test_no_tensor_is_left_behind_over_a_thousand_steps",
        f"{KRONECKER}/test_ekfac.py::test_nothing_is_held_after_the_first_step",
        "curvature/matrix_free/test_in_an_optimizer.py::test_memory_does_not_grow_over_1000_steps",
    ),
    "a loss that changes from call to call": (
        f"{BAD}::test_a_loss_that_is_not_deterministic_is_refused_where_it_would_be_evaluated_again",
        f"{BAD}::test_a_matrix_free_step_solves_with_the_masks_of_its_own_loss",
        f"{BAD}::test_both_looks_of_ekfac_meet_the_same_masks",
        "curvature/test_estimate.py::test_dropout_draws_one_mask_a_batch_and_the_global_state_stays",
    ),
}


@cache
def functions(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("row", TABLE)
def test_every_row_has_its_tests(row: str) -> None:
    assert TABLE[row]
    for test in TABLE[row]:
        file, name = test.split("::")
        assert name in functions(TESTS / file), f"{row}: there is no {test}"


def test_the_cases_of_losses_and_layers_cover_their_rows() -> None:
    """The parametrised exact tests run over these."""
    assert set(cases.LOSSES) >= {
        "sum", "class weights", "ignore_index", "label smoothing", "sequence", "padding mask", "regression",
        "binary", "huber",
    }  # fmt: skip
    assert set(cases.LAYERS) >= {
        "linear", "conv1d", "conv2d", "conv2d, circular", "conv3d", "transposed conv", "embedding", "layer norm",
        "rms norm", "group norm", "batch norm, evaluating", "attention", "called twice", "tied", "frozen",
        "in-place activation", "checkpointed",
    }  # fmt: skip
