"""Masked mean, variance and whitening, against numpy on the selected values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from appo.functional import masked_mean, masked_var, masked_whiten

VALUES = st.lists(st.tuples(st.floats(-100, 100), st.booleans()), min_size=1, max_size=20)


def build(pairs: list[tuple[float, bool]], filler: float) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    mask = torch.tensor([[keep for _, keep in pairs]])
    x = torch.tensor([[value if keep else filler for value, keep in pairs]], dtype=torch.float64)
    return x, mask, x[mask].numpy()


@pytest.mark.parametrize("filler", [1e6, math.nan, math.inf])
@settings(deadline=None)
@given(pairs=VALUES)
def test_mean_and_variance_are_those_of_the_selected_values(filler: float, pairs: list[tuple[float, bool]]) -> None:
    x, mask, selected = build(pairs, filler)
    n = len(selected)
    assert_close(masked_mean(x, mask).item(), selected.mean() if n else 0.0, rtol=1e-9, atol=1e-9)
    assert_close(masked_var(x, mask).item(), selected.var(ddof=1) if n > 1 else 0.0, rtol=1e-9, atol=1e-9)
    assert_close(masked_var(x, mask, unbiased=False).item(), selected.var() if n else 0.0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("filler", [1e6, math.nan, math.inf])
@settings(deadline=None)
@given(pairs=VALUES)
def test_whitened_values_are_centred_and_scaled(filler: float, pairs: list[tuple[float, bool]]) -> None:
    x, mask, selected = build(pairs, filler)
    whitened = masked_whiten(x, mask)
    if len(selected) > 1:
        expected = (selected - selected.mean()) / np.sqrt(selected.var(ddof=1) + 1e-8)
        assert_close(whitened[mask], torch.from_numpy(expected), rtol=1e-7, atol=1e-7)
    assert (whitened[~mask] == 0).all()


def test_mean_along_a_dimension_is_zero_where_nothing_is_selected() -> None:
    x = torch.tensor([[1.0, 3.0], [5.0, 7.0]])
    assert masked_mean(x, torch.tensor([[1, 1], [0, 0]]), dim=1).tolist() == [2.0, 0.0]


def test_a_single_value_whitens_to_zero() -> None:
    assert masked_whiten(torch.tensor([[5.0, 9.0]]), torch.tensor([[1, 0]])).tolist() == [[0.0, 0.0]]


def test_gradient_of_the_mean_does_not_reach_under_the_mask() -> None:
    x = torch.tensor([1.0, math.nan], requires_grad=True)
    masked_mean(x, torch.tensor([1, 0])).backward()
    assert x.grad.tolist() == [1.0, 0.0]
