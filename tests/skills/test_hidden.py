"""Hidden states and how far they are apart, by hand; in models test_ilora.py has them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hatcl.errors import SkillError
from hatcl.skills.hidden import hidden_states_of, masked_mse


class Gives(nn.Module):
    def __init__(self, **out):
        super().__init__()
        self.out = out

    def forward(self, **inputs):
        assert inputs["output_hidden_states"] and inputs["return_dict"]
        return SimpleNamespace(**self.out)


def test_the_error_is_the_mean_over_what_the_mask_leaves():
    a, b = torch.zeros(2, 3, 2), torch.tensor([[[1.0, 3.0]] * 3] * 2)
    b[:, 2] = 99.0
    mask = torch.tensor([[1, 1, 0]] * 2)
    assert float(masked_mse(a, b, mask)) == 5.0 and float(masked_mse(a, b, None)) > 5.0
    assert masked_mse(a.half(), b.half(), mask).dtype == torch.float32


@pytest.mark.parametrize(
    "shape, mask, text",
    [
        ((2, 4, 2), None, r"hidden states of \[2, 3, 2\] \(plastic\) and \[2, 4, 2\] \(stable\) differ"),
        ((2, 3, 2), torch.ones(2, 4), r"the mask is \[2, 4\], the hidden states are \[2, 3, 2\]"),
        ((2, 3, 2), torch.zeros(2, 3), "the batch has only padding"),
    ],
)
def test_what_cannot_be_compared(shape, mask, text):
    with pytest.raises(SkillError, match=text):
        masked_mse(torch.zeros(2, 3, 2), torch.zeros(shape), mask)


def test_an_encoder_alone_and_one_beside_a_decoder():
    x, mask, labels = torch.ones(1, 2, 1), torch.ones(1, 2), torch.tensor([[3, -100]])
    (one,) = hidden_states_of(Gives(hidden_states=(x,)), {"attention_mask": mask})
    assert one.states[0] is x and one.mask is mask
    both = Gives(encoder_hidden_states=(x,), decoder_hidden_states=(x,))
    encoder, decoder = hidden_states_of(both, {"attention_mask": mask, "labels": labels})
    assert encoder.mask is mask and decoder.mask.tolist() == [[True, False]]


def test_what_gives_no_hidden_states():
    with pytest.raises(SkillError, match="the batch is a Tensor, expected a mapping"):
        hidden_states_of(Gives(), torch.ones(1))
    with pytest.raises(SkillError, match="Gives returned no hidden_states; pass hidden_states="):
        hidden_states_of(Gives(), {})
