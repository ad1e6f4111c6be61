import torch

from cogx_fast.model.transformer import CogVideoXTransformer
from cogx_fast.weights.layout import by_our_name, our_shape, slots
from tests.cases import for_each
from tests.support import RELEASED, small, upstream

OPTIONS = [
    {},
    {"activation_fn": "swiglu"},
    {"norm_elementwise_affine": False, "attention_bias": False},
    {"patch_bias": False},
]


@for_each("options", OPTIONS, "name", RELEASED)
def test_slots_are_the_tensors_of_both_models(name, options):
    config = small(name, **options)
    layout = slots(config)
    expected = {key: tuple(value.shape) for key, value in upstream(config).state_dict().items()}
    assert list(layout) == list(expected)
    assert {key: slot.shape for key, slot in layout.items()} == expected

    ours = {key: tuple(value.shape) for key, value in CogVideoXTransformer(config).state_dict().items()}
    assert {key: our_shape(config, group) for key, group in by_our_name(layout).items()} == ours


@for_each("name", RELEASED)
def test_every_value_of_ours_is_in_exactly_one_slot(name):
    config = small(name)
    for group in by_our_name(slots(config)).values():
        ours = torch.zeros(our_shape(config, group))
        for slot in group:
            slot.view(ours).add_(1)
        assert torch.equal(ours, torch.ones_like(ours))


def test_rows_are_where_the_forward_reads_them():
    layout, dim = slots(small("5b")), small("5b").inner_dim
    assert layout["transformer_blocks.1.attn1.to_v.weight"].first_row == 2 * dim
    assert layout["transformer_blocks.1.norm2.linear.bias"].first_row == 18 * dim
    assert layout["transformer_blocks.1.norm2.linear.bias"].our_name == "modulation.linear.bias"
