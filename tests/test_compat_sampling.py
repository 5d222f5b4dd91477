"""``mamba_ssm.utils.generation``: one draw, and the filters that write into logits."""

import pytest
import torch

from dualform.compat.sampling import (
    modify_logit_for_repetition_penalty,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
)
from dualform.core.errors import ArgumentError

INF = torch.inf
LOGITS = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).log()


@pytest.mark.parametrize(
    ("modify", "value", "kept"),
    [
        (modify_logits_for_top_k_filtering, 1, [[1, 0, 0], [0, 0, 1]]),
        (modify_logits_for_top_k_filtering, 2, [[1, 1, 0], [1, 1, 1]]),  # equal ones stay, as upstream
        (modify_logits_for_top_p_filtering, 0.6, [[1, 1, 0], [0, 0, 1]]),
        (modify_logits_for_top_p_filtering, 0.0, [[1, 1, 1], [1, 1, 1]]),
        (modify_logits_for_top_p_filtering, 1.0, [[1, 1, 1], [1, 1, 1]]),
        (modify_logits_for_min_p_filtering, 0.0, [[1, 1, 1], [1, 1, 1]]),
        (modify_logits_for_min_p_filtering, 1.0, [[1, 1, 1], [1, 1, 1]]),
    ],
)
def test_filters_write_in_place(modify, value, kept):
    logits = LOGITS.clone()
    assert modify(logits, value) is None
    torch.testing.assert_close(logits, torch.where(torch.tensor(kept) == 1, LOGITS, -INF))


def test_the_bound_of_min_p_is_a_logit():
    logits = torch.tensor([[0.1, 0.4, 2.0]])
    modify_logits_for_min_p_filtering(logits, 0.3)
    assert logits.tolist() == [[-INF, pytest.approx(0.4), 2.0]]


def test_the_penalty_is_returned_and_written():
    logits = torch.tensor([[1.0, -1.0, 3.0]])
    found = modify_logit_for_repetition_penalty(logits, torch.tensor([[0, 1, 1]]), 2.0)
    assert found is logits and logits.tolist() == [[0.5, -2.0, 3.0]]
    assert modify_logit_for_repetition_penalty(logits, torch.tensor([[2]])) is logits and logits[0, 2] == 3.0


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, {0}),
        ({"top_k": 2}, {0, 1}),
        ({"top_k": 0}, {0, 1, 2}),
        ({"top_k": 0, "top_p": 0.4}, {0}),
        ({"top_k": 3, "top_p": 0.6}, {0, 1}),
        ({"top_k": 0, "min_p": 0.5}, {0, 1}),
        ({"top_k": 0, "temperature": 1e-3}, {0}),
    ],
)
def test_what_is_drawn(options, allowed):
    torch.manual_seed(0)
    logits = LOGITS[:1].repeat(60, 1)
    drawn = sample(logits, **options)
    assert drawn.shape == (60,) and set(drawn.tolist()) == allowed
    assert torch.equal(logits, LOGITS[:1].repeat(60, 1))


@pytest.mark.parametrize("options", [{"top_p": 2.0}, {"top_k": -1}, {"temperature": 0.0}, {"min_p": -0.1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ArgumentError, match=r"^sample: "):
        sample(LOGITS, **options)
    with pytest.raises(ArgumentError, match=r"sample: logits has shape \(3,\)"):
        sample(LOGITS[0])
