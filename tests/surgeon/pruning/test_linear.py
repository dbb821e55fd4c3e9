import torch

from surgeon.pruning.linear import PrunedLinear


def test_everything_lives_in_a_dense_linear() -> None:
    linear = PrunedLinear.dense(torch.ones(2, 3), torch.ones(2))
    assert linear.live_rows.tolist() == [True] * 2
    assert linear.live_columns.tolist() == [True] * 3
    assert (linear.n_weights, linear.n_live_weights) == (6, 6)


def test_live_weights_are_those_in_live_rows_and_live_columns() -> None:
    weight = torch.ones(4, 5)
    linear = PrunedLinear.dense(weight, torch.ones(4)).restricted(
        torch.tensor([True, False, True, True]), torch.tensor([False, True, True, False, True])
    )
    assert linear.n_weights == 20
    assert linear.n_live_weights == 9 == int(linear.weight.count_nonzero())


def test_restriction_zeroes_what_goes_and_takes_the_bias_of_a_row_but_not_of_a_column() -> None:
    weight, bias = torch.arange(1.0, 7.0).reshape(2, 3), torch.tensor([7.0, 8.0])
    linear = PrunedLinear.dense(weight, bias).restricted(torch.tensor([False, True]), torch.tensor([True, True, False]))
    assert linear.weight.tolist() == [[0, 0, 0], [4, 5, 0]]
    assert linear.bias is not None
    assert linear.bias.tolist() == [0, 8]
    assert weight.tolist() == [[1, 2, 3], [4, 5, 6]], "the argument is left alone"


def test_the_bias_is_the_last_column_of_the_augmented_weight() -> None:
    weight, bias = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([5.0, 6.0])
    assert PrunedLinear.dense(weight, bias).augmented(torch.float64).tolist() == [[1, 2, 5], [3, 4, 6]]
    assert PrunedLinear.dense(weight, bias).augmented(torch.float64).dtype is torch.float64
    assert PrunedLinear.dense(weight, None).augmented(torch.float64).tolist() == [[1, 2], [3, 4]]
