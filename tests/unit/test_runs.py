"""A run's folder."""

from nvlm.runs.folder import weight_keys


def test_a_weight_without_a_copy_of_its_own_stands_under_its_fp32_one():
    moments = ["optimizer.state.exp_avg.a", "optimizer.state.exp_avg_sq.b"]
    keys = weight_keys(["a", "frozen", "optimizer.state.param.a", "optimizer.state.param.b", *moments])
    assert keys == {"a": "a", "frozen": "frozen", "b": "optimizer.state.param.b"}
