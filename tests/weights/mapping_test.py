"""Names and shapes of other networks' tensors, as real files have them."""

import numpy as np
import pytest

from bn_jax.errors import ConfigError
from bn_jax.weights import mapping


def nothing_ignored(name):
    return False


@pytest.mark.parametrize("shape", [(1, 64), (64, 1, 1), (1, 64, 1, 1), (64,)])
def test_axes_of_length_1_do_not_count(shape):
    values = np.arange(64, dtype=np.float32)
    source = mapping.Source({"bn.weight": values.reshape(shape)})
    np.testing.assert_array_equal(source.take("bn.weight", (64,)), values)
    source.finish(nothing_ignored)


def test_another_order_of_axes_is_refused():
    source = mapping.Source({"w": np.ones((3, 4))})
    source.take("w", (4, 3))
    with pytest.raises(ConfigError, match=r"1 wrong: w has shape \[3, 4\], not \[4, 3\]"):
        source.finish(nothing_ignored)


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "model.module."])
def test_a_common_prefix_is_taken_off(prefix):
    tensors = {f"{prefix}a": np.ones(2), f"{prefix}b.weight": np.ones(3)}
    assert mapping.common_prefix(tensors) == prefix
    source = mapping.Source(tensors)
    source.take("a", (2,))
    source.take("b.weight", (3,))
    source.finish(nothing_ignored)


def test_a_prefix_that_one_name_lacks_stays():
    assert mapping.common_prefix({"module.a": 0, "b": 0}) == ""
    assert mapping.common_prefix({}) == ""


def test_a_message_names_the_first_few_and_how_many():
    source = mapping.Source({"a": np.ones(1)})
    source.take("a", (1,))
    for k in range(276):
        source.take(f"layer_{k}", (1,))
    with pytest.raises(ConfigError) as error:
        source.finish(nothing_ignored)
    text = str(error.value)
    assert "276 missing: layer_0, layer_1, layer_2, layer_3, layer_4 and 271 more" in text
    assert len(text) < 200


def test_another_network_is_refused_with_names_of_both():
    source = mapping.Source({f"stage_{k}": np.ones(1) for k in range(9)})
    source.take("conv1_7x7_s2.weight", (1,))
    with pytest.raises(ConfigError, match="none of the network's 1 tensors, such as conv1_7x7_s2"):
        source.finish(nothing_ignored)
    with pytest.raises(ConfigError, match=r"It has 9: stage_0.* and 4 more\. .*--variant"):
        source.finish(nothing_ignored)


def test_googlenet_is_refused_by_name():
    with pytest.raises(ConfigError, match="GoogLeNet of torchvision or timm"):
        mapping.Source({"inception3a.branch1.conv.weight": np.ones((64, 192, 1, 1))})


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "state_dict.model."])
def test_prefixes_of_compiled_and_saved_modules_are_taken_off(prefix):
    """torch.compile, and a checkpoint that was flattened as a whole. (Refused, with the advice to
    try another --variant.)"""
    source = mapping.Source({f"{prefix}a": np.ones(2), f"{prefix}b": np.ones(2)})
    np.testing.assert_array_equal(source.take("a", (2,)), np.ones(2))


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, bool])
def test_quantized_weights_are_refused(dtype):
    """(They were taken for the weights themselves: a network of whole numbers, without a word.)"""
    source = mapping.Source({"a.weight": np.ones((4, 3), dtype), "a.bias": np.ones(4)})
    source.take("a.weight", (4, 3))
    source.take("a.bias", (4,))
    with pytest.raises(ConfigError, match=f"1 wrong: a.weight has dtype {np.dtype(dtype)}: it is"):
        source.finish(nothing_ignored)


@pytest.mark.parametrize("value", [-1e-3, np.nan, np.inf])
def test_variances_that_are_none_are_refused(value):
    source = mapping.Source({"bn.running_var": np.array([1.0, value])})
    source.take("bn.running_var", (2,))
    with pytest.raises(ConfigError, match="running_var has values that are not finite, or var"):
        source.finish(nothing_ignored)
