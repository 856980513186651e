"""Keys and values with room for more are those that transformers' own layers hold."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from vlmdiag.model.cache import ROOM, RoomyLayer, with_room


def states(seed, count, batch=2, grad=False):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, batch, 3, count, 4, generator=generator)
    return [part.clone().requires_grad_(grad) for part in drawn]


@pytest.mark.parametrize("counts", [[1] * (2 * ROOM + 3), [5, ROOM, 1, 3 * ROOM, 2], [ROOM, 1, 1]])
def test_what_is_held_is_what_a_plain_layer_holds(counts):
    plain = DynamicLayer()
    plain.update(*states(0, 7))
    roomy = RoomyLayer(plain.keys, plain.values)
    beginning = plain.keys.clone()
    for seed, count in enumerate(counts, 1):
        wanted = plain.update(*states(seed, count))
        for mine, other in zip(roomy.update(*states(seed, count)), wanted, strict=True):
            assert torch.equal(mine, other)
        assert roomy.get_seq_length() == plain.get_seq_length()
        assert roomy.get_mask_sizes(1) == plain.get_mask_sizes(1)
    assert torch.equal(plain.keys[:, :, :7], beginning)


def test_what_was_made_in_inference_mode_goes_on_outside_of_it():
    plain, roomy = DynamicLayer(), RoomyLayer(*states(0, 5))
    plain.update(*states(0, 5))
    with torch.inference_mode():
        roomy.update(*states(1, 2))
    plain.update(*states(1, 2))
    for seed in (2, 3):
        wanted = plain.update(*states(seed, 1))
        with torch.no_grad():
            found = roomy.update(*states(seed, 1))
        assert all(map(torch.equal, found, wanted))


def test_rows_that_share_a_beginning_do_not_write_into_it_nor_into_each_other():
    keys, values = states(0, 6, batch=1)
    before = keys.clone()
    first, second = (
        RoomyLayer(keys[:, :, :4].expand(3, -1, -1, -1), values[:, :, :4].expand(3, -1, -1, -1))
        for _ in range(2)
    )
    for seed in (1, 2):
        first.update(*states(seed, 1, batch=3))
    second.update(*states(3, 1, batch=3))
    # what goes on from the first one, while it goes on itself
    branch = RoomyLayer(first.keys[:, :, :5], first.values[:, :, :5])
    branch.update(*states(4, 1, batch=3))
    first.update(*states(5, 1, batch=3))
    assert torch.equal(keys, before)
    assert torch.equal(first.keys[:, :, 4:], torch.cat([states(n, 1, 3)[0] for n in (1, 2, 5)], 2))
    assert torch.equal(second.keys[:, :, 4], states(3, 1, 3)[0][:, :, 0])
    assert torch.equal(branch.keys[:, :, 5], states(4, 1, 3)[0][:, :, 0])


def test_a_layer_that_was_cropped_or_whose_rows_were_chosen_goes_on_from_what_is_left():
    plain, roomy = DynamicLayer(), RoomyLayer(*states(0, 5))
    plain.update(*states(0, 5))
    for layer in (plain, roomy):
        layer.update(*states(1, 4))
        layer.crop(-3)
        layer.update(*states(2, 2))
        layer.batch_select_indices(torch.tensor([1, 0, 1]))
        layer.update(*states(3, 1, batch=3))
    assert torch.equal(roomy.keys, plain.keys) and torch.equal(roomy.values, plain.values)


def test_gradients_pass_through_what_was_appended():
    leaves = []
    for layer in (DynamicLayer(), RoomyLayer(*(part[:, :, :0] for part in states(0, 1)))):
        leaf = states(1, 3, grad=True)
        layer.update(*leaf)
        keys, values = layer.update(*states(2, 2))
        (keys.sin() * values.cos()).sum().backward()
        leaves.append(leaf)
    for mine, other in zip(*leaves, strict=True):
        assert torch.equal(mine.grad, other.grad)


def test_windows_and_caches_of_other_kinds_stay_as_they_are():
    cache = DynamicCache()
    cache.layers = [DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=4), DynamicLayer()]
    for layer in cache.layers[:2]:
        layer.update(*states(0, 6))
    kinds = [RoomyLayer, DynamicSlidingWindowLayer, DynamicLayer]  # the last one holds nothing yet
    assert [type(layer) for layer in with_room(cache).layers] == kinds
    other = StaticCache(LlamaConfig(num_hidden_layers=2), max_cache_len=8)
    assert with_room(other) is other and type(other.layers[0]) is StaticLayer
